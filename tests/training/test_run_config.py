"""RunConfig: sections from plain data, and the checks that span them."""

from types import SimpleNamespace

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.options.resolve import resolve
from megatron_vlm.training.run_config import RunConfig


def config(**sections) -> RunConfig:
    """A run on the CPU that works, with some values changed."""
    data = {
        "data": {"train": ["t"], "seq_length": 64},
        "training": {"train_iters": 1, "device": "cpu", "global_batch_size": 8, "micro_batch_size": 2},
        "checkpoint": {"load": "model"},
    }
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    return RunConfig.from_dict(data)


def test_plain_data_goes_round():
    one = config(model={"freeze_llm": True}, logging={"output_dir": "out"})
    assert RunConfig.from_dict(one.to_dict()) == one
    assert one.model.freeze == ("llm",)
    assert not one.data.packing


def test_a_learning_rate_that_nobody_named_is_said(tmp_path):
    base = ["--load", "M", "--data-path", "D", "--seq-length", "64", "--train-iters", "1", "--device", "cpu"]
    said = "no learning rate is given: optimizer.lr is 0.0001, the default (--lr sets another)"
    (tmp_path / "run.yaml").write_text("optimizer: {lr: 1e-4}")
    assert resolve(base)[1] == [said]
    for more in (
        ["--lr", "1e-4"],
        ["optimizer.lr=1e-4"],
        ["--learning_rate", "1e-4"],
        ["--config", str(tmp_path / "run.yaml")],
    ):
        assert resolve([*base, *more])[1] == []
    assert resolve([*base, "--skip-train", "--valid-data-path", "V"])[1] == []


def test_output_dir_falls_back_to_save_and_then_to_the_name():
    assert str(config(logging={"output_dir": "o"}, checkpoint={"save": "s"}).output_dir) == "o"
    assert str(config(checkpoint={"save": "s"}).output_dir) == "s"
    assert str(config(logging={"name": "n"}).output_dir) == "runs/n"


def test_rows_are_filled_where_the_layout_needs_it():
    parallel = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
    assert (config().row_fill, config().row_multiple) == (0, 1)
    assert config(parallel=parallel).row_fill == 128
    assert config(parallel={"tensor_model_parallel_size": 4, "sequence_parallel": True}).row_multiple == 4


def test_world_gives_the_data_parallel_size():
    assert config(parallel={"tensor_model_parallel_size": 2}).check_world(4) == 2


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"checkpoint": {"load": None}}, "checkpoint.load is not set"),
        ({"data": {"train": []}}, "data.train is empty"),
        ({"data": {"packing": True}}, "micro_batch_size must be 1, got 2"),
        ({"training": {"train_iters": None}}, "no length"),
        ({"training": {"train_epochs": 1}}, "set one of"),
        ({"training": {"train_iters": 0}}, "train_iters must be above 0"),
        ({"training": {"precision": "fp16"}}, "fp16 does not run on the CPU"),
        ({"training": {"precision": "int8"}}, "training.precision must be one of fp32, bf16, fp16"),
        ({"training": {"skip_train": True}}, "data.valid is empty"),
        ({"parallel": {"accumulate_allreduce_grads_in_fp32": False}}, "no effect with training.precision fp32"),
        ({"parallel": {"context_parallel_exchange": "heads"}}, "no effect at context_parallel_size 1"),
        ({"parallel": {"context_parallel_size": 0}}, "context_parallel_size must be at least 1, got 0"),
        ({"parallel": {"sequence_parallel": True}}, "no effect at tensor_model_parallel_size 1"),
        ({"optimizer": {"loss_scale": 8.0}}, "loss_scale has no effect"),
        ({"logging": {"tensorboard": False, "tensorboard_dir": "t"}}, "tensorboard_dir has no effect"),
        ({"model": {"freeze_llms": True}}, "unknown config key 'model.freeze_llms' .did you mean 'freeze_llm'"),
    ],
)
def test_what_cannot_work_is_named(sections, named):
    with pytest.raises(ConfigError, match=named):
        config(**sections)


