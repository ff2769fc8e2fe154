"""Idefics2: a SigLIP NaViT tower, a perceiver resampler and a Mistral or Llama 3 decoder."""

from dataclasses import replace
from functools import partial

from megatron_vlm.models.registry import FamilySpec, Part

_part = partial(Part, __name__)

SPEC = FamilySpec(
    name="idefics2",
    model_types=("idefics2",),
    config=_part("config:Idefics2ModelConfig.from_hf"),
    build=_part("model:build_idefics2"),
    processor=_part("processor:Idefics2Processor.from_pretrained"),
    mapping=_part("mapping:idefics2_mapping"),
    add_end_of_utterance=_part("assemble:add_end_of_utterance"),
    reference=_part("reference:Idefics2Reference"),
)

LLAMA3_SPEC = replace(
    SPEC, name="idefics2_llama3", model_types=("idefics2/llama",), assemble=_part("assemble:assemble")
)
