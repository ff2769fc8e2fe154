"""LLaVA in XTuner's folders: the language model in its own form, ``visual_encoder/`` and ``projector/`` beside it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConversionError
from megatron_vlm.files import read_bytes
from megatron_vlm.models.assembling import copy_small_files
from megatron_vlm.models.families.internlm2.mapping import internlm2_entries
from megatron_vlm.models.families.llava_internlm2.assemble import PARTS
from megatron_vlm.models.families.llava_internlm2.config import LlavaModelConfig
from megatron_vlm.models.parts.clip import clip_entries
from megatron_vlm.models.parts.decoder import llama_entries
from megatron_vlm.models.parts.projector import projector_entries
from megatron_vlm.models.processing.processor_files import processor_settings
from megatron_vlm.weights.mapping import Entry, Mapping

VISION, PROJECTOR = "visual_encoder", "projector"
_TOKENIZER = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "chat_template",
    "generation_config",
    "vocab",
    "merges",
)


def find_parts(directory: Path) -> dict[str, Path] | None:
    """The parts of a folder that XTuner wrote after training them all; None: it is another folder.

    Raises:
        ConversionError: XTuner wrote adapters (see peft/adapter_folders.py), or left out a part that was not trained.
    """
    if not (directory / PROJECTOR / "config.json").is_file():
        return None
    adapters = [name for name in ("llm_adapter", "visual_encoder_adapter") if (directory / name).is_dir()]
    if adapters:
        raise ConversionError(
            f"{directory} holds adapters ({', '.join(adapters)}): make one model of those they were trained on (hf2mg with "
            f"--llm and --vision, then mg2hf), and merge them into it (convert merge --base DIR --adapter {directory})"
        )
    parts = {"llm": directory, "vision": directory / VISION}
    absent = [f"--{part}" for part, path in parts.items() if not (path / "config.json").is_file()]
    if absent:
        raise ConversionError(
            f"{directory} has a projector and not everything else: XTuner leaves out what it did not train. Give "
            f"--llm DIR --vision DIR --projector {directory / PROJECTOR} (absent here: {', '.join(absent)})"
        )
    return {**parts, "projector": directory / PROJECTOR}


def xtuner_mapping(config: LlavaModelConfig) -> Mapping:
    """The family's full tensors under the names of XTuner's folders; the row of ``<image>`` stays behind."""
    text = config.text
    fused = config.source_type == "internlm2"
    language = internlm2_entries(text) if fused else llama_entries(text)
    entries = [
        *clip_entries(config.vision, 1, f"{VISION}/vision_model."),
        *projector_entries("connector.", [f"{PROJECTOR}/model.0", f"{PROJECTOR}/model.2"]),
        *(_without_added_rows(entry, config.source_vocab_size) for entry in language),
    ]
    return Mapping(entries=tuple(entries), vocab_size=text.vocab_size, hf_aliases=_file_name)


def _file_name(name: str) -> str:
    """The tower's tensors carry a prefix that transformers 5 has no more."""
    tower = f"{VISION}/"
    if name.startswith(tower) and not name.startswith(f"{tower}vision_model."):
        return f"{tower}vision_model.{name.removeprefix(tower)}"
    return name


def write_xtuner_files(hf_dir: Path, hf_config: dict[str, Any], directory: Path) -> None:
    """Writes config, tokenizer and processor files of the three folders."""
    config = LlavaModelConfig.from_hf(hf_config)
    if config.vision.siglip:
        raise ConversionError(
            "XTuner's folders hold a CLIP tower, this model's is SigLIP: export it as native LLaVA (--as hf)"
        )
    dtype = {key: value for key, value in hf_config.items() if key in ("torch_dtype", "dtype")}
    if (hf_dir / PARTS).is_dir():
        copy_small_files(hf_dir / PARTS, directory)
    else:
        text = {**hf_config["text_config"], **dtype, "tie_word_embeddings": config.text.tie_word_embeddings}
        _write(directory / "config.json", {"architectures": ["LlamaForCausalLM"], **text})
        for path in hf_dir.iterdir():
            if path.name.startswith(_TOKENIZER):
                (directory / path.name).write_bytes(read_bytes(path, ConversionError))
    tower = {**hf_config["vision_config"], "model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    _write(directory / VISION / "config.json", {**tower, **dtype})
    _, images = processor_settings(hf_dir)
    left_out = ("image_processor_type", "processor_class", "do_pad")  # XTuner's loader pads before it calls CLIP's
    images = {key: value for key, value in images.items() if key not in left_out}
    images = {"image_processor_type": "CLIPImageProcessor", **images}
    _write(directory / VISION / "preprocessor_config.json", images)
    projector = {
        "architectures": ["ProjectorModel"],
        "model_type": "projector",
        "visual_hidden_size": config.vision.hidden_size,
        "llm_hidden_size": config.text.hidden_size,
        "depth": 2,
        "hidden_act": "gelu",
        "bias": True,
    }
    _write(directory / PROJECTOR / "config.json", {**projector, **dtype})


def _without_added_rows(entry: Entry, rows: int) -> Entry:
    if not entry.split.pads:
        return entry
    return dataclasses.replace(entry, from_full=lambda full: [full[:rows]], end_to_end=False)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
