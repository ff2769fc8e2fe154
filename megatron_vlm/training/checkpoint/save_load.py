"""Training checkpoints that any (tp, pp, dp) and any kind of optimizer can load.

    save: model, optimizer --owned--> rank file of each rank in iter_N.tmp-x/ --checkpoint_write.commit--> iter_N/
    load: find_checkpoint (verified, agreed on by all ranks) --RankFiles, fill--> model, optimizer

Every function here is a collective of the whole job: a failure on one rank is raised on all of them.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_vlm.errors import CheckpointError, MegatronVLMError
from megatron_vlm.files import read_json, write_json
from megatron_vlm.log import get_logger
from megatron_vlm.models.options import group_of
from megatron_vlm.parallel.batch import together
from megatron_vlm.parallel.topology import Topology
from megatron_vlm.peft.adapter_map import PeftPlan, trained_mapping
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.registry import FamilySpec
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.checkpoint.tensors import fill, owned
from megatron_vlm.training.optimizer.state import restore_scaler, scaler_state
from megatron_vlm.weights import checkpoint_dir, checkpoint_write
from megatron_vlm.weights.mapping import Mapping
from megatron_vlm.weights.model_folder import CarriedFiles
from megatron_vlm.weights.rank_files import RankFiles, rank_file_bytes, rank_file_name, write_rank_file

log = get_logger(__name__)

_MARGIN_BYTES = 16 << 20
"""Room for headers, state.json and the HF files."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Attributes:
        folder: holds rank files, ``hf/``, manifest and state.
        iteration: to go on at; 0 where only the weights are taken.
        state: what ``save_checkpoint`` was given.
        scaler: dynamic loss scale, or None.
        layout: layout of the run that wrote it, in words.
        weights_only: ``--finetune``, or a ``release``: nothing but weights is to be taken from it.
        peft: it holds adapters alone: their ``config`` and ``base``; None: it holds the whole model.
    """

    folder: Path
    iteration: int
    state: dict[str, Any]
    scaler: dict[str, float] | None
    layout: str
    weights_only: bool
    peft: dict[str, Any] | None = None

    @property
    def hf_dir(self) -> Path:
        return self.folder / "hf"


@dataclass(frozen=True, kw_only=True)
class PeftRecord:
    """What a checkpoint of adapters says of itself.

    Attributes:
        config: with targets, ranks and scales of its own where the run goes on from an adapter.
        plan: what trains.
        base: record of the base (peft/base_identity.py).
    """

    config: PeftConfig
    plan: PeftPlan
    base: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """``peft`` of state.json."""
        return {"config": self.config.to_dict(), "base": self.base}


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a load kept and what it reset, in parameters over all ranks by group (llm, vision, connector).

    Attributes:
        folder: what was loaded.
        layouts: (of the checkpoint, of this run).
        weights: parameters loaded.
        kept: optimizer state taken over: main parameters, moments and Adam's step.
        reset: trained now, but without stored state (newly unfrozen, or states left behind): zero moments, step 0.
        dropped: state stored, but the parameter is frozen now.
        loss_scale: the dynamic loss scale was taken over.
    """

    folder: Path
    layouts: tuple[str, str]
    weights: dict[str, int]
    kept: dict[str, int]
    reset: dict[str, int]
    dropped: dict[str, int]
    loss_scale: bool

    def __str__(self) -> str:
        rows = {
            "weights loaded": self.weights,
            "optimizer state kept": self.kept,
            "optimizer state reset (zero moments, Adam step 0)": self.reset,
            "optimizer state dropped (frozen now)": self.dropped,
        }
        lines = [f"loaded {self.folder}, written with {self.layouts[0]}, into {self.layouts[1]}"]
        for title, counts in rows.items():
            if counts:
                lines.append(f"  {title}: " + ", ".join(f"{group} {count}" for group, count in counts.items()))
        lines.append(f"  loss scale: {'kept' if self.loss_scale else 'none, or reset'}")
        return "\n".join(lines)


# ---- save ----


