"""Questions to a model."""

import pytest

from megatron_vlm.data.formats.records import VideoSettings
from megatron_vlm.data.sample import Turn, Video
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.training.answering.prompts import EvaluateConfig, Prompt, encode_prompt
from tests.data.formats.make import write_pictures


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
        encode_prompt(Asked(), Prompt(text="What?", images=(str(tmp_path / "absent.png"),)))


class Asked:
    video = VideoSettings(max_frames=2)

    def encode_prompt(self, turns, images):
        return turns, [image.size for image in images]


def test_a_video_by_its_path(tmp_path):
    picture = write_pictures(tmp_path, 1) / "0.png"
    clip = write_pictures(tmp_path / "clip", 5)
    (turn,), sizes = encode_prompt(Asked(), Prompt(text="What?", images=(str(clip), str(picture))))
    assert turn.text == "<video>\n<image>\nWhat?" and len(sizes) == 3
    assert turn.videos == (Video(frames=(0, 1), total=2, fps=24.0),)
    with pytest.raises(DataError, match="0 <video> placeholders for 1 videos"):
        encode_prompt(Asked(), Prompt(text="<image>", images=(str(clip), str(picture))))
