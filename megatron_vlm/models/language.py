"""The only file that builds megatron-core's GPT decoder and its layer specs.

    embed(ids) -> [T, 1, H] -(fused with image features, scattered by vlm.py)-> forward -> hidden -> loss | logits

Legend: T tokens of the row (T / tp under sequence parallelism), H hidden size, V vocabulary, D dimension of a head.
Everything that depends on the version of megatron-core (pinned to 0.16.1) stands here and in ``parallel/``.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_vlm.layers.backend import backend_of
from megatron_vlm.layers.core_attention import RowParams
from megatron_vlm.layers.cross_entropy import linear_cross_entropy_sum
from megatron_vlm.layers.deepstack import DeepStackLayer
from megatron_vlm.layers.norm import NormedResidual
from megatron_vlm.layers.rope import RotaryAngles
from megatron_vlm.layers.solo import SoloGroup
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.decoder import TextConfig
from megatron_vlm.parallel.topology import Topology


def layer_spec(
    config: TransformerConfig,
    causal: bool,
    layer: ModuleSpec | None = None,
    qk_norm: bool = False,
    sandwich: bool = False,
) -> ModuleSpec:
    """Spec of one transformer layer, of the classes that ``layers/backend.py`` chooses for ``config``.

    Args:
        config: of the part that the layer belongs to.
        causal: of the attention.
        layer: a family's own class of layer, and what its constructor takes beside megatron-core's arguments.
        qk_norm: queries and keys are normed head by head.
        sandwich: what attention and MLP give is normed too, before it is added.
    """
    mask, backend = AttnMaskType.causal if causal else AttnMaskType.no_mask, backend_of(config)
    column, row, norm = backend.column, backend.row, backend.norm(config)
    head_norm = backend.head_norm if qk_norm else None
    add: Any = get_bias_dropout_add
    if sandwich:
        params = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        add = ModuleSpec(NormedResidual, params=params)
    return ModuleSpec(
        layer.module if layer else TransformerLayer,
        params=layer.params if layer else {},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                backend.self_attention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=backend.core_attention,
                    linear_proj=row,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(backend.mlp, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=add,
        ),
    )


def transformer_config(
    topology: Topology, options: ModelOptions, *, decoder: bool, tp: int | None = None, **fields: Any
) -> TransformerConfig:
    """Returns megatron-core's config with what every part of a model shares; ``fields`` are the part's own.

    Args:
        topology: layout of the run.
        options: of the model.
        decoder: the part is the decoder, which pipelines and may run sequence parallel; towers and connectors do neither.
        tp: tensor parallel size of the part; 1 for a part that runs replicated.
    """
    pp, vp = (topology.pp, topology.vp) if decoder else (1, 1)
    dtype = options.torch_dtype
    if decoder and len(set(topology.layers)) > 1:
        stages = [["decoder"] * count for count in topology.layers]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        fields["pipeline_model_parallel_layout"] = stages
    return TransformerConfig(
        tensor_model_parallel_size=topology.tp if tp is None else tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        sequence_parallel=options.sequence_parallel and decoder,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=topology.device.type == "cpu" or options.build_on_cpu,
        perform_initialization=False,  # every parameter is loaded; conversion checks that none is left out
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,  # megatron-core's fused GELU is the tanh form only
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        batch_p2p_comm=topology.device.type == "cuda",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        calculate_per_token_loss=True,
        transformer_impl=options.transformer_impl,
        deallocate_pipeline_outputs=decoder,
        # Rows differ in length; megatron-core asks for the alltoall dispatcher with this even in dense models.
        variable_seq_lengths=pp > 1 and vp == 1,
        moe_token_dispatcher_type="alltoall",
        **options.recomputation(decoder=decoder),
        **fields,
    )


def process_groups(solo: bool = False) -> ProcessGroupCollection:
    """megatron-core's groups; ``solo`` replaces the tensor parallel one by this rank alone.

    So is the context parallel one always: its layers know of no other tokens than this rank's, whose angles they are given, and
    core attention (layers/context/) does the rest. With the real group megatron-core's RoPE would cut the angles once more.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.cp = SoloGroup()
    if solo:
        groups.tp = SoloGroup()
    return groups


