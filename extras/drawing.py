"""SVG without a library, for visualize.py: text and marks, legend, axes, and the page around them.

Lengths are pixels, y grows downwards; in a Series x and y are those of the data.
"""
import html
import math
import re
from pathlib import Path
from typing import NamedTuple

LINE = ""  # how the points of a Series are drawn: joined, as words, or each by a relative SVG path
TEXT, DOT = "text", "h0"
MARKS = (DOT, "m-4 0h8m-4-4v8", "m-3-3h6v6h-6z", "m0-4l4 7h-8z", "m-3-3l6 6m0-6l-6 6",
         "m0-4l4 4-4 4-4-4z", "m-3-4h6l-6 8h6z", "m0 4l4-7h-8z")
COLOURS = "#0072b2 #e69f00 #009e73 #d55e00 #cc79a7 #56b4e9 #777 #222".split()  # Okabe, Ito
DARK = {"#222": "#eee", "#fff": "#16181c", "#666": "#aaa", "#777": "#aaa", "#e2e2e2": "#333",
        "#aaa": "#888", "#05a": "#5be", "#0072b2": "#2b8fd0", "#d55e00": "#f80", "#56b4e9": "#8df"}


def themed(css: str) -> str:
    """CSS with the colours of a light page, and where it is dark those of DARK instead."""
    dark = re.sub("#[0-9a-f]+", lambda colour: DARK.get(colour[0], colour[0]), css)
    return f"{css}\n@media screen and (prefers-color-scheme:dark){{{dark}}}"


STYLE = themed("""text{fill:#222}.grey{fill:#666}.paper,.on{fill:#fff}.heat{fill:#05a}
.grid{stroke:#e2e2e2}.halo,.hole{stroke:#fff}.p0{stroke:#222}.p1{stroke:#8c8c8c}
.true{stroke:#aaa}.ring{stroke:#d55e00}
""" + "".join(f".c{i}{{fill:{c};stroke:{c}}}" for i, c in enumerate(COLOURS))) + """
text,body{font:12px/1.5 Helvetica,Arial,"Liberation Sans",sans-serif}.small{font-size:11px}
.tiny{font-size:8px}.bold{font-weight:bold}.mid{text-anchor:middle}.end{text-anchor:end}
.halo{stroke-width:3px;paint-order:stroke;stroke-linejoin:round}.mark{fill-opacity:.25}
.grid,.bar,.dash,.line,.bone,.joint{fill:none}.soft{opacity:.7}.dash{stroke-dasharray:5 3}
.mark,.dash{stroke-width:1.2}.line{stroke-width:1.8}.bone{stroke-width:2}.dot{stroke-width:5.6}
.joint,.hole{stroke-width:5}.ring{stroke-width:8}.bar{stroke-width:12}
.joint,.dot,.bone{stroke-linecap:round}"""
PAGE = themed("body{color:#222;background:#fff}figcaption,h2 small{color:#666}") + """
body{font-size:15px;margin:0 auto;max-width:1000px;padding:16px}h1{font-size:22px;margin:8px 0}
h2{font-size:16px;margin:0 0 8px}h2 small{font-weight:normal;white-space:nowrap}
main{display:flex;flex-wrap:wrap;gap:36px 28px}
figure{margin:0;width:min(100%,480px);break-inside:avoid}figure.wide{width:100%}
figure div{display:flex;flex-wrap:wrap;align-items:end;gap:14px;overflow-x:auto}
div::-webkit-scrollbar{height:9px}div::-webkit-scrollbar-thumb{background:#8889}svg{height:auto}
figcaption{font-size:13px;margin-top:6px}table{border-collapse:collapse;font-size:14px}
td{min-width:5em}td+td{overflow-wrap:anywhere}code{display:inline-block;margin-right:.4em}
td,th{text-align:left;vertical-align:top;padding:3px 14px 3px 0;border-bottom:1px solid #8884}"""

