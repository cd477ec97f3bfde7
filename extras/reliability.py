"""What training and reading survive, on tiny data in a temporary folder.

    python -m extras.reliability                            # about ten minutes
    python -m extras.reliability --kills 2 --count 100 --steps 500

Training that is killed (kill -9) at random moments and resumed ends with the same bits. Damaged
data files and checkpoints end in one line (DataError, OSError) or in a valid read, never in another
exception, a crash or a hang. Steps of training take no more and more memory.
"""
import argparse
import itertools
import math
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from array import array
from pathlib import Path
from unittest import mock

import data  # before torch: it silences torch's warning about numpy
from extras.benchmark import npy_header
from skeletonmae import SkeletonMAE
import train_pretrain as shared
import torch

ROOT = os.path.dirname(data.__file__)
TINY = "--synthetic-size 40 --device cpu --width 8 --hidden 8 --layers 1 --frames 8 --batch-size 8"


def write_pt(path: str):
    """4 + 2 sequences of 6 to 9 frames of 17 joints in 2D."""
    x = [torch.arange(1.0, 34 * T + 1).view(T, 17, 2) for T in (6, 7, 8, 9, 6, 7)]
    annotations = [{"keypoint": keypoint, "label": i % 2} for i, keypoint in enumerate(x)]
    split = {"train": [0, 1, 2, 3], "test": [4, 5]}
    torch.save({"annotations": annotations, "split": split}, path)


def write_npz(path: str, compression: int):
    """CTR-GCN's: 4 + 2 sequences of 3 frames of 20 joints in 3D."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for half, N in (("train", 4), ("test", 2)):
            x = array("f", (1.0 + i % 97 for i in range(N * 180)))
            y = array("d", [1, 0, 0, 1] * (N // 2))
            archive.writestr(f"x_{half}.npy", npy_header("<f4", N, 3, 60) + x.tobytes())
            archive.writestr(f"y_{half}.npy", npy_header("<f8", N, 2) + y.tobytes())


def write_pickle(path: str):
    """PYSKL's: six annotations of 2 frames of 17 joints in 2D with scores. numpy is not here to
    write its arrays: modules and names of numpy's stand in while they are pickled."""
    modules = {}
    for place in ("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct"):
        module, _, name = place.rpartition(".")
        modules.setdefault(module, types.ModuleType(module))
        setattr(modules[module], name, type(name, (), {"__module__": module}))
    numpy, rebuild = modules["numpy"], modules["numpy.core.multiarray"]._reconstruct
    order = 3, "<", None, None, None, -1, -1, 0
    numpy.dtype.__reduce__ = lambda self: (numpy.dtype, ("f4", False, True), order)

    class Array:
        def __init__(self, *shape: int):
            numbers = array("f", (1.0 + i % 89 for i in range(math.prod(shape))))
            self.state = 1, shape, numpy.dtype(), False, numbers.tobytes()

        def __reduce__(self):
            return rebuild, (numpy.ndarray, (0,), b"b"), self.state

    annotations = [{"frame_dir": f"a{i}", "label": i % 2, "keypoint": Array(1, 2, 17, 2),
                    "keypoint_score": Array(1, 2, 17)} for i in range(6)]
    split = {"train": ["a0", "a1", "a2", "a3"], "test": ["a4", "a5"]}
    with mock.patch.dict(sys.modules, modules):
        Path(path).write_bytes(pickle.dumps({"annotations": annotations, "split": split}, 4))


def start(folder: str, *words: str) -> subprocess.Popen:
    """A Python process whose first line can be read as soon as it is written."""
    return subprocess.Popen([sys.executable, "-u", *words], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT})


def finish(run: subprocess.Popen) -> str:
    said, errors = run.communicate()
    assert (run.returncode, errors) == (0, ""), f"exit {run.returncode}: {errors[-2000:]}"
    return said


def check_same(script: str, *folders: str):
    """The same bits: weights, optimiser and log, and of fine-tuning the test outputs."""
    parts = {f"{script}.pt": ("model", "optimizer", "log", "epoch")}
    if script == "finetune":
        parts["test_outputs.pt"] = ("logits", "features", "labels", "metrics")
    for file, keys in parts.items():
        a, b = (torch.load(f"{folder}/{file}", weights_only=True) for folder in folders)
        for key in keys:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, equal_nan=True)
    a, b = (Path(folder, "log.csv").read_text() for folder in folders)
    assert a == b, f"other log.csv in {folders}"


