"""Base and adapter as one weight source, wherever the adapter comes from.

    base (any WeightSource) ---+
    Adapter -------------------+--> MergedSource.read(name) = W + scaling B A, in fp32, cast once
        checkpoint of a run | PEFT's folder | XTuner's folders | a model saved with its adapters inside

What can be loaded, converted, verified or answered with can thus be a base with an adapter.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_vlm.digests import Record
from megatron_vlm.errors import ConversionError
from megatron_vlm.peft.adapter import WEIGHT, Adapter, Pair
from megatron_vlm.peft.adapter_folders import open_adapter
from megatron_vlm.peft.adapter_io import lora_settings
from megatron_vlm.peft.adapter_map import PeftPlan, trained_mapping
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.select import named_mapping
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.weights.mapping import Entry, Mapping, Split
from megatron_vlm.weights.nf4.tensor import Nf4Tensor


class MergedSource(WeightSource):
    """A base and its adapter, read as the merged model.

    Attributes:
        base: the weights beneath; closed with this source.
        adapter: under the names of ``named``.
        named: the map whose names the adapter has.
        naming: its name among the family's exports; None: the model's own.
        directory: where the adapter comes from.
        base_name: path or hub id of the base; None: there is none without the adapter.

    ``records`` are of its files; ``main`` reads it anew, of fp32 main parameters.
    """

    kind = "adapted"

    def __init__(
        self,
        base: WeightSource,
        adapter: Adapter,
        naming: str | None,
        directory: Path,
        base_name: str | os.PathLike | None,
        records: Sequence[Record] = (),
        main: Callable[[], Adapter] | None = None,
    ):
        super().__init__(base.hf_dir, base.hf_config, base.spec)
        self.base, self.adapter, self.naming, self.directory = base, adapter, naming, directory
        self.base_name = None if base_name is None else absolute(base_name)
        self._records, self._main = records, main
        self.named = named_mapping(base.spec, base.config, naming)
        self.infos, self.stored_ties, self.quantization = base.infos, base.stored_ties, base.quantization
        self._touched = {entry.name: entry for entry in self.named if adapter.touches(entry)}

    def read(self, name: str) -> Tensor:
        full = self.base.read(name)
        entry = self._touched.get(name)
        if entry is None:
            return full
        parts = zip(entry.hf, entry.from_full(full.to(self.infos[name].dtype)), strict=True)
        merged = entry.to_full([self.adapter.applied(hf, part) for hf, part in parts])
        # The head under another naming may lack the rows of added tokens.
        return torch.cat([merged, full[len(merged) :]]) if len(merged) < len(full) else merged

    def read_shard(self, name: str, split: Split, tp: int, tp_rank: int) -> Tensor:
        if name in self._touched:
            return super().read_shard(name, split, tp, tp_rank)
        return self.base.read_shard(name, split, tp, tp_rank)

    def read_hf(self, entry: Entry) -> Iterator[list[Tensor]]:
        return super().read_hf(entry) if entry.name in self._touched else self.base.read_hf(entry)

    def read_nf4(self, entry: Entry) -> Iterator[Nf4Tensor]:
        self.require_full("merging an adapter into it")
        return super().read_nf4(entry)

    def use_main_parameters(self) -> None:
        self.base.use_main_parameters()
        if self._main:
            self.adapter = self._main()
            touched = {name: self.base.infos[name].cast(torch.float32) for name in self._touched}
            self.infos = {**self.base.infos, **touched}

    def folders(self) -> tuple[Path, ...]:
        return (self.directory, *self.base.folders())

    def records(self) -> Sequence[Record]:
        return (*self._records, *self.base.records())

    def hash_as_read(self) -> None:
        self.base.hash_as_read()

    def close(self) -> None:
        self.base.close()


def absolute(path_or_id: str | os.PathLike) -> str:
    """A directory's whole path, or a hub id as it is."""
    path = Path(path_or_id)
    return str(path.resolve()) if path.is_dir() else str(path_or_id)


