"""Draws what the supplement shows from what training left: one self-contained report.html and every figure as an .svg file.

    python visualize.py                                                # runs/finetune
    python visualize.py runs/finetune --compare runs/scratch           # with and without pre-training, class by class
    python visualize.py runs/finetune --classes 2,5,7 --class-names names.txt --no-tsne
    python visualize.py runs/finetune --table runs/*                   # masking strategies against accuracy

Reads finetune.pt, log.csv and test_outputs.pt of the run, and pretrain.pt of the pre-training it started from.
Nothing imports this file. Figure numbers are the supplement's; Fig. 6 is the paper's own. Lengths in a figure are pixels.
"""
import csv
import html
import math
import os
import shlex
import statistics
import sys
from dataclasses import dataclass

from data import Loader, brief, read_torch  # before torch: it silences torch's one remark about numpy
from skeletonmae import SkeletonMAE, draw_mask
from train_finetune import Settings as Finetuning
from train_pretrain import (Failure, Settings as Pretraining, option, parse, pretraining_arguments, read_checkpoint, read_data, recorded,
                            run, write_atomically)
import torch
from torch import Tensor


@dataclass
class Settings:
    run: str = option("runs/finetune", "run folder of train_finetune.py; as the first word it stands without --run")
    compare: str = option("", "a second run folder on the same test set, beside the first in Fig. 2")
    table: tuple = option((), "run folders for Table 2, as in --table runs/*", nargs="+")
    pretrained: str = option("", "pre-training to draw; default: what the run started from; none: leave it out")
    classes: tuple = option((), "ids or names of the classes in Fig. 4 and Table 1; default: five of the rarer half, drawn by --seed")
    class_names: str = option("", "text file with a class name a line, in the order of the labels")
    sequence: str = option("", "test sequence to reconstruct, its name or number from 0; default: drawn by --seed")
    seed: int = option(0, "seed of everything that is drawn", low=0)
    tsne: bool = option(True, "t-SNE in Fig. 1")
    out: str = option("", "folder for report.html and the .svg files; default: the run folder")


# ---------------------------------------------------------------------------------------------- reading

def read(path: str, script: str = "train_finetune"):
    """A checkpoint, test outputs or the rows of log.csv; what is missing or broken is a Failure that names the command for it."""
    try:
        if path.endswith("log.csv"):
            with open(path, newline="") as file:
                return plottable([{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)])
        if path.endswith("test_outputs.pt"):
            return read_outputs(path)
        checkpoint = read_checkpoint(path, ("finetune",) if path.endswith("finetune.pt") else ("pretrain", "finetune"))
        kind = Pretraining if checkpoint["kind"] == "pretrain" else Finetuning
        return checkpoint | {"settings": recorded(kind, checkpoint, path), "log": plottable(checkpoint["log"])}
    except Exception as error:  # a damaged file can raise almost anything
        state = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be used ({brief(error)})"
        command = f"python {script}.py --out {shlex.quote(os.path.dirname(path) or '.')}"
        mend = ", or leave its figures out: --pretrained none" * (script == "train_pretrain")
        raise Failure(f"{path} {state}; make it with: {command}{mend}") from None


def plottable(rows: list) -> list:
    """The rows of a log, if they are what train_*.py writes."""
    if not rows or not all({"epoch", "loss"} <= row.keys() and all(abs(value) < 1e30 for value in row.values()) for row in rows):
        raise ValueError("expected a log of finite numbers, epoch and loss among them")
    return rows


def read_outputs(path: str) -> dict:
    """What train_finetune.py knows of N test sequences and K classes: logits (N, K), features (N, F), labels (N,), train_counts (K,);
    and counts (K, K), the confusion matrix."""
    outputs = read_torch(path, "is no test_outputs.pt", "expected what train_finetune.py wrote")
    (N, K), labels, features = outputs["logits"].shape, outputs["labels"].long(), outputs["features"].float()
    if not N or [len(outputs[key]) for key in ("features", "labels", "train_counts", "classes")] != [N, N, K, K]:
        raise ValueError("its parts do not belong together")
    if features.dim() != 2 or features.shape[1] < 1 or outputs["train_counts"].shape != (K,):
        raise ValueError("expected features (N, F) and train_counts (K,)")
    if labels.min() < 0 or labels.max() >= K or not (outputs["logits"].sum() + features.sum()).isfinite():
        raise ValueError(f"expected labels from 0 to {K - 1} and finite logits and features")
    summary = "{top1:.2f} % top-1, {top5:.2f} % top-5, {mean_class:.2f} % mean class accuracy".format(**outputs["metrics"])
    return outputs | {"features": features, "labels": labels, "counts": confusion(labels, outputs["logits"].argmax(1), K),
                      "summary": f"{summary} on {N:,} test sequences, {K} classes"}


def read_pretraining(path: str) -> dict | None:
    """The pre-training at `path`, or what a fine-tuned checkpoint there started from."""
    seen = set()  # a run that was fine-tuned again in its own folder started from itself
    while path and path not in seen:
        seen.add(path)
        found = read(path, "train_finetune" if path.endswith("finetune.pt") else "train_pretrain")
        if not isinstance(found, dict) or "kind" not in found:
            raise Failure(f"--pretrained {path} is no checkpoint; expected a pretrain.pt or finetune.pt")
        if found["kind"] == "pretrain":
            return found
        path = found["settings"]["ckpt"]
    return None


# ---------------------------------------------------------------------------------------------- numbers

def pca(x: Tensor, components: int) -> tuple:
    """Principal components of x (N, F): (coordinates (N, components), share of the variance each explains). Signs are fixed."""
    x = x - x.mean(0)
    _, scale, axes = torch.linalg.svd(torch.cat([x, x.new_zeros(components, x.shape[1])]), full_matrices=False)  # N may be small
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # the largest loading is positive
    return x @ axes[:components].T, (scale.square() / scale.square().sum().clamp(min=1e-30))[:components]


