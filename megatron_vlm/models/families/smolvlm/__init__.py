"""Idefics3, SmolVLM and SmolVLM2: a SigLIP tower over tiles, pixel shuffle with one linear and a Llama decoder."""

from functools import partial

from megatron_vlm.registry import CLIP_LINEARS, LLAMA_LINEARS, AdapterSpec, FamilySpec, Part, RecipeSpec

_part = partial(Part, __name__)

SPEC = FamilySpec(
    name="smolvlm",
    model_types=("smolvlm", "idefics3"),
    config=_part("config:SmolVLMModelConfig.from_hf"),
    build=_part("model:build_smolvlm"),
    processor=_part("processor:SmolVLMProcessor.from_pretrained"),
    stop_ids=_part("processor:stop_ids"),
    video=_part("processor:video_settings"),
    mapping=_part("mapping:smolvlm_mapping"),
    reference=_part("reference:SmolVLMReference"),
    adapters=AdapterSpec(
        language=rf"model\.text_model\.layers\.\d+\.{LLAMA_LINEARS}",
        vision=rf"model\.vision_model\.encoder\.layers\.\d+\.{CLIP_LINEARS}",
        whole=lambda hf_config: {"connector": ("connector",), "vision": ("vision_model",), "head": ("lm_head",)},
    ),
    recipes=lambda hf_config: RecipeSpec(
        full="smolvlm/finetune_smolvlm", lora="smolvlm/lora_smolvlm", qlora="smolvlm/qlora_smolvlm"
    ),
)
