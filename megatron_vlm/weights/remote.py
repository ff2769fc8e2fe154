"""Checkpoints in a store that has a URL (s3://, gs://, whatever fsspec knows): written here first, whole there or not at all.

    iter_N/ of the staging folder --upload--> URL/iter_N/{rank files, ..., manifest.json last}; URL/tracker
    URL --fetch--> iter_N/ of a folder here, compared with its manifest

A store has no rename: the manifest is what makes a folder a checkpoint, so it goes there last, and first where one is removed.
What is needed to get in (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...) comes from the environment, as the store's library reads it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files import read_json, write_synced
from megatron_vlm.log import get_logger
from megatron_vlm.weights.checkpoint_dir import (
    MANIFEST,
    SEQUENCE,
    TRACKER,
    checkpoint_record,
    folder_name,
    is_iteration,
    iteration_of,
    verify,
)

T = TypeVar("T")
_TRIES = 4
_WAIT_SECONDS = 1.0
"""Before the second try; each further wait is twice as long."""
_MODEL = "model"
"""Folder of what is no training checkpoint, beside fetched iterations."""
_PACKAGES = {"s3": "pip install 'megatron_vlm[s3]'", "gs": "pip install gcsfs"}

log = get_logger(__name__)


def is_url(text: str | os.PathLike | None) -> bool:
    """Whether it names a place that is not in this host's file systems."""
    return "://" in str(text or "")


def upload(folder: Path, url: str, keep_last: int | None) -> None:
    """Copies a checkpoint into the store, then removes there what ``keep_last`` says, as ``checkpoint_write.purge`` does here.

    Args:
        folder: ``iter_N``; every file is compared with its manifest first.
        url: that holds iterations.
        keep_last: None keeps all.

    Raises:
        CheckpointError: a file was changed, or the store refuses it again and again; what is there already is untouched.
    """
    record, store = checkpoint_record(folder), Store(url)
    record.check_digests()
    store.remove(f"{folder.name}/{MANIFEST}")
    for name in [*record.files, MANIFEST]:
        store.put(folder / name, f"{folder.name}/{name}")
    store.put(folder.parent / TRACKER, TRACKER)
    older = [number for number in store.sequences() if number <= iteration_of(folder)]
    for number in older[: -keep_last if keep_last is not None else 0]:
        store.remove(f"{folder_name(number)}/{MANIFEST}")
        store.remove(folder_name(number))


