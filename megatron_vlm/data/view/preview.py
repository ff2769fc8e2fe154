"""One self-contained HTML page of what the model will see: rows in training order, tokens, images, counts.

Stream --rows--> RowReader.sample --EncodedSample--> tokens by colour, pixels de-normalised --> HTML
"""

import base64
import html
import io
from itertools import groupby, islice

import numpy as np
from PIL import Image
from torch import Tensor

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.row import IGNORE_INDEX, EncodedSample
from megatron_vlm.data.stream.counts import sample_name
from megatron_vlm.data.stream.loader import OpenedData
from megatron_vlm.data.stream.reader import RowReader
from megatron_vlm.data.stream.step_plan import Item
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import DataError, Reason, printable

_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#edc948")
_THUMBNAIL = 320
_GAP = (128, 128, 128)  # between tiles
# Nothing of a page may run or reach out, whatever its texts and names are.
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">"
)
_LISTED = 50
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222;background:#fafafa}
h1{font-size:1.4em}h2{font-size:1.1em;margin:2em 0 .4em}h3{font-size:1em;margin:0 0 .4em}
.bar{display:flex;height:26px;border-radius:4px;overflow:hidden;
background:repeating-linear-gradient(45deg,#ddd,#ddd 6px,#eee 6px,#eee 12px)}
.bar a{color:#fff;font-size:12px;line-height:26px;text-align:center;overflow:hidden;text-decoration:none;
border-right:1px solid #fff;box-sizing:border-box}
.card{background:#fff;border:1px solid #ddd;border-left:6px solid;border-radius:4px;padding:.8em 1em;margin:.8em 0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:.6em;border-radius:4px}
.s{background:#bfe8c2}.i{background:#cfdcf7;border-radius:8px;padding:0 .4em;white-space:nowrap}
.images{display:flex;flex-wrap:wrap;gap:10px;align-items:flex-end;margin:.6em 0}
figure{margin:0}figcaption{font-size:12px;color:#666}img{border:1px solid #888;display:block}img.own{border:2px dashed #aaa}
.counts{color:#555}.bad{color:#b00020}
"""


def preview_page(opened: OpenedData, processor: Processor, config: DataConfig, *, seed: int, num_samples: int) -> str:
    """Returns the page: the first rows of training until they hold ``num_samples`` samples.

    Args:
        opened: data with its order.
        processor: of the model.
        config: packing, seq_length, what is done to bad samples is shown, not applied.
        seed: of the order and augmentation.
        num_samples: at least 1.
    """
    reader = RowReader(opened.dataset, processor, config, seed=seed, multiple_of=1, fill_to=0)
    body, shown, number = [], 0, 0
    for epoch, window, item_number, item in islice(opened.stream.items(), num_samples):
        if shown >= num_samples or epoch:  # what a second epoch reads is the same again
            break
        body.append(_row(opened, reader, processor, config, (epoch, window, item_number), item, shown))
        shown += len(item.ids)
        number += 1
    kind = f"packed rows of {config.seq_length} tokens" if config.packing else "samples, not packed"
    sources = ", ".join(
        f"{source.name} x {float(source.per_epoch / source.samples):.4g}" for source in opened.mixture.sources
    )
    head = (
        f"<h1>{html.escape(sources)}</h1><p>{len(opened.dataset):,} samples; here {_how_many(opened, shown)}, as {number} "
        f'{kind}. <span class="s">Supervised tokens</span> are what the loss is taken on; <span class="i">image tokens</span> '
        "are replaced by image features. A dashed frame is an image as it is stored, the frames beside it are what the tower "
        f"gets of the sample, tiles apart.</p>{_excluded(opened)}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{_POLICY}<title>Data preview</title><style>{_STYLE}</style>'
        f"<body>{head}{''.join(body)}</body></html>\n"
    )


def _how_many(opened: OpenedData, shown: int) -> str:
    total = sum(int((opened.counts.shard(shard)["reason"] == 0).sum()) for shard in range(len(opened.dataset.shards)))
    usual = all(source.per_epoch == source.samples for source in opened.mixture.sources)
    if usual and shown >= total:
        return f"all {shown} that can be used" if total < len(opened.dataset) else f"all {shown}"
    return f"the first {shown} of an epoch"


def _excluded(opened: OpenedData) -> str:
    """The samples that a run leaves out, with the reason of each: they stand in no row."""
    lines, number = [], 0
    for shard in range(len(opened.dataset.shards)):
        reasons = opened.counts.shard(shard)["reason"]
        for row in np.flatnonzero(reasons).tolist():
            number += 1
            if number <= _LISTED:
                reason = Reason.numbered(int(reasons[row]))
                lines.append(
                    f"<li>{html.escape(sample_name(opened.dataset, shard, row))}: {html.escape(reason.words)}</li>"
                )
    if not number:
        return ""
    more = f"<li>and {number - _LISTED:,} more</li>" if number > _LISTED else ""
    return f'<p class="bad">{number:,} samples are left out of training:</p><ul class="bad">{"".join(lines)}{more}</ul>'


def _row(
    opened: OpenedData,
    reader: RowReader,
    processor: Processor,
    config: DataConfig,
    place: tuple[int, int, int],
    item: Item,
    start: int,
) -> str:
    epoch, window, number = place
    length = config.seq_length if config.packing else max(1, sum(item.tokens))
    segments, cards = [], []
    for index, (sample_id, tokens) in enumerate(zip(item.ids, item.tokens)):
        colour = _COLOURS[index % len(_COLOURS)]
        name = f"sample-{start + index}"
        segments.append(
            f'<a href="#{name}" title="{tokens} tokens" style="width:{100 * tokens / length:.3f}%;'
            f'background:{colour}">{tokens}</a>'
        )
        cards.append(
            f'<div class="card" id="{name}" style="border-left-color:{colour}">'
            f"{_sample(opened, reader, processor, sample_id, tokens, epoch)}</div>"
        )
    used = sum(item.tokens)
    return (
        f"<h2>Epoch {epoch}, window {window}, {'row' if config.packing else 'sample'} {number}: {len(item.ids)} samples, "
        f'{used} of {length} tokens ({used / length:.1%})</h2><div class="bar">{"".join(segments)}</div>{"".join(cards)}'
    )


def _sample(
    opened: OpenedData, reader: RowReader, processor: Processor, sample_id: int, tokens: int, epoch: int
) -> str:
    shard, row = opened.dataset.locate_one(sample_id)
    where = html.escape(printable(f"{opened.dataset.shards[shard].path.name}, sample {row}"))
    try:
        sample = reader.sample(sample_id, tokens, epoch)
        raw = opened.dataset.read(sample_id)
        stored = [decode_image(data, name) for data, name in zip(raw.images, raw.image_names)]
    except DataError as error:
        return f'<h3>{where}</h3><p class="bad">A hole: {html.escape(str(error))}</p>'
    supervised = int((sample.labels[1:] != IGNORE_INDEX).sum())
    counts = (
        f"{len(sample.input_ids)} tokens, {supervised} supervised, {len(sample.image_positions)} for images; "
        f"{len(stored)} images, {len(sample.pixels)} as the tower gets them"
    )
    figures = [
        _figure(image, f"{name}, {image.width} x {image.height}", "own") for image, name in zip(stored, raw.image_names)
    ]
    figures += [_figure(*_picture(pixels, processor), "") for pixels in sample.pixels]
    return (
        f'<h3>{html.escape(sample.key)}</h3><p class="counts">{where}: {counts}</p>'
        f'<div class="images">{"".join(figures)}</div><div class="text">{_text(sample, processor)}</div>'
    )


def _text(sample: EncodedSample, processor: Processor) -> str:
    """Tokens as text in runs of one kind; runs of image tokens as their number."""
    learned = (sample.labels != IGNORE_INDEX).tolist()
    learned[0] = False
    parts = []
    image = processor.image_token_id
    for (supervised, is_image), run in groupby(
        zip(sample.input_ids.tolist(), learned), lambda item: (item[1], item[0] == image)
    ):
        ids = [token for token, _ in run]
        text = html.escape(processor.tokenizer.decode(ids[:1] if is_image else ids))
        if is_image:
            parts.append(f'<span class="i">{text} x {len(ids)}</span>')
        else:
            parts.append(f'<span class="s" title="{len(ids)} tokens">{text}</span>' if supervised else text)
    return "".join(parts)


def _picture(pixels: Tensor, processor: Processor) -> tuple[Image.Image, str]:
    """Takes normalisation back: float32 [C, H, W] -> an RGB image, its tiles apart, and its caption."""
    mean = np.array(processor.mean, dtype=np.float32)[:, None, None]
    std = np.array(processor.std, dtype=np.float32)[:, None, None]
    values = ((pixels.numpy() * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
    image = Image.fromarray(values.transpose(1, 2, 0))
    side, across = processor.tiles(pixels)
    if not side:
        return image, f"{image.width} x {image.height}"
    columns, number = image.width // side, image.width // side * (image.height // side)
    gap = max(1, side // 24)
    size = (across * (side + gap) + gap, -(-number // across) * (side + gap) + gap)
    sheet = Image.new("RGB", size, _GAP)
    for index in range(number):
        left, top = index % columns * side, index // columns * side
        place = index % across * (side + gap) + gap, index // across * (side + gap) + gap
        sheet.paste(image.crop((left, top, left + side, top + side)), place)
    return sheet, f"{number} {'tile' if number == 1 else 'tiles'} of {side} x {side}"


def _figure(image: Image.Image, caption: str, kind: str) -> str:
    small = image.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img class="{kind}" alt="" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
