"""Records of files as questions: the last answer of each is asked for again.

files --questions--> Question: where it stands, its references --encode--> EncodedSample, with its images or blind
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from megatron_vlm.data.formats import open_sources, read_source
from megatron_vlm.data.formats.records import (
    IMAGE_PLACEHOLDER,
    OWN_VIDEO,
    VIDEO_PLACEHOLDER,
    Record,
    RecordSource,
    VideoSettings,
)
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.shards.writer import load_record
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import DataError
from megatron_vlm.models.generation import SamplingConfig
from megatron_vlm.training.answering.answers import check_length


@dataclass(frozen=True, kw_only=True)
class Question:
    """A record whose last answer is asked for.

    Attributes:
        number: among all questions, from 0.
        source, record: it comes from.
        references: right answers: the list ``answers`` of the record, else its last answer.
        subset: what its scores are grouped by.
    """

    number: int
    source: RecordSource
    record: Record
    references: tuple[str, ...]
    subset: str

    @property
    def name(self) -> str:
        """The record's id, else its key in a tar, else its number in the file."""
        return self.record.label or self.record.key or str(self.record.number)

    @property
    def where(self) -> dict[str, str]:
        """File and record, as errors name them."""
        return {
            "shard": self.record.file or self.source.path,
            "key": self.record.key or f"record {self.record.number}",
        }

    def load(self, own: VideoSettings = OWN_VIDEO) -> tuple[tuple[Turn, ...], list[tuple[str, bytes]]]:
        """The turns before the answer, and (name, encoded image) in order of use; ``own``: how the model takes frames.

        Raises:
            DataError: a file that cannot be read.
        """
        turns, files = load_record(self.source, self.record, own)
        return turns[:-1], files

    @property
    def text(self) -> str:
        """What is asked last."""
        return self.record.turns[-2].text

    @property
    def digest(self) -> str:
        """Of all that is asked: the turns before the answer, the names or bytes of the files."""
        digest = hashlib.sha256(json.dumps([(turn.role, turn.text) for turn in self.record.turns[:-1]]).encode())
        for file in (*self.record.images, *self.record.videos):
            digest.update(hashlib.sha256(file.encode() if isinstance(file, str) else file).digest())
        return digest.hexdigest()[:16]

    def encode(
        self, processor: Processor, positions: int, sampling: SamplingConfig, *, blind: bool = False
    ) -> EncodedSample:
        """Returns the prompt; ``blind``: without the images, and without their marks.

        Raises:
            DataError: it cannot be asked.
            ConfigError: prompt and answer are longer than ``positions``.
        """
        try:
            turns, files = (self._blind(), []) if blind else self.load(processor.video)
            sample = processor.encode_prompt(turns, [decode_image(data, name) for name, data in files])
        except DataError as error:
            raise DataError(error.message, **self.where) from error  # type: ignore[arg-type]
        check_length(sample, positions, sampling, ", ".join(self.where.values()))
        return sample

    def _blind(self) -> tuple[Turn, ...]:
        turns = []
        for turn in self.record.turns[:-1]:
            text = turn.text
            for mark in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
                text = text.replace(f"{mark}\n", "").replace(f"\n{mark}", "").replace(mark, "")
            turns.append(replace(turn, text=text))
        return tuple(turns)


def questions(
    format: str,
    files: Sequence[str],
    image_root: str,
    limit: int | None = None,
    subset_key: str | None = None,
) -> Iterator[Question]:
    """Yields the records of some files, globs resolved; their images are not read yet.

    Args:
        format: as of ``data build``.
        files: with a right answer in each record.
        image_root: folder that relative image paths start from.
        limit: most records of each file.
        subset_key: key of a record whose value is its subset; None: the file's name, where there are several.

    Raises:
        DataError: a record that cannot be asked.
    """
    sources, number = open_sources(format, files, root=image_root), 0
    for source in sources:
        for _, value, record in islice(read_source(source), limit):
            if isinstance(record, DataError):
                raise record
            question = Question(number=number, source=source, record=record, references=(), subset="")
            data = value if isinstance(value, Mapping) else {}
            subset = source.title if len(sources) > 1 else ""
            if subset_key is not None:
                if not isinstance(data.get(subset_key), str | int):
                    message = f"no text or number under {subset_key!r}, which --subset-key names"
                    raise DataError(message, **question.where)  # type: ignore[arg-type]
                subset = str(data[subset_key])
            references = _references(data, record, question.where)
            yield replace(question, references=references, subset=subset)
            number += 1


def _references(data: Mapping[str, Any], record: Record, where: Mapping[str, str]) -> tuple[str, ...]:
    given = data.get("answers")
    if given is None:
        return (record.turns[-1].text,)
    items = given if isinstance(given, list) else []
    texts = [item.get("answer") if isinstance(item, Mapping) else item for item in items]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        message = "'answers' must be a list of right answers, each a text or a mapping with 'answer'"
        raise DataError(message, **where)  # type: ignore[arg-type]
    return tuple(map(str, texts))
