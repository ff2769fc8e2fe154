"""`convert assemble`: every tower, connector and decoder that a class of transformers runs, trained as that class trains."""

import dataclasses
import itertools

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.cli.convert import main
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.errors import ConfigError
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.layouts import NORM
from megatron_vlm.testing.parity import layout_run
from megatron_vlm.testing.twins.internvl3 import hf_processor
from megatron_vlm.testing.twins.parts import DECODERS, TOWERS, write_tiny_llm, write_tiny_tower
from megatron_vlm.testing.twins.peft import peft_training

BAR = 1e-5  # of the loss before, between and after two updates, and of the first gradient's norm; measured 3e-6
CONNECTORS = ("mlp", "pixel_shuffle", "perceiver")
MODEL_TYPES = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "internvit": "internvl_vision"}
CLASSES = {
    "mlp": "LlavaForConditionalGeneration",
    "pixel_shuffle": "InternVLForConditionalGeneration",
    "perceiver": "Idefics2ForConditionalGeneration",
}
CELLS = [
    *itertools.product(("clip", "siglip"), ("mlp",), DECODERS),
    *itertools.product(("siglip",), ("perceiver",), DECODERS),
    *itertools.product(("internvit",), ("pixel_shuffle",), DECODERS),
]
DEFAULT = [("siglip", "mlp", "qwen3"), ("internvit", "pixel_shuffle", "internlm2")]
PERCEIVER = [
    "resampler_n_latents=5",
    "resampler_depth=2",
    "resampler_n_heads=4",
    "resampler_head_dim=16",
    "num_key_value_heads=2",
]


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """Kind of a tower or decoder -> its folder, made when first asked for."""
    root = tmp_path_factory.mktemp("parts")

    def make(kind):
        if not (root / kind).exists():
            (write_tiny_tower if kind in TOWERS else write_tiny_llm)(root / kind, kind)
        return root / kind

    return make


def without(sample, pad):
    """The sample with another token for ``pad``, whose embedding transformers gives no gradient."""
    ids = torch.where(sample.input_ids == pad, 7, sample.input_ids)
    return dataclasses.replace(sample, input_ids=ids, labels=torch.where(sample.labels == -100, -100, ids))


@pytest.mark.parametrize(
    "cell", [pytest.param(c, marks=() if c in DEFAULT else pytest.mark.full, id="-".join(c)) for c in CELLS]
)
def test_cell(part, cell, tmp_path):
    """Assembled, it loads in silence as transformers' own class, and two updates change it as that class's change it."""
    import transformers

    tower, connector, decoder = cell
    words = f"assemble --vision {part(tower)} --llm {part(decoder)} --connector {connector} --out {tmp_path}/made"
    assert main([*words.split(), *(["--perceiver", *PERCEIVER] if connector == "perceiver" else [])]) == 0
    kind = getattr(transformers, CLASSES[connector])
    auto = transformers.AutoModelForImageTextToText
    model, info = auto.from_pretrained(tmp_path / "made", attn_implementation="eager", output_loading_info=True)
    assert type(model) is kind and not any(info.values()), info
    if connector == "pixel_shuffle":  # whose auto class asks for torchvision, for videos
        hf_processor(tmp_path / "made")
    else:
        transformers.AutoProcessor.from_pretrained(tmp_path / "made")
    with open_source(tmp_path / "made") as source:
        reference = source.spec.reference(source.config)
        pad = model.config.get_text_config().pad_token_id
        samples = [without(sample, pad) for sample in reference.samples()]
    (ours,) = run_distributed(layout_run, str(tmp_path / "made"), [row_from_samples(samples)], {}, {}, 3)
    theirs = peft_training(model.eval(), samples, 3, 1e-3, reference.inputs)
    losses, norms = ([abs(a[i] - b[i]) / b[i] for a, b in zip(ours["history"], theirs, strict=True)] for i in (0, 1))
    print(f"{cell}: {theirs[0][0]:.4f} -> {theirs[-1][0]:.4f}, losses off {max(losses):.1e}, norms {norms}")
    assert theirs[-1][0] < theirs[0][0] and max(losses) <= BAR and norms[0] <= BAR and max(norms) <= NORM


def test_every_other_cell_is_refused_by_name():
    """The table of docs/assemble.md is this one."""
    for tower, connector, decoder in itertools.product(TOWERS, CONNECTORS, DECODERS):
        kind = MODEL_TYPES[tower]
        if (tower, connector, decoder) in CELLS:
            assert registry.assembler(kind, decoder, connector).connector == connector
        else:
            with pytest.raises(ConfigError, match=rf"{kind} \+ {connector} \+ {decoder} is not built"):
                registry.assembler(kind, decoder, connector)
    with pytest.raises(ConfigError, match=r"\+ gemma is not built"):
        registry.assembler("clip", "gemma")
