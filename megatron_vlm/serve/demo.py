"""What `megatron-vlm demo` serves: pages with a conversation each, their pictures, a run's curves, held-out examples.

Demo.page --> HTML | keep(picture) -> id | ask(question) -> events | demo_server.py has it over HTTP
"""

import secrets
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats import open_sources, read_source
from megatron_vlm.data.images.pictures import probe_image
from megatron_vlm.data.images.video import announce
from megatron_vlm.data.shards.writer import load_record
from megatron_vlm.errors import ConfigError, DataError, TrainingError
from megatron_vlm.serve.conversation import Conversation
from megatron_vlm.serve.demo_page import demo_page
from megatron_vlm.serve.engine import Engine
from megatron_vlm.training.metrics.report_page import results
from megatron_vlm.training.metrics.run_files import RunFiles

_FORGOTTEN = "this conversation is forgotten: load the page again"
_MOST_SESSIONS, _MOST_STORED = 100, 1 << 30  # conversations (and pages not yet used), bytes of uploads; the oldest go
_LEAST_STORED = 1 << 16  # that a picture counts as, however small


@dataclass(eq=False)
class Session:
    """A page: its conversation, whether it has been used, its questions that are answered or wait, the pictures that were
    uploaded from it, their bytes as they count."""

    talk: Conversation
    used: bool = False
    pending: int = 0
    pictures: dict[str, Path] = field(default_factory=dict)
    stored: int = 0

    def forget(self) -> None:
        """Begins anew, without pictures."""
        self.talk.reset()
        for path in self.pictures.values():
            path.unlink(missing_ok=True)
        self.pictures, self.stored = {}, 0


