"""LLaVA: a CLIP tower, a two-layer MLP, and InternLM2 or a decoder of Llama's shape (LLaVA-1.5)."""

from pathlib import Path
from typing import Any

from megatron_vlm.models.registry import ExportSpec, FamilySpec


def _config(hf_config: dict[str, Any]) -> Any:
    from megatron_vlm.models.llava_internlm2.config import LlavaModelConfig

    return LlavaModelConfig.from_hf(hf_config)


def _build(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.llava_internlm2.model import build_llava

    return build_llava(*args, **kwargs)


def _processor(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.llava_internlm2.processor import LlavaProcessor

    return LlavaProcessor.from_pretrained(*args, **kwargs)


def _mapping(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.llava_internlm2.mapping import llava_mapping

    return llava_mapping(*args, **kwargs)


def _assemble(llm: Any, vision: Any, files: Path, options: dict[str, Any], projector: Any = None) -> Any:
    from megatron_vlm.models.llava_internlm2.assemble import AssembleOptions, assemble

    return assemble(llm, vision, files, AssembleOptions.from_dict(options), projector)


def _reference(config: Any) -> Any:
    from megatron_vlm.models.llava_internlm2.reference import LlavaReference

    return LlavaReference(config)


def _parts(directory: Path) -> dict[str, Path] | None:
    from megatron_vlm.models.llava_internlm2.xtuner import find_parts

    return find_parts(directory)


def _xtuner_mapping(config: Any) -> Any:
    from megatron_vlm.models.llava_internlm2.xtuner import xtuner_mapping

    return xtuner_mapping(config)


def _xtuner_files(hf_dir: Path, hf_config: dict[str, Any], directory: Path) -> None:
    from megatron_vlm.models.llava_internlm2.xtuner import write_xtuner_files

    write_xtuner_files(hf_dir, hf_config, directory)


SPEC = FamilySpec(
    name="llava_internlm2",
    model_types=("llava",),
    config=_config,
    build=_build,
    processor=_processor,
    mapping=_mapping,
    assemble=_assemble,
    parts=_parts,
    reference=_reference,
    exports={
        "xtuner": ExportSpec(
            mapping=_xtuner_mapping,
            files=_xtuner_files,
            adapters={"": "llm_adapter", "visual_encoder": "visual_encoder_adapter"},
        )
    },
)
