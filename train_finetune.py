"""Fine-tunes the pre-trained encoder in the paper's classifier (SSL), or trains that classifier from random weights.

    python train_finetune.py                                           # built-in stick figures, from random weights
    python train_finetune.py --ckpt                                    # from the newest pre-training, on the data it saw
    python train_finetune.py --ckpt runs/pretrain/pretrain.pt --data ntu60.npz   # supplement A: SGD 0.1, batch 128, 110 epochs
    python train_finetune.py --ckpt --label-fraction 0.1               # a tenth of the labels
    python train_finetune.py --ckpt --linear-probe                     # frozen encoder and one linear layer
    python train_finetune.py --ckpt runs/finetune/finetune.pt --eval-only

Leaves in --out (runs/finetune): finetune.pt, log.csv, and test_outputs.pt with logits, features before the classifier and
labels of the test set. Results are those of the last epoch; the test set chooses nothing.
"""
import glob
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from data import Loader, brief  # before torch: it silences torch's one remark about numpy
from skeletonmae import LinearProbe, Packing, SkeletonClassifier, SkeletonMAE
from train_pretrain import (STRL_SETTINGS, CommonSettings, Failure, Progress, check_fit, encoder_arguments, hint_at_steps, loaders,
                            note_oddities, option, parse, pick, read_checkpoint, read_data, recorded, refuse_change, replayed, restore,
                            resume_settings, run, save, seed_epoch, set_up, strl_arguments, write_atomically)
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Settings(CommonSettings):
    """Fine-tuning; the defaults are supplement A."""
    ckpt: str = option("", "pre-trained checkpoint; without a value the newest runs/*/pretrain.pt; left out: random weights", nargs="?",
                       const="newest")
    out: str = option("runs/finetune", "folder for checkpoint, log and test outputs")
    epochs: int = option(110, "supplement A: 110", low=1)
    batch_size: int = option(128, "supplement A: 128", low=2)
    optimizer: str = option("sgd", "sgd (supplement A) or adamw, which needs far fewer epochs on a small set", choices=("sgd", "adamw"))
    lr: float = option(0.1, "learning rate, supplement A: 0.1 for SGD", low=0)
    momentum: float = option(0.9, "of SGD, supplement A: 0.9", low=0, high=1)
    nesterov: bool = option(False, "Nesterov's momentum in SGD")
    weight_decay: float = option(0.005, "supplement A: 0.005", low=0)
    warmup: int = option(5, "epochs of linear warm-up, supplement A: 5", low=0)
    milestones: tuple = option((90, 100), "epochs at which the learning rate is divided by 10, supplement A: 90,100", low=0)
    clip: float = option(0.0, "largest gradient norm; 0: none", low=0)
    label_smoothing: float = option(0.1, "supplement A: 0.1", low=0, high=1)
    encoder_lr_scale: float = option(1.0, "the pre-trained weights' share of the learning rate", low=0)
    label_fraction: float = option(1.0, "share of the training labels to use, stratified, at least one a class", low=0, high=1)
    label_seed: int = option(0, "which labels --label-fraction keeps", low=0)
    linear_probe: bool = option(False, "freeze the encoder, train one linear layer on its pooled features")
    eval_only: bool = option(False, "measure a fine-tuned --ckpt on the test set, train nothing")
    strl_layers: int = option(3, "M_l, STRL layers", low=1, high=100)
    attention_dropout: float = option(0.1, "supplement A: 0.1", low=0, high=0.99)
    head_dropout: float = option(0.0, "dropout before the classifier", low=0, high=0.99)


DATA_SETTINGS = {"data", "split", "layout", "test_fraction", "synthetic_size"}  # what a checkpoint was trained on


def learning_rate(epoch: int, base: float, warmup: int, milestones: tuple) -> float:
    """The rate of zero-based epoch e: base (e + 1) / warmup while e < warmup, then base, divided by 10 at each milestone (S A)."""
    if epoch < warmup:
        return base * (epoch + 1) / warmup
    return base * 0.1 ** sum(epoch >= milestone for milestone in milestones)


