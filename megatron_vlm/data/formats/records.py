"""What the formats share: where records come from, what a record is, and the checks every conversation must pass."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats import keys
from megatron_vlm.data.sample import IMAGE_PLACEHOLDER as IMAGE_PLACEHOLDER
from megatron_vlm.data.sample import VIDEO_PLACEHOLDER as VIDEO_PLACEHOLDER
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.literal import check_whole
from megatron_vlm.errors import DataError, Reason, printable

RECORDS_VERSION = 2  # of what records mean: shards that were built of the same files with another one are built anew
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
         "system": "system"}  # fmt: skip


SAMPLING: dict[str, tuple[float | None, int]] = {"middles": (None, 32), "ends": (1.0, 64), "pairs": (2.0, 768)}
"""Rules by which frames are taken: frames a second, and most frames of a video, where nothing else says."""


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """How a video becomes frames; None: as the model does it, else as ``SAMPLING`` says.

    Attributes:
        sampling: which frames are taken, a key of ``SAMPLING``; see ``images/video.py``.
        min_frames: a shorter video is refused.
        max_frames: most frames that are taken.
        fps: frames taken a second, by the rules that go by time.
        folder_fps: frames a second of a folder of frames, of which no file tells; as transformers assumes.
        announce: text of each frame, ``{i}`` its number from 1, on lines of their own; None: the model writes it.
    """

    sampling: str | None = None
    min_frames: int = 1
    max_frames: int | None = None
    fps: float | None = None
    folder_fps: float = 24.0
    announce: str | None = None

    def filled(self, own: "VideoSettings") -> "VideoSettings":
        """These settings; what they do not say is as in ``own``, a model's, unless another rule is named."""
        rule = self.sampling or own.sampling or "middles"
        same = own if (own.sampling or "middles") == rule else VideoSettings()
        fps, most = SAMPLING[rule]
        given = {"max_frames": (self.max_frames, same.max_frames, most), "fps": (self.fps, same.fps, fps)}
        first = {name: next((value for value in values if value is not None), None) for name, values in given.items()}
        return replace(self, sampling=rule, **first)  # type: ignore[arg-type]


OWN_VIDEO = VideoSettings()
"""Of a model that has no videos, or of none."""


