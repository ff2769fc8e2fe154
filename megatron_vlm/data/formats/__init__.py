"""Public formats: each reads one into records.

inputs (files, globs) --expand--> Sources --rows--> json values --parse--> Records, or a DataError in their place
"""

import glob
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.data.file_kinds import refuse_other_format
from megatron_vlm.data.formats.internvl import expand_internvl
from megatron_vlm.data.formats.json_file import CHUNK, JSON_LINES, MAX_INLINE_BYTES, read_json_records
from megatron_vlm.data.formats.llava import parse_llava
from megatron_vlm.data.formats.openai import parse_openai
from megatron_vlm.data.formats.parquet import files_of, parse_row, rows_of_parquet
from megatron_vlm.data.formats.records import Record, RecordSource
from megatron_vlm.data.formats.splits import choose
from megatron_vlm.data.formats.webdataset import read_tars, tars_of
from megatron_vlm.data.formats.xcomposer import expand_xcomposer, parse_xcomposer
from megatron_vlm.data.problems import Notes
from megatron_vlm.errors import ConfigError, DataError, Reason, nearest
from megatron_vlm.log import get_logger

LOGGER = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format: ``expand`` an input into sources, read the ``rows`` of each, ``parse`` each into a record.

    ``mark`` stands in the text of every record of a json array, once: what a guess of their number counts.
    """

    parse: Callable[[RecordSource, int, Any], Record]
    rows: Callable[[RecordSource], Iterator[tuple[int, Any]]] = field(
        default=lambda source: read_json_records(source.path)
    )
    expand: Callable[[RecordSource], list[RecordSource]] = field(default=lambda source: [source])
    mark: bytes | None = b'"conversations"'


def _rows_with_images(source: RecordSource) -> Iterator[tuple[int, Any]]:
    return read_json_records(source.path, MAX_INLINE_BYTES)


FORMATS: dict[str, Format] = {
    "llava": Format(parse=parse_llava),
    "xcomposer": Format(parse=parse_xcomposer, expand=expand_xcomposer),
    "internvl": Format(parse=parse_llava, expand=expand_internvl),
    "openai": Format(parse=parse_openai, rows=_rows_with_images, mark=b'"messages"'),
    "parquet": Format(parse=parse_row, rows=rows_of_parquet, mark=None),
}


WEBDATASET = "webdataset"  # not one file of records, but a sample in several members of several tars: ``read_tars``
NAMES = (*FORMATS, WEBDATASET)


def check_format(name: str, known: Sequence[str] = NAMES) -> None:
    """Raises ConfigError unless ``name`` is a format."""
    if name not in known:
        raise ConfigError(f"unknown format {name!r}{nearest(name, known)}; known: {', '.join(known)}")


def expand_inputs(inputs: Sequence[str | Path], part: str = "") -> list[str]:
    """Returns the files that inputs name, globs resolved in the order of names; ``part`` of them, as ``splits`` has it.

    Raises:
        ConfigError: a glob that matches nothing.
        DataError: it matches nothing of that split.
    """
    paths: list[str] = []
    for name in map(str, inputs):
        if os.path.exists(name) or not glob.has_magic(name):
            paths.append(name)
            continue
        base, found = _matches(name)
        if not found:
            raise ConfigError(f"--input {name}: no file matches")
        chosen = choose(found, base, part, name)
        if chosen.note:
            LOGGER.warning("%s", chosen.note)
        paths += map(str, chosen.files)
    return paths


def _matches(pattern: str) -> tuple[Path, list[Path]]:
    """The folder where a glob begins, and what it matches; links to folders are not followed by ``**``, nor hidden names."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:first])
    try:
        found = sorted(base.glob(str(Path(*parts[first:]))))
    except (ValueError, NotImplementedError, OSError) as error:
        raise ConfigError(f"--input {pattern}: {error}") from error
    hidden = any(part.startswith(".") for part in parts[first:])
    return base, [p for p in found if hidden or not any(n.startswith(".") for n in p.relative_to(base).parts)]


def open_sources(
    format: str, inputs: Sequence[str | Path], *, repeat: Sequence[float] = (), **settings: Any
) -> list[RecordSource]:
    """Returns the sources of some inputs.

    Args:
        format: one of ``NAMES``.
        inputs: files or globs.
        repeat: of all inputs, or one for each (a glob counts as one).
        settings: fields of RecordSource, the same for all.

    Raises:
        ConfigError, DataError: an input, list or meta file that cannot be used.
    """
    check_format(format)
    files = [item for item in map(str, inputs) if not os.path.isdir(item) and not glob.has_magic(item)]
    if settings.get("part") and len(files) == len(inputs):
        raise ConfigError(
            f"--split {settings['part']} chooses among the files of a folder or a glob: {files[0]} is one file"
        )
    if len(repeat) > 1 and len(repeat) != len(inputs):
        raise ConfigError(f"--repeat has {len(repeat)} numbers for {len(inputs)} inputs: give one, or one for each")
    for number in repeat:
        if not (math.isfinite(number) and number > 0):
            raise ConfigError(f"--repeat must be above 0, got {number}")
    sources = []
    for index, item in enumerate(inputs):
        times = repeat[index % len(repeat)] if repeat else None
        for path in expand_inputs([item], settings.get("part", "")):
            refuse_other_format(path, format)
            source = RecordSource(path=path, format=format, repeat=times, **settings)
            if note := _note(source):
                LOGGER.warning("%s", note)
            sources += [source] if format == WEBDATASET else FORMATS[format].expand(source)
    return sources


def _note(source: RecordSource) -> str:
    """What is to be said of the splits of a folder; of one that cannot be read, whoever reads it says so."""
    if not os.path.isdir(source.path):
        return ""
    try:
        if source.format == "parquet":
            return files_of(Path(source.path), source.part).note
        return tars_of(source).note if source.format == WEBDATASET else ""
    except DataError:
        return ""


def guess_records(sources: Sequence[RecordSource]) -> int | None:
    """Guesses how many records there are, for a progress bar, without parsing any; None: no way to tell from the files."""
    total = 0
    for source in sources:
        mark = None if source.format == WEBDATASET else FORMATS[source.format].mark
        path = Path(source.path)
        if mark is None or not os.path.isfile(path):
            return None
        lines = path.suffix.lower() in JSON_LINES
        mark = b"\n" if lines else mark
        with path.open("rb") as file:
            last, open_line = b"", False  # last: as much as may begin a mark that the next chunk ends
            while chunk := file.read(CHUNK):
                chunk = last + chunk
                total += chunk.count(mark)
                last = chunk[1 - len(mark) :] if len(mark) > 1 else b""
                open_line = lines and not chunk.endswith(b"\n")
        total += int(open_line)  # a last line without its end
    return total


def read_source(source: RecordSource, notes: Notes | None = None) -> Iterator[tuple[int, Any, Record | DataError]]:
    """Yields (number, the value as read, its record or what is wrong with it); ``notes``: see ``samples_of_tar``.

    Raises:
        DataError: what makes the rest of the file unreadable.
    """
    if source.format == WEBDATASET:
        yield from read_tars(source, notes)
        return
    format = FORMATS[source.format]
    for number, value in format.rows(source):
        where: dict[str, Any] = {"shard": source.path, "key": f"record {number}"}
        try:
            if isinstance(value, DataError):
                raise value
            yield number, value, format.parse(source, number, value)
        except DataError as error:
            yield number, None, error.at(**where)
        except RecursionError:
            yield number, None, DataError("nested too deeply", reason=Reason.BAD_JSON, **where)
