"""Skeleton data without numpy: readers, one flat form for every data set, batches, augmentation, built-in stick figures.

    data = load("ntu60.npz")                         # or a PYSKL pickle, a .pt dict, or None for the stick figures
    for batch in Loader(data.train, data.skeleton, data.channels, batch_size=128, frames=64, training=True).epoch(0):
        batch.x                                      # (N, M, T, V, C), or C + 1 with the joint score last

Formats (README, "Real data"): CTR-GCN's npz, PYSKL's pickle, and a .pt dict {"x_train": [tensors (T, M, V, C)], "y_train":
[ints], "x_test": ..., "y_test": ...}. Nothing in a file is ever run: pickles go through an allow-list, .pt files through
torch's weights_only. Shape legend: see skeletonmae.py; F is all frames of a data set, one sequence after the other.
"""
import ast
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import re
import struct
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace

from skeletonmae import SKELETONS, find_present, make_skeleton  # before torch: it silences torch's one remark about numpy
import torch
from torch import Tensor
from torch.nn.functional import pad

warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores are the user's choice


def shown(text: str) -> str:
    """Text that may come from a file, made safe to print: no control characters, at most 2000 characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:2000])[:2000]


class DataError(ValueError):
    """Data that cannot be used. The message is one line: what was expected, what came, how to mend it."""

    def __init__(self, message: str):
        super().__init__(shown(message))


def brief(error: Exception) -> str:
    """What an exception says, on one line of at most 300 characters."""
    culprit = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch.load names it amid advice to trust the file
    text = f"it asks for {culprit[1]}, which is never loaded" if culprit else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


@contextmanager
def reading(what: str, fault: str, mend: str):
    """A damaged file can make its reader raise almost anything: every exception leaves as a DataError that names `what`, but for
    an OSError of the file itself."""
    try:
        yield
    except DataError as error:
        raise error if what in str(error) else DataError(f"{what}: {error}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise DataError(f"{what} {fault} ({brief(error)}); {mend}") from None


# ---------------------------------------------------------------------------------------------- one form for all

@dataclass
class Sequences:
    """N sequences of one split as one flat tensor of frames and an index into it."""
    frames: Tensor    # (F, M, V, C), or C + 1 with the joint score last; float, in the units of the file; absent persons are 0
    start: Tensor     # (N,) int64, first frame of each sequence
    length: Tensor    # (N,) int64, frames of each sequence, at least 1
    label: Tensor     # (N,) int64, 0 to K - 1
    present: Tensor   # (N, M) bool, stays on the CPU: who is there at all
    there: Tensor     # (F, M) bool: who is there in which frame
    names: list       # (N,) for messages
    placement: tuple = ()  # see find_placement: what takes each sequence to its normalised form, found by the Loader
    box: bool = False  # see boxed: the other way of normalising, if asked for

    def __len__(self) -> int:
        return len(self.start)

    def subset(self, index) -> "Sequences":
        index = torch.arange(len(self))[index]  # numbers or a mask
        return replace(self, start=self.start[index], length=self.length[index], label=self.label[index],
                       present=self.present[index], names=[self.names[i] for i in index.tolist()],
                       placement=tuple(p[index] for p in self.placement))

    def empty(self) -> int:
        """How many sequences nobody is in."""
        seen = pad(self.there.any(1).cumsum(0), (1, 0))  # frames with someone before each frame
        return int((seen[self.start + self.length] == seen[self.start]).sum())

    def to(self, device) -> "Sequences":
        moved = {name: getattr(self, name).to(device) for name in ("frames", "start", "length", "label", "there")}
        return replace(self, **moved, placement=tuple(p.to(device) for p in self.placement))


@dataclass
class Dataset:
    train: Sequences
    test: Sequences
    layout: str             # name of the skeleton layout
    skeleton: dict
    channels: int           # C, 2 or 3, the score not counted
    score: bool             # frames carry a joint score as one further channel
    classes: list           # label values from the lowest to the highest in the two halves, K of them
    split: str              # how training and test sequences were told apart

    @property
    def persons(self) -> int:
        return self.train.frames.shape[1]

    def __str__(self) -> str:
        lengths, labels = (torch.cat([getattr(half, name) for half in (self.train, self.test)]) for name in ("length", "label"))
        empty, unused = self.train.empty() + self.test.empty(), len(self.classes) - len(labels.unique())
        return (f"{len(self.train)} training and {len(self.test)} test sequences ({shown(self.split)}), {len(self.classes)} classes"
                f"{f' ({unused} of them without a sequence)' * (unused > 0)}, "
                f"{self.persons} person{'s' * (self.persons > 1)}, layout {self.layout} ({len(self.skeleton['joints'])} joints), "
                f"{self.channels}D{' with joint scores' * self.score}, {int(lengths.min())} to {int(lengths.max())} frames"
                + f", {empty} sequences without anyone" * (empty > 0))


MAX_COORDINATE = 1e9  # beyond any unit a body is measured in: a larger number is damage
MAX_LABEL = 100_000   # more classes than any data set has: a larger label is damage


def unpadded(someone: Tensor) -> Tensor:
    """Frames of each sequence before the padding at its end, (N,), at least 1; someone: bool (N, T), whether anyone is in the frame."""
    return (someone * torch.arange(1, someone.shape[1] + 1, device=someone.device)).amax(1).clamp(min=1)


def scan(x: Tensor, names: list, what: str, scored: bool = False) -> tuple:
    """Length and presence of padded sequences x (N, T, M, V, C), or C + 1 with the joint score last: trailing frames whose coordinates
    are all zero are cut, a person without any non-zero coordinate is absent. In chunks, so that a memory-mapped array is never
    copied. Returns (length (N,), present (N, M), there (N, T, M))."""
    theres = []
    for first in range(0, len(x), 128):
        part = x[first:first + 128]
        peak = torch.linalg.vector_norm(part.flatten(3).float(), math.inf, dim=-1)  # (n, T, M)
        wrong = (~(peak < MAX_COORDINATE)).flatten(1).any(1)
        if wrong.any():
            raise DataError(f"{what}: sequence {names[first + int(wrong.int().argmax())]} holds NaN, infinite or absurd coordinates"
                            f"{' or scores' * scored}; expected finite numbers below {MAX_COORDINATE:g}, repair or drop it")
        theres.append((part[..., :-1] != 0).flatten(3).any(3) if scored else peak > 0)  # peak saves a pass
    there = torch.cat(theres)
    present = there.any(1)
    present[:, 0] |= ~present.any(1)  # a sequence without anyone still holds one (empty) first person
    return unpadded(there.any(2)), present, there


def flatten(sequences: list, labels: Tensor, names: list, what: str, persons: int = 1, scored: bool = False) -> Sequences:
    """A list of (T, M, V, C) tensors, or C + 1, T and M may differ, in the one flat form of at least `persons` persons."""
    persons = max(persons, *(s.shape[1] for s in sequences))

    def widened(masks):  # each (1 or T, its persons) -> all of them, one after the other, (..., persons)
        return torch.cat([pad(mask, (0, persons - mask.shape[1])) for mask in masks])

    lengths, presents, theres = zip(*(scan(sequence[None], [name], what, scored) for sequence, name in zip(sequences, names)))
    length, present = torch.cat(lengths), widened(presents)
    there = widened(there[0, :int(n)] for there, n in zip(theres, lengths))
    frames = torch.zeros(len(there), persons, *sequences[0].shape[2:])
    for part, sequence in zip(frames.split(length.tolist()), sequences):
        part[:, :sequence.shape[1]] = sequence[:len(part)]
    return Sequences(frames, length.cumsum(0) - length, length, labels, present, there, names)


def check_size(path: str, claimed: int, rate: int = 1, spare: int = 2**22, what: str = "values", mend: str = ""):
    """A few bytes can name one array a million times, or deflate zeros without end: what a file unfolds to may not outgrow it."""
    size = os.path.getsize(path)
    if claimed > rate * size + spare:
        mend = mend or "it repeats itself (of overlapping windows save copies, window.clone()) or is damaged"
        raise DataError(f"{path} claims {claimed} {what}, too many for a file of {size} bytes; {mend}")


# ---------------------------------------------------------------------------------------------- .npy and .npz by hand

DTYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32,
          "i8": torch.int64, "u1": torch.uint8, "b1": torch.bool}


def array(buffer, code: str, shape: tuple, fortran: bool = False, offset: int = 0) -> Tensor:
    """The tensor that numpy wrote as `shape` values of dtype `code` ("<f4", ">i8", "|b1") at `offset`; no copy where the bytes
    already lie as torch wants them. Raises DataError."""
    kind = code[1:] if code[:1] in "<>|=" else code
    if kind not in DTYPES:
        raise DataError(f"dtype {code!r} is not supported; expected one of {', '.join(DTYPES)}, save the array as one of them, and names "
                        "as a list of strings")
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**61 for n in shape):
        raise DataError("an array has no shape of eight whole numbers at most; the file is damaged")
    dtype = DTYPES[kind]
    size = math.prod(shape) * dtype.itemsize
    if len(buffer) - offset < size:
        raise DataError(f"an array of shape {shape} and dtype {code!r} needs {size} bytes, {len(buffer) - offset} are there; "
                        "the file is truncated, copy it again")
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=offset)
    if code[0] == ">":
        flat = flat.view(-1, dtype.itemsize).flip(1).flatten()
    flat = flat.view(dtype)
    return flat.view(shape[::-1]).permute(*reversed(range(len(shape)))) if fortran else flat.view(shape)


def read_npy(body: memoryview, what: str) -> Tensor:
    """The array of the .npy file in `body`."""
    with reading(what, "is no .npy array", "expected its header, save the file again"):
        wide = body[6] > 1  # version 1 has a header length of two bytes, later ones of four
        size, first = struct.unpack_from("<I" if wide else "<H", body, 8)[0], 12 if wide else 10
        if body[:6] != b"\x93NUMPY" or size > 65536:
            raise ValueError("it does not begin as one")
        fields = ast.literal_eval(bytes(body[first:first + size]).decode("latin1"))
        code, shape, fortran = fields["descr"], fields["shape"], fields["fortran_order"]
        if "O" in code:
            raise DataError("it holds Python objects (dtype object), which are never loaded; expected numbers, save a numeric array")
        return array(body, code, shape, bool(fortran), first + size)


def inflate(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytearray:
    """An entry of a zip, never more of it than it claims to hold: archive.read inflates up to 2 GiB before it cuts, and Python's
    other decompressors whatever there is."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{entry.filename:.80} is compressed in a way that neither numpy nor torch writes; expected stored or deflated")
    content = bytearray()
    with archive.open(entry) as stream:
        while piece := stream.read(min(2**20, entry.file_size - len(content))):
            content += piece
    return content


