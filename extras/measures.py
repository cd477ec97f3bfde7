"""What visualize.py computes: PCA, t-SNE, the confusion matrix and 95 % intervals."""
import csv
import math
import statistics

from data import DataError  # before torch: it silences its warning
import torch
from torch import Tensor


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


def interval(hits: float, count: float) -> tuple:
    """Wilson's 95 % interval of the share hits / count, in percent."""
    z = 1.96
    middle = (hits + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(hits * (count - hits) / count + z * z / 4)
    return 100 * (middle - half), 100 * (middle + half)


def class_interval(counts: Tensor) -> tuple:
    """The 95 % interval of the mean class accuracy, in percent: each class's hits are binomial.
    A class without an error has a variance, too: a share is taken as (hits + 1) / (count + 2)."""
    total = counts.sum(1)
    tested = total > 0
    share = (counts.diagonal() + 1)[tested] / (total + 2)[tested]
    half = 196 * float((share * (1 - share) / total[tested]).sum().sqrt() / tested.sum())
    mean = 100 * float((counts.diagonal()[tested] / total[tested]).mean())
    return max(mean - half, 0), min(mean + half, 100)


def mean_interval(values: list) -> float:
    """Half of Student's 95 % interval of a mean; 0 of a single value."""
    df = len(values) - 1
    if not df:
        return 0.0
    t = (12.706, 4.303, 3.182, 2.776)[df - 1] if df < 5 else 1.96 + 2.372 / df + 3.5 / df**2
    return t * statistics.stdev(values) / math.sqrt(len(values))


def read_shares(path: str) -> dict:
    """Lines of share,arm,accuracy, in percent, one a run: arm -> {share: (mean accuracy, half of
    its 95 % interval, number of runs)}, shares ascending."""
    arms = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                share, accuracy = float(row["share"]), float(row["accuracy"])
                if not 0 < share <= 100 or not 0 <= accuracy <= 100:
                    raise ValueError(f"share {share:g}, accuracy {accuracy:g}")
                arms.setdefault(row["arm"], {}).setdefault(share, []).append(accuracy)
        if not arms:
            raise ValueError("no lines")
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: {error}; expected lines of share,arm,accuracy under these three "
                        "words, shares and accuracies in percent, shares above 0") from None
    return {arm: {share: (statistics.mean(runs), mean_interval(runs), len(runs))
                  for share, runs in sorted(cells.items())} for arm, cells in arms.items()}
