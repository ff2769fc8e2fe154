"""Memory of one rank of each pipeline stage, before anything runs.

RunConfig + model config --fake process group, real stage modules on meta--> weights, gradients, optimizer, activations
"""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_vlm.training.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """What one microbatch is taken to hold.

    Attributes:
        segments: tokens of each sample.
        images: [C, H, W] of each image as the tower gets it (InternVL: a column of tiles).
    """

    segments: tuple[int, ...]
    images: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """One rank of a stage (tensor parallel rank 0, which is never the smaller one); sizes in bytes.

    Attributes:
        stage: number of the pipeline stage.
        ranks: first and last global rank of the stage.
        parameters, trainable: numbers held by one rank, by parameter group (llm, vision, connector).
        weights, gradients, optimizer: what stays between steps.
        activations: kept for the backward pass by all microbatches in flight.
        temporary: on top of these at the worst moment.
        constant: of the device's context and libraries, outside the allocator.
    """

    stage: int
    ranks: tuple[int, int]
    parameters: dict[str, int]
    trainable: dict[str, int]
    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    constant: int

    @property
    def total(self) -> int:
        """Bytes that the device must have."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.temporary, self.constant)
        return sum(parts)

    @property
    def largest(self) -> str:
        """Name of what takes most."""
        names = ("weights", "gradients", "optimizer", "activations", "temporary", "constant")
        return max(names, key=lambda name: getattr(self, name))


def estimate(
    config: RunConfig,
    spec: Any,
    model_config: Any,
    world_size: int,
    device_kind: Literal["cpu", "cuda"],
    *,
    row: RowShape | None = None,
) -> list[StageMemory]:
    """Estimates one rank of each pipeline stage; needs a process without a process group.

    Args:
        config: the run; its model is not read.
        spec, model_config: the model's family and configuration.
        world_size: ranks of the run.
        device_kind: where the run would be.
        row: a microbatch; None: a full row with the images that ``config.data`` leads to expect.

    Raises:
        ConfigError: the sizes do not fit the world or the model.
    """
    from megatron_vlm.training.dry_run import stage_reports

    return [
        StageMemory(
            stage=number,
            ranks=stage.ranks,
            parameters=stage.parameters,
            trainable=stage.trainable,
            weights=stage.weights,
            gradients=stage.gradients,
            optimizer=stage.optimizer,
            activations=stage.activations,
            temporary=0,
            constant=1 << 30 if device_kind == "cuda" else 0,
        )
        for number, stage in enumerate(stage_reports(config, spec, model_config, world_size))
    ]


def table(stages: list[StageMemory]) -> list[str]:
    """Lines of a table, one row per stage."""
    names = ("weights", "gradients", "optimizer", "activations", "temporary", "constant", "total")
    rows = [("stage", "ranks", *names, "largest")]
    for stage in stages:
        sizes = [f"{getattr(stage, name) / 2**30:.2f}" for name in names]
        rows.append((str(stage.stage), f"{stage.ranks[0]}-{stage.ranks[1]}", *sizes, stage.largest))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
