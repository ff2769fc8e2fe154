"""Saving a training checkpoint that any (tp, pp, dp) and any kind of optimizer can load.

model, optimizer --owned--> rank file of each rank in iter_N.tmp-x/ --checkpoint_write.commit--> iter_N/
"""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files import write_json
from megatron_vlm.log import get_logger
from megatron_vlm.models.built import Model
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.checkpoint.tensors import owned
from megatron_vlm.training.checkpoint.together import checkpoint_work, from_rank_0, gather
from megatron_vlm.training.optimizer.state import scaler_state
from megatron_vlm.weights import checkpoint_dir, checkpoint_write
from megatron_vlm.weights.model_folder import CarriedFiles
from megatron_vlm.weights.rank_files import rank_file_bytes, rank_file_name, write_rank_file

log = get_logger(__name__)

_MARGIN_BYTES = 16 << 20
"""Room for headers, state.json and the HF files."""


@dataclass(frozen=True, kw_only=True)
class PeftRecord:
    """What a checkpoint of adapters says of itself.

    Attributes:
        config: with targets, ranks and scales of its own where the run goes on from an adapter.
        base: record of the base (peft/base_identity.py).
    """

    config: PeftConfig
    base: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a run comes from: its checkpoints carry it or name it, and keep it.

    Attributes:
        hf_files: HF files of the model, which are carried along; None on ranks that write none.
        loaded_from: the checkpoint that it went on from.
        peft: of its adapters; None: it trains the model itself.
    """

    hf_files: CarriedFiles | None = None
    loaded_from: Path | None = None
    peft: PeftRecord | None = None

    @property
    def protected(self) -> list[Path]:
        """Folders that are never removed."""
        paths = (self.loaded_from, self.peft.base["path"] if self.peft else None)
        return [Path(path) for path in paths if path]

    @property
    def facts(self) -> dict[str, Any]:
        """Of state.json."""
        return {"peft": {"config": self.peft.config.to_dict(), "base": self.peft.base}} if self.peft else {}


def save_checkpoint(
    config: CheckpointConfig, model: Model, optimizer: Any, state: dict[str, Any], origin: Origin
) -> Path:
    """Writes ``iter_NNNNNNN`` into ``config.save`` and removes old checkpoints as ``config.keep_last`` says.

    A collective of the whole job: a failure on one rank is raised on all of them.

    Args:
        config: where and what.
        model: wrapped; its ``saved`` is written.
        optimizer: megatron-core's.
        state: JSON data, the same on all ranks: ``iteration`` (updates done), other counters, data state, seeds, resolved config.
        origin: of the run.

    Returns:
        The new folder.

    Raises:
        CheckpointError: on every rank; earlier checkpoints are untouched.
    """
    if config.save is None:
        raise CheckpointError(
            "checkpoint.save is not set, so there is no place for a checkpoint: name a folder (--save)"
        )
    topology, iteration = model.topology, state["iteration"]
    root, rank, save_optim = Path(config.save), topology.rank, not config.no_save_optim
    what = f"saving iteration {iteration} to {root}"
    facts = {"iteration": iteration, "layout": topology.name(), "optimizer": save_optim}
    temporary: Path | None = None
    try:
        with torch.no_grad():
            with checkpoint_work(what, topology.device):
                pieces, tensors = owned(model, optimizer if save_optim else None)
            num_bytes = sum(gather(rank_file_bytes(tensors)))
            with checkpoint_work(what, topology.device):
                if rank == 0:
                    temporary = checkpoint_write.begin(root, iteration, num_bytes + _MARGIN_BYTES)
            folder = Path(from_rank_0(str(temporary)))
            with checkpoint_work(what, topology.device):
                record = write_rank_file(
                    folder,
                    rank=rank,
                    world_size=topology.world_size,
                    tp=topology.tp,
                    tp_rank=topology.tp_rank,
                    pieces=pieces,
                    tensors=tensors,
                )
        records = {rank_file_name(writer): r for writer, r in enumerate(gather(record))}
        with checkpoint_work(what, topology.device):
            if rank == 0:
                if origin.hf_files is not None:
                    origin.hf_files.write(folder / "hf")
                scaler = scaler_state(optimizer) if save_optim else None
                content = {**facts, "loss_scale": scaler, "run": state, **origin.facts}
                write_json(folder / checkpoint_dir.STATE, content)
                checkpoint_write.commit(folder, records, {**facts, "versions": _versions()})
    except Exception:
        if temporary is not None:
            checkpoint_write.discard(temporary)
        raise
    final = root / checkpoint_dir.folder_name(iteration)
    if rank == 0:
        checkpoint_write.purge(root, iteration, config.keep_last, origin.protected)
        log.info("saved %s (%.2f GB)", final, num_bytes / 1e9)
    return final


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "megatron-core", "transformers")}
