"""`--dry-run`: the resolved config, the topology, and parameters and memory of each stage, for any world size on one process.

RunConfig + config.json --for each stage: fake process group of the whole world, real stage modules on meta--> report
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import yaml

from megatron_vlm.conversion.source import open_source
from megatron_vlm.errors import ConfigError
from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.topology import Topology, build_topology, destroy_topology
from megatron_vlm.training.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """One rank of a stage (tensor parallel rank 0, which is never the smaller one).

    Attributes:
        ranks: first and last global rank of the stage.
        parameters, trainable: numbers held by one rank, by parameter group (llm, vision, connector).
        weights, gradients, optimizer: bytes of one rank.
        activations: bytes of the decoder's activations of full rows in flight (an estimate; images come on top).
    """

    ranks: tuple[int, int]
    parameters: dict[str, int]
    trainable: dict[str, int]
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def dry_run(config: RunConfig) -> str:
    """Returns the report as text.

    Raises:
        ConfigError: the sizes do not fit the world or the model.
        ConversionError: the checkpoint cannot be read.
    """
    parallel, training = config.parallel, config.training
    smallest = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    world = training.dry_run_world_size or max(int(os.environ.get("WORLD_SIZE", "1")), smallest)
    dp = config.check_world(world)
    with open_source(str(config.checkpoint.load), config.model.family) as source:
        spec, model_config = source.spec, source.config
    config.check_model(model_config)
    stages = stage_reports(config, spec, model_config, world)
    lines = [yaml.safe_dump(config.to_dict(), sort_keys=False).rstrip(), ""]
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    rows = config.num_microbatches_per_batch // dp
    vp = parallel.virtual_size(model_config.text.num_layers)
    lines.append(
        f"{spec.name}: world size {world} = tp {tp} x pp {pp} x dp {dp}, {vp} virtual stages per rank; "
        f"{training.global_batch_size} {'rows' if config.data.packing else 'samples'} a step = {rows} microbatches per rank"
    )
    total = sum(count for stage in stages for count in stage.parameters.values())
    lines.append(f"parameters of one tensor parallel rank over all stages: {total:,}")
    lines += ["", *_table(stages)]
    lines.append(
        "GiB per rank. Activations: an estimate for the decoder over full rows of "
        f"{config.data.seq_length * training.micro_batch_size} tokens; images come on top."
    )
    return "\n".join(lines)


def stage_reports(config: RunConfig, spec: Any, model_config: Any, world: int) -> list[StageReport]:
    """Builds each stage on meta under a fake process group of ``world`` ranks."""
    if dist.is_initialized():
        raise ConfigError("--dry-run needs a process without a process group: start it alone, without torchrun")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_vlm.models.vlm import ModelOptions, build_model

    cpu.install()
    pp = config.parallel.pipeline_model_parallel_size
    reports = []
    for stage in range(pp):
        dist.init_process_group("fake", store=FakeStore(), rank=stage * (world // pp), world_size=world)
        try:
            layers = model_config.text.num_layers
            topology = build_topology(config.parallel, num_layers=layers, device=torch.device("cpu"))
            with torch.device("meta"):
                chunks = build_model(spec, model_config, topology, ModelOptions(**config.model_options()))
            reports.append(_report(config, model_config, topology, chunks))
        finally:
            destroy_topology()
            dist.destroy_process_group()
    return reports


def _report(config: RunConfig, model_config: Any, topology: Topology, chunks: Iterable[torch.nn.Module]) -> StageReport:
    from megatron_vlm.models.vlm import GROUPS, global_named_parameters, group_of

    held, trained = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0)
    for chunk in chunks:
        for name, parameter in global_named_parameters(chunk):
            held[group_of(name)] += parameter.numel()
            trained[group_of(name)] += parameter.numel() if parameter.requires_grad else 0
    parameters, trainable = sum(held.values()), sum(trained.values())
    width = 4 if config.training.precision == "fp32" else 2
    states = 8 if width == 4 else 12  # AdamW's moments, and fp32 main parameters beside 16-bit weights
    shards = topology.dp if config.parallel.use_distributed_optimizer else 1
    start = topology.rank
    return StageReport(
        ranks=(start, start + topology.tp * topology.dp - 1),
        parameters=held,
        trainable=trained,
        weights=parameters * width,
        gradients=trainable * (4 if config.parallel.accumulate_allreduce_grads_in_fp32 else width),
        optimizer=-(-trainable * states // shards),
        activations=_activations(config, model_config.text, topology, width),
    )


def _activations(config: RunConfig, text: Any, topology: Topology, width: int) -> int:
    """Bytes of the decoder's activations of one rank: what each layer keeps for its backward pass, by tensors.

    Per token and layer: layer input, two normalised inputs, two residual sums (hidden size, split under sequence parallelism);
    queries, keys and values before and after RoPE, attention output, gate, up and their product (split over tp).
    """
    tokens = config.data.seq_length * config.training.micro_batch_size
    hidden = 5 * text.hidden_size / (topology.tp if config.parallel.sequence_parallel else 1)
    queries, keys = text.num_attention_heads * text.head_dim, text.num_query_groups * text.head_dim
    split = (3 * queries + 3 * keys + 3 * text.ffn_hidden_size) / topology.tp
    layer = tokens * (hidden + split) * width
    layers = text.num_layers // topology.pp
    if config.parallel.recompute_granularity:
        kept = tokens * hidden / 5 * width * layers
    else:
        kept = layer * layers
    microbatches = config.num_microbatches_per_batch // topology.dp
    in_flight = min(microbatches, topology.pp - topology.pp_rank + (topology.vp - 1) * topology.pp)
    return int(kept * in_flight + (layer if config.parallel.recompute_granularity else 0))


def _table(stages: list[StageReport]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("stage", "ranks", "llm", "vision", "connector", "trainable", "weights", "grads", "AdamW", "activ.", "total")
    ]
    for number, stage in enumerate(stages):
        counts = [f"{stage.parameters[group]:,}" for group in ("llm", "vision", "connector")]
        sizes = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.total)
        rows.append(
            (
                str(number),
                f"{stage.ranks[0]}-{stage.ranks[1]}",
                *counts,
                f"{sum(stage.trainable.values()):,}",
                *(f"{size / 2**30:.2f}" for size in sizes),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
