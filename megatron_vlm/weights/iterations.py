"""Which iteration of a run is its newest: by what the checkpoints say of themselves. The tracker, one short number that anything
may change, is only compared with it.

DIR/iter_0000100/manifest.json {"sequence": 7} --newest_first--> folders, the one written last in front
"""

import re
from pathlib import Path

from megatron_vlm.errors import CheckpointError, MegatronVLMError
from megatron_vlm.files import read_json, read_text

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
RELEASE = "release"
"""Name of a folder, and content of the tracker, for weights that start at iteration 0."""
SEQUENCE = "sequence"
"""Key of a manifest: grows with every checkpoint of a folder, also where a run went back to an earlier iteration."""
_NAME = re.compile(r"iter_(\d{7,})")


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


def check_tracker(root: Path, tracker: str) -> None:
    """Raises CheckpointError for a tracker that says nothing, where there is no iteration to take in its place."""
    if tracker != RELEASE and not tracker.isdecimal():
        raise CheckpointError(f"{root / TRACKER} holds {tracker[:40]!r}, neither an iteration nor {RELEASE!r}")
    if tracker != RELEASE:
        raise CheckpointError(
            f"{root / TRACKER} names {folder_name(int(tracker))}, which is absent; iterations there: none"
        )


def _sequence(folder: Path) -> int | None:
    """None: the manifest cannot be read."""
    try:
        value = read_json(folder / MANIFEST, CheckpointError).get(SEQUENCE, 0)
    except MegatronVLMError:
        return None
    return value if isinstance(value, int) else None
