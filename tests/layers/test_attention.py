"""Attention over packed rows against explicit softmax of each segment."""

import itertools
import math

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.layers import attention as module
from megatron_vlm.layers.attention import attention

WORST = 2e-6  # absolute, inputs N(0, 1); measured 6e-7


def explicit(q, k, v, cu_q, cu_k, causal, window):
    """Softmax written out, segment by segment and head by head, in fp64."""
    output = torch.empty_like(q, dtype=torch.float64)
    repeat = q.shape[1] // k.shape[1]
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k)):
        for head in range(q.shape[1]):
            scores = q[q0:q1, head].double() @ k[k0:k1, head // repeat].double().T / math.sqrt(q.shape[2])
            for i in range(q1 - q0):
                position = i + (k1 - k0) - (q1 - q0)
                for j in range(k1 - k0):
                    if (causal and j > position) or (window is not None and j <= position - window):
                        scores[i, j] = -torch.inf
            output[q0:q1, head] = scores.softmax(-1) @ v[k0:k1, head // repeat].double()
    return output


def draw(cu_q, cu_k, heads, groups, dim, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (cu_q[-1], heads, dim), (cu_k[-1], groups, dim), (cu_k[-1], groups, dim)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


CASES = [
    ([0, 7, 20, 24], [0, 7, 20, 24], True, None),
    ([0, 7, 20, 24], [0, 7, 20, 24], True, 5),
    ([0, 7, 20, 24], [0, 7, 20, 24], False, None),
    ([0, 6, 12, 18, 19], [0, 6, 12, 18, 19], True, 6),
    ([0, 5, 10, 15], [0, 9, 30, 36], False, None),
    ([0, 3, 6], [0, 9, 20], True, 4),
    ([0, 3, 6, 13], [0, 9, 20, 27], False, 4),
]


def run(case, heads, groups, device="cpu", dtype=torch.float32):
    cu_q, cu_k, causal, window = case
    q, k, v = draw(cu_q, cu_k, heads, groups, 16, device, dtype)
    longest = [max(b - a for a, b in itertools.pairwise(c)) for c in (cu_q, cu_k)]
    tensors = [torch.tensor(c, dtype=torch.int32, device=device) for c in (cu_q, cu_k)]
    out = attention(q, k, v, *tensors, *longest, causal, window)
    exact_inputs = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    exact = explicit(*exact_inputs, cu_q, cu_k, causal, window)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(exact.shape, generator=generator)
    (out * weight.to(device, dtype)).sum().backward()
    (exact * weight).sum().backward()
    grads = [(a.grad.double().cpu() - b.grad).abs().max().item() for a, b in zip((q, k, v), exact_inputs)]
    return (out.double().cpu() - exact).abs().max().item(), max(grads)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 1)])
def test_segments_equal_explicit_softmax(case, heads, groups):
    forward, backward = run(case, heads, groups)
    assert forward <= WORST
    assert backward <= 4 * WORST


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["torch_varlen", "segments"])
def test_gpu_backends_equal_explicit_softmax_in_bf16(case, backend, monkeypatch):
    monkeypatch.setenv("MEGATRON_VLM_ATTENTION", backend)
    module.select_backend.cache_clear()
    forward, backward = run(case, 4, 2, "cuda", torch.bfloat16)
    module.select_backend.cache_clear()
    assert forward <= 3e-2
    assert backward <= 6e-2


def test_no_attention_across_segments():
    q, k, v = draw([0, 6, 10], [0, 6, 10], 2, 2, 8)
    cu = torch.tensor([0, 6, 10], dtype=torch.int32)
    attention(q, k, v, cu, cu, 6, 6, True)[6:].sum().backward()
    assert k.grad[:6].abs().max() == 0
    assert v.grad[6:].abs().max() > 0


def test_an_impossible_backend_is_named(monkeypatch):
    module.select_backend.cache_clear()
    monkeypatch.setenv("MEGATRON_VLM_ATTENTION", "torch_varln")
    with pytest.raises(ConfigError, match="torch_varlen"):
        module.select_backend("cpu", torch.float32)
    monkeypatch.setenv("MEGATRON_VLM_ATTENTION", "torch_varlen")
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        module.select_backend("cpu", torch.float32)
    module.select_backend.cache_clear()
