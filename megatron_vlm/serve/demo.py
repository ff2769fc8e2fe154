"""`megatron-vlm demo`: a conversation in the browser, with the standard library's server.

GET / page | POST /upload picture -> id | POST /ask -> a line of JSON an event, as it comes | /stop | /reset | GET /picture/id

Who may: the machine itself by its own names, or whoever has the token. A page of another site cannot: its requests lack the
header that only scripts of this page send, and its name for this machine is not one of ours.
"""

import hmac
import json
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from megatron_vlm.data.formats import open_sources, read_source
from megatron_vlm.data.images.pictures import probe_image
from megatron_vlm.data.shards.writer import load_record
from megatron_vlm.errors import ConfigError, DataError, MegatronVLMError, TrainingError, printable
from megatron_vlm.serve.conversation import Conversation
from megatron_vlm.serve.demo_page import demo_page
from megatron_vlm.serve.engine import Engine
from megatron_vlm.training.metrics.charts import Line, chart
from megatron_vlm.training.metrics.run_files import RunFiles, smoothed

LOCAL = ("127.0.0.1", "localhost", "::1")
_MOST_QUESTION = 1 << 20  # bytes of a question
_MOST_PICTURES, _MOST_SESSIONS = 1000, 100  # kept at a time; the oldest go


