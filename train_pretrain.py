"""Pre-trains SkeletonMAE: masked body parts are reconstructed from the visible ones, without labels.

    python train_pretrain.py                                  # built-in stick figures
    python train_pretrain.py --data ntu60.npz                 # supplement A: Adam 1.5e-4, batch 1024
    python train_pretrain.py --data mine.pkl --recipe small   # a small set: about 4,000 steps
    python train_pretrain.py --data ntu60.npz --mask-ratio 0.3    # random joints, not body parts
    python train_pretrain.py --pretrain stack                 # more than the paper: whole STRL layers
    python train_pretrain.py --resume                         # goes on where runs/pretrain stopped

Leaves in --out (runs/pretrain) pretrain.pt, which train_finetune.py --ckpt reads, and log.csv.
The file in order: the settings, `main`, what it measures, and what both scripts share.
"""
import argparse
import contextlib
import csv
import ctypes
import difflib
import io
import itertools
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace

# before torch: skeletonmae silences torch's warning that numpy is missing
from data import Augmentation, DataError, Dataset, Loader, load, read_torch, usual_channels
from skeletonmae import Packing, SkeletonMAE, make_skeleton
import torch
from torch import Tensor


def option(default, help: str, **extra):
    """A setting that is also a flag. extra: its value in a recipe (small=..., stack=...), its bounds
    (low, high), or keywords of argparse. A default of None is filled in by `suit`."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass
class CommonSettings:
    """What both scripts take. The defaults are supplement A, whatever the data."""
    recipe: str = option("paper", "paper (supplement A) or small (for a few thousand sequences)",
                         choices=("paper", "small"))
    data: str = option("", "CTR-GCN's .npz, PYSKL's .pkl or a .pt dict; without it stick figures")
    split: str = option("", "of a pickle: xsub for xsub_train and xsub_val, or train_name,test_name")
    layout: str = option("", "skeleton layout where two fit, or a JSON file with your own")
    test_fraction: float = option(0.2, "test share where a pickle has no split", low=0, high=1)
    synthetic_size: int = option(1600, "number of built-in stick figures", low=32, high=20_000)
    frames: int = option(64, "T, frames sampled from each sequence", small=16, low=2, high=10_000)
    box: bool = option(None, "stretch each axis to -1 to 1, do not turn to the viewer (3D, small: on)")
    rotation: float = option(None, "random rotation, degrees (3D: 30, small 60)", low=0, high=180)
    scaling: float = option(None, "random scaling of each axis, undone by --box (0.1)", low=0, high=0.9)
    shift: float = option(None, "random shift in body units, undone by --box (0.1)", low=0)
    flip: float = option(None, "probability of a mirror image (2D: 0.5, 3D: 0)", low=0, high=1)
    noise: float = option(None, "coordinate noise in body units (2D: 0.01, 3D: 0)", low=0)
    crop: float = option(1.0, "shortest random window to sample from, as a share of the sequence",
                         small=0.3, low=0, high=1)
    repeat: int = option(None, "passes over the data an epoch (1; small: for about 4,000 steps)",
                         low=1, high=10_000)
    workers: int = option(0, "loader processes (supplement A: 4; measured slower)", low=0, high=256)
    width: int = option(64, "D, joint embedding", low=4, high=4096)
    hidden: int = option(128, "H, encoder width", small=64, low=4, high=4096)
    layers: int = option(3, "L_D, encoder layers", low=1, high=100)
    dropout: float = option(0.2, "input feature dropout, supplement A: 0.2", low=0, high=0.99)
    blocks: int = option(2, "attention blocks in each STRL layer", small=1, low=0, high=100)
    stride: int = option(2, "temporal stride between STRL layers", low=1, high=100)
    motion: bool = option(False, "motion as further input channels", small=True)
    bone: bool = option(False, "bones as further input channels", small=True)
    score: bool = option(False, "joint score as a further input channel")
    eval_every: int = option(10, "epochs between measurements on the test split", low=1)
    seed: int = option(0, "of weights, order, masks and augmentation", low=0, high=2**31)
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    amp: bool = option(None, "bfloat16 (on where the GPU or CPU has instructions for it)")
    graphs: bool = option(None, "CUDA graphs (on one GPU, for passes of at most 128 sequences)")
    resume: bool = option(False, "go on from the checkpoint in --out, with its settings")


@dataclass
class Settings(CommonSettings):
    """Pre-training."""
    out: str = option("runs/pretrain", "folder for checkpoint and log")
    pretrain: str = option("encoder", "encoder (the paper's) or stack (ours): three STRL layers, "
                           "squared error, masks drawn anew in each of four segments of the frames",
                           choices=("encoder", "stack"))
    epochs: int = option(50, "supplement A: 50", low=1)
    batch_size: int = option(1024, "sequences a step, supplement A: 1024", small=32, low=2)
    micro_batch: int = option(256, "sequences a forward pass: bounds memory; batch norm sees these",
                              low=1)
    lr: float = option(1.5e-4, "Adam's learning rate, supplement A: 1.5e-4", small=1e-3, low=0)
    beta: float = option(2.0, "power of the re-weighted cosine error (paper Eq. 2)", low=1)
    mask_parts: tuple = option(("right_arm", "right_leg"), "body parts to mask, with commas")
    mask_num_parts: int = option(0, "or: mask this many parts, drawn per sequence", low=0)
    mask_ratio: float = option(0.0, "or: mask this share of the joints, drawn per sequence",
                               stack=0.5, low=0, high=1)


def main(argv=None):
    settings, checkpoint, path = begin(Settings, parse(Settings, __doc__, argv), "pretrain")
    device, amp, rank, world = set_up(settings)
    say = print if rank == 0 else lambda *_: None

    data = read_data(settings, say)
    if checkpoint:
        check_fit(checkpoint, path, data)
    settings = suit(settings, data)
    forward_size = min(settings.batch_size, settings.micro_batch)
    train, held_out = loaders(settings, data, device, rank, world, forward_size)
    note_oddities(settings, data, train, say)

    torch.manual_seed(settings.seed)
    arguments = pretraining_arguments(settings, data)
    with settings_errors():
        model = SkeletonMAE(**arguments).to(device)
    scale, mean_pose = measure_scale(loader(settings, train.data, data, training=False))
    model.scale.copy_(scale)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    first_epoch, log = 0, []
    if checkpoint:
        first_epoch, log = restore(checkpoint, path, model, optimizer)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}"
        f"{' in bfloat16' * amp}, {train.steps} steps an epoch, {augmentation(settings)}")

    def step(packing: Packing, x: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        with autocast(device, amp):
            loss = parallel(x, packing, mask)[0]
        loss.backward(weight)
        return loss.detach() * weight

    step = replayed(step, settings, device, world, forward_size)
    progress = Progress(settings.epochs, train.steps, first_epoch, rank)
    for epoch in range(first_epoch, settings.epochs):
        seed_epoch(settings, epoch, rank)
        model.train()
        progress.start_epoch(epoch, settings.lr)
        for batch in train.epoch(epoch):
            loss = 0
            parts = micro_batches(len(batch.x), settings.micro_batch)
            for part in parts:
                x = batch.x[part].to(device)
                mask = model.draw(len(x), settings.frames).to(device, non_blocking=True)
                weight = torch.tensor(len(x) / len(batch.x)).to(device, non_blocking=True)
                last = part is parts[-1]  # processes exchange gradients once a batch
                with contextlib.nullcontext() if last or world == 1 else parallel.no_sync():
                    loss = loss + step(Packing(batch.present[part], device), x, mask, weight)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # a CUDA graph adds to the gradients in place
            progress.step(loss, len(batch.x) * world)
        row = progress.end_epoch()
        if rank == 0:
            if (epoch + 1) % settings.eval_every == 0 or epoch + 1 == settings.epochs:
                row |= reconstruction_error(model, held_out, mean_pose)
            log.append(row)
            save({"kind": "pretrain", "model": model.state_dict(), "epoch": epoch, "log": log,
                  "optimizer": optimizer.state_dict(), "settings": asdict(settings),
                  "model_settings": arguments, "skeleton": data.skeleton, "layout": data.layout,
                  "channels": data.channels}, path)
        progress.print_epoch(row)
    say(f"saved {path}; fine-tune with: python train_finetune.py --ckpt {path}")


def pretraining_arguments(settings: Settings, data: Dataset) -> dict:
    """What SkeletonMAE takes."""
    arguments = encoder_arguments(settings, data)
    arguments |= pick(settings, "beta", "mask_parts", "mask_num_parts", "mask_ratio")
    if settings.pretrain == "stack":
        arguments |= {"loss": "squared", "mask_segments": 4, "strl": {"persons": data.persons,
                      "strl_layers": 3, **pick(settings, "frames", "blocks", "stride")}}
    return arguments


def micro_batches(size: int, most: int) -> list:
    """Slices of `most` sequences; the last takes one left over, for batch norm needs two."""
    bounds = [*range(0, max(1, size - 1), most), size]
    return [slice(first, end) for first, end in itertools.pairwise(bounds)]


# ----------------------------------------------------------------------------------- measuring

def measure_scale(batches: Loader) -> tuple:
    """s, the root mean square distance of the training joints from the origin, and the mean pose
    (M, V, C)."""
    C = batches.channels
    square = count = pose = frames = 0
    for batch in batches.epoch():
        joints, in_frame = batch.x[..., :C], batch.in_frame[..., None, None]
        square = square + joints.square().sum()
        count = count + in_frame.sum() * joints.shape[3]
        pose = pose + joints.sum((0, 2))
        frames = frames + in_frame.sum((0, 2))
    return (square / count.clamp(min=1)).sqrt(), pose / frames.clamp(min=1)


def joint_distances(skeleton: dict) -> Tensor:
    """Edges on the shortest path between every two joints, (V, V); inf where there is none."""
    V = len(skeleton["joints"])
    distance = torch.full((V, V), math.inf).fill_diagonal_(0)
    for i, j in skeleton["edges"]:
        distance[i, j] = distance[j, i] = 1
    for k in range(V):  # Floyd and Warshall: paths through the first k joints
        distance = torch.minimum(distance, distance[:, k:k + 1] + distance[k:k + 1])
    return distance


def neighbour_mean(x: Tensor, mask: Tensor, distance: Tensor) -> Tensor:
    """For every joint the mean of its nearest visible joints. x: (N, M, T, V, C), mask: (N, 1 or T,
    V), True is masked -> (N, M, T, V, C)."""
    V = len(distance)
    distance = distance.to(x.device).clamp(max=V).masked_fill(mask[:, :, None, :], math.inf)
    nearest = (distance == distance.amin(3, keepdim=True)).to(x.dtype)  # (N, 1 or T, V to, V from)
    return (nearest / nearest.sum(3, keepdim=True))[:, None] @ x


@torch.no_grad()
def reconstruction_error(model: SkeletonMAE, batches: Loader, mean_pose: Tensor) -> dict:
    """Mean distance of the masked joints from where they are, in the units of the file: of the
    reconstruction, of the training set's mean pose, and of each joint's nearest visible joints."""
    model.eval()
    C, device, distance = model.channels, model.scale.device, joint_distances(model.skeleton)
    sums = torch.zeros(4, dtype=torch.float64)
    for step, batch in enumerate(batches.epoch()):
        full = batch.x.to(device)
        unit = batch.unit.to(device).view(len(full), 1, 1, 1, -1)
        x = full[..., :C]
        mask = model.draw(len(x), x.shape[2], torch.Generator().manual_seed(step)).to(device)
        counted = batch.in_frame.to(device)[..., None] & mask[:, None]  # (N, M, T, V)
        if full.shape[-1] > C:
            counted = counted & (full[..., C] > 0)
        guesses = (model.reconstruct(full, batch.present, mask)[0],
                   mean_pose.to(device)[None, :, None].expand_as(x),
                   neighbour_mean(x, mask, distance))
        errors = [(((guess - x) * unit).norm(dim=-1) * counted).sum() for guess in guesses]
        sums += torch.stack([*errors, counted.sum()]).cpu().double()
    means = (sums[:3] / sums[3].clamp(min=1)).tolist()
    return dict(zip(("joint_error", "mean_pose_error", "neighbour_error"), means))


# ------------------------------------------------------------- shared by both scripts: settings

def pick(settings: CommonSettings, *names: str) -> dict:
    return {name: getattr(settings, name) for name in names}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise DataError(f"{message}; --help lists all flags")


def parse(settings: type, doc: str, argv=None) -> dict:
    """The flags that were typed, as setting -> value. The fields of `settings` decide what is
    allowed; `doc` heads --help."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(settings):
        extra = {key: f.metadata[key] for key in ("choices", "nargs", "const") if key in f.metadata}
        if f.type is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["type"] = converter(f)
            extra["metavar"] = "A,B" if f.type is tuple else f.type.__name__.upper()
        default = ",".join(map(str, f.default)) if f.type is tuple else f.default
        described = f"(default {default}" + "".join(
            f", {recipe} {f.metadata[recipe]}" for recipe in RECIPES if recipe in f.metadata) + ")"
        text = f.metadata["help"] + (f" {described}" if default not in ("", None) else "")
        parser.add_argument(flag(f.name), help=text.replace("%", "%%"), **extra)
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all flags"
        raise DataError(f"unknown argument {unknown[0]}; {hint}")
    return vars(typed)


