"""Pre-trains SkeletonMAE: masked body parts are reconstructed from the visible ones, without labels.

    python train_pretrain.py                                           # built-in stick figures
    python train_pretrain.py --data ntu60.npz                          # supplement A: Adam 1.5e-4, batch 1024, 50 epochs
    python train_pretrain.py --data ntu60.npz --mask-ratio 0.3         # random joints instead of body parts
    python train_pretrain.py --strl-layers 3 --loss squared --mask-ratio 0.5 --mask-segments 4   # more than the paper; see the README
    python train_pretrain.py --resume                                  # go on where runs/pretrain stopped

Leaves in --out (runs/pretrain): pretrain.pt, the checkpoint that train_finetune.py --ckpt reads, and log.csv. All but
the last section, and Settings, is what both scripts share; training itself is `main`, read top to bottom.
"""
import argparse
import contextlib
import csv
import ctypes
import difflib
import glob
import io
import itertools
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace

# before torch: these silence its one remark about numpy
from data import Augmentation, DataError, Dataset, Loader, brief, load, read_torch, reading, shown, usual_channels
from skeletonmae import Packing, SkeletonMAE, bone_parents, make_skeleton, normalized_adjacency
import torch
from torch import Tensor


# ---------------------------------------------------------------------------------------------- settings

