"""Makes a LLaVA out of a language model, a vision tower and, where there is one, a trained projector.

    InternLM2 (query, key and value taken apart), Llama, Mistral, Qwen2, Qwen3  --+
    CLIP or SigLIP vision tower  -------------------------------------------------+--> HFModel, as transformers'
    a trained projector, or a fresh one  -----------------------------------------+    LlavaForConditionalGeneration

Nothing is read until a converter asks for it. The non-weight files of the language model are kept in a folder ``xtuner``, so
that it can be written back in its own form.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.text.templates import IMAGE
from megatron_vlm.errors import ConversionError
from megatron_vlm.files import read_json
from megatron_vlm.models.assembling import (
    SAID_ONCE,
    NewRows,
    add_connector,
    check_names,
    copy_licences,
    copy_small_files,
    drawn,
    extend_vocabulary,
    new_ids,
    prefixed,
    with_biases,
)
from megatron_vlm.models.families.internlm2.llama import llama_config, llama_tensors
from megatron_vlm.models.families.llava_internlm2.config import SOURCE, LlavaModelConfig
from megatron_vlm.models.families.llava_internlm2.mapping import PROJECTOR, VISION, llava_mapping
from megatron_vlm.models.processing.pixels import CLIP, HALF
from megatron_vlm.models.processing.processor_files import special_tokens
from megatron_vlm.models.processing.template_processor import (
    TemplateProcessor,
    prompt_settings,
    write_tokenizer,
)
from megatron_vlm.weights.mapping import DerivedTensors, HFModel

FEATURE_LAYER = -2
PARTS = "xtuner"
_LINEARS = (("model.0", "model.2"), ("mm_projector.0", "mm_projector.2"))  # of XTuner's projector, of LLaVA's
_LEFT_OUT = (  # of a whole CLIP or SigLIP
    "text_model.", "visual_projection.", "text_projection.", "logit_", "vision_model.head.", "head.",
)  # fmt: skip
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # of a whole model, and of the tower alone


@dataclass(frozen=True, kw_only=True)
class AssembleOptions(Config):
    """How new parts are made.

    Attributes:
        seed: of everything drawn; each tensor has its own stream.
        new_rows: rows of the added ``<image>`` token: ``mean`` of the existing ones, or ``normal``: N(0, 0.02).
        template: prompt format, written as the model's chat template; None: the one that fits the vocabulary.
    """

    seed: int = 0
    new_rows: NewRows = "mean"
    template: str | None = None


def assemble(
    llm: HFModel, vision: HFModel, files: Path, settings: dict[str, Any], projector: HFModel | None = None
) -> HFModel:
    """Joins the parts; a projector that is not given is drawn N(0, 0.02), its biases zero.

    Args:
        llm: InternLM2ForCausalLM, or a model of Llama's shape.
        vision: CLIPVisionModel or SiglipVisionModel, or a whole model, of which the text tower is left out; SigLIP's pooling
            head too.
        files: empty folder that takes the non-weight files.
        settings: of AssembleOptions: how the new parts are made. They have the dtype of the LLM's embedding.
        projector: alone, under XTuner's names (``model.0.weight`` ...), LLaVA's or transformers', or a LLaVA that has it.

    Raises:
        ConversionError: a part is of another architecture, or has tensors missing, unknown or of a wrong shape.
    """
    options = AssembleOptions.from_dict(settings)
    readers, infos = prefixed(llama_tensors(llm), "language_model.")
    tower = _vision_config(vision)
    embedding, head = (f"language_model.{name}" for name in ("model.embed_tokens.weight", "lm_head.weight"))
    dtype, rows = infos[embedding].dtype, infos[embedding].shape[0]
    special = special_tokens(llm.directory)
    prompts = prompt_settings(
        llm.directory, DataConfig(seq_length=2, template=options.template), "llava_internlm2", rows
    )
    tokenizer = write_tokenizer(files, TemplateProcessor(**prompts), special, [IMAGE])
    image_token = tokenizer.convert_tokens_to_ids(IMAGE)
    before = () if prompts["tokenizer"].token_id(IMAGE) is None else (IMAGE,)
    new = new_ids([IMAGE], tokenizer, before, rows)
    total = max(rows, image_token + 1)
    config = _write_config(files, llm, tower, image_token, total, dtype)
    _write_processor_files(files, vision, tower)
    copy_small_files(llm.directory, files / PARTS)
    copy_licences(llm.directory, files)
    tied = config["tie_word_embeddings"]
    extend_vocabulary((readers, infos), (embedding, head), total, new, options.new_rows, options.seed, tied=tied)
    for name in vision.tensors.infos:
        target = VISION + name.removeprefix("vision_model.")
        if not name.startswith(_LEFT_OUT) and "position_ids" not in name:
            infos[target] = vision.tensors.infos[name]
            readers[target] = partial(vision.tensors.read, name)
    hidden, width = config["text_config"]["hidden_size"], tower["hidden_size"]
    shapes = with_biases({f"{PROJECTOR}linear_1": (hidden, width), f"{PROJECTOR}linear_2": (hidden, hidden)})
    add_connector((readers, infos), shapes, dtype, partial(drawn, seed=options.seed), projector, _LINEARS)
    mapping = llava_mapping(LlavaModelConfig.from_hf(config))
    parts = f"--llm {llm.directory} and --vision {vision.directory} do not make a LLaVA"
    check_names(mapping.hf_names(), infos.keys() - mapping.hf_tied.keys(), parts)
    sources = [part.tensors for part in (llm, vision, projector) if part is not None]
    return HFModel(directory=files, config=config, tensors=DerivedTensors(infos, readers, sources))


def _vision_config(vision: HFModel) -> dict[str, Any]:
    found = str(vision.config.get("model_type"))
    kind, whole = _TOWERS.get(found, found), found in _TOWERS
    if kind not in _TOWERS.values():
        raise ConversionError(f"--vision {vision.directory} has model_type {kind!r}, not a CLIP or SigLIP one")
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    classes = {"clip_vision_model": CLIPVisionConfig, "siglip_vision_model": SiglipVisionConfig}
    tower = vision.config.get("vision_config", {}) if whole else vision.config
    resolved = classes[kind].from_dict(dict(tower)).to_dict()
    head = {"vision_use_head": False} if kind == "siglip_vision_model" else {}
    return {key: value for key, value in resolved.items() if key not in SAID_ONCE} | head


def _write_config(
    files: Path, llm: HFModel, tower: dict[str, Any], image_token: int, rows: int, dtype: torch.dtype
) -> dict[str, Any]:
    kind = llm.config.get("model_type")
    text = llama_config(llm.config) if kind == "internlm2" else dict(llm.config)
    tied = bool(text.get("tie_word_embeddings", False))
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "image_seq_length": (tower["image_size"] // tower["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": _strategy(tower),
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "text_config": {key: value for key, value in text.items() if key not in SAID_ONCE} | {"vocab_size": rows},
        "vision_config": tower,
        SOURCE: {"model_type": kind, "vocab_size": text["vocab_size"]},
    }
    (files / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def _strategy(tower: dict[str, Any]) -> str:
    """transformers' word for the features that are used: without a class token all are."""
    return "full" if tower["model_type"] == "siglip_vision_model" else "default"


def _write_processor_files(files: Path, vision: HFModel, tower: dict[str, Any]) -> None:
    """Files of transformers' LlavaProcessor, which pads images to squares as LLaVA-1.5 and XTuner do."""
    path, side = vision.directory / "preprocessor_config.json", tower["image_size"]
    own = read_json(path, ConversionError) if path.is_file() else {}
    statistics = CLIP if _strategy(tower) == "default" else HALF
    images = {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_pad": True,
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": own.get("resample", 3),
        "rescale_factor": own.get("rescale_factor", 1 / 255),
        "image_mean": own.get("image_mean", list(statistics[0])),
        "image_std": own.get("image_std", list(statistics[1])),
        **{f"do_{step}": True for step in ("convert_rgb", "resize", "center_crop", "rescale", "normalize")},
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": tower["patch_size"],
        "vision_feature_select_strategy": _strategy(tower),
        "image_token": IMAGE,
        "num_additional_image_tokens": int(_strategy(tower) == "default"),
    }
    for name, content in (("preprocessor_config.json", images), ("processor_config.json", processor)):
        (files / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
