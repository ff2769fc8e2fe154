"""Parquet files and HF ``datasets`` folders, with image bytes and conversations in their columns.

    images: ``image`` or ``images`` (bytes, {"bytes", "path"}, or a path; one or a list)
    text:   ``conversations`` as LLaVA's, ``messages`` as OpenAI's, or ``texts``: [{"user", "assistant"}]

The columns say which. A folder is read as ``datasets.save_to_disk`` wrote it (its state.json lists the arrow files) or
as parquet files in the order of their names; of its splits one is read: see ``splits``.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_vlm.data.file_kinds import what_it_is
from megatron_vlm.data.formats.keys import LOSS, loss_of, unknown_keys
from megatron_vlm.data.formats.llava import parse_llava
from megatron_vlm.data.formats.openai import parse_openai
from megatron_vlm.data.formats.records import (
    IMAGE_PLACEHOLDER,
    Record,
    RecordSource,
    files_beside,
    object_of,
    record_of,
)
from megatron_vlm.data.formats.splits import Choice, choose_in, choose_name
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import ConfigError, DataError, Reason
from megatron_vlm.files import describe, open_regular, read_json

BATCH_ROWS = 64  # in memory at a time: rows hold images
COLUMNS = ("conversations", "messages", "texts")


def parse_row(source: RecordSource, number: int, data: Any) -> Record:
    """Turns one row, or json value of unknown format, into a record.

    Raises:
        DataError: what is wrong with it.
    """
    data = object_of(data)
    if data.get("conversations") is not None:
        return parse_llava(source, number, data)
    if data.get("messages") is not None:
        return parse_openai(source, number, data)
    if data.get("texts") is not None:
        return _parse_texts(source, number, data)
    raise DataError(f"no column {', '.join(COLUMNS)}; found: {', '.join(map(str, data))[:200]}")


def _parse_texts(source: RecordSource, number: int, data: Mapping[str, Any]) -> Record:
    """The Cauldron's rows: pairs of texts; their images come before the first question, without placeholders."""
    texts = data["texts"]
    if not isinstance(texts, list) or not texts:
        raise DataError("'texts' must be a non-empty list")
    images, videos = files_beside(data)
    turns: list[Turn] = []
    unknown: list[str] = []
    for index, item in enumerate(texts):
        if not isinstance(item, Mapping) or not all(isinstance(item.get(role), str) for role in ("user", "assistant")):
            raise DataError(f"texts[{index}] must have the texts 'user' and 'assistant'")
        loss = loss_of(item, "assistant", f"texts[{index}]")
        turns += [Turn(role="user", text=item["user"]), Turn(role="assistant", text=item["assistant"], loss=loss)]
        found = unknown_keys(item, ("user", "assistant", *LOSS), f"texts[{index}]")
        unknown += [f"texts[].{key}" for key in found]
    if images and not any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
        turns[0] = Turn(role="user", text=IMAGE_PLACEHOLDER * len(images) + turns[0].text)
    return record_of(source, number, data, turns, images, videos, read=["texts"], unknown=unknown)


def rows_of_parquet(source: RecordSource) -> Iterator[tuple[int, Any]]:
    """Yields (row number, row as a dict) of a parquet file, an arrow file, or a folder of them.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: nothing to read, or a damaged file, by name.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("--format parquet needs pyarrow: pip install 'megatron_vlm[parquet]'") from error
    number = 0
    for path in files_of(Path(source.path), source.part).files:
        try:
            for batch in _batches(pyarrow, path):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
        except (OSError, pyarrow.ArrowException, ValueError) as error:
            raise DataError(f"cannot be read: {str(error)[:300]}", shard=str(path), key=f"record {number}") from error


def _batches(pyarrow: Any, path: Path) -> Iterator[Any]:
    with open_regular(path, DataError) as file:  # never a pipe
        if words := what_it_is(file.read(64)):
            raise DataError(f"{describe(path)} is {words}", reason=Reason.DAMAGED_SHARD)
    if path.suffix.lower() == ".arrow":
        with pyarrow.memory_map(str(path)) as file:
            try:
                stream = pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                table = pyarrow.ipc.open_file(file)
                stream = (table.get_batch(index) for index in range(table.num_record_batches))
            for batch in stream:
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield batch.slice(start, BATCH_ROWS)
    else:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=BATCH_ROWS)


def files_of(path: Path, part: str = "") -> Choice:
    """Returns the files that hold the rows of a source, in order; ``part`` as ``splits`` has it.

    Raises:
        DataError: none.
    """
    if os.path.isfile(path):
        return Choice(files=(path,))
    several = path / "dataset_dict.json"
    if os.path.isfile(several):
        names = read_json(several, DataError).get("splits")
        if not isinstance(names, list) or any(not isinstance(n, str) or n != Path(n).name for n in names) or not names:
            raise DataError("not a readable dataset_dict.json", shard=str(several))
        name = choose_name(names, part, str(path))
        left = ", ".join(other for other in names if other != name)
        note = f"{path}: of its splits {name} is read, not {left}; --split reads another" if left else ""
        return dataclasses.replace(files_of(path / name), note=note)
    state = path / "state.json"
    if os.path.isfile(state):
        try:
            names = [item["filename"] for item in read_json(state, DataError)["_data_files"]]
            if any("/" in name or name.startswith(".") for name in names):
                raise ValueError(f"file names lead out of the folder: {names}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not a readable state.json: {error!r}", shard=str(path)) from error
        return Choice(files=tuple(path / name for name in names))
    found = choose_in(path, (".parquet", ".arrow"), part)
    if not found.files:
        raise DataError("No such file, or a folder without parquet or arrow files", shard=str(path))
    return found