# Files of a report; where a figure has more panels than one, -2, -3 and so on follow the name.
NAMES = ("finetune-loss", "finetune-accuracy", "finetune-rate", "pretrain-loss", "pretrain-error",
         "confusion", "class-accuracy", "class-sizes", "features-pca", "features-tsne",
         "chosen-pca", "reconstruction")


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
    points: list      # (x, y)
    style: str        # CSS classes
    mark: str = DOT
    label: str = ""   # in the legend
    tip: str = ""     # clean words that show on hover; of TEXT the words


def clean(words, limit: int = 40) -> str:
    """Words from data, safe in HTML and SVG: unprintable letters replaced, clipped, escaped."""
    words = "".join(c if c.isprintable() else "\ufffd" for c in str(words))
    return html.escape(words if len(words) <= limit else words[:limit - 1].rstrip() + "…")


def text(x: float, y: float, words, style: str = "", limit: int = 60, turn: float = 0) -> str:
    turned = f' transform="rotate({turn} {x:.4g} {y:.4g})"' if turn else ""
    place = f'x="{x:.4g}" y="{y:.4g}"{turned} class="{style}"'
    return f"<text {place}>{clean(words, limit)}</text>" if words else ""


def path(points, style: str, mark: str = LINE, tip: str = "", extra: str = "") -> str:
    """A LINE through points [(x, y)], or a mark at each; `tip`, already clean, shows on hover."""
    shape = (f"{mark}M" if mark else "L").join(f"{x:.4g} {y:.4g}" for x, y in points) + mark
    title = f"<title>{tip}</title>" if tip else ""
    return f'<path class="{style}"{extra} d="M{shape}">{title}</path>' if len(points) else ""


def legend(series: list, width: float) -> tuple:
    """The labels of the series, in columns as wide as they need. Returns (SVG, height)."""
    labelled = [s for s in series if s.label]
    longest = min(max((len(s.label) for s in labelled), default=0), 34)
    columns = max(1, min(len(labelled), int((width - 66) / (24 + 6 * longest))))
    body = ""
    for i, s in enumerate(labelled):
        x = 60 + i % columns * (width - 66) / columns
        y = 14 + i // columns * 16
        body += path([(x + 6, y - 4)], s.style, s.mark or "m-6 0h12")
        body += text(x + 16, y, s.label, "small", 34)
    return body, 16 * math.ceil(len(labelled) / columns)


def ticks(low: float, high: float, log: bool = False) -> list:
    """At most eight round numbers from low to high, or on a log axis 1, 2 and 5 times powers of
    ten, of many the powers alone: [(number, label)]."""
    digits = (1,) if log and high > 50 * low else (1, 2, 5)
    numbers = [digit * 10.0 ** power for power in range(-45, 39) for digit in digits]
    if log:
        numbers = [number for number in numbers if low <= number <= high]
    else:
        step = next(step for step in numbers if step >= (high - low) / 7)
        numbers = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(number, re.sub(r"-0*(?=\d)", "−", f"{number:.6g}")) for number in numbers]


def scale(values, log: bool, begin: float, end: float) -> tuple:
    """An axis of pixels from `begin` to `end`, the values with a little room: (function from value
    to pixel, ticks). Whole numbers, epochs, have whole ticks."""
    warp, back = (math.log, math.exp) if log else (float, float)
    low, high = warp(min(values)), warp(max(values))
    room = 0.05 * (high - low) or (0.7 if log else 0.5 * abs(high) or 1)
    marks = ticks(back(low - room), back(high + room), log)
    if all(isinstance(value, int) for value in values):
        marks = [mark for mark in marks if mark[0] % 1 == 0]
    share = (end - begin) / (high - low + 2 * room)
    return lambda value: begin + (warp(value) - low + room) * share, marks


