"""Tests of what is in this folder: python -m extras.test_extras, under 90 seconds on one core.

Figures are drawn of runs that the scripts made a moment before, or of such a run with the numbers
replaced. Ends with "N passed, N failed, N skipped".
"""
import contextlib
import glob
import io
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path
from unittest.mock import patch

import data  # before torch: it silences torch's one remark about numpy
from extras import benchmark, drawing, measures, reconstruction, reliability, visualize
from data import Loader
from skeletonmae import Packing, SkeletonClassifier, SkeletonMAE
from test_skeletonmae import FIVE, ScriptCase, close
import train_finetune
import train_pretrain
import torch
import torch.nn.functional as F

ROOT = Path(data.__file__).parent
TINY = "--synthetic-size 60 --device cpu --width 8 --hidden 8 --layers 1 --frames 8 --epochs 3"
DataError = data.DataError


def quietly(main, *words: str) -> str:
    """What main(words) prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(list(words))
    return said.getvalue()


def load(*path: str) -> dict:
    return torch.load(os.path.join(*path), weights_only=True)


def text_of(*path: str) -> str:
    return Path(*path).read_text(encoding="utf-8")


class Case(unittest.TestCase):
    """A test with a folder of its own, beside the folder of one pre-training and one run."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.trained = f"{folder.name}/finetune"
        cls.pretrained = f"{folder.name}/pretrain/pretrain.pt"
        quietly(train_pretrain.main, *TINY.split(), "--out", f"{folder.name}/pretrain")
        words = "--device cpu --strl-layers 2 --blocks 1 --epochs 3 --eval-every 1".split()
        quietly(train_finetune.main, "--ckpt", cls.pretrained, *words, "--out", cls.trained)

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def make_run(self, folder: str, K: int = 5, N: int = 60, pretrained: str = "") -> dict:
        """A run with random outputs of K classes; class 1 has no test sequence."""
        os.makedirs(folder, exist_ok=True)
        checkpoint = load(self.trained, "finetune.pt")
        checkpoint["settings"]["ckpt"] = pretrained
        torch.save(checkpoint, f"{folder}/finetune.pt")
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(K, (N,), generator=generator)
        labels[labels == 1] = 0
        outputs = load(self.trained, "test_outputs.pt") | {
            "logits": torch.randn(N, K, generator=generator), "labels": labels,
            "features": torch.randn(N, 16, generator=generator), "classes": list(range(K)),
            "train_counts": torch.arange(K) * 3 + 1}
        torch.save(outputs, f"{folder}/test_outputs.pt")
        return outputs

    def make_pretraining(self, folder: str, **masking):
        os.makedirs(folder)
        checkpoint = load(self.pretrained)
        checkpoint["model_settings"] |= masking
        torch.save(checkpoint, f"{folder}/pretrain.pt")

    def draw(self, *words: str) -> str:
        return quietly(visualize.main, *words)

    def refused(self, pattern: str, *words: str):
        with self.assertRaisesRegex(DataError, pattern) as caught:
            self.draw(*words)
        self.assertNotIn("\n", str(caught.exception))


# ------------------------------------------------------------------------------------ numbers