def read_npz(path: str, wanted: tuple) -> dict:
    """The wanted arrays of an npz as tensors. An entry stored without compression is memory-mapped in place (private,
    copy-on-write) and never copied; a deflated one is inflated once. Entries not wanted are not read."""
    arrays = {}
    with reading(path, "is not a readable npz", "expected a zip of .npy arrays, copy or save it again"), \
            zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        check_size(path, sum(entries[name].file_size for name in wanted if name in entries), 50, 2**26, "bytes", "it is damaged or, "
                   "for one very long sequence, mostly padding: save it with np.savez, which does not compress")
        for name in wanted:
            if name not in entries:
                raise DataError(f"{path} has no {name}; expected {', '.join(wanted)}, found {', '.join(sorted(entries)) or 'nothing'}")
            info = entries[name]
            if info.compress_type == zipfile.ZIP_STORED:  # the local header is 30 bytes, a name and extra fields, their lengths last
                first = info.header_offset + 30 + sum(struct.unpack("<2H", mapped[info.header_offset + 26:info.header_offset + 30]))
                body = mapped[first:first + info.file_size]
            else:
                body = memoryview(inflate(archive, info))
            arrays[name] = read_npy(body, f"{name} in {path}")
    return arrays


# ---------------------------------------------------------------------------------------------- pickles without numpy

class _DType:
    """Stands in for numpy.dtype. A BUILD may set its byte order after it was memoised, so arrays read it late."""

    def __init__(self, code, *_):
        if not isinstance(code, str) or len(code) > 16:
            raise DataError("a dtype in the pickle is no string; expected f4 or the like")
        self.code = code


class _Unpickler(pickle._Unpickler):
    """The one written in Python: its memo is a dict, which a damaged index cannot blow up, and its opcodes can be chosen. The
    stand-ins and functions in `allowed` are all that a pickle can call."""
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, size: int):
        super().__init__(file)
        self.size, self.left = size, 8 * size + 2**26

        def empty(*_):  # stands in for numpy.ndarray until BUILD gives it shape, dtype and bytes
            self.spend(400)
            return torch.empty(0)

        self.allowed = {"numpy.ndarray": empty, "numpy.dtype": _DType, "_codecs.encode": self.encode}
        for core in ("numpy.core", "numpy._core"):
            self.allowed |= {f"{core}.multiarray._reconstruct": empty, f"{core}.multiarray.scalar": self.scalar,
                             f"{core}.numeric._frombuffer": lambda data, dtype, shape, order: self.stored(data, dtype, shape, order == "F")}

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.allowed:
            raise DataError(f"the pickle asks for {f'{module}.{name}':.200}, which is not loaded; expected arrays, numbers, strings, "
                            "lists and dicts alone")
        return self.allowed[f"{module}.{name}"]

    def spend(self, size: int):
        """What is built takes memory in proportion to the file, however often a pickle names one text, list or array again."""
        self.left -= size
        if self.left < 0:
            raise DataError(f"the pickle builds more than a file of {self.size} bytes can need; it is hostile or damaged")

    def encode(self, text, encoding="latin1"):
        if encoding != "latin1" or not isinstance(text, str):
            raise DataError("the pickle asks for an encoding other than latin1; protocol 2 arrays need none")
        self.spend(len(text))
        return text.encode("latin1")

    def stored(self, data, dtype, shape, fortran) -> Tensor:
        if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, _DType):
            raise DataError(f"an array of dtype {getattr(dtype, 'code', 'object')} is not stored as plain numbers, which alone are loaded; "
                            "save a numeric array")
        self.spend(len(data) + 500)
        return array(bytearray(data), dtype.code, shape, bool(fortran))

    def scalar(self, dtype, data):
        return self.stored(data, dtype, (), False).item()

    def load_build(self):
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) is Tensor:
            _, shape, dtype, fortran, data = state
            made.data = self.stored(data, dtype, shape, fortran)
        elif type(made) is not _DType:
            raise DataError("the pickle tries to change a function or class; it is hostile or damaged")
        elif state[1] in ("<", ">", "|", "="):
            made.code = state[1] + made.code.lstrip("<>|=")

    def load_pairs(self, load):
        # the stack ends in dict, key, value where one pair is set, else it is key, value, key, value ... since its MARK
        at = slice(-2, -1) if load is pickle._Unpickler.load_setitem else slice(None, None, 2)
        keys = self.stack[at]
        if not all(is_name(key) or type(key) is float for key in keys):  # the hash of tuples nested in tuples can take for ever
            raise DataError("a dict in the pickle has keys other than strings and numbers; it is hostile or damaged")
        self.stack[at] = map(str, keys)  # and numbers can be chosen so that a dict of them is as slow as a list
        load(self)

    def load_bytearray8(self):
        size = int.from_bytes(self.read(8), "little")
        if size > self.size:  # Python's own allocates first and reads then
            raise DataError(f"the pickle promises {size} bytes in a file of {self.size}; it is truncated or damaged")
        self.append(bytearray(self.read(size)))

    def load_set(self):
        raise DataError("the pickle holds a set; expected arrays, numbers, strings, lists and dicts alone")

    dispatch[pickle.BYTEARRAY8[0]], dispatch[pickle.BUILD[0]] = load_bytearray8, load_build
    for _code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        dispatch[_code[0]] = load_set
    for _code in (pickle.SETITEM, pickle.SETITEMS, pickle.DICT):
        dispatch[_code[0]] = lambda self, load=dispatch[_code[0]]: self.load_pairs(load)
    for _code in (pickle.MARK, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.LIST, pickle.DICT, pickle.MEMOIZE, pickle.TUPLE,
                  pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.REDUCE):  # each is one byte and builds an object of about 100
        dispatch[_code[0]] = lambda self, load=dispatch[_code[0]]: (self.spend(100), load(self))


