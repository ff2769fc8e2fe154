"""Where weights come from: an HF directory, Megatron weights or a training checkpoint, all read as full tensors.

HF files (hf.py) --Entry.to_full---------+
Megatron shards (megatron.py) --merge----+--> WeightSource.read(full name) --Split.shard--> parameter (conversion/load.py)
RankFiles (training.py) -----------------+                                 --Entry.from_full--> HF export (convert.export_hf)
"""

import abc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from megatron_vlm import registry
from megatron_vlm.config import nearest
from megatron_vlm.digests import Record, check_records
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.log import get_logger
from megatron_vlm.models.hf_config import section
from megatron_vlm.registry import ExportSpec, FamilySpec
from megatron_vlm.weights.hf_io import CONFIG_NAME
from megatron_vlm.weights.mapping import Entry, Mapping, Split, TensorInfo
from megatron_vlm.weights.megatron_dir import FileEntry
from megatron_vlm.weights.nf4.tensor import Nf4Tensor, Quantization


class WeightSource(abc.ABC):
    """Full tensors of a model by global name, read one at a time.

    Attributes:
        kind: ``hf``, ``megatron``, ``training`` or ``adapted`` (a base with an adapter).
        spec: the model family.
        hf_config: content of config.json.
        config: the family's model config.
        hf_dir: directory with every non-weight HF file.
        mapping: the family's map (splits as for one rank).
        infos: name -> dtype and shape of the full tensor, without vocabulary padding.
        stored_ties: HF names of tied copies that the original files store.
        source_files: sizes and digests of the HF directory that the weights were made from, where that was recorded.
        verify_hashes: whether ``check_digests`` does anything.
        quantization: how some are stored in 4 bits; None: all are in full.
    """

    kind: str
    infos: dict[str, TensorInfo]
    stored_ties: Sequence[str] = ()
    verify_hashes = True
    source_files: dict[str, FileEntry] | None = None
    quantization: Quantization | None = None

    def __init__(self, hf_dir: Path, hf_config: dict[str, Any], spec: FamilySpec):
        self.hf_dir, self.hf_config, self.spec = hf_dir, hf_config, spec
        self.config = spec.read_config(hf_config, hf_dir / CONFIG_NAME)
        self.mapping: Mapping = spec.mapping(self.config)
        self.entries: dict[str, Entry] = self.mapping.by_name()

    def use_config(self, hf_config: dict[str, Any]) -> None:
        """Takes another content of config.json from here on, of the same shapes: what is written from this has it."""
        if hf_config != self.hf_config:
            self.hf_config, self.config = hf_config, self.spec.read_config(hf_config, self.hf_dir / CONFIG_NAME)

    @abc.abstractmethod
    def read(self, name: str) -> Tensor:
        """Reads one full tensor: fused as Megatron holds it, with the true vocabulary."""

    def read_shard(self, name: str, split: Split, tp: int, tp_rank: int) -> Tensor:
        """Reads what one tensor parallel rank holds, vocabulary padded as ``split`` says."""
        return split.shard(self.read(name), tp, tp_rank)

    def read_hf(self, entry: Entry) -> Iterator[list[Tensor]]:
        """Reads the HF tensors of an entry of any of the family's namings, one at a time, each in pieces along dim 0."""
        for part in entry.from_full(self.read(entry.name)):
            yield [part]

    def read_nf4(self, entry: Entry) -> Iterator[Nf4Tensor]:
        """Reads the entry's HF tensors as they are stored in 4 bits, one at a time."""
        raise ConversionError(f"{self.hf_dir}: {entry.name} is not stored in 4 bits")

    def require_full(self, what: str) -> None:
        """Refuses what cannot be done with 4-bit weights.

        Raises:
            ConversionError: weights are stored in 4 bits.
        """
        if self.quantization is not None:
            raise ConversionError(
                f"{self.hf_dir.parent} holds linears in 4 bits, and {what} needs them in full: give the model that it was made "
                "from instead"
            )

    def use_main_parameters(self) -> None:  # noqa: B027
        """Gives fp32 main parameters, where they are stored, in place of rounded weights from here on."""

    def folders(self) -> tuple[Path, ...]:
        """Where the weights and the other files lie."""
        return (self.hf_dir,)

    def records(self) -> Sequence[Record]:
        """The files that this reads and whose digests were recorded."""
        return ()

    def hash_as_read(self) -> None:
        """Called before a pass over all tensors: ``check_digests`` then costs less than a second one."""
        return

    def check_digests(self, *, share: int = 0, shares: int = 1) -> None:
        """Compares files with their recorded digests.

        Args:
            share, shares: as of ``Record.check_digests``.

        Raises:
            MegatronVLMError: a file was changed.
        """
        if self.verify_hashes:
            check_records(self.records(), share=share, shares=shares)

    def close(self) -> None:
        """Closes the files."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_entry(entry: Entry, infos: Sequence[TensorInfo], vocab_size: int) -> TensorInfo:
    """Returns the full tensor's info, after a round trip of shapes through the entry.

    Raises:
        ConversionError: parts of different dtypes, or shapes that the entry cannot take.
    """
    if len({info.dtype for info in infos}) > 1:
        parts = ", ".join(f"{name} {info.dtype}" for name, info in zip(entry.hf, infos))
        raise ConversionError(f"{entry.name} fuses tensors of different dtypes: {parts}; convert them to one first")
    shapes = ", ".join(f"{name} {list(info.shape)}" for name, info in zip(entry.hf, infos))
    try:
        full = entry.to_full([info.meta() for info in infos])
        back = [TensorInfo.of(part) for part in entry.from_full(full)]
    except (RuntimeError, IndexError) as error:
        raise ConversionError(f"shapes do not fit into {entry.name}: {shapes} ({error})") from error
    if back != list(infos):
        raise ConversionError(f"shapes do not fit the heads or parts of {entry.name}: {shapes}")
    if entry.split.pads and full.shape[0] != vocab_size:
        raise ConversionError(f"{shapes}: config.json says a vocabulary of {vocab_size} rows")
    return TensorInfo.of(full)


def choose_family(
    hf_config: dict[str, Any], directory: Path, wanted: str | None, recorded: FamilySpec | None = None
) -> FamilySpec:
    """The family of an HF config, checked against the one that the caller wants (or that was recorded).

    A family that reads the ``model_type`` with any text model, as ``idefics2`` does, also accepts what a more special
    one names.

    Raises:
        ConversionError: the files belong to another family.
    """
    try:
        found = recorded or registry.family_of(hf_config)
    except ConfigError as error:
        raise ConversionError(f"{directory}: {error}") from error
    if wanted is None or wanted == found.name:
        return found
    if hf_config.get("model_type") in registry.get(wanted).model_types:
        get_logger(__name__).info("%s is of family %s, which %s reads as well", directory, found.name, wanted)
        return found
    text = section(hf_config, "text_config").get("model_type")
    raise ConversionError(
        f"{directory} holds a model of family {found.name} (model_type {hf_config.get('model_type')!r}, text model "
        f"{text!r}), not {wanted}: set --family {found.name}, or choose another directory"
    )


def other_naming(source: WeightSource, naming: str | None) -> ExportSpec | None:
    """What ``--as`` asks for; None: the source's own naming.

    Raises:
        ConfigError: the family does not offer it.
    """
    if naming is None or naming == getattr(source.config, "layout", None):
        return None  # the original's
    offered = source.spec.exports
    if not offered:
        raise ConfigError(f"--as {naming}: family {source.spec.name} has one layout alone: leave --as out")
    if naming not in offered:
        raise ConfigError(
            f"--as {naming}{nearest(naming, offered)}: family {source.spec.name} offers {', '.join(offered)}"
        )
    return offered[naming]
