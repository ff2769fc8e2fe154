"""What a file is that is not what its name says: told by its first bytes, so that a message can say what to do."""

_MARKS = (
    (b"version https://git-lfs.github.com/", "a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first (gunzip)"),
    (b"BZh", "compressed with bzip2: unpack it first (bunzip2)"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first (unzstd)"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"<!doctype html", "a web page, as a download without access gives: download it again"),
    (b"<html", "a web page, as a download without access gives: download it again"),
)  # fmt: skip


def told(head: bytes) -> str:
    """Returns what a file with these first bytes (64 or more) is, and what to do; empty: nothing known."""
    head = head[:64].lower() if head[:1] == b"<" else head
    return next((words for mark, words in _MARKS if head.startswith(mark)), "")