def option(default, help: str, **extra):
    """A field of a settings dataclass that is also a flag of the command line."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass
class CommonSettings:
    """What both scripts take."""
    data: str = option("", "data set: CTR-GCN's .npz, PYSKL's .pkl or a .pt dict; without it built-in stick figures")
    split: str = option("", "split of a PYSKL pickle: xsub for xsub_train and xsub_val, or train_name,test_name")
    layout: str = option("", "skeleton layout where two fit, or a JSON file with your own")
    test_fraction: float = option(0.2, "share of test sequences where a pickle has no split", low=0, high=1)
    synthetic_size: int = option(1600, "how many stick figures the built-in set has", low=32, high=1_000_000)
    frames: int = option(64, "T, frames sampled from each sequence", low=2, high=10_000)
    box: bool = option(False, "each axis of a sequence from -1 to 1, after augmentation, instead of turning it to face the viewer")
    rotation: float = option(None, "3D: random rotation in degrees to either side; default: what suits the data", low=0, high=180)
    scaling: float = option(None, "random scaling of each axis up to this; --box undoes it; default: what suits the data", low=0, high=0.9)
    shift: float = option(None, "random shift in body units; --box undoes it; default: what suits the data", low=0)
    flip: float = option(None, "probability of a mirror image; default: what suits the data", low=0, high=1)
    noise: float = option(None, "coordinate noise in body units; default: what suits the data", low=0)
    crop: float = option(None, "shortest random part of a sequence to sample from; default: what suits the data", low=0, high=1)
    repeat: int = option(1, "passes over the data per epoch", low=1, high=10_000)
    workers: int = option(0, "loader processes; 0 builds batches in this one (supplement A: 4; measured slower)", low=0, high=256)
    width: int = option(64, "D, joint embedding", low=4, high=4096)
    hidden: int = option(128, "H, encoder width", low=4, high=4096)
    layers: int = option(3, "L_D, encoder layers", low=1, high=100)
    dropout: float = option(0.2, "input feature dropout, supplement A: 0.2", low=0, high=0.99)
    blocks: int = option(2, "attention blocks in each STRL layer", low=0, high=100)
    stride: int = option(2, "temporal stride between STRL layers", low=1, high=100)
    motion: bool = option(False, "motion as further input channels")
    bone: bool = option(False, "bones as further input channels")
    score: bool = option(False, "joint score as a further input channel, where the data have one")
    eval_every: int = option(10, "epochs between measurements on the test split", low=1)
    seed: int = option(0, "seed of weights, order, masks and augmentation", low=0, high=2**31)
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    amp: bool = option(None, "bfloat16 autocast; default on GPUs that have bfloat16 themselves, off on CPUs")
    compile: bool = option(False, "torch.compile; needs a C++ compiler on CPUs")
    graphs: bool = option(None, "CUDA graphs; default: on one GPU, where a pass has at most 128 sequences")
    resume: bool = option(False, "go on from the checkpoint in --out, with its settings")


@dataclass
class Settings(CommonSettings):
    """Pre-training; the defaults are supplement A."""
    out: str = option("runs/pretrain", "folder for checkpoint and log")
    epochs: int = option(50, "supplement A: 50", low=1)
    batch_size: int = option(1024, "sequences per optimiser step, supplement A: 1024", low=2)
    micro_batch: int = option(256, "sequences per forward pass; bounds memory, batch norm sees this many (one left over joins them)", low=1)
    lr: float = option(1.5e-4, "Adam's learning rate, supplement A: 1.5e-4", low=0)
    beta: float = option(2.0, "power of the re-weighted cosine error", low=1)
    mask_parts: tuple = option(("right_arm", "right_leg"), "body parts to mask, with commas")
    mask_num_parts: int = option(0, "mask this many parts, drawn per sequence, instead", low=0)
    mask_ratio: float = option(0.0, "mask this share of the joints, drawn per sequence, instead", low=0, high=1)
    mask_segments: int = option(1, "draw masks anew in each of this many segments of the frames; not the paper's", low=1, high=10_000)
    loss: str = option("cosine", "cosine (paper Eq. 2) or squared, of positions; not the paper's", choices=("cosine", "squared"))
    strl_layers: int = option(0, "pre-train this many STRL layers too, 3 for the classifier's; not the paper's", low=0, high=100)


STRL_SETTINGS = ("frames", "strl_layers", "blocks", "stride")  # which decide the shape of the STRL layers


class Failure(DataError):
    """A DataError about a flag, a checkpoint or the machine: `run` prints it as one line and exits with status 2."""


def flag(name: str) -> str:
    return name.replace("_", "-")


def pick(settings: CommonSettings, *names: str) -> dict:
    return {name: getattr(settings, name) for name in names}


def bounds(f) -> tuple:
    return f.metadata.get("low", -math.inf), f.metadata.get("high", 2**31 if f.type is int else 1e30)


def within(f, value) -> bool:
    """Whether a number, or every number of several, is within the bounds of its setting."""
    low, high = bounds(f)
    numbers = value if type(value) in (tuple, list) else [value]
    return all(low <= number <= high for number in numbers if type(number) is not str)


def parse(settings: type, doc: str, argv=None) -> tuple:
    """The command line that a settings dataclass describes. Returns (settings, names of the flags that were given)."""
    def several(default):
        kind = type(default[0]) if default else str

        def convert(text):
            try:
                return tuple(kind(part.strip()) for part in text.split(","))
            except ValueError:
                example = ",".join(map(str, default))
                raise argparse.ArgumentTypeError(f"{text} is no list; expected values with commas, as in {example}") from None
        return convert

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise Failure(f"{message}; --help lists all flags")

    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for f in fields(settings):
        default = ",".join(map(str, f.default)) if f.type is tuple else f.default
        extra = {key: f.metadata[key] for key in ("choices", "nargs", "const") if key in f.metadata}
        if f.type is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif f.type is tuple and "nargs" not in f.metadata:
            extra |= {"type": several(f.default), "metavar": "A,B"}
        elif f.type in (int, float):
            extra |= {"type": f.type, "metavar": f.type.__name__.upper()}
        text = f.metadata["help"].replace("%", "%%") + (f" (default {default})" if default not in ("", None) else "")
        parser.add_argument("--" + flag(f.name), help=text, **extra)
    namespace, unknown = parser.parse_known_args(argv)
    given = vars(namespace)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [o for a in parser._actions for o in a.option_strings], 1)
        raise Failure(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; --help lists all flags"))
    for f in fields(settings):
        if f.name in given and f.type in (int, float, tuple) and not within(f, given[f.name]):
            low, high = bounds(f)
            parser.error(f"argument --{flag(f.name)}: {given[f.name]} is out of range; expected {low:g} to {high:g}")
    return settings(**given), set(given)


class Terminated(BaseException):
    """SIGTERM, raised where the program stands."""


def in_a_job() -> bool:
    """Whether several processes of torchrun have found each other; torch may come without the means."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def run(main, resumes: bool = True):
    """Calls main. What ends it is one line on stderr and an exit status: 2 for what the user can mend, 1 for another process that
    stopped, 130 for Ctrl-C and 143 for SIGTERM, these two with how to go on if it `resumes`. A bug keeps its traceback."""
    def terminate(*_):
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        if in_a_job():
            torch.distributed.destroy_process_group()
        return
    except DataError as error:
        status, message = 2, f"error: {error}"
    except OSError as error:
        mend = "; expected the path of something that exists" if isinstance(error, FileNotFoundError) else ""
        status, message = 2, f"error: {error.filename or 'file'}: {error.strerror or error}{mend}"
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            status, message = 2, (f"error: the GPU's memory is full ({brief(error)}); try a smaller --micro-batch (pre-training) or "
                                  "--batch-size, --no-graphs, or --device cpu")
        elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            status, message = 2, (f"error: the memory is full ({brief(error)}); try a smaller --micro-batch (pre-training) or "
                                  "--batch-size, or fewer --frames")
        elif in_a_job() and "onnection" in str(error):  # gloo: connection closed or reset by peer
            status, message = 1, f"error: another process of this job stopped ({brief(error)}); --resume goes on from the last checkpoint"
        else:
            raise
    except (KeyboardInterrupt, Terminated) as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else 143
        message = "\nstopped"
        if resumes:
            message += "; epochs that ended are saved: the same command line with --resume goes on after the last of them"
    print(message, file=sys.stderr)
    sys.exit(status)


