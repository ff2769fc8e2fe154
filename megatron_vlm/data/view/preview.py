"""One self-contained HTML page of what the model will see: rows in training order, tokens, images, counts.

Stream --rows--> RowReader.sample --EncodedSample--> tokens by colour, pixels de-normalised --> HTML
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from PIL import Image
from torch import Tensor

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.row import IGNORE_INDEX, EncodedSample
from megatron_vlm.data.sample import RawSample
from megatron_vlm.data.stream.counts import sample_name
from megatron_vlm.data.stream.loader import OpenedData
from megatron_vlm.data.stream.reader import RowReader
from megatron_vlm.data.stream.step_plan import Item
from megatron_vlm.data.types import Processor
from megatron_vlm.data.view import cards
from megatron_vlm.errors import DataError, Reason
from megatron_vlm.pages import escape, page, picture

_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#edc948")
_GAP = (128, 128, 128)  # between tiles
_STYLE = """
.bar{display:flex;height:26px;border-radius:4px;overflow:hidden;
background:repeating-linear-gradient(45deg,#ddd,#ddd 6px,#eee 6px,#eee 12px)}
.bar a{color:#fff;font-size:12px;line-height:26px;text-align:center;overflow:hidden;text-decoration:none;
border-right:1px solid #fff;box-sizing:border-box}
.s{background:#bfe8c2}.i{background:#cfdcf7;border-radius:8px;padding:0 .4em;white-space:nowrap}
.pair{display:flex;flex-wrap:wrap;gap:6px;align-items:flex-end;border:1px solid #eee;padding:6px}
"""


@dataclass
class _Page:
    """What a page is made from, and how many cards of each kind it has."""

    opened: OpenedData
    reader: RowReader
    processor: Processor
    config: DataConfig
    wanted: str
    shown: Counter[str] = field(default_factory=Counter)


def preview_page(
    opened: OpenedData,
    processor: Processor,
    config: DataConfig,
    *,
    seed: int,
    num_samples: int,
    said: str = "",
    wanted: str = "",
    title: str = "",
) -> str:
    """Returns the page: the first rows of training until they hold ``num_samples`` samples.

    Args:
        opened: data with its order.
        processor: of the model.
        config: packing, seq_length, what is done to bad samples is shown, not applied.
        seed: of the order and augmentation.
        num_samples: at least 1.
        said: where the settings come from.
        wanted: text that a sample must hold to be shown; empty: any.
        title: names the data; empty: its sources and how often an epoch reads each.
    """
    reader = RowReader(opened.dataset, processor, config, seed=seed, multiple_of=1, fill_to=0)
    what = _Page(opened, reader, processor, config, wanted)
    body, number = [], 0
    for epoch, window, item_number, item in opened.stream.items():
        if what.shown["all"] >= num_samples or epoch:  # what a second epoch reads is the same again
            break
        row = _row(what, (epoch, window, item_number), item)
        body.append(row)
        number += bool(row)
    kind = f"packed rows of {config.seq_length} tokens" if config.packing else "samples, not packed"
    sources = ", ".join(
        f"{source.name} x {float(source.per_epoch / source.samples):.4g}" for source in opened.mixture.sources
    )
    chosen = f", those with {wanted!r}," if wanted else ""
    head = (
        f"<h1>{escape(title or sources)}</h1><p>{escape(said)}</p><p>{len(opened.dataset):,} samples; here "
        f"{_how_many(opened, what.shown['all'])}{escape(chosen)} as {number} {kind}. "
        '<span class="s">Supervised tokens</span> are what the loss is taken on; <span class="i">image tokens</span> '
        "are replaced by image features. A dashed frame is an image as it is stored, the frames beside it are what the tower "
        f"gets of it, tiles apart.</p>{_left_out(opened)}{cards.buttons(what.shown)}"
    )
    return page("Data preview", head + "".join(body), style=_STYLE + cards.STYLE)


def _how_many(opened: OpenedData, shown: int) -> str:
    total = sum(int((opened.counts.shard(shard)["reason"] == 0).sum()) for shard in range(len(opened.dataset.shards)))
    usual = all(source.per_epoch == source.samples for source in opened.mixture.sources)
    if usual and shown >= total:
        return f"all {shown} that can be used," if total < len(opened.dataset) else f"all {shown},"
    return f"the first {shown} of an epoch,"


def _left_out(opened: OpenedData) -> str:
    """What a run leaves out, with the reason of each: records that no shard holds, and samples that stand in no row."""
    found = cards.rejected_of(dict.fromkeys(shard.folder for shard in opened.dataset.shards))
    for shard in range(len(opened.dataset.shards)):
        reasons = opened.counts.shard(shard)["reason"]
        for row in np.flatnonzero(reasons).tolist():
            reason = Reason.numbered(int(reasons[row])).words
            found.add(reason, f"{sample_name(opened.dataset, shard, row)}: {reason}")
    return found.html()


def _row(what: _Page, place: tuple[int, int, int], item: Item) -> str:
    """A row: a bar of its samples, and the card of each that is wanted; empty where none is."""
    epoch, window, number = place
    length = what.config.seq_length if what.config.packing else max(1, sum(item.tokens))
    segments, found = [], []
    for index, (sample_id, tokens) in enumerate(zip(item.ids, item.tokens)):
        colour = _COLOURS[index % len(_COLOURS)]
        name = f"sample-{what.shown['all']}"
        card = _card(what, sample_id, tokens, epoch)
        segments.append(
            f'<a href="#{name if card else ""}" title="{tokens} tokens" style="width:{100 * tokens / length:.3f}%;'
            f'background:{colour}">{tokens}</a>'
        )
        if card is not None:
            kinds, inside = card
            what.shown.update(("all", *kinds))
            found.append(
                f'<div class="card {" ".join(kinds)}" id="{name}" style="border-left-color:{colour}">{inside}</div>'
            )
    if not found:
        return ""
    used = sum(item.tokens)
    return (
        f"<h2>Epoch {epoch}, window {window}, {'row' if what.config.packing else 'sample'} {number}: {len(item.ids)} samples, "
        f'{used} of {length} tokens ({used / length:.1%})</h2><div class="bar">{"".join(segments)}</div>{"".join(found)}'
    )


def _card(what: _Page, sample_id: int, tokens: int, epoch: int) -> tuple[list[str], str] | None:
    """Kinds and HTML of a sample; None where it is not wanted."""
    opened = what.opened
    shard, row = opened.dataset.locate_one(sample_id)
    where = f"{opened.dataset.shards[shard].path.name}, sample {row}"
    try:
        raw = opened.dataset.read(sample_id)
        if not cards.matches(raw, what.wanted):
            return None
        sample = what.reader.sample(sample_id, tokens, epoch)
        images = [decode_image(data, name) for data, name in zip(raw.images, raw.image_names)]
    except DataError as error:
        return (
            None if what.wanted else (["hole"], f'<h3>{escape(where)}</h3><p class="bad">A hole: {escape(error)}</p>')
        )
    cut = bool(opened.counts.shard(shard)["truncated"][row])
    supervised = int((sample.labels[1:] != IGNORE_INDEX).sum())
    counts = (
        f"{len(sample.input_ids)} tokens, {supervised} supervised, {len(sample.image_positions)} for images; "
        f"{len(images)} images, {len(sample.pixels)} as the tower gets them{'; shortened' if cut else ''}"
    )
    return (
        [cards.kind_of(raw), *(["cut"] if cut else [])],
        f'<h3>{escape(sample.key)}</h3><p class="counts">{escape(where)}: {counts}</p>'
        f'<div class="images">{_pictures(what.processor, raw, images, sample)}</div>{cards.turns(raw.turns)}'
        f'<div class="text">{_text(sample, what.processor)}</div>',
    )


def _pictures(processor: Processor, raw: RawSample, images: list[Image.Image], sample: EncodedSample) -> str:
    """Each image as it is stored, beside what the tower gets of it."""
    own = cards.stored(images, raw.image_names)
    frames = [picture(*_picture(pixels, processor)) for pixels in sample.pixels]
    if not own or len(frames) % len(own):
        return "".join(own + frames)
    views = len(frames) // len(own)  # Idefics2 sees five of each, all others one
    return "".join(
        f'<div class="pair">{figure}{"".join(frames[index * views : (index + 1) * views])}</div>'
        for index, figure in enumerate(own)
    )


def _text(sample: EncodedSample, processor: Processor) -> str:
    """Tokens as text in runs of one kind; runs of image tokens as their number."""
    learned = (sample.labels != IGNORE_INDEX).tolist()
    learned[0] = False
    parts = []
    images = frozenset(processor.image_ids)
    for (supervised, is_image), run in groupby(
        zip(sample.input_ids.tolist(), learned), lambda item: (item[1], item[0] in images)
    ):
        ids = [token for token, _ in run]
        text = escape(processor.tokenizer.decode(ids[:1] if is_image else ids))
        if is_image:
            parts.append(f'<span class="i">{text} x {len(ids)}</span>')
        else:
            parts.append(f'<span class="s" title="{len(ids)} tokens">{text}</span>' if supervised else text)
    return "".join(parts)


def _picture(pixels: Tensor, processor: Processor) -> tuple[Image.Image, str]:
    """Takes normalisation back: float32 [C, H, W] -> an RGB image, its tiles apart, and its caption; frames side by side."""
    mean = np.array(processor.mean, dtype=np.float32)[:, None, None]
    std = np.array(processor.std, dtype=np.float32)[:, None, None]
    frames = len(pixels) // len(mean)  # a tower may see several of a video as one
    pixels = pixels.unflatten(0, (frames, -1)).permute(1, 2, 0, 3).flatten(2)
    values = ((pixels.numpy() * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
    image = Image.fromarray(values.transpose(1, 2, 0))
    side, across = processor.tiles(pixels)
    if not side:
        each = f"{image.width // frames} x {image.height}"
        return image, f"{frames} frames of {each}" if frames > 1 else each
    columns, number = image.width // side, image.width // side * (image.height // side)
    gap = max(1, side // 24)
    size = (across * (side + gap) + gap, -(-number // across) * (side + gap) + gap)
    sheet = Image.new("RGB", size, _GAP)
    for index in range(number):
        left, top = index % columns * side, index // columns * side
        place = index % across * (side + gap) + gap, index // across * (side + gap) + gap
        sheet.paste(image.crop((left, top, left + side, top + side)), place)
    return sheet, f"{number} {'tile' if number == 1 else 'tiles'} of {side} x {side}"
