"""Pre-trains SkeletonMAE: masked body parts are reconstructed from the visible ones.

    python train_pretrain.py                                     # built-in stick figures
    python train_pretrain.py --data ntu60.npz                    # supplement A
    python train_pretrain.py --data mine.pkl --recipe small      # a small set: 4,000 steps or more
    python train_pretrain.py --data ntu60.npz --mask-ratio 0.3   # random joints, not body parts
    python train_pretrain.py --pretrain stack                    # ours: the whole STRL layers
    python train_pretrain.py --resume                            # goes on where it stopped

Leaves in --out (runs/pretrain) pretrain.pt, which train_finetune.py --ckpt reads, and log.csv.
"""
import argparse
import contextlib
import csv
import ctypes
import io
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial
from typing import get_args

from data import Augmentation, DataError, Dataset, Loader, load, reading
from skeletonmae import Packing, SkeletonMAE
import torch

def option(default, help, **extra):
    """A setting and its flag. extra: its value for small or stack, its bounds (low, else 0; high),
    keywords of argparse. A default of None depends on the data (`suit`) or the device."""
    return field(default=default, metadata={"help": help, **extra})

@dataclass
class CommonSettings:
    """What both scripts take. The defaults are supplement A where it says."""
    recipe: str = option("paper", "small: for little data", choices=("paper", "small"))
    data: str = option("", "CTR-GCN's .npz, PYSKL's .pkl or .pt; without it stick figures")
    split: str = option("", "xsub for a pickle's xsub_train and xsub_val, or train_name,test_name")
    layout: str = option("", "skeleton layout, if the guess is wrong, or a JSON file with your own")
    test_fraction: float = option(0.2, "test share where a file has no split", low=0.01, high=0.99)
    synthetic_size: int = option(1600, "number of stick figures", low=20, high=20_000)
    frames: int = option(64, "T, frames sampled from each sequence", small=16, low=2)
    box: bool = option(None, "stretch each axis to -1 to 1, without turning (small 3D: on)")
    center: str = option("sequence", "origin; frame drops the path", choices=("sequence", "frame"))
    up: str = option("y", "vertical axis of 3D data", choices=("y", "z"))
    motion: bool = option(False, "motion as further input channels", small=True)
    bone: bool = option(False, "bones as further input channels", small=True)
    rotation: float = option(None, "random rotation, degrees (2D: 0; 3D: 30, small 60)", high=180)
    scaling: float = option(None, "random scaling of each axis (0.1; box: 0)", high=0.9)
    shift: float = option(None, "random shift in body units (0.1; box: 0)")
    flip: float = option(None, "probability of a mirror image (2D: 0.5; 3D: 0)", high=1)
    noise: float = option(None, "coordinate noise in body units (2D: 0.01; 3D: 0)")
    crop: float = option(1.0, "shortest random window of a sequence", small=0.3, high=1)
    width: int = option(64, "D, joint embedding", low=4)
    hidden: int = option(128, "H, encoder width", small=64, low=4)
    layers: int = option(3, "L_D, encoder layers", low=1)
    dropout: float = option(0.2, "input feature dropout, supplement A: 0.2", high=0.99)
    blocks: int = option(2, "attention blocks in each STRL layer", small=1)
    stride: int = option(2, "temporal stride between STRL layers", low=1)
    repeat: int = option(None, "passes an epoch (1; small: 4,000 steps; stack: max. 100)", low=1)
    eval_every: int = option(10, "epochs between measurements on the test split", low=1)
    seed: int = option(0, "of weights, order, masks and augmentation", high=2**31)
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    amp: bool = option(None, "bfloat16 (on where the device has instructions for it)")
    graphs: bool = option(None, "CUDA graphs (on one GPU, for passes of at most 128 sequences)")
    resume: bool = option(False, "go on from the checkpoint in --out, with its settings")
    overwrite: bool = option(False, "replace an unfinished run in --out")

@dataclass
class Settings(CommonSettings):
    """Pre-training."""
    out: str = option("runs/pretrain", "folder for checkpoint and log")
    pretrain: str = option("encoder", "stack: ours, STRL layers", choices=("encoder", "stack"))
    epochs: int = option(50, "supplement A: 50", low=1)
    batch_size: int = option(1024, "sequences a step, supplement A: 1024", small=32, low=2)
    micro_batch: int = option(256, "sequences a forward pass, which batch norm sees", low=2)
    lr: float = option(1.5e-4, "Adam's learning rate, supplement A: 1.5e-4", small=1e-3)
    beta: float = option(2.0, "power of the encoder's cosine error (paper Eq. 2)", low=1)
    mask_parts: tuple[str, ...] = option(("right_arm", "right_leg"), "parts, as head,torso")
    mask_num_parts: int = option(0, "or: mask this many parts, drawn per sequence")
    mask_ratio: float = option(0.0, "or: mask this share of the joints", stack=0.2, high=1)

