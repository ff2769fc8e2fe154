"""LLaVA's processor against transformers' own on the exported folder, and against XTuner's rules where they differ."""

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm import registry
from megatron_vlm.conversion.convert import export_hf, mg2hf, open_model
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_llava, write_tiny_parts

SIZES = [(28, 28), (40, 17), (17, 40), (100, 31), (5, 9), (29, 28)]  # width, height
TOKENS = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """template -> native folder assembled with it; ``vicuna`` is one on Llama, as transformers saves it."""
    root = tmp_path_factory.mktemp("llava")
    parts = write_tiny_parts(root / "parts")
    found = {}
    for template in ("internlm2_chat", "default"):
        found[template] = root / template
        with open_model(None, family="llava_internlm2", **parts, assemble={"template": template}) as source:
            export_hf(source, found[template])
    write_tiny_llava(root / "vicuna")
    return found | {"vicuna": root / "vicuna"}


def processor_of(folder, **data):
    config = DataConfig(**{"seq_length": 128, "answer_loss_only": True, **data})
    return registry.get("llava_internlm2").processor(folder, config)


def image_of(size, seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def turns(*texts, system=None):
    roles = [Turn(role="system", text=system)] if system else []
    return roles + [Turn(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("template", ["internlm2_chat", "vicuna"])
def test_pixels_equal_transformers(folders, template):
    """Padded to a square where the folder says so (LlavaImageProcessor), cropped where it does not (CLIP's)."""
    from transformers import AutoProcessor

    theirs = AutoProcessor.from_pretrained(folders[template]).image_processor
    ours = processor_of(folders[template])
    if ours.pad:
        with pytest.raises(ConfigError, match=r"jpeg_scaled_decoding has no effect.*do_pad"):
            processor_of(folders[template], jpeg_scaled_decoding=True)
    assert ours.pad == (template == "internlm2_chat") == bool(getattr(theirs, "do_pad", False))
    for number, size in enumerate(SIZES):
        image = image_of(size, number)
        expected = theirs(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(ours.pixels(image), expected), size


@pytest.mark.parametrize("template", ["internlm2_chat", "default"])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_prompt_equals_transformers(folders, template, images):
    """The exported chat template and processor give the ids that the model was trained on."""
    from transformers import AutoProcessor

    hf = AutoProcessor.from_pretrained(folders[template])
    pictures = [image_of((30, 20), seed) for seed in range(images)]
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": "What digit is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "seven"}]},
        {"role": "user", "content": [{"type": "text", "text": "How many cats?"}]},
    ]
    text = hf.apply_chat_template(chat, add_generation_prompt=True)
    expected = hf(text=text, images=pictures or None, return_tensors="pt")
    ours = processor_of(folders[template]).encode_prompt(
        turns("<image>\n" * images + "What digit is this?", "seven", "How many cats?", system="Be short."), pictures
    )
    assert ours.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert len(ours.image_positions) == TOKENS * images
    if images:
        assert torch.equal(torch.stack(ours.pixels), expected["pixel_values"])


def test_vicunas_prompt_is_tokenised_whole(folders):
    """LLaVA-1.5: 'USER: <image>\\nTEXT ASSISTANT: ANSWER</s>', as transformers tokenises it, its BOS in front."""
    from transformers import AutoProcessor

    hf = AutoProcessor.from_pretrained(folders["vicuna"])
    picture = image_of((30, 20))
    text = "USER: <image>\nWhat digit is this? ASSISTANT: seven</s>USER: How many cats? ASSISTANT: two</s>"
    expected = hf(text=text, images=picture, return_tensors="pt")["input_ids"][0].tolist()
    processor = processor_of(folders["vicuna"])
    sample = processor.encode("key", turns("<image>\nWhat digit is this?", "seven", "How many cats?", "two"), [picture])
    assert sample.input_ids.tolist() == expected
    supervised = [token for token in sample.labels.tolist() if token != -100]
    assert processor.tokenizer.decode(supervised) == " seven</s> two</s>"


