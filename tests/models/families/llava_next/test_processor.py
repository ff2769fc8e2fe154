"""The processor of LLaVA-NeXT and LLaVA-OneVision against transformers' own: ids, pixels, sizes; labels worked out by hand."""

import io
import json

import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import open_image
from megatron_vlm.data.row import IGNORE_INDEX
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.llava_next.processor import LlavaNextProcessor
from megatron_vlm.testing.twins.llava_next import hf_processor, write_tiny_llava_next
from tests.models.families.idefics2.test_processor import ODD_IMAGES

TWINS = {
    "vicuna": {},
    "mistral": dict(text=dict(model_type="mistral"), vision=dict(image_size=38)),
    "onevision": dict(kind="LlavaOnevision"),
}
ANSWERS = {
    "vicuna": "<s>USER: {}What? ASSISTANT:| a seven</s>|USER: Sure? ASSISTANT:| yes</s>",
    "mistral": "<s>[INST] {}What? [/INST]| a seven</s>|[INST] Sure? [/INST]| yes</s>",
    "onevision": "<|im_start|>user {}What?<|im_end|><|im_start|>assistant\n|a seven<|im_end|>|"
    "<|im_start|>user \nSure?<|im_end|><|im_start|>assistant\n|yes<|im_end|>",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> (folder, transformers' processor)."""
    made = {}
    for name, options in TWINS.items():
        folder = tmp_path_factory.mktemp(name)
        write_tiny_llava_next(folder, **options)
        made[name] = folder, hf_processor(folder, options.get("kind", "LlavaNext"))
    return made


def ours(folder, **config):
    return LlavaNextProcessor.from_pretrained(folder, DataConfig(**{"seq_length": 4096, **config}))


def turns_of(*texts):
    return tuple(Turn(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts))


def assert_equal(processor, hf, turns, images, text, copies=None):
    """Ids and pixels are transformers' of ``text``; what is counted from sizes is what is encoded. Returns the sample."""
    sample = processor.encode("k", turns, images)
    theirs = (
        hf(text=text, images=[copies or images], return_tensors="pt") if images else hf(text=text, return_tensors="pt")
    )
    assert sample.input_ids.tolist() == theirs["input_ids"][0].tolist()
    for number, image in enumerate(sample.pixels):
        views = torch.stack(image.split(image.shape[2], 1))
        padded = theirs["pixel_values"][number]
        assert torch.equal(views, padded[: len(views)]) and not padded[len(views) :].any()
        assert list(sample.grids[number][2:]) == theirs["image_sizes"][number].tolist()
    count = processor.count(
        turns, [image.size for image in copies or images]
    )  # its header has a turned one's before turning
    assert (count.tokens, count.image_tokens) == (len(sample.input_ids), len(sample.image_positions))
    assert count.supervised == int((sample.labels[1:] != IGNORE_INDEX).sum())
    assert count.patches == sum(image.shape[1] // image.shape[2] for image in sample.pixels) * processor.anyres.side**2
    return sample


def text_of(name, image):
    parts = split(name)
    return "".join(parts).format(image).removeprefix("<s>")


def split(name):
    """What is asked and answered, in turn."""
    marked = ANSWERS[name].replace("<|", "\0").replace("|>", "\1")
    return [part.replace("\0", "<|").replace("\1", "|>") for part in marked.split("|")]


TURNS = turns_of("<image>\nWhat?", "a seven", "Sure?", "yes")


@pytest.mark.parametrize("name", TWINS)
def test_odd_images_equal_hf(folders, name):
    """As transformers reads them from files: an alpha channel is dropped, where a picture in memory would be blended."""
    folder, hf = folders[name]
    processor, views = ours(folder), set()
    for data in ODD_IMAGES.values():
        image = load_image(Image.open(io.BytesIO(data)))
        sample = assert_equal(processor, hf, TURNS, [open_image(data)], text_of(name, "<image>\n"), [image])
        views.add(sample.grids[0][:2])
    assert len(views) >= 3


@pytest.mark.parametrize("size", [(w, h) for w in (1, 27, 28, 57, 300) for h in (1, 28, 90)])
def test_shapes_equal_hf(folders, size):
    for name in ("vicuna", "onevision"):
        image = Image.effect_noise(size, 80).convert("RGB")
        assert_equal(ours(folders[name][0]), folders[name][1], TURNS, [image], text_of(name, "<image>\n"))


@pytest.mark.parametrize("name", TWINS)
def test_several_images_equal_hf(folders, name):
    """LLaVA-NeXT cuts each of them, LLaVA-OneVision none: single squares, padded in the colour of the mean."""
    folder, hf = folders[name]
    images = [Image.effect_noise(size, 80).convert("RGB") for size in ((30, 60), (64, 20), (28, 28))]
    turns = turns_of("<image><image>\nWhat?", "a seven", "Sure <image>?", "yes")
    text = text_of(name, "<image><image>\n").replace("Sure?", "Sure <image>?")
    if name == "onevision":
        turns = turns_of("<image><image>\nWhat?", "a seven", "<image>\nSure?", "yes")
        text = text_of(name, "<image><image>\n").replace("\nSure?", "<image>\nSure?")
    else:
        text = text.replace("Sure <image>?", "<image>\nSure ?")  # a question's only image goes in front
    sample = assert_equal(ours(folder), hf, turns, images, text)
    assert [bool(grid[0]) for grid in sample.grids] == [name != "onevision"] * 3


@pytest.mark.parametrize("name", TWINS)
def test_labels_and_questions(folders, name):
    """Supervised are answers and their end alone; a question is what the folder's chat template asks."""
    folder, hf = folders[name]
    processor, image = ours(folder, answer_loss_only=True), Image.new("RGB", (50, 20), (200, 9, 30))
    sample = processor.encode("k", TURNS, [image])
    kept = [token for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist()) if label != IGNORE_INDEX]
    assert processor.tokenizer.decode(kept) == "".join(split(name)[1::2])
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    asked = hf.apply_chat_template(chat, add_generation_prompt=True)
    expected = hf(text=asked, images=[[image]], return_tensors="pt")["input_ids"][0].tolist()
    turn = Turn(role="user", text="<image>\nWhat?")
    assert processor.encode_prompt([turn], [image]).input_ids.tolist() == expected


def test_pretraining_takes_no_loss_on_images(folders):
    sample = ours(folders["vicuna"][0]).encode("k", TURNS, [Image.new("RGB", (50, 20))])
    assert (sample.labels[sample.image_positions] == IGNORE_INDEX).all()
    assert int((sample.labels == IGNORE_INDEX).sum()) == 1 + len(sample.image_positions)  # and BOS


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize"),
        ("preprocessor_config.json", {"crop_size": {"height": 30, "width": 30}}, "crop_size .* is not the model's"),
        (
            "preprocessor_config.json",
            {"image_grid_pinpoints": [[28, 28]]},
            "image_grid_pinpoints .* is not the model's",
        ),
        ("config.json", {"image_token_index": 3}, "image_token_index 3"),
        ("chat_template.jinja", "{{ messages[0]['content'][1]['text'] }}!", "its chat template asks 'a!', as none of"),
        ("chat_template.jinja", None, ""),
    ],
)
def test_files(folders, tmp_path, file, change, message):
    for path in folders["mistral"][0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / file
    if change is None:  # without a template the prompt is that of the published models with such a decoder
        path.unlink()
        assert ours(tmp_path).template.name == "mistral"
        return
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        ours(tmp_path)


def test_data_settings(folders):
    folder, _ = folders["vicuna"]
    assert ours(folder, template="mistral").template.name == "mistral"
    with pytest.raises(ConfigError, match="no effect on LlavaNext"):
        ours(folder, image_size=56)
