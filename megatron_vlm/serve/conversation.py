"""A conversation as it grows, with one model or with two that answer side by side; and what is attached to the next question.

attach(path) ... ask(text) -> a question for the engine --answered(texts)--> turns --save(path)--> records, LLaVA's format
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megatron_vlm.data.images.pictures import open_image, read_image_file
from megatron_vlm.data.images.video import is_video
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import expand_text, write_synced

_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}
_MARKS = {"images": IMAGE_PLACEHOLDER, "videos": VIDEO_PLACEHOLDER}


@dataclass
class Conversation:
    """Turns of each model, with the pictures that all of them see.

    Attributes:
        names: of the models.
        system: a system turn before the first; None: none (or the template's own).
        opening: files that go with the first question, also after ``reset``.
        number: questions asked so far, forgotten ones too.
    """

    names: Sequence[str]
    system: str | None = None
    opening: Sequence[str] = ()
    number: int = 0
    attached: list[str] = field(init=False)
    _turns: list[list[tuple[str, str]]] = field(init=False)
    _files: dict[str, list[str]] = field(init=False)
    _asked: tuple[str, dict[str, list[str]]] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets what was said."""
        self.attached = []
        for name in self.opening:
            self.attach(name)
        self._turns = [[] for _ in self.names]
        self._files = {"images": [], "videos": []}

    def attach(self, name: str) -> str:
        """Adds a picture, a video or a folder of its frames to the next question; returns its path.

        Raises:
            ConfigError, DataError: it cannot be read, or is no picture.
        """
        path = os.path.abspath(expand_text(name, "a picture"))
        if not is_video(path):
            open_image(read_image_file(path), path)
        elif not os.path.exists(path):
            raise ConfigError(f"cannot read video {path}: No such file")
        self.attached.append(path)
        return path

    def ask(self, text: str) -> dict[str, Any]:
        """Returns the request that asks every model; the conversation goes on only with ``answered``.

        Raises:
            ConfigError: another number of marks in the text than of files attached.
        """
        new = {kind: [path for path in self.attached if is_video(path) == (kind == "videos")] for kind in _MARKS}
        if not any(mark in text for mark in _MARKS.values()):
            text = "".join(f"{_MARKS['videos' if is_video(path) else 'images']}\n" for path in self.attached) + text
        for kind, mark in _MARKS.items():
            if text.count(mark) != len(new[kind]):
                raise ConfigError(
                    f"{text.count(mark)} {mark} for {len(new[kind])} {kind} attached: one each, or none at all"
                )
        self._asked = (text, {kind: [*self._files[kind], *new[kind]] for kind in _MARKS})
        system = [] if self.system is None else [("system", self.system)]
        return {
            "number": self.number,
            "asks": [
                {"model": model, "turns": [*system, *turns, ("user", text)], **self._asked[1]}
                for model, turns in enumerate(self._turns)
            ],
        }

    def answered(self, texts: Sequence[str]) -> None:
        """Takes the answers to what was asked last, of each model."""
        asked, self._files = self._asked
        for turns, text in zip(self._turns, texts, strict=True):
            turns += [("user", asked), ("assistant", text)]
        self.attached = []
        self.number += 1

    def save(self, name: str) -> Path:
        """Writes a record of each model's conversation, as `data build --format llava` and `generate --input` read them.

        Raises:
            ConfigError: nothing was said, the file exists or cannot be written.
        """
        path = Path(expand_text(name, "/save"))
        if not self.number or not self._turns[0]:
            raise ConfigError("nothing was said yet")
        if path.exists():
            raise ConfigError(f"{path} exists: name another file")
        system = [] if self.system is None else [("system", self.system)]
        records = [
            {
                "id": model,
                **{kind[:-1]: files for kind, files in self._files.items() if files},
                "conversations": [{"from": _ROLES[role], "value": text} for role, text in [*system, *turns]],
            }
            for model, turns in zip(self.names, self._turns)
        ]
        try:
            write_synced(path, (json.dumps(records, ensure_ascii=False, indent=1) + "\n").encode())
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        return path
