"""Building shard folders: deterministic, in several processes, and resumed after a kill.

    sources --records, in order--> jobs of one shard each --worker processes--> .OUT.partial/out/shard-000000.tar ...
                                                                            \\-> .OUT.partial/done/shard-000000.json
    all done --> manifest.json --> .OUT.partial/out renamed to OUT

What a shard holds depends on the records alone, so a shard that is done stays done: the same command, run again after a
kill, goes over the records and makes only what is missing. OUT is whole or absent. Webdataset's tars stay where they
are: a job makes the index of one, or with two halves an index in each.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Literal

from megatron_vlm.data.formats import WEBDATASET, read_source
from megatron_vlm.data.formats.records import Record, RecordSource
from megatron_vlm.data.formats.webdataset import open_tars
from megatron_vlm.data.image_roots import wrong_root
from megatron_vlm.data.images.video import check_settings
from megatron_vlm.data.problems import REJECTED, Notes, Problem, describe, rejected_line
from megatron_vlm.data.shards.split import Halves, SplitSettings, assign
from megatron_vlm.data.shards.staging import fingerprint_of, partial_folder
from megatron_vlm.data.shards.tar_shards import TarJob, index_shard
from megatron_vlm.data.shards.writer import MANIFEST, MANIFEST_VERSION, ShardWriter, load_record
from megatron_vlm.errors import ConfigError, DataError, Reason
from megatron_vlm.files import check_output, read_json, read_json_value, sync_path, write_synced, writing
from megatron_vlm.files import describe as describe_path
from megatron_vlm.log import get_logger

LOGGER = get_logger(__name__)
MAX_INLINE = 64 * 2**20  # bytes of images inside the records of one job
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard to make: ``records`` are (number of the source, record)."""

    folder: str
    name: str
    sources: Sequence[RecordSource]
    stems: Sequence[str]
    records: Sequence[tuple[int, Record]]


@dataclass(kw_only=True)
class _OutFolder:
    """What goes to one folder: OUT itself, or OUT/train and OUT/val."""

    name: str
    jobs: int = 0
    records: list[tuple[int, Record]] = field(default_factory=list)
    inline: int = 0
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)


# What makes a shard, of what, and for which folders under which name.
_Task = tuple[Callable[[Any], Any], Any, tuple[Sequence[_OutFolder], str]]