def plot(name: str, series: list, x_label: str, y_label: str, width: float = 400,
         tall: float = 300, log: str = "", rows: list = ()) -> Panel:
    """Legend, axes and what they hold. log: which axes are logarithmic, x, y or xy; rows: names at
    y = 0, -1 and so on."""
    body, below_legend = legend(series, width)
    left, right = 18 + 6 * min(max(map(len, rows)), 24) if rows else 66, width - 10
    top, bottom = below_legend + 8, below_legend + 8 + tall
    xs, ys = zip(*(point for s in series for point in s.points))
    across, columns = scale(xs, "x" in log, left, right)
    down, levels = scale(ys, "y" in log, bottom, top)
    body += text((left + right) / 2, bottom + 32, x_label, "mid")
    body += text(13, (top + bottom) / 2, y_label, "mid", turn=-90)
    for value, words in [(-i, words) for i, words in enumerate(rows)] or levels:
        y = down(value)
        body += path([(left, y), (right, y)], "grid")
        body += text(left - 8, y + 3.5, words, "small end", 24)
    for value, words in columns:
        x = across(value)
        body += path([(x, top), (x, bottom)], "grid") + text(x, bottom + 16, words, "small mid")
    for points, style, mark, _, tip in series:
        places = [(across(x), down(y)) for x, y in points]
        body += text(*places[0], tip, style) if mark == TEXT else path(places, style, mark, tip)
        if "line" in style and len(places) <= 20:
            body += path(places, style.replace("line", "dot"), DOT)
    return Panel(name, width, bottom + 40, body)


def table(title: str, where: str, caption: str, rows: list, heads: int = 1) -> Figure:
    """rows of cells, not yet escaped; the first `heads` of them are headings."""
    content = ""
    for tag, row in zip(["th"] * heads + ["td"] * len(rows), rows):
        cells = [clean(cell, 600).replace("/", "/<wbr>") for cell in row]
        content += "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
    content = re.sub(r"python \S+|--[\w-]+( [^-\s<].*?)?(?= |</)", r"<code>\g<0></code>", content)
    return Figure(title, where, caption, [], f"<table>{content}</table>")


def svg(panel: Panel, label: str, alone: bool = False) -> str:
    """One panel, for the page, or `alone` as a file with the style that the page has."""
    _, width, height, body = panel
    size = f'style="width:{1.2 * width:.4g}px;min-width:{0.85 * width:.4g}px"'
    if alone:
        size = f'width="{width:.4g}" height="{height:.4g}" xmlns="http://www.w3.org/2000/svg"'
        body = f'<style>{STYLE}</style><rect class="paper" width="100%" height="100%"/>{body}'
    return (f'<svg viewBox="0 0 {width:.4g} {height:.4g}" role="figure" '
            f'aria-label="{clean(label, 900)}" {size}>{body}</svg>')


def write_report(out: str, title: str, figures: list):
    """report.html, and an .svg file of every panel; those of an earlier report are removed."""
    Path(out).mkdir(parents=True, exist_ok=True)
    for file in Path(out).glob("*.svg"):
        if re.sub(r"-\d+$", "", file.stem) in NAMES:
            file.unlink()
    body = ""
    for heading, where, caption, panels, content in figures:
        for i, panel in enumerate(panels):
            same = [before.name for before in panels[:i]].count(panel.name)
            file = Path(out, f"{panel.name}-{same + 1}.svg" if same else f"{panel.name}.svg")
            file.write_text(svg(panel, f"{heading}. {caption}", alone=True), encoding="utf-8")
            content += svg(panel, heading)
        wide = ' class="wide"' if sum(panel.width for panel in panels) > 420 or not where else ""
        where = f" <small>{where}</small>" if where else ""
        caption = f"<figcaption>{clean(caption, 900)}</figcaption>" if caption else ""
        heading = clean(heading, 160)
        body += f"<figure{wide}><h2>{heading}{where}</h2><div>{content}</div>{caption}</figure>"
    page, title = Path(out, "report.html"), clean(title, 160).replace(" %", "&nbsp;%")
    page.write_text('<!doctype html><html lang="en"><meta charset="utf-8">'
                    '<meta name="viewport" content="width=device-width">'
                    f"<title>{title}</title><style>{STYLE}{PAGE}</style>"
                    f"<h1>{title}</h1><main>{body}</main></html>\n", encoding="utf-8")
    print(f"{page} and {sum(len(one.panels) for one in figures)} panels as .svg beside it")