def main(argv=None):
    settings, checkpoint, path = begin(Settings, parse(Settings, __doc__, argv), "pretrain")
    device, rank, world = set_up(settings)
    data = read_data(settings, checkpoint)
    keep_unfinished(settings, path)
    settings = suit(settings, data)
    data = to_device(data, device)
    train = loader(settings, data, data.train, settings.batch_size, True, rank, world)
    forward_size = min(settings.batch_size, settings.micro_batch)
    held_out = loader(settings, data, data.test, forward_size)

    torch.manual_seed(settings.seed)
    arguments = pretraining_arguments(settings, data)
    model = build(SkeletonMAE, **arguments).to(device)
    model.mean[:], model.spread[:], mean_pose = measure_target(
        loader(settings, data, data.train, forward_size))
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, fused=True)
    first_epoch, log = restore(checkpoint, model, optimizer)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    introduce(settings, data, model, train, device)

    inputs = ("x", "seen", "target") if train.pose else ("x", "seen")  # fields of a Batch

    def step(packing: Packing, mask, weight, x, seen, target=None):
        with autocast(device, settings.amp):
            loss = parallel(x, packing, mask, seen, target)[0]
        loss.backward(weight)
        return loss.detach() * weight

    step = replayed(step, settings, device, world, forward_size)
    for epoch in range(first_epoch, settings.epochs):
        seed_epoch(settings, epoch, rank)
        model.train()
        progress = Progress(epoch, settings.epochs, train.steps, settings.lr)
        for batch in train.epoch(epoch):
            loss = 0
            pieces = math.ceil(len(batch.x) / settings.micro_batch)
            split = (getattr(batch, name).tensor_split(pieces) for name in ("present", *inputs))
            for piece, (present, *values) in enumerate(zip(*split), 1):
                mask = model.draw(len(present)).to(device, non_blocking=True)
                weight = torch.tensor(len(present) / len(batch.x)).to(device, non_blocking=True)
                syncs = world == 1 or piece == pieces  # processes exchange gradients once a batch
                with contextlib.nullcontext() if syncs else parallel.no_sync():
                    loss += step(Packing(present, device), mask, weight,
                                 *(value.to(device) for value in values))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # a CUDA graph adds to the gradients in place
            progress.step(loss, len(batch.x) * world)
        row = progress.end()
        if rank == 0:
            last = epoch + 1 == settings.epochs
            if len(data.test) and (last or (epoch + 1) % settings.eval_every == 0):
                row |= reconstruction_error(model, held_out, mean_pose)
            log.append(row)
            save(path, "pretrain", model, optimizer, epoch, log, settings, arguments, data)
        progress.show()
    flags = f" --recipe {settings.recipe}"
    if settings.recipe == "small" and settings.pretrain == "stack":
        flags += " --lr 1e-3 --encoder-lr-scale 0.3"
    print(f"saved {path}; fine-tune with: python train_finetune.py --ckpt {path}{flags}")

def pretraining_arguments(settings, data: Dataset):
    """What SkeletonMAE takes."""
    arguments = encoder_arguments(settings, data)
    arguments |= pick(settings, "beta", "mask_parts", "mask_num_parts", "mask_ratio")
    if settings.pretrain == "stack":
        arguments["strl"] = {"persons": data.persons, "strl_layers": 3,
                             **pick(settings, "frames", "blocks", "stride")}
    return arguments

# --------------------------------------------------------------------------------------- measuring
def measure_target(batches: Loader):
    """What whitens the target, over the seen joints: each joint's mean (V, C) and spread (V,), the
    root mean square distance from it, 0.01 at least; and each person's mean pose (M, V, C)."""
    square = pose = count = 0
    for batch in batches.epoch():
        seen = batch.seen[..., None]
        joints = batch.target.double() * seen
        square += joints.square().sum((0, 1, 2, 4))
        pose += joints.sum((0, 2))
        count += seen.sum((0, 2))  # (M, V, 1)
    total = count.sum(0).clamp(min=1)
    mean = pose.sum(0) / total
    spread = (square / total[:, 0] - mean.square().sum(-1)).clamp(min=1e-4).sqrt()
    return mean.float(), spread.float(), (pose / count.clamp(min=1)).float()

