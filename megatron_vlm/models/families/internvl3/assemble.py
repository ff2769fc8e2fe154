"""Makes an InternVL out of a language model and an InternViT tower, as transformers' InternVLForConditionalGeneration.

    InternLM2 (query, key and value taken apart), Llama, Mistral, Qwen2, Qwen3  --+
    InternViT  -------------------------------------------------------------------+--> HFModel
    a trained connector, or a fresh one  -----------------------------------------+

Nothing is read until a converter asks for it. The vocabulary gets the tokens around images and, if it lacks them, around turns.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_vlm.config import Config
from megatron_vlm.errors import ConversionError
from megatron_vlm.files import read_json
from megatron_vlm.models.assembling import (
    SAID_ONCE,
    NewRows,
    add_connector,
    check_names,
    copy_licences,
    drawn,
    extend_vocabulary,
    new_ids,
    prefixed,
    renamed,
    with_biases,
)
from megatron_vlm.models.families.internlm2.llama import llama_config, llama_tensors
from megatron_vlm.models.families.internvl3.config import InternVL3ModelConfig
from megatron_vlm.models.families.internvl3.mapping import internvl3_mapping
from megatron_vlm.models.families.internvl3.naming import MARKS
from megatron_vlm.models.families.internvl3.prompts import CLOSE, DEFAULT, OPEN, PROMPTS
from megatron_vlm.models.parts.internvit import InternVitConfig, internvit_entries
from megatron_vlm.models.processing.pixels import IMAGENET
from megatron_vlm.models.processing.processor_files import load_tokenizer
from megatron_vlm.weights.mapping import DerivedTensors, HFModel

_EMBEDDING, _HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_PROJECTOR, _TOWER = "multi_modal_projector.", "vision_tower."
_SHUFFLE = 2


@dataclass(frozen=True, kw_only=True)
class AssembleOptions(Config):
    """How new parts are made.

    Attributes:
        seed: of everything drawn; each tensor has its own stream.
        new_rows: rows of added tokens: ``mean`` of the existing ones, or ``normal``: N(0, 0.02).
    """

    seed: int = 0
    new_rows: NewRows = "mean"


def assemble(
    llm: HFModel, vision: HFModel, files: Path, settings: dict[str, Any], projector: HFModel | None = None
) -> HFModel:
    """Joins the parts; a connector that is not given is drawn N(0, 0.02), its biases zero, its norm one.

    Args:
        llm: InternLM2ForCausalLM, or a model of Llama's shape.
        vision: InternVisionModel, or transformers' InternVLVisionModel.
        files: empty folder that takes the non-weight files.
        settings: of AssembleOptions. New parts have the dtype of the LLM's embedding.
        projector: the connector alone (``mlp1.0.weight`` ..., or the state of ``mlp1`` as InternVL's ``--mlp_path`` reads it),
            or an InternVL of either layout that has it.

    Raises:
        ConversionError: a part is of another architecture, or has tensors missing, unknown or of a wrong shape.
    """
    options = AssembleOptions.from_dict(settings)
    readers, infos = prefixed(llama_tensors(llm), "language_model.")
    dtype, rows = infos[_EMBEDDING].dtype, infos[_EMBEDDING].shape[0]
    tokenizer = load_tokenizer(llm.directory, extra_special_tokens=MARKS)
    tokenizer.add_special_tokens({"additional_special_tokens": [OPEN, CLOSE]}, replace_extra_special_tokens=False)
    total = max(rows, len(tokenizer))
    config = _write_config(files, llm, vision, tokenizer, total, dtype)
    _write_processor_files(files, vision, tokenizer, config)
    copy_licences(llm.directory, files)
    ids = new_ids([*MARKS.values(), OPEN, CLOSE], tokenizer, load_tokenizer(llm.directory).get_vocab(), rows)
    tied = config["tie_word_embeddings"]
    extend_vocabulary((readers, infos), (_EMBEDDING, _HEAD), total, ids, options.new_rows, options.seed, tied=tied)
    model = InternVL3ModelConfig.from_hf(config)
    naming: Literal["chat", "hf"] = "hf" if vision.config.get("model_type") == "internvl_vision" else "chat"
    own = internvit_entries(model.vision, 1, naming, "")
    makes_none = "does not make part of an InternVL"
    check_names({name for entry in own for name in entry.hf}, vision.tensors.infos, f"{vision.directory} {makes_none}")
    target = {entry.name: entry for entry in internvit_entries(model.vision, 1, "hf", _TOWER)}
    tower = renamed(vision.tensors, own, target)
    readers, infos = readers | tower[0], infos | tower[1]
    width, hidden = model.vision.hidden_size * _SHUFFLE**2, model.text.hidden_size
    shapes = {"layer_norm": (width,), "linear_1": (hidden, width), "linear_2": (hidden, hidden)}
    shapes = with_biases({_PROJECTOR + module: shape for module, shape in shapes.items()})
    draw = partial(drawn, seed=options.seed)
    add_connector((readers, infos), shapes, dtype, draw, projector, (("mlp1.0", "mlp1.1", "mlp1.3"), ("0", "1", "3")))
    mapping = internvl3_mapping(model)
    check_names(mapping.hf_names(), infos.keys() - mapping.hf_tied.keys(), f"{llm.directory} {makes_none}")
    stores = [part.tensors for part in (llm, vision, projector) if part is not None]
    return HFModel(directory=files, config=config, tensors=DerivedTensors(infos, readers, stores))


def _write_config(
    files: Path, llm: HFModel, vision: HFModel, tokenizer: Any, rows: int, dtype: torch.dtype
) -> dict[str, Any]:
    kind = vision.config.get("model_type")
    if kind == "internvl_vision":
        vit = InternVitConfig.from_hf(_with_defaults(vision.config))
    else:
        vit = InternVitConfig.from_chat(vision.config)
    text = llama_config(llm.config) if llm.config.get("model_type") == "internlm2" else dict(llm.config)
    side = vit.image_size // vit.patch_size // _SHUFFLE
    config = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": tokenizer.convert_tokens_to_ids(MARKS["context_image_token"]),
        "image_seq_length": side**2,
        "downsample_ratio": 1 / _SHUFFLE,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "dtype": str(dtype).removeprefix("torch."),
        "text_config": {key: value for key, value in text.items() if key not in SAID_ONCE} | {"vocab_size": rows},
        "vision_config": vit.to_native(),
    }
    (files / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def _with_defaults(vision: dict[str, Any]) -> dict[str, Any]:
    from transformers import InternVLVisionConfig

    return InternVLVisionConfig.from_dict(dict(vision)).to_dict()


def _write_processor_files(files: Path, vision: HFModel, tokenizer: Any, config: dict[str, Any]) -> None:
    """Files of transformers' InternVLProcessor, tiles as InternVL3's; the end of a turn ends an answer."""
    from transformers import GenerationConfig

    path, size = vision.directory / "preprocessor_config.json", config["vision_config"]["image_size"][0]
    own = read_json(path, ConversionError) if path.is_file() else {}
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 12,
        "size": {"height": size, "width": size},
        "resample": 3,
        "image_mean": own.get("image_mean", list(IMAGENET[0])),
        "image_std": own.get("image_std", list(IMAGENET[1])),
        **{f"do_{step}": True for step in ("convert_rgb", "resize", "rescale", "normalize")},
    }
    settings = {"processor_class": "InternVLProcessor", "image_seq_length": config["image_seq_length"]}
    for name, content in (("preprocessor_config.json", images), ("processor_config.json", settings)):
        (files / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.eos_token = CLOSE
    if tokenizer.pad_token is None or tokenizer.pad_token == CLOSE:
        tokenizer.pad_token = tokenizer.unk_token or "<video>"  # in no text of a run, unlike the end of a turn
    tokenizer.chat_template = PROMPTS[DEFAULT].jinja
    tokenizer.save_pretrained(files)
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids(CLOSE), "pad_token_id": tokenizer.pad_token_id}
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ends).save_pretrained(files)
