"""Tar shards of other tools, used as they are: which of them to read, and what the parts of a sample say.

    KEY.jpg KEY.1.png KEY.json     an image or several, and LLaVA's, OpenAI's or The Cauldron's record
    KEY.jpg KEY.txt                a caption

A sample is a run of members that share their name up to the first dot (webdataset's rule); its images are its image
members, in the order of the tar. A folder with ``.nv-meta`` (Megatron-Energon) says which shards belong to which part
(split.yaml) and which fields make a sample (dataset.yaml). Nothing in a tar is ever unpickled or run.

tar --runs of members--> samples_of_tar: TarSamples, checked --> the index (tar_shards.py)
                                                             --> read_tars: records, as of the other formats
"""

import itertools
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats.energon import CAPTION, CRUDE, VQA, read_energon, refuse_metadataset
from megatron_vlm.data.formats.json_file import MAX_RECORD_BYTES, strict_decoder
from megatron_vlm.data.formats.parquet import COLUMNS, parse_row
from megatron_vlm.data.formats.records import IMAGE_PLACEHOLDER, Record, RecordSource, make_record
from megatron_vlm.data.formats.splits import Choice, choose_in
from megatron_vlm.data.images.pictures import MAX_BYTES
from megatron_vlm.data.problems import Notes
from megatron_vlm.data.sample import MAX_IMAGES, MAX_SPAN, Turn
from megatron_vlm.data.shards.tar import TarIndex, index_tar
from megatron_vlm.errors import DataError, Reason

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif", ".heic", ".heif")
TEXT_SUFFIXES = (".json", ".txt", ".caption", ".cls")
_ACCESS = re.compile(r"^([^\[\]]+)((?:\[[^\[\]]+\])*)$")


@dataclass(frozen=True, kw_only=True)
class SampleForm:
    """How the parts of a sample make a conversation.

    Attributes:
        kind: Energon's sample class; empty: by the parts themselves.
        fields: Energon's field map: field -> part with access, as ``json[answers][0]``, alternatives after commas.
        prepend: see RecordSource.
    """

    kind: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    prepend: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TarSample:
    """A sample where it lies in its tar.

    Attributes:
        number: in its tar, from 0.
        key: see ``split_name``.
        start: of its first member's header, in the tar.
        block: its bytes, up to the next sample.
        images: (name, offset in ``block``, bytes) of its images, in order.
        texts: part -> content.
        record: what it says; see ``parse_parts``.
    """

    number: int
    key: str
    start: int
    block: bytes
    images: tuple[tuple[str, int, int], ...]
    texts: Mapping[str, bytes]
    record: Record


def split_name(name: str) -> tuple[str, str]:
    """Returns key and part of a member's name: ``dir/0001.seg.png`` -> (``dir/0001``, ``seg.png``)."""
    folder, slash, base = name.rpartition("/")
    stem, _, part = base.partition(".")
    return f"{folder}{slash}{stem}", part.lower()


def stray(name: str) -> str:
    """Returns what kind of member belongs to no sample, as webdataset's own reader has it; empty: it is part of one.

    A name without a suffix, or a hidden one: what macOS (``._a.jpg``, ``__MACOSX``), desktops and people leave in archives.
    """
    *folders, base = name.split("/")
    if "__MACOSX" in folders:
        return "__MACOSX/*"
    if base.startswith("._"):
        return "._*"
    if base.lower().startswith("readme"):
        return "README"
    if base.startswith(".") or any(len(folder) > 1 and folder.startswith(".") for folder in folders):
        return "hidden"
    return "" if "." in base else "without a suffix"


def is_image(part: str) -> bool:
    """Whether a part (``jpg``, ``1.png``) is an image by its name."""
    return f".{part}".endswith(IMAGE_SUFFIXES)


def is_text(part: str) -> bool:
    """Whether a part may hold text."""
    return f".{part}".endswith(TEXT_SUFFIXES)


def images_of(form: SampleForm, parts: Sequence[str]) -> list[int]:
    """Returns which parts are the sample's images, in order: what the field map names, else all of them."""
    if form.fields and "image" in form.fields:
        for option in form.fields["image"].split(","):
            if option.strip().lower() in parts:
                return [parts.index(option.strip().lower())]
        return []
    return [index for index, part in enumerate(parts) if is_image(part)]


