"""How Hugging Face's Qwen3-VL is run beside ours for ``convert verify``."""

from megatron_vlm.models.families.qwen2_5_vl.reference import Qwen25VLReference
from megatron_vlm.models.hf_reference import Probe


class Qwen3VLReference(Qwen25VLReference):
    """HF's side of a comparison: inputs and samples as of Qwen2.5-VL."""

    hf_class = "Qwen3VLForConditionalGeneration"

    @property
    def side(self) -> int:
        return 3

    def probes(self) -> list[Probe]:
        """Without the decoder's first layers: ours give levels beside hidden states, and have added the first of them."""
        levels = [f".decoder.layers.{i}" for i in range(self.config.text.deepstack)]
        return [probe for probe in super().probes() if not probe.ours.endswith(tuple(levels))]
