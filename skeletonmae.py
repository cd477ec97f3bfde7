"""SkeletonMAE: Graph-based Masked Autoencoder for Skeleton Sequence Pre-training (Yan et al., ICCV
2023, arXiv 2307.08476). An independent implementation: the authors' code was never released. This
file needs nothing but torch, and works copied alone into another project:

    model = SkeletonMAE(SKELETONS["coco17"], channels=2)
    model.mean.copy_(mean)                       # of each joint over the training set, (V, C)
    model.spread.copy_(spread)                   # root mean square distance from it, (V,)
    loss, prediction, mask = model(x)            # x (N, M, T, V, C), pre-training
    classifier = SkeletonClassifier(SKELETONS["coco17"], 2, classes=60, persons=2, frames=64)
    classifier.load_pretrained(model.state_dict())
    logits = classifier(x)                       # (N, classes), fine-tuning; x of 64 frames

"S" marks the paper's supplement. Where neither says how, docs/choices.md says what was chosen.

Shape legend
    N sequences, M persons a sequence (1 or 2), T frames, V joints, C coordinates (2 or 3)
    P persons present in the whole batch, P <= N M: absent ones are packed away and cost nothing
    D embedding width (64), H encoder width (128), K classes; T / stride is rounded up
Inside, joints come first, (V, P, T, D): the aggregation A X of S Eq. 1 is then one matrix product
without a copy. A mask is True where a joint is masked (hidden from the encoder).
"""
import warnings
from functools import reduce

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # before torch, which warns
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# --------------------------------------------------------------------------------------- skeletons
def make_skeleton(joints, edges, parts, centre, pairs=None):
    """One skeleton layout as plain data, your own too: make_skeleton(**json.load(file)). joints: V
    names, as a list or one string; edges: (joint, joint) index pairs, without self-loops; parts:
    body part name -> joint indices; centre: the joints whose mean is the origin, the first of them
    the root of the bones; pairs: (left, right) indices that a mirror swaps, by default read off
    names "left_x" and "right_x". Raises ValueError."""
    names = joints.split() if isinstance(joints, str) else list(joints)
    if pairs is None:
        pairs = [(i, names.index(f"right_{name[5:]}")) for i, name in enumerate(names)
                 if name.startswith("left_") and f"right_{name[5:]}" in names]
    centre = [centre] if isinstance(centre, int) else list(centre)
    edges = [[i, j] for i, j in edges]
    pairs = [[left, right] for left, right in pairs]
    repeats = any(len(set(group)) < len(group) for group in (names, sum(pairs, []), *edges))
    inside = all(type(j) is int and j in range(len(names))
                 for group in (*edges, *parts.values(), *pairs, centre) for j in group)
    if repeats or not inside or not parts or not all(parts.values()) or not centre:
        raise ValueError(f"expected {len(names)} different names, indices 0 to {len(names) - 1}, "
                         "edges and pairs of two joints, no joint in two pairs, no empty part")
    return {"joints": names, "edges": edges, "pairs": pairs, "centre": centre,
            "parts": {name: list(part) for name, part in parts.items()}}

def built_in(joints, chains, parts, centre):
    """A layout of chains of bones, "0 1 3, 0 2 4", and of the body parts V0 to V5 (paper 3.1.2)."""
    chains, parts = ([[int(joint) for joint in group.split()] for group in text.split(",")]
                     for text in (chains, parts))
    edges = [edge for chain in chains for edge in zip(chain, chain[1:])]
    names = "head", "torso", "left_arm", "right_arm", "left_leg", "right_leg"
    return make_skeleton(joints, edges, dict(zip(names, parts)), centre)

