"""Fine-tunes the pre-trained encoder in the paper's classifier, or trains that from scratch.

    python train_finetune.py                                  # stick figures, from random weights
    python train_finetune.py --ckpt                           # the newest pre-training, on its data
    python train_finetune.py --ckpt runs/pretrain/pretrain.pt --data ntu60.npz
    python train_finetune.py --data mine.pkl --recipe small   # a small set: 4,000 steps or more
    python train_finetune.py --ckpt --label-fraction 0.1      # a tenth of the labels
    python train_finetune.py --ckpt --linear-probe            # one linear layer on frozen features
    python train_finetune.py --ckpt runs/finetune/finetune.pt --eval-only
    python train_finetune.py --ckpt runs/finetune/finetune.pt --predict new.pkl > new.csv

Leaves in --out (runs/finetune) finetune.pt, log.csv, and test_outputs.pt with logits, features and
labels of the test set. Results are those of the last epoch; the test set chooses nothing.
"""
import csv
import glob
import os
import sys
from dataclasses import dataclass

import train_pretrain as shared
from data import DataError, Dataset, Loader, Sequences, complete, from_annotations, read, reading
from skeletonmae import LinearProbe, Packing, SkeletonClassifier, SkeletonMAE
from train_pretrain import option
import torch
import torch.nn as nn
import torch.nn.functional as F

@dataclass
class Settings(shared.CommonSettings):
    """Fine-tuning."""
    ckpt: str = option("", "where to start; no value: the newest", nargs="?", const="newest")
    out: str = option("runs/finetune", "folder for checkpoint, log and test outputs")
    eval_only: bool = option(False, "test a fine-tuned --ckpt, train nothing")
    predict: str = option("", "file whose classes a fine-tuned --ckpt predicts, as CSV on stdout")
    epochs: int = option(110, "supplement A: 110", low=1)
    batch_size: int = option(128, "supplement A: 128", small=16, low=2)
    optimizer: str = option("sgd", "supplement A: sgd", small="adamw", choices=("sgd", "adamw"))
    lr: float = option(0.1, "learning rate, supplement A: 0.1", small=3e-3)
    momentum: float = option(0.9, "of SGD, supplement A: 0.9", high=1)
    nesterov: bool = option(False, "Nesterov's momentum in SGD")
    weight_decay: float = option(0.005, "supplement A: 0.005", small=0.05)
    warmup: int = option(5, "epochs of linear warm-up, supplement A: 5")
    milestones: tuple[int, ...] = option(None, "epochs where the rate falls to a tenth (90,100)")
    clip: float = option(0.0, "largest gradient norm; 0: none", small=5.0)
    label_smoothing: float = option(0.1, "supplement A: 0.1", high=1)
    encoder_lr_scale: float = option(1.0, "learning-rate multiplier of the pre-trained weights")
    label_fraction: float = option(1.0, "share of the labels, at least one a class", high=1)
    label_seed: int = option(0, "which labels --label-fraction keeps", high=2**31)
    linear_probe: bool = option(False, "train one linear layer on frozen pre-trained features")
    strl_layers: int = option(3, "M_l, STRL layers", low=1)
    attention_dropout: float = option(0.1, "supplement A: 0.1", high=0.99)
    drop_path: float = option(0.0, "share of persons that skip an STRL layer", high=0.99)

def main(argv=None):
    settings, source, path = start(shared.parse(Settings, __doc__, argv))
    if settings.predict:
        return predict(settings, source)
    device, rank, world = shared.set_up(settings)
    data = shared.read_data(settings, source, settings.eval_only)
    check_start(settings, source, data)
    if not settings.eval_only:
        shared.keep_unfinished(settings, path)
    if settings.label_fraction < 1:
        subset = label_subset(data.train.label, settings.label_fraction, settings.label_seed)
        data.train = data.train.subset(subset)
        print(f"{len(data.train)} labelled sequences, label seed {settings.label_seed}")
    settings = shared.suit(settings, data)
    data = shared.to_device(data, device)
    train = shared.loader(settings, data, data.train, settings.batch_size, True, rank, world)
    test = shared.loader(settings, data, data.test, settings.batch_size)

    torch.manual_seed(settings.seed)
    model, arguments, loaded = shared.build(make_model, settings, data, source)
    model.to(device)
    what = "linear probe, " * settings.linear_probe + f"from {settings.ckpt or 'random weights'}"
    if settings.eval_only:
        return report(evaluate(model, test, device, settings.amp), settings, data, what)

    pretrained = source["pretrained"] if settings.resume else loaded
    optimizer = shared.build(make_optimizer, settings, model, pretrained)
    first_epoch, log = shared.restore(source if settings.resume else None, model, optimizer)
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    print(f"{what}: {len(pretrained)} of {len(model.state_dict())} tensors loaded")
    shared.introduce(settings, data, model, train, device)

    def step(packing: Packing, x, label):
        with shared.autocast(device, settings.amp):
            logits = parallel(x, packing)
        loss = F.cross_entropy(logits, label, label_smoothing=settings.label_smoothing)
        loss.backward()
        return loss.detach()

    step = shared.replayed(step, settings, device, world, settings.batch_size)
    outputs = None
    for epoch in range(first_epoch, settings.epochs):
        shared.seed_epoch(settings, epoch, rank)
        lr = learning_rate(epoch, settings.lr, settings.warmup, settings.milestones)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        model.train()
        progress = shared.Progress(epoch, settings.epochs, train.steps, lr)
        for batch in train.epoch(epoch):
            packing = Packing(batch.present, device)
            loss = step(packing, batch.x.to(device), batch.label.to(device))
            if settings.clip:
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # a CUDA graph adds to the gradients in place
            progress.step(loss, len(batch.x) * world)
        row = progress.end()
        if rank == 0:
            if (epoch + 1) % settings.eval_every == 0 or epoch + 1 == settings.epochs:
                outputs = evaluate(model, test, device, settings.amp)
                row |= metrics(outputs)
            log.append(row)
            shared.save(path, "finetune", model, optimizer, epoch, log, settings, arguments, data,
                        pretrained=pretrained)
        progress.show()
    if rank == 0:
        outputs = outputs or evaluate(model, test, device, settings.amp)
        report(outputs, settings, data, f"last epoch ({len(log)}), {what}")
        print(f"saved {path}")

# ---------------------------------------------------------------------------------------- starting
DATA = ("data", "split", "layout", "test_fraction", "synthetic_size")
SHAPE = ("width", "hidden", "layers", "motion", "bone", "box", "center", "up")
STRL_SHAPE = ("frames", "blocks", "stride")

def start(typed):
    """(settings, the checkpoint to start from or None, the path of this run's checkpoint). A
    checkpoint decides the shape of the model and, where nothing else is typed, the data."""
    ckpt, tests = typed.get("ckpt"), typed.get("eval_only") or typed.get("predict")
    if tests and not ckpt:
        raise DataError("--eval-only and --predict need a --ckpt of fine-tuning")
    kinds = ("finetune",) if tests else ("pretrain", "finetune")
    if typed.get("resume") or not ckpt:
        if ckpt == "newest":
            del typed["ckpt"]  # the settings of the run name the one that was newest then
        return shared.begin(Settings, typed, "finetune")
    if ckpt == "newest":
        ckpt = typed["ckpt"] = max(glob.glob(f"runs/*/{kinds[0]}.pt"), key=os.path.getmtime,
                                   default=f"runs/{kinds[0]}/{kinds[0]}.pt")
    source = shared.read_checkpoint(ckpt, kinds)
    fixed = SHAPE
    if source["kind"] == "finetune":
        fixed += (*STRL_SHAPE, "strl_layers", "linear_probe")
    elif "strl" in source["model_settings"]:
        fixed += STRL_SHAPE
    brought = ("test_fraction", "layout") if "data" in typed else DATA
    if typed.get("eval_only"):
        typed.setdefault("out", os.path.dirname(ckpt) or ".")
        brought += ("label_fraction", "label_seed")
        if not source["settings"]["amp"]:
            typed.setdefault("amp", False)
    kept = {name: source["settings"][name] for name in (*fixed, *brought)}
    settings = shared.settle(Settings, typed, kept, brought)
    return settings, source, f"{settings.out}/finetune.pt"

