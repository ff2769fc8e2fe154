"""Tiny LLaVA checkpoints: the parts (InternLM2, CLIP, projector), and a native one on Llama with transformers' processor."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.testing.twins.common import noise_samples, randomise
from megatron_vlm.testing.twins.idefics2 import tiny_tokenizer
from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2

CLIP = dict(
    hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7,
    projection_dim=16,
)  # fmt: skip
LLAMA = dict(
    model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=1024, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def write_tiny_clip(directory: Path, seed: int = 1, std: float = 0.15, **options: Any):
    """Writes a CLIPVisionModel under the names of the published files, and returns it."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel

    directory.mkdir(parents=True, exist_ok=True)
    config = CLIPVisionConfig(**{**CLIP, **options})
    config._attn_implementation = "eager"
    model: Any = randomise(CLIPVisionModel(config), seed, std).eval()
    config.save_pretrained(directory)
    state = {f"vision_model.{name}": tensor.detach().clone() for name, tensor in model.named_parameters()}
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return model


def write_tiny_projector(directory: Path, width: int = 48, hidden: int = 64, seed: int = 2) -> dict[str, Tensor]:
    """Writes XTuner's projector folder and returns its tensors."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    layers = randomise(nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)), seed, 0.15)
    state = {f"model.{name}": tensor.detach().clone() for name, tensor in layers.named_parameters()}
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    sizes = {"visual_hidden_size": width, "llm_hidden_size": hidden}
    config = {"model_type": "projector", **sizes, "depth": 2, "hidden_act": "gelu", "bias": True}
    (directory / "config.json").write_text(json.dumps(config))
    return state


def write_tiny_parts(directory: str | Path, **options: Any) -> dict[str, Any]:
    """Writes ``llm/`` (InternLM2), ``vision/`` (CLIP) and ``projector/``; options as of ``write_tiny_internlm2``."""
    parts: dict[str, Any] = {name: Path(directory) / name for name in ("llm", "vision", "projector")}
    parts["llm"].mkdir(parents=True)
    write_tiny_internlm2(parts["llm"], **options)
    write_tiny_clip(parts["vision"])
    write_tiny_projector(parts["projector"], hidden=options.get("hidden_size", 64))
    return parts


def write_tiny_llava_internlm2(directory: str | Path, **options: Any):
    """Writes a native LLaVA assembled from ``write_tiny_parts`` and returns transformers' model of it."""
    import tempfile

    from transformers import LlavaForConditionalGeneration

    from megatron_vlm.conversion.convert import export_hf, open_model  # not for those who only make samples

    with tempfile.TemporaryDirectory() as work:
        parts = write_tiny_parts(work, **options)
        with open_model(None, family="llava_internlm2", **parts) as source:
            export_hf(source, directory)
    return LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation="eager").eval()


def write_tiny_llava(directory: str | Path, seed: int = 0, std: float = 0.15, tie: bool = False, **vision: Any):
    """Writes a native LLaVA on Llama as transformers saves it, with its processor, and returns the model.

    ``vision`` overrides values of the CLIP config.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tiny_tokenizer()
    clip = {**CLIP, **vision}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **clip},
        text_config={**LLAMA, "vocab_size": len(tokenizer), "tie_word_embeddings": tie},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(clip["image_size"] // clip["patch_size"]) ** 2,
        vision_feature_layer=-2,
        tie_word_embeddings=tie,
    )
    config._attn_implementation = "eager"
    model: Any = randomise(LlavaForConditionalGeneration(config), seed, std).eval()
    model.save_pretrained(directory)
    side = clip["image_size"]
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    LlavaProcessor(
        images, tokenizer, patch_size=clip["patch_size"], vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)  # fmt: skip
    return model


def make_samples(config: Any, specs: Sequence[tuple[int, int]], seed: int = 0, prompt: int = 0) -> list[EncodedSample]:
    """Samples of random tokens and noise images.

    Args:
        config: of the model.
        specs: (number of images, number of text tokens after them) of each.
        seed: of the numbers drawn.
        prompt: leading tokens of each sample that carry no label.
    """
    vision = config.vision
    image = (vision.side**2, (vision.num_channels, vision.image_size, vision.image_size))
    made = [([image] * num_images, num_text) for num_images, num_text in specs]
    return noise_samples(made, config.image_token_id, seed=seed, prompt=prompt)


def llava_inputs(sample: EncodedSample, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """transformers' arguments for one sample."""
    inputs = {"input_ids": sample.input_ids[None]}
    return inputs | ({"pixel_values": torch.stack(sample.pixels).to(dtype)} if sample.pixels else {})
