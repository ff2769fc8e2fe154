"""Public formats: each reads one into records. One line per format."""

from collections.abc import Callable, Iterator

from megatron_vlm.data.formats.llava import read_llava
from megatron_vlm.data.formats.records import Record

READERS: dict[str, Callable[[str], Iterator[Record]]] = {"llava": read_llava}