@torch.no_grad()
def reconstruction_error(model: SkeletonMAE, batches: Loader, mean_pose):
    """Mean distance of the masked joints from the target, in the units of the file: of the
    reconstruction, and of the training set's mean pose."""
    model.eval()
    device, sums = model.mean.device, 0
    pose = mean_pose.to(device)[:, None]
    for step, batch in enumerate(batches.epoch()):
        x, target = batch.x.to(device), batch.target.to(device)
        unit = batch.unit.to(device).view(len(x), 1, 1, 1, -1)
        mask = model.draw(len(x), torch.Generator().manual_seed(step)).to(device)
        counted = batch.seen.to(device) & mask[:, None, None]  # (N, M, T, V)
        guesses = model.reconstruct(x, batch.present, mask, target)[0], pose
        errors = [(((guess - target) * unit).norm(dim=-1) * counted).sum() for guess in guesses]
        sums += torch.stack([*errors, counted.sum()]).cpu().double()
    means = (sums[:2] / sums[2].clamp(min=1)).tolist()
    return dict(zip(("joint_error", "mean_pose_error"), means))

# -------------------------------------------------------------------------------- shared: settings
VIEW = "box", "center", "up"  # of normalise_frames

def pick(settings, *names: str):
    return {name: getattr(settings, name) for name in names}

def parse(settings_type, doc, argv):
    """The flags that were typed, as setting -> value; `doc` heads --help."""
    def refuse(message):
        raise DataError(f"{message}; --help lists all flags")
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, usage="%(prog)s [flags]")
    parser.error = refuse
    for f in fields(settings_type):
        extra = {key: f.metadata[key] for key in ("choices", "nargs", "const") if key in f.metadata}
        if f.type is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["type"] = partial(convert, f)
        values = {"default": f.default, **f.metadata}
        told = [f"{name} {values[name]}" for name in ("default", "small", "stack")
                if values.get(name) not in (None, "")]
        text = f.metadata["help"] + f" ({', '.join(told)})" * bool(told)
        parser.add_argument(flag(f.name), help=text, **extra)
    return vars(parser.parse_args(argv))

def flag(name):
    return f"--{name.replace('_', '-')}"

def convert(f, text):
    """The text of a flag as its value; a setting of several values takes them with commas."""
    kind, *several = get_args(f.type) or [f.type]
    low, high = f.metadata.get("low", 0), f.metadata.get("high", math.inf)
    parts = text.split(",") if several else [text]
    try:
        values = tuple(kind(part.strip()) for part in parts)
        if kind is not str and not all(low <= value <= high and value < math.inf
                                       for value in values):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text}, expected {kind.__name__} from {low} to "
                                         f"{high}") from None
    return values if several else values[0]

def settle(settings_type, typed, kept={}, free=()):
    """Settings as a union: defaults, the recipe, `kept` ones of a checkpoint, what was typed. A
    typed flag that contradicts one that is kept and not `free` is refused."""
    chosen = typed.get("recipe"), typed.get("pretrain")
    recipe = {f.name: f.metadata[name] for f in fields(settings_type) for name in chosen
              if name in f.metadata}
    if typed.keys() & {"mask_parts", "mask_num_parts"}:
        recipe.pop("mask_ratio", None)
    for name in sorted(typed.keys() & kept.keys() - set(free)):
        if typed[name] != kept[name]:
            raise DataError(f"{flag(name)} {typed[name]} differs from {kept[name]} of the "
                            "checkpoint; leave it out or start anew")
    return settings_type(**recipe | kept | typed)

def begin(settings_type, typed, kind):
    """A new run, or with --resume the one in --out: (settings, checkpoint or None, its path)."""
    path = f"{typed.setdefault('out', settings_type.out)}/{kind}.pt"
    if not typed.get("resume"):
        return settle(settings_type, typed), None, path
    checkpoint = read_checkpoint(path, (kind,))
    free = ("epochs", "milestones", "eval_every", "device", "amp", "graphs", "resume", "out",
            "overwrite", "data")  # data may have moved: check_fit compares the sequences' names
    return settle(settings_type, typed, checkpoint["settings"], free), checkpoint, path

