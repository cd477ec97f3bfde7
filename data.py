"""Skeleton data without numpy: one flat form for every data set, batches, readers, stick figures.

    data = load("ntu60.npz")     # or a PYSKL pickle, a .pt dict, or None for the stick figures
    batches = Loader(data.train, data.skeleton, data.channels, batch_size=128, frames=64, training=True)
    for batch in batches.epoch(0):
        batch.x                  # (N, M, T, V, C), or C + 1 with the joint score last

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

# before torch: skeletonmae silences torch's warning that numpy is missing
from skeletonmae import SKELETONS, find_present, make_skeleton
import torch
from torch import Tensor
from torch.nn.functional import pad

warnings.filterwarnings("ignore", message="This DataLoader will create")  # the user asked for them


class DataError(ValueError):
    """Input that cannot be used. The message is one line: expected, got, fix."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclass
class Sequences:
    """N sequences of one split: one flat tensor of frames and an index into it."""
    frames: Tensor    # (F, M, V, C), or C + 1 with the joint score last, in the units of the file
    start: Tensor     # (N,) int64, first frame of each sequence
    length: Tensor    # (N,) int64, frames of each sequence, at least 1
    label: Tensor     # (N,) int64, 0 to K - 1
    present: Tensor   # (N, M) bool, stays on the CPU: who is there at all
    in_frame: Tensor  # (F, M) bool: who is in which frame; others are all zero
    names: list       # (N,) for messages

    def __len__(self) -> int:
        return len(self.start)

    def subset(self, index) -> "Sequences":
        index = torch.arange(len(self))[index]  # from numbers or a mask
        return replace(self, start=self.start[index], length=self.length[index],
                       label=self.label[index], present=self.present[index],
                       names=[self.names[i] for i in index.tolist()])

    def to(self, device) -> "Sequences":
        return replace(self, **{name: getattr(self, name).to(device) for name in
                                ("frames", "start", "length", "label", "in_frame")})


@dataclass
class Dataset:
    train: Sequences
    test: Sequences
    layout: str      # name of the skeleton layout
    skeleton: dict
    channels: int    # C, 2 or 3, the score not counted
    score: bool      # frames carry a joint score as one further channel
    classes: list    # label values from the lowest to the highest in the two halves, K of them
    split: str       # how training and test sequences were told apart

    @property
    def persons(self) -> int:
        return self.train.frames.shape[1]

    def __str__(self) -> str:
        halves = self.train, self.test
        lengths = torch.cat([half.length for half in halves])
        unused = len(self.classes) - len(torch.cat([half.label for half in halves]).unique())
        return (f"{len(self.train)} training and {len(self.test)} test sequences ({self.split}), "
                f"{len(self.classes)} classes{f' ({unused} without a sequence)' * (unused > 0)}, "
                f"{self.persons} person{'s' * (self.persons > 1)}, layout {self.layout} "
                f"({len(self.skeleton['joints'])} joints), {self.channels}D"
                f"{' with joint scores' * self.score}, {int(lengths.min())} to "
                f"{int(lengths.max())} frames")


# ------------------------------------------------------------------- sampling and normalising

def sample_frames(length: Tensor, frames: int, training: bool, crop: float = 1.0,
                  generator=None) -> Tensor:
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


def rotation(angle: Tensor, axis: int) -> Tensor:
    """Rotations by angle (N,), in radians, about a coordinate axis of 3D space, (N, 3, 3)."""
    a, b = [k for k in range(3) if k != axis]
    matrix = torch.eye(3, device=angle.device).repeat(len(angle), 1, 1)
    matrix[:, a, a] = matrix[:, b, b] = angle.cos()
    matrix[:, a, b] = angle.sin()
    matrix[:, b, a] = -angle.sin()
    return matrix


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, (N, I, J) and (N, J, K). On a GPU as a sum, for a @ b may round factors to ten bits."""
    return (a[..., None] * b[:, None]).sum(2) if a.is_cuda else a @ b


def mean_joint(pose: Tensor, joints: list) -> Tensor:
    """Mean of some joints, (..., V) -> (...). Without an index list, for which a GPU would wait."""
    return torch.stack([pose[..., joint] for joint in joints]).mean(0)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a normalised sequence, one draw for all its frames but for the noise. 0
    turns a change off."""
    rotation: float = 0.0   # 3D: degrees to either side about the vertical, half about the horizontal
    scaling: float = 0.0    # each axis is scaled by 1 - scaling to 1 + scaling
    shift: float = 0.0      # the sequence moves by up to this, in units of the normalised body
    flip: float = 0.0       # probability of a mirror image, left and right joints swapped
    noise: float = 0.0      # standard deviation of Gaussian noise on every coordinate
    crop: float = 1.0       # see sample_frames

    def draw(self, num: int, channels: int, generator, device) -> tuple:
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


