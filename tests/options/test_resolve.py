"""The run that a command line of `train` means."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.options.request import read_request
from megatron_vlm.options.resolve import resolve


def test_train_takes_the_same_flags_but_no_raw_data(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = "--load x --data-path y --max_length 64 --max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 3"
    config, _ = resolve([*words.split(), "--output_dir", "o", "--save_steps", "1", "--device", "cpu"])
    assert (config.training.micro_batch_size, config.training.global_batch_size) == (2, 24)  # 2 x 3 x 4
    assert config.checkpoint.save == "o" and config.data.train == ("y",)
    for words in ("--meta_path m", "--train_json t", "--save_merged_model", "--master_port 1"):
        with pytest.raises(ConfigError, match="belongs to `megatron-vlm launch`"):
            resolve(words.split())
    with pytest.raises(ConfigError, match="section launch is for"):
        read_request({"launch": {"no_launch": True}}, [], command="train")


def test_a_model_has_to_be_named_where_its_recipe_is_wanted():
    with pytest.raises(ConfigError, match="no model is named: --model_name_or_path DIR"):
        resolve(["--use_lora", "True", "--data-path", "y", "--max_length", "64"])


def test_validation_on_training_data_is_told(tmp_path):
    same = f"{tmp_path}/../{tmp_path.name}"
    words = f"--load x --data-path {tmp_path} --valid-data-path {same} --seq-length 8 --device cpu --train-iters 1"
    _, notes = resolve([*words.split(), "--eval-interval", "1"])
    assert any(
        str(tmp_path) in note and "is trained on: its loss is not that of held-out data" in note for note in notes
    )