class NumberTest(unittest.TestCase):
    def test_pca_is_the_eigen_decomposition(self):
        """Coordinates and shares agree with torch.linalg.eigh of the covariance, up to sign."""
        generator = torch.Generator().manual_seed(1)
        spread = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])
        x = torch.randn(200, 6, generator=generator) * spread + 7
        points, share = measures.pca(x, 3)
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        for k in range(3):
            expected = (x - x.mean(0)) @ vectors[:, -1 - k]
            expected = expected * torch.sign(expected @ points[:, k])
            torch.testing.assert_close(points[:, k], expected, atol=2e-3, rtol=1e-3)
            self.assertAlmostEqual(float(share[k]), float(values[-1 - k] / values.sum()), places=4)

    def test_perplexity_is_reached(self):
        """exp(entropy) of each row of the affinities, summed in a loop, is the perplexity."""
        x = torch.randn(120, 8, generator=torch.Generator().manual_seed(2)) * 4 + 3
        for wanted in (5.0, 30.0):
            p = measures.affinities(x, wanted)
            for row in p:
                entropy = -sum(v * math.log(v) for v in row.tolist() if v > 0)
                self.assertAlmostEqual(math.exp(entropy), wanted, delta=0.01 * wanted)
            self.assertEqual(float(p.diagonal().abs().max()), 0)

    def test_tsne_separates_three_blobs(self):
        """The nearest neighbour is of one's own blob, and the divergence falls to what its formula
        says of the coordinates."""
        generator = torch.Generator().manual_seed(3)
        label = torch.arange(3).repeat_interleave(30)
        x = torch.randn(90, 10, generator=generator) + 12 * torch.eye(3, 10)[label]
        y, divergence = measures.tsne(x, perplexity=12, iterations=350, early=100)
        self.assertLess(divergence[-1], 0.5 * divergence[0])
        for before, after in zip(divergence[3:], divergence[4:]):
            self.assertLess(after, before + 0.01)
        kernel = (1 / (1 + torch.cdist(y, y) ** 2)).fill_diagonal_(0)
        q = (kernel / kernel.sum()).clamp(min=1e-12)
        p = measures.affinities(x, 12)
        p = ((p + p.T) / 180).clamp(min=1e-12)
        self.assertAlmostEqual(divergence[-1], float((p * (p / q).log()).sum()), places=3)
        distance = torch.cdist(y, y).fill_diagonal_(math.inf)
        self.assertTrue((label[distance.argmin(1)] == label).all())

    def test_confusion_and_class_accuracy_against_loops(self):
        """The accuracy of each class that has sequences, their mean and spread."""
        generator = torch.Generator().manual_seed(4)
        labels = torch.randint(5, (300,), generator=generator)
        predicted = torch.randint(5, (300,), generator=generator)
        labels[labels == 2] = 4
        counts = measures.confusion(labels, predicted, 5)
        expected = [[0] * 5 for _ in range(5)]
        for true, guess in zip(labels.tolist(), predicted.tolist()):
            expected[true][guess] += 1
        self.assertEqual(counts.tolist(), expected)
        accuracy = {c: 100 * expected[c][c] / sum(expected[c]) for c in (0, 1, 3, 4)}
        names = [f"class {c}" for c in range(5)]
        drawn = visualize.class_accuracy([visualize.Run("", {}, {}, counts)], names)
        order = sorted(accuracy, key=accuracy.get, reverse=True)
        self.assertEqual(re.findall(r"<title>class (\d): ([\d.]+) %", drawn.panels[0].body),
                         [(str(c), f"{accuracy[c]:.1f}") for c in order])
        mean = statistics.mean(accuracy.values())
        spread = statistics.pstdev(accuracy.values())
        self.assertIn(f">mean {mean:.2f} %</text>", drawn.panels[0].body)
        self.assertIn(f"Standard deviation over classes: {spread:.1f} points", drawn.caption)
        self.assertIn("Left out: 1 ", drawn.caption)

    def test_intervals(self):
        """Published values of Wilson's interval and of Student's; the mean class accuracy's covers
        the truth in 95 of 100 draws."""
        low, high = measures.interval(81, 263)  # Newcombe 1998, table I
        self.assertEqual((f"{low:.2f}", f"{high:.2f}"), ("25.53", "36.62"))
        self.assertEqual(f"{measures.interval(0, 20)[1]:.2f}", "16.11")
        for df, t in ((1, 12.706), (4, 2.776), (5, 2.571), (9, 2.262), (29, 2.045)):
            values = [0.0, 2.0] + [1.0] * (df - 1)
            half = measures.mean_interval(values)
            error = statistics.stdev(values) / math.sqrt(df + 1)
            self.assertAlmostEqual(half / error, t, delta=0.006)
        self.assertEqual(measures.mean_interval([3.0]), 0)
        generator = torch.Generator().manual_seed(5)
        truth = torch.tensor([0.9, 0.6, 0.97])
        covered = 0
        for _ in range(400):
            hits = (torch.rand(3, 60, generator=generator) < truth[:, None]).sum(1)
            counts = torch.diag(hits)
            counts[:, 0] += torch.tensor([0, 1, 1]) * (60 - hits)
            counts[0, 1] = 60 - hits[0]
            low, high = measures.class_interval(counts)
            covered += low < 100 * truth.mean() < high
        self.assertGreater(covered, 364)
        self.assertLess(covered, 396)


# ------------------------------------------------------------------------------------ figures