# ---------------------------------------------------------------------------------------------- machine

def set_up(settings: CommonSettings) -> tuple:
    """Device, whether to use bfloat16, and this process's place among those of torchrun: (device, amp, rank, world).
    What would only fail after the first epoch fails here: a folder that cannot be written, a batch too small to share."""
    os.makedirs(settings.out or ".", exist_ok=True)
    tempfile.TemporaryFile(dir=settings.out or ".").close()
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world > 1 and ":" in name:
        raise Failure(f"--device {name} is one device for {world} processes; expected cuda, where each takes its own, or cpu")
    if name == "cuda":
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        float(torch.zeros(1, device=device))
    except (RuntimeError, AssertionError, ImportError) as error:
        expected = "auto, cpu, cuda" if torch.cuda.is_available() else "auto, cpu"
        raise Failure(f"device {name} cannot be used here ({brief(error)}); expected {expected}") from None
    if settings.batch_size < 2 * world:
        raise Failure(f"--batch-size {settings.batch_size} cannot be shared among {world} processes; expected at least two sequences each")
    if settings.graphs and (device.type != "cuda" or world > 1 or settings.compile):
        raise Failure(f"--graphs needs one GPU and no --compile, this is {world} x {device.type}; leave it out")
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    amp = native if settings.amp is None else settings.amp
    return device, amp, rank, world


