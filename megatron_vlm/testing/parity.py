"""Parity by proof: the same samples through HF (one at a time, eager, fp32) and through our model in any layout.

samples --hf_reference--> loss, logits, gradients by HF name
samples --rows--> run_distributed(layout_run, ...) --merge_gradients--> the same, by HF name
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_vlm.conversion.load import load_model
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.row import EncodedSample, Row
from megatron_vlm.models.built import Model
from megatron_vlm.models.families.idefics2.reference import hf_inputs as hf_inputs
from megatron_vlm.models.generation import SamplingConfig, generate
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.rng import seed_step
from megatron_vlm.parallel.shards import held
from megatron_vlm.parallel.topology import Topology, build_topology
from megatron_vlm.peft.adapter_map import PeftPlan, adapter_mapping
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.lora import apply_lora, fill
from megatron_vlm.peft.qlora import quantization_of
from megatron_vlm.peft.select import make_plan
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.testing.twins.common import noise_samples
from megatron_vlm.training.optimizer.build import build_optimizer, set_learning_rates, wrap_model
from megatron_vlm.training.optimizer.config import OptimizerConfig
from megatron_vlm.training.optimizer.sharded import FullySharded
from megatron_vlm.training.step import reduce_over_job, run_schedule, train_step
from megatron_vlm.weights.mapping import GROUPS, Mapping


def random_samples(
    model_config: Any, specs: Sequence[tuple[Sequence[tuple[int, int]], int]], seed: int = 0, prompt: int = 0
) -> list[EncodedSample]:
    """Makes samples of random tokens and noise images for an Idefics2-shaped config.

    Args:
        model_config: gives the vocabulary, the image token and the tokens of an image.
        specs: one ((height, width) of each image, number of text tokens after the images) per sample.
        seed: of the numbers drawn.
        prompt: leading text tokens of each sample that carry no label.
    """
    latents = model_config.perceiver.num_latents
    made = [([(latents, (3, *size)) for size in sizes], num_text) for sizes, num_text in specs]
    return noise_samples(made, model_config.image_token_id, seed=seed, prompt=prompt)


def hf_reference(
    model: Any,
    samples: Sequence[EncodedSample],
    gradients: bool = True,
    inputs: Callable[[EncodedSample, torch.dtype], dict[str, Tensor]] = hf_inputs,
) -> tuple[float, Tensor, dict]:
    """Runs HF one sample at a time; ``inputs(sample, dtype)`` gives the model's arguments (Idefics2's unless told).

    Returns:
        (sum of token losses / supervised tokens, logits [sum of lengths, V], gradients of that loss by name).
    """
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    logits, total, count = [], torch.zeros((), dtype=dtype), 0
    with torch.set_grad_enabled(gradients):
        for sample in samples:
            output = model(**inputs(sample, dtype)).logits[0]
            total = total + F.cross_entropy(output[:-1], sample.labels[1:], reduction="sum")
            count += int((sample.labels[1:] != -100).sum())
            logits.append(output.detach())
        loss = total / count
        if gradients:
            loss.backward()
    # What no sample reached (the tower in a text-only batch) has a gradient of zero, not none.
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if gradients
    }
    return float(loss), torch.cat(logits), grads


def build_for_test(
    hf_dir: str, parallel: dict, options: dict, peft: dict | None = None
) -> tuple[Topology, WeightSource, Model, ParallelConfig]:
    """On a rank: the layout, the weights of ``hf_dir``, and a model that holds them.

    ``peft``: of the section of that name of a run, and ``tensors`` of adapters by the names in PEFT's files.
    """
    config = ParallelConfig(**parallel)
    source = open_source(hf_dir)
    topology = build_topology(config, num_layers=source.config.text.num_layers, device=torch.device("cpu"))
    seed_step(topology, seed=0, iteration=0)
    model_options = ModelOptions(
        sequence_parallel=config.sequence_parallel,
        recompute_granularity=config.recompute_granularity,
        recompute_num_layers=config.recompute_num_layers,
        recompute_modules=config.recompute_modules,
        offload_activations=config.offload_activations,
        **{"make_vocab_size_divisible_by": 8, **options},
    )
    model = load_model(source, topology, model_options, *_quantised(source, model_options, peft))
    return topology, source, model if peft is None else adapt(source, model, **peft), config


def _quantised(source: WeightSource, options: ModelOptions, peft: dict[str, Any] | None) -> tuple[Any, ...]:
    """The arguments of ``load_model`` that say what is kept in 4 bits."""
    settings = {key: value for key, value in (peft or {}).items() if key != "tensors"}
    quantization = quantization_of(PeftConfig(**settings), options.params_dtype)
    return (quantization, adapted_plan(source, settings).saved) if quantization else ()


def adapt(source: WeightSource, model: Model, tensors: dict[str, Tensor], **settings: Any) -> Model:
    """On a rank: adds pairs to a model, filled from ``tensors`` by PEFT's names."""
    model = apply_lora(model, adapted_plan(source, settings), seed=0)
    entries = [entry for entry in model.mapping if entry.hf[0] in tensors]
    fill(model, {entry.name: entry.to_full([tensors[hf] for hf in entry.hf]) for entry in entries})
    return model


