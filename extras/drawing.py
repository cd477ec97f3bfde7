"""SVG without a library, for visualize.py: text and marks, legend, axes, and the page around them.

Lengths are pixels, y grows downwards. `at` is what takes the coordinates of data to pixels.
"""
import html
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#777")  # Okabe, Ito
TEXT = ""  # what stands at a point: words, or a relative SVG path
DOT = "h0"
LINE = "m-6 0h12"
MARKS = (DOT, "m-3 0h6m-3-3v6", "m-2-2h4v4h-4z", "m0-3l3 5h-6z", "m-2-2l4 4m0-4l-4 4",
         "m0-3l3 3-3 3-3-3z")
FONT = 'Helvetica,Arial,"Liberation Sans",sans-serif'
STYLE = f"""text{{font:12px {FONT};fill:#222}}
.small{{font-size:11px}}.tiny{{font-size:8px}}.bold{{font-weight:bold}}.grey{{fill:#666}}
.mid{{text-anchor:middle}}.end{{text-anchor:end}}
.halo{{stroke:#fff;stroke-width:3px;paint-order:stroke;stroke-linejoin:round}}
.paper,.on{{fill:#fff}}.none{{fill:#e2e2e2}}.heat{{fill:#0072b2}}.soft{{opacity:.45}}
.grid,.axis,.dash,.line,.bone,.joint{{fill:none}}.grid{{stroke:#e2e2e2}}.axis{{stroke:#777}}
.dash{{stroke-dasharray:5 3}}.line{{stroke-width:1.8}}.mark{{fill-opacity:.25;stroke-width:1.2}}
.joint,.dot,.bone{{stroke-linecap:round}}.dot{{stroke-width:4.6}}.big{{stroke-width:8}}
.bone{{stroke-width:2}}.joint{{stroke-width:5}}.true{{stroke:#c8c8c8}}.p0{{stroke:#222}}
.p1{{stroke:#8c8c8c}}.ring{{stroke:#d55e00;stroke-width:8}}.hole{{stroke:#fff;stroke-width:5}}
{"".join(f".c{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(COLOURS))}
@media screen and (prefers-color-scheme:dark){{text{{fill:#e4e4e4}}.halo{{stroke:#16181c}}
.paper,.on{{fill:#16181c}}.axis{{stroke:#8a8a8a}}.grid{{stroke:#33373d}}.none{{fill:#33373d}}
.heat{{fill:#56b4e9}}.grey{{fill:#a5a5a5}}.true{{stroke:#50555c}}.p0{{stroke:#e4e4e4}}
.hole{{stroke:#16181c}}.ring,.c3{{stroke:#f0803c}}.f3{{fill:#f0803c}}.c0{{stroke:#2b8fd0}}
.f0{{fill:#2b8fd0}}.c5{{stroke:#8fd3ff}}.f5{{fill:#8fd3ff}}}}"""

# Files of a report; where a figure has more panels than one, -2, -3 and so on follow the name.
NAMES = ("finetune-loss", "finetune-accuracy", "finetune-rate", "pretrain-loss", "pretrain-error",
         "confusion", "class-accuracy", "class-sizes", "features-pca", "features-tsne",
         "chosen-pca2d", "chosen-pca3d", "reconstruction", "reconstruction-frames")


class Panel(NamedTuple):
    name: str      # of the .svg file
    width: float
    height: float
    body: str      # SVG


class Figure(NamedTuple):
    title: str     # what is seen
    where: str     # its number in the supplement, or ""
    caption: str
    panels: list   # of Panel, side by side
    table: str = ""


class Series(NamedTuple):
    """A LINE through the points, a mark at each, or one TEXT."""
    points: list      # (x, y), or (x, y, z) in the cube from -1 to 1
    style: str        # CSS classes
    mark: str = DOT
    label: str = ""   # in the legend
    tip: str = ""     # clean words that show on hover; of TEXT the words


def svg(panel: Panel, label: str, alone: bool = False) -> str:
    """One panel, for the page, or `alone` as a file with the style that the page has."""
    _, width, height, body = panel
    head = (f'<svg viewBox="0 0 {width:.4g} {height:.4g}" role="img" '
            f'aria-label="{clean(label, 900)}"')
    if alone:
        return (f'{head} width="{width:.4g}" height="{height:.4g}" '
                f'xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>'
                f'<rect class="paper" width="100%" height="100%"/>{body}</svg>')
    return f'{head} style="max-width:{width:.4g}px;min-width:{0.7 * width:.4g}px">{body}</svg>'