def save_checkpoint(
    config: CheckpointConfig,
    *,
    iteration: int,
    chunks: Sequence[nn.Module],
    optimizer: Any,
    topology: Topology,
    spec: FamilySpec,
    model_config: Any,
    vocab_multiple: int,
    state: dict[str, Any],
    hf_files: CarriedFiles | None,
    loaded_from: Path | None = None,
    peft: PeftRecord | None = None,
) -> Path:
    """Writes ``iter_NNNNNNN`` into ``config.save`` and removes old checkpoints as ``config.keep_last`` says.

    Args:
        config: where and what.
        iteration: updates done.
        chunks: this rank's stages, wrapped in DDP.
        optimizer: megatron-core's.
        topology, spec, model_config, vocab_multiple: what the model was built from.
        state: JSON data, the same on all ranks: counters, data state, seeds, resolved config.
        hf_files: HF files of the model, which are carried along; needed on rank 0 alone.
        loaded_from: a folder that is never removed.
        peft: what trains; the rest is not written. None: everything is.

    Returns:
        The new folder.

    Raises:
        CheckpointError: on every rank; earlier checkpoints are untouched.
    """
    if config.save is None:
        raise CheckpointError(
            "checkpoint.save is not set, so there is no place for a checkpoint: name a folder (--save)"
        )
    root, rank, save_optim = Path(config.save), topology.rank, not config.no_save_optim
    mapping = _mapping(spec, model_config, topology, vocab_multiple, peft)
    what = f"saving iteration {iteration} to {root}"
    facts = {"iteration": iteration, "layout": topology.name(), "optimizer": save_optim}
    protected = [Path(path) for path in (loaded_from, peft and peft.base["path"]) if path]
    temporary: Path | None = None
    try:
        with torch.no_grad():
            with _together(what, topology.device):
                pieces, tensors = owned(chunks, optimizer if save_optim else None, topology, mapping)
            num_bytes = sum(_gather(rank_file_bytes(tensors)))
            with _together(what, topology.device):
                if rank == 0:
                    temporary = checkpoint_write.begin(root, iteration, num_bytes + _MARGIN_BYTES)
            folder = Path(_from_rank_0(str(temporary)))
            with _together(what, topology.device):
                record = write_rank_file(
                    folder,
                    rank=rank,
                    world_size=topology.world_size,
                    tp=topology.tp,
                    tp_rank=topology.tp_rank,
                    pieces=pieces,
                    tensors=tensors,
                )
        records = {rank_file_name(writer): r for writer, r in enumerate(_gather(record))}
        with _together(what, topology.device):
            if rank == 0:
                if hf_files is not None:
                    hf_files.write(folder / "hf")
                scaler = scaler_state(optimizer) if save_optim else None
                content = {**facts, "loss_scale": scaler, "run": state, **({"peft": peft.record} if peft else {})}
                write_json(folder / checkpoint_dir.STATE, content)
                checkpoint_write.commit(folder, records, {**facts, "versions": _versions()})
    except Exception:
        if temporary is not None:
            checkpoint_write.discard(temporary)
        raise
    final = root / checkpoint_dir.folder_name(iteration)
    if rank == 0:
        checkpoint_write.purge(root, iteration, config.keep_last, protected)
        log.info("saved %s (%.2f GB)", final, num_bytes / 1e9)
    return final


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "megatron-core", "transformers")}


# ---- load ----


