"""What the checkpoint tests run on ranks: a tiny real model trained for a few steps between a load and a save."""

import functools
import itertools
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.data.row import row_from_samples
from megatron_vlm.testing.parity import random_samples
from megatron_vlm.weights.model_folder import CarriedFiles

STEPS = 3
VOCAB_MULTIPLE = 8
SAMPLES = [[([(16, 24)], 9)], [([(16, 16)], 7), ([], 6)], [([(24, 16), (16, 16)], 7)], [([], 5), ([(16, 16)], 6)]]


class Run:
    """One training run on this rank, from HF weights or from a checkpoint.

    Args:
        hf_dir: tiny twin.
        parallel: fields of ParallelConfig.
        options: fields of ModelOptions.
        checkpoint: fields of CheckpointConfig.
    """

    def __init__(self, hf_dir: str, parallel: dict, options: dict | None = None, checkpoint: dict | None = None):
        from megatron_vlm.conversion.load import load_into
        from megatron_vlm.conversion.open_source import open_source
        from megatron_vlm.models.built import build_model
        from megatron_vlm.models.options import ModelOptions
        from megatron_vlm.parallel.config import ParallelConfig
        from megatron_vlm.parallel.topology import build_topology
        from megatron_vlm.training.checkpoint.config import CheckpointConfig
        from megatron_vlm.training.checkpoint.load import find_checkpoint, load_checkpoint
        from megatron_vlm.training.optimizer.build import build_optimizer, wrap_model
        from megatron_vlm.training.optimizer.config import OptimizerConfig
        from megatron_vlm.training.optimizer.main_parameters import fill_main

        self.hf_dir, self.iteration, self.report = hf_dir, 0, None
        self.config = CheckpointConfig(**(checkpoint or {}))
        parallel_config = ParallelConfig(**parallel)
        source = open_source(hf_dir)
        self.model_config = source.config
        layers = source.config.text.num_layers
        device = torch.device("cpu")
        self.topology = build_topology(parallel_config, num_layers=layers, device=device)
        model_options = ModelOptions(
            sequence_parallel=parallel_config.sequence_parallel,
            make_vocab_size_divisible_by=VOCAB_MULTIPLE,
            **(options or {}),
        )
        model = build_model(source.spec, source.config, self.topology, model_options)
        self.found = find_checkpoint(self.config, device)
        if self.found is None:
            load_into(source, model)
        self.model = wrap_model(model, parallel_config)
        self.optimizer_config = OptimizerConfig(lr=1e-3)
        self.optimizer = build_optimizer(self.optimizer_config, self.model, parallel_config.host_share)
        if self.found is None:
            fill_main(source, self.model, self.optimizer, {})
        else:
            self.iteration = self.found.iteration
            self.report = load_checkpoint(self.config, self.found, self.model, self.optimizer)

    def train(self, steps: int = STEPS) -> list[tuple[float, float]]:
        """Trains; the rows depend on the iteration alone. Returns (loss, gradient norm) of each step."""
        from megatron_vlm.parallel.rng import seed_step
        from megatron_vlm.training.optimizer.build import set_learning_rates
        from megatron_vlm.training.step import train_step

        results = []
        for _ in range(steps):
            rows = [
                row_from_samples(random_samples(self.model_config, s, seed=10 * self.iteration + i), fill_to=32)
                for i, s in enumerate(SAMPLES)
            ]
            seed_step(self.topology, 0, self.iteration)
            set_learning_rates(self.optimizer, dict.fromkeys(("llm", "vision", "connector"), 1e-3), 0.01)
            mine = rows[self.topology.dp_rank :: self.topology.dp]
            result = train_step(self.model, self.optimizer, mine)
            self.iteration += 1
            results.append((result.loss, result.grad_norm))
        return results

    def save(self, **state: Any) -> str:
        from megatron_vlm.training.checkpoint.save import Origin, save_checkpoint

        loaded = self.found.folder if self.found else None
        origin = Origin(hf_files=CarriedFiles(Path(self.hf_dir)), loaded_from=loaded)
        state = {"iteration": self.iteration, **state}
        return str(save_checkpoint(self.config, self.model, self.optimizer, state, origin))

    def snapshot(self) -> dict[str, Any]:
        """This rank's share of everything that a checkpoint must hold, as plain tensors."""
        from megatron_vlm.models.built import global_parameters
        from megatron_vlm.testing.parity import gradient_buffers, whole
        from megatron_vlm.training.optimizer.state import fragments

        dtype = self.model.options.torch_dtype
        named = list(self.model.named_parameters())
        names = {id(parameter): name for name, parameter in named}
        tied = {id(parameter) for _, parameter in named if getattr(parameter, "tied_copy", False)}
        own = {id(parameter) for parameter in global_parameters(self.model).values()}
        weights = {n: whole(p, self.topology).to(dtype) for n, p in named if id(p) in own}
        return {
            "place": (self.topology.tp_rank, self.topology.pp_rank, self.topology.dp_rank),
            "tp": self.topology.tp,
            "weights": weights,
            "tied": {n: p.detach().clone() for n, p in named if id(p) in tied},
            "state": [
                (
                    names[id(f.parameter)],
                    id(f.parameter) in tied,
                    f.start,
                    f.end,
                    f.step,
                    {kind: t.clone() for kind, t in f.state().items()},
                )
                for f in fragments(self.optimizer)
            ],
            "padded_rows": max(
                (
                    float(p[max(0, self.model_config.text.vocab_size - self.topology.tp_rank * len(p)) :].abs().sum())
                    for n, p in weights.items()
                    if "word_embeddings" in n or "output_layer" in n
                ),
                default=0.0,
            ),
            "buckets": [
                (bucket.grad_data.numel(), bucket.numel_unpadded)
                for buffer in gradient_buffers(self.model)
                for bucket in buffer.buckets
            ],
        }


