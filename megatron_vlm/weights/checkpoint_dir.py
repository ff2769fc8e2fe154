"""Folders of training checkpoints on disk: which there are, which one is taken, and whether it is whole.

    DIR/iter_0000100/{manifest.json {"sequence": 7}, state.json, rankR.safetensors, hf/}      one iteration
    DIR/release/                         weights that start at iteration 0, a checkpoint or Megatron weights
    DIR/latest_checkpointed_iteration.txt    "100": one short number that anything may change; it is only compared

    DIR or DIR/iter_N --candidates--> folders, the one written last in front --choose--> the first sound one

The one reader: training, conversion, generation, launching and adapters all take what this takes. checkpoint_write.py writes
them. No megatron, no process group.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_vlm.digests import Record, check_seal
from megatron_vlm.errors import CheckpointError, MegatronVLMError
from megatron_vlm.files import read_json, read_text
from megatron_vlm.log import get_logger

TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best.json"
MANIFEST = "manifest.json"
STATE = "state.json"
RELEASE = "release"
"""Name of a folder, and content of the tracker, for weights that start at iteration 0."""
SEQUENCE = "sequence"
"""Key of a manifest: grows with every checkpoint of a folder, also where a run went back to an earlier iteration."""
FORMAT = "megatron_vlm.checkpoint.1"
_NAME = re.compile(r"iter_(\d{7,})")
T = TypeVar("T")

log = get_logger(__name__)


# ---- which one ----


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Folders that could be loaded, the wanted one first.

    Attributes:
        path: what was asked for.
        folders: in the order in which they are tried.
        explicit: the user named it, so there is no other.
        tracker: what the tracker says, where it is not explicit.
    """

    path: Path
    folders: tuple[Path, ...]
    explicit: bool
    tracker: str | None = None

    def choose(self, check: Callable[[Path], T], *, tell: bool = True) -> tuple[Path, T]:
        """Takes the first folder that is sound.

        Args:
            check: raises CheckpointError for a damaged folder; what it returns is returned.
            tell: warn of folders that are passed over, and of a tracker that names another.

        Raises:
            CheckpointError: all are damaged; the message has what is wrong with each.
        """
        problems = []
        for folder in self.folders:
            try:
                found = check(folder)
            except CheckpointError as error:
                problems.append(str(error))
                if tell and not self.explicit:
                    log.warning("%s cannot be loaded, trying the one before it: %s", folder, error)
                continue
            if tell and not self.explicit and (said := compare(self.path, self.tracker, folder)):
                log.warning("%s", said)
            return folder, found
        hint = "name another iteration" if self.explicit else "start again from the weights, or a copy"
        raise CheckpointError(f"no checkpoint can be loaded from {self.path} ({hint}):\n  " + "\n  ".join(problems))


def candidates(path: Path, ckpt_step: int | None = None) -> Candidates | None:
    """Lists what ``--load path`` and ``--ckpt-step`` mean; None where ``path`` holds no training checkpoint.

    Without ``ckpt_step`` these are all iterations, the one that was written last in front, whatever the tracker says: it is
    compared with the one that is taken.

    Raises:
        CheckpointError: the named iteration is absent, or there is a tracker and no iteration.
    """
    if not path.is_dir():
        return None
    if _is_one(path):
        if ckpt_step not in (None, iteration_of(path)):
            raise CheckpointError(f"--load {path} is one iteration, --ckpt-step {ckpt_step} another: drop one of them")
        return Candidates(path=path, folders=(path,), explicit=True)
    present = iterations(path)
    if ckpt_step is not None:
        if ckpt_step not in present:
            known = ", ".join(map(str, present)) or "none"
            raise CheckpointError(f"{path} has no {folder_name(ckpt_step)} (--ckpt-step); iterations there: {known}")
        return Candidates(path=path, folders=(path / folder_name(ckpt_step),), explicit=True)
    tracker = read_tracker(path)
    if tracker == RELEASE and (release := path / RELEASE).is_dir():
        return Candidates(path=path, folders=(release,), explicit=True) if (release / MANIFEST).exists() else None
    folders = newest_first(path)
    if not folders and tracker is not None:
        _check_tracker(path, tracker)
    return Candidates(path=path, folders=tuple(folders), explicit=False, tracker=tracker) if folders else None


def holds_checkpoints(path: Path) -> bool:
    """Whether ``--load path`` is taken as training checkpoints, sound or not: a run that saves there goes on from them.

    The first save of a run may have been cut short between its folder and the tracker, so no tracker says nothing.
    """
    try:
        return candidates(path) is not None
    except CheckpointError:  # a tracker that names none: said by the load
        return True


