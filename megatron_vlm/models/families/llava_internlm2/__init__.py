"""LLaVA: a CLIP or SigLIP tower, a two-layer MLP, and InternLM2 or a decoder of Llama's shape (LLaVA-1.5)."""

from functools import partial

from megatron_vlm.registry import (
    CLIP_LINEARS,
    LLAMA_LINEARS,
    AdapterSpec,
    ExportSpec,
    FamilySpec,
    Part,
    RecipeSpec,
)

_part = partial(Part, __name__)

SPEC = FamilySpec(
    name="llava_internlm2",
    model_types=("llava",),
    config=_part("config:LlavaModelConfig.from_hf"),
    build=_part("model:build_llava"),
    processor=_part("processor:LlavaProcessor.from_pretrained"),
    stop_ids=_part("processor:stop_ids"),
    mapping=_part("mapping:llava_mapping"),
    assemble=_part("assemble:assemble"),
    towers=("clip", "siglip"),
    decoders=("internlm2", "llama", "mistral", "qwen2", "qwen3"),
    connector="mlp",
    parts=_part("xtuner:find_parts"),
    reference=_part("reference:LlavaReference"),
    adapters=AdapterSpec(
        language=rf"model\.language_model\.layers\.\d+\.{LLAMA_LINEARS}",
        vision=rf"model\.vision_tower\.encoder\.layers\.\d+\.{CLIP_LINEARS}",
        whole=lambda hf_config: {
            "connector": ("multi_modal_projector",),
            "vision": ("vision_tower",),
            "head": ("lm_head",),
        },
    ),
    recipes=lambda hf_config: RecipeSpec(
        full="llava_internlm2/finetune_llava_internlm2",
        lora="llava_internlm2/qlora_llava_internlm2",
        qlora="llava_internlm2/qlora_llava_internlm2",
    ),
    exports={
        "xtuner": ExportSpec(
            mapping=_part("xtuner:xtuner_mapping"),
            files=_part("xtuner:write_xtuner_files"),
            adapters={"": "llm_adapter", "visual_encoder": "visual_encoder_adapter"},
        )
    },
)
