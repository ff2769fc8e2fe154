"""A video as frames: a folder of images, or a file decoded with PyAV (an optional extra).

The same video always gives the same frames, by one of the rules of ``formats.records.SAMPLING``:

    middles   from the middles of equal parts
    ends      one or more a second, evenly from first to last, as transformers' ``SmolVLMVideoProcessor``
    pairs     two or more a second, an even number, as transformers' ``Qwen2VLVideoProcessor``
"""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.formats.records import IMAGE_PLACEHOLDER, OWN_VIDEO, SAMPLING, VIDEO_PLACEHOLDER, VideoSettings
from megatron_vlm.data.images.pictures import MAX_ASPECT, MAX_PIXELS, MAX_SIDE, read_image_file
from megatron_vlm.data.sample import Turn, Video
from megatron_vlm.errors import ConfigError, DataError, Reason

ANNOUNCE = "Frame-{i}: <image>"  # InternVL's way, and that of all models that have no videos
VIDEO_FILES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
FRAME_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif", ".heic", ".heif")
_unreadable = partial(DataError, reason=Reason.UNREADABLE_IMAGE)
LEAST_PAIRS = 4  # frames of a video that has as many, in that rule
MAX_VIDEO_FRAMES = 500_000  # of a file, before some are taken
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}  # of frames that were decoded from a file


def is_video(path: str) -> bool:
    """A video file by its name, or a folder of frames."""
    return path.lower().endswith(VIDEO_FILES) or os.path.isdir(path)


