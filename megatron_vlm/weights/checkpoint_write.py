"""How a training checkpoint appears on disk at once, and how old ones go.

    DIR/iter_0000100.tmp-1f3a/  --commit--> DIR/iter_0000100/{manifest.json, state.json, rankR.safetensors, hf/}
    DIR/latest_checkpointed_iteration.txt: "100", written last

A kill at any moment leaves the previous checkpoint or the new one: files are flushed before the manifest that lists
them, the manifest before the folder gets its name, and the name before the tracker says so.
"""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_vlm.digests import sealed
from megatron_vlm.errors import CheckpointError
from megatron_vlm.files import file_digest, sync_path, sync_tree, write_json, write_synced
from megatron_vlm.log import get_logger
from megatron_vlm.weights.checkpoint_dir import (
    BEST,
    FORMAT,
    MANIFEST,
    SEQUENCE,
    STATE,
    TRACKER,
    folder_name,
    iteration_of,
    iterations,
    next_sequence,
)
from megatron_vlm.weights.model_folder import CarriedFiles
from megatron_vlm.weights.remote import newest_sequence, upload

_LEFTOVER = re.compile(r"iter_\d{7,}\.(tmp|old)-[0-9a-f]+")

log = get_logger(__name__)


def begin(root: Path, iteration: int, num_bytes: int) -> Path:
    """Makes the temporary folder of a new checkpoint.

    Args:
        root: ``--save``; made where it does not exist.
        iteration: of the new checkpoint.
        num_bytes: what will be written.

    Raises:
        CheckpointError: the disk is too small.
        OSError: the folder cannot be made.
    """
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < num_bytes:
        raise CheckpointError(
            f"{root} has {free / 1e9:.2f} GB free, a checkpoint needs {num_bytes / 1e9:.2f} GB: free some space, lower "
            "checkpoint.keep_last, or set checkpoint.no_save_optim"
        )
    folder = root / f"{folder_name(iteration)}.tmp-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    return folder


def commit(temporary: Path, records: Mapping[str, dict[str, Any]], facts: Mapping[str, Any], after: int = 0) -> Path:
    """Turns a written temporary folder into ``iter_NNNNNNN`` and names it in the tracker.

    Args:
        temporary: from ``begin``, with all files in it.
        records: size and sha256 of files that are flushed already; the others are read for it.
        facts: what else the manifest says.
        after: number of a save elsewhere that this one follows.

    Raises:
        CheckpointError: a file that was written elsewhere is not visible here.
        OSError: the disk refuses; the previous checkpoint is untouched.
    """
    for name, record in records.items():
        path = temporary / name
        if not path.exists() or path.stat().st_size != record["size"]:
            raise CheckpointError(
                f"{path} was written by another rank and is not visible here: checkpoint.save must lie on a file "
                "system that all nodes share"
            )
    facts = {**facts, SEQUENCE: max(next_sequence(temporary.parent), after + 1)}
    files = {str(p.relative_to(temporary)): p for p in sorted(temporary.rglob("*")) if p.is_file()}
    listed = {name: records.get(name) or file_digest(path, CheckpointError) for name, path in files.items()}
    write_json(temporary / MANIFEST, sealed({"format": FORMAT, **facts, "files": listed}))
    sync_tree(temporary)
    final = temporary.with_name(temporary.name.partition(".")[0])
    if final.exists():  # a run that went back to an older checkpoint passes this iteration again
        log.warning("replacing %s, which an earlier run wrote", final)
        os.rename(final, temporary.with_name(temporary.name.replace(".tmp-", ".old-")))
    os.rename(temporary, final)
    sync_path(final.parent)
    write_synced(final.parent / TRACKER, f"{iteration_of(final)}\n".encode())
    return final


def finish(
    temporary: Path,
    records: Mapping[str, dict[str, Any]],
    facts: Mapping[str, Any],
    state: Mapping[str, Any],
    hf_files: CarriedFiles | None,
    keep_last: int | None,
    protect: Iterable[Path],
    url: str | None = None,
    best: Mapping[str, Any] | None = None,
) -> Path:
    """What rank 0 does once all rank files are there: the files beside them, the commit, and then the end of old checkpoints.

    Args:
        temporary, records: see ``commit``.
        facts: of the manifest.
        state: of state.json.
        hf_files: for ``hf/``.
        keep_last, protect: see ``purge``.
        url: store that the checkpoint is copied to (remote.py), where ``keep_last`` counts; here the newest stays.
        best: of best.json; the iteration under ``best`` stays as well.

    Returns:
        The new folder.

    Raises:
        CheckpointError, OSError: as ``commit``.
    """
    if hf_files is not None:
        hf_files.write(temporary / "hf")
    write_json(temporary / STATE, state)
    after, silence = 0, None
    if url is not None:
        try:
            after = newest_sequence(url)
        except CheckpointError as error:  # what was saved here stays, and is told of as not uploaded
            silence = error
    final = commit(temporary, records, facts, after)
    kept = (best or {}).get("best")
    if best is not None:
        write_json(final.parent / BEST, best)
    if silence is not None:
        raise silence
    if url is not None:
        upload(final, url, keep_last, kept, [BEST] if best is not None else [])
        keep_last = 1
    elif kept is not None:
        protect = [*protect, final.parent / folder_name(kept)]
    with contextlib.suppress(OSError):
        purge(final.parent, iteration_of(final), keep_last, protect)
    return final


def discard(temporary: Path) -> None:
    """Removes what a failed save left."""
    shutil.rmtree(temporary, ignore_errors=True)


def purge(root: Path, newest: int, keep_last: int | None, protect: Iterable[Path] = ()) -> None:
    """Removes all but the last ``keep_last`` checkpoints up to ``newest``, and what killed saves left.

    Folders of later iterations, which an abandoned run wrote, are not counted and stay.

    Args:
        root: ``--save``.
        newest: iteration just saved.
        keep_last: None keeps all.
        protect: folders that stay in any case (the one that this run was loaded from).
    """
    kept = {path.resolve() for path in protect}
    doomed = [entry for entry in root.iterdir() if _LEFTOVER.fullmatch(entry.name)]
    if keep_last is not None:
        older = [i for i in iterations(root) if i <= newest]
        doomed += [root / folder_name(i) for i in older[:-keep_last]]
    for folder in doomed:
        if folder.resolve() in kept:
            continue
        # Renamed first: a folder under its own name is whole, even if the run is killed in here.
        gone = folder.with_name(f"{folder.name.partition('.')[0]}.old-{uuid.uuid4().hex[:12]}")
        with contextlib.suppress(OSError):
            os.rename(folder, gone)
            shutil.rmtree(gone)
