"""SVG without a library, for visualize.py: text and marks, legend, axes, and the page around them.

Lengths are pixels, y grows downwards. `at` is what takes the coordinates of data to pixels.
"""
import html
import math
import os
from pathlib import Path
from typing import NamedTuple

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#777")  # Okabe, Ito
TEXT = ""  # what stands at a point: words, or a relative SVG path
DOT = "h0"
LINE = "m-6 0h12"
BAR = "m-4-4h8v8h-8z"
RING = "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0"
MARKS = (DOT, "m-3 0h6m-3-3v6", "m-2-2h4v4h-4z", "m0-3l3 5h-6z", "m-2-2l4 4m0-4l-4 4",
         "m0-3l3 3-3 3-3-3z")
FONT = 'Helvetica,Arial,"Liberation Sans",sans-serif'
STYLE = f"""text{{font:12px {FONT};fill:#222}}
.small{{font-size:10px}}.tiny{{font-size:8px}}.bold{{font-weight:bold}}
.mid{{text-anchor:middle}}.end{{text-anchor:end}}
.halo{{stroke:#fff;stroke-width:3px;paint-order:stroke;stroke-linejoin:round}}
.paper,.on{{fill:#fff}}.none{{fill:#e2e2e2}}.heat{{fill:#0072b2}}.ghost{{opacity:.35}}
.grid,.axis,.dash,.line,.bone,.joint{{fill:none}}.grid{{stroke:#e2e2e2}}.axis{{stroke:#777}}
.dash{{stroke-dasharray:5 3}}.line{{stroke-width:1.8}}.mark{{fill-opacity:.25;stroke-width:1.2}}
.joint,.dot{{stroke-linecap:round}}.dot{{stroke-width:4.6}}
.bone,.joint{{stroke:#222;stroke-width:1.6}}.joint{{stroke-width:4}}
.ring{{stroke:#d55e00;stroke-width:1.4}}
{"".join(f".c{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(COLOURS))}
@media screen and (prefers-color-scheme:dark){{text{{fill:#e4e4e4}}.halo{{stroke:#16181c}}
.paper,.on{{fill:#16181c}}.axis{{stroke:#8a8a8a}}.grid{{stroke:#33373d}}.none{{fill:#33373d}}
.heat{{fill:#56b4e9}}.bone,.joint{{stroke:#e4e4e4}}.ring,.c3{{stroke:#f0803c}}.f3{{fill:#f0803c}}
.c0{{stroke:#2b8fd0}}.f0{{fill:#2b8fd0}}.c5{{stroke:#8fd3ff}}.f5{{fill:#8fd3ff}}}}"""


FIGURES = {  # name of the file -> title
    "fig1-pca": "Fig. 1: features before the classifier, PCA",
    "fig1-tsne": "Fig. 1: features before the classifier, t-SNE",
    "fig2-class-accuracy": "Fig. 2: accuracy of each class against the average",
    "fig3-long-tail": "Fig. 3: long-tailed distribution of the training classes",
    "fig4-confusion": "Fig. 4 left: confusion matrix",
    "fig4-pca2d": "Fig. 4 middle: 2D PCA of the chosen classes",
    "fig4-pca3d": "Fig. 4 right: 3D PCA of the chosen classes",
    "paper-fig6-reconstruction": "Paper Fig. 6: input, masked, reconstructed",
    "training-pretrain": "Pre-training",
    "training-finetune": "Fine-tuning",
}


class Figure(NamedTuple):
    name: str     # of the .svg file; "" for a table
    title: str
    caption: str
    content: str  # SVG, or the HTML of a table


class Series(NamedTuple):
    """A LINE through the points, BARs up to them, a mark at each, or one TEXT."""
    points: list      # (x, y), or (x, y, z) in the cube from -1 to 1
    style: str        # CSS classes
    mark: str = DOT
    label: str = ""   # in the legend
    tip: object = ""  # clean words that show on hover, for BARs a list of them; of TEXT the words


def figure(name: str, caption: str, width: float, height: float, body: str) -> Figure:
    size = f'width="{width:.4g}" height="{height:.4g}"'
    wide = ' class="wide"' if width > 500 else ""
    head = f'<svg viewBox="0 0 {width:.4g} {height:.4g}" {size}{wide} role="img"'
    content = f'{head} aria-label="{FIGURES[name]}">{body}</svg>'
    return Figure(name, FIGURES[name], caption, content)


def table(title: str, caption: str, rows: list) -> Figure:
    """rows of cells, not yet escaped; the first is the head."""
    content = ""
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = "".join(f"<{tag}>{clean(cell, 100)}</{tag}>" for cell in row)
        content += f"<tr>{cells}</tr>"
    return Figure("", title, caption, f"<table>{content}</table>")


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
    limit = 34 if width < 500 else 100  # letters of a label
    longest = min(max((len(s.label) for s in labelled), default=0), limit)
    columns = max(1, min(len(labelled), int((width - 72) / (24 + 5.2 * longest))))
    body = ""
    for i, s in enumerate(labelled):
        x = 64 + i % columns * (width - 72) / columns
        y = top + 14 + i // columns * 16
        body += path([(x + 6, y - 4)], s.style, s.mark) + text(x + 16, y, s.label, "small", limit)
    return body, top + 16 * math.ceil(len(labelled) / columns)


