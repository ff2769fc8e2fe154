"""Attention over packed rows against explicit softmax of each segment."""

import importlib
import itertools
import math
import sys

import pytest
import torch
from torch.nn import attention as switches

from megatron_vlm.errors import ConfigError
from megatron_vlm.layers import attention as module
from megatron_vlm.layers import core_attention, perceiver
from megatron_vlm.layers.attention import attention
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import build_for_test
from megatron_vlm.testing.twins.small_families import NAMES, write_small_twin

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


def run(case, heads, groups, device="cpu", dtype=torch.float32, head_multiple=1):
    cu_q, cu_k, causal, window = case
    q, k, v = draw(cu_q, cu_k, heads, groups, 16, device, dtype)
    longest = [max(b - a for a, b in itertools.pairwise(c)) for c in (cu_q, cu_k)]
    tensors = [torch.tensor(c, dtype=torch.int32, device=device) for c in (cu_q, cu_k)]
    out = attention(q, k, v, *tensors, *longest, causal, window, head_multiple)
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


@pytest.mark.parametrize("case", CASES)
def test_heads_filled_with_zeros_give_the_same(case):
    """16 numbers of a head in 24: with the scale of 24, everything would be wrong."""
    forward, backward = run(case, 4, 2, head_multiple=24)
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


def forget():
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        del sys.modules[name]
    torch.nn.attention._fa4._fa4_import_module.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def fresh(monkeypatch):
    """The choice of a process that has made none, and torch's switch as it was."""
    monkeypatch.delenv("MEGATRON_VLM_ATTENTION", raising=False)
    monkeypatch.setattr(module, "_chosen", "auto")
    module.select_backend.cache_clear()
    yield
    module.select_backend.cache_clear()
    forget()
    if switches.current_flash_attention_impl():
        switches.restore_flash_attention_impl()


@pytest.mark.usefixtures("fresh")
def test_an_impossible_backend_is_named(monkeypatch):
    monkeypatch.setenv("MEGATRON_VLM_ATTENTION", "torch_varln")
    with pytest.raises(ConfigError, match="torch_varlen"):
        module.select_backend("cpu", torch.float32)
    monkeypatch.setenv("MEGATRON_VLM_ATTENTION", "torch_varlen")
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        module.select_backend("cpu", torch.float32)
    with pytest.raises(ConfigError, match=r"MEGATRON_VLM_ATTENTION=torch_varlen, but model.attention=segments"):
        module.choose("segments", "cpu", torch.float32)


PACKAGES = {  # files of packages with what torch's switch and select_backend look for
    "flash_attn/cute/interface.py": "def _flash_attn_fwd(*a): ...\ndef _flash_attn_bwd(*a): ...\n",
    "flash_attn_interface.py": """import torch
for name in ("fwd", "bwd"):
    if not hasattr(torch.ops.flash_attn_3, name):
        torch.library.define(f"flash_attn_3::{name}", "(Tensor q) -> Tensor")
""",
    "flash_attn/flash_attn_interface.py": "",
}


@pytest.mark.usefixtures("fresh")
def test_auto_takes_the_newest_that_is_installed_and_knows_the_gpu(tmp_path, monkeypatch):
    """Up to a kernel's launch everything is real but the packages' contents and the GPU's number. FlashAttention 4, which knows
    heads of some sizes alone, runs where it is asked for."""
    half = ("cuda", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name, wanted in (
        ("flash_attn_4", "flash-attn-4"),
        ("flash_attn_3", "flash-attn-3"),
        ("flash_attn", "flash-attn"),
    ):
        with pytest.raises(
            ConfigError, match=f"model.attention={name} needs the package {wanted}, which is not installed"
        ):
            module.choose(name, *half)
    assert module.choose("auto", *half) == "torch_varlen"
    monkeypatch.syspath_prepend(tmp_path)
    for file, text in PACKAGES.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    taken = {}
    for capability in ((8, 0), (9, 0), (10, 3), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        taken[capability] = module.choose("auto", *half), switches.current_flash_attention_impl()
    two = ("flash_attn", None)
    assert taken == {(8, 0): two, (9, 0): ("flash_attn_3", "FA3"), (10, 3): two, (12, 0): two}
    with pytest.raises(ConfigError, match=r"needs a GPU of compute capability 9.x, this one has 12.0"):
        module.choose("flash_attn_3", *half)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert module.choose("flash_attn_4", *half) == "flash_attn_4" and switches.current_flash_attention_impl() == "FA4"
    # Back to torch's own kernel, in a process that was switched before; FlashAttention 4 alone is no FlashAttention 2.
    assert module.choose("torch_varlen", *half) == "torch_varlen" and switches.current_flash_attention_impl() is None
    (tmp_path / "flash_attn/flash_attn_interface.py").unlink()
    (tmp_path / "flash_attn/cute/interface.py").write_text("")
    (tmp_path / "flash_attn_interface.py").unlink()
    forget()
    assert module.choose("auto", *half) == "torch_varlen"  # of a package that torch cannot use
    with pytest.raises(ConfigError, match=r"is installed, but torch cannot use it: .* does not expose FA4"):
        module.choose("flash_attn_4", *half)
    for error in ("AttributeError", "RuntimeError", "ImportError"):  # importing the package above the kernel's module
        (tmp_path / "flash_attn/__init__.py").write_text(f"raise {error}('made for torch 1')")
        forget()
        assert module.choose("auto", *half) == "torch_varlen"
        with pytest.raises(ConfigError, match=r"flash_attn is installed, but torch cannot use it: made for torch 1"):
            module.choose("flash_attn", *half)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))  # a package is asked after the GPU
    with pytest.raises(
        ConfigError, match=r"flash_attn_4 needs a GPU of compute capability 9.x or 10.x, this one has 8.0"
    ):
        module.choose("flash_attn_4", *half)


def calls_of_a_tower(directory, rows):
    """On a rank: calls of attention in the tower and connector, for each row."""
    _, _, (stage,), _ = build_for_test(directory, {}, {})
    counts = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for place in (core_attention, perceiver):
            patch.setattr(place, "attention", lambda *args, **more: counts.append(1) or attention(*args, **more))
        numbers = []
        for row in rows:
            counts.clear()
            stage.image_features(row.pixels)
            numbers.append(len(counts))
    return numbers


QUICK = ("idefics2", "qwen2_5_vl")


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(n, marks=pytest.mark.full) for n in NAMES if n not in (*QUICK, "internlm2"))],
)
def test_all_images_of_a_row_are_one_call_a_layer(name, tmp_path):
    twin = write_small_twin(name, tmp_path)
    rows = [twin.row([(1, 9)], seed=0), twin.row([(2, 9), (1, 5)], seed=1)]
    assert len(rows[0].pixels) < len(rows[1].pixels)
    ((one, three),) = run_distributed(calls_of_a_tower, twin.directory, rows)
    assert one == three > 0
