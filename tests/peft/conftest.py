"""Twins that tests of names share."""

import pytest

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2
from megatron_vlm.testing.twins.internvl3 import write_chat_layout, write_tiny_internvl3
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_llava, write_tiny_llava_internlm2
from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """Name -> (HF model or None, WeightSource), written when first asked for."""
    made = {}

    def chat(directory):
        model = write_tiny_internvl3(directory / "hf")
        write_chat_layout(directory / "chat", model)
        return directory / "chat"

    writers = {
        "idefics2": write_tiny_idefics2,
        "tied": lambda d: write_tiny_idefics2(d, text="llama", tie=True),
        "one_kv_head": lambda d: write_tiny_idefics2(d, text="llama", kv_heads=2, perceiver_kv_heads=1),
        "internvl3": write_tiny_internvl3,
        "chat": chat,
        "llava": write_tiny_llava,
        "llava_internlm2": write_tiny_llava_internlm2,
        "internlm2": write_tiny_internlm2,
        "xcomposer2": lambda d: write_tiny_xcomposer2(d, variant="7b"),
    }

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            model = writers[name](directory)
            made[name] = model, open_source(model if name == "chat" else directory)
        return made[name]

    yield make
    for _, source in made.values():
        source.close()