SKELETONS = {
    "coco17": built_in(  # 2D poses of HRNet: NTU RGB+D, FineGym, Diving48
        "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow "
        "right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle "
        "right_ankle", "0 1 3, 0 2 4, 0 5 7 9, 0 6 8 10, 5 11 13 15, 6 12 14 16",
        "0 1 2 3 4, 5 6 11 12, 7 9, 8 10, 13 15, 14 16", centre=[11, 12]),
    "ntu25": built_in(  # Kinect v2: NTU RGB+D in 3D
        "spine_base spine_middle neck head left_shoulder left_elbow left_wrist left_hand "
        "right_shoulder right_elbow right_wrist right_hand left_hip left_knee left_ankle "
        "left_foot right_hip right_knee right_ankle right_foot spine_shoulder left_hand_tip "
        "left_thumb right_hand_tip right_thumb",
        "0 1 20 2 3, 20 4 5 6 7 21, 20 8 9 10 11 23, 0 12 13 14 15, 0 16 17 18 19, 7 22, 11 24",
        "2 3, 0 1 4 8 12 16 20, 5 6 7 21 22, 9 10 11 23 24, 13 14 15, 17 18 19", centre=1),
    "kinect20": built_in(  # Kinect v1: Northwestern-UCLA, MSRC-12
        "hip_centre spine shoulder_centre head left_shoulder left_elbow left_wrist left_hand "
        "right_shoulder right_elbow right_wrist right_hand left_hip left_knee left_ankle "
        "left_foot right_hip right_knee right_ankle right_foot",
        "0 1 2 3, 2 4 5 6 7, 2 8 9 10 11, 0 12 13 14 15, 0 16 17 18 19",
        "3, 0 1 2 4 8 12 16, 5 6 7, 9 10 11, 13 14 15, 17 18 19", centre=1),
    "sbu15": built_in(  # SBU Kinect Interaction
        "head neck torso left_shoulder left_elbow left_hand right_shoulder right_elbow right_hand "
        "left_hip left_knee left_foot right_hip right_knee right_foot",
        "0 1 2 9 10 11, 1 3 4 5, 1 6 7 8, 2 12 13 14",
        "0 1, 2 3 6 9 12, 4 5, 7 8, 10 11, 13 14", centre=2),
    "penn13": built_in(  # Penn Action
        "head left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist left_hip "
        "right_hip left_knee right_knee left_ankle right_ankle",
        "0 1 3 5, 0 2 4 6, 1 7 9 11, 2 8 10 12",
        "0, 1 2 7 8, 3 5, 4 6, 9 11, 10 12", centre=[7, 8]),
    "mediapipe33": built_in(  # MediaPipe's and BlazePose's landmarks
        "nose left_eye_inner left_eye left_eye_outer right_eye_inner right_eye right_eye_outer "
        "left_ear right_ear left_mouth right_mouth left_shoulder right_shoulder left_elbow "
        "right_elbow left_wrist right_wrist left_pinky right_pinky left_index right_index "
        "left_thumb right_thumb left_hip right_hip left_knee right_knee left_ankle right_ankle "
        "left_heel right_heel left_foot_index right_foot_index",
        "0 1 2 3 7, 0 4 5 6 8, 0 9, 0 10, 0 11 13 15 17, 0 12 14 16 18, 15 19, 15 21, 16 20, "
        "16 22, 11 23 25 27 29 31, 12 24 26 28 30 32",
        "0 1 2 3 4 5 6 7 8 9 10, 11 12 23 24, 13 15 17 19 21, 14 16 18 20 22, 25 27 29 31, "
        "26 28 30 32", centre=[23, 24]),
    "body25": built_in(  # OpenPose's BODY_25
        "nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist "
        "hip_centre right_hip right_knee right_ankle left_hip left_knee left_ankle right_eye "
        "left_eye right_ear left_ear left_big_toe left_small_toe left_heel right_big_toe "
        "right_small_toe right_heel",
        "8 1 0, 1 2 3 4, 1 5 6 7, 8 9 10 11 22 23, 8 12 13 14 19 20, 11 24, 14 21, 0 15 17, "
        "0 16 18",
        "0 15 16 17 18, 1 2 5 8 9 12, 6 7, 3 4, 13 14 19 20 21, 10 11 22 23 24", centre=8),
    "smpl22": built_in(  # the body of SMPL and SMPL-X without hands: AMASS, HumanML3D, BABEL
        "pelvis left_hip right_hip spine1 left_knee right_knee spine2 left_ankle right_ankle "
        "spine3 left_foot right_foot neck left_collar right_collar head left_shoulder "
        "right_shoulder left_elbow right_elbow left_wrist right_wrist",
        "0 1 4 7 10, 0 2 5 8 11, 0 3 6 9 12 15, 9 13 16 18 20, 9 14 17 19 21",
        "12 15, 0 1 2 3 6 9 13 14 16 17, 18 20, 19 21, 4 7 10, 5 8 11", centre=0),
    "h36m17": built_in(  # Human3.6M, as 2D-to-3D lifting has it
        "hip_centre right_hip right_knee right_ankle left_hip left_knee left_ankle spine thorax "
        "nose head left_shoulder left_elbow left_wrist right_shoulder right_elbow right_wrist",
        "0 1 2 3, 0 4 5 6, 0 7 8 9 10, 8 11 12 13, 8 14 15 16",
        "9 10, 0 1 4 7 8 11 14, 12 13, 15 16, 5 6, 2 3", centre=0),
    "openpose18": built_in(  # Kinetics-Skeleton
        "nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist "
        "right_hip right_knee right_ankle left_hip left_knee left_ankle right_eye left_eye "
        "right_ear left_ear", "0 1 2 3 4, 1 5 6 7, 2 8 9 10, 5 11 12 13, 0 14 16, 0 15 17",
        "0 14 15 16 17, 1 2 5 8 11, 6 7, 3 4, 12 13, 9 10", centre=[8, 11]),
}

def normalized_adjacency(skeleton):
    """D^-1/2 (A + I) D^-1/2 of S Eq. 1, (V, V), with D the degrees of A + I."""
    adjacency = torch.eye(len(skeleton["joints"]))
    for i, j in skeleton["edges"]:
        adjacency[i, j] = adjacency[j, i] = 1
    inverse_root = adjacency.sum(1).rsqrt()
    return inverse_root[:, None] * adjacency * inverse_root

