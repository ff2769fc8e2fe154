"""What a run writes: where it can, and how much room it takes."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.files import trial_write
from megatron_vlm.launch.checks import Report
from megatron_vlm.launch.exports import HF, MERGED
from megatron_vlm.launch.inputs import Inputs, cache_folder
from megatron_vlm.options.request import Request
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.training.memory.stages import StageMemory
from megatron_vlm.training.run_config import RunConfig

_SLACK_BYTES = 64 << 20  # logs, configs, tokenizer files


def check_outputs(report: Report, folders: Mapping[str, Path]) -> None:
    """Tries to write where the run will: setting -> folder."""
    failures = len(report.failed)
    settings: dict[Path, list[str]] = {}
    for setting, folder in folders.items():
        settings.setdefault(folder, []).append(setting)
    for folder, names in settings.items():  # one folder, one line
        try:
            trial_write(folder, ", ".join(names))
        except ConfigError as error:
            report.fail(
                "output", str(error), "name a folder that can be written: --output_dir, --shard_cache, --logging_dir"
            )
    if len(report.failed) == failures:
        report.ok("output", ", ".join(dict.fromkeys(str(folder) for folder in folders.values())))


def check_disk(report: Report, needs: Mapping[Path, Mapping[str, int]]) -> None:
    """Checks free space: folder -> what goes there -> bytes. Folders on one file system share it."""
    by_device: dict[int, dict[str, Any]] = {}
    for folder, parts in needs.items():
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        group = by_device.setdefault(os.stat(there).st_dev, {"folder": there, "parts": {}})
        for name, size in parts.items():
            group["parts"][name] = group["parts"].get(name, 0) + size
    for group in by_device.values():
        free, parts = shutil.disk_usage(group["folder"]).free, group["parts"]
        need = sum(parts.values()) + _SLACK_BYTES
        words = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
        text = f"{group['folder']}: {need / 1e9:.2f} GB needed ({words}), {free / 1e9:.2f} GB free"
        if free >= need:
            report.ok("disk", text)
        else:
            advice = (
                "make room, choose another --output_dir, or keep fewer checkpoints (--save_total_limit, --save_steps)"
            )
            report.fail("disk", text, advice)


def disk_needs(
    request: Request,
    config: RunConfig,
    source: WeightSource,
    stages: Sequence[StageMemory],
    train: Inputs,
    valid: Inputs,
    adapts: bool,
) -> dict[Path, dict[str, int]]:
    """Folder -> what will lie there at once -> bytes."""
    width = 4 if config.training.precision == "fp32" else 2
    numbers = sum(math.prod(info.shape) for info in source.infos.values())
    trained = sum(sum(stage.trainable.values()) for stage in stages) * config.parallel.tensor_model_parallel_size
    states = 0 if config.checkpoint.no_save_optim else (8 if width == 4 else 12)
    one = trained * (4 + 8) if adapts else numbers * width + trained * states
    kept = num_checkpoints(config)
    output = {f"{kept} checkpoint{'s' if kept > 1 else ''}": one * kept}
    if adapts:
        output["adapter"] = trained * 4
    if not adapts or request.launch.save_merged_model:
        output[MERGED if adapts else HF] = numbers * width
    needs = {config.output_dir: output}
    missing = sum(inputs.bytes for inputs in (train, valid) if inputs.sources and not inputs.built)
    if missing:
        needs[cache_folder(request.launch)] = {"shards": missing}
    return needs


def num_checkpoints(config: RunConfig) -> int:
    """Most checkpoints that lie there at once: the new one is written before an old one goes."""
    checkpoint, training = config.checkpoint, config.training
    number = 1
    if checkpoint.save_interval and training.train_iters:
        number = math.ceil(training.train_iters / checkpoint.save_interval)
    elif checkpoint.save_epochs and training.train_epochs:
        number = math.ceil(training.train_epochs / checkpoint.save_epochs)
    elif checkpoint.save_interval:
        number = 2  # its length in steps shows once the data is counted
    return min(number, checkpoint.keep_last + 1) if checkpoint.keep_last else number