class FigureTest(Case):
    def test_report_of_a_run(self):
        """All figures of a pre-training and its fine-tuning, and the numbers of their logs."""
        said = self.draw(self.trained, "--table", self.trained, "--out", self.folder)
        files = {path.stem for path in Path(self.folder).glob("*.svg")}
        self.assertIn(f"{len(files)} panels", said)
        left_out = {"class-sizes", "pretrain-error"}  # balanced; measured once
        self.assertEqual(files, set(drawing.NAMES) - left_out | {"chosen-pca-2"})
        last = load(self.pretrained)["log"][-1]
        often = {"log": [last, last | {"epoch": 8}, last | {"epoch": 9}]}
        error = visualize.curves([], often).panels[-1].body
        self.assertIn(f">model {last['joint_error']:#.4g}</text>", error)
        metrics = load(self.trained, "test_outputs.pt")["metrics"]
        page = text_of(self.folder, "report.html")
        self.assertIn(f"{metrics['top1']:.2f}&nbsp;% top-1", page)
        self.assertIn(f"<td>{metrics['top5']:.2f} %</td>", page)
        self.assertIn(">jumping jack</text>", page)
        self.assertNotIn("class 0", page)
        count = sum(p.numel() for p in visualize.train_finetune.new_model(
            load(self.trained, "finetune.pt")["model_settings"], 10).parameters())
        self.assertIn(f"<td>{count / 1e6:.2f} million</td>", page)
        self.assertLess(page.index("fine-tuning loss"), page.index("<h2>Confusion matrix"))

    def test_the_command_makes_the_run(self):
        """The command line that a report gives parses to the settings of the run."""
        data_set = data.load(synthetic_size=60)
        finetuned, pretrained = load(self.trained, "finetune.pt"), load(self.pretrained)
        other = {"recipe": "small", "motion": False, "repeat": 7, "data": "my set.pkl"}
        masked = {"mask_parts": ("head", "torso"), "mask_ratio": 0.0, "pretrain": "stack"}
        for script, checkpoint, typed in ((train_finetune, finetuned, None),
                                          (train_pretrain, pretrained, None),
                                          (train_finetune, finetuned, other | {"flip": 0.0}),
                                          (train_pretrain, pretrained, other | masked)):
            settings = checkpoint["settings"]
            if typed:
                settled = train_pretrain.settle(script.Settings, typed)
                settings = vars(train_pretrain.suit(settled, data_set))
            words = shlex.split(visualize.command_line(checkpoint | {"settings": settings}))
            found = train_pretrain.parse(script.Settings, "", words[2:])
            again = train_pretrain.suit(train_pretrain.settle(script.Settings, found), data_set)
            own = {"device", "amp", "graphs"}
            self.assertEqual({k: v for k, v in vars(again).items() if k not in own},
                             {k: v for k, v in settings.items() if k not in own})
            self.assertNotIn("--width 64", " ".join(words))  # a default

    def test_a_log_axis(self):
        """Equal ratios are equal distances, ticks are powers of ten."""
        series = [drawing.Series([(1, 1e-1), (2, 1e-2), (3, 1e-4)], "line c0", drawing.LINE)]
        body = drawing.plot("", series, "epoch", "rate", log="y").body
        line = re.search(r'class="line c0" d="M([^"m]+)"', body)[1]
        y = [float(point.split()[1]) for point in line.split("L")]
        self.assertAlmostEqual((y[2] - y[1]) / (y[1] - y[0]), 2, delta=0.01)
        ticks = re.findall(r'class="small end">([^<]+)<', body)
        self.assertEqual(ticks, ["0.0001", "0.001", "0.01", "0.1"])
        run = visualize.read_run(self.trained)
        for rates, ticks in (((0.1, 0.01, 0.001), {"0.1", "0.01", "0.001"}),
                             ((0.1, 0.2, 0.3), {"0.1", "0.15", "0.2", "0.25", "0.3"})):
            for row, rate in zip(run.checkpoint["log"], rates):
                row["lr"] = rate
            panel = next(one for one in visualize.curves([run], None).panels
                         if one.name == "finetune-rate")
            self.assertEqual(set(re.findall(r'class="small end">([^<]+)<', panel.body)), ticks)

    def test_rows_of_many_classes(self):
        """Beside each class stands its own accuracy, in each panel."""
        self.make_run(self.folder, 64, 640)
        self.draw(self.folder, "--no-tsne")
        seen = []
        for name in ("class-accuracy", "class-accuracy-2", "class-accuracy-3"):
            drawn = text_of(self.folder, f"{name}.svg")
            labels = re.findall(r">(class \d+)</text>", drawn)
            self.assertEqual(labels, re.findall(r"<title>(class \d+):", drawn))
            seen += labels
            self.assertNotIn("−10", drawn)  # no accuracy below 0
        self.assertEqual(sorted(seen), sorted(f"class {c}" for c in range(64) if c != 1))

    def test_two_runs_side_by_side(self):
        """With --compare both runs stand in every figure of classes and features, and their
        difference has its paired interval."""
        outputs = self.make_run(self.folder, K=6)
        other = outputs | {"logits": outputs["logits"].flip(1),
                           "metrics": outputs["metrics"] | {"top1": 12.5}}
        self.make_run(f"{self.folder}/other", K=6, pretrained=self.pretrained)
        torch.save(other, f"{self.folder}/other/test_outputs.pt")
        said = self.draw(self.folder, "--compare", f"{self.folder}/other")
        top1 = outputs["metrics"]["top1"]
        self.assertIn(f"from random weights: {top1:.2f} % top-1, pre-trained: 12.50 %", said)
        files = {path.stem for path in Path(self.folder).glob("*.svg")}
        expected = {"confusion-2", "features-pca-2", "features-tsne-2", "reconstruction"}
        self.assertLess(expected, files)
        hits = [(one["logits"].argmax(1) == one["labels"]).double() for one in (outputs, other)]
        gain = [100 * (a - b) for a, b in zip(*(h.tolist() for h in hits))]
        half = 1.96 * statistics.stdev(gain) / math.sqrt(len(gain))
        mean = statistics.mean(gain)
        told = f"{mean:+.2f} points ({mean - half:+.2f} to {mean + half:+.2f})".replace("-", "−")
        page = text_of(self.folder, "report.html")
        self.assertIn(told, page)
        self.assertRegex(page, ">from random weights mean [0-9.]+ %<")
        self.assertRegex(page, ">pre-trained mean [0-9.]+ %<")
        dots = re.findall(r'class="joint c\d"', text_of(self.folder, "class-accuracy.svg"))
        self.assertEqual(len(dots), 2 * 5)  # class 1 has no test sequence

    def test_few_and_balanced_classes(self):
        """Without top-5, with at most five classes, no figure repeats another; sizes are drawn
        where they differ."""
        outputs = self.make_run(self.folder, K=4)
        del outputs["metrics"]["top5"]
        outputs["train_counts"] = torch.tensor([10, 10, 11, 12])
        torch.save(outputs, f"{self.folder}/test_outputs.pt")
        self.draw(self.folder, "--no-tsne")
        files = {path.stem for path in Path(self.folder).glob("*.svg")}
        self.assertFalse(files & {"chosen-pca", "class-sizes"})
        self.assertNotIn("top-5", text_of(self.folder, "report.html"))
        outputs["train_counts"][3] = 40
        torch.save(outputs, f"{self.folder}/test_outputs.pt")
        self.draw(self.folder, "--no-tsne", "--classes", "3,0")
        sizes = text_of(self.folder, "class-sizes.svg")
        self.assertEqual(re.findall(r">(\* class \d)<", sizes), ["* class 3", "* class 0"])

    def test_names_are_escaped_and_clipped_in_well_formed_files(self):
        """5, 60 and 120 classes with bad names: XML that parses, nothing loaded from elsewhere."""
        names = f"{self.folder}/names.txt"
        for K in (5, 60, 120):
            self.make_run(self.folder, K, 4 * K)
            lines = [f"<b>\"{i}' & \x01" + "W" * 90 for i in range(K)]
            Path(names).write_text("\n".join(lines))
            self.draw(self.folder, "--class-names", names, "--compare", self.folder, "--no-tsne")
            files = glob.glob(f"{self.folder}/*.svg")
            self.assertEqual(len(files), {5: 9, 60: 13, 120: 17}[K], files)
            for path in files:
                self.assertIn("(prefers-color-scheme:dark)", text_of(path))
                for element in ElementTree.parse(path).iter():
                    if element.tag.endswith(("}text", "}title")):
                        self.assertNotIn("W" * 60, element.text, path)
                        self.assertLessEqual(len(element.text), 140, path)
            confusion = text_of(self.folder, "class-accuracy.svg")
            self.assertIn("&lt;b&gt;&quot;0&#x27; &amp; ", confusion)
            page = text_of(self.folder, "report.html")
            self.assertNotIn("<b>", page)
            self.assertNotRegex(page, r"https?:|<link|\bsrc=|@import|url\(")
            counts = re.findall(r": (\d+) of \d+ taken for", page)
            self.assertEqual(sum(map(int, counts)), 2 * 4 * K)  # a run counts each sequence once

    def test_reconstruction_of_a_pretraining(self):
        """Moving, a ring at each masked joint, and the mean distance from where they are, of the
        model and of the mean pose, in the units of the data (paper Fig. 6)."""
        checkpoint = load(self.pretrained)
        found = self.reconstruct(checkpoint)
        self.assertFalse(found.upwards)  # stick figures are in the pixels of an image
        data_set = data.load(synthetic_size=60)
        test = data_set.test
        own = slice(int(test.start[3]), int(test.start[3] + test.length[3]))
        raw = test.frames[own, 0, :, :2].float()
        for pose in found.x[0]:  # distances between joints are those of one of its frames
            gap = (torch.cdist(raw, raw) - torch.cdist(pose, pose)).abs().amax((1, 2))
            self.assertLess(float(gap.min()), 1e-2)
        errors = {"guess": [], "mean": []}
        hidden = (found.known & found.masked).nonzero().tolist()
        mean_pose = found.mean.expand_as(found.x)
        for m, t, v in hidden:
            true = found.x[m, t, v].tolist()
            errors["guess"].append(math.dist(true, found.guess[m, t, v].tolist()))
            errors["mean"].append(math.dist(true, mean_pose[m, t, v].tolist()))
        self.assertEqual(len(hidden) % (4 * 8), 0)  # right arm and right leg in eight frames
        self.draw(self.trained, "--no-tsne", "--sequence", "3", "--out", self.folder)
        elements = list(ElementTree.parse(f"{self.folder}/reconstruction.svg").iter())
        rings = [e.get("d").count("M") for e in elements if e.get("class") == "joint ring"]
        self.assertEqual(sum(rings), len(hidden))
        moving = text_of(self.folder, "reconstruction.svg")
        poses = re.findall(r'class="(?:bone|joint) [^"]+" d="([^"]+)"', moving)
        across = [float(x) for pose in poses for x in re.findall(r"[ML]([-.\d]+) ", pose)]
        self.assertAlmostEqual(max(across), 62, delta=0.6)  # what is put back is in the picture
        self.assertAlmostEqual(min(across), -62, delta=0.6)
        columns = re.findall(r'<g transform="translate\((\d+) ', moving)  # frames side by side
        self.assertEqual([int(x) for x in columns], [x + 400 * i for i in range(8)
                                                     for x in (68, 200, 332)])
        self.assertIn("steps(8) infinite", moving)
        still = int(re.search(r"\.film{transform:translateX\((-?\d+)px\)", moving)[1])
        self.assertIn(still, range(-2800, 1, 400))  # the frame that unmoved pages show
        self.assertIn("translateX(-3200px)", moving)
        self.assertIn("(prefers-reduced-motion:reduce){.film{animation:none}}", moving)
        told = (f"Mean error of masked joints: model {statistics.mean(errors['guess']):.3g}, mean "
                f"pose of the training set {statistics.mean(errors['mean']):.3g}, in")
        self.assertIn(told, text_of(self.folder, "report.html"))
        for wanted in ("1000", "9" * 5000, "nobody"):
            self.refused("no test sequence", self.trained, "--no-tsne", "--sequence", wanted)

    def reconstruct(self, checkpoint: dict):
        return reconstruction.reconstruct(checkpoint, *visualize.read_model(checkpoint), "3", 0)

    def test_the_mean_pose_and_the_moving_sequence(self):
        """The mean pose is that of the training set; the sequence that moves more than three in
        four is found among others that stand still."""
        checkpoint = load(self.pretrained)
        data_set = data.load(synthetic_size=60)
        loader = Loader(data_set.train, checkpoint["skeleton"], 100, 8)
        expected = train_pretrain.measure_target(loader)[2]
        found = self.reconstruct(checkpoint)
        unit = (found.mean / expected[:, None]).flatten()
        close(unit, unit[:1].expand_as(unit), rtol=1e-3, atol=1e-3)
        test = data_set.test
        for i in range(len(test)):
            own = slice(int(test.start[i]), int(test.start[i] + test.length[i]))
            middle = test.frames[own].mean(0, keepdim=True)
            share = {3: 1.0, 4: 1.0, 5: 0.1, 6: 1.0}.get(i, 0.001)
            test.frames[own] = middle + share * (test.frames[own] - middle)
            if i > 6:  # out of sight in every other frame: that is no movement
                test.seen[own][::2] = False
        slow = Loader(test, checkpoint["skeleton"], 100, 8)
        self.assertEqual(reconstruction.moving(slow), 5)  # three of twelve move more

    def test_sequences_named_by_numbers(self):
        """As in a pickle without frame_dir: that sequence is drawn which was chosen."""
        model, data_set = visualize.read_model(load(self.pretrained))
        names = list(data_set.test.names)
        chosen = []
        for data_set.test.names in (names, [str(len(names) - 1 - i) for i in range(len(names))]):
            found = reconstruction.reconstruct(load(self.pretrained), model, data_set, None, 0)
            chosen.append(data_set.test.names.index(found.name))
        self.assertEqual(*chosen)

    def test_a_pretraining_without_test_sequences(self):
        """The report leaves the reconstruction out."""
        model, data_set = visualize.read_model(load(self.pretrained))
        data_set.test = data_set.test.subset([])
        with patch("extras.visualize.read_model", return_value=(model, data_set)):
            self.draw(self.trained, "--no-tsne", "--out", self.folder)
        self.assertFalse(Path(self.folder, "reconstruction.svg").exists())

    def test_label_share(self):
        """A point a cell at the mean of its lines, an interval by Student; what is no such file is
        one line."""
        path = Path(self.folder, "shares.csv")
        rows = ["share,arm,accuracy"]
        for share, values in ((1, (60, 62, 67)), (10, (80, 82, 84)), (100, (90,))):
            rows += [f"{share},<pre>,{value}" for value in values]
            rows.append(f"{share},scratch,{share / 2}")
        path.write_text("\n".join(rows))
        self.draw("--labels", str(path))
        drawn = text_of(self.folder, "label-share.svg")
        ElementTree.fromstring(drawn)
        half = 4.303 * statistics.stdev((60, 62, 67)) / math.sqrt(3)
        self.assertIn(f"<title>&lt;pre&gt;, 1 %: 63.0 ± {half:.1f}, n = 3</title>", drawn)
        self.assertIn("&lt;pre&gt; (n = 1 to 3)", drawn)
        line = re.search(r'class="line c0" d="M([^"m]+)"', drawn)[1]
        x, y = zip(*(map(float, point.split()) for point in line.split("L")))
        self.assertAlmostEqual(x[1] - x[0], x[2] - x[1], delta=0.2)  # 1, 10, 100: a log axis
        self.assertAlmostEqual((y[0] - y[1]) / (y[1] - y[2]), 19 / 8, delta=0.05)
        for content in ("a,b\n1,2", "share,arm,accuracy\n0,a,5", "share,arm,accuracy\n1,a,x",
                        "share,arm,accuracy", "share,arm,accuracy\n1"):
            path.write_text(content)
            self.refused("expected lines of share,arm,accuracy", "--labels", str(path))

    def test_table_2(self):
        """The best and the worst set of as many joints, mean and deviation over runs, a dash where
        there is none; other test labels make a table of their own."""
        runs = {"a": {}, "b": {}, "c": {"mask_parts": ("left_arm", "left_leg")},
                "d": {"mask_ratio": 4 / 17}, "e": None}
        for i, (name, masking) in enumerate(runs.items()):
            folder = f"{self.folder}/{name}"
            pretrained = ""
            if masking is not None:
                self.make_pretraining(folder + "-pre", **masking)
                pretrained = folder + "-pre/pretrain.pt"
            outputs = self.make_run(folder, pretrained=pretrained)
            outputs["metrics"]["top1"] = 80.0 + i * i
            torch.save(outputs, f"{folder}/test_outputs.pt")
        os.rename(f"{self.folder}/d-pre/pretrain.pt", f"{self.folder}/d/pretrain.pt")  # one --out
        saved = load(f"{self.folder}/d", "finetune.pt")
        saved["settings"]["ckpt"] = f"{self.folder}/d/pretrain.pt"
        torch.save(saved, f"{self.folder}/d/finetune.pt")
        os.rmdir(f"{self.folder}/d-pre")
        os.makedirs(f"{self.folder}/eval-only")
        torch.save(outputs, f"{self.folder}/eval-only/test_outputs.pt")
        other = self.make_run(f"{self.folder}/other")
        torch.save(other | {"labels": 0 * other["labels"]}, f"{self.folder}/other/test_outputs.pt")
        self.draw(f"{self.folder}/e", "--table", *sorted(glob.glob(f"{self.folder}/*")),
                  "--no-tsne", "--out", self.folder)
        page = text_of(self.folder, "report.html")
        self.assertEqual(page.count("<h2>Masking strategy"), 2)
        found = page.partition("<h2>Masking strategy")[2].partition("</table>")[0].split("<tr>")[1:]
        rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in found]
        parts = list(load(self.pretrained)["skeleton"]["parts"])
        high, low = (f"V{parts.index(side + '_arm')} V{parts.index(side + '_leg')}"
                     for side in ("left", "right"))
        self.assertEqual(rows, [["Masked joints", "0", "4"],
                                ["Ratio", "0 %", "24 %"],
                                ["No pre-training", "96.0 ", "–"],
                                ["Random joints", "–", "89.0 "],
                                ["Body parts, high", "–", f"84.0 {high}"],
                                ["Body parts, low", "–", f"80.5 ± 0.7 (n = 2) {low}"]])
        self.refused("--table names no folder", f"{self.folder}/e", "--no-tsne", "--table",
                     f"{self.folder}/a-pre")

    def test_names_at_medians(self):
        """Where classes are more than the eight colours."""
        for K in (8, 9):
            names = {c: (f"{c}", f"name {c}") for c in range(K)}
            points, classes = torch.rand(K, 1, 2).expand(K, 3, 2), torch.arange(K)[:, None]
            points = points + 100 * classes[..., None]  # far apart
            panel = visualize.scatter("a", points.flatten(0, 1), classes.expand(K, 3).flatten(),
                                      names, ["x", "y"])
            self.assertEqual(panel.body.count("halo"), 9 * (K == 9))

    def test_what_an_earlier_report_left_is_removed(self):
        self.make_run(self.folder)
        Path(self.folder, "own.svg").write_text("<svg/>")
        self.draw(self.folder)
        before = {path.stem for path in Path(self.folder).glob("*.svg")}
        self.assertLess({"own", "features-tsne", "confusion"}, before)
        self.draw(self.folder, "--no-tsne", "--compare", self.folder)
        self.draw(self.folder, "--no-tsne")
        after = {path.stem for path in Path(self.folder).glob("*.svg")}
        self.assertEqual(before - after, {"features-tsne"})
        self.assertEqual(after - before, set())

    def test_classes_are_named_or_drawn_from_the_rarer_half(self):
        """A table has the classes asked for; else features are of five of the rarer half, drawn by
        the seed."""
        outputs = self.make_run(self.folder, 24, 480)
        names = f"{self.folder}/names.txt"
        lines = "\n".join(f"name {i}" for i in range(24))
        Path(names).write_text(lines, encoding="utf-8-sig")  # as Windows writes it
        self.draw(self.folder, "--no-tsne", "--class-names", names, "--classes", "name 7,0")
        page = text_of(self.folder, "report.html")
        found = page.partition("The chosen classes")[2].partition("</table>")[0].split("<tr>")[2:]
        cells = [re.findall("<td>(.*?)</td>", row) for row in found]
        hits = outputs["logits"].argmax(1) == outputs["labels"]
        expected = []
        for c in (7, 0):
            own = outputs["labels"] == c
            accuracy = f"{100 * hits[own].float().mean():.1f}"
            expected.append([f"{c} name {c}", str(3 * c + 1), str(int(own.sum())), accuracy])
        self.assertEqual(cells, expected)
        drawn = []
        for seed in "112":
            self.draw(self.folder, "--no-tsne", "--seed", seed)
            legend = text_of(self.folder, "chosen-pca.svg").partition("PC 1")[0]
            drawn.append({int(c) for c in re.findall(r">class (\d+)<", legend)})
            self.assertEqual(len(drawn[-1] & set(range(12))), 5)  # sizes grow with the id
        self.assertEqual(drawn[0], drawn[1])
        self.assertNotEqual(drawn[0], drawn[2])
        self.assertNotIn("The chosen classes", text_of(self.folder, "report.html"))
        self.refused("no class 77", self.folder, "--no-tsne", "--classes", "77")
        Path(names).write_text("one name")
        self.refused("has 1 lines; expected 24", self.folder, "--class-names", names)

    def test_missing_and_foreign_files(self):
        """One line with the command that makes the file, exit status 2, and no report."""
        command = [sys.executable, "-m", "extras.visualize", f"{self.folder}/nothing"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (2, "", 1))
        mend = r"missing; make it with: python train_finetune\.py --out \S*nothing"
        self.assertRegex(done.stderr, mend)

        self.make_run(self.folder, pretrained=f"{self.folder}/gone/pretrain.pt")
        self.refused(r"make it with: python train_pretrain\.py --out \S*gone, or leave its figures "
                     "out: --pretrained none", self.folder)
        for name in ("test_outputs.pt", "finetune.pt"):
            for content in ("broken", {"x": 1}, load(self.pretrained)):
                self.make_run(self.folder)
                torch.save(content, f"{self.folder}/{name}")
                if content == "broken":
                    Path(self.folder, name).write_text(content)
                self.refused(rf"{name} cannot be used .*train_finetune\.py --out", self.folder)
        outputs = self.make_run(self.folder)
        for change in ({"labels": outputs["labels"] + 3}, {"metrics": {"top1": "high"}}):
            torch.save(outputs | change, f"{self.folder}/test_outputs.pt")
            self.refused("test_outputs.pt cannot be used", self.folder)
        self.make_run(self.folder)
        self.make_run(f"{self.folder}/other", N=61)
        self.refused("was tested on other sequences", self.folder, "--compare",
                     f"{self.folder}/other")
        self.assertFalse(os.path.exists(f"{self.folder}/report.html"))

    def test_a_run_that_started_from_itself(self):
        """Fine-tuned again in its own folder, its checkpoint names itself: no pre-training."""
        path = f"{self.folder}/finetune.pt"
        self.make_run(self.folder, pretrained=path)
        self.assertIsNone(visualize.read_pretraining(path))


