"""Draws what training left: a report.html and every panel of it as .svg.

    python -m extras.visualize                                  # runs/finetune
    python -m extras.visualize runs/finetune --compare runs/scratch  # another run beside it
    python -m extras.visualize runs/finetune --classes 2,5,7 --class-names names.txt --no-tsne
    python -m extras.visualize runs/finetune --table runs/*     # masking strategies and accuracy
    python -m extras.visualize --labels accuracies.csv          # accuracy over the share of labels

Reads finetune.pt and test_outputs.pt of the run, and pretrain.pt of the pre-training it started
from. How lines and letters are drawn is in drawing.py; measures.py computes.
"""
import argparse
import math
import os
import shlex
import statistics
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from data import DataError  # before torch: it silences its warning
from extras.drawing import (DOT, LINE, MARKS, TEXT, Figure, Panel, Series, clean, path, plot, svg,
                            table, text, write_report)
from extras.measures import class_interval, confusion, interval, pca, read_shares, tsne
from extras.reconstruction import reconstruction
from skeletonmae import SkeletonMAE, draw_mask
import train_finetune
import train_pretrain as shared
import torch
from torch import Tensor


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m extras.visualize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", nargs="?", default="runs/finetune", help="run folder of train_finetune.py")
    add("--compare", metavar="RUN", help="a second run on the same test set, beside the first")
    add("--table", nargs="+", default=[], metavar="RUN", help="run folders for Table 2")
    add("--pretrained", metavar="FILE",
        help="pre-training to draw; default: what the run started from; none: leave it out")
    add("--classes", type=lambda text: text.split(","), default=[], metavar="A,B",
        help="ids or names to look at more closely; default: five of the rarer half, drawn")
    add("--class-names", metavar="FILE", help="text file with a class name a line, in label order")
    add("--sequence", help="test sequence to reconstruct, name or number from 0; default: one with "
                           "more motion than three in four")
    add("--seed", type=int, default=0, help="seed of everything that is drawn")
    add("--no-tsne", action="store_true", help="leave t-SNE out")
    add("--labels", metavar="CSV", help="draw label-share.svg alone, from lines of share,arm,"
                                        "accuracy: percent of the labels, a word, percent")
    add("--out", help="folder for report.html and the .svg files; default: the run folder, with "
                      "--labels that of the CSV")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------ reading

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


class Run(NamedTuple):
    """What train_finetune.py left of N test sequences and K classes."""
    folder: str
    checkpoint: dict
    outputs: dict    # logits (N, K), features (N, F), labels (N,), train_counts (K,), classes
    counts: Tensor   # (K, K), the confusion matrix
    title: str = ""  # short, of two runs


def read_run(folder: str) -> Run:
    path = os.path.join(folder, "test_outputs.pt")
    with reading(path, "train_finetune"):
        outputs = torch.load(path, map_location="cpu", weights_only=True)
        outputs["labels"] = outputs["labels"].long()
        outputs["metrics"] = {name: float(value) for name, value in outputs["metrics"].items()}
        predicted = outputs["logits"].argmax(1)
        counts = confusion(outputs["labels"], predicted, outputs["logits"].shape[1])
    return Run(folder, read_checkpoint(os.path.join(folder, "finetune.pt")), outputs, counts)


def read_two(folder: str, other: str) -> list:
    """Two runs on the same test set, titled by what they started from or else by their folders."""
    runs = [read_run(folder), read_run(other)]
    first, second = (run.outputs for run in runs)
    if not first["labels"].equal(second["labels"]) or first["classes"] != second["classes"]:
        raise DataError(f"{other} was tested on other sequences than {folder}; "
                        "expected two runs on the same data")
    titles = ["pre-trained" if run.checkpoint["settings"]["ckpt"] else "from random weights"
              for run in runs]
    if titles[0] == titles[1]:
        titles = [os.path.normpath(run.folder) for run in runs]
    return [run._replace(title=title) for run, title in zip(runs, titles)]


def data_name(run: Run) -> str:
    return os.path.basename(run.checkpoint["settings"]["data"]) or "built-in stick figures"