def adapted_plan(source: WeightSource, settings: dict[str, Any]) -> PeftPlan:
    """The plan of a section ``peft``."""
    return make_plan(source.spec, source.config, PeftConfig(**settings), source.infos)


def adapted_mapping(source: WeightSource, settings: dict[str, Any], tp: int, whole: Sequence[str] = ()) -> Mapping:
    """The weight map with pairs, vocabularies padded to 8, parts ``whole`` on every rank."""
    base = source.spec.mapping(source.config, tp=tp).padded(8).whole(*whole)
    return adapter_mapping(base, adapted_plan(source, settings), tp)


def layout_logits(hf_dir: str, rows: Sequence[Row], parallel: dict, options: dict, peft: dict | None = None) -> dict:
    """On a rank of a layout without pipeline: logits of each row [T, V], loss sum and supervised tokens."""
    topology, _, (model,), _ = build_for_test(hf_dir, parallel, options, peft)
    model.eval()
    with torch.no_grad():
        logits = [model.logits(row) for row in rows]
        loss = sum(float(model(row)) for row in rows)
    return {"logits": logits, "loss": loss / sum(row.num_supervised for row in rows), "tp_rank": topology.tp_rank}


def layout_answers(
    hf_dir: str,
    prompts: Sequence[EncodedSample],
    layouts: Sequence[dict],
    sampling: dict,
    stop_ids: Sequence[int],
) -> list[list[Any]]:
    """On a rank: the answers (models.generation.Answer) to ``prompts`` in each layout of its size, batch by batch."""
    found: list[list[Any]] = []
    for parallel in layouts:
        _, _, model, _ = build_for_test(hf_dir, parallel, {})
        config = SamplingConfig(**sampling)
        found.append([])
        for first in range(0, len(prompts), config.batch_size):
            batch = prompts[first : first + config.batch_size]
            found[-1] += generate(model, batch, config, stop_ids=stop_ids, first_number=first)
    return found


def layout_run(
    hf_dir: str,
    rows: Sequence[Row],
    parallel: dict,
    options: dict,
    steps: int = 0,
    lr: float = 1e-3,
    peft: dict | None = None,
) -> dict:
    """On a rank: gradients of one global batch of ``rows`` (dealt round robin over data parallel ranks), then training on it.

    Returns:
        what ``batch_gradients`` returns, before any update; loss and gradient norm of each of ``steps`` AdamW updates; and the
        dtype of the gradient buffers.
    """
    optimizer_config = OptimizerConfig(lr=lr, fused=False)  # which leaves 1 / tokens to its update
    model, optimizer = wrapped_for_test(hf_dir, parallel, options, peft, optimizer_config)
    gradients = batch_gradients(model, rows)
    mine = rows[model.topology.dp_rank :: model.topology.dp]
    history = []
    for _ in range(steps):
        set_learning_rates(optimizer, dict.fromkeys(GROUPS, lr), optimizer_config.weight_decay)
        result = train_step(model, optimizer, mine)
        history.append((result.loss, result.grad_norm))
    dtypes = {buffer.grad_data.dtype for buffer in gradient_buffers(model)}
    return {**gradients, "history": history, "buffer_dtypes": dtypes}


def layout_gradients(
    hf_dir: str, batches: Sequence[Sequence[Row]], parallel: dict, options: dict, peft: dict | None = None
) -> list[dict]:
    """On a rank: what ``batch_gradients`` returns of one global batch after the other, without updates between them.

    In fp16 the gradients are 256 times as large.
    """
    model, _ = wrapped_for_test(hf_dir, parallel, options, peft, OptimizerConfig(loss_scale=256.0, fused=False))
    return [batch_gradients(model, rows) for rows in batches]


