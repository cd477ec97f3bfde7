"""Skeleton data without numpy: one flat form for every data set, batches, readers, stick figures.

    data = load("ntu60.npz")      # or a PYSKL pickle, a .pt dict, or None for the stick figures
    batches = Loader(data.train, data.skeleton, data.channels, batch_size=128, frames=64)
    for batch in batches.epoch():
        batch.x                   # (N, M, T, V, C), or C + 1 with the joint score last

Formats: docs/data.md. Nothing in a file is ever run: pickles go through an allow-list, .pt files
through torch's weights_only. Shape legend: skeletonmae.py; F counts the frames of all sequences.
A person is `present` in a sequence, `in_frame` in a frame; a joint of score above 0 is `seen`.
"""
import ast
import json
import math
import mmap
import os
import pickle
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass, replace

from skeletonmae import SKELETONS, find_present, make_skeleton
import torch
from torch import Tensor

warnings.filterwarnings("ignore", message="This DataLoader will create")  # the user asked for them

class DataError(ValueError):
    """Input that cannot be used. The message is one line: expected, got, fix."""
    def __init__(self, message):
        super().__init__(" ".join(message.split()))

@dataclass
class Sequences:
    """N sequences of one split: one flat tensor of frames and an index into it."""
    frames: Tensor    # (F, M, V, C), or C + 1 with the joint score last, in the units of the file
    start: Tensor     # (N,) int64, first frame of each sequence
    length: Tensor    # (N,) int64, frames of each sequence, at least 1
    label: Tensor     # (N,) int64, 0 to K - 1
    present: Tensor   # (N, M) bool, stays on the CPU: who is there at all
    in_frame: Tensor  # (F, M) bool: who has coordinates in which frame, filled-in ones too
    names: list       # (N,) for messages

    def __len__(self):
        return len(self.start)

    def subset(self, index):
        index = torch.arange(len(self))[index]  # from numbers or a mask
        fields = "start", "length", "label", "present"
        return replace(self, **{field: getattr(self, field)[index] for field in fields},
                       names=[self.names[i] for i in index.tolist()])

    def to(self, device):
        fields = "frames", "start", "length", "label", "in_frame"
        return replace(self, **{field: getattr(self, field).to(device) for field in fields})

@dataclass
class Dataset:
    train: Sequences
    test: Sequences
    layout: str      # name of the skeleton layout
    skeleton: dict
    channels: int    # C, 2 or 3, the score not counted
    score: bool      # frames carry a joint score as one further channel
    classes: list    # the labels in the file, K of them, in order
    split: str       # how training and test sequences were told apart

    @property
    def persons(self):
        return self.train.frames.shape[1]

    def __str__(self):
        lengths = torch.cat([self.train.length, self.test.length])
        return (f"{len(self.train)} training and {len(self.test)} test sequences ({self.split}), "
                f"{len(self.classes)} classes, {self.persons} person{'s' * (self.persons > 1)}, "
                f"layout {self.layout} ({len(self.skeleton['joints'])} joints), {self.channels}D"
                f"{' with scores' * self.score}, {lengths.min()} to {lengths.max()} frames")

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

def rotation(angle, axis):
    """Rotations by angle (N,), in radians, about a coordinate axis of 3D space, (N, 3, 3)."""
    a, b = [k for k in range(3) if k != axis]
    matrix = torch.eye(3, device=angle.device).repeat(len(angle), 1, 1)
    matrix[:, a, a] = matrix[:, b, b] = angle.cos()
    matrix[:, a, b] = angle.sin()
    matrix[:, b, a] = -angle.sin()
    return matrix

def product(a, b):
    """a b, (N, I, J) and (N, J, K). On a GPU as a sum, for a @ b may round factors to ten bits."""
    return (a[..., None] * b[:, None]).sum(2) if a.is_cuda else a @ b

def mean_joint(pose, joints):
    """Mean of some joints, (..., V) -> (...). Without an index list, for which a GPU would wait."""
    return torch.stack([pose[..., joint] for joint in joints]).mean(0)

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
        """Of `num` sequences (linear maps (num, C, C), shifts (num, C), which are mirrored)."""
        def uniform(*shape, reach):
            return reach * (2 * torch.rand(num, *shape, generator=generator, device=device) - 1)

        change = torch.eye(channels, device=device).repeat(num, 1, 1)
        if self.rotation and channels == 3:
            reach = math.radians(self.rotation)
            tilt = rotation(uniform(reach=reach / 2), axis=0)
            change = product(tilt, rotation(uniform(reach=reach), axis=1))
        mirrored = torch.rand(num, generator=generator, device=device) < self.flip
        change[:, 0] *= torch.where(mirrored, -1.0, 1.0)[:, None]
        change = change * (1 + uniform(channels, 1, reach=self.scaling))
        return change, uniform(channels, reach=self.shift), mirrored

