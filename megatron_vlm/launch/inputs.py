"""Raw data and its place in the cache of shards: a second start of the same input finds them there.

    json, jsonl, meta.json, data.txt, parquet, tars --open_inputs--> Sources --digest--> CACHE/<digest>/ (data build)
    folders of shards ---------------------------------------------------------------> as they are (data check, once)
                                                              CACHE/<digest>.images: size and time of every image

The cache is keyed by what is read; token counts of a processor lie beside the shards under the processor's fingerprint, so
that another ``seq_length`` or image size counts anew and builds nothing.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.data.file_kinds import is_meta
from megatron_vlm.data.formats import FORMATS, WEBDATASET, expand_inputs, open_sources
from megatron_vlm.data.formats.json_file import read_json, read_json_records
from megatron_vlm.data.formats.records import OWN_VIDEO, RECORDS_VERSION, RecordSource, VideoSettings
from megatron_vlm.data.formats.splits import HELD_OUT
from megatron_vlm.data.image_roots import names_of
from megatron_vlm.data.shards.writer import MANIFEST, MANIFEST_VERSION
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.files import expand_path, open_regular
from megatron_vlm.options.launch_config import LaunchConfig

SNIFFED = 100  # records that are looked at to tell a format
_PREPENDING = ("internvl", "xcomposer")
"""Formats whose own programs take a record with an image and no place for it, and show the image first."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a part of the data (train, valid) is made of.

    Attributes:
        name: of the part, in reports.
        folders: of shards, which exist already.
        sources: raw data, built into one more folder.
        shards: that folder; None without raw data.
        images: (path, size, time) of every image and video of the sources; -1 for one that cannot be read.
    """

    name: str
    folders: tuple[str, ...] = ()
    sources: tuple[RecordSource, ...] = ()
    shards: Path | None = None
    images: tuple[tuple[str, int, int], ...] = ()

    @property
    def paths(self) -> list[str]:
        """Folders that the run reads."""
        return [*self.folders, *([str(self.shards)] if self.shards else [])]

    @property
    def built(self) -> bool:
        """The shards are there, and no image has changed since they were built."""
        if self.shards is None or not os.path.isfile(self.shards / MANIFEST):
            return False
        return _listed(self.shards) == [list(image) for image in self.images]

    @property
    def bytes(self) -> int:
        """About what the shards take."""
        tables = sum(Path(source.path).stat().st_size for source in self.sources if os.path.isfile(source.path))
        return tables + sum(max(0, size) for _, size, _ in self.images)


def cache_folder(launch: LaunchConfig) -> Path:
    """Where built shards are kept."""
    return Path(launch.shard_cache or expand_path("~/.cache/megatron_vlm/shards"))


def open_inputs(
    name: str, inputs: Sequence[str], launch: LaunchConfig, record_format: str, own: VideoSettings = OWN_VIDEO
) -> Inputs:
    """Tells what each input is, and finds its place in the cache; ``own``: how the model takes frames of a video.

    Raises:
        ConfigError, DataError: an input that is not there or cannot be read, by name.
    """
    folders, sources = [], []
    part = HELD_OUT if name == "valid" else ""  # of a folder or glob that holds several splits
    for path in expand_inputs(inputs, part):
        if not os.path.exists(path):
            raise ConfigError(
                f"{path} does not exist: name a json, jsonl, data.txt or meta.json file, or a shard folder"
            )
        if os.path.isfile(Path(path) / MANIFEST):
            folders.append(path)
        else:
            sources += sources_of(path, launch, record_format, own, part if os.path.isdir(path) else "")
    if not sources:
        return Inputs(name=name, folders=tuple(folders))
    images = tuple(_states(dict.fromkeys(_files_of(sources))))
    shards = cache_folder(launch) / _digest(sources)
    return Inputs(name=name, folders=tuple(folders), sources=tuple(sources), shards=shards, images=images)


def sources_of(
    path: str, launch: LaunchConfig, record_format: str, own: VideoSettings = OWN_VIDEO, part: str = ""
) -> list[RecordSource]:
    """The sources of one raw input, with the folder that their images start from.

    Raises:
        ConfigError, DataError: as ``open_inputs``.
    """
    format = launch.data_format or tell_format(path, record_format)
    policy = launch.missing_placeholder or ("prepend" if format in _PREPENDING else "refuse")
    frames: dict[str, Any] = {
        "min_frames": launch.min_num_frame,
        "max_frames": launch.max_num_frame,
        "sampling": launch.video_sampling,
        "fps": launch.video_fps,
    }
    video = VideoSettings(**{key: value for key, value in frames.items() if value is not None}).filled(own)
    root = launch.image_root or ""
    found = open_sources(format, [path], root=root, prepend=policy == "prepend", video=video, part=part)
    made = []
    for source in found:
        if launch.given_num is False and source.per_epoch is not None:
            source = dataclasses.replace(source, repeat=source.per_epoch / 1000, per_epoch=None)
        if launch.image_root is None and source.format != WEBDATASET:
            source = dataclasses.replace(source, root=_root_of(source))
        made.append(source)
    return made


def tell_format(path: str, record_format: str) -> str:
    """The format of a file, by its name and first records.

    Raises:
        ConfigError: it is none of the formats.
        DataError: it cannot be read.
    """
    known = f"say which with --data_format (of `data`: --format) {' | '.join(sorted((*FORMATS, WEBDATASET)))}"
    suffix = Path(path).suffix.lower()
    by_suffix = {".txt": "xcomposer", ".parquet": "parquet", ".tar": WEBDATASET}
    if suffix in by_suffix:
        return by_suffix[suffix]
    if os.path.isdir(path) or suffix not in (".json", ".jsonl"):
        raise ConfigError(
            f"{path} is neither a shard folder ({MANIFEST}) nor a json, jsonl, txt, parquet or tar file; {known}"
        )
    if suffix == ".json" and _holds_meta(path):
        return "internvl"
    records = [record for _, record in itertools.islice(read_json_records(path), SNIFFED) if isinstance(record, dict)]
    if any("messages" in record for record in records):
        return "openai"
    text = json.dumps(records, ensure_ascii=False)
    if "<ImageHere>" in text:
        return "xcomposer"
    if any("conversations" in record for record in records):
        return "llava" if "<image>" in text else record_format
    raise ConfigError(f"{path}: records with neither 'conversations' nor 'messages'; {known}")


def _holds_meta(path: str) -> bool:
    """Whether a json file holds one object, and that is a meta.json."""
    with open_regular(path, DataError) as file:
        if not file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return False
    return is_meta(read_json(path))


def _root_of(source: RecordSource) -> str:
    """The folder that a source's images start from: beside the file, or where the command runs."""
    beside = str(Path(source.path).parent / source.root)
    for name in itertools.islice(names_of(source), SNIFFED):
        for root in (beside, source.root or "."):
            if os.path.exists(os.path.join(root, name)):
                return root
    return beside