def bone_parents(skeleton):
    """The parent of every joint in the tree of bones, (V,), breadth first; without one, itself."""
    parents = list(range(len(skeleton["joints"])))
    queue = skeleton["centre"][:1]
    for joint in queue:  # grows on the way
        for i, j in skeleton["edges"]:
            other = i + j - joint
            if joint in (i, j) and other not in queue:
                parents[other] = joint
                queue.append(other)
    return parents

# ------------------------------------------------------------------------------------ graph layers
class BatchNorm(nn.BatchNorm1d):
    """Batch norm over all leading dimensions of (..., D)."""
    def forward(self, h):
        return super().forward(h.flatten(0, -2)).view(h.shape)

class PReLU(nn.PReLU):
    """max(x, 0) + a min(x, 0), one learnable slope a. torch's own backward is slow on a CPU."""
    def forward(self, x):
        slope = self.weight.to(x.dtype)
        return F.prelu(x, slope) if x.is_cuda else torch.lerp(x, F.relu(x), 1 - slope)

class GraphConvolution(nn.Module):
    """S Eq. 1 and batch norm: PReLU(BN(D^-1/2 (A+I) D^-1/2 H W)). (V, ..., in) -> (V, ..., out)."""
    def __init__(self, adjacency, width_in, width_out):
        super().__init__()
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.linear = nn.Linear(width_in, width_out, bias=False)
        self.norm = BatchNorm(width_out)
        self.activation = PReLU()

    def forward(self, h):
        h = (self.adjacency @ h.flatten(1)).view(h.shape)  # A H: (V, V) x (V, ...)
        return self.activation(self.norm(self.linear(h)))

class GraphEncoder(nn.Module):
    """G_E: L_D graph layers after input feature dropout (S A: 0.2), drawn once for all frames of a
    person. Shape: (V, P, T, D) -> (V, P, T, H)."""
    def __init__(self, adjacency, width, hidden, layers=3, dropout=0.2):
        super().__init__()
        self.layers = nn.Sequential(*(GraphConvolution(adjacency, hidden if i else width, hidden)
                                      for i in range(layers)))
        self.dropout = dropout

    def forward(self, h):
        if self.training and self.dropout:
            h = h * F.dropout(torch.ones_like(h[:, :, :1]), self.dropout)
        return self.layers(h)