def normalise_frames(x, in_frame, skeleton, channels, box=False, augmentation=None, generator=None):
    """Centres, scales and turns sampled frames x (N, M, T, V, C [+ score]) and changes them at
    random: x -> linear (x - origin) + shift, one affine map a sequence. in_frame: bool (N, M, T);
    who is not in a frame stays all zero there.

    The origin is the mean of the centre joints over frames and persons: one for both persons, or
    their distance would vanish. The unit is the root mean square distance of the seen joints (all
    joints, where a sequence has none) from it: the size of the body and of its path. 3D sequences
    (y is vertical) are turned about the vertical so that the first person's left and right
    shoulders and hips lie along x on average, the left at larger x: the camera's place drops out.
    box: instead of turning, each axis is stretched to -1 to 1 at the end, as in CTR-GCN's feeder.
    Returns (x, origin (N, C), unit (N,), or (N, C) for the axes of a box), in units of the file."""
    C, N = channels, len(x)
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    # (N, C + 1, M, T, V): a plane a coordinate, and one that is 1 where someone is in the frame
    planes = x.new_empty(N, C + 1, *x.shape[1:4], dtype=precision)
    planes[:, :C] = x[..., :C].movedim(4, 1)
    planes[:, C] = in_frame[..., None]
    pose = planes.sum(3)                                 # over frames, (N, C + 1, M, V)
    total = mean_joint(pose, skeleton["centre"]).sum(2)  # over persons, (N, C + 1)
    origin = total[:, :C] / total[:, C:].clamp(min=1)
    square = (planes[:, :C] - origin[:, :, None, None, None]).square_()
    counts = planes[:, C:]                               # (N, 1, M, T, V), 1 or 0
    if x.shape[-1] > C:
        seen = counts * (x[..., C] > 0)[:, None]
        counts = torch.where(seen.flatten(1).any(1).view(-1, 1, 1, 1, 1), seen, counts)
        square *= counts
    square = (square.sum(4).sum(1) * in_frame).sum((1, 2))
    unit = (square / counts.flatten(1).sum(1).clamp(min=1)).sqrt().clamp(min=1e-6)

    linear = torch.eye(C, device=x.device).repeat(N, 1, 1)
    torso = skeleton["parts"].get("torso", ())
    sides = [(left, right) for left, right in skeleton["pairs"] if left in torso]
    if C == 3 and sides and not box:
        left, right = (mean_joint(pose, joints) for joints in zip(*sides))
        first_absent = ~in_frame[:, 0].any(1)
        leader = first_absent.long() * (x.shape[1] - 1)  # person 1 where person 0 never appears
        across = (left - right).gather(2, leader[:, None, None].expand(-1, C + 1, 1))[..., 0]
        linear = rotation(torch.atan2(across[:, 2], across[:, 0]), axis=1)
    linear = linear / unit[:, None, None]
    shift = torch.zeros_like(origin)
    if augmentation:
        change, shift, mirrored = augmentation.draw(N, C, generator, x.device)
        linear = product(change.to(precision), linear)
    constant = shift - (linear * origin[:, None]).sum(2)
    planes = product(torch.cat([linear, constant[..., None]], 2), planes.flatten(2))
    planes = planes.view(N, C, *x.shape[1:4]).float()
    x = torch.cat([planes, x[..., C:].movedim(4, 1)], 1) if x.shape[-1] > C else planes
    if augmentation and augmentation.flip:
        swap = dict(skeleton["pairs"]) | {right: left for left, right in skeleton["pairs"]}
        order = torch.tensor([swap.get(joint, joint) for joint in range(x.shape[4])])
        swapped = x.index_select(4, order.to(x.device, non_blocking=True))
        x = torch.where(mirrored.view(-1, 1, 1, 1, 1), swapped, x)
    if augmentation and augmentation.noise:
        noise = torch.randn(planes.shape, generator=generator, device=x.device)
        x[:, :C] += augmentation.noise * noise * in_frame[:, None, ..., None]
    if box:
        there = in_frame[:, None, ..., None]
        low = x[:, :C].masked_fill(~there, math.inf).amin((2, 3, 4), keepdim=True)
        high = x[:, :C].masked_fill(~there, -math.inf).amax((2, 3, 4), keepdim=True)
        half = ((high - low) / 2).clamp(min=1e-6)
        x[:, :C] = torch.where(there, (x[:, :C] - (low + high) / 2) / half, 0.0)
        unit = unit[:, None] * half.view(N, C)
    return x.movedim(1, 4), origin, unit

