"""InternLM-XComposer2 (7b, vl-7b, 4khd-7b): a CLIP tower, a projection and InternLM2 with partial LoRA for image tokens."""

from typing import Any

from megatron_vlm.models.registry import FamilySpec


def _config(hf_config: dict[str, Any]) -> Any:
    from megatron_vlm.models.xcomposer2.config import XComposer2Config

    return XComposer2Config.from_hf(hf_config)


def _build(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.xcomposer2.model import build_xcomposer2

    return build_xcomposer2(*args, **kwargs)


def _processor(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.xcomposer2.processor import XComposer2Processor

    return XComposer2Processor.from_pretrained(*args, **kwargs)


def _mapping(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.xcomposer2.mapping import xcomposer2_mapping

    return xcomposer2_mapping(*args, **kwargs)


SPEC = FamilySpec(
    name="xcomposer2",
    model_types=("internlmxcomposer2", "internlm"),
    config=_config,
    build=_build,
    processor=_processor,
    mapping=_mapping,
)
