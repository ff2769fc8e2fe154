"""Base and adapter as one weight source, wherever the adapter comes from.

    base (any WeightSource) ---+
    Adapter -------------------+--> MergedSource.read(name) = W + scaling B A, in fp32, cast once
        checkpoint of a run | PEFT's folder | XTuner's folders | a model saved with its adapters inside

What can be loaded, converted, verified or answered with can thus be a base with an adapter.
"""

import atexit
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.conversion.source import HFSource, WeightSource, open_source
from megatron_vlm.digests import Record
from megatron_vlm.errors import CheckpointError, ConversionError
from megatron_vlm.files import read_json, write_json
from megatron_vlm.peft.adapter import WEIGHT, Adapter, Pair, hf_infos
from megatron_vlm.peft.adapter_folders import adapter_records, open_adapter
from megatron_vlm.peft.adapter_io import CONFIG, is_adapter, lora_settings
from megatron_vlm.peft.adapter_map import PeftPlan, trained_mapping
from megatron_vlm.peft.base_identity import base_place, check_base
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.select import make_plan, named_mapping
from megatron_vlm.registry import FamilySpec
from megatron_vlm.weights.hf_io import CONFIG_NAME, list_names
from megatron_vlm.weights.mapping import DerivedTensors, Entry, HFModel, Mapping, Split
from megatron_vlm.weights.model_folder import copy_hf_files
from megatron_vlm.weights.nf4 import Nf4Tensor
from megatron_vlm.weights.rank_files import Kind, RankFiles

_INSIDE = ".base_model.model."


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
        parts = zip(entry.hf, entry.from_full(full.to(self.dtype(name))), strict=True)
        merged = entry.to_full([self.adapter.applied(hf, part) for hf, part in parts])
        # The head under another naming may lack the rows of added tokens.
        return torch.cat([merged, full[len(merged) :]]) if len(merged) < len(full) else merged

    def read_shard(self, name: str, split: Split, tp: int, tp_rank: int) -> Tensor:
        if name in self._touched:
            return super().read_shard(name, split, tp, tp_rank)
        return self.base.read_shard(name, split, tp, tp_rank)

    def read_shards(self, entry: Entry, tp: int) -> list[list[Tensor]]:
        return super().read_shards(entry, tp) if entry.name in self._touched else self.base.read_shards(entry, tp)

    def read_hf_pieces(self, entry: Entry) -> list[list[Tensor]]:
        return super().read_hf_pieces(entry) if entry.name in self._touched else self.base.read_hf_pieces(entry)

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


def open_run(
    directory: Path,
    peft: dict[str, Any],
    base: str | os.PathLike | None = None,
    family: str | None = None,
    record: Record | None = None,
    verify_hashes: bool = True,
) -> MergedSource:
    """A checkpoint that holds only what trained, with its base.

    Args:
        directory: of one iteration.
        peft: of its state.json: config and base.
        base: where the base is now; None: where it was.
        family, verify_hashes: as of ``open_source``.
        record: of the checkpoint's files.

    Raises:
        ConversionError: the base is another one, or tensors are missing or unknown.
    """
    config = PeftConfig.from_dict(peft["config"])
    source = open_base(peft["base"], None if base is None else str(base), directory, family, verify_hashes)
    try:
        plan = make_plan(source.spec, source.config, config, source.infos)
        with RankFiles(directory) as files:
            stored = set(files.names())
            missing, extra = sorted(plan.names - stored), sorted(stored - plan.names)
            if missing or extra:
                raise ConversionError(
                    f"{directory} does not hold what its run trained: missing {list_names(missing) or 'nothing'}; "
                    f"unexpected {list_names(extra) or 'nothing'}"
                )

        def read(*kinds: Kind) -> Adapter:
            named = named_mapping(source.spec, source.config, config.names)
            with RankFiles(directory) as files:

                def full(name: str) -> Tensor:
                    return files.read(name, next(kind for kind in kinds if files.has(name, kind)))

                return trained_adapter(plan, config, named, full)

        where, main = base or peft["base"]["path"], partial(read, "param", "model")
        return MergedSource(source, read("model"), config.names, directory, where, [record] if record else (), main)
    except BaseException:
        source.close()
        raise


