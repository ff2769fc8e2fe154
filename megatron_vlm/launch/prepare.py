"""Raw data in, shards out, once: a second start of the same input finds them.

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
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.formats import FORMATS, WEBDATASET, expand_inputs, open_sources
from megatron_vlm.data.formats.image_roots import names_of, wrong_root
from megatron_vlm.data.formats.json_file import read_json, read_json_records
from megatron_vlm.data.formats.records import RECORDS_VERSION, RecordSource, VideoSettings
from megatron_vlm.data.formats.splits import HELD_OUT
from megatron_vlm.data.problems import REJECTED, Problem, describe
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.data.shards.writer import MANIFEST, MANIFEST_VERSION
from megatron_vlm.data.stream.counts import check_share, survey
from megatron_vlm.data.stream.loader import open_data
from megatron_vlm.data.types import Processor
from megatron_vlm.data.view.check import check_folder, check_sources
from megatron_vlm.errors import ConfigError, DataError, Reason
from megatron_vlm.files import expand_path, open_regular, read_bytes, write_synced, writing
from megatron_vlm.launch.checks import Report
from megatron_vlm.options.launch_config import LaunchConfig
from megatron_vlm.progress import Bar

_SNIFFED = 100  # records that are looked at to tell a format
_SHOWN = 3  # records left out that a line names
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


def open_inputs(name: str, inputs: Sequence[str], launch: LaunchConfig, record_format: str) -> Inputs:
    """Tells what each input is, and finds its place in the cache.

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
            sources += _sources_of(path, launch, record_format, part if os.path.isdir(path) else "")
    if not sources:
        return Inputs(name=name, folders=tuple(folders))
    images = tuple(_states(dict.fromkeys(_files_of(sources))))
    shards = cache_folder(launch) / _digest(sources)
    return Inputs(name=name, folders=tuple(folders), sources=tuple(sources), shards=shards, images=images)


def _sources_of(path: str, launch: LaunchConfig, record_format: str, part: str) -> list[RecordSource]:
    """The sources of one raw input, with the folder that their images start from."""
    format = launch.data_format or tell_format(path, record_format)
    policy = launch.missing_placeholder or ("prepend" if format in _PREPENDING else "refuse")
    frames: dict[str, Any] = {"min_frames": launch.min_num_frame, "max_frames": launch.max_num_frame}
    video = VideoSettings(**{key: value for key, value in frames.items() if value is not None})
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
    known = f"say which with --data_format {' | '.join(sorted((*FORMATS, WEBDATASET)))}"
    suffix = Path(path).suffix.lower()
    by_suffix = {".txt": "xcomposer", ".parquet": "parquet", ".tar": WEBDATASET}
    if suffix in by_suffix:
        return by_suffix[suffix]
    if os.path.isdir(path) or suffix not in (".json", ".jsonl"):
        raise ConfigError(
            f"{path} is neither a shard folder ({MANIFEST}) nor a json, jsonl, txt, parquet or tar file; {known}"
        )
    if suffix == ".json" and _is_object(path):
        return "internvl"
    records = [record for _, record in itertools.islice(read_json_records(path), _SNIFFED) if isinstance(record, dict)]
    if any("messages" in record for record in records):
        return "openai"
    text = json.dumps(records, ensure_ascii=False)
    if "<ImageHere>" in text:
        return "xcomposer"
    if any("conversations" in record for record in records):
        return "llava" if "<image>" in text else record_format
    raise ConfigError(f"{path}: records with neither 'conversations' nor 'messages'; {known}")


def _is_object(path: str) -> bool:
    """Whether a json file holds one object, as a meta.json does: its data sets are objects with an annotation."""
    with open_regular(path, DataError) as file:
        if not file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return False
    value = read_json(path)
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and "annotation" in entry for entry in value.values()
    )


def _root_of(source: RecordSource) -> str:
    """The folder that a source's images start from: beside the file, or where the command runs."""
    beside = str(Path(source.path).parent / source.root)
    for name in itertools.islice(names_of(source), _SNIFFED):
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


# ---- checking and building ----


def check_data(report: Report, inputs: Inputs, config: DataConfig, processor: Processor, cache: Path) -> None:
    """Reads every record, unless that was done before; builds nothing."""
    if inputs.sources and not inputs.built:
        with Bar(f"reading {inputs.name}", None) as bar:
            _tell(report, inputs, config, _counted(check_sources(inputs.sources, processor), bar))
    elif inputs.sources:
        report.ok("data", f"{inputs.name}: shards of an earlier start, {inputs.shards}")
    _check_folders(report, inputs, config, processor, cache)
    if not report.failed and (inputs.built or not inputs.sources):
        _survey(report, inputs, config, processor)


def build_data(report: Report, inputs: Inputs, config: DataConfig, processor: Processor, cache: Path) -> None:
    """Builds the shards that are missing; each record is read and checked on the way."""
    if inputs.shards is not None:
        start = time.monotonic()
        try:
            # What an earlier start was allowed to leave out, this one may have to tell of, record by record.
            if inputs.built and not (config.on_bad_sample == "raise" and _rejected(inputs)):
                report.ok("data", f"{inputs.name}: shards of an earlier start, {inputs.shards}")
            else:
                _build(inputs, config)
                seconds = time.monotonic() - start
                report.ok("data", f"{inputs.name}: shards built in {seconds:.1f} s, {inputs.shards}")
        except (DataError, ConfigError) as error:
            report.fail("data", f"{inputs.name}: {error}", "correct the records; no process of the run was started")
            return
        _tell_rejected(report, inputs, config)
    _check_folders(report, inputs, config, processor, cache)
    if not report.failed:
        _survey(report, inputs, config, processor)


def _build(inputs: Inputs, config: DataConfig) -> None:
    assert inputs.shards is not None
    listing = inputs.shards.with_suffix(".images")
    inputs.shards.parent.mkdir(parents=True, exist_ok=True)
    listing.unlink(missing_ok=True)
    if os.path.exists(inputs.shards):
        shutil.rmtree(inputs.shards)  # an image has changed
    with Bar(f"building {inputs.name}", None) as bar:
        build_shards(
            inputs.sources,
            inputs.shards,
            on_bad_sample=config.on_bad_sample,
            max_bad_fraction=config.max_bad_fraction,
            num_workers=min(os.cpu_count() or 1, 8) if len(inputs.images) > _SNIFFED * 10 else 0,
            progress=lambda records: bar.show(records),
        )
    with writing(listing):
        write_synced(listing, json.dumps(inputs.images).encode())


def _check_folders(report: Report, inputs: Inputs, config: DataConfig, processor: Processor, cache: Path) -> None:
    """`data check` of folders that exist already; what it found is kept, so that a folder is read once."""
    for folder in inputs.folders:
        manifest = read_bytes(Path(folder, MANIFEST), DataError)
        mark = cache / "checked" / hashlib.sha256(manifest + processor.fingerprint.encode()).hexdigest()[:24]
        if os.path.isfile(mark):
            continue
        before = len(report.failed)
        with Bar(f"checking {folder}", None) as bar:
            _tell(
                report, dataclasses.replace(inputs, name=folder), config, _counted(check_folder(folder, processor), bar)
            )
        if len(report.failed) == before:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _counted(found: Iterator[str | DataError], bar: Bar) -> Iterator[str | DataError]:
    for number, item in enumerate(found, 1):
        if number % 20 == 0:
            bar.show(number)
        yield item


