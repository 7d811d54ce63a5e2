"""The results as SVG: bars for the workloads, lines for growth.

Drawn here rather than by a library, so that a chart is the same bytes for the same figures, has its values
beside its bars, and is legible on a light page as on a dark one: no background, one grey that suits both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from .report import number, title_of
from .runner import CONTENDERS, Results
from .workloads import WORKLOADS

GREY, OURS, THEIRS, RAW = "#7d8590", "#2f81f7", "#8b949e", "#c69026"
LINES = (OURS, RAW, "#3fb950", "#bc8cff", "#f47067", GREY)
WIDTH, LEFT, RIGHT, BAR = 760, 190, 110, 26


def write(results: Results, folder: Path) -> list[Path]:
    """Write one chart a workload and one a study of growth; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in results.workloads():
        metric = WORKLOADS[name].headline if name in WORKLOADS else "import_ms"
        bars = [
            (f"{contender} · {backend}" if backend in {"trio", "uvloop"} else contender, value)
            for contender, backend in results.entrants(name)
            if (value := results.median(name, contender, backend, metric)) is not None
        ]
        if bars:
            unit = WORKLOADS[name].unit if metric == "rate" else metric.replace("_ms", " ms").replace("_", " ")
            written.append(_save(folder / f"{name}.svg", bar_chart(f"{title_of(name)} ({unit})", bars, metric)))
    for study in results.growth:
        chart = line_chart(f"{study['title']} ({study['unit']})", study["axis"], study["x"], study["series"])
        written.append(_save(folder / f"growth_{study['axis'].split()[0]}.svg", chart))
    return written


def bar_chart(title: str, bars: Sequence[tuple[str, float]], metric: str) -> ET.Element:
    """Horizontal bars from zero, each with its value behind it."""
    drawing = _drawing(title, 48 + BAR * len(bars))
    longest = max(value for _, value in bars) or 1.0
    for place, (name, value) in enumerate(bars):
        contender = CONTENDERS.get(name.split(" · ")[0])
        kind = contender.kind if contender else "neighbour"
        colour = {"ours": OURS, "raw": RAW}.get(kind, THEIRS)
        top = 40 + BAR * place
        length = max(1.0, (WIDTH - LEFT - RIGHT) * value / longest)
        _text(drawing, LEFT - 8, top + 14, name, anchor="end")
        _add(drawing, "rect", x=LEFT, y=top, width=round(length, 1), height=BAR - 7, rx=2, fill=colour)
        _text(drawing, round(LEFT + length + 6, 1), top + 14, number(value, metric))
    return drawing


def line_chart(title: str, axis: str, x: Sequence[int], series: Mapping[str, Mapping[str, float]]) -> ET.Element:
    """Lines on logarithmic axes, named to their right."""
    top, bottom, left, right = 48, 300, 80, WIDTH - 190
    drawing = _drawing(title, bottom + 56)
    values = [value for points in series.values() for value in points.values() if value > 0]
    low, high = math.floor(math.log10(min(values, default=1))), math.ceil(math.log10(max(values, default=10)))
    first, last = math.log10(x[0]), math.log10(x[-1])

    def across(value: float) -> float:
        return round(left + (right - left) * (math.log10(value) - first) / ((last - first) or 1), 1)

    def up(value: float) -> float:
        return round(bottom - (bottom - top) * (math.log10(value) - low) / ((high - low) or 1), 1)

    for power in range(low, high + 1):
        y = up(10.0**power)
        _add(drawing, "line", x1=left, x2=right, y1=y, y2=y, stroke=GREY, stroke_opacity=0.3)
        _text(drawing, left - 8, y + 4, f"{10**power:,}" if power >= 0 else f"{10.0**power:g}", anchor="end")
    for value in x:
        _text(drawing, across(value), bottom + 20, f"{value:,}", anchor="middle")
    _text(drawing, (left + right) / 2, bottom + 44, axis, anchor="middle")
    taken: list[float] = []
    for (name, points), colour in zip(series.items(), LINES * len(series), strict=False):
        drawn = [(across(int(at)), up(value)) for at, value in points.items() if value > 0]
        if not drawn:
            continue
        path = " ".join(f"{px},{py}" for px, py in drawn)
        _add(drawing, "polyline", points=path, fill="none", stroke=colour, stroke_width=2)
        for px, py in drawn:
            _add(drawing, "circle", cx=px, cy=py, r=3, fill=colour)
        y = drawn[-1][1] + 4
        while any(abs(y - other) < 16 for other in taken):
            y += 4
        taken.append(y)
        _text(drawing, right + 12, y, name, fill=colour)
    return drawing


def _drawing(title: str, height: int) -> ET.Element:
    drawing = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {height}",
            "font-family": "system-ui, sans-serif",
            "font-size": "13",
            "role": "img",
        },
    )
    _add(drawing, "title").text = title
    _text(drawing, 8, 22, title, size=15)
    return drawing


def _add(parent: ET.Element, tag: str, **attributes: object) -> ET.Element:
    return ET.SubElement(parent, tag, {name.replace("_", "-"): str(value) for name, value in attributes.items()})


def _text(
    parent: ET.Element,
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    fill: str = GREY,
    size: int = 13,
) -> None:
    _add(parent, "text", x=x, y=y, text_anchor=anchor, fill=fill, font_size=size).text = text


def _save(path: Path, drawing: ET.Element) -> Path:
    ET.indent(drawing)
    path.write_text(ET.tostring(drawing, encoding="unicode") + "\n", encoding="utf-8")
    return path
