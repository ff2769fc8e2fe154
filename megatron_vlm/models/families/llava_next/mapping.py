"""Weight map of LLaVA-NeXT and LLaVA-OneVision: LLaVA's, and the newline."""

import dataclasses

from megatron_vlm.models.families.llava_internlm2 import mapping as llava
from megatron_vlm.models.families.llava_next.config import LlavaNextModelConfig
from megatron_vlm.weights.mapping import Mapping, Prefixes, direct

NAMES = Prefixes((*llava.NAMES.pairs, ("model.image_newline", "image_newline")))


def llava_next_mapping(config: LlavaNextModelConfig, tp: int = 1) -> Mapping:
    """Returns the map of a model; arguments as of ``FamilySpec.mapping``.

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    mapping = llava.llava_mapping(config, tp)
    return dataclasses.replace(
        mapping,
        entries=(*mapping.entries, direct("connector.newline", "image_newline")),
        hf_aliases=NAMES.file_name,
        module_name=NAMES.module_name,
    )
