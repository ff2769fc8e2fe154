"""Tiny InternLM-XComposer2 checkpoints in its own key names: every variant, as safetensors or as files saved by torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.families.xcomposer2.config import XComposer2Config
from megatron_vlm.testing.twins.common import noise_samples, randomise
from megatron_vlm.testing.twins.internlm2 import fuse, write_generation, write_sentencepiece

TILE, PATCH = 28, 7
LINEARS = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
# What a real config.json says of the variant; the sizes are the twin's.
VARIANTS: dict[str, dict[str, Any]] = {
    "7b": {"img_size": TILE, "max_length": 4096, "rope_scaling": {"type": "dynamic", "factor": 1.0}},
    "4khd-7b": {"max_length": 16384, "rope_scaling": None},
}


def write_tiny_xcomposer2(
    directory: str | Path,
    variant: str = "7b",
    *,
    seed: int = 0,
    std: float = 0.15,
    shards: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """Writes a whole checkpoint, with a file of code beside it that must never run; returns its config.json.

    Args:
        directory: exists.
        variant: a key of VARIANTS; ``vl-7b`` is ``7b`` with larger images.
        seed, std: of the random weights.
        shards: number of ``pytorch_model`` files saved by torch, old buffers included; 0: one safetensors file.
        dtype: of the tensors on disk.
        options: override single values of config.json (``vision_config`` those given).
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    directory = Path(directory)
    vocab_size = write_sentencepiece(directory, chat=False)
    tower = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, patch_size=PATCH,
        image_size=TILE, hidden_act="quick_gelu",
    ) | options.pop("vision_config", {})  # fmt: skip
    config: dict[str, Any] = {
        "architectures": ["InternLMXComposer2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"},
        "model_type": "internlmxcomposer2",
        "bias": False,
        "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": vocab_size, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vision_config": tower,
        "plora_rank": 6,
        "plora_dropout": 0.0,
        **VARIANTS[variant],
        **options,
    }  # fmt: skip
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=config["vocab_size"], **{name: config[name] for name in names}))
    clip = CLIPVisionModel(CLIPVisionConfig(**{**tower, "image_size": config.get("img_size", tower["image_size"])}))
    state = {
        name: p.detach()
        for name, p in fuse(dict(randomise(llama, seed, std).named_parameters()), config["num_key_value_heads"]).items()
    }
    own = {
        f"vit.vision_tower.vision_model.{name}": p.detach()
        for name, p in randomise(clip, seed + 1, std).named_parameters()
    }
    generator = torch.Generator().manual_seed(seed + 2)
    for name, shape in _other_shapes(state, config, tower).items():
        own[name] = std * torch.randn(shape, generator=generator)
    state |= own
    state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    _save(directory, state, shards)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_generation(directory)
    for name in ("modeling_internlm_xcomposer2.py", "build_mlp.py"):
        (directory / name).write_text("raise RuntimeError('the code of a model folder was run')\n")
    return config


def _other_shapes(
    state: dict[str, Tensor], config: dict[str, Any], tower: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Branches, projection, and what the 4khd variant adds."""
    hidden, hd = config["hidden_size"], "img_size" not in config
    width = tower["hidden_size"] * (4 if hd else 1)
    shapes: dict[str, tuple[int, ...]] = {
        "vision_proj.0.weight": (hidden, width),
        "vision_proj.0.bias": (hidden,),
        "vision_proj.2.weight": (hidden, hidden),
        "vision_proj.2.bias": (hidden,),
    }
    for i in range(config["num_hidden_layers"]):
        for linear in LINEARS:
            name = f"model.layers.{i}.{linear}"
            rows, columns = state[f"{name}.weight"].shape
            shapes[f"{name}.Plora_A.weight"] = (config["plora_rank"], columns)
            shapes[f"{name}.Plora_B.weight"] = (rows, config["plora_rank"])
    return shapes | ({"plora_glb_GN": (1, 1, width), "plora_sub_GN": (1, 1, 1, width)} if hd else {})


def _save(directory: Path, state: dict[str, Tensor], shards: int) -> None:
    if not shards:
        from safetensors.torch import save_file

        save_file(state, directory / "model.safetensors", {"format": "pt"})
        return
    state["vit.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(
        len(state["vit.vision_tower.vision_model.embeddings.position_embedding.weight"])
    )[None]
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return
    files = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in state.items() if files[name] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def make_samples(
    hf_config: dict[str, Any], specs: Sequence[tuple[Sequence[tuple[int, int]], int]], seed: int = 0
) -> list[EncodedSample]:
    """Samples of random tokens and noise images.

    Args:
        hf_config: content of config.json.
        specs: of each sample the (rows, columns) of tiles of each image, (1, 1) unless 4khd, and the number of text tokens.
        seed: of the numbers drawn.
    """
    model = XComposer2Config.from_hf(hf_config)
    side = model.vision.image_size
    made = [
        ([(model.tokens(rows, columns), (3, rows * side, columns * side)) for rows, columns in grids], num_text)
        for grids, num_text in specs
    ]
    return noise_samples(made, 0, seed=seed, below=model.text.vocab_size)
