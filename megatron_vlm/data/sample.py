"""A record as its author wrote it. Free of torch: building shards starts many short processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER = "<image>", "<video>"
MAX_IMAGES = 2**16 - 1  # of a sample: their number
MAX_SPAN = 2**30  # and bytes of its members


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video of which some frames were taken.

    Attributes:
        frames: their numbers in the video, from 0, in order.
        total: frames of the whole.
        fps: frames that it shows a second.
    """

    frames: tuple[int, ...]
    total: int
    fps: float

    @property
    def times(self) -> list[float]:
        """Second at which each of the frames is shown."""
        return [number / self.fps for number in self.frames]

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.total / self.fps


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message.

    Attributes:
        role: ``user``, ``assistant`` or ``system``.
        text: ``<image>`` in it marks an image's place, ``<video>`` that of the frames of a video.
        videos: of each ``<video>`` in it; none in a record whose videos were not read yet.
        loss: false where its author wants no loss taken on it, whatever the settings; true: as they say.
    """

    role: str
    text: str
    loss: bool = True
    videos: tuple[Video, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One record.

    Attributes:
        key: names it in every error.
        turns: the conversation.
        images: encoded files, in order of use; frames of a video among them.
        image_names: where each came from.
        options: what the data set's own settings ask of the processor for this sample (``max_dynamic_patch`` and
            ``data_augment`` of InternVL's meta.json); a family without the notion (tiles, say) leaves a key unused.
        label: the record's ``id`` as its author wrote it, unique or not.
    """

    key: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()
    image_names: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
