"""XComposer2's own key names in and out of every layout, from files saved by torch too; code beside the weights never runs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm import registry
from megatron_vlm.cli.convert import main
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.sources.source import check_entry
from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2
from megatron_vlm.weights.mapping import TensorInfo
from megatron_vlm.weights.torch_files import load_weights_only

BUFFER = "vit.vision_tower.vision_model.embeddings.position_ids"


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Name -> directory: safetensors, and two files saved by torch with an old buffer."""
    made = {}
    for name, options in {"7b": dict(dtype=torch.bfloat16, shards=2), "4khd-7b": {}}.items():
        made[name] = tmp_path_factory.mktemp(name)
        write_tiny_xcomposer2(made[name], name, num_attention_heads=8, num_key_value_heads=2, **options)
    return made


def tensors_of(directory):
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(directory.glob("*.bin")):
        tensors |= load_weights_only(path)
    tensors.pop(BUFFER, None)
    return tensors


def others_of(directory):
    weights = (".bin", ".safetensors", ".index.json")
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.endswith(weights)}


@pytest.mark.parametrize("name", ["7b", "4khd-7b"])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_round_trip(twins, tmp_path, name, tp, pp):
    hf2mg(twins[name], tmp_path / "mg", family="xcomposer2", tp=tp, pp=pp)
    mg2hf(tmp_path / "mg", tmp_path / "hf")
    before, after = tensors_of(twins[name]), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)
    assert others_of(twins[name]) == others_of(tmp_path / "hf")
    assert {"config.json", "tokenizer.model", "modeling_internlm_xcomposer2.py", "build_mlp.py"} <= set(
        others_of(tmp_path / "hf")
    )


def test_verify_compares_every_weight(twins, tmp_path, capsys):
    """There is no class of transformers to run beside ours: the weights level is the highest, and asking for more says so."""
    hf2mg(twins["7b"], tmp_path / "mg", tp=2)
    assert main(["verify", "--hf", str(twins["7b"]), "--load", str(tmp_path / "mg")]) == 0
    assert "weights" in capsys.readouterr().out
    assert main(["verify", "--hf", str(twins["7b"]), "--load", str(tmp_path / "mg"), "--level", "forward"]) == 1
    shard = next((tmp_path / "mg").glob("mp_rank_01_000/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    assert main(["verify", "--hf", str(twins["7b"]), "--load", str(tmp_path / "mg")]) == 1


def published_tensors(variant):
    """Names and shapes of the published checkpoints: decoder and tower by hand, from their release notes and code."""
    h, ffn, kv, r, v, vocab = 4096, 14336, 1024, 256, 1024, 92544
    tower = "vit.vision_tower.vision_model."
    side = {"7b": 16, "vl-7b": 35, "4khd-7b": 24}[variant]
    width = 4096 if variant == "4khd-7b" else 1024
    shapes = {
        "model.tok_embeddings.weight": (vocab, h), "model.norm.weight": (h,), "output.weight": (vocab, h),
        "vision_proj.0.weight": (h, width), "vision_proj.0.bias": (h,),
        "vision_proj.2.weight": (h, h), "vision_proj.2.bias": (h,),
        tower + "embeddings.class_embedding": (v,),
        tower + "embeddings.patch_embedding.weight": (v, 3, 14, 14),
        tower + "embeddings.position_embedding.weight": (side * side + 1, v),
    }  # fmt: skip
    if variant == "4khd-7b":
        shapes |= {"plora_glb_GN": (1, 1, 4096), "plora_sub_GN": (1, 1, 1, 4096)}
    linears = {
        "attention.wqkv": (h + 2 * kv, h), "attention.wo": (h, h),
        "feed_forward.w1": (ffn, h), "feed_forward.w2": (h, ffn), "feed_forward.w3": (ffn, h),
    }  # fmt: skip
    for i in range(32):
        layer = f"model.layers.{i}."
        shapes |= {layer + "attention_norm.weight": (h,), layer + "ffn_norm.weight": (h,)}
        for linear, (rows, columns) in linears.items():
            shapes[f"{layer}{linear}.weight"] = (rows, columns)
            shapes[f"{layer}{linear}.Plora_A.weight"] = (r, columns)
            shapes[f"{layer}{linear}.Plora_B.weight"] = (rows, r)
    norms = [tower + "pre_layrnorm.", tower + "post_layernorm."]
    for i in range(24):
        layer = f"{tower}encoder.layers.{i}."
        norms += [layer + "layer_norm1.", layer + "layer_norm2."]
        pairs = {f"self_attn.{x}_proj": (v, v) for x in ("q", "k", "v", "out")} | {
            "mlp.fc1": (4 * v, v),
            "mlp.fc2": (v, 4 * v),
        }
        for name, shape in pairs.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    return shapes | {norm + kind: (v,) for norm in norms for kind in ("weight", "bias")}


@pytest.mark.parametrize("variant", ["7b", "vl-7b", "4khd-7b"])
def test_the_map_takes_the_published_tensors(variant):
    from tests.models.families.xcomposer2.test_processor import OF_VARIANT, PUBLISHED

    spec = registry.get("xcomposer2")
    config = spec.config({**PUBLISHED, **OF_VARIANT[variant]})
    mapping, shapes = spec.mapping(config, tp=8).padded(128), published_tensors(variant)
    assert mapping.hf_names() == set(shapes)
    for entry in mapping:
        infos = [TensorInfo(dtype=torch.bfloat16, shape=shapes[name]) for name in entry.hf]
        full = check_entry(entry, infos, mapping.vocab_size)
        entry.split.shard(full.meta(), 8, 7)  # divides over 8 ranks
    branches = sum(torch.Size(shape).numel() for name, shape in shapes.items() if "Plora" in name)
    assert round(branches / 1e6) == 604
    with pytest.raises(ConfigError, match=r"use one of 1, 2, 4, 8, 16, 32"):
        spec.mapping(config, tp=3)


def test_what_cannot_be_read_says_why(twins, tmp_path):
    source = tmp_path / "other"
    source.mkdir()
    config = json.loads((twins["4khd-7b"] / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "img_size": 28, "max_length": 4096})
    )  # then it has no separators
    (source / "model.safetensors").symlink_to(twins["4khd-7b"] / "model.safetensors")
    with pytest.raises(ConversionError, match=r"2 tensors unmapped: plora_glb_GN, plora_sub_GN"):
        open_source(source)
    with pytest.raises(ConversionError, match=r"of family xcomposer2 .*, not internlm2"):
        open_source(twins["7b"], "internlm2")
