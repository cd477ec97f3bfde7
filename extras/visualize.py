"""Draws the supplement's figures from what training left: a report.html and every figure as .svg.

    python -m extras.visualize                                  # runs/finetune
    python -m extras.visualize runs/finetune --compare runs/scratch  # another run beside it
    python -m extras.visualize runs/finetune --classes 2,5,7 --class-names names.txt --no-tsne
    python -m extras.visualize runs/finetune --table runs/*     # masking strategies and accuracy

Reads finetune.pt and test_outputs.pt of the run, and pretrain.pt of the pre-training it started
from. Figure numbers are the supplement's; Fig. 6 is the paper's. How lines and letters are drawn
is in drawing.py.
"""
import argparse
import math
import os
import shlex
import statistics
from contextlib import contextmanager

from data import DataError, Loader  # before torch: it silences its warning
from extras.drawing import (BAR, DOT, LINE, MARKS, RING, TEXT, Figure, Series, clean, cube,
                            figure, names_below, path, plot, rect, table, text, write_report)
from skeletonmae import SkeletonMAE, draw_mask
import train_pretrain as shared
import torch
from torch import Tensor


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m extras.visualize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", nargs="?", default="runs/finetune", help="run folder of train_finetune.py")
    add("--compare", metavar="RUN", help="a second run on the same test set, beside it in Fig. 2")
    add("--table", nargs="+", default=[], metavar="RUN", help="run folders for Table 2")
    add("--pretrained", metavar="FILE",
        help="pre-training to draw; default: what the run started from; none: leave it out")
    add("--classes", type=lambda text: text.split(","), default=[], metavar="A,B",
        help="ids or names for Fig. 4 and Table 1; default: five of the rarer half, drawn")
    add("--class-names", metavar="FILE", help="text file with a class name a line, in label order")
    add("--sequence", help="test sequence to reconstruct, name or number from 0; default: drawn")
    add("--seed", type=int, default=0, help="seed of everything that is drawn")
    add("--no-tsne", action="store_true", help="Fig. 1 without t-SNE")
    add("--out", help="folder for report.html and the .svg files; default: the run folder")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------ reading

@contextmanager
def reading(path: str, script: str):
    """Makes whatever a missing or foreign file raises one line with the command that makes it."""
    try:
        yield
    except Exception as error:  # a foreign file can raise almost anything
        state = f"cannot be used ({type(error).__name__}: {str(error).partition(chr(10))[0]:.200})"
        if isinstance(error, FileNotFoundError) and error.filename == path:
            state = "is missing"
        command = f"python {script}.py --out {shlex.quote(os.path.dirname(path) or '.')}"
        if script == "train_pretrain":
            command += ", or leave its figures out: --pretrained none"
        raise DataError(f"{path} {state}; make it with: {command}") from None


def read_outputs(folder: str) -> dict:
    """What train_finetune.py knows of N test sequences and K classes: logits (N, K), features
    (N, F), labels (N,), train_counts (K,), classes; and counts (K, K), the confusion matrix."""
    path = os.path.join(folder, "test_outputs.pt")
    score = "{top1:.2f} % top-1, {top5:.2f} % top-5, {mean_class:.2f} % mean class accuracy"
    with reading(path, "train_finetune"):
        outputs = torch.load(path, map_location="cpu", weights_only=True)
        outputs["labels"] = outputs["labels"].long()
        N, K = outputs["logits"].shape
        counts = confusion(outputs["labels"], outputs["logits"].argmax(1), K)
        summary = f"{score.format(**outputs['metrics'])} on {N:,} test sequences, {K} classes"
        return outputs | {"counts": counts, "summary": summary}


def read_checkpoint(path: str) -> dict:
    finetuned = path.endswith("finetune.pt")
    with reading(path, "train_finetune" if finetuned else "train_pretrain"):
        kinds = ("finetune",) if finetuned else ("pretrain", "finetune")
        return shared.read_checkpoint(path, kinds)


