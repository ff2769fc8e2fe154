"""Folders of training checkpoints on disk: which are whole, which one to load, and how a new one appears at once.

    DIR/iter_0000100.tmp-1f3a/  --commit--> DIR/iter_0000100/{manifest.json, state.json, rankR.safetensors, hf/}
    DIR/latest_checkpointed_iteration.txt: "100", written last

A kill at any moment leaves the previous checkpoint or the new one: files are flushed before the manifest that lists
them, the manifest before the folder gets its name, and the name before the tracker says so. No megatron, no process
group.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm import files
from megatron_vlm.digests import Record, check_seal, sealed
from megatron_vlm.errors import CheckpointError
from megatron_vlm.files import file_digest, sync_path, sync_tree, write_synced
from megatron_vlm.log import get_logger
from megatron_vlm.weights.iterations import (
    MANIFEST,
    RELEASE,
    SEQUENCE,
    TRACKER,
    check_tracker,
    compare,
    folder_name,
    is_iteration,
    iteration_of,
    iterations,
    newest_first,
    next_sequence,
    read_tracker,
)

STATE = "state.json"
FORMAT = "megatron_vlm.checkpoint.1"
_LEFTOVER = re.compile(r"iter_\d{7,}\.(tmp|old)-[0-9a-f]+")

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Folders that could be loaded, the wanted one first.

    Attributes:
        folders: in the order in which they are tried.
        explicit: the user named it, so there is no other.
        tracker: what the tracker says, where it is not explicit.
    """

    folders: tuple[Path, ...]
    explicit: bool
    tracker: str | None = None


def candidates(path: Path, ckpt_step: int | None = None) -> Candidates | None:
    """Lists what ``--load path`` and ``--ckpt-step`` mean; None where ``path`` holds no training checkpoint.

    Without ``ckpt_step`` these are all iterations, the one that was written last in front, whatever the tracker says: it is
    compared with the one that is taken.

    Raises:
        CheckpointError: the named iteration is absent, or there is a tracker and no iteration.
    """
    if not path.is_dir():
        return None
    if ((path / MANIFEST).exists() and (path / STATE).exists()) or is_iteration(path):
        if ckpt_step not in (None, iteration_of(path)):
            raise CheckpointError(f"--load {path} is one iteration, --ckpt-step {ckpt_step} another: drop one of them")
        return Candidates(folders=(path,), explicit=True)
    present = iterations(path)
    if ckpt_step is not None:
        if ckpt_step not in present:
            known = ", ".join(map(str, present)) or "none"
            raise CheckpointError(f"{path} has no {folder_name(ckpt_step)} (--ckpt-step); iterations there: {known}")
        return Candidates(folders=(path / folder_name(ckpt_step),), explicit=True)
    tracker = read_tracker(path)
    if tracker == RELEASE:
        release = path / RELEASE
        return Candidates(folders=(release,), explicit=True) if (release / MANIFEST).exists() else None
    folders = newest_first(path)
    if not folders and tracker is not None:
        check_tracker(path, tracker)
    return Candidates(folders=tuple(folders), explicit=False, tracker=tracker) if folders else None


def tracked_folder(root: Path) -> Path:
    """The newest checkpoint of a run; a tracker that names another one is told of.

    Raises:
        CheckpointError: there is none.
    """
    tracker, folders = read_tracker(root), newest_first(root)
    if tracker == RELEASE and (root / RELEASE).is_dir():
        return root / RELEASE
    if not folders:
        check_tracker(root, tracker or "")
    folder = next((one for one in folders if (one / MANIFEST).is_file()), folders[0])
    if said := compare(root, tracker, folder):
        log.warning("%s", said)
    return folder


def checkpoint_record(directory: Path) -> Record:
    """The files of a checkpoint, as its manifest lists them, of the sizes that it says.

    Raises:
        CheckpointError: files absent or damaged.
    """
    manifest = read_json(directory, MANIFEST)
    check_seal(manifest, directory / MANIFEST, CheckpointError, required=False)
    record = Record(
        folder=directory,
        source=MANIFEST,
        files=manifest.get("files"),  # type: ignore[arg-type]  # checked by Record
        error=CheckpointError,
        advice="take another iteration, or a copy",
    )
    record.check_sizes()
    return record


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Reads one of the folder's JSON files.

    Raises:
        CheckpointError: absent, or not a JSON object.
    """
    if not (folder / name).exists():
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no {name}")
    return files.read_json(folder / name, CheckpointError)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON object and flushes it to disk. Numbers that are not finite are refused."""
    with open(path, "x", encoding="utf-8") as file:
        json.dump(data, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def verify(folder: Path, *, share: int = 0, shares: int = 1, hashes: bool = True) -> None:
    """Compares a folder with its manifest: every size, and the sha256 of each ``shares``-th file from ``share`` on.

    Raises:
        CheckpointError: a file is absent, of another size or of other content; the message names it.
    """
    manifest = read_json(folder, MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest.get('format')!r}, this version reads {FORMAT!r}")
    record = checkpoint_record(folder)
    if hashes:
        record.check_digests(share=share, shares=shares)


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


def commit(temporary: Path, records: Mapping[str, dict[str, Any]], facts: Mapping[str, Any]) -> Path:
    """Turns a written temporary folder into ``iter_NNNNNNN`` and names it in the tracker.

    Args:
        temporary: from ``begin``, with all files in it.
        records: size and sha256 of files that are flushed already; the others are read for it.
        facts: what else the manifest says.

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
    facts = {**facts, SEQUENCE: next_sequence(temporary.parent)}
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