# ------------------------------------------------------------------------------------ the others

class BenchmarkTest(unittest.TestCase):
    def test_a_row(self):
        lines = list(benchmark.p4(sequences=64))
        self.assertEqual(len(lines), 2)
        self.assertRegex(lines[1], r"batch 8: \d+\.\d{4} ms$")

    def test_ntu(self):
        """Data in NTU's layout: as many sequences as asked for, of two persons at most."""
        with tempfile.TemporaryDirectory() as folder:
            quietly(benchmark.main, "--write-ntu", f"{folder}/ntu.npz", "130", "60")
            ntu = data.load(f"{folder}/ntu.npz")
        self.assertEqual((len(ntu.train), len(ntu.test), len(ntu.classes)), (130, 60, 60))
        self.assertEqual((ntu.channels, len(ntu.skeleton["joints"])), (3, 25))
        self.assertTrue(ntu.train.present[:, 0].all())
        self.assertLess(float(ntu.train.present[:, 1].float().mean()), 0.5)

    def test_unknown_row(self):
        with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit):
            benchmark.main(["P1", "P99"])
        self.assertIn("no row P99; expected P1, P2", said.getvalue())


class ReliabilityTest(unittest.TestCase):
    def test_killed_and_resumed(self):
        for script in ("pretrain", "finetune"):
            self.assertIn("1 kills", reliability.kills(script, 1, epochs=12))

    def test_mutations(self):
        said = "\n".join(reliability.mutations(20))
        for file, count in (("stored.npz", 10), ("deflated.npz", 10), ("annotations.pkl", 20),
                            ("data.pt", 20), ("finetune.pt", 20)):
            self.assertRegex(said, rf"(?m)^{file}: {count} mutations, \d+ still readable$")

    def test_memory(self):
        self.assertIn("120 steps", reliability.memory(120))

    def test_a_changed_bit_is_found(self):
        """The comparison of two runs fails for one weight, one logged number, one logit."""
        with tempfile.TemporaryDirectory() as folder:
            words = f"{TINY} --strl-layers 2 --blocks 1 --out"
            for out in ("a", "b"):
                quietly(train_finetune.main, *words.split(), f"{folder}/{out}")
            runs = f"{folder}/a", f"{folder}/b"
            reliability.check_same("finetune", *runs)
            for file, key in (("finetune.pt", "epoch"), ("test_outputs.pt", "logits")):
                content = load(runs[1], file)
                torch.save(content | {key: content[key] + 1}, f"{runs[1]}/{file}")
                with self.assertRaises(AssertionError):
                    reliability.check_same("finetune", *runs)
                torch.save(content, f"{runs[1]}/{file}")
            Path(runs[1], "log.csv").write_text("epoch,loss\n")
            with self.assertRaisesRegex(AssertionError, "log.csv"):
                reliability.check_same("finetune", *runs)

    def test_mutated_files_are_read_before(self):
        """What is damaged can be read: the pickle like numpy's, both archives, the .pt."""
        numpy = sys.modules.get("numpy")
        with tempfile.TemporaryDirectory() as folder:
            reliability.write_pt(f"{folder}/a.pt")
            reliability.write_npz(f"{folder}/b.npz", zipfile.ZIP_DEFLATED)
            reliability.write_pickle(f"{folder}/c.pkl")
            for name, sizes in (("a.pt", (4, 2, 17, 2)), ("b.npz", (4, 2, 20, 3)),
                                ("c.pkl", (4, 2, 17, 2))):
                found = data.load(f"{folder}/{name}")
                joints = len(found.skeleton["joints"])
                self.assertEqual((len(found.train), len(found.test), joints, found.channels), sizes)
            self.assertTrue(found.scored)
            self.assertEqual(found.train.frames[0, 0, :3].tolist(),
                             [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        self.assertIs(sys.modules.get("numpy"), numpy)  # nothing stands in for it afterwards


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class GpuTest(ScriptCase):
    def test_same_batches_losses_and_gradients(self):
        torch.set_float32_matmul_precision("highest")
        train = data.load("tiny.pt", layout="five.json").train
        shape = dict(width=8, hidden=8, layers=1, motion=True, bone=True, dropout=0.0)
        mae = SkeletonMAE(FIVE, 3, mask_ratio=0.4, **shape)
        classifier = SkeletonClassifier(FIVE, 3, 3, persons=2, attention_dropout=0.0, **shape)
        models = torch.nn.ModuleList([mae, classifier])
        mask = mae.draw(25)
        results = []
        for device in ("cpu", "cuda"):
            models.to(device).zero_grad()
            batch, = Loader(train.to(device), FIVE, 25, 8, False).epoch()
            packing = Packing(batch.present, device)
            loss = mae(batch.x, packing, mask)[0]
            loss = loss + F.cross_entropy(classifier(batch.x, packing), batch.label)
            loss.backward()
            grads = [p.grad for p in models.parameters() if p.requires_grad]
            results.append([value.detach().cpu() for value in (batch.x, loss, *grads)])
        close(*results, rtol=1e-3, atol=1e-4)

    def test_graphs_train_alike(self):
        for script, name, flags in ((self.pretrain, "pretrain", "--micro-batch 4 --lr 0.01"),
                                    (self.finetune, "finetune", "--clip 5")):
            line = f"{self.data} --device cuda --no-amp --epochs 6 --batch-size 8 {flags}"
            for graphs in ("graphs", "no-graphs"):
                script(f"{line} --{graphs} --out {graphs}")
            a, b = (load(graphs, f"{name}.pt")["log"] for graphs in ("graphs", "no-graphs"))
            close([row["loss"] for row in a], [row["loss"] for row in b], rtol=1e-2, atol=1e-3)

    def test_scripts(self):
        printed = self.pretrain(f"{self.data} --device auto --amp --epochs 1")
        self.assertIn("on cuda:0 in bfloat16", printed)
        self.assertIn("epoch 3/3", self.pretrain("--device cuda --resume --epochs 3"))
        self.finetune("--ckpt --amp --device cuda:0 --epochs 2 --batch-size 8")
        self.assertIn("epoch 3/3", self.finetune("--device cuda --resume --epochs 3"))
        self.assertIn("top-1", self.finetune("--ckpt runs/finetune/finetune.pt --eval-only"))


class CoreTest(unittest.TestCase):
    def test_the_core_does_not_know_this_folder(self):
        """It can be deleted: no file beside it imports it."""
        files = sorted(ROOT.glob("*.py"))
        self.assertIn("skeletonmae.py", [path.name for path in files])
        for path in files:
            self.assertNotRegex(path.read_text(), r"(?m)^\s*(import|from) extras", path.name)


class DocsTest(unittest.TestCase):
    def test_figures(self):
        """Well-formed, readable in the dark, nothing loaded from elsewhere, small."""
        files = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.svg")}
        self.assertLessEqual({"model.svg", "reconstruction.svg"}, files.keys())
        for name, content in files.items():
            ElementTree.fromstring(content)
            self.assertIn("(prefers-color-scheme:dark)", content, name)
            content = content.replace("http://www.w3.org/2000/svg", "")
            self.assertNotRegex(content, r"https?:|href|\bsrc=|@import|url\([^#]|<script", name)
        self.assertLess(len(files["reconstruction.svg"].encode()), 60_000)
        self.assertIn("prefers-reduced-motion", files["reconstruction.svg"])
        self.assertLess(len(files["model.svg"].encode()), 12_000)
        self.assertLess(sum(path.stat().st_size for path in ROOT.glob("docs/*")), 400_000)


class Result(unittest.TextTestResult):
    def line(self) -> str:
        """Counts whole tests: one with several failing sub-tests failed once."""
        failed = {getattr(test, "test_case", test).id() for test, _ in self.failures + self.errors}
        passed = self.testsRun - len(failed) - len(self.skipped)
        return f"{passed} passed, {len(failed)} failed, {len(self.skipped)} skipped"


class Runner(unittest.TextTestRunner):
    resultclass = Result


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = unittest.main(exit=False, testRunner=Runner).result
    print(result.line(), flush=True)
    sys.exit(not result.wasSuccessful())