def table(title: str, where: str, caption: str, rows: list, heads: int = 1) -> Figure:
    """rows of cells, not yet escaped; the first `heads` of them are headings."""
    content = ""
    for i, row in enumerate(rows):
        tag = "th" if i < heads else "td"
        cells = "".join(f"<{tag}>{clean(cell, 600)}</{tag}>" for cell in row)
        cells = re.sub(r"(--[\w-]+)", r"<span>\1</span>", cells)  # a flag stays on one line
        content += f"<tr>{cells}</tr>"
    return Figure(title, where, caption, [], f"<table>{content}</table>")


def clean(words, limit: int = 40) -> str:
    """Words from data, safe in HTML and SVG: unprintable letters replaced, clipped, escaped."""
    words = "".join(c if c.isprintable() else "\ufffd" for c in str(words))
    return html.escape(words if len(words) <= limit else words[:limit - 1].rstrip() + "…")


def text(x: float, y: float, words, style: str = "", limit: int = 60, turn: float = 0,
         extra: str = "") -> str:
    if turn:
        extra += f' transform="rotate({turn} {x:.4g} {y:.4g})"'
    return f'<text x="{x:.4g}" y="{y:.4g}" class="{style}"{extra}>{clean(words, limit)}</text>'


def path(points, style: str, mark: str = "", tip: str = "", extra: str = "") -> str:
    """A line through points [(x, y)], or a mark at each; `tip`, already clean, shows on hover."""
    places = [f"{x:.4g} {y:.4g}" for x, y in points]
    if not places:
        return ""
    shape = "".join(f"M{place}{mark}" for place in places) if mark else "M" + "L".join(places)
    title = f"<title>{tip}</title>" if tip else ""
    return f'<path class="{style}"{extra} d="{shape}">{title}</path>'


def rect(x: float, y: float, width: float, height: float, style: str, tip: str = "",
         extra: str = "") -> str:
    return path([(x, y)], style, f"h{width:.4g}v{height:.4g}h{-width:.4g}z", tip, extra)


def legend(series: list, top: float, width: float) -> tuple:
    """The labels of the series, in columns as wide as they need. Returns (SVG, y below it)."""
    labelled = [s for s in series if s.label]
    longest = min(max((len(s.label) for s in labelled), default=0), 34)
    columns = max(1, min(len(labelled), int((width - 66) / (24 + 6 * longest))))
    body = ""
    for i, s in enumerate(labelled):
        x = 60 + i % columns * (width - 66) / columns
        y = top + 14 + i // columns * 16
        body += path([(x + 6, y - 4)], s.style, s.mark) + text(x + 16, y, s.label, "small", 34)
    return body, top + 16 * math.ceil(len(labelled) / columns)


def names_below(xs: list, y: float, names: list) -> tuple:
    """Names under evenly spaced places: level where they fit, else slanted, upright or only some.
    Returns (SVG, height)."""
    step = xs[1] - xs[0] if len(xs) > 1 else 100
    longest = min(max(map(len, names)), 24)
    size = "small" if step > 11 else "tiny"
    shown = list(zip(xs, names))[::math.ceil(7 / step)]
    if 6 * longest + 4 < step:
        return "".join(text(x, y + 14, name, f"{size} mid", 24) for x, name in shown), 18
    turn = -60 if step > 13 else -90
    body = "".join(text(x + 3.5, y + 8, name, f"{size} end", 24, turn) for x, name in shown)
    return body, 12 + (5.4 if turn == -60 else 6.2) * longest


def ticks(low: float, high: float, log: bool = False) -> list:
    """At most eight round numbers from low to high, or on a log axis 1, 2 and 5 times powers of
    ten, of many the powers alone: [(number, label)]."""
    if log:
        digits = (1, 2, 5) if high < 50 * low else (1,)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        numbers = [digit * 10.0 ** power for power in powers for digit in digits]
        numbers = [number for number in numbers if low <= number <= high]
    else:
        steps = (m * 10.0 ** e for e in range(-45, 39) for m in (1, 2, 5))
        step = next(step for step in steps if step >= (high - low) / 7)
        bounds = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1
        numbers = [i * step for i in range(*bounds)]
    return [(number, f"{number:.6g}".replace("-", "−")) for number in numbers]


def draw(series: list, at) -> str:
    """Points in space keep their coordinates, for the script of the page that turns them."""
    body = ""
    for points, style, mark, _, tip in series:
        places = [at(*point) for point in points]
        extra = ""
        if len(points) and len(points[0]) == 3:
            in_space = " ".join(",".join(f"{v:.3g}" for v in point) for point in points)
            extra = f' data-mark="{mark}" data-xyz="{in_space}"'
        if mark == TEXT:
            body += text(*places[0], tip, style, extra=extra)
        elif mark == LINE:
            body += path(places, style, "", tip, extra)
            if "line" in style and len(places) <= 20:
                body += path(places, style.replace("line", "dot"), DOT)
        else:
            body += path(places, style, mark, tip, extra)
    return body


