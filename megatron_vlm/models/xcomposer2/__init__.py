"""InternLM-XComposer2 (7b, vl-7b, 4khd-7b): a CLIP tower, a projection and InternLM2 with partial LoRA for image tokens."""

from functools import partial

from megatron_vlm.models.registry import FamilySpec, Part

_part = partial(Part, __name__)

SPEC = FamilySpec(
    name="xcomposer2",
    model_types=("internlmxcomposer2", "internlm"),
    config=_part("config:XComposer2Config.from_hf"),
    build=_part("model:build_xcomposer2"),
    processor=_part("processor:XComposer2Processor.from_pretrained"),
    mapping=_part("mapping:xcomposer2_mapping"),
)