def label_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of a stratified share of the sequences: of every class round(fraction x its size), at least one."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([members[:max(1, round(fraction * len(members)))] for members in classes]).sort().values


def newest_pretraining() -> str:
    newest = max(glob.glob("runs/*/pretrain.pt"), key=os.path.getmtime, default="")
    if not newest:
        raise Failure("--ckpt without a value takes the newest runs/*/pretrain.pt, and there is none; "
                      "run train_pretrain.py first or name a file")
    return newest


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, device, amp: bool) -> dict:
    """Logits (N, K), features before the classifier and labels of every sequence, in the loader's order, on the CPU."""
    model.eval()
    logits, features, labels = [], [], []
    for batch in loader.epoch():
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            feature = model.features(batch.x.to(device), batch.present)
            logits.append(model.head(feature).float())
        features.append(feature.float())
        labels.append(batch.label)
    return {"logits": torch.cat(logits).cpu(), "features": torch.cat(features).cpu(), "labels": torch.cat(labels).cpu()}


def metrics(outputs: dict) -> dict:
    """Top-1, top-5 and mean class accuracy (over the classes that the test set holds), in percent."""
    logits, labels = outputs["logits"], outputs["labels"]
    hit = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]  # (N, 5)
    per_class = [hit[labels == c, 0].float().mean() for c in labels.unique()]
    return {"top1": 100 * float(hit[:, 0].float().mean()), "top5": 100 * float(hit.any(1).float().mean()),
            "mean_class": 100 * float(torch.stack(per_class).mean())}


def take_settings(settings: Settings, given: set, source: dict) -> set:
    """A checkpoint decides its shape and, unless told otherwise, its data; of other data still the layout, where that is a file.
    Returns the names of the settings that no flag may change."""
    fixed = {"width", "hidden", "layers", "motion", "bone", "score", "box"}
    if source["kind"] == "finetune":
        fixed |= {*STRL_SETTINGS, "linear_probe"}
        if settings.eval_only:
            fixed |= {"label_fraction", "label_seed"}  # test_outputs.pt counts the training labels that the run saw
    elif source["settings"].get("strl_layers"):  # the STRL layers are pre-trained too
        fixed |= {*STRL_SETTINGS}
    before = recorded(Settings, source, settings.ckpt, fixed | DATA_SETTINGS)
    refuse_change(settings, before, fixed & given, settings.ckpt, "leave it out")
    for name in fixed:
        setattr(settings, name, before[name])
    brought = DATA_SETTINGS
    if "data" in given:  # the layout must be the same, and one that is not built in cannot be found from other data
        brought = {"layout"} if before["layout"].endswith(".json") else set()
    for name in brought - given:
        setattr(settings, name, before[name])
    if settings.eval_only and "out" not in given:
        settings.out = os.path.dirname(settings.ckpt) or "."
    return fixed


def build(settings: Settings, data, source: dict | None) -> tuple:
    """The model that the settings ask for, with the weights of a checkpoint where there is one.
    Returns (model, its arguments, names of the loaded tensors)."""
    arguments = encoder_arguments(settings, data)
    kind = source["kind"] if source else ""
    loaded = []
    if settings.linear_probe:
        before = source["model_settings"] if source else {}
        arguments["loss"] = before.get("loss", "cosine")
        if "strl" in before:
            arguments["strl"] = strl_arguments(settings, data)
        encoder = SkeletonMAE(**arguments, mask_ratio=0.5)  # it masks nothing, but the default parts may not exist
        if kind == "pretrain":
            encoder.load_state_dict(source["model"])
            loaded = ["pretrained." + name for name in source["model"]]  # by their names in the probe
        model = LinearProbe(encoder, len(data.classes))
    else:
        arguments |= {"classes": len(data.classes), **strl_arguments(settings, data), **pick(settings, "attention_dropout", "head_dropout")}
        model = SkeletonClassifier(**arguments)
        if kind == "pretrain":
            loaded = model.load_pretrained(source["model"])
    if kind == "finetune":
        model.load_state_dict(source["model"])
        loaded = list(source["model"])
    return model, arguments, loaded


