"""megatron_vlm: vision-language models from a Hugging Face checkpoint to a Hugging Face checkpoint, trained with megatron-core."""

__version__ = "0.1.0"