def normalise_frames(x: Tensor, in_frame: Tensor, skeleton: dict, channels: int, box: bool = False,
                     augmentation: Augmentation | None = None, generator=None) -> tuple:
    """Centres, scales and turns sampled frames x (N, M, T, V, C [+ score]) and changes them at
    random: x -> linear (x - origin) + shift, one affine map a sequence. in_frame: bool (N, M, T);
    who is not in a frame stays all zero there.

    The origin is the mean of the centre joints over frames and persons: one for both persons, or
    their distance would vanish. The unit is the root mean square distance of the seen joints (all
    joints, where a sequence has none) from it: the size of the body and of its path. 3D sequences
    (y is vertical) are turned about the vertical so that the first person's left and right shoulders
    and hips lie along x on average, the left at larger x: the camera's place drops out.
    box: instead of turning, each axis is stretched to -1 to 1 at the end, as in CTR-GCN's feeder.
    Returns (x, origin (N, C), unit (N,), or (N, C) for the axes of a box), in the units of the file.
    """
    C, N = channels, len(x)
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    planes = x.new_empty(N, C + 1, *x.shape[1:4], dtype=precision)  # (N, C + 1, M, T, V): a plane a
    planes[:, :C] = x[..., :C].movedim(4, 1)                        # coordinate, and one that is 1
    planes[:, C] = in_frame[..., None]                              # where someone is in the frame
    pose = planes.sum(3)                                            # over frames, (N, C + 1, M, V)
    total = mean_joint(pose, skeleton["centre"]).sum(2)             # over persons, (N, C + 1)
    origin = total[:, :C] / total[:, C:].clamp(min=1)

    square = (planes[:, :C] - origin[:, :, None, None, None]).square_()
    counted = in_frame[..., None]                                   # (N, M, T, 1), or V if scored
    if x.shape[-1] > C:
        seen = counted & (x[..., C] > 0)
        counted = torch.where(seen.flatten(1).any(1).view(-1, 1, 1, 1), seen, counted)
        square *= counted[:, None]
    square = (square.sum(4).sum(1) * in_frame).sum((1, 2))
    number = counted.sum((1, 2, 3)) * (x.shape[3] // counted.shape[3])
    unit = (square / number.clamp(min=1)).sqrt().clamp(min=1e-6)

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


def normalise(x: Tensor, skeleton: dict, channels: int, box: bool = False,
              frames: int | None = None) -> tuple:
    """Raw whole sequences x (N, M, any T, V, C [+ score]) as a model is tested on them: missing
    joints filled in, persons of whom nothing was seen beside another left out, `frames` frames
    sampled evenly from those before the padding at the end (None: all T), then as
    normalise_frames. Returns (x, origin, unit)."""
    scored = x.shape[-1] > channels
    if scored:
        x = without_absent(x)
    in_frame = (x[..., :channels] != 0).flatten(3).any(3)  # (N, M, T)
    length = length_without_padding(in_frame.transpose(1, 2))
    if scored:
        x = torch.stack([fill_missing(sequence.transpose(0, 1)).transpose(0, 1) for sequence in x])
        padding = torch.arange(x.shape[2], device=x.device) >= length[:, None]  # (N, T)
        x = x.masked_fill(padding[:, None, :, None, None], 0)
        in_frame = (x[..., :channels] != 0).flatten(3).any(3)
    if frames:
        rows = torch.arange(len(x), device=x.device)[:, None]
        steps = sample_frames(length, frames, training=False)
        x = x.transpose(1, 2)[rows, steps].transpose(1, 2)
        in_frame = in_frame.transpose(1, 2)[rows, steps].transpose(1, 2)
    return normalise_frames(x, in_frame, skeleton, channels, box)


# ------------------------------------------------------------------------------------- batches

@dataclass
class Batch:
    x: Tensor         # (N, M, T, V, C), or C + 1 with the joint score last, normalised
    label: Tensor     # (N,)
    present: Tensor   # (N, M) bool, on the CPU
    in_frame: Tensor  # (N, M, T) bool: who is in which frame
    unit: Tensor      # (N,), or (N, C) for the axes of a box: x times unit is in the file's units
    index: Tensor     # (N,) which sequences these are, on the CPU


class Loader:
    """Epochs of batches. What a batch holds depends on (seed, epoch, step) alone, not on workers or
    on what was drawn before; on a GPU the random numbers are drawn there, and are others.

    repeat: passes over the data per epoch, each in an order of its own. No sequence is dropped: a
    last batch of fewer than two for each process, too few for batch norm, joins its neighbour.
    rank, world: this process takes every world-th sequence of each batch. workers: loader processes;
    0 builds batches here, one gather and a few vector operations each.
    """

    def __init__(self, data: Sequences, skeleton: dict, channels: int, batch_size: int, frames: int,
                 training: bool, seed: int = 0, augmentation: Augmentation | None = None,
                 box: bool = False, repeat: int = 1, workers: int = 0, rank: int = 0,
                 world: int = 1):
        self.data, self.skeleton, self.channels = data, skeleton, channels
        self.batch_size, self.frames, self.training, self.box = batch_size, frames, training, box
        self.augmentation = augmentation if training else None
        self.seed, self.repeat, self.workers = seed, repeat, workers
        self.rank, self.world = rank, world
        self.steps = len(self._batches(torch.arange(len(data) * repeat)))

    def _batches(self, order: Tensor) -> list:
        batches = list(order.split(self.batch_size))
        if len(batches) > 1 and len(batches[-1]) < 2 * self.world:
            last = batches.pop()
            batches[-1] = torch.cat([batches[-1], last])
        return batches

    def epoch(self, epoch: int = 0):
        """The batches of one epoch, in training in an order of its own, in testing in the file's."""
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

    def _seed(self, epoch: int, step: int = 0) -> int:
        """A seed for every step of every epoch, the same in all processes; step 0 is the order."""
        return ((self.seed * 1_000_003 + epoch) * 1_000_003 + step) * 1_003 % 2**62

    def batch(self, index_and_seed) -> Batch:
        """Gathers the sampled frames on the device that holds them, and normalises them."""
        index, seed = index_and_seed
        data, device = self.data, self.data.frames.device
        generator = torch.Generator(device).manual_seed(seed)
        here = index.to(device, non_blocking=True)
        crop = self.augmentation.crop if self.augmentation else 1.0
        steps = sample_frames(data.length[here], self.frames, self.training, crop, generator)
        rows = (data.start[here][:, None] + steps).flatten()
        x, in_frame = (flat.index_select(0, rows).unflatten(0, steps.shape).transpose(1, 2)
                       for flat in (data.frames, data.in_frame))
        x, _, unit = normalise_frames(x, in_frame, self.skeleton, self.channels, self.box,
                                      self.augmentation, generator)
        return Batch(x, data.label[here], data.present[index], in_frame, unit, index)


# ---------------------------------------------------------------------------- presence, missing joints

MAX_COORDINATE = 1e9  # beyond any unit a body is measured in: a larger number is damage


def find_in_frame(x: Tensor, names: list, scored: bool = False) -> Tensor:
    """Who is in which frame of x (N, T, M, V, C), or C + 1 with the joint score last: whoever has a
    coordinate that is not 0. Returns bool (N, T, M); raises DataError where numbers are not finite.
    In chunks, so that a memory-mapped array is never copied."""
    chunks = []
    for first in range(0, len(x), 128):
        part = x[first:first + 128].flatten(3)
        peak = torch.linalg.vector_norm(part.float(), math.inf, dim=-1)  # (n, T, M)
        wrong = (~(peak < MAX_COORDINATE)).flatten(1).any(1)
        if wrong.any():
            raise DataError(f"sequence {names[first + int(wrong.int().argmax())]} holds NaN, infinite "
                            f"or absurd numbers; expected finite ones below {MAX_COORDINATE:g}")
        chunks.append((x[first:first + 128, ..., :-1] != 0).flatten(3).any(3) if scored else peak > 0)
    return torch.cat(chunks)


def length_without_padding(in_frame: Tensor) -> Tensor:
    """Frames of each sequence up to the last with anyone in it, (N,), at least 1, from (N, T, M)."""
    someone, steps = in_frame.any(2), torch.arange(1, in_frame.shape[1] + 1, device=in_frame.device)
    return (someone * steps).amax(1).clamp(min=1)


def find_present_from_frames(in_frame: Tensor) -> Tensor:
    """(N, T, M) -> (N, M); a sequence without anyone still holds one (empty) first person."""
    present = in_frame.any(1)
    present[:, 0] |= ~present.any(1)
    return present


def fill_missing(sequence: Tensor) -> Tensor:
    """Joints that nobody saw, in one sequence (T, M, V, C + 1) with the score last. A joint of score
    0 at a placeholder, (0, 0) or (1, 1), takes its position from the nearest earlier frame that has
    one, else from the nearest later one, else it is the mean of the person's other joints. Other
    joints of score 0 carry a usable guess and are kept. All keep score 0 and never count in a loss."""
    position, score = sequence[..., :-1], sequence[..., -1:]
    known = (score[..., 0] > 0) | ((position != 0).any(-1) & (position != 1).any(-1))  # (T, M, V)
    if known.all():
        return sequence
    T = len(sequence)
    steps = torch.arange(T, device=sequence.device)[:, None, None]
    earlier = torch.where(known, steps, -1).cummax(0).values
    later = torch.where(known, steps, T).flip(0).cummin(0).values.flip(0)
    nearest = torch.where(earlier >= 0, earlier, later % T)  # where no frame has one: any
    position = position.gather(0, nearest[..., None].expand_as(position))
    never = ~known.any(0)[None, :, :, None]  # (1, M, V, 1)
    others = position.masked_fill(never, 0).sum(2, keepdim=True)
    position = torch.where(never, others / (~never).sum(2, keepdim=True).clamp(min=1), position)
    return torch.cat([position, score], -1)


def without_absent(x: Tensor) -> Tensor:
    """x (N, M, T, V, C + 1), the joint score last, in which an absent person is all zero."""
    return x * find_present(x, x.shape[-1] - 1).to(x.device)[..., None, None, None]


def flatten(sequences: list, labels: Tensor, names: list, persons: int, scored: bool) -> Sequences:
    """A list of (T, M, V, C) tensors, or C + 1, T and M may differ, in the one flat form."""
    in_frames, lengths = [], []
    for sequence, name in zip(sequences, names):
        in_frame = find_in_frame(sequence[None], [name], scored)
        lengths.append(int(length_without_padding(in_frame)))
        in_frames.append(pad(in_frame[0, :lengths[-1]], (0, persons - sequence.shape[1])))
    frames = sequences[0].new_zeros(sum(lengths), persons, *sequences[0].shape[2:])
    for part, sequence in zip(frames.split(lengths), sequences):
        part[:, :sequence.shape[1]] = sequence[:len(part)]
    length = torch.tensor(lengths)
    present = torch.cat([find_present_from_frames(in_frame[None]) for in_frame in in_frames])
    return Sequences(frames, length.cumsum(0) - length, length, labels, present,
                     torch.cat(in_frames), names)


# ---------------------------------------------------------------------------- .npy and .npz by hand

DTYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "i1": torch.int8,
          "i2": torch.int16, "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8,
          "b1": torch.bool}


