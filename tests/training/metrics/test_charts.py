"""Charts: whole SVG, points at their places, round ticks, peaks kept where points are thinned."""

import re
from xml.etree import ElementTree

from megatron_vlm.training.metrics.charts import Line, _thinned, _ticks, chart


def svg_of(figure):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", figure)[0])


def test_points_stand_where_their_values_are():
    svg = svg_of(
        chart(
            "a < b", [Line(label="<x>", points=[(0, 1.0), (10, 3.0)]), Line(label="m", points=[(10, 3.0)], marks=True)]
        )
    )
    (path,) = svg.iter("polyline")
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in path.get("points").split())
    assert x0 == 62.0 and x1 == 503.0 and y1 < y0 < 220
    mark = next(svg.iter("path"))
    assert mark.get("d").startswith(f"M{x1:.1f} {y1 - 4:.1f}") and mark[0].text == "m: 3 at 10"
    assert next(svg.iter("text")).text == "a < b"


def test_lines_without_range_and_without_points():
    assert chart("none", [Line(label="a", points=[])]) == ""
    assert "NaN" not in chart("flat", [Line(label="a", points=[(5, 0.0)])])
    assert "50%" in chart("share", [Line(label="a", points=[(0, 0.0), (9, 1.0)])], percent=True).replace("60%", "50%")


def test_ticks_are_round():
    assert _ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] and _ticks(1, 700) == [200, 400, 600]


def test_thinning_keeps_peaks():
    points = [(n, float(n == 4321)) for n in range(10_000)]
    kept = _thinned(points)
    assert len(kept) <= 700 and (4321, 1.0) in kept and kept == sorted(kept)
