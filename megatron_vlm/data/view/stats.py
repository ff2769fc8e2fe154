"""Figures of training data under a processor: what a run will see, before it starts.

index + token counts --collect--> arrays --describe--> text
                                         --plot-----> PNG of histograms
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.stream.counts import survey
from megatron_vlm.data.stream.loader import OpenedData
from megatron_vlm.files import write_synced, writing

_PANEL = (520, 300)
_BLUE, _GREY, _BLACK = (66, 113, 174), (205, 205, 205), (30, 30, 30)
_BARS = 48


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Figures of all usable samples.

    Attributes:
        report: of ``counts.survey``.
        tokens, supervised, patches, images: int64 [samples].
        widths, heights: int64 [images].
        rows: of the first epoch's first windows, when packed; tokens of each, int64.
        num_rows: packed rows of an epoch.
        seq_length, global_batch_size: what rows and steps are counted with.
    """

    report: dict[str, Any]
    tokens: NDArray[np.int64]
    supervised: NDArray[np.int64]
    patches: NDArray[np.int64]
    images: NDArray[np.int64]
    widths: NDArray[np.int64]
    heights: NDArray[np.int64]
    rows: NDArray[np.int64]
    num_rows: int
    seq_length: int
    global_batch_size: int

    @property
    def efficiency(self) -> float:
        """Real tokens of packed rows over their length."""
        return float(self.rows.sum() / (len(self.rows) * self.seq_length))

    @property
    def samples_per_epoch(self) -> float:
        """Samples that an epoch trains on, in the mean."""
        return sum(source["samples"] for source in self.report["mixture"].values())


def collect(opened: OpenedData, config: DataConfig, global_batch_size: int) -> Statistics:
    """Goes over the index once.

    Args:
        opened: with ``config.packing``.
        config: policies, seq_length.
        global_batch_size: rows of a step.

    Raises:
        DataError: as ``survey``.
    """
    report = survey(opened.counts, config, None, opened.mixture.sources)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(6)]
    for shard in range(len(opened.dataset.shards)):
        counts = opened.counts.shard(shard)
        usable = counts["reason"] == 0
        sizes = opened.dataset.image_sizes(shard)
        columns = [counts[name][usable] for name in ("tokens", "supervised", "patches")]
        columns += [opened.dataset.index(shard)["num_images"][usable], sizes[:, 0], sizes[:, 1]]
        for part, column in zip(parts, columns):
            part.append(column.astype(np.int64))
    windows = range(min(opened.stream.num_windows, 16))
    rows = [sum(item.tokens) for window in windows for item in opened.stream.window(0, window)]
    tokens, supervised, patches, images, widths, heights = (np.concatenate(part) for part in parts)
    return Statistics(
        report=report,
        tokens=tokens,
        supervised=supervised,
        patches=patches,
        images=images,
        widths=widths,
        heights=heights,
        rows=np.array(rows, dtype=np.int64),
        num_rows=opened.stream.count_rows(),
        seq_length=config.seq_length,
        global_batch_size=global_batch_size,
    )


def describe(stats: Statistics) -> str:
    """Returns the figures as text."""
    report, batch = stats.report, stats.global_batch_size
    share = stats.supervised.sum() / max(1, stats.tokens.sum())
    lines = [
        f"samples            {report['samples']:,}, {len(stats.tokens):,} usable",
        *(f"  excluded         {number:,} {reason}" for reason, number in sorted(report["excluded"].items())),
        *([f"  truncated        {report['truncated']:,}"] if report["truncated"] else []),
        f"tokens             {int(stats.tokens.sum()):,}, {share:.1%} supervised",
        f"tokens a sample    {_spread(stats.tokens)}",
        f"images a sample    {_spread(stats.images)}; {np.mean(stats.images > 0):.1%} of samples have any",
        f"image width        {_spread(stats.widths)}",
        f"image height       {_spread(stats.heights)}",
        f"patches a sample   {_spread(stats.patches)}",
        f"packed rows        {stats.num_rows:,} of {stats.seq_length} tokens an epoch, {stats.efficiency:.1%} full",
        f"steps an epoch     {math.ceil(stats.num_rows / batch):,} of {batch} rows packed, "
        f"{math.ceil(stats.samples_per_epoch / batch):,} of {batch} samples not packed",
    ]
    lines += ["", f"{'source':<40} {'an epoch':>10} {'repeat':>8} {'used':>10} {'samples':>8} {'tokens':>8}"]
    for name, row in report["mixture"].items():
        lines.append(
            f"{name[-40:]:<40} {row['per_epoch']:>10,} {row['repeat']:>8.3g} {row['samples']:>10,} "
            f"{row['sample_share']:>8.2%} {row['token_share']:>8.2%}"
        )
    return "\n".join(lines)