def spread(total: int, most: int) -> list[int]:
    """Returns the indices of at most ``most`` of ``total`` frames, in order, from the middles of equal parts."""
    number = min(total, most)
    return [(2 * i + 1) * total // (2 * number) for i in range(number)]


def sampled(total: int, fps: float, settings: VideoSettings) -> list[int]:
    """Returns the indices of the frames to take of ``total``, of which ``fps`` are shown a second.

    Source of the rules by time: transformers 5.23, models/smolvlm/video_processing_smolvlm.py and
    models/qwen2_vl/video_processing_qwen2_vl.py, ``sample_frames``.
    """
    most, rate = settings.max_frames or total, settings.fps
    if rate is None:
        return spread(total, most)
    if settings.sampling == "ends":
        wanted, first, last = max(1, min(round(rate * (total / fps)), most)), 0, total - 1
        if total / fps - 2 > most * rate:  # a second at either end is passed over
            begin, end = int(fps), min(int(total - fps), total - 1)
            first, last = (begin, end) if begin < end else (first, last)
        return np.unique(np.linspace(first, last, wanted, dtype=int)).tolist()
    number = min(max(total / fps * rate, LEAST_PAIRS), min(most, total) // 2 * 2)
    number = max(1, int(number) // 2 * 2)  # of a single frame it is one
    return np.arange(0, total, total / number).astype(np.float32).astype(int).tolist()


def read_frames(root: str | Path, name: str, settings: VideoSettings) -> tuple[Video, list[tuple[str, bytes]]]:
    """Returns what is known of the video ``name`` in folder ``root``, and (name, encoded image) of each frame that is taken.

    A folder's frames are its image files in the order of their names, numbers in names compared as numbers; they were taken
    before: all are, or ``max_frames`` from the middles of equal parts.

    Raises:
        ConfigError: a video file, and PyAV is not installed.
        DataError: too few frames, not a video, damaged, or beyond a limit.
    """
    path = Path(root, name)
    if os.path.isdir(path):
        files = sorted((p for p in path.iterdir() if p.suffix.lower() in FRAME_FILES), key=_by_numbers)
        _check_number(len(files), settings, path)
        wanted = spread(len(files), settings.max_frames or len(files))
        taken = [files[i] for i in wanted]
        video = Video(frames=tuple(range(len(wanted))), total=len(wanted), fps=settings.folder_fps)
        return video, [(f"{name}/{file.name}", read_image_file(file)) for file in taken]
    if not os.path.isfile(path):
        message = f"cannot read video {path}: {'not a regular file' if os.path.exists(path) else 'No such file'}"
        raise DataError(message, reason=Reason.MISSING_IMAGE)
    total, fps, frames = _decode(path, settings)
    video = Video(frames=tuple(index for index, _ in frames), total=total, fps=fps)
    return video, [(f"{name}#{index}", data) for index, data in frames]


def _check_number(total: int, settings: VideoSettings, path: Path) -> None:
    if total < max(1, settings.min_frames):
        least = f"at least {settings.min_frames} are needed: lower --video-frames"
        raise _unreadable(f"video {path} has {total} frames, {least}")


def _by_numbers(path: Path) -> list[Any]:
    parts: list[Any] = []
    for char in path.name:
        if char.isascii() and char.isdigit():
            if parts and isinstance(parts[-1], tuple) and parts[-1][0] == 0:
                parts[-1] = (0, parts[-1][1] * 10 + int(char))
            else:
                parts.append((0, int(char)))
        else:
            parts.append((1, char))
    return parts


def _decode(path: Path, settings: VideoSettings) -> tuple[int, float, list[tuple[int, bytes]]]:
    """Frames of the whole, frames a second, and those that are taken."""
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            "video files need PyAV: pip install 'megatron_vlm[video]', or give folders of frames"
        ) from error
    try:
        # Only files: a playlist inside must not reach for others.
        options = {"protocol_whitelist": "file"}
        with av.open(os.path.abspath(path), options=options, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise _unreadable(f"video {path} has no pictures")
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
                raise _unreadable(
                    f"video {path} is {width} x {height}: the limit is {MAX_SIDE} a side, {MAX_PIXELS} pixels"
                )
            if not width or not height or max(width, height) > MAX_ASPECT * min(width, height):
                raise _unreadable(f"video {path} is {width} x {height}")
            total = _count(container, stream, path)
            _check_number(total, settings, path)
            fps = float(stream.average_rate or settings.folder_fps)
            wanted = sampled(total, fps, settings)
            container.seek(0)
            frames = _take(container, stream, wanted)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _unreadable(f"video {path} cannot be decoded: {error}") from error
    if len(frames) < settings.min_frames:
        raise _unreadable(f"video {path} cannot be decoded: {len(frames)} of {len(wanted)} frames came out")
    return total, fps, frames


def _count(container: Any, stream: Any, path: Path) -> int:
    """Counts packets, which is cheap; headers lie."""
    total = 0
    for packet in container.demux(stream):
        total += packet.size > 0
        if total > MAX_VIDEO_FRAMES:
            raise _unreadable(f"video {path} has more than {MAX_VIDEO_FRAMES} frames: cut it")
    return total


def _take(container: Any, stream: Any, wanted: list[int]) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    left = iter(wanted)
    target = next(left)
    for index, frame in enumerate(container.decode(stream)):
        if index == target:
            buffer = io.BytesIO()
            frame.to_image().save(buffer, **JPEG)
            found.append((index, buffer.getvalue()))
            target = next(left, -1)
            if target < 0:
                break
    return found


def with_videos(turns: Sequence[Turn], videos: Sequence[Video], settings: VideoSettings) -> tuple[Turn, ...]:
    """Gives turns with a ``<video>`` per video theirs; written as lines of frames where the settings have a text for them."""
    left, made = iter(videos), []
    for turn in turns:
        turn = replace(turn, videos=tuple(islice(left, turn.text.count(VIDEO_PLACEHOLDER))))
        made.append(turn if settings.announce is None else announce(turn, settings.announce))
    return tuple(made)


def announce(turn: Turn, text: str = ANNOUNCE) -> Turn:
    """Writes each ``<video>`` of a turn as its frames' lines: ``text``, ``{i}`` in it the number of the frame from 1."""
    return spelled(turn, lambda video: "\n".join(text.replace("{i}", str(i + 1)) for i in range(len(video.frames))))


def spelled(turn: Turn, text: Callable[[Video], str]) -> Turn:
    """Writes each ``<video>`` of a turn as a text, with an ``<image>`` for each frame."""
    if not turn.videos:
        return turn
    head, *rest = turn.text.split(VIDEO_PLACEHOLDER)
    written = "".join(text(video) + part for video, part in zip(turn.videos, rest, strict=True))
    return replace(turn, text=head + written, videos=())


def check_settings(settings: VideoSettings) -> None:
    """Raises ConfigError for settings that cannot work."""
    if settings.sampling not in (None, *SAMPLING):
        raise ConfigError(f"--video-sampling {settings.sampling}: one of {', '.join(SAMPLING)}")
    filled = settings.filled(OWN_VIDEO)
    if not 1 <= settings.min_frames <= (filled.max_frames or 0):
        raise ConfigError(f"--video-frames {settings.min_frames} {filled.max_frames}: give 1 <= MIN <= MAX")
    for name, value in (("fps", filled.fps), ("folder-fps", settings.folder_fps)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--video-{name} must be above 0, got {value}")
    if settings.fps is not None and filled.sampling == "middles":
        raise ConfigError("--video-fps has no effect on frames from the middles of equal parts: name --video-sampling")
    if settings.announce is not None and settings.announce.count(IMAGE_PLACEHOLDER) != 1:
        raise ConfigError(f"--frame-text {settings.announce!r} must hold {IMAGE_PLACEHOLDER} once")