@pytest.mark.parametrize(
    ("parallel", "training", "world", "named"),
    [
        ({"tensor_model_parallel_size": 4}, {}, 6, "world size 6 is not a multiple of .* 4 x 1 = 4"),
        ({}, {"global_batch_size": 10}, 2, "global_batch_size 10 is not a multiple of .* = 4: set it to 12"),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
            {"global_batch_size": 6},
            2,
            "multiple of 2 microbatches per rank, got 3 .* multiple of 4",
        ),
    ],
)
def test_what_does_not_fit_the_world_is_named(parallel, training, world, named):
    with pytest.raises(ConfigError, match=named):
        config(parallel=parallel, training=training).check_world(world)


def test_rows_under_virtual_stages_and_sequence_parallelism_must_divide():
    parallel = {
        "tensor_model_parallel_size": 4,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 1,
    }
    with pytest.raises(ConfigError, match="rows of 66 tokens do not divide over the 4 ranks that split them"):
        config(parallel=parallel, data={"seq_length": 33}).check_world(8)


def test_packed_rows_must_divide_over_the_ranks_that_split_them():
    """Found with the sizes, so that a dry run finds it too."""
    run = config(
        parallel={"context_parallel_size": 2},
        data={"seq_length": 33, "packing": True},
        training={"micro_batch_size": 1},
    )
    with pytest.raises(ConfigError, match=r"rows of 33 tokens do not divide over the 2 ranks .*a multiple of 2"):
        run.check_world(2)


def test_sharing_images_has_no_effect_without_any():
    run = config(parallel={"context_parallel_size": 2, "vision_parallel": "tensor"})
    with pytest.raises(ConfigError, match="vision_parallel has no effect on a text model"):
        run.check_model(SimpleNamespace(text=SimpleNamespace(longest=1024)))


def test_recomputed_layers_leave_some_out():
    text = SimpleNamespace(max_position_embeddings=64, longest=64, rope_scaling=None, num_layers=4)
    run = config(parallel={"recompute_granularity": "full", "recompute_num_layers": 3})
    run.check_model(SimpleNamespace(text=text, vision=None))
    run = run.replace(parallel=run.parallel.replace(pipeline_model_parallel_size=2))
    with pytest.raises(ConfigError, match="recompute_num_layers 3 leaves no layer of a stage of 2 out"):
        run.check_model(SimpleNamespace(text=text, vision=None))


def test_heads_that_need_no_zeros_are_said():
    text = SimpleNamespace(longest=64)
    with pytest.raises(
        ConfigError, match="vision_head_multiple 8 has no effect on the tower's heads of 72: leave it out"
    ):
        config(model={"vision_head_multiple": 8}).check_model(
            SimpleNamespace(text=text, vision=SimpleNamespace(head_size=72))
        )


def test_samples_must_fit_the_positions():
    text = SimpleNamespace(longest=32)
    with pytest.raises(ConfigError, match="seq_length 64 is above the model's max_position_embeddings 32"):
        config().check_model(SimpleNamespace(text=text, vision=None))


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"freeze_vision": True}},
        {"model": {"freeze_connector": True}},
        {"optimizer": {"vision_lr": 1e-5}},
        {"optimizer": {"connector_lr": 1e-5}},
        {"parallel": {"recompute_granularity": "selective", "recompute_modules": ["tower"]}},
        {"model": {"vision_head_multiple": 96}},
        {"data": {"jpeg_scaled_decoding": True}},
    ],
)
def test_settings_of_a_tower_are_refused_for_a_text_model(sections):
    text = SimpleNamespace(longest=64)
    ((_, values),) = sections.items()
    name = list(values)[-1]
    config().check_model(SimpleNamespace(text=text))
    config(**sections).check_model(SimpleNamespace(text=text, vision=SimpleNamespace(head_size=72)))
    with pytest.raises(ConfigError, match=f"{name}.* has no effect on a text model"):
        config(**sections).check_model(SimpleNamespace(text=text))
