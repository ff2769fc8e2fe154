"""Image splitting against transformers (pixels, ids, logits), and prompts for generation."""

import io

import pytest
import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import open_image
from megatron_vlm.data.row import IGNORE_INDEX, row_from_samples
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import DataError
from megatron_vlm.models.families.idefics2.processor import Idefics2Processor
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import hf_reference, layout_logits
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from tests.models.families.idefics2.test_processor import LATENTS, ODD_IMAGES, hf_inputs, write_processor

SPLITTABLE = {name: data for name, data in ODD_IMAGES.items() if name not in ("line", "line across", "one pixel")}
LOGITS = 2e-5  # of the largest logit, as in test_model.py; measured 5e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("splitting")


@pytest.fixture(scope="module")
def hf(folder):
    return write_processor(folder, do_image_splitting=True)


def ours(folder, **config):
    return Idefics2Processor.from_pretrained(folder, DataConfig(seq_length=4096, **config))


@pytest.mark.parametrize("name", SPLITTABLE)
def test_views_of_odd_images_equal_hf(hf, folder, name):
    turns = (Turn(role="user", text="<image>What?"), Turn(role="assistant", text="seven"))
    processor = ours(folder)
    sample = processor.encode("k", turns, [open_image(SPLITTABLE[name])])
    theirs = hf_inputs(hf, turns, [Image.open(io.BytesIO(SPLITTABLE[name]))])
    assert torch.equal(sample.input_ids, theirs["input_ids"][0])
    assert len(sample.pixels) == 5 and len(sample.image_positions) == 5 * LATENTS
    for pixels, values, mask in zip(sample.pixels, theirs["pixel_values"][0], theirs["pixel_attention_mask"][0]):
        height, width = pixels.shape[1:]
        assert torch.equal(pixels, values[:, :height, :width]) and int(mask.sum()) == height * width
    count = processor.count(turns, [open_image(SPLITTABLE[name]).size])
    if name != "turned":  # its header has the size before turning
        assert (count.tokens, count.image_tokens) == (len(sample.input_ids), 5 * LATENTS)
        assert count.patches == sum((p.shape[1] // 14) * (p.shape[2] // 14) for p in sample.pixels)


def test_several_images_and_turns(hf, folder):
    turns = (
        Turn(role="user", text="<image><image>Which?"),
        Turn(role="assistant", text="one"),
        Turn(role="user", text="And <image>now"),
        Turn(role="assistant", text="two"),
    )
    images = [Image.open(io.BytesIO(ODD_IMAGES[name])) for name in ("photo", "digit", "cmyk")]
    sample = ours(folder).encode("k", turns, images)
    theirs = hf_inputs(hf, turns, images)
    assert torch.equal(sample.input_ids, theirs["input_ids"][0]) and len(sample.pixels) == 15
    # A conversation that is cut to its first exchange keeps the ten views of its two images.
    short = ours(folder, on_too_long="truncate").count(turns[:2], [image.size for image in images[:2]]).tokens
    cut = Idefics2Processor.from_pretrained(folder, DataConfig(seq_length=short, on_too_long="truncate"))
    assert len(cut.encode("k", turns, images).pixels) == 10


def test_an_image_without_quarters_is_left_out(hf, folder):
    turns = (Turn(role="user", text="<image>What?"), Turn(role="assistant", text="seven"))
    assert ours(folder).count(turns, [(1, 50)]).reason.text == "image_too_small"
    assert ours(folder, image_splitting=False).count(turns, [(1, 50)]).reason.text == ""


def test_prompt_equals_hf_generation_prompt(hf, folder):
    for splitting in (True, False):
        processor = ours(folder, image_splitting=splitting)
        hf.image_processor.do_image_splitting = splitting
        image = Image.new("RGB", (60, 50), (9, 200, 30))
        turns = (Turn(role="user", text="<image>What?"),)
        sample = processor.encode_prompt(turns, [image])
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
        text = hf.apply_chat_template([message], add_generation_prompt=True)
        theirs = hf(text=text, images=[image], return_tensors="pt")
        assert torch.equal(sample.input_ids, theirs["input_ids"][0])
        assert len(sample.pixels) == theirs["pixel_values"].shape[1]
        assert (sample.labels == IGNORE_INDEX).all()
        ends = processor.tokenizer.ids("<end_of_utterance>") + processor.tokenizer.ids("</s>")
        assert set(processor.stop_ids) == set(ends)
        assert processor.decode([*processor.tokenizer.ids(" two dogs"), *ends]) == "two dogs"
        with pytest.raises(DataError, match="1 <image> placeholders for 0 images"):
            processor.encode_prompt(turns, [])
    hf.image_processor.do_image_splitting = True


def test_logits_equal_hf(tmp_path):
    """What the processor makes of two images, split, through both models."""
    model = write_tiny_idefics2(tmp_path)
    processor = Idefics2Processor.from_pretrained(tmp_path, DataConfig(seq_length=1024, image_splitting=True))
    images = [Image.open(io.BytesIO(ODD_IMAGES[name])) for name in ("photo", "digit")]
    turns = (Turn(role="user", text="<image>\n<image>\nWhat?"), Turn(role="assistant", text="seven and two"))
    sample = processor.encode("k", turns, images)
    assert len(sample.pixels) == 10
    loss, logits, _ = hf_reference(model, [sample], gradients=False)
    (result,) = run_distributed(layout_logits, str(tmp_path), [row_from_samples([sample])], {}, {})
    difference = float((result["logits"][0] - logits).abs().max())
    print(f"logits {difference:.1e} of {float(logits.abs().max()):.1f}")
    assert difference <= LOGITS * float(logits.abs().max())
    assert abs(result["loss"] - loss) <= 2e-6 * loss
