"""Tiny random twins of InternVL 2 to 3.5 in both namings, with tokenizer and processor."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.families.internvl3.prompts import PROMPTS
from megatron_vlm.models.families.internvl3.reference import hf_inputs as hf_inputs
from megatron_vlm.models.processing.processor_files import load_tokenizer
from megatron_vlm.testing.twins.common import CORPUS, noise_samples, randomise
from megatron_vlm.testing.twins.internlm2 import fuse, write_sentencepiece

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>",
)  # fmt: skip
MARKS = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(vocab_size: int = 400, special: Sequence[str] = SPECIAL_TOKENS):
    """Trains a byte-level BPE tokenizer without BOS, with Qwen2's and InternVL's ``special`` tokens at the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=MARKS if special is SPECIAL_TOKENS else {},
    )
    fast.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    return fast


def tiny_config(tokenizer: Any, **options: Any):
    """Returns a tiny InternVLConfig; ``text`` and ``vision`` override values of those parts, ``tie`` ties the head."""
    from transformers import InternVLConfig

    image_size = options.get("vision", {}).get("image_size", 32)
    text = dict(
        model_type="qwen2",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=options.get("tie", False),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        attention_bias=True,
        image_size=(image_size, image_size),
        patch_size=(8, 8),
    )
    return InternVLConfig(
        text_config={**text, **options.get("text", {})},
        vision_config={**vision, **options.get("vision", {}), "image_size": (image_size, image_size)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(image_size // 16) ** 2,
        tie_word_embeddings=options.get("tie", False),
    )


def write_tiny_internvl3(
    directory: str | Path, *, seed: int = 0, std: float = 0.15, tokenizer: Any = None, **options: Any
):
    """Writes a checkpoint in transformers' naming (weights, config, tokenizer, processor) and returns the model."""
    from transformers import InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tokenizer = tokenizer or tiny_tokenizer()
    config = tiny_config(tokenizer, **options)
    config._attn_implementation = "eager"
    model: Any = randomise(InternVLForConditionalGeneration(config), seed, std).eval()
    for name, parameter in model.named_parameters():
        if "lambda_" in name:
            parameter.data.add_(1.0)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(directory)
    size = config.vision_config.image_size[0]
    images = GotOcr2ImageProcessorPil(
        size={"height": size, "width": size},
        crop_to_patches=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    images.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = {"image_seq_length": config.image_seq_length, "processor_class": "InternVLProcessor"}
    (Path(directory) / "processor_config.json").write_text(json.dumps(settings))
    (Path(directory) / "chat_template.jinja").write_text(TEMPLATE)
    return model


def hf_processor(directory: str | Path, template: str = TEMPLATE):
    """transformers' processor of a twin; without its video processor, which needs torchvision."""
    from transformers import AutoTokenizer, InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    class ImagesOnly(InternVLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    settings = json.loads((Path(directory) / "processor_config.json").read_text())
    return ImagesOnly(
        GotOcr2ImageProcessorPil.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
        chat_template=template,
        image_seq_length=settings["image_seq_length"],
    )


def write_tiny_internvl2(root: Path, template: str = "internlm2-chat", **options: Any):
    """Writes a model on InternLM2 to ``root/hf``, where it is a Llama, and to ``root/chat``; returns the one of transformers."""
    (root / "chat").mkdir(parents=True, exist_ok=True)
    write_sentencepiece(root / "chat", more=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"))
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = load_tokenizer(root / "chat", extra_special_tokens={**marks, "video_token": "<video>"})
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    text = {"model_type": "llama", "rope_parameters": rope, "rms_norm_eps": 1e-5, **options.pop("text", {})}
    model = write_tiny_internvl3(root / "hf", tokenizer=tokenizer, text=text, **options)
    (root / "hf" / "chat_template.jinja").write_text(PROMPTS[template].jinja)
    write_chat_layout(root / "chat", model, template, fused=True)
    return model


def write_chat_layout(directory: str | Path, model: Any, template: str = "internvl2_5", fused: bool = False) -> None:
    """Writes the same weights as the original's checkpoints have them; by its own table, not by our weight map.

    ``fused``: a Llama as the InternLM2 that it is; the tokenizer is there.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config
    vision, text = config.vision_config, config.text_config
    chat = _chat_tensors(model, fused)
    save_file(
        {name: tensor.contiguous() for name, tensor in chat.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    content = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size[0],
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "torch_dtype": "float32",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "llm_config": {
            "architectures": [f"{'InternLM2' if fused else text.model_type.capitalize()}ForCausalLM"],
            "model_type": "internlm2" if fused else text.model_type,
            **({"bias": False} if fused else {"head_dim": text.head_dim} if text.model_type == "qwen3" else {}),
            **{name: getattr(text, name) for name in (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "max_position_embeddings", "rms_norm_eps", "eos_token_id", "pad_token_id", "hidden_act",
            )},
            "rope_theta": 1e6,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "tie_word_embeddings": bool(config.tie_word_embeddings),
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            **{name: getattr(vision, name) for name in (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "norm_type",
                "layer_norm_eps", "hidden_act", "num_channels",
            )},
            "image_size": vision.image_size[0],
            "patch_size": vision.patch_size[0],
            "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm,
            "drop_path_rate": 0.1,
        },
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(content, indent=2))
    if not fused:
        tiny_tokenizer().save_pretrained(directory)


def _chat_tensors(model: Any, fused: bool) -> dict[str, Tensor]:
    vision, text = model.config.vision_config, model.config.text_config
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fixed = {
        "model.vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
        "model.vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
        "model.vision_tower.embeddings.patch_embeddings.projection.": "vision_model.embeddings.patch_embedding.",
        "model.multi_modal_projector.layer_norm.": "mlp1.0.",
        "model.multi_modal_projector.linear_1.": "mlp1.1.",
        "model.multi_modal_projector.linear_2.": "mlp1.3.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    inner = {
        "attention.projection_layer.": "attn.proj.",
        "attention.q_norm.": "attn.q_norm.",
        "attention.k_norm.": "attn.k_norm.",
        "layernorm_before.": "norm1.",
        "layernorm_after.": "norm2.",
        "lambda_1": "ls1",
        "lambda_2": "ls2",
        "mlp.": "mlp.",
    }
    chat: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for old, new in fixed.items():
            if name.startswith(old):
                chat[new + name[len(old) :]] = tensor
    for i in range(vision.num_hidden_layers):
        layer, own = f"model.vision_tower.encoder.layer.{i}.", f"vision_model.encoder.layers.{i}."
        for kind in ("weight", "bias") if vision.attention_bias else ("weight",):
            parts = [state[f"{layer}attention.{x}_proj.{kind}"] for x in "qkv"]
            chat[f"{own}attn.qkv.{kind}"] = torch.cat(parts)
        for name, tensor in state.items():
            for old, new in inner.items():
                if name.startswith(layer + old):
                    chat[own + new + name[len(layer + old) :]] = tensor
    if fused:
        llm = {name.removeprefix("language_model."): chat.pop(name) for name in [*chat] if name.startswith("language_")}
        chat |= {f"language_model.{name}": tensor for name, tensor in fuse(llm, text.num_key_value_heads).items()}
    return chat


def make_samples(
    config: Any, specs: Sequence[tuple[Sequence[int], int]], seed: int = 0, *, tile: int | None = None
) -> list[EncodedSample]:
    """Makes samples of random tokens and noise tiles.

    Args:
        config: InternVL3ModelConfig.
        specs: one (number of tiles of each image, number of text tokens after the images) per sample.
        seed: of the numbers drawn.
        tile: side of a tile in pixels; None: the tower's.
    """
    size = tile or config.vision.image_size
    made = [
        ([(tiles * config.tile_tokens(size), (3, tiles * size, size)) for tiles in images], num_text)
        for images, num_text in specs
    ]
    return noise_samples(made, config.image_token_id or config.text.vocab_size - 2, seed=seed)