def normalise(x, skeleton, channels, box=False, frames=None):
    """Raw whole sequences x (N, M, any T, V, C [+ score]) as a model is tested on them: missing
    joints filled in, persons of whom nothing was seen beside another left out, `frames` frames
    sampled evenly from those before the padding at the end (None: all T), then as
    normalise_frames. Returns (x, origin, unit)."""
    x = x * find_present(x, channels)[..., None, None, None]
    length = length_without_padding((x[..., :channels] != 0).flatten(3).any(3).any(1))
    if x.shape[-1] > channels:
        x = torch.stack([fill_missing(sequence.transpose(0, 1)).transpose(0, 1) for sequence in x])
        padding = torch.arange(x.shape[2], device=x.device) >= length[:, None]  # (N, T)
        x = x.masked_fill(padding[:, None, :, None, None], 0)
    if frames:
        steps = sample_frames(length, frames)
        x = x.transpose(1, 2)[torch.arange(len(x), device=x.device)[:, None], steps].transpose(1, 2)
    in_frame = (x[..., :channels] != 0).flatten(3).any(3)  # (N, M, T)
    return normalise_frames(x, in_frame, skeleton, channels, box)

@dataclass
class Batch:
    x: Tensor         # (N, M, T, V, C), or C + 1 with the joint score last, normalised
    label: Tensor     # (N,)
    present: Tensor   # (N, M) bool, on the CPU
    in_frame: Tensor  # (N, M, T) bool: who is in which frame
    unit: Tensor      # (N,), or (N, C) for the axes of a box: x times unit is in the file's units
    index: Tensor     # (N,) which sequences these are, on the CPU

@dataclass
class Loader:
    """Epochs of batches. What a batch holds depends on (seed, epoch, step) alone, not on workers or
    on what was drawn before; on a GPU the random numbers are drawn there, and are others."""
    data: Sequences
    skeleton: dict
    channels: int
    batch_size: int
    frames: int                                  # T, sampled from each sequence
    training: bool = False                       # in random order, augmented
    seed: int = 0
    augmentation: Augmentation = Augmentation()
    box: bool = False
    repeat: int = 1                              # passes over the data an epoch, in training
    workers: int = 0                             # loader processes; 0: in this one
    rank: int = 0                                # of torchrun: this process takes every world-th
    world: int = 1                               # sequence of each batch

    @property
    def steps(self):
        """Batches an epoch."""
        passes = self.repeat if self.training else 1
        return len(self._batches(torch.arange(len(self.data) * passes)))

    def _batches(self, order):
        """No sequence is dropped: a last batch too small for batch norm joins its neighbour."""
        batches = list(order.split(self.batch_size))
        if len(batches) > 1 and len(batches[-1]) < 2 * self.world:
            last = batches.pop()
            batches[-1] = torch.cat([batches[-1], last])
        return batches

    def epoch(self, epoch=0):
        """The batches of one epoch: in training in its own order, in testing in the file's."""
        order = torch.arange(len(self.data))
        if self.training:
            generator = torch.Generator().manual_seed(self._seed(epoch))
            order = torch.cat([torch.randperm(len(self.data), generator=generator)
                               for _ in range(self.repeat)])
        batches = [(index[self.rank::self.world], self._seed(epoch, step) + self.rank)
                   for step, index in enumerate(self._batches(order), 1)]
        if not self.workers:
            return map(self.batch, batches)
        own = torch.Generator()  # the global one goes on as without workers
        return torch.utils.data.DataLoader(batches, batch_size=None, num_workers=self.workers,
                                           collate_fn=self.batch, generator=own)

    def _seed(self, epoch, step=0):
        """A seed for every step of every epoch, the same in all processes; step 0 is the order."""
        return ((self.seed * 1_000_003 + epoch) * 1_000_003 + step) * 1_003 % 2**62

    def batch(self, index_and_seed):
        """Gathers the sampled frames on the device that holds them, and normalises them."""
        index, seed = index_and_seed
        data, device = self.data, self.data.frames.device
        generator = torch.Generator(device).manual_seed(seed)
        here = index.to(device, non_blocking=True)
        steps = sample_frames(data.length[here], self.frames, self.training,
                              self.augmentation.crop, generator)
        rows = (data.start[here][:, None] + steps).flatten()
        x, in_frame = (flat.index_select(0, rows).unflatten(0, steps.shape).transpose(1, 2)
                       for flat in (data.frames, data.in_frame))
        augmentation = self.augmentation if self.training else None
        x, _, unit = normalise_frames(x, in_frame, self.skeleton, self.channels, self.box,
                                      augmentation, generator)
        return Batch(x, data.label[here], data.present[index], in_frame, unit, index)

# ------------------------------------------------------------ readers: presence and missing joints

def check_numbers(peak, names):
    """peak: the largest absolute value of each sequence, (N,). NaN or above 1e9 is damage."""
    wrong = ~(peak < 1e9)
    if wrong.any():
        raise DataError(f"sequence {names[int(wrong.int().argmax())]} holds NaN, infinite or "
                        "absurd numbers; expected finite ones below 1e9")