def build_shards(
    sources: Sequence[RecordSource],
    out: str | Path,
    *,
    samples_per_shard: int = 1000,
    on_bad_sample: Literal["raise", "skip"] = "raise",
    max_bad_fraction: float = 1.0,
    split: SplitSettings | None = None,
    num_workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Writes records and the original bytes of their images as shards.

    Args:
        sources: in order. A sample's key is the source's stem and the record's number.
        out: the folder to make; must not exist, or be empty. A build that was killed is taken up.
        samples_per_shard: records in every shard but the last of a folder.
        on_bad_sample: ``raise`` reports every record that cannot be used and makes nothing; ``skip`` leaves them out
            and lists them in ``OUT/rejected.jsonl``.
        max_bad_fraction: largest share of records that ``skip`` may leave out; above it nothing is made.
        split: write ``OUT/train`` and ``OUT/val`` instead, and a report to ``OUT/split.json``.
        num_workers: processes; 0: this one. Never changes what is written.
        progress: called with the number of records gone over so far.

    Returns:
        The manifest; with ``split`` the report, which holds both.

    Raises:
        ConfigError: ``out`` holds something or cannot be written, or a setting cannot work.
        DataError: records that cannot be used, with source and record number; ``OUT.rejected.jsonl`` lists all of them.
    """
    out = Path(out)
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    check_output(out, [source.path for source in sources], "--out")
    for source in sources:
        check_settings(source.video)
    settings: dict[str, Any] = {"samples_per_shard": samples_per_shard, "on_bad_sample": on_bad_sample}
    settings["split"] = dataclasses.asdict(split) if split else None
    with writing(out), partial_folder(out, fingerprint_of(sources, settings)) as folder:
        if folder is None:  # killed between its last step and the removal of its traces
            return read_json(out / ("split.json" if split else MANIFEST), DataError)
        build = _Build(sources, folder, samples_per_shard, num_workers, progress)
        targets = build.run(split)
        return build.finish(targets, out, split, on_bad_sample, max_bad_fraction)


class _Build:
    def __init__(
        self,
        sources: Sequence[RecordSource],
        folder: Path,
        samples_per_shard: int,
        num_workers: int,
        progress: Callable[[int], None] | None,
    ):
        self.sources, self.folder, self.size, self.workers = sources, folder, samples_per_shard, num_workers
        self.progress = progress or (lambda _: None)
        self.stems = unique_stems([source.title for source in sources])
        self.problems: list[Problem] = []
        self.total = 0
        self.fatal = False
        self.notes = Notes()
        self.pending: dict[Future[Any], tuple[Sequence[_OutFolder], str]] = {}
        self.pool: ProcessPoolExecutor | None = None
        self.held: list[_Task] = []  # the first shard, until there is a second
        self.report: dict[str, Any] = {}
        self.forms: list[dict[str, Any]] = []

    def run(self, split: SplitSettings | None) -> list[_OutFolder]:
        """Goes over all records and makes the shards that are missing."""
        targets, chosen = [_OutFolder(name="")], None
        if split is not None:
            targets = [_OutFolder(name="train"), _OutFolder(name="val")]
            chosen, self.report = assign(self.sources, split)
        for target in targets:
            (self.folder / "out" / target.name).mkdir(parents=True, exist_ok=True)
        try:
            if any(source.format == WEBDATASET for source in self.sources):
                self._index_tars(targets, chosen)
            else:
                self._read(targets, chosen)
            for work, item, where in self.held:
                self._done(*where, work(item))
            while self.pending:
                self._collect()
        except BrokenProcessPool as error:
            raise DataError("a process of the build was ended, for want of memory perhaps: lower --workers") from error
        finally:
            if self.pool is not None:
                self.pool.shutdown(cancel_futures=True)
        self.progress(self.total)
        return targets

    def _read(self, targets: Sequence[_OutFolder], chosen: Halves | None) -> None:
        """Goes over all records; every so many of a folder are a job."""
        for number, source in enumerate(self.sources):
            try:
                for record, _, found in read_source(source):
                    self.total += 1
                    if isinstance(found, DataError):
                        self._problem(number, record, found)
                    else:
                        self.notes.add(source.title, Reason.UNKNOWN_KEYS, found.unknown)
                        self._add(targets[0 if chosen is None else chosen[number, ""][record]], number, found)
                    if not self.total % 100:
                        self.progress(self.total)
            except DataError as error:
                self.fatal = True
                where = f"{error.key}: " if error.key else ""
                self._problem(number, -1, error, where)
        for target in targets:
            self._flush(target)

    def _index_tars(self, targets: Sequence[_OutFolder], chosen: Halves | None) -> None:
        """Indexes tars where they lie; every one is a job."""
        jobs = itertools.count()
        for number, source in enumerate(self.sources):
            form, tars = open_tars(source)
            self.forms.append(dataclasses.asdict(form))
            for tar in tars:
                job = TarJob(
                    folders=[str(self.folder / "out" / target.name) for target in targets],
                    name=f"shard-{next(jobs):06d}",
                    tar=str(tar),
                    form=form,
                    form_number=number,
                    source=number,
                    halves=None if chosen is None else chosen.get((number, str(tar)), {}),
                )
                self._submit(targets, job.name, index_shard, job)
                self.progress(self.total)

    def _problem(self, source: int, record: int, error: DataError, where: str = "") -> None:
        file = error.shard or self.sources[source].path
        self.problems.append(
            Problem(source=source, record=record, file=file, message=where + error.message, reason=error.reason.number)
        )

    def _add(self, target: _OutFolder, source: int, record: Record) -> None:
        target.records.append((source, record))
        target.inline += sum(len(image) for image in record.images if isinstance(image, bytes))
        if len(target.records) == self.size or target.inline > MAX_INLINE:
            self._flush(target)

    def _flush(self, target: _OutFolder) -> None:
        if not target.records:
            return
        name, target.jobs = f"shard-{target.jobs:06d}", target.jobs + 1
        folder = str(self.folder / "out" / target.name)
        job = Job(folder=folder, name=name, sources=self.sources, stems=self.stems, records=tuple(target.records))
        target.records, target.inline = [], 0
        self._submit([target], name, make_shard, job)

    def _submit(self, targets: Sequence[_OutFolder], name: str, make: Callable[[Any], Any], job: Any) -> None:
        """Makes a shard of each folder, unless that is done: in a worker process if there are any, and more shards than one.

        A process takes as long to start as some hundred samples take.
        """
        done = self._done_file(targets, name)
        if os.path.exists(done):
            self._take(targets, name, read_json_value(done, DataError))
        elif not self.workers:
            self._done(targets, name, make(job))
        else:
            self.held.append((make, job, (targets, name)))
            if self.pool is None and len(self.held) == 1:
                return
            if self.pool is None:
                context = multiprocessing.get_context("spawn")
                self.pool = ProcessPoolExecutor(self.workers, context, initializer=_end_with_parent)
            for work, item, where in self.held:
                self.pending[self.pool.submit(work, item)] = where
            self.held.clear()
            if len(self.pending) > self.workers:  # records wait in memory: not too many
                self._collect()

    def _collect(self) -> None:
        for future in wait(self.pending, return_when=FIRST_COMPLETED).done:
            self._done(*self.pending.pop(future), future.result())

    def _done_file(self, targets: Sequence[_OutFolder], name: str) -> Path:
        return self.folder / "done" / f"{'-'.join(target.name for target in targets)}{name}.json"

    def _done(self, targets: Sequence[_OutFolder], name: str, results: list[dict[str, Any]]) -> None:
        write_synced(self._done_file(targets, name), json.dumps(results).encode())
        self._take(targets, name, results)

    def _take(self, targets: Sequence[_OutFolder], name: str, results: list[dict[str, Any]]) -> None:
        for target, result in zip(targets, results, strict=True):
            self.problems += [Problem(**problem) for problem in result["rejected"]]
            for source, reason, what, number in result.get("notes", []):
                self.notes.add(self.sources[source].title, Reason.numbered(reason), [what], number)
            target.shards[name] = result
            if self.forms:
                self.total += result["shard"]["samples"] + len(result["rejected"])

    def finish(
        self,
        targets: list[_OutFolder],
        out: Path,
        split: SplitSettings | None,
        on_bad_sample: str,
        max_bad_fraction: float,
    ) -> dict[str, Any]:
        """Writes the manifests and puts the folder in place; raises if the policy says so."""
        for line in self.notes.lines():
            LOGGER.warning("%s", line)
        self.problems.sort(key=lambda p: (p.source, p.file, p.record < 0, p.record))
        names = ", ".join(dict.fromkeys(describe_path(source.path) for source in self.sources)) or "the inputs"
        listed = out.with_name(f"{out.name}.{REJECTED}")
        listed.unlink(missing_ok=True)
        allowed = None if on_bad_sample == "raise" else max_bad_fraction
        if self.problems and (self.fatal or len(self.problems) > (allowed or 0) * self.total):
            write_synced(listed, self._rejected())
            text = describe(self.problems, self.total, self.fatal, allowed=allowed, hint=wrong_root(self.sources))
            raise DataError(f"{text}; all are listed in {listed}")
        folder = self.folder / "out"
        for target in targets:
            manifest = make_manifest(target.shards, self.sources)
            if self.forms:
                manifest["layouts"] = self.forms
            if not manifest["samples"]:
                left = f" ({len(self.problems)} are rejected)" if self.problems else ""
                raise DataError(f"no records in {names}{left}{f' for {target.name}' if target.name else ''}")
            if target.name == "val":  # an evaluation reads each sample once
                for entry in manifest["sources"]:
                    entry["repeat"] = entry["per_epoch"] = None
            write_synced(folder / target.name / MANIFEST, json.dumps(manifest, indent=1).encode())
            self.report[target.name or "manifest"] = manifest
        if self.problems:
            write_synced(folder / REJECTED, self._rejected())
        if split is not None:  # what was drawn, less what is rejected
            numbers = {target.name: self.report[target.name]["samples"] for target in targets}
            self.report["records"] = numbers
            self.report["realised_fraction"] = round(numbers["val"] / sum(numbers.values()), 6)
            write_synced(folder / "split.json", json.dumps(self.report, indent=1).encode())
        sync_path(folder)
        if os.path.exists(out):
            out.rmdir()
        os.rename(folder, out)
        sync_path(out.parent)
        return self.report if split is not None else self.report["manifest"]

    def _rejected(self) -> bytes:
        return "".join(f"{rejected_line(p)}\n" for p in self.problems).encode()


def make_shard(job: Job) -> list[dict[str, Any]]:
    """Makes one shard and returns, as a list of one, its line of the manifest, its samples by source, and what is rejected."""
    final = Path(job.folder, f"{job.name}.tar")
    writer = ShardWriter(final)
    rejected, by_source = [], Counter[int]()
    for number, record in job.records:
        source = job.sources[number]
        try:
            turns, images = load_record(source, record)
            text = {"id": record.label, "source": source.title, "record": record.number}
            if record.options:
                text["options"] = dict(record.options)
            writer.add(f"{job.stems[number]}-{record.number:09d}", text, turns, images)
            by_source[number] += 1
        except DataError as error:
            where = {"source": number, "record": record.number, "file": source.path}
            rejected.append(where | {"message": error.message, "reason": error.reason.number})
    line = writer.close()
    sync_path(final.parent)
    return [{"shard": line, "by_source": sorted(by_source.items()), "rejected": rejected}]


def make_manifest(shards: Mapping[str, Mapping[str, Any]], sources: Sequence[RecordSource]) -> dict[str, Any]:
    """Returns the manifest of shards (results of ``make_shard`` by name); a shard without samples is left out."""
    lines = [shards[name]["shard"] for name in sorted(shards) if shards[name]["shard"]["samples"]]
    counts = Counter[int]()
    for result in shards.values():
        for number, samples in result["by_source"]:
            counts[number] += samples
    entries, first = [], 0
    for number, source in enumerate(sources):
        if counts[number]:
            entries.append(
                {
                    "name": source.title,
                    "first_sample": first,
                    "samples": counts[number],
                    "repeat": source.repeat,
                    "per_epoch": source.per_epoch,
                }
            )
            first += counts[number]
    return {
        "version": MANIFEST_VERSION,
        "samples": first,
        "images": sum(line["images"] for line in lines),
        "sources": entries,
        "shards": lines,
    }


def unique_stems(titles: Sequence[str]) -> list[str]:
    """Returns a short name for each source that tar members can start with, all different."""
    stems: list[str] = []
    for title in titles:
        stem = _UNSAFE.sub("-", Path(title).stem)[:60] or "source"
        taken = set(stems)
        stems.append(next(s for s in (stem, *(f"{stem}-{i}" for i in range(1, len(stems) + 2))) if s not in taken))
    return stems


def _end_with_parent() -> None:
    """Ends a worker when its parent is gone: a killed build leaves no process behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
