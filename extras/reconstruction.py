"""Draws for visualize.py how a pre-trained model puts masked joints back (paper Fig. 6)."""
from types import SimpleNamespace

from data import DataError, Dataset, Loader  # before torch: it silences its warning
from extras.drawing import Figure, Panel, text
from skeletonmae import SkeletonMAE
import train_pretrain as shared
import torch
from torch import Tensor


def moving(loader: Loader) -> int:
    """Of the loader's sequences the one that moves more than nine in ten, joints against the middle
    of the body, in the units of the model's input."""
    motions = []
    for batch in loader.epoch():
        x = batch.x[..., :loader.channels]
        seen = batch.seen[..., None]
        middle = (x * seen).sum(3, keepdim=True) / seen.sum(3, keepdim=True).clamp(min=1)
        spread = ((x - middle) * seen).std(2).norm(dim=-1).mean(2)           # (N, M)
        motions.append((spread * batch.seen.float().mean((2, 3))).amax(1))   # (N,)
    order = torch.cat(motions).argsort()
    return int(order[int(0.9 * (len(order) - 1))])


def reconstruct(checkpoint: dict, model: SkeletonMAE, data: Dataset, wanted: str | None,
                seed: int) -> SimpleNamespace:
    """Of a test sequence: its name, its joints x, what the pre-trained model makes of them and the
    mean pose, (M, T, V, C) in the units of the data, which are known (M, T, V) and which masked
    (V,), and whether y grows upwards."""
    settings, skeleton, C = checkpoint["settings"], checkpoint["skeleton"], checkpoint["channels"]
    generator = torch.Generator().manual_seed(seed)
    frames = settings["frames"]

    def loader(half, kept: list) -> Loader:
        view = shared.view(shared.Settings(**settings))
        return Loader(half.subset(kept), skeleton, C, 100, frames, view=view, pose=model.stacked)

    def draw(half, count: int) -> list:
        return torch.randperm(len(half), generator=generator)[:count].tolist()

    names = data.test.names
    numbers = [str(i) for i in range(len(names))]
    if wanted is None:
        drawn = draw(data.test, 500)
        wanted = numbers[drawn[moving(loader(data.test, drawn))]]
    if wanted not in names + numbers:
        raise DataError(f"no test sequence {wanted}; expected a number from 0 to "
                        f"{len(names) - 1} or a name such as {names[0]}")
    chosen = (names + numbers).index(wanted) % len(names)
    batch = next(iter(loader(data.test, [chosen]).epoch()))
    mean = shared.measure_target(loader(data.train, draw(data.train, 2000)))[2]  # (M, V, C)
    mask = model.draw(1, generator)
    guess = model.reconstruct(batch.x, batch.present, mask, batch.target)[0][0]
    x = batch.target[0, ..., :C]
    head, leg = (float(mean[0, skeleton["parts"].get(part, [0]), 1].mean())
                 for part in ("head", "left_leg"))
    return SimpleNamespace(
        name=names[chosen], x=x * batch.unit, guess=guess * batch.unit,
        mean=mean[:, None] * batch.unit, known=batch.seen[0], masked=mask[0],
        upwards=head > leg or head == leg and C == 3)  # equal: there are no such parts


def stick(places: Tensor, bones: Tensor, dots: Tensor, style: str) -> str:
    """One person in one frame: V places, the bones to draw (B, 2) and which joints to dot."""
    lines = "".join(f"M{x:.3g} {y:.3g}L{x2:.3g} {y2:.3g}"
                    for (x, y), (x2, y2) in places[bones].tolist())
    marks = "".join(f"M{x:.3g} {y:.3g}h0" for x, y in places[dots].tolist())
    return f'<path class="bone {style}" d="{lines}"/><path class="joint {style}" d="{marks}"/>'


def pose(edges: Tensor, true: Tensor, guess: Tensor, known: Tensor, masked: Tensor) -> tuple:
    """One frame as it is, as the encoder sees it, and as it is reconstructed. edges: (E, 2); true,
    guess: (M, V, 2); known: (M, V); masked: (V,)."""
    layers = ["", "", ""]
    for m in known.any(1).nonzero().flatten().tolist():
        visible = known[m] & ~masked
        hidden = known[m] & masked
        there = visible | masked
        whole = edges[known[m][edges].all(1)]
        kept = edges[visible[edges].all(1)]
        filled = edges[there[edges].all(1) & masked[edges].any(1)]
        rest = stick(true[m], kept, visible, f"p{m}")
        layers[0] += stick(true[m], whole, known[m], f"p{m}")
        layers[1] += rest
        for style in ("ring", "hole"):
            layers[1] += stick(true[m], edges[:0], hidden, style)
        layers[2] += stick(true[m], whole, known[m], "true")
        layers[2] += stick(guess[m], filled, masked, f"c{5 * m}") + rest
    return tuple(layers)