def length_without_padding(someone):
    """Frames of each sequence up to the last with anyone in it, at least 1, (N, T) bool -> (N,)."""
    steps = torch.arange(1, someone.shape[1] + 1, device=someone.device)
    return (someone * steps).amax(1).clamp(min=1)

def fill_missing(sequence):
    """Joints that nobody saw, in one sequence (T, M, V, C + 1) with the score last. A joint of
    score 0 at a placeholder, (0, 0) or (1, 1), takes its position from the nearest earlier frame
    that has one, else from the nearest later one, else it is the mean of the person's other joints.
    Other joints of score 0 carry a usable guess. All keep score 0 and never count in a loss."""
    position, score = sequence[..., :-1], sequence[..., -1:]
    known = (score[..., 0] > 0) | ((position != 0).any(-1) & (position != 1).any(-1))  # (T, M, V)
    if known.all():
        return sequence
    T = len(sequence)
    steps = torch.arange(T, device=sequence.device)[:, None, None]
    earlier = torch.where(known, steps, -1).cummax(0).values
    later = torch.where(known, steps, T).flip(0).cummin(0).values.flip(0)
    nearest = torch.where(earlier >= 0, earlier, later % T)  # T, no frame has one, becomes 0
    position = position.gather(0, nearest[..., None].expand_as(position))
    never = ~known.any(0)[None, :, :, None]  # (1, M, V, 1)
    others = position.masked_fill(never, 0).sum(2, keepdim=True)
    position = torch.where(never, others / (~never).sum(2, keepdim=True).clamp(min=1), position)
    return torch.cat([position, score], -1)

def flatten(sequences, labels, names, channels, persons):
    """A list of (T, M, V, C) tensors, or C + 1, T and M may differ, in the one flat form: empty
    frames at the end are cut, missing joints filled in where there are scores."""
    check_numbers(torch.stack([s.abs().max() for s in sequences]), names)
    kept = []
    for s in sequences:
        someone = (s[..., :channels] != 0).flatten(1).any(1)
        s = s[:int(length_without_padding(someone[None]))]
        kept.append(fill_missing(s) if s.shape[-1] > channels else s)
    lengths = [len(s) for s in kept]
    frames = kept[0].new_zeros(sum(lengths), persons, *kept[0].shape[2:])
    for part, s in zip(frames.split(lengths), kept):
        part[:, :s.shape[1]] = s
    in_frame = (frames[..., :channels] != 0).flatten(2).any(2)
    present = torch.stack([part.any(0) for part in in_frame.split(lengths)])
    length = torch.tensor(lengths)
    return Sequences(frames, length.cumsum(0) - length, length, labels, present, in_frame, names)

# ------------------------------------------------------------------------- readers: npz and pickle

DTYPES = dict(f2=torch.float16, f4=torch.float32, f8=torch.float64, i1=torch.int8, i2=torch.int16,
              i4=torch.int32, i8=torch.int64, u1=torch.uint8, b1=torch.bool)

def array(buffer, code, shape, fortran=False, offset=0):
    """The tensor that numpy wrote as `shape` values of dtype `code` ("<f4", ">i8", "|b1") at
    `offset`; no copy where the bytes already lie as torch wants them."""
    dtype = DTYPES.get(code.lstrip("<>|="))
    if dtype is None:
        raise DataError(f"dtype {code!r}; expected one of {', '.join(DTYPES)}: save numbers")
    size = math.prod(shape) * dtype.itemsize
    if len(buffer) - offset < size:
        raise DataError(f"an array {shape} of {code} is truncated; copy the file again")
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=offset)
    if code[0] == ">":
        flat = flat.view(-1, dtype.itemsize).flip(1).flatten()
    flat = flat.view(dtype)
    if fortran:
        return flat.view(shape[::-1]).permute(*reversed(range(len(shape))))
    return flat.view(shape)

def read_npz(path, wanted):
    """The wanted arrays of an npz as tensors. An entry stored without compression is memory-mapped
    in place (private, copy-on-write); a deflated one is inflated."""
    arrays = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        for name in wanted:
            if name not in entries:
                raise DataError(f"no {name}; expected {', '.join(wanted)}, got {list(entries)}")
            info = entries[name]
            if info.compress_type == zipfile.ZIP_STORED:  # after 30 bytes, a name and extra fields
                lengths = struct.unpack_from("<2H", mapped, info.header_offset + 26)
                first = info.header_offset + 30 + sum(lengths)
                body = mapped[first:first + info.file_size]
            else:
                body = memoryview(bytearray(archive.read(info)))
            start, code = (12, "<I") if body[6] > 1 else (10, "<H")  # by the version of the format
            start += struct.unpack_from(code, body, 8)[0]
            header = bytes(body[:start]).decode("latin1")
            npy = ast.literal_eval(header[header.index("{"):])
            arrays[name] = array(body, npy["descr"], npy["shape"], npy["fortran_order"], start)
    return arrays

