"""A record as its author wrote it. Free of torch: building shards starts many short processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER = "<image>", "<video>"
MAX_IMAGES = 2**16 - 1  # of a sample: their number
MAX_SPAN = 2**30  # and bytes of its members


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message.

    Attributes:
        role: ``user``, ``assistant`` or ``system``.
        text: ``<image>`` in it marks an image's place.
        loss: false where its author wants no loss taken on it, whatever the settings; true: as they say.
    """

    role: str
    text: str
    loss: bool = True


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