# --------------------------------------------------------------------- attention, temporal pooling
class AttentionBlock(nn.Module):
    """Multi-head self-attention over the T frames of each person, softmax(Q K^T / sqrt(d)) V, and
    feed-forward, each pre-norm with its residual; dropout 0.1 (S A) in both.
    Shape: (P, T, H) -> (P, T, H)."""
    def __init__(self, width, heads=4, dropout=0.1):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} attention heads do not divide a width of {width}")
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
            nn.Linear(4 * width, width), nn.Dropout(dropout))

    def forward(self, g):
        split = self.query_key_value(self.norm(g)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # (P, heads, T, d) each
        attended = F.scaled_dot_product_attention(query, key, value,
                                                  dropout_p=self.dropout * self.training)
        g = g + self.project(attended.transpose(1, 2).flatten(2))
        return g + self.feed_forward(g)

def three_frames(x, dilation, stride):
    """The frame `dilation` before, itself and the one after, for every stride-th frame:
    (..., T, D) -> three (..., ceil(T / stride), D), zero beyond the ends."""
    T = x.shape[-2]
    x = F.pad(x, (0, 0, dilation, dilation))
    return [x[..., first:first + T:stride, :] for first in (0, dilation, 2 * dilation)]

class TemporalPooling(nn.Module):
    """Multi-scale temporal pooling in four branches like the dilated multi-branch temporal
    convolution of CTR-GCN, whose kernels take 5 frames where these take 3. A convolution over
    frames is one matrix product: cuDNN would plan anew for every number of persons.
    Shape: (V, P, T, D) -> (V, P, ceil(T / stride), D)."""
    def __init__(self, width, stride):
        super().__init__()
        if width % 4:
            raise ValueError(f"a width of {width} does not divide into four branches")
        branch = width // 4
        self.stride = stride
        self.reduce = nn.Linear(width, width, bias=False)
        self.reduce_norm = BatchNorm(width)
        self.near = nn.Linear(3 * branch, branch, bias=False)
        self.far = nn.Linear(3 * branch, branch, bias=False)
        self.norm = BatchNorm(width)

    def forward(self, h):
        near, far, largest, same = F.relu_(self.reduce_norm(self.reduce(h))).chunk(4, -1)
        near = self.near(torch.cat(three_frames(near, 1, self.stride), -1))
        far = self.far(torch.cat(three_frames(far, 2, self.stride), -1))
        largest = reduce(torch.maximum, three_frames(largest, 1, self.stride))
        same = same[:, :, ::self.stride]
        x = torch.cat([near, far, largest, same], -1)  # (V, P, T / stride, D)
        return F.relu_(self.norm(x) + h[:, :, ::self.stride])

# ----------------------------------------------------------------------------------------- persons
def pool_person(h):
    """Mean over joints, then mean and maximum over frames: (V, P, T, D) -> (P, 2 D)."""
    h = h.mean(0)
    return torch.cat([h.mean(1), h.amax(1)], -1)

class Packing:
    """Which persons are present, and where they stand once the absent ones are packed away.
    present: bool (N, M), on the CPU, at least one person a sequence."""
    def __init__(self, present, device):
        if not present.any(1).all():
            raise ValueError("a sequence of the batch has no person present")
        self.persons = present.shape[1]
        rows = present.flatten().nonzero()[:, 0]
        sequence, person = rows // self.persons, rows % self.persons
        has_partner = (present.sum(1) == 2)[sequence]
        partner = (torch.arange(len(rows)) + 1 - 2 * person) * has_partner  # next or last

        tensors = rows, sequence, partner, has_partner, present.sum(1).float()
        self.tensors = [x.to(device, non_blocking=True) for x in tensors]
        # (P,) each: place in N M, place in N, the other's place in P or 0, bool; (N,): persons
        self.rows, self.sequence, self.partner, self.has_partner, self.count = self.tensors

    def pack(self, x):
        """(N, M, T, V, C) -> (V, P, T, C)."""
        return x.flatten(0, 1)[self.rows].permute(2, 0, 1, 3).contiguous()

    def unpack(self, h):
        """(V, P, T, C) -> (N, M, T, V, C), absent persons zero."""
        h = h.permute(1, 2, 0, 3)
        x = h.new_zeros(len(self.count) * self.persons, *h.shape[1:]).index_copy(0, self.rows, h)
        return x.unflatten(0, (-1, self.persons))

    def other(self, h):
        """What belongs to the other person, (V, P, T, D) -> the same shape, zero without one."""
        return h.index_select(1, self.partner) * self.has_partner[:, None, None]

    def pool(self, h):
        """pool_person, then mean over the persons present: (V, P, T, D) -> (N, 2 D)."""
        h = pool_person(h)
        total = h.new_zeros(len(self.count), h.shape[1]).index_add(0, self.sequence, h)
        return total / self.count[:, None].to(h.dtype)

# --------------------------------------------------------------------------------- joint embedding
class JointEmbedding(nn.Module):
    """Paper 3.1.1: a joint's coordinates, mapped linearly to D features, plus a learnable embedding
    of which joint it is. Input streams: coordinates, motion (x[t + 1] - x[t], zero in the last
    frame), bones (x - x of the parent joint); each is batch-normalised per joint and coordinate. A
    masked joint's features are replaced by the mask token, and a bone from a masked parent is
    zeroed: it would leak the parent's position. Both happen after the norm, whose statistics
    include masked joints.
    Shape: (V, P, T, C) and a mask (V, P) or None -> (V, P, T, D)."""
    def __init__(self, skeleton, channels, width, motion=False, bone=False):
        super().__init__()
        V = len(skeleton["joints"])
        self.channels = channels
        streams = ["position"] + ["motion"] * motion + ["bone"] * bone
        self.norms = nn.ModuleDict({name: BatchNorm(V * channels) for name in streams})
        self.linear = nn.Linear(len(streams) * channels, width)
        self.joint = nn.Parameter(0.02 * torch.randn(V, width))
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.register_buffer("parents", torch.tensor(bone_parents(skeleton)), persistent=False)

    def forward(self, x, mask=None):
        x = x.to(self.joint.dtype)
        streams = []
        for name, norm in self.norms.items():
            stream = x
            if name == "motion":
                stream = F.pad(x.diff(dim=2), (0, 0, 0, 1))
            elif name == "bone":
                stream = x - x[self.parents]
            stream = norm(stream.permute(1, 2, 0, 3).flatten(2))  # (P, T, V C): per joint, axis
            stream = stream.unflatten(2, (len(x), -1)).permute(2, 0, 1, 3)
            if mask is not None and name == "bone":
                stream = stream.masked_fill(mask[self.parents][..., None, None], 0)
            streams.append(stream)
        h = self.linear(torch.cat(streams, -1))
        if mask is not None:
            h = torch.where(mask[..., None, None], self.mask_token.to(h.dtype), h)
        return h + self.joint[:, None, None]

def packing_of(x, embedding: JointEmbedding, present: Tensor | Packing | None,
               persons=None) -> Packing:
    """Checks x, and returns the Packing of the batch. present: a Packing, bool (N, M), or None: the
    persons who are not all zero. One clear ValueError instead of an error ten layers down."""
    joints, channels = len(embedding.joint), embedding.channels
    expected = f"expected a tensor of skeletons (N, {persons or '1 or 2'}, T, {joints}, {channels})"
    if (not isinstance(x, Tensor) or x.dim() != 5 or x.shape[3:] != (joints, channels)
            or x.shape[1] not in ((1, 2) if persons is None else (persons,))):
        raise ValueError(f"{expected}, got {type(x).__name__} {tuple(getattr(x, 'shape', ()))}")
    if isinstance(present, Packing):
        return present
    if present is None:
        present = x.flatten(2).any(2)
        if not x.isfinite().all():
            raise ValueError(f"{expected} of finite numbers")
    if present.shape != x.shape[:2] or present.dtype != torch.bool:
        raise ValueError(f"expected present as bool (N, M), got {present.dtype} {present.shape}")
    return Packing(present.cpu(), x.device)

# ------------------------------------------------------------------------------------ pre-training
def draw_mask(num, skeleton, mask_parts=("right_arm", "right_leg"), mask_num_parts=0,
              mask_ratio=0.0, generator=None):
    """Masks of `num` sequences, bool (num, V): True is masked, in all frames. Three strategies
    (paper 3.1.2 and Table 5b, S Table 2): `mask_ratio` > 0 masks that share of the joints, drawn
    for each sequence; else `mask_num_parts` > 0 as many whole body parts, drawn for each sequence;
    else the named `mask_parts` are masked. Never all joints and never none: ValueError."""
    V, known = len(skeleton["joints"]), skeleton["parts"]
    members = torch.tensor([[j in part for j in range(V)] for part in known.values()])  # (parts, V)
    if mask_ratio:
        mask = torch.rand(num, V, generator=generator).argsort(1) < round(mask_ratio * V)
    elif mask_num_parts:
        if not 0 < mask_num_parts <= len(known):
            raise ValueError(f"cannot mask {mask_num_parts} of {len(known)} body parts")
        order = torch.rand(num, len(known), generator=generator).argsort(1)
        mask = members[order[:, :mask_num_parts]].any(1)
    elif known.keys() >= set(mask_parts):
        mask = members[[name in mask_parts for name in known]].any(0).expand(num, -1)
    else:
        raise ValueError(f"no body parts {', '.join(mask_parts)}; this skeleton has "
                         f"{', '.join(known)}: set mask_parts, mask_num_parts or mask_ratio")
    hidden = mask.sum(1)
    if not ((0 < hidden) & (hidden < V)).all():
        raise ValueError(f"a mask of {int(hidden.max())} of {V} joints; expected one at least and "
                         "not all: set mask_parts, mask_num_parts or mask_ratio")
    return mask

def selected_mean(error, selected):
    """Mean of the errors where selected, 0 where none is. Both of one shape."""
    return (error * selected).sum() / selected.sum().clamp(min=1)

def reweighted_cosine_error(prediction, target, selected, beta=2.0):
    """Paper Eq. 2: mean over the selected (masked) joints of (1 - cos(prediction, target))^beta.
    prediction, target: (..., C + 1); selected: bool (...). An all-zero vector has cosine 0."""
    cosine = F.cosine_similarity(prediction, target, dim=-1)
    return selected_mean((1 - cosine).clamp(min=0) ** beta, selected)

LAGS = (1, 2, 4, 8)  # frames

def displacement(x, seen):
    """How far each joint moves, whenever it does (ours): the logarithm of the root mean square
    change of each coordinate within 1, 2, 4 and 8 frames, at most T - 1, over the frames with the
    joint seen at both ends. x: (V, P, T, C), seen: bool (V, P, T). Returns (V, P, 4 C), and bool
    of the same shape, False where there are no such frames."""
    values, counted = [], []
    for lag in LAGS:
        pairs = max(x.shape[2] - lag, 1)  # of frames `lag` apart
        both = seen[:, :, :pairs] & seen[:, :, -pairs:]
        count = both.sum(2, keepdim=True)
        square = (x[:, :, -pairs:] - x[:, :, :pairs]).square() * both[..., None]
        values.append((square.sum(2) / count.clamp(min=1) + 1e-4).sqrt().log())  # 0.01 at least
        counted.append((count > 0).expand_as(values[-1]))
    return torch.cat(values, -1), torch.cat(counted, -1)

class SequenceDecoder(nn.Module):
    """Ours, not the paper's: every joint of every frame from a person's pooled features alone, so
    that what the classifier reads must tell the whole movement. Joint and frame are learnable
    queries, added to the features; an MLP and one graph layer follow. stack: the STRLStack.
    Shape: (V, P, T / stride, D) -> the same."""
    def __init__(self, adjacency, width, stack):
        super().__init__()
        frames, inner = len(stack.position[::stack.stride]), 2 * width
        self.pooled = nn.Linear(2 * width, inner)
        self.joint = nn.Parameter(0.5 * torch.randn(len(adjacency), 1, 1, inner))
        self.frame = nn.Parameter(0.5 * torch.randn(frames, inner))
        self.mlp = nn.Sequential(nn.ReLU(), nn.Linear(inner, inner), nn.ReLU(),
                                 nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, width))
        self.graph = GraphConvolution(adjacency, width, width)

    def forward(self, encoded):
        query = self.joint + self.frame
        return self.graph(self.mlp(self.pooled(pool_person(encoded))[:, None] + query))

