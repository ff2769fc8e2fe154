"""A model in memory: what loading, training, saving, export, adapters and generation take.

    FamilySpec, its config, ModelOptions, Topology --build_model--> Model: this rank's stages, and their weight map
    Model --load.load_into--> weights in it --lora.apply_lora--> pairs in it --optimizer.wrap_model--> gradients in it

Parameters have global names: decoder layers count over the whole model, whatever stage they are on.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.context.attention import check_heads
from megatron_vlm.layers.context.images import ImageParts
from megatron_vlm.models.family_config import FamilyConfig, ImageConfig, ImageShape, has_tower, image_work
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.topology import Topology
from megatron_vlm.registry import FamilySpec
from megatron_vlm.weights.mapping import Mapping, group_of

EMBEDDING = "language_model.embedding.word_embeddings.weight"
"""What a tied copy on the last stage is filled from."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """This rank's part of a model, in iteration its stages.

    Attributes:
        spec, config: its family, and what that read in config.json.
        options: how it was built.
        topology: over which ranks.
        mapping: weight map of this layout, pairs of adapters included.
        saved: the part of it that a checkpoint holds: all, or what trains beside a base.
        stages: one, or one per virtual stage; wrapped in megatron-core's DDP where they train.
    """

    spec: FamilySpec
    config: FamilyConfig
    options: ModelOptions
    topology: Topology
    mapping: Mapping
    saved: Mapping
    stages: Sequence[Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def device(self) -> torch.device:
        return self.topology.device

    def to(self, device: torch.device) -> Self:
        """The same, its stages on ``device``."""
        return dataclasses.replace(self, stages=[stage.to(device) for stage in self.stages])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (global name, parameter), copies of tied weights included."""
        for stage in self.stages:
            yield from global_named_parameters(stage)

    @property
    def lockstep(self) -> bool:
        """All ranks must run the same passes: each needs the weights that others hold."""
        return any(unwrapped(stage).lockstep for stage in self.stages)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Runs a block in evaluation mode; each stage's own mode comes back after it."""
        modes = [stage.training for stage in self.stages]
        for stage in self.stages:
            stage.eval()
        try:
            yield
        finally:
            for stage, mode in zip(self.stages, modes):
                stage.train(mode)


def build_model(spec: FamilySpec, config: FamilyConfig, topology: Topology, options: ModelOptions) -> Model:
    """Builds this rank's stages (one per virtual stage), frozen groups applied; weights are to be loaded.

    Raises:
        ConfigError: the model does not divide over the topology, with the legal sizes.
    """
    if options.drop_path_rate and not spec.drop_path:
        raise ConfigError(f"drop_path_rate {options.drop_path_rate}: the tower of family {spec.name} has no drop path")
    text = config.text
    problem = check_heads(text.num_attention_heads, text.num_query_groups, topology.cp, topology.tp)
    if topology.exchange == "heads" and problem:
        raise ConfigError(f"parallel.context_parallel_exchange is heads, but {problem}: set gather or auto")
    if topology.vp > 1 and topology.layers[0] < text.deepstack:
        raise ConfigError(
            f"the first of {topology.vp} virtual stages of rank 0 holds {topology.layers[0]} decoder layers, but features of "
            f"images are added behind the first {text.deepstack} (DeepStack), which virtual stages cannot hand on: raise "
            "parallel.num_layers_per_virtual_pipeline_stage (or the first of decoder_layers_per_stage), or do without virtual "
            "stages"
        )
    mapping = spec.mapping(config, topology.tp).padded(options.make_vocab_size_divisible_by)
    if topology.whole_tower:
        mapping = mapping.whole("vision", "connector")
    stages = []
    for stage in range(topology.vp):
        chunk = spec.build(config, topology, options, vp_stage=stage if topology.vp > 1 else None)
        mark_sharding(chunk, mapping)
        freeze(chunk, options.freeze)
        if has_tower(config) and chunk.vision_model is not None:
            chunk.image_work = partial(image_parts, config, chunk.vision_model)
        stages.append(chunk)
    return Model(
        spec=spec, config=config, options=options, topology=topology, mapping=mapping, saved=mapping, stages=stages
    )


def image_parts(config: ImageConfig, tower: Any, image: ImageShape, grid: tuple[int, ...] = ()) -> ImageParts:
    """How an image is dealt: in the parts that its tower names (``tower.parts``), or whole; ``grid``: its numbers in a row."""
    features, work = image_work(config, image, grid)
    if hasattr(tower, "parts"):
        return tower.parts(image, features, work)
    return ImageParts(number=1, cut=lambda pixels: (pixels,), features=features, work=work)


def mark_sharding(chunk: nn.Module, mapping: Mapping) -> None:
    """Sets the marks by which megatron-core tells sharded from replicated parameters, from the family's weight map.

    megatron-core sets them only where it initialises weights itself, and ours are loaded. Without them the gradient norm would
    count one rank's shard alone; a tower that runs whole on every rank must not carry them.
    """
    entries = mapping.by_name()
    for name, parameter in global_named_parameters(chunk):
        split = entries[weight_name(name, parameter)].split
        parameter.tensor_model_parallel = split.dim is not None  # type: ignore[attr-defined]
        parameter.partition_dim = -1 if split.dim is None else split.dim  # type: ignore[attr-defined]
        parameter.partition_stride = split.stride  # type: ignore[attr-defined]


def freeze(chunk: nn.Module, groups: Sequence[str]) -> None:
    """Takes whole groups out of training, both copies of a tied weight included."""
    for name, parameter in global_named_parameters(chunk):
        if group_of(name) in groups:
            parameter.requires_grad_(False)


def weight_name(name: str, parameter: nn.Parameter) -> str:
    """Global name of the weight that a parameter is filled from: that of the embedding for a tied head's copy of it."""
    return EMBEDDING if getattr(parameter, "tied_copy", False) else name


_LAYER = re.compile(r"^language_model\.decoder\.layers\.(\d+)\.")


def global_named_parameters(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields (global name, parameter) of a stage, wrapped in DDP or not: decoder layers count over the whole model."""
    model = unwrapped(chunk)
    for name, parameter in model.named_parameters():
        yield _global_name(model, name), parameter


def global_named_modules(chunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The same of modules."""
    model = unwrapped(chunk)
    for name, module in model.named_modules():
        yield _global_name(model, name), module


def unwrapped(chunk: nn.Module) -> VisionLanguageModel:
    """The stage inside megatron-core's DDP."""
    while not isinstance(chunk, VisionLanguageModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def _global_name(model: VisionLanguageModel, name: str) -> str:
    match = _LAYER.match(name)
    if match is None:
        return name
    layers: Any = model.language_model.decoder.layers
    return f"language_model.decoder.layers.{layers[int(match[1])].layer_number - 1}.{name[match.end() :]}"


def global_parameters(chunks: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """All parameters of this rank by global name, copies left out: tied weights', and towers' on later stages."""
    return {
        name: parameter
        for chunk in chunks
        for name, parameter in global_named_parameters(chunk)
        if not getattr(parameter, "tied_copy", False)
        and not (unwrapped(chunk).holds_copies and group_of(name) != "llm")
    }