def check_start(settings, source, data: Dataset):
    """The data must fit the checkpoint; sequences without a label are left out. What may be a
    mistake is noted: classes without training, an unfinished checkpoint."""
    if (settings.resume or settings.eval_only) and source["classes"] != data.classes:
        raise DataError(f"the checkpoint knows the classes {str(source['classes']):.80}, the data "
                        f"have {str(data.classes):.80}; expected the same")
    for name, half in (("train", data.train), ("test", data.test)):
        labelled = half.subset(half.label >= 0)
        if not len(labelled):
            raise DataError(f"none of {len(half)} {name} sequences ({data.split}) has a label; "
                            "expected one at least, from another --split or --data")
        if len(labelled) < len(half):
            print(f"note: {len(half) - len(labelled)} {name} sequences without a label left out")
        setattr(data, name, labelled)
    unknown = ~torch.isin(data.test.label, data.train.label)
    if unknown.any():
        print(f"note: {unknown.sum()} test sequences are of classes without a training sequence")
    if source and not settings.resume and source["epoch"] + 1 < source["settings"]["epochs"]:
        print(f"note: {settings.ckpt} is of an unfinished run")

def label_subset(labels, fraction, seed):
    """Indices of a stratified share: of every class round(fraction x its size), at least one."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = [order[labels[order] == c] for c in labels.unique()]
    kept = [members[:max(1, round(fraction * len(members)))] for members in classes]
    return torch.cat(kept).sort().values

def new_model(arguments, classes):
    """A model from the `model_settings` of a checkpoint; a linear probe's tell no classes."""
    if "classes" in arguments:
        return SkeletonClassifier(**arguments)
    encoder = SkeletonMAE(**arguments, mask_ratio=0.5)  # the default parts may not exist
    return LinearProbe(encoder, classes)

def make_model(settings, data: Dataset, source):
    """(the model asked for, its arguments, names of the tensors loaded from a checkpoint)."""
    arguments = shared.encoder_arguments(settings, data)
    if settings.linear_probe:
        if source and "strl" in source["model_settings"]:
            arguments["strl"] = source["model_settings"]["strl"]
    else:
        arguments |= {"classes": len(data.classes), "persons": data.persons,
                      **shared.pick(settings, *STRL_SHAPE, "strl_layers", "attention_dropout",
                                    "drop_path")}
    model = new_model(arguments, len(data.classes))
    if not source:
        return model, arguments, []
    state = source["model"]
    if source["kind"] == "pretrain":
        if not settings.linear_probe:
            return model, arguments, model.load_pretrained(state)
        state = {f"pretrained.{name}": value for name, value in state.items()}
    elif source["classes"] != data.classes:  # a new head
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    model.load_state_dict(state, strict=False)
    return model, arguments, list(state)

def make_optimizer(settings, model, pretrained):
    """Loaded weights form a group of their own, at encoder_lr_scale of the learning rate."""
    groups = [{"lr_scale": scale, "params": []} for scale in (1.0, settings.encoder_lr_scale)]
    for name, parameter in model.named_parameters():
        groups[name in pretrained]["params"].append(parameter)
    decay = settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, settings.lr, weight_decay=decay, fused=True)
    return torch.optim.SGD(groups, settings.lr, settings.momentum, weight_decay=decay,
                           nesterov=settings.nesterov)

def learning_rate(epoch, base, warmup, milestones):
    """The rate of zero-based epoch e: base (e + 1) / warmup while e < warmup, then base, divided by
    10 at each milestone (supplement A)."""
    if epoch < warmup:
        return base * (epoch + 1) / warmup
    return base * 0.1 ** sum(epoch >= milestone for milestone in milestones)

# ----------------------------------------------------------------------------------------- testing
@torch.no_grad()
def evaluate(model: nn.Module, batches: Loader, device, amp):
    """Logits (N, K), features before the classifier and labels in the data's order, on the CPU."""
    model.eval()
    parts = []
    for batch in batches.epoch():
        with shared.autocast(device, amp):
            features = model.features(batch.x.to(device), batch.present)
            logits = model.head(features)
        parts.append((logits.float().cpu(), features.float().cpu(), batch.label.cpu()))
    return dict(zip(("logits", "features", "labels"), map(torch.cat, zip(*parts))))