def fetch(url: str, into: Path | None = None, ckpt_step: int | None = None) -> Path:
    """Brings the newest sound checkpoint of a store here, or a model folder, and returns what ``--load`` takes.

    Processes of one host that ask for the same wait for the one that fetches.

    Args:
        url: a folder of iterations, one of them, or a folder of a model.
        into: folder of a run that saves to this very URL: it is filled up and returned. None: a cache.
        ckpt_step: iteration; None: the newest.

    Raises:
        CheckpointError: the store does not answer, or nothing whole lies there.
    """
    url = url.rstrip("/")
    parent, _, name = url.rpartition("/")
    if is_iteration(Path(name)):
        return fetch(parent, into, iteration_of(Path(name)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_vlm" / "remote"
    root = into or cache / hashlib.sha256(url.encode()).hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".fetch.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = Store(url)
        known = store.sequences()
        if not known and ckpt_step is None and into is None:
            return _fetch_model(store, root)
        wanted = sorted(known, key=lambda number: known[number], reverse=True) if ckpt_step is None else [ckpt_step]
        problems = []
        for number in wanted:
            try:
                found = _fetch_iteration(store, root, number)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                log.warning("passed over: %s", problem)
            return root if into is not None else found
    there = ", ".join(map(str, sorted(known))) or "none"
    raise CheckpointError(
        f"no checkpoint can be fetched from {url} (iterations there: {there})\n  " + "\n  ".join(problems)
    )


def iterations(url: str) -> list[int]:
    """Iterations that have a manifest in the store, in order; nothing where there is no such place.

    Raises:
        CheckpointError: the store does not answer.
    """
    return sorted(Store(url).sequences())


class Store:
    """A folder in a store; every call is tried again.

    Raises:
        CheckpointError: nothing here speaks to such a store; the message says what to install.
    """

    def __init__(self, url: str):
        import fsspec  # costs a tenth of a second, and is needed for URLs alone

        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            scheme = self.url.partition("://")[0]
            advice = f": {_PACKAGES[scheme]}" if scheme in _PACKAGES else ""
            raise CheckpointError(f"{self.url} cannot be used ({error}){advice}") from error

    def put(self, path: Path, name: str) -> None:
        """Copies a file there, and compares its size.

        Raises:
            CheckpointError: it cannot be written.
        """

        def work() -> None:
            self._files.put_file(str(path), f"{self._root}/{name}")
            found, size = self._files.info(f"{self._root}/{name}")["size"], path.stat().st_size
            if found != size:
                raise OSError(f"it has {found:,} bytes there, {size:,} here")

        self._try(f"uploading {path} to {self.url}/{name}", work)

    def get(self, name: str, path: Path) -> None:
        """Copies a file from there.

        Raises:
            CheckpointError: it cannot be read.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._try(f"fetching {self.url}/{name}", lambda: self._files.get_file(f"{self._root}/{name}", str(path)))

    def remove(self, name: str) -> None:
        """Removes a file or a folder, if it is there.

        Raises:
            CheckpointError: it cannot be removed.
        """

        def work() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm(f"{self._root}/{name}", recursive=True)

        self._try(f"removing {self.url}/{name}", work)

    def sequences(self) -> dict[int, int]:
        """Iterations with a manifest -> the number in it that grows with every save; in order of iterations."""
        found = {}
        for path in self._list():
            folder = Path(path)
            if not is_iteration(folder):
                continue
            with contextlib.suppress(FileNotFoundError):  # being removed, or not whole yet
                what = f"reading {self.url}/{folder.name}/{MANIFEST}"
                text = self._try(what, partial(self._files.cat_file, f"{self._root}/{folder.name}/{MANIFEST}"))
                try:
                    found[iteration_of(folder)] = int(json.loads(text).get(SEQUENCE, 0))
                except (ValueError, TypeError, AttributeError):  # damaged: told of where it is fetched
                    found[iteration_of(folder)] = 0
        return dict(sorted(found.items()))

    def files(self) -> dict[str, int]:
        """Files below this folder -> their sizes."""
        found = self._try(f"listing {self.url}", lambda: self._files.find(self._root, detail=True))
        return {path.removeprefix(self._root).lstrip("/"): entry["size"] for path, entry in found.items()}

    def _list(self) -> list[str]:
        try:
            return self._try(f"listing {self.url}", lambda: self._files.ls(self._root, detail=False))
        except FileNotFoundError:
            return []

    def _try(self, what: str, work: Callable[[], T]) -> T:
        """Raises FileNotFoundError as it is, and CheckpointError for all else that lasts."""
        wait = _WAIT_SECONDS
        for left in range(_TRIES - 1, -1, -1):
            try:
                return work()
            except FileNotFoundError:
                raise
            except Exception as error:  # each store has classes of its own for what goes wrong
                reason = f"{type(error).__name__}: {error}"
                if not left:
                    raise CheckpointError(f"{what} failed {_TRIES} times, the last with {reason}") from error
                log.warning("%s failed, %d more tries, the next in %g s: %s", what, left, wait, reason)
                time.sleep(wait)
                wait *= 2
        raise AssertionError


def _fetch_iteration(store: Store, root: Path, number: int) -> Path:
    name = folder_name(number)
    final = root / name
    with _beside(final) as temporary:
        try:
            store.get(f"{name}/{MANIFEST}", temporary / MANIFEST)
        except FileNotFoundError as error:
            raise CheckpointError(f"{store.url}/{name} has no {MANIFEST}: it is not there, or not whole") from error
        if _same(temporary / MANIFEST, final / MANIFEST):
            with contextlib.suppress(CheckpointError):
                verify(final, hashes=False)
                return final
        listed = read_json(temporary / MANIFEST, CheckpointError)
        began = time.monotonic()
        for file in _names(listed, store, name):
            try:
                store.get(f"{name}/{file}", temporary / file)
            except FileNotFoundError as error:
                raise CheckpointError(f"{store.url}/{name}/{file} is missing: {MANIFEST} lists it") from error
        verify(temporary)
        _replace(temporary, final)
    write_synced(root / TRACKER, f"{number}\n".encode())
    log.info("fetched %s/%s to %s in %.1f s", store.url, name, final, time.monotonic() - began)
    return final


def _fetch_model(store: Store, root: Path) -> Path:
    files, final = store.files(), root / _MODEL
    if not files:
        raise CheckpointError(f"{store.url} holds nothing: neither checkpoints nor a model")
    if all((final / name).is_file() and (final / name).stat().st_size == size for name, size in files.items()):
        return final
    with _beside(final) as temporary:
        for name, size in files.items():
            if ".." in Path(name).parts:
                raise CheckpointError(f"{store.url} holds {name!r}, which leads out of the folder")
            store.get(name, temporary / name)
            if (found := (temporary / name).stat().st_size) != size:
                raise CheckpointError(f"{store.url}/{name} has {size:,} bytes, {found:,} came: fetch it again")
        _replace(temporary, final)
    return final


def _names(manifest: dict[str, Any], store: Store, name: str) -> list[str]:
    """Files that a manifest lists; none leads out of its folder."""
    files = manifest.get("files")
    if not isinstance(files, dict) or any(Path(file).is_absolute() or ".." in Path(file).parts for file in files):
        raise CheckpointError(f"{store.url}/{name}/{MANIFEST} is damaged: its list of files cannot be read")
    return list(files)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


@contextlib.contextmanager
def _beside(final: Path) -> Iterator[Path]:
    """A temporary folder, under a name that is cleared away as what a killed save left."""
    temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:12]}")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, final: Path) -> None:
    if final.exists():
        old = final.with_name(f"{final.name}.old-{uuid.uuid4().hex[:12]}")
        os.rename(final, old)
        shutil.rmtree(old, ignore_errors=True)
    os.rename(temporary, final)
