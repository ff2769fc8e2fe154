"""Handmade checkpoints of runs with adapters, and what an adapter's files say of the weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.models.assembling import generator
from megatron_vlm.peft.adapter_io import CONFIG, WEIGHTS
from megatron_vlm.peft.adapter_map import trained_mapping
from megatron_vlm.peft.base_identity import describe_base
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.select import make_plan
from megatron_vlm.weights.checkpoint_write import begin, commit
from megatron_vlm.weights.rank_files import Piece, RankFile

PREFIX = "base_model.model."


def checkpoint(folder: Path, base: Path, tp: int = 1, pp: int = 1, **settings: Any) -> Path:
    """A checkpoint of a run with these settings, as tp x pp ranks write it; every tensor is drawn by its name."""
    config = PeftConfig(**settings)
    with open_source(base) as source:
        plan = make_plan(source.spec, source.config, config, source.infos)
        mapping = source.spec.mapping(source.config, tp=tp).padded(8)
        whole, infos, vocab = trained_mapping(mapping, plan, tp), source.infos, mapping.vocab_size
        record = {"config": config.to_dict(), "base": describe_base(source, str(base))}
    shapes = {
        f"{t.name}.{half}": s for t in plan.targets for half, s in (("a", (t.r, t.inputs)), ("b", (t.shape[0], t.r)))
    }
    shapes |= {f"{t.name}.b": (vocab, t.r) for t in plan.targets if t.name.startswith("language_model.output_layer")}
    writing = begin(folder, 1, 0)
    for rank in range(tp * pp):
        pieces, tensors = [], {}
        for number, entry in enumerate(whole):
            if number % pp != rank // tp or (entry.split.dim is None and rank % tp):
                continue
            shape = shapes.get(entry.name) or infos[entry.name].shape
            full = 0.1 * torch.randn(shape, generator=generator(0, entry.name))
            if entry.hf and entry.name not in shapes:
                full = full + 0.5
            shard = entry.split.shard(full, tp, rank % tp).contiguous()
            pieces.append(Piece(name=entry.name, shape=shape, local_shape=tuple(shard.shape), split=entry.split))
            tensors["model", entry.name] = shard
        place = dict(rank=rank, world_size=tp * pp, tp=tp, tp_rank=rank % tp)
        RankFile(place=place, pieces=pieces, tensors=tensors).write(writing)  # type: ignore[arg-type]
    (writing / "state.json").write_text(json.dumps({"iteration": 1, "peft": record}))
    commit(writing, {}, {"iteration": 1})
    return folder


def adapter_of(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = load_file(folder / WEIGHTS)
    return json.loads((folder / CONFIG).read_text()), {name.removeprefix(PREFIX): t for name, t in tensors.items()}


def merged(base: dict[str, Tensor], config: dict[str, Any], adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base's tensors with an adapter of one rank and scale merged in."""
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    scale = config["lora_alpha"] / config["r"]
    result = dict(base)
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            result[f"{module}.weight"] = base[f"{module}.weight"] + scale * adapter[f"{module}.lora_B.weight"] @ a
        elif ".lora_" not in name:
            result[name] = a
    return result


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder
