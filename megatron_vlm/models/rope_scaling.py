"""Positions stretched by a setting: the config.json that says so, as transformers reads it.

config.json + model.rope_scaling --scaled_config--> config.json of the run, its checkpoints and its exports
"""

import copy
import math
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.rope import RopeScaling
from megatron_vlm.models.hf_config import section
from megatron_vlm.models.parts.decoder import TextConfig


def scaled_config(hf_config: dict[str, Any], text: TextConfig, setting: RopeScaling, seq_length: int) -> dict[str, Any]:
    """The content of config.json with RoPE scaled as ``setting`` says; as it is where it says so already.

    Args:
        hf_config: content of config.json.
        text: the decoder that it tells of.
        setting: ``model.rope_scaling``.
        seq_length: of the rows, which a setting without a factor is made for.

    Raises:
        ConfigError: the setting has no effect, or the positions that the model was trained on are not known.
    """
    if text.local_rotary_base is not None:
        raise ConfigError(
            "model.rope_scaling is not built for a decoder whose layers with and without a window have RoPE of their own: leave "
            "it out, and write it into text_config of config.json"
        )
    now, positions = text.rope_scaling, text.max_position_embeddings
    asked = {name: value for name, value in setting.to_dict().items() if value is not None}
    if now is not None and asked.items() <= now.to_dict().items() and ("factor" in asked or seq_length <= text.longest):
        return hf_config
    original = setting.original_max_position_embeddings or (now and now.original_max_position_embeddings)
    if original is None and now is not None and now.rope_type == "linear":
        raise ConfigError(
            f"the model's RoPE is scaled already (linear, factor {now.factor:g}), and config.json does not say how many "
            "positions it was trained on before: set model.rope_scaling.original_max_position_embeddings"
        )
    original = original or positions
    factor = setting.factor or max(1.0, float(math.ceil(seq_length / original)))
    if setting.factor is None and factor == 1:
        raise ConfigError(
            f"model.rope_scaling has no effect: data.seq_length {seq_length} is within the {original} positions that the model "
            "was trained on; leave it out, or give it a factor"
        )
    scaling: dict[str, Any] = {"type": setting.rope_type, "factor": factor}
    if setting.rope_type in ("yarn", "llama3"):  # of the others, code that is not transformers' wants these keys alone
        scaling = {**asked, **scaling, "original_max_position_embeddings": original}
    if setting.rope_type == "llama3":
        scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **scaling}
    config = copy.deepcopy(hf_config)
    # A section goes before the same keys beside it, which older versions of transformers wrote too.
    name = next((name for name in ("llm_config", "text_config") if config.get(name)), "text_config")
    decoder = config if "num_hidden_layers" in config and not config.get(name) else section(config, name)
    if decoder is not config:
        config[name] = decoder
    decoder.pop("rope_parameters", None)
    stretched = original if setting.rope_type == "dynamic" else int(original * factor)
    decoder |= {"rope_theta": text.rotary_base, "rope_scaling": scaling, "max_position_embeddings": stretched}
    return config
