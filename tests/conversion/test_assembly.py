"""`convert assemble`: every tower, connector and decoder that a class of transformers runs, trained as that class trains."""

import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm import registry
from megatron_vlm.cli.convert import main
from megatron_vlm.conversion.convert import export_hf, open_model
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.errors import ConfigError, ConversionError
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


@pytest.mark.parametrize(
    ("cell", "numbers", "spellings"),
    [
        (("siglip", "mlp", "qwen3"), {"linear_1": 0, "linear_2": 2}, ("model.{}", "model.mm_projector.{n}.{kind}")),
        (("siglip", "perceiver", "llama"), {}, ()),
        (
            ("internvit", "pixel_shuffle", "qwen3"),
            {"layer_norm": 0, "linear_1": 1, "linear_2": 3},
            ("mlp1.{n}.{kind}", "{n}.{kind}"),
        ),
    ],
)
def test_a_trained_connector(part, cell, numbers, spellings, tmp_path):
    """Out of a whole model, or alone under the names that programs give it; no other part is taken from there."""
    tower, connector, decoder = cell
    spec = registry.assembler(MODEL_TYPES[tower], decoder, connector)
    sizes = {name: int(value) for name, _, value in (word.partition("=") for word in PERCEIVER)}
    options = {"perceiver": sizes} if connector == "perceiver" else {}
    parts = dict(family=spec.name, llm=part(decoder), vision=part(tower))

    def made(projector=None, seed=0):
        with open_model(None, **parts, projector=projector, assemble={"seed": seed, **options}) as source:
            return {name: source.read(name) for name in source.entries if name.startswith("connector.")}

    fresh, trained = made(), made(seed=7)
    assert any(not torch.equal(fresh[name], trained[name]) for name in trained)
    with open_model(None, **parts, assemble={"seed": 7, **options}) as source:
        export_hf(source, tmp_path / "whole")
    state = load_file(tmp_path / "whole" / "model.safetensors")
    own = {n: t for n, t in state.items() if "multi_modal_projector." in n or ".connector." in n}
    forms = [tmp_path / "whole"]
    for number, spelling in enumerate(("{}", *spellings)):
        renamed = {}
        for name, tensor in own.items():
            *_, module, kind = name.removeprefix("model.").split(".")
            renamed[spelling.format(name, n=numbers.get(module), kind=kind)] = tensor
        forms.append(tmp_path / f"{number}.pth")
        torch.save(renamed, forms[-1])
    for form in forms:
        found = made(form)
        assert found.keys() == trained.keys() and all(torch.equal(found[name], trained[name]) for name in found), form
    torch.save(own | {"language_model.lora": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ConversionError, match=r"0 tensors missing \(none\), 1 unknown \(language_model\.lora\)"):
        made(tmp_path / "more.pth")
    torch.save({"epoch": 3, "model": own}, tmp_path / "training.pth")
    with pytest.raises(ConversionError, match="epoch, model are no tensors"):
        made(tmp_path / "training.pth")


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
