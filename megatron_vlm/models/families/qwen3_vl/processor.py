"""Qwen3-VL's processor: prompts, image tokens, pixels and positions equal to those of transformers' ``Qwen3VLProcessor``."""

from pathlib import Path

from megatron_vlm.data.config import DataConfig
from megatron_vlm.models.families.qwen3_vl.config import Qwen3VLConfig
from megatron_vlm.models.processing.qwen_vl import QwenKind, QwenVLProcessor, processor_fields, tokens_of

KIND = QwenKind(
    name="Qwen3-VL",
    family="qwen3_vl",
    system="",
    config=Qwen3VLConfig.from_hf,
)


class Qwen3VLProcessor(QwenVLProcessor):
    """Encodes samples for Qwen3-VL."""

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "Qwen3VLProcessor":
        """Reads an HF folder; errors as of ``processor_fields``."""
        return cls(**processor_fields(Path(hf_dir), config, KIND))


def stop_ids(hf_dir: Path) -> tuple[int, ...]:
    """Ids that end an answer of a model with the tokenizer files of ``hf_dir``."""
    return tokens_of(hf_dir, KIND)["stop_ids"]
