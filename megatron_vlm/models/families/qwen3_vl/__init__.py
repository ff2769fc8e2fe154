"""Qwen3-VL: a tower with learned positions over images, mergers of some of its layers (DeepStack), a Qwen3 decoder."""

from functools import partial

from megatron_vlm.registry import LLAMA_LINEARS, AdapterSpec, FamilySpec, Part, RecipeSpec

_part = partial(Part, __name__)

SPEC = FamilySpec(
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    config=_part("config:Qwen3VLConfig.from_hf"),
    build=_part("model:build_qwen3_vl"),
    processor=_part("processor:Qwen3VLProcessor.from_pretrained"),
    stop_ids=_part("processor:stop_ids"),
    mapping=_part("mapping:qwen3_vl_mapping"),
    reference=_part("reference:Qwen3VLReference"),
    adapters=AdapterSpec(
        language=rf"model\.language_model\.layers\.\d+\.{LLAMA_LINEARS}",
        vision=r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])",
        whole=lambda hf_config: {
            "connector": ("merger", "deepstack_merger_list"),
            "vision": ("patch_embed", "pos_embed", "blocks"),
            "head": ("lm_head",),
        },
    ),
    recipes=lambda hf_config: RecipeSpec(
        full="qwen3_vl/finetune_qwen3_vl", lora="qwen3_vl/lora_qwen3_vl", qlora="qwen3_vl/qlora_qwen3_vl"
    ),
)
