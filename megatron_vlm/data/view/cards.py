"""What pages about samples share: turns with their labels, pictures, what is left out, and buttons that choose among cards.

RawSample --raw_card--> a card without a model;  records_page: a page of them
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from megatron_vlm.data.formats import read_source
from megatron_vlm.data.formats.records import RecordSource
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.problems import REJECTED
from megatron_vlm.data.sample import RawSample, Turn
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.shards.writer import load_record
from megatron_vlm.errors import DataError
from megatron_vlm.line_files import json_lines
from megatron_vlm.pages import escape, page, picture, table

_LISTED = 50
_KINDS = {
    "all": "all",
    "pictured": "with images",
    "textonly": "without images",
    "cut": "shortened",
    "hole": "cannot be read",
}
STYLE = (
    ".role{flex:0 0 7em;font-weight:600;color:#555}.turns{margin:.4em 0;overflow-wrap:anywhere}"
    ".turn{display:flex;white-space:pre-wrap;border-top:1px solid #eee;padding:.2em 0}.assistant .role{color:#2a7f3a}"
    "label{margin-right:1em;cursor:pointer}"
    + "".join(f"body:has(#only-{kind}:checked) .card:not(.{kind}){{display:none}}" for kind in _KINDS if kind != "all")
)


@dataclass
class LeftOut:
    """Samples that training leaves out: how many by reason, and the first of them by name."""

    counts: Counter[str]
    first: list[str]

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        if len(self.first) < _LISTED:
            self.first.append(name)

    def html(self) -> str:
        number = self.counts.total()
        if not number:
            return ""
        lines = "".join(f"<li>{escape(name)}</li>" for name in self.first)
        more = f"<li>and {number - len(self.first):,} more</li>" if number > len(self.first) else ""
        kinds = table((), [(f"{count:,}", reason) for reason, count in self.counts.most_common()])
        return (
            f'<div class="bad"><p>{number:,} samples are left out of training:</p>{kinds}<ul>{lines}{more}</ul></div>'
        )


def rejected_of(folders: Iterable[str | os.PathLike]) -> LeftOut:
    """Records that `data build` could not use, as it listed them beside the shards."""
    found = LeftOut(Counter(), [])
    for folder in folders:
        for line in json_lines(Path(folder, REJECTED)):
            where = f"{line['file']}, record {line['record']}"
            found.add(line.get("kind", "cannot be used"), f"{where}: {line['reason']}")
    return found


def matches(sample: RawSample, wanted: str) -> bool:
    """Whether a sample's name, id, texts or names of images hold ``wanted``, in any case of letters."""
    words = (sample.key, sample.label, *sample.image_names, *(turn.text for turn in sample.turns))
    return not wanted or any(wanted.lower() in word.lower() for word in words)


def turns(sample_turns: Sequence[Turn]) -> str:
    """A conversation, each turn with who speaks."""
    lines = []
    for turn in sample_turns:
        note = "" if turn.loss else " (no loss)"
        lines.append(
            f'<div class="turn {escape(turn.role)}"><span class="role">{escape(turn.role + note)}</span> '
            f"<span>{escape(turn.text)}</span></div>"
        )
    return f'<div class="turns">{"".join(lines)}</div>'


def stored(images: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
    """The images of a sample as they are stored, a figure each."""
    return [picture(image, f"{name}, {image.width} x {image.height}", "own") for image, name in zip(images, names)]


def buttons(shown: Mapping[str, int]) -> str:
    """Buttons that show cards of one class alone (CSS, no script); nothing where all are of one kind."""
    kinds = {kind: number for kind, number in shown.items() if number and kind != "all"}
    if not any(0 < number < shown["all"] for number in kinds.values()):
        return ""
    return "".join(
        f'<label><input type="radio" name="only" id="only-{kind}"{" checked" if kind == "all" else ""} /> '
        f"{_KINDS[kind]} ({number})</label>"
        for kind, number in [("all", shown["all"]), *kinds.items()]
    )


def kind_of(sample: RawSample) -> str:
    """The class of a card."""
    return "pictured" if sample.images else "textonly"


def read_records(sources: Sequence[RecordSource]) -> Iterator[RawSample | DataError]:
    """Yields raw records with their images, or what is wrong with one."""
    for source in sources:
        try:
            for number, _, record in read_source(source):
                if isinstance(record, DataError):
                    yield record
                    continue
                key = record.key or f"{source.title} record {number}"
                try:
                    talk, images = load_record(source, record)
                except DataError as error:
                    yield error.at(key=key, shard=record.file or source.path)
                    continue
                yield RawSample(
                    key=key,
                    turns=talk,
                    images=tuple(data for _, data in images),
                    image_names=tuple(name for name, _ in images),
                    label=record.label,
                )
        except DataError as error:  # the rest of the file cannot be read
            yield error


def read_shards(dataset: Dataset) -> Iterator[RawSample | DataError]:
    """Yields the samples of shard folders as they lie there."""
    for number in range(len(dataset)):
        try:
            yield dataset.read(number)
        except DataError as error:
            yield error


def records_page(samples: Iterable[RawSample | DataError], title: str, *, num_samples: int, wanted: str) -> str:
    """Returns a page of records as their author wrote them: no model, no tokens.

    Args:
        samples: read until ``num_samples`` are shown; problems met on the way are counted.
        title: names the data.
        num_samples: at least 1.
        wanted: text that a record must hold; empty: any.
    """
    cards: list[str] = []
    bad, shown = rejected_of(()), Counter[str]()
    for sample in samples:
        if len(cards) >= num_samples:
            break
        if isinstance(sample, DataError):
            bad.add(sample.reason.words, str(sample))
            continue
        if not matches(sample, wanted):
            continue
        try:
            pictures = stored(
                [decode_image(d, n) for d, n in zip(sample.images, sample.image_names)], sample.image_names
            )
        except DataError as error:
            bad.add(error.reason.words, str(error.at(key=sample.key)))
            continue
        shown.update(("all", kind_of(sample)))
        cards.append(
            f'<div class="card {kind_of(sample)}"><h3>{escape(sample.key)}</h3><div class="images">{"".join(pictures)}</div>'
            f"{turns(sample.turns)}</div>"
        )
    note = f", those with {wanted!r}" if wanted else ""
    head = (
        f"<h1>{escape(title)}</h1><p>The first {len(cards)} records as they are written{escape(note)}. Name a model (--model) "
        "to see tokens, the loss mask and what the tower gets.</p>"
    )
    return page("Data preview", f"{head}{bad.html()}{buttons(shown)}{''.join(cards)}", style=STYLE)