def array(buffer, code: str, shape: tuple, fortran: bool = False, offset: int = 0) -> Tensor:
    """The tensor that numpy wrote as `shape` values of dtype `code` ("<f4", ">i8", "|b1") at
    `offset`; no copy where the bytes already lie as torch wants them."""
    kind = code.lstrip("<>|=")
    if kind not in DTYPES:
        raise DataError(f"dtype {code!r} is not supported; expected one of {', '.join(DTYPES)}: save "
                        "a numeric array, and names as a list of strings")
    dtype = DTYPES[kind]
    size = math.prod(shape) * dtype.itemsize
    if len(buffer) - offset < size:
        raise DataError(f"an array of shape {shape} and dtype {code!r} needs {size} bytes, "
                        f"{len(buffer) - offset} are there; the file is truncated, copy it again")
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=offset)
    if code[0] == ">":
        flat = flat.view(-1, dtype.itemsize).flip(1).flatten()
    flat = flat.view(dtype)
    return flat.view(shape[::-1]).movedim(*transposed(len(shape))) if fortran else flat.view(shape)


def transposed(n: int) -> tuple:
    return tuple(range(n)), tuple(reversed(range(n)))


def read_npy(body: memoryview) -> Tensor:
    """The array of a .npy file."""
    if body[:6] != b"\x93NUMPY":
        raise DataError("expected a .npy array, found something else; save the file again")
    wide = body[6] > 1  # version 1 has a header length of two bytes, later ones of four
    size = struct.unpack_from("<I" if wide else "<H", body, 8)[0]
    first = 12 if wide else 10
    fields = ast.literal_eval(bytes(body[first:first + size]).decode("latin1"))
    return array(body, fields["descr"], fields["shape"], fields["fortran_order"], first + size)


