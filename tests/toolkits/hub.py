"""A small model hub on localhost: the few answers that huggingface_hub asks for, with ranges and a connection that breaks."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class Hub:
    """Serves one model.

    Attributes:
        url: for HF_ENDPOINT.
        files: name -> bytes.
        sent: (name, first byte) of each answer with content, in order.
        breaks: names whose next answer ends halfway.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files, self.sent, self.breaks = files, [], set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, body: bytes, **headers):
                self.send_response(int(headers.pop("status", 200)))
                for name, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                path = self.path.split("?")[0]
                if "/resolve/" in path:
                    return self.file(path.rpartition(f"{COMMIT}/")[2] if COMMIT in path else path.rpartition("/")[2])
                if "/tree/" in path:
                    listed = [
                        {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                        for name, body in hub.files.items()
                    ]
                    return self.answer(json.dumps(listed).encode(), Content_Type="application/json")
                info = {"id": "me/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]}
                return self.answer(json.dumps(info).encode(), Content_Type="application/json")

            def file(self, name: str):
                body = hub.files[name]
                first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
                headers = {
                    "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
                    "X-Repo-Commit": COMMIT,
                    "Accept-Ranges": "bytes",
                }
                if self.command == "GET":
                    hub.sent.append((name, first))
                if self.command == "GET" and name in hub.breaks:
                    hub.breaks.discard(name)
                    self.send_response(200)
                    for key, value in {"Content-Length": len(body), **headers}.items():
                        self.send_header(key, str(value))
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return
                if first:
                    headers |= {"status": 206, "Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"}
                self.answer(body[first:], **headers)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Ends the server."""
        self.server.shutdown()
        self.server.server_close()