def read_pickle(path: str):
    """The object in a pickle, arrays as tensors; runs no foreign code. Raises DataError, naming what was refused."""
    with reading(path, "is no readable pickle", "expected PYSKL's format, copy it again"), open(path, "rb") as file:
        return _Unpickler(file, os.fstat(file.fileno()).st_size).load()


def _as_tensor(value, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise DataError(f"{what} is {type(value).__name__}; expected an array of numbers")
    return value


def is_name(value) -> bool:
    """Whether this can be a frame_dir or a key: a string, or an integer, neither long enough to make comparing it slow."""
    return type(value) is str and len(value) <= 1000 or type(value) is int and -2**63 < value < 2**63


def without_absent(x: Tensor) -> Tensor:
    """x (N, M, T, V, C + 1), the joint score last, in which a person who is absent, as find_present has it, is all zero."""
    return x * find_present(x, x.shape[-1] - 1).to(x.device)[..., None, None, None]


def read_annotation(annotation: dict, scored: bool, what: str) -> Tensor:
    """The sequence (T, M, V, C), with the joint score last where the file has scores, of at most two persons."""
    keypoint = _as_tensor(annotation.get("keypoint"), f"{what}: keypoint")
    if (keypoint.dim() != 4 or keypoint.shape[3] not in (2, 3) or 0 in keypoint.shape
            or len(keypoint) > 5 and keypoint.shape[1] <= 2):  # a crowd in two frames: the axes are swapped
        raise DataError(f"{what}: keypoint has shape {tuple(keypoint.shape)}; expected (M, T, V, C) with C 2 or 3, persons before frames "
                        "(an array a of one person is a[None])")
    keypoint = keypoint.float()
    if scored:
        score = annotation.get("keypoint_score")
        score = keypoint.new_ones(keypoint.shape[:3]) if score is None else _as_tensor(score, f"{what}: keypoint_score").float()
        if score.shape != keypoint.shape[:3]:
            raise DataError(f"{what}: keypoint_score has shape {tuple(score.shape)}; expected {tuple(keypoint.shape[:3])}")
        keypoint = torch.cat([keypoint, score[..., None]], -1)
    if len(keypoint) > 2:
        if scored:
            rank = keypoint[..., -1].mean((1, 2))
        else:
            there = (keypoint != 0).flatten(2).any(2)  # (M, T)
            moved = keypoint.diff(dim=1).abs().sum((2, 3)) * (there[:, 1:] & there[:, :-1])  # who comes or goes has not moved by that
            rank = torch.where(there.any(1), moved.sum(1), -1)
        keypoint = keypoint[rank.topk(2).indices.sort().values]
    return (without_absent(keypoint[None])[0] if scored else keypoint).transpose(0, 1)


def from_pyskl(path: str, split: str | None, test_fraction: float) -> tuple:
    """PYSKL's pickle, {"split": {name: [frame_dir]}, "annotations": [...]} or the bare list of annotations.

    An annotation holds `keypoint` (M, T, V, C), `label`, optionally `keypoint_score` (M, T, V) and `frame_dir`. Of more than
    two persons the two with the highest mean score are kept, without scores the two that move most.
    """
    content = read_pickle(path)
    annotations, splits = (content.get("annotations"), content.get("split")) if isinstance(content, dict) else (content, None)
    if not isinstance(annotations, list) or not annotations or not all(isinstance(a, dict) for a in annotations):
        raise DataError(f"{path} holds {type(content).__name__}; expected PYSKL's dict with a list `annotations`, or that list alone")
    scored = any("keypoint_score" in a for a in annotations)
    names, sequences, labels, elements = [], [], [], 0
    for i, annotation in enumerate(annotations):
        name, label = annotation.get("frame_dir", i), annotation.get("label")
        if not is_name(name):
            raise DataError(f"{path}: annotation {i}: frame_dir is {type(name).__name__}; expected a string of at most 1000 characters")
        what = f"{path}: annotation {str(name)!r:.80}"
        sequence = read_annotation(annotation, scored, what)
        if sequences and sequence.shape[2:] != sequences[0].shape[2:]:
            raise DataError(f"{what}: keypoint has {tuple(sequence.shape[2:])} joints and coordinates, those before it another number")
        if type(label) is not int or not 0 <= label <= MAX_LABEL:
            raise DataError(f"{what}: label is {label if type(label) is int and is_name(label) else type(label).__name__}; "
                            f"expected an integer from 0 to {MAX_LABEL}")
        elements += sequence.numel() + 50
        check_size(path, elements)
        names.append(str(name))
        sequences.append(sequence)
        labels.append(label)
    data = flatten(sequences, torch.tensor(labels), names, path, scored=scored)
    if scored:
        data.there = fill_missing(data.frames, data.start, data.length)
    return *divide(data, splits, split, test_fraction, path), scored


def divide(data: Sequences, splits: dict | None, wanted: str | None, test_fraction: float, path: str) -> tuple:
    """Training half, test half and how they were told apart: by the splits of the file or, where it has none, by a digest of
    each name, the same for every seed."""
    if splits is None:
        if wanted:
            raise DataError(f"{path} has no splits, so --split {wanted} cannot be found; leave it out and set --test-fraction")
        if not 0 < test_fraction < 1:
            raise DataError(f"test fraction {test_fraction}; expected more than 0 and less than 1")
        if len(data) < 2:
            raise DataError(f"{path} holds one sequence and no split; expected at least two")
        digests = [hashlib.sha256(name.encode(errors="replace")).digest() for name in data.names]
        order = sorted(range(len(data)), key=digests.__getitem__)  # random, but one added later moves one other at most
        cut = min(max(round(test_fraction * len(data)), 1), len(data) - 1)
        return data.subset(order[cut:]), data.subset(order[:cut]), f"a random {test_fraction:g} for testing"
    if not isinstance(splits, dict):
        raise DataError(f"{path}: split is {type(splits).__name__}; expected a dict of name -> list of frame_dir")
    train_name, test_name = find_split(list(splits), wanted, path)
    positions, halves, unknown = {}, [], 0
    for i, name in enumerate(data.names):
        positions.setdefault(name, []).append(i)
    for half in (train_name, test_name):
        listed = splits[half] if isinstance(splits[half], (list, tuple)) else []
        listed = [str(name) for name in listed if is_name(name) and str(name) in positions]
        if not listed or len(listed) > len(data.names):
            raise DataError(f"{path}: split {half} is empty, names no annotation, or more than there are; expected a list of frame_dir")
        unknown += len(splits[half]) - len(listed)
        halves.append(data.subset([i for name in dict.fromkeys(listed) for i in positions[name]]))
    shared = len({*halves[0].names} & {*halves[1].names})
    return *halves, (f"{train_name} / {test_name}" + f", {unknown} of their names without an annotation" * (unknown > 0)
                     + f", {shared} of their names in both" * (shared > 0))


def find_split(names: list, wanted: str | None, path: str) -> tuple:
    """The pair (training split, test split). wanted: None for the obvious pair, "xsub" (or either name of
    the pair) for xsub_train and xsub_val or xsub_test, or "a,b" for two names as they stand in the file."""
    pairs = [(a, b) for a in names if a.endswith("train") for b in (a[:-5] + "val", a[:-5] + "test") if b in names]
    if wanted is None:
        obvious = ("xsub_train", "xsub_val"), ("train", "val"), ("train", "test")
        fits = [pair for pair in obvious if pair in pairs] or (pairs if len(pairs) == 1 else [])
    elif "," in wanted:
        pair = tuple(part.strip() for part in wanted.split(",", 1))
        fits = [pair] if set(pair) <= set(names) else []
    else:
        fits = [pair for pair in pairs if wanted in (*pair, pair[0].removesuffix("_train"))]
    if not fits:
        raise DataError(f"{path}: {'no obvious split' if wanted is None else f'no split {wanted}'}; present are "
                        f"{', '.join(sorted(names))}: name a pair with --split, as in --split xsub or --split a_train,a_test")
    return fits[0]


def fill_missing(frames: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Joints that nobody saw, in place. A joint of score 0 that holds a placeholder, (0, 0) or (1, 1), takes its position from
    the nearest earlier frame of its sequence that has one, else from the nearest later one, else it is the mean of the person's
    other joints; other joints of score 0 carry a usable guess and are kept. All keep score 0, so pre-training never counts
    them in its loss.

    frames: (F, M, V, C + 1) with the score last; start, length: (N,), see Sequences. Returns `there` anew."""
    position, score = frames[..., :-1], frames[..., -1]  # views, (F, M, V, C) and (F, M, V)
    known = (score > 0) | ((position != 0).any(-1) & (position != 1).any(-1))
    F, steps = len(position), torch.arange(len(position), device=frames.device)[:, None, None]
    first, end = (bound.repeat_interleave(length)[:, None, None] for bound in (start, start + length))  # of each frame's sequence
    earlier = torch.where(known, steps, -1).cummax(0).values
    later = torch.where(known, steps, F).flip(0).cummin(0).values.flip(0)
    source = torch.where(earlier >= first, earlier, torch.where(later < end, later, steps))
    position.copy_(position.gather(0, source[..., None].expand_as(position)))
    never = (~known & (source == steps))[..., None]  # a hip that is in no frame would put the centre into the corner of the image
    middle = position.masked_fill(never, 0).sum(2, keepdim=True) / (~never).sum(2, keepdim=True).clamp(min=1)
    position.copy_(torch.where(never, middle, position))
    return (position != 0).flatten(2).any(2)


# ---------------------------------------------------------------------------------------------- the other readers

def read_labels(y: Tensor, count: int, what: str) -> Tensor:
    """Integer labels (N,) from integers (N,) or a one-hot (N, K) of numbers or booleans."""
    if y.dim() == 0 or len(y) != count:
        raise DataError(f"{what} has {y.numel() if y.dim() == 0 else len(y)} labels for {count} sequences; expected as many of each")
    if y.dim() == 2 and y.shape[1] == 1:  # a column of integers
        y = y[:, 0]
    if y.dim() == 2:
        if not ((y != 0).sum(1) == 1).all():
            raise DataError(f"{what} is no one-hot: a row has other than one non-zero entry; expected exactly one a row")
        return (y != 0).int().argmax(1)
    if y.dim() != 1 or y.is_floating_point() and (y != y.round()).any():
        raise DataError(f"{what} has shape {tuple(y.shape)} and dtype {y.dtype}; expected integers (N,) or one-hot (N, K)")
    low, high = float(y.min()), float(y.max())
    if not 0 <= low <= high <= MAX_LABEL:
        raise DataError(f"{what} holds labels from {low:g} to {high:g}; expected integers from 0 to {MAX_LABEL}")
    return y.long()


def usual_channels(name: str) -> int:
    """C of the data of a layout as they usually come."""
    return 3 if name in ("ntu25", "kinect20", "sbu15") else 2


def divide_columns(columns: int, layout: str | None, asked: dict | None, path: str) -> tuple:
    """(M, V, C) of an npz row of M V C columns: of the known layouts in their native number of coordinates the one that fits,
    3D first, for CTR-GCN's files are 3D; with --layout, that layout."""
    known = {layout: asked} if asked else SKELETONS
    fits = [(M, len(s["joints"]), C) for C in (3, 2) for M in (1, 2) for name, s in known.items()
            if M * len(s["joints"]) * C == columns and (asked or C == usual_channels(name))]
    if not fits:
        sizes = ", ".join(f"{len(s['joints'])} ({name})" for name, s in known.items())
        raise DataError(f"{path}: {columns} columns are not persons (1 or 2) x joints x coordinates (2 or 3) of a layout as its data "
                        f"usually come; known joint numbers are {sizes}; name one of these, or a file with your own, with --layout")
    return fits[0]


def from_npz(path: str, layout: str | None, asked: dict | None) -> tuple:
    """CTR-GCN's npz: x_* (N, T, M V C) zero-padded at the end, y_* one-hot or integer. Other arrays are ignored."""
    arrays, halves = read_npz(path, ("x_train", "y_train", "x_test", "y_test")), []
    for half in ("train", "test"):
        x, y = arrays[f"x_{half}"], arrays[f"y_{half}"]
        what = f"x_{half} in {path}"
        if x.dim() != 3 or not x.is_floating_point() or 0 in x.shape:
            raise DataError(f"{what} has shape {tuple(x.shape)} and dtype {x.dtype}; expected floats (N, T, M*V*C), none of them 0")
        N, T, columns = x.shape
        label = read_labels(y, N, f"y_{half} in {path}")
        x = x.reshape(N, T, *divide_columns(columns, layout, asked, path))
        names = [f"{half}[{i}]" for i in range(N)]
        length, present, there = scan(x, names, what)
        halves.append(Sequences(x.flatten(0, 1), torch.arange(N) * T, length, label, present, there.flatten(0, 1), names))
    return *halves, "x_train / x_test", False


class _Rehearsal(_Unpickler):
    """Reads a pickle of torch's with nothing behind its names. torch.load runs nothing foreign, but it can be made to hash or copy
    for ever, and what can do that here is refused."""
    dispatch = {**_Unpickler.dispatch, pickle.BUILD[0]: lambda self: self.stack.pop()}

    def find_class(self, module, name):
        if not re.fullmatch(r"collections\.OrderedDict|torch\.((storage\.)?\w*Storage|_utils\._rebuild_(tensor|parameter)\w*|Size|device"
                            r"|\w+\d+\w*)", f"{module}.{name}"):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return lambda *_: {}

    def persistent_load(self, key):
        return None


def read_torch(path: str, fault: str, mend: str):
    """torch.load of plain tensors and settings; nothing in the file is run."""
    with reading(path, fault, mend), open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":  # as torch.load decides
            with zipfile.ZipFile(file) as archive:
                check_size(path, sum(info.file_size for info in archive.infolist()))  # torch.save compresses nothing
                pickles = [io.BytesIO(inflate(archive, info)) for info in archive.infolist() if info.filename.lower().endswith("data.pkl")]
        else:
            file.seek(0)
            pickles = [file] * 5  # before torch 1.6 a file was five pickles, then the numbers
        for stream in pickles:
            _Rehearsal(stream, os.path.getsize(path)).load()
        return torch.load(path, map_location="cpu", weights_only=True)


def from_pt(path: str) -> tuple:
    """A dict saved by torch: x_train, x_test lists of tensors (T, M, V, C) (or one tensor (N, T, M, V, C)), y_train, y_test labels."""
    content = read_torch(path, "is no .pt file of plain tensors", "save a dict of tensors with torch.save")
    if not isinstance(content, dict):
        content = {}
    halves = {}
    for half in ("train", "test"):
        x, y = content.get(f"x_{half}"), content.get(f"y_{half}")
        if not all(isinstance(v, (list, tuple)) or isinstance(v, Tensor) and v.dim() for v in (x, y)) or len(x) == 0:
            raise DataError(f"{path} has no list x_{half} with its y_{half}; expected a dict of x_train, y_train, x_test, y_test")
        check_size(path, sum(v.numel() + 50 for v in ([x] if isinstance(x, Tensor) else x) if isinstance(v, Tensor)))
        for i, sequence in enumerate(x):
            shape = tuple(sequence.shape) if isinstance(sequence, Tensor) else ()
            if len(shape) != 4 or 0 in shape or shape[2:] != tuple(x[0].shape[2:]) or shape[1] > 2 or shape[3] not in (2, 3):
                raise DataError(f"{path}: x_{half}[{i}] is {shape or type(sequence).__name__}; expected a tensor (T, M, V, C), M 1 or 2, "
                                "C 2 or 3, V and C the same in all")
            if sequence.is_complex():
                raise DataError(f"{path}: x_{half}[{i}] holds complex numbers; expected real coordinates")
        with reading(f"y_{half} in {path}", "is no list of labels", "expected integers"):
            if len(y) and isinstance(y[0], (list, tuple)):  # one-hot
                check_size(path, len(y) * len(y[0]))
                if any(isinstance(value, (list, tuple)) for value in y[0]):
                    raise ValueError("lists in lists in lists")
            label = read_labels(torch.as_tensor(y), len(x), f"y_{half} in {path}")
        halves[half] = x, label
    persons = max(s.shape[1] for x, _ in halves.values() for s in x)
    train, test = (flatten([s.detach().float() for s in x], label, [f"{half}[{i}]" for i in range(len(x))], path, persons)
                   for half, (x, label) in halves.items())
    return train, test, "x_train / x_test", False


def layouts_of(V: int) -> list:
    """Names of the built-in layouts of V joints."""
    return [name for name, s in SKELETONS.items() if len(s["joints"]) == V]


def find_layout(V: int, C: int, path: str) -> str:
    fits = layouts_of(V)
    fits = [name for name in fits if C == usual_channels(name)] or fits
    if len(fits) != 1:
        raise DataError(f"{path}: {V} joints in {C}D fit {' and '.join(fits) or 'no known layout'}; name one with --layout "
                        f"({', '.join(SKELETONS)}, or a JSON file)")
    return fits[0]


def load_skeleton(layout: str) -> dict:
    """A layout by name, or from a JSON file with the arguments of make_skeleton."""
    if layout in SKELETONS:
        return SKELETONS[layout]
    if not layout.endswith(".json"):
        raise DataError(f"unknown layout {layout}; expected {', '.join(SKELETONS)}, or a JSON file")
    with reading(layout, "is no skeleton layout", "expected joints, edges, parts, centre, and optionally pairs"), open(layout) as file:
        return make_skeleton(**json.load(file))


def first_byte(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(1)


def load(path: str | None = None, split: str | None = None, layout: str | None = None, test_fraction: float = 0.2,
         synthetic_size: int = 1600) -> Dataset:
    """Reads a data set by the ending of its name, a pickle also by its first byte, checks all of it, and finds its layout. Without a
    path: the built-in stick figures.

    Raises DataError for what is in the file, OSError for the file itself.
    """
    asked = load_skeleton(layout) if layout else None
    path = path and os.fspath(path)
    if split and (path is None or path.endswith((".pt", ".pth", ".npz"))):
        raise DataError(f"{path or 'the built-in set'} has one split, and --split {split} was asked for; expected none, leave it out")
    if path is None:
        if asked and asked != SKELETONS["coco17"]:
            raise DataError(f"the built-in stick figures are coco17, not {layout}; leave --layout out, or name your --data")
        train, test, note, score = stick_figures(synthetic_size)
        layout = "coco17"
    elif path.endswith((".pt", ".pth")):
        train, test, note, score = from_pt(path)
    elif path.endswith(".npz"):
        train, test, note, score = from_npz(path, layout, asked)
    elif path.endswith((".pkl", ".pickle")) or first_byte(path) == pickle.PROTO:
        train, test, note, score = from_pyskl(path, split, test_fraction)
    else:
        raise DataError(f"{path} ends in neither .npz, .pkl nor .pt; expected CTR-GCN's npz, PYSKL's pickle or a .pt dict")
    if train.frames.shape[1:] != test.frames.shape[1:]:
        raise DataError(f"{path}: x_train and x_test have different numbers of persons, joints or coordinates; expected the same")
    V, C = train.frames.shape[2], train.frames.shape[3] - score
    layout = layout or find_layout(V, C, path)
    skeleton = asked or SKELETONS[layout]
    if len(skeleton["joints"]) != V:
        raise DataError(f"{path} has {V} joints, layout {layout} has {len(skeleton['joints'])}; expected the same, choose another --layout "
                        f"({' or '.join(layouts_of(V)) or 'a JSON file'})")
    if not train.there.any():
        raise DataError(f"{path}: every coordinate of the training sequences is zero; expected skeletons")
    labels = torch.cat([train.label, test.label])
    first = int(labels.min())  # labels that do not start at 0 are shifted
    for half in (train, test):
        half.label = half.label - first
    return Dataset(train, test, layout, skeleton, C, score, list(range(first, int(labels.max()) + 1)), note)


# ---------------------------------------------------------------------------------------------- batches

def sample_frames(length: Tensor, frames: int, training: bool, crop: float = 1.0, generator=None) -> Tensor:
    """Which T frames of each sequence are taken, (N, T) from 0: one of each of T equal segments, a random one in training, the
    middle one in testing; shorter sequences repeat frames. crop < 1: in training the segments divide a random window of at
    least that share of the sequence."""
    def uniform(count):
        return torch.rand(len(length), count, dtype=torch.float64, generator=generator, device=length.device)

    length = length[:, None].double()
    first, share, within = 0.0, 1.0, 0.5
    if training:
        within = uniform(frames)
        if crop < 1:
            share = crop + (1 - crop) * uniform(1)
            first = (1 - share) * uniform(1)
    steps = torch.arange(frames, dtype=torch.float64, device=length.device)
    return torch.minimum(((first + share * (steps + within) / frames) * length).long(), length.long() - 1)


def turn(angle: Tensor, axis: int) -> Tensor:
    """Rotations by angle (N,), in radians, about a coordinate axis of 3D space, (N, 3, 3)."""
    a, b = [k for k in range(3) if k != axis]
    matrix = torch.eye(3, device=angle.device).repeat(len(angle), 1, 1)
    matrix[:, a, a] = matrix[:, b, b] = angle.cos()
    matrix[:, a, b], matrix[:, b, a] = angle.sin(), -angle.sin()
    return matrix


def compose(a: Tensor, b: Tensor) -> Tensor:
    """The matrix products a b, (N, I, J) and (N, J, K), in full precision: a GPU may round the factors of a @ b to ten bits."""
    return (a[..., None] * b[:, None]).sum(2) if a.is_cuda else a @ b


def joint_mean(x: Tensor, joints: list) -> Tensor:
    """The mean position of some joints, (..., V, C) -> (..., C), without an index list, for which a GPU would have to wait."""
    return torch.stack([x[..., joint, :] for joint in joints]).mean(0)


def find_placement(frames: Tensor, there: Tensor, owner: Tensor, num: int, skeleton: dict, channels: int, turned: bool = True) -> tuple:
    """How each of `num` sequences is normalised: x -> linear (x - origin).

    The origin is the centre joint, averaged over frames and persons: one origin for both persons, or their distance would
    vanish. The unit is the root mean square distance of the seen joints (score above 0; all, where a sequence has none) from it,
    at least 1e-6: the size of the body and of its path. In 3D (y is vertical), if `turned`, the sequence is turned about the
    vertical so that the first present person's left and right torso joints (shoulders, hips) lie along x, the left at larger x, on
    the average over frames: what the camera's place adds is gone.

    frames: (F, M, V, C [+ score]); there: bool (F, M); owner: (F,) the sequence of each frame. Returns (linear (num, C, C),
    origin (num, C), unit (num,)): linear is the turn divided by the unit.
    """
    def total(values):  # over the frames of each sequence, (F, ...) -> (num, ...)
        return values.new_zeros(num, *values.shape[1:]).index_add_(0, owner, values)

    joints, seen = frames[..., :channels], there[..., None].expand(frames.shape[:3])  # (F, M, V)
    centre = joint_mean(joints, skeleton["centre"]) * there[..., None]                # (F, M, C)
    origin = total(centre.sum(1)) / total(there.sum(1).float()).clamp(min=1)[:, None]
    if frames.shape[-1] > channels:
        scored = seen & (frames[..., channels] > 0)
        seen = torch.where((total(scored.sum((1, 2))) > 0)[owner, None, None], scored, seen)  # nothing seen: all guesses count
    square = torch.linalg.vector_norm(joints - origin[owner, None, None], dim=-1).square() * seen
    unit = (total(square.sum((1, 2))) / total(seen.sum((1, 2))).clamp(min=1)).sqrt().clamp(min=1e-6)
    linear = torch.eye(channels, device=frames.device).repeat(num, 1, 1)
    across = [(left, right) for left, right in skeleton["pairs"] if left in skeleton["parts"].get("torso", ())]
    if turned and channels == 3 and across:
        lead = (total(there[:, 0].long()) == 0).long().clamp(max=there.shape[1] - 1)[owner]  # the second person where no first one is
        first = joints[torch.arange(len(joints), device=joints.device), lead]              # (F, V, 3)
        left, right = (total(joint_mean(first, side)) for side in zip(*across))            # (num, 3)
        linear = turn(torch.atan2((left - right)[:, 2], (left - right)[:, 0]), axis=1)
    return linear / unit[:, None, None], origin, unit


def find_placements(data: Sequences, skeleton: dict, channels: int) -> tuple:
    """find_placement of every sequence of a split, in chunks, so that a memory-mapped array is never copied."""
    parts = []
    for start, length in zip(data.start.split(64), data.length.split(64)):
        owner = torch.arange(len(start)).repeat_interleave(length)
        rows = torch.arange(len(owner)) + (start - length.cumsum(0) + length)[owner]
        frames, there = data.frames.index_select(0, rows).float(), data.there.index_select(0, rows)
        parts.append(find_placement(frames, there, owner, len(start), skeleton, channels, not data.box))
    return tuple(torch.cat(part) for part in zip(*parts))


def place(x: Tensor, there: Tensor, linear: Tensor, origin: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """linear (x - origin) + shift for every joint of x (N, M, T, V, C [+ score]). The score passes through; who is not there is all
    zero and stays so.

    there: bool (N, M, T); linear: (N, C, C); origin, shift: (N, C). One matrix product for each sequence, of a plane (M, T, V)
    per coordinate: with the coordinates innermost the same takes four times as long on a CPU.
    """
    N, C, S = len(x), linear.shape[1], x.shape[4]
    planes = x.new_empty(N, S + 1, *x.shape[1:4])
    planes[:, :S], planes[:, S] = x.movedim(4, 1), there[..., None]  # the last plane, 1 where someone is, takes the constant part
    matrix = torch.eye(S, S + 1, dtype=x.dtype, device=x.device).repeat(N, 1, 1)
    matrix[:, :C, :C], matrix[:, :C, S] = linear, shift - (linear * origin[:, None]).sum(-1)
    return compose(matrix, planes.flatten(2)).view(N, S, *x.shape[1:4]).movedim(1, 4)


def find_batch_placement(x: Tensor, there: Tensor, skeleton: dict, channels: int, turned: bool = True) -> tuple:
    """find_placement of every sequence of a batch x (N, M, T, V, C [+ score]) with there (N, M, T)."""
    owner = torch.arange(len(x), device=x.device).repeat_interleave(x.shape[2])
    return find_placement(x.transpose(1, 2).flatten(0, 1), there.transpose(1, 2).flatten(0, 1), owner, len(x), skeleton, channels, turned)


def boxed(x: Tensor, there: Tensor, unit: Tensor, channels: int) -> tuple:
    """Each axis of every sequence of a batch x (N, M, T, V, C [+ score]), there (N, M, T), from -1 to 1 over its persons and frames,
    as CTR-GCN's feeder for NW-UCLA has it: how wide, high and deep a movement is no longer matters. Returns (x, the unit of
    each axis (N, C), where that of all was unit (N,))."""
    absent, planes = ~there[:, None, ..., None], x[..., :channels].movedim(4, 1)  # (N, 1, M, T, 1), (N, C, M, T, V)
    low, high = planes.masked_fill(absent, math.inf).amin((2, 3, 4)), planes.masked_fill(absent, -math.inf).amax((2, 3, 4))
    half = ((high - low) / 2).clamp(min=1e-6)
    return place(x, there, torch.diag_embed(1 / half), ((low + high) / 2).nan_to_num()), unit[:, None] * half


def normalise(x: Tensor, skeleton: dict, channels: int, box: bool = False, frames: int | None = None) -> tuple:
    """Raw whole sequences x (N, M, any T, V, C [+ score]) as a model is tested on them: joints that nobody saw filled in as by
    fill_missing, where scores tell; centred, scaled, and in 3D turned to face the viewer, as find_placement describes, or else
    `boxed`; of each as many frames as asked for, spread evenly over those before the padding at its end, else all T. Persons
    who are all zero and padding stay zero, as do those of whom nothing was seen beside another (find_present). Returns (x, origin
    (N, C), unit (N,), or (N, C) for the axes of what was boxed); the turn, and the middle of the box, are not returned."""
    scored = x.shape[-1] > channels
    x = without_absent(x) if scored else x
    there = (x[..., :channels] != 0).flatten(3).any(3)
    length = unpadded(there.any(1))
    if scored:
        flat, each = x.transpose(1, 2).flatten(0, 1), torch.full_like(length, x.shape[2])
        there = fill_missing(flat, each.cumsum(0) - each, each)
        x, there = (t.unflatten(0, (len(x), -1)).transpose(1, 2) for t in (flat, there))
        there = there & (torch.arange(x.shape[2], device=x.device) < length[:, None])[:, None]  # padding is nobody
        x = x * there[..., None, None]
    linear, origin, unit = find_batch_placement(x, there, skeleton, channels, not box)
    if frames:
        rows, steps = torch.arange(len(x), device=x.device)[:, None], sample_frames(length, frames, False)
        x, there = (t.transpose(1, 2)[rows, steps].transpose(1, 2) for t in (x, there))
    x = place(x, there, linear, origin)
    if box:
        x, unit = boxed(x, there, unit, channels)
    return x, origin, unit


@dataclass(frozen=True)
class Augmentation:
    """How a batch is normalised and, on the way, randomly changed, by one draw for all frames of a sequence, but for the noise. 0 turns a
    change off."""
    rotation: float = 0.0   # degrees to either side about the vertical axis, half of it about the horizontal one; 3D only
    scaling: float = 0.0    # each axis is scaled by 1 - scaling to 1 + scaling
    shift: float = 0.0      # the whole sequence moves by up to this, in units of the normalised body
    flip: float = 0.0       # probability of a mirror image, left and right joints swapped
    noise: float = 0.0      # standard deviation of Gaussian noise on every coordinate
    crop: float = 1.0       # see sample_frames

    def __call__(self, x: Tensor, there: Tensor, placement: tuple, skeleton: dict, generator=None) -> Tensor:
        """Normalises raw x (N, M, T, V, C [+ score]) by its placement and changes it, in one affine map a sequence; without left/right
        pairs nothing is mirrored."""
        linear, origin, _ = placement
        N, C = linear.shape[:2]
        pairs = skeleton["pairs"]
        flip = self.flip if pairs else 0.0

        def uniform(*shape, reach):
            return (2 * torch.rand(N, *shape, generator=generator, device=x.device) - 1) * reach

        change = torch.eye(C, device=x.device).repeat(N, 1, 1)
        if self.rotation and C == 3:
            reach = math.radians(self.rotation)
            change = compose(turn(uniform(reach=reach / 2), axis=0), turn(uniform(reach=reach), axis=1))
        mirror = torch.rand(N, generator=generator, device=x.device) < flip
        change[:, 0] *= 1 - 2 * mirror[:, None].float()
        change, shift = change * (1 + uniform(C, 1, reach=self.scaling)), uniform(C, reach=self.shift)
        x = place(x, there, compose(change, linear), origin, shift)
        if flip:
            swap = dict(pairs) | {right: left for left, right in pairs}
            order = [swap.get(joint, joint) for joint in range(x.shape[3])]
            mirrored = x.index_select(3, torch.tensor(order).to(x.device, non_blocking=True))
            x = torch.where(mirror.view(-1, 1, 1, 1, 1), mirrored, x)
        if self.noise:
            x[..., :C] += self.noise * torch.randn(x[..., :C].shape, generator=generator, device=x.device) * there[..., None, None]
        return x


@dataclass
class Batch:
    x: Tensor        # (N, M, T, V, C), or C + 1 with the joint score last, normalised
    label: Tensor    # (N,)
    present: Tensor  # (N, M) bool, on the CPU
    there: Tensor    # (N, M, T) bool: who is in which frame
    unit: Tensor     # (N,), or (N, C) for the axes of what was boxed: x times unit is in the units of the file
    index: Tensor    # (N,) which sequences these are, on the CPU


class Loader:
    """Epochs of batches. What a batch holds depends on (seed, epoch, step) alone, not on workers or on what was drawn before; where
    the frames lie on a GPU, the random numbers are drawn there, and are others, and sums agree up to rounding.

    repeat: passes over the data per epoch, each in an order of its own. No sequence is dropped: a last batch of fewer than two
    for each process, too few for batch norm, joins its neighbour. rank, world: this process takes every world-th
    sequence of each batch. workers: loader processes; 0 builds batches here, one gather and a few vector operations each.
    """

    def __init__(self, data: Sequences, skeleton: dict, channels: int, batch_size: int, frames: int, training: bool, seed: int = 0,
                 augmentation: Augmentation = Augmentation(), repeat: int = 1, workers: int = 0, rank: int = 0, world: int = 1,
                 box: bool = False):
        data = replace(data, box=box)
        self.data = replace(data, placement=find_placements(data, skeleton, channels))
        self.skeleton, self.channels, self.frames, self.training = skeleton, channels, frames, training
        self.augmentation = augmentation if training else Augmentation()
        self.batch_size, self.seed, self.repeat, self.workers, self.rank, self.world = batch_size, seed, repeat, workers, rank, world
        self.steps = len(self._batches(torch.arange(len(data) * repeat)))

    def _batches(self, order: Tensor) -> list:
        batches = list(order.split(self.batch_size))
        if len(batches) > 1 and len(batches[-1]) < 2 * self.world:
            last = batches.pop()
            batches[-1] = torch.cat([batches[-1], last])
        return batches

    def epoch(self, epoch: int = 0):
        """The batches of one epoch, in order of (seed, epoch) in training and of the file in testing."""
        order = torch.arange(len(self.data))
        if self.training:
            generator = torch.Generator().manual_seed(self._seed(epoch))
            order = torch.cat([torch.randperm(len(self.data), generator=generator) for _ in range(self.repeat)])
        batches = [(index[self.rank::self.world], self._seed(epoch, step) + self.rank)
                   for step, index in enumerate(self._batches(order), 1)]
        if not self.workers:
            return map(self.batch, batches)
        return torch.utils.data.DataLoader(batches, batch_size=None, num_workers=self.workers, collate_fn=self.batch,
                                           generator=torch.Generator())  # its own: the global one goes on as without workers

    def _seed(self, epoch: int, step: int = 0) -> int:
        """A seed of its own for every step of every epoch, the same in all processes; step 0 is the order of the epoch."""
        return ((self.seed * 1_000_003 + epoch) * 1_000_003 + step) * 1_003 % 2**62

    def batch(self, index_and_seed) -> Batch:
        """One vectorised gather on the device that holds the frames, then normalisation and augmentation as one affine map."""
        index, seed = index_and_seed
        data, device = self.data, self.data.frames.device
        generator = torch.Generator(device).manual_seed(seed)
        here = index.to(device, non_blocking=True)
        steps = sample_frames(data.length[here], self.frames, self.training, self.augmentation.crop, generator)
        rows = (data.start[here][:, None] + steps).flatten()
        x, there = (t.index_select(0, rows).unflatten(0, steps.shape).transpose(1, 2) for t in (data.frames, data.there))
        x = x.float()
        if self.augmentation.crop < 1:  # a window is normalised by what it shows, as a sequence that short would be
            placement = find_batch_placement(x, there, self.skeleton, self.channels, not data.box)
        else:
            placement = tuple(p[here] for p in data.placement)
        x, unit = self.augmentation(x, there, placement, self.skeleton, generator), placement[2]  # (N, M, T, V, C), (N,)
        if data.box:
            x, unit = boxed(x, there, unit, self.channels)
        return Batch(x, data.label[here], data.present[index], there, unit, index)


# ---------------------------------------------------------------------------------------------- built-in stick figures

# What the angles of a stick figure do in each action: joint angle -> (amplitude in radians or body units, cycles per period,
# phase in periods). All swing about the same resting pose, so that no single pose gives the action away. "l" and "r" are
# exchanged at random. After "|" comes the second person, who stands face to face.
ANGLES = "swing_l swing_r raise_l raise_r elbow_l elbow_r leg_l leg_r knee_l knee_r lean sway up forward".split()
ACTIONS = {
    "walk": "leg_l .5 1 0, leg_r .5 1 .5, swing_l .5 1 .5, swing_r .5 1 0, knee_l .3 1 .3, knee_r .3 1 .8",
    "march": "leg_l .55 1 0, leg_r .55 1 .5, knee_l .5 1 .3, knee_r .5 1 .8, up .05 2 0",
    "jumping jack": "raise_l .8 1 0, raise_r .8 1 0, up .12 1 .1",
    "windmill": "raise_l .8 1 0, raise_r .8 1 .5",
    "squat": "knee_l .6 1 0, knee_r .6 1 0, leg_l .4 1 0, leg_r .4 1 0, up .2 1 .5",
    "wave": "elbow_r .6 2 0, raise_r .3 2 .25",
    "wave slowly": "elbow_r .6 .7 0, raise_r .3 .7 .25",
    "box": "swing_l .6 1.5 0, swing_r .6 1.5 .5, elbow_l .6 1.5 .5, elbow_r .6 1.5 0",
    "lift": "swing_l .6 1 0, swing_r .6 1 0, elbow_l .4 1 0, elbow_r .4 1 0, up .08 1 0",
    "kick": "leg_r .8 1 0, knee_r .5 1 .25",
    "bow": "lean .6 .7 0",
    "sway": "sway .4 1 0",
    "shake hands": "swing_r .35 2 0, elbow_r .2 2 0 | swing_r .35 2 .5, elbow_r .2 2 .5",
    "push": "swing_l .7 1 0, swing_r .7 1 0, elbow_l .5 1 .5 | lean .4 1 .65, forward .3 1 .65",
    "dance in step": "sway .4 1 0, leg_l .3 1 0 | sway .4 1 0, leg_l .3 1 0",
    "approach": "forward .5 .6 0, leg_l .3 1.8 0, leg_r .3 1.8 .5 | forward .5 .6 0, leg_l .3 1.8 .5, leg_r .3 1.8 0",
}


def stick_figures(size: int) -> tuple:
    """`size` sequences of ACTIONS, 2D coco17 poses of 40 to 80 frames in pixels, a fifth of them for testing; always the same.

    Forward kinematics in the body's frame (x to its left, y up, z ahead), then a random view. Body proportions, resting pose,
    tempo, phase, amplitude, view and pixel noise vary from one sequence to the next.
    """
    if size < 2 * len(ACTIONS):
        raise DataError(f"a built-in set of {size} sequences; expected at least {2 * len(ACTIONS)}, two for each action")
    table = torch.zeros(len(ACTIONS), 2, len(ANGLES), 3)  # (K, M, angles, amplitude / cycles / phase)
    for k, action in enumerate(ACTIONS.values()):
        for person, terms in enumerate(action.split("|")):
            for angle, *numbers in map(str.split, terms.split(",")):
                table[k, person, ANGLES.index(angle)] = torch.tensor([float(n) for n in numbers])
    generator, labels = torch.Generator().manual_seed(0), torch.arange(size) % len(ACTIONS)
    pairs = torch.tensor(["|" in action for action in ACTIONS.values()])[labels]
    parts = [draw_figures(table[chunk], pair, generator) for chunk, pair in zip(labels.split(2048), pairs.split(2048))]
    frames, length = map(torch.cat, zip(*parts))
    present = torch.stack([torch.ones_like(pairs), pairs], 1)
    data = Sequences(frames, length.cumsum(0) - length, length, labels, present, present.repeat_interleave(length, 0),
                     [f"stick[{i}]" for i in range(size)])
    order = torch.randperm(size, generator=generator)
    return data.subset(order[size // 5:]), data.subset(order[:size // 5]), "built-in stick figures, a fifth for testing", False


def draw_figures(table: Tensor, pairs: Tensor, generator) -> tuple:
    """Frames (F, 2, 17, 2) and lengths (n,) of n sequences whose angles follow table (n, 2, angles, 3)."""
    def normal(*shape, spread=1.0):
        return spread * torch.randn(n, *shape, generator=generator)

    n, T = len(table), 80
    other_side = {"_l": "_r", "_r": "_l"}
    mirrored = table[:, :, [ANGLES.index(a[:-2] + other_side.get(a[-2:], a[-2:])) for a in ANGLES]]
    table = torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.5, table, mirrored)
    amplitude, cycles, phase = (table * torch.cat([1 + normal(1, 1, 1, spread=0.15), torch.ones(n, 1, 1, 2)], -1)).unbind(-1)
    period = 30 * torch.exp(normal(1, 1, 1, spread=0.12))                          # frames, (n, 1, 1, 1)
    time = torch.arange(T).view(T, 1) / period + torch.rand(n, 1, 1, 1, generator=generator)
    rest = torch.tensor([{"knee": .5, "elbow": 1., "raise": .7}.get(a.split("_")[0], 0.) for a in ANGLES])
    wave = torch.sin(2 * math.pi * (cycles[:, :, None] * time + phase[:, :, None]))
    angle = rest + normal(2, 1, len(ANGLES), spread=0.12) + amplitude[:, :, None] * wave
    a = dict(zip(ANGLES, angle.unbind(-1)))                                        # each (n, 2, T)
    size = (1 + normal(2, 1, 10, spread=0.07)) * torch.tensor([.5, .22, .3, .27, .42, .4, .19, .11, .05, .08])
    bone = dict(zip("trunk neck upper_arm forearm thigh shin shoulder hip eye ear".split(), size.unbind(-1)))  # each (n, 2, 1)
    zero = torch.zeros(n, 2, T)

    def along(x, y, z):
        return torch.stack([zero + x, zero + y, zero + z], -1)                     # (n, 2, T, 3)

    def limb(side, bend, length, lift=zero):
        """A bone that hangs down, swung forward by `bend` and raised sideways by `lift`."""
        return along(side * lift.sin(), -lift.cos() * bend.cos(), lift.cos() * bend.sin()) * length[..., None]

    hips = along(0, a["up"], a["forward"])
    trunk = along(a["sway"].sin(), a["lean"].cos() * a["sway"].cos(), a["lean"].sin())
    neck = hips + trunk * bone["trunk"][..., None]
    head = neck + trunk * bone["neck"][..., None]
    joints = {"nose": head + along(0, 0, .1)}
    for side, name in ((1, "left_"), (-1, "right_")):
        swing, lift, bend, leg, knee = (a[f"{angle}_{name[0]}"] for angle in ("swing", "raise", "elbow", "leg", "knee"))
        joints[name + "eye"] = head + along(side * bone["eye"], .05, .07)
        joints[name + "ear"] = head + along(side * bone["ear"], .02, 0)
        joints[name + "shoulder"] = neck + along(side * bone["shoulder"], 0, 0)
        joints[name + "elbow"] = joints[name + "shoulder"] + limb(side, swing, bone["upper_arm"], lift)
        joints[name + "wrist"] = joints[name + "elbow"] + limb(side, swing + bend, bone["forearm"], lift)
        joints[name + "hip"] = hips + along(side * bone["hip"], 0, 0)
        joints[name + "knee"] = joints[name + "hip"] + limb(side, leg, bone["thigh"])
        joints[name + "ankle"] = joints[name + "knee"] + limb(side, leg - knee, bone["shin"])
    body = torch.stack([joints[name] for name in SKELETONS["coco17"]["joints"]], 3)  # (n, 2, T, 17, 3)
    body[..., 2] -= 0.5 * (1 + normal(1, 1, 1, spread=0.1)) * pairs.view(n, 1, 1, 1)  # of two, each stands half a step back
    view = (2 * torch.rand(n, 1, generator=generator) - 1 + math.pi * torch.arange(2))[:, :, None, None]  # the second faces the first
    x = body[..., 0] * view.cos() + body[..., 2] * view.sin()
    depth = 4 + normal(1, 1, 1, spread=0.3) - body[..., 0] * view.sin() + body[..., 2] * view.cos()
    pixels = torch.stack([320 + normal(1, 1, 1, spread=40.) + 500 * x / depth, 240 - 500 * body[..., 1] / depth], -1)
    pixels += torch.randn(pixels.shape, generator=generator) * 1.5
    pixels[~pairs, 1] = 0
    length = torch.randint(40, T + 1, (n,), generator=generator)
    return pixels.transpose(1, 2)[torch.arange(T) < length[:, None]], length
