"""The processor of Idefics3 and SmolVLM against transformers' own: ids, pixels, mask; labels worked out by hand."""

import io
import json

import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.formats.records import VideoSettings
from megatron_vlm.data.images.pictures import open_image, probe_image
from megatron_vlm.data.images.video import sampled
from megatron_vlm.data.row import IGNORE_INDEX
from megatron_vlm.data.sample import Turn, Video
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.models.families.smolvlm.processor import SmolVLMProcessor
from megatron_vlm.testing.twins.smolvlm import hf_processor, tiny_config, tiny_tokenizer, write_processor
from tests.models.families.idefics2.test_processor import ODD_IMAGES, hf_inputs
from tests.models.processing.transformers_videos import metadata, smolvlm_text, video_processor

MOST, SIDE, TOKENS = 4, 38, 9  # tiles along the longer edge, pixels and tokens of one
KINDS = ("SmolVLM", "Idefics3")


def write(folder, kind="SmolVLM", **images):
    tokenizer = tiny_tokenizer(kind, MOST)
    config = tiny_config(tokenizer, kind)
    config.save_pretrained(folder)
    write_processor(folder, tokenizer, config, MOST, **images)
    return hf_processor(folder, kind)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> (folder, transformers' processor)."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = folder, write(folder, kind)
    return made


def ours(folder, **config):
    return SmolVLMProcessor.from_pretrained(folder, DataConfig(**{"seq_length": 4096, **config}))


def turns_of(*texts):
    return tuple(Turn(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts))


def assert_equal(processor, hf, turns, images, copies=None):
    """Ids, pixels and mask are transformers'; what is counted from sizes is what is encoded. Returns the sample."""
    sample, theirs = processor.encode("k", turns, images), hf_inputs(hf, turns, copies or images)
    assert sample.input_ids.tolist() == theirs["input_ids"][0].tolist()
    assert torch.equal(torch.stack(sample.pixels), theirs["pixel_values"][0])
    assert theirs["pixel_attention_mask"].all()  # no tile has padding
    count = processor.count(turns, [image.size for image in images])
    assert (count.tokens, count.image_tokens) == (len(sample.input_ids), len(sample.image_positions))
    assert count.supervised == int((sample.labels[1:] != IGNORE_INDEX).sum())
    assert count.patches == sum((p.shape[1] // 6) * (p.shape[2] // 6) for p in sample.pixels)
    assert count.image_tokens == TOKENS * len(sample.pixels)
    return sample


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splitting", [True, False])
def test_odd_images_equal_hf(folders, monkeypatch, kind, splitting):
    """As transformers reads them from files: an alpha channel is dropped, where a picture in memory would be blended."""
    folder, hf = folders[kind]
    processor = ours(folder, image_splitting=splitting)
    monkeypatch.setattr(hf.image_processor, "do_image_splitting", splitting)
    grids = set()
    for name, data in ODD_IMAGES.items():
        image = load_image(Image.open(io.BytesIO(data)))
        if name == "turned":  # its header has the size before turning
            assert processor.grid(probe_image(data)[1:]) == ((MOST, 3) if splitting else (0, 0))
            continue
        sample = assert_equal(processor, hf, turns_of("<image>\nWhat is it?", "seven"), [open_image(data)], [image])
        grids.add(processor.grid(image.size))
        assert len(sample.pixels) == 1 + grids_of(sample, processor)
    assert len(grids) >= 4 if splitting else grids == {(0, 0)}


def grids_of(sample, processor):
    """Tiles that the prompt names."""
    ids = sample.input_ids.tolist()
    places = processor.around[2:]
    return sum(ids.count(place) for place in places)


@pytest.mark.parametrize("size", [(w, h) for w in (1, 37, 38, 39, 151, 152, 153, 300) for h in (1, 38, 77, 152, 400)])
def test_grids_of_every_shape_equal_hf(folders, size):
    folder, hf = folders["SmolVLM"]
    image = Image.new("RGB", size, (9, 200, 30))
    theirs = hf.image_processor([image], return_row_col_info=True)
    assert ours(folder).grid(size) == (theirs["rows"][0][0], theirs["cols"][0][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "texts",
    [
        ("Hello", "there"),
        ("<image>", "a cat"),
        ("<image> What?", " padded  "),
        ("Look: <image> and\n<image>\n, then <image><image>.", "two and\ntwo"),
        ("Is this<image>9", "yes\n\nUser: no", "And <image>?<image>", "日本語 café ✓ 🙂"),
    ],
)
def test_ids_equal_hf(folders, kind, texts):
    folder, hf = folders[kind]
    images = [Image.new("RGB", (30 + 40 * i, 40), (9, 200, 30)) for i in range(sum(t.count("<image>") for t in texts))]
    turns = (Turn(role="system", text="You are brief."), *turns_of(*texts))
    processor = ours(folder)
    sample = processor.encode("k", turns, images)
    assert sample.input_ids.tolist() == hf_inputs(hf, turns, images)["input_ids"][0].tolist()
    assert sample.input_ids.tolist().count(1) == 1  # BOS, once
    # The question of the last answer is transformers' prompt for generation.
    asked = [m for m in turns if m is not turns[-1]]
    content = [
        {"role": t.role, "content": [{"type": "text", "text": t.text}]} for t in asked if "<image>" not in t.text
    ]
    if len(content) == len(asked):
        text = hf.apply_chat_template(content, add_generation_prompt=True)
        prompt = hf.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert processor.encode_prompt(asked, []).input_ids.tolist() == prompt


def shown(processor, sample, supervised):
    """The text of the tokens that are, or are not, supervised."""
    return processor.tokenizer.decode(
        [
            t
            for t, label in zip(sample.input_ids.tolist(), sample.labels.tolist())
            if (label != IGNORE_INDEX) == supervised
        ]
    )


def test_labels(folders):
    folder, _ = folders["SmolVLM"]
    turns = turns_of("<image>What?", "a seven", "Sure?", "yes")
    images, tile = [Image.new("L", (9, 18))], "<image>" * TOKENS
    expanded = "".join(
        "".join(f"<fake_token_around_image><row_{row}_col_{column}>{tile}" for column in (1, 2)) + "\n"
        for row in (1, 2, 3, 4)
    )
    expanded += f"\n<fake_token_around_image><global-img>{tile}<fake_token_around_image>"
    pretraining = ours(folder)
    sample = pretraining.encode("k", turns, images)
    # All text is supervised, down to the line breaks between turns; an image is not, line breaks and all, and neither is BOS.
    assert shown(pretraining, sample, False) == f"<|im_start|>{expanded}"
    assert shown(pretraining, sample, True) == (
        "User:What?<end_of_utterance>\nAssistant: a seven<end_of_utterance>\n"
        "User: Sure?<end_of_utterance>\nAssistant: yes<end_of_utterance>\n"
    )
    answers = ours(folder, answer_loss_only=True)
    text = shown(answers, answers.encode("k", turns, images), True)
    assert text == " a seven<end_of_utterance> yes<end_of_utterance>"
    assert answers.decode(answers.tokenizer.ids(" two dogs<end_of_utterance>")) == "two dogs"


@pytest.mark.parametrize("size, total, fps", [((160, 90), 90, 29.97), ((33, 70), 5000, 24.0), ((38, 38), 1, 5.0)])
def test_video_equals_hf(folders, size, total, fps):
    """Frames, their times in the prompt, ids and pixels are those of transformers' video processor and processor."""
    folder, hf = folders["SmolVLM"]
    processor = ours(folder)
    given = dict(
        video_sampling={"fps": 1.5, "max_frames": 9, "video_size": {"longest_edge": 1}},
        size={"longest_edge": MOST * SIDE},
    )
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor.frame_edge == settings["size"]["longest_edge"] == MOST * SIDE
    theirs = video_processor("smolvlm", "SmolVLMVideoProcessor", max_image_size={"longest_edge": SIDE}, **given)
    width, height = size
    whole = torch.randint(
        0, 256, (total, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    data, told = theirs.frames(whole, metadata(total, fps))
    taken = VideoSettings(sampling="ends", fps=1.5, max_frames=9)
    video = Video(frames=tuple(sampled(total, fps, taken)), total=total, fps=fps)
    assert list(video.frames) == told.frames_indices.tolist()
    frames = [Image.fromarray(whole[i].permute(1, 2, 0).numpy()) for i in video.frames]
    turns = (Turn(role="user", text="<video>What?", videos=(video,)), Turn(role="assistant", text="a cat"))
    sample = processor.encode("k", turns, frames)
    made = smolvlm_text(data, told, TOKENS)
    wanted = f"<|im_start|>User: {made}What?<end_of_utterance>\nAssistant: a cat<end_of_utterance>\n"
    assert sample.input_ids.tolist() == hf.tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert torch.equal(torch.stack(sample.pixels), data["pixel_values"][0])
    assert data["pixel_attention_mask"].all()
    count = processor.count(turns, [size] * len(frames))
    assert (count.tokens, count.image_tokens) == (len(sample.input_ids), TOKENS * len(frames))
    assert count.patches == sum((p.shape[1] // 6) * (p.shape[2] // 6) for p in sample.pixels)


def test_frames_written_by_hand_and_settings_of_videos(folders, tmp_path):
    folder, _ = folders["SmolVLM"]
    frames = [Image.new("RGB", (160, 90), (9, 20 * i, 30)) for i in range(3)]
    video = Video(frames=(0, 65, 130), total=131, fps=1.0)
    text = "You are provided the following series of three frames from a 0:02:11 [H:MM:SS] video.\n"
    text += "".join(f"\nFrame from {at}:<image>" for at in ("00:00", "01:05", "02:10")) + "\n\nWhat?"
    processor = ours(folder)
    by_hand = processor.encode("k", turns_of(text, "a cat"), frames)
    turns = (Turn(role="user", text="<video>What?", videos=(video,)), Turn(role="assistant", text="a cat"))
    sample = processor.encode("k", turns, frames)
    assert torch.equal(by_hand.input_ids, sample.input_ids)
    assert all(torch.equal(a, b) for a, b in zip(by_hand.pixels, sample.pixels, strict=True))
    # A picture beside the frames is cut as ever.
    mixed = processor.encode("k", turns_of("<image>Frame from 00:07: <image>Frame-3: <image>", "x"), frames)
    assert len(mixed.pixels) == 1 + MOST * 3 + 2
    # Where published files say how frames are taken, theirs holds; a file of videos alone comes before that of images.
    write(tmp_path)
    assert ours(tmp_path).video == VideoSettings(sampling="ends")
    own = {"video_sampling": {"fps": 0.5, "max_frames": 20, "video_size": {"longest_edge": 60}}}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(own))
    assert ours(tmp_path).video == VideoSettings(sampling="ends", max_frames=20, fps=0.5)
    assert ours(tmp_path).frame_edge == 60
    assert ours(tmp_path).fingerprint != processor.fingerprint


def test_images_are_never_cut(folders):
    folder, _ = folders["SmolVLM"]
    turns = turns_of("Show", "this <image> is two and three")
    picture = Image.new("RGB", (40, 30))
    whole = ours(folder).encode("k", turns, [picture])
    end = int(whole.image_positions[-1]) + 2  # with the token that closes it
    fits = ours(folder, seq_length=end, on_too_long="truncate")
    assert len(fits.encode("k", turns, [picture]).pixels) == len(whole.pixels)
    short = ours(folder, seq_length=end - 1, on_too_long="truncate")
    assert short.count(turns, [picture.size]).reason.text == "too_long"
    with pytest.raises(DataError, match="too_long"):
        short.encode("k", turns, [picture])


def test_data_settings(folders, tmp_path):
    folder, _ = folders["SmolVLM"]
    other = write(tmp_path, size={"longest_edge": 2 * SIDE})
    china = Image.open(io.BytesIO(ODD_IMAGES["photo"]))
    small = ours(folder, image_size=2 * SIDE)
    assert_equal(small, other, turns_of("<image>", "x"), [china])
    assert small.fingerprint != ours(folder).fingerprint
    for settings, message in (
        ({"image_size": SIDE - 1}, "set data.image_size to 38, one tile, up to 4096"),
        ({"image_size": 5 * SIDE}, "lacks <row_1_col_5>"),
        ({"shortest_edge": 20}, "no effect on SmolVLM"),
        ({"template": "vicuna"}, "template"),
    ):
        with pytest.raises(ConfigError, match=message):
            ours(folder, **settings)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize"),
        (
            "preprocessor_config.json",
            {"max_image_size": {"longest_edge": 30}},
            "tiles have 30 pixels a side and 9 tokens",
        ),
        ("processor_config.json", {"image_seq_len": 7}, "38 pixels a side and 7 tokens"),
        ("config.json", {"image_token_id": 3}, "image_token_id 3"),
        ("chat_template.jinja", "{{ messages[0]['content'][1]['text'] }}", "chat template that is not SmolVLM's"),
        ("chat_template.jinja", None, ""),
    ],
)
def test_files(tmp_path, file, change, message):
    hf = write(tmp_path)
    path = tmp_path / file
    if change is None:  # without a template the prompt is the published models'
        path.unlink()
        picture = [Image.new("RGB", (40, 30))]
        assert_equal(ours(tmp_path), hf, turns_of("<image>What?", "x"), picture)
        return
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        ours(tmp_path)
