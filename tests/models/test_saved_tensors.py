"""What autograd keeps: offloaded or made again, gradients are the same, and the device lets go of what waits."""

import gc
import weakref

import pytest
import torch
from torch import nn

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.models import saved_tensors
from megatron_vlm.models.saved_tensors import SavedTensors
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import build_for_test, random_samples
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2


class Block(nn.Module):
    """A norm, a linear whose output is saved in three views, and one more."""

    def __init__(self, width=64):
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(torch.softmax(q @ k.t(), -1) @ v)


def run(offload, norms, seen=None):
    """Gradients by name of four blocks; ``seen`` gets weak references to all storages that were offered to be saved."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block() for _ in range(4)))
    saved = SavedTensors(blocks, offload=offload, norms=[block.norm for block in blocks] if norms else ())
    if seen is not None:
        pack = saved._pack
        saved.used, saved._pack = True, lambda x: (seen.append(weakref.ref(x.untyped_storage())), pack(x))[1]
    x = torch.randn(300, 64).requires_grad_()
    with saved.of_a_pass():
        y = blocks(x)
    if seen is not None:
        gc.collect()
        own = {t.untyped_storage()._cdata for t in (*blocks.parameters(), x, y)}
        alive = {s._cdata: s.nbytes() for s in (reference() for reference in seen) if s is not None}
        seen[:] = [size for data, size in alive.items() if data not in own]
    y.square().sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in blocks.named_parameters()}}


@pytest.mark.parametrize(("offload", "norms"), [(True, False), (False, True), (True, True)])
def test_gradients_are_the_same_and_storages_are_let_go(offload, norms):
    before, held = [], []
    plain = run(False, False, before)
    found = run(offload, norms, held)
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())
    large = [size for size in held if size >= saved_tensors.LEAST]
    assert sum(before) > 3e6 and (not large if offload else sum(before) - sum(held) == 4 * 4 * 300 * 64)


def test_small_tensors_and_parameters_stay():
    linear, sent = nn.Linear(300, 300), []
    saved = SavedTensors(linear, offload=True)
    send = saved._send
    saved._send = lambda x, size: (sent.append(size), send(x, size))[1]
    x = torch.randn(300, 300).requires_grad_()
    with saved.of_a_pass():
        small = (x[:2].clone() * x[:2].clone()).sum()
        large = linear(x).exp()
    assert sent == [4 * 300 * 300] * 2  # x and the output of exp, once each; the weight of the linear is as large
    (large.sum() + small).backward()


def gradients_of(directory, row, settings):
    """On a rank: of each setting the gradients by name, and bytes that were sent to the host."""
    found, saved_tensors.LEAST = [], 256
    for parallel in settings:
        _, _, (model,), _ = build_for_test(directory, parallel, {})
        model.train()
        sent, send = [], model.saved._send
        model.saved._send = lambda x, size, sent=sent, send=send: (sent.append(size), send(x, size))[1]
        model(row).backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, sum(sent)))
    return found


def test_a_model_trains_the_same_with_its_activations_on_the_host(tmp_path):
    hf = write_tiny_idefics2(tmp_path)
    config = registry.get("idefics2").config(hf.config.to_dict())
    row = row_from_samples(random_samples(config, [([(24, 24), (40, 16)], 12), ([], 9)]))
    selective = dict(
        recompute_granularity="selective", recompute_modules=["mlp", "norm", "connector", "core_attention"]
    )
    ways = [{}, selective, dict(recompute_granularity="full")]
    settings = [way | {"offload_activations": on} for way in ways for on in (False, True)]
    (found,) = run_distributed(gradients_of, str(tmp_path), row, settings)
    plain = found[0][0]
    for gradients, _ in found[1:]:
        assert all(torch.equal(gradients[name], gradient) for name, gradient in plain.items())
    sent = [size for _, size in found]
    assert sent[0] == sent[2] == sent[4] == 0 and sent[1] > sent[3] > sent[5] > 0, sent
