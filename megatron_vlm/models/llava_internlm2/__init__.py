"""LLaVA: a CLIP tower, a two-layer MLP, and InternLM2 or a decoder of Llama's shape (LLaVA-1.5)."""

from functools import partial

from megatron_vlm.models.registry import ExportSpec, FamilySpec, Part

_part = partial(Part, __name__)

SPEC = FamilySpec(
    name="llava_internlm2",
    model_types=("llava",),
    config=_part("config:LlavaModelConfig.from_hf"),
    build=_part("model:build_llava"),
    processor=_part("processor:LlavaProcessor.from_pretrained"),
    mapping=_part("mapping:llava_mapping"),
    assemble=_part("assemble:assemble"),
    parts=_part("xtuner:find_parts"),
    reference=_part("reference:LlavaReference"),
    exports={
        "xtuner": ExportSpec(
            mapping=_part("xtuner:xtuner_mapping"),
            files=_part("xtuner:write_xtuner_files"),
            adapters={"": "llm_adapter", "visual_encoder": "visual_encoder_adapter"},
        )
    },
)
