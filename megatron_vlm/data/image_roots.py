"""Why pictures of a source are not found: relative paths that start from another folder."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_vlm.data.formats import WEBDATASET, read_source
from megatron_vlm.data.formats.records import RecordSource
from megatron_vlm.errors import DataError

_LOOKED_AT = 1000  # names, to tell a wrong folder from a few lost pictures


def names_of(source: RecordSource) -> Iterator[str]:
    """Images and videos of a source as its records write them; what cannot be read is the build's to report."""
    try:
        for _, _, record in read_source(source):
            if not isinstance(record, DataError):
                yield from (name for name in (*record.images, *record.videos) if isinstance(name, str))
    except DataError:
        return


def wrong_root(sources: Sequence[RecordSource]) -> str:
    """What to say where most pictures of a source are not there: the first, the folder it was looked for in, and one that has it.

    Empty where most are there, or there are none.
    """
    for source in sources:
        if source.format == WEBDATASET:
            continue
        names = list(itertools.islice(names_of(source), _LOOKED_AT))
        missing = [name for name in names if not os.path.exists(os.path.join(source.root, name))]
        if names and 2 * len(missing) > len(names):
            root = source.root or "."
            looked = os.path.join(root, missing[0])
            text = f"{len(missing)} of the first {len(names)} pictures of {source.path} are not there; the first is {looked}"
            text += f", looked for from {root}"
            better = _folder_with(source, missing[0])
            if better:
                return f"{text}. {Path(better, missing[0])} exists: --image-root {better}"
            return f"{text}: is that the folder that the paths start from? --image-root DIR names another"
    return ""


def _folder_with(source: RecordSource, name: str) -> str | None:
    """A folder near the source's file, or near where the command runs, that has the picture."""
    beside = Path(source.path).absolute().parent
    near = dict.fromkeys((beside, beside.parent, Path.cwd()))
    try:
        inside = [folder for start in near for folder in sorted(start.iterdir()) if os.path.isdir(folder)]
    except OSError:
        inside = []
    return next((str(folder) for folder in (*near, *inside) if os.path.isfile(os.path.join(folder, name))), None)
