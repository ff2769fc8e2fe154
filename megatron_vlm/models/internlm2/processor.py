"""InternLM2's processor: conversations of text through a prompt template, tokenised without the model's own code."""

from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.processor_files import read_json
from megatron_vlm.models.template_processor import TemplateProcessor, prompt_settings


@dataclass(frozen=True, kw_only=True)
class InternLM2Processor(TemplateProcessor):
    """Encodes conversations of text alone; a sample with images is left out, by reason."""

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "InternLM2Processor":
        """Reads the tokenizer of an HF folder.

        Raises:
            ConfigError: a file is missing, or a setting that cannot work.
        """
        for name in ("image_size", "shortest_edge", "image_splitting", "max_image_num"):
            if getattr(config, name) is not None:
                raise ConfigError(f"data.{name} has no effect on InternLM2, which sees no images: leave it out")
        hf_dir = Path(hf_dir)
        return cls(**prompt_settings(hf_dir, config, "internlm2", read_json(hf_dir / "config.json")["vocab_size"]))
