"""`--dry-run`: the resolved config, the topology, and parameters and memory of each stage, for any world size on one process.

RunConfig + config.json --training/memory/estimate.py: real stage modules and a full row, without data--> report
"""

import os
from collections.abc import Sequence

import yaml

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.stream.glance import glance
from megatron_vlm.peft.merge import continued
from megatron_vlm.peft.select import make_plan
from megatron_vlm.training.balance import planned
from megatron_vlm.training.memory.estimate import estimate
from megatron_vlm.training.memory.stages import RowShape, StageMemory, in_columns, table
from megatron_vlm.training.run_config import RunConfig, scale_rope


def dry_run(config: RunConfig) -> str:
    """Returns the report as text: of a run on GPUs, unless ``training.device`` says cpu.

    Raises:
        ConfigError: the sizes do not fit the world or the model.
        ConversionError: the checkpoint cannot be read.
    """
    parallel, training = config.parallel, config.training
    world = training.dry_run_world_size or max(int(os.environ.get("WORLD_SIZE", "1")), parallel.replica_size)
    config.check_world(world)
    with open_source(str(config.checkpoint.load), config.model.family) as source:
        scale_rope(config, source)
        spec, model_config = source.spec, source.config
        if config.peft.adapter is not None:
            config = config.replace(peft=continued(config.peft, source)[1])
        adapted = make_plan(spec, model_config, config.peft, source.infos).groups if config.peft.active else None
        counts = None
        if parallel.pipeline_model_parallel_size > 1 and config.data.train:
            processor = spec.open_processor(source.hf_dir, config.data)
            counts = glance(config.data, processor, config.data.train, training.seed)
    config.check_model(model_config)
    device_kind = training.device or "cuda"
    row, grid = RowShape.expected(config, model_config), parallel.grid(world)
    lines = [yaml.safe_dump(config.to_dict(), sort_keys=False).rstrip(), ""]
    config, step = planned(config, model_config, grid, counts=counts, adapted=adapted)
    stages = estimate(config, spec, model_config, world, device_kind, row=row)
    lines.append(
        f"{spec.name}: world size {world} = {' x '.join(grid.sizes())}, {step.virtual} virtual stages per rank; "
        f"{training.global_batch_size} {'rows' if config.data.packing else 'samples'} a step = {step.microbatches} "
        "microbatches per rank"
    )
    total = sum(count for stage in stages for count in stage.parameters.values())
    lines += [f"parameters of one tensor parallel rank over all stages: {total:,}", "", *_parameters(stages)]
    lines += ["", f"memory of a rank ({device_kind}), with rows of {row}:", *table(stages, step)]
    return "\n".join(lines)


def _parameters(stages: Sequence[StageMemory]) -> list[str]:
    rows: list[tuple[str, ...]] = [("stage", "ranks", "llm", "vision", "connector", "trainable")]
    for stage in stages:
        counts = [f"{stage.parameters[group]:,}" for group in ("llm", "vision", "connector")]
        trainable = f"{sum(stage.trainable.values()):,}"
        rows.append((str(stage.stage), f"{stage.ranks[0]}-{stage.ranks[1]}", *counts, trainable))
    return in_columns(rows)
