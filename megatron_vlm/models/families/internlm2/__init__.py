"""InternLM2: a Llama-shaped text model whose checkpoint keeps query, key and value in one fused ``wqkv``."""

from functools import partial

from megatron_vlm.registry import INTERNLM2_LINEARS, AdapterSpec, ExportSpec, FamilySpec, Part, RecipeSpec

_part = partial(Part, __name__)

SPEC = FamilySpec(
    name="internlm2",
    model_types=("internlm2",),
    config=_part("config:InternLM2ModelConfig.from_hf"),
    build=_part("model:build_internlm2"),
    processor=_part("processor:InternLM2Processor.from_pretrained"),
    stop_ids=_part("processor:stop_ids"),
    mapping=_part("mapping:internlm2_mapping"),
    exports={"llama": ExportSpec(mapping=_part("mapping:llama_mapping"), files=_part("llama:write_llama_files"))},
    adapters=AdapterSpec(language=INTERNLM2_LINEARS, whole=lambda hf_config: {"head": ("output",)}),
    recipes=lambda hf_config: RecipeSpec(
        full="internlm2/finetune_internlm2", lora="internlm2/qlora_internlm2", qlora="internlm2/qlora_internlm2"
    ),
)
