"""Measures the rows of the speed table that need no GPU, and writes the data for those that do.

    python -m extras.benchmark                                  # all rows
    python -m extras.benchmark P1 P4                            # some of them
    python -m extras.benchmark --write-ntu ntu.npz 40091 16487  # data of NTU 60's size: P9, P10
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import timeit
import zipfile

import data  # before torch: it silences torch's warning about numpy
from skeletonmae import SKELETONS, Packing, SkeletonClassifier, SkeletonMAE
import train_pretrain as shared
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

COCO = SKELETONS["coco17"]


def npy_header(code: str, *shape: int) -> bytes:
    """What stands in a .npy file before its numbers."""
    text = f"{{'descr': '{code}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()


def write_ntu(path: str, sequences: int, test_sequences: int):
    """Random skeletons as a stored npz in the layout of NTU60_CS.npz: 300 frames, of which 40 to
    140 hold somebody, and two persons of 25 joints, the second one mostly absent."""
    draw = torch.Generator().manual_seed(0)

    def numbers(x: torch.Tensor) -> bytearray:
        buffer = bytearray(x.nbytes)
        torch.frombuffer(buffer, dtype=x.dtype).copy_(x.flatten())
        return buffer

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for half, N in (("train", sequences), ("test", test_sequences)):
            with archive.open(f"x_{half}.npy", "w", force_zip64=True) as file:
                file.write(npy_header("<f4", N, 300, 150))
                for first in range(0, N, 128):
                    x = torch.randn(min(128, N - first), 300, 2, 75, generator=draw)
                    length = torch.randint(40, 140, (len(x), 1, 1, 1), generator=draw)
                    x *= torch.arange(300)[:, None, None] < length
                    x[torch.rand(len(x), generator=draw) < 0.75, :, 1] = 0
                    file.write(numbers(x))
            labels = F.one_hot(torch.arange(N) % 60, 60).double()
            archive.writestr(f"y_{half}.npy", npy_header("<f8", N, 60) + numbers(labels))


def seconds(work, repeats: int = 9) -> float:
    """The median, after two warm-ups."""
    return statistics.median(timeit.repeat(work, number=1, repeat=repeats + 2)[2:])


def training_step(model, optimizer, loss, amp: bool):
    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            error = loss()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def pretraining_step(amp: bool = False):
    """64 sequences x 64 frames x 17 joints of one person, an encoder of 3 x 256."""
    model = SkeletonMAE(COCO, 2, hidden=256)
    x = torch.randn(64, 1, 64, 17, 2)
    return training_step(model, torch.optim.Adam(model.parameters()), lambda: model(x)[0], amp)


def finetuning_step(N: int = 16, T: int = 64, M: int = 2):
    """N sequences x M persons x T frames x 17 joints, the default model, 60 classes."""
    model = SkeletonClassifier(COCO, 2, 60, persons=2)
    x = torch.randn(N, 2, T, 17, 2)
    x[:, M:] = 0
    packing = Packing(x.flatten(2).any(2), "cpu")
    label = torch.arange(N) % 60
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    return training_step(model, optimizer, lambda: F.cross_entropy(model(x, packing), label), False)


def rate(step, N: int) -> str:
    """Sequences a second, and the share in FLOP a second of a matrix product of P1's shapes."""
    taken = seconds(step)
    a, b = torch.randn(69632, 256), torch.randn(256, 256)
    limit = 2 * a.numel() * 256 / seconds(lambda: a @ b)
    with FlopCounterMode(display=False) as counter:
        step()
    percent = 100 * counter.get_total_flops() / taken / limit
    return f"{N / taken:.1f} sequences/s, {percent:.0f} % of the matrix-product limit"


def p1():
    work = "pre-training step, 64 sequences x 64 frames x 17 joints, 3 x 256"
    yield f"{work}: {rate(pretraining_step(), 64)}"


def p2():
    yield f"the same in bfloat16: {64 / seconds(pretraining_step(amp=True), 3):.1f} sequences/s"


def p3():
    work = "fine-tuning step, 16 sequences x 2 persons x 64 frames x 17 joints"
    yield f"{work}: {rate(finetuning_step(), 16)}"