def keep_freed_memory():
    """glibc gives every large tensor's memory back to the kernel and asks for it again, page by page: up to 40 % of a step.
    These three thresholds keep it in the process: measured 1.3 to 1.8 times as fast on 2 cores. Other systems: no effect."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(parameter, value)


def seed_epoch(settings: CommonSettings, epoch: int, rank: int):
    """Masks and dropout depend on the seed, the epoch and the process alone, so resuming is exact."""
    torch.manual_seed((settings.seed * 100_003 + epoch) * 1_003 + rank)


class Replay:
    """step(packing, *tensors), which runs forward and backward and returns the loss, as a CUDA graph: its hundreds of small kernels start
    as one, where starting them one by one takes longer than they do.

    A graph has fixed shapes: each number of sequences and persons gets its own when it comes up for the second time; the first time
    warms up. It writes where it was recorded: parameters, buffers and gradients must stay the same tensors (zero_grad(set_to_none=False)),
    and whatever else the step reads, training mode and numbers, stays as it was."""

    def __init__(self, step):
        self.step, self.recorded, self.pool = step, {}, torch.cuda.graph_pool_handle()  # graphs run in turn and share their memory

    def __call__(self, packing: Packing, *tensors: Tensor) -> Tensor:
        inputs = packing.rows, packing.sequence, packing.count, *tensors
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.recorded:
            self.recorded[shapes] = None
            return self.step(packing, *tensors)
        if self.recorded[shapes] is None:
            own = *inputs[:3], *(x.clone() for x in tensors)  # clones: a slice would keep its whole batch in memory
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                loss = self.step(packing, *own[3:])
            self.recorded[shapes] = graph, own, loss
        graph, own, loss = self.recorded[shapes]
        for mine, x in zip(own, inputs):
            mine.copy_(x)
        graph.replay()
        return loss.clone()


def replayed(step, settings: CommonSettings, device, world: int, sequences: int):
    """The step as a CUDA graph where that is asked for, or where passes are so small that it pays."""
    pays = device.type == "cuda" and world == 1 and not settings.compile and sequences <= 128
    graphs = pays if settings.graphs is None else settings.graphs
    return Replay(step) if graphs else step


def read_data(settings: CommonSettings) -> Dataset:
    return load(settings.data or None, settings.split or None, settings.layout or None, settings.test_fraction, settings.synthetic_size,
                settings.box)


def note_oddities(say, settings: CommonSettings, data: Dataset):
    """Says what may be a mistake: a layout that may be another, numbers that may be no positions, flags that these data leave without
    effect."""
    C, joints, usual = data.channels, data.skeleton["joints"], usual_channels(data.layout)
    poses = data.train.frames[:10_000, ..., :C][data.train.there[:10_000]].float()  # (n, V, C), of NTU's 7 GB the beginning
    zero = (poses == 0).all(-1)
    missing = 100 * (zero & ~zero.all(0)).float().mean()  # the origin of centred data is zero in every frame
    if settings.data and not settings.layout:
        say(f"note: {data.layout} is a guess from {len(joints)} joints in {C}D; if yours are not {', '.join(joints)}, in this order, "
            "give their --layout")
    if missing > 1 and not data.score:
        say(f"note: {missing:.0f} % of the joints are exactly 0 and taken for positions; where they are missing, give a pickle a "
            "keypoint_score of 0")
    if C == 3 and ((0 <= poses[..., 2]) & (poses[..., 2] <= 1)).all() and (poses[..., :2] > 10).any():
        say("note: the third coordinate is between 0 and 1, the others are not: a score is no coordinate; leave it out or make it the "
            "keypoint_score of a pickle")
    if not data.skeleton["pairs"]:
        say(f"note: layout {data.layout} has no left and right: nothing is mirrored and, in 3D, no sequence is turned to its viewer; "
            "name joints left_x and right_x, or list pairs")
    if not settings.layout and C != usual:
        say(f"note: {data.layout} usually comes in {usual}D, these data are {C}D: joints in another order need a --layout of "
            "their own, and a score is no coordinate (in a pickle it is the keypoint_score)")
    loose = sum(parent == joint for joint, parent in enumerate(bone_parents(data.skeleton))) - 1  # the root aside
    if loose:
        root = shown(joints[data.skeleton["centre"][0]])
        say(f"note: in layout {data.layout} no edges join {loose} of the joints to {root}, the root of the bones")
    if settings.score and not data.score:
        say("note: these data have no joint scores; --score does nothing")
    if settings.rotation and C == 2:
        say("note: these data are 2D; --rotation does nothing")


def encoder_arguments(settings: CommonSettings, data: Dataset) -> dict:
    """What SkeletonMAE and SkeletonClassifier both take."""
    return {"skeleton": data.skeleton, "channels": data.channels, "score": settings.score and data.score,
            **pick(settings, "width", "hidden", "layers", "dropout", "motion", "bone")}


def strl_arguments(settings: CommonSettings, data: Dataset) -> dict:
    """What gives the STRL layers their shape, in pre-training and in the classifier."""
    return {"persons": data.persons, **pick(settings, *STRL_SETTINGS)}


def pretraining_arguments(settings: Settings, data: Dataset) -> dict:
    """What SkeletonMAE takes."""
    arguments = encoder_arguments(settings, data)
    arguments |= pick(settings, "beta", "mask_parts", "mask_num_parts", "mask_ratio", "mask_segments", "loss")
    if settings.strl_layers:
        arguments["strl"] = strl_arguments(settings, data)
    return arguments


def augmentation(settings: CommonSettings, channels: int) -> Augmentation:
    """The augmentation asked for, with what suits 2D or 3D data for what was not."""
    suits = Augmentation(scaling=0.1, shift=0.1, **({"rotation": 30} if channels == 3 else {"flip": 0.5, "noise": 0.01}))
    asked = pick(settings, *(f.name for f in fields(Augmentation)))
    return replace(suits, **{name: value for name, value in asked.items() if value is not None})


def loaders(settings: CommonSettings, data: Dataset, device, rank: int, world: int, test_batch: int | None = None) -> tuple:
    """Batches of the training split, and of the test split, there of test_batch sequences if given. The frames move to the GPU where
    they fit into half of its free memory; batches are then built there. Loader processes cannot use a GPU: with them the frames stay."""
    if len(data.train) < world:
        raise Failure(f"{len(data.train)} training sequences cannot be shared among {world} processes; expected at least one for each")

    def placed(split):
        fits = device.type == "cuda" and not settings.workers and split.frames.nbytes < torch.cuda.mem_get_info(device)[0] / 2
        return split.to(device) if fits else split

    train = placed(data.train)
    if data.test.frames is data.train.frames:  # the splits of a pickle share one tensor: it moves once, what is small follows
        test = replace(data.test, frames=train.frames, there=train.there).to(train.frames.device)
    else:
        test = placed(data.test)
    train = Loader(train, data.skeleton, data.channels, settings.batch_size, settings.frames, True, settings.seed,
                   augmentation(settings, data.channels), settings.repeat, settings.workers, rank, world)
    return train, Loader(test, data.skeleton, data.channels, test_batch or settings.batch_size, settings.frames, False)


# ---------------------------------------------------------------------------------------------- files

def write_atomically(path: str, write):
    """write(file) into memory, from there into a new file beside path, synced, then renamed: path is at no moment half-written,
    and a full disk is an OSError that says so."""
    content = io.BytesIO()
    write(content)
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(beside, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, f"could not be written ({error.strerror}); what was there is kept", path) from None
    finally:
        for left in glob.glob(f"{glob.escape(path)}.*.tmp"):  # this one after a failure, or that of a run killed while it wrote
            os.remove(left)


def save(checkpoint: dict, path: str):
    """A plain dict of tensors and settings, for torch.load(weights_only=True), and its log as log.csv beside it."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))
    write_log(checkpoint["log"], os.path.join(os.path.dirname(path), "log.csv"))


