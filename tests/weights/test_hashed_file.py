"""Files that are hashed while they are written past the page cache."""

import os
import tempfile
from pathlib import Path

import pytest

from megatron_vlm.errors import ConversionError
from megatron_vlm.files import file_digest
from megatron_vlm.weights.hashed_file import HashedFile


@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize("size", [(4 << 20) - 1, 4 << 20, (4 << 20) + 1, 9_999_999])
def test_blocks_of_direct_writes_meet_without_a_gap(tmp_path, where, size):
    with tempfile.TemporaryDirectory(dir=tmp_path if where == "disk" else "/dev/shm") as directory:
        path, parts = Path(directory) / "a", (b"header", os.urandom(size), os.urandom(40_000))
        file = HashedFile(path)
        for part in parts:
            file.put(memoryview(part))
        assert file.close() == file_digest(path) and file.size == size + 40_006
        assert path.read_bytes() == b"".join(parts)


def test_a_full_disk_is_told_with_the_file(tmp_path):
    file = HashedFile(tmp_path / "a")
    file._file.close()  # what the kernel refuses
    with pytest.raises(ConversionError, match=r"writing .*/a failed after 0 bytes: Bad file descriptor"):
        file.put(memoryview(bytes(5 << 20)))
    file.abort()