def open_base(
    record: dict[str, Any], moved: str | None, what: Path, family: str | None = None, verify_hashes: bool = True
) -> WeightSource:
    """Opens the base of a checkpoint that holds adapters alone.

    Args:
        record: ``base`` of ``peft`` in its state.json.
        moved: where it is now; None: where it was.
        what: the checkpoint.
        family, verify_hashes: as of ``open_source``.

    Raises:
        CheckpointError: it is not there, or another one.
    """
    path = base_place(record, moved, what)
    source = open_source(path, family, verify_hashes=verify_hashes)
    try:
        try:
            check_base(record, source, path)
        except CheckpointError:
            # A folder with base and adapter in it is also where a run that goes on from that adapter has its base.
            if not isinstance(source, MergedSource):
                raise
            source = source.base
            check_base(record, source, path)
        return source
    except BaseException:
        source.close()
        raise


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


def adapted(
    directory: Path, base: str | os.PathLike | None = None, family: str | None = None, verify_hashes: bool = True
) -> MergedSource:
    """An adapter's folder with its base.

    Args:
        directory: see ``open_adapter``.
        base: the model it was trained on; None: where its adapter_config.json says.
        family, verify_hashes: as of ``open_source``.

    Raises:
        ConversionError: no base is known, or it is another one.
    """
    path = base or (
        read_json(directory / CONFIG, ConversionError).get("base_model_name_or_path") if is_adapter(directory) else None
    )
    if not path:
        raise ConversionError(f"{directory} holds an adapter and does not say of which model: give --base DIR")
    source = open_source(path, family, verify_hashes=verify_hashes)
    try:
        adapter, names = open_adapter(directory, source, verify_hashes)
        return MergedSource(source, adapter, names, directory, path, list(adapter_records(directory, source)))
    except BaseException:
        source.close()
        raise


def open_wrapped(model: HFModel, spec: FamilySpec) -> MergedSource:
    """Splits such a model into base and adapter.

    Raises:
        ConversionError: tensors that belong to neither.
    """
    ranks = {key: model.config[key] for key in ("use_llm_lora", "use_backbone_lora") if model.config.get(key)}
    config = {**model.config, **dict.fromkeys(ranks, 0)}
    halves: dict[str, dict[str, Tensor]] = {}
    infos, readers = {}, {}
    for name, info in model.tensors.infos.items():
        plain = name.replace(_INSIDE, ".")
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", plain):
            halves.setdefault(match[1], {})[match[2]] = model.tensors.read(name)
            continue
        plain = plain.replace(".base_layer.", ".")
        infos[plain], readers[plain] = info, partial(model.tensors.read, name)
    tensors = DerivedTensors(infos, readers, [model.tensors])
    # Whoever copies the other files takes the changed config.json along.
    files = Path(tempfile.mkdtemp(prefix="megatron_vlm_"))
    atexit.register(shutil.rmtree, files, ignore_errors=True)
    copy_hf_files(model.directory, files)
    write_json(files / CONFIG_NAME, config)
    source = HFSource(HFModel(directory=files, config=config, tensors=tensors), spec)
    shapes = hf_infos(source.mapping, source.infos)
    problems = []
    for module, pair in halves.items():
        shape = shapes[module + WEIGHT].shape if module + WEIGHT in shapes else None
        if shape is None or pair.keys() != {"A", "B"} or (pair["B"].shape[0], pair["A"].shape[1]) != shape:
            problems.append(module)
    if problems:
        raise ConversionError(f"{model.directory}: lora_A and lora_B do not fit at {list_names(problems)}")
    # The original's wrap_llm_lora and wrap_backbone_lora: alpha is twice the rank.
    pairs = {m: Pair(a=pair["A"], b=pair["B"], alpha=2.0 * pair["A"].shape[0]) for m, pair in halves.items()}
    return MergedSource(source, Adapter(pairs=pairs, dropout=0.05), None, model.directory, None)