@dataclass(frozen=True, kw_only=True)
class RecordSource:
    """One file of records and how it is read. Plain values: it travels to build processes.

    Attributes:
        path: of the file (or HF ``datasets`` folder).
        format: key of ``formats.FORMATS``.
        name: the data set's name, where its format gives one; else the file's name.
        root: folder that relative image paths start from.
        repeat: how often an epoch goes over it (1.5: all, and half of it again); None: once.
        per_epoch: exactly so many samples an epoch; None: by ``repeat``.
        prepend: a record with images and no placeholder gets them before its first user turn; else it is refused.
        options: RawSample.options of every sample.
        video: how videos become frames.
        part: split of a folder, or of an Energon folder; empty: train. See ``splits``.
    """

    path: str
    format: str
    name: str = ""
    root: str = "."
    repeat: float | None = None
    per_epoch: int | None = None
    prepend: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    video: VideoSettings = field(default_factory=VideoSettings)
    part: str = ""

    @property
    def title(self) -> str:
        """Its name in the manifest."""
        return printable(self.name or Path(self.path).name)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record of a source.

    Attributes:
        number: in its file, from 0.
        label: its ``id``, unique or not.
        turns: with a placeholder per image and per video.
        images: paths as written, or the encoded bytes where the record carries them.
        videos: paths as written: of a video file or of a folder of frames.
        options: see RawSample.
        file: the tar that it lies in, of a source that is several; empty: the source's own file.
        key: what the names of its members share; empty: it lies in no tar.
        names: of ``images``, where they are members of a tar.
        unknown: keys that nobody knows here; see ``keys``.
    """

    number: int
    label: str
    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...] = ()
    videos: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    key: str = ""
    names: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def record_of(
    source: RecordSource,
    number: int,
    data: Mapping[str, Any],
    turns: Sequence[Turn],
    images: Sequence[str | bytes],
    videos: Sequence[str | bytes] = (),
    *,
    read: Sequence[str],
    unknown: Sequence[str] = (),
) -> Record:
    """Adds what a record says beside its conversation, in every format alike: system text, history; and looks at its keys.

    Args:
        source, number: of the record.
        data: the whole of it.
        turns: of its conversation.
        images, videos: of it.
        read: the keys that its format has read, but for those that all formats have.
        unknown: keys of its turns that nobody knows.

    Raises:
        DataError: what is wrong with it.
    """
    if any(isinstance(video, bytes) for video in videos):
        raise DataError("'video' must be a path or a list of paths")
    turns = list(turns)
    system = keys.system_of(data)
    head = int(bool(turns) and turns[0].role == "system")
    if system is not None and not head:
        turns, head = [Turn(role="system", text=system), *turns], 1
    elif system is not None and turns[0].text != system:
        raise DataError("a system text beside the conversation, and another as its first turn: keep one")
    pairs = keys.history_of(data)
    turns[head:head] = [Turn(role=r, text=t) for pair in pairs for r, t in zip(("user", "assistant"), pair)]
    here = (*read, "id", "image", "images", "video", "videos", "history", *keys.SYSTEM)
    strange = [*unknown, *keys.unknown_keys(data, (*here, *keys.IMAGE_NAMES))]
    named = [name for name in keys.IMAGE_NAMES if not keys.says_nothing(data.get(name))]
    if named and not images and not videos:
        message = f"an image under {named[0]!r} is not read, and would be missing in training: call the key 'image'"
        raise DataError(message, reason=Reason.UNSUPPORTED)
    record = make_record(source, number, data.get("id"), turns, images, [str(video) for video in videos])
    return replace(record, unknown=tuple(dict.fromkeys(strange)))


def make_record(
    source: RecordSource,
    number: int,
    label: Any,
    turns: Sequence[Turn],
    images: Sequence[str | bytes],
    videos: Sequence[str] = (),
) -> Record:
    """Checks a conversation and makes a record of it.

    Raises:
        DataError: what is wrong with it.
    """
    if not (label is None or isinstance(label, str | int | float)):
        raise DataError(f"'id' must be a text or a number, this is {type(label).__name__}")
    texts = [(f"turn {index}", turn.text) for index, turn in enumerate(turns)] + [("'id'", str(label))]
    texts += [("a path", name) for name in (*images, *videos) if isinstance(name, str)]
    for what, text in texts:
        check_whole(text, what)
    marks = "".join(turn.text for turn in turns)
    if (images or videos) and not (IMAGE_PLACEHOLDER in marks or VIDEO_PLACEHOLDER in marks):
        if not source.prepend:
            raise DataError(
                f"0 {IMAGE_PLACEHOLDER} placeholders for {len(images)} images and {len(videos)} videos: write one per "
                "image, in its place, or set --missing-placeholder prepend to put them before the first question",
                reason=Reason.PLACEHOLDERS,
            )
        turns = _prepend(turns, len(images), len(videos), "" if source.format == "xcomposer" else "\n")
    check_turns(turns, len(images), len(videos))
    return Record(
        number=number,
        label="" if label is None else str(label),
        turns=tuple(turns),
        images=tuple(images),
        videos=tuple(videos),
        options=source.options,
    )


def _prepend(turns: Sequence[Turn], num_images: int, num_videos: int, end: str) -> list[Turn]:
    marks = f"{IMAGE_PLACEHOLDER}{end}" * num_images + f"{VIDEO_PLACEHOLDER}{end}" * num_videos
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    return [replace(t, text=marks + t.text) if i == first else t for i, t in enumerate(turns)]


def check_turns(turns: Sequence[Turn], num_images: int, num_videos: int = 0) -> None:
    """Checks roles, answers and placeholders: [system] (user assistant)+ with an ``<image>`` per image.

    Raises:
        DataError: what is wrong, with the numbers.
    """
    body = turns[1:] if turns and turns[0].role == "system" else turns
    for index, turn in enumerate(body):
        wanted = ("user", "assistant")[index % 2]
        if turn.role != wanted:
            roles = ", ".join(t.role for t in turns[:20]) + (" ..." if len(turns) > 20 else "")
            raise DataError(
                f"roles out of order: expected {wanted} and found {turn.role} (turns: {roles})", reason=Reason.ROLES
            )
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError(f"empty answer in turn {index + len(turns) - len(body)}", reason=Reason.EMPTY_ANSWER)
    if len(body) % 2 or not body:
        message = "roles out of order: the last user turn has no answer" if body else "there is no user turn"
        raise DataError(message, reason=Reason.ROLES)
    for mark, kind, number in ((IMAGE_PLACEHOLDER, "image", num_images), (VIDEO_PLACEHOLDER, "video", num_videos)):
        found = sum(turn.text.count(mark) for turn in turns)
        if found != number:
            message = f"{found} {mark} placeholders for {number} {kind}s: write one per {kind}, in its place"
            raise DataError(message, reason=Reason.PLACEHOLDERS)


def role_of(name: Any, where: str) -> str:
    """Returns ``user``, ``assistant`` or ``system`` for a role in any letter case.

    Raises:
        DataError: not a role.
    """
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{where}: unknown role {name!r} (known: {', '.join(ROLES)})", reason=Reason.ROLES)
    return role


def object_of(data: Any) -> Mapping[str, Any]:
    """Returns ``data`` if it is a json object; raises DataError else."""
    if not isinstance(data, Mapping):
        raise DataError(f"a record is a json object, this is {type(data).__name__}")
    return data


def list_of(data: Mapping[str, Any], key: str, what: str = "a path or a list of paths") -> list[Any]:
    """Returns the list under ``key``; a single value is a list of one, an absent or empty one is empty.

    Raises:
        DataError: an entry is neither text, bytes nor an object of one of them (``{"bytes", "path"}``).
    """
    value = data.get(key)
    entries = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    entries = [_unwrap(entry) for entry in entries]
    if not all(isinstance(entry, str | bytes) and entry for entry in entries):
        raise DataError(f"'{key}' must be {what}")
    return [inline(entry) for entry in entries]


def files_beside(data: Mapping[str, Any]) -> tuple[list[str | bytes], list[str | bytes]]:
    """Returns the images and the videos that stand beside a conversation; raises DataError."""
    images, videos = ([*list_of(data, kind), *list_of(data, f"{kind}s")] for kind in ("image", "video"))
    return images, videos


def _unwrap(entry: Any) -> Any:
    """HF ``datasets`` keeps an image as ``{"bytes": ..., "path": ...}``; json has its bytes as base64."""
    if isinstance(entry, Mapping) and set(entry) <= {"bytes", "path", "url"}:
        if isinstance(entry.get("bytes"), str) and entry["bytes"]:
            return from_base64(entry["bytes"], "'bytes'")
        return entry.get("bytes") or entry.get("path") or entry.get("url")
    return entry


def from_base64(text: str, what: str) -> bytes:
    """Decodes base64; raises DataError naming ``what`` where it is none, or holds nothing."""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{what} is not base64: {error}", reason=Reason.UNREADABLE_IMAGE) from error
    if not data:
        raise DataError(f"{what} holds nothing", reason=Reason.UNREADABLE_IMAGE)
    return data


def inline(entry: str | bytes) -> str | bytes:
    """Decodes an image that is given as a data URI; a path or bytes come back as they are.

    Raises:
        DataError: not base64, or the address of another machine.
    """
    if not isinstance(entry, str):
        return entry
    if entry[:5].lower() == "data:":
        head, comma, body = entry.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise DataError(f"a data URI must read data:image/...;base64,...; this one starts {entry[:40]!r}")
        return from_base64(body, "a data URI")
    scheme, colon, rest = entry.partition("://")
    if colon and scheme.lower() == "file":
        return rest
    if colon and scheme.isalnum():
        message = f"image {entry[:80]!r}: only files are read; download it first"
        raise DataError(message, reason=Reason.UNSUPPORTED)
    return entry
