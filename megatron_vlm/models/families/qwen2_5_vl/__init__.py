"""Qwen2.5-VL: a tower with windows over images of any size, a patch merger and a Qwen2.5 decoder with three positions a token."""

from functools import partial

from megatron_vlm.registry import LLAMA_LINEARS, AdapterSpec, FamilySpec, Part, RecipeSpec

_part = partial(Part, __name__)

SPEC = FamilySpec(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    config=_part("config:Qwen25VLConfig.from_hf"),
    build=_part("model:build_qwen2_5_vl"),
    processor=_part("processor:Qwen25VLProcessor.from_pretrained"),
    stop_ids=_part("processor:stop_ids"),
    video=_part("processor:video_settings"),
    mapping=_part("mapping:qwen2_5_vl_mapping"),
    reference=_part("reference:Qwen25VLReference"),
    adapters=AdapterSpec(
        language=rf"model\.language_model\.layers\.\d+\.{LLAMA_LINEARS}",
        vision=r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)",
        whole=lambda hf_config: {"connector": ("merger",), "vision": ("patch_embed", "blocks"), "head": ("lm_head",)},
    ),
    recipes=lambda hf_config: RecipeSpec(
        full="qwen2_5_vl/finetune_qwen2_5_vl", lora="qwen2_5_vl/lora_qwen2_5_vl", qlora="qwen2_5_vl/qlora_qwen2_5_vl"
    ),
)
