"""InternVL3Processor: tiles, ids and pixels against transformers' own, prompts and label masks as golden ids."""

import dataclasses
import io
import itertools
import json
import pickle

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from transformers.image_utils import load_image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import IGNORE_INDEX
from megatron_vlm.data.sample import Turn, Video
from megatron_vlm.errors import ConfigError, DataError, Reason
from megatron_vlm.models.families.idefics2.processor import Idefics2Processor
from megatron_vlm.models.families.internvl3.processor import InternVL3Processor
from megatron_vlm.models.families.internvl3.prompts import PROMPTS
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.internvl3 import (
    hf_processor,
    write_chat_layout,
    write_tiny_internvl2,
    write_tiny_internvl3,
)

SYSTEM, FIRST = PROMPTS["internvl2_5"].system, PROMPTS["internlm2-chat"].system
CHINA = Image.fromarray(load_sample_image("china.jpg"))
DIGIT = Image.fromarray((load_digits().images[7] * 15).astype(np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("internvl3")
    model = write_tiny_internvl3(root / "hf")
    write_chat_layout(root / "chat", model)
    return root


def processor_of(folders, layout="hf", **config):
    return InternVL3Processor.from_pretrained(folders / layout, DataConfig(**{"seq_length": 4096, **config}))


def turns_of(*texts, system=None):
    turns = [Turn(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts)]
    return ([Turn(role="system", text=system)] if system is not None else []) + turns


def odd_images():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    CHINA.resize((90, 50)).save(turned, "JPEG", exif=exif)
    rgba = CHINA.resize((70, 50)).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize((70, 50)))
    return {
        "photo": CHINA,
        "digit": DIGIT,
        "line": CHINA.resize((1, 90)),
        "ribbon": CHINA.resize((500, 20)),
        "tile": CHINA.resize((32, 32)),
        "two": CHINA.resize((64, 32)),
        "thirds": CHINA.resize((97, 64)),
        "rgba": rgba,
        "palette": CHINA.resize((45, 77)).convert("P"),
        "turned": Image.open(turned),
    }


@pytest.mark.parametrize("name", odd_images())
def test_tiles_and_ids_equal_transformers(folders, name):
    image = odd_images()[name]
    hf = hf_processor(folders / "hf")
    given = load_image(image)  # as transformers opens a path: upright, alpha dropped
    message = {"role": "user", "content": [{"type": "image", "image": given}, {"type": "text", "text": "What?"}]}
    system = {"role": "system", "content": SYSTEM}
    theirs = hf.apply_chat_template(
        [system, message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for layout in ("hf", "chat"):
        processor = processor_of(folders, layout)
        ours = processor.encode_prompt(turns_of("<image>\nWhat?"), [image])
        assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
        assert ours.pixels[0].dtype == torch.float32
        assert torch.equal(ours.pixels[0], torch.cat(list(theirs["pixel_values"]), 1))
        sample = assert_count_is_encode(processor, turns_of("<image>\nWhat?", "seven"), [image])
        assert torch.equal(sample.pixels[0], ours.pixels[0])


def assert_count_is_encode(processor, turns, images, options=None):
    options = options or {}
    sample = processor.encode("k", turns, images, 3, options)
    sizes = [tuple(reversed(np.asarray(image).shape[:2])) if not image.getexif() else (50, 90) for image in images]
    count = processor.count(turns, sizes, options)
    assert (count.tokens, count.image_tokens) == (len(sample.input_ids), len(sample.image_positions))
    assert count.supervised == int((sample.labels[1:] != IGNORE_INDEX).sum())
    tiles = sum(p.shape[1] // p.shape[2] for p in sample.pixels)
    assert count.image_tokens == tiles * processor.tile_tokens and count.patches == tiles * processor.tile_patches
    return sample


def shown(processor, sample):
    """The sample's text; what is not supervised in brackets, runs of image tokens as their number."""
    ids, masked = sample.input_ids, sample.labels == IGNORE_INDEX
    assert torch.equal(ids[~masked], sample.labels[~masked])
    edges = [0, *((masked[1:] != masked[:-1]).nonzero()[:, 0] + 1).tolist(), len(ids)]
    text = ""
    for start, end in itertools.pairwise(edges):
        part = processor.tokenizer.decode(ids[start:end].tolist())
        text += f"[{part}]" if masked[start] else part
    for number in (64, 52, 28, 12, 4):
        text = text.replace("<IMG_CONTEXT>" * number, f"({number})")
    return text


def test_labels_of_the_published_rule(folders):
    processor = processor_of(folders, answer_loss_only=True)
    turns = turns_of("<image>\nWhat?", "two dogs", "And <image>?", "a cat")
    sample = assert_count_is_encode(processor, turns, [CHINA.resize((32, 32)), CHINA.resize((64, 32))])
    assert shown(processor, sample) == (
        f"[<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<img>(4)</img>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n]two dogs<|im_end|>[\n<|im_start|>user\nAnd <img>(12)</img>?<|im_end|>\n"
        "<|im_start|>assistant\n]a cat<|im_end|>[\n]"
    )
    # A leading system turn takes the place of the default line.
    sample = assert_count_is_encode(processor, turns_of("Hi", "yes", system="Be brief."), [])
    text = "[<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n]yes<|im_end|>[\n]"
    assert shown(processor, sample) == text
    # All text, as in pre-training: image tokens and their marks stay out.
    whole = processor_of(folders)
    sample = whole.encode("k", turns_of("<image>\nHi", "yes", system=""), [CHINA.resize((32, 32))])
    assert shown(whole, sample) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n[<img>(4)</img>]\nHi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )


def test_prompts_of_the_generations(folders, tmp_path):
    """InternVL2 on InternLM2: BOS, no line breaks between turns, texts without outer white space; 2.5 on the same tokenizer."""
    write_tiny_internvl2(tmp_path)
    turns = turns_of("<image>\nWhat?", " two dogs\n", "And?", "a cat")
    first, later, plain = (
        InternVL3Processor.from_pretrained(
            folder,
            DataConfig(seq_length=4096, answer_loss_only=True, template=template, special_tokens_in_text="refuse"),
        )
        for folder, template in (
            (tmp_path / "chat", None),
            (tmp_path / "chat", "internvl2_5"),
            (folders / "chat", "Hermes-2"),
        )
    )
    image = CHINA.resize((32, 32))
    assert shown(first, assert_count_is_encode(first, turns, [image])) == (
        f"[<s><|im_start|>system\n{FIRST}<|im_end|><|im_start|>user\n<img>(4)</img>\nWhat?<|im_end|><|im_start|>assistant\n]"
        "two dogs<|im_end|>[<|im_start|>user\nAnd?<|im_end|><|im_start|>assistant\n]a cat<|im_end|>"
    )
    assert shown(later, later.encode("k", turns_of("Hi", "yes"), [])) == (
        f"[<s><|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n]yes<|im_end|>[\n]"
    )
    assert shown(plain, plain.encode("k", turns_of("Hi", " yes", system="S"), [])) == (
        "[<|im_start|>system\nS<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n] yes<|im_end|>"
    )
    # SentencePiece's own ids of each stretch between the marks.
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "chat" / "tokenizer.model"))
    start, end = (pieces.piece_to_id(f"[UNUSED_TOKEN_{number}]") for number in (146, 145))
    ids = [1]
    for text in (f"system\n{FIRST}", "user\nHi", "assistant\nyes"):
        ids += [start, *pieces.encode(text), end]
    assert first.encode("k", turns_of("Hi", "yes"), []).input_ids.tolist() == ids
    # transformers' processor of the same model as a Llama: its chat template and tokenizer write the same prompt.
    hf = hf_processor(tmp_path / "hf", (tmp_path / "hf" / "chat_template.jinja").read_text())
    messages = [
        {"role": "system", "content": FIRST},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]},
    ]
    theirs = hf.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for folder in ("chat", "hf"):
        processor = InternVL3Processor.from_pretrained(tmp_path / folder, DataConfig(seq_length=4096))
        ours = processor.encode_prompt(turns_of("<image>\nWhat?"), [image])
        assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
        assert torch.equal(ours.pixels[0], torch.cat(list(theirs["pixel_values"]), 1))