def share_of_labels(run: Run) -> str:
    share = run.checkpoint["settings"]["label_fraction"]
    return f", {100 * share:g} % of the labels" if share < 1 else ""


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


def read_model(checkpoint: dict) -> tuple:
    """The model of a pre-training, and its data."""
    settings = checkpoint["settings"]
    with reading(os.path.join(settings["out"], "pretrain.pt"), "train_pretrain"):
        model = SkeletonMAE(**checkpoint["model_settings"]).eval()
        model.load_state_dict(checkpoint["model"])
        with redirect_stdout(None):
            data = shared.read_data(shared.Settings(**settings), checkpoint)
    return model, data


def read_class_names(path: str | None, K: int) -> list:
    """A name for each of K classes, or an empty list without a file."""
    if not path:
        return []
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        names = [name.strip() for name in file.read().rstrip().split("\n")]
    if len(names) != K:
        raise DataError(f"{path} has {len(names)} lines; expected {K}, a class name each")
    return names


def uneven(run: Run) -> bool:
    sizes = run.outputs["train_counts"]
    return bool(sizes.max() > 1.5 * sizes.min())


def choose_classes(wanted: list, ids: list, names: list, run: Run, seed: int) -> list:
    """The classes asked for, or five drawn from those that the test set holds, of uneven ones the
    rarer half."""
    for word in wanted:
        if word not in ids + names:
            raise DataError(f"no class {word}; ids run from {ids[0]} to {ids[-1]}")
    if wanted:
        return list(dict.fromkeys((ids + names).index(word) % len(ids) for word in wanted))
    rarest_first = run.outputs["train_counts"].argsort(stable=True).tolist()
    tested = [c for c in rarest_first if run.counts[c].any()]
    half = tested[:max(len(tested) // 2, 5)] if uneven(run) else tested
    order = torch.randperm(len(half), generator=torch.Generator().manual_seed(seed))
    return sorted(half[i] for i in order[:5].tolist())


# ------------------------------------------------------------------------------------------ the run

def command_line(checkpoint: dict) -> str:
    """A command that makes such a run: what differs from the defaults, and what decides them."""
    saved, kind = checkpoint["settings"], checkpoint["kind"]
    settings_type = train_finetune.Settings if kind == "finetune" else shared.Settings
    decisive = {"recipe", "pretrain", "epochs", "batch_size", "repeat"} & saved.keys()
    typed = {name: saved[name] for name in decisive}
    data = SimpleNamespace(train=[0], channels=checkpoint["channels"],
                           skeleton=checkpoint["skeleton"])
    usual = vars(shared.suit(shared.settle(settings_type, typed), data))
    words = ["python", f"train_{kind}.py"]
    for name in usual:
        value = saved[name]
        technical = name in ("resume", "overwrite", "device", "amp", "graphs")
        if technical or value == usual[name] and name not in decisive:
            continue
        words.append(shared.flag(f"no_{name}" if value is False else name))
        if isinstance(value, tuple):
            words.append(",".join(map(str, value)))
        elif not isinstance(value, bool):
            words.append(shlex.quote(str(value)))
    return " ".join(words)


def told(run: Run) -> dict:
    """What a person asks first of a run: question -> answer."""
    checkpoint, outputs = run.checkpoint, run.outputs
    settings, metrics = checkpoint["settings"], outputs["metrics"]
    model = train_finetune.new_model(checkpoint["model_settings"], len(outputs["classes"]))
    loaded = settings["encoder_lr_scale"] if settings["ckpt"] else 1
    slower = f", loaded layers {loaded * settings['lr']:.3g}" if loaded != 1 else ""
    score = "{:.2f} % ({:.1f} to {:.1f})"
    hits, count = int(run.counts.diagonal().sum()), int(run.counts.sum())
    answers = {
        "data": ", ".join(filter(None, (data_name(run), " / ".join(checkpoint["pair"])))),
        "classes": len(outputs["classes"]),
        "sequences": f"{int(outputs['train_counts'].sum()):,} training, {count:,} test",
        "labels used": f"{100 * settings['label_fraction']:g} %",
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million",
        "seed": settings["seed"],
        "start": settings["ckpt"] or "random weights",
        "learning rate": f"{settings['lr']:g}{slower}",
        "top-1": score.format(metrics["top1"], *interval(hits, count)),
        "mean class accuracy": score.format(metrics["mean_class"], *class_interval(run.counts))}
    if "top5" in metrics:
        answers["top-5"] = f"{metrics['top5']:.2f} %"
    return answers


def facts(runs: list) -> Figure:
    """`told` as a table, a column a run."""
    columns = [told(run) for run in runs]
    cells = [[what, *(column[what] for column in columns)] for what in columns[0]]
    if len(runs) == 2:
        cells.insert(0, ["", *(run.title for run in runs)])
        hits = [run.outputs["logits"].argmax(1) == run.outputs["labels"] for run in runs]
        gain = 100 * (hits[0].double() - hits[1].double())  # on the same sequences: paired
        mean, half = float(gain.mean()), 1.96 * float(gain.std()) / math.sqrt(len(gain))
        points = f"{mean:+.2f} points ({mean - half:+.2f} to {mean + half:+.2f})"
        cells.append(["top-1, difference", points.replace("-", "−"), ""])
    caption = ("Last epoch, one seed, no test-time augmentation. In brackets: 95 % intervals over "
               "test sequences (Wilson's; normal ones of mean class accuracy and of the paired "
               "difference), not over seeds or choices of labels. Grey words beside headings: the "
               "figures of Yan et al. (ICCV 2023) of the same kind.")
    return table("The run" if len(runs) == 1 else "The runs", "", caption, cells, len(runs) - 1)


def commands(runs: list, pretraining: dict | None) -> Figure:
    cells = [[", ".join(filter(None, ("fine-tuning", run.title))), command_line(run.checkpoint)]
             for run in runs]
    if pretraining:
        cells.insert(0, ["pre-training", command_line(pretraining)])
    return table("The commands", "", "", cells, 0)


def curves(runs: list, pretraining: dict | None) -> Figure:
    """What was measured in more than two epochs."""
    finetuned = [(run.title, run.checkpoint["log"]) for run in runs]
    pretrained = [("", pretraining["log"])] if pretraining else []
    panels = []
    for name, logs, y_label, columns, log in (
            ("finetune-loss", finetuned, "fine-tuning loss", {"loss": ""}, ""),
            ("finetune-accuracy", finetuned, "test top-1 accuracy, %", {"top1": ""}, ""),
            ("finetune-rate", finetuned, "learning rate", {"lr": ""}, "y"),
            ("pretrain-loss", pretrained, "pre-training loss", {"loss": ""}, ""),
            ("pretrain-error", pretrained, "joint error",
             {"joint_error": "model", "mean_pose_error": "mean pose"}, "")):
        series = []
        for title, rows in logs:
            for column, word in columns.items():
                points = [(row["epoch"], row[column]) for row in rows
                          if column in row and (row[column] > 0 or not log)]
                if len(points) > 2:
                    styles = ("line c0", "dash c6", "dash c7") if word else ("line c0", "line c3")
                    label = word or title
                    if column not in ("loss", "lr"):  # the last loss is of few sequences
                        label = f"{label or 'last'} {points[-1][1]:#.4g}"
                    series.append(Series(points, styles[len(series)], LINE, label))
        if series:
            heights = [y for one in series for _, y in one.points]
            log = log if max(heights) > 30 * min(heights) else ""
            panels.append(plot(name, series, "epoch", y_label, 270, 130, log))
    caption = "Numbers in legends: last values. Learning rate: of the new layers." * bool(panels)
    if panels and panels[-1].name == "pretrain-error":
        caption += (" Joint error: mean distance of masked test joints from their true places, in "
                    "the units of the data, as predicted by the model and by the mean pose of the "
                    "training set.")
    return Figure("Training", "", caption, panels)


# ------------------------------------------------------------------------------------------ classes

def side_by_side(runs: list, draw) -> list:
    """draw(run) -> Panel: one a run, under its title if there are two."""
    panels = []
    for run in runs:
        panel = draw(run)
        if run.title:
            body = f'<g transform="translate(0 24)">{panel.body}</g>'
            panel = panel._replace(height=panel.height + 24,
                                   body=text(0, 14, run.title, "bold") + body)
        panels.append(panel)
    return panels


def confusion_matrix(counts: Tensor, labels: list, ids: list, room: float) -> Panel:
    """counts (K, K), row-normalised: true classes down, predicted ones across, in at most `room`
    pixels."""
    K = len(counts)
    cell = min(34, room / K)
    names = labels if cell >= 10 else ids
    limit = 16 if room < 300 else 24
    longest = min(max(map(len, names)), limit)
    left, top, side = 30 + 6 * longest, 8, cell * K
    right, bottom = left + side, top + side
    body = path([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], "grid")
    numbers = ""  # above all cells
    size = "end small" if cell > 11 else "end tiny"
    for i, total in enumerate(counts.sum(1).tolist()):
        y = top + i * cell
        if i % math.ceil(8 / cell) == 0:  # so many names fit
            body += text(left - 5, y + cell / 2 + 3.5, names[i], size, limit)
            body += text(left + (i + 0.5) * cell + 3.5, bottom + 8, names[i], size, limit, -60)
        for j in counts[i].nonzero().flatten().tolist():
            x = left + j * cell
            share = float(counts[i, j]) / total
            tip = (f"{clean(labels[i], 30)}: {counts[i, j]} of {total} taken for "
                   f"{clean(labels[j], 30)} ({100 * share:.0f} %)")
            square = f"h{cell:.4g}v{cell:.4g}h-{cell:.4g}z"
            fill = f' fill-opacity="{0.12 + 0.88 * share:.2f}"'
            body += path([(x, y)], "heat", square, tip, fill)
            if cell >= 17:
                style = "small mid on" if share > 0.7 else "small mid"
                number = f"{100 * share:.0f}"
                number = {"0": "<1", "100": ">99" if share < 1 else "100"}.get(number, number)
                numbers += text(x + cell / 2, y + cell / 2 + 3.5, number, style)
    below = bottom + 26 + 5.4 * longest
    body += text(left + side / 2, below, "predicted class", "mid")
    body += text(13, top + side / 2, "true class", "mid", turn=-90) + numbers
    return Panel("confusion", max(right + 10, 400), below + 8, body)


def confusions(runs: list, labels: list, ids: list) -> Figure:
    room = 260 if len(runs) == 2 or len(ids) <= 14 else 720
    panels = side_by_side(runs, lambda run: confusion_matrix(run.counts, labels, ids, room))
    totals = runs[0].counts.sum(1).tolist()
    caption = ("Percent of a true class's test sequences by predicted class, blank: none; "
               f"{sum(totals):,} sequences.")
    if labels[0].startswith("class "):
        caption += " The data has no class names."
    if 0 in totals:
        caption += f" Empty rows: {totals.count(0)} without test sequences."
    return Figure("Confusion matrix", "supplement Fig. 4", caption, panels)


def class_rows(name: str, order: list, labels: list, draw, x_label: str, averages: dict) -> list:
    """A row for each class in `order`, at most 30 a panel: draw(class, y) -> its series. averages:
    CSS class of a dashed line across all rows -> (where, its label)."""
    size = math.ceil(len(order) / math.ceil(len(order) / 30))
    reach = [x for c in order for one in draw(c, 0) for x, _ in one.points]
    panels = []
    for first in range(0, len(order), size):
        own = order[first:first + size]
        series = [Series([(x, 0.5), (x, 0.5 - len(own))], f"dash {colour}", LINE, label)
                  for colour, (x, label) in averages.items()]
        series += [one for i, c in enumerate(own) for one in draw(c, -i)]
        series.append(Series([(min(reach), 0), (max(reach), 0)], "", LINE))  # unseen: one scale
        tall = (15 + 5 * max(len(averages), 1)) * len(own)
        panels.append(plot(name, series, x_label, "", tall=tall, rows=[labels[c] for c in own]))
    return panels


def class_accuracy(runs: list, labels: list) -> Figure:
    """The accuracy of every class that has test sequences, with its interval, a dot a run."""
    totals = runs[0].counts.sum(1).tolist()
    tested = [c for c, total in enumerate(totals) if total]
    hits = {f"c{colour}": run.counts.diagonal().tolist() for run, colour in zip(runs, (0, 3))}

    def draw(c: int, y: float):
        for i, (colour, own) in enumerate(hits.items()):
            place = y + 0.13 * (len(hits) - 1) * (1 - 2 * i)
            share = 100 * own[c] / totals[c]
            tip = f"{clean(labels[c])}: {share:.1f} %, {own[c]} of {totals[c]}"
            ends = [(end, place) for end in interval(own[c], totals[c])]
            yield Series(ends, f"bone soft {colour}", LINE)
            yield Series([(share, place)], f"joint {colour}", tip=tip)

    averages = {}
    spreads = []
    for run, (colour, own) in zip(runs, hits.items()):
        accuracies = [100 * own[c] / totals[c] for c in tested]
        mean = statistics.mean(accuracies)
        averages[colour] = mean, f"{run.title} mean {mean:.2f} %".lstrip()
        spreads.append(f"{statistics.pstdev(accuracies):.1f}")
    order = sorted(tested, key=lambda c: -hits["c0"][c] / totals[c])
    panels = class_rows("class-accuracy", order, labels, draw, "accuracy, %", averages)
    caption = (f"Lines through dots: Wilson's 95 % intervals. Standard deviation over classes: "
               f"{' and '.join(spreads)} points.")
    if len(tested) < len(labels):
        caption += f" Left out: {len(labels) - len(tested)} without test sequences."
    return Figure("Accuracy of each class", "supplement Fig. 2", caption, panels)


def class_sizes(train_counts: Tensor, chosen: list, labels: list) -> Figure:
    """Training sequences of every class; a star marks those in `chosen`."""
    counts = train_counts.tolist()
    order = train_counts.argsort(descending=True, stable=True).tolist()
    marked = [f"* {label}" if c in chosen else label for c, label in enumerate(labels)]

    def draw(c: int, y: float):
        tip = f"{clean(labels[c])}: {counts[c]}"
        yield Series([(0, y), (counts[c], y)], "bar c0", LINE, tip=tip)

    panels = class_rows("class-sizes", order, marked, draw, "training sequences", {})
    caption = f"{sum(counts):,} in {len(order)} classes." + " *: chosen, see below." * bool(chosen)
    return Figure("Training sequences of each class", "supplement Fig. 3", caption, panels)


# ----------------------------------------------------------------------------------------- features

POINTS = 3000  # at most so many are drawn: t-SNE takes their square


def scatter(name: str, points: Tensor, classes: Tensor, names: dict, axes: list) -> Panel:
    """points (N, 2) and their classes (N,); names: class -> (its id, its name)."""
    low, high = points.amin(0), points.amax(0)
    series = []
    words = {}  # of more classes than colours: cell of a 20 x 20 grid -> the word shown there
    for i, (c, (id, label)) in enumerate(names.items()):
        own = points[classes == c]
        if not len(own):
            continue
        colour = i % 8
        mark = MARKS[(i + i // 8) % 8]  # 64 classes differ in colour or mark
        style = f"c{colour} dot" if mark == DOT else f"c{colour} mark"
        in_legend = label if len(names) <= 20 else ""
        series.append(Series(own.tolist(), style, mark, in_legend, clean(label)))
        if len(names) > 8:  # then some share a colour
            middle = own.median(0).values
            cell = tuple(((middle - low) / (high - low) * 20).int().tolist())
            words.setdefault(cell, Series([middle.tolist()], "small bold mid halo", TEXT,
                                          tip=label if in_legend else id))
    return plot(name, [*series, *words.values()], *axes)


def axes_of(share: Tensor) -> list:
    return [f"PC {i} ({100 * part:.1f} % of variance)" for i, part in enumerate(share.tolist(), 1)]


def features(runs: list, names: dict, with_tsne: bool, seed: int):
    """PCA and, if asked for, t-SNE of the features before the classifier."""
    labels = runs[0].outputs["labels"]
    N = len(labels)
    kept = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:POINTS].sort().values
    shown = f"{len(kept):,} of {N:,}" if N > POINTS else f"{N:,}"
    shown = f"Features of the trained classifier, before its last layer: {shown} test sequences"
    if len(names) > 20:
        shown += "; numbers are class ids, where there is room, others show on hover"

    def draw_pca(run: Run) -> Panel:
        points, share = pca(run.outputs["features"], 2)
        return scatter("features-pca", points[kept], labels[kept], names, axes_of(share))

    def draw_tsne(run: Run) -> Panel:
        points, divergence = tsne(run.outputs["features"][kept], perplexity)
        divergences.append(f"{divergence[-1]:.2f}")
        return scatter("features-tsne", points, labels[kept], names, ["t-SNE 1", "t-SNE 2"])

    yield Figure("Features, principal components", "supplement Fig. 1",
                 f"{shown}.", side_by_side(runs, draw_pca))
    if with_tsne and N >= 10:  # fewer have no neighbourhoods to keep
        print(f"t-SNE of {len(kept):,} sequences; --no-tsne leaves it out", flush=True)
        perplexity = min(30, (len(kept) - 1) / 3)
        divergences = []
        panels = side_by_side(runs, draw_tsne)
        caption = (f"{shown}. Perplexity {perplexity:.3g}, Kullback-Leibler divergence "
                   f"{' and '.join(divergences)}.")
        yield Figure("Features, t-SNE", "supplement Fig. 1", caption, panels)


def chosen_classes(run: Run, chosen: list, how: str, names: dict) -> Figure:
    """Three principal components of the features before the classifier, fitted to the chosen
    classes, in two views."""
    inside = torch.isin(run.outputs["labels"], torch.tensor(chosen))
    if not inside.any():
        raise DataError("the test set holds no sequence of these classes; expected other --classes")
    labels = run.outputs["labels"][inside]
    shown = {c: names[c] for c in chosen if c in names}
    coloured = names if len(names) <= 20 else shown  # as in the figure before, if that has a legend
    points, share = pca(run.outputs["features"][inside], 3)
    axes = axes_of(share)
    panels = [scatter("chosen-pca", points[:, [0, k]], labels, coloured, [axes[0], axes[k]])
              for k in (1, 2)]
    caption = (f"Principal components fitted to the {len(points):,} test sequences of these "
               f"classes, in two views. {how}")
    title = ", ".join(filter(None, (f"Features of {len(shown)} classes, three components",
                                    run.title)))
    return Figure(title, "supplement Fig. 4", caption, panels)


# ------------------------------------------------------------------------------------------- tables

def masking_of(source: dict | None) -> tuple:
    """How a pre-training masks: (its row of Table 2, masked joints, which body parts)."""
    if source is None:
        return "No pre-training", 0, ""
    skeleton = source["skeleton"]
    settings = source["model_settings"]
    masking = {key: settings[key] for key in ("mask_parts", "mask_num_parts", "mask_ratio")}
    masks = draw_mask(1000, skeleton, **masking, generator=torch.Generator().manual_seed(0))
    row = "Body parts"
    what = " ".join(f"V{i}" for i, part in enumerate(skeleton["parts"])
                    if part in masking["mask_parts"])
    if masking["mask_ratio"]:
        row, what = "Random joints", ""
    elif masking["mask_num_parts"]:
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
        if held and "finetune.pt" not in held:  # pre-trained, or --eval-only
            continue
        run = read_run(folder)
        outputs, checkpoint, settings = run.outputs, run.checkpoint, run.checkpoint["settings"]
        row, count, what = masking_of(read_pretraining(settings["ckpt"]))
        protocol = f"{data_name(run)} {settings['split']}".rstrip()
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
        yield table("Masking strategy against accuracy", "supplement Table 2", caption, rows)


# ------------------------------------------------------------------------------ the share of labels

def label_share(path: str) -> Panel:
    """Accuracy over the share of the labels that trained, a line an arm, with 95 % intervals."""
    arms = read_shares(path)
    series = []
    for i, (arm, cells) in enumerate(arms.items()):
        colour = f"c{3 * i % 7}"
        apart = 1.03 ** (i - (len(arms) - 1) / 2)  # intervals stand beside each other
        for share, (mean, half, n) in cells.items():
            ends = [(share * apart, mean - half), (share * apart, mean + half)]
            tip = f"{clean(arm)}, {share:g} %: {mean:.1f} ± {half:.1f}, n = {n}"
            series.append(Series(ends, f"bone soft {colour}", LINE, tip=tip))
        means = [(share * apart, mean) for share, (mean, _, _) in cells.items()]
        few, many = min(n for _, _, n in cells.values()), max(n for _, _, n in cells.values())
        counted = f"n = {few} to {many}" if few < many else f"n = {few}"
        series.append(Series(means, f"line {colour}", LINE, f"{arm} ({counted})"))
    return plot("label-share", series, "share of the labels, %", "top-1 accuracy, %", 480, 260, "x")


# -------------------------------------------------------------------------------------- the command

def main(argv=None):
    asked = parse(argv)
    if asked.labels:
        path = os.path.join(asked.out or os.path.dirname(asked.labels), "label-share.svg")
        title = "Accuracy over the share of the labels, with 95 % intervals"
        Path(path).write_text(svg(label_share(asked.labels), title, True), encoding="utf-8")
        return print(path)
    runs = read_two(asked.run, asked.compare) if asked.compare else [read_run(asked.run)]
    run = runs[0]
    classes = [str(name) for name in run.outputs["classes"]]
    numeric = all(name.isdecimal() for name in classes)
    ids = classes if numeric else [str(c) for c in range(len(classes))]
    names = read_class_names(asked.class_names, len(ids)) or ([] if numeric else classes)
    labels = names or [f"class {id}" for id in ids]
    if names and len(ids) > 20:  # where names do not fit, ids stand for them
        labels = [f"{id} {name}" for id, name in zip(ids, names)]
    named = {c: (ids[c], labels[c]) for c in run.outputs["labels"].unique().tolist()}
    chosen = choose_classes(asked.classes, ids, names, run, asked.seed)
    started = [one.checkpoint["settings"]["ckpt"] for one in runs]
    path = asked.pretrained or next(filter(None, started), "")
    pretraining = read_pretraining(path) if path != "none" else None
    model_and_data = read_model(pretraining) if pretraining else ()

    figures = [facts(runs), commands(runs, pretraining), curves(runs, pretraining),
               confusions(runs, labels, ids), class_accuracy(runs, labels)]
    figures = [figure for figure in figures if figure.panels or figure.table]
    sizes = run.outputs["train_counts"]
    if uneven(run):
        figures.append(class_sizes(sizes, chosen if asked.classes else [], labels))
    figures += features(runs, named, not asked.no_tsne, asked.seed)
    if asked.classes or len(named) > 5:  # five or fewer are all in the figure before
        rare = " from the half with the fewest training sequences" if uneven(run) else ""
        how = "" if asked.classes else f"Five classes, drawn at random{rare}."
        figures.append(chosen_classes(run, chosen, how, named))
    if asked.classes:
        cells = [["class", "training sequences", "test sequences",
                  *(f"{one.title} accuracy, %".lstrip() for one in runs)]]
        for c in chosen:
            total = int(run.counts[c].sum())
            accuracies = [f"{100 * int(one.counts[c, c]) / max(total, 1):.1f}" for one in runs]
            cells.append([labels[c], int(sizes[c]), total, *accuracies])
        figures.append(table("The chosen classes", "supplement Table 1", "", cells))
    if asked.table:
        figures += table2(asked.table)
    if pretraining and len(model_and_data[1].test):
        figures.append(reconstruction(pretraining, *model_and_data, asked.sequence, asked.seed))
    scores = [f"{one.outputs['metrics']['top1']:.2f} % top-1" for one in runs]
    title = f"SkeletonMAE on {data_name(run)}{share_of_labels(run)}: "
    title += ", ".join(f"{score} {one.title}".rstrip() for one, score in zip(runs, scores))
    write_report(asked.out or asked.run, title, figures)
    if asked.compare:
        print(", ".join(f"{one.title}: {score}" for one, score in zip(runs, scores)))


if __name__ == "__main__":
    torch.set_num_threads(1)  # blocks of t-SNE are small: beside other work two threads wait, 48 s
    shared.run(main)          # instead of 1 s