def keep_unfinished(settings, path):
    """A new run does not replace an unfinished one unasked."""
    if settings.resume or settings.overwrite or not os.path.exists(path):
        return
    before = read_checkpoint(path, ("pretrain", "finetune"))
    done, epochs = before["epoch"] + 1, before["settings"]["epochs"]
    if done < epochs:
        raise DataError(f"{path} is an unfinished run ({done} of {epochs} epochs); go on with "
                        "--resume, keep it with another --out, or replace it with --overwrite")
    print(f"note: the finished run in {path} will be replaced")

def suit(settings, data: Dataset):
    """Fills in the settings that depend on the data."""
    small, is_3d = settings.recipe == "small", data.channels == 3
    steps = len(data.train) * settings.epochs / settings.batch_size
    repeat = math.ceil(4000 / steps) if small else 1
    if getattr(settings, "pretrain", "") == "stack":
        repeat = min(repeat, max(1, 100 // settings.epochs))
    box = small and is_3d if settings.box is None else settings.box
    reach = 0.1 * (not box)  # a box undoes scaling and shift
    suiting = {"rotation": (60.0 if small else 30.0) if is_3d else 0.0, "box": box,
               "scaling": reach, "shift": reach, "noise": 0.0 if is_3d else 0.01,
               "flip": 0.5 if data.skeleton["pairs"] and not is_3d else 0.0,
               "repeat": repeat,
               "milestones": tuple(round(settings.epochs * epoch / 110) for epoch in (90, 100))}
    return replace(settings, **{name: value for name, value in suiting.items()
                                if getattr(settings, name, "") is None})

def build(make, *arguments, **keywords):
    """Calls make. What it refuses is the user's settings: one line, no traceback."""
    try:
        return make(*arguments, **keywords)
    except (ValueError, RuntimeError) as error:
        raise DataError(str(error)) from None

# --------------------------------------------------------------------------- shared: machine, data
def run(main):
    """Calls main. Bad input is one line and exit status 2, Ctrl-C 130; a bug has its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may lack a path's characters
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on after the last whole epoch", file=sys.stderr)
        sys.exit(130)

def set_up(settings):
    """(device, rank, number of processes), and fills in settings.amp. Process 0 alone prints."""
    os.makedirs(settings.out, exist_ok=True)
    tempfile.TemporaryFile(dir=settings.out).close()  # a folder that cannot be written fails now
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    device = find_device(settings.device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        build(torch.distributed.init_process_group, backend)  # in torchrun's environment
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    if settings.amp is None:
        settings.amp = has_bfloat16(device)
    return device, rank, world

def find_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name} cannot be used here ({str(error):.100}); "
                        "expected auto, cpu or a device that torch finds") from None

def has_bfloat16(device):
    """Whether the device has instructions for bfloat16; on a CPU False where torch cannot tell."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))

def keep_freed_memory():
    """glibc returns the memory of every large tensor to the kernel and asks for it again page by
    page. Keeping it in the process makes steps 1.3 to 1.8 times as fast. No effect elsewhere."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            ctypes.CDLL(None).mallopt(parameter, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD

def autocast(device, amp):
    """bfloat16 where asked for. Without the cache of weights, which a CUDA graph cannot use."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp, cache_enabled=False)

def seed_epoch(settings, epoch, rank):
    """Masks and dropout depend on seed, epoch and process alone, so resuming is exact."""
    torch.manual_seed((settings.seed * 100_003 + epoch) * 1_003 + rank)

def read_data(settings, source, tests=False):
    """source: a checkpoint, whose skeleton and splits hold where no other layout or split is typed,
    or None. Its placeholders hold for these data too, and where they test it, its origin."""
    layout, skeleton, pair, marks = settings.layout, None, (), None
    if source:
        pair = source["pair"]
        marks = source["normalisation"]["marks"]
        marks = marks if tests else {"places": marks["places"]}
        if settings.layout == source["settings"]["layout"]:
            layout, skeleton = source["layout"], source["skeleton"]
    data = load(settings.data, settings.split, layout, settings.test_fraction,
                settings.synthetic_size, skeleton, pair, marks)
    print(f"{settings.data or 'stick figures'}: {data}")
    if source:
        check_fit(source, data, settings)
    return data

def to_device(data: Dataset, device):
    """Frames that fit into half of a GPU's free memory move there, and batches are built there."""
    size = sum(frames.nbytes for frames in {data.train.frames, data.test.frames})
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] / 2:
        return data
    move = cache(torch.Tensor.to)  # both halves of a pickle hold the same tensors
    return replace(data, train=data.train.to(device, move), test=data.test.to(device, move))

def loader(settings, data: Dataset, half, batch_size, training=False, rank=0, world=1):
    augmentation = Augmentation(**pick(settings, *(f.name for f in fields(Augmentation))))
    return Loader(half, data.skeleton, batch_size, settings.frames, training, settings.seed,
                  augmentation, pick(settings, *VIEW), settings.repeat, rank, world,
                  pose=getattr(settings, "pretrain", "") == "stack")

def encoder_arguments(settings, data: Dataset):
    """What SkeletonMAE and SkeletonClassifier both take."""
    return pick(data, "skeleton", "channels") | pick(settings, "width", "hidden", "layers",
                                                     "dropout", "motion", "bone")

def introduce(settings, data: Dataset, model, train: Loader, device):
    """Says what is trained how, and what may be a mistake in the data or the settings for them."""
    steps = train.steps * settings.epochs
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}"
          f"{' in bfloat16' * settings.amp}, {steps} steps in all, {train.augmentation}")
    if settings.data and not settings.layout:
        joints = data.skeleton["joints"]
        print(f"note: {data.layout} is a guess from {len(joints)} joints in {data.channels}D; if "
              f"yours are not {', '.join(joints)}, in this order, give their --layout")
    for doubt in doubts(data, pick(settings, "center", "up")):
        print(f"note: {doubt}")
    if steps < 2000 and settings.recipe != "small":
        print(f"note: {steps} steps are little training; for a small set try --recipe small")