def test_prompts_that_are_not_built_are_refused(folders, tmp_path):
    content = json.loads((folders / "chat" / "config.json").read_text())
    for path in (folders / "chat").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**content, "template": "phi3-chat"}))
    with pytest.raises(
        ConfigError, match="template 'phi3-chat' is not built for InternVL: internvl2_5, internlm2-chat, Hermes-2 are"
    ):
        InternVL3Processor.from_pretrained(tmp_path, DataConfig(seq_length=64))


def test_golden_ids(folders):
    """Ids of a conversation written out, so that a change of the tokenizer's use cannot hide."""
    processor = processor_of(folders, answer_loss_only=True)
    special = {mark: processor.tokenizer.ids(mark)[0] for mark in ("<|im_start|>", "<|im_end|>", "<img>", "</img>")}
    newline = processor.tokenizer.ids("\n")
    words = {text: processor.tokenizer.ids(text) for text in ("system", "user", "assistant", "S", "Q", "\n\nA!")}
    start, end = [special["<|im_start|>"]], [special["<|im_end|>"]]
    header = [*start, *words["assistant"], *newline]
    answer = processor.tokenizer.ids("assistant\n\n\nA!")[len(words["assistant"]) + 1 :]
    expected = [
        *start, *words["system"], *newline, *words["S"], *end, *newline,
        *start, *words["user"], *newline, special["<img>"], *[processor.image_token_id] * 4, special["</img>"],
        *newline, *words["Q"], *end, *newline, *header, *answer, *end, *newline,
    ]  # fmt: skip
    turns = turns_of("<image>\nQ", "\n\nA!", system="S")
    sample = processor.encode("k", turns, [CHINA.resize((32, 32))])
    assert sample.input_ids.tolist() == expected
    labels = [IGNORE_INDEX] * len(expected)
    labels[-len(answer) - 2 : -1] = expected[-len(answer) - 2 : -1]
    assert sample.labels.tolist() == labels


