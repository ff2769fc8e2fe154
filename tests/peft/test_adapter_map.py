"""Where the rows of a pair lie over tensor parallel ranks."""

import pytest
import torch

from megatron_vlm.peft.adapter_map import adapter_mapping, local_rows
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.select import make_plan


def plan_of(source, **settings):
    return make_plan(source.spec, source.config, PeftConfig(**settings), source.infos)


@pytest.mark.parametrize(("name", "tp"), [("idefics2", 2), ("one_kv_head", 4), ("chat", 2), ("xcomposer2", 2)])
def test_pairs_lie_as_their_weights(twin, name, tp):
    """For every rank: (rows of its B) x A lies in its output where that HF linear's weight does, and nowhere else."""
    _, source = twin(name)
    base = source.spec.mapping(source.config, tp=tp)
    plan = plan_of(source, target_modules="all-linear")
    entries = adapter_mapping(base, plan, tp).by_name()
    generator = torch.Generator().manual_seed(0)
    replicated = 0
    for target in plan.targets:
        a_hf = torch.randn(target.r, target.inputs, generator=generator)
        b_hf = torch.randn(target.shape[0], target.r, generator=generator)
        a, b = (entries[f"{target.name}.{part}"] for part in "ab")
        assert torch.equal(b.from_full(b.to_full([b_hf]))[0], b_hf)
        weight = base.by_name()[target.entry.name]
        parts = [torch.zeros(rows, target.inputs) for rows in target.part_rows]
        parts[target.index] = b_hf @ a_hf
        fused = target.entry.to_full(parts)
        for rank in range(tp):
            rows = local_rows(target, weight.split, tp, rank)
            whole = b.split.dim is None
            b_local = b.split.shard(b.to_full([b_hf]), tp, rank)
            b_local = b_local[rows.source] if whole else b_local
            a_local = a.split.shard(a_hf, tp, rank)
            expected = weight.split.shard(fused, tp, rank)
            delta = torch.zeros_like(expected)
            delta[rows.place] = b_local @ a_local
            torch.testing.assert_close(delta, expected)
        replicated += weight.split.dim == 0 and b.split.dim is None
    # More ranks than kv heads: their shares of q, k and v differ.
    assert replicated == (3 * source.config.text.num_layers if name == "one_kv_head" else 0)