def _files_of(sources: Sequence[RecordSource]) -> Iterator[str]:
    for source in sources:
        if source.format != WEBDATASET:
            yield from (os.path.join(source.root, name) for name in names_of(source))


def _states(paths: Sequence[str] | dict[str, None]) -> list[tuple[str, int, int]]:
    """Size and time of files, asked for by several threads: on a network disk each answer takes a while."""

    def state(path: str) -> tuple[str, int, int]:
        try:
            found = os.stat(path)
        except OSError:
            return path, -1, -1
        return path, found.st_size, found.st_mtime_ns

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(state, paths))


def _listed(shards: Path) -> list[Any] | None:
    try:
        return json.loads(shards.with_suffix(".images").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _digest(sources: Sequence[RecordSource]) -> str:
    """Of the files of records and how they are read."""
    digest = hashlib.sha256(f"{MANIFEST_VERSION} {RECORDS_VERSION}".encode())
    for source in sources:
        digest.update(json.dumps(dataclasses.asdict(source), sort_keys=True).encode())
        path = Path(source.path)
        if path.suffix.lower() in (".json", ".jsonl"):
            with open_regular(path, DataError) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            files = sorted(p for p in path.rglob("*") if os.path.isfile(p)) if os.path.isdir(path) else [path]
            digest.update(json.dumps(_states([str(file) for file in files])).encode())
    return digest.hexdigest()[:24]
