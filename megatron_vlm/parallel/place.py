"""Where a rank stands in its job, as torchrun's variables say, and the store through which the ranks meet."""

import contextlib
import datetime
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatron_vlm.errors import ConfigError, TrainingError
from megatron_vlm.processes import Identity, children

START_TIMEOUT = 40.0


@dataclass(frozen=True)
class Place:
    """Where this rank stands in its job.

    Attributes:
        rank, world: of the job; world 1: alone, or in a process group that somebody else made.
        host, port: where the store is.
        agent: torchrun keeps the store, else rank 0 does.
        attempt: number of torchrun's restarts.
        parent: torchrun's agent, where one started this process.
    """

    rank: int = 0
    world: int = 1
    host: str = ""
    port: int = 0
    agent: bool = False
    attempt: str = "0"
    parent: int | None = None

    @classmethod
    def of_environment(cls) -> Self:
        """Reads the variables that torchrun sets, or a scheduler's script."""
        env = os.environ
        parent = os.getppid() if "TORCHELASTIC_RUN_ID" in env else None
        distributed = sys.modules.get("torch.distributed")
        joined = distributed is not None and distributed.is_initialized()
        if joined or int(env.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in env or "RANK" not in env:
            return cls(rank=int(env.get("RANK", "0")), parent=parent)
        return cls(
            rank=int(env["RANK"]),
            world=int(env["WORLD_SIZE"]),
            host=env["MASTER_ADDR"],
            port=int(env.get("MASTER_PORT", "29500")),
            agent=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=env.get("TORCHELASTIC_RESTART_COUNT", "0"),
            parent=parent,
        )

    def __str__(self) -> str:
        return f"{'the store of torchrun' if self.agent else 'rank 0'} at {self.host}:{self.port}"

    def beside(self) -> dict[int, Identity]:
        """Ranks of this job that torchrun started on this host: processes of one parent whose RANK says so."""
        found = {}
        for pid in children(self.parent) if self.parent is not None else ():
            with contextlib.suppress(OSError, ValueError):
                words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                variables = dict(word.partition("=")[::2] for word in words)
                if variables.get("TORCHELASTIC_RUN_ID") == os.environ.get("TORCHELASTIC_RUN_ID"):
                    found[int(variables.get("RANK", ""))] = Identity.of(pid)
        return found

    def open_store(self, *, server: bool = False, seconds: float = START_TIMEOUT) -> Any:
        """A connection to the job's store; with ``server``, the store as well.

        Raises:
            ConfigError: the port is taken.
            TrainingError: nobody answers for ``seconds``.
        """
        from torch.distributed import PrefixStore, TCPStore

        try:
            if not server:
                _wait_for_port(self.host, self.port, seconds)
            store = TCPStore(
                self.host,
                self.port,
                self.world,
                is_master=server,
                timeout=datetime.timedelta(seconds=seconds),
                wait_for_workers=False,
            )
        except (RuntimeError, OSError) as error:
            why = str(error).splitlines()[0]
            if server:
                raise ConfigError(f"rank 0 cannot listen on MASTER_PORT {self.port}: {why}: set another") from error
            raise TrainingError(f"{self} does not answer for {seconds:.0f} s: {why}") from error
        prefixed = PrefixStore(f"megatron_vlm/{self.attempt}", store)
        prefixed.compare_set("verdict", "", "-")
        return prefixed


def _wait_for_port(host: str, port: int, seconds: float) -> None:
    """Waits until somebody listens; torch's store would repeat its own time-out, and tell of each in many lines.

    Raises:
        OSError: nobody does.
    """
    patience = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, patience - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > patience:
                raise
            time.sleep(0.1)