def affinities(x: Tensor, perplexity: float) -> Tensor:
    """p_j|i of t-SNE, (N, N): Gaussian rows whose log precision is bisected until e^entropy is the perplexity."""
    square = torch.cdist(x, x).square_()
    square = (square / square.mean().clamp(min=1e-12)).fill_diagonal_(math.inf)  # nobody is a neighbour of itself
    low, high = torch.full((len(x), 1), -10.0), torch.full((len(x), 1), 30.0)
    for _ in range(40):
        middle = (low + high) / 2
        p = torch.softmax(-middle.exp() * square, 1)
        flat = torch.special.entr(p).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    return p


def tsne(x: Tensor, perplexity: float = 30.0, iterations: int = 750, early: int = 250) -> tuple:
    """t-SNE of x (N, F) with the exact gradient (van der Maaten and Hinton 2008), started from PCA, hence without a seed; in the
    `early` iterations p is exaggerated. Returns (coordinates (N, 2), Kullback-Leibler divergence every 50 iterations)."""
    N, history = len(x), []
    p = affinities(x, perplexity)
    p = (p + p.T).div_(2 * N).clamp_(min=1e-12)
    y = pca(x, 2)[0]
    y = 1e-4 * y / y[:, 0].std().clamp(min=1e-12)
    velocity, gain, rate = torch.zeros_like(y), torch.ones_like(y), max(N / 48, 50)
    for step in range(iterations + 1):
        columns = torch.cat([y.T, torch.ones(1, N)])  # (3, N): one product gives sum_j w_ij y_j and sum_j w_ij
        pull, push, total, divergence = [], [], -N, 0.0  # -N: kernels of a point with itself do not count
        for p_rows, y_rows in zip(p.split(128), y.split(128)):
            dx, dy = y_rows[:, :1] - columns[0], y_rows[:, 1:] - columns[1]
            kernel = dx.square_().add_(dy.square_()).add_(1).reciprocal_()  # 1 / (1 + |y_i - y_j|^2)
            if step % 50 == 0:
                divergence += float((p_rows * (p_rows / kernel).log()).sum())
            total += float(kernel.sum())
            pull.append(torch.nn.functional.linear(p_rows * kernel, columns))
            push.append(torch.nn.functional.linear(kernel.square_(), columns))
        if step % 50 == 0:
            history.append(divergence + math.log(total))
        force = torch.cat(pull) * (12 if step < early else 1) - torch.cat(push) / total
        gradient = 4 * (force[:, 2:] * y - force[:, :2])
        gain = torch.where(gradient * velocity < 0, gain + 0.2, gain * 0.8).clamp(min=0.01)
        velocity = (0.5 if step < early else 0.8) * velocity - rate * gain * gradient
        y = y + velocity * (step < iterations)
        y = y - y.mean(0)
    return y, history


def confusion(labels: Tensor, predicted: Tensor, K: int) -> Tensor:
    """Counts (K, K): rows are the true classes, columns the predicted ones."""
    return torch.bincount(labels * K + predicted, minlength=K * K).view(K, K)


