"""Fifty optimizer steps against a loop written by hand with transformers and torch.optim.AdamW, on the same batches."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.stream.loader import RowLoader
from megatron_vlm.models.families.idefics2.processor import Idefics2Processor
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import hf_inputs
from megatron_vlm.testing.runs import metrics_of, samples_of, train

STEPS, WARMUP, LR, VISION_LR, MIN_LR, DECAY, CLIP = 50, 5, 1e-3, 5e-4, 1e-4, 0.1, 1.0

LOSS_BAR = 2e-4
"""Largest difference of a loss allowed at any step. Measured worst case: 6e-7."""


def lr_of(step: int, top: float) -> float:
    """Megatron's linear warm-up from 0 and cosine decay, written anew."""
    if step <= WARMUP:
        lr = LR * step / WARMUP
    else:
        lr = MIN_LR + (LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
    return lr * top / LR


def hf_losses(twin: Path, data: Path) -> list[float]:
    """The hand-written loop."""
    from transformers import Idefics2ForConditionalGeneration

    config = DataConfig(train=(str(data),), seq_length=96, shortest_edge=24, num_workers=0)
    processor = Idefics2Processor.from_pretrained(twin, config)
    batches = RowLoader(
        config, processor, paths=config.train, seed=1234, global_batch_size=4, micro_batch_size=2, dp_rank=0, dp_size=1
    )
    model = Idefics2ForConditionalGeneration.from_pretrained(twin, attn_implementation="eager").train()
    groups = []
    for vision, top in ((True, VISION_LR), (False, LR)):
        named = [(n, p) for n, p in model.named_parameters() if ("vision_model" in n) == vision]
        for decay in (True, False):
            parameters = [p for n, p in named if (p.dim() > 1 and not n.endswith(".bias")) == decay]
            groups.append({"params": parameters, "weight_decay": DECAY if decay else 0.0, "top": top})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(STEPS):
        samples = [s for row in batches.next_step().rows for s in samples_of(row, processor.image_seq_len)]
        tokens = sum(int((sample.labels[1:] != -100).sum()) for sample in samples)
        optimizer.zero_grad()
        total = 0.0
        for sample in samples:
            logits = model(**hf_inputs(sample)).logits[0, :-1].float()
            loss = F.cross_entropy(logits, sample.labels[1:], ignore_index=-100, reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = lr_of(step, group["top"])
        optimizer.step()
        losses.append(total)
    batches.close()
    return losses


@pytest.mark.slow
def test_fifty_steps_equal_a_hand_written_loop(command, tmp_path, twin, train_data):
    argv = command(
        "ours",
        f"--train-iters {STEPS} --lr {LR} --vision-lr {VISION_LR} --min-lr {MIN_LR} --lr-warmup-iters {WARMUP}",
        f"--weight-decay {DECAY} --adam-beta2 0.95 --clip-grad {CLIP}",
    )
    assert run_distributed(train, argv) == [(0, "")]
    ours = [line["loss"] for line in metrics_of(tmp_path / "ours")]
    theirs = hf_losses(twin, train_data)
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    print(f"loss {theirs[0]:.4f} -> {theirs[-1]:.4f}; largest difference {max(differences):.2e}")
    assert theirs[-1] < theirs[0] - 1.0  # it learns, so the updates matter
    assert max(differences) < LOSS_BAR, differences
