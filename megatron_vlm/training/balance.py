"""Pipeline stages that take equally long: ``parallel.decoder_layers_per_stage=auto``, and what every stage has to do.

    config of the model, an expected row --FLOPs of tower, connector, layers, head--> layers of each stage, loads, idle share

Work is counted in operations of a forward and backward pass (training/memory/flops.py): a frozen part costs its forward pass,
and no gradient flows below the first part that trains. The row is the one that memory is estimated for: full, with images of
the largest size that the data section lets through.
"""

from dataclasses import dataclass

from megatron_vlm.models.family_config import FamilyConfig
from megatron_vlm.training.memory.flops import forward_flops
from megatron_vlm.training.memory.stages import RowShape
from megatron_vlm.training.run_config import RunConfig
from megatron_vlm.weights.stages import idle_share, spread


@dataclass(frozen=True, kw_only=True)
class PartWork:
    """Operations of one microbatch, forward and backward.

    Attributes:
        before: of tower and connector, on the first stage.
        layer: of a decoder layer.
        after: of head and loss, on the last stage.
    """

    before: float
    layer: float
    after: float

    @classmethod
    def of(cls, config: RunConfig, model_config: FamilyConfig, row: RowShape) -> "PartWork":
        """Of ``row``, with a loss on every token."""
        frozen, tokens = config.model.freeze, sum(row.segments)
        flops = forward_flops(model_config, images=row.images, segments=row.segments, supervised=tokens)
        head = 2.0 * tokens * model_config.text.hidden_size * model_config.text.vocab_size
        before, whole = flops.of_groups(frozen, ("vision", "connector")), flops.of_groups(frozen, ("llm",))
        layer = whole * (1 - head / flops.llm) / model_config.text.num_layers
        return cls(before=before, layer=layer, after=whole * head / flops.llm)

    def loads(self, layers: tuple[int, ...], pp: int) -> list[float]:
        """Work of each pipeline rank; ``layers`` of each virtual stage."""
        found = [self.layer * sum(layers[rank::pp]) for rank in range(pp)]
        found[0] += self.before
        found[-1] += self.after
        return found


def balanced(config: RunConfig, model_config: FamilyConfig) -> RunConfig:
    """The run with ``auto`` replaced by the layers of each stage."""
    parallel = config.parallel
    if parallel.decoder_layers_per_stage != "auto":
        return config
    work = PartWork.of(config, model_config, RowShape.expected(config, model_config))
    pp = parallel.pipeline_model_parallel_size
    counts = spread(model_config.text.num_layers, [work.before, *[0.0] * (pp - 2), work.after], work.layer)
    return config.replace(parallel=parallel.replace(decoder_layers_per_stage=counts))


def describe(config: RunConfig, model_config: FamilyConfig, row: RowShape, microbatches: int) -> str:
    """Layers and share of work of each pipeline rank, and the predicted idle share, in one line.

    Args:
        config: of the run, ``auto`` replaced.
        model_config: of the model.
        row: a microbatch.
        microbatches: of a step, on a rank.
    """
    pp = config.parallel.pipeline_model_parallel_size
    layers = config.parallel.stage_layers(model_config.text.num_layers)
    loads = PartWork.of(config, model_config, row).loads(layers, pp)
    virtual = len(layers) // pp
    idle = idle_share(loads, microbatches * virtual)
    counts = ", ".join(str(sum(layers[rank::pp])) for rank in range(pp))
    shares = ", ".join(f"{load / sum(loads):.1%}" for load in loads)
    return f"decoder layers of each stage: {counts}; work: {shares}; idle in a step of {microbatches} microbatches: {idle:.1%}"