def p4(sequences: int = 1024):
    with tempfile.TemporaryDirectory() as folder:
        write_ntu(f"{folder}/ntu.npz", sequences, 60)
        ntu = data.load(f"{folder}/ntu.npz")
        augment = data.Augmentation(rotation=30, scaling=0.1, shift=0.1)
        for batch in (sequences, sequences // 8):
            loader = data.Loader(ntu.train, ntu.skeleton, batch, 64, True, augmentation=augment)
            taken = seconds(lambda: sum(1 for _ in loader.epoch())) / sequences
            yield (f"a training sample of NTU's shape, augmented, batch {batch}: "
                   f"{1000 * taken:.4f} ms")


FIRST_BATCH = """
import sys, time
begin = time.perf_counter()
import data, train_pretrain
train_pretrain.keep_freed_memory()
ntu = data.load(sys.argv[1])
next(iter(data.Loader(ntu.train, ntu.skeleton, 256, 64, True).epoch()))
print(f"{time.perf_counter() - begin:.1f} s", end=", ")
anonymous = [line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")]
print(f"{int(anonymous[0]) / 1e6:.2f} GB of anonymous memory")
"""


def p5(sequences: int = 40091):
    with tempfile.TemporaryDirectory() as folder:
        write_ntu(f"{folder}/ntu.npz", sequences, 60)
        size = os.path.getsize(f"{folder}/ntu.npz") / 1e9
        said = subprocess.check_output([sys.executable, "-c", FIRST_BATCH, f"{folder}/ntu.npz"],
                                       cwd=os.path.dirname(data.__file__), text=True)
        yield f"from the start of Python to the first batch of {size:.1f} GB: {said.strip()}"


def p6():
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen([sys.executable, shared.__file__, "--synthetic-size", "1280",
                                  "--device", "cpu", "--no-amp", "--epochs", "1", "--out", folder],
                                 stdout=subprocess.DEVNULL)
        usage = os.wait4(child.pid, 0)[2]
    work = "an epoch of pre-training, batch 1024, micro-batch 256, 64 frames x 17 joints"
    yield f"peak memory of {work}: {usage.ru_maxrss / 1e6:.2f} GB"


@torch.inference_mode()
def p7():
    model = SkeletonClassifier(COCO, 2, 60).eval()
    one, many = torch.randn(1, 1, 64, 17, 2), torch.randn(64, 1, 64, 17, 2)
    yield (f"inference: one sequence of one person {1000 * seconds(lambda: model(one), 50):.1f} "
           f"ms; batches of 64 {64 / seconds(lambda: model(many)):.0f} sequences/s")
    with torch.autocast("cpu", torch.bfloat16):
        yield f"the same in bfloat16: {64 / seconds(lambda: model(many)):.0f} sequences/s"


def p8():
    for what, counts, step in (("sequences", (8, 16, 32, 64), lambda n: finetuning_step(n, 64, 1)),
                               ("frames", (32, 64, 128, 256), lambda n: finetuning_step(16, n, 1)),
                               ("persons", (1, 2), lambda n: finetuning_step(16, 64, n))):
        steps = [step(n) for n in counts]
        rounds = [[seconds(step, 3) for step in steps] for _ in range(5)]  # one after the other
        each = [statistics.median(taken) / n for taken, n in zip(zip(*rounds), counts)]
        yield (f"cost per unit at {', '.join(map(str, counts))} {what}, relative to the first: "
               + ", ".join(f"{cost / each[0]:.2f}" for cost in each))


ROWS = {"P1": p1, "P2": p2, "P3": p3, "P4": p4, "P5": p5, "P6": p6, "P7": p7, "P8": p8}


def main(argv=None):
    parser = argparse.ArgumentParser("python -m extras.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="P1 to P8; default: all")
    parser.add_argument("--write-ntu", nargs=3, metavar=("FILE", "SEQUENCES", "TEST_SEQUENCES"))
    asked = parser.parse_args(argv)
    if asked.write_ntu:
        return write_ntu(asked.write_ntu[0], *map(int, asked.write_ntu[1:]))
    if unknown := set(asked.rows) - ROWS.keys():
        parser.error(f"no row {', '.join(sorted(unknown))}; expected {', '.join(ROWS)}")
    shared.keep_freed_memory()
    for row in asked.rows or ROWS:
        for line in ROWS[row]():
            print(f"{row}  {line}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))  # the table is of two cores
    main()