def doubts(data: Dataset, shown):
    """What may be a mistake in the data, by 300 training sequences."""
    hips = data.skeleton["centre"]
    batch = next(Loader(data.train, data.skeleton, 300, 32, view=shown).epoch())
    place = batch.x.mean(3)  # (N, M, T, C)
    path = place.amax(2) - place.amin(2)
    if path[:, 0].norm(dim=-1).median() > 2.6:  # in units of body and path
        yield "people travel far; where the path is not the action, try --center frame"
    if data.channels == 3:
        raw = data.train.frames[:10_000]
        pose = batch.x[:, 0].mean((0, 1))  # of the first person, (V, 3)
        head = data.skeleton["parts"].get("head", hips)
        height = (pose[head].mean(0) - pose[hips[0]]).abs()
        if 0 <= raw[..., 2].min() and raw[..., 2].max() <= 1 and raw.max() > 10:
            yield "the third coordinate lies between 0 and 1: is it a score, the keypoint_score?"
        elif height[2] > 2 * height[1]:
            yield "head and hips differ along z; where z is vertical, give --up z"
    if data.persons == 2:
        both = place[batch.present.all(1)]
        stay = both.diff(dim=2).norm(dim=3).sum(1)
        swap = (both.flip(1)[:, :, 1:] - both[:, :, :-1]).norm(dim=3).sum(1)
        share = (swap < stay / 2).double().mean()
        if share > 0.02:
            yield f"persons change places in {100 * share:.0f} % of the frames; each needs one"

# ----------------------------------------------------------- shared: checkpoints, progress, graphs
def write_atomically(path, content: bytes):
    """Into a new file beside path, synced, then renamed: path is whole at every moment."""
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)

def save_torch(value, path):
    content = io.BytesIO()
    torch.save(value, content)  # in memory first: on a full disk torch.save raises a RuntimeError
    write_atomically(path, content.getbuffer())

FORMAT = 3  # of a checkpoint; rises when those before no longer fit the model

def save(path, kind, model, optimizer, epoch, log, settings, arguments, data: Dataset, **more):
    """A plain dict of tensors and settings, and its log as log.csv beside it."""
    form = {"frames": settings.frames, "marks": data.marks, "view": pick(settings, *VIEW)}
    known = pick(data, "skeleton", "layout", "channels", "persons", "classes", "pair", "digest")
    save_torch({"kind": kind, "format": FORMAT, "epoch": epoch, "log": log, **known, **more,
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "settings": asdict(settings), "model_settings": arguments,
                "normalisation": form}, path)
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for row in log for name in row))
    writer.writeheader()
    writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in log)
    write_atomically(f"{settings.out}/log.csv", text.getvalue().encode())