def newest(path: Path) -> Path:
    """The folder that ``candidates`` and ``choose`` take, sizes compared.

    Raises:
        CheckpointError: there is none, or none is sound.
    """
    found = candidates(path)
    if found is None:
        raise CheckpointError(f"{path} holds no training checkpoint")
    return found.choose(checkpoint_record)[0]


def _is_one(path: Path) -> bool:
    """A folder of one iteration, whole or damaged, and no model that was written to a folder of such a name."""
    return (path / STATE).exists() or (is_iteration(path) and not (path / "config.json").exists())


# ---- whether it is whole ----


def checkpoint_record(directory: Path) -> Record:
    """The files of a checkpoint, as its manifest lists them, of the sizes that it says.

    Raises:
        CheckpointError: files absent or damaged.
    """
    if not (directory / MANIFEST).exists():
        raise CheckpointError(f"{directory} is not a whole checkpoint: it has no {MANIFEST}")
    manifest = read_json(directory / MANIFEST, CheckpointError)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{directory} has format {manifest.get('format')!r}, this version reads {FORMAT!r}")
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


def verify(folder: Path, *, share: int = 0, shares: int = 1, hashes: bool = True) -> None:
    """Compares a folder with its manifest: every size, and the sha256 of each ``shares``-th file from ``share`` on.

    Raises:
        CheckpointError: a file is absent, of another size or of other content; the message names it.
    """
    record = checkpoint_record(folder)
    if hashes:
        record.check_digests(share=share, shares=shares)


# ---- names, order and tracker ----


def folder_name(iteration: int) -> str:
    """Name of an iteration's folder."""
    return f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int:
    """Iteration in a folder's name; 0 for any other name (``release``)."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else 0


def is_iteration(folder: Path) -> bool:
    """Whether a folder is named as an iteration's."""
    return _NAME.fullmatch(folder.name) is not None


def iterations(root: Path) -> list[int]:
    """Iterations that have a folder in ``root``, in order."""
    return sorted(iteration_of(entry) for entry in root.iterdir() if is_iteration(entry) and entry.is_dir())


def newest_first(root: Path) -> list[Path]:
    """Folders of iterations, the one that was written last in front; one whose manifest cannot be read comes before the one
    with the next lower iteration, so that it is tried, and told of."""
    known, above = [], 0
    for number in iterations(root):
        folder = root / folder_name(number)
        sequence = _sequence(folder)
        above = max(above, sequence or 0)
        known.append((above if sequence is None else sequence, sequence is None, number, folder))
    return [folder for *_, folder in sorted(known, reverse=True)]


def next_sequence(root: Path) -> int:
    """Number of the next checkpoint in a folder."""
    return 1 + max((_sequence(root / folder_name(number)) or 0 for number in iterations(root)), default=0)


def read_tracker(root: Path) -> str | None:
    """The tracker's content; None without a tracker. It may be anything."""
    path = root / TRACKER
    if not path.exists():
        return None
    try:
        return read_text(path, CheckpointError, 4096).strip()
    except CheckpointError:
        return "not readable"


def compare(root: Path, tracker: str | None, chosen: Path) -> str | None:
    """What is to be said of a tracker that does not name ``chosen``; None: it does."""
    if tracker is None:
        return f"{root} has no {TRACKER}: taking the newest sound iteration there, {iteration_of(chosen)}"
    if tracker.isdecimal() and int(tracker) == iteration_of(chosen):
        return None
    there = tracker.isdecimal() and (root / folder_name(int(tracker))).is_dir()
    other = f"; --ckpt-step {int(tracker)} takes the other" if there else ""
    return (
        f"{root / TRACKER} says {tracker[:40]!r}, but the newest sound checkpoint there is {chosen.name}: taking that{other}. A "
        "kill before the tracker was written, a damaged checkpoint or a changed tracker leave this"
    )


def _check_tracker(root: Path, tracker: str) -> None:
    """Raises CheckpointError for a tracker that says nothing, where there is no iteration to take in its place."""
    if tracker != RELEASE and not tracker.isdecimal():
        raise CheckpointError(f"{root / TRACKER} holds {tracker[:40]!r}, neither an iteration nor {RELEASE!r}")
    name = RELEASE if tracker == RELEASE else folder_name(int(tracker))
    raise CheckpointError(f"{root / TRACKER} names {name}, which is absent; iterations there: none")


def _sequence(folder: Path) -> int | None:
    """None: the manifest cannot be read."""
    try:
        value = read_json(folder / MANIFEST, CheckpointError).get(SEQUENCE, 0)
    except MegatronVLMError:
        return None
    return value if isinstance(value, int) else None
