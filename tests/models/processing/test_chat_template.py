"""Chat templates of strangers: rendered as transformers does, or refused within seconds."""

import json
import time

import pytest

from megatron_vlm import registry
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.processing.chat_template import MAX_TEMPLATE, chat_template, render
from megatron_vlm.testing.twins.idefics2 import CHAT_TEMPLATE, tiny_idefics2_config, tiny_tokenizer
from megatron_vlm.testing.twins.internvl3 import TEMPLATE

TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a <b> 'c'"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "b\n"}]},
]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
BOMBS = {
    LOOPS: "runs for more than|takes more",
    "{% set t = namespace(s='x') %}{% for a in range(99) %}{% set t.s = t.s ~ t.s %}{% endfor %}": "takes more|writes more",
    "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}": "writes more than",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "nested too deeply|takes more",
    "{% for m in messages %}": "TemplateSyntaxError",
    "{{ messages.__class__.__mro__ }}{{ messages[0].x.y }}": "SecurityError|UndefinedError",
    "{{ raise_exception('only text') }}": "only text",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ ('%0' ~ '9' * 9 ~ 'd') % 1 }}": "takes more|writes more|Error",
    "(" * 100_000 + "{{ " + "(" * 100_000: "nested too deeply|Syntax|takes more|runs for",
}


def test_templates_render_as_transformers_does(tmp_path):
    tokenizer = tiny_tokenizer()
    for template in (
        CHAT_TEMPLATE,
        TEMPLATE,
        "{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}{{ eos_token }}",
    ):
        expected = tokenizer.apply_chat_template(TALK, chat_template=template, tokenize=False)
        assert render(template, TALK, tmp_path, **tokenizer.special_tokens_map) == expected


@pytest.mark.parametrize("number", range(len(BOMBS)))
def test_a_bad_template_is_refused_in_time(tmp_path, number):
    template, message = list(BOMBS.items())[number]
    start = time.process_time(), time.monotonic()
    with pytest.raises(ConfigError, match=f"chat template of {tmp_path} cannot be used: .*({message})"):
        render(template, TALK, tmp_path)
    assert time.process_time() - start[0] < 2 and time.monotonic() - start[1] < 30  # this process only waits


def test_a_model_folder_with_a_bomb(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tiny_idefics2_config(tokenizer).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_seq_len": 5}))
    (tmp_path / "chat_template.jinja").write_text(LOOPS)
    with pytest.raises(ConfigError, match="cannot be used"):
        registry.get("idefics2").processor(tmp_path, DataConfig(seq_length=64))
    (tmp_path / "chat_template.jinja").write_text("x" * (MAX_TEMPLATE + 1))
    with pytest.raises(ConfigError, match=r"more than 1,048,576 bytes"):
        chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text('{"chat_template": [3]}')
    with pytest.raises(ConfigError, match="'chat_template' must be a text, this is list"):
        chat_template(tmp_path)
