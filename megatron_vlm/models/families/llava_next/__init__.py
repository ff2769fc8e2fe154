"""LLaVA-NeXT (1.6) and LLaVA-OneVision: a tower over the whole and tiles of an image, a two-layer MLP, a decoder."""

from functools import partial

from megatron_vlm.registry import CLIP_LINEARS, LLAMA_LINEARS, AdapterSpec, FamilySpec, Part, RecipeSpec

_part = partial(Part, __name__)

SPEC = FamilySpec(
    name="llava_next",
    model_types=("llava_next", "llava_onevision"),
    config=_part("config:LlavaNextModelConfig.from_hf"),
    build=_part("model:build_llava_next"),
    processor=_part("processor:LlavaNextProcessor.from_pretrained"),
    stop_ids=_part("processor:stop_ids"),
    mapping=_part("mapping:llava_next_mapping"),
    reference=_part("reference:LlavaNextReference"),
    adapters=AdapterSpec(
        language=rf"model\.language_model\.layers\.\d+\.{LLAMA_LINEARS}",
        vision=rf"model\.vision_tower\.encoder\.layers\.\d+\.{CLIP_LINEARS}",
        whole=lambda hf_config: {
            "connector": (
                "multi_modal_projector",
            ),  # PEFT saves modules: the newline, a bare parameter, stays as it is
            "vision": ("vision_tower",),
            "head": ("lm_head",),
        },
    ),
    recipes=lambda hf_config: RecipeSpec(
        full="llava_next/finetune_llava_next", lora="llava_next/lora_llava_next", qlora="llava_next/qlora_llava_next"
    ),
)
