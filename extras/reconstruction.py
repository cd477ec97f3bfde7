"""Draws for visualize.py how a pre-trained model puts masked joints back (paper Fig. 6)."""
from types import SimpleNamespace

from data import DataError, Dataset, Loader  # before torch: it silences its warning
from extras.drawing import Figure, Panel, text
from skeletonmae import SkeletonMAE
import train_pretrain as shared
import torch
from torch import Tensor


def moving(loader: Loader) -> int:
    """Of the loader's sequences the one that moves more than three in four, joints against the
    middle of the body, in the units of the model's input."""
    motions = []
    for batch in loader.epoch():
        x = batch.x
        spread = (x - x.mean(3, keepdim=True)).std(2).norm(dim=-1).mean(2)   # (N, M)
        motions.append((spread * batch.seen.float().mean((2, 3))).amax(1))   # (N,)
    order = torch.cat(motions).argsort()
    return int(order[int(0.75 * (len(order) - 1))])


def reconstruct(checkpoint: dict, model: SkeletonMAE, data: Dataset, wanted: str | None,
                seed: int) -> SimpleNamespace:
    """Of a test sequence: its name, the target x, what the pre-trained model makes of it and the
    mean pose, (M, T, V, C) in the units of the data, which are known (M, T, V) and which masked
    (V,), and whether y grows upwards."""
    settings, skeleton = checkpoint["settings"], checkpoint["skeleton"]
    form = {"view": shared.pick(shared.Settings(**settings), *shared.VIEW), "pose": model.stacked}
    generator = torch.Generator().manual_seed(seed)

    def loader(half, kept: list) -> Loader:
        return Loader(half.subset(kept), skeleton, 100, settings["frames"], **form)

    def draw(half, count: int) -> list:
        return torch.randperm(len(half), generator=generator)[:count].tolist()

    names = data.test.names
    numbers = [str(i) for i in range(len(names))]
    if wanted is None:
        drawn = draw(data.test, 500)
        wanted = names[drawn[moving(loader(data.test, drawn))]]
    if wanted not in names + numbers:
        raise DataError(f"no test sequence {wanted}; expected a number from 0 to "
                        f"{len(names) - 1} or a name such as {names[0]}")
    chosen = (names + numbers).index(wanted) % len(names)
    batch = next(iter(loader(data.test, [chosen]).epoch()))
    mean = shared.measure_target(loader(data.train, draw(data.train, 2000)))[2]  # (M, V, C)
    mask = model.draw(1, generator)
    guess = model.reconstruct(batch.x, batch.present, mask, batch.target)[0][0]
    head, leg = (float(mean[0, skeleton["parts"].get(part, [0]), 1].mean())
                 for part in ("head", "left_leg"))
    return SimpleNamespace(
        name=names[chosen], x=batch.target[0] * batch.unit,
        guess=guess * batch.unit, mean=mean[:, None] * batch.unit, known=batch.seen[0],
        masked=mask[0],
        upwards=head > leg or head == leg and data.channels == 3)  # equal: no such parts


def stick(places: Tensor, edges: Tensor, joints: Tensor, style: str) -> str:
    """One person in one frame: of V places which joints to dot, and the edges between those."""
    lines = "".join(f"M{x:.3g} {y:.3g}L{x2:.3g} {y2:.3g}"
                    for (x, y), (x2, y2) in places[edges[joints[edges].all(1)]].tolist())
    dots = "".join(f"M{x:.3g} {y:.3g}h0" for x, y in places[joints].tolist())
    return f'<path class="bone {style}" d="{lines}"/><path class="joint {style}" d="{dots}"/>'


def pose(edges: Tensor, true: Tensor, guess: Tensor, known: Tensor, masked: Tensor) -> tuple:
    """One frame as it is, without the masked joints, and as it is reconstructed. edges: (E, 2);
    true, guess: (M, V, 2); known: (M, V); masked: (V,)."""
    whole = seen = rebuilt = ""
    for m in known.any(1).nonzero().flatten().tolist():
        visible, hidden = known[m] & ~masked, known[m] & masked
        rest = stick(true[m], edges, visible, f"p{m}")
        whole += stick(true[m], edges, known[m], f"p{m}")
        seen += rest + "".join(stick(true[m], edges[:0], hidden, style)
                               for style in ("ring", "hole"))
        filled = edges[masked[edges].any(1)]  # over its visible joints comes the rest
        rebuilt += stick(true[m], edges, known[m], "true")
        rebuilt += stick(guess[m], filled, visible | masked, f"c{5 * m}") + rest
    return whole, seen, rebuilt


