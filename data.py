"""Skeleton data without numpy: one flat form for every data set, batches, readers, stick figures.

    data = load("ntu60.npz")      # or PYSKL's .pkl or .pt; nothing: the stick figures
    batches = Loader(data.train, data.skeleton, batch_size=128, frames=64)
    for batch in batches.epoch():
        batch.x                   # (N, M, T, V, C)

Formats: docs/data.md. Nothing in a file is ever run: pickles go through an allow-list, .pt files
through torch's weights_only. Shape legend: skeletonmae.py; F counts the frames of all sequences. A
joint is `seen` in a frame, a person `in_frame` if a joint is, and `present` in a sequence.
"""
import ast
import contextlib
import json
import math
import mmap
import pickle
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial, reduce

from skeletonmae import SKELETONS, make_skeleton
import torch
import torch.nn.functional as F
from torch import Tensor

warnings.filterwarnings("ignore", message="The given buffer is not writable")  # it is only read

class DataError(ValueError):
    """Input that cannot be used. The message is one line: expected, got, fix."""
    def __init__(self, message):
        super().__init__(" ".join(message.split()))

@dataclass
class Sequences:
    """N sequences of one split: one flat tensor of frames and an index into it."""
    frames: Tensor    # (F, M, V, C), in the units of the file
    seen: Tensor      # (F, M, V) bool: which joints were seen, not filled in or guessed
    start: Tensor     # (N,) int64, first frame of each sequence
    length: Tensor    # (N,) int64, frames of each sequence, at least 1
    label: Tensor     # (N,) int64, 0 to K - 1, or -1 where the file has none
    names: list       # (N,) for messages
    present: Tensor | None = None  # (N, M) bool, on the CPU: who is there at all; see `tidy`

    def __len__(self):
        return len(self.start)

    def subset(self, index):
        index = torch.arange(len(self))[index]  # from numbers or a mask
        fields = "start", "length", "label", "present"
        return replace(self, **{field: getattr(self, field)[index] for field in fields},
                       names=[self.names[i] for i in index.tolist()])

    def to(self, device, move=Tensor.to):
        fields = "frames", "seen", "start", "length", "label"
        return replace(self, **{field: move(getattr(self, field), device) for field in fields})

@dataclass
class Dataset:
    """What a reader finds in a file; `complete`, `divide` and `load` fill in the rest."""
    train: Sequences             # all sequences, where a test half is yet to be divided off
    test: Sequences | None
    scored: bool = False         # the file has joint scores
    splits: dict | None = None   # name of a split -> names of its sequences
    classes: list | None = None  # names of the classes 0 to K - 1: of the file, or its labels
    repairs: Counter = field(default_factory=Counter)  # what was mended or left out: how often
    marks: dict | None = None    # see find_marks
    split: str = "x_train / x_test"  # how training and test sequences were told apart
    pair: list | tuple = ()      # the names of the two splits, or empty
    layout: str = ""             # name of the skeleton layout
    skeleton: dict | None = None
    digest: list | None = None   # checksums of names and lengths, training half and test half

    @property
    def persons(self):
        return self.train.frames.shape[1]

    @property
    def channels(self):
        return self.train.frames.shape[3]

    def __str__(self):
        lengths = torch.cat([self.train.length, self.test.length])
        return (f"{len(self.train)} training and {len(self.test)} test sequences ({self.split}), "
                f"{len(self.classes)} classes, {self.persons} person{'s' * (self.persons > 1)}, "
                f"layout {self.layout} ({len(self.skeleton['joints'])} joints), {self.channels}D"
                f"{' with scores' * self.scored}, {lengths.min()} to {lengths.max()} frames"
                + "".join(f", {count} {what}" for what, count in (+self.repairs).items()))

# ------------------------------------------------------------------ sampling, normalising, batches
def sample_frames(length, frames, training=False, crop=1.0, generator=None):
    """Which T frames of each sequence are taken, (N, T) from 0: one of each of T equal segments, a
    random one in training, the middle one in testing; shorter sequences repeat frames. crop < 1: in
    training the segments divide a random window of at least that share of the sequence."""
    def uniform(count):
        return torch.rand(len(length), count, dtype=torch.float64, generator=generator,
                          device=length.device)
    length = length[:, None].double()
    first, share, within = 0.0, 1.0, 0.5
    if training:
        within = uniform(frames)
        if crop < 1:
            share = crop + (1 - crop) * uniform(1)
            first = (1 - share) * uniform(1)
    steps = torch.arange(frames, dtype=torch.float64, device=length.device)
    position = (first + share * (steps + within) / frames) * length
    return torch.minimum(position.long(), length.long() - 1)

def rotation(angle, a, b):
    """Rotations by angle (N,), in radians, from axis b of 3D space towards axis a, (N, 3, 3)."""
    matrix = torch.eye(3, device=angle.device).repeat(len(angle), 1, 1)
    matrix[:, a, a] = matrix[:, b, b] = angle.cos()
    matrix[:, a, b] = angle.sin()
    matrix[:, b, a] = -angle.sin()
    return matrix

def product(a, b):
    """a b, (N, I, J) and (N, J, K). On a GPU as a sum, for a @ b may round factors to ten bits."""
    return (a[..., None] * b[:, None]).sum(2) if a.is_cuda else a @ b