def write_log(rows: list, path: str):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


FIELDS = {"model": dict, "optimizer": dict, "settings": dict, "model_settings": dict, "skeleton": dict, "log": list, "epoch": int,
          "layout": str, "channels": int}  # of every checkpoint
FINETUNED_FIELDS = {**FIELDS, "persons": int, "classes": list, "pretrained": list}
ITEMS = {"model": Tensor, "log": dict, "classes": int, "pretrained": str}


def read_checkpoint(path: str, kinds: tuple) -> dict:
    """A checkpoint of one of these kinds ("pretrain", "finetune"), on the CPU. Raises DataError, OSError."""
    checkpoint = read_torch(path, "is no checkpoint of these scripts", f"expected {' or '.join(kinds)}.pt")
    kind = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
    if kind not in kinds:
        raise Failure(f"{path} holds {kind if isinstance(kind, str) else type(checkpoint).__name__}, no {' or '.join(kinds)} checkpoint; "
                      "expected a file that these scripts wrote")
    for name, expected in (FINETUNED_FIELDS if kind == "finetune" else FIELDS).items():
        value = checkpoint.get(name)
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if (not isinstance(value, expected) or not all(isinstance(item, ITEMS.get(name, object)) for item in items)
                or name == "epoch" and not 0 <= value < 2**31):
            raise Failure(f"{path} lacks the {name} of a {kind} checkpoint; expected a file that these scripts wrote")
    with reading(path, "holds no skeleton", "expected a file that these scripts wrote"):
        checkpoint["skeleton"] = make_skeleton(**checkpoint["skeleton"])
    return checkpoint


def restore(checkpoint: dict | None, path: str, rank: int, **parts) -> tuple:
    """Takes an interrupted run up again, if there is one: parts are its model or optimizer. Returns (the epoch to go on with, the log)."""
    if not checkpoint:
        return 0, []
    with reading(path, "does not fit these settings and data", "resume with the same"):
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    if rank == 0:  # the run may have died between its checkpoint and its log
        write_log(checkpoint["log"], os.path.join(os.path.dirname(path), "log.csv"))
    return checkpoint["epoch"] + 1, checkpoint["log"]


def check_fit(checkpoint: dict, path: str, data: Dataset):
    """The data must have the skeleton of a checkpoint, its coordinates, its joint scores and, where its layers depend on them, its
    persons."""
    if (checkpoint["skeleton"], checkpoint["channels"]) != (data.skeleton, data.channels):
        raise Failure(f"{path} was trained on layout {checkpoint['layout']} in {checkpoint['channels']}D, the data are {data.layout} in "
                      f"{data.channels}D; expected the same skeleton")
    shape = checkpoint["model_settings"]
    if shape.get("score") is True and not data.score:
        raise Failure(f"{path} was trained with joint scores, the data have none; expected a file with scores")
    strl = shape.get("strl")  # a dict where the STRL layers were pre-trained
    persons = (strl if isinstance(strl, dict) else shape).get("persons")
    if isinstance(persons, int) and persons != data.persons:
        raise Failure(f"{path} was trained on sequences of {persons} person{'s' * (persons > 1)}, the data have {data.persons}; "
                      "expected as many")


def allowed(f, value) -> bool:
    """Whether a setting can have this value: the type of its field, within its bounds."""
    if value is None:
        return f.default is None
    if f.type in (int, float):
        return type(value) in (int, f.type) and within(f, value)
    if f.type is tuple:
        return type(value) is tuple and all(type(v) is type(f.default[0]) for v in value) and within(f, value)
    if f.type is str:
        return type(value) is str and value.isprintable() and value in f.metadata.get("choices", (value,))
    return type(value) is bool


