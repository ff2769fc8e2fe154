"""Decoder layers of each stage by the settings, and what they refuse."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.parallel.config import ParallelConfig


def of(pp=4, **settings) -> ParallelConfig:
    return ParallelConfig(pipeline_model_parallel_size=pp, **settings)


@pytest.mark.parametrize("settings, layers", [
    ({}, (7, 7, 7, 7)),
    ({"pp": 8}, (3, 4, 4, 4, 4, 3, 3, 3)),
    ({"decoder_layers_per_stage": (0, 9, 10, 9)}, (0, 9, 10, 9)),
    ({"decoder_first_pipeline_num_layers": 4}, (4, 8, 8, 8)),
    ({"decoder_first_pipeline_num_layers": 4, "decoder_last_pipeline_num_layers": 6}, (4, 9, 9, 6)),
    ({"num_layers_per_virtual_pipeline_stage": 7}, (7, 7, 7, 7)),
    ({"pp": 2, "num_layers_per_virtual_pipeline_stage": 7}, (7, 7, 7, 7)),
    ({"pp": 2, "decoder_layers_per_stage": (1, 9, 9, 9)}, (1, 9, 9, 9)),
    ({"decoder_layers_per_stage": "auto"}, (7, 7, 7, 7)),  # until the model is known: training/balance.py
])  # fmt: skip
def test_layers_of_each_stage(settings, layers):
    config = of(**settings)
    assert config.stage_layers(28) == layers
    assert config.virtual_size(28) == len(layers) // config.pipeline_model_parallel_size
    assert config.virtual is (len(layers) > config.pipeline_model_parallel_size or "num_layers" in str(settings)[:14])


@pytest.mark.parametrize("settings, wanted", [
    ({"decoder_layers_per_stage": (7, 7, 7)}, "must be one number of layers, 0 or more, for each of 4 stages"),
    ({"decoder_layers_per_stage": (8, -1, 10, 11)}, "0 or more"),
    ({"decoder_layers_per_stage": (0, 0, 14, 14)}, "stage 1 nothing to do: tower and connector are whole on the first stage"),
    ({"decoder_layers_per_stage": (7, 7, 7, 8)}, r"\[7, 7, 7, 8\] are 29 layers, but the decoder has 28"),
    ({"pp": 1, "decoder_layers_per_stage": "auto"}, "no effect at pipeline_model_parallel_size 1"),
    ({"pp": 1, "decoder_last_pipeline_num_layers": 3}, "decoder_last_pipeline_num_layers has no effect"),
    ({"decoder_layers_per_stage": (7,) * 4, "num_layers_per_virtual_pipeline_stage": 7}, "both say it"),
    ({"decoder_layers_per_stage": (7,) * 4, "decoder_first_pipeline_num_layers": 7}, "both say it"),
    ({"decoder_first_pipeline_num_layers": -1}, "decoder_first_pipeline_num_layers must be 0 or more, got -1"),
    ({"decoder_first_pipeline_num_layers": 30}, "30 layers on the first pipeline stage and 0 on the last leave -2"),
    ({"num_layers_per_virtual_pipeline_stage": 3}, "28 decoder layers do not divide over 4 pipeline stages"),
    ({"pp": 32}, "28 decoder layers for pipeline_model_parallel_size 32"),
])  # fmt: skip
def test_what_does_not_give_the_layers_is_refused(settings, wanted):
    with pytest.raises(ConfigError, match=wanted):
        of(**settings).stage_layers(28)


@pytest.mark.parametrize("settings, wanted", [
    ({"recompute_num_layers": 2}, "recompute_num_layers 2 must be at least 1, and goes with .* full, got None"),
    ({"recompute_granularity": "full", "recompute_num_layers": 0}, "must be at least 1"),
    ({"recompute_granularity": "full", "recompute_modules": ("mlp",)}, "recompute_modules mlp needs .* selective"),
    ({"recompute_granularity": "selective", "recompute_modules": ("mlp", "mlp")}, "names one twice: mlp, mlp"),
    ({"offload_fraction": 0.5}, "goes with offload optimizer, got 0.5 and none"),
    ({"offload": "optimizer", "offload_fraction": 0.0}, "must be above 0 and at most 1"),
    ({"offload": "optimizer+parameters"}, "goes with data_parallel_sharding parameters, on one rank too, .* got none"),
])  # fmt: skip
def test_recomputation_and_offload_without_effect_is_refused(settings, wanted):
    with pytest.raises(ConfigError, match=wanted):
        of(pp=1, **settings)


def test_the_old_name_of_the_distributed_optimizer():
    def sharding(**data):
        return ParallelConfig.from_dict(data, "parallel").data_parallel_sharding

    assert [sharding(use_distributed_optimizer=value) for value in (True, "true", False)] == [
        "optimizer",
        "optimizer",
        "none",
    ]
    assert sharding(use_distributed_optimizer=True, data_parallel_sharding="parameters") == "parameters"
    for old, new in ((True, "none"), (False, "optimizer")):
        with pytest.raises(ConfigError, match=rf"use_distributed_optimizer true is .*got {old} beside {new}: leave it"):
            sharding(use_distributed_optimizer=old, data_parallel_sharding=new)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (
            dict(pipeline_model_parallel_size=2),
            r"size 2 is not built: .*sharding optimizer, or .*parallel_size 2 where",
        ),
        (dict(ddp_bucket_size=100), "ddp_bucket_size has no effect"),
    ],
)
def test_what_does_not_go_with_sharded_parameters(settings, wanted):
    with pytest.raises(ConfigError, match=wanted):
        ParallelConfig(data_parallel_sharding="parameters", **settings)


@pytest.mark.parametrize(
    ("host", "wanted"),
    [("optimizer+parameters", "optimizer and offload optimizer, or pipeline"), ("optimizer", "optimizer, or pipeline")],
)
def test_what_stands_in_for_shards_over_stages_is_taken(host, wanted):
    asked = dict(pipeline_model_parallel_size=2, data_parallel_sharding="parameters", offload=host)
    with pytest.raises(ConfigError, match=f"Set data_parallel_sharding {wanted}"):
        ParallelConfig(**asked)
    ParallelConfig(**{**asked, "data_parallel_sharding": "optimizer", "offload": "optimizer"})
    ParallelConfig(**{**asked, "pipeline_model_parallel_size": 1, "tensor_model_parallel_size": 2})


def test_sharding_groups_divide_the_ranks():
    config = ParallelConfig(data_parallel_sharding="parameters", sharding_group_size=4, tensor_model_parallel_size=2)
    assert config.grid(16).dp == 8
    with pytest.raises(ConfigError, match=r"sharding_group_size 4 does not divide the 6 ranks"):
        config.grid(12)
    with pytest.raises(ConfigError, match=r"at least 2, and goes with .* got optimizer"):
        ParallelConfig(data_parallel_sharding="optimizer", sharding_group_size=2)


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            dict(vision_parallel="share", pipeline_model_parallel_size=2),
            "share has no effect on one rank: .* raise tensor",
        ),
        (dict(vision_parallel="ahead"), "ahead has no effect on one rank: .* or pipeline_model_parallel_size"),
        (
            dict(vision_parallel="ahead", tensor_model_parallel_size=2, data_parallel_sharding="parameters"),
            "vision_parallel ahead is not built: .* set vision_parallel share",
        ),
    ],
)
def test_ways_to_deal_images_that_are_not_there(settings, words):
    with pytest.raises(ConfigError, match=words):
        ParallelConfig(**settings)


def test_axes_that_images_are_dealt_over():
    sizes = dict(tensor_model_parallel_size=2, context_parallel_size=3, pipeline_model_parallel_size=5)
    found = {way: ParallelConfig(vision_parallel=way, **sizes) for way in ("tensor", "auto", "share", "ahead")}
    assert {way: config.image_ranks for way, config in found.items()} == dict(tensor=1, auto=3, share=6, ahead=30)
