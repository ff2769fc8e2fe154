"""Opening weights, whatever they are: a whole model of any format, or an adapter together with its base.

    directory or hub id --open_source--> HFSource | MegatronSource | TrainingSource
                                         MergedSource(base, adapter): PEFT's folder, XTuner's folders, the checkpoint of a run
                                         that trained one, or a model saved with PEFT's layers inside

The one place that knows all of them; each of them knows none of the others. A base may itself be any of these.
"""

import atexit
import os
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_vlm import registry
from megatron_vlm.digests import Record
from megatron_vlm.errors import CheckpointError, ConfigError, ConversionError
from megatron_vlm.files import read_json, write_json
from megatron_vlm.peft.adapter import WEIGHT, Adapter, Pair, hf_infos
from megatron_vlm.peft.adapter_folders import adapter_records, open_adapter
from megatron_vlm.peft.adapter_io import CONFIG, is_adapter
from megatron_vlm.peft.base_identity import base_place, check_base
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.merge import MergedSource, trained_adapter
from megatron_vlm.peft.select import make_plan, named_mapping
from megatron_vlm.registry import FamilySpec
from megatron_vlm.sources.hf import HFSource, open_hf
from megatron_vlm.sources.megatron import MegatronSource
from megatron_vlm.sources.source import WeightSource, choose_family
from megatron_vlm.sources.training import TrainingSource
from megatron_vlm.weights.checkpoint_dir import RELEASE, STATE, TRACKER, candidates, checkpoint_record, read_tracker
from megatron_vlm.weights.hf_io import CONFIG_NAME, list_names, resolve_directory
from megatron_vlm.weights.mapping import DerivedTensors, HFModel
from megatron_vlm.weights.megatron_dir import MANIFEST, check_hf_files, read_manifest
from megatron_vlm.weights.model_folder import check_model_folder, copy_hf_files
from megatron_vlm.weights.rank_files import Kind, RankFiles

_INSIDE = ".base_model.model."


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
        recorded = registry.get(read_manifest(directory).family)
        return MegatronSource(
            directory,
            choose_family(read_json(directory / "hf" / CONFIG_NAME, ConversionError), directory, family, recorded),
            verify_hashes=verify_hashes,
        )
    if (found := candidates(directory)) is not None:
        folder, record = found.choose(partial(_sound, verify_hashes=verify_hashes))
        return _open_iteration(folder, record, family, base, verify_hashes)
    if read_tracker(directory) == RELEASE:  # Megatron weights that a run starts from
        return _open(directory / RELEASE, family, base, verify_hashes)
    if _is_adapter(directory):
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


# ---- checkpoints ----


def _sound(folder: Path, verify_hashes: bool) -> Record:
    """The files of an iteration, of the sizes in its manifest, the small ones also of the content.

    Raises:
        CheckpointError: files absent or damaged.
    """
    record = checkpoint_record(folder)
    if verify_hashes:
        check_hf_files(record)
        record.check_digests([name for name in record.files if name == STATE])
    return record


def _open_iteration(
    directory: Path, record: Record, family: str | None, base: str | os.PathLike | None, verify_hashes: bool
) -> WeightSource:
    """All weights of a model, or what a run trained of it together with its base."""
    if (directory / "hf").is_dir():
        check_model_folder(directory / "hf")
    peft = read_json(directory / STATE, CheckpointError).get("peft")
    if peft is None:
        return TrainingSource(directory, record, family)
    return _open_run(directory, record, peft, family, base, verify_hashes)


def _open_run(
    directory: Path,
    record: Record,
    peft: dict[str, Any],
    family: str | None,
    base: str | os.PathLike | None,
    verify_hashes: bool,
) -> MergedSource:
    """A checkpoint that holds only what trained, with its base.

    Args:
        directory: of one iteration.
        record: of its files.
        peft: of its state.json: config and base.
        base: where the base is now; None: where it was.
        family, verify_hashes: as of ``open_source``.

    Raises:
        ConversionError: the base is another one, or tensors are missing or unknown.
    """
    config = PeftConfig.from_checkpoint(peft["config"])
    source = open_base(peft["base"], None if base is None else str(base), directory, family, verify_hashes)
    try:
        if (directory / "hf" / CONFIG_NAME).exists():  # the run's own: it may have stretched the positions
            source.use_config(read_json(directory / "hf" / CONFIG_NAME, ConversionError))
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
        return MergedSource(source, read("model"), config.names, directory, where, [record], main)
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


# ---- adapters ----


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
