"""What a stage is estimated to hold and to do: the row that is meant, memory, work, and a table of both. No megatron-core."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlm.models.family_config import FamilyConfig, has_tower
from megatron_vlm.parallel.pipeline_time import step_work
from megatron_vlm.training.run_config import RunConfig

TEXT_PER_IMAGE = 512
"""Tokens of text that an expected row has for each image (LLaVA's instruction data: about 300)."""


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """What one microbatch is taken to hold.

    Attributes:
        segments: tokens of each sample.
        images: [C, H, W] of each image as the tower gets it (InternVL: a column of tiles).
    """

    segments: tuple[int, ...]
    images: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def expected(cls, config: RunConfig, model_config: FamilyConfig) -> "RowShape":
        """A full row: images of the largest size that ``config.data`` lets through, one to each ``TEXT_PER_IMAGE`` tokens of text
        in a packed row and one to each sample else, no more than ``max_image_num`` and ``max_patches_per_row`` allow."""
        data, samples = config.data, config.training.micro_batch_size
        segments = (data.seq_length,) * samples
        if not has_tower(model_config) or data.max_image_num == 0:
            return cls(segments=segments)
        image = model_config.expected_image(data)
        cost = model_config.image_cost(image)
        count = max(1, data.seq_length // (cost.features + TEXT_PER_IMAGE)) if data.packing else samples
        if cost.features >= data.seq_length:
            count = 0  # no sample with such an image is within seq_length
        if data.max_patches_per_row is not None:
            count = min(count, data.max_patches_per_row // cost.patches)
        return cls(segments=segments, images=(image,) * count)

    def __str__(self) -> str:
        sizes = {image: self.images.count(image) for image in self.images}
        images = " and ".join(f"{count} images of {w} x {h} pixels" for (_, h, w), count in sizes.items())
        return f"{sum(self.segments):,} tokens" + (f" with {images}" if images else ", no images")


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """One rank of a stage (tensor parallel rank 0, which is never the smaller one); sizes in bytes.

    Attributes:
        stage: number of the pipeline stage.
        ranks: first and last global rank of the stage.
        parameters, trainable: numbers held by one rank, by parameter group (llm, vision, connector).
        weights, gradients, optimizer: what stays between steps.
        activations: kept for the backward pass by all microbatches in flight.
        temporary: on top of these at the worst moment of a step.
        constant: of the device's context and libraries, outside the allocator.
        host: of the optimizer, and of weights and gradients where they are offloaded, in the host's memory.
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
    host: int = 0

    @property
    def allocated(self) -> int:
        """Bytes of tensors at the worst moment."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary

    @property
    def total(self) -> int:
        """Bytes that the device must have."""
        return self.allocated + self.constant

    @property
    def largest(self) -> str:
        """Name of what takes most."""
        return max(_SIZES, key=lambda name: getattr(self, name))


_SIZES = ("weights", "gradients", "optimizer", "activations", "temporary", "constant")


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """A step as it is predicted.

    Attributes:
        layers: decoder layers of each pipeline rank.
        loads: work of each in the pipeline for one microbatch.
        microbatches: of a rank.
        virtual: stages of a rank.
        ahead: of all ranks for one microbatch, before the pipeline.
        once: of all ranks, once a step.
        source: what the microbatch is taken from.
    """

    layers: tuple[int, ...]
    loads: tuple[float, ...]
    microbatches: int
    virtual: int
    ahead: float
    once: float
    source: str

    @property
    def time(self) -> float:
        """Of the step, in operations of a rank."""
        pipeline = step_work(self.loads, self.microbatches * self.virtual) / self.virtual
        return pipeline + self.microbatches * self.ahead + self.once

    @property
    def work(self) -> tuple[float, ...]:
        """All of each pipeline rank for one microbatch."""
        return tuple(load + self.ahead for load in self.loads)

    @property
    def idle(self) -> float:
        """Share of it in which a rank waits, over all ranks."""
        return 1 - (self.microbatches * sum(self.work) / len(self.work) + self.once) / self.time

    def __str__(self) -> str:
        return f"{self.idle:.1%} of a step of {self.microbatches} microbatches idle, by {self.source}"


def table(stages: Sequence[StageMemory], step: StepWork) -> list[str]:
    """Lines of a table, one per stage: what it does for a row, and what it holds in GiB (MiB where all is small)."""
    unit, name = (2**30, "GiB") if max(stage.total for stage in stages) > 2**29 else (2**20, "MiB")
    work, of_work = (10**12, "TFLOP") if max(step.work) > 10**11 else (10**9, "GFLOP")
    host = ("host",) if any(stage.host for stage in stages) else ()
    rows: list[tuple[str, ...]] = [
        ("stage", "ranks", "layers", f"{of_work} a row", "share", *_SIZES, f"total {name}", *host, "most")
    ]
    for stage in stages:
        load = step.work[stage.stage]
        does = (str(step.layers[stage.stage]), f"{load / work:.2f}", f"{load / sum(step.work):.1%}")
        sizes = [f"{getattr(stage, size) / unit:.2f}" for size in (*_SIZES, "total", *host)]
        rows.append((str(stage.stage), f"{stage.ranks[0]}-{stage.ranks[1]}", *does, *sizes, stage.largest))
    return [*in_columns(rows), *([str(step)] if len(step.loads) > 1 else [])]


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, cells to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