class Demo:
    """What all requests share.

    Args:
        engine: its models are loaded.
        names: of the models.
        system: a system turn before every conversation.
        sampling: what the fields start with.
        folder: for uploaded pictures.
        most_bytes: of a picture.
        token: who calls from elsewhere must have it; None: nobody else may call.
    """

    def __init__(
        self,
        engine: Engine,
        names: Sequence[str],
        *,
        system: str | None,
        sampling: dict[str, float],
        folder: Path,
        most_bytes: int,
        token: str | None,
    ):
        self.engine, self.names, self.system, self.sampling = engine, list(names), system, sampling
        self.folder, self.most_bytes, self.token = folder, most_bytes, token
        self.charts, self.examples = "", list[tuple[str, str, list[str]]]()
        self.talks: dict[str, Conversation] = {}
        self.pictures: dict[str, Path] = {}
        self.uploads: list[str] = []
        self.turn, self._asking = threading.Lock(), ""
        self.lost: Exception | None = None

    def keep(self, data: bytes, name: str, *, upload: bool = True) -> str:
        """Checks and stores a picture; returns its id.

        Raises:
            DataError: it is none, or beyond a limit.
        """
        extension = probe_image(data, name)[0]
        number = secrets.token_hex(8)
        path = self.folder / f"{number}.{extension}"
        path.write_bytes(data)
        self.pictures[number] = path
        if upload:
            self.uploads.append(number)
            if len(self.uploads) > _MOST_PICTURES:
                self.pictures.pop(self.uploads.pop(0)).unlink(missing_ok=True)
        return number

    def page(self, nonce: str) -> str:
        """The page, with a conversation of its own."""
        session = secrets.token_hex(8)
        while len(self.talks) >= _MOST_SESSIONS:
            self.talks.pop(next(iter(self.talks)))
        self.talks[session] = Conversation(self.names, self.system)
        return demo_page(
            self.names,
            self.charts,
            self.examples,
            self.sampling,
            session=session,
            nonce=nonce,
            most_bytes=self.most_bytes,
        )

    def talk(self, request: dict[str, Any]) -> Conversation:
        """The conversation that a request names.

        Raises:
            ConfigError: it is forgotten.
        """
        talk = self.talks.get(str(request.get("session")))
        if talk is None:
            raise ConfigError("this conversation is forgotten: load the page again")
        return talk

    def ask(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the events of an answer; one question at a time, others wait.

        Raises:
            MegatronVLMError: it cannot be answered.
        """
        talk, text = self.talk(request), request.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError("a question is a text")
        with self.turn:
            talk.attached = []
            for number in request.get("images") or ():
                if number not in self.pictures:
                    raise ConfigError("a picture is no longer here: choose it again")
                talk.attach(str(self.pictures[number]))
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
    """A server of one demo."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], demo: Demo):
        self.demo = demo
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    timeout = 60  # of a client that sends nothing
    server_version, sys_version = "megatron-vlm", ""

    def do_GET(self) -> None:
        demo, path = self.server.demo, urlsplit(self.path)
        if not self._may():
            return
        if path.path == "/":
            nonce = secrets.token_urlsafe(16)
            headers = {
                "Content-Security-Policy": f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
                "style-src-attr 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                "frame-ancestors 'none'"
            }
            if demo.token is not None:
                headers["Set-Cookie"] = f"token={demo.token}; HttpOnly; SameSite=Strict; Path=/"
            self._answer(HTTPStatus.OK, demo.page(nonce).encode(), "text/html; charset=utf-8", headers)
        elif path.path.startswith("/picture/") and (file := demo.pictures.get(path.path.removeprefix("/picture/"))):
            kind = {"jpg": "jpeg"}.get(file.suffix[1:], file.suffix[1:])
            self._answer(HTTPStatus.OK, file.read_bytes(), f"image/{kind}")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        demo, path = self.server.demo, urlsplit(self.path).path
        if not self._may():
            return
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
                self._json(HTTPStatus.OK, {"id": demo.keep(body, name)})
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
                demo.talk(request).reset()
                self._json(HTTPStatus.OK, {})
            else:
                self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
        except (MegatronVLMError, ValueError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))

    def _stream(self, events: Iterator[dict[str, Any]]) -> None:
        first = next(events)  # what cannot be asked is told with a status of its own
        self.send_response(HTTPStatus.OK)
        self._headers({"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        try:
            while first is not None:
                self.wfile.write((json.dumps(first) + "\n").encode())
                self.wfile.flush()
                first = next(events, None)  # type: ignore[arg-type]
        except MegatronVLMError as error:
            self.wfile.write((json.dumps({"error": str(error)}) + "\n").encode())
        except OSError:  # the reader has left
            events.close()  # type: ignore[attr-defined]

    def _may(self) -> bool:
        """Whether the caller may; tells it if not."""
        demo, token = self.server.demo, self.server.demo.token
        if token is None:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if host not in LOCAL:
                self._refuse(HTTPStatus.FORBIDDEN, f"this page is served to {', '.join(LOCAL)} alone")
                return False
            return True
        given = parse_qs(urlsplit(self.path).query).get("token", [])
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", ""))
            given += [cookie["token"].value] if "token" in cookie else []
        except CookieError:
            pass
        if not any(hmac.compare_digest(word.encode(), str(demo.token).encode()) for word in given):
            self._refuse(HTTPStatus.FORBIDDEN, "open the address with its token, as the program has printed it")
            return False
        return True

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
    files = RunFiles.read(run)
    loss = files.series("loss")
    smooth = list(zip([x for x, _ in loss], smoothed([y for _, y in loss])))
    lines = [
        Line(label="training", points=loss, faint=True),
        Line(label="training, smoothed", points=smooth),
        Line(label="held out", points=files.series("eval_loss"), marks=True),
    ]
    figures = [chart("loss per supervised token", lines)]
    figures += [chart(name, [Line(label=name, points=files.series(name), marks=True)]) for name in files.scores]
    return "".join(figures)


def held_out(
    demo: Demo, format: str, files: Sequence[str], image_root: str, most: int
) -> list[tuple[str, str, list[str]]]:
    """The first question of some records: (question, answer, ids of its pictures).

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
            ids = [demo.keep(data, name, upload=False) for name, data in shown]
            found.append((turns[place].text, turns[place + 1].text, ids))
    return found


def serve_demo(
    engine: Engine,
    names: Sequence[str],
    *,
    host: str,
    port: int,
    token: str | None,
    system: str | None,
    most_mb: float,
    run: Path,
    examples: dict[str, Any],
) -> None:
    """Serves until Ctrl-C.

    Args:
        engine, names, system: of the models.
        host, port: where; 0 is any free port.
        token: None: one is made where ``host`` is not this machine alone.
        most_mb: of an uploaded picture.
        run: folder whose curves are shown, if it is a run's.
        examples: arguments of ``held_out``; empty: none.

    Raises:
        ConfigError: the address cannot be served.
    """
    if token is None and host not in LOCAL:
        token = secrets.token_urlsafe(16)
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 512, "seed": 0} | engine.config.sampling
    with tempfile.TemporaryDirectory(prefix="megatron_vlm_demo_") as folder:
        demo = Demo(
            engine,
            names,
            system=system,
            sampling=sampling,
            folder=Path(folder),
            most_bytes=int(most_mb * 2**20),
            token=token,
        )
        demo.charts = curves(run)
        if examples:
            demo.examples = held_out(demo, **examples)
        try:
            server = DemoServer((host, port), demo)
        except OSError as error:
            raise ConfigError(f"cannot serve {host}:{port}: {error.strerror}: choose another --port") from error
        with server:
            query = f"/?token={token}" if token is not None else ""
            print(f"serving http://{host}:{server.server_address[1]}{query} (Ctrl-C ends it)", flush=True)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                while demo.lost is None:
                    time.sleep(0.5)
                raise demo.lost
            except KeyboardInterrupt:
                pass
            finally:
                server.shutdown()
