"""What lies in a folder is opened as what it is, or the message lists what it could be."""

import pytest

from megatron_vlm.conversion.convert import hf2mg
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConfigError, ConversionError


def test_neither_one_nor_the_other(tmp_path):
    with pytest.raises(
        ConversionError, match=r"neither an HF model .*nor Megatron weights .*nor a training checkpoint"
    ):
        open_source(tmp_path)


def test_a_whole_model_has_no_base(twins):
    with pytest.raises(ConfigError, match=r"--base .*: .* is a whole model, which has no base: leave it out"):
        open_source(twins("mistral"), base=twins("llama"))


def test_a_release_of_megatron_weights_is_opened(twins, tmp_path):
    hf2mg(twins("mistral"), tmp_path / "run" / "release", tp=2)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("release")
    with open_source(tmp_path / "run") as source:
        assert source.kind == "megatron" and source.directory == tmp_path / "run" / "release"
