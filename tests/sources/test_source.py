"""Which family a folder is of, and which namings it can be written in."""

import pytest

from megatron_vlm.conversion.convert import mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.testing.twins.model_folders import edited


def test_wrong_family(twins, tmp_path):
    with pytest.raises(ConversionError, match=r"family idefics2 .*'mistral'.*not idefics2_llama3"):
        open_source(twins("mistral"), "idefics2_llama3")
    with open_source(twins("llama"), "idefics2") as source:  # idefics2 reads any text model
        assert source.spec.name == "idefics2_llama3"
    other = edited(twins("mistral"), tmp_path, config=lambda config: config.update(model_type="bert"))
    with pytest.raises(ConversionError, match="no model family reads model_type 'bert'"):
        open_source(other)
    with pytest.raises(ConfigError, match=r"unknown model family 'idefics' .did you mean 'idefics2'"):
        open_source(twins("mistral"), "idefics")


def test_a_family_of_one_layout_offers_no_other(twins, tmp_path):
    with pytest.raises(ConfigError, match=r"^--as chat: family idefics2 has one layout alone: leave --as out$"):
        mg2hf(twins("mistral"), tmp_path / "hf", naming="chat")
