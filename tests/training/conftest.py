"""Tiny twins that the checkpoint tests share; a whole tiny checkpoint and real shards for the trainer's tests."""

from pathlib import Path

import pytest
import torch

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.testing.parity import hf_reference, random_samples
from megatron_vlm.testing.runs import write_shards
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

SMALL = dict(text_hidden=32, ffn=48, vision_hidden=32, vision_ffn=40, vision_layers=2, depth=1, perceiver_head_dim=8)
TWINS = {
    "mistral": dict(text="mistral", sliding_window=11, **SMALL),
    "tied": dict(text="llama", tie=True, **SMALL),
    "deep": dict(text="llama", tie=True, std=0.05, layers=28, **SMALL),
}


@pytest.fixture(scope="session")
def twin(tmp_path_factory) -> Path:
    """A whole HF checkpoint."""
    folder = tmp_path_factory.mktemp("twin")
    write_tiny_idefics2(folder, std=0.15, layers=4)
    return folder


@pytest.fixture(scope="session")
def train_data(tmp_path_factory) -> Path:
    """40 samples."""
    return write_shards(tmp_path_factory.mktemp("train"), 40, seed=1)


@pytest.fixture(scope="session")
def valid_data(tmp_path_factory) -> Path:
    """7 samples: uneven over 2 replicas with rows of 2."""
    return write_shards(tmp_path_factory.mktemp("valid"), 7, seed=2)


@pytest.fixture
def command(twin, train_data, tmp_path):
    """``command(out, *more) -> argv`` of a small fp32 run on the CPU that reports to ``tmp_path / out``."""

    def make(out: str, *more: str, load: Path | str = twin) -> list[str]:
        base = (
            f"--load {load} --data-path {train_data} --seq-length 96 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 "
            f"--shortest-edge 24 --num-workers 0 --device cpu --no-tensorboard --log-interval 1 "
            f"--output-dir {tmp_path / out} --make-vocab-size-divisible-by 8"
        )
        return [*base.split(), *(word for text in more for word in text.split())]

    return make


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """``twins(name)`` -> HF directory, written when first asked for."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name))
            write_tiny_idefics2(made[name], **TWINS[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def calm(tmp_path_factory):
    """(directory, how far transformers in bf16 is from transformers in fp32 on this processor, of the gradients' norm).

    Weights of std 0.05: those of 0.15 amplify rounding, and then a bar would measure the processor's bf16 kernels.
    """
    folder = tmp_path_factory.mktemp("calm")
    model = write_tiny_idefics2(folder, std=0.05)
    with open_source(folder) as source:
        samples = random_samples(source.config, [([(16, 24)], 9), ([], 6), ([], 12)])
    _, _, exact = hf_reference(model, samples)
    _, _, rounded = hf_reference(model.to(torch.bfloat16), samples)
    off = torch.stack([(rounded[name].float() - gradient).norm() for name, gradient in exact.items()]).norm()
    distance = float(off / torch.stack([gradient.norm() for gradient in exact.values()]).norm())
    assert 1e-3 < distance < 5e-2  # bf16 has 8 bits, and the twin is well conditioned
    return str(folder), distance
