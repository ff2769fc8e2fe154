"""Qwen25VLProcessor: ids, pixels and positions against transformers' own; labels by hand; limits of pixels; refusals."""

import dataclasses
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.image_utils import load_image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.formats.records import VideoSettings
from megatron_vlm.data.images.pictures import size_of_blocks
from megatron_vlm.data.images.video import sampled
from megatron_vlm.data.row import IGNORE_INDEX
from megatron_vlm.data.sample import Turn, Video
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.models.families.qwen2_5_vl.config import Qwen25VLConfig
from megatron_vlm.models.families.qwen2_5_vl.processor import Qwen25VLProcessor
from megatron_vlm.models.families.qwen2_5_vl.reference import hf_inputs
from megatron_vlm.models.processing.processor_files import set_pixels
from megatron_vlm.testing.twins.qwen2_5_vl import PIXELS, hf_processor, write_tiny_qwen2_5_vl
from tests.models.families.internvl3.test_processor import CHINA, odd_images, turns_of
from tests.models.processing.transformers_videos import metadata, video_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen2_5_vl")
    write_tiny_qwen2_5_vl(root)
    return root


def processor_of(folder, **config):
    return Qwen25VLProcessor.from_pretrained(folder, DataConfig(**{"seq_length": 1024, **config}))


def patches_of(pixels, patch=8, block=2):
    """[3, H, W] -> [patches, 3 * 2 * patch * patch] by plain numpy: block by block, each frame twice."""
    found = []
    for row in range(0, pixels.shape[1], patch * block):
        for column in range(0, pixels.shape[2], patch * block):
            for r in range(block):
                for c in range(block):
                    y, x = row + r * patch, column + c * patch
                    one = pixels[:, y : y + patch, x : x + patch].numpy()
                    found.append(np.stack([one, one], 1).reshape(-1))
    return np.stack(found)


def test_equal_to_transformers(folder):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).model
    assert_equal_to_transformers(hf_processor(folder), processor_of(folder), model)


