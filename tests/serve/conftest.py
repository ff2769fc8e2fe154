"""A tiny model to talk to, a picture, and a demo with nobody behind it."""

import http.client
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.errors import ConfigError
from megatron_vlm.serve.demo import Demo
from megatron_vlm.serve.demo_server import DemoServer
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2


@pytest.fixture(scope="session")
def twins(tmp_path_factory) -> tuple[Path, Path]:
    """Two checkpoints of other weights."""
    folders = tmp_path_factory.mktemp("talk") / "base", tmp_path_factory.mktemp("talk") / "tuned"
    for seed, folder in enumerate(folders):
        write_tiny_idefics2(folder, std=0.15, layers=4, seed=seed)
    return folders


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("a picture's") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(path)
    return path


class Echo:
    """Stands for the ranks: says what it was asked."""

    def send(self, request):
        self.request = request

    def events(self):
        for ask in self.request["asks"]:
            if "bad" in ask["turns"][-1][1]:
                raise ConfigError("it is bad")
            yield {"model": ask["model"], "text": "you said: "}
            yield {"model": ask["model"], "done": {"text": f"you said: {ask['turns'][-1][1]}"}}


@pytest.fixture
def serve(tmp_path):
    """``serve(token) -> (demo, call)``; ``call(method, path, body, headers) -> (status, body, headers)``."""
    servers = []

    def start(token=None):
        sampling = {"temperature": 0.0, "max_new_tokens": 8}
        names = ["base", "<img src=x onerror=alert(1)>"]
        demo = Demo(names, system=None, sampling=sampling, folder=tmp_path, most_bytes=1 << 20, token=token)
        server = DemoServer("127.0.0.1", 0)
        demo.engine, server.demo, demo.port = Echo(), demo, server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)

        def call(method, path, body=None, headers=(), length=None):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
            connection.putrequest(method, path, skip_host="Host" in dict(headers))
            for name, value in {"X-Demo": "1", **dict(headers)}.items():
                connection.putheader(name, value)
            if body is not None or length:
                connection.putheader("Content-Length", str(length or len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())

        return demo, call

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
