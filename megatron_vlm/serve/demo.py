"""`megatron-vlm demo`: a conversation in the browser, with the standard library's server.

GET / page | POST /upload picture -> id | POST /ask -> a line of JSON an event, as it comes | /stop | /reset
           | GET /picture/SESSION/id: of that conversation, or of the examples

Who may: the machine itself by its own names, or whoever has the token. A page of another site cannot: its requests lack the
header that only scripts of this page send, and its name for this machine is not one of ours.
"""

import hmac
import json
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from megatron_vlm.data.formats import open_sources, read_source
from megatron_vlm.data.images.pictures import probe_image
from megatron_vlm.data.shards.writer import load_record
from megatron_vlm.errors import ConfigError, DataError, MegatronVLMError, TrainingError, printable
from megatron_vlm.serve.config import ServeConfig
from megatron_vlm.serve.conversation import Conversation
from megatron_vlm.serve.demo_page import demo_page
from megatron_vlm.serve.engine import Engine
from megatron_vlm.training.metrics.report_page import results
from megatron_vlm.training.metrics.run_files import RunFiles

LOCAL = ("127.0.0.1", "localhost", "::1")
_MOST_QUESTION = 1 << 20  # bytes of a question
_MOST_SESSIONS, _MOST_STORED = 100, 1 << 30  # conversations and bytes of uploads kept at a time; the oldest go
_PORT = re.compile(r":\d*$")
_LEAST_STORED = 1 << 16  # that a picture counts as, however small


@dataclass
class Session:
    """A page: its conversation, the pictures that were uploaded from it, and their bytes as they count."""

    talk: Conversation
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
            if session is not None:
                size = max(len(data), _LEAST_STORED)
                self._make_room(size, session, name)
                session.stored += size
            path.write_bytes(data)
            (self.pictures if session is None else session.pictures)[number] = path
        return number

    def _make_room(self, size: int, session: Session, name: str) -> None:
        """Forgets the sessions that were used longest ago until there is room for ``size`` more bytes."""
        while sum(other.stored for other in self.sessions.values()) + size > _MOST_STORED:
            others = (n for n, s in self.sessions.items() if s.stored and s is not session and n != self._asking)
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
            while len(self.sessions) >= _MOST_SESSIONS:
                self.sessions.pop(next(name for name in self.sessions if name != self._asking)).forget()
            self.sessions[session] = Session(Conversation(self.names, self.system))
        return demo_page(
            self.names,
            self.charts,
            self.examples,
            self.sampling,
            session=session,
            nonce=nonce,
            most_bytes=self.most_bytes,
        )

    def session(self, name: Any) -> Session:
        """The session of that name.

        Raises:
            ConfigError: it is forgotten.
        """
        with self._lock:
            session = self.sessions.pop(str(name), None)
            if session is None:
                raise ConfigError("this conversation is forgotten: load the page again")
            self.sessions[str(name)] = session  # now the one that was used last
            return session

    def ask(self, request: dict[str, Any]) -> Generator[dict[str, Any]]:
        """Yields the events of an answer; one question at a time, others wait.

        Raises:
            MegatronVLMError: it cannot be answered.
        """
        session, text = self.session(request.get("session")), request.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError("a question is a text")
        with self._turn:
            talk = session.talk
            talk.attached = []
            for number in request.get("images") or ():
                if (path := self.picture(request["session"], str(number))) is None:
                    raise ConfigError("a picture is no longer here: choose it again")
                talk.attach(str(path))
            sampling = {name: value for name, value in (request.get("sampling") or {}).items() if name in self.sampling}
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


