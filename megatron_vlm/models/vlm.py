"""VisionLanguageModel: one pipeline stage of a vision tower, a connector and a decoder.

    pixels --vision_model--> patches --connector--> features --fuse--> embeddings --(scatter)--> decoder stage --> hidden | loss

The first stage owns tower and connector; where images are encoded ahead (training/ahead.py), later ones hold copies. The family
gives both:
    vision_model(pixels: tuple of [C, h, w]) -> (patches [P, Hv], number of patches of each image)
    connector(patches, counts) -> features [F, H]; of images with numbers beside their pixels (Row.grids) these in place of counts
In training a row without images runs them on the smallest image of zeros, whose features go nowhere (models/fusion.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_vlm.data.row import Row
from megatron_vlm.errors import DataError
from megatron_vlm.layers.context.blocks import Blocks
from megatron_vlm.layers.core_attention import RowParams
from megatron_vlm.models.fusion import Filler, filler_pixels, fuse
from megatron_vlm.models.language import Decoder
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.decoder import TextConfig
from megatron_vlm.models.saved_tensors import SavedTensors
from megatron_vlm.parallel.batch import ImageWork
from megatron_vlm.parallel.rng import alike_over_context_ranks, unchanged_generators
from megatron_vlm.parallel.topology import Topology


class VisionLanguageModel(MegatronModule):
    """One stage. ``vision_model`` and ``connector`` are None on stages that do not own them, and in a text model on all.

    Attributes:
        trained: what trains of tower and connector, copies on later stages included (``optimizer.build.wrap_model``).
        ahead: images of the step in work that were encoded before it (training.ahead.Ahead).
        lockstep: parameters are cut over ranks (training/optimizer/sharded.py): every row must gather the same ones.
    """

    lockstep = False

    def __init__(
        self,
        language_model: Decoder,
        vision_model: nn.Module | None,
        connector: nn.Module | None,
        options: ModelOptions,
        *,
        topology: Topology,
    ):
        super().__init__(config=language_model.config)
        self.vision_model = vision_model
        self.connector = connector
        self.language_model = language_model
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.vp_stage = language_model.vp_stage
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights
        self.recompute_connector = options.recomputes("connector")
        norms = options.recompute_granularity == "selective" and options.recomputes("norm")
        layers = language_model.decoder.layers if norms else ()
        self.saved = SavedTensors(
            self,
            offload=options.offload_activations,
            norms=[norm for layer in layers for norm in (layer.input_layernorm, layer.pre_mlp_layernorm)],
        )
        self.topology = topology
        self.trained: list[nn.Parameter] = []
        self.ahead: Any = None
        self.filler = Filler()
        self.image_work: ImageWork | None = None
        self.model_type = language_model.model_type

    @property
    def holds_copies(self) -> bool:
        """Tower and connector are copies of the first stage's, which neither optimizer nor checkpoint knows."""
        return self.vision_model is not None and not self.pre_process

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.language_model.set_input_tensor(input_tensor)

    def forward(self, batch: Row) -> Tensor:
        """Runs the stage on one row.

        Returns:
            The last stage: fp32 scalar, the sum of token losses of the row. Other stages: hidden states [T(/tp), 1, H].
        """
        with self.saved.of_a_pass():
            hidden = self._hidden(batch)
        return self.language_model.loss(hidden, batch.labels, batch.loss_positions) if self.post_process else hidden

    def logits(self, batch: Row) -> Tensor:
        """As ``forward``, but the last stage returns logits [T, true vocabulary]."""
        hidden = self._hidden(batch)
        return self.language_model.logits(hidden) if self.post_process else hidden

    def next_logits(self, batch: Row, row: RowParams) -> Tensor:
        """As ``logits``, with a cache in ``row``: the last stage returns those after each real segment, [N, true V]."""
        hidden = self._hidden(batch, row)
        if not self.post_process:
            return hidden
        assert row.cache is not None
        return self.language_model.logits(hidden, row.cu_seqlens_q[1:][: len(row.cache.lengths)].long() - 1)

    def image_features(self, pixels: Sequence[Tensor], grids: Sequence[tuple[int, ...]] = ()) -> Tensor:
        """[F, H] (DeepStack: wider), features of all images [C, h, w] of a row in order (first stage); ``grids`` as of Row."""
        with alike_over_context_ranks():
            return self._features(pixels, grids, *self._vision_parts())

    def own_features(self, pixels: Sequence[Tensor], grids: Sequence[tuple[int, ...]] = ()) -> Tensor:
        """The same of parts of images (layers.context.images.ImageParts) that no other rank encodes: it draws its own numbers."""
        vision, connector = self._vision_parts()
        vision, connector = getattr(vision, "encode_parts", vision), getattr(connector, "of_parts", connector)
        apart = self.topology.whole_tower and self.training
        with (
            get_cuda_rng_tracker().fork() if apart else nullcontext()
        ):  # as what is split draws: tensor parallel ranks apart
            return self._features(pixels, grids, vision, connector)

    def _features(
        self, pixels: Sequence[Tensor], grids: Sequence[tuple[int, ...]], vision: Any, connector: Any
    ) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(self.vision_model)):
            patches, counts = vision(pixels)
        counts = grids or counts
        if self.recompute_connector and self.training and _trains(self):
            # Non-reentrant: a frozen tower gives an input without gradient, which a reentrant one would answer with zeros.
            return checkpoint(connector, patches, counts, use_reentrant=False, context_fn=_same_numbers)
        return connector(patches, counts)

    def _hidden(self, batch: Row, row: RowParams | None = None) -> Tensor:
        embeddings = self._embeddings(batch) if self.pre_process else None
        row = row or RowParams.of(batch.cu_seqlens, max(batch.segments), len(batch.input_ids))
        row.image_positions, row.deal = batch.image_positions, batch.deal
        if self.language_model.image_blocks and batch.runs:
            row.blocks = Blocks(batch.starts, batch.runs, batch.input_ids.device)
        return self.language_model(embeddings, batch.position_ids, row)

    def _embeddings(self, batch: Row) -> Tensor:
        x = self.language_model.embed(batch.input_ids, batch.position_ids)
        if batch.features is not None:
            x = fuse(x, batch.features, batch.image_positions, len(batch.pixels))
        elif batch.share is not None:
            features = batch.share.exchange(self._shared_features(batch))
            x = fuse(x, features, batch.image_positions, len(batch.pixels))
        elif batch.pixels:
            features = self.filler.real(self.image_features(batch.pixels, batch.grids))
            x = fuse(x, features, batch.image_positions, len(batch.pixels), batch.part)
        elif self._needs_filler():
            x = self._beside_filler(x)
        if self.config.sequence_parallel:
            x = scatter_to_sequence_parallel_region(x, group=self.language_model.tp_group)
        if torch.is_grad_enabled() and not x.requires_grad and _trains(self.language_model):
            # A frozen embedding before a decoder that trains: megatron-core's recomputation gives no gradient at all to layers
            # whose input needs none.
            x = x.detach().requires_grad_()
        return x

    def _shared_features(self, batch: Row) -> Tensor:
        """[f, H], features of the images that this rank encodes of a row that ranks share; it may have none."""
        if batch.pixels:
            return self.filler.real(self.own_features(batch.pixels, batch.grids))
        width, dtype = self.language_model.feature_size, self.config.params_dtype
        none = torch.empty(0, width, dtype=dtype, device=batch.input_ids.device)
        return self._beside_filler(none) if self._needs_filler() else none

    def _beside_filler(self, x: Tensor) -> Tensor:
        """``x`` as it is; tower and connector ran on filler, and autograd passes through them."""
        parts = self._vision_parts()
        encode = self.own_features if self.topology.shares_images else self.image_features
        with unchanged_generators():
            features = encode(filler_pixels(parts[0]))
        self.filler.guard(p for part in parts for p in part.parameters())
        return self.filler.beside(x, features)

    def _needs_filler(self) -> bool:
        """Tower or connector trains inside the schedule, or is cut over ranks: decided by what is equal on every rank, never by
        the row."""
        parts = [part for part in (self.vision_model, self.connector) if part is not None]
        here = torch.is_grad_enabled() and not self.topology.encodes_ahead
        return bool(parts) and (self.lockstep or (here and any(map(_trains, parts))))

    def _vision_parts(self) -> tuple[nn.Module, nn.Module]:
        if self.vision_model is None or self.connector is None:
            raise DataError(
                "a row has images, and the model has no vision tower: train it on text, or another model on this"
            )
        return self.vision_model, self.connector