def plot(series: list, x_label: str, y_label: str, width: float = 480, tall: float = 350,
         log: str = "", x_ticks: list = ()) -> tuple:
    """Legend, axes and what they hold. log: which axes are logarithmic, x, y or xy; x_ticks: in
    place of round numbers. Returns (SVG, height)."""
    def span(values, axis: str) -> tuple:
        low, high = min(values), max(values)
        if axis in log:
            room = (high / low) ** 0.05 if high > low else 2
            return low / room, high * room
        room = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
        return low - room, high + room

    def share(value, low, high, axis: str) -> float:
        if axis in log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    def at(x, y):
        return (left + share(x, x0, x1, "x") * (right - left),
                bottom - share(y, y0, y1, "y") * (bottom - top))

    body, below_legend = legend(series, 0, width)
    left, right, top, bottom = 66, width - 10, below_legend + 8, below_legend + 8 + tall
    xs, ys = zip(*(point for s in series for point in s.points))
    x0, x1 = span(xs, "x")
    y0, y1 = span(ys, "y")
    body += text((left + right) / 2, bottom + 32, x_label, "mid")
    body += text(13, (top + bottom) / 2, y_label, "mid", turn=-90)
    for value, words in ticks(y0, y1, "y" in log):
        y = at(x0, value)[1]
        body += path([(left, y), (right, y)], "grid") + text(left - 6, y + 3.5, words, "small end")
    if not x_ticks:
        whole = all(isinstance(x, int) for x in xs)  # epochs
        x_ticks = [tick for tick in ticks(x0, x1, "x" in log) if not whole or tick[0] % 1 == 0]
    for value, words in x_ticks:
        x = at(value, y0)[0]
        body += path([(x, bottom), (x, bottom + 4)], "axis")
        body += text(x, bottom + 16, words, "small mid")
    body += path([(left, top), (left, bottom), (right, bottom)], "axis")
    return body + draw(series, at), bottom + 40


YAW = 0.65  # of the cube, in radians, before it is turned
PITCH = 0.42


def project(x: float, y: float, z: float) -> tuple:
    """Pixels of a point of the cube from -1 to 1, as the page's script has them at first."""
    across = x * math.cos(YAW) - y * math.sin(YAW)
    depth = x * math.sin(YAW) + y * math.cos(YAW)
    return 255 + 118 * across, 200 - 118 * (z * math.cos(PITCH) + depth * math.sin(PITCH))


def cube(series: list, *labels: str) -> tuple:
    """`plot` for points (x, y, z) in the cube from -1 to 1."""
    key, top = legend(series, 0, 480)
    corners = "000 100 110 010 000 001 101 100 101 111 110 111 011 010 011 001"  # along every edge
    corners = [[2 * int(v) - 1 for v in corner] for corner in corners.split()]
    ends = [Series([end], "small mid", TEXT, tip=label.replace(" of variance", ""))
            for end, label in zip(((0, -1.35, -1.15), (-1.35, 0, -1.15), (-1, 1, 1.12)), labels)]
    body = draw([Series(corners, "grid", LINE), *series, *ends], project)
    return (f'{key}<g class="turn" transform="translate(0 {top})">'
            f'<rect class="paper" width="480" height="399"/>{body}</g>', top + 399)


def rows(names: list, runs: list, x_label: str, low: float, high: float, lines: list) -> tuple:
    """A row for each name, with a bar from `low` where there is one run without intervals, else a
    dot with its interval for each run. runs: [(CSS number, [(value, (from, to) or None, tip)])];
    lines: [(CSS number, value)], upright. Returns (SVG, height)."""
    left = 16 + 6 * min(max(map(len, names)), 24)
    step = 13 + 5 * len(runs)
    bottom = step * len(names) + 6

    def at(value) -> float:
        return left + (value - low) / (high - low) * (464 - left)

    body = ""
    for value, words in ticks(low, high):
        body += path([(at(value), 2), (at(value), bottom)], "grid")
        body += text(at(value), bottom + 14, words, "small mid")
    for colour, value in lines:
        body += path([(at(value), 2), (at(value), bottom)], f"dash c{colour}")
    for i, name in enumerate(names):
        middle = 4 + step * (i + 0.5)
        body += text(left - 8, middle + 4, name, "small end", 24)
        for r, (colour, values) in enumerate(runs):
            value, interval, tip = values[i]
            y = middle + 6 * (r - (len(runs) - 1) / 2)
            if interval:
                body += path([(at(end), y) for end in interval], f"line soft c{colour}")
                body += path([(at(value), y)], f"big joint c{colour}", DOT, tip)
            else:
                body += rect(left, y - 6, max(at(value) - left, 0.7), 12, f"f{colour}", tip)
    body += path([(left, 2), (left, bottom)], "axis")
    return body + text((left + 464) / 2, bottom + 30, x_label, "mid"), bottom + 38


