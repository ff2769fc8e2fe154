"""Every linear, norm and core attention of every family is of the backend's classes; their seams do nothing until used."""

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_vlm import registry
from megatron_vlm.layers.backend import backend_of
from megatron_vlm.layers.linear import ColumnLinear, Place, RowLinear
from megatron_vlm.models.built import build_model
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.topology import build_topology
from megatron_vlm.testing import shapes
from megatron_vlm.testing.distributed import run_distributed


def classes(family: str) -> tuple[set[str], set[str], list[str]]:
    """On a rank: norms that are not the backend's, core attentions and linears likewise, and the plain linears."""
    config = shapes.small()[family]
    topology = build_topology(ParallelConfig(), num_layers=config.text.num_layers, device=torch.device("cpu"))
    with torch.device("meta"):
        (stage,) = build_model(registry.get(family), config, topology, ModelOptions(make_vocab_size_divisible_by=1))
    backend = backend_of(stage.config)
    ours = {
        backend.column,
        backend.row,
        backend.unbiased_column,
        backend.core_attention,
        *backend.norms.values(),
        backend.head_norm,
    }
    found = {type(m) for m in stage.modules() if "Norm" in type(m).__name__ or type(m).__name__.startswith("Core")}
    linears = {name: type(m) for name, m in stage.named_modules() if Place.of(m) is not None}
    plain = [name for name, kind in linears.items() if kind not in ours]
    return {kind.__name__ for kind in found - ours}, {kind.__name__ for kind in linears.values()}, plain


@pytest.mark.parametrize("family", sorted(shapes.small()))
def test_every_part_is_of_the_backends_classes(family):
    ((others, linears, plain),) = run_distributed(classes, family)
    assert others <= {"WidthRMSNorm", "NormedResidual"} and {"ColumnLinear", "RowLinear"} <= linears
    assert plain == ["language_model.output_layer"]  # megatron-core's GPTModel makes the head, and nothing calls it


class Scale(nn.Module):
    """A branch that multiplies what the linear made."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        return output * self.factor + x.sum()


def seams() -> dict[str, bool]:
    """On a rank: what branches, another product and a bias that trains alone make of a linear."""
    topology = build_topology(ParallelConfig(), num_layers=1, device=torch.device("cpu"))
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, use_cpu_initialization=True)
    shared = dict(config=config, init_method=config.init_method, bias=True, skip_bias_add=False)
    found, x = {}, torch.randn(5, 1, 4)
    for mine, theirs, more in (
        (ColumnLinear, ColumnParallelLinear, {"gather_output": False}),
        (RowLinear, RowParallelLinear, {"input_is_parallel": True}),
    ):
        name, group = mine.__name__, topology.tp_group
        ours, plain = (kind(4, 4, **shared, **more, tp_group=group) for kind in (mine, theirs))
        plain.load_state_dict(ours.state_dict())
        place = Place.of(ours)
        found[f"{name} place"] = place == Place.of(plain) and place.row == (mine is RowLinear) and not place.draws_apart
        found[f"{name} alone"] = torch.equal(ours(x)[0], plain(x)[0])
        ours.plora, ours.lora = Scale(2.0), Scale(3.0)
        wanted = (plain(x)[0] * 2.0 + x.sum()) * 3.0 + x.sum()
        found[f"{name} branches"] = torch.equal(ours(x)[0], wanted)
        ours.plora = ours.lora = None
        ours.weight.requires_grad_(False)
        ours(x)[0].sum().backward()
        found[f"{name} bias alone"] = ours.bias.grad is not None and torch.equal(ours.bias.grad, torch.full((4,), 5.0))
        ours.product = lambda input, weight, *args, **kwargs: torch.zeros_like(input)
        found[f"{name} product"] = not ours(x)[0].sub(ours.bias if mine is RowLinear else 0).any()
    return found


def test_seams_of_a_linear():
    (found,) = run_distributed(seams)
    assert len(found) == 10 and all(found.values()), found


def test_other_modules_have_no_place():
    assert Place.of(nn.Linear(2, 2)) is None