class Demo:
    """What all requests share.

    Args:
        names: of the models.
        system: a system turn before every conversation.
        sampling: what the fields start with.
        folder: for uploaded pictures.
        most_bytes: of a picture.
        token: who calls from elsewhere must have it; None: nobody else may call.

    Attributes:
        engine: its models are loaded before the first question.
        charts: HTML of the run's curves.
        examples, pictures: see ``held_out``; by id.
        sessions: by name, the one that was used last at the end.
        lost: why there is nobody left to ask.
    """

    engine: Engine

    def __init__(
        self,
        names: Sequence[str],
        *,
        system: str | None,
        sampling: dict[str, float],
        folder: Path,
        most_bytes: int,
        token: str | None,
    ):
        self.names, self.system, self.sampling = list(names), system, sampling
        self.folder, self.most_bytes, self.token = folder, most_bytes, token
        self.charts, self.examples = "", list[tuple[str, str, list[str]]]()
        self.sessions: dict[str, Session] = {}
        self.pictures: dict[str, Path] = {}
        self._lock, self._turn, self._asking = threading.RLock(), threading.Lock(), ""
        self.lost: Exception | None = None

    def keep(self, data: bytes, name: str, session: Session | None = None) -> str:
        """Checks and stores a picture, of a session or of the examples; returns its id.

        Raises:
            DataError: it is none, or beyond a limit.
        """
        extension = probe_image(data, name)[0]
        number = secrets.token_hex(8)
        path = self.folder / f"{number}.{extension}"
        with self._lock:
            size = max(len(data), _LEAST_STORED)
            if session is not None:
                if session not in self.sessions.values():
                    raise ConfigError(_FORGOTTEN)
                self._make_room(size, session, name)
            try:
                path.write_bytes(data)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            (self.pictures if session is None else session.pictures)[number] = path
            if session is not None:
                session.stored += size
        return number

    def _make_room(self, size: int, session: Session, name: str) -> None:
        """Forgets the sessions that were used longest ago until there is room for ``size`` more bytes."""
        while sum(other.stored for other in self.sessions.values()) + size > _MOST_STORED:
            others = (n for n, s in self.sessions.items() if s.stored and s is not session and not s.pending)
            if (oldest := next(others, None)) is None:
                raise DataError(f"{name}: there is no room beside {session.stored >> 20} MB of pictures: Reset")
            self.sessions.pop(oldest).forget()

    def picture(self, session: str, number: str) -> Path | None:
        """A picture of a session or of the examples, if it is there."""
        found = self.sessions.get(session)
        return (found.pictures | self.pictures).get(number) if found is not None else None

    def page(self, nonce: str) -> str:
        """The page, with a conversation of its own."""
        session = secrets.token_hex(16)
        with self._lock:
            self.sessions[session] = Session(Conversation(self.names, self.system))
            self._forget_oldest(used=False)  # alone: whoever makes a browser load pages ends no conversation
        return demo_page(
            self.names,
            self.charts,
            self.examples,
            self.sampling,
            session=session,
            nonce=nonce,
            most_bytes=self.most_bytes,
        )

    def _forget_oldest(self, used: bool) -> None:
        names = [name for name, session in self.sessions.items() if session.used == used and not session.pending]
        for name in names[:-_MOST_SESSIONS]:
            self.sessions.pop(name).forget()

    def session(self, name: Any) -> Session:
        """The session of that name, which is in use from now on.

        Raises:
            ConfigError: it is forgotten.
        """
        with self._lock:
            session = self.sessions.pop(str(name), None)
            if session is None:
                raise ConfigError(_FORGOTTEN)
            self.sessions[str(name)] = session  # now the one that was used last
            session.used = True
            self._forget_oldest(used=True)
            return session

    def ask(self, request: dict[str, Any]) -> Generator[dict[str, Any]]:
        """Yields the events of an answer; one question at a time, others wait.

        Raises:
            MegatronVLMError: it cannot be answered.
        """
        with self._lock:
            session = self.session(request.get("session"))
            session.pending += 1  # not forgotten before it is answered
        try:
            yield from self._answer(session, request)
        finally:
            with self._lock:
                session.pending -= 1

    def _answer(self, session: Session, request: dict[str, Any]) -> Generator[dict[str, Any]]:
        text = request.get("text")
        images, sampling = request.get("images") or [], request.get("sampling") or {}
        if not isinstance(text, str) or not text.strip():
            raise ConfigError("a question is a text")
        if not isinstance(images, list) or not isinstance(sampling, dict):
            raise ConfigError("images are a list, sampling is a mapping")
        with self._turn:
            talk = session.talk
            talk.attached = []
            for number in images:
                if (path := self.picture(request["session"], str(number))) is None:
                    raise ConfigError("a picture is no longer here: choose it again")
                talk.attach(str(path))
            sampling = {name: value for name, value in sampling.items() if name in self.sampling}
            self._asking = str(request["session"])
            self.engine.send(talk.ask(text) | {"sampling": sampling})
            texts: dict[int, str] = {}
            events = self.engine.events()
            try:
                for event in events:
                    if "done" in event:
                        texts[event["model"]] = event["done"]["text"]
                    yield event
                talk.answered([texts[model] for model in range(len(self.names))])
            except GeneratorExit:  # the reader has left: the next question waits for the end of this one
                self.engine.stop()
                for _ in events:
                    pass
                raise
            except TrainingError as error:
                self.lost = error
                raise
            finally:
                self._asking = ""

    def stop(self, request: dict[str, Any]) -> None:
        """Ends the answer to this conversation's question, if one comes."""
        if self._asking == str(request.get("session")):
            self.engine.stop()


def curves(run: Path) -> str:
    """The run's loss, held-out loss and scores as figures; nothing of a folder that is no run's."""
    if not (run / "metrics.jsonl").is_file():
        return ""
    return "".join(results([RunFiles.read(run)]))


def held_out(
    demo: Demo, format: str, files: Sequence[str], image_root: str, most: int = 12
) -> list[tuple[str, str, list[str]]]:
    """The first question of some records: (question, answer, ids of its pictures, which the demo keeps).

    A video is asked as its frames, a line each: a page shows pictures alone.

    Raises:
        DataError: a record or a picture that cannot be read.
    """
    found: list[tuple[str, str, list[str]]] = []
    for source in open_sources(format, files, root=image_root):
        for _, _, record in islice(read_source(source), most - len(found)):
            if isinstance(record, DataError):
                raise record
            turns, pictures = load_record(source, record)
            place = next(i for i, turn in enumerate(turns) if turn.role == "user")
            text = announce(turns[place]).text
            ids = [demo.keep(data, name) for name, data in pictures[: text.count("<image>")]]
            found.append((text, turns[place + 1].text, ids))
    return found