class DemoServer(ThreadingHTTPServer):
    """A server of one demo.

    Args:
        host, port: where; 0 is any free port.

    Raises:
        ConfigError: the address cannot be served.
    """

    daemon_threads = True

    demo: Demo

    def __init__(self, host: str, port: int):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot serve --host {host} --port {port}: {reason}") from error
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    timeout = 60  # of a client that sends nothing
    server_version, sys_version = "megatron-vlm", ""

    def do_GET(self) -> None:
        if not self._may():
            return
        demo, path = self.server.demo, self.path.partition("?")[0]
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            headers = {
                "Content-Security-Policy": f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
                "style-src-attr 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                "frame-ancestors 'none'"
            }
            if demo.token is not None:
                headers["Set-Cookie"] = f"{self._cookie}={demo.token}; HttpOnly; SameSite=Strict; Path=/"
            self._answer(HTTPStatus.OK, demo.page(nonce).encode(), "text/html; charset=utf-8", headers)
        elif path.startswith("/picture/") and (
            file := demo.picture(*path.removeprefix("/picture/").partition("/")[::2])
        ):
            kind = {"jpg": "jpeg"}.get(file.suffix[1:], file.suffix[1:])
            self._answer(HTTPStatus.OK, file.read_bytes(), f"image/{kind}")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        if not self._may():
            return
        demo, path = self.server.demo, self.path.partition("?")[0]
        if self.headers.get("X-Demo") != "1":
            self._refuse(HTTPStatus.FORBIDDEN, "this is no request of the page")
            return
        most = demo.most_bytes if path == "/upload" else _MOST_QUESTION
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > most:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length or 'unknown'} bytes, the limit is {most}")
            return
        body = self.rfile.read(int(length))
        try:
            if path == "/upload":
                name = printable(unquote(self.headers.get("X-Name", "picture"))[:200])
                session = demo.session(self.headers.get("X-Session"))
                self._json(HTTPStatus.OK, {"id": demo.keep(body, name, session)})
                return
            request = json.loads(body)
            if not isinstance(request, dict):
                raise ConfigError("a request is a mapping")
            if path == "/ask":
                self._stream(demo.ask(request))
            elif path == "/stop":
                demo.stop(request)
                self._json(HTTPStatus.OK, {})
            elif path == "/reset":
                demo.session(request.get("session")).forget()
                self._json(HTTPStatus.OK, {})
            else:
                self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
        except (MegatronVLMError, ValueError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))

    def _stream(self, events: Generator[dict[str, Any]]) -> None:
        first: dict[str, Any] | None = next(events)  # what cannot be asked is told with a status of its own
        self.send_response(HTTPStatus.OK)
        self._headers({"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        try:
            while first is not None:
                self.wfile.write((json.dumps(first) + "\n").encode())
                self.wfile.flush()
                first = next(events, None)
        except MegatronVLMError as error:
            self.wfile.write((json.dumps({"error": str(error)}) + "\n").encode())
        except OSError:  # the reader has left
            events.close()

    def _may(self) -> bool:
        """Whether the caller may; tells it if not."""
        demo, token = self.server.demo, self.server.demo.token
        if token is None:
            if _PORT.sub("", self.headers.get("Host", "")).strip("[]").lower() not in LOCAL:
                self._refuse(HTTPStatus.FORBIDDEN, f"this page is served to {', '.join(LOCAL)} alone")
                return False
            return True
        given = parse_qs(self.path.partition("?")[2]).get("token", [])
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", ""))
            given += [cookie[self._cookie].value] if self._cookie in cookie else []
        except CookieError:
            pass
        if not any(hmac.compare_digest(word.encode(), str(demo.token).encode()) for word in given):
            self._refuse(HTTPStatus.FORBIDDEN, "open the address with its token, as the program has printed it")
            return False
        return True

    @property
    def _cookie(self) -> str:
        """Its name: a browser gives cookies to all ports of a machine."""
        return f"token_{self.server.server_address[1]}"

    def _json(self, status: HTTPStatus, data: dict[str, Any]) -> None:
        self._answer(status, json.dumps(data).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True
        self._json(status, {"error": why})

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self._headers({"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def _headers(self, headers: dict[str, str]) -> None:
        for name, value in {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for the address."""


def curves(run: Path) -> str:
    """The run's loss, held-out loss and scores as figures; nothing of a folder that is no run's."""
    if not (run / "metrics.jsonl").is_file():
        return ""
    return "".join(results([RunFiles.read(run)]))


def held_out(
    demo: Demo, format: str, files: Sequence[str], image_root: str, most: int = 12
) -> list[tuple[str, str, list[str]]]:
    """The first question of some records: (question, answer, ids of its pictures, which the demo keeps).

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
            shown = pictures[: turns[place].text.count("<image>")]
            ids = [demo.keep(data, name) for name, data in shown]
            found.append((turns[place].text, turns[place + 1].text, ids))
    return found


def serve_demo(
    config: ServeConfig,
    *,
    host: str,
    port: int,
    token: str | None,
    system: str | None,
    most_mb: float,
    run: Path,
    examples: dict[str, Any],
) -> None:
    """Serves until Ctrl-C. What can be wrong is looked at before the models are loaded.

    Args:
        config: the models.
        host, port: where; 0 is any free port.
        token: None: one is made where ``host`` is not this machine alone.
        system: a system turn before every conversation.
        most_mb: of an uploaded picture.
        run: folder whose curves are shown, if it is a run's.
        examples: arguments of ``held_out``; empty: none.

    Raises:
        ConfigError: the address cannot be served.
        DataError: an example that cannot be read.
    """
    if token is None and host not in LOCAL:
        token = secrets.token_urlsafe(16)
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 512, "seed": 0} | config.sampling
    names, most = [model.name for model in config.models], int(most_mb * 2**20)
    with tempfile.TemporaryDirectory(prefix="megatron_vlm_demo_") as folder, DemoServer(host, port) as server:
        demo = Demo(names, system=system, sampling=sampling, folder=Path(folder), most_bytes=most, token=token)
        server.demo, demo.charts = demo, curves(run)
        if examples:
            demo.examples = held_out(demo, **examples)
        print(f"loading {' and '.join(names)} ...", flush=True)
        with Engine(config) as demo.engine:
            demo.engine.ready()
            query = f"/?token={token}" if token is not None else ""
            print(f"serving {server.address}{query} (Ctrl-C ends it)", flush=True)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                while demo.lost is None:
                    time.sleep(0.5)
                raise demo.lost
            except KeyboardInterrupt:
                pass
            finally:
                server.shutdown()