class SkeletonMAE(nn.Module):
    """The graph masked autoencoder (paper 3.1) with the layers of S Eq. 1. skeleton: an entry of
    SKELETONS or your own; channels: C; motion, bone: further input streams; masking: mask_parts,
    mask_num_parts or mask_ratio of draw_mask. The target of a masked joint j is
    ((x - mean_j) / spread_j, 1), homogeneous coordinates: a zero error means the right position
    (docs/choices.md). The buffers `mean` (V, C) and `spread` (V,) are each joint's mean over the
    training set and its root mean square distance from it, in the units of the target.

    strl (ours, not the paper's): arguments of STRLStack, whose layers are then pre-trained in the
    encoder's place, by a SequenceDecoder and the `displacement` of all seen joints; the scripts
    then give the pose as target, Batch.target."""
    def __init__(self, skeleton, channels, width=64, hidden=128, layers=3, dropout=0.2, beta=2.0,
                 motion=False, bone=False, strl=None, **masking):
        super().__init__()
        self.skeleton, self.channels, self.beta = skeleton, channels, beta
        self.masking = masking
        self.draw(1, torch.Generator())  # refuses early
        adjacency = normalized_adjacency(skeleton)
        self.register_buffer("mean", torch.zeros(len(adjacency), channels))
        self.register_buffer("spread", torch.ones(len(adjacency)))
        self.embedding = JointEmbedding(skeleton, channels, width, motion, bone)
        self.stacked = strl is not None
        if self.stacked:
            graph = dict(layers=layers, dropout=dropout)
            self.encoder = STRLStack(adjacency, width, hidden, **graph, **strl)
            self.decoder = SequenceDecoder(adjacency, width, self.encoder)
            self.head = nn.Linear(width, self.encoder.stride * channels)
            self.displacement = nn.Linear(2 * width, self.mean.numel() * len(LAGS))
        else:
            self.encoder = GraphEncoder(adjacency, width, hidden, layers, dropout)
            self.decoder = GraphConvolution(adjacency, hidden, width)
            self.head = nn.Linear(width, channels + 1)
        self.features_width = width if self.stacked else hidden

    def draw(self, num, generator=None):
        """Masks of `num` sequences, bool (num, V): True is masked."""
        return draw_mask(num, self.skeleton, **self.masking, generator=generator)

    def encode(self, packed, packing: Packing, masked=None):
        """Packed joints (V, P, T, C), masks (V, P) -> (V, P, T / stride, H or D)."""
        h = self.embedding(packed, masked)
        return self.encoder(h, packing) if self.stacked else self.encoder(h)

    def decode(self, encoded, frames):
        """Features of the encoder -> homogeneous coordinates (V, P, T, C + 1), as the target has
        them, by one graph layer (paper 3.1.1). With STRL layers a SequenceDecoder does, an encoded
        frame holds `stride` frames, and coordinate C + 1 is 1."""
        prediction = self.head(self.decoder(encoded)).float()
        if not self.stacked:
            return prediction
        prediction = prediction.unflatten(-1, (-1, self.channels)).flatten(2, 3)[:, :, :frames]
        return F.pad(prediction, (0, 1), value=1.0)

    def loss(self, prediction, encoded, target, selected):
        """Mean error of the selected joints. prediction: (V, P, T, C + 1); encoded: what it was
        decoded from; target: (V, P, T, C); selected: bool (V, P, T). Of STRL layers, in units of
        the target: the squared error of each joint's path about its mean over frames, + 0.1 x that
        of the mean, + 0.1 x that of `displacement`."""
        mean, spread = self.mean[:, None, None], self.spread[:, None, None, None]
        if not self.stacked:
            whitened = F.pad((target - mean) / spread, (0, 1), value=1.0)
            return reweighted_cosine_error(prediction, whitened, selected, self.beta)
        error = (mean + spread * prediction[..., :-1] - target) * selected[..., None]
        frames = selected.sum(2, keepdim=True).clamp(min=1)
        still = error.sum(2, keepdim=True) / frames[..., None]  # (V, P, 1, C)
        square = (error - still).square() + 0.1 * still.square()
        moved, counted = displacement(target, selected)
        guess = self.displacement(pool_person(encoded)).float()
        guess = guess.unflatten(-1, (len(mean), -1)).transpose(0, 1)  # (V, P, 4 C)
        return (selected_mean(square.sum(-1), selected)
                + 0.1 * selected_mean((guess - moved).square(), counted))

    def forward(self, x, present=None, mask=None, seen=None, target=None):
        """x: (N, M, T, V, C); present: bool (N, M) on the CPU or a Packing, by default the persons
        who are not all zero; mask: bool (N, V), True is masked, in all frames, drawn where not
        given; seen: bool (N, M, T, V), the joints that count in the loss, by default those of the
        persons who are not all zero in a frame; target: what to put back, by default x.
        Returns (loss, prediction, mask): a scalar; homogeneous coordinates (N, M, T, V, C + 1), as
        the target has them, float32, zero for absent persons; the mask (N, V)."""
        packing = packing_of(x, self.embedding, present)
        N, _, T = x.shape[:3]
        if seen is None:
            seen = x.any(-1).any(3, keepdim=True).expand(x.shape[:4])
        mask = (self.draw(N) if mask is None else mask).to(x.device, non_blocking=True)
        packed = packing.pack(x)            # (V, P, T, C)
        masked = mask[packing.sequence].T   # (V, P)
        encoded = self.encode(packed, packing, masked)
        prediction = self.decode(encoded, T)
        selected = packing.pack(seen[..., None])[..., 0]
        if not self.stacked:
            selected = selected & masked[..., None]
        target = packed if target is None else packing.pack(target)
        loss = self.loss(prediction, encoded, target, selected)
        return loss, packing.unpack(prediction), mask

    def features(self, x, present=None):
        """Features of unmasked skeletons, (N, M, T / stride, V, H or D), absent persons zero."""
        packing = packing_of(x, self.embedding, present)
        return packing.unpack(self.encode(packing.pack(x), packing))

    @torch.no_grad()
    def reconstruct(self, x, present=None, mask=None, target=None):
        """Puts the masked joints back (call eval() first): a prediction (p, w) of joint j stands
        for the position mean_j + spread_j p / max(w, 0.01). target: see forward. Returns
        (coordinates (N, M, T, V, C) in the units of the target, whose visible joints stay, absent
        persons zero; the mask (N, V))."""
        C, packing = self.channels, packing_of(x, self.embedding, present)
        _, prediction, mask = self(x, packing, mask)
        whitened = prediction[..., :C] / prediction[..., C:].clamp(min=1e-2)
        position = self.mean + self.spread[:, None] * whitened
        visible = x if target is None else target
        joints = torch.where(mask[:, None, None, :, None], position, visible)
        return packing.unpack(packing.pack(joints)), mask  # packing leaves absent persons zero

