"""The processor of Gemma 3 against transformers' own: ids, token types, pixels; labels worked out by hand."""

import io
import json

import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import open_image
from megatron_vlm.data.row import IGNORE_INDEX, row_from_samples
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.models.families.gemma3.processor import Gemma3Processor
from megatron_vlm.testing.twins.gemma3 import hf_processor, tiny_config, tiny_tokenizer, write_processor
from tests.models.families.idefics2.test_processor import ODD_IMAGES

SIDE, TOKENS = 36, 9


def write(folder, **images):
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    config.save_pretrained(folder)
    write_processor(folder, tokenizer, config, **images)
    return hf_processor(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, transformers' processor)."""
    folder = tmp_path_factory.mktemp("gemma3")
    return folder, write(folder)


def ours(folder, **config):
    return Gemma3Processor.from_pretrained(folder, DataConfig(**{"seq_length": 4096, **config}))


def turns_of(*texts, system=None):
    turns = [Turn(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts)]
    return tuple([Turn(role="system", text=system)] * (system is not None) + turns)


def theirs_of(hf, turns, images, **options):
    messages = []
    for turn in turns:
        content = []
        for number, text in enumerate(turn.text.split("<image>")):
            content += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
        messages.append({"role": turn.role, "content": content})
    prompt = hf.apply_chat_template(messages, tokenize=False)
    options = {"images": [images], **options} if images else {}
    return hf(text=[prompt.removeprefix("<bos>")], return_tensors="pt", **options)


def assert_equal(processor, hf, turns, images, copies=None, **options):
    """Ids, types and pixels are transformers'; what is counted from sizes is what is encoded. Returns the sample."""
    sample, theirs = processor.encode("k", turns, images), theirs_of(hf, turns, copies or images, **options)
    assert sample.input_ids.tolist() == theirs["input_ids"][0].tolist()
    assert theirs["token_type_ids"][0].nonzero()[:, 0].tolist() == sample.image_positions.tolist()
    if images:
        assert torch.equal(torch.stack(sample.pixels), theirs["pixel_values"])
    count = processor.count(turns, [image.size for image in images])
    assert (count.tokens, count.image_tokens) == (len(sample.input_ids), len(sample.image_positions))
    assert count.supervised == int((sample.labels[1:] != IGNORE_INDEX).sum())
    assert (count.patches, count.image_tokens) == (36 * len(sample.pixels), TOKENS * len(sample.pixels))
    assert [b - a for a, b in row_from_samples([sample]).runs] == [TOKENS] * len(sample.pixels)
    return sample


def test_odd_images_equal_hf(made):
    folder, hf = made
    for name, data in ODD_IMAGES.items():
        if name == "turned":
            continue
        image = load_image(Image.open(io.BytesIO(data)))
        assert_equal(ours(folder), hf, turns_of("<image>\nWhat is it?", "seven"), [open_image(data)], [image])


def test_pan_and_scan_equals_hf(made):
    """Crops of images of every shape, asked for by data.image_splitting; transformers' processor takes no file's word for it."""
    folder, hf = made
    processor, seen = ours(folder, image_splitting=True), set()
    generator = torch.Generator().manual_seed(0)
    for size in [(w, h) for w in (255, 300, 520, 800) for h in (256, 301, 700, 1290)]:
        small = torch.randint(0, 256, (11, 7, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(small.numpy()).resize(size)
        sample = assert_equal(processor, hf, turns_of("<image> What?", "x"), [image], do_pan_and_scan=True)
        seen.add(len(sample.pixels))
    assert seen == {1, 3, 4, 5}
    assert len(ours(folder).encode("k", turns_of("<image>", "x"), [image.resize((600, 300))]).pixels) == 1
    assert ours(folder).fingerprint != processor.fingerprint


def test_boxes_by_hand(made):
    crops = ours(made[0], image_splitting=True).crops
    assert crops(1000, 900) == crops(500, 250) == []  # no long image; crops would be too small
    assert crops(600, 500) == [(0, 0, 300, 500), (300, 0, 600, 500)]
    assert crops(501, 1600) == [(0, i, 501, min(i + 534, 1600)) for i in (0, 534, 1068)]
    assert crops(2600, 500) == [(i * 650, 0, (i + 1) * 650, 500) for i in range(4)]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(
    "texts",
    [
        ("Hello", "there"),
        ("<image>", "a cat"),
        ("<image> What?", " padded  "),
        ("Look: <image> and\n<image>\n, then <image><image>.", "two and\ntwo"),
        ("Is this<image>9", "yes\n\nuser: no", "And <image>?<image>", "日本語 café ✓ 🙂"),
    ],
)
def test_ids_equal_hf(made, texts, system):
    folder, hf = made
    images = [Image.new("RGB", (30 + 40 * i, 40), (9, 200, 30)) for i in range(sum(t.count("<image>") for t in texts))]
    assert_equal(ours(folder), hf, turns_of(*texts, system=system), images)


def test_labels_by_hand(made):
    """Loss on the answer and the token that ends its turn; on all texts but marks, where asked."""
    folder, _ = made
    turns, image = turns_of("<image>What?", "seven", "Sure?", "yes", system="Short."), Image.new("RGB", (40, 30))
    processor = ours(folder, answer_loss_only=True)
    sample = processor.encode("k", turns, [image])
    text = processor.tokenizer.decode(sample.labels[sample.labels != IGNORE_INDEX].tolist())
    assert text == "seven<end_of_turn>yes<end_of_turn>"
    assert processor.tokenizer.decode(sample.input_ids.tolist()) == (
        "<bos><start_of_turn>user\nShort.\n\n\n\n<start_of_image>" + "<image_soft_token>" * TOKENS + "<end_of_image>\n\nWhat?"
        "<end_of_turn>\n<start_of_turn>model\nseven<end_of_turn>\n<start_of_turn>user\nSure?<end_of_turn>\n"
        "<start_of_turn>model\nyes<end_of_turn>\n"
    )  # fmt: skip
    every = ours(folder, answer_loss_only=False).encode("k", turns, [image]).labels
    silent = {
        processor.tokenizer.token_id(t) for t in ("<bos>", "<start_of_image>", "<image_soft_token>", "<end_of_image>")
    }
    kept = sample.input_ids[every == IGNORE_INDEX].tolist()
    assert set(kept) - set(processor.tokenizer.ids("\n\n")) == silent
    quiet = processor.encode("k", [*turns[:2], Turn(role="assistant", text="seven", loss=False), *turns[3:]], [image])
    assert "seven" not in processor.tokenizer.decode(quiet.labels[quiet.labels != IGNORE_INDEX].tolist())


def test_prompts_end_where_the_model_answers(made):
    folder, hf = made
    turns, image = turns_of("<image>What?"), Image.new("RGB", (40, 30))
    prompt = ours(folder).encode_prompt(turns, [image])
    whole = ours(folder).encode("k", [*turns, Turn(role="assistant", text="x")], [image])
    text = ours(folder).tokenizer.decode(prompt.input_ids.tolist())
    assert text.endswith("<start_of_turn>model\n") and (prompt.labels == IGNORE_INDEX).all()
    assert whole.input_ids[: len(prompt.input_ids)].equal(prompt.input_ids)
    stops = {hf.tokenizer.eos_token_id, hf.tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    assert set(ours(folder).stop_ids) == stops
    assert ours(folder).decode([*ours(folder).tokenizer.ids("four"), *stops]) == "four"


def test_images_are_never_cut(made):
    folder, _ = made
    turns = turns_of("Show", "this <image> is two and three")
    picture = Image.new("RGB", (40, 30))
    whole = ours(folder).encode("k", turns, [picture])
    end = int(whole.image_positions[-1]) + 2  # with the token that closes it
    fits = ours(folder, seq_length=end, on_too_long="truncate")
    assert len(fits.encode("k", turns, [picture]).pixels) == 1
    short = ours(folder, seq_length=end - 1, on_too_long="truncate")
    with pytest.raises(DataError, match="too_long"):
        short.encode("k", turns, [picture])


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize false"),
        ("preprocessor_config.json", {"do_resize": None}, "do_resize null"),
        ("preprocessor_config.json", {"resample": None}, "resample null"),
        ("preprocessor_config.json", {"size": {"height": 24, "width": 36}}, "this model's tower"),
        ("processor_config.json", {"image_seq_length": 7}, "image_seq_length 7 is not built for this model: only 9"),
        ("config.json", {"image_token_index": 3}, "image_token_id 3"),
        ("chat_template.jinja", "{{ messages[1]['content'][1]['text'] }}", "chat template that is not Gemma 3's"),
        ("chat_template.jinja", None, ""),
    ],
)
def test_files(tmp_path, file, change, message):
    hf = write(tmp_path)
    path = tmp_path / file
    if change is None:  # without a template the prompt is the published models'
        path.unlink()
        assert_equal(ours(tmp_path), hf, turns_of("<image>What?", "x"), [Image.new("RGB", (40, 30))])
        return
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        ours(tmp_path)


def test_what_the_published_files_leave_to_transformers(tmp_path):
    write(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    names = ("do_convert_rgb", "do_pan_and_scan", "pan_and_scan_max_num_crops")
    path.write_text(json.dumps({**json.loads(path.read_text()), **dict.fromkeys(names)}))
    picture = Image.new("RGB", (40, 30), (200, 10, 90))
    assert_equal(ours(tmp_path), hf_processor(tmp_path), turns_of("<image>What?", "x"), [picture])


def test_data_settings(made):
    folder, _ = made
    for settings, message in (({"image_size": 40}, "no effect on Gemma 3"), ({"template": "vicuna"}, "template")):
        with pytest.raises(ConfigError, match=message):
            ours(folder, **settings)