def reconstruction(checkpoint: dict, model: SkeletonMAE, data: Dataset, wanted: str | None,
                   seed: int) -> Figure:
    """Paper Fig. 6: a test sequence as it is, without the masked joints, and as it is
    reconstructed, moving: the target, which of STRL layers is the pose. A person is looked at from
    a little to the side where there is depth."""
    found = reconstruct(checkpoint, model, data, wanted, seed)
    known, masked = found.known, found.masked
    _, T, V, C = found.x.shape
    if not known.any():
        raise DataError(f"sequence {found.name} has no joint to draw; expected another --sequence")
    error, mean_error = (float((guess - found.x).norm(dim=-1)[known & masked].mean())
                         for guess in (found.guess, found.mean))
    down = -1.0 if found.upwards else 1.0  # y grows downwards on a page
    view = torch.tensor([[0.9, 0], [0, down], [0.44, 0]] if C == 3 else [[1.0, 0], [0, down]])
    true = found.x @ view                                                   # (M, T, V, 2)
    guess = torch.where(masked[..., None], found.guess, found.x) @ view
    middle = (true[..., 0] * known).sum((0, 2)) / known.sum((0, 2)).clamp(min=1)  # (T,)
    for places in (true, guess):
        places[..., 0] -= middle[:, None]  # centred sideways only: a jump is seen
    drawn_at = torch.cat([true[known], guess[known.any(2, keepdim=True) & masked]])
    low, high = drawn_at.amin(0), drawn_at.amax(0)
    size = (high - low).clamp(min=1e-6)
    scale = float((torch.tensor([124, 260]) / size).amin())
    height = scale * float(size[1])
    true, guess = ((v - (low + high) / 2) * scale for v in (true, guess))  # around (0, 0)

    edges = torch.tensor(checkpoint["skeleton"]["edges"]).view(-1, 2).long()
    frames = torch.linspace(0, T - 1, min(24, T)).round().long().tolist()
    poses = [pose(edges, true[:, t], guess[:, t], known[:, t], masked) for t in frames]
    stands = (true - true.mean(1, keepdim=True)).norm(dim=-1).mean((0, 2))[frames].argmax().item()
    n = len(frames)  # of a film whose frames lie side by side, 400 wide
    body = (f"<style>.film{{transform:translateX({-400 * stands}px);animation:film {n / 6:.4g}s "
            f"steps({n}) infinite}}@keyframes film{{from{{transform:none}}to{{transform:"
            f"translateX({-400 * n}px)}}}}@media print,(prefers-reduced-motion:reduce)"
            "{.film{animation:none}}</style>")
    titles = {"true": "", "masked": "as rings", "reconstructed": "blue; grey: true"}
    for x, (title, key) in zip((68, 200, 332), titles.items()):
        body += text(x, 16, title, "bold mid") + text(x, height + 58, key, "small mid grey")
    body += '<g class="film">'
    for i, layers in enumerate(poses):
        body += text(68 + 400 * i, height + 58, f"frame {frames[i] + 1} of {T}", "small mid grey")
        for x, layer in zip((68, 200, 332), layers):
            body += f'<g transform="translate({x + 400 * i} {34 + height / 2:.4g})">{layer}</g>'
    body += "</g>"

    masking = checkpoint["model_settings"]
    drawn = masking["mask_ratio"] or masking["mask_num_parts"]
    what = "drawn at random" if drawn else ", ".join(masking["mask_parts"])
    caption = (f"Test sequence {found.name:.60}, {int(masked.sum())} of {V} joints masked ({what}):"
               " rings at their true places, blue as predicted, over the true pose in grey. Lines: "
               "the graph's edges. "
               + "Chosen for moving more than three in four test sequences. " * (wanted is None)
               + f"Mean error of masked joints: model {error:.3g}, mean pose of the training set "
               f"{mean_error:.3g}, in the units of the data")
    for row in [row for row in checkpoint["log"] if "joint_error" in row][-1:]:
        caption += f"; over the whole test set {row['joint_error']:.3g} and "
        caption += f"{row['mean_pose_error']:.3g}"
    return Figure("Reconstruction", "paper Fig. 6", caption + ".",
                  [Panel("reconstruction", 400, height + 66, body)])