# ------------------------------------------------------------------------------------- fine-tuning
def concat_linear(g, h, weight):
    """Concat(Repeat(g; V), h) W of paper Eq. 3 and 4 without the repeated tensor: g W_g, broadcast
    over joints, + h W_h. g: (P, T, H), h: (V, P, T, D), weight: (out, H + D) -> (V, P, T, out)."""
    H = g.shape[-1]
    return F.linear(h, weight[:, H:]) + F.linear(g, weight[:, :H])

class STRL(nn.Module):
    """One spatial-temporal representation learning layer (paper 3.2, S D) with its own encoder.
    Paper Eq. 3: SM(H) = Concat(Repeat(SumPool_joints(G_E(H)); V), H), with attention over the frame
    tokens before Repeat. S Eq. 2 and paper Eq. 4: H'_p = ReLU(BN(W_own SM(H_p^l) + W_other
    SM(H_q^(l-1))) + residual), q the other person; without q the W_other term is exactly 0, and
    with one person a sequence there is no W_other. Then multi-scale temporal pooling. drop_path
    (not the paper's; stochastic depth, Huang et al. 2016): the share of persons who in training
    pass by the residual alone."""
    def __init__(self, adjacency, width, hidden, persons, stride, layers=3, blocks=2, heads=4,
                 dropout=0.2, attention_dropout=0.1, drop_path=0.0):
        super().__init__()
        self.drop_path = drop_path
        self.encoder = GraphEncoder(adjacency, width, hidden, layers, dropout)
        self.token_norm = nn.LayerNorm(hidden)
        self.attention = nn.Sequential(*(AttentionBlock(hidden, heads, attention_dropout)
                                         for _ in range(blocks)))
        self.own = nn.Linear(hidden + width, width, bias=False)
        self.other = nn.Linear(hidden + width, width, bias=False) if persons == 2 else None
        self.norm = BatchNorm(width)
        self.residual = nn.Linear(width, width)
        self.pool = TemporalPooling(width, stride)

    def forward(self, h, previous, packing: Packing):
        """h: (V, P, T, D); previous: SM of the layer before as (tokens (P, T, H), h (V, P, T, D)),
        None in the first layer, where SM of this one stands in. Returns (h (V, P, T / stride, D),
        this layer's SM at the same frames)."""
        tokens = self.attention(self.token_norm(self.encoder(h).sum(0)))  # SumPool of paper Eq. 3
        mixed = concat_linear(tokens, h, self.own.weight)
        if self.other is not None:                                        # S Eq. 2
            previous = previous or (tokens, h)
            mixed = mixed + packing.other(concat_linear(*previous, self.other.weight))
        mixed = self.norm(mixed)
        if self.training and self.drop_path:
            mixed = mixed * F.dropout(mixed.new_ones(mixed.shape[1], 1, 1), self.drop_path)
        out = self.pool(F.relu_(mixed + self.residual(h)))                # paper Eq. 4
        stride = self.pool.stride
        return out, (tokens[:, ::stride], h[:, :, ::stride])