def read_labels(y, count):
    """Integer labels (N,) from integers (N,), (N, 1) or a one-hot (N, K)."""
    if y.dim() == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dim() == 2 and ((y != 0).sum(1) == 1).all():
        y = (y != 0).int().argmax(1)
    if len(y) != count or y.dim() != 1 or (y != y.long()).any() or (y < 0).any():
        raise DataError(f"labels {tuple(y.shape)} of {y.dtype} for {count} sequences; expected as "
                        "many integers from 0, or one-hot rows")
    return y.long()

def usual_channels(layout):
    """C of the data of a layout as they usually come."""
    return 3 if layout in ("ntu25", "kinect20", "sbu15") else 2

def divide_columns(columns, asked):
    """(M, V, C) of an npz row of M V C columns: that of the asked skeleton or of the known layouts,
    these in their usual number of coordinates, 3D first."""
    for C, M in ((3, 1), (3, 2), (2, 1), (2, 2)):
        for name, skeleton in ({"": asked} if asked else SKELETONS).items():
            V = len(skeleton["joints"])
            if M * V * C == columns and (asked or C == usual_channels(name)):
                return M, V, C
    raise DataError(f"{columns} columns are not persons x joints x coordinates of "
                    f"{'that' if asked else 'a known'} layout; name another with --layout")

def from_npz(path, asked):
    """CTR-GCN's npz: x_* (N, T, M V C) zero-padded at the end, y_* one-hot or integer."""
    arrays = read_npz(path, ("x_train", "y_train", "x_test", "y_test"))
    halves = []
    for half in ("train", "test"):
        x = arrays[f"x_{half}"]
        if x.dim() != 3 or not x.is_floating_point() or 0 in x.shape:
            raise DataError(f"x_{half} {tuple(x.shape)} {x.dtype}; expected floats (N, T, M*V*C)")
        N, T, columns = x.shape
        x = x.reshape(N, T, *divide_columns(columns, asked))
        names = [f"{half}[{i}]" for i in range(N)]
        peak = torch.cat([torch.linalg.vector_norm(part.flatten(3).float(), math.inf, dim=-1)
                          for part in x.split(128)])  # (N, T, M), without a copy of a mapped array
        check_numbers(peak.flatten(1).amax(1), names)
        in_frame = peak > 0
        halves.append(Sequences(
            x.flatten(0, 1), torch.arange(N) * T, length_without_padding(in_frame.any(2)),
            read_labels(arrays[f"y_{half}"], N), in_frame.any(1), in_frame.flatten(0, 1), names))
    return *halves, "x_train / x_test", False

class _DType:
    """Stands in for numpy.dtype."""
    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        self.code = state[1].replace("|", "=") + self.code.lstrip("<>|=")

class _Array:
    """Stands in for numpy.ndarray: holds the tensor."""
    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.tensor = array(bytearray(data), dtype.code, shape, fortran)

class _Unpickler(pickle.Unpickler):
    """A pickle can call what `allowed` names, and nothing else. The functions are made anew for
    each file, so that one file cannot change them for the next."""
    def __init__(self, file):
        super().__init__(file)

        def frombuffer(data, dtype, shape, order):
            made = _Array()
            made.__setstate__((1, shape, dtype, order == "F", data))
            return made

        def scalar(dtype, data):
            return array(bytearray(data), dtype.code, ()).item()

        def encode(text, encoding):
            if encoding != "latin1":
                raise DataError(f"the file asks for encoding {encoding}; expected latin1")
            return text.encode("latin1")

        self.allowed = {"numpy.ndarray": _Array, "numpy.dtype": _DType, "_codecs.encode": encode}
        for core in ("numpy.core", "numpy._core"):
            self.allowed |= {f"{core}.multiarray._reconstruct": lambda *_: _Array(),
                             f"{core}.multiarray.scalar": scalar,
                             f"{core}.numeric._frombuffer": frombuffer}

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.allowed:
            raise DataError(f"the file asks for {module}.{name}, which is never loaded; expected "
                            "arrays, numbers, strings, lists and dicts alone")
        return self.allowed[f"{module}.{name}"]

def read_array(annotation, key):
    value = annotation.get(key)
    if not isinstance(value, _Array):
        raise DataError(f"{key} is {type(value).__name__}; expected an array of numbers")
    return value.tensor.float()