RECIPES = ("small", "stack")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def converter(f):
    """The function that turns the text of a flag into its value, or into several with commas."""
    kind = type(f.default[0]) if f.type is tuple and f.default else str if f.type is tuple else f.type
    low, high = f.metadata.get("low", -math.inf), f.metadata.get("high", math.inf)

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if kind is not str and not (low <= value <= high and abs(value) < math.inf):
            expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected {expected}")
        return value

    def convert_several(text):
        return tuple(convert(part.strip()) for part in text.split(","))

    return convert_several if f.type is tuple and "nargs" not in f.metadata else convert


def settle(settings: type, typed: dict, source: dict | None = None, path: str = "", fixed=(),
           brought=()) -> CommonSettings:
    """Settings as a union: defaults, the recipe, what the checkpoint `source` at `path` brings, what
    was typed. A typed flag that contradicts a `fixed` setting of the checkpoint is refused."""
    chosen = typed.get("recipe"), typed.get("pretrain")
    recipe = {f.name: f.metadata[name] for f in fields(settings) for name in chosen
              if name in f.metadata}
    kept = {name: source["settings"][name] for name in (*fixed, *brought)} if source else {}
    for name in fixed:
        if typed.get(name, kept[name]) != kept[name]:
            raise DataError(f"{flag(name)} {typed[name]} differs from {kept[name]} of {path}; "
                            "leave it out or start anew")
    return settings(**recipe | kept | typed)