class STRLStack(nn.Module):
    """A learnable temporal position, then M_l STRL layers with a temporal stride after each but
    the last. persons: M, 1 or 2; frames: T; layer: further keywords of STRL. `stride` becomes that
    of all layers together.
    Shape: (V, P, T, D) -> (V, P, T / stride, D)."""
    def __init__(self, adjacency, width, hidden, persons, frames, strl_layers=3, stride=2, **layer):
        super().__init__()
        if persons not in (1, 2):
            raise ValueError(f"{persons} persons a sequence; expected 1 or 2")
        self.stride = stride ** (strl_layers - 1)
        if self.stride > frames:
            raise ValueError(f"these STRL layers leave one of {self.stride} frames, there are "
                             f"{frames}; expected fewer layers or a smaller stride")
        self.position = nn.Parameter(0.02 * torch.randn(frames, width))
        self.layers = nn.ModuleList(STRL(adjacency, width, hidden, persons, each, **layer)
                                    for each in [stride] * (strl_layers - 1) + [1])

    def forward(self, h, packing: Packing):
        if h.shape[2] != len(self.position):
            raise ValueError(f"{h.shape[2]} frames; expected {len(self.position)}")
        h, previous = h + self.position, None
        for layer in self.layers:
            h, previous = layer(h, previous, packing)
        return h