def kills(script: str, count: int, epochs: int = 15) -> str:
    """Each time killed between the first line, once the data are read, and the end."""
    draw = random.Random(0)
    words = f"{TINY} --epochs {epochs} --eval-every 1"
    if script == "finetune":
        words += " --strl-layers 2 --blocks 1 --milestones 10,13"
    resumed = 0
    with tempfile.TemporaryDirectory() as folder:
        def begin(words: str) -> subprocess.Popen:
            return start(folder, f"{ROOT}/train_{script}.py", *words.split())

        whole = begin(f"{words} --out whole")
        whole.stdout.readline()
        first_line = time.monotonic()
        finish(whole)
        lasts = time.monotonic() - first_line
        for trial in range(count):
            out = f"killed{trial}"
            run = begin(f"{words} --out {out}")
            run.stdout.readline()
            time.sleep(draw.random() * lasts)
            run.kill()
            run.communicate()
            saved = os.path.exists(f"{folder}/{out}/{script}.pt")  # else: in the first epoch
            resumed += saved
            finish(begin(f"{'--resume' if saved else words} --out {out}"))
            check_same(script, f"{folder}/whole", f"{folder}/{out}")
    return f"{script}: {count} kills, {resumed} resumed, the same bits each time"


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Damage at a random place, two times of three near the beginning or the end, where headers and
    directories are, or in a number that stands there in words."""
    numbers = [*re.finditer(rb"\d+", content[:400])]
    if numbers and draw.random() < 0.15:
        number = draw.choice(numbers)
        other = draw.choice((b"1152921504606846976", b"0", b"-1", b"99999", b"(" * 900))
        return content[:number.start()] + other + content[number.end():]
    near = min(400, len(content))
    place = draw.choice((draw.randrange(len(content)), draw.randrange(near),
                         len(content) - 1 - draw.randrange(near)))
    after = content[place:]
    length = draw.choice((0, 1 << 31, 1 << 60, 1 << 63, (1 << 64) - 1)).to_bytes(8, "little")
    length = length[:draw.choice((1, 2, 4, 8))]
    return content[:place] + draw.choice((
        b"",                                                             # cut off
        after[draw.randint(1, 64):],                                     # a hole
        after[:draw.randint(1, 64)] + after,                             # a repetition
        length + after[len(length):],                                    # another length
        bytes([after[0] ^ 1 << draw.randrange(8)]) + after[1:],          # one bit
        draw.randbytes(draw.randint(1, 8)) + after[draw.randint(1, 8):]  # more or fewer bytes
    ))


def read(path: str):
    """As a user does, data batch by batch."""
    if "finetune" in path:
        shared.read_checkpoint(path, ("finetune",))
        return
    found = data.load(path)
    for half in (found.train, found.test):
        for batch in data.Loader(half, found.skeleton, 8, 4, False).epoch():
            assert batch.x.isfinite().all()
            assert 0 <= batch.label.min() and batch.label.max() < len(found.classes)


def read_mutants(path: str, count: int):
    """Runs in a process of its own: a crash ends it, and so do 10 seconds and 8 GB for one read."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    content = Path(path).read_bytes()
    read(path)
    accepted = 0
    for i in range(count):
        Path(path).unlink()  # a file that is mapped into memory must not change
        Path(path).write_bytes(mutated(content, random.Random(i)))
        signal.alarm(10)
        try:
            read(path)
            accepted += 1
        except (data.DataError, OSError) as error:
            assert "\n" not in str(error), f"mutation {i}: {error}"
        except Exception as error:
            raise AssertionError(f"mutation {i} of {path}: {error!r}") from error
        signal.alarm(0)
    print(f"{path}: {count} mutations, {accepted} still readable")


def mutations(count: int):
    """`count` of each kind of file, of npz half of them compressed. Yields what to print."""
    with tempfile.TemporaryDirectory() as folder:
        write_pt(f"{folder}/data.pt")
        write_npz(f"{folder}/stored.npz", zipfile.ZIP_STORED)
        write_npz(f"{folder}/deflated.npz", zipfile.ZIP_DEFLATED)
        write_pickle(f"{folder}/annotations.pkl")
        words = f"{TINY} --strl-layers 2 --blocks 1 --epochs 1 --out ."
        finish(start(folder, f"{ROOT}/train_finetune.py", *words.split()))
        for name in ("stored.npz", "deflated.npz", "annotations.pkl", "data.pt", "finetune.pt"):
            times = count // 2 if name.endswith("npz") else count
            call = f"extras.reliability.read_mutants({name!r}, {times})"
            yield finish(start(folder, "-c", f"import extras.reliability; {call}")).rstrip()


def memory(steps: int) -> str:
    figures = data.load(synthetic_size=320)
    model = SkeletonMAE(figures.skeleton, figures.channels, 16, 16)
    optimizer = torch.optim.Adam(model.parameters())
    loader = data.Loader(figures.train, figures.skeleton, 8, 16, True,
                         augmentation=data.Augmentation(scaling=0.1))
    batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
    taken = []  # pages
    for batch in itertools.islice(batches, steps):
        model(batch.x, batch.present)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(int(Path("/proc/self/statm").read_text().split()[1]))
    growth = (taken[-1] - taken[min(100, steps // 2)]) * resource.getpagesize() / 1e6  # MB
    assert growth < 20, f"{growth:.1f} MB more after {steps} steps than after 100"
    return f"{steps} steps: {growth:+.1f} MB after the first 100"


def main(argv=None):
    parser = argparse.ArgumentParser("python -m extras.reliability", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="of each script; default 25")
    parser.add_argument("--count", type=int, default=2000, help="of mutations; default 2000")
    parser.add_argument("--steps", type=int, default=5000, help="of training; default 5000")
    asked = parser.parse_args(argv)
    print(memory(asked.steps), flush=True)
    print(kills("pretrain", asked.kills), flush=True)
    print(kills("finetune", asked.kills), flush=True)
    for line in mutations(asked.count):
        print(line, flush=True)


if __name__ == "__main__":
    main()
