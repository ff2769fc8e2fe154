"""megatron_vlm: vision-language models from one Hugging Face checkpoint to the next, trained with megatron-core."""

__version__ = "0.1.0"