def read_annotation(annotation, scored):
    """The sequence (T, M, V, C) of one annotation, with the joint score last where the file has
    scores. Of more than two persons stay the two with the highest mean score, without scores the
    two that move most."""
    x = read_array(annotation, "keypoint")  # (M, T, V, C)
    if (x.dim() != 4 or x.shape[3] not in (2, 3) or 0 in x.shape
            or len(x) > 5 and x.shape[1] <= 2):  # frames before persons
        raise DataError(f"keypoint {tuple(x.shape)}; expected (M, T, V, C), C 2 or 3, persons "
                        "before frames (of an array a of one person, a[None])")
    if scored:
        score = x.new_ones(x.shape[:3])
        if "keypoint_score" in annotation:
            score = read_array(annotation, "keypoint_score")
        if score.shape != x.shape[:3]:
            raise DataError(f"keypoint_score {tuple(score.shape)}; expected {tuple(x.shape[:3])}")
        x = torch.cat([x, score[..., None]], -1)
        x = x * find_present(x[None], x.shape[-1] - 1)[0, :, None, None, None]
        rank = x[..., -1].mean((1, 2))
    else:
        in_frame = (x != 0).flatten(2).any(2)  # (M, T); who comes or goes does not move by that
        moved = x.diff(dim=1).abs().sum((2, 3)) * (in_frame[:, 1:] & in_frame[:, :-1])
        rank = torch.where(in_frame.any(1), moved.sum(1), -1)
    if len(x) > 2:
        x = x[rank.topk(2).indices.sort().values]
    return x.transpose(0, 1)

def from_pyskl(path, split, test_fraction):
    """PYSKL's pickle, {"split": {name: [frame_dir]}, "annotations": [...]} or the bare list of
    annotations: dicts with `keypoint` (M, T, V, C), `label`, optionally `keypoint_score` (M, T, V)
    and `frame_dir`."""
    with open(path, "rb") as file:
        content = _Unpickler(file).load()
    content = content if isinstance(content, dict) else {"annotations": content}
    annotations = content.get("annotations")
    if not isinstance(annotations, list) or not annotations:
        raise DataError("expected PYSKL's dict with a list `annotations`, or that list alone")
    scored = any("keypoint_score" in annotation for annotation in annotations)
    names = [str(annotation.get("frame_dir", i)) for i, annotation in enumerate(annotations)]
    sequences, labels = [], []
    for name, annotation in zip(names, annotations):
        try:
            sequences.append(read_annotation(annotation, scored))
            labels.append(annotation.get("label"))
            shape, first = (tuple(s.shape[2:]) for s in (sequences[-1], sequences[0]))
            if shape != first:
                raise DataError(f"{shape} joints and coordinates, the first has {first}")
            if type(labels[-1]) is not int or not 0 <= labels[-1] < 100_000:
                raise DataError(f"label {labels[-1]!r}; expected an integer from 0 to 99999")
        except DataError as error:
            raise DataError(f"annotation {name!r}: {error}") from None
    persons = max(s.shape[1] for s in sequences)
    data = flatten(sequences, torch.tensor(labels), names, first[1] - scored, persons)
    return *divide(data, content.get("split"), split, test_fraction), scored

def divide(data: Sequences, splits, wanted, test_fraction):
    """Training half, test half and how they were told apart: by the splits of the file or, where it
    has none, at random, the same for every seed."""
    if splits is None and wanted:
        raise DataError(f"no splits, so --split {wanted} cannot be found; leave it out")
    if splits is None:
        return divide_at_random(data, test_fraction)
    positions, pair = {}, find_split(list(splits), wanted)
    for i, name in enumerate(data.names):
        positions.setdefault(name, []).append(i)
    listed = [dict.fromkeys(map(str, splits[half])) for half in pair]
    rows = [[i for name in names for i in positions.get(name, ())] for names in listed]
    if not all(rows):
        raise DataError(f"a split of {pair} names no annotation; expected lists of frame_dir")
    unknown = sum(name not in positions for names in listed for name in names)
    shared = len(listed[0].keys() & listed[1].keys())
    return *map(data.subset, rows), (
        " / ".join(pair) + f", {unknown} names without an annotation" * bool(unknown)
        + f", {shared} names in both" * bool(shared))

def divide_at_random(data: Sequences, test_fraction):
    """Of every class the same share tests, at least one of two or more. Drawn by a fixed seed
    from the sorted names, so that other classes and their order do not matter."""
    classes, tests = {}, torch.zeros(len(data), dtype=torch.bool)
    for i in sorted(range(len(data)), key=data.names.__getitem__):
        classes.setdefault(int(data.label[i]), []).append(i)
    for members in classes.values():
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(0))
        count = min(max(round(test_fraction * len(members)), 1), len(members) - 1)
        tests[torch.tensor(members)[order[:count]]] = True
    if not 0 < test_fraction < 1 or not tests.any():
        raise DataError(f"test fraction {test_fraction}; expected a share between 0 and 1, and two "
                        "sequences of a class")
    return data.subset(~tests), data.subset(tests), f"a random {test_fraction:g} of each class"

