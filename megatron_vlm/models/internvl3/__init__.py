"""InternVL3: an InternViT tower over tiles, pixel shuffle with an MLP connector and a Qwen2.5 decoder."""

from typing import Any

from megatron_vlm.models.registry import ExportSpec, FamilySpec


def _config(hf_config: dict[str, Any]) -> Any:
    from megatron_vlm.models.internvl3.config import InternVL3ModelConfig

    return InternVL3ModelConfig.from_hf(hf_config)


def _build(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.internvl3.model import build_internvl3

    return build_internvl3(*args, **kwargs)


def _processor(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.internvl3.processor import InternVL3Processor

    return InternVL3Processor.from_pretrained(*args, **kwargs)


def _mapping(*args: Any, **kwargs: Any) -> Any:
    from megatron_vlm.models.internvl3.mapping import internvl3_mapping

    return internvl3_mapping(*args, **kwargs)


def _reference(config: Any) -> Any:
    from megatron_vlm.models.internvl3.reference import InternVL3Reference

    return InternVL3Reference(config) if config.layout == "hf" else None


def _export(layout: str) -> ExportSpec:
    def files(hf_dir: Any, hf_config: dict[str, Any], directory: Any) -> None:
        from megatron_vlm.models.internvl3.layouts import write_files

        write_files(layout, hf_dir, hf_config, directory)

    return ExportSpec(mapping=lambda config: _mapping(config, layout=layout), files=files)


SPEC = FamilySpec(
    name="internvl3",
    model_types=("internvl_chat", "internvl"),
    config=_config,
    build=_build,
    processor=_processor,
    mapping=_mapping,
    reference=_reference,
    exports={"chat": _export("chat"), "hf": _export("hf")},
    drop_path=True,
)