def begin(settings: type, typed: dict, kind: str) -> tuple:
    """A new run, or with --resume the one in --out, whose settings stay but for a few.
    Returns (settings, the checkpoint to resume or None, the path of the run's checkpoint)."""
    path = os.path.join(typed.get("out", settings.out), kind + ".pt")
    if not typed.get("resume"):
        return settle(settings, typed), None, path
    checkpoint = read_checkpoint(path, (kind,))
    may_change = {"epochs", "eval_every", "workers", "device"}
    fixed = {f.name for f in fields(settings)} - may_change - {"resume", "out", "graphs"}
    found = settle(settings, typed, checkpoint, path, sorted(fixed), may_change)
    if found.epochs <= checkpoint["epoch"]:
        raise DataError(f"--epochs {found.epochs}: {path} has {checkpoint['epoch'] + 1} epochs "
                        "behind it; expected at least as many")
    return found, checkpoint, path


def suit(settings: CommonSettings, data: Dataset) -> CommonSettings:
    """Fills in the settings that depend on the data."""
    small, solid = settings.recipe == "small", data.channels == 3
    steps_of_a_pass = len(data.train) * settings.epochs / settings.batch_size
    suiting = {"box": small and solid, "rotation": (60.0 if small else 30.0) if solid else 0.0,
               "scaling": 0.1, "shift": 0.1, "flip": 0.5 if data.skeleton["pairs"] and not solid else 0.0,
               "noise": 0.0 if solid else 0.01,
               "repeat": math.ceil(4000 / steps_of_a_pass) if small else 1}
    missing = {name: value for name, value in suiting.items() if getattr(settings, name) is None}
    return replace(settings, **missing)


