"""Between a rank's model and optimizer and the rank files of a checkpoint: what to write, how to fill from them.

parameters + Fragments --owned--> Pieces and tensors --> rank file
RankFiles --fill--> parameters + main parameters + moments + Adam's step
"""

from typing import Any

from torch import Tensor, nn

from megatron_vlm.errors import CheckpointError
from megatron_vlm.models.built import Model, global_parameters, weight_name
from megatron_vlm.parallel.shards import held, put, replica
from megatron_vlm.parallel.topology import Topology
from megatron_vlm.training.optimizer.state import Fragment, fragments, warn_of_shared_steps
from megatron_vlm.weights.mapping import Split
from megatron_vlm.weights.rank_files import Kind, Piece, RankFiles

_MAX_LISTED = 20


def owned(model: Model, optimizer: Any) -> tuple[list[Piece], dict[tuple[Kind, str], Tensor]]:
    """What this rank writes, as views of the live tensors.

    Each element has one writer. Of tensor parallel replicas that is rank 0. Copies of a shard (weights, and states
    of a plain optimizer; rows of sharded parameters in each sharding group) take turns, so that all ranks write about as much.
    Tied copies are not written.

    Args:
        model: what its ``saved`` names is written.
        optimizer: megatron-core's; None: weights only.

    Raises:
        CheckpointError: a parameter trains that is not among it.
    """
    topology, mapping = model.topology, model.saved
    splits = {entry.name: entry.split for entry in mapping}
    parts = {id(part.parameter): part for part in fragments(optimizer)} if optimizer is not None else {}
    parameters = global_parameters(model)
    lost = [name for name, parameter in parameters.items() if parameter.requires_grad and name not in splits]
    if lost:
        raise CheckpointError(f"parameters train that no checkpoint would hold: {', '.join(lost[:_MAX_LISTED])}")
    parameters = {name: parameter for name, parameter in parameters.items() if name in splits}
    total, before = sum(parameter.numel() for parameter in parameters.values()), 0
    dtype = model.options.torch_dtype
    pieces: list[Piece] = []
    tensors: dict[tuple[Kind, str], Tensor] = {}
    for name, parameter in parameters.items():
        cut = replica(parameter)
        number, count = cut or (topology.copy_number, topology.copies)
        my_turn = before * count // total == number
        before += parameter.numel()
        split, part = splits[name], parts.get(id(parameter))
        if split.dim is None and topology.tp_rank:
            continue
        if part is not None and not (part.sharded or my_turn):
            part = None
        rows, start = held(parameter)
        if cut and not (my_turn and rows.numel()):
            continue
        mine: dict[Kind, Tensor] = {"model": rows.view(-1).to(dtype) if cut else parameter} if my_turn else {}
        if part is not None:
            mine |= part.state()
        if not mine:
            continue
        tensors |= {(kind, name): tensor for kind, tensor in mine.items()}
        pieces.append(
            Piece(
                name=name,
                shape=_full_shape(parameter, split, topology.tp, mapping.vocab_size),
                local_shape=tuple(parameter.shape),
                split=split,
                start=part.start if part else start,
                step=part.step if part else None,
            )
        )
    return pieces, tensors


def fill(
    files: RankFiles,
    model: Model,
    optimizer: Any,
    *,
    with_state: bool,
    with_main: bool,
) -> dict[str, str]:
    """Fills parameters, tied copies, main parameters and, with ``with_state``, what AdamW knows of them.

    Args:
        with_main: main parameters are those stored, where any are; else, and off, they are the stored weights.

    Returns:
        Of each parameter of this rank, what became of its optimizer state: ``kept``; ``reset`` (it trains, nothing was
        taken over); ``dropped`` (stored, but it is frozen now); ``none``.

    Raises:
        CheckpointError: the files are of another model; names and shapes are listed.
    """
    _check_fit(files, model)
    splits, topology = {entry.name: entry.split for entry in model.saved}, model.topology
    parts = {id(part.parameter): part for part in fragments(optimizer)} if optimizer is not None else {}
    fate: dict[str, str] = {}
    fresh: list[Fragment] = []
    own = global_parameters(model)
    for name, parameter in model.named_parameters():
        source = weight_name(name, parameter)
        if source not in splits:  # of the base of adapters
            continue
        part = parts.get(id(parameter))
        step = files.steps.get(source) if with_state else None
        _fill(_Shards(files, source, splits[source], topology), parameter, part, step, with_main)
        if part is not None and step is None:
            fresh.append(part)
        if name not in own:
            continue
        if parameter.requires_grad and optimizer is not None:
            fate[name] = "reset" if step is None else "kept"
        else:
            fate[name] = "dropped" if source in files.steps else "none"
    warn_of_shared_steps(fresh)
    return fate


class _Shards:
    """This rank's shard of one tensor, by kind."""

    def __init__(self, files: RankFiles, name: str, split: Split, topology: Topology):
        self.files, self.name, self.split, self.topology = files, name, split, topology

    def has(self, kind: Kind) -> bool:
        return self.files.has(self.name, kind)

    def read(self, kind: Kind) -> Tensor:
        return self.files.read_shard(self.name, self.split, self.topology.tp, self.topology.tp_rank, kind)


def _fill(shards: _Shards, parameter: nn.Parameter, part: Fragment | None, step: float | None, with_main: bool) -> None:
    stored_main = with_main and part is not None and shards.has("param")
    # fp32 weights are their own main parameters, and take the finer numbers where both are stored.
    own_main = part is not None and not part.separate
    weight = shards.read("param" if stored_main and own_main else "model")
    put(parameter, weight)
    if part is None:
        return
    if part.separate or part.host:
        part.set_main(shards.read("param") if stored_main else weight)
    if step is not None:
        part.set_moments({"exp_avg": shards.read("exp_avg"), "exp_avg_sq": shards.read("exp_avg_sq")}, step)


def _check_fit(files: RankFiles, model: Model) -> None:
    mapping, topology = model.saved, model.topology
    splits = {entry.name: entry.split for entry in mapping}
    stored = set(files.names())
    problems = [f"{name}: in the checkpoint, not in the model" for name in sorted(stored - set(splits))]
    problems += [f"{name}: in the model, not in the checkpoint" for name in sorted(set(splits) - stored)]
    for name, parameter in global_parameters(model).items():
        if name in stored:
            wanted = _full_shape(parameter, splits[name], topology.tp, mapping.vocab_size)
            if files.info(name).shape != wanted:
                problems.append(
                    f"{name}: {list(files.info(name).shape)} in the checkpoint, {list(wanted)} in the model"
                )
    if problems:
        more = [f"and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
        listed = "\n    ".join(problems[:_MAX_LISTED] + more)
        raise CheckpointError(f"{files.directory} is of another model:\n    {listed}")


def _full_shape(parameter: Tensor, split: Split, tp: int, vocab_size: int) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if split.dim is not None:
        shape[split.dim] *= tp
    if split.pads:
        shape[0] = vocab_size
    return tuple(shape)