def read_npz(path: str, wanted: tuple) -> dict:
    """The wanted arrays of an npz as tensors. An entry stored without compression is memory-mapped
    in place (private, copy-on-write); a deflated one is inflated."""
    arrays = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        for name in wanted:
            if name not in entries:
                raise DataError(f"no array {name}; expected {', '.join(wanted)}, found "
                                f"{', '.join(sorted(entries)) or 'nothing'}")
            info = entries[name]
            if info.compress_type == zipfile.ZIP_STORED:  # after 30 bytes, a name and extra fields
                lengths = struct.unpack_from("<2H", mapped, info.header_offset + 26)
                first = info.header_offset + 30 + sum(lengths)
                body = mapped[first:first + info.file_size]
            else:
                body = memoryview(bytearray(archive.read(info)))
            arrays[name] = read_npy(body)
    return arrays


def read_labels(y: Tensor, count: int) -> Tensor:
    """Integer labels (N,) from integers (N,), (N, 1) or a one-hot (N, K)."""
    if y.dim() == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dim() == 2 and ((y != 0).sum(1) == 1).all():
        y = (y != 0).int().argmax(1)
    if len(y) != count or y.dim() != 1 or (y != y.long()).any() or (y < 0).any():
        raise DataError(f"labels have shape {tuple(y.shape)} and dtype {y.dtype} for {count} "
                        "sequences; expected as many integers from 0, or one-hot rows")
    return y.long()


def usual_channels(layout: str) -> int:
    """C of the data of a layout as they usually come."""
    return 3 if layout in ("ntu25", "kinect20", "sbu15") else 2


def divide_columns(columns: int, asked: dict | None) -> tuple:
    """(M, V, C) of an npz row of M V C columns: that of the asked skeleton or of the known layouts,
    these in their usual number of coordinates, 3D first."""
    for C in (3, 2):
        for M in (1, 2):
            for name, skeleton in ({"": asked} if asked else SKELETONS).items():
                V = len(skeleton["joints"])
                if M * V * C == columns and (asked or C == usual_channels(name)):
                    return M, V, C
    raise DataError(f"{columns} columns are not persons (1 or 2) x joints x coordinates (2 or 3) of "
                    f"{'that layout' if asked else 'a known layout'}; name another with --layout")


def from_npz(path: str, asked: dict | None) -> tuple:
    """CTR-GCN's npz: x_* (N, T, M V C) zero-padded at the end, y_* one-hot or integer."""
    arrays = read_npz(path, ("x_train", "y_train", "x_test", "y_test"))
    halves = []
    for half in ("train", "test"):
        x = arrays[f"x_{half}"]
        if x.dim() != 3 or not x.is_floating_point() or 0 in x.shape:
            raise DataError(f"x_{half} has shape {tuple(x.shape)} and dtype {x.dtype}; expected "
                            "floats (N, T, M*V*C), none of them 0")
        N, T, columns = x.shape
        x = x.reshape(N, T, *divide_columns(columns, asked))
        names = [f"{half}[{i}]" for i in range(N)]
        in_frame = find_in_frame(x, names)
        halves.append(Sequences(x.flatten(0, 1), torch.arange(N) * T, length_without_padding(in_frame),
                                read_labels(arrays[f"y_{half}"], N),
                                find_present_from_frames(in_frame), in_frame.flatten(0, 1), names))
    return *halves, "x_train / x_test", False