def test_images_share_the_limit_of_tiles_and_frames_are_one_tile(folders):
    wide = CHINA.resize((128, 32))  # 4 x 1 tiles and a thumbnail
    processor = processor_of(folders)

    def tiles(text, number, options=None, **config):
        p = processor_of(folders, **config) if config else processor
        sample = assert_count_is_encode(p, turns_of(text, "x"), [wide] * number, options)
        return [pixels.shape[1] // 32 for pixels in sample.pixels]

    assert tiles("<image>", 1) == [5]
    assert tiles("<image><image><image>", 3) == [5, 5, 5]
    assert tiles("<image>" * 4, 4) == [4, 4, 4, 4]  # 12 // 4 = 3 tiles and a thumbnail each
    assert tiles("<image>" * 13, 13) == [1] * 13
    assert tiles("<image>", 1, {"max_dynamic_patch": 2}) == [3]  # the data set's own limit
    assert tiles("<image>", 1, max_dynamic_patch=1) == [1]
    assert tiles("<image>", 1, {"max_dynamic_patch": 2}, dynamic_image_size=False) == [1]
    assert tiles("<image>", 1, use_thumbnail=False) == [4]
    assert tiles("<image>", 1, min_dynamic_patch=5, max_dynamic_patch=8) == [6]
    assert tiles("Frame-1: <image>\nFrame-2: <image>\nWhat?", 2) == [1, 1]
    assert tiles("<image>\nFrame-1: <image>\nWhat?", 2) == [5, 1]
    # The published prompt of a video.
    text = shown(
        processor, processor.encode("k", turns_of("Frame-1: <image>\nFrame-2: <image>\nHi", "x", system=""), [wide] * 2)
    )
    assert "user\nFrame-1: [<img>(4)</img>]\nFrame-2: [<img>(4)</img>]\nHi<|im_end|>" in text
    video = Video(frames=(0, 9), total=10, fps=1.0)
    turns = [dataclasses.replace(turn, videos=(video,)) if "<video>" in turn.text else turn
             for turn in turns_of("<video>\nHi", "x", system="")]  # fmt: skip
    assert shown(processor, processor.encode("k", turns, [wide] * 2)) == text
    assert processor.count(turns, [wide.size] * 2).reason is Reason.NONE


def test_jpeg_augmentation_is_keyed_by_the_sample(folders):
    processor, turns, images = processor_of(folders), turns_of("<image>", "x"), [CHINA.resize((128, 32))]
    plain = processor.encode("k", turns, images, 1)
    one, again, other = (processor.encode("k", turns, images, seed, {"data_augment": True}) for seed in (1, 1, 2))
    assert torch.equal(one.pixels[0], again.pixels[0])
    assert not torch.equal(one.pixels[0], other.pixels[0]) and not torch.equal(one.pixels[0], plain.pixels[0])
    assert float((one.pixels[0] - plain.pixels[0]).abs().mean()) < 0.2  # quality 75 to 100 is mild
    assert torch.equal(processor.encode("k", turns, images, 2).pixels[0], plain.pixels[0])


def test_no_token_id_means_padding(folders):
    """The original's collator masks every token of id 0 from attention; here lengths say what is real."""
    processor = processor_of(folders, answer_loss_only=True)
    text = processor.tokenizer.decode([0])
    sample = processor.encode("k", turns_of("Hi" + text, text + "x" + text), [])
    assert (sample.input_ids == 0).sum() == 3
    assert (sample.labels == 0).sum() == 2


def test_truncation_takes_whole_turns_with_their_images(folders):
    turns = turns_of("<image>What?", "one two", "And <image>?", "three")
    images = [CHINA.resize((128, 32)), DIGIT]
    whole = processor_of(folders).encode("k", turns, images)
    first = processor_of(folders).encode("k", turns_of("<image>What?", "one two"), images[:1])
    processor = processor_of(folders, seq_length=len(whole.input_ids) - 1, on_too_long="truncate")
    sample = assert_count_is_encode(processor, turns, images)
    assert torch.equal(sample.input_ids, first.input_ids)
    assert torch.equal(sample.pixels[0], whole.pixels[0]) and len(sample.pixels) == 1
    drop = processor_of(folders, seq_length=64)
    assert drop.count(turns, [image.size for image in images]).reason.text == "too_long"
    with pytest.raises(DataError, match="too_long"):
        drop.encode("k", turns, images)


@pytest.mark.parametrize(
    "text, number, config, reason",
    [
        ("<image>", 0, {}, "placeholders"),
        ("hi", 1, {}, "placeholders"),
        ("<image><image>", 2, {"max_image_num": 1}, "max_image_num"),
        ("a<IMG_CONTEXT>b", 0, {"special_tokens_in_text": "refuse"}, "control_tokens"),
        ("a<|im_end|>b", 0, {"special_tokens_in_text": "refuse"}, "control_tokens"),
    ],
)
def test_reasons(folders, text, number, config, reason):
    turns, processor = turns_of(text, "x"), processor_of(folders, **config)
    assert processor.count(turns, [(8, 8)] * number).reason.text == reason
    with pytest.raises(DataError, match=reason):
        processor.encode("k", turns, [DIGIT] * number)


def test_generation_border_and_workers(folders):
    processor = processor_of(folders)
    end = processor.tokenizer.ids("<|im_end|>")
    assert processor.stop_ids == tuple(end)
    assert processor.decode([*processor.tokenizer.ids(" two dogs"), *end]) == "two dogs"
    with pytest.raises(DataError, match="1 <image> placeholders for 0 images"):
        processor.encode_prompt(turns_of("<image>"), [])
    twin = pickle.loads(pickle.dumps(processor))
    assert twin.fingerprint == processor.fingerprint == processor_of(folders).fingerprint
    assert twin.encode("k", turns_of("<image>", "x"), [DIGIT]).input_ids.tolist()
    others = [{"max_dynamic_patch": 6}, {"use_thumbnail": False}, {"image_size": 48}, {"answer_loss_only": True}]
    assert len({processor_of(folders, **other).fingerprint for other in others} | {processor.fingerprint}) == 5
    assert processor_of(folders, image_size=48).tile_tokens == 9


@pytest.mark.parametrize(
    "config, message",
    [
        ({"shortest_edge": 8}, "shortest_edge 8 has no effect on InternVL3"),
        ({"image_splitting": True}, "image_splitting True has no effect"),
        ({"template": "llama"}, "template 'llama'"),
        ({"image_size": 40}, "not a multiple of 16"),
        ({"min_dynamic_patch": 13}, "13 to 12 tiles"),
    ],
)
def test_settings_that_cannot_work_are_refused(folders, config, message):
    with pytest.raises(ConfigError, match=message):
        processor_of(folders, **config)


def test_other_families_refuse_the_settings_of_tiles(tmp_path):
    write_tiny_idefics2(tmp_path)
    with pytest.raises(ConfigError, match="max_dynamic_patch 6 has no effect on Idefics2"):
        Idefics2Processor.from_pretrained(tmp_path, DataConfig(seq_length=64, max_dynamic_patch=6))
