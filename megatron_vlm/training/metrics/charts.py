"""Line charts as SVG that stands in a page: axes with round numbers, several lines, points with their values.

Line --chart(title, lines)--> <figure><svg>...</svg></figure>
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vlm.pages import escape
from megatron_vlm.training.metrics.run_files import Points

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 515, 250, 62, 12, 30, 30
_MOST = 700  # points of a line: more than a chart has columns show nothing more
COLOURS = ("#1f5fa8", "#c4501b", "#2a7f3a", "#7d3c98", "#b8860b", "#008b8b")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")  # lines differ by more than colour
STYLE = (
    ".charts{display:flex;flex-wrap:wrap;gap:12px}svg text{font-size:11px;fill:#444}"
    "svg{background:#fff;border:1px solid #ddd;border-radius:4px}"
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """``points`` in order of x; ``run`` picks colour and dashes; ``faint`` lies behind; ``marks``: no line, a mark each."""

    label: str
    points: Points
    run: int = 0
    faint: bool = False
    marks: bool = False


def chart(title: str, lines: Sequence[Line], *, percent: bool = False) -> str:
    """Returns a figure; nothing where there is no point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    low, high = min(ys), max(ys)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = (0.0 if low >= 0 and low < 0.3 * high else low - margin), high + margin
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + (point[0] - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
        return x, _HEIGHT - _BOTTOM - (point[1] - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<text x="{_LEFT}" y="18" font-weight="bold">{escape(title)}</text>']
    for tick in _ticks(low, high):
        y = place((first, tick))[1]
        text = f"{tick:.0%}" if percent else f"{tick:.6g}"
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in _ticks(first, last):
        x = place((tick, low))[0]
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{tick:.10g}</text>')
    parts += [_draw(line, place) for line in sorted(lines, key=lambda line: not line.faint)]
    keys = [line for line in lines if not line.faint]
    legend = ""
    if len(keys) > 1:
        legend = " &nbsp; ".join(
            f'<span style="color:{COLOURS[line.run % 6]}">{_sign(line)}</span> {escape(line.label)}' for line in keys
        )
    svg = f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{legend}</figcaption></figure>"


def _sign(line: Line) -> str:
    return "◆" if line.marks else "┅" if DASHES[line.run % 6] else "━"


def _draw(line: Line, place: Callable[[tuple[float, float]], tuple[float, float]]) -> str:
    colour, dash = COLOURS[line.run % 6], DASHES[line.run % 6]
    if line.marks:
        marks = [(*place(point), escape(f"{line.label}: {point[1]:.6g} at {point[0]:g}")) for point in line.points]
        shape = "l4 4l-4 4l-4 -4z"
        return "".join(
            f'<path d="M{x:.1f} {y - 4:.1f}{shape}" fill="{colour}"><title>{text}</title></path>'
            for x, y, text in marks
        )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, _thinned(line.points)))
    look = 'stroke-opacity="0.3"' if line.faint else f'stroke-width="1.8" stroke-dasharray="{dash}"'
    return f'<polyline points="{path}" fill="none" stroke="{colour}" {look}/>'


def _thinned(points: Points) -> Points:
    """Of more points than a chart shows, the least and the largest of each column."""
    if len(points) <= _MOST:
        return points
    size, kept = math.ceil(len(points) / (_MOST // 2)), []
    for start in range(0, len(points), size):
        column = points[start : start + size]
        ends = {min(column, key=lambda p: p[1]), max(column, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(times * unit for times in (1, 2, 5, 10) if times * unit >= rough)
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