# ---------------------------------------------------------------------------- pickles without numpy

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
        if not isinstance(data, (bytes, bytearray)):
            raise DataError("an array holds Python objects, which are never loaded; save numbers")
        self.tensor = array(bytearray(data), dtype.code, shape, fortran)


class _Unpickler(pickle.Unpickler):
    """A pickle can call what `allowed` names, and nothing else. The functions are made anew for each
    file, so that one file cannot change them for the next."""

    def __init__(self, file):
        super().__init__(file)

        def frombuffer(data, dtype, shape, order="C"):
            made = _Array()
            made.__setstate__((1, shape, dtype, order == "F", data))
            return made

        def scalar(dtype, data):
            return array(bytearray(data), dtype.code, ()).item()

        def encode(text, encoding):
            if encoding != "latin1":
                raise DataError(f"the pickle asks for encoding {encoding}; expected latin1")
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


def read_array(annotation: dict, key: str) -> Tensor:
    value = annotation.get(key)
    if not isinstance(value, _Array):
        raise DataError(f"{key} is {type(value).__name__}; expected an array of numbers")
    return value.tensor.float()


def read_annotation(annotation: dict, scored: bool) -> Tensor:
    """The sequence (T, M, V, C) of one annotation, with the joint score last where the file has
    scores. Of more than two persons stay the two with the highest mean score, without scores the
    two that move most."""
    keypoint = read_array(annotation, "keypoint")
    swapped = keypoint.dim() == 4 and len(keypoint) > 5 and keypoint.shape[1] <= 2
    if keypoint.dim() != 4 or keypoint.shape[3] not in (2, 3) or 0 in keypoint.shape or swapped:
        raise DataError(f"keypoint has shape {tuple(keypoint.shape)}; expected (M, T, V, C) with C 2 "
                        "or 3, persons before frames (of an array a of one person, a[None])")
    if scored:
        score = keypoint.new_ones(keypoint.shape[:3])
        if annotation.get("keypoint_score") is not None:
            score = read_array(annotation, "keypoint_score")
        if score.shape != keypoint.shape[:3]:
            raise DataError(f"keypoint_score has shape {tuple(score.shape)}; expected "
                            f"{tuple(keypoint.shape[:3])}")
        keypoint = torch.cat([keypoint, score[..., None]], -1)
    if len(keypoint) > 2:
        if scored:
            rank = keypoint[..., -1].mean((1, 2))
        else:
            in_frame = (keypoint != 0).flatten(2).any(2)  # (M, T); who comes or goes does not move
            moved = keypoint.diff(dim=1).abs().sum((2, 3)) * (in_frame[:, 1:] & in_frame[:, :-1])
            rank = torch.where(in_frame.any(1), moved.sum(1), -1)
        keypoint = keypoint[rank.topk(2).indices.sort().values]
    if scored:
        keypoint = without_absent(keypoint[None])[0]
    return keypoint.transpose(0, 1)


def from_pyskl(path: str, split: str | None, test_fraction: float) -> tuple:
    """PYSKL's pickle, {"split": {name: [frame_dir]}, "annotations": [...]} or the bare list of
    annotations. An annotation holds `keypoint` (M, T, V, C), `label`, optionally `keypoint_score`
    (M, T, V) and `frame_dir`."""
    with open(path, "rb") as file:
        content = _Unpickler(file).load()
    annotations, splits = content, None
    if isinstance(content, dict):
        annotations, splits = content.get("annotations"), content.get("split")
    if not isinstance(annotations, list) or not annotations:
        raise DataError(f"it holds {type(content).__name__}; expected PYSKL's dict with a list "
                        "`annotations`, or that list alone")
    scored = any("keypoint_score" in annotation for annotation in annotations)
    names, sequences, labels = [], [], []
    for i, annotation in enumerate(annotations):
        name, label = str(annotation.get("frame_dir", i)), annotation.get("label")
        try:
            sequence = read_annotation(annotation, scored)
            if sequences and sequence.shape[2:] != sequences[0].shape[2:]:
                raise DataError(f"keypoint has {tuple(sequence.shape[2:])} joints and coordinates, "
                                f"the first has {tuple(sequences[0].shape[2:])}")
            if type(label) is not int or not 0 <= label < 100_000:
                raise DataError(f"label is {label!r}; expected an integer from 0 to 99999")
        except DataError as error:
            raise DataError(f"annotation {name!r}: {error}") from None
        names.append(name)
        sequences.append(sequence)
        labels.append(label)
    persons = max(sequence.shape[1] for sequence in sequences)
    data = flatten(sequences, torch.tensor(labels), names, persons, scored)
    if scored:
        for first, length in zip(data.start.tolist(), data.length.tolist()):
            part = data.frames[first:first + length]
            part.copy_(fill_missing(part))
        data.in_frame = (data.frames[..., :-1] != 0).flatten(2).any(2)
    return *divide(data, splits, split, test_fraction), scored


