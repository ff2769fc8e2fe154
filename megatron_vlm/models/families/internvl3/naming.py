"""The non-weight files of InternVL's other naming: config.json, tokenizer and processor of ``--as chat`` and ``--as hf``."""

import json
from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConversionError
from megatron_vlm.models.assembling import copy_licences
from megatron_vlm.models.families.internlm2.llama import llama_config
from megatron_vlm.models.families.internvl3.config import DECODERS, InternVL3ModelConfig
from megatron_vlm.models.families.internvl3.processor import CONTEXT, START, STOP, own_template
from megatron_vlm.models.families.internvl3.prompts import CLOSE, PROMPTS
from megatron_vlm.models.processing.processor_files import load_tokenizer, processor_settings

MARKS = {
    "start_image_token": START, "end_image_token": STOP, "context_image_token": CONTEXT, "video_token": "<video>",
}  # fmt: skip
"""Tokens that transformers' processor asks its tokenizer for."""
# Same value, other name: chat -> hf.
_TEXT = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "initializer_range", "attention_dropout", "bos_token_id",
    "eos_token_id", "pad_token_id", "use_sliding_window", "sliding_window", "max_window_layers", "head_dim",
)  # fmt: skip


def write_files(naming: str, hf_dir: Path, hf_config: dict[str, Any], directory: Path) -> None:
    """Writes the files of ``naming``; ``hf_dir`` and ``hf_config`` are of the other one."""
    model = InternVL3ModelConfig.from_hf(dict(hf_config))
    (_write_native if naming == "hf" else _write_chat)(model, hf_dir, hf_config, directory)
    copy_licences(hf_dir, directory)


def _write_native(model: InternVL3ModelConfig, hf_dir: Path, hf_config: dict[str, Any], directory: Path) -> None:
    from transformers import GenerationConfig, InternVLConfig

    llm, vision = hf_config["llm_config"], model.vision
    tokenizer = load_tokenizer(hf_dir, extra_special_tokens=MARKS)
    tokenizer.save_pretrained(directory)
    ids = tokenizer.convert_tokens_to_ids
    side = hf_config.get("force_image_size") or vision.image_size
    if model.text.model_type == "internlm2":
        text = {
            key: value
            for key, value in llama_config(llm).items()
            if key not in ("architectures", "torch_dtype", "dtype")
        }
    else:
        text = {key: llm[key] for key in (*_TEXT, "rope_theta", "rope_scaling") if llm.get(key) is not None}
        text |= {"model_type": model.text.model_type, "tie_word_embeddings": model.text.tie_word_embeddings}
    config = InternVLConfig(
        text_config=text,
        vision_config=vision.to_native(),
        image_token_id=ids(CONTEXT),
        image_seq_length=model.tile_tokens(side),
        downsample_ratio=1 / model.shuffle,
        tie_word_embeddings=model.text.tie_word_embeddings,
        architectures=["InternVLForConditionalGeneration"],
        dtype=hf_config.get("dtype") or hf_config.get("torch_dtype"),
    )
    dynamic = bool(hf_config.get("dynamic_image_size"))
    # to_dict, not to_diff_dict: a default of the class (a tied head) must not be left to the reader's version.
    _write(directory / "config.json", config.to_dict())
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": dynamic,
        "min_patches": hf_config.get("min_dynamic_patch", 1) if dynamic else 1,
        "max_patches": hf_config.get("max_dynamic_patch", 6) if dynamic else 1,
        "size": {"height": side, "width": side},
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    }
    _write(directory / "preprocessor_config.json", images)
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": model.tile_tokens(side)}
    _write(directory / "processor_config.json", processor)
    prompt = PROMPTS[own_template(hf_dir, hf_config)]
    (directory / "chat_template.jinja").write_text(prompt.jinja, encoding="utf-8")
    GenerationConfig(eos_token_id=ids(CLOSE), pad_token_id=tokenizer.pad_token_id).save_pretrained(directory)


def _write_chat(model: InternVL3ModelConfig, hf_dir: Path, hf_config: dict[str, Any], directory: Path) -> None:
    _, images = processor_settings(hf_dir)
    vision, text = model.vision, dict(hf_config.get("text_config") or {})
    if text.get("model_type") not in DECODERS:
        raise ConversionError(
            f"the original's naming knows decoders of {', '.join(DECODERS)}, this one is {text.get('model_type')}: "
            "export it as transformers names it (--as hf)"
        )
    rope = dict(text.get("rope_parameters") or {})
    scaling = text.get("rope_scaling") or {k: v for k, v in rope.items() if k != "rope_theta"}
    kind = scaling.get("rope_type") or scaling.get("type")
    load_tokenizer(hf_dir).save_pretrained(directory)
    llm = {key: text[key] for key in _TEXT if text.get(key) is not None}
    remote = "modeling_internvl_chat.InternVLChatModel"
    config = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": remote,
            "AutoModelForCausalLM": remote,
        },
        "model_type": "internvl_chat",
        "downsample_ratio": 1 / model.shuffle,
        "dynamic_image_size": images.get("max_patches", 12) > 1,
        "force_image_size": (images.get("size") or {}).get("height", vision.image_size),
        "min_dynamic_patch": images.get("min_patches", 1),
        "max_dynamic_patch": images.get("max_patches", 12),
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": own_template(hf_dir, hf_config),
        "tie_word_embeddings": model.text.tie_word_embeddings,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "torch_dtype": hf_config.get("dtype") or hf_config.get("torch_dtype"),
        "llm_config": {
            "architectures": [f"{text['model_type'].capitalize()}ForCausalLM"],
            "model_type": text["model_type"],
            **llm,
            "rope_theta": model.text.rotary_base,
            "rope_scaling": None if kind in (None, "default") else {**scaling, "type": kind, "rope_type": kind},
            "tie_word_embeddings": model.text.tie_word_embeddings,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": vision.num_channels,
            "norm_type": vision.norm_type,
            "layer_norm_eps": vision.norm_epsilon,
            "hidden_act": "gelu",
            "qkv_bias": vision.qkv_bias,
            "qk_normalization": vision.qk_norm,
            "drop_path_rate": 0.0,
        },
    }
    _write(directory / "config.json", config)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
