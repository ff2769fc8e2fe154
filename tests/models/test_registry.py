"""What a family promises is there: the registry names its parts by text, which no type checker follows."""

from functools import partial

import pytest

from megatron_vlm import registry
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