def read_checkpoint(path, kinds):
    """A checkpoint of one of these kinds ("pretrain", "finetune"), on the CPU."""
    expected = f"a {' or '.join(kinds)} checkpoint of format {FORMAT}"
    with reading(path, expected):
        checkpoint = torch.load(path, "cpu", weights_only=True)
        if checkpoint["kind"] not in kinds or checkpoint["format"] != FORMAT:
            raise DataError(f"it holds a {checkpoint['kind']} run, format "
                            f"{checkpoint['format']}; expected {expected}")
    return checkpoint

def restore(checkpoint, model, optimizer):
    """Takes an interrupted run up again. Returns (the epoch to go on with, the log so far)."""
    if not checkpoint:
        return 0, []
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["epoch"] + 1, checkpoint["log"]

def check_fit(checkpoint, data: Dataset, settings):
    """The data must have the skeleton and persons of the checkpoint, and to resume the same
    sequences; others are noted."""
    shape = checkpoint["model_settings"]
    persons = (shape.get("strl") or shape).get("persons", data.persons)  # an encoder: any
    if (checkpoint["skeleton"], persons) != (data.skeleton, data.persons):
        raise DataError(f"the checkpoint is of {checkpoint['layout']} and {persons} persons, got "
                        f"{data.layout} and {data.persons}; expected the same")
    if checkpoint["digest"] != data.digest:
        found = "other data"
        if sum(checkpoint["digest"]) == sum(data.digest):
            found = "another split of the data: its training sequences may be tested here"
        if settings.resume:
            raise DataError(f"the checkpoint is of {found}; --resume expects the same")
        print(f"note: the checkpoint is of {found}")

class Progress:
    """One epoch: a live line on a terminal, a line at its end. A loss that is not finite stops.
    row: the epoch's row of the log, to which its measurements are added."""
    def __init__(self, epoch, epochs, steps, lr):
        self.row = {"epoch": epoch + 1, "loss": math.nan, "lr": lr}
        self.epochs, self.total = epochs, (epochs - epoch) * steps
        self.losses, self.sequences = [], 0
        self.begin = self.drawn = time.monotonic()

    def step(self, loss, sequences):
        self.losses.append(loss)
        self.sequences += sequences
        self.now = time.monotonic()
        if sys.stdout.isatty() and self.now - self.drawn > 0.5:  # reading a loss makes a GPU wait
            self.drawn = self.now
            self.row["loss"] = float(loss)
            self.show(end="")

    def end(self):
        losses = torch.stack(self.losses)
        finite = losses.isfinite()
        if not finite.all():
            raise DataError(f"loss is not finite in epoch {self.row['epoch']}, step "
                            f"{int(finite.int().argmin()) + 1}; try a lower --lr")
        self.row["loss"] = float(losses.mean())
        return self.row

    def show(self, end="\n"):
        values = "  ".join(f"{name} {value:.4g}" for name, value in self.row.items()
                           if name != "epoch")
        spent = self.now - self.begin
        left = timedelta(seconds=round(spent * (self.total / len(self.losses) - 1)))
        line = (f"epoch {self.row['epoch']}/{self.epochs}  {values}  "
                f"{self.sequences / spent:.0f} seq/s  {left} left")
        print("\r\033[K" * sys.stdout.isatty() + line, end=end, flush=True)

def replayed(step, settings, device, world, sequences):
    """A step, forward and backward on (packing, *tensors), as a CUDA graph on one GPU, where asked
    for or where passes are so small that it pays: its hundreds of kernels start as one. Each set of
    shapes is recorded when it comes for the second time; the first time warms up. Parameters,
    buffers and gradients must stay the same tensors."""
    wanted = sequences <= 128 if settings.graphs is None else settings.graphs
    if not wanted or device.type != "cuda" or world > 1:
        return step
    recorded = {}
    pool = torch.cuda.graph_pool_handle()  # graphs run in turn and share their memory

    def replay(packing: Packing, *tensors):
        inputs = *packing.tensors, *tensors
        shapes = tuple(x.shape for x in inputs)
        if shapes not in recorded:
            recorded[shapes] = None
            return step(packing, *tensors)
        if recorded[shapes] is None:
            own = [x.clone() for x in tensors]  # a slice would keep its whole batch
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                loss = step(packing, *own)
            recorded[shapes] = graph, (*packing.tensors, *own), loss
        graph, own, loss = recorded[shapes]
        for mine, x in zip(own, inputs):
            mine.copy_(x)
        graph.replay()
        return loss.clone()

    return replay

if __name__ == "__main__":
    run(main)
