"""Gemma 3's decoder read from transformers' config: what is not built is refused by name."""

import pytest
from transformers import Gemma3TextConfig

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.parts.gemma import gemma3_text_config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not built"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not built"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not built"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True is not built"),
        ({"attention_bias": True}, "attention_bias True is not built"),
    ],
)
def test_what_is_not_built_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        gemma3_text_config(Gemma3TextConfig(num_hidden_layers=2, **change), True)


def test_layers_and_their_rope():
    text = gemma3_text_config(Gemma3TextConfig(num_hidden_layers=12, query_pre_attn_scalar=168), False)
    assert text.full_layers == (5, 11) and (text.rotary_base, text.local_rotary_base) == (1e6, 1e4)
    assert text.attention_scale == 168**-0.5 and text.embedding_scale == text.hidden_size**0.5
