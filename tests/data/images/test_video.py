"""Videos become frames: evenly spread, announced, from folders and from files."""

import io
import json

import av
import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data.formats.records import VideoSettings
from megatron_vlm.data.images.video import announce, check_settings, read_frames, sampled, spread
from megatron_vlm.data.sample import Turn, Video
from megatron_vlm.data.shards.writer import parse_text
from megatron_vlm.errors import ConfigError, DataError
from tests.data.formats.make import built, picture, write_json, write_pictures
from tests.models.processing.transformers_videos import metadata, video_processor


def write_video(path, number, size=(64, 48)):
    """Grey frames that grow lighter by 8 with each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(number):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), i * 8, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    "total, most, expected",
    [(1, 8, [0]), (4, 8, [0, 1, 2, 3]), (8, 4, [1, 3, 5, 7]), (9, 3, [1, 4, 7]), (100, 4, [12, 37, 62, 87])],
)
def test_frames_come_from_the_middles_of_equal_parts(total, most, expected):
    assert spread(total, most) == expected


def test_spread_is_even_for_any_numbers():
    for total in range(1, 200):
        for most in (1, 2, 7, 32):
            found = spread(total, most)
            steps = np.diff([-1 - found[0], *found, 2 * total - 1 - found[-1]])
            assert len(set(found)) == len(found) == min(total, most) and found[-1] < total
            assert max(steps[1:-1], default=0) - min(steps[1:-1], default=0) <= 1


@pytest.mark.parametrize("rule", ["ends", "pairs"])
def test_frames_by_time_are_those_of_transformers(rule):
    """Of videos from one frame to an hour, at rates that divide nothing."""
    compared = 0
    for fps in (1.0, 7.5, 23.976, 60.0):
        for total in (1, 2, 3, 4, 5, 7, 23, 24, 25, 99, 300, 301, 1799, 3600, 90_001):
            for rate, most in ((1.0, 64), (2.0, 768), (0.5, 7), (3.3, 16)):
                settings = VideoSettings(sampling=rule, fps=rate, max_frames=most)
                if rule == "ends":
                    theirs = video_processor("smolvlm", "SmolVLMVideoProcessor", num_frames=most, fps=rate)
                else:
                    theirs = video_processor("qwen2_vl", "Qwen2VLVideoProcessor", max_frames=most, fps=rate)
                    if total == 1:  # it divides by zero there
                        assert sampled(total, fps, settings) == [0]
                        continue
                found, wanted = sampled(total, fps, settings), theirs.sample_frames(metadata(total, fps)).tolist()
                if total > 10_000 and len(found) == len(
                    wanted
                ):  # 32 bits there: a product may fall below a whole number
                    wanted = [w if abs(f - w) < 2 else -1 for f, w in zip(found, wanted)]
                    assert sum(f != w for f, w in zip(found, wanted)) < 5 and -1 not in wanted
                else:
                    assert found == wanted
                compared += 1
    assert compared > 200


def test_settings_that_cannot_work():
    for settings, message in (
        (dict(min_frames=40), "--video-frames 40 32"),
        (dict(sampling="all"), "--video-sampling all: one of middles, ends, pairs"),
        (dict(fps=2.0), "--video-fps has no effect"),
        (dict(sampling="pairs", fps=0.0), "--video-fps must be above 0"),
        (dict(folder_fps=-1.0), "--video-folder-fps must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_settings(VideoSettings(**settings))
    # What a model's own processor says holds where the user says nothing, or the same rule.
    own = VideoSettings(sampling="ends", fps=1.5, max_frames=50)
    assert VideoSettings().filled(own) == own
    assert VideoSettings(max_frames=8).filled(own).fps == 1.5
    assert VideoSettings(sampling="pairs").filled(own) == VideoSettings(sampling="pairs", fps=2.0, max_frames=768)


def test_video_file(tmp_path):
    write_video(tmp_path / "v.mp4", 30)
    video, frames = read_frames(tmp_path, "v.mp4", VideoSettings(max_frames=5))
    assert video == Video(frames=(3, 9, 15, 21, 27), total=30, fps=10.0)
    assert (video.seconds, video.times[1]) == (3.0, 0.9)
    assert [name for name, _ in frames] == [f"v.mp4#{i}" for i in (3, 9, 15, 21, 27)]
    for index, (_, data) in zip((3, 9, 15, 21, 27), frames):
        image = Image.open(io.BytesIO(data))
        assert image.size == (64, 48) and image.format == "JPEG"
        assert abs(float(np.asarray(image).mean()) - index * 8) < 4
    assert read_frames(tmp_path, "v.mp4", VideoSettings(max_frames=5)) == (video, frames)
    with pytest.raises(DataError, match="has 30 frames, at least 31 are needed"):
        read_frames(tmp_path, "v.mp4", VideoSettings(min_frames=31, max_frames=40))


def test_a_cut_video_is_read_or_named(tmp_path):
    data = write_video(tmp_path / "v.avi", 30).read_bytes()
    for length in (0, 100, len(data) // 2, len(data) - 100):
        (tmp_path / "cut.avi").write_bytes(data[:length])
        try:
            _, frames = read_frames(tmp_path, "cut.avi", VideoSettings(max_frames=8))
        except DataError as error:
            assert "cut.avi" in str(error)
        else:
            assert all(Image.open(io.BytesIO(frame)).size == (64, 48) for _, frame in frames)


def test_folder_of_frames_in_the_order_of_their_numbers(tmp_path):
    folder = write_pictures(tmp_path / "clip", 12)
    (folder / "notes.txt").write_text("not a frame")
    video, frames = read_frames(tmp_path, "clip", VideoSettings(folder_fps=2.0))
    assert video == Video(frames=tuple(range(12)), total=12, fps=2.0)
    assert [data for _, data in frames] == [picture(i) for i in range(12)]  # 10.png comes after 9.png


def test_announced_as_configured(tmp_path):
    videos = (Video(frames=(0, 1), total=2, fps=1.0), Video(frames=(0,), total=1, fps=1.0))
    turn = Turn(role="user", text="<video>\nand <video>?", videos=videos)
    text = announce(turn, "Frame{i}: <image>").text
    assert text == "Frame1: <image>\nFrame2: <image>\nand Frame1: <image>?"


def test_images_and_videos_in_one_record(tmp_path):
    """The order is that of the placeholders."""
    write_pictures(tmp_path, 1)
    write_pictures(tmp_path / "clip", 3)
    write_video(tmp_path / "v.mp4", 6)
    talk = [{"from": "human", "value": "<video> <image> <video>"}, {"from": "gpt", "value": "Yes."}]
    record = {"image": "0.png", "video": ["clip", "v.mp4"], "conversations": talk}
    path = write_json(tmp_path / "a.jsonl", [record])
    _, (sample,) = built(tmp_path / "out", "llava", path, root=str(tmp_path), video=VideoSettings(max_frames=2))
    assert sample.image_names == ("clip/0.png", "clip/2.png", "0.png", "v.mp4#1", "v.mp4#4")
    clip, file = Video(frames=(0, 1), total=2, fps=24.0), Video(frames=(1, 4), total=6, fps=10.0)
    assert sample.turns[0] == Turn(role="user", text="<video> <image> <video>", videos=(clip, file))
    written = VideoSettings(max_frames=2, announce="({i}) <image>")
    _, (sample,) = built(tmp_path / "written", "llava", path, root=str(tmp_path), video=written)
    assert sample.turns[0] == Turn(role="user", text="(1) <image>\n(2) <image> <image> (1) <image>\n(2) <image>")
    again, _ = built(tmp_path / "again", "llava", path, root=str(tmp_path), video=VideoSettings(max_frames=2))
    assert again["shards"][0]["sha256"] == built(
        tmp_path / "third", "llava", path, root=str(tmp_path), video=VideoSettings(max_frames=2)
    )[0]["shards"][0]["sha256"]  # fmt: skip


@pytest.mark.parametrize(
    "video",
    [
        {"frames": [], "total": 3, "fps": 1.0},
        {"frames": [0, 1], "total": 1, "fps": 1.0},
        {"frames": [0], "total": 1, "fps": 0.0},
        7,
    ],
)
def test_a_shard_that_says_nonsense_of_a_video_is_named(video):
    turns = [{"role": "user", "text": "<video>", "videos": [video]}, {"role": "assistant", "text": "x"}]
    with pytest.raises(DataError, match=r"bad k\.json"):
        parse_text("k.json", json.dumps({"turns": turns, "images": []}).encode())