def read_pretraining(path: str) -> dict | None:
    """The pre-training at `path`, or what a fine-tuned checkpoint there started from."""
    seen = set()
    while path and path not in seen:  # a run fine-tuned again in its own folder names itself
        seen.add(path)
        checkpoint = read_checkpoint(path)
        if checkpoint["kind"] == "pretrain":
            return checkpoint
        path = checkpoint["settings"]["ckpt"]
    return None


# ------------------------------------------------------------------------------------ numbers

def pca(x: Tensor, components: int) -> tuple:
    """Principal components of x (N, F): (coordinates (N, components), share of the variance that
    each explains). Signs are fixed: the largest loading of each is positive."""
    x = x - x.mean(0)
    padded = torch.cat([x, x.new_zeros(components, x.shape[1])])  # N may be small
    _, scale, axes = torch.linalg.svd(padded, full_matrices=False)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    share = scale.square() / scale.square().sum().clamp(min=1e-30)
    return x @ axes[:components].T, share[:components]


def affinities(x: Tensor, perplexity: float) -> Tensor:
    """p_j|i of t-SNE, (N, N): Gaussian rows whose log precision is bisected until e^entropy is the
    perplexity."""
    square = torch.cdist(x, x).square_()
    square = square / square.mean().clamp(min=1e-12)
    square.fill_diagonal_(math.inf)  # nobody is a neighbour of itself
    low = torch.full((len(x), 1), -10.0)
    high = torch.full((len(x), 1), 30.0)
    for _ in range(40):
        middle = (low + high) / 2
        p = torch.softmax(-middle.exp() * square, 1)
        flat = torch.special.entr(p).sum(1, keepdim=True) > math.log(perplexity)
        low = torch.where(flat, middle, low)
        high = torch.where(flat, high, middle)
    return p


def tsne(x: Tensor, perplexity: float = 30.0, iterations: int = 750, early: int = 250) -> tuple:
    """t-SNE of x (N, F) with the exact gradient (van der Maaten and Hinton 2008), started from PCA,
    hence without a seed; in the `early` iterations p is exaggerated. Returns (coordinates (N, 2),
    Kullback-Leibler divergence every 50 iterations)."""
    N = len(x)
    p = affinities(x, perplexity)
    p = (p + p.T).div_(2 * N).clamp_(min=1e-12)
    y = pca(x, 2)[0]
    y = 1e-4 * y / y[:, 0].std().clamp(min=1e-12)
    velocity = torch.zeros_like(y)
    gain = torch.ones_like(y)
    rate = max(N / 48, 50)
    history = []
    for step in range(iterations + 1):
        columns = torch.cat([y.T, torch.ones(1, N)])  # one product: sum_j w_ij y_j and sum_j w_ij
        pull = []
        push = []
        total = -N  # kernels of a point with itself do not count
        divergence = 0.0
        for p_rows, y_rows in zip(p.split(128), y.split(128)):
            dx = y_rows[:, :1] - columns[0]
            dy = y_rows[:, 1:] - columns[1]
            kernel = dx.square_().add_(dy.square_()).add_(1).reciprocal_()  # 1 / (1 + |yi - yj|²)
            if step % 50 == 0:
                divergence += float((p_rows * (p_rows / kernel).log()).sum())
            total += float(kernel.sum())
            pull.append(torch.nn.functional.linear(p_rows * kernel, columns))
            push.append(torch.nn.functional.linear(kernel.square_(), columns))
        if step % 50 == 0:
            history.append(divergence + math.log(total))
        if step == iterations:
            return y, history
        force = torch.cat(pull) * (12 if step < early else 1) - torch.cat(push) / total
        gradient = 4 * (force[:, 2:] * y - force[:, :2])
        gain = torch.where(gradient * velocity < 0, gain + 0.2, gain * 0.8).clamp(min=0.01)
        velocity = (0.5 if step < early else 0.8) * velocity - rate * gain * gradient
        y = y + velocity
        y = y - y.mean(0)