def names_below(xs: list, y: float, names: list) -> tuple:
    """Names under evenly spaced places: level where they fit, else slanted, upright or only some.
    Returns (SVG, height)."""
    step = xs[1] - xs[0] if len(xs) > 1 else 100
    longest = min(max(map(len, names)), 24)
    size = "small" if step > 10 else "tiny"
    shown = list(zip(xs, names))[::math.ceil(7 / step)]
    if 5.5 * longest + 4 < step:
        return "".join(text(x, y + 14, name, f"{size} mid", 24) for x, name in shown), 18
    turn = -60 if step > 12.5 else -90
    body = "".join(text(x + 3.5, y + 8, name, f"{size} end", 24, turn) for x, name in shown)
    return body, 10 + 4.6 * longest


def ticks(low: float, high: float, least: float) -> list:
    """At most eight round numbers from low to high, at least `least` apart: [(number, label)]."""
    steps = (m * 10.0 ** e for e in range(-45, 39) for m in (1, 2, 5))
    step = next(step for step in steps if step >= max(least, (high - low) / 7))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(i * step, f"{i * step:.6g}".replace("-", "−")) for i in numbers]


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
            body += path(places, style, extra=extra)
            if "line" in style and len(places) <= 40:
                body += path(places, style.replace("line", "dot"), DOT)
        elif mark == BAR:
            half = at(0.37, 0)[0] - at(0, 0)[0]
            zero = at(0, 0)[1]
            for (x, y), its in zip(places, tip):
                height = max(abs(y - zero), 0.7)
                body += rect(x - half, min(y, zero), 2 * half, height, style, its)
        else:
            body += path(places, style, mark, tip, extra)
    return body


def plot(series: list, x_label: str, y_label: str, top: float = 0, width: float = 480,
         tall: float = 350, least: tuple = (0, 0), names=()) -> tuple:
    """Legend, axes and what they hold. least: smallest distance of the ticks of either axis;
    names: what stands at x = 0, 1, ... instead of ticks. Returns (SVG, y below it)."""
    def span(values) -> tuple:
        pad = 0.04 * (max(values) - min(values)) or 0.5 * abs(max(values)) or 1.0
        return min(values) - pad, max(values) + pad

    def at(x, y):
        up = (y - y0) / (y1 - y0) * (bottom - top)
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - up

    body, below_legend = legend(series, top, width)
    left, right, top, bottom = 64, width - 12, below_legend + 8, below_legend + 8 + tall
    xs, ys = zip(*(point for s in series for point in s.points))
    x0, x1 = span(xs)
    y0, y1 = span(ys)
    height = 17
    if names:
        x0, x1 = -0.5, len(names) - 0.5
        y0 = y0 if min(ys) < 0 else 0
        below, height = names_below([at(i, y0)[0] for i in range(len(names))], bottom, names)
        body += below
    body += text((left + right) / 2, bottom + height + 14, x_label, "mid")
    body += text(16, (top + bottom) / 2, y_label, "mid", turn=-90)
    for value, words in ticks(y0, y1, least[1]):
        y = at(x0, value)[1]
        body += path([(left, y), (right, y)], "grid") + text(left - 6, y + 3.5, words, "small end")
    for value, words in [] if names else ticks(x0, x1, least[0]):
        x = at(value, y0)[0]
        body += path([(x, bottom), (x, bottom + 4)], "axis")
        body += text(x, bottom + 15, words, "small mid")
    body += path([(left, top), (left, bottom), (right, bottom)], "axis")
    return body + draw(series, at), bottom + height + 24


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


# ------------------------------------------------------------------------------------ the page

PAGE = f"""body{{font:15px/1.5 {FONT};margin:0 auto;max-width:1000px;padding:20px;color:#222}}
h1{{font-size:22px}}h2{{font-size:15px;margin:0 0 8px}}body{{background:#fff}}
main{{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:36px 28px}}
figure{{margin:0;break-inside:avoid}}figure:has(.wide){{grid-column:1/-1}}
figure div{{overflow-x:auto}}svg{{max-width:100%;height:auto}}
.turn{{cursor:grab;touch-action:pan-y}}figcaption{{font-size:13px;color:#666;margin-top:6px}}
table{{border-collapse:collapse;font-size:13px}}
td,th{{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid #8885}}
@media screen and (max-width:760px){{main{{grid-template-columns:minmax(0,1fr)}}
.wide{{max-width:none}}}}@media print{{body{{padding:0}}}}
@media screen and (prefers-color-scheme:dark){{body{{color:#e4e4e4;background:#16181c}}
figcaption{{color:#a5a5a5}}}}"""
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


def write_report(out: str, title: str, summary: str, figures: list):
    """report.html, and an .svg file of every figure, with the style that the page has. Figures
    that an earlier report left are removed."""
    os.makedirs(out, exist_ok=True)
    for name in FIGURES:
        Path(out, f"{name}.svg").unlink(missing_ok=True)
    alone = (f' xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>'
             '<rect class="paper" width="100%" height="100%"/>')
    files = {f"{f.name}.svg": f.content.replace(">", alone, 1) for f in figures if f.name}
    body = ""
    for _, heading, caption, content in figures:
        body += (f"<figure><h2>{heading}</h2><div>{content}</div>"
                 f"<figcaption>{clean(caption, 600)}</figcaption></figure>")
    head = ('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{clean(title, 80)}</title><style>{PAGE}{STYLE}</style>")
    files["report.html"] = (f'<!doctype html><html lang="en">{head}<h1>{clean(title, 80)}</h1>'
                            f"<p>{clean(summary, 300)}</p><main>{body}</main>"
                            f"<script>{SCRIPT}</script></html>\n")
    for name, content in files.items():
        Path(out, name).write_text(content, encoding="utf-8")
    print(f"{os.path.join(out, 'report.html')} and {len(files) - 1} figures as .svg beside it")