def augmentation(settings: CommonSettings) -> Augmentation:
    return Augmentation(**pick(settings, *(f.name for f in fields(Augmentation))))


@contextlib.contextmanager
def settings_errors():
    """What a model refuses is the user's settings: one line, no traceback."""
    try:
        yield
    except ValueError as error:
        raise DataError(str(error)) from None


# -------------------------------------------------------------- shared by both scripts: machine

def run(main):
    """Calls main. Bad input is one line on stderr and exit status 2, Ctrl-C one line and 130; a bug
    keeps its traceback."""
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    except DataError as error:
        status, message = 2, f"error: {error}"
    except OSError as error:
        status, message = 2, (f"error: {error.filename or 'file'}: {error.strerror or error}; "
                              "expected a file that can be read, a folder that can be written")
    except KeyboardInterrupt:
        status, message = 130, ("\nstopped; the same command with --resume goes on after the last "
                                "epoch that ended")
    print(message, file=sys.stderr)
    sys.exit(status)


def set_up(settings: CommonSettings) -> tuple:
    """Device, whether to use bfloat16, and this process's place among those of torchrun:
    (device, amp, rank, world)."""
    os.makedirs(settings.out, exist_ok=True)
    write_atomically(os.path.join(settings.out, ".writable"), b"")  # fails now, not an epoch later
    os.remove(os.path.join(settings.out, ".writable"))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"--device {name} cannot be used here ({reason}); expected auto, cpu or a "
                        "device that torch finds") from None
    if settings.batch_size < 2 * world:
        raise DataError(f"--batch-size {settings.batch_size} for {world} processes; expected at "
                        "least two sequences each")
    if settings.graphs and (device.type != "cuda" or world > 1):
        raise DataError(f"--graphs needs one GPU, this is {world} x {device.type}; leave it out")
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    return device, has_bfloat16(device) if settings.amp is None else settings.amp, rank, world


