"""Packages that are not there: named as pip knows them."""

from megatron_vlm.packages import missing, pins, pip_line


def test_a_missing_module_is_named_by_its_package():
    assert "the package pillow is not installed: pip install" in missing("PIL.Image")
    assert "the package megatron-core is not installed" in missing("megatron.core.parallel_state")
    assert "the package no_such is not installed: pip install no_such, or" in missing("no_such.inner")
    assert missing("megatron_vlm.cli") is None and missing(None) is None


def test_pins_are_those_of_this_installation():
    version, extra = pins()["transformers"]
    assert extra == "" and pip_line("transformers", version) == f"pip install 'transformers=={version}'"
    assert f"pip install 'transformers=={version}'" in missing("transformers")