# ------------------------------------------------------------------------------------ the page

PAGE = f"""body{{font:15px/1.5 {FONT};margin:0 auto;max-width:1000px;padding:16px;color:#222}}
h1{{font-size:22px;margin:8px 0}}h2{{font-size:16px;margin:0 0 8px}}body{{background:#fff}}
h2 small{{font-weight:normal;color:#666;white-space:nowrap}}
main{{display:flex;flex-wrap:wrap;justify-content:center;gap:36px 28px}}
figure{{margin:0;width:min(100%,480px);break-inside:avoid}}figure.wide{{width:100%}}
figure div{{display:flex;flex-wrap:wrap;justify-content:space-evenly;align-items:start;
gap:14px;overflow-x:auto}}
svg{{flex:1 0 0;height:auto}}figcaption{{font-size:13px;color:#666;margin-top:6px}}
::-webkit-scrollbar{{height:9px}}::-webkit-scrollbar-thumb{{background:#8888;border-radius:5px}}
.turn{{cursor:grab;touch-action:pan-y}}
table{{border-collapse:collapse;font-size:14px;margin-right:auto}}
td{{min-width:84px}}td+td{{overflow-wrap:anywhere}}td span{{white-space:nowrap}}
td,th{{text-align:left;vertical-align:top;padding:3px 14px 3px 0;border-bottom:1px solid #8884}}
@media print{{body{{padding:0}}}}
@media screen and (prefers-color-scheme:dark){{body{{color:#e4e4e4;background:#16181c}}
figcaption,h2 small{{color:#a5a5a5}}}}"""
SCRIPT = f"""for (const cube of document.querySelectorAll(".turn")) {{
  let yaw = {YAW}, pitch = {PITCH}
  const place = ([x, y, z]) => {{
    const across = x * Math.cos(yaw) - y * Math.sin(yaw)
    const depth = x * Math.sin(yaw) + y * Math.cos(yaw)
    const up = z * Math.cos(pitch) + depth * Math.sin(pitch)
    return (255 + 118 * across).toFixed(1) + " " + (200 - 118 * up).toFixed(1)
  }}
  cube.onpointerdown = e => cube.setPointerCapture(e.pointerId)
  cube.onpointermove = e => {{
    if (!e.buttons) return
    yaw += e.movementX / 120
    pitch = Math.max(-1.5, Math.min(1.5, pitch + e.movementY / 120))
    for (const part of cube.querySelectorAll("[data-xyz]")) {{
      const at = part.dataset.xyz.split(" ").map(p => place(p.split(",").map(Number)))
      const mark = part.dataset.mark
      if (part.tagName == "text") at[0].split(" ").forEach((v, i) => part.setAttribute("xy"[i], v))
      else if (mark == "{LINE}") part.setAttribute("d", "M" + at.join("L"))
      else part.setAttribute("d", at.map(p => "M" + p + mark).join(""))
    }}
  }}
}}"""


def write_report(out: str, title: str, figures: list):
    """report.html, and an .svg file of every panel. Those that an earlier report left are
    removed."""
    os.makedirs(out, exist_ok=True)
    for file in Path(out).glob("*.svg"):
        if re.sub(r"-\d+$", "", file.stem) in NAMES:
            file.unlink()
    files = {}
    body = ""
    for heading, where, caption, panels, content in figures:
        for i, panel in enumerate(panels):
            same = [before.name for before in panels[:i]].count(panel.name)
            name = f"{panel.name}-{same + 1}" if same else panel.name
            files[f"{name}.svg"] = svg(panel, f"{heading}. {caption}", alone=True)
            content += svg(panel, heading)
        wide = ' class="wide"' if sum(panel.width for panel in panels) > 500 or not where else ""
        where = f" <small>{where}</small>" if where else ""
        caption = f"<figcaption>{clean(caption, 900)}</figcaption>" if caption else ""
        body += f"<figure{wide}><h2>{heading}{where}</h2><div>{content}</div>{caption}</figure>"
    head = ('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{clean(title, 80)}</title><style>{PAGE}{STYLE}</style>")
    files["report.html"] = (f'<!doctype html><html lang="en">{head}<h1>{clean(title, 80)}</h1>'
                            f"<main>{body}</main><script>{SCRIPT}</script></html>\n")
    for name, content in files.items():
        Path(out, name).write_text(content, encoding="utf-8")
    print(f"{os.path.join(out, 'report.html')} and {len(files) - 1} panels as .svg beside it")