def main(argv=None):
    settings, given = parse(Settings, __doc__, argv)
    path, resumed, source = os.path.join(settings.out, "finetune.pt"), None, None
    fixed = set()  # what a checkpoint decides
    if settings.resume:
        source = resumed = read_checkpoint(path, ("finetune",))
        if settings.ckpt == "newest" and resumed["settings"].get("ckpt"):
            given = given - {"ckpt"}  # what was newest then, this checkpoint names
        settings = resume_settings(settings, given, resumed, path)
    elif settings.ckpt:
        if settings.ckpt == "newest":
            settings.ckpt = newest_pretraining()
        source = read_checkpoint(settings.ckpt, ("finetune",) if settings.eval_only else ("pretrain", "finetune"))
        fixed = take_settings(settings, given, source)
    elif settings.eval_only:
        raise Failure("--eval-only needs --ckpt with a fine-tuned checkpoint, as in --ckpt runs/finetune/finetune.pt")
    if settings.nesterov and (settings.optimizer != "sgd" or not settings.momentum):
        raise Failure("--nesterov is a kind of momentum, of SGD; expected --optimizer sgd and a --momentum above 0, or leave it out")
    device, amp, rank, world = set_up(settings)
    say = print if rank == 0 else lambda *_: None

    data = read_data(settings)
    say(f"{settings.data or 'stick figures'}: {data}")
    start = path if resumed else settings.ckpt
    if source:
        check_fit(source, start, data)
    note_oddities(say, settings, data)
    if source and source["kind"] == "finetune" and source["classes"] != data.classes:
        known, found = (f"{len(labels)} classes {str(labels):.40}" for labels in (source["classes"], data.classes))
        raise Failure(f"{start} knows {known}, the data have {found}; expected the same")
    before = recorded(Settings, source, start, DATA_SETTINGS) if source else {}
    if source and settings.data == before["data"] and any(getattr(settings, name) != before[name] for name in DATA_SETTINGS - {"layout"}):
        say(f"note: {start} was trained with another --split, --test-fraction or --synthetic-size of these data: its training sequences "
            "may be among the test sequences here")
    if settings.eval_only and "out" not in given and pick(settings, *DATA_SETTINGS) != before:
        raise Failure(f"--eval-only would replace the test outputs of {start} by those of other data; expected an --out of their own")
    if settings.label_fraction < 1:
        data.train = data.train.subset(label_subset(data.train.label, settings.label_fraction, settings.label_seed))
        say(f"{len(data.train)} labelled sequences, {settings.label_fraction:g} of each class, label seed {settings.label_seed}")
    if settings.linear_probe and not settings.eval_only and len(data.train) < 2 * world:
        raise Failure(f"{len(data.train)} training sequences for --linear-probe; expected at least two in each process, for batch norm")
    train, test = loaders(settings, data, device, rank, world)

    torch.manual_seed(settings.seed)
    try:
        model, arguments, loaded = build(settings, data, source)
    except (RuntimeError, ValueError, TypeError) as error:
        raise Failure(f"{start or 'these settings'}: the model cannot be built ({brief(error)})") from None
    model.to(device)
    if loaded:
        say(f"{start}: {len(loaded)} tensors loaded, {len(model.state_dict()) - len(loaded)} start at random")

    def report(outputs: dict, what: str):
        result = metrics(outputs)
        say(f"{what}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, mean class accuracy {result['mean_class']:.2f} % "
            f"on {len(outputs['labels'])} test sequences, one model, no test-time augmentation")
        counts = torch.bincount(data.train.label, minlength=len(data.classes))
        outputs |= {"classes": data.classes, "names": data.test.names, "train_counts": counts, "metrics": result}
        write_atomically(os.path.join(settings.out, "test_outputs.pt"), lambda file: torch.save(outputs, file))

    if settings.eval_only:
        if rank == 0:  # of several processes one writes the file
            report(evaluate(model, test, device, amp), settings.ckpt)
        return

    pretrained = resumed["pretrained"] if resumed else loaded
    groups = [{"params": [p for name, p in model.named_parameters() if name not in pretrained]},
              {"params": [p for name, p in model.named_parameters() if name in pretrained]}]  # at encoder_lr_scale of the rate
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    else:
        optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay,
                                    nesterov=settings.nesterov)
    described = "linear probe, " * settings.linear_probe + (f"from {settings.ckpt}" if settings.ckpt else "from random weights")
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}{' in bfloat16' * amp}, {described}; "
        f"{train.steps} steps an epoch")
    if not resumed and not settings.linear_probe:
        hint_at_steps(say, train, settings, fixed, batch_size=16, optimizer="adamw", nesterov=False, lr=3e-3, weight_decay=0.05, clip=5)
    if settings.warmup > settings.epochs:
        say(f"hint: the learning rate does not reach --lr, for its warm-up takes {settings.warmup} epochs; try a shorter --warmup")
    elif settings.milestones and min(settings.milestones) >= settings.epochs > max(1, settings.warmup):
        near_the_end = sorted({settings.epochs * 9 // 11, settings.epochs * 10 // 11})
        say(f"hint: the learning rate never falls within {settings.epochs} epochs; try --milestones {','.join(map(str, near_the_end))}")
    first_epoch, log = restore(resumed, path, rank, optimizer=optimizer)  # build has loaded the weights
    parallel = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    step_model = torch.compile(parallel, dynamic=True) if settings.compile else parallel

    def step(packing: Packing, x: Tensor, label: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp, cache_enabled=False):  # a CUDA graph holds its own casts
            logits = step_model(x, packing)
        loss = F.cross_entropy(logits, label, label_smoothing=settings.label_smoothing)
        loss.backward()
        return loss.detach()

    step = replayed(step, settings, device, world, settings.batch_size)
    progress, outputs = Progress(settings.epochs, train.steps, first_epoch, data.train.names, path, rank, world), None
    for epoch in range(first_epoch, settings.epochs):
        seed_epoch(settings, epoch, rank)
        lr = learning_rate(epoch, settings.lr, settings.warmup, settings.milestones)
        for group, scale in zip(optimizer.param_groups, (1.0, settings.encoder_lr_scale)):
            group["lr"] = lr * scale
        model.train()
        progress.start_epoch(epoch, lr)
        for batch in train.epoch(epoch):
            loss = step(Packing(batch.present, device), batch.x.to(device), batch.label.to(device))
            if settings.clip:
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # a CUDA graph adds to the gradients in place
            progress.step(loss, batch.index)
        row, note = progress.row(model), ""
        if rank == 0 and ((epoch + 1) % settings.eval_every == 0 or epoch + 1 == settings.epochs):
            outputs = evaluate(model, test, device, amp)
            row |= metrics(outputs)
            note = f"  top-1 {row['top1']:.2f} %"
        log.append(row)
        if rank == 0:
            save({"kind": "finetune", "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "log": log,
                  "settings": asdict(settings), "model_settings": arguments, "skeleton": data.skeleton, "layout": data.layout,
                  "channels": data.channels, "persons": data.persons, "classes": data.classes, "pretrained": pretrained}, path)
            if epoch == 0:  # those of an earlier run in this folder
                Path(settings.out, "test_outputs.pt").unlink(missing_ok=True)
        progress.end_epoch(row["loss"], note)
    if rank == 0:
        report(outputs or evaluate(model, test, device, amp), f"last epoch ({settings.epochs}), {described}")
        say(f"saved {path}")


if __name__ == "__main__":
    run(main)