def divide(data: Sequences, splits: dict | None, wanted: str | None, test_fraction: float) -> tuple:
    """Training half, test half and how they were told apart: by the splits of the file or, where it
    has none, at random, the same for every seed."""
    if splits is None:
        if wanted:
            raise DataError(f"no splits, so --split {wanted} cannot be found; leave it out")
        return divide_at_random(data, test_fraction)
    train_name, test_name = find_split(list(splits), wanted)
    positions = {}
    for i, name in enumerate(data.names):
        positions.setdefault(name, []).append(i)
    halves, unknown = [], 0
    for half in (train_name, test_name):
        listed = [str(name) for name in splits[half] if str(name) in positions]
        if not listed:
            raise DataError(f"split {half} names no annotation; expected a list of frame_dir")
        unknown += len(splits[half]) - len(listed)
        halves.append(data.subset([i for name in dict.fromkeys(listed) for i in positions[name]]))
    shared = len({*halves[0].names} & {*halves[1].names})
    return *halves, (f"{train_name} / {test_name}"
                     + f", {unknown} of their names without an annotation" * (unknown > 0)
                     + f", {shared} of their names in both" * (shared > 0))


def divide_at_random(data: Sequences, test_fraction: float) -> tuple:
    """Of every class the same share tests, at least one sequence and not all. Drawn by a fixed seed
    from the sorted names, so that other classes and their order do not matter."""
    classes, test = {}, []
    for i in sorted(range(len(data)), key=data.names.__getitem__):
        classes.setdefault(int(data.label[i]), []).append(i)
    for members in classes.values():
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(0)).tolist()
        count = min(max(round(test_fraction * len(members)), 1), len(members) - 1)
        test += [members[i] for i in order[:count]]
    tests = torch.zeros(len(data), dtype=torch.bool)
    tests[test] = True
    if not 0 < test_fraction < 1 or not tests.any():
        raise DataError(f"test fraction {test_fraction} of {len(data)} sequences; expected a share "
                        "between 0 and 1, and two sequences of a class")
    return data.subset(~tests), data.subset(tests), f"a random {test_fraction:g} of each class tests"


def find_split(names: list, wanted: str | None) -> tuple:
    """The pair (training split, test split). wanted: None for the obvious pair, "xsub" (or a name of
    the pair) for xsub_train and xsub_val or xsub_test, or "a,b" for two names as they stand."""
    pairs = [(a, b) for a in names if a.endswith("train")
             for b in (a[:-5] + "val", a[:-5] + "test") if b in names]
    if wanted is None:
        obvious = ("xsub_train", "xsub_val"), ("train", "val"), ("train", "test")
        fits = [pair for pair in obvious if pair in pairs] or (pairs if len(pairs) == 1 else [])
    elif "," in wanted:
        pair = tuple(part.strip() for part in wanted.split(",", 1))
        fits = [pair] if set(pair) <= set(names) else []
    else:
        fits = [pair for pair in pairs if wanted in (*pair, pair[0].removesuffix("_train"))]
    if not fits:
        raise DataError(f"{'no obvious split' if wanted is None else f'no split {wanted}'}; present "
                        f"are {', '.join(sorted(names))}: name a pair with --split, as in "
                        "--split xsub or --split a_train,a_test")
    return fits[0]


# ---------------------------------------------------------------------------- .pt, layouts, load