def choose_classes(wanted: tuple, ids: list, names: list, train_counts: Tensor, test_counts: Tensor, seed: int) -> list:
    """The classes asked for, or five drawn from the rarer half of those that the test set holds."""
    for word in wanted:
        if word not in ids + names:
            raise Failure(f"no class {word:.40}; ids run from {ids[0]} to {ids[-1]}")
    if wanted:
        return list(dict.fromkeys((ids + names).index(word) % len(ids) for word in wanted))
    tested = [c for c in train_counts.argsort(stable=True).tolist() if test_counts[c]]
    half = tested[:max(len(tested) // 2, 5)]
    return sorted(half[i] for i in torch.randperm(len(half), generator=torch.Generator().manual_seed(seed))[:5].tolist())


# ---------------------------------------------------------------------------------------------- drawing

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#777")  # Okabe and Ito: the colour-blind tell them apart
TEXT, LINE, BAR, RING = "", "m-6 0h12", "m-4-4h8v8h-8z", "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0"  # marks are relative SVG paths
DOT = "h0"
MARKS = (DOT, "m-3 0h6m-3-3v6", "m-2-2h4v4h-4z", "m0-3l3 5h-6z", "m-2-2l4 4m0-4l-4 4", "m0-3l3 3-3 3-3-3z")
FONT = 'Helvetica,Arial,"Liberation Sans",sans-serif'
STYLE = f"""text{{font:12px {FONT};fill:#222}}.small{{font-size:10px}}.tiny{{font-size:8px}}.bold{{font-weight:bold}}
.mid{{text-anchor:middle}}.end{{text-anchor:end}}.halo{{stroke:#fff;stroke-width:3px;paint-order:stroke;stroke-linejoin:round}}
.paper,.on{{fill:#fff}}.none{{fill:#e2e2e2}}.heat{{fill:#0072b2}}.ghost{{opacity:.35}}
.grid,.axis,.dash,.line,.bone,.joint{{fill:none}}.grid{{stroke:#e2e2e2}}.axis{{stroke:#777}}.dash{{stroke-dasharray:5 3}}
.line{{stroke-width:1.8}}.mark{{fill-opacity:.25;stroke-width:1.2}}.joint,.dot{{stroke-linecap:round}}.dot{{stroke-width:4.6}}
.bone,.joint{{stroke:#222;stroke-width:1.6}}.joint{{stroke-width:4}}.ring{{stroke:#d55e00;stroke-width:1.4}}
{"".join(f".c{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(COLOURS))}
@media screen and (prefers-color-scheme:dark){{text{{fill:#e4e4e4}}.halo{{stroke:#16181c}}.paper,.on{{fill:#16181c}}.axis{{stroke:#8a8a8a}}
.grid{{stroke:#33373d}}.none{{fill:#33373d}}.heat{{fill:#56b4e9}}.bone,.joint{{stroke:#e4e4e4}}.ring,.c3{{stroke:#f0803c}}
.f3{{fill:#f0803c}}.c0{{stroke:#2b8fd0}}.f0{{fill:#2b8fd0}}.c5{{stroke:#8fd3ff}}.f5{{fill:#8fd3ff}}}}"""
FIGURES = {"fig1-pca": "Fig. 1: features before the classifier, PCA", "fig1-tsne": "Fig. 1: features before the classifier, t-SNE",
           "fig2-class-accuracy": "Fig. 2: accuracy of each class against the average",
           "fig3-long-tail": "Fig. 3: long-tailed distribution of the training classes", "fig4-confusion": "Fig. 4 left: confusion matrix",
           "fig4-pca2d": "Fig. 4 middle: 2D PCA of the chosen classes", "fig4-pca3d": "Fig. 4 right: 3D PCA of the chosen classes",
           "paper-fig6-reconstruction": "Paper Fig. 6: input, masked, reconstructed",
           "training-pretrain": "Pre-training", "training-finetune": "Fine-tuning"}  # name of the file -> title


def figure(name: str, caption: str, width: float, height: float, body: str) -> tuple:
    """(name, title, caption, SVG)."""
    size, wide = f'width="{width:.4g}" height="{height:.4g}"', ' class="wide"' * (width > 500)
    head = f'<svg viewBox="0 0 {width:.4g} {height:.4g}" {size}{wide} role="img" aria-label="{FIGURES[name]}">'
    return name, FIGURES[name], caption, f"{head}{body}</svg>"


def clean(words, limit: int = 40) -> str:
    """Text from data, safe in HTML and SVG: unprintable characters replaced, clipped, escaped."""
    words = "".join(c if c.isprintable() else "\ufffd" for c in str(words))
    return html.escape(words if len(words) <= limit else words[:limit - 1].rstrip() + "…")


def text(x: float, y: float, words, style: str = "", limit: int = 60, turn: float = 0, extra: str = "") -> str:
    extra += f' transform="rotate({turn} {x:.4g} {y:.4g})"' * bool(turn)
    return f'<text x="{x:.4g}" y="{y:.4g}" class="{style}"{extra}>{clean(words, limit)}</text>'


def path(points, style: str, mark: str = "", tip: str = "", extra: str = "") -> str:
    """A line through points [(x, y)], or a mark at each of them; `tip`, already clean, shows on hover."""
    places = [f"{x:.4g} {y:.4g}" for x, y in points]
    shape = "".join(f"M{place}{mark}" for place in places) if mark else "M" + "L".join(places)
    return f'<path class="{style}"{extra} d="{shape}">{f"<title>{tip}</title>" * bool(tip)}</path>' if places else ""


def rect(x: float, y: float, width: float, height: float, style: str, tip: str = "", extra: str = "") -> str:
    return path([(x, y)], style, f"h{width:.4g}v{height:.4g}h{-width:.4g}z", tip, extra)


def legend(series: list, top: float, width: float) -> tuple:
    """series: [(label, style, mark, ...)], those with a label in columns as wide as they need. Returns (svg, y below it)."""
    series = [entry for entry in series if entry[0]]
    limit = 34 if width < 500 else 100  # letters of a label
    longest = min(max((len(label) for label, *_ in series), default=0), limit)
    columns = max(1, min(len(series), int((width - 72) / (24 + 5.2 * longest))))
    places = [(64 + i % columns * (width - 72) / columns, top + 14 + i // columns * 16) for i in range(len(series))]
    body = "".join(path([(x + 6, y - 4)], style, mark) + text(x + 16, y, label, "small", limit)
                   for (label, style, mark, *_), (x, y) in zip(series, places))
    return body, top + 16 * -(-len(series) // columns)


def names_below(xs: list, y: float, names: list) -> tuple:
    """Names under evenly spaced places: level where they fit, else slanted, upright or only some. Returns (svg, height)."""
    step = xs[1] - xs[0] if len(xs) > 1 else 100
    longest = min(max(map(len, names)), 24)
    if 5.5 * longest + 4 < step:
        turn, anchor, dx, dy = 0, "mid", 0, 14
    else:
        turn, anchor, dx, dy = -60 if step > 12.5 else -90, "end", 3.5, 8
    style = f"{'small' if step > 10 else 'tiny'} {anchor}"
    body = "".join(text(x + dx, y + dy, name, style, 24, turn) for x, name in list(zip(xs, names))[::math.ceil(7 / step)])
    return body, 10 + 4.6 * longest if turn else 18


def ticks(low: float, high: float, least: float) -> list:
    """At most eight round numbers from low to high, at least `least` apart: [(number, label)]."""
    step = next(m * 10.0 ** e for e in range(-45, 39) for m in (1, 2, 5) if m * 10.0 ** e >= max(least, (high - low) / 7))
    numbers = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(value, f"{value:.6g}".replace("-", "−")) for value in numbers]


def draw(series: list, at) -> str:
    """series: [(label in the legend or "", style, mark, points, tip)]: a LINE through the points, BARs with a tip each, a mark at each,
    or a text. at(*point) are its pixels; points in space keep their coordinates, for the page's script."""
    body = ""
    for _, style, mark, points, tip in series:
        places, solid = [at(*point) for point in points], len(points) > 0 and len(points[0]) == 3
        extra = f' data-mark="{mark}" data-xyz="{" ".join(",".join(f"{v:.3g}" for v in point) for point in points)}"' * solid
        if mark == TEXT:
            body += text(*places[0], tip, style, extra=extra)
        elif mark == LINE:
            body += path(places, style, extra=extra)
            body += path(places, style.replace("line", "dot"), DOT) * ("line" in style and len(places) <= 40)
        elif mark == BAR:
            half, zero = at(0.37, 0)[0] - at(0, 0)[0], at(0, 0)[1]
            body += "".join(rect(x - half, min(y, zero), 2 * half, max(abs(y - zero), 0.7), style, its) for (x, y), its in zip(places, tip))
        else:
            body += path(places, style, mark, tip, extra)
    return body


def plot(series: list, labels: list, top: float = 0, width: float = 480, tall: float = 350, least: tuple = (0, 0), names=()) -> tuple:
    """Legend, axes and what they hold; labels, least: of the axes, and the least distance of their ticks. names: what stands at
    x = 0, 1, ... instead of ticks. Returns (svg, y below it)."""
    key, top = legend(series, top, width)
    left, right, top, bottom = 64, width - 12, top + 8, top + 8 + tall
    xs, ys = zip(*(point for *_, points, _ in series for point in points))
    pads = [0.04 * (max(v) - min(v)) or 0.5 * abs(max(v)) or 1.0 for v in (xs, ys)]
    (x0, x1), (y0, y1) = ((min(v) - pad, max(v) + pad) for v, pad in zip((xs, ys), pads))
    if names:
        x0, x1, y0 = -0.5, len(names) - 0.5, y0 if min(ys) < 0 else 0

    def at(x, y):
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    below, height = names_below([at(i, y0)[0] for i in range(len(names))], bottom, names) if names else ("", 17)
    body = key + below + text((left + right) / 2, bottom + height + 14, labels[0], "mid")
    body += text(16, (top + bottom) / 2, labels[1], "mid", turn=-90)
    for value, words in ticks(y0, y1, least[1]):
        y = at(x0, value)[1]
        body += path([(left, y), (right, y)], "grid") + text(left - 6, y + 3.5, words, "small end")
    for value, words in [] if names else ticks(x0, x1, least[0]):
        x = at(value, y0)[0]
        body += path([(x, bottom), (x, bottom + 4)], "axis") + text(x, bottom + 15, words, "small mid")
    body += path([(left, top), (left, bottom), (right, bottom)], "axis")
    return body + draw(series, at), bottom + height + 24


# ---------------------------------------------------------------------------------------------- figures

POINTS = 3000  # at most so many in Fig. 1: t-SNE takes their square
YAW, PITCH = 0.65, 0.42  # of the cube in Fig. 4, in radians, before it is turned


def project(x: float, y: float, z: float) -> tuple:
    """Pixels of a point of the cube from -1 to 1, as the page's script has them at first."""
    depth = x * math.sin(YAW) + y * math.cos(YAW)
    return 255 + 118 * (x * math.cos(YAW) - y * math.sin(YAW)), 200 - 118 * (z * math.cos(PITCH) + depth * math.sin(PITCH))


def cube(series: list, labels: list) -> tuple:
    """`plot` for points (x, y, z) in the cube from -1 to 1."""
    key, top = legend(series, 0, 480)
    corners = "000 100 110 010 000 001 101 100 101 111 110 111 011 010 011 001".split()  # one line along every edge
    edges = ("", "grid", LINE, [[2 * int(v) - 1 for v in corner] for corner in corners], "")
    ends = [("", "small mid", TEXT, [end], label.replace(" of variance", ""))
            for end, label in zip(((0, -1.35, -1.15), (-1.35, 0, -1.15), (-1, 1, 1.12)), labels)]
    return (f'{key}<g class="turn" transform="translate(0 {top})"><rect class="paper" width="480" height="399"/>'
            f"{draw([edges, *series, *ends], project)}</g>", top + 399)


def scatter(name: str, caption: str, points: Tensor, classes: Tensor, names: dict, share: Tensor | None) -> tuple:
    """points (N, 2), or (N, 3) in the cube from -1 to 1, and their classes (N,); names: class -> its name; share: see `pca`."""
    series, labels = [], ["t-SNE dimension 1 (no unit)", "t-SNE dimension 2 (no unit)"]
    if share is not None:
        labels = [f"PC {i} ({100 * part:.1f} % of variance)" for i, part in enumerate(share.tolist(), 1)]
    ids, low, high = {}, points.amin(0), points.amax(0)
    for i, (c, label) in enumerate(names.items()):
        own, colour, mark = points[classes == c], i % 7, MARKS[(i + i // 7) % 6]  # 42 classes in a row differ in one or the other
        style = f"c{colour} dot" if mark == DOT else f"c{colour} mark f{colour}"
        series.append((label if len(names) <= 20 else "", style, mark, own.tolist(), clean(label)))
        if len(names) > 20 and len(own):  # too many for a legend: ids where there is room
            middle = own.median(0).values
            cell = tuple(((middle - low) / (high - low) * 20).int().tolist())
            ids.setdefault(cell, ("", "small bold mid halo", TEXT, [middle.tolist()], label.removeprefix("class ").split(" ")[0]))
    body, height = (cube if points.shape[1] == 3 else plot)([*series, *ids.values()], labels)
    return figure(name, caption + " Numbers: class ids, where there is room; others show on hover." * bool(ids), 480, height, body)


def fig1(outputs: dict, names: list, with_tsne: bool, seed: int):
    """PCA and, if asked for, t-SNE of the features before the classifier."""
    features, labels, N = outputs["features"], outputs["labels"], len(outputs["labels"])
    kept = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:POINTS].sort().values
    shown = f"{len(kept):,} of {N:,} test sequences, drawn with seed {seed}." if N > POINTS else f"all {N:,} test sequences."
    classes = labels[kept], {c: names[c] for c in labels.unique().tolist()}
    flat, share = pca(features, 2)
    yield scatter("fig1-pca", f"Principal components of all test features. Shown: {shown}", flat[kept], *classes, share)
    if with_tsne and N >= 10:  # fewer have no neighbourhoods to keep
        print(f"t-SNE of {len(kept):,} sequences; --no-tsne leaves it out", flush=True)
        perplexity = min(30, (len(kept) - 1) / 3)
        flat, divergence = tsne(features[kept], perplexity)
        yield scatter("fig1-tsne", f"t-SNE of {shown} Perplexity {perplexity:.3g}, divergence {divergence[-1]:.2f}.", flat, *classes, None)


def fig2(counts: dict, names: list, short: list) -> tuple:
    """counts: run -> its confusion matrix (K, K); the first run's accuracies are bars and give the order, the second's are dots."""
    accuracies = {run: 100 * c.diagonal() / c.sum(1) for run, c in counts.items()}  # (K,), NaN for a class without test sequences
    gaps, series = [a - a.nanmean() for a in accuracies.values()], []
    order = [c for c in gaps[0].argsort(descending=True, stable=True).tolist() if not gaps[0][c].isnan()]
    tips = [f"{clean(names[c])}: " + ", ".join(f"{a[c]:.1f} %" for a in accuracies.values()) for c in order]
    for (run, accuracy), gap, style, colour, mark in zip(accuracies.items(), gaps, ("f0", "c3 dot"), ("c0", "c3"), (BAR, DOT)):
        spread = statistics.pstdev(gap[order].tolist())
        label = f"{run[-40:]}: average {accuracy.nanmean():.1f} %, spread ±{spread:.1f} points"
        series.append((label, style, mark, list(enumerate(gap[order].tolist())), tips if mark == BAR else ""))
        series += [("", f"{colour} dash", LINE, [(-0.5, level), (len(order) - 0.5, level)], "") for level in (spread, -spread)]
    series.append(("", "axis", LINE, [(-0.5, 0), (len(order) - 0.5, 0)], ""))
    body, height = plot(series, ["class, sorted", "accuracy − average, percentage points"], 0, 960, 250, names=[short[c] for c in order])
    caption = ("Accuracy of each class minus the average over classes. Spread: standard deviation over classes, dashed."
               + f" Left out: {len(names) - len(order)} without test sequences." * (len(order) < len(names)))
    return figure("fig2-class-accuracy", caption, 960, height, body)


def fig3(train_counts: Tensor, chosen: list, names: list, short: list) -> tuple:
    """Training sequences of each class, (K,), the chosen classes marked."""
    order, series = train_counts.argsort(descending=True, stable=True).tolist(), []
    for label, style, wanted in (("classes of Fig. 4 and Table 1", "f3", True), ("other classes", "f0 ghost", False)):
        bars = [((i, int(train_counts[c])), f"{clean(names[c])}: {train_counts[c]}") for i, c in enumerate(order)
                if (c in chosen) == wanted]
        series += [(label, style, BAR, *zip(*bars))] if bars else []
    body, height = plot(series, ["class, most frequent first", "training sequences"], 0, 960, 250, (1, 1), [short[c] for c in order])
    return figure("fig3-long-tail", f"Training sequences of {len(order)} classes, {int(train_counts.sum()):,} in all.", 960, height, body)


def fig4_confusion(counts: Tensor, names: list, short: list) -> tuple:
    """counts (K, K), row-normalised: true classes down, predicted ones across."""
    K, totals = len(counts), counts.sum(1).tolist()
    cell, left, top = min(52, (440 if K <= 20 else 720) / K), 40 + 5.2 * min(max(map(len, short)), 24), 14
    side = cell * K
    below, height = names_below([left + (i + 0.5) * cell for i in range(K)], top + side, short)
    body, numbers = rect(left, top, side, side, "grid") + below, ""
    for i, total in enumerate(totals):
        y = top + i * cell
        body += text(left - 5, y + cell / 2 + 3.5, short[i], "end small" if cell > 10 else "end tiny", 24) * (i % math.ceil(7 / cell) == 0)
        body += rect(left, y, side, cell, "none", f"{clean(names[i])}: no test sequence") * (total == 0)
        for j in counts[i].nonzero().flatten().tolist():
            x, share = left + j * cell, float(counts[i, j]) / total
            tip = f"{clean(names[i], 30)}: {counts[i, j]} of {total} taken for {clean(names[j], 30)} ({100 * share:.0f} %)"
            body += rect(x, y, cell, cell, "heat", tip, f' fill-opacity="{max(share, 0.06):.2f}"')
            if K <= 12:
                numbers += text(x + cell / 2, y + cell / 2 + 3.5, f"{100 * share:.0f}", "small mid" + " on" * (share > 0.55))
    for i, words in enumerate(("> 0 %", "25 %", "50 %", "75 %", "100 %")):  # the key
        body += rect(left + side + 18, top + 60 - 15 * i, 12, 15, "heat", extra=f' fill-opacity="{max(i / 4, 0.06)}"')
        body += text(left + side + 36, top + 71 - 15 * i, words, "small")
    body += text(left + side / 2, top + side + height + 14, "predicted class", "mid")
    body += text(16, top + side / 2, "true class", "mid", turn=-90) + numbers
    caption = (f"Share in percent of a true class's test sequences by predicted class; {sum(totals):,} sequences, counts on hover."
               + f" Grey: {totals.count(0)} without test sequences." * (0 in totals))
    return figure("fig4-confusion", caption, left + side + 76, top + side + height + 24, body)


def fig4_pca(outputs: dict, chosen: list, names: list) -> list:
    """2D and 3D PCA of the features before the classifier, fitted to the chosen classes."""
    inside = torch.isin(outputs["labels"], torch.tensor(chosen))
    if not inside.any():
        raise Failure("the test set holds no sequence of the classes named; choose others with --classes")
    classes = outputs["labels"][inside], {c: names[c] for c in chosen}
    points, share = pca(outputs["features"][inside], 3)
    caption = f"Principal components of the features before the classifier, fitted to the {len(points)} test sequences of these classes"
    in_cube = 2 * (points - points.amin(0)) / (points.amax(0) - points.amin(0)).clamp(min=1e-9) - 1
    return [scatter("fig4-pca2d", caption + ".", points[:, :2], *classes, share),
            scatter("fig4-pca3d", caption + "; each axis spans its range. Drag to turn.", in_cube, *classes, share)]


def training(name: str, log: list) -> tuple:
    """Loss, accuracy or joint error, and learning rate over epochs; log: {column: value} of each epoch."""
    kinds = {"loss": {"loss": "training loss"}, "accuracy, %": {"top1": "top-1", "top5": "top-5", "mean_class": "mean class"},
             "joint error, data units": {"joint_error": "reconstruction", "mean_pose_error": "mean pose", "neighbour_error": "neighbours"},
             "learning rate": {"lr": "learning rate"}}
    body, height = "", 0
    for label, columns in kinds.items():
        series = [(words, f"line c{i}", LINE, [(row["epoch"], row[column]) for row in log if column in row], "")
                  for i, (column, words) in enumerate(columns.items()) if any(column in row for row in log)]
        if series:
            series += [("", "", DOT, [(row["epoch"], series[0][3][0][1]) for row in log], "")]  # not seen: all panels span all epochs
            panel, height = plot(series, ["epoch", label], height, tall=118, least=(1, 0))
            body += panel
    return figure(name, f"From the log, {len(log)} epochs; accuracy and joint error are the test set's, where measured.", 480, height, body)


def reconstruct(checkpoint: dict, wanted: str, seed: int) -> tuple:
    """(name of a test sequence, its coordinates x and what the pre-trained model makes of them (M, T, V, C), in the units of the
    data, known (M, T, V): there and seen, masked (1 or T, V), whether y points up), for the paper's Fig. 6."""
    was, skeleton, C = checkpoint["settings"], checkpoint["skeleton"], checkpoint["channels"]
    try:
        settings = Pretraining(**was)
        data = read_data(settings)
        model = SkeletonMAE(**pretraining_arguments(settings, data))
        model.load_state_dict(checkpoint["model"])
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise Failure(f"the pre-training cannot be drawn ({brief(error)}); make it anew with: python train_pretrain.py --out "
                      f"{shlex.quote(was['out'])}, or leave its figure out: --pretrained none") from None
    generator, names = torch.Generator().manual_seed(seed), data.test.names
    wanted = wanted or str(int(torch.randint(len(names), (1,), generator=generator)))
    if wanted not in names and not (wanted.isdecimal() and len(wanted) < 10 and int(wanted) < len(names)):
        raise Failure(f"no test sequence {wanted:.60}; expected a number from 0 to {len(names) - 1} or a name such as {names[0]:.60}")
    chosen = names.index(wanted) if wanted in names else int(wanted)
    batch = next(iter(Loader(data.test.subset([chosen]), skeleton, C, 1, was["frames"], False).epoch()))
    mask = model.draw(1, was["frames"], generator)
    guess = model.reconstruct(batch.x, batch.present, mask)[0][0]
    x, guess = batch.x[0, ..., :C] * batch.unit, guess * batch.unit  # the unit is a number, or one for each axis
    known = batch.there[0, ..., None] & (batch.x[0, ..., C:] > 0).all(-1)  # where there is no score, all of none
    head, legs = (data.test.frames[::7, 0, skeleton["parts"].get(part, [0]), 1].mean() for part in ("head", "left_leg"))
    up = bool(head > legs or head == legs and C == 3)
    return names[chosen], x, guess, known, mask[0], up


def fig6(checkpoint: dict, wanted: str, seed: int) -> tuple:
    """Paper Fig. 6: eight frames of a test sequence as it is, as the encoder sees it, and as it is reconstructed."""
    name, x, guess, known, masked, up = reconstruct(checkpoint, wanted, seed)
    T, was, edges = x.shape[1], checkpoint["settings"], checkpoint["skeleton"]["edges"]
    error = float((guess - x).norm(dim=-1)[known & masked].sum() / (known & masked).sum().clamp(min=1))
    size = float(x[known].square().sum(-1).mean().sqrt().clamp(min=1e-9))
    frames = torch.linspace(0, T - 1, min(8, T)).round().long()
    down = -1.0 if up else 1.0  # y grows downwards on a page
    view = torch.tensor([[0.9, 0], [0, down], [0.44, 0]] if x.shape[-1] == 3 else [[1.0, 0], [0, down]])
    true, guess = (v[:, frames] for v in (x @ view, torch.where(masked[..., None], guess, x) @ view))  # (M, 8, V, 2)
    known, masked = known[:, frames], masked.expand(T, -1)[frames]                                    # (M, 8, V), (8, V)
    if not known.any():
        raise Failure(f"test sequence {name:.60} has no joint that could be drawn; choose another with --sequence")
    low, high = (true.masked_fill(~known[..., None], sign * math.inf) for sign in (1, -1))
    low, high = low.amin((0, 2)), high.amax((0, 2))  # (8, 2)
    low[:, 1], high[:, 1] = low[:, 1].amin(), high[:, 1].amax()  # frames are centred sideways; a jump stays a jump
    scale = float((torch.tensor([98, 130]) / (high - low).amax(0).clamp(min=1e-6)).amin())
    true, guess = (((v - (low + high)[:, None] / 2) * scale).tolist() for v in (true, guess))
    height, body, seen = round(scale * float(high[0, 1] - low[0, 1])) + 22, "", known & ~masked
    rows = {"input": [(true, known, "")], "masked: rings are hidden from the encoder": [(true, seen, ""), (true, known & masked, "ring")],
            "reconstructed: masked joints in blue, where they are in grey":
                [(true, known, "ghost"), (guess, known | known.any(2, keepdim=True) & masked, "c0"), (true, seen, "")]}

    def stick(places, there, style):  # V places of one person in one frame, and which of them to draw
        bones = [path([places[i], places[j]], f"bone {style}") for i, j in edges if there[i] and there[j] and style != "ring"]
        joints = [place for place, shown in zip(places, there) if shown]
        return "".join(bones) + path(joints, f"joint {style}", RING if style == "ring" else DOT)

    for row, (title, layers) in enumerate(rows.items()):
        top = 20 + row * (height + 28)
        body += text(4, top - 4, title, "bold", 90)
        for f, frame in enumerate(frames.tolist()):
            people = "".join(stick(places[m][f], there[m, f], style) for m in range(len(x)) for places, there, style in layers)
            place = f'x="{116 * f + 4}" y="{top}" width="112" height="{height}" viewBox="-56 {-height / 2} 112 {height}"'
            body += f"<svg {place}>{people}</svg>" + text(116 * f + 60, top + height + 12, f"frame {frame + 1}", "small mid") * (row == 2)
    least, most = (int(bound) for bound in masked.sum(1).aminmax())  # segments with masks of their own may differ
    hidden = f"{least} to {most}" if least < most else most
    what = "drawn at random" if was["mask_ratio"] or was["mask_num_parts"] else ", ".join(was["mask_parts"])
    caption = (f"Test sequence {name:.60}, {len(frames)} of {T} frames; {hidden} of {masked.shape[1]} joints masked ({what}). "
               f"Mean error of its masked joints: {error:.3g} in the units of the data, {100 * error / size:.0f} % of the "
               "sequence's size (root mean square distance of its joints from its origin).")
    return figure("paper-fig6-reconstruction", caption, 936, 3 * height + 96, body)


# ---------------------------------------------------------------------------------------------- tables

def table(title: str, caption: str, rows: list) -> tuple:
    """rows of cells, not yet escaped; the first is the head. Returns ("", title, caption, HTML)."""
    rows = ["".join(f"<{tag}>{clean(cell, 100)}</{tag}>" for cell in row) for tag, row in zip(["th"] + ["td"] * len(rows), rows)]
    return "", title, caption, f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def table2(folders: tuple):
    """Masking strategies against accuracy, one table for each data set and protocol among the runs."""
    found = {}  # (protocol, joints, test labels) -> {(row, masked joints): {what is masked: [top-1 of each run]}}
    for folder in folders:
        held = {name for name in ("pretrain.pt", "finetune.pt", "test_outputs.pt") if os.path.isfile(os.path.join(folder, name))}
        if "pretrain.pt" in held or held == {"test_outputs.pt"}:  # runs/* holds pre-trainings too, and what --eval-only left
            continue
        outputs, checkpoint = (read(os.path.join(folder, name)) for name in ("test_outputs.pt", "finetune.pt"))
        was, skeleton = checkpoint["settings"], checkpoint["skeleton"]
        row, count, what, source = "No pre-training", 0, "", read_pretraining(was["ckpt"])
        if source:
            masking = {key: source["settings"][f"mask_{key}"] for key in ("parts", "num_parts", "ratio")}
            row = "Random joints" if masking["ratio"] else "Parts drawn per sequence" if masking["num_parts"] else "Body parts"
            count = round(float(draw_mask(1000, skeleton, **masking, generator=torch.Generator().manual_seed(0)).sum()) / 1000)
            what = " ".join(f"V{i}" for i, part in enumerate(skeleton["parts"]) if part in masking["parts"]) * (row == "Body parts")
            what += " (STRL layers too)" * bool(source["settings"]["strl_layers"])
        protocol = (f"{os.path.basename(was['data']) or 'built-in stick figures'}{' ' * bool(was['split'])}{was['split']}, "
                    f"{100 * was['label_fraction']:g} % of the labels{', linear probe' * was['linear_probe']}")
        same = protocol, len(skeleton["joints"]), tuple(outputs["labels"].tolist())  # other sets can have the same name
        cells = found.setdefault(same, {})
        cells.setdefault((row, count), {}).setdefault(what, []).append(outputs["metrics"]["top1"])
    if not found:
        raise Failure("--table names no folder of train_finetune.py; make one with: python train_finetune.py --ckpt --out runs/finetune")
    for (protocol, V, _), cells in found.items():
        counts = sorted({count for _, count in cells})
        rows = [["Masked joints", *counts], ["Ratio", *(f"{100 * count / V:.0f} %" for count in counts)]]
        for row, pick in (("No pre-training", max), ("Random joints", max), ("Body parts, high", max), ("Body parts, low", min),
                          ("Parts drawn per sequence", max)):
            rows.append([row])
            for sets in (cells.get((row.partition(",")[0], count), {"": []}) for count in counts):
                mean, what, runs = pick((statistics.mean(runs or [0]), what, runs) for what, runs in sets.items())
                spread = f" ± {statistics.stdev(runs):.1f} (n = {len(runs)})" if len(runs) > 1 else ""
                rows[-1].append(f"{mean:.1f}{spread} {what}" if runs else "–")
        rows = [row for row in rows if set(row[1:]) != {"–"}]
        yield table("Table 2: masking strategy against accuracy", f"Top-1 accuracy in percent; {protocol}. High and low: the best and the "
                    "worst set of body parts with as many joints. ±: standard deviation over runs.", rows)


# ---------------------------------------------------------------------------------------------- the report

PAGE = f"""body{{font:15px/1.5 {FONT};margin:0 auto;max-width:1000px;padding:20px;color:#222;background:#fff}}h1{{font-size:22px}}
h2{{font-size:15px;margin:0 0 8px}}main{{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:36px 28px}}
figure{{margin:0;break-inside:avoid}}figure:has(.wide){{grid-column:1/-1}}figure div{{overflow-x:auto}}svg{{max-width:100%;height:auto}}
.turn{{cursor:grab;touch-action:pan-y}}figcaption{{font-size:13px;color:#666;margin-top:6px}}
table{{border-collapse:collapse;font-size:13px}}td,th{{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid #8885}}
@media screen and (max-width:760px){{main{{grid-template-columns:minmax(0,1fr)}}.wide{{max-width:none}}}}
@media screen and (prefers-color-scheme:dark){{body{{color:#e4e4e4;background:#16181c}}figcaption{{color:#a5a5a5}}}}
@media print{{body{{padding:0}}}}"""
SCRIPT = f"""for (const cube of document.querySelectorAll(".turn")) {{
  let yaw = {YAW}, pitch = {PITCH}
  const place = ([x, y, z]) => [255 + 118 * (x * Math.cos(yaw) - y * Math.sin(yaw)),
    200 - 118 * (z * Math.cos(pitch) + (x * Math.sin(yaw) + y * Math.cos(yaw)) * Math.sin(pitch))].map(v => v.toFixed(1)).join(" ")
  cube.onpointerdown = e => cube.setPointerCapture(e.pointerId)
  cube.onpointermove = e => {{
    if (!e.buttons) return
    yaw += e.movementX / 120; pitch = Math.max(-1.5, Math.min(1.5, pitch + e.movementY / 120))
    for (const part of cube.querySelectorAll("[data-xyz]")) {{
      const at = part.dataset.xyz.split(" ").map(p => place(p.split(",").map(Number))), mark = part.dataset.mark
      if (part.tagName == "text") [part.attributes.x.value, part.attributes.y.value] = at[0].split(" ")
      else part.setAttribute("d", mark == "{LINE}" ? "M" + at.join("L") : at.map(p => "M" + p + mark).join(""))
    }}
  }}
}}"""


def main(argv=None):
    words = sys.argv[1:] if argv is None else list(argv)
    if words and not words[0].startswith("-"):
        words = ["--run", *words]
    settings, _ = parse(Settings, __doc__, words)
    folder, out = settings.run, settings.out or settings.run
    outputs, checkpoint, log = (read(os.path.join(folder, name)) for name in ("test_outputs.pt", "finetune.pt", "log.csv"))
    counts, train_counts, ids, names = outputs["counts"], outputs["train_counts"], [str(c) for c in outputs["classes"]], []
    if settings.class_names:
        with open(settings.class_names, encoding="utf-8-sig", errors="replace") as file:
            names = [name.strip() for name in file.read().rstrip().split("\n")]
        if len(names) != len(ids):
            raise Failure(f"{settings.class_names} has {len(names)} lines; expected {len(ids)}, a class name each, in the order of labels")
    labels = [f"{id} {name}" for id, name in zip(ids, names)] if names else [f"class {id}" for id in ids]
    short = labels if len(ids) <= 20 else ids  # what fits beside an axis
    compared = {folder: outputs} | ({settings.compare: read(os.path.join(settings.compare, "test_outputs.pt"))} if settings.compare else {})
    if any(not other["labels"].equal(outputs["labels"]) or other["classes"] != outputs["classes"] for other in compared.values()):
        raise Failure(f"{settings.compare} was tested on other sequences than {folder}; expected two runs on the same data")
    chosen = choose_classes(settings.classes, ids, names, train_counts, counts.sum(1), settings.seed)
    started = checkpoint["settings"]["ckpt"]
    pretraining = read_pretraining("" if settings.pretrained == "none" else settings.pretrained or started)

    rows = [[ids[c], int(train_counts[c]), int(counts[c].sum()), names[c] if names else ""] for c in chosen]
    figures = [*fig1(outputs, labels, settings.tsne, settings.seed),
               fig2({run: other["counts"] for run, other in compared.items()}, labels, short),
               fig3(train_counts, chosen, labels, short), fig4_confusion(counts, labels, short), *fig4_pca(outputs, chosen, labels),
               table("Table 1: the chosen classes", "Names: --class-names FILE." * (not names),
                     [["id", "training sequences", "test sequences", "name"], *rows])]
    figures += table2(settings.table) if settings.table else []
    if pretraining:
        figures.append(fig6(pretraining, settings.sequence, settings.seed))
        figures.append(training("training-pretrain", pretraining["log"]))
    figures.append(training("training-finetune", log))

    title = clean(f"SkeletonMAE: {folder}", 80)
    summary = clean(f"{outputs['summary']}; {f'pre-trained: {started}' if started else 'no pre-training'}", 300)
    body = "".join(f"<figure><h2>{head}</h2><div>{content}</div><figcaption>{clean(caption, 600)}</figcaption></figure>"
                   for _, head, caption, content in figures)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{PAGE}{STYLE}</style>'
    paper = f' xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style><rect class="paper" width="100%" height="100%"/>'
    files = {f"{name}.svg": svg.replace(">", paper, 1) for name, *_, svg in figures if name}  # alone they need what the page has
    stale = [f"{name}.svg" for name in FIGURES if f"{name}.svg" not in files and os.path.isfile(os.path.join(out, f"{name}.svg"))]
    done = f"{os.path.join(out, 'report.html')} and {len(files)} figures as .svg beside it"
    done += f"; removed what an earlier report left: {', '.join(stale)}" * bool(stale)
    files["report.html"] = (f'<!doctype html><html lang="en">{head}<h1>{title}</h1><p>{summary}</p><main>{body}</main>'
                            f"<script>{SCRIPT}</script></html>\n")
    for name, content in files.items():
        write_atomically(os.path.join(out, name), lambda file: file.write(content.encode()))
    for name in stale:
        os.remove(os.path.join(out, name))
    print(done)


if __name__ == "__main__":
    torch.set_num_threads(1)  # t-SNE's blocks are small: two threads beside other work wait for each other, 48 s instead of 1 s
    run(main, resumes=False)
