"""InternLM2: a Llama-shaped text model whose checkpoint keeps query, key and value in one fused ``wqkv``."""

from pathlib import Path
from typing import Any

from megatron_vlm.models.registry import ExportSpec, FamilySpec


def _config(hf_config: dict[str, Any]) -> Any:
    from megatron_vlm.models.internlm2.config import InternLM2ModelConfig

    return InternLM2ModelConfig.from_hf(hf_config)


def _build(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.internlm2.model import build_internlm2

    return build_internlm2(*args, **kwargs)


def _processor(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.internlm2.processor import InternLM2Processor

    return InternLM2Processor.from_pretrained(*args, **kwargs)


def _mapping(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.internlm2.mapping import internlm2_mapping

    return internlm2_mapping(*args, **kwargs)


def _llama_mapping(config: Any) -> Any:
    from megatron_vlm.models.internlm2.mapping import llama_mapping

    return llama_mapping(config)


def _llama_files(hf_dir: Path, hf_config: dict[str, Any], directory: Path) -> None:
    from megatron_vlm.models.internlm2.llama import write_llama_files

    write_llama_files(hf_dir, hf_config, directory)


SPEC = FamilySpec(
    name="internlm2",
    model_types=("internlm2",),
    config=_config,
    build=_build,
    processor=_processor,
    mapping=_mapping,
    exports={"llama": ExportSpec(mapping=_llama_mapping, files=_llama_files)},
)
