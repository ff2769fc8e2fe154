"""What a family promises is there: the registry names its parts by text, which no type checker follows."""

import dataclasses
from functools import partial

import pytest

from megatron_vlm import registry
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.types import Processor
from megatron_vlm.models.family_config import FamilyConfig, ImageConfig
from megatron_vlm.registry import FAMILIES, Part


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_of_a_family_is_there(name):
    spec = registry.get(name)
    values = [*vars(spec).values(), *(value for export in spec.exports.values() for value in vars(export).values())]
    parts = [value.func if isinstance(value, partial) else value for value in values]
    found = [part.resolve() for part in parts if isinstance(part, Part)]
    assert spec.name == name and len(found) >= 4 and all(map(callable, found))


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(AttributeError, match="no_such_function"):
        Part("megatron_vlm.models.families.internlm2", "config:no_such_function").resolve()


def members(protocol) -> set[str]:
    """Names that a protocol, and those it extends, ask for."""
    own = {name for base in protocol.__mro__ if getattr(base, "_is_protocol", False) for name in vars(base)}
    own |= {name for base in protocol.__mro__ for name in vars(base).get("__annotations__", {})}
    return {name for name in own if not name.startswith("_")}


def lacks(kind, protocol) -> set[str]:
    """Members of a protocol that a class has neither as a field nor as a method."""
    return members(protocol) - {field.name for field in dataclasses.fields(kind)} - set(dir(kind))


@pytest.mark.parametrize("name", FAMILIES)
def test_config_and_processor_have_all_that_the_house_calls(name):
    spec = registry.get(name)
    config, processor = (part.resolve().__self__ for part in (spec.config, spec.processor))
    tower = "vision" in {field.name for field in dataclasses.fields(config)}
    assert not lacks(config, ImageConfig if tower else FamilyConfig)
    assert not lacks(processor, Processor) - (set() if tower else {"mean", "std"})


def test_the_protocols_name_what_is_called():
    assert {"count", "encode", "encode_prompt", "decode", "stop_ids", "filler_token_id"} <= members(Processor)
    assert members(ImageConfig) == {"text", "to_dict", "vision", "expected_image", "image_cost"}
    assert lacks(EncodedSample, Processor) >= {"encode_prompt", "fingerprint"}
