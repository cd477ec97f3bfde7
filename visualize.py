"""Draws what the supplement shows from what training left: one self-contained report.html and every figure as an .svg file.

    python visualize.py                                                # runs/finetune
    python visualize.py runs/finetune --compare runs/scratch           # with and without pre-training, class by class
    python visualize.py runs/finetune --classes 2,5,7 --class-names names.txt --no-tsne
    python visualize.py runs/finetune --table runs/*                   # masking strategies against accuracy

Reads finetune.pt, log.csv and test_outputs.pt of the run, and pretrain.pt and log.csv of the pre-training it started from.
Nothing imports this file. Figure numbers are those of the supplement; "P" marks the paper itself.
"""
import csv
import html
import math
import os
import shlex
import statistics
import sys
from dataclasses import dataclass

from data import Loader, brief, load  # before torch: it silences torch's one remark about numpy
from skeletonmae import SkeletonMAE, draw_mask
from train_pretrain import Failure, option, parse, read_checkpoint, run, write_atomically
import torch
from torch import Tensor


@dataclass
class Settings:
    run: str = option("runs/finetune", "run folder of train_finetune.py; may stand as a bare word, without --run")
    compare: str = option("", "a second run folder on the same test set, beside the first in Fig. 2")
    table: tuple = option((), "run folders for Table 2, with spaces, as in --table runs/*")
    pretrained: str = option("", "pre-training to draw; default: what the run started from; none: leave the reconstruction out")
    classes: tuple = option((), "ids or names of the classes in Fig. 4 and Table 1; default: five of the rarer half, drawn by --seed")
    class_names: str = option("", "text file with a class name a line, in the order of the labels")
    sequence: str = option("", "test sequence to reconstruct, its name or number from 0; default: drawn by --seed")
    seed: int = option(0, "seed of everything that is drawn", low=0)
    tsne: bool = option(True, "t-SNE in Fig. 1")
    out: str = option("", "folder for report.html and the .svg files; default: the run folder")


def as_flags(argv: list) -> list:
    """What `parse` knows, flags with one value each: a bare word becomes --run, --table's folders one value with commas."""
    flags, folders, flag = [], [], ""
    for word in argv:
        if word.startswith("-"):
            flags += [word] * (word != "--table")
            flag = "" if "=" in word or word in ("--tsne", "--no-tsne") else word  # it waits for a value
        elif flag == "--table":
            folders.append(word)
        else:
            flags, flag = flags + ["--run"] * (not flag) + [word], ""
    if flags.count("--run") > 1:
        raise Failure("one run folder is drawn at a time; a second goes after --compare, more after --table")
    return flags + ["--table", ",".join(folders)] * ("--table" in argv)


# ---------------------------------------------------------------------------------------------- reading

def read(folder: str, name: str, script: str, reader):
    """reader(path); a missing or broken file becomes a Failure that names the command which makes it."""
    path, command = os.path.join(folder, name), f"python {script}.py --out {shlex.quote(folder or '.')}"
    if not os.path.isfile(path):
        raise Failure(f"{path} is missing; make it with: {command}")
    try:
        return reader(path)
    except Exception as error:  # a damaged file can raise almost anything
        raise Failure(f"{path} cannot be used ({brief(error)}); make it anew with: {command}") from None


def read_outputs(path: str) -> dict:
    """What train_finetune.py knows about the test set, checked."""
    outputs = torch.load(path, map_location="cpu", weights_only=True)
    (N, K), labels = outputs["logits"].shape, outputs["labels"].long()
    if [len(outputs[key]) for key in ("features", "labels", "train_counts", "classes")] != [N, N, K, K] or not N:
        raise ValueError("its parts do not belong together")
    if not all(isinstance(outputs["metrics"][name], float) for name in ("top1", "top5", "mean_class")):
        raise ValueError("expected the metrics top1, top5 and mean_class")
    if labels.min() < 0 or labels.max() >= K or not (outputs["logits"].sum() + outputs["features"].sum()).isfinite():
        raise ValueError(f"expected labels from 0 to {K - 1} and finite logits and features")
    return outputs | {"features": outputs["features"].float(), "labels": labels}


