"""What a chat template of the Idefics family writes before the first turn, and that another template is refused."""

from types import SimpleNamespace

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.processing.utterances import written_first
from megatron_vlm.testing.twins.smolvlm import TEMPLATE

TOKENIZER = SimpleNamespace(special_tokens_map={"bos_token": "<s>"})


@pytest.mark.parametrize(
    ("template", "first"),
    [(None, None), (TEMPLATE, ""), ("{{ bos_token }}" + TEMPLATE, "<s>"), ("<s>" + TEMPLATE, "<s>")],
)
def test_the_beginning(tmp_path, template, first):
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    assert written_first(tmp_path, TOKENIZER, "SmolVLM", "", "<s>") == first


@pytest.mark.parametrize("template", ["Hello " + TEMPLATE, TEMPLATE.replace("capitalize", "upper")])
def test_another_template_is_refused(tmp_path, template):
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(
        ConfigError, match=r"not SmolVLM's: it makes .*, not '<s>User:<image>a<end_of_utterance>\\nAssis"
    ):
        written_first(tmp_path, TOKENIZER, "SmolVLM", "", "<s>")