def has_bfloat16(device) -> bool:
    """Whether the device has instructions for bfloat16; on a CPU False where torch cannot tell."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def keep_freed_memory():
    """glibc returns the memory of every large tensor to the kernel and asks for it again page by
    page. Keeping it in the process makes steps 1.3 to 1.8 times as fast. No effect elsewhere."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)           # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)   # M_TRIM_THRESHOLD
        mallopt(-2, 2**28)       # M_TOP_PAD


def autocast(device, amp: bool):
    """bfloat16 where asked for. Without the cache of weights, which a CUDA graph cannot use."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp, cache_enabled=False)


def seed_epoch(settings: CommonSettings, epoch: int, rank: int):
    """Masks and dropout depend on seed, epoch and process alone, so resuming is exact."""
    torch.manual_seed((settings.seed * 100_003 + epoch) * 1_003 + rank)


# ----------------------------------------------------------------- shared by both scripts: data

def read_data(settings: CommonSettings, say) -> Dataset:
    data = load(settings.data or None, settings.split or None, settings.layout or None,
                settings.test_fraction, settings.synthetic_size)
    say(f"{settings.data or 'stick figures'}: {data}")
    return data


def loader(settings: CommonSettings, sequences, data: Dataset, training: bool, **options) -> Loader:
    return Loader(sequences, data.skeleton, data.channels, settings.batch_size, settings.frames,
                  training, settings.seed, **{"box": settings.box, **options})


def loaders(settings: CommonSettings, data: Dataset, device, rank: int, world: int,
            test_batch: int | None = None) -> tuple:
    """The batches of both halves, the test half's of test_batch sequences if given. Frames that
    fit into half of a GPU's free memory move there, and batches are built there."""
    if len(data.train) < world:
        raise DataError(f"{len(data.train)} training sequences for {world} processes; expected at "
                        "least one each")

    def placed(half):
        on_gpu = device.type == "cuda" and not settings.workers  # workers cannot use a GPU
        fits = on_gpu and half.frames.nbytes < torch.cuda.mem_get_info(device)[0] / 2
        return half.to(device) if fits else half

    train = placed(data.train)
    if data.test.frames is data.train.frames:  # a pickle's halves share one tensor: it moves once
        test = replace(data.test, frames=train.frames, in_frame=train.in_frame).to(train.frames.device)
    else:
        test = placed(data.test)
    train = loader(settings, train, data, True, augmentation=augmentation(settings),
                   repeat=settings.repeat, workers=settings.workers, rank=rank, world=world)
    test = loader(replace(settings, batch_size=test_batch or settings.batch_size), test, data, False)
    return train, test