class LocalLayer(TransformerLayer):
    """megatron-core's layer, which takes the RoPE of layers with a window where it has one."""

    def forward(self, *args: Any, packed_seq_params: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        if self.self_attention.core_attention.window is not None:
            packed_seq_params = packed_seq_params.local
            rotary_pos_emb = packed_seq_params.angles
        return super().forward(*args, packed_seq_params=packed_seq_params, rotary_pos_emb=rotary_pos_emb, **kwargs)


class Decoder(GPTModel):
    """megatron-core's GPTModel for packed rows: fused embeddings in; hidden states, loss sum or logits out."""

    def __init__(
        self,
        text: TextConfig,
        topology: Topology,
        options: ModelOptions,
        vp_stage: int | None,
        pre: bool,
        post: bool,
        layer: ModuleSpec | None = None,
    ):
        config = decoder_transformer_config(text, topology, options)
        layer = ModuleSpec(DeepStackLayer) if text.deepstack else layer
        if text.local_rotary_base is not None:
            layer = layer or ModuleSpec(LocalLayer)
        layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=topology.pp_rank)
        spec = TransformerBlockSubmodules(
            layer_specs=[layer_spec(config, True, layer, qk_norm=text.qk_norm, sandwich=text.gemma)] * layers,
            layer_norm=backend_of(config).norm(config),
        )
        super().__init__(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=options.vocab_split.padded(text.vocab_size, topology.tp),
            max_sequence_length=text.max_position_embeddings,
            pre_process=pre,
            post_process=post,
            share_embeddings_and_output_weights=text.tie_word_embeddings,
            position_embedding_type="none",  # angles are those of each token, see layers/rope.py
            scatter_embedding_sequence_parallel=False,  # images are fused in first
            pg_collection=process_groups(),
            vp_stage=vp_stage,
        )
        self.rotates = backend_of(config).rotates
        self.true_vocab_size = text.vocab_size
        self.feature_size = text.feature_size
        before = sum(topology.layers[: topology.pp_rank + (vp_stage or 0) * topology.pp])
        self.input_size = text.hidden_size * (1 + max(0, text.deepstack - before))
        self.tp_group = topology.tp_group
        self.rotary_angles = RotaryAngles(
            text.head_dim,
            text.rotary_base,
            text.max_position_embeddings,
            text.rope_scaling,
            topology.device,
            text.rope_axes,
        )
        self.local_rotary_angles = None
        if text.local_rotary_base is not None:
            sizes = text.head_dim, text.local_rotary_base, text.max_position_embeddings
            self.local_rotary_angles = RotaryAngles(*sizes, None, topology.device)
        # Rounded as transformers does.
        self.embedding_scale = float(torch.tensor(text.embedding_scale, device="cpu").to(options.torch_dtype))
        self.image_blocks = text.image_blocks
        if post and not pre and text.tie_word_embeddings:
            self.output_layer.weight.tied_copy = True

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[T] ids -> [T, 1, H], whole on every tensor parallel rank."""
        x = self.embedding(input_ids=input_ids[None], position_ids=position_ids[None])
        return x if self.embedding_scale == 1.0 else x * self.embedding_scale

    def forward(self, decoder_input: Tensor | None, position_ids: Tensor, row: RowParams) -> Tensor:
        """Runs this stage's layers (and the final norm on the last stage).

        Args:
            decoder_input: [T(/tp), 1, H] on the first stage; None elsewhere (see ``set_input_tensor``).
            position_ids: int64 [..., T], restarting in each segment.
            row: the row's segments.

        Returns:
            Hidden states [T(/tp), 1, H].
        """
        row = self._turned(row, self.rotary_angles, position_ids)
        if self.local_rotary_angles is not None:
            row.local = self._turned(row, self.local_rotary_angles, position_ids)
        return self.decoder(
            hidden_states=decoder_input,
            attention_mask=None,
            rotary_pos_emb=row.angles,
            packed_seq_params=row,
        )

    def _turned(self, row: RowParams, rotary: RotaryAngles, position_ids: Tensor) -> RowParams:
        """The row with the angles of its tokens, or what an attention that rotates by itself takes in their place."""
        segments = None if row.deal is None else row.deal.segments
        angles = rotary(position_ids, row.cu_seqlens_q, row.cu_seqlens_kv, row.max_seqlen_kv, segments)
        if not self.rotates:
            return dataclasses.replace(row, angles=angles)
        half = angles[:, 0, :, : angles.shape[-1] // 2]
        return dataclasses.replace(row, rotation=(half.cos(), half.sin()))

    def loss(self, hidden: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """Sum of token losses at ``positions`` (int64 [N]) with shifted ``labels`` (int64 [T]): fp32 scalar."""
        low_rank = self._low_rank(hidden, positions)
        hidden = self._whole(hidden)[:, 0].index_select(0, positions)
        targets = labels[positions]
        return linear_cross_entropy_sum(
            hidden, self._head, targets, self.true_vocab_size, self.tp_group, low_rank=low_rank
        )

    def logits(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """[T, true V] (at int64 ``positions`` only), gathered over tensor parallel ranks: never for training."""
        low_rank = self._low_rank(hidden, positions)
        hidden = self._whole(hidden)[:, 0]
        local = F.linear(hidden if positions is None else hidden.index_select(0, positions), self._head)
        if low_rank is not None:
            local = (local + F.linear(*low_rank)).to(local.dtype)
        return gather_from_tensor_model_parallel_region(local, group=self.tp_group)[:, : self.true_vocab_size]

    @property
    def _head(self) -> Tensor:
        """This rank's rows of the head."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def _low_rank(self, hidden: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """(A x at ``positions`` on every rank, this rank's rows of B) of an adapter on the head (peft/lora.py).

        The head is never called as a module, so that its logits need not be held whole.
        """
        adapter = getattr(self.output_layer, "lora", None)
        if adapter is None:
            return None
        low, b = adapter.head_factors(hidden)
        low = low[:, 0]
        return (low if positions is None else low.index_select(0, positions)), b

    def _whole(self, hidden: Tensor) -> Tensor:
        """The whole row on every rank; gradients of the ranks' shares of the vocabulary are summed on the way back."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)


