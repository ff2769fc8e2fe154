"""InternLM2's processor: conversations of text through a prompt template, tokenised without the model's own code."""

from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.data.config import DataConfig
from megatron_vlm.files import read_json
from megatron_vlm.models.processing.processor_files import check_image_settings
from megatron_vlm.models.processing.template_processor import TemplateProcessor, prompt_settings


@dataclass(frozen=True, kw_only=True)
class InternLM2Processor(TemplateProcessor):
    """Encodes conversations of text alone; a sample with images is left out, by reason."""

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "InternLM2Processor":
        """Reads the tokenizer of an HF folder.

        Raises:
            ConfigError: a file is missing, or a setting that cannot work.
        """
        check_image_settings(config, "InternLM2, which sees no images")
        hf_dir = Path(hf_dir)
        return cls(**prompt_settings(hf_dir, config, "internlm2", read_json(hf_dir / "config.json")["vocab_size"]))


def stop_ids(hf_dir: Path) -> tuple[int, ...]:
    """Ids that end an answer of a model with the tokenizer files of ``hf_dir``."""
    return InternLM2Processor.from_pretrained(hf_dir, DataConfig(seq_length=2)).stop_ids