@dataclass(frozen=True)
class Augmentation:
    """Random changes of a normalised sequence, one draw for all its frames but for the noise."""
    rotation: float = 0.0   # 3D: up to so many degrees about the vertical, half about x
    scaling: float = 0.0    # each axis is scaled by 1 - scaling to 1 + scaling
    shift: float = 0.0      # the sequence moves by up to this, in units of the normalised body
    flip: float = 0.0       # probability of a mirror image, left and right joints swapped
    noise: float = 0.0      # standard deviation of Gaussian noise on every coordinate
    crop: float = 1.0       # see sample_frames

    def draw(self, num, channels, generator, device):
        """Of `num` sequences linear maps (num, C, C) and shifts (num, C)."""
        def uniform(*shape, reach):
            return reach * (2 * torch.rand(num, *shape, generator=generator, device=device) - 1)
        change = torch.eye(channels, device=device).repeat(num, 1, 1)
        if self.rotation and channels == 3:
            reach = math.radians(self.rotation)
            tilt = rotation(uniform(reach=reach / 2), 1, 2)
            change = product(tilt, rotation(uniform(reach=reach), 0, 2))
        change = change * (1 + uniform(channels, 1, reach=self.scaling))
        return change, uniform(channels, reach=self.shift)

def normalise_frames(x, seen, present, skeleton, box=False, center="sequence", up="y",
                     turn=False, mirrored=None, augmentation=None, generator=None):
    """Centres, scales and turns sampled frames x (N, M, T, V, C) and changes them at random: one
    affine map a sequence. seen: bool (N, M, T, V), False for a person out of sight; present: bool
    (N, M), on the device of x; absent persons stay all zero.
    The origin is the mean of the centre joints over frames and persons in sight, one for both;
    center "frame": one for each frame, which drops the path. The unit is the root mean square
    distance of the seen joints from it. up "z": z-up data are turned to y-up first. 3D sequences
    are turned about the vertical so that the first person's left and right shoulders and hips lie
    along x on average, the left at larger x. box: each axis is stretched to -1 to 1 at the end, as
    in CTR-GCN's feeder, and only with `turn` the sequence is turned too. mirrored: bool (N,), which
    become mirror images, or None.
    Returns (x, seen, unit (N,), or (N, C) for the axes of a box, in units of the file)."""
    N, C = len(x), x.shape[4]
    precision = torch.promote_types(x.dtype, torch.float32)
    in_frame = seen.any(3)                               # (N, M, T)
    # (N, C + 1, M, T, V): a plane a coordinate, and one that is 1 where someone is present
    planes = x.new_empty(N, C + 1, *x.shape[1:4], dtype=precision)
    planes[:, :C] = x.movedim(4, 1)
    here = present[:, None, :, None, None]
    planes[:, C:] = here
    if up == "z" and C == 3:
        planes[:, 1:3] = torch.stack([planes[:, 2], -planes[:, 1]], 1)

    def in_sight(joints):  # their mean, (N, C + 1, M, T); for an index list a GPU would wait
        return torch.stack([planes[..., j] for j in joints]).mean(0) * in_frame[:, None]
    total = in_sight(skeleton["centre"]).sum(2)        # over persons
    if center == "sequence":
        total = total.sum(2, keepdim=True)             # and over frames
    origin = total[:, :C] / total[:, C:].clamp(min=1)  # (N, C, T or 1)
    planes[:, :C] -= origin[:, :, None, :, None] * planes[:, C:]
    square = planes[:, :C].square().sum(1)             # (N, M, T, V)
    count = seen.flatten(1).sum(1).clamp(min=1)
    unit = ((square * seen).flatten(1).sum(1) / count).sqrt().clamp(min=1e-6)

    linear = torch.eye(C, device=x.device).repeat(N, 1, 1)
    torso = skeleton["parts"].get("torso", ())
    sides = [pair for pair in skeleton["pairs"] if pair[0] in torso]
    if C == 3 and sides and (turn or not box):
        left, right = (in_sight(joints).sum(3) for joints in zip(*sides))  # (N, C + 1, M)
        across = left - right
        appears = in_frame[:, 0].any(1)[:, None]  # person 0; else it is person 1 who leads
        across = torch.where(appears, across[..., 0], across[..., -1])
        linear = rotation(torch.atan2(across[:, 2], across[:, 0]), 0, 2)
    linear = linear / unit[:, None, None]
    shift = torch.zeros(N, C, device=x.device)
    if augmentation:
        change, shift = augmentation.draw(N, C, generator, x.device)
        linear = product(change.to(precision), linear)
    if mirrored is not None:
        linear[:, 0] *= torch.where(mirrored, -1.0, 1.0)[:, None]
    planes = product(torch.cat([linear, shift[..., None]], 2), planes.flatten(2))
    x = planes.unflatten(2, x.shape[1:4]).float()
    if mirrored is not None:
        order = list(range(x.shape[4]))
        for left, right in skeleton["pairs"]:
            order[left], order[right] = right, left
        order = torch.tensor(order).to(x.device, non_blocking=True)
        mirrored = mirrored.view(-1, 1, 1, 1)
        x = torch.where(mirrored[..., None], x.index_select(4, order), x)
        seen = torch.where(mirrored, seen.index_select(3, order), seen)
    if augmentation and augmentation.noise:
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        x += augmentation.noise * noise * here
    if box:
        away = ~in_frame[:, None, ..., None]
        low = x.masked_fill(away, math.inf).amin((2, 3, 4), keepdim=True)
        high = x.masked_fill(away, -math.inf).amax((2, 3, 4), keepdim=True)
        half = ((high - low) / 2).clamp(min=1e-6)
        middle = ((low + high) / 2).nan_to_num()  # of a sequence without anyone
        x = (x - middle) / half * here
        unit = unit[:, None] * half.flatten(1)
    return x.movedim(1, 4), seen, unit