def decoder_transformer_config(text: TextConfig, topology: Topology, options: ModelOptions) -> TransformerConfig:
    """megatron-core's config of a Llama-shaped decoder."""
    window = (text.sliding_window - 1, 0) if text.sliding_window is not None else None
    skipped = [int(i not in text.full_layers) for i in range(text.num_layers)] if text.full_layers else None
    sharper = text.rope_scaling.concentration**2 if text.rope_scaling is not None else 1.0
    root = text.head_dim**0.5 if text.attention_scale is None else 1 / text.attention_scale
    plain = sharper == 1.0 and root == text.head_dim**0.5
    config = transformer_config(
        topology,
        options,
        decoder=True,
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.ffn_hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_query_groups,
        kv_channels=text.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=text.norm_epsilon,
        gated_linear_unit=True,
        activation_func=gelu_tanh if text.gemma else F.silu,
        layernorm_zero_centered_gamma=text.gemma,
        add_bias_linear=False,
        add_qkv_bias=text.qkv_bias,
        window_size=window,
        window_attn_skip_freq=skipped,
        softmax_scale=None if plain else sharper / root,
    )
    setattr(config, "fp8_products", options.fp8)  # noqa: B010 - for layers/engines.py
    return config


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU (HF: gelu_pytorch_tanh)."""
    return F.gelu(x, approximate="tanh")
