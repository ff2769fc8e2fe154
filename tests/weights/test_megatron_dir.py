"""Which stage stores what, and manifests that are not read."""

import json

import pytest

from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.weights.megatron_dir import Stages, rank_file, read_manifest

DECODER = "language_model.decoder."
NAMES = [
    "language_model.embedding.word_embeddings.weight", *(f"{DECODER}layers.{i}.mlp.weight" for i in range(6)),
    f"{DECODER}final_layernorm.weight", "language_model.output_layer.weight", "vision_model.x", "connector.y",
]  # fmt: skip


def test_stages():
    stages = Stages(NAMES, 3)
    assert stages.num_layers == 6
    assert [stages.of(name) for name in NAMES] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 0]
    assert {Stages(NAMES, 1).of(name) for name in NAMES} == {0}
    for pp in (0, 12):
        with pytest.raises(ConfigError, match=f"pipeline parallel size {pp} for 6 decoder layers: use 1 to 6"):
            Stages(NAMES, pp)
    assert rank_file(3, 12) == "mp_rank_03_012/model.safetensors"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "says format None version None"),
        ({"format": "megatron_vlm", "version": 2}, "version 2; this program reads 'megatron_vlm' version 1"),
        ({"format": "megatron_vlm", "version": 1, "family": "idefics2"}, r"megatron\.json"),
    ],
)
def test_manifests_of_other_formats(tmp_path, data, message):
    (tmp_path / "megatron.json").write_text(json.dumps(data))
    with pytest.raises(ConversionError, match=message):
        read_manifest(tmp_path)
