"""InternVL2 to 3.5: an InternViT tower over tiles, pixel shuffle with an MLP connector; a decoder."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_vlm.registry import LLAMA_LINEARS, AdapterSpec, ExportSpec, FamilySpec, Part, RecipeSpec

_part = partial(Part, __name__)

_mapping = _part("mapping:internvl3_mapping")


def _export(naming: str) -> ExportSpec:
    return ExportSpec(mapping=partial(_mapping, naming=naming), files=partial(_part("naming:write_files"), naming))


def _whole(hf_config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    own = hf_config.get("model_type") == "internvl_chat"
    connector, vision = ("mlp1", "vision_model") if own else ("multi_modal_projector", "vision_tower")
    fused = own and (hf_config.get("llm_config") or {}).get("model_type") == "internlm2"
    return {"connector": (connector,), "vision": (vision,), "head": ("output" if fused else "lm_head",)}


SPEC = FamilySpec(
    name="internvl3",
    model_types=("internvl_chat", "internvl"),
    config=_part("config:InternVL3ModelConfig.from_hf"),
    build=_part("model:build_internvl3"),
    processor=_part("processor:InternVL3Processor.from_pretrained"),
    stop_ids=_part("processor:stop_ids"),
    mapping=_mapping,
    assemble=_part("assemble:assemble"),
    towers=("intern_vit", "internvl_vision"),
    decoders=("internlm2", "llama", "mistral", "qwen2", "qwen3"),
    connector="pixel_shuffle",
    reference=_part("reference:reference_of"),
    exports={"chat": _export("chat"), "hf": _export("hf")},
    drop_path=True,
    adapters=AdapterSpec(
        language=r"(language_model\.model|model\.language_model)\.layers\.\d+\."
        rf"({LLAMA_LINEARS}|attention\.(wqkv|wo)|feed_forward\.w[123])",
        vision=r"vision_model\.encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"  # in its own naming q, k and v are one
        r"|model\.vision_tower\.encoder\.layer\.\d+\.(attention\.(q_proj|k_proj|v_proj|projection_layer)|mlp\.fc[12])",
        whole=_whole,
    ),
    recipes=lambda hf_config: RecipeSpec(
        full="internvl3/finetune_internvl3", lora="internvl3/lora_internvl3", qlora="internvl3/qlora_internvl3"
    ),
    facts={
        "vision_select_layer": (("select_layer", "vision_feature_layer"), -1),
        "down_sample_ratio": (("downsample_ratio",), 0.5),
        "ps_version": (("ps_version",), "v2"),  # transformers' layout has the one order of version 2
    },
)
