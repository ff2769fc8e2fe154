"""An HF model, on disk or assembled, as a weight source."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_vlm.digests import Record, listed
from megatron_vlm.errors import ConversionError
from megatron_vlm.files import read_json
from megatron_vlm.registry import FamilySpec
from megatron_vlm.sources.config_sizes import check_layers, check_sizes, described
from megatron_vlm.sources.source import WeightSource, check_entry
from megatron_vlm.weights.hf_io import CONFIG_NAME, HFTensors, list_names
from megatron_vlm.weights.mapping import Entry, HFModel
from megatron_vlm.weights.model_folder import check_model_folder, hf_files


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

    def read_hf(self, entry: Entry) -> Iterator[list[Tensor]]:
        if entry.hf != self.entries[entry.name].hf:  # of another naming
            return super().read_hf(entry)
        return ([self.read_stored(hf)] for hf in entry.hf)

    def read_stored(self, hf_name: str) -> Tensor:
        """Reads one tensor as the files hold it, by the mapping's HF name."""
        return self.tensors.read(self._file_name[hf_name])

    def folders(self) -> tuple[Path, ...]:
        return (self.hf_dir, *self._made_from)

    def records(self) -> Sequence[Record]:
        return listed(self.hf_dir, ConversionError)

    def file_names(self) -> list[str]:
        """Files of ``hf_dir`` whose content this is, weights included; none of a model that was put together."""
        if not isinstance(self.tensors, HFTensors) or self.tensors.directory != self.hf_dir:
            return []
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
            if not torch.equal(self.read_stored(name), self.read_stored(other)):
                raise ConversionError(
                    f"{self.hf_dir}: config.json ties {name} to {other}, but the stored tensors differ: "
                    "set tie_word_embeddings to false in config.json, or remove the copy"
                )
        return stored


def open_hf(directory: Path) -> HFModel:
    """Opens the config and the weights of an HF directory.

    Raises:
        ConversionError: what lies there is no model, or cannot be read to its end (``check_model_folder``).
    """
    check_model_folder(directory)
    return HFModel(
        directory=directory, config=read_json(directory / CONFIG_NAME, ConversionError), tensors=HFTensors(directory)
    )
