"""InternLM-XComposer2 (7b, vl-7b, 4khd-7b): a CLIP tower, a projection and InternLM2 with partial LoRA for image tokens."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_vlm.registry import CLIP_LINEARS, INTERNLM2_LINEARS, AdapterSpec, FamilySpec, Part, RecipeSpec

_part = partial(Part, __name__)


def _is_4khd(hf_config: Mapping[str, Any]) -> bool:
    """The variant that reads pictures in high definition: without an img_size, or with 16,384 positions."""
    return "img_size" not in hf_config or hf_config.get("max_length") == 16384


def _whole(hf_config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    separators = ("plora_glb_GN", "plora_sub_GN") if _is_4khd(hf_config) else ()
    return {"connector": ("vision_proj", *separators), "vision": ("vit",), "head": ("output",)}


def _recipes(hf_config: Mapping[str, Any]) -> RecipeSpec:
    end = "_4khd" if _is_4khd(hf_config) else ""
    full, lora = f"xcomposer2/finetune_xcomposer2{end}", f"xcomposer2/lora_xcomposer2{end}"
    return RecipeSpec(full=full, lora=lora, qlora=lora, accumulation=8)  # FT.py's, whose batch grows with the ranks


SPEC = FamilySpec(
    name="xcomposer2",
    model_types=("internlmxcomposer2", "internlm"),
    config=_part("config:XComposer2Config.from_hf"),
    build=_part("model:build_xcomposer2"),
    processor=_part("processor:XComposer2Processor.from_pretrained"),
    stop_ids=_part("processor:stop_ids"),
    mapping=_part("mapping:xcomposer2_mapping"),
    adapters=AdapterSpec(
        language=INTERNLM2_LINEARS,
        vision=rf"vit\.vision_tower\.(vision_model\.)?encoder\.layers\.\d+\.{CLIP_LINEARS}",
        whole=_whole,
        frozen_beside={"connector": "fix_sampler", "vision": "fix_vit"},
    ),
    recipes=_recipes,
    record_format="xcomposer",
)