def reconstruction(checkpoint: dict, model: SkeletonMAE, data: Dataset, wanted: str | None,
                   seed: int) -> Figure:
    """Paper Fig. 6: a test sequence as it is, as the encoder sees it, and as it is reconstructed,
    moving and in four frames. A person is looked at from a little to the side where there is
    depth."""
    found = reconstruct(checkpoint, model, data, wanted, seed)
    known, masked = found.known, found.masked
    _, T, V, C = found.x.shape
    if not known.any():
        raise DataError(f"test sequence {found.name} has no joint to draw; expected another "
                        "--sequence")
    error, mean_error = (float((guess - found.x).norm(dim=-1)[known & masked].mean())
                         for guess in (found.guess, found.mean))

    down = -1.0 if found.upwards else 1.0  # y grows downwards on a page
    view = torch.tensor([[0.9, 0], [0, down], [0.44, 0]] if C == 3 else [[1.0, 0], [0, down]])
    true = found.x @ view                                                   # (M, T, V, 2)
    guess = torch.where(masked[..., None], found.guess, found.x) @ view
    weight = known[..., None].float()
    middle = (true * weight).sum((0, 2)) / weight.sum((0, 2)).clamp(min=1)  # (T, 2)
    middle[:, 1] = 0  # centred sideways only: a jump is seen
    true, guess = true - middle[:, None], guess - middle[:, None]
    people = known.any(2, keepdim=True) & masked  # (M, T, V), whose masked joints are put back
    drawn_at = torch.cat([true[known], guess[people]])
    low, high = drawn_at.amin(0), drawn_at.amax(0)
    size = (high - low).clamp(min=1e-6)
    edges = torch.tensor(checkpoint["skeleton"]["edges"]).view(-1, 2).long()

    def drawn(frame: int, width: float, tall: float) -> tuple:
        """The three poses of a frame around (0, 0), and their height."""
        scale = float((torch.tensor([width, tall]) / size).amin())
        places = [(v[:, frame] - (low + high) / 2) * scale for v in (true, guess)]
        return pose(edges, *places, known[:, frame], masked), scale * float(size[1])

    titles = {"input": "", "masked": "rings: hidden", "reconstructed": "blue; grey: true pose"}
    frames = torch.linspace(0, T - 1, min(24, T)).round().long().tolist()
    poses = [drawn(frame, 146, 300) for frame in frames]
    away = (true - true.mean(1, keepdim=True)).norm(dim=-1).mean((0, 2))[frames]
    most_moved = int(away.argmax())  # what stands where motion is unwelcome
    height = poses[0][1]
    seconds = len(frames) / 6
    body = (f"<style>.frame{{visibility:hidden;animation:show {seconds:.3g}s step-end infinite}}"
            f"@keyframes show{{0%{{visibility:visible}}{100 / len(frames):.4g}%"
            "{visibility:hidden}}@media print,(prefers-reduced-motion:reduce){.frame"
            "{animation:none}.still{visibility:visible}}</style>")
    for row, (title, key) in enumerate(titles.items()):
        x = 80 + 160 * row
        body += text(x, 16, title, "bold mid") + text(x, height + 58, key, "small mid grey")
        body += f'<g transform="translate({x} {34 + height / 2:.4g})">'
        for i, (layers, _) in enumerate(poses):
            still = " still" if i == most_moved else ""
            delay = f"animation-delay:{i / 6 - seconds:.3g}s"
            body += f'<g class="frame{still}" style="{delay}">{layers[row]}</g>'
        body += "</g>"
    panels = [Panel("reconstruction", 480, height + 66, body)]

    body = ""
    for column, frame in enumerate(frames[i * (len(frames) - 1) // 3] for i in range(4)):
        layers, height = drawn(frame, 112, 130)
        x = 60 + 120 * column
        body += text(x, 14, f"frame {frame + 1}", "small mid grey")
        for row, (title, layer) in enumerate(zip(titles, layers)):
            top = 20 + row * (height + 32)
            body += text(4, top + 12, title, "bold") if column == 0 else ""
            body += f'<g transform="translate({x} {top + 22 + height / 2:.4g})">{layer}</g>'
    panels.append(Panel("reconstruction-frames", 480, 3 * (height + 32) + 18, body))

    masking = checkpoint["model_settings"]
    what = "drawn at random"
    if not masking["mask_ratio"] and not masking["mask_num_parts"]:
        what = ", ".join(masking["mask_parts"])
    caption = (f"Test sequence {found.name:.60}, {int(masked.sum())} of {V} joints masked "
               f"({what}). Mean error of its masked joints {error:.3g}, by the mean pose "
               f"{mean_error:.3g}, in the units of the data")
    measured = [row for row in checkpoint["log"] if "joint_error" in row][-1:]
    for row in measured:
        caption += f"; over the whole test set {row['joint_error']:.3g}"
        caption += f" and {row['mean_pose_error']:.3g}"
    return Figure("Reconstruction", "paper Fig. 6", caption + ".", panels)