@dataclass
class Batch:
    x: Tensor         # (N, M, T, V, C), normalised
    label: Tensor     # (N,)
    present: Tensor   # (N, M) bool, on the CPU
    seen: Tensor      # (N, M, T, V) bool: which joints were seen
    target: Tensor    # what pre-training puts back: x, or its pose (Loader.pose)
    unit: Tensor      # (N,), or (N, C) for the axes of a box: target times unit is in file units

@dataclass
class Loader:
    """Epochs of batches. What a batch holds depends on (seed, epoch, step) alone, not on what was
    drawn before; on a GPU the random numbers are drawn there, and are others."""
    data: Sequences
    skeleton: dict
    batch_size: int
    frames: int                                  # T, sampled from each sequence
    training: bool = False                       # in random order, augmented
    seed: int = 0
    augmentation: Augmentation = Augmentation()
    view: dict = field(default_factory=dict)     # box, center and up of normalise_frames
    repeat: int = 1                              # passes over the data an epoch, in training
    rank: int = 0                                # of torchrun: this process takes sequences rank,
    world: int = 1                               # rank + world, ... of each batch
    pose: bool = False                           # Batch.target is the pose alone: see batch

    @property
    def steps(self):
        """Batches an epoch of training."""
        return len(self._batches(torch.arange(len(self.data) * self.repeat)))

    def _batches(self, order):
        """No sequence is dropped: a last batch too small for batch norm joins its neighbour."""
        batches = list(order.split(self.batch_size))
        if len(batches) > 1 and len(batches[-1]) < 2 * self.world:
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def epoch(self, epoch=0):
        """The batches of one epoch: in training in its own order, in testing in the data's."""
        order = torch.arange(len(self.data))
        if self.training:
            generator = torch.Generator().manual_seed(self._seed(epoch))
            order = torch.cat([torch.randperm(len(self.data), generator=generator)
                               for _ in range(self.repeat)])
        for step, index in enumerate(self._batches(order), 1):
            yield self.batch(index[self.rank::self.world], self._seed(epoch, step) + self.rank)

    def _seed(self, epoch, step=0):
        """A seed for every step of every epoch, the same in all processes; step 0 is the order."""
        return ((self.seed * 1_000_003 + epoch) * 1_000_003 + step) * 1_003 % 2**62

    def batch(self, index, seed):
        """Gathers the sampled frames on the device that holds them, and normalises them. The pose
        of a sequence is centred in each frame, in 3D turned, and not augmented, but cropped and
        mirrored as x is: camera, place and path drop out."""
        data, device = self.data, self.data.frames.device
        generator = torch.Generator(device).manual_seed(seed)
        here = index.to(device, non_blocking=True)
        steps = sample_frames(data.length[here], self.frames, self.training,
                              self.augmentation.crop, generator)
        rows = (data.start[here][:, None] + steps).flatten()
        x, seen = (flat.index_select(0, rows).unflatten(0, steps.shape).transpose(1, 2)
                   for flat in (data.frames, data.seen))
        present = data.present[index]
        change = self.augmentation if self.training else None
        mirrored = torch.rand(len(x), generator=generator, device=device) < self.augmentation.flip
        mirrored = mirrored if change and change.flip else None
        normalised = partial(normalise_frames, x, seen, present.to(device, non_blocking=True),
                             self.skeleton, mirrored=mirrored, **self.view)
        x, seen, unit = normalised(augmentation=change, generator=generator)
        target = x
        if self.pose:
            target, _, unit = normalised(turn=True, center="frame")
        return Batch(x, data.label[here], present, seen, target, unit)

# ------------------------------------------------------------ readers: presence and missing joints
def find_marks(data: Sequences, scored):
    """How a file marks what is missing. `places`: where joints of score 0 stand that have no
    position, 0 and each place that ten joints, and one in 10,000, share to the last digit (a joint
    counts once a sequence). `origin`: joints of data without scores that are 0 in the first frame
    of every sequence, of its first person, because the data are centred there."""
    C = data.frames.shape[3]
    places, origin = [[0.0] * C], []
    if scored:
        hidden = ~data.seen & data.frames.any(-1)
        rows, lengths = [], data.length.tolist()
        for x, part in zip(data.frames.split(lengths), hidden.split(lengths)):
            joint = part.nonzero()[:, 2:]
            rows.append(torch.cat([x[part].double(), joint], 1).unique(dim=0))
        rows = torch.cat(rows)[:, :C]
        found, count = rows.unique(dim=0, return_counts=True)
        places += found[count >= max(10, len(rows) / 10_000)].tolist()
    else:
        first = data.start[data.seen[data.start, 0].any(1)]
        joints = data.frames[first, 0].float().flatten(0, 1)  # centred ones lie on both sides of 0
        if len(first) and (joints.amin(0) < 0).all() and (joints.amax(0) > 0).all():
            origin = (~data.seen[first, 0]).all(0).nonzero()[:, 0].tolist()
    return {"places": places, "origin": origin}