def find_split(names, wanted):
    """(training split, test split). wanted: None for the obvious pair, "xsub" (or a name of the
    pair) for xsub_train and xsub_val or xsub_test, or "a,b" for two names as they stand."""
    pairs = [(a, b) for a in names if a.endswith("train")
             for b in (a[:-5] + "val", a[:-5] + "test") if b in names]
    fits = [pair for pair in pairs if wanted in (None, *pair, pair[0].removesuffix("_train"))]
    if wanted and "," in wanted:
        pair = tuple(part.strip() for part in wanted.split(",", 1))
        fits = [pair] if set(pair) <= set(names) else []
    elif wanted is None and len(fits) > 1:
        obvious = ("xsub_train", "xsub_val"), ("train", "val"), ("train", "test")
        fits = [pair for pair in obvious if pair in pairs]
    if not fits:
        raise DataError(f"no {f'split {wanted}' if wanted else 'obvious split'} among "
                        f"{', '.join(sorted(names))}; name a pair, as in --split xsub or --split "
                        "a_train,a_test")
    return fits[0]

# --------------------------------------------------------------------- readers: .pt, layouts, load

def read_torch(path):
    """torch.load of plain tensors and settings; nothing in the file is run."""
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise almost anything
            asked = re.search(r"GLOBAL ([\w.]+)", str(error))
            why = f"it asks for {asked[1]}, which is never loaded" if asked else brief(error)
            raise DataError(f"no file of plain tensors by torch.save ({why})") from None

def from_pt(path):
    """A dict saved by torch: x_train, x_test lists of tensors (T, M, V, C) (or one tensor (N, T, M,
    V, C)), y_train, y_test labels."""
    content, halves = read_torch(path), []
    x = {half: [s.detach().float() for s in content[f"x_{half}"]] for half in ("train", "test")}
    for half, sequences in x.items():
        for i, s in enumerate(sequences):
            if (s.dim() != 4 or 0 in s.shape or s.shape[1] > 2 or s.shape[3] not in (2, 3)
                    or s.shape[2:] != sequences[0].shape[2:]):
                raise DataError(f"x_{half}[{i}] {tuple(s.shape)}; expected (T, M, V, C), M 1 or 2")
    persons = max(s.shape[1] for sequences in x.values() for s in sequences)
    for half, sequences in x.items():
        label = read_labels(torch.as_tensor(content[f"y_{half}"]), len(sequences))
        names = [f"{half}[{i}]" for i in range(len(sequences))]
        halves.append(flatten(sequences, label, names, sequences[0].shape[3], persons))
    return *halves, "x_train / x_test", False

def load_skeleton(layout):
    """A layout by name, or from a JSON file with the arguments of make_skeleton."""
    if layout in SKELETONS:
        return SKELETONS[layout]
    if not layout.endswith(".json"):
        raise DataError(f"unknown layout {layout}; expected {', '.join(SKELETONS)}, or a JSON file")
    with open(layout) as file:
        try:
            return make_skeleton(**json.load(file))
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(f"{layout} is no skeleton layout ({brief(error)})") from None

def brief(error):
    return f"{type(error).__name__}: {error}"[:300]  # DataError puts it on one line

def load(path=None, split=None, layout=None, test_fraction=0.2, synthetic_size=1600):
    """Reads a data set by the ending of its name, checks it, and finds its layout. Without a path:
    the built-in stick figures. Raises DataError for what is in a file, OSError for the file."""
    asked = load_skeleton(layout) if layout else None
    path = path and os.fspath(path)
    try:
        if path is None:
            layout, score = layout or "coco17", False
            train, test, note = divide(stick_figures(synthetic_size), None, split, test_fraction)
        elif path.endswith((".pt", ".pth")):
            train, test, note, score = from_pt(path)
        elif path.endswith(".npz"):
            train, test, note, score = from_npz(path, asked)
        elif path.endswith((".pkl", ".pickle")):
            train, test, note, score = from_pyskl(path, split, test_fraction)
        else:
            raise DataError("its name ends in neither .npz, .pkl nor .pt")
        if split and note == "x_train / x_test":
            raise DataError(f"it has one split, and --split {split} was asked for; leave it out")
        return assemble(train, test, layout, asked, score, note)
    except DataError as error:
        raise DataError(f"{path or 'stick figures'}: {error}") from None
    except Exception as error:  # a damaged file can make its reader raise almost anything
        if isinstance(error, MemoryError) or getattr(error, "filename", None):
            raise
        raise DataError(f"{path} is damaged or of another format ({brief(error)}); expected "
                        "CTR-GCN's npz, PYSKL's pickle or a .pt dict") from None

