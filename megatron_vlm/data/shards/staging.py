"""The folder that a build works in: locked, kept if the process is killed, recognised by the next one."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats.records import RECORDS_VERSION, RecordSource
from megatron_vlm.data.shards.writer import MANIFEST_VERSION
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import write_synced


@contextlib.contextmanager
def partial_folder(out: Path, fingerprint: str) -> Iterator[Path | None]:
    """Gives the folder to build in, with what an earlier build of the same fingerprint has done; None: all is done.

    The folder stays if this process is killed and goes away if it ends in any other way.
    """
    folder = out.parent / f".{out.name}.partial"
    full = os.path.exists(out) and (not os.path.isdir(out) or any(out.iterdir()))
    known = folder / "build.json"
    if full and not (os.path.isfile(known) and known.read_text() == fingerprint):
        with contextlib.suppress(OSError):
            folder.rmdir()  # empty: killed at its very last step
        raise ConfigError(f"{out} exists and is not an empty folder: remove it or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process builds {out} at this moment") from error
        try:
            if not full:
                if not os.path.isfile(known) or known.read_text() != fingerprint:
                    for name in ("build.json", "done", "out"):
                        shutil.rmtree(folder / name) if os.path.isdir(folder / name) else (folder / name).unlink(True)
                    write_synced(known, fingerprint.encode())
                for name in ("done", "out"):
                    (folder / name).mkdir(exist_ok=True)
                for left in (folder / "out").rglob(".*.tmp"):  # of a write that was killed
                    left.unlink(missing_ok=True)
            yield None if full else folder
        finally:
            for name in ("done", "out"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in ("lock", "build.json"):  # the last one says whose traces these are
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
    finally:
        os.close(lock)


def fingerprint_of(sources: Sequence[RecordSource], settings: Mapping[str, Any]) -> str:
    """Returns a text that is the same for the same inputs and settings. Images are taken not to change meanwhile."""
    inputs = []
    for source in sources:
        path = Path(source.path)
        files = sorted(p for p in path.rglob("*") if os.path.isfile(p)) if os.path.isdir(path) else [path]
        stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if os.path.exists(p)]
        inputs.append([dataclasses.asdict(source), stats])
    text = json.dumps([MANIFEST_VERSION, RECORDS_VERSION, inputs, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