def encoder_arguments(settings: CommonSettings, data: Dataset) -> dict:
    """What SkeletonMAE and SkeletonClassifier both take."""
    return {"skeleton": data.skeleton, "channels": data.channels,
            "score": settings.score and data.score,
            **pick(settings, "width", "hidden", "layers", "dropout", "motion", "bone")}


def note_oddities(settings: CommonSettings, data: Dataset, train: Loader, say):
    """Says what may be a mistake in the data or in the settings for them."""
    C, joints = data.channels, data.skeleton["joints"]
    poses = data.train.frames[:10_000, ..., :C][data.train.in_frame[:10_000]].float()  # (n, V, C)
    zero = (poses == 0).all(-1)
    missing = 100 * (zero & ~zero.all(0)).float().mean()  # a centred origin is 0 in every frame
    if settings.data and not settings.layout:
        unusual = f" (which usually comes in {usual_channels(data.layout)}D)"
        say(f"note: {data.layout} is a guess from {len(joints)} joints in {C}D"
            f"{unusual * (C != usual_channels(data.layout))}; if yours are not {', '.join(joints)}, "
            "in this order, give their --layout")
    if missing > 1 and not data.score:
        say(f"note: {missing:.0f} % of the joints are exactly 0 and taken for positions; where they "
            "are missing, give a pickle a keypoint_score of 0")
    if C == 3 and (0 <= poses[..., 2]).all() and (poses[..., 2] <= 1).all() and (poses > 10).any():
        say("note: the third coordinate lies between 0 and 1 and the others do not: a score is no "
            "coordinate; in a pickle it is the keypoint_score")
    steps = train.steps * settings.epochs
    if steps < 2000 and settings.recipe != "small" and not settings.resume:
        say(f"note: {steps} steps in all is little training; for a small set try --recipe small")


# ---------------------------------------------------------- shared by both scripts: checkpoints

def write_atomically(path: str, content: bytes):
    """Into a new file beside path, synced, then renamed: path is whole at every moment."""
    beside = f"{path}.{os.getpid()}.tmp"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)


def save_torch(value, path: str):
    content = io.BytesIO()
    torch.save(value, content)  # in memory first: on a full disk torch.save raises a RuntimeError
    write_atomically(path, content.getbuffer())


def save(checkpoint: dict, path: str):
    """A plain dict of tensors and settings, and its log as log.csv beside it."""
    if not all(value.isfinite().all() for value in checkpoint["model"].values()):
        raise DataError(f"weights are not finite after epoch {checkpoint['epoch'] + 1}, the "
                        "checkpoint before is kept; try a lower --lr")
    save_torch(checkpoint, path)
    write_log(checkpoint["log"], path)