def make_whole(x, seen, marks):
    """Decides who is there in a whole sequence x (T, M, V, C), and fills in what is missing. seen:
    bool (T, M, V). A person is in a frame if a joint is seen there; one in less than a tenth of the
    frames with anyone is a ghost and becomes absent, all zero. Joints at the marked places that are
    not seen, and all joints of a person out of sight, take the position of the nearest frame that
    has one, the earlier of two; without any they are the mean of the person's other joints. Other
    joints that are not seen carry a usable guess.
    Returns (x, seen, present (M,), frames with anyone (T,), number of filled-in joints)."""
    T, in_frame = len(x), seen.any(2)
    count = in_frame.sum(0)
    present = (count > 0) & (count >= in_frame.any(1).sum() / 10)
    in_frame = in_frame & present
    seen = seen & in_frame[..., None]
    placed = (x[..., None, :] == torch.tensor(marks["places"], dtype=x.dtype)).all(-1).any(-1)
    known = in_frame[..., None] & (seen | ~placed)
    steps = torch.arange(T)[:, None, None]
    earlier = torch.where(known, steps, -T).cummax(0).values
    later = torch.where(known, steps, 2 * T).flip(0).cummin(0).values.flip(0)
    nearest = torch.where(steps - earlier <= later - steps, earlier, later).clamp(0, T - 1)
    x = x.gather(0, nearest[..., None].expand_as(x))
    never = ~known.any(0)[..., None]  # (M, V, 1)
    others = x.masked_fill(never, 0).sum(2, keepdim=True, dtype=torch.float64)
    others = others / (~never).sum(1, keepdim=True).clamp(min=1)
    x = torch.where(never, others.to(x.dtype), x)
    return x, seen, present, in_frame.any(1), int((in_frame[..., None] & ~known).sum())

def tidy(data: Sequences, marks, repairs):
    """Checks the numbers, cuts the padding at the end of each sequence, makes whole in place those
    that need it, and says who is present."""
    data.present = torch.zeros(len(data), data.frames.shape[1], dtype=torch.bool)
    data.seen[..., marks["origin"]] = data.seen.any(-1, keepdim=True)
    lengths = data.length.tolist()
    parts = zip(data.frames.split(lengths), data.seen.split(lengths))
    for i, (frames, seen) in enumerate(parts):
        if not frames.abs().amax() < 1e9:  # nor is NaN
            raise DataError(f"sequence {data.names[i]} holds NaN, infinite or absurd numbers; "
                            "expected finite ones below 1e9, 0 for a missing joint")
        in_frame = seen.any(2)  # (T, M)
        present = in_frame.any(0)
        steps = in_frame.any(1).nonzero()
        length = int(steps[-1]) + 1 if len(steps) else 1
        if not seen[:length, present].all():
            x, sighted, there, kept, filled = make_whole(frames[:length], seen[:length], marks)
            ghosts = present & ~there
            present = there
            repairs["frames without anyone dropped"] += int((~kept).sum())
            repairs["persons seen in less than a tenth of the frames dropped"] += int(ghosts.sum())
            repairs["missing joints filled in"] += filled
            length = int(kept.sum())
            frames[:length] = x[kept]
            seen[:length] = sighted[kept]
        repairs["sequences without anyone"] += int(not present.any())
        present[0] |= not present.any()  # an empty first person
        data.length[i] = length
        data.present[i] = present

def flatten(sequences, labels, names, persons):
    """A list of (x (T, M, V, C), scores (T, M, V), above 0 where a joint is seen), T and M may
    differ, in the one flat form."""
    lengths = [len(x) for x, _ in sequences]
    V, C = sequences[0][0].shape[2:]
    dtype = reduce(torch.promote_types, {x.dtype for x, _ in sequences})
    frames = torch.zeros(sum(lengths), persons, V, C, dtype=dtype)
    seen = torch.zeros(frames.shape[:3], dtype=torch.bool)
    for part, part_seen, (x, scores) in zip(frames.split(lengths), seen.split(lengths), sequences):
        M = x.shape[1]
        part[:, :M] = x
        part_seen[:, :M] = scores > 0
        part[:, ~part_seen.any(2).any(0)] = 0  # who is never seen
    length = torch.tensor(lengths)
    return Sequences(frames, seen, length.cumsum(0) - length, length, labels, names)

# ------------------------------------------------------------------------- readers: npz and pickle
DTYPES = dict(f2=torch.float16, f4=torch.float32, f8=torch.float64, i1=torch.int8, i2=torch.int16,
              i4=torch.int32, i8=torch.int64, u1=torch.uint8, b1=torch.bool)

def array(buffer, code, shape, fortran=False, offset=0):
    """The tensor that numpy wrote as `shape` values of dtype `code` ("<f4", ">i8", "|b1") at
    `offset`; no copy where the bytes already lie as torch wants them."""
    dtype = DTYPES.get(code.lstrip("<>|="))
    if dtype is None:
        raise DataError(f"dtype {code!r}; expected one of {', '.join(DTYPES)}, strings in a list")
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)
    if code[0] == ">":
        flat = flat.view(torch.uint8).view(count, -1).flip(1).flatten().view(dtype)
    if fortran:
        return flat.view(shape[::-1]).permute(*reversed(range(len(shape))))
    return flat.view(shape)

def read_npz(path):
    """The arrays x_* and y_* of an npz as tensors. An entry stored without compression is
    memory-mapped in place (private, copy-on-write); a deflated one is inflated."""
    arrays = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name not in ("x_train", "y_train", "x_test", "y_test"):
                continue
            if info.compress_type == zipfile.ZIP_STORED:  # after 30 bytes, a name and extra fields
                lengths = struct.unpack_from("<2H", mapped, info.header_offset + 26)
                first = info.header_offset + 30 + sum(lengths)
                body = mapped[first:first + info.file_size]
            else:
                body = memoryview(bytearray(archive.read(info)))
            line = bytes(body[:65536]).partition(b"\n")[0]  # ends in a Python dict
            npy = ast.literal_eval(line[line.index(b"{"):].decode())
            arrays[name] = array(body, npy["descr"], npy["shape"], npy["fortran_order"],
                                 offset=len(line) + 1)
    return arrays