def wrapped_for_test(
    hf_dir: str, parallel: dict, options: dict, peft: dict | None, optimizer_config: OptimizerConfig
) -> tuple[Model, Any]:
    """On a rank: the model of ``build_for_test`` wrapped and in training mode, and its optimizer."""
    _, _, model, config = build_for_test(hf_dir, parallel, options, peft)
    model = wrap_model(model, config)
    optimizer = build_optimizer(optimizer_config, model, config.host_share)
    for stage in model:
        stage.train()
    return model, optimizer


def batch_gradients(model: Model, rows: Sequence[Row]) -> dict:
    """On a rank: its coordinates, and of one global batch the loss, reduced fp32 gradients by global name, number of buckets.

    ``rows`` are dealt round robin over data parallel ranks.
    """
    topology = model.topology
    mine = rows[topology.dp_rank :: topology.dp]
    for stage in model:
        stage.zero_grad_buffer()
    totals = reduce_over_job(run_schedule(model, mine, forward_only=False), mine, topology, model.config)
    if model.stages[0].ddp_config.use_distributed_optimizer:
        _gather_gradient_shards(model)
    sharded = isinstance(model.stages[0], FullySharded)
    return {
        "tp_rank": topology.tp_rank,
        "copy": topology.copy_number,
        "loss": totals["loss_sum"] / totals["supervised_tokens"],
        "buckets": sum(len(buffer.buckets) for buffer in gradient_buffers(model)),
        "grads": {
            name: whole(getattr(parameter, "grad" if sharded else "main_grad"), topology).float()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not getattr(parameter, "tied_copy", False)
        },
    }


def gradient_buffers(model: Model) -> list[Any]:
    """megatron-core's, which a model in shards has none of."""
    return [buffer for stage in model if not isinstance(stage, FullySharded) for buffer in stage.buffers]


def whole(tensor: Tensor, topology: Topology) -> Tensor:
    """All of a tensor that copies of the weights share among them. DTensor's own collectives keep groups of earlier layouts."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    rows: list[Any] = [None] * topology.copies
    dist.all_gather_object(rows, held(tensor), group=topology.copies_group)
    by_start = {start: part for part, start in rows if part.numel()}
    return torch.cat([by_start[start] for start in sorted(by_start)])


def _gather_gradient_shards(model: Model) -> None:
    """The distributed optimizer leaves each copy of the weights its shard of every bucket: put them together."""
    topology = model.topology
    for stage in model:
        for buffer in stage.buffers:
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.view(topology.copies, -1))
                dist.all_gather(shards, shards[topology.copy_number].clone(), group=topology.copies_group)


def merge_gradients(results: Sequence[dict], mapping: Mapping, vocab_size: int) -> tuple[float, dict[str, Tensor]]:
    """Puts the ranks' results together: (loss, gradients by HF name); replicas must agree to 1e-5."""
    loss = results[0]["loss"]
    first = [r for r in results if r["copy"] == 0]
    hf_grads: dict[str, Tensor] = {}
    for name, entry in mapping.by_name().items():
        shards = [r["grads"][name] for r in sorted(first, key=lambda r: r["tp_rank"]) if name in r["grads"]]
        if not shards:
            continue
        if entry.split.dim is None:
            # The order of sums differs between ranks; more than rounding would be a missing reduction.
            spread = max(float((shard - shards[0]).norm()) for shard in shards)
            if spread > 1e-5 * float(shards[0].norm()) + 1e-7:
                raise AssertionError(f"gradient of {name} differs between tensor parallel ranks by {spread}")
            shards = shards[:1]
        full = entry.split.merge(shards, vocab_size)
        hf_grads |= dict(zip(entry.hf, entry.from_full(full)))
    return loss, hf_grads


def gradient_errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """By name: norm of the difference / max(norm, 1e-6 of the global norm). Names must be the same."""
    if set(ours) != set(theirs):
        raise AssertionError(f"gradients of other parameters: {sorted(set(ours) ^ set(theirs))}")
    floor = 1e-6 * float(torch.stack([g.double().norm() for g in theirs.values()]).norm())
    return {
        name: float((ours[name].double() - g.double()).norm()) / max(float(g.double().norm()), floor)
        for name, g in theirs.items()
    }