def confusion(labels: Tensor, predicted: Tensor, K: int) -> Tensor:
    """Counts (K, K): rows are the true classes, columns the predicted ones."""
    return torch.bincount(labels * K + predicted, minlength=K * K).view(K, K)


def choose_classes(wanted: list, ids: list, names: list, outputs: dict, seed: int) -> list:
    """The classes asked for, or five drawn from the rarer half of those that the test set holds."""
    for word in wanted:
        if word not in ids + names:
            raise DataError(f"no class {word}; ids run from {ids[0]} to {ids[-1]}")
    if wanted:
        return list(dict.fromkeys((ids + names).index(word) % len(ids) for word in wanted))
    rarest_first = outputs["train_counts"].argsort(stable=True).tolist()
    tested = [c for c in rarest_first if outputs["counts"][c].any()]
    half = tested[:max(len(tested) // 2, 5)]
    order = torch.randperm(len(half), generator=torch.Generator().manual_seed(seed))
    return sorted(half[i] for i in order[:5].tolist())


# ------------------------------------------------------------------------------------ figures

POINTS = 3000  # at most so many in Fig. 1: t-SNE takes their square


def scatter(name: str, caption: str, points: Tensor, classes: Tensor, names: dict,
            share: Tensor | None = None) -> Figure:
    """points (N, 2), or (N, 3) in the cube from -1 to 1, and their classes (N,); names: class ->
    its name; share: see `pca`."""
    labels = ["t-SNE dimension 1 (no unit)", "t-SNE dimension 2 (no unit)"]
    if share is not None:
        labels = [f"PC {i} ({100 * part:.1f} % of variance)"
                  for i, part in enumerate(share.tolist(), 1)]
    low, high = points.amin(0), points.amax(0)
    series = []
    ids = {}  # of more classes than a legend holds: cell of a 20 x 20 grid -> the id shown there
    for i, (c, label) in enumerate(names.items()):
        own = points[classes == c]
        colour = i % 7
        mark = MARKS[(i + i // 7) % 6]  # 42 classes in a row differ in colour or mark
        style = f"c{colour} dot" if mark == DOT else f"c{colour} mark f{colour}"
        in_legend = label if len(names) <= 20 else ""
        series.append(Series(own.tolist(), style, mark, in_legend, clean(label)))
        if len(names) > 20 and len(own):
            middle = own.median(0).values
            cell = tuple(((middle - low) / (high - low) * 20).int().tolist())
            id = label.removeprefix("class ").split(" ")[0]
            ids.setdefault(cell, Series([middle.tolist()], "small bold mid halo", TEXT, tip=id))
    if ids:
        caption += " Numbers: class ids, where there is room; others show on hover."
    on_axes = cube if points.shape[1] == 3 else plot
    body, height = on_axes([*series, *ids.values()], *labels)
    return figure(name, caption, 480, height, body)


def fig1(outputs: dict, names: list, with_tsne: bool, seed: int):
    """PCA and, if asked for, t-SNE of the features before the classifier."""
    features, labels = outputs["features"], outputs["labels"]
    N = len(labels)
    kept = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:POINTS].sort().values
    shown = f"all {N:,} test sequences."
    if N > POINTS:
        shown = f"{len(kept):,} of {N:,} test sequences, drawn with seed {seed}."
    tested = {c: names[c] for c in labels.unique().tolist()}
    flat, share = pca(features, 2)
    yield scatter("fig1-pca", f"Principal components of all test features. Shown: {shown}",
                  flat[kept], labels[kept], tested, share)
    if with_tsne and N >= 10:  # fewer have no neighbourhoods to keep
        print(f"t-SNE of {len(kept):,} sequences; --no-tsne leaves it out", flush=True)
        perplexity = min(30, (len(kept) - 1) / 3)
        flat, divergence = tsne(features[kept], perplexity)
        yield scatter("fig1-tsne", f"t-SNE of {shown} Perplexity {perplexity:.3g}, "
                      f"divergence {divergence[-1]:.2f}.", flat, labels[kept], tested)


def fig2(counts: dict, names: list, short: list) -> Figure:
    """counts: run -> its confusion matrix (K, K). The first run's accuracies are bars and give the
    order, the second's are dots. A class without test sequences has no accuracy."""
    accuracies = {run: 100 * c.diagonal() / c.sum(1) for run, c in counts.items()}  # (K,) or NaN
    gaps = [a - a.nanmean() for a in accuracies.values()]
    order = [c for c in gaps[0].argsort(descending=True, stable=True).tolist()
             if not gaps[0][c].isnan()]
    tips = [f"{clean(names[c])}: " + ", ".join(f"{a[c]:.1f} %" for a in accuracies.values())
            for c in order]
    first, end = -0.5, len(order) - 0.5
    looks = (("f0", "c0", BAR, tips), ("c3 dot", "c3", DOT, ""))
    series = []
    for run, gap, (style, colour, mark, tip) in zip(accuracies, gaps, looks):
        gap = gap[order].tolist()
        spread = statistics.pstdev(gap)
        average = accuracies[run].nanmean()
        label = f"{run[-40:]}: average {average:.1f} %, spread ±{spread:.1f} points"
        series.append(Series(list(enumerate(gap)), style, mark, label, tip))
        for level in (spread, -spread):
            series.append(Series([(first, level), (end, level)], f"{colour} dash", LINE))
    series.append(Series([(first, 0), (end, 0)], "axis", LINE))
    body, height = plot(series, "class, sorted", "accuracy − average, percentage points", 0, 960,
                        250, names=[short[c] for c in order])
    caption = ("Accuracy of each class minus the average over classes. "
               "Spread: standard deviation over classes, dashed.")
    if len(order) < len(names):
        caption += f" Left out: {len(names) - len(order)} without test sequences."
    return figure("fig2-class-accuracy", caption, 960, height, body)


def fig3(train_counts: Tensor, chosen: list, names: list, short: list) -> Figure:
    """Training sequences of each class, (K,), the chosen classes marked."""
    order = train_counts.argsort(descending=True, stable=True).tolist()
    series = []
    for label, style, marked in (("classes of Fig. 4 and Table 1", "f3", True),
                                 ("other classes", "f0 ghost", False)):
        places = [i for i, c in enumerate(order) if (c in chosen) == marked]
        points = [(i, int(train_counts[order[i]])) for i in places]
        tips = [f"{clean(names[order[i]])}: {count}" for i, count in points]
        if points:
            series.append(Series(points, style, BAR, label, tips))
    body, height = plot(series, "class, most frequent first", "training sequences", 0, 960, 250,
                        (1, 1), [short[c] for c in order])
    caption = f"Training sequences of {len(order)} classes, {int(train_counts.sum()):,} in all."
    return figure("fig3-long-tail", caption, 960, height, body)


def fig4_confusion(counts: Tensor, names: list, short: list) -> Figure:
    """counts (K, K), row-normalised: true classes down, predicted ones across."""
    K = len(counts)
    totals = counts.sum(1).tolist()
    cell = min(52, (440 if K <= 20 else 720) / K)
    left, top = 40 + 5.2 * min(max(map(len, short)), 24), 14
    side = cell * K
    below, height = names_below([left + (i + 0.5) * cell for i in range(K)], top + side, short)
    body = rect(left, top, side, side, "grid") + below
    numbers = ""  # above all cells
    for i, total in enumerate(totals):
        y = top + i * cell
        if i % math.ceil(7 / cell) == 0:
            size = "end small" if cell > 10 else "end tiny"
            body += text(left - 5, y + cell / 2 + 3.5, short[i], size, 24)
        if total == 0:
            body += rect(left, y, side, cell, "none", f"{clean(names[i])}: no test sequence")
        for j in counts[i].nonzero().flatten().tolist():
            x = left + j * cell
            share = float(counts[i, j]) / total
            tip = (f"{clean(names[i], 30)}: {counts[i, j]} of {total} taken for "
                   f"{clean(names[j], 30)} ({100 * share:.0f} %)")
            opacity = f' fill-opacity="{max(share, 0.06):.2f}"'
            body += rect(x, y, cell, cell, "heat", tip, opacity)
            if K <= 12:
                style = "small mid on" if share > 0.55 else "small mid"
                middle = x + cell / 2, y + cell / 2 + 3.5
                numbers += text(*middle, f"{100 * share:.0f}", style)
    for i, words in enumerate(("> 0 %", "25 %", "50 %", "75 %", "100 %")):  # the key
        opacity = f' fill-opacity="{max(i / 4, 0.06)}"'
        body += rect(left + side + 18, top + 60 - 15 * i, 12, 15, "heat", extra=opacity)
        body += text(left + side + 36, top + 71 - 15 * i, words, "small")
    body += text(left + side / 2, top + side + height + 14, "predicted class", "mid")
    body += text(16, top + side / 2, "true class", "mid", turn=-90) + numbers
    caption = ("Share in percent of a true class's test sequences by predicted class; "
               f"{sum(totals):,} sequences, counts on hover.")
    if 0 in totals:
        caption += f" Grey: {totals.count(0)} without test sequences."
    return figure("fig4-confusion", caption, left + side + 76, top + side + height + 24, body)


def fig4_pca(outputs: dict, chosen: list, names: list) -> list:
    """2D and 3D PCA of the features before the classifier, fitted to the chosen classes."""
    inside = torch.isin(outputs["labels"], torch.tensor(chosen))
    if not inside.any():
        raise DataError("the test set holds no sequence of these classes; expected other --classes")
    labels = outputs["labels"][inside]
    shown = {c: names[c] for c in chosen}
    points, share = pca(outputs["features"][inside], 3)
    caption = ("Principal components of the features before the classifier, fitted to the "
               f"{len(points)} test sequences of these classes")
    low, high = points.amin(0), points.amax(0)
    in_cube = 2 * (points - low) / (high - low).clamp(min=1e-9) - 1
    return [scatter("fig4-pca2d", caption + ".", points[:, :2], labels, shown, share[:2]),
            scatter("fig4-pca3d", caption + "; each axis spans its range. Drag to turn.", in_cube,
                    labels, shown, share)]


def training(name: str, log: list) -> Figure:
    """Loss, accuracy or joint error, and learning rate over epochs, a panel each; log: a dict for
    every epoch."""
    panels = {"loss": {"loss": "training loss"},
              "accuracy, %": {"top1": "top-1", "top5": "top-5", "mean_class": "mean class"},
              "joint error, data units": {"joint_error": "reconstruction",
                                          "mean_pose_error": "mean pose",
                                          "neighbour_error": "neighbours"},
              "learning rate": {"lr": "learning rate"}}
    body = ""
    height = 0
    for y_label, columns in panels.items():
        series = []
        for i, (column, words) in enumerate(columns.items()):
            points = [(row["epoch"], row[column]) for row in log if column in row]
            if points:
                series.append(Series(points, f"line c{i}", LINE, words))
        if series:
            level = series[0].points[0][1]
            all_epochs = [(row["epoch"], level) for row in log]  # unseen: panels span all epochs
            series.append(Series(all_epochs, ""))
            panel, height = plot(series, "epoch", y_label, height, tall=118, least=(1, 0))
            body += panel
    caption = (f"From the log, {len(log)} epochs; accuracy and joint error are the test set's, "
               "where measured.")
    return figure(name, caption, 480, height, body)


def reconstruct(checkpoint: dict, wanted: str | None, seed: int) -> tuple:
    """Of a test sequence: its name, its joints x and what the pre-trained model makes of them
    (M, T, V, C) in the units of the data, which are known (M, T, V) and which masked (T, V), and
    whether y grows upwards."""
    settings, skeleton, C = checkpoint["settings"], checkpoint["skeleton"], checkpoint["channels"]
    with reading(os.path.join(settings["out"], "pretrain.pt"), "train_pretrain"):
        data = shared.read_data(shared.Settings(**settings), lambda *_: None, checkpoint)
        model = SkeletonMAE(**checkpoint["model_settings"]).eval()
        model.load_state_dict(checkpoint["model"])
    generator = torch.Generator().manual_seed(seed)
    names = data.test.names
    if wanted is None:
        wanted = str(int(torch.randint(len(names), (1,), generator=generator)))
    numbers = [str(i) for i in range(len(names))]
    if wanted not in names + numbers:
        raise DataError(f"no test sequence {wanted}; expected a number from 0 to "
                        f"{len(names) - 1} or a name such as {names[0]}")
    chosen = (names + numbers).index(wanted) % len(names)
    frames = settings["frames"]
    half = data.test.subset([chosen])
    loader = Loader(half, skeleton, C, 1, frames, view=shared.view(shared.Settings(**settings)))
    batch = next(iter(loader.epoch()))
    mask = model.draw(1, frames, generator)
    guess = model.reconstruct(batch.x, batch.present, mask)[0][0]
    x = batch.x[0, ..., :C]
    known = batch.seen[0]
    head, leg = (float(data.test.frames[::7, 0, skeleton["parts"].get(part, [0]), 1].mean())
                 for part in ("head", "left_leg"))
    upwards = head > leg or head == leg and C == 3  # equal: there are no such parts
    masked = mask[0].expand(frames, -1)
    return names[chosen], x * batch.unit, guess * batch.unit, known, masked, upwards


def fig6(checkpoint: dict, wanted: str | None, seed: int) -> Figure:
    """Paper Fig. 6: eight frames of a test sequence as it is, as the encoder sees it, and as it is
    reconstructed. A person is looked at from a little to the side where there is depth."""
    name, x, guess, known, masked, upwards = reconstruct(checkpoint, wanted, seed)
    M, T, V, C = x.shape
    if not known.any():
        raise DataError(f"test sequence {name} has no joint to draw; expected another --sequence")
    hidden = known & masked
    error = float((guess - x).norm(dim=-1)[hidden].sum() / hidden.sum().clamp(min=1))
    size = float(x[known].square().sum(-1).mean().sqrt().clamp(min=1e-9))

    frames = torch.linspace(0, T - 1, min(8, T)).round().long()
    down = -1.0 if upwards else 1.0  # y grows downwards on a page
    view = torch.tensor([[0.9, 0], [0, down], [0.44, 0]] if C == 3 else [[1.0, 0], [0, down]])
    true = (x @ view)[:, frames]                                            # (M, 8, V, 2)
    guess = (torch.where(masked[..., None], guess, x) @ view)[:, frames]
    known, masked = known[:, frames], masked[frames]                        # (M, 8, V), (8, V)
    low = true.masked_fill(~known[..., None], math.inf).amin((0, 2))        # (8, 2)
    high = true.masked_fill(~known[..., None], -math.inf).amax((0, 2))
    low[:, 1], high[:, 1] = low[:, 1].amin(), high[:, 1].amax()  # centred sideways only
    scale = float((torch.tensor([98, 130]) / (high - low).amax(0).clamp(min=1e-6)).amin())
    middle = (low + high)[:, None] / 2
    true, guess = ((v - middle) * scale for v in (true, guess))

    def stick(places: Tensor, shown: Tensor, style: str) -> str:
        """One person in one frame: V places, and which of them to draw."""
        bones = [(i, j) for i, j in checkpoint["skeleton"]["edges"]
                 if shown[i] and shown[j] and style != "ring"]
        mark = RING if style == "ring" else DOT
        return ("".join(path(places[[i, j]].tolist(), f"bone {style}") for i, j in bones)
                + path(places[shown].tolist(), f"joint {style}", mark))

    visible = known & ~masked
    guessed = known | known.any(2, keepdim=True) & masked
    rows = {"input": [(true, known, "")],
            "masked: rings are hidden from the encoder":
                [(true, visible, ""), (true, known & masked, "ring")],
            "reconstructed: masked joints in blue, where they are in grey":
                [(true, known, "ghost"), (guess, guessed, "c0"), (true, visible, "")]}
    height = round(scale * float(high[0, 1] - low[0, 1])) + 22
    body = ""
    for row, (title, layers) in enumerate(rows.items()):
        top = 20 + row * (height + 28)
        body += text(4, top - 4, title, "bold", 90)
        for f, frame in enumerate(frames.tolist()):
            people = "".join(stick(places[m, f], shown[m, f], style)
                             for m in range(M) for places, shown, style in layers)
            body += (f'<svg x="{116 * f + 4}" y="{top}" width="112" height="{height}" '
                     f'viewBox="-56 {-height / 2} 112 {height}">{people}</svg>')
            if row == 2:
                body += text(116 * f + 60, top + height + 12, f"frame {frame + 1}", "small mid")

    least, most = (int(bound) for bound in masked.sum(1).aminmax())
    count = f"{least} to {most}" if least < most else most  # segments may have own masks
    masking = checkpoint["model_settings"]
    what = "drawn at random"
    if not masking["mask_ratio"] and not masking["mask_num_parts"]:
        what = ", ".join(masking["mask_parts"])
    caption = (f"Test sequence {name:.60}, {len(frames)} of {T} frames; {count} of {V} joints "
               f"masked ({what}). Mean error of its masked joints: {error:.3g} in the units of the "
               f"data, {100 * error / size:.0f} % of the sequence's size (root mean square "
               "distance of its joints from its origin).")
    return figure("paper-fig6-reconstruction", caption, 936, 3 * height + 96, body)


# ------------------------------------------------------------------------------------ tables

def masking_of(source: dict | None) -> tuple:
    """How a pre-training masks: (its row of Table 2, masked joints, which body parts)."""
    if source is None:
        return "No pre-training", 0, ""
    skeleton = source["skeleton"]
    settings = source["model_settings"]
    masking = {key: settings[f"mask_{key}"] for key in ("parts", "num_parts", "ratio")}
    masks = draw_mask(1000, skeleton, **masking, generator=torch.Generator().manual_seed(0))
    row = "Body parts"
    what = " ".join(f"V{i}" for i, part in enumerate(skeleton["parts"]) if part in masking["parts"])
    if masking["ratio"]:
        row, what = "Random joints", ""
    elif masking["num_parts"]:
        row, what = "Parts drawn per sequence", ""
    if settings.get("strl"):
        what += " (STRL layers too)"
    return row, round(float(masks.sum()) / len(masks)), what


def table2(folders: list):
    """Masking strategy against accuracy, one table for each data set and protocol of the runs."""
    tables = {}  # (protocol, joints, test labels) -> {(row, masked joints): {parts: [top-1s]}}
    for folder in folders:
        held = {name for name in ("pretrain.pt", "finetune.pt", "test_outputs.pt")
                if os.path.isfile(os.path.join(folder, name))}
        if "pretrain.pt" in held or held == {"test_outputs.pt"}:  # pre-trained, or --eval-only
            continue
        outputs = read_outputs(folder)
        checkpoint = read_checkpoint(os.path.join(folder, "finetune.pt"))
        settings = checkpoint["settings"]
        row, count, what = masking_of(read_pretraining(settings["ckpt"]))
        data = os.path.basename(settings["data"]) or "built-in stick figures"
        protocol = f"{data} {settings['split']}".rstrip()
        protocol += f", {100 * settings['label_fraction']:g} % of the labels"
        if settings["linear_probe"]:
            protocol += ", linear probe"
        joints = len(checkpoint["skeleton"]["joints"])
        labels = tuple(outputs["labels"].tolist())  # other sets can have the same name
        cells = tables.setdefault((protocol, joints, labels), {})
        cells.setdefault((row, count), {}).setdefault(what, []).append(outputs["metrics"]["top1"])
    if not tables:
        raise DataError("--table names no folder of train_finetune.py; make one with: "
                        "python train_finetune.py --ckpt --out runs/finetune")

    def cell(sets: dict, pick) -> str:
        """The best or worst set of masked parts, over its runs."""
        mean, what, runs = pick((statistics.mean(runs), what, runs) for what, runs in sets.items())
        if len(runs) == 1:
            return f"{mean:.1f} {what}"
        return f"{mean:.1f} ± {statistics.stdev(runs):.1f} (n = {len(runs)}) {what}"

    for (protocol, joints, _), cells in tables.items():
        counts = sorted({count for _, count in cells})
        rows = [["Masked joints", *counts],
                ["Ratio", *(f"{100 * count / joints:.0f} %" for count in counts)]]
        for title, pick in (("No pre-training", max), ("Random joints", max),
                            ("Body parts, high", max), ("Body parts, low", min),
                            ("Parts drawn per sequence", max)):
            found = [cells.get((title.partition(",")[0], count)) for count in counts]
            if any(found):
                rows.append([title, *(cell(sets, pick) if sets else "–" for sets in found)])
        caption = (f"Top-1 accuracy in percent; {protocol}. High and low: the best and the worst "
                   "set of body parts with as many joints. ±: standard deviation over runs.")
        yield table("Table 2: masking strategy against accuracy", caption, rows)


# ------------------------------------------------------------------------------------ the command

def read_class_names(path: str | None, K: int) -> list:
    """A name for each of K classes, or an empty list without a file."""
    if not path:
        return []
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        names = [name.strip() for name in file.read().rstrip().split("\n")]
    if len(names) != K:
        raise DataError(f"{path} has {len(names)} lines; expected {K}, a class name each")
    return names


def main(argv=None):
    asked = parse(argv)
    outputs = read_outputs(asked.run)
    checkpoint = read_checkpoint(os.path.join(asked.run, "finetune.pt"))
    counts = outputs["counts"]  # (K, K)
    train_counts = outputs["train_counts"]
    ids = [str(id) for id in outputs["classes"]]
    names = read_class_names(asked.class_names, len(ids))
    labels = [f"{id} {name}" for id, name in zip(ids, names)] or [f"class {id}" for id in ids]
    short = labels if len(ids) <= 20 else ids  # what fits beside an axis
    compared = {asked.run: counts}
    if asked.compare:
        other = read_outputs(asked.compare)
        same = other["labels"].equal(outputs["labels"]) and other["classes"] == outputs["classes"]
        if not same:
            raise DataError(f"{asked.compare} was tested on other sequences than {asked.run}; "
                            "expected two runs on the same data")
        compared[asked.compare] = other["counts"]
    chosen = choose_classes(asked.classes, ids, names, outputs, asked.seed)
    started = checkpoint["settings"]["ckpt"]
    pretraining = None
    if asked.pretrained != "none":
        pretraining = read_pretraining(asked.pretrained or started)

    figures = [*fig1(outputs, labels, not asked.no_tsne, asked.seed),
               fig2(compared, labels, short),
               fig3(train_counts, chosen, labels, short),
               fig4_confusion(counts, labels, short),
               *fig4_pca(outputs, chosen, labels)]
    rows = [["id", "training sequences", "test sequences", "name"]]
    for c in chosen:
        rows.append([ids[c], int(train_counts[c]), int(counts[c].sum()), names[c] if names else ""])
    caption = "" if names else "Names: --class-names FILE."
    figures.append(table("Table 1: the chosen classes", caption, rows))
    if asked.table:
        figures += table2(asked.table)
    if pretraining:
        figures.append(fig6(pretraining, asked.sequence, asked.seed))
        figures.append(training("training-pretrain", pretraining["log"]))
    figures.append(training("training-finetune", checkpoint["log"]))
    origin = f"pre-trained: {started}" if started else "no pre-training"
    out = asked.out or asked.run
    write_report(out, f"SkeletonMAE: {asked.run}", f"{outputs['summary']}; {origin}", figures)


if __name__ == "__main__":
    torch.set_num_threads(1)  # blocks of t-SNE are small: beside other work two threads wait, 48 s
    shared.run(main)          # instead of 1 s
