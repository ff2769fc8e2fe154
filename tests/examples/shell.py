"""Running the scripts of examples/ as a user does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**variables: object) -> dict[str, str]:
    """An environment for a script: this one's few general variables and choice of installation, and ``variables``."""
    general = ("HOME", "PATH", "TMPDIR", "LANG")
    kept = {k: v for k, v in os.environ.items() if k in general or k.startswith("MEGATRON_VLM_")}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    fixed = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    return {**kept, **fixed, **{name: str(value) for name, value in variables.items()}}


def start(script: str, *arguments: str, **variables: object) -> subprocess.Popen:
    """Starts a script of examples/, in a process group of its own."""
    return subprocess.Popen(
        ["sh", str(EXAMPLES / script), *arguments],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
