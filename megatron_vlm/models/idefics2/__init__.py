"""Idefics2: a SigLIP NaViT tower, a perceiver resampler and a Mistral or Llama 3 decoder."""

from typing import Any

from megatron_vlm.models.registry import FamilySpec


def _config(hf_config: dict[str, Any]) -> Any:
    from megatron_vlm.models.idefics2.config import Idefics2ModelConfig

    return Idefics2ModelConfig.from_hf(hf_config)


def _build(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.idefics2.model import build_idefics2

    return build_idefics2(*args, **kwargs)


def _processor(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.idefics2.processor import Idefics2Processor

    return Idefics2Processor.from_pretrained(*args, **kwargs)


def _mapping(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.idefics2.mapping import idefics2_mapping

    return idefics2_mapping(*args, **kwargs)


def _assemble(llm: Any, vision: Any, files: Any, options: dict[str, Any]) -> Any:
    from megatron_vlm.models.idefics2.assemble import AssembleOptions, assemble

    return assemble(llm, vision, files, AssembleOptions.from_dict(options))


def _add_end_of_utterance(model: Any, files: Any, options: dict[str, Any]) -> Any:
    from megatron_vlm.models.idefics2.assemble import AssembleOptions, add_end_of_utterance

    return add_end_of_utterance(model, files, AssembleOptions.from_dict(options))


def _reference(config: Any) -> Any:
    from megatron_vlm.models.idefics2.reference import Idefics2Reference

    return Idefics2Reference(config)


SPEC = FamilySpec(
    name="idefics2",
    model_types=("idefics2",),
    config=_config,
    build=_build,
    processor=_processor,
    mapping=_mapping,
    add_end_of_utterance=_add_end_of_utterance,
    reference=_reference,
)

LLAMA3_SPEC = FamilySpec(
    name="idefics2_llama3",
    model_types=("idefics2/llama",),
    config=_config,
    build=_build,
    processor=_processor,
    mapping=_mapping,
    add_end_of_utterance=_add_end_of_utterance,
    reference=_reference,
    assemble=_assemble,
)