# ---- checkpoints of runs, and runs that go on from an adapter ----


def trained_adapter(plan: PeftPlan, config: PeftConfig, named: Mapping, read: Callable[[str], Tensor]) -> Adapter:
    """The adapter that a run's full tensors make.

    Args:
        plan, config: of the run.
        named: the map whose names the plan goes by.
        read: reads a full tensor by its global name.
    """
    entries, trained = named.by_name(), trained_mapping(named, plan).by_name()
    pairs = {}
    for target in plan.targets:
        ((a,), (b,)) = (trained[f"{target.name}.{half}"].from_full(read(f"{target.name}.{half}")) for half in "ab")
        module = target.entry.hf[target.index].removesuffix(WEIGHT)
        pairs[module] = Pair(a=a, b=b, alpha=target.alpha, rslora=config.rslora)
    full: dict[str, Tensor] = {}
    for name in (*plan.saved, *plan.biases):
        entry = entries[name]
        kept = plan.biases.get(name, entry.hf)
        parts = zip(entry.hf, entry.from_full(read(name)), strict=True)
        full |= {hf: part for hf, part in parts if hf in kept}
    return Adapter(pairs=pairs, full=full, bias=config.bias, dropout=config.dropout)


def continued(
    config: PeftConfig, source: WeightSource, verify_hashes: bool = True
) -> tuple[WeightSource, PeftConfig, Adapter]:
    """What a run that goes on from ``config.adapter`` trains, and on which base.

    Args:
        config: its ``adapter`` is set; dropout and quantisation are taken from it.
        source: the base; or base and adapter in one, where ``adapter`` is the same folder.
        verify_hashes: as of ``open_source``.

    Returns:
        The base alone, the config with the adapter's own targets, ranks and scales, and the adapter.

    Raises:
        ConversionError: the adapter does not fit the base.
    """
    assert config.adapter is not None
    folder = Path(config.adapter)
    if isinstance(source, MergedSource):
        if folder.resolve() != source.directory.resolve():
            raise ConversionError(
                f"{source.directory} is a base with an adapter already, and peft.adapter {folder} is another: merge the first "
                "into its base (convert merge), and load the result"
            )
        base, adapter, names = source.base, source.adapter, source.naming
    else:
        base = source
        adapter, names = open_adapter(folder, source, verify_hashes)
    said = lora_settings(adapter, named_mapping(base.spec, base.config, names))
    resolved = dataclasses.replace(
        config,
        adapter=None,
        target_modules=tuple(said["target_modules"]),
        modules_to_save=tuple(said["modules_to_save"] or ()),
        r=said["r"],
        alpha=float(said["lora_alpha"]),
        rslora=said["use_rslora"],
        rank_pattern=said["rank_pattern"],
        alpha_pattern=said["alpha_pattern"],
        bias=said["bias"],
        names=names,
    )
    return base, resolved, adapter


def full_tensors(adapter: Adapter, plan: PeftPlan, named: Mapping, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The full tensors that a run starts from: the inverse of ``trained_adapter``.

    Args:
        adapter: under the names of ``named``.
        plan, named: of the run.
        read: reads a full tensor of the base, for those that train in part.
    """
    entries, trained = named.by_name(), trained_mapping(named, plan).by_name()
    tensors = {}
    for target in plan.targets:
        pair = adapter.pairs[target.entry.hf[target.index].removesuffix(WEIGHT)]
        tensors[f"{target.name}.a"] = trained[f"{target.name}.a"].to_full([pair.a])
        tensors[f"{target.name}.b"] = trained[f"{target.name}.b"].to_full([pair.b])
    for name in (*plan.saved, *plan.biases):
        entry = entries[name]
        parts = zip(entry.hf, entry.from_full(read(name)), strict=True)
        tensors[name] = entry.to_full([adapter.full.get(hf, part) for hf, part in parts])
    return tensors


# ---- folders and models ----
