"""Gemma 3: a SigLIP tower, pooling with one linear, and a decoder of local and global layers whose images see both ways."""

from functools import partial

from megatron_vlm.registry import CLIP_LINEARS, LLAMA_LINEARS, AdapterSpec, FamilySpec, Part, RecipeSpec

_part = partial(Part, __name__)

SPEC = FamilySpec(
    name="gemma3",
    model_types=("gemma3",),
    config=_part("config:Gemma3ModelConfig.from_hf"),
    build=_part("model:build_gemma3"),
    processor=_part("processor:Gemma3Processor.from_pretrained"),
    stop_ids=_part("processor:stop_ids"),
    mapping=_part("mapping:gemma3_mapping"),
    reference=_part("reference:Gemma3Reference"),
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
        full="gemma3/finetune_gemma3", lora="gemma3/lora_gemma3", qlora="gemma3/qlora_gemma3"
    ),
)