def write_log(rows: list, path: str):
    """log.csv beside the checkpoint at path."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(os.path.join(os.path.dirname(path), "log.csv"), text.getvalue().encode())


def read_checkpoint(path: str, kinds: tuple) -> dict:
    """A checkpoint of one of these kinds ("pretrain", "finetune"), on the CPU."""
    expected = f"expected a {' or '.join(kinds)}.pt that these scripts wrote"
    checkpoint = read_torch(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") not in kinds:
        raise DataError(f"{path} is no checkpoint; {expected}")
    try:
        checkpoint["skeleton"] = make_skeleton(**checkpoint["skeleton"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path} holds no skeleton; {expected}") from None
    return checkpoint


def restore(checkpoint: dict, path: str, model, optimizer) -> tuple:
    """Takes an interrupted run up again. Returns (the epoch to go on with, the log so far)."""
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    write_log(checkpoint["log"], path)  # the run may have died between its checkpoint and its log
    return checkpoint["epoch"] + 1, checkpoint["log"]


def check_fit(checkpoint: dict, path: str, data: Dataset):
    """The data must have the skeleton, coordinates, scores and persons of the checkpoint."""
    shape = checkpoint["model_settings"]
    persons = (shape.get("strl") or shape).get("persons", data.persons)
    pairs = (("skeleton", checkpoint["skeleton"] == data.skeleton, checkpoint["layout"], data.layout),
             ("coordinates", checkpoint["channels"] == data.channels, checkpoint["channels"],
              data.channels),
             ("joint scores", data.score or not shape["score"], "scores", "none"),
             ("persons a sequence", persons == data.persons, persons, data.persons))
    for what, fits, theirs, ours in pairs:
        if not fits:
            raise DataError(f"{path} was trained on other {what} ({theirs}) than the data have "
                            f"({ours}); expected the same")


# ------------------------------------------------------------- shared by both scripts: progress

class Progress:
    """A live line on a terminal, one line an epoch elsewhere; only rank 0 prints. A loss that is
    not finite stops the run."""

    def __init__(self, epochs: int, steps: int, first_epoch: int, rank: int):
        self.epochs, self.steps, self.first_epoch = epochs, steps, first_epoch
        self.prints = rank == 0
        self.live = self.prints and sys.stdout.isatty()
        self.begin = self.drawn = time.monotonic()

    def start_epoch(self, epoch: int, lr: float):
        self.epoch, self.lr, self.losses, self.sequences = epoch, lr, [], 0
        self.epoch_begin = time.monotonic()

    def step(self, loss: Tensor, sequences: int):
        self.losses.append(loss)
        self.sequences += sequences
        if self.live and time.monotonic() - self.drawn > 0.5:  # a GPU waits where a loss is read
            self.drawn = time.monotonic()
            print("\r" + self.line(float(loss)), end="", flush=True)

    def end_epoch(self) -> dict:
        """The epoch's row of the log."""
        losses = torch.stack(self.losses)
        if not losses.isfinite().all():
            step = int((~losses.isfinite()).int().argmax())
            raise DataError(f"loss is {losses[step]} in epoch {self.epoch + 1}, step {step + 1}, the "
                            "checkpoint of the epoch before is kept; try a lower --lr")
        self.text = self.line(float(losses.mean()))
        return {"epoch": self.epoch + 1, "loss": float(losses.mean()), "lr": self.lr}

    def print_epoch(self, row: dict):
        measured = "".join(f"  {name} {value:.4g}" for name, value in row.items()
                           if name not in ("epoch", "loss", "lr"))
        if self.prints:
            print("\r" * self.live + self.text + measured, flush=True)

    def line(self, loss: float) -> str:
        now = time.monotonic()
        done = (self.epoch - self.first_epoch) * self.steps + len(self.losses)
        left = (now - self.begin) / done * ((self.epochs - self.first_epoch) * self.steps - done)
        rate = self.sequences / (now - self.epoch_begin)
        return (f"epoch {self.epoch + 1}/{self.epochs}  loss {loss:.4g}  lr {self.lr:.3g}  "
                f"{rate:.0f} seq/s  {left // 60:.0f}m{left % 60:02.0f}s left")


# ----------------------------------------------------------- shared by both scripts: CUDA graphs

class Replay:
    """A step as a CUDA graph: its hundreds of small kernels start as one. The step runs forward
    and backward on (packing, *tensors) and returns the loss.

    A graph has fixed shapes: each number of sequences and persons is recorded when it comes for
    the second time; the first time warms up. It writes where it was recorded: parameters, buffers
    and gradients must stay the same tensors, as must all else that the step reads."""

    def __init__(self, step):
        self.step, self.recorded = step, {}
        self.pool = torch.cuda.graph_pool_handle()  # graphs run in turn and share their memory

    def __call__(self, packing: Packing, *tensors: Tensor) -> Tensor:
        inputs = *packing.tensors(), *tensors
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.recorded:
            self.recorded[shapes] = None
            return self.step(packing, *tensors)
        if self.recorded[shapes] is None:
            own = *packing.tensors(), *(x.clone() for x in tensors)  # a slice keeps its whole batch
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                loss = self.step(packing, *own[-len(tensors):])
            self.recorded[shapes] = graph, own, loss
        graph, own, loss = self.recorded[shapes]
        for mine, x in zip(own, inputs):
            mine.copy_(x)
        graph.replay()
        return loss.clone()


def replayed(step, settings: CommonSettings, device, world: int, sequences: int):
    """The step as a CUDA graph where asked for, or where passes are so small that it pays."""
    pays = device.type == "cuda" and world == 1 and sequences <= 128
    return Replay(step) if (pays if settings.graphs is None else settings.graphs) else step


if __name__ == "__main__":
    run(main)