class SkeletonClassifier(nn.Module):
    """The paper's Skeleton Sequence Learning model (SSL): joint embedding, STRLStack, pooling, and
    an MLP of one hidden layer, 2 H wide; about 1.5 M parameters (S A) for 60 classes. Further
    keywords: see STRLStack and STRL."""
    def __init__(self, skeleton, channels, classes, persons=1, frames=64, width=64, hidden=128,
                 motion=False, bone=False, **strl):
        super().__init__()
        self.persons = persons
        adjacency = normalized_adjacency(skeleton)
        self.embedding = JointEmbedding(skeleton, channels, width, motion, bone)
        self.embedding.mask_token.requires_grad_(False)  # nothing is masked here
        self.strl = STRLStack(adjacency, width, hidden, persons, frames, **strl)
        self.hidden_layer = nn.Sequential(nn.Linear(2 * width, 2 * hidden), nn.ReLU())
        self.head = nn.Linear(2 * hidden, classes)

    def features(self, x, present=None):
        """The features before the last linear layer, (N, 2 H)."""
        packing = packing_of(x, self.embedding, present, self.persons)
        h = self.strl(self.embedding(packing.pack(x)), packing)
        return self.hidden_layer(packing.pool(h))

    def forward(self, x, present=None):
        """x, of T = frames, and present as in SkeletonMAE.forward. Returns logits (N, K)."""
        return self.head(self.features(x, present)).float()

    def load_pretrained(self, state):
        """Copies the joint embedding and the encoder of a SkeletonMAE state dict, the encoder into
        every STRL layer; or, where STRL layers were pre-trained, these as they are. Returns the
        names of the loaded tensors; raises ValueError where one does not fit."""
        targets = [f"strl.layers.{i}.encoder." for i in range(len(self.strl.layers))]
        if "encoder.position" in state:
            targets = ["strl."]
        loaded = {name.replace("encoder.", target, 1): value for target in targets
                  for name, value in state.items() if name.startswith(("embedding.", "encoder."))}
        own, their = ({name: tuple(value.shape) for name, value in tensors.items()
                       if name.startswith(("embedding.", *targets))}
                      for tensors in (self.state_dict(), loaded))
        for name, _ in sorted(own.items() ^ their.items()):
            raise ValueError(f"the pre-trained weights do not fit: {name} is {own.get(name)} here, "
                             f"{their.get(name)} there; expected the settings of pre-training")
        self.load_state_dict(loaded, strict=False)
        return sorted(loaded)

class LinearProbe(nn.Module):
    """A linear classifier on frozen features: Packing.pool over joints, frames and persons, then
    batch norm without learnable weights, so that their scale does not matter. Freezes `pretrained`
    itself, but not the statistics of its batch norms, which pre-training took of masked joints."""
    def __init__(self, pretrained: SkeletonMAE, classes):
        super().__init__()
        self.pretrained = pretrained.requires_grad_(False)
        self.norm = nn.BatchNorm1d(2 * pretrained.features_width, affine=False)
        self.head = nn.Linear(self.norm.num_features, classes)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        for module in self.pretrained.modules():
            module.training = mode and isinstance(module, BatchNorm)  # no dropout
        return self

    def features(self, x, present=None):
        """(N, M, T, V, C) -> (N, 2 H), or (N, 2 D) of STRL layers."""
        packing = packing_of(x, self.pretrained.embedding, present)
        pooled = packing.pool(self.pretrained.encode(packing.pack(x), packing))
        return self.norm(pooled.float())

    forward = SkeletonClassifier.forward
