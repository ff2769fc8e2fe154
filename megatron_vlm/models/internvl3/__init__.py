"""InternVL3: an InternViT tower over tiles, pixel shuffle with an MLP connector and a Qwen2.5 decoder."""

from functools import partial

from megatron_vlm.models.registry import ExportSpec, FamilySpec, Part

_part = partial(Part, __name__)

_mapping = _part("mapping:internvl3_mapping")


def _export(layout: str) -> ExportSpec:
    return ExportSpec(mapping=partial(_mapping, layout=layout), files=partial(_part("layouts:write_files"), layout))


SPEC = FamilySpec(
    name="internvl3",
    model_types=("internvl_chat", "internvl"),
    config=_part("config:InternVL3ModelConfig.from_hf"),
    build=_part("model:build_internvl3"),
    processor=_part("processor:InternVL3Processor.from_pretrained"),
    mapping=_mapping,
    reference=_part("reference:reference_of"),
    exports={"chat": _export("chat"), "hf": _export("hf")},
    drop_path=True,
)