def test_labels_and_image_positions(folders):
    """XTuner's rule: the question's only image goes in front, on a line of its own; the answer and its end are supervised."""
    processor = processor_of(folders["internlm2_chat"])
    text = ["What digit ", "is this?"]
    sample = processor.encode("key", turns(f"{text[0]}<image>\n{text[1]}", "seven"), [image_of((30, 20))])
    ids = processor.tokenizer.ids
    start, end = ids("<|im_start|>"), ids("<|im_end|>")
    image = [processor.image_token_id] * TOKENS
    head = [1, *start, *ids("user\n")]
    question = [*ids("\nWhat digit \nis this?"), *end, *ids("\n"), *start, *ids("assistant\n")]
    answer = [*ids("seven"), *end]
    assert sample.input_ids.tolist() == [*head, *image, *question, *answer, *ids("\n")]
    assert sample.image_positions.tolist() == list(range(len(head), len(head) + TOKENS))
    before = len(head) + TOKENS + len(question)
    assert sample.labels.tolist() == [*[-100] * before, *answer, *[-100] * len(ids("\n"))]
    count = processor.count(turns(f"{text[0]}<image>\n{text[1]}", "seven"), [(30, 20)])
    assert (count.tokens, count.image_tokens, count.patches) == (len(sample.input_ids), TOKENS, TOKENS)


def test_several_images_of_a_turn_keep_their_places(folders):
    processor = processor_of(folders["internlm2_chat"])
    sample = processor.encode(
        "key",
        turns("Is <image> like <image>?", "two", "<image> and?", "three"),
        [image_of((9, 9), i) for i in range(3)],
    )
    texts = [processor.tokenizer.ids(text) for text in ("Is ", " like ", "?")]
    positions = sample.image_positions.reshape(3, TOKENS)
    assert positions[1, 0] - positions[0, -1] == 1 + len(texts[1]) and len(sample.pixels) == 3
    assert sample.input_ids[positions[1, -1] + 1 :][: len(texts[2])].tolist() == texts[2]


def test_images_are_never_cut(folders):
    processor = processor_of(folders["internlm2_chat"], seq_length=TOKENS + 4, on_too_long="truncate")
    assert processor.count(turns("<image>\nWhat?", "two"), [(9, 9)]).reason.text == "too_long"
    two = turns("<image>\nWhat?", "two", "<image>\nWhat?", "three")
    whole = len(processor_of(folders["internlm2_chat"]).encode("key", two[:2], [image_of((9, 9))]).input_ids)
    processor = processor_of(folders["internlm2_chat"], seq_length=whole + TOKENS, on_too_long="truncate")
    sample = processor.encode("key", two, [image_of((9, 9)), image_of((9, 9), 1)])
    assert (len(sample.input_ids), len(sample.pixels)) == (whole, 1)


def test_reasons(folders):
    processor = processor_of(folders["internlm2_chat"], max_image_num=1, special_tokens_in_text="refuse")
    assert processor.count(turns("What?", "two"), [(9, 9)]).reason.text == "placeholders"
    assert processor.count(turns("<image><image>What?", "two"), [(9, 9)] * 2).reason.text == "max_image_num"
    assert processor.count(turns("<|im_end|>What?", "two"), []).reason.text == "control_tokens"
    with pytest.raises(DataError, match="1 <image> placeholders for 0 images"):
        processor.encode_prompt(turns("<image>What?"), [])


def test_the_folder_says_which_template(folders, caplog):
    assert processor_of(folders["default"]).template.name == "default"
    assert processor_of(folders["vicuna"]).template.name == "vicuna"
    assert processor_of(folders["default"], template="internlm2_chat").template.name == "internlm2_chat"
    assert "the chat template in" in caplog.text and "is default" in caplog.text
    with pytest.raises(ConfigError, match=r"lacks <\|im_start\|>, <\|im_end\|>, which data\.template internlm2_chat"):
        processor_of(folders["vicuna"], template="internlm2_chat")


def test_settings_that_say_nothing_are_refused(folders):
    with pytest.raises(ConfigError, match=r"data\.image_size 56: the CLIP tower takes 28 only"):
        processor_of(folders["vicuna"], image_size=56)
    with pytest.raises(ConfigError, match=r"data\.image_splitting True has no effect on LLaVA"):
        processor_of(folders["vicuna"], image_splitting=True)


def test_xtuners_folder_keeps_the_tokenizer(folders, tmp_path):
    mg2hf(folders["internlm2_chat"], tmp_path / "xtuner", naming="xtuner")
    text = registry.get("internlm2").processor(tmp_path / "xtuner", DataConfig(seq_length=64))
    ours = processor_of(folders["internlm2_chat"])
    prompt = turns("How many cats?")
    assert text.encode_prompt(prompt, []).input_ids.tolist() == ours.encode_prompt(prompt, []).input_ids.tolist()
