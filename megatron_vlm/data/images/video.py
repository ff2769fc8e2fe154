"""A video as frames: a folder of images, or a file decoded with PyAV (an optional extra).

Frames are taken from the middles of equal parts of the video, so that the same video always gives the same ones.
"""

import io
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, VideoSettings
from megatron_vlm.data.images.pictures import MAX_ASPECT, MAX_PIXELS, MAX_SIDE, read_image_file
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import ConfigError, DataError, Reason

FRAME_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif", ".heic", ".heif")
_unreadable = partial(DataError, reason=Reason.UNREADABLE_IMAGE)
MAX_VIDEO_FRAMES = 500_000  # of a file, before some are taken
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}  # of frames that were decoded from a file


def spread(total: int, settings: VideoSettings, name: str = "video") -> list[int]:
    """Returns the indices of the frames to take of ``total``, in order: at most ``max_frames``, evenly spread.

    Raises:
        DataError: fewer than ``min_frames``.
    """
    if total < settings.min_frames:
        raise _unreadable(f"{name} has {total} frames, at least {settings.min_frames} are needed: lower --video-frames")
    number = min(total, settings.max_frames)
    return [(2 * i + 1) * total // (2 * number) for i in range(number)]


def read_frames(root: str | Path, name: str, settings: VideoSettings) -> list[tuple[str, bytes]]:
    """Returns (name, encoded image) of each frame that is taken of the video ``name`` in folder ``root``.

    A folder's frames are its image files in the order of their names, numbers in names compared as numbers.

    Raises:
        ConfigError: a video file, and PyAV is not installed.
        DataError: too few frames, not a video, damaged, or beyond a limit.
    """
    path = Path(root, name)
    if os.path.isdir(path):
        files = sorted((p for p in path.iterdir() if p.suffix.lower() in FRAME_FILES), key=_by_numbers)
        wanted = spread(len(files), settings, f"video {path}")
        return [(f"{name}/{files[i].name}", read_image_file(files[i])) for i in wanted]
    if not os.path.isfile(path):
        message = f"cannot read video {path}: {'not a regular file' if os.path.exists(path) else 'No such file'}"
        raise DataError(message, reason=Reason.MISSING_IMAGE)
    return [(f"{name}#{index}", data) for index, data in _decode(path, settings)]


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


def _decode(path: Path, settings: VideoSettings) -> list[tuple[int, bytes]]:
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
            wanted = spread(total, settings, f"video {path}")
            container.seek(0)
            frames = _take(container, stream, wanted)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _unreadable(f"video {path} cannot be decoded: {error}") from error
    if len(frames) < settings.min_frames:
        raise _unreadable(f"video {path} cannot be decoded: {len(frames)} of {len(wanted)} frames came out")
    return frames


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


def announce(turns: tuple[Turn, ...], frames: list[int], settings: VideoSettings) -> tuple[Turn, ...]:
    """Writes each ``<video>`` as its frames' lines.

    Args:
        turns: with a ``<video>`` per video.
        frames: number of frames of each.
        settings: the text of a frame.
    """
    left = iter(frames)
    written = []
    for turn in turns:
        head, *rest = turn.text.split(VIDEO_PLACEHOLDER)
        for part in rest:
            lines = "\n".join(settings.announce.replace("{i}", str(i)) for i in range(1, next(left) + 1))
            head = head + lines + part
        written.append(replace(turn, text=head))
    return tuple(written)


def check_settings(settings: VideoSettings) -> None:
    """Raises ConfigError for settings that cannot work."""
    if not 1 <= settings.min_frames <= settings.max_frames:
        raise ConfigError(f"--video-frames {settings.min_frames} {settings.max_frames}: give 1 <= MIN <= MAX")
    if settings.announce.count(IMAGE_PLACEHOLDER) != 1:
        raise ConfigError(f"--frame-text {settings.announce!r} must hold {IMAGE_PLACEHOLDER} once")
