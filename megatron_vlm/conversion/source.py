"""Where weights come from: an HF directory, Megatron weights or a training checkpoint, all read as full tensors.

HF files ----Entry.to_full---+
Megatron shards --merge------+--> WeightSource.read(full name) --Split.shard--> parameter (load.py)
RankFiles (checkpoint) ------+                                 --Entry.from_full--> HF export (convert.export_hf)
"""

import abc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from megatron_vlm import registry
from megatron_vlm.conversion.megatron_dir import MANIFEST, FileEntry, read_manifest
from megatron_vlm.digests import Record, check_records, listed
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.files import read_json
from megatron_vlm.log import get_logger
from megatron_vlm.models.hf_config import section
from megatron_vlm.registry import FamilySpec
from megatron_vlm.weights.checkpoint_dir import tracked_folder
from megatron_vlm.weights.config_sizes import check_layers, check_sizes, described
from megatron_vlm.weights.hf_io import CONFIG_NAME, HFTensors, list_names, resolve_directory
from megatron_vlm.weights.iterations import TRACKER
from megatron_vlm.weights.mapping import Entry, HFModel, Mapping, Split, TensorInfo
from megatron_vlm.weights.model_folder import check_model_folder, hf_files

if TYPE_CHECKING:
    from megatron_vlm.weights.nf4 import Nf4Tensor, Quantization


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
    source_files: "dict[str, FileEntry] | None" = None
    quantization: "Quantization | None" = None

    def __init__(self, hf_dir: Path, hf_config: dict[str, Any], spec: FamilySpec):
        self.hf_dir, self.hf_config, self.spec = hf_dir, hf_config, spec
        self.config = spec.read_config(hf_config, hf_dir / CONFIG_NAME)
        self.mapping: Mapping = spec.mapping(self.config)
        self.entries: dict[str, Entry] = self.mapping.by_name()

    def names(self) -> list[str]:
        return list(self.infos)

    def dtype(self, name: str) -> torch.dtype:
        return self.infos[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.infos[name].shape

    @abc.abstractmethod
    def read(self, name: str) -> Tensor:
        """Reads one full tensor: fused as Megatron holds it, with the true vocabulary."""

    def read_shard(self, name: str, split: Split, tp: int, tp_rank: int) -> Tensor:
        """Reads what one tensor parallel rank holds, vocabulary padded as ``split`` says."""
        return split.shard(self.read(name), tp, tp_rank)

    def read_shards(self, entry: Entry, tp: int) -> list[list[Tensor]]:
        """Reads every rank's shard, as ``entry.split`` cuts it, in pieces along dim 0: nothing is copied without need."""
        full, split = self.read(entry.name), entry.split
        if split.dim == 0:
            return [split.pieces(full, tp, rank) for rank in range(tp)]
        return [[split.shard(full, tp, rank)] for rank in range(tp)]

    def read_hf_pieces(self, entry: Entry) -> list[list[Tensor]]:
        """Reads the entry's HF tensors, each in pieces along dim 0."""
        return [[part] for part in entry.from_full(self.read(entry.name))]

    def read_hf_tensors(self, entry: Entry) -> Iterator[Tensor]:
        """Reads the entry's HF tensors whole, one at a time."""
        for pieces in self.read_hf_pieces(entry):
            yield pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def read_nf4(self, entry: Entry) -> "Iterator[Nf4Tensor]":
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

    def hf_file_names(self) -> list[str]:
        """Files of ``hf_dir`` whose content this is, weights included; none where it is no HF directory as it was found."""
        return []

    def close(self) -> None:
        """Closes the files."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HFSource(WeightSource):
    """An HF model, on disk or assembled.

    Args:
        model: config and tensors.
        spec: its family.
        made_from: folders that an assembled model's parts lie in.

    Raises:
        ConversionError: tensors missing, unmapped, stored twice or of a wrong shape; every name is listed.
    """

    kind = "hf"

    def __init__(self, model: HFModel, spec: FamilySpec, made_from: tuple[Path, ...] = ()):
        super().__init__(model.directory, model.config, spec)
        self._made_from = made_from
        self.model, self.tensors = model, model.tensors
        self._file_name = self._match_names()
        self.infos = {}
        try:
            for entry in self.mapping:
                infos = [self.tensors.infos[self._file_name[hf]] for hf in entry.hf]
                self.infos[entry.name] = check_entry(entry, infos, self.mapping.vocab_size)
        except ConversionError as error:
            raise ConversionError(f"{self.hf_dir}: {error}; {described(self.config)}") from error
        check_sizes(self.config, self.infos, str(self.hf_dir))
        self.stored_ties = self._check_ties()

    def read(self, name: str) -> Tensor:
        entry = self.entries[name]
        return entry.to_full([self.tensors.read(self._file_name[hf]) for hf in entry.hf])

    def read_shards(self, entry: Entry, tp: int) -> list[list[Tensor]]:
        if not entry.cut_by_rows or entry.split.vocab_multiple:
            return super().read_shards(entry, tp)
        parts = [self.read_hf(hf) for hf in entry.hf]
        return [[part.chunk(tp)[rank] for part in parts] for rank in range(tp)]

    def read_hf_tensors(self, entry: Entry) -> Iterator[Tensor]:
        return map(self.read_hf, entry.hf)

    def read_hf(self, hf_name: str) -> Tensor:
        """Reads one tensor as the files hold it, by the mapping's HF name."""
        return self.tensors.read(self._file_name[hf_name])

    def folders(self) -> tuple[Path, ...]:
        return (self.hf_dir, *self._made_from)

    def records(self) -> Sequence[Record]:
        return listed(self.hf_dir, ConversionError)

    def hf_file_names(self) -> list[str]:
        if not isinstance(self.tensors, HFTensors) or self.tensors.directory != self.hf_dir:
            return []  # it was put together
        return [*self.tensors.file_names(), *(path.as_posix() for path in hf_files(self.hf_dir))]

    def close(self) -> None:
        self.tensors.close()

    def _match_names(self) -> dict[str, str]:
        wanted = self.mapping.hf_names()
        found: dict[str, str] = {}
        unmapped = []
        for name in self.tensors.infos:
            hf_name = self.mapping.hf_aliases(name)
            if hf_name in found:
                raise ConversionError(f"{self.hf_dir}: {name} and {found[hf_name]} are the same tensor {hf_name}")
            if hf_name in wanted or hf_name in self.mapping.hf_tied:
                found[hf_name] = name
            elif hf_name not in self.mapping.ignored:
                unmapped.append(name)
        check_layers(map(self.mapping.hf_aliases, self.tensors.infos), wanted, str(self.hf_dir))
        missing = sorted(wanted - set(found))
        if missing or unmapped:
            lines = [f"the weights in {self.hf_dir} are not those of family {self.spec.name}:"]
            if missing:
                lines.append(f"  {len(missing)} tensors missing: {list_names(missing)}")
            if unmapped:
                lines.append(f"  {len(unmapped)} tensors unmapped: {list_names(sorted(unmapped))}")
            raise ConversionError("\n".join(lines))
        return found

    def _check_ties(self) -> list[str]:
        stored = [name for name in self.mapping.hf_tied if name in self._file_name]
        for name in stored:
            other = self.mapping.hf_tied[name]
            if not torch.equal(self.read_hf(name), self.read_hf(other)):
                raise ConversionError(
                    f"{self.hf_dir}: config.json ties {name} to {other}, but the stored tensors differ: "
                    "set tie_word_embeddings to false in config.json, or remove the copy"
                )
        return stored


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
    if entry.split.vocab_multiple and full.shape[0] != vocab_size:
        raise ConversionError(f"{shapes}: config.json says a vocabulary of {vocab_size} rows")
    return TensorInfo.of(full)


def open_source(
    path_or_id: str | os.PathLike,
    family: str | None = None,
    base: str | os.PathLike | None = None,
    *,
    verify_hashes: bool = True,
) -> WeightSource:
    """Opens an HF directory or hub id, Megatron weights, or a training checkpoint (its folder or one iteration's).

    An adapter's folder, and the checkpoint of a run that trained one, are opened together with their base (peft/merge.py).

    Args:
        path_or_id: what to open.
        family: what the caller expects; None takes what the files say.
        base: where the base of an adapter is; None: where its files say.
        verify_hashes: compare small files (``hf/``, adapters) with the digests that were recorded of them, where there are some;
            ``check_digests`` of what is returned compares all. False: sizes alone.

    Raises:
        ConversionError: not weights of that family, or damaged ones; the message names the culprit.
        ConfigError: a base is given for a whole model.
    """
    source = _open(resolve_directory(path_or_id), family, base, verify_hashes)
    source.verify_hashes = verify_hashes
    if base is not None and source.kind != "adapted":
        source.close()
        raise ConfigError(f"--base {base}: {path_or_id} is a whole model, which has no base: leave it out")
    return source


def _open(directory: Path, family: str | None, base: str | os.PathLike | None, verify_hashes: bool) -> WeightSource:
    if (directory / MANIFEST).exists():
        from megatron_vlm.conversion.megatron_source import MegatronSource

        recorded = registry.get(read_manifest(directory).family)
        return MegatronSource(
            directory,
            choose_family(read_json(directory / "hf" / CONFIG_NAME, ConversionError), directory, family, recorded),
            verify_hashes=verify_hashes,
        )
    if (directory / TRACKER).exists() or (directory / "state.json").exists():
        from megatron_vlm.conversion.training_source import open_iteration

        if (directory / "state.json").exists():
            return open_iteration(directory, family, base, verify_hashes)
        return _open(tracked_folder(directory), family, base, verify_hashes)
    if _is_adapter(directory):
        from megatron_vlm.peft.merge import adapted

        return adapted(directory, base, family, verify_hashes)
    if not (directory / CONFIG_NAME).exists():
        raise ConversionError(
            f"{directory} is neither an HF model (config.json), nor Megatron weights ({MANIFEST}), nor a training "
            f"checkpoint ({TRACKER}, or an iteration's state.json), nor an adapter (adapter_config.json)"
        )
    whole = _parts_family(directory)
    if whole and family is None:
        raise ConversionError(
            f"{directory} holds a {whole} in parts: put them together with `convert hf2mg --hf {directory}` first (or set the "
            "family, to take the language model alone)"
        )
    spec = choose_family(read_json(directory / CONFIG_NAME, ConversionError), directory, family)
    model = open_hf(directory)
    try:
        if any(".base_model.model." in name for name in model.tensors.infos):  # PEFT's layers are still in it
            from megatron_vlm.peft.merge import open_wrapped

            return open_wrapped(model, spec)
        return HFSource(model, spec)
    except BaseException:
        model.tensors.close()
        raise


def _is_adapter(directory: Path) -> bool:
    """Adapters of PEFT, or of the parts of a model, and no whole model beside them."""
    whole = any(directory.glob("model*.safetensors*")) or any(directory.glob("pytorch_model*.bin*"))
    found = [directory / "adapter_config.json", *directory.glob("*_adapter/adapter_config.json")]
    return not whole and any(path.is_file() for path in found)


def _parts_family(directory: Path) -> str | None:
    """The family whose parts a folder holds, beside the config of one of them."""
    specs = [registry.get(name) for name in registry.FAMILIES]
    return next((spec.name for spec in specs if spec.parts and spec.parts(directory)), None)


def open_hf(directory: Path) -> HFModel:
    """Opens the config and the weights of an HF directory.

    Raises:
        ConversionError: what lies there is no model, or cannot be read to its end (``check_model_folder``).
    """
    check_model_folder(directory)
    return HFModel(
        directory=directory, config=read_json(directory / CONFIG_NAME, ConversionError), tensors=HFTensors(directory)
    )


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