def plot(stats: Statistics, path: str | Path) -> None:
    """Writes histograms as a PNG: lengths, images, sizes, supervised share, patches, row fill; ConfigError where it cannot."""
    share = stats.supervised / np.maximum(1, stats.tokens)
    panels = [
        ("tokens a sample", stats.tokens, None),
        ("supervised share of a sample", share, (0.0, 1.0)),
        ("images a sample", stats.images, None),
        ("longer edge of an image, pixels", np.maximum(stats.widths, stats.heights), None),
        ("aspect ratio of an image, width / height", stats.widths / np.maximum(1, stats.heights), None),
        ("patches a sample", stats.patches, None),
        (f"tokens of a packed row ({stats.efficiency:.1%} full)", stats.rows, (0, stats.seq_length)),
    ]
    across = 2
    down = -(-len(panels) // across)
    page = Image.new("RGB", (across * _PANEL[0], down * _PANEL[1]), "white")
    for index, (title, values, limits) in enumerate(panels):
        place = (index % across * _PANEL[0], index // across * _PANEL[1])
        page.paste(_histogram(title, np.asarray(values, dtype=np.float64), limits), place)
    file = io.BytesIO()
    page.save(file, "PNG")
    with writing(path):
        write_synced(Path(path), file.getvalue())


def _histogram(title: str, values: NDArray[np.float64], limits: Sequence[float] | None) -> Image.Image:
    panel = Image.new("RGB", _PANEL, "white")
    draw, font, small = ImageDraw.Draw(panel), ImageFont.load_default(15), ImageFont.load_default(12)
    left, top, right, bottom = 60, 45, _PANEL[0] - 25, _PANEL[1] - 40
    draw.text((left, 14), title, fill=_BLACK, font=font)
    draw.line((left, bottom, right, bottom), fill=_BLACK)
    if not values.size:
        draw.text((left + 20, (top + bottom) // 2), "none", fill=_BLACK, font=font)
        return panel
    low, high = limits or (float(values.min()), float(values.max()))
    whole = limits is None and high - low < _BARS and bool((values == np.round(values)).all())
    edges = np.arange(low - 0.5, high + 1) if whole else np.linspace(low, high if high > low else low + 1, _BARS + 1)
    heights, edges = np.histogram(values, edges)
    most = int(heights.max())
    for count in heights_marked(most):
        y = bottom - count / most * (bottom - top)
        draw.line((left, y, right, y), fill=_GREY)
        draw.text((left - 6, y), f"{count:,}", fill=_BLACK, font=small, anchor="rm")
    width = (right - left) / len(heights)
    for number, height in [(n, h) for n, h in enumerate(heights.tolist()) if h]:
        x = left + number * width
        draw.rectangle((x + 1, bottom - height / most * (bottom - top), x + max(2, width - 1), bottom), fill=_BLUE)
    first, last = (edges[0] + 0.5, edges[-1] - 0.5) if whole else (edges[0], edges[-1])
    inset = width / 2 if whole else 0
    for x, value in ((left + inset, first), ((left + right) / 2, (first + last) / 2), (right - inset, last)):
        draw.text((x, bottom + 8), in_figures(value), fill=_BLACK, font=small, anchor="ma")
    draw.text((right, top - 14), f"median {in_figures(float(np.median(values)))}", fill=_BLACK, font=small, anchor="rm")
    return panel


def heights_marked(most: int) -> list[int]:
    """Returns the counts that lines stand at: whole ones, each at its own height."""
    return [most // 2, most] if most > 1 else [most]


def in_figures(value: float) -> str:
    """Returns a number as a label has it: whole ones whole, others with at least four figures that count."""
    if value == round(value):
        return f"{round(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def _spread(values: NDArray[np.int64]) -> str:
    if not values.size:
        return "none"
    low, middle, high = (round(x) for x in np.percentile(values, (5, 50, 95)))
    least, most = values.min(), values.max()
    return (
        f"{values.mean():,.1f} mean; {least:,} least, {low:,} / {middle:,} / {high:,} at 5 / 50 / 95 %, {most:,} most"
    )