def parse_parts(form: SampleForm, texts: Mapping[str, bytes], num_images: int) -> Record:
    """Makes a record of a sample's text parts.

    Args:
        form: of the data set.
        texts: part -> content.
        num_images: of the sample.

    Returns:
        The record; its ``images`` are empty bytes, which only count.

    Raises:
        DataError: what is wrong with it.
    """
    source = RecordSource(path="", format="webdataset", prepend=form.prepend)
    images = [b"-"] * num_images
    if form.kind in ("", CRUDE):
        data = _json(texts["json"]) if "json" in texts else None
        if isinstance(data, Mapping) and any(data.get(column) is not None for column in COLUMNS):
            if data.get("video") or data.get("videos"):
                raise DataError(
                    "a video beside a tar is not read: its frames can be members", reason=Reason.UNSUPPORTED
                )
            return parse_row(source, 0, {**data, "images": images or None, "image": None})
        caption = next((texts[part] for part in ("txt", "caption") if part in texts), None)
        if caption is None:
            found = ", ".join(sorted(texts)) or "none"
            raise DataError(f"no conversation: a json with {', '.join(COLUMNS)}, or a txt, is needed (parts: {found})")
        return _caption(source, _text(caption), images)
    if form.kind == VQA:
        context, answers = _field(form, texts, "context"), _field(form, texts, "answers")
        weights = _field(form, texts, "answer_weights") if "answer_weights" in form.fields else None
        answer = _best(answers, weights)
        if not isinstance(context, str) or not isinstance(answer, str):
            raise DataError("'context' must be a text and 'answers' a text or a list of texts")
        if images and IMAGE_PLACEHOLDER not in context:
            context = f"{IMAGE_PLACEHOLDER}\n" * num_images + context
        turns = [Turn(role="user", text=context), Turn(role="assistant", text=answer)]
        return make_record(source, 0, None, turns, images)
    text = _field(form, texts, "caption" if form.kind == CAPTION else "text")
    return _caption(source, text, images)


def _caption(source: RecordSource, text: Any, images: list[bytes]) -> Record:
    if not isinstance(text, str):
        raise DataError(f"the caption must be a text, this is {type(text).__name__}")
    marks = "".join(IMAGE_PLACEHOLDER for _ in images)
    turns = [Turn(role="user", text=marks), Turn(role="assistant", text=text.strip())]
    return make_record(source, 0, None, turns, images)


def _best(answers: Any, weights: Any) -> Any:
    if not isinstance(answers, list):
        return answers
    if not answers:
        raise DataError("'answers' is empty")
    if isinstance(weights, list) and len(weights) == len(answers) and all(isinstance(w, int | float) for w in weights):
        return answers[max(range(len(answers)), key=weights.__getitem__)]
    return answers[0]


def _json(content: bytes) -> Any:
    if len(content) > MAX_RECORD_BYTES:
        raise DataError(f"the json has {len(content)} bytes, the limit is {MAX_RECORD_BYTES}", reason=Reason.BAD_JSON)
    try:
        return strict_decoder().decode(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise DataError("bad json: nested too deeply", reason=Reason.BAD_JSON) from error
    except ValueError as error:
        raise DataError(f"bad json: {error}", reason=Reason.BAD_JSON) from error


def _text(content: bytes) -> str:
    if len(content) > MAX_RECORD_BYTES:
        raise DataError(f"the text has {len(content)} bytes, the limit is {MAX_RECORD_BYTES}", reason=Reason.BAD_JSON)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error.reason} at byte {error.start}", reason=Reason.BAD_JSON) from error


def _field(form: SampleForm, texts: Mapping[str, bytes], name: str) -> Any:
    """Follows Energon's field map: the first alternative that is there."""
    tried = []
    for option in form.fields[name].split(","):
        match = _ACCESS.match(option.strip())
        if match is None:
            raise DataError(f"field_map {name}: {option!r} is not PART[key][index]")
        part, keys = match[1].lower(), re.findall(r"\[([^\[\]]+)\]", match[2])
        if part not in texts:
            tried.append(f"no part {part}")
            continue
        value = _json(texts[part]) if f".{part}".endswith(".json") else _text(texts[part])
        try:
            for key in keys:
                value = value[int(key)] if isinstance(value, list) else value[key]
            return value
        except (KeyError, IndexError, ValueError, TypeError):
            tried.append(f"{part} has no {match[2]}")
    raise DataError(f"field {name}: {'; '.join(tried)}")


def samples_of_tar(
    path: Path, form: SampleForm, notes: Notes | None = None
) -> Iterator[tuple[int, TarSample | DataError]]:
    """Yields (number, sample or what is wrong with it) of a tar; images are found, not opened.

    ``notes`` takes note of members that belong to no sample.

    Raises:
        DataError: the tar is missing, or damaged as a whole.
    """
    if not os.path.isfile(path):
        message = "the tar is no regular file" if os.path.exists(path) else "the tar is missing"
        raise DataError(message, reason=Reason.DAMAGED_SHARD, shard=str(path))
    index = index_tar(path)
    names = index.names()
    members = [place for place, name in enumerate(names) if not stray(name)]
    if len(members) == len(names):
        firsts = index.groups.tolist()
    else:  # a run of members goes on over the strays between them
        keys = [split_name(names[place])[0] for place in members]
        firsts = [place for i, place in enumerate(members) if not i or keys[i] != keys[i - 1]]
        if notes is not None:
            notes.add(str(path), Reason.SKIPPED_MEMBERS, filter(None, map(stray, names)))
    bounds = itertools.pairwise([*firsts, len(names)])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, (first, last) in enumerate(bounds):
            found: TarSample | DataError
            try:
                found = _sample(form, data, index, names, number, first, last)
            except DataError as error:
                found = error.at(key=split_name(names[first])[0], shard=str(path))
            yield number, found