def read_torch(path: str):
    """torch.load of plain tensors and settings; nothing in the file is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise almost anything
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {culprit[1]}, which is never loaded" if culprit else one_line(error)
        raise DataError(f"{path} is no file of plain tensors by torch.save ({reason})") from None


def from_pt(path: str) -> tuple:
    """A dict saved by torch: x_train, x_test lists of tensors (T, M, V, C) (or one tensor (N, T, M,
    V, C)), y_train, y_test labels."""
    content = read_torch(path)
    halves = {}
    for half in ("train", "test"):
        if not isinstance(content, dict) or not {f"x_{half}", f"y_{half}"} <= content.keys():
            raise DataError(f"no x_{half} with its y_{half}; expected a dict of x_train, y_train, "
                            "x_test, y_test")
        x = [torch.as_tensor(sequence).detach() for sequence in content[f"x_{half}"]]
        for i, s in enumerate(x):
            if (s.dim() != 4 or 0 in s.shape or s.shape[2:] != x[0].shape[2:] or s.shape[1] > 2
                    or s.shape[3] not in (2, 3) or s.is_complex()):
                raise DataError(f"x_{half}[{i}] has shape {tuple(s.shape)} and dtype {s.dtype}; "
                                "expected real numbers (T, M, V, C), M 1 or 2, C 2 or 3, V and C the "
                                "same in all")
        if not x:
            raise DataError(f"x_{half} is empty; expected a list of tensors (T, M, V, C)")
        label = read_labels(torch.as_tensor(content[f"y_{half}"]), len(x))
        halves[half] = [s.float() for s in x], label
    persons = max(s.shape[1] for x, _ in halves.values() for s in x)
    train, test = (flatten(x, label, [f"{half}[{i}]" for i in range(len(x))], persons, False)
                   for half, (x, label) in halves.items())
    return train, test, "x_train / x_test", False


def find_layout(V: int, C: int) -> str:
    fits = [name for name, skeleton in SKELETONS.items() if len(skeleton["joints"]) == V]
    fits = [name for name in fits if C == usual_channels(name)] or fits
    if len(fits) != 1:
        raise DataError(f"{V} joints in {C}D fit {' and '.join(fits) or 'no known layout'}; name one "
                        f"with --layout ({', '.join(SKELETONS)}, or a JSON file)")
    return fits[0]


def load_skeleton(layout: str) -> dict:
    """A layout by name, or from a JSON file with the arguments of make_skeleton."""
    if layout in SKELETONS:
        return SKELETONS[layout]
    if not layout.endswith(".json"):
        raise DataError(f"unknown layout {layout}; expected {', '.join(SKELETONS)}, or a JSON file")
    try:
        with open(layout) as file:
            return make_skeleton(**json.load(file))
    except (TypeError, ValueError) as error:
        raise DataError(f"{layout} is no skeleton layout ({one_line(error)}); expected joints, "
                        "edges, parts, centre, and optionally pairs") from None


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def load(path: str | None = None, split: str | None = None, layout: str | None = None,
         test_fraction: float = 0.2, synthetic_size: int = 1600) -> Dataset:
    """Reads a data set by the ending of its name, checks all of it, and finds its layout. Without a
    path: the built-in stick figures. Raises DataError for what is in the file, OSError for the file
    itself."""
    path = path and os.fspath(path)
    asked = load_skeleton(layout) if layout else None
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
            raise DataError("its name ends in neither .npz, .pkl nor .pt; expected CTR-GCN's npz, "
                            "PYSKL's pickle or a .pt dict")
        if split and note == "x_train / x_test":
            raise DataError(f"it has one split, and --split {split} was asked for; leave it out")
        return describe(train, test, layout, asked, score, note)
    except DataError as error:
        raise DataError(f"{path or 'stick figures'}: {error}") from None
    except OSError as error:
        if error.filename:
            raise
        raise DataError(f"{path} cannot be read ({one_line(error)})") from None
    except Exception as error:  # a damaged file can make its reader raise almost anything
        raise DataError(f"{path} is damaged or of another format ({one_line(error)}); expected "
                        "CTR-GCN's npz, PYSKL's pickle or a .pt dict, copy it again") from None


def describe(train: Sequences, test: Sequences, layout: str | None, asked: dict | None, score: bool,
             split: str) -> Dataset:
    """The two halves as a Dataset: finds the layout, checks it, lets labels start at 0."""
    if train.frames.shape[1:] != test.frames.shape[1:]:
        raise DataError("x_train and x_test have different numbers of persons, joints or coordinates")
    V, C = train.frames.shape[2], train.frames.shape[3] - score
    layout = layout or find_layout(V, C)
    skeleton = asked or SKELETONS[layout]
    if len(skeleton["joints"]) != V:
        raise DataError(f"{V} joints, layout {layout} has {len(skeleton['joints'])}; choose another "
                        "--layout or a JSON file")
    if not train.in_frame.any():
        raise DataError("every coordinate of the training sequences is zero; expected skeletons")
    labels = torch.cat([train.label, test.label])
    first = int(labels.min())
    train.label, test.label = train.label - first, test.label - first
    classes = list(range(first, int(labels.max()) + 1))
    return Dataset(train, test, layout, skeleton, C, score, classes, split)


# ------------------------------------------------------------------------ built-in stick figures

# What the angles of a stick figure do in each action: joint angle, amplitude in radians or body
# units, cycles per period, phase in periods. All swing about the same resting pose, so no single
# pose gives the action away. _l and _r are exchanged at random. After "|": the second person, who
# stands face to face.
ACTIONS = {
    "walk": "leg_l .5 1 0, leg_r .5 1 .5, swing_l .5 1 .5, swing_r .5 1 0, knee_l .3 1 .3, knee_r .3 1 .8",
    "jumping jack": "raise_l .8 1 0, raise_r .8 1 0, up .12 1 .1",
    "windmill": "raise_l .8 1 0, raise_r .8 1 .5",
    "squat": "knee_l .6 1 0, knee_r .6 1 0, leg_l .4 1 0, leg_r .4 1 0, up .2 1 .5",
    "wave": "elbow_r .6 2 0, raise_r .3 2 .25",
    "wave slowly": "elbow_r .6 .7 0, raise_r .3 .7 .25",
    "box": "swing_l .6 1.5 0, swing_r .6 1.5 .5, elbow_l .6 1.5 .5, elbow_r .6 1.5 0",
    "kick": "leg_r .8 1 0, knee_r .5 1 .25",
    "shake hands": "swing_r .35 2 0, elbow_r .2 2 0 | swing_r .35 2 .5, elbow_r .2 2 .5",
    "push": "swing_l .7 1 0, swing_r .7 1 0, elbow_l .5 1 .5 | lean .4 1 .65, forward .3 1 .65",
}
# joint angle -> its resting value
ANGLES = dict(swing_l=0, swing_r=0, raise_l=.7, raise_r=.7, elbow_l=1, elbow_r=1, leg_l=0, leg_r=0,
              knee_l=.5, knee_r=.5, lean=0, up=0, forward=0)
# body part -> its mean length
BONES = dict(trunk=.5, neck=.22, upper_arm=.3, forearm=.27, thigh=.42, shin=.4, shoulder=.19, hip=.11,
             eye=.05, ear=.08)


def stick_figures(size: int) -> Sequences:
    """`size` sequences of ACTIONS, 2D coco17 poses of 40 to 80 frames in pixels; always the same.

    Forward kinematics in the body's frame (x to its left, y up, z ahead), then a random view. Body
    proportions, resting pose, tempo, phase, amplitude, view and pixel noise vary between sequences.
    """
    generator, T = torch.Generator().manual_seed(0), 80

    def normal(*shape, std):
        return std * torch.randn(size, *shape, generator=generator)

    def uniform(*shape):
        return torch.rand(size, *shape, generator=generator)

    names = list(ANGLES)
    table = torch.zeros(len(ACTIONS), 2, len(names), 3)  # (K, M, angles, amplitude / cycles / phase)
    for k, action in enumerate(ACTIONS.values()):
        for person, terms in enumerate(action.split("|")):
            for angle, *numbers in map(str.split, terms.split(",")):
                table[k, person, names.index(angle)] = torch.tensor([float(n) for n in numbers])
    label = torch.arange(size) % len(ACTIONS)
    of_two = torch.tensor(["|" in action for action in ACTIONS.values()])[label]
    table = table[label]
    other_side = {"_l": "_r", "_r": "_l"}
    mirrored = [names.index(n[:-2] + other_side.get(n[-2:], n[-2:])) for n in names]
    table = torch.where(uniform(1, 1, 1) < 0.5, table, table[:, :, mirrored])
    amplitude, cycles, phase = table[..., None, :].unbind(-1)                    # (n, 2, angles, 1)
    period = 30 * torch.exp(normal(1, 1, 1, std=0.12))                           # frames
    time = torch.arange(T) / period + uniform(1, 1, 1)                           # (n, 1, 1, T)
    swing = amplitude * (1 + normal(1, 1, 1, std=0.15)) * torch.sin(2 * math.pi * (cycles * time + phase))
    rest = torch.tensor(list(ANGLES.values()))[:, None] + normal(2, len(names), 1, std=0.12)
    a = dict(zip(names, (rest + swing).unbind(2)))                               # each (n, 2, T)
    lengths = torch.tensor(list(BONES.values())) * (1 + normal(2, 1, len(BONES), std=0.07))
    bone = dict(zip(BONES, lengths.unbind(-1)))                                  # each (n, 2, 1)

    def point(x, y, z):
        return torch.stack(torch.broadcast_tensors(x, y, z, a["up"])[:3], -1)    # (n, 2, T, 3)

    def limb(length, side, bend, lift=torch.zeros(())):
        """A bone that hangs down, swung forward by `bend` and raised sideways by `lift`."""
        return point(side * length * lift.sin(), -length * lift.cos() * bend.cos(),
                     length * lift.cos() * bend.sin())

    zero = torch.zeros(())
    hips = point(zero, a["up"], a["forward"])
    neck = hips + point(zero, bone["trunk"] * a["lean"].cos(), bone["trunk"] * a["lean"].sin())
    head = neck + point(zero, bone["neck"] * a["lean"].cos(), bone["neck"] * a["lean"].sin())
    joints = {"nose": head + point(zero, zero, zero + 0.1)}
    for side, name in ((1, "left_"), (-1, "right_")):
        s = name[0]
        joints[name + "eye"] = head + point(side * bone["eye"], zero + 0.05, zero + 0.07)
        joints[name + "ear"] = head + point(side * bone["ear"], zero + 0.02, zero)
        shoulder = neck + point(side * bone["shoulder"], zero, zero)
        elbow = shoulder + limb(bone["upper_arm"], side, a[f"swing_{s}"], a[f"raise_{s}"])
        bent = a[f"swing_{s}"] + a[f"elbow_{s}"]
        wrist = elbow + limb(bone["forearm"], side, bent, a[f"raise_{s}"])
        hip = hips + point(side * bone["hip"], zero, zero)
        knee = hip + limb(bone["thigh"], side, a[f"leg_{s}"])
        ankle = knee + limb(bone["shin"], side, a[f"leg_{s}"] - a[f"knee_{s}"])
        joints |= {name + "shoulder": shoulder, name + "elbow": elbow, name + "wrist": wrist,
                   name + "hip": hip, name + "knee": knee, name + "ankle": ankle}
    body = torch.stack([joints[name] for name in SKELETONS["coco17"]["joints"]], 3)  # (n, 2, T, 17, 3)
    body[..., 2] -= 0.5 * (1 + normal(1, 1, 1, std=0.1)) * of_two.view(-1, 1, 1, 1)  # half a step back
    view = (2 * uniform(1) - 1 + math.pi * torch.arange(2))[:, :, None, None]  # the second faces the first
    x = body[..., 0] * view.cos() + body[..., 2] * view.sin()
    depth = 4 + normal(1, 1, 1, std=0.3) - body[..., 0] * view.sin() + body[..., 2] * view.cos()
    pixels = torch.stack([320 + normal(1, 1, 1, std=40.0) + 500 * x / depth,
                          240 - 500 * body[..., 1] / depth], -1)
    pixels += normal(*pixels.shape[1:], std=1.5)
    pixels[~of_two, 1] = 0
    length = torch.randint(40, T + 1, (size,), generator=generator)
    sequences = [s[:n] for s, n in zip(pixels.transpose(1, 2), length.tolist())]
    return flatten(sequences, label, [f"stick[{i:06}]" for i in range(size)], 2, False)
