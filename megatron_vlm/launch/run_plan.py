"""From what was asked to a run that can start: every check in order, the layout by memory, the numbers in words.

Request --packages, model--> config.json, family --complete--> sections of RunConfig
        --processor, devices, inputs--> RunConfig --lay_out--> RunPlan --disk, port--> text
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.data.stream.glance import glance
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError, ConversionError, DataError, MegatronVLMError
from megatron_vlm.files import check_output
from megatron_vlm.launch import checks
from megatron_vlm.launch.checks import Report
from megatron_vlm.launch.devices import Devices, check_devices
from megatron_vlm.launch.disk import check_disk, check_outputs, disk_needs
from megatron_vlm.launch.exports import ADAPTER, HF, LOSS, MERGED, adapter_command
from megatron_vlm.launch.inputs import Inputs, cache_folder, open_inputs
from megatron_vlm.launch.layout import NothingFits, as_flags, lay_out
from megatron_vlm.launch.parts import assemble
from megatron_vlm.launch.processes import JobRank, command
from megatron_vlm.options.launch_config import LaunchConfig
from megatron_vlm.options.request import Request
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.grid import replica_size, replicas
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.metrics.trackers import TRACKERS
from megatron_vlm.training.optimizer.config import Schedule
from megatron_vlm.training.run_config import RunConfig, folders_of, scale_rope
from megatron_vlm.weights.checkpoint_dir import holds_checkpoints

CONFIG = "config.yaml"
"""The resolved config in the output folder: what the processes of the run read, and what its Metrics write again."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run that passed its checks.

    Attributes:
        config: the run.
        adapts: adapters train, the base does not.
        names_base: the base is an HF directory, which an adapter for PEFT can name; without one no adapter is written.
        world: ranks of the run.
        here: ranks on this machine.
        devices, port: of this machine; port 0 where it is not ours to choose.
        train, valid: the data.
        processor: of the model.
        lines: the plan in words.
    """

    config: RunConfig
    adapts: bool
    names_base: bool
    world: int
    here: int
    devices: Devices
    port: int
    train: Inputs
    valid: Inputs
    processor: Processor
    lines: tuple[str, ...]


def plan_run(request: Request, job: JobRank, report: Report) -> RunPlan | None:
    """Runs the checks that need no pass over the data; None where one of them failed."""
    launch, run = request.launch, request.run
    load = _start_from(request, report)
    checks.check_packages(report, *_packages(run, request.adapts))
    if load is None:
        return None
    source = checks.check_model(report, load, (run.get("model") or {}).get("family"))
    if source is None:
        return None
    with source:
        training = run.get("training") or {}
        devices = check_devices(
            report,
            device=training.get("device"),
            precision=training.get("precision") or "fp32",
            visible=launch.cuda_visible_devices,
            ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            if not job.alone
            else launch.num_processes or _model_ranks(run),
            single=launch.single_process,
            memory_gib=launch.memory_gib,
        )
        if devices is None:
            return None
        world = job.world or devices.ranks
        try:
            keep = launch.strict_sharding or request.sharding.named
            return _plan(request, job, report, source, devices, world, load, keep)
        except MegatronVLMError as error:
            label = {DataError: "data", ConversionError: "model"}.get(type(error), "settings")
            report.fail(label, str(error), "")
            return None


def _plan(
    request: Request,
    job: JobRank,
    report: Report,
    source: WeightSource,
    devices: Devices,
    world: int,
    load: str,
    keep_sharding: bool,
) -> RunPlan | None:
    launch, spec = request.launch, source.spec
    how = (launch, spec.record_format, spec.video(source.hf_dir))
    train = open_inputs("train", launch.train_inputs or _folders(request.run, "train"), *how)
    valid = open_inputs("valid", launch.valid_inputs or _folders(request.run, "valid"), *how)
    adapts = request.adapts

    def config_for(dp: int) -> tuple[RunConfig, tuple[str, ...]]:
        completed = request.complete(source.hf_config, spec, dp, keep_sharding)
        sections = completed.run
        sections.setdefault("checkpoint", {})["load"] = load
        data = sections.setdefault("data", {})
        if launch.train_inputs:
            data["train"] = train.paths
        if launch.valid_inputs:
            data["valid"] = valid.paths
        if launch.export_each_epoch and not sections["checkpoint"].get("save_epochs"):
            if sections["checkpoint"].get("save_interval"):
                raise ConfigError("launch.export_each_epoch needs checkpoints at epochs: leave save_interval out")
            sections["checkpoint"]["save_epochs"] = 1.0
        config = RunConfig.from_dict(sections)
        return config, (*completed.notes, *config.default_notes(sections))

    config, notes = _first_config(config_for, replicas(request.run.get("parallel") or {}, world))
    config.check_outputs(source.folders())
    scale_rope(config, source)
    check_output(cache_folder(launch), source.folders(), "launch.shard_cache", around=True)
    for note in notes:
        report.note(note)
    processor = checks.check_processor(report, source, config.data)
    try:
        fixed = bool(launch.per_device_train_batch_size or launch.batch_size)
        fixed = fixed or bool((request.run.get("training") or {}).get("micro_batch_size"))
        counts = None
        if processor is not None and world > 1 and train.paths:
            counts = glance(config.data, processor, train.paths, config.training.seed)
        laid = lay_out(request.run, config, source, devices, world, lambda dp: config_for(dp)[0], fixed, counts)
    except NothingFits as error:
        if request.sharding_asked and not keep_sharding:
            report.warn("sharding", f"{request.sharding_asked}: the run does not fit without", "")
            return _plan(request, job, report, source, devices, world, load, keep_sharding=True)
        advice = (
            "take more or larger GPUs, --use_lora (with --quantize nf4), a shorter --max_length, or fewer images a row"
        )
        asked = f"{request.sharding_asked}, which is kept: " if request.sharding_asked else ""
        report.fail("memory", f"{asked}{error}", advice)
        return None
    before = config.parallel
    config, stages, rows, reason = laid
    if request.sharding_asked and not keep_sharding:
        now = config.parallel
        if now.fully_sharded or now.offload != before.offload:  # costs time as well
            report.warn("sharding", f"{request.sharding_asked}: the run does not fit without sharding or offload", "")
            return _plan(request, job, report, source, devices, world, load, keep_sharding=True)
        text = f"{request.sharding_asked}: the run {_fits_like(before, config, reason)}"
        report.warn("sharding", text, "--strict-sharding True keeps what was asked for")
    config.check_model(source.config)
    if config.training.train_iters is not None:
        Schedule.of(config.optimizer, config.training.train_iters)  # raises where warm-up and length do not go together
    checks.check_host(report, max(stage.host for stage in stages) * devices.ranks, config.parallel.offload)
    report.ok("memory", f"{reason}\n" + "\n".join(rows))
    writes = folders_of(config)
    if train.sources or valid.sources:
        writes["launch.shard_cache"] = cache_folder(launch)
    check_outputs(report, writes)
    check_disk(report, disk_needs(request, config, source, stages, train, valid, adapts))
    port = checks.choose_port(report, launch.master_port) if job.alone and world > 1 else 0
    if processor is None or report.failed:
        return None
    names_base = _names_base(source)
    if adapts and not names_base:
        _tell_missing_base(report, launch, load, config.output_dir)
        if report.failed:
            return None
    here = devices.ranks if job.alone else 1
    lines = _describe(config, train, valid, reason, world, adapts and names_base, adapts, launch.save_merged_model)
    words = command(config.output_dir / CONFIG, here, port) if job.alone else command(config.output_dir / CONFIG, 1, 0)
    by = "" if job.alone else f" on each of the {world} ranks that {job.by} tells of: none is started here"
    lines.append(f"command    {' '.join(words)}{by}")
    return RunPlan(
        config=config, adapts=adapts, names_base=names_base, world=world, here=here, devices=devices, port=port,
        train=train, valid=valid,
        processor=processor, lines=tuple(lines),
    )  # fmt: skip


def _fits_like(before: ParallelConfig, config: RunConfig, reason: str) -> str:
    """Where a layout without sharding and offload has nothing else in their place, it is faster; else who knows."""
    now = config.parallel
    less = now.replica_size == 1 and now.recompute_granularity == before.recompute_granularity
    return f"fits like this as well{', and is faster' if less else ''}: {as_flags(config, reason)}"


def _names_base(source: WeightSource) -> bool:
    """Whether what is adapted lies in an HF directory, as PEFT loads a base."""
    base = getattr(source, "base", source)
    return base.kind == "hf" and (base is source or getattr(source, "base_name", None) is not None)


def _tell_missing_base(report: Report, launch: LaunchConfig, load: str, output: Path) -> None:
    """The run can be trained and merged, but not leave an adapter: said before it starts."""
    text = f"the base {load} is no Hugging Face directory, which an adapter of PEFT has to name: none is written at the end"
    advice = f"afterwards: {adapter_command(output)}; or start from an HF directory (toolkits/convert mg2hf writes one)"
    if launch.export_each_epoch:
        report.fail(
            "output", f"{text}, and launch.export_each_epoch has nothing to write", "leave it out, or " + advice
        )
    else:
        report.warn("output", text, advice)


def _start_from(request: Request, report: Report) -> str | None:
    """What the run loads: its own last checkpoint, where it goes on, else the model that was named."""
    section = request.run.setdefault("checkpoint", {})
    places = CheckpointConfig(save=section.get("save"), staging=section.get("staging"))
    load, output = section.get("load"), places.folder
    parts = request.launch.llm is not None
    if parts and load is not None:
        report.fail("model", f"{load} is named, and parts to make one of", "leave --model_name_or_path or --llm out")
        return None
    if load is None and not parts:
        advice = "--model_name_or_path DIR, checkpoint.load in the config, or its parts: --llm DIR --vision DIR"
        report.fail("model", "no model is named", advice)
        return None
    there = output is not None and holds_checkpoints(output) and not request.launch.overwrite_output_dir
    if there and output is not None:
        if not section.get("finetune"):
            text = f"{output} holds checkpoints: the run goes on from the last one"
            report.warn("model", text, "--overwrite_output_dir True to start anew")
            return str(output)
        if load is not None and not Path(os.path.realpath(load)).is_relative_to(os.path.realpath(output)):
            text = f"{output} holds checkpoints of another run than the one that checkpoint.finetune starts from {load}"
            advice = "leave checkpoint.finetune out to go on from them, --overwrite_output_dir True to replace them, or another"
            report.fail("output", text, f"{advice} --output_dir")
    if load is None:
        model, training = (request.run.get(key) or {} for key in ("model", "training"))
        try:
            load = assemble(request.launch, model.get("family"), output or Path("."), training.get("precision"))
        except MegatronVLMError as error:
            report.fail("model", str(error), "")
            return None
    if not there and holds_checkpoints(Path(load)):
        section.setdefault("finetune", True)  # another run's checkpoint gives its weights
    return str(load)


def _packages(run: dict[str, Any], adapts: bool) -> tuple[dict[str, str], dict[str, str]]:
    """(package -> the setting that needs it, package -> what is left out without it)."""
    logging, asked = run.get("logging") or {}, {}
    if logging.get("tensorboard", True):
        asked["tensorboard"] = "logging.tensorboard (--report_to tensorboard)"
    asked |= {name: f"logging.{name} (--report_to {name})" for name in TRACKERS if logging.get(name)}
    if adapts:
        asked["peft"] = "section peft (--use_lora)"
    return asked, {"matplotlib": f"{LOSS} is left out"}


def _folders(run: dict[str, Any], part: str) -> list[str]:
    entries = (run.get("data") or {}).get(part) or []
    return [str(entry["path"] if isinstance(entry, dict) else entry) for entry in entries]


def _first_config(
    config_for: Callable[[int], tuple[RunConfig, tuple[str, ...]]], most: int
) -> tuple[RunConfig, tuple[str, ...]]:
    """The run at the largest data parallel size, of those that ``most`` ranks allow, which its batch does not contradict.

    Raises:
        ConfigError: that of the largest, where there is none.
    """
    first: ConfigError | None = None
    for dp in range(most, 0, -1):
        if most % dp == 0:
            try:
                return config_for(dp)
            except ConfigError as error:
                first = first or error
    assert first is not None
    raise first


def _model_ranks(run: dict[str, Any]) -> int | None:
    """Ranks of one replica on the CPU, where its sizes are named: there is no number of GPUs to go by."""
    on_cpu = (run.get("training") or {}).get("device") == "cpu"
    return replica_size(run.get("parallel") or {}) if on_cpu else None


def _describe(
    config: RunConfig, train: Inputs, valid: Inputs, reason: str, world: int, adapter: bool, adapts: bool, merged: bool
) -> list[str]:
    training = config.training
    grid = config.parallel.grid(world)
    dp = grid.dp
    micro, total = training.micro_batch_size, training.global_batch_size
    what = "rows" if config.data.packing else "samples"
    length = next(
        f"{value:g} {name}"
        for name, value in (
            ("updates", training.train_iters),
            ("samples", training.train_samples),
            ("epochs", training.train_epochs),
            ("an evaluation alone", 0),
        )
        if value is not None
    )
    output = config.output_dir
    names = [ADAPTER] if adapter else []
    names += ([f"{MERGED}/"] if merged else []) if adapts else [f"{HF}/"]
    lines = [
        f"data       {', '.join(train.paths) or 'none'}"
        + (f"; held out: {', '.join(valid.paths)}" if valid.paths else ""),
        f"layout     {grid.name()}: {reason}",
        f"batch      {micro} {what} x {total // (micro * dp)} microbatches x dp {dp} = {total} {what} an update; {length}",
        f"precision  {training.precision}; lr {config.optimizer.lr:g}; seed {training.seed}",
        f"output     {output}: {', '.join([*names, LOSS, 'train.log', CONFIG])}, checkpoints",
    ]
    return lines