def find_checkpoint(config: CheckpointConfig, device: torch.device) -> Checkpoint | None:
    """Finds and verifies what ``config.load`` means; None where that is no training checkpoint (HF, Megatron weights).

    The newest sound one: a damaged one is passed over, and a tracker that names another is told of. An iteration that was
    named (``ckpt_step``, or ``load`` being its folder) is taken or refused. The ranks share the hashing among them.

    Args:
        config: ``load``, ``ckpt_step``, ``finetune`` and ``verify_hashes`` are read.
        device: of this rank, for the collectives.

    Raises:
        CheckpointError: on every rank: the named one, or every one, is damaged.
    """
    if config.load is None:
        return None
    path, rank, ckpt_step = Path(config.load), dist.get_rank(), config.ckpt_step
    found: checkpoint_dir.Candidates | None = None
    with _together(f"looking for a checkpoint in {path}", device):
        if rank == 0:
            found = checkpoint_dir.candidates(path, ckpt_step)
    found = _from_rank_0(found)
    if found is None:
        if ckpt_step is not None:
            raise CheckpointError(f"{path} holds no training checkpoint, so there is no --ckpt-step {ckpt_step}")
        return None

    def state_of(folder: Path) -> dict[str, Any]:
        with _together(str(folder), device):
            checkpoint_dir.verify(folder, share=rank, shares=dist.get_world_size(), hashes=config.verify_hashes)
        with _together(str(folder), device):
            return read_json(folder / checkpoint_dir.STATE, CheckpointError)

    folder, state = found.choose(state_of, tell=rank == 0)
    weights_only = config.finetune or folder.name == checkpoint_dir.RELEASE
    return Checkpoint(
        folder=folder,
        iteration=0 if weights_only else state["iteration"],
        state=state["run"],
        scaler=state["loss_scale"],
        layout=state["layout"],
        weights_only=weights_only,
        peft=state.get("peft"),
    )


def load_checkpoint(
    config: CheckpointConfig,
    found: Checkpoint,
    *,
    chunks: Sequence[nn.Module],
    optimizer: Any,
    topology: Topology,
    spec: FamilySpec,
    model_config: Any,
    vocab_multiple: int,
    peft: PeftRecord | None = None,
) -> LoadReport:
    """Fills parameters and, unless ``no_load_optim`` or ``finetune`` says otherwise, the optimizer.

    A parameter that is trained now but has no stored state starts with its weight as main parameter, zero moments and
    Adam step 0. ``finetune`` takes main parameters as weights. Learning rates and weight decay are not stored here; they
    come from the config and the schedule.

    Args:
        config: ``no_load_optim`` is read; main parameters are then the stored weights, and the optimizer has no state.
        found: from ``find_checkpoint``.
        chunks: this rank's stages, wrapped in DDP or not.
        optimizer: megatron-core's; None: weights only, for evaluation.
        topology, spec, model_config, vocab_multiple: what the model was built from.
        peft: what trains, and alone is in the checkpoint; None: everything.

    Raises:
        CheckpointError: on every rank: tensors missing, unexpected or of another shape, all listed.
    """
    mapping = _mapping(spec, model_config, topology, vocab_multiple, peft)
    with_state = optimizer is not None and not (found.weights_only or config.no_load_optim)
    with (
        _together(f"loading {found.folder}", topology.device),
        RankFiles(found.folder) as files,
        torch.no_grad(),
    ):
        with_main = with_state or found.weights_only
        fate = fill(files, chunks, optimizer, topology, mapping, with_state=with_state, with_main=with_main)
        loss_scale = with_state and restore_scaler(optimizer, found.scaler)
    merged = {name: kind for one in _gather(fate) for name, kind in sorted(one.items())}

    def count(kind: str | None = None) -> dict[str, int]:
        return dict(Counter(group_of(name) for name, its in merged.items() if kind in (None, its)))

    report = LoadReport(
        folder=found.folder,
        layouts=(found.layout, topology.name()),
        weights=count(),
        kept=count("kept"),
        reset=count("reset"),
        dropped=count("dropped"),
        loss_scale=loss_scale,
    )
    log.info("%s", report)
    return report


def _mapping(
    spec: FamilySpec, model_config: Any, topology: Topology, vocab_multiple: int, peft: PeftRecord | None
) -> Mapping:
    """Of what a checkpoint holds."""
    mapping = spec.mapping(model_config, tp=topology.tp, vocab_multiple=vocab_multiple)
    return trained_mapping(mapping, peft.plan, topology.tp) if peft else mapping


@contextlib.contextmanager
def _together(what: str, device: torch.device) -> Iterator[None]:
    """Runs a block of local work; if it fails on any rank, every rank raises CheckpointError. A collective."""
    with together(device):
        try:
            yield
        except (MegatronVLMError, OSError) as error:
            raise CheckpointError(f"{what}: {error}") from error


def _gather(value: Any) -> list[Any]:
    """One value of each rank, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _from_rank_0(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
