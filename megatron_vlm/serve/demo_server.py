"""The server of `megatron-vlm demo`, the standard library's.

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
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from megatron_vlm.errors import ConfigError, MegatronVLMError, printable
from megatron_vlm.log import get_logger
from megatron_vlm.serve.config import ServeConfig
from megatron_vlm.serve.demo import Demo, curves, held_out
from megatron_vlm.serve.engine import Engine

log = get_logger(__name__)

LOCAL = ("127.0.0.1", "localhost", "::1")
_MOST_QUESTION = 1 << 20  # bytes of a question
_PORT = re.compile(r":\d*$")


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

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that leaves, or a fault of ours, ends that request alone; the terminal gets at most a line."""
        error = sys.exception()
        if not isinstance(error, (ConnectionError, TimeoutError)):
            log.warning("a request failed: %s: %s", type(error).__name__, printable(str(error)))


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    timeout = 60  # of a client that sends nothing
    server_version, sys_version = "megatron-vlm", ""

    def do_GET(self) -> None:
        if not self._may():
            return
        demo, path = self.server.demo, self.path.partition("?")[0]
        if path == "/" and self._embeds():
            self._refuse(HTTPStatus.FORBIDDEN, "this page is not part of another")
        elif path == "/":
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
        if not length.isdecimal() or len(length) > 18 or int(length) > most:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length[:18] or 'unknown'} bytes, the limit is {most}")
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
        except (MegatronVLMError, ValueError, RecursionError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except (ConnectionError, TimeoutError):  # the caller has left
            raise
        except OSError as error:  # a full disk, say
            log.warning("a request failed: %s", printable(str(error)))
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"the server failed: {error.strerror or error}")

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

    def _embeds(self) -> bool:
        """A page of another site asks for a picture, a frame or the like; browsers that do not say so are believed."""
        elsewhere = self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
        return elsewhere and self.headers.get("Sec-Fetch-Dest") != "document"

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