def read_log(path: str) -> dict:
    """Columns of log.csv: name -> [(epoch, value)], cells left empty left out."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [(int(row["epoch"]), float(row[name])) for row in rows if row[name]] for name in rows[0]}


def read_run(folder: str) -> tuple:
    """(fine-tuned checkpoint, test outputs) of a run folder."""
    outputs = read(folder, "test_outputs.pt", "train_finetune", read_outputs)
    return read(folder, "finetune.pt", "train_finetune", lambda path: read_checkpoint(path, ("finetune",))), outputs


def read_pretraining(path: str) -> tuple:
    """The pre-training at `path`, or what a fine-tuned checkpoint there started from: (its folder, checkpoint or None)."""
    if path in ("", "none"):
        return "", None
    folder, name = os.path.split(path)
    script = "train_finetune" if name == "finetune.pt" else "train_pretrain"
    found = read(folder, name, script, lambda path: read_checkpoint(path, ("pretrain", "finetune")))
    return (folder, found) if found["kind"] == "pretrain" else read_pretraining(found["settings"]["ckpt"])


# ---------------------------------------------------------------------------------------------- numbers

def pca(x: Tensor, components: int) -> tuple:
    """Principal components of x (N, F): (coordinates (N, components), share of the variance each explains). Signs are fixed."""
    x = x - x.mean(0)
    _, scale, axes = torch.linalg.svd(x, full_matrices=False)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # the largest loading is positive
    share = scale.square() / scale.square().sum().clamp(min=1e-30)
    pad = (0, max(components - len(scale), 0))  # fewer sequences than components
    return tuple(torch.nn.functional.pad(v[..., :components], pad) for v in (x @ axes.T, share))


def affinities(x: Tensor, perplexity: float, steps: int = 40) -> Tensor:
    """p_j|i of t-SNE, (N, N): Gaussian rows whose precision is bisected until e^entropy is the perplexity."""
    x, rows = x - x.mean(0), []
    for first in range(0, len(x), 128):  # blocks stay in the cache
        part = x[first:first + 128]
        square = (part.square().sum(1, keepdim=True) + x.square().sum(1) - 2 * part @ x.T).clamp(min=0)
        scale = square.mean(1, keepdim=True).clamp(min=1e-12)
        square = (square / scale).diagonal_scatter(torch.full((len(part),), 1e9), first)  # nobody is a neighbour of itself
        square -= square.amin(1, keepdim=True)
        low, high, precision = torch.zeros_like(scale), torch.full_like(scale, math.inf), torch.ones_like(scale)
        for _ in range(steps):
            p = torch.exp(-precision * square)
            total = p.sum(1, keepdim=True)
            entropy = total.log() + precision * torch.linalg.vecdot(p, square)[:, None] / total
            flat = entropy > math.log(perplexity)
            low, high = torch.where(flat, precision, low), torch.where(flat, high, precision)
            precision = torch.where(high.isinf(), 2 * precision, (low + high) / 2)
        rows.append(p / total)
    return torch.cat(rows)


def tsne(x: Tensor, perplexity: float = 30.0, iterations: int = 750, early: int = 250, exaggeration: float = 12.0) -> tuple:
    """t-SNE of x (N, F) with the exact gradient (van der Maaten and Hinton 2008), started from PCA, hence without a seed. Returns
    (coordinates (N, 2), [(iteration, Kullback-Leibler divergence)], the perplexity, at most a third of N - 1)."""
    N, history = len(x), []
    perplexity = max(min(perplexity, (N - 1) / 3), 1.0)
    p = affinities(x, perplexity)
    p = (p + p.T).div_(2 * N).clamp_(min=1e-12)
    y = pca(x, 2)[0]
    y = 1e-4 * y / y[:, 0].std().clamp(min=1e-12)
    velocity, gain, rate = torch.zeros_like(y), torch.ones_like(y), max(N / exaggeration / 4, 50)
    for step in range(iterations + 1):
        if step % 50 == 0:
            q = torch.cdist(y, y).square_().add_(1).reciprocal_().fill_diagonal_(0)
            history.append((step, float((p * (p / (q / q.sum()).clamp_(min=1e-12)).log_()).sum())))
        pull, push, total, ones = [], [], -N, torch.ones(N, 1)  # the diagonal of the kernel sums to N
        square, weights = y.square().sum(1, keepdim=True), torch.cat([y, ones], 1).T.contiguous()
        left, right = torch.cat([-2 * y, square + 1, ones], 1), torch.cat([y, ones, square], 1)
        for p_rows, rows in zip(p.split(128), left.split(128)):  # blocks stay in the cache
            kernel = (rows @ right.T).clamp_(min=1).reciprocal_()  # 1 / (1 + |y_i - y_j|^2) by one matrix product
            total += float(kernel.sum())
            pull.append(torch.nn.functional.linear(p_rows * kernel, weights))  # (sum_j w_ij y_j, sum_j w_ij) at once
            push.append(torch.nn.functional.linear(kernel.square_(), weights))
        force = torch.cat(pull) * (exaggeration if step < early else 1) - torch.cat(push) / total
        gradient = 4 * (force[:, 2:] * y - force[:, :2])
        gain = torch.where(gradient * velocity < 0, gain + 0.2, gain * 0.8).clamp(min=0.01)
        velocity = (0.5 if step < early else 0.8) * velocity - rate * gain * gradient
        y = y + velocity * (step < iterations)
        y = y - y.mean(0)
    return y, history, perplexity


def confusion(labels: Tensor, predicted: Tensor, K: int) -> Tensor:
    """Counts (K, K): rows are the true classes, columns the predicted ones."""
    return torch.bincount(labels * K + predicted, minlength=K * K).view(K, K)


def class_accuracy(counts: Tensor) -> Tensor:
    """Accuracy of each class in percent, (K,); NaN for a class without test sequences."""
    return 100 * counts.diagonal() / counts.sum(1)


def choose_classes(wanted: tuple, ids: list, names: list, train_counts: Tensor, test_counts: Tensor, seed: int) -> list:
    """The classes asked for, or five drawn from the rarer half of those that the test set holds."""
    for word in wanted:
        if word not in ids + names:
            raise Failure(f"no class {word:.40}; ids run from {ids[0]} to {ids[-1]}")
    if wanted:
        return list(dict.fromkeys(ids.index(word) if word in ids else names.index(word) for word in wanted))
    tested = [c for c in train_counts.argsort(stable=True).tolist() if test_counts[c]]
    half = tested[:max(len(tested) // 2, 5)]
    return sorted(half[i] for i in torch.randperm(len(half), generator=torch.Generator().manual_seed(seed))[:5].tolist())


# ---------------------------------------------------------------------------------------------- drawing

POINTS = 3000  # at most so many in Fig. 1: t-SNE takes their square
FIGURES = ("fig1-pca", "fig1-tsne", "fig2-class-accuracy", "fig3-long-tail", "fig4-confusion", "fig4-pca2d", "fig4-pca3d",
           "paper-fig6-reconstruction", "training-pretrain", "training-finetune")  # what is left of an earlier report says so
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#777")  # Okabe and Ito: the colour-blind tell them apart
MARKS = ("h0", "m-3 0h6m-3-3v6", "m-2-2h4v4h-4z", "m0-3l3 5h-6z", "m-2-2l4 4m0-4l-4 4", "m0-3l3 3-3 3-3-3z")  # relative SVG paths
FONT = 'Helvetica,Arial,"Liberation Sans",sans-serif'
STYLE = f"""text{{font:12px {FONT};fill:#222}}.small{{font-size:10px}}.tiny{{font-size:8px}}.bold{{font-weight:bold}}
.mid{{text-anchor:middle}}.end{{text-anchor:end}}.halo{{stroke:#fff;stroke-width:3px;paint-order:stroke;stroke-linejoin:round}}
.paper,.on{{fill:#fff}}.grid{{stroke:#e2e2e2;fill:none}}.axis{{stroke:#777;fill:none}}.none{{fill:#e2e2e2}}.heat{{fill:#0072b2}}
.bone{{stroke:#222;fill:none;stroke-width:1.6}}.joint{{fill:#222}}.ring{{fill:none;stroke:#d55e00;stroke-width:1.4}}.ghost{{opacity:.35}}
.line{{fill:none;stroke-width:1.8}}.mark{{fill-opacity:.25;stroke-width:1.2}}.dash{{stroke-dasharray:5 3}}
.dot{{stroke-linecap:round;stroke-width:4.6}}{"".join(f".c{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(COLOURS))}
@media screen and (prefers-color-scheme:dark){{text,.joint{{fill:#e4e4e4}}.paper,.on{{fill:#16181c}}.halo{{stroke:#16181c}}
.grid{{stroke:#33373d}}.axis{{stroke:#8a8a8a}}.none{{fill:#33373d}}.heat{{fill:#56b4e9}}.bone{{stroke:#e4e4e4}}
.c0{{stroke:#3d9bd6}}.f0{{fill:#3d9bd6}}}}"""


@dataclass
class Figure:
    name: str       # of the .svg file
    title: str
    caption: str
    width: float
    height: float
    body: str
    turn: str = ""  # view of a 3D figure: yaw, pitch, size, centre

    def svg(self, alone: bool) -> str:
        """As a file of its own, or as a part of the page, which has the style and the script."""
        size = f'width="{n(self.width)}" height="{n(self.height)}"'
        extra = 'xmlns="http://www.w3.org/2000/svg"' if alone else f'data-turn="{self.turn}"' * bool(self.turn)
        paper = f'<style>{STYLE}</style><rect class="paper" {size}/>' * alone
        box = f'viewBox="0 0 {n(self.width)} {n(self.height)}" {size} role="img" aria-label="{self.title}"'
        return f"<svg {extra} {box}>{paper}{self.body}</svg>"


def clean(words, limit: int = 40) -> str:
    """Text from data, safe in HTML and SVG: unprintable characters replaced, clipped, escaped."""
    words = "".join(c if c.isprintable() else "\ufffd" for c in str(words))
    return html.escape(words if len(words) <= limit else words[:limit - 1].rstrip() + "…")


def n(value: float, digits: int = 1) -> str:
    """A short number for a path."""
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")


def text(x: float, y: float, words, style: str = "", limit: int = 60, turn: float = 0, extra: str = "") -> str:
    extra += f' transform="rotate({turn} {n(x)} {n(y)})"' * bool(turn)
    return f'<text x="{n(x)}" y="{n(y)}" class="{style}"{extra}>{clean(words, limit)}</text>'


def path(points, style: str, mark: str = "L", tip: str = "", extra: str = "") -> str:
    """A line through points (pixels), or with another mark that mark at each; `tip` shows on hover."""
    places = [f"{n(x)} {n(y)}" for x, y in points]
    d = "M" + "L".join(places) if mark == "L" else "".join(f"M{place}{mark}" for place in places)
    return f'<path class="{style}"{extra} d="{d}"><title>{tip}</title></path>' if places else ""


def rect(x: float, y: float, width: float, height: float, style: str, tip: str = "", extra: str = "") -> str:
    return path([(x, y)], style, f"h{n(width, 2)}v{n(height, 2)}h{n(-width, 2)}z", tip, extra)


def legend(entries: list, left: float, top: float, width: float, limit: int = 34) -> tuple:
    """entries: [(CSS class, mark, label)], in columns as wide as the labels need. Returns (svg, height)."""
    longest, body = min(max(len(label) for _, _, label in entries), limit), ""
    columns = min(max(int(width / (24 + 5.2 * longest)), 1), len(entries))
    for i, (style, mark, label) in enumerate(entries):
        x, y = left + i % columns * (width / columns), top + i // columns * 16
        body += path([(x + 6, y - 4)], style, mark) + text(x + 15, y, label, "small", limit)
    return body, 16 * -(-len(entries) // columns)


def class_legend(labels) -> list:
    """Entries for `legend`: 42 classes in a row differ in colour or shape."""
    shapes = [(i % 7, (i + i // 7) % 6, label) for i, label in enumerate(labels)]
    return [(f"c{colour} mark f{colour}" if shape else f"c{colour} dot", MARKS[shape], label) for colour, shape, label in shapes]


def ticks(low: float, high: float, least: float = 0) -> list:
    """At most seven round numbers from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 7))
    step = max(step * next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 7), least)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def below(xs: list, y: float, names: list) -> tuple:
    """Names under evenly spaced places: level where they fit, else slanted, upright or only some. Returns (svg, height)."""
    step, longest = xs[1] - xs[0] if len(xs) > 1 else 100, min(max(map(len, names)), 24)
    turn = 0 if 5.5 * longest < step else -60 if step > 12 else -90
    style, dx, dy = ("small " if step > 10 else "tiny ") + ("end" if turn else "mid"), 3.5 * bool(turn), 8 if turn else 14
    body = "".join(text(x + dx, y + dy, name, style, 24, turn) for x, name in list(zip(xs, names))[::math.ceil(7 / step)])
    return body, 8 + 4.6 * longest if turn else 18


class Panel:
    """A rectangle (pixels) with axes; `at` maps data to pixels."""

    def __init__(self, left: float, top: float, width: float, height: float, xs: list, ys: list, margin: float = 0.04):
        self.left, self.top, self.right, self.bottom, self.limits = left, top, left + width, top + height, []
        for low, high in ((min(xs), max(xs)), (min(ys), max(ys))):
            pad = (high - low) * margin if high > low else abs(high) * 0.5 or 1.0
            self.limits.append((low - pad, high + pad))

    def at(self, x: float, y: float) -> tuple:
        (x0, x1), (y0, y1) = self.limits
        return self.left + (x - x0) / (x1 - x0) * (self.right - self.left), self.bottom - (y - y0) / (y1 - y0) * (self.bottom - self.top)

    def level(self, y: float, style: str) -> str:
        return path([self.at(x, y) for x in self.limits[0]], style)

    def axes(self, xlabel: str, ylabel: str, xticks: list, yticks: list, space: float = 31) -> str:
        body = path([(self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)], "axis")
        for v in yticks:
            body += self.level(v, "grid") + text(self.left - 6, self.at(0, v)[1] + 3.5, f"{v:.6g}".replace("-", "−"), "small end")
        for v in xticks:
            x = self.at(v, 0)[0]
            body += path([(x, self.bottom), (x, self.bottom + 4)], "axis")
            body += text(x, self.bottom + 15, f"{v:.6g}".replace("-", "−"), "small mid")
        body += text((self.left + self.right) / 2, self.bottom + space, xlabel, "mid")
        return body + text(self.left - 42, (self.top + self.bottom) / 2, ylabel, "mid", turn=-90)


# ---------------------------------------------------------------------------------------------- figures

def pc_labels(share: Tensor) -> list:
    """Axes with the variance they explain."""
    return [f"PC {i + 1} ({100 * part:.1f} % of variance)" for i, part in enumerate(share.tolist())]


def scatter(name: str, title: str, caption: str, points: Tensor, groups: Tensor, labels: dict, axes: list, unit: bool = True) -> Figure:
    """points (N, 2) and their classes (N,); labels: class -> its name. More than 20 classes are labelled where they are."""
    panel, above, entries = Panel(58, 12, 410, 350, points[:, 0].tolist(), points[:, 1].tolist()), {}, class_legend(labels.values())
    body = panel.axes(*axes, *(ticks(*limits) if unit else [] for limits in panel.limits))
    for c, (style, mark, label) in zip(labels, entries):
        own = points[groups == c]
        body += path([panel.at(*point) for point in own.tolist()], style, mark, clean(label))
        if len(own) and len(labels) > 20:
            x, y = panel.at(*own.median(0).values.tolist())
            above.setdefault((x // 26, y // 13), text(x, y + 4, label.removeprefix("class ").split(" ")[0], "small bold mid halo", 8))
    if above:
        caption += " Numbers: class ids at the median of their sequences, where there is room."
    key, height = ("", -10) if above else legend(entries, 58, 418, 414)
    return Figure(name, title, caption, 480, 412 + height, body + "".join(above.values()) + key)


def fig1(outputs: dict, labels: list, with_tsne: bool, seed: int) -> list:
    features, classes, N = outputs["features"], outputs["labels"], len(outputs["labels"])
    kept = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:POINTS].sort().values
    shown = f"{len(kept):,} of {N:,} test sequences, drawn with seed {seed}" if N > POINTS else f"all {N:,} test sequences"
    common, (flat, share) = (classes[kept], {c: labels[c] for c in classes.unique().tolist()}), pca(features, 2)
    title, caption = "Fig. 1: features before the classifier, ", f"Principal components of all test features. Shown: {shown}."
    figures = [scatter("fig1-pca", title + "PCA", caption, flat[kept], *common, pc_labels(share))]
    if with_tsne and N > 4:
        print(f"t-SNE of {len(kept):,} sequences; --no-tsne leaves it out", flush=True)
        flat, history, perplexity = tsne(features[kept])
        end = f"{history[-1][0]} iterations, divergence {history[-1][1]:.2f}"
        caption = f"t-SNE, perplexity {perplexity:.3g}, {end}. Shown: {shown}. Axes have no unit."
        figures.append(scatter("fig1-tsne", title + "t-SNE", caption, flat, *common, ["t-SNE dimension 1", "t-SNE dimension 2"], False))
    return figures


def bars(values: list, styles: list, names: list, tips: list, limits: list, xlabel: str, ylabel: str) -> tuple:
    """Figs. 2 and 3. Returns (panel, svg, height)."""
    panel = Panel(64, 34, 880, 250, [0, len(values)], limits, 0)
    body, height = below([panel.at(i + 0.5, 0)[0] for i in range(len(values))], panel.bottom, names)
    body += panel.axes(xlabel, ylabel, [], ticks(*panel.limits[1], least=1), height + 14)
    for i, (value, style, tip) in enumerate(zip(values, styles, tips)):
        (x0, y0), (x1, y1) = panel.at(i + 0.13, max(value, 0)), panel.at(i + 0.87, min(value, 0))
        body += rect(x0, y0, x1 - x0, max(y1 - y0, 0.7), style, tip)
    return panel, body, panel.bottom + height + 24


def fig2(accuracies: dict, labels: list, short: list) -> Figure:
    """accuracies: run -> accuracy of each class (K,); the first run's are bars and give the order, the second's are dots."""
    values = [a - a.nanmean() for a in accuracies.values()]
    order = [c for c in values[0].argsort(descending=True, stable=True).tolist() if not values[0][c].isnan()]
    gaps = [gap[order].tolist() for gap in values]
    tips = [f"{clean(labels[c])}: " + ", ".join(f"{a[c]:.1f} %" for a in accuracies.values()) for c in order]
    reach = [min(map(min, gaps)) - 2, max(map(max, gaps)) + 2]
    panel, body, height = bars(gaps[0], ["f0"] * len(order), [short[c] for c in order], tips, reach, "class, sorted",
                               "accuracy − average, percentage points")
    body, entries = body + panel.level(0, "axis"), []
    for gap, (run, accuracy), style, mark in zip(gaps, accuracies.items(), ("c0", "c3"), ("m-3 0h6", "h0")):
        spread = torch.tensor(gap).std(correction=0).item()
        body += "".join(panel.level(s, f"{style} dash") for s in (spread, -spread) if reach[0] < s < reach[1])
        body += path([panel.at(i + 0.5, v) for i, v in enumerate(gap)], f"{style} dot", mark) if mark == "h0" else ""
        entries.append((f"{style} dot", mark, f"{run[-40:]}: average {accuracy.nanmean():.1f} %, spread ±{spread:.1f} points"))
    missing = len(labels) - len(order)
    caption = "Accuracy of each class minus the average over classes. Spread: standard deviation over classes, dashed." + \
        f" Left out: {missing} without test sequences." * bool(missing)
    body += legend(entries, 64, 18, 880, 90)[0]
    return Figure("fig2-class-accuracy", "Fig. 2: accuracy of each class against the average", caption, 960, height, body)


def fig3(train_counts: Tensor, chosen: list, labels: list, short: list) -> Figure:
    order = train_counts.argsort(descending=True, stable=True).tolist()
    tips, styles = [f"{clean(labels[c])}: {train_counts[c]}" for c in order], ["f3" if c in chosen else "f0 ghost" for c in order]
    _, body, height = bars(train_counts[order].tolist(), styles, [short[c] for c in order], tips,
                           [0, 1.1 * max(int(train_counts.max()), 1)], "class, most frequent first", "training sequences")
    body += legend([("c3 dot", "m-3 0h6", "classes of Fig. 4 and Table 1")], 64, 18, 880)[0]
    caption = f"Training sequences of {len(order)} classes, {int(train_counts.sum()):,} in all."
    return Figure("fig3-long-tail", "Fig. 3: long-tailed distribution of the training classes", caption, 960, height, body)


def fig4_confusion(counts: Tensor, labels: list, short: list) -> Figure:
    K, totals = len(counts), counts.sum(1)
    cell = min(52, (440 if K <= 20 else 720) / K)
    left, top, side = 40 + 5.2 * min(max(map(len, short)), 24), 14, cell * K
    numbers, body = "", rect(left, top, side, side, "grid")
    for i, j in counts.nonzero().tolist():
        count, share = int(counts[i, j]), float(counts[i, j] / totals[i])
        tip = f"{clean(labels[i], 30)}: {count} of {int(totals[i])} taken for {clean(labels[j], 30)} ({100 * share:.0f} %)"
        body += rect(left + j * cell, top + i * cell, cell, cell, "heat", tip, f' fill-opacity="{max(share, 0.06):.2f}"')
        if K <= 12:
            place = (left + (j + 0.5) * cell, top + (i + 0.5) * cell + 3.5)
            numbers += text(*place, f"{100 * share:.0f}", "small mid" + " on" * (share > 0.55))
    body, empty = body + numbers, (totals == 0).nonzero().flatten().tolist()
    body += "".join(rect(left, top + cell * i, side, cell, "none", f"{clean(labels[i])}: no test sequence") for i in empty)
    for i in range(0, K, math.ceil(7 / cell)):
        body += text(left - 5, top + (i + 0.5) * cell + 3.5, short[i], "end " + ("small" if cell > 10 else "tiny"), 24)
    names, height = below([left + (i + 0.5) * cell for i in range(K)], top + side, short)
    bottom = top + side + height
    body += names + text(left + side / 2, bottom + 14, "predicted class", "mid") + text(12, top + side / 2, "true class", "mid", turn=-90)
    for i in range(5):  # the key
        y = top + 15 * (4 - i)
        body += rect(left + side + 18, y, 12, 15, "heat", extra=f' fill-opacity="{max(i / 4, 0.06)}"')
        body += text(left + side + 36, y + 11, f"{25 * i} %" if i else "> 0 %", "small")
    caption = f"Share in percent of a true class's test sequences by predicted class; {int(totals.sum()):,} sequences, counts on hover." + \
        f" Grey: {len(empty)} without test sequences." * bool(empty)
    return Figure("fig4-confusion", "Fig. 4 left: confusion matrix", caption, left + side + 76, bottom + 24, body)


def fig4_pca(outputs: dict, chosen: list, labels: list) -> list:
    """2D and 3D PCA fitted to the chosen classes."""
    inside, names = torch.isin(outputs["labels"], torch.tensor(chosen)), {c: labels[c] for c in chosen}
    if not inside.any():
        raise Failure("the test set holds no sequence of the classes named; choose others with --classes")
    groups, (points, share) = outputs["labels"][inside], pca(outputs["features"][inside], 3)
    what, axes = "five classes" if len(chosen) == 5 else "the chosen classes", pc_labels(share)
    caption = f"Principal components of the features before the classifier, fitted to the {len(points)} test sequences of these classes"
    flat = scatter("fig4-pca2d", f"Fig. 4 middle: 2D PCA of {what}", caption + ".", points[:, :2], groups, names, axes[:2])
    centre = (points.amax(0) + points.amin(0)) / 2
    unit = (points - centre) / (points - centre).abs().amax(0).clamp(min=1e-9)  # the cube from -1 to 1
    yaw, pitch, size, cx, cy = 0.65, 0.42, 118, 255, 185

    def place(x, y, z):  # as the page's script does
        depth = x * math.sin(yaw) + y * math.cos(yaw)
        return cx + size * (x * math.cos(yaw) - y * math.sin(yaw)), cy - size * (z * math.cos(pitch) + depth * math.sin(pitch))

    def turning(corners):
        return f' data-xyz="{" ".join(",".join(n(v, 2) for v in corner) for corner in corners)}"'

    body, corners = "", [[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
    for edge in ((a, b) for a in corners for b in corners if a < b and sum(p != q for p, q in zip(a, b)) == 1):
        body += path([place(*c) for c in edge], "grid", extra=turning(edge))
    for end, label in zip(((0, -1.35, -1.15), (-1.35, 0, -1.15), (-1, 1, 1.12)), axes):
        body += text(*place(*end), label.replace(" of variance", ""), "small mid halo", extra=turning([end]))
    for c, (style, mark, label) in zip(names, entries := class_legend(names.values())):
        own = unit[groups == c].tolist()
        body += path([place(*p) for p in own], style, mark, clean(label), turning(own) + f' data-mark="{mark}"')
    key, height = legend(entries, 58, 418, 414)
    caption += "; each axis spans its range. Drag to turn."
    view = " ".join(map(str, (yaw, pitch, size, cx, cy)))
    return [flat, Figure("fig4-pca3d", f"Fig. 4 right: 3D PCA of {what}", caption, 480, 412 + height, body + key, view)]


def training(name: str, title: str, log: dict) -> Figure:
    """Loss, accuracy or joint error, and learning rate over epochs."""
    rows = {"loss": {"loss": "training loss"}, "accuracy, %": {"top1": "top-1", "top5": "top-5", "mean_class": "mean class"},
            "joint error, data units": {"joint_error": "reconstruction", "mean_pose_error": "mean pose", "neighbour_error": "neighbours"},
            "learning rate": {"lr": "learning rate"}}
    epochs, body, top = [epoch for epoch, _ in log["loss"]], "", 0
    for ylabel, series in rows.items():
        curves = [(label, log[key]) for key, label in series.items() if log.get(key)]
        if not curves:
            continue
        panel = Panel(64, top + 26, 396, 118, epochs, [v for _, curve in curves for _, v in curve], 0.06)
        body += panel.axes("epoch", ylabel, ticks(*panel.limits[0], least=1), ticks(*panel.limits[1]))
        body += legend([(f"line c{i}", "m-6 0h12", label) for i, (label, _) in enumerate(curves)], 64, top + 18, 396)[0]
        for i, (_, curve) in enumerate(curves):
            points = [panel.at(*point) for point in curve]
            body += path(points, f"line c{i}") + path(points, f"dot c{i}", "h0") * (len(points) <= 40)
        top += 186
    caption = f"From log.csv, {epochs[-1]} epochs; accuracy and joint error are those of the test set, where they were measured."
    return Figure(name, title, caption, 480, top, body)


def fig6(checkpoint: dict, wanted: str, seed: int) -> Figure:
    """P Fig. 6: a test sequence as it is, as the encoder sees it, and as it is reconstructed."""
    was, skeleton, C = checkpoint["settings"], checkpoint["skeleton"], checkpoint["channels"]
    try:
        data = load(*(was[key] or None for key in ("data", "split", "layout")), was["test_fraction"], was["synthetic_size"])
        model = SkeletonMAE(**checkpoint["model_settings"])
        model.load_state_dict(checkpoint["model"])
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise Failure(f"the pre-training cannot be drawn ({brief(error)}); make it anew with: python train_pretrain.py --out "
                      f"{shlex.quote(was['out'])}, or leave its figure out: --pretrained none") from None
    generator, names = torch.Generator().manual_seed(seed), data.test.names
    wanted = wanted or str(int(torch.randint(len(names), (1,), generator=generator)))
    if wanted not in names and not (wanted.isdecimal() and int(wanted) < len(names)):
        raise Failure(f"no test sequence {wanted:.60}; expected a number from 0 to {len(names) - 1} or a name such as {names[0]:.60}")
    chosen = names.index(wanted) if wanted in names else int(wanted)
    batch = next(iter(Loader(data.test.subset([chosen]), skeleton, C, 1, was["frames"], False).epoch()))
    mask = draw_mask(1, skeleton, **model.masking, generator=generator)
    guess, x, hidden = model.reconstruct(batch.x, batch.present, mask)[0][0], batch.x[0, ..., :C], mask[0]  # (M, T, V, C), (V,)
    known = (x != 0).flatten(2).any(2)[..., None].expand(x.shape[:3])                                        # (M, T, V): there and seen
    if batch.x.shape[-1] > C:
        known = known & (batch.x[0, ..., C] > 0)
    error = float((guess - x).norm(dim=-1)[known & hidden].sum() / (known & hidden).sum().clamp(min=1) * batch.unit)

    head, legs = (data.test.frames[::7, 0, skeleton["parts"].get(part, [0]), 1].mean() for part in ("head", "left_leg"))
    up = 1 if head > legs or head == legs and C == 3 else -1  # in images y points down
    frames = torch.linspace(0, x.shape[1] - 1, min(8, x.shape[1])).round().long()
    sideways = torch.tensor([0.9, 0.0, 0.44] if C == 3 else [1.0, 0.0])  # 3D is seen from 26 degrees to the side
    true, drawn = (torch.stack([v @ sideways, -up * v[..., 1]], -1)[:, frames] for v in (x, torch.where(hidden[:, None], guess, x)))
    known = known[:, frames]                                                                            # (M, 8, V); true (M, 8, V, 2)
    shown = true * known[..., None]
    centre = shown.sum((0, 2)) / known.sum((0, 2))[:, None].clamp(min=1)  # frames are centred sideways; a jump stays a jump
    centre[:, 1] = (shown[..., 1].amin() + shown[..., 1].amax()) / 2
    wide, tall = ((true - centre[:, None]) * known[..., None]).abs().amax((0, 1, 2)).clamp(min=1e-6).tolist()
    scale = min(49 / wide, 65 / tall)
    true, drawn = (((v - centre[:, None]) * scale).tolist() for v in (true, drawn))
    height, body = round(2 * tall * scale) + 22, ""
    titles = ("input", "masked: rings are hidden from the encoder", "reconstructed: hidden joints in blue, where they are in grey")
    for row, title in enumerate(titles):
        top = 20 + row * (height + 28)
        body += text(4, top - 4, title, "bold", 90)
        for f, frame in enumerate(frames.tolist()):
            people = "".join(person(row, true[m][f], drawn[m][f], known[m, f], hidden, skeleton["edges"])
                             for m in range(len(x)) if known[m, f].any())
            box = f'x="{116 * f + 4}" y="{top}" width="112" height="{height}" viewBox="-56 {-height / 2} 112 {height}"'
            body += f"<svg {box}>{people}</svg>"  # clips what flies off
            body += text(116 * f + 60, top + height + 12, f"frame {frame + 1}", "small mid") * (row == 2)
    what = "drawn at random" if was["mask_ratio"] or was["mask_num_parts"] else ", ".join(was["mask_parts"])
    caption = f"Test sequence {names[chosen]:.60}, {len(frames)} of {x.shape[1]} frames; {int(hidden.sum())} of {len(hidden)} joints " \
              f"masked ({what}). Mean error of its masked joints: {error:.3g} in the units of the data, " \
              f"{100 * error / float(batch.unit):.0f} % of the sequence's size (root mean square distance of its joints from its origin)."
    return Figure("paper-fig6-reconstruction", "Paper Fig. 6: input, masked, reconstructed", caption, 936, 3 * height + 96, body)


def person(row: int, true: list, drawn: list, known: Tensor, hidden: Tensor, edges: list) -> str:
    """One person in one frame, V places each; row 0: all of it, 1: what is visible, 2: the reconstruction over what it replaces."""
    def stick(places, there, bone, joint, radius=1.8):
        bones = "".join(path([places[i], places[j]], bone) for i, j in edges if there[i] and there[j])
        dots = (f'<circle class="{joint}" cx="{n(x)}" cy="{n(y)}" r="{radius}"/>' for (x, y), shown in zip(places, there) if shown)
        return bones + "".join(dots)

    if row == 0:
        return stick(true, known, "bone", "joint")
    visible = stick(true, known & ~hidden, "bone", "joint")
    if row == 1:
        return visible + "".join(f'<circle class="ring" cx="{n(x)}" cy="{n(y)}" r="3"/>' for (x, y), k in zip(true, known & hidden) if k)
    return stick(true, known, "bone ghost", "joint ghost") + stick(drawn, known | hidden, "line c0", "f0", 2.4) + visible


# ---------------------------------------------------------------------------------------------- tables

def section(title: str, content: str, caption: str, wide: bool) -> str:
    return f'<figure{" class=all" * wide}><h2>{title}</h2><div>{content}</div><figcaption>{clean(caption, 600)}</figcaption></figure>'


def table(title: str, caption: str, rows: list) -> str:
    """rows of cells, not yet escaped; the first is the head."""
    tags = ["th"] + ["td"] * len(rows)
    lines = "".join(f"<tr>{''.join(f'<{tag}>{clean(cell, 100)}</{tag}>' for cell in row)}</tr>" for tag, row in zip(tags, rows))
    return section(title, f"<table>{lines}</table>", caption, False)


def masking(checkpoint: dict | None) -> tuple:
    """(row of Table 2, number of masked joints, what is masked) of a pre-training."""
    if checkpoint is None:
        return "No pre-training", 0, ""
    was, parts, V = checkpoint["settings"], checkpoint["skeleton"]["parts"], len(checkpoint["skeleton"]["joints"])
    if was["mask_ratio"]:
        return "Random joints", round(was["mask_ratio"] * V), ""
    if was["mask_num_parts"]:
        joints = was["mask_num_parts"] * sum(map(len, parts.values())) / len(parts)
        return "Parts drawn per sequence", round(joints), f"{was['mask_num_parts']} parts"
    members = {joint for part in was["mask_parts"] for joint in parts[part]}
    return "Body parts", len(members), " ".join(f"V{i}" for i, part in enumerate(parts) if part in was["mask_parts"])


def table2(folders: tuple) -> list:
    """Masking strategies against accuracy, one table for each data set and protocol among the runs."""
    tables, found = [], {}  # (protocol, joints) -> {(row, masked joints): {what is masked: [accuracy of each run]}}
    for folder in folders:
        if not os.path.isfile(os.path.join(folder, "pretrain.pt")):  # runs/* holds pre-trainings too
            checkpoint, outputs = read_run(folder)
            was, (row, count, what) = checkpoint["settings"], masking(read_pretraining(checkpoint["settings"]["ckpt"])[1])
            protocol = f"{os.path.basename(was['data']) or 'built-in stick figures'} {was['split']}, {100 * was['label_fraction']:g} % " \
                       f"of the labels{', linear probe' * was['linear_probe']}"
            cells = found.setdefault((protocol, len(checkpoint["skeleton"]["joints"])), {})
            cells.setdefault((row, count), {}).setdefault(what, []).append(outputs["metrics"]["top1"])
    if not found:
        raise Failure("--table names no folder of train_finetune.py; make one with: python train_finetune.py --ckpt --out runs/finetune")
    for (protocol, V), cells in found.items():
        counts = sorted({count for _, count in cells})
        rows = [["Masked joints", *counts], ["Ratio", *(f"{100 * count / V:.0f} %" for count in counts)]]
        for row, tail, rank in (("No pre-training", "", 0), ("Random joints", "", 0), ("Body parts", ", high", 0),
                                ("Body parts", ", low", -1), ("Parts drawn per sequence", "", 0)):
            line = [row + tail]
            for count in counts:
                sets = sorted(((statistics.mean(v), what, v) for what, v in cells.get((row, count), {}).items()), reverse=True)
                mean, what, v = sets[rank] if len(sets) > -rank else (None, "", [])
                spread = f" ± {statistics.stdev(v):.1f} (n = {len(v)})" if len(v) > 1 else ""
                line.append(f"{mean:.1f}{spread} {what}" if v else "–")
            rows += [line] * (set(line[1:]) != {"–"})
        caption = f"Top-1 accuracy in percent; {protocol}. High and low: the best and the worst set of body parts with as many joints. " \
                  "±: standard deviation over runs."
        tables.append(table("Table 2: masking strategy against accuracy", caption, rows))
    return tables


# ---------------------------------------------------------------------------------------------- the report

PAGE = f"""body{{font:15px/1.5 {FONT};margin:0 auto;max-width:1000px;padding:20px;color:#222;background:#fff}}h1{{font-size:22px}}
h2{{font-size:15px;margin:0 0 8px}}main{{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:36px 28px}}
figure{{margin:0;break-inside:avoid}}figure.all{{grid-column:1/-1}}figure div{{overflow-x:auto}}svg{{max-width:100%;height:auto}}
svg[data-turn]{{cursor:grab;touch-action:pan-y}}figcaption{{font-size:13px;color:#666;margin-top:6px}}
table{{border-collapse:collapse;font-size:13px}}td,th{{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid #8885}}
@media screen and (max-width:760px){{main{{grid-template-columns:minmax(0,1fr)}}.all svg{{max-width:none}}}}
@media screen and (prefers-color-scheme:dark){{body{{color:#e4e4e4;background:#16181c}}figcaption{{color:#a5a5a5}}}}
@media print{{body{{padding:0}}}}"""
SCRIPT = """for (const svg of document.querySelectorAll("svg[data-turn]")) {
  let [yaw, pitch, size, cx, cy] = svg.dataset.turn.split(" ").map(Number), from = null
  const parts = [...svg.querySelectorAll("[data-xyz]")].map(e => [e, e.dataset.xyz.split(" ").map(p => p.split(",").map(Number))])
  const place = ([x, y, z]) => [cx + size * (x * Math.cos(yaw) - y * Math.sin(yaw)),
    cy - size * (z * Math.cos(pitch) + (x * Math.sin(yaw) + y * Math.cos(yaw)) * Math.sin(pitch))].map(v => v.toFixed(1))
  const draw = () => { for (const [e, points] of parts) {
    const p = points.map(place), mark = e.dataset.mark
    if (e.tagName == "text") { e.setAttribute("x", p[0][0]); e.setAttribute("y", p[0][1]) }
    else e.setAttribute("d", mark ? p.map(q => "M" + q.join(" ") + mark).join("") : "M" + p.map(q => q.join(" ")).join("L"))
  } }
  svg.onpointerdown = e => { from = [e.clientX, e.clientY]; svg.setPointerCapture(e.pointerId) }
  svg.onpointerup = svg.onpointercancel = () => { from = null }
  svg.onpointermove = e => { if (!from) return
    yaw += (e.clientX - from[0]) / 120; pitch = Math.max(-1.5, Math.min(1.5, pitch + (e.clientY - from[1]) / 120))
    from = [e.clientX, e.clientY]; draw() }
}"""


def main(argv=None):
    settings, _ = parse(Settings, __doc__, as_flags(sys.argv[1:] if argv is None else argv))
    folder, out = settings.run, settings.out or settings.run
    checkpoint, outputs = read_run(folder)
    log = read(folder, "log.csv", "train_finetune", read_log)
    K, ids, names = len(outputs["classes"]), [str(c) for c in outputs["classes"]], []
    if settings.class_names:
        with open(settings.class_names, encoding="utf-8", errors="replace") as file:
            names = [name.strip() for name in file.read().rstrip().split("\n")]
        if len(names) != K:
            raise Failure(f"{settings.class_names} has {len(names)} lines; expected {K}, a class name each, in the order of the labels")
    labels = [f"{id} {name}" for id, name in zip(ids, names)] if names else [f"class {id}" for id in ids]
    short = labels if K <= 20 else ids  # what fits beside an axis
    counts = confusion(outputs["labels"], outputs["logits"].argmax(1), K)
    accuracies = {folder: class_accuracy(counts)}
    if settings.compare:
        _, other = read_run(settings.compare)
        if not other["labels"].equal(outputs["labels"]):
            raise Failure(f"{settings.compare} was tested on other sequences than {folder}; expected two runs on the same data")
        accuracies[settings.compare] = class_accuracy(confusion(other["labels"], other["logits"].argmax(1), K))
    chosen = choose_classes(settings.classes, ids, names, outputs["train_counts"], counts.sum(1), settings.seed)
    started = checkpoint["settings"]["ckpt"]
    source = settings.pretrained if settings.pretrained not in ("", "none") else started
    draw = settings.pretrained != "none"  # without it a pre-training that is gone is no error
    home, pretraining = read_pretraining(source) if draw or os.path.isfile(source) else ("", None)

    rows = [[ids[c], int(outputs["train_counts"][c]), int(counts[c].sum()), names[c] if names else ""] for c in chosen]
    table1 = [["id", "training sequences", "test sequences", "name"], *rows]
    parts = [*fig1(outputs, labels, settings.tsne, settings.seed), fig2(accuracies, labels, short),
             fig3(outputs["train_counts"], chosen, labels, short), fig4_confusion(counts, labels, short),
             *fig4_pca(outputs, chosen, labels), table("Table 1: the chosen classes", "Names: --class-names FILE." * (not names), table1)]
    parts += table2(settings.table) if settings.table else []
    if pretraining:
        parts += [fig6(pretraining, settings.sequence, settings.seed)] if draw else []
        parts.append(training("training-pretrain", "Pre-training", read(home, "log.csv", "train_pretrain", read_log)))
    parts.append(training("training-finetune", "Fine-tuning", log))
    summary = "{top1:.2f} % top-1, {top5:.2f} % top-5, {mean_class:.2f} % mean class accuracy".format(**outputs["metrics"]) + \
        f" on {len(outputs['labels']):,} test sequences, {K} classes; " + (f"pre-trained: {started}" if started else "no pre-training")

    figures = [part for part in parts if isinstance(part, Figure)]
    files = {f"{part.name}.svg": part.svg(alone=True) for part in figures}
    old = Figure("", "no figure", "", 480, 40, text(12, 24, "Not drawn for the report beside this file."))
    stale = [f"{name}.svg" for name in FIGURES if os.path.isfile(os.path.join(out, f"{name}.svg"))]
    files = {name: old.svg(alone=True) for name in stale} | files
    body = "".join(part if isinstance(part, str) else section(part.title, part.svg(alone=False), part.caption, part.width > 500)
                   for part in parts)
    title = clean(f"SkeletonMAE: {folder}", 80)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{PAGE}{STYLE}</style>'
    page = f"<h1>{title}</h1><p>{clean(summary, 300)}</p><main>{body}</main><script>{SCRIPT}</script>"
    files["report.html"] = f'<!doctype html><html lang="en">{head}{page}</html>\n'
    for name, content in files.items():
        write_atomically(os.path.join(out, name), lambda file: file.write(content.encode()))
    print(f"{os.path.join(out, 'report.html')} and {len(figures)} figures as .svg beside it")


if __name__ == "__main__":
    torch.set_num_threads(1)  # t-SNE's blocks are small: two threads beside other work wait for each other, 48 s instead of 1 s
    run(main)
