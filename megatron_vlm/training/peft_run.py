"""What a run with adapters opens and trains: the base, the plan, and what it starts from.

checkpoint.load + peft --open_run--> base (WeightSource), PeftRun | None, Checkpoint to go on from | None
PeftRun --outline_adapted--> Model with pairs, everything else frozen

load                                    peft    trains
model, full checkpoint                  given   adapters on it, from the start
checkpoint of adapters                  given   the same adapters, from where they are; with --finetune from the start
checkpoint of adapters, --finetune      none    the merged model, in full
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_vlm.conversion.load import outline
from megatron_vlm.conversion.open_source import open_base, open_source
from megatron_vlm.digests import check_records
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.files import read_json
from megatron_vlm.log import get_logger
from megatron_vlm.models.built import Model
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel.topology import Topology
from megatron_vlm.peft.adapter_map import PeftPlan
from megatron_vlm.peft.base_identity import base_place, describe_base
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.lora import apply_lora, fill
from megatron_vlm.peft.merge import absolute, continued, full_tensors
from megatron_vlm.peft.qlora import quantization_of
from megatron_vlm.peft.select import make_plan, named_mapping
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.training.checkpoint.load import Checkpoint
from megatron_vlm.training.checkpoint.output_check import check_kept
from megatron_vlm.training.checkpoint.save import PeftRecord
from megatron_vlm.training.run_config import RunConfig, scale_rope
from megatron_vlm.weights.hf_io import CONFIG_NAME
from megatron_vlm.weights.model_folder import CarriedFiles

log = get_logger(__name__)

_FREE = ("adapter", "dropout", "init", "quantize", "double_quant", "quantize_groups")
"""Settings that may change between a checkpoint and the run that goes on from it."""


@dataclass(frozen=True, kw_only=True)
class PeftRun(PeftRecord):
    """Adapters of a run.

    Attributes:
        plan: what trains.
        tensors: full tensors to start from, by global name; what is absent starts anew.
    """

    plan: PeftPlan
    tensors: dict[str, Tensor] = field(default_factory=dict)


def open_run(config: RunConfig, found: Checkpoint | None) -> tuple[WeightSource, PeftRun | None, Checkpoint | None]:
    """Opens the weights that a run starts from, with their positions stretched as the run says.

    Args, returns and errors as of ``_open_run``.
    """
    opened = _open_run(config, found)
    try:
        scale_rope(config, opened[0])
    except BaseException:
        opened[0].close()
        raise
    return opened


def _open_run(config: RunConfig, found: Checkpoint | None) -> tuple[WeightSource, PeftRun | None, Checkpoint | None]:
    """Opens the weights that a run starts from.

    Args:
        config: of the run.
        found: the checkpoint that ``checkpoint.load`` means, if it is one.

    Returns:
        (source to build the model from, adapters if any, checkpoint to restore parameters and state from if any).

    Raises:
        ConfigError: the checkpoint and the section peft do not go together.
        CheckpointError: the base is absent or another one.
    """
    name, family, moved = (
        str(found.folder if found else config.checkpoint.load),
        config.model.family,
        config.checkpoint.base,
    )
    verify = verifies(config)
    if found is not None and found.peft is not None:
        if config.peft.active:
            return _go_on(config, found, found.peft)
        if not (found.weights_only or config.training.skip_train):
            raise ConfigError(
                f"{found.folder} holds adapters of {found.peft['base']['path']}: give the section peft they were trained with "
                f"(target_modules {found.peft['config']['target_modules']} ...) to go on, or checkpoint.finetune (--finetune) "
                "to train the merged model in full"
            )
        return open_source(name, family, moved, verify_hashes=verify), None, None
    source = open_source(name, family, moved, verify_hashes=verify)
    if not config.peft.active:
        if source.quantization is not None and not config.training.skip_train:
            source.close()
            raise ConfigError(
                f"{name} holds linears in 4 bits, which do not train: train adapters on it (peft.target_modules), or load the "
                "model that it was made from"
            )
        return source, None, found
    if found is not None:
        log.info("%s is the base of new adapters; started anew: optimizer, schedule, iteration and data order", name)
    try:
        return *_begin(config, source, absolute(name)), None
    except BaseException:
        source.close()
        raise


def verifies(config: RunConfig) -> bool:
    """Whether this process compares small files with their digests: one of each machine does. Large ones are shared."""
    return config.checkpoint.verify_hashes and os.environ.get("LOCAL_RANK", "0") == "0"


def check_source(
    config: RunConfig, source: WeightSource, found: Checkpoint | None, *, start: int
) -> CarriedFiles | None:
    """Checks that a run may start from these files: no output lies in them, none is another run's, and this rank's share of
    them is as it was written.

    Args:
        config: of the run.
        source: of its weights.
        found: the checkpoint that ``checkpoint.load`` means, if it is one; its own digests were compared when it was found.
        start: iteration that the run goes on at.

    Returns:
        On rank 0 what the run's checkpoints carry: the folder may be gone by the first save, as a temporary copy is.

    Raises:
        MegatronVLMError: an output lies in the model or holds another run, or a file was changed or cannot be read.
    """
    config.check_outputs(source.folders())
    if dist.get_rank() == 0 and not config.training.skip_train:
        check_kept(config.checkpoint, found, start)
    if config.checkpoint.verify_hashes:
        records = [record for record in source.records() if found is None or record.folder != found.folder]
        check_records(records, share=dist.get_rank(), shares=dist.get_world_size())
    return CarriedFiles(source.hf_dir, source.hf_config) if dist.get_rank() == 0 else None


def _begin(config: RunConfig, source: WeightSource, path: str) -> tuple[WeightSource, PeftRun]:
    """Adapters from their start: new ones, or those of ``peft.adapter``."""
    peft, tensors = config.peft, {}
    if peft.adapter is not None:
        whole = source
        source, peft, adapter = continued(peft, whole, verifies(config))
        if source is not whole:
            path = getattr(whole, "base_name", None) or path
        plan = make_plan(source.spec, source.config, peft, source.infos)
        tensors = full_tensors(adapter, plan, named_mapping(source.spec, source.config, peft.names), source.read)
    else:
        plan = make_plan(source.spec, source.config, peft, source.infos)
    return source, PeftRun(config=peft, plan=plan, base=describe_base(source, path), tensors=tensors)


def _go_on(config: RunConfig, found: Checkpoint, record: dict[str, Any]) -> tuple[WeightSource, PeftRun, Checkpoint]:
    """The adapters of a checkpoint, on the base that it names."""
    stored, now = PeftConfig.from_checkpoint(record["config"]), config.peft
    old, new = stored.to_dict(), now.to_dict()
    changed = [f"{key} {old[key]!r} -> {new[key]!r}" for key in old if key not in _FREE and old[key] != new[key]]
    if changed and now.adapter is None:
        raise ConfigError(
            f"{found.folder} holds other adapters than the section peft describes ({'; '.join(changed)}): give the settings "
            "they were trained with, or load their base to train new ones"
        )
    peft = stored.replace(**{key: getattr(now, key) for key in _FREE if key != "adapter"})
    path = base_place(record["base"], config.checkpoint.base, found.folder)
    source = open_base(record["base"], config.checkpoint.base, found.folder, config.model.family, verifies(config))
    try:
        source.use_config(read_json(found.hf_dir / CONFIG_NAME, ConversionError))
        plan = make_plan(source.spec, source.config, peft, source.infos)
    except BaseException:
        source.close()
        raise
    return source, PeftRun(config=peft, plan=plan, base={**record["base"], "path": absolute(path)}), found


def outline_adapted(
    source: WeightSource, peft: PeftRun, topology: Topology, options: ModelOptions, seed: int
) -> tuple[Model, Callable[[Model], None]]:
    """The model, pairs added and everything else frozen, and what fills it, as of ``conversion.load.outline``: its base (in 4
    bits where the run says so) and what ``peft.tensors`` says."""
    quantization = quantization_of(peft.config, options.params_dtype)
    model, fill_base = outline(source, topology, options, quantize=quantization, keep=peft.plan.saved)

    def fill_adapted(filled: Model) -> None:
        fill_base(filled)
        fill(filled, peft.tensors)

    return apply_lora(model, peft.plan, seed), fill_adapted