def _sample(
    form: SampleForm, data: mmap.mmap, index: TarIndex, names: Sequence[str], number: int, first: int, last: int
) -> TarSample:
    """Checks the members ``first`` to ``last`` as a sample."""
    members = [place for place in range(first, last) if not stray(names[place])]
    keys, parts = zip(*(split_name(names[place]) for place in members))
    if len(set(parts)) != len(parts):
        raise DataError(f"two members of one name: {', '.join(names[first:last][:10])}")
    start = int(index.starts[first])
    span = (int(index.starts[last]) if last < len(names) else index.end) - start
    if span > MAX_SPAN:
        raise DataError(f"the sample has {span} bytes, the limit is {MAX_SPAN}")
    places = [(int(index.offsets[at]) - start, int(index.sizes[at])) for at in members]
    images = tuple((names[members[i]], *places[i]) for i in images_of(form, parts))
    if len(images) > MAX_IMAGES:
        raise DataError(f"{len(images)} images, the limit is {MAX_IMAGES}")
    for name, _, size in images:
        if size > MAX_BYTES:
            message = f"image {name} has {size} bytes, the limit is {MAX_BYTES}"
            raise DataError(message, reason=Reason.UNREADABLE_IMAGE)
    block = data[start : start + span]
    texts = {part: block[at : at + size] for part, (at, size) in zip(parts, places) if is_text(part)}
    record = parse_parts(form, texts, len(images))
    return TarSample(number=number, key=keys[0], start=start, block=block, images=images, texts=texts, record=record)


def read_tars(source: RecordSource, notes: Notes | None = None) -> Iterator[tuple[int, Any, Record | DataError]]:
    """Yields (number, json, record or what is wrong with it) of the samples of an input, one tar after the other.

    The number counts over all tars, that of the record within its own; the json has webdataset's ``__key__`` as well. A tar
    that is damaged as a whole is one problem.

    Raises:
        DataError: as ``open_tars``.
    """
    form, tars = open_tars(source)
    number = 0
    for tar in tars:
        try:
            for _, found in samples_of_tar(tar, form, notes):
                if isinstance(found, DataError):
                    yield number, None, found
                else:
                    yield number, _value(found), _with_images(found, str(tar))
                number += 1
        except DataError as error:
            yield number, None, error.at(shard=str(tar))


def _with_images(sample: TarSample, tar: str) -> Record:
    images = tuple(sample.block[at : at + size] for _, at, size in sample.images)
    names = tuple(name for name, _, _ in sample.images)
    return replace(sample.record, number=sample.number, images=images, names=names, file=tar, key=sample.key)


def _value(sample: TarSample) -> dict[str, Any]:
    try:
        value = _json(sample.texts.get("json", b"{}"))
    except DataError:  # a json that the form does not look at
        value = None
    return {"__key__": sample.key, **(value if isinstance(value, dict) else {})}


def open_tars(source: RecordSource) -> tuple[SampleForm, list[Path]]:
    """Returns the form of the samples and the shards (absolute, links followed) of a tar, a folder of them, or an Energon folder.

    Raises:
        DataError: none, or metadata that cannot be used.
    """
    path = Path(source.path)
    if path.suffix.lower() in (".yaml", ".yml"):
        raise refuse_metadataset(path)
    if os.path.isdir(path / ".nv-meta"):
        kind, fields, found = read_energon(path, source.part)
        form = SampleForm(kind=kind, fields=fields, prepend=source.prepend)
        return form, [_real(tar) for tar in found]
    tars = tars_of(source).files
    if not tars:
        raise DataError("a folder without .tar files", shard=str(path))
    return SampleForm(prepend=source.prepend), [_real(tar) for tar in tars]


def _real(tar: Path) -> Path:
    """The file itself, links followed; of what is none, whoever opens it says so under the name that was given."""
    return Path(os.path.realpath(tar)) if os.path.isfile(tar) else tar


def tars_of(source: RecordSource) -> Choice:
    """Returns the tars of an input that is not Energon's, in order, and what to say of its splits."""
    path = Path(source.path)
    if os.path.isdir(path / ".nv-meta"):
        return Choice(files=())
    return choose_in(path, (".tar",), source.part) if os.path.isdir(path) else Choice(files=(path,))