def assemble(train: Sequences, test: Sequences, layout, asked, score, split):
    """Finds the layout and checks it; the labels that occur become 0 to K - 1."""
    V, C = train.frames.shape[2], train.frames.shape[3] - score
    if train.frames.shape[1:] != test.frames.shape[1:] or not train.in_frame.any():
        raise DataError("expected anyone in the training sequences, and the same persons, joints "
                        "and coordinates in the test sequences")
    if layout is None:
        fits = [name for name, skeleton in SKELETONS.items() if len(skeleton["joints"]) == V]
        fits = [name for name in fits if C == usual_channels(name)] or fits
        if len(fits) != 1:
            raise DataError(f"{V} joints in {C}D fit {' and '.join(fits) or 'no layout'}; name one "
                            f"with --layout ({', '.join(SKELETONS)}, or a JSON file)")
        layout = fits[0]
    skeleton = asked or SKELETONS[layout]
    if len(skeleton["joints"]) != V:
        raise DataError(f"{V} joints; {layout} has {len(skeleton['joints'])}: another --layout?")
    classes, label = torch.cat([train.label, test.label]).unique(return_inverse=True)
    train.label, test.label = label.split([len(train), len(test)])
    for half in (train, test):
        half.present[:, 0] |= ~half.present.any(1)  # without anyone: an empty first person
    return Dataset(train, test, layout, skeleton, C, score, classes.tolist(), split)

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
# joint angle -> its resting value
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
                table[k, person, angles.index(angle)] = torch.tensor([float(n) for n in numbers])
    label = torch.arange(size) % len(ACTIONS)
    of_two = torch.tensor(["|" in action for action in ACTIONS.values()])[label]
    amplitude, cycles, phase = table[label][..., None, :].unbind(-1)  # (n, 2, angles, 1)
    time = torch.arange(T) / (30 * torch.exp(normal(1, 1, 1, std=0.12))) + normal(1, 1, 1, std=1)
    wave = torch.sin(2 * math.pi * (cycles * time + phase))           # (n, 2, angles, T)
    rest = torch.tensor(list(ANGLES.values()))[:, None] + normal(2, len(angles), 1, std=0.35)
    amplitude = amplitude * (1 + normal(1, 1, 1, std=0.3))
    angle = dict(zip(angles, (rest + amplitude * wave).unbind(2)))    # each (n, 2, T)

    def limb(length, turn, side=1):
        """A bone that hangs down, raised sideways by `turn`."""
        return length * torch.stack([side * turn.sin(), -turn.cos()], -1)  # (n, 2, T, 2)

    hips = torch.stack([angle["along"], angle["up"]], -1)
    neck = hips + limb(-0.5, angle["lean"])
    head = neck + limb(-0.22, angle["lean"])
    joints = {"nose": head}
    for side, name in ((1, "left"), (-1, "right")):
        arm, elbow = angle[f"arm_{name[0]}"], angle[f"elbow_{name[0]}"]
        leg, knee = angle[f"leg_{name[0]}"], angle[f"knee_{name[0]}"]
        x = torch.tensor([side, 0.0])
        joints |= {f"{name}_eye": head + 0.05 * x, f"{name}_ear": head + 0.08 * x,
                   f"{name}_shoulder": neck + 0.19 * x, f"{name}_hip": hips + 0.11 * x}
        joints[f"{name}_elbow"] = joints[f"{name}_shoulder"] + limb(0.3, arm, side)
        joints[f"{name}_wrist"] = joints[f"{name}_elbow"] + limb(0.27, arm + elbow, side)
        joints[f"{name}_knee"] = joints[f"{name}_hip"] + limb(0.42, leg, side)
        joints[f"{name}_ankle"] = joints[f"{name}_knee"] + limb(0.4, leg - knee, side)
    body = torch.stack([joints[name] for name in SKELETONS["coco17"]["joints"]], 3)
    body = body * (1 + normal(2, 1, 1, 2, std=0.25)) * torch.tensor([1, -1])  # y grows downwards
    body[..., 0] -= 0.5 * of_two[:, None, None, None]  # (n, 2, T, 17, 2): two stand apart ...
    body[:, 1, ..., 0] *= -1                           # ... and face to face
    place = torch.tensor([320, 240]) + normal(1, 1, 1, 2, std=40)
    pixels = place + 120 * body + normal(*body.shape[1:], std=1.5)
    pixels[~of_two, 1] = 0
    length = torch.randint(40, T + 1, (size,), generator=generator).tolist()
    sequences = [frames[:n] for frames, n in zip(pixels.transpose(1, 2), length)]
    return flatten(sequences, label, [f"stick[{i:06}]" for i in range(size)], 2, 2)