def leg(hf_dir: str, parallel: dict, options: dict, checkpoint: dict) -> dict[str, Any]:
    """One leg of a chain: load, take stock, train, save, take stock, train on without a stop."""
    run = Run(hf_dir, parallel, options, checkpoint)
    loaded = run.snapshot()
    resumed = run.train()
    folder = run.save(seed=7)
    saved = run.snapshot()
    return {
        "loaded": loaded,
        "saved": saved,
        "resumed": resumed,
        "uninterrupted": run.train(),
        "folder": folder,
        "found": run.found,
        "report": run.report,
    }


def merge(snapshots: list[dict[str, Any]], mapping: Any) -> dict[tuple[str, str], torch.Tensor]:
    """(kind, name) -> full tensor, put together from all ranks' shares; "step" is a tensor of one number."""
    splits = {entry.name: entry.split for entry in mapping}
    shards: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    full: dict[tuple[str, str], torch.Tensor] = {}
    for snapshot in snapshots:
        tp_rank = snapshot["place"][0]
        for name, weight in snapshot["weights"].items():
            known = shards.setdefault(("model", name), {}).setdefault(tp_rank, weight)
            assert torch.equal(known, weight), f"{name} differs between data parallel ranks"
    for snapshot in snapshots:
        tp_rank = snapshot["place"][0]
        for name, tied, start, end, step, state in snapshot["state"]:
            if tied:
                continue
            for kind, tensor in state.items():
                empty = torch.full_like(shards["model", name][tp_rank], float("nan"), dtype=torch.float32)
                shard = shards.setdefault((kind, name), {}).setdefault(tp_rank, empty)
                shard.view(-1)[start:end] = tensor
            if step is not None:
                known = full.setdefault(("step", name), torch.tensor(step))
                assert known == step, f"steps of {name} differ between ranks"
    for (kind, name), by_rank in shards.items():
        split = splits[name]
        parts = [by_rank[rank] for rank in sorted(by_rank)]
        full[kind, name] = split.merge(
            parts[:1] if split.dim is None else parts, mapping.vocab_size if split.pads else None
        )
    for snapshot in snapshots:
        for weight in snapshot["tied"].values():
            name, tp_rank = "language_model.embedding.word_embeddings.weight", snapshot["place"][0]
            assert torch.equal(weight, shards["model", name][tp_rank]), "the tied copy differs from the embedding"
    return full


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def looked_for(checkpoints: list[dict]) -> list[tuple[str, bool] | str]:
    """(folder name, weights only) that each config finds, "none", or its error."""
    from megatron_vlm.errors import CheckpointError
    from megatron_vlm.training.checkpoint.config import CheckpointConfig
    from megatron_vlm.training.checkpoint.load import find_checkpoint

    answers: list[tuple[str, bool] | str] = []
    for fields in checkpoints:
        try:
            found = find_checkpoint(CheckpointConfig(**fields), torch.device("cpu"))
            answers.append((found.folder.name, found.weights_only) if found else "none")
        except CheckpointError as error:
            answers.append(str(error))
    return answers


