"""Weight map of InternVL in both of its namings: the same full tensors, under the original's or transformers' names.

Transformers' naming has InternLM2 as the Llama that it is, query, key and value apart.
"""

from typing import Literal

from megatron_vlm.models.families.internlm2.mapping import internlm2_entries
from megatron_vlm.models.families.internvl3.config import InternVL3ModelConfig
from megatron_vlm.models.parts.decoder import check_tensor_parallel, llama_entries
from megatron_vlm.models.parts.internvit import internvit_entries
from megatron_vlm.models.parts.projector import projector_entries
from megatron_vlm.weights.mapping import Mapping, Prefixes

_TOWERS = {"chat": "vision_model.", "hf": "vision_tower."}
_CONNECTORS = {  # linears and norm
    "chat": ("mlp1.1", "mlp1.3", "mlp1.0"),
    "hf": tuple(f"multi_modal_projector.{name}" for name in ("linear_1", "linear_2", "layer_norm")),
}
NAMES = Prefixes(  # of transformers' naming
    (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head", "language_model.lm_head"),
    )
)


def internvl3_mapping(
    config: InternVL3ModelConfig,
    tp: int = 1,
    naming: Literal["chat", "hf"] | None = None,
) -> Mapping:
    """Returns the map of a model; arguments as of ``FamilySpec.mapping``, and ``naming`` (chat or hf) (None: the model's own).

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    check_tensor_parallel(config.text, tp)
    naming = naming or config.layout
    *linears, norm = _CONNECTORS[naming]
    fused = naming == "chat" and config.text.model_type == "internlm2"
    lm = "language_model."
    decoder = (
        internlm2_entries(config.text, lm)
        if fused
        else llama_entries(config.text, f"{lm}model.", f"{lm}lm_head.weight")
    )
    head, embedding = ("output", "tok_embeddings") if fused else ("lm_head", "embed_tokens")
    tied = {f"{lm}{head}.weight": f"{lm}model.{embedding}.weight"}
    entries = [
        *internvit_entries(config.vision, tp, naming, _TOWERS[naming]),
        *projector_entries("connector.", linears, norm),
        *decoder,
    ]
    return Mapping(
        entries=tuple(entries),
        vocab_size=config.text.vocab_size,
        hf_tied=tied if config.text.tie_word_embeddings else {},
        hf_aliases=NAMES.file_name,
        module_name=NAMES.module_name if naming == "hf" else str,
    )