def recorded(settings: type, checkpoint: dict, path: str, names=None) -> dict:
    """The settings in a checkpoint, all of them or those in `names`; a value that no command line could have set is refused."""
    chosen = [f for f in fields(settings) if names is None or f.name in names]
    before = {f.name: checkpoint["settings"].get(f.name, f.default) for f in chosen}
    for f in chosen:
        if not allowed(f, before[f.name]):
            raise Failure(f"{path} holds {str(before[f.name]):.40} as --{flag(f.name)}; expected a file that these scripts wrote")
    return before


def refuse_change(asked, before: dict, names: set, path: str, mend: str):
    """A flag that contradicts what the checkpoint at `path` was made with is refused by name; `mend` says what to do."""
    for name in sorted(names):
        if getattr(asked, name) != before[name]:
            raise Failure(f"--{flag(name)} {getattr(asked, name)} differs from {before[name]} of {path}; {mend}")


def resume_settings(asked: CommonSettings, given: set, checkpoint: dict, path: str) -> CommonSettings:
    """The settings of the interrupted run; a flag that would change the run is refused by name."""
    free = {"epochs", "resume", "out", "workers", "device", "eval_every", "graphs"}
    before = recorded(type(asked), checkpoint, path)
    if "epochs" in given and asked.epochs <= checkpoint["epoch"]:
        raise Failure(f"--epochs {asked.epochs}: {path} has {checkpoint['epoch'] + 1} epochs behind it; expected at least as many")
    refuse_change(asked, before, given - free, path, "resume without it, or start anew with another --out")
    kept = (given & free) | {"resume", "out", "graphs"}  # graphs: they depend on the machine, not on the run
    return replace(asked, **{name: value for name, value in before.items() if name not in kept})


# ---------------------------------------------------------------------------------------------- progress

def hint_at_steps(say, train: Loader, settings: CommonSettings, fixed=(), **advice):
    """A small set takes few steps at supplement A's settings: says so, and which flags make it 4,000 in the way that suits such a set
    (README, "Measured"): of these and of `advice` those that change anything and are not `fixed` by a checkpoint."""
    steps = train.steps * settings.epochs
    if steps < 2000:
        repeat = math.ceil(4000 * advice["batch_size"] / (len(train.data) * settings.epochs))
        frames = min(max(16, settings.stride ** max(0, settings.strl_layers - 1)), 10_000)  # which leave one for the last layer
        advice |= {"motion": True, "bone": True, "hidden": 64, "frames": frames, "crop": 0.3, "repeat": min(repeat, 10_000)}
        if settings.strl_layers:  # else pre-training has no attention
            advice |= {"blocks": 1}
        if train.channels == 3:
            advice |= {"box": True, "rotation": 60}
        changed = {flag(name): value for name, value in advice.items() if name not in fixed and getattr(settings, name) != value}
        flags = " ".join(f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name} {value}"
                         for name, value in changed.items())
        say(f"hint: {steps} steps in all is little training; for a small set try {flags}")


