"""Raw data checked and built into shards, each start telling what they hold and what they lack."""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.image_roots import wrong_root
from megatron_vlm.data.problems import REJECTED, Problem, describe
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.data.shards.writer import MANIFEST
from megatron_vlm.data.stream.counts import check_share, survey
from megatron_vlm.data.stream.loader import open_data
from megatron_vlm.data.types import Processor
from megatron_vlm.data.view.check import check_folder, check_sources
from megatron_vlm.errors import ConfigError, DataError, Reason
from megatron_vlm.files import read_bytes, read_json, write_synced, writing
from megatron_vlm.launch.checks import Report
from megatron_vlm.launch.inputs import SNIFFED, Inputs
from megatron_vlm.line_files import json_lines
from megatron_vlm.progress import Bar

_SHOWN = 3  # records left out that a line names


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
                build(inputs, config)
                seconds = time.monotonic() - start
                report.ok("data", f"{inputs.name}: shards built in {seconds:.1f} s, {inputs.shards}")
        except (DataError, ConfigError) as error:
            report.fail("data", f"{inputs.name}: {error}", "correct the records; no process of the run was started")
            return
        _tell_rejected(report, inputs, config)
    _check_folders(report, inputs, config, processor, cache)
    if not report.failed:
        _survey(report, inputs, config, processor)


def build(inputs: Inputs, config: DataConfig) -> None:
    """Builds the shards of raw data in the cache; ``config`` says what is done to records that cannot be used.

    Raises:
        DataError: records that cannot be used, more than may be left out.
    """
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
            num_workers=min(os.cpu_count() or 1, 8) if len(inputs.images) > SNIFFED * 10 else 0,
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
    return json_lines(inputs.shards / REJECTED)


def _tell_rejected(report: Report, inputs: Inputs, config: DataConfig) -> None:
    """Tells, at every start, what the shards lack; fails where that is more than the run allows."""
    left = _rejected(inputs)
    if not left:
        return
    assert inputs.shards is not None
    total = len(left) + read_json(inputs.shards / MANIFEST)["samples"]
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