def read_labels(y, count):
    """Integer labels (N,) from integers (N,), (N, 1), a one-hot (N, K), or None: -1."""
    if y is None:
        return torch.full((count,), -1)
    if y.dim() == 2 and y.shape[1] > 1 and ((y != 0).sum(1) == 1).all():
        y = (y != 0).int().argmax(1)
    if len(y) != count or y.numel() != count or (y != y.long()).any() or (y < 0).any():
        raise DataError(f"labels {tuple(y.shape)} of {y.dtype} for {count} sequences; expected as "
                        "many integers from 0, or one-hot rows")
    return y.long().flatten()

USUALLY_3D = "ntu25", "kinect20", "sbu15", "h36m17", "smpl22", "mediapipe33"  # the others: 2D

def divide_columns(columns, asked):
    """(M, V, C) of an npz row: of the asked skeleton, or of a layout in its usual C, 3D first."""
    for C, M in ((3, 1), (3, 2), (2, 1), (2, 2)):
        for name, skeleton in ({"": asked} if asked else SKELETONS).items():
            V = len(skeleton["joints"])
            if M * V * C == columns and (asked or C == 2 + (name in USUALLY_3D)):
                return M, V, C
    raise DataError(f"{columns} columns are not persons x joints x coordinates of "
                    f"{'that' if asked else 'a known'} layout; name another with --layout")

def from_npz(path, skeleton, persons):
    """CTR-GCN's npz: x_* (N, T, M V C) zero-padded at the end, y_* one-hot or integer."""
    arrays, halves = read_npz(path), []
    if "x_train" not in arrays:
        raise DataError("no x_train; expected x_train and, to fine-tune, x_test")
    for half in ("train", "test"):
        x = arrays.get(f"x_{half}", arrays["x_train"][:0])
        if x.dim() != 3 or not x.is_floating_point() or 0 in x.shape[1:]:
            raise DataError(f"x_{half} {tuple(x.shape)} {x.dtype}; expected floats (N, T, M*V*C)")
        N, T, columns = x.shape
        frames = x.reshape(N * T, *divide_columns(columns, skeleton))
        if persons and persons > frames.shape[1]:
            frames = F.pad(frames, (0, 0, 0, 0, 0, persons - frames.shape[1]))
        seen = torch.cat([part.any(-1) for part in frames.split(4096)])
        halves.append(Sequences(frames, seen, torch.arange(N) * T, torch.full((N,), T),
                                read_labels(arrays.get(f"y_{half}"), N),
                                [f"{half}[{i}]" for i in range(N)]))
    return Dataset(*halves)

class _DType:
    """Stands in for numpy.dtype."""
    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        self.code = state[1] + self.code  # "<", ">" or "|"

class _Array:
    """Stands in for numpy.ndarray: holds the tensor."""
    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.tensor = array(data, dtype.code, shape, fortran)

    def __iter__(self):  # names of a split
        return iter(self.tensor.tolist())

def _scalar(dtype, data):
    if dtype.code[:2] == "<U":  # a string
        return data.decode("utf-32-le").rstrip("\0")
    return array(data, dtype.code, ()).item()

ALLOWED = {  # all that a pickle can call; numpy 2 writes numpy._core for numpy.core
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": lambda data, dtype, shape, order: array(
        data, dtype.code, shape, order == "F"),
    "_codecs.encode": lambda text, _: text.encode("latin1"),
}

class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        asked = f"{module}.{name}"
        found = ALLOWED.get(asked.replace("numpy._core.", "numpy.core."))
        if not found:
            raise DataError(f"the file asks for {asked}, which is never loaded; expected arrays, "
                            "numbers, strings, lists and dicts alone")
        return found

def numbers(value, what, dims):
    """A tensor of floats from a pickle's or a caller's array, (1, T, V, ...) if M is left out."""
    value = getattr(value, "tensor", value)  # of an _Array
    if not hasattr(value, "__array__"):  # numpy's or torch's
        raise DataError(f"{what} is {type(value).__name__}; expected an array of numbers")
    value = torch.as_tensor(value).detach()
    value = value if value.is_floating_point() else value.float()
    return value[None] if value.dim() < dims else value

def read_annotation(annotation, channels, persons, repairs):
    """(x (T, M, V, C), scores (T, M, V)) of a dict with `keypoint`; without scores, bool: which
    joints are not 0. channels: C, or None; one more is then the score. Of more persons than
    `persons` stay those with the highest mean score, without scores those that move most."""
    if "keypoint" not in annotation:
        raise DataError(f"no keypoint; got {', '.join(map(str, annotation))}")
    x = numbers(annotation["keypoint"], "keypoint", 4)
    sizes = (channels, channels + 1) if channels else (2, 3)
    if (x.dim() != 4 or x.shape[3] not in sizes or 0 in x.shape
            or len(x) > 5 and len(x) > x.shape[1]):  # frames before persons
        raise DataError(f"keypoint {tuple(x.shape)}; expected ([M,] T, V, {channels or '2 or 3'}), "
                        "persons before frames, none of them 0; a score belongs in keypoint_score")
    score = annotation.get("keypoint_score")
    if channels and x.shape[3] > channels:
        x, score = x[..., :channels], x[..., channels]
        if score.min() < 0 or score.max() > 2:
            raise DataError(f"{channels + 1} numbers a joint, no score last; expected {channels}")
    if score is None:
        score = x.any(3)
    else:
        score = numbers(score, "keypoint_score", 3)
        if score.shape != x.shape[:3] or not score.isfinite().all():
            raise DataError(f"keypoint_score {tuple(score.shape)}; expected finite {x.shape[:3]}")
    if len(x) > persons:
        rank = (score * x.any(3)).float().mean((1, 2))
        if score.dtype == torch.bool:
            in_frame = score.any(2)  # who comes or goes does not move by that
            moved = x.diff(dim=1).abs().float().sum((2, 3)) * in_frame[:, 1:] * in_frame[:, :-1]
            rank = torch.where(in_frame.any(1), moved.sum(1), -1)
        kept = rank.topk(persons).indices.sort().values
        repairs[f"persons beyond {persons} a sequence left out"] += len(x) - persons
        x, score = x[kept], score[kept]
    return x.transpose(0, 1), score.transpose(0, 1)