def metrics(outputs):
    """Top-1, the mean over the classes that occur, of more than five classes top-5, in percent."""
    logits, labels = outputs["logits"], outputs["labels"]
    best = logits.topk(min(5, logits.shape[1]), 1).indices  # (N, 5 or K)
    hit = (best == labels[:, None]).float()
    per_class = [hit[labels == c, 0].mean() for c in labels.unique()]
    found = {"top1": hit[:, 0].mean()}
    if logits.shape[1] > 5:
        found["top5"] = hit.sum(1).mean()
    found["mean_class"] = torch.stack(per_class).mean()
    return {name: 100 * float(value) for name, value in found.items()}

def report(outputs, settings, data: Dataset, what):
    """Prints the result and leaves test_outputs.pt."""
    result = metrics(outputs)
    names = {"top1": "top-1", "top5": "top-5", "mean_class": "mean class accuracy"}
    print(f"{what}: " + ", ".join(f"{names[name]} {value:.2f} %" for name, value in result.items())
          + f" on {len(outputs['labels'])} test sequences, one model, no test-time augmentation")
    counts = torch.bincount(data.train.label, minlength=len(data.classes)).cpu()
    outputs |= {"classes": data.classes, "names": data.test.names, "train_counts": counts,
                "metrics": result}
    shared.save_torch(outputs, f"{settings.out}/test_outputs.pt")

# -------------------------------------------------------------------------------------- predicting
def load_classifier(path, device="cpu", amp=None):
    """A checkpoint of fine-tuning as a function: names, probabilities = classify(arrays). arrays:
    one a sequence, (T, V, C) or (M, T, V, C), numpy's or torch's, C + 1 with the joint score last,
    or Sequences of a file; names: the class of each; probabilities: (N, K). amp: bfloat16, by
    default as in training where the device has instructions for it."""
    saved = shared.read_checkpoint(path, ("finetune",))
    device = torch.device(device)
    C, form = saved["channels"], saved["normalisation"]
    model = new_model(saved["model_settings"], len(saved["classes"]))
    model.load_state_dict(saved["model"])
    model.to(device)
    if amp is None:
        amp = saved["settings"]["amp"] and shared.has_bfloat16(device)

    def classify(arrays):
        half = arrays
        if not isinstance(half, Sequences):
            with reading("arrays", "a list of arrays"):
                data = from_annotations(list(arrays), C, saved["persons"])
                half = complete(data, form["marks"]).train
        shape = saved["persons"], len(saved["skeleton"]["joints"]), C
        if half.frames.shape[1:] != shape:
            raise DataError(f"(persons, joints, coordinates) {tuple(half.frames.shape[1:])}; "
                            f"expected {shape}")
        batches = Loader(half, saved["skeleton"], 64, form["frames"], view=form["view"])
        probabilities = evaluate(model, batches, device, amp)["logits"].softmax(1)
        return [saved["classes"][k] for k in probabilities.argmax(1).tolist()], probabilities

    return classify

def predict(settings, source):
    """A line of name,class,probability a sequence on stdout, what was mended on stderr."""
    classify = load_classifier(settings.ckpt, shared.find_device(settings.device), settings.amp)
    with reading(settings.predict):
        data = read(settings.predict, source["skeleton"], source["channels"], source["persons"],
                    source["normalisation"]["marks"])
    rows = [("name", "class", "probability")]
    for half in filter(None, (data.train, data.test)):
        classes, found = classify(half)
        rows += zip(half.names, classes, (f"{p:.4f}" for p in found.amax(1).tolist()))
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    print(f"note: by {settings.ckpt}, trained on {source['settings']['data'] or 'stick figures'}",
          file=sys.stderr)
    for what, count in (+data.repairs).items():  # those above 0
        print(f"note: {count} {what}", file=sys.stderr)

if __name__ == "__main__":
    shared.run(main)
