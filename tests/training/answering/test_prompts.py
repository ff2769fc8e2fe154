"""Questions to a model."""

import pytest

from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.training.answering.prompts import EvaluateConfig, Prompt, encode_prompt


def test_images_come_first_unless_the_text_places_them():
    assert Prompt(text="What?", images=("a", "b")).turns == (Turn(role="user", text="<image>\n<image>\nWhat?"),)
    placed = Prompt(text="In <image>, what?", images=("a",), system="Be short.")
    assert placed.turns == (Turn(role="system", text="Be short."), Turn(role="user", text="In <image>, what?"))


def test_texts_and_mappings_are_questions():
    config = EvaluateConfig.from_dict({"prompts": ["Hello", {"text": "What?", "images": ["a.png"]}], "interval": 2})
    assert config.questions == (Prompt(text="Hello"), Prompt(text="What?", images=("a.png",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(prompts=["x"], interval=0), "interval must be at least 1, got 0"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(interval=2), r"has no effect without evaluate\.prompts"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig.from_dict(settings)


def test_an_image_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.png"):
        encode_prompt(None, Prompt(text="What?", images=(str(tmp_path / "absent.png"),)))
