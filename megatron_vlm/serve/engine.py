"""The ranks that hold the models, seen from the program that talks to the user. Imports no torch, so that it starts at once.

Engine(config) --ready()--> names | send(question) --> events(): {model, text} ... {model, done}, until all have ended
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Self

from megatron_vlm.errors import ConfigError, MegatronVLMError, TrainingError
from megatron_vlm.serve.config import ServeConfig

Event = dict[str, Any]
_LOOK_SECONDS = 0.5
_END_SECONDS = 5.0


class Engine:
    """Starts the ranks; use it as a context manager, from the thread that ends last.

    Attributes:
        config: what they serve.
    """

    def __init__(self, config: ServeConfig):
        if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "this command starts its ranks itself, on this machine: run it once, without torchrun, with --tp and --pp"
            )
        self.config = config
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._waiting: queue.Queue[Event | None] = queue.Queue()
        world = config.tp * config.pp
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._ranks = []
        for rank in range(world):
            place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            self._ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "megatron_vlm.serve.ranks"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=self._errors,
                    env=os.environ | ({name: str(value) for name, value in place.items()} if world > 1 else {}),
                    text=True,
                    encoding="utf-8",
                    start_new_session=True,  # Ctrl-C is the front's to hear
                )
            )
        threading.Thread(target=self._listen, daemon=True).start()
        self.send(config.to_dict())

    def ready(self) -> list[str]:
        """Waits until the models are loaded; returns their names.

        Raises:
            MegatronVLMError: why they cannot be.
        """
        return self._next()["ready"]

    def send(self, request: Mapping[str, Any]) -> None:
        """Asks; see ``ranks.Served.answer``."""
        line = json.dumps(request) + "\n"
        for rank in self._ranks:
            assert rank.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # told of by _next
                rank.stdin.write(line)
                rank.stdin.flush()

    def stop(self) -> None:
        """Ends the answers that come; ``events`` still gives their ends. Safe in a signal handler."""
        self.send({"stop": True})

    def events(self) -> Iterator[Event]:
        """Yields what comes of the question that was sent last.

        Raises:
            MegatronVLMError: the question cannot be answered, in words for its user; or the ranks are gone.
        """
        error = None
        while "end" not in (event := self._next()):
            if "error" in event:
                error = ConfigError(event["error"])
            else:
                yield event
        if error is not None:
            raise error

    def _next(self) -> Event:
        while True:
            try:
                event = self._waiting.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if all(rank.poll() is None for rank in self._ranks):
                    continue
                event = None
            if event is None:
                self._errors.seek(0)
                said = self._errors.read().strip()[-2000:]
                raise TrainingError(f"the model's process ended by itself{': ' if said else ''}{said}")
            if "fatal" in event:
                raise MegatronVLMError(event["fatal"])
            return event

    def _listen(self) -> None:
        lines = self._ranks[0].stdout
        assert lines is not None
        for line in lines:
            self._waiting.put(json.loads(line))
        self._waiting.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.stdin.close()  # type: ignore[union-attr]
        for rank in self._ranks:
            try:
                rank.wait(_END_SECONDS if error[0] is None else 0)  # after an error there is nothing to wait for
            except subprocess.TimeoutExpired:
                os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()
        self._errors.close()