def assert_equal_to_transformers(hf, ours, model):
    """Ids, pixels and the three positions of each token: images of odd sizes and modes, several in a conversation."""
    images = odd_images()
    cases = [*([name] for name in images), ["ribbon", "digit", "photo"]]
    for names in cases:
        given = [load_image(images[name]) for name in names]
        content = [
            part for image in given for part in ({"type": "image", "image": image}, {"type": "text", "text": "\nSo?"})
        ]
        theirs = hf.apply_chat_template(
            [{"role": "user", "content": content}, {"role": "assistant", "content": "\n\nTwo dogs."}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        text = "<image>\nSo?" * len(names)
        sample = ours.encode("k", turns_of(text, "\n\nTwo dogs."), [images[name] for name in names])
        assert sample.input_ids.tolist() == theirs["input_ids"][0].tolist()
        patches = np.concatenate([patches_of(image) for image in sample.pixels])
        assert np.array_equal(patches, theirs["pixel_values"].numpy()), names
        places, _ = model.get_rope_index(
            theirs["input_ids"],
            theirs["mm_token_type_ids"],
            theirs["image_grid_thw"],
            attention_mask=theirs["attention_mask"],
        )
        assert torch.equal(sample.position_ids, places[:, 0])
        count = ours.count(turns_of(text, "\n\nTwo dogs."), [image.size for image in given])
        assert (count.tokens, count.image_tokens, count.patches) == (
            len(sample.input_ids),
            len(sample.image_positions),
            len(patches),
        )
        assert count.supervised == int((sample.labels[1:] != IGNORE_INDEX).sum())
    text = ours.encode("k", turns_of("So?", "No."), [])
    assert torch.equal(text.position_ids, torch.arange(len(text.input_ids)).expand(3, -1))


@pytest.mark.parametrize(
    "size, total, fps, more",
    [
        ((70, 45), 50, 23.976, {}),
        ((33, 90), 7, 3.0, {}),
        ((64, 64), 1, 24.0, {}),
        ((120, 80), 300, 29.97, {"total": 9000}),
    ],
)
def test_videos_equal_transformers(folder, size, total, fps, more):
    """Frames, ids, pixels of pairs and positions of a video between images; an odd number of frames, a limit of all pixels."""
    hf = hf_processor(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).model
    limits = {"video_total_pixels": more["total"]} if more else {}
    ours = processor_of(folder, video_min_pixels=600, video_max_pixels=5000, **limits)
    tokens = dict(cap_pixels_per_frame=True, max_video_tokens=more["total"] / 0.9 / 16**2) if more else {}
    edges = {"shortest_edge": 600, "longest_edge": 5000}
    theirs = video_processor(
        "qwen2_vl", "Qwen2VLVideoProcessor", size=edges, patch_size=8, fps=2.0, max_frames=9, **tokens
    )
    whole = torch.randint(
        0, 256, (total, 3, *size[::-1]), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    told, taken = metadata(total, fps), VideoSettings(sampling="pairs", fps=2.0, max_frames=9)
    if total == 1:  # transformers divides by zero where it samples one frame
        theirs.sample_frames = lambda metadata: torch.tensor([0])
    data, told = theirs.frames(whole, told)
    video = Video(frames=tuple(sampled(total, fps, taken)), total=total, fps=fps)
    assert list(video.frames) == told.frames_indices.tolist()
    frames = [Image.fromarray(whole[i].permute(1, 2, 0).numpy()) for i in video.frames]
    pictures = [CHINA.resize((40, 20)), CHINA.resize((32, 48))]
    turns = turns_of("<image>See <video> and <image>", "Two dogs.")
    turns = [dataclasses.replace(turns[0], videos=(video,)), *turns[1:]]
    sample = ours.encode("k", turns, [pictures[0], *frames, pictures[1]])
    parts = [{"type": "image"}, {"type": "text", "text": "See "}, {"type": "video"}, {"type": "text", "text": " and "}]
    text = hf.apply_chat_template(
        [{"role": "user", "content": [*parts, {"type": "image"}]}, {"role": "assistant", "content": "Two dogs."}]
    )
    pad = type(hf).replace_video_token(SimpleNamespace(video_processor=theirs, video_token="<|video_pad|>"), data, 0)
    assert text.count("<|video_pad|>") == 1
    hf.video_token = None  # it would ask for the video's own processor
    inputs = hf(text=[text.replace("<|video_pad|>", pad)], images=pictures, return_tensors="pt")
    ids = inputs["input_ids"]
    assert sample.input_ids.tolist() == ids[0].tolist()
    # The seconds of a pair as the processor counts them, in 32 bits as a batch has them.
    seconds = torch.tensor([theirs.temporal_patch_size / told.sampled_fps])
    kinds = (ids == ours.image_token_id).int() + 2 * (ids == ours.video_token_id).int()
    places, _ = model.get_rope_index(ids, kinds, inputs["image_grid_thw"], data["video_grid_thw"], seconds)
    assert torch.equal(sample.position_ids, places[:, 0])
    made = hf_inputs(Qwen25VLConfig.from_hf(model.config.to_dict()), sample)
    assert torch.equal(made["pixel_values_videos"], data["pixel_values_videos"])
    assert torch.equal(made["pixel_values"], inputs["pixel_values"])
    assert torch.equal(made["video_grid_thw"], data["video_grid_thw"])
    count = ours.count(turns, [image.size for image in (pictures[0], *frames, pictures[1])])
    assert (count.tokens, count.image_tokens) == (len(sample.input_ids), len(sample.image_positions))
    assert count.patches == len(data["pixel_values_videos"]) + len(inputs["pixel_values"])
    assert ours.decode(sample.input_ids.tolist()).count("pad") == 0
    # A conversation that is cut loses whole videos.
    longer = [*turns, Turn(role="user", text="<video>?", videos=(video,)), Turn(role="assistant", text="No.")]
    short = dataclasses.replace(ours, seq_length=len(ids[0]) + 3, truncate=True)
    cut = short.encode("k", longer, [pictures[0], *frames, pictures[1], *frames])
    assert torch.equal(cut.input_ids[: len(ids[0])], ids[0]) and len(cut.pixels) == len(sample.pixels)


def test_settings_of_videos(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    # Without settings of videos those of images hold, as in transformers.
    assert processor_of(tmp_path).frame_pixels == PIXELS and processor_of(tmp_path).total_pixels is None
    own = {
        "size": {"shortest_edge": 700, "longest_edge": 7000},
        "fps": 3.0,
        "max_frames": 20,
        "cap_pixels_per_frame": True,
        "patch_size": 8,
        "merge_size": 2,
    }
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(own))
    for wrong, words in (
        ({"num_frames": 8}, "num_frames 8 of videos"),
        ({"min_frames": 6}, "min_frames 6 of videos"),
        ({"image_mean": [0.1, 0.2, 0.3]}, r"mean of videos \(0\.1, 0\.2, 0\.3\)"),
        ({"resample": 2}, "resample of videos 2"),
        ({"patch_size": 14}, "patch_size of videos 14"),
    ):
        (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({**own, **wrong}))
        with pytest.raises(ConfigError, match=words):
            processor_of(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({**own, "min_frames": 4, "num_frames": None}))
    processor = processor_of(tmp_path)
    assert (processor.frame_pixels, processor.total_pixels) == ((700, 7000), int(128_000 * 16**2 * 0.9))
    assert processor.video == VideoSettings(sampling="pairs", fps=3.0, max_frames=20)
    assert processor.fingerprint != processor_of(tmp_path, video_max_pixels=6000).fingerprint
    with pytest.raises(ConfigError, match=r"700 to 300 pixels.*data\.video_max_pixels"):
        processor_of(tmp_path, video_max_pixels=300)


@pytest.mark.parametrize("place", ["images", "file", "nested"])
def test_an_export_sees_images_and_frames_as_its_run_did(folder, tmp_path, caplog, place):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own = {"size": {"shortest_edge": 300, "longest_edge": 9000}, "fps": 3.0, "patch_size": 8, "merge_size": 2}
    if place == "file":
        (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(own))
    elif place == "nested":
        (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": own}))
    bounds = {"min_pixels": 512, "max_pixels": 3000}
    for more in ({}, {"video_max_pixels": 2048, "video_total_pixels": 9216}):
        trained = processor_of(tmp_path, **bounds | more)
        set_pixels(tmp_path, bounds | more)
        exported = processor_of(tmp_path)
        assert (exported.min_pixels, exported.max_pixels) == (512, 3000)
        assert (exported.frame_pixels, exported.video) == (trained.frame_pixels, trained.video)
        assert exported.total_pixels == trained.total_pixels
    assert not caplog.text
    set_pixels(tmp_path, {"video_total_pixels": 9217})
    assert "9217 video_total_pixels" in caplog.text and "keeps to 9216 by max_video_tokens 40" in caplog.text
    assert (place == "nested") is not (tmp_path / "video_preprocessor_config.json").exists()


def test_size_of_blocks_is_smart_resize():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    generator = np.random.default_rng(0)
    for width, height in [
        (1, 1),
        (14, 14),
        (42, 70),
        (2000, 10),
        (8192, 41),
        *generator.integers(1, 3000, (300, 2)).tolist(),
    ]:
        if max(width, height) > 200 * min(width, height):
            continue
        for least, most in ((3136, 12845056), (28 * 28 * 4, 28 * 28 * 16), (28 * 28 * 100, 28 * 28 * 1280)):
            columns, rows = size_of_blocks(width, height, 28, least, most)
            assert (rows * 28, columns * 28) == smart_resize(height, width, 28, least, most)


def test_labels_and_truncation(folder):
    processor = processor_of(folder, answer_loss_only=True)
    turns = turns_of("<image>\nWhat?", "two", "And <image>?", "a cat", system="Be brief.")
    images = [CHINA.resize((64, 32)), CHINA.resize((32, 32))]
    sample = processor.encode("k", turns, images)
    kept = sample.labels != IGNORE_INDEX
    assert torch.equal(sample.labels[kept], sample.input_ids[kept])
    assert processor.tokenizer.decode(sample.labels[kept].tolist()) == "two<|im_end|>a cat<|im_end|>"
    shown = (
        processor.tokenizer.decode(sample.input_ids.tolist())
        .replace("<|image_pad|>" * 8, "(8)")
        .replace("<|image_pad|>" * 4, "(4)")
    )
    assert shown == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>(8)<|vision_end|>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nAnd <|vision_start|>(4)<|vision_end|>?<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n"
    )
    # All of the text where every text counts, but no image token nor its marks.
    everything = processor_of(folder).encode("k", turns, images)
    hidden = everything.labels == IGNORE_INDEX
    assert set(everything.input_ids[hidden].tolist()) == {*processor.never_cut} - {processor.video_token_id}
    # The second exchange goes, with its image and its positions.
    short = processor_of(folder, seq_length=len(sample.input_ids) - 1, on_too_long="truncate").encode(
        "k", turns, images
    )
    assert len(short.pixels) == 1 and short.position_ids.shape == (3, len(short.input_ids))
    assert torch.equal(short.position_ids, sample.position_ids[:, : len(short.input_ids)])
    again = pickle.loads(pickle.dumps(processor))
    assert again.fingerprint == processor.fingerprint and torch.equal(
        again.encode("k", turns, images).labels, sample.labels
    )


def test_limits_of_pixels(folder):
    def blocks(**config):
        return len(
            processor_of(folder, **config).encode_prompt([Turn(role="user", text="<image>")], [CHINA]).image_positions
        )

    assert (
        blocks() == 20
        and blocks(max_pixels=16 * 16 * 6) <= 6
        and 100 <= blocks(min_pixels=25600, max_pixels=51200) <= 200
    )
    assert processor_of(folder, max_pixels=5000).fingerprint != processor_of(folder).fingerprint
    with pytest.raises(ConfigError, match=r"512 to 300 pixels.*data\.max_pixels"):
        processor_of(folder, max_pixels=300)
    for name, value in {"image_size": 448, "dynamic_image_size": True, "hd_num": 4, "shortest_edge": 8}.items():
        with pytest.raises(ConfigError, match=f"data.{name} .* has no effect on Qwen2.5-VL"):
            processor_of(folder, **{name: value})
    with pytest.raises(DataError, match="too_long"):
        processor_of(folder, seq_length=24).encode("k", turns_of("<image>", "a"), [CHINA])


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("preprocessor_config.json", {"merge_size": 4}, "merge_size 4 is not built"),
        ("preprocessor_config.json", {"patch_size": 14}, "patch_size 14"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize false"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 0, "longest_edge": 9}}, "shortest_edge is 0"),
        ("chat_template.jinja", "{{ messages[0]['role'] }}", "chat template that is not Qwen2.5-VL's"),
    ],
)
def test_files_of_another_model_are_refused(folder, tmp_path, file, change, message):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = change if isinstance(change, str) else json.dumps({**json.loads((tmp_path / file).read_text()), **change})
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        processor_of(tmp_path)