def from_annotations(annotations, channels, persons, splits=None, classes=None):
    """The sequences of PYSKL's annotations, or of arrays; persons: M, or None: 2 at most."""
    if not annotations:
        raise DataError("no sequences; expected a list of them, alone or as `annotations`")
    sequences, labels, names, repairs, shape = [], [], [], Counter(), None
    for i, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            annotation = {"keypoint": annotation}
        name = str(annotation.get("frame_dir", i))
        label = annotation.get("label")
        try:
            if label is not None and (type(label) is not int or label < 0):
                raise DataError(f"label {label!r}; expected an integer from 0, or none")
            x, scores = read_annotation(annotation, channels, persons or 2, repairs)
            shape = shape or tuple(x.shape[2:])
            if x.shape[2:] != shape:
                raise DataError(f"(V, C) is {tuple(x.shape[2:])}; in the first it is {shape}")
        except DataError as error:
            raise DataError(f"annotation {name!r}: {error}") from None
        sequences.append((x, scores))
        labels.append(-1 if label is None else label)
        names.append(name)
    persons = persons or max(x.shape[1] for x, _ in sequences)
    scored = any(scores.is_floating_point() for _, scores in sequences)
    data = flatten(sequences, torch.tensor(labels), names, persons)
    return Dataset(data, None, scored, splits, classes, repairs)

def from_pyskl(content, channels, persons):
    """PYSKL's dict, {"split": {name: [frame_dir]}, "annotations": [...]}, the bare list of
    annotations, one of them (docs/data.md), or an array of sequences."""
    content = getattr(content, "tensor", content)
    if isinstance(content, Tensor) and content.dim() > 3:
        content = list(content)  # as many sequences, as a caller's array would be
    if not isinstance(content, dict) or "keypoint" in content:
        content = {"annotations": content if isinstance(content, list) else [content]}
    return from_annotations(content.get("annotations"), channels, persons,
                            content.get("split"), content.get("classes"))

def divide(data: Dataset, wanted, preferred, test_fraction):
    """Divides training and test half by the splits of the file or, where it has none, at random,
    the same for every seed."""
    if wanted and not data.splits:
        raise DataError(f"no splits, so --split {wanted} cannot be found; leave it out")
    if data.test is not None:
        return
    if not data.splits:
        data.split = f"a random {test_fraction:g} of each class"
        data.train, data.test = divide_at_random(data.train, test_fraction)
        return
    splits = {str(name): list(map(str, names)) for name, names in data.splits.items()}
    keeps = not wanted and preferred and splits.keys() >= set(filter(None, preferred))
    pair = data.pair = preferred if keeps else find_split(splits, wanted)
    rows = {}  # name -> indices of its sequences
    for i, name in enumerate(data.train.names):
        rows.setdefault(name, []).append(i)
    train, test = (splits.get(half, []) for half in pair)
    data.train, data.test = (data.train.subset([i for name in names for i in rows.get(name, ())])
                             for names in (train, test))
    if not len(data.train):
        raise DataError(f"the split {pair[0]} names no annotation; expected a list of frame_dir")
    data.split = " / ".join(filter(None, pair))
    unused = pair[0].removesuffix("train") + "val"
    data.split += f", {unused} unused" * (unused in splits and unused not in pair)
    data.repairs["names without an annotation"] = len({*train, *test} - rows.keys())
    data.repairs["names twice"] = len(train) - len({*train}) + len(test) - len({*test})
    data.repairs["names in both halves"] = len({*train} & {*test})

def divide_at_random(data: Sequences, test_fraction):
    """(training half, test half). Of every class the same share tests, at least one of two or more.
    Drawn by a fixed seed from the sorted names, so that other classes and their order do not
    matter; sequences without a label train, where others have one."""
    tests = torch.zeros(len(data), dtype=torch.bool)
    by_name = torch.tensor(sorted(range(len(data)), key=data.names.__getitem__))
    for label in data.label[data.label >= 0].unique().tolist() or [-1]:
        members = by_name[data.label[by_name] == label]
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(0))
        count = min(max(round(test_fraction * len(members)), 1), len(members) - 1)
        tests[members[order[:count]]] = True
    return data.subset(~tests), data.subset(tests)

def find_split(splits, wanted):
    """(training split, test split). wanted: None for the obvious pair, "xsub" (or a name of the
    pair) for xsub_train and xsub_test or xsub_val, or "a,b" for two names as they stand."""
    pairs = [(name, other) for name in splits if name.endswith("train")
             for other in (f"{name[:-5]}test", f"{name[:-5]}val") if other in splits]
    if wanted and "," in wanted:
        pair = tuple(map(str.strip, wanted.split(",", 1)))
        fits = [pair] if set(filter(None, pair)) <= splits.keys() else []
    elif wanted:
        fits = [pair for pair in pairs if wanted in (*pair, pair[0].removesuffix("_train"))]
    elif pairs:
        alone = len({name for name, _ in pairs}) == 1
        fits = [pair for pair in pairs if alone or pair[0] in ("xsub_train", "train")]
    else:
        fits = [(name, "") for name in splits if name == "train" or len(splits) == 1]
    if not fits:
        asked = f"split {wanted}" if wanted else "obvious split"
        raise DataError(f"no {asked} among {', '.join(sorted(splits))}; name a pair, as in --split "
                        "xsub or --split a_train,a_test")
    return fits[0]