class Progress:
    """The losses of an epoch as one live line on a terminal, one line an epoch elsewhere; silent in all processes but the first.
    The first loss that is not finite stops the run and says where it came from."""

    def __init__(self, epochs: int, steps: int, first_epoch: int, names: list, checkpoint: str, rank: int, world: int):
        self.epochs, self.names, self.checkpoint, self.world, self.quiet = epochs, names, checkpoint, world, rank > 0
        self.begin = self.drawn = time.monotonic()
        self.total, self.done, self.live = (epochs - first_epoch) * steps, 0, sys.stdout.isatty()

    def start_epoch(self, epoch: int, lr: float):
        self.epoch, self.lr, self.losses, self.indices = epoch, lr, [], []
        self.epoch_begin, self.epoch_end = time.monotonic(), None

    def step(self, loss: Tensor, index: Tensor):
        self.losses.append(loss)
        self.indices.append(index)
        self.done += 1
        if not loss.is_cuda:  # on a GPU, looking at a loss would stop the queue: there once an epoch
            self.check(len(self.losses) - 1)
        if self.live and not self.quiet and time.monotonic() - self.drawn > 0.5:  # reading a loss waits for the GPU: twice a second
            self.drawn = time.monotonic()
            self.show(self.line(float(loss)), last=False)

    def check(self, first: int = 0):
        bad = (~torch.stack(self.losses[first:]).isfinite()).nonzero().flatten().tolist()
        if bad:
            raise self.failure(f"loss is {float(self.losses[first + bad[0]])}", first + bad[0])

    def failure(self, what: str, step: int) -> Failure:
        who = [self.names[i] for i in self.indices[step].tolist()]
        listed = ", ".join(who[:8]) + " ..." * (len(who) > 8)
        kept = f"; {self.checkpoint} of the epoch before is kept" if self.epoch else ""
        return Failure(f"{what} in epoch {self.epoch + 1}, step {step + 1}, sequences {listed}; try a lower --lr{kept}")

    def row(self, model: torch.nn.Module) -> dict:
        """What the epoch adds to the log. Its last step can still have ruined the weights: no loss has seen them yet."""
        self.check()
        self.epoch_end = time.monotonic()  # measuring on the test split and saving, which follow, are not training
        if not torch.stack([value.isfinite().all() for value in model.state_dict().values()]).all():
            raise self.failure("weights are not finite", len(self.losses) - 1)
        return {"epoch": self.epoch + 1, "loss": float(torch.stack(self.losses).mean()), "lr": self.lr}

    def line(self, loss: float) -> str:
        now = time.monotonic()
        left = (now - self.begin) / max(self.done, 1) * (self.total - self.done)
        rate = sum(map(len, self.indices)) * self.world / max((self.epoch_end or now) - self.epoch_begin, 1e-9)
        return (f"epoch {self.epoch + 1}/{self.epochs}  loss {loss:.4g}  lr {self.lr:.3g}  {rate:.0f} seq/s  "
                f"{left // 60:.0f}m{left % 60:02.0f}s left")

    def end_epoch(self, loss: float, note: str):
        if not self.quiet:
            self.show(self.line(loss) + note, last=True)

    def show(self, line: str, last: bool):
        """On a terminal over the line before, but for the last column: a live line that reaches it would wrap, and stay."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            line = "\r" + (line if last else line[:width]).ljust(width)
        print(line, end="\n" if last else "", flush=True)


# ---------------------------------------------------------------------------------------------- pre-training

def measure_scale(loader: Loader) -> tuple:
    """Over the training set: s, the root mean square distance of the joints from the origin, and the mean pose (M, V, C)."""
    C = loader.channels
    square = count = pose = frames = 0
    for batch in loader.epoch():
        joints, there = batch.x[..., :C], batch.there[..., None, None]
        square, count = square + joints.square().sum(), count + there.sum() * joints.shape[3]
        pose, frames = pose + joints.sum((0, 2)), frames + there.sum((0, 2))
    return (square / count.clamp(min=1)).sqrt(), pose / frames.clamp(min=1)


def joint_distances(skeleton: dict) -> Tensor:
    """Edges on the shortest path between every two joints, (V, V), V where there is none. (A + I)^k is zero exactly where the path is
    longer than k: the number of k from 0 to V - 1 that find zero is its length."""
    V = len(skeleton["joints"])
    adjacency = normalized_adjacency(skeleton["edges"], V).double()
    return sum(torch.linalg.matrix_power(adjacency, k) == 0 for k in range(V)).float()


def neighbour_mean(x: Tensor, mask: Tensor, hops: Tensor) -> Tensor:
    """For every joint the mean of its nearest visible joints. x (N, M, T, V, C), mask (N, 1 or T, V) -> (N, M, T, V, C)."""
    hops = hops.to(x.device).masked_fill(mask[:, :, None, :], float("inf"))  # (N, 1 or T, V to, V from)
    nearest = (hops == hops.amin(3, keepdim=True)).to(x.dtype)
    return (nearest / nearest.sum(3, keepdim=True))[:, None] @ x


@torch.no_grad()
def reconstruction_error(model: SkeletonMAE, loader: Loader, mean_pose: Tensor) -> dict:
    """Mean distance of the masked joints from where they are, on the loader's sequences, in the units of the file: of the
    reconstruction, of the training set's mean pose, and of the mean of each joint's nearest visible neighbours."""
    C, hops, device = model.channels, joint_distances(model.skeleton), model.scale.device
    mean_pose = mean_pose.to(device)
    sums = torch.zeros(4, dtype=torch.float64)
    for step, batch in enumerate(loader.epoch()):
        full, unit = batch.x.to(device), batch.unit.to(device).view(len(batch.x), 1, 1, 1, -1)
        x = full[..., :C]
        mask = model.draw(len(x), x.shape[2], torch.Generator().manual_seed(step)).to(device)  # (N, 1 or T, V)
        seen = batch.there.to(device)[..., None] & mask[:, None]  # (N, M, T, V)
        if full.shape[-1] > C:
            seen = seen & (full[..., C] > 0)
        guesses = (model.reconstruct(full, batch.present, mask)[0], mean_pose[None, :, None].expand_as(x),
                   neighbour_mean(x, mask, hops))
        errors = [(((guess - x) * unit).norm(dim=-1) * seen).sum() for guess in guesses]
        sums += torch.stack([*errors, seen.sum()]).cpu().double()
    return dict(zip(("joint_error", "mean_pose_error", "neighbour_error"), (sums[:3] / sums[3].clamp(min=1)).tolist()))


def what_is_masked(settings: Settings) -> str:
    if settings.mask_ratio:
        what = f"{settings.mask_ratio:g} of the joints"
    elif settings.mask_num_parts:
        what = f"{settings.mask_num_parts} parts"
    else:
        what = ", ".join(settings.mask_parts)
    return what + f", drawn anew in each of {settings.mask_segments} segments" * (settings.mask_segments > 1)


def main(argv=None):
    settings, given = parse(Settings, __doc__, argv)
    path, checkpoint = os.path.join(settings.out, "pretrain.pt"), None
    if settings.resume:
        checkpoint = read_checkpoint(path, ("pretrain",))
        settings = resume_settings(settings, given, checkpoint, path)
    device, amp, rank, world = set_up(settings)
    say = print if rank == 0 else lambda *_: None

    data = read_data(settings)
    say(f"{settings.data or 'stick figures'}: {data}")
    if checkpoint:
        check_fit(checkpoint, path, data)
    note_oddities(say, settings, data)
    at_once = min(settings.batch_size, settings.micro_batch)  # so that measuring takes no more memory than training
    train, held_out = loaders(settings, data, device, rank, world, at_once)
    if not checkpoint:
        hint_at_steps(say, train, settings, batch_size=32, lr=1e-3)
    if settings.width % 4 or settings.hidden % 4:
        say("hint: the classifier needs --width and --hidden that divide by 4, for its four branches and heads; these are "
            f"{settings.width} and {settings.hidden}")

    torch.manual_seed(settings.seed)
    arguments = pretraining_arguments(settings, data)
    try:
        model = SkeletonMAE(**arguments).to(device)
    except ValueError as error:
        raise Failure(str(error)) from None
    scale, mean_pose = measure_scale(Loader(train.data, data.skeleton, data.channels, settings.batch_size, settings.frames, False))
    model.scale.copy_(scale)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}{' in bfloat16' * amp}; {train.steps} steps an epoch; "
        f"masked: {what_is_masked(settings)}")
    first_epoch, log = restore(checkpoint, path, rank, model=model, optimizer=optimizer)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    step_model = torch.compile(parallel, dynamic=True) if settings.compile else parallel

    def step(packing: Packing, x: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp, cache_enabled=False):  # a CUDA graph holds its own casts
            loss = step_model(x, packing, mask)[0]
        loss.backward(weight)
        return loss.detach() * weight

    step = replayed(step, settings, device, world, at_once)
    progress = Progress(settings.epochs, train.steps, first_epoch, data.train.names, path, rank, world)
    for epoch in range(first_epoch, settings.epochs):
        seed_epoch(settings, epoch, rank)
        model.train()
        progress.start_epoch(epoch, settings.lr)
        for batch in train.epoch(epoch):
            loss = 0
            edges = [*range(0, max(1, len(batch.x) - 1), settings.micro_batch), len(batch.x)]  # batch norm never sees a sequence left alone
            for first, end in itertools.pairwise(edges):  # a part weighs as its share of the sequences
                part, last = slice(first, end), end == len(batch.x)
                x = batch.x[part].to(device)
                mask, weight = model.draw(len(x), settings.frames), torch.tensor(len(x) / len(batch.x))
                inputs = x, mask.to(device, non_blocking=True), weight.to(device, non_blocking=True)
                with contextlib.nullcontext() if last or world == 1 else parallel.no_sync():  # processes meet once a batch
                    loss = loss + step(Packing(batch.present[part], device), *inputs)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # a CUDA graph adds to the gradients in place
            progress.step(loss, batch.index)
        row, note = progress.row(model), ""
        if rank == 0 and ((epoch + 1) % settings.eval_every == 0 or epoch + 1 == settings.epochs):
            row |= reconstruction_error(model, held_out, mean_pose)
            note = (f"  held-out joint error {row['joint_error']:.4g} (mean pose {row['mean_pose_error']:.4g}, "
                    f"neighbours {row['neighbour_error']:.4g})")
        log.append(row)
        if rank == 0:
            save({"kind": "pretrain", "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "log": log,
                  "settings": asdict(settings), "model_settings": arguments, "skeleton": data.skeleton, "layout": data.layout,
                  "channels": data.channels}, path)
        progress.end_epoch(row["loss"], note)
    say(f"saved {path}; fine-tune with: python train_finetune.py --ckpt {path}")


if __name__ == "__main__":
    run(main)
