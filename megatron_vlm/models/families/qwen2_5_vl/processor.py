"""Qwen2.5-VL's processor: prompts, image tokens, pixels and positions equal to those of transformers' ``Qwen2_5_VLProcessor``."""

from pathlib import Path

from megatron_vlm.data.config import DataConfig
from megatron_vlm.models.families.qwen2_5_vl.config import Qwen25VLConfig
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.processing.processor_files import read_json
from megatron_vlm.models.processing.qwen_vl import (
    PAIR,
    QwenKind,
    QwenVLProcessor,
    processor_fields,
    tokens_of,
)
from megatron_vlm.models.processing.qwen_vl import video_settings as video_settings

KIND = QwenKind(
    name="Qwen2.5-VL",
    family="qwen2_5_vl",
    system="You are a helpful assistant.",
    config=Qwen25VLConfig.from_hf,
    videos=True,
)


class Qwen25VLProcessor(QwenVLProcessor):
    """Encodes samples for Qwen2.5-VL."""

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "Qwen25VLProcessor":
        """Reads an HF folder; errors as of ``processor_fields``."""
        hf_dir = Path(hf_dir)
        model = Qwen25VLConfig.from_hf(read_json(hf_dir / "config.json"))
        require(f"{hf_dir}: temporal_patch_size", model.vision.temporal_patch_size, PAIR)
        return cls(
            **processor_fields(hf_dir, config, KIND),
            video_token_id=model.video_token_id,
            tokens_per_second=model.tokens_per_second,
        )


def stop_ids(hf_dir: Path) -> tuple[int, ...]:
    """Ids that end an answer of a model with the tokenizer files of ``hf_dir``."""
    return tokens_of(hf_dir, KIND)["stop_ids"]
