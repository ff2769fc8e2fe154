"""The one table of flags."""

import typing

from megatron_vlm.options.aliases import (
    IGNORED,
    LAUNCH_LISTS,
    LAUNCH_SWITCHES,
    LAUNCH_VALUES,
    LISTS,
    REFUSED,
    SWITCHES,
    VALUES,
)
from megatron_vlm.options.flag_values import FlagValues
from megatron_vlm.options.flags import FLAG_FIELDS
from megatron_vlm.training.run_config import RunConfig


def test_every_key_of_the_table_exists():
    fields = RunConfig.__dataclass_fields__
    keys = {*VALUES.values(), *LISTS.values(), *(key for key, _ in SWITCHES.values())}
    for key in keys:
        section, name, *inside = key.split(".")
        assert name in (known := fields[section].type.__dataclass_fields__), key
        if inside:
            assert inside[0] in typing.get_args(known[name].type)[0].__dataclass_fields__, key


def test_a_flag_stands_in_one_table_only():
    flags = [*VALUES, *LISTS, *SWITCHES, *IGNORED, *REFUSED, *FLAG_FIELDS]
    assert len(flags) == len(set(flags))
    more = [*LAUNCH_VALUES, *LAUNCH_SWITCHES]
    assert not set(more) & set(flags) and not set(LAUNCH_LISTS) & (set(flags) - set(LISTS))


def test_flags_that_need_more_to_be_understood_have_a_field():
    assert set(FLAG_FIELDS.values()) <= {f"--{name}" for name in FlagValues.__dataclass_fields__} | set(
        FlagValues.__dataclass_fields__
    )
