"""Streaming safetensors: read one tensor at a time, write one tensor at a time behind a known header.

Format: https://github.com/huggingface/safetensors#format. Tensors are views of the mapped file, so that reading takes no
memory of ours; the kernel is asked for all pages of a tensor at once, which is quick on network file systems too, and
tells of a file that shrinks under us by an error instead of a SIGBUS.
"""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from megatron_vlm.errors import ConversionError
from megatron_vlm.files import (
    describe,
    open_regular,
    refuse_lfs_pointer,
    remove_abandoned,
    sync_path,
    sync_tree,
    unique_temporary,
)
from megatron_vlm.weights.hashed_file import HashedFile
from megatron_vlm.weights.mapping import TensorInfo

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MADV_POPULATE_READ = 22  # linux/mman.h; not yet a name in mmap
PARAMS_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What ``--dtype`` takes."""


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Casts floating point tensors to ``dtype`` (None: keeps each tensor's own)."""
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def aligned_order(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Widest dtypes first, else in the given order, so that every tensor starts at a multiple of its item size."""
    return dict(sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize))


class SafetensorsFile:
    """One open file for reading. Symbolic links are followed.

    Args:
        path: of the file.

    Attributes:
        infos: name -> TensorInfo, in the order of the data.
        metadata: the header's ``__metadata__``.

    Raises:
        ConversionError: absent, truncated, or not a safetensors file; the message names it.
    """

    def __init__(self, path: str | os.PathLike):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.exists():
            raise ConversionError(f"weights file {describe(self.path)} does not exist")
        try:
            with open_regular(self.path, ConversionError) as file:
                refuse_lfs_pointer(self.path, file.read(64), ConversionError)
                with safe_open(self.path, framework="np"):  # checks the header against the file's size
                    pass
                # Private: a tensor that someone writes to is copied page by page, the file never changes.
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, SafetensorError) as error:
            raise ConversionError(
                f"weights file {self.path} cannot be read as safetensors ({error}): it is truncated or damaged, "
                "fetch it again"
            ) from error
        self.size = len(self._map)
        length = int.from_bytes(self._map[:8], "little")
        header: dict[str, Any] = json.loads(self._map[8 : 8 + length])
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.infos: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise ConversionError(f"{name} in {self.path} has dtype {entry['dtype']}, which is not supported")
            self.infos[name] = TensorInfo(dtype=DTYPES[entry["dtype"]], shape=tuple(entry["shape"]))
            self._offsets[name] = 8 + length + entry["data_offsets"][0]
        self._data = 8 + length
        self._digest, self._hash, self._hashed = False, hashlib.sha256(), 0

    def hash_as_read(self) -> None:
        """From now on hashes what is read in file order, so that ``sha256`` costs no second pass."""
        self._digest = True
        if not self._hashed:
            self._pass_over(0, self._data)

    def read(self, name: str) -> Tensor:
        """Returns one tensor, a view of the file."""
        info, offset = self.infos[name], self._offsets[name]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=info.dtype)
        self._fetch(offset, info.nbytes, name)
        if self._digest and offset == self._hashed:
            self._pass_over(offset, info.nbytes)
        count = info.nbytes // info.dtype.itemsize
        if offset % info.dtype.itemsize:  # the format allows it
            raw = torch.frombuffer(self._mapped(), dtype=torch.uint8, count=info.nbytes, offset=offset)
            return raw.clone().view(info.dtype).reshape(info.shape)
        return torch.frombuffer(self._mapped(), dtype=info.dtype, count=count, offset=offset).reshape(info.shape)

    def sha256(self) -> str:
        """Digest of the whole file."""
        while self._hashed < self.size:
            count = min(1 << 24, self.size - self._hashed)
            self._fetch(self._hashed, count, "its digest")
            self._pass_over(self._hashed, count)
        return self._hash.hexdigest()

    def close(self) -> None:
        """Lets go of the file; tensors that were read stay valid."""
        self._map = None

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        return self._map

    def _fetch(self, offset: int, count: int, what: str) -> None:
        start = offset - offset % mmap.PAGESIZE
        try:
            self._mapped().madvise(_MADV_POPULATE_READ, start, offset + count - start)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a kernel before 5.14: pages come one by one
                return
            raise ConversionError(
                f"reading {what} from {self.path} failed ({error.strerror}): the file was cut or cannot be read"
            ) from error

    def _pass_over(self, offset: int, count: int) -> None:
        with memoryview(self._mapped())[offset : offset + count] as view:
            self._hash.update(view)
        self._hashed = offset + count


def header_of(path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    """What a file of these tensors, laid end to end behind it, starts with: a multiple of 8 bytes.

    Raises:
        ConversionError: a tensor would start unaligned; the message names it and ``path``.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, info in infos.items():
        if offset % info.dtype.itemsize:
            raise ConversionError(f"{name} would start unaligned in {path}: order tensors with aligned_order")
        header[name] = {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """Writes one file front to back: the header first, then each tensor as it comes, hashed on the way.

    Args:
        path: a new file.
        infos: every tensor, in the order of the ``write`` calls (see ``aligned_order``).
        metadata: text values for ``__metadata__``.
    """

    def __init__(
        self, path: str | os.PathLike, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None
    ):
        self.path = Path(path)
        self._infos = dict(infos)
        self._left = iter(self._infos)
        header = header_of(self.path, self._infos, metadata)
        self._file = HashedFile(self.path)
        self._file.put(memoryview(header))

    def write(self, name: str, *pieces: Tensor) -> None:
        """Appends the next tensor, given whole or as pieces along its first dimension.

        Raises:
            ConversionError: not the next one of the header, or of another shape or dtype than announced.
        """
        expected = next(self._left, None)
        if name != expected:
            raise ConversionError(f"{self.path}: got tensor {name} where {expected} comes next")
        info = TensorInfo.of(pieces[0])
        if len(pieces) > 1:
            info = TensorInfo(dtype=info.dtype, shape=(sum(len(piece) for piece in pieces), *info.shape[1:]))
        if info != self._infos[name]:
            raise ConversionError(f"{name} is {info}, the header of {self.path} says {self._infos[name]}")
        for piece in pieces:
            self._file.put(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> dict[str, Any]:
        """Flushes the file to disk and returns ``{"size", "sha256"}``.

        Raises:
            ConversionError: announced tensors were not written.
        """
        left = list(self._left)
        if left:
            raise ConversionError(
                f"{self.path}: {len(left)} announced tensors were not written: {', '.join(left[:10])}"
            )
        return self._file.close()

    def abort(self) -> None:
        """Closes the file as it is."""
        self._file.abort()


class Writers:
    """Several files written at the same time; on an error all are closed."""

    def __init__(self) -> None:
        self.open: dict[str, SafetensorsWriter] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.open.values():
            writer.abort()

    def close(self) -> dict[str, dict[str, Any]]:
        """Closes every file and returns their sizes and digests."""
        return {key: writer.close() for key, writer in self.open.items()}


@contextlib.contextmanager
def atomic_directory(out: str | os.PathLike, need_bytes: int = 0) -> Iterator[Path]:
    """Yields a temporary directory that becomes ``out`` when the block ends well, and is removed when not.

    Args:
        out: absent, or an empty directory.
        need_bytes: what will be written; checked against the free space before anything is.

    Raises:
        ConversionError: ``out`` holds something, or the disk is too small.
    """
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise ConversionError(f"--out {out} exists and is not a directory")
    if out.exists() and any(out.iterdir()):
        raise ConversionError(f"--out {out} exists and is not empty: remove it, or choose another directory")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < need_bytes:
            raise ConversionError(
                f"{out.parent} has {free / 1e9:.1f} GB free, the output needs {need_bytes / 1e9:.1f} GB"
            )
        remove_abandoned(out)
        temporary = unique_temporary(out)
        temporary.mkdir()
    except OSError as error:
        raise ConversionError(f"cannot write beside {out}: {error}") from error
    try:
        yield temporary
        sync_tree(temporary)
        os.rename(temporary, out)  # replaces an empty directory
        sync_path(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