def _tell(report: Report, inputs: Inputs, config: DataConfig, found: Iterator[str | DataError]) -> None:
    """Sorts what a check yields into sound, excluded by a policy, and wrong."""
    sound, refused, excluded, problems = 0, 0, Counter[str](), []
    for item in found:
        if isinstance(item, str):
            sound += 1
        elif item.reason.is_warning:
            excluded[f"warning: {item.reason.words}"] += 1
        elif _policy_excludes(item, config):
            excluded[item.reason.text] += 1
            refused += not item.reason.asked_for
        else:
            problems.append(
                Problem(source=0, record=-1, file=_place(item), message=item.message, reason=item.reason.number)
            )
    words = "".join(f", {number} {reason}" for reason, number in excluded.most_common())
    total = sound + len(problems) + refused
    allowed = None if config.on_bad_sample == "raise" else config.max_bad_fraction
    if problems and len(problems) + refused > (allowed or 0) * total:
        text = describe(problems, total, fatal=False, allowed=allowed, hint=wrong_root(inputs.sources))
        report.fail("data", f"{inputs.name}: {text}", "correct them; no process of the run was started")
    elif not sound:
        report.fail("data", f"{inputs.name}: no record can be used{words}", "see `megatron-vlm data check`")
    elif refused > config.max_bad_fraction * total:
        share = f"{refused} of {total} records cannot be used, and data.max_bad_fraction is {config.max_bad_fraction:g}"
        report.fail("data", f"{inputs.name}: {share}{words}", "see `megatron-vlm data check` for each record")
    else:
        report.ok("data", f"{inputs.name}: {sound} sound records{words}")
        if problems:
            text = _few([str(problem) for problem in problems], total)
            report.warn("data", f"{inputs.name}: {text}", "`megatron-vlm data check` lists all of them")


def _rejected(inputs: Inputs) -> list[dict[str, Any]]:
    """Records that the build left out."""
    assert inputs.shards is not None
    path = inputs.shards / REJECTED
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if os.path.isfile(path) else []


def _tell_rejected(report: Report, inputs: Inputs, config: DataConfig) -> None:
    """Tells, at every start, what the shards lack; fails where that is more than the run allows."""
    left = _rejected(inputs)
    if not left:
        return
    assert inputs.shards is not None
    total = len(left) + read_json(str(inputs.shards / MANIFEST))["samples"]
    lines = [f"{line['file']}, record {line['record']}: {line['reason']}" for line in left]
    text = f"{inputs.name}: {_few(lines, total)}; all are listed in {inputs.shards / REJECTED}"
    if len(left) > config.max_bad_fraction * total:
        share = f"{len(left) / total:.1%}, and data.max_bad_fraction allows {config.max_bad_fraction:.1%}"
        report.fail("data", text, f"that is {share}: correct them, or raise it")
    else:
        report.warn("data", text, "the run goes on without them; correct them to have them")


def _few(lines: Sequence[str], total: int) -> str:
    more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return f"{len(lines)} of {total} records cannot be used and are left out: {'; '.join(lines[:_SHOWN])}{more}"


def _place(error: DataError) -> str:
    return ", ".join(str(part) for part in (error.shard, error.key) if part)


def _policy_excludes(error: DataError, config: DataConfig) -> bool:
    """Whether a run leaves a sample out, rather than stop over it."""
    raised = error.reason is Reason.TOO_LONG and config.on_too_long == "raise"
    return error.reason.of_the_processor and not raised


def _survey(report: Report, inputs: Inputs, config: DataConfig, processor: Processor) -> None:
    """What the run will make of it: counts of tokens, and what is left out and why."""
    try:
        opened = open_data(config, processor, inputs.paths, seed=None)
        try:
            found = survey(opened.counts, config, None)
            check_share(found, config)
        finally:
            opened.dataset.close()
    except DataError as error:
        report.fail("data", f"{inputs.name}: {error}", "see `megatron-vlm data check` for each record")
        return
    left = "".join(f", {number} left out: {reason}" for reason, number in found["excluded"].items())
    used = found["samples"] - sum(found["excluded"].values())
    shortened = f", {found['truncated']} shortened" if found["truncated"] else ""
    text = f"{used} samples, {found['tokens']:,} tokens, {found['supervised_tokens']:,} supervised{shortened}{left}"
    report.ok("data", f"{inputs.name}: {text}")