def build_stage(
    text: TextConfig,
    topology: Topology,
    options: ModelOptions,
    vp_stage: int | None,
    tower: Callable[[Topology, ModelOptions], nn.Module] | None = None,
    connector: Callable[[Topology, ModelOptions], nn.Module] | None = None,
    layer: ModuleSpec | None = None,
) -> VisionLanguageModel:
    """Builds one stage of a model.

    Args:
        text: the decoder.
        topology, options: of the run.
        vp_stage: number of the virtual stage on this rank; None: there is one.
        tower, connector: build these parts, called on the stages that hold them; None: a text model.
        layer: of the decoder, where it is not the plain one.
    """
    first = topology.first_stage and vp_stage in (None, 0)
    last = topology.last_stage and vp_stage in (None, topology.vp - 1)
    encodes = first or (topology.encodes_ahead and vp_stage in (None, 0))
    return VisionLanguageModel(
        Decoder(text, topology, options, vp_stage, first, last, layer=layer),
        tower(topology, options) if tower and encodes else None,
        connector(topology, options) if connector and encodes else None,
        options,
        topology=topology,
    )


def _same_numbers() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a forward pass and of its recomputation, which draws the same from megatron-core's generator of the rank.

    torch's checkpoint takes care of the default generator.
    """
    tracker = get_cuda_rng_tracker()
    before = tracker.get_states()

    @contextmanager
    def again() -> Iterator[None]:
        now = tracker.get_states()
        tracker.set_states(dict(before))
        try:
            yield
        finally:
            tracker.set_states(now)

    return nullcontext(), again()


def _trains(module: nn.Module | None) -> bool:
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())