# -------------------------------------------------------------------------- readers: layouts, load
def load_skeleton(layout):
    """A layout by name, or from a JSON file with the arguments of make_skeleton."""
    if layout in SKELETONS:
        return SKELETONS[layout]
    if not layout.endswith(".json"):
        raise DataError(f"unknown layout {layout}; expected {', '.join(SKELETONS)}, or a JSON file")
    with reading(layout, "a skeleton layout"), open(layout) as file:
        return make_skeleton(**json.load(file))

@contextlib.contextmanager
def reading(path, expected="CTR-GCN's npz, PYSKL's dict as pickle or .pt"):
    """Any reader's error becomes a DataError of one line that names the file, but for an OSError
    that names it. torch.load tells its reason amid much advice."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path or 'stick figures'}: {error}") from None
    except Exception as error:  # a damaged file can make its reader raise almost anything
        if isinstance(error, MemoryError) or isinstance(error, OSError) and error.filename:
            raise
        told = str(error).rpartition("Unpickler error:")[2].split("\n\n")[-2:][0].split(". ")[0]
        told = f"{type(error).__name__}: {told:.200}"
        raise DataError(f"{path} is damaged or not {expected} ({told})") from None

def read(path, skeleton, channels=None, persons=None, marks=None):
    """The sequences of a file, by the ending of its name. The rest: as known before, or None."""
    if path.endswith(".npz"):
        return complete(from_npz(path, skeleton, persons), marks, skeleton)
    if path.endswith((".pt", ".pth")):
        content = torch.load(path, "cpu", weights_only=True)
    elif path.endswith((".pkl", ".pickle")):
        with open(path, "rb") as file:
            content = _Unpickler(file).load()
    else:
        raise DataError("its name ends in neither .npz, .pkl nor .pt")
    return complete(from_pyskl(content, channels, persons), marks, skeleton)

def complete(data: Dataset, marks=None, skeleton=None):
    """Finds the marks, beside those of a checkpoint, and makes the sequences whole."""
    V, C = data.train.frames.shape[2], data.channels
    expected = (len(skeleton["joints"]) if skeleton else V, len(marks["places"][0]) if marks else C)
    if (V, C) != expected:
        raise DataError(f"{V} joints in {C}D; expected {expected[0]} in {expected[1]}D, as "
                        "--layout or the checkpoint has them")
    if data.scored and not data.train.seen.any():
        raise DataError("no joint score is above 0; expected confidences, 0 for a missing joint")
    found = data.marks = find_marks(data.train, data.scored)
    if marks:
        if "origin" in marks and not data.scored:  # a few sequences do not show where it is
            found["origin"] = marks["origin"]
        found["places"] += [place for place in marks["places"] if place not in found["places"]]
    for half in (data.train, data.test):
        if half is not None:
            tidy(half, found, data.repairs)
    return data

def load(path=None, split=None, layout=None, test_fraction=0.2, synthetic_size=1600,
         skeleton=None, pair=(), marks=None):
    """Reads a data set, divides it, and finds its layout. Without a path: the built-in stick
    figures. skeleton, pair: those of a checkpoint, where layout and split name no others; marks:
    those of a checkpoint. Raises DataError for what is in a file, OSError for the file."""
    skeleton = skeleton or (load_skeleton(layout) if layout else None)
    with reading(path):
        if path:
            data = read(str(path), skeleton, marks=marks)
        else:
            figures = Dataset(stick_figures(synthetic_size), None, classes=list(ACTIONS))
            data = complete(figures, marks, skeleton)
        divide(data, split, pair, test_fraction)
        shape = data.train.frames.shape[1:]
        if shape != data.test.frames.shape[1:] or not data.train.seen.any():
            raise DataError("expected anyone in the training sequences, and the same persons, "
                            "joints and coordinates in the test sequences")
        data.layout = layout if skeleton else find_layout(shape[1], data.channels)
        data.skeleton = skeleton or SKELETONS[data.layout]
        number_labels(data)
        data.digest = [sum(zlib.crc32(ascii(key).encode())
                           for key in zip(half.names, half.length.tolist()))
                       for half in (data.train, data.test)]
    return data

def find_layout(V, C):
    """The name of the only known layout of V joints whose data usually have C coordinates."""
    fits = [name for name, known in SKELETONS.items()
            if len(known["joints"]) == V and C == 2 + (name in USUALLY_3D)]
    if len(fits) != 1:
        raise DataError(f"{V} joints in {C}D fit {' and '.join(fits) or 'no layout'}; name one "
                        f"with --layout ({', '.join(SKELETONS)}, or a JSON file)")
    return fits[0]

def number_labels(data: Dataset):
    """Names the classes: as the file does, whose labels number them, or else by the labels that
    occur, which then become 0 to K - 1."""
    label = torch.cat([data.train.label, data.test.label])
    if not data.classes:
        values = label[label >= 0].unique()
        label = torch.where(label < 0, -1, torch.searchsorted(values, label))
        data.classes = values.tolist()
    elif not isinstance(data.classes, (list, tuple)):
        raise DataError(f"classes is {type(data.classes).__name__}; expected a list, name 0 first")
    elif int(label.max()) >= len(data.classes):
        raise DataError(f"label {label.max()}; expected 0 to {len(data.classes) - 1} of `classes`")
    data.train.label, data.test.label = label.split([len(data.train), len(data.test)])
    data.classes = list(map(str, data.classes))

# -------------------------------------------------------------------------- built-in stick figures
# What the angles of a stick figure do in each action: joint angle, amplitude in radians or body
# units, cycles in 30 frames, phase in cycles. All swing about resting poses drawn alike, so that a
# single pose says little. After "|": the second person, who stands face to face.
ACTIONS = {
    "march": "leg_l .5 1 0, leg_r .5 1 .5, knee_l .4 1 .3, knee_r .4 1 .8, arm_l .3 1 .5",
    "jumping jack": "arm_l .7 1 0, arm_r .7 1 0, leg_l .3 1 0, leg_r .3 1 0, up .12 1 .1",
    "windmill": "arm_l .7 1 0, arm_r .7 1 .5",
    "squat": "leg_l .5 1 0, leg_r .5 1 0, knee_l .7 1 0, knee_r .7 1 0, up .2 1 .5",
    "wave": "elbow_r .6 2 0, arm_r .3 2 .25",
    "wave slowly": "elbow_r .6 .7 0, arm_r .3 .7 .25",
    "kick": "leg_r .8 1 0, knee_r .5 1 .25",
    "bow": "lean .5 1 0, arm_l .2 1 0, arm_r .2 1 0",
    "shake hands": "arm_r .35 2 0, elbow_r .2 2 0 | arm_r .35 2 .5, elbow_r .2 2 .5",
    "push": "arm_l .5 1 0, arm_r .5 1 0, elbow_l .5 1 .5 | lean .4 1 .65, along .3 1 .65",
}
# joint angle -> its resting value; left before right
ANGLES = dict(arm_l=.6, arm_r=.6, elbow_l=.8, elbow_r=.8, leg_l=.15, leg_r=.15, knee_l=.3,
              knee_r=.3, lean=0, up=0, along=0)

def stick_figures(size):
    """`size` sequences of ACTIONS, 2D coco17 poses of 40 to 80 frames in pixels; always the same.
    Size, width, place, resting pose, tempo, phase, amplitude and noise vary between sequences."""
    generator, T, angles = torch.Generator().manual_seed(0), 80, list(ANGLES)

    def normal(*shape, std):
        return std * torch.randn(size, *shape, generator=generator)
    table = torch.zeros(len(ACTIONS), 2, len(angles), 3)  # amplitude, cycles, phase
    for k, action in enumerate(ACTIONS.values()):
        for person, terms in enumerate(action.split("|")):
            for angle, *numbers in map(str.split, terms.split(",")):
                table[k, person, angles.index(angle)] = torch.tensor(list(map(float, numbers)))
    label = torch.arange(size) % len(ACTIONS)
    of_two = table[label, 1].flatten(1).any(1)
    amplitude, cycles, phase = table[label][..., None, :].unbind(-1)  # (n, 2, angles, 1)
    time = torch.arange(T) / (30 * torch.exp(normal(1, 1, 1, std=0.12))) + normal(1, 1, 1, std=1)
    wave = torch.sin(2 * math.pi * (cycles * time + phase))           # (n, 2, angles, T)
    rest = torch.tensor(list(ANGLES.values()))[:, None] + normal(2, len(angles), 1, std=0.35)
    amplitude = amplitude * (1 + normal(1, 1, 1, std=0.3))
    angle = rest + amplitude * wave
    # (n, 2, sides, T) each, and of lean, up, along (n, 2, 1, T)
    arm, elbow, leg, knee, lean, up, along = angle.split((2, 2, 2, 2, 1, 1, 1), 2)
    sides = torch.tensor([[1.0], [-1.0]])                                   # left, right
    outward = F.pad(sides[..., None], (0, 1))

    def limb(length, turn, side=1):
        """A bone that hangs down, raised sideways by `turn`: (n, 2, sides, T, 2)."""
        return length * torch.stack([side * turn.sin(), -turn.cos()], -1)

    middle = torch.stack([along, up], -1)
    neck = middle + limb(-0.5, lean)
    head = neck + limb(-0.22, lean)
    shoulders = neck + 0.19 * outward
    elbows = shoulders + limb(0.3, arm, sides)
    wrists = elbows + limb(0.27, arm + elbow, sides)
    hips = middle + 0.11 * outward
    knees = hips + limb(0.42, leg, sides)
    ankles = knees + limb(0.4, leg - knee, sides)
    body = torch.cat([head, head + 0.05 * outward, head + 0.08 * outward,  # nose, eyes, ears
                      shoulders, elbows, wrists, hips, knees, ankles], 2)
    body = body.transpose(2, 3)  # in the order of coco17
    body = body * (1 + normal(2, 1, 1, 2, std=0.25)) * torch.tensor([1, -1])  # y grows downwards
    body[..., 0] -= 0.5 * of_two[:, None, None, None]  # (n, 2, T, 17, 2): two stand apart ...
    body[:, 1, ..., 0] *= -1                           # ... and face to face
    place = torch.tensor([320, 240]) + normal(1, 1, 1, 2, std=40)
    pixels = place + 120 * body + normal(*body.shape[1:], std=1.5)
    pixels[~of_two, 1] = 0
    length = torch.randint(40, T + 1, (size,), generator=generator).tolist()
    sequences = [(x[:n], x[:n].any(-1)) for x, n in zip(pixels.transpose(1, 2), length)]
    return flatten(sequences, label, [f"stick[{i:06}]" for i in range(size)], 2)