def two_saves(hf_dir: str, save: str, parallel: dict, options: dict) -> None:
    """Leaves iterations 1 and 2."""
    run = Run(hf_dir, parallel, options, {"save": save})
    for _ in range(2):
        run.train(1)
        run.save()


def train_without_room(argv: list[str], free: int) -> tuple[int, str]:
    """``train`` on a disk that has ``free`` bytes left, as it tells."""
    from megatron_vlm.testing.runs import train

    real = shutil.disk_usage
    shutil.disk_usage = lambda path: real(path)._replace(free=free)  # type: ignore[assignment]
    try:
        return train(argv)
    finally:
        shutil.disk_usage = real


def full_disk(hf_dir: str, save: str, parallel: dict) -> tuple[str, list[str], list[str], float]:
    """Saves twice; at the second try rank 1 cannot write large files. Returns the error and what is left after each try."""
    from megatron_vlm.errors import CheckpointError

    run = Run(hf_dir, parallel, {}, {"save": save})
    run.train(1)
    run.save()
    run.train(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = ""
    if run.topology.rank == 1:
        size = (Path(save) / "iter_0000001" / "rank1.safetensors").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        run.save()
    except CheckpointError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    left = sorted(os.listdir(save))
    dist.barrier()
    loss = run.train(1)[0][0]
    run.save()
    dist.barrier()
    return message, left, sorted(os.listdir(save)), loss


def killed_save(hf_dir: str, save: str, killed_at: int, rank: int, store: str, world: int = 1) -> None:
    """A process of its own: loads the newest checkpoint, trains one step, and dies by SIGKILL at a call of its save.

    Args:
        hf_dir: tiny twin.
        save: folder with a checkpoint.
        killed_at: number of the call that changes or flushes a file; beyond the last, the process ends well.
        rank, world: of this process; only the last rank is killed.
        store: file for the process group to meet.
    """
    from megatron_vlm.parallel import cpu

    torch.set_num_threads(1)
    cpu.install()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    run = Run(hf_dir, {}, {}, {"save": save, "load": save, "keep_last": 2})
    run.train(1)
    if world == 1:  # fewer places to die at
        few = Path(f"{store}.hf")
        few.mkdir()
        shutil.copy(Path(hf_dir, "config.json"), few)
        run.hf_dir = str(few)
    count = itertools.count()

    def counted(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(count) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    if rank == world - 1:
        for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
    run.save()


def save_of(hf_dir: str, parallel: dict, options: dict, checkpoint: dict, steps: int = STEPS) -> dict[str, Any]:
    """Trains, saves and takes stock."""
    run = Run(hf_dir, parallel, options, checkpoint)
    if steps:
        run.train(steps)
    for scaler in _scalers(run.optimizer):
        scaler.update(True), scaler.update(True), scaler.update(False)
    run.save()
    return {**run.snapshot(), "loss_scale": float(run.optimizer.get_loss_scale())}


def load_of(hf_dir: str, parallel: dict, options: dict, checkpoint: dict, steps: int = 0) -> dict[str, Any]:
    """Loads, takes stock, and takes stock again after some steps."""
    run = Run(hf_dir, parallel, options, checkpoint)
    loaded = run.snapshot()
    if steps:
        run.train(steps)
    return {
        **loaded,
        "report": run.report,
        "iteration": run.iteration,
        "weights_only": run.found.weights_only,
        "loss_scale": float(run.optimizer.get_loss_scale()),
        "scalers": [scaler.state_dict() for scaler in _scalers(run.optimizer)],
        "after": run.snapshot(),
    }


def load_error(hf_dir: str, parallel: dict, checkpoint: dict) -> str:
    from megatron_vlm.errors import CheckpointError

    try:
        Run(hf_dir, parallel, {}, checkpoint)
    except CheckpointError as error:
        return str(error)
    return ""


def _scalers(optimizer: Any) -> list[Any]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [scaler for part in parts if (scaler := getattr(part, "grad_scaler", None)) is not None]
