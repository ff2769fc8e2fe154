"""Idefics2: a SigLIP NaViT tower, a perceiver resampler and a Mistral or Llama 3 decoder."""

from dataclasses import replace
from functools import partial

from megatron_vlm.registry import CLIP_LINEARS, LLAMA_LINEARS, AdapterSpec, FamilySpec, Part, RecipeSpec

_part = partial(Part, __name__)

SPEC = FamilySpec(
    name="idefics2",
    model_types=("idefics2",),
    config=_part("config:Idefics2ModelConfig.from_hf"),
    build=_part("model:build_idefics2"),
    processor=_part("processor:Idefics2Processor.from_pretrained"),
    stop_ids=_part("processor:stop_ids"),
    mapping=_part("mapping:idefics2_mapping"),
    assemble=_part("assemble:assemble"),
    towers=("siglip",),
    decoders=("mistral", "qwen2", "qwen3"),
    connector="perceiver",
    add_end_of_utterance=_part("assemble:add_end_of_utterance"),
    reference=_part("reference:Idefics2Reference"),
    adapters=AdapterSpec(
        language=rf"model\.text_model\.layers\.\d+\.{LLAMA_LINEARS}",
        vision=rf"model\.vision_model\.encoder\.layers\.\d+\.{CLIP_LINEARS}",
        whole=lambda hf_config: {"connector": ("connector",), "vision": ("vision_model",), "head": ("lm_head",)},
    ),
    recipes=lambda hf_config: RecipeSpec(full="finetune_idefics2", lora="lora_idefics2", qlora="qlora_idefics2"),
)

LLAMA3_SPEC = replace(
    SPEC,
    name="idefics2_llama3",
    model_types=("idefics2/llama",),
    decoders=("llama", "internlm2"),
    recipes=lambda hf_config: replace(SPEC.recipes(hf_config), full="finetune_idefics2_llama3"),
)
