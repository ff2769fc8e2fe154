"""DeepSpeed files and FSDP options: what they become, what is refused, and what contradicts the command line."""

import json
import math
import re

import pytest

from megatron_vlm import registry
from megatron_vlm.errors import ConfigError
from megatron_vlm.options.flags import parse_flags
from megatron_vlm.options.request import read_request
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.training.optimizer.config import OptimizerConfig, Schedule

# As published with InternVL (zero_stage1_config.json), shortened by nothing.
INTERNVL_ZERO1 = {
    "zero_optimization": {
        "stage": 1, "allgather_partitions": True, "allgather_bucket_size": 1e9, "overlap_comm": True,
        "reduce_scatter": True, "reduce_bucket_size": 1e9, "contiguous_gradients": True,
    },
    "fp16": {
        "enabled": "auto", "auto_cast": True, "loss_scale": 0, "initial_scale_power": 32, "loss_scale_window": 1000,
        "hysteresis": 2, "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"}},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": True,
}  # fmt: skip


@pytest.fixture
def ask(tmp_path):
    """``ask(file or None, flags)``: the Request; the file's path stands for FILE in the flags."""

    def make(data, words="--deepspeed FILE", file=None):
        path = tmp_path / "ds.json"
        if data is not None:
            path.write_text(data if isinstance(data, str) else json.dumps(data))
        parsed = parse_flags([str(path) if word == "FILE" else word for word in words.split()], "launch")
        return read_request(file or {}, parsed.settings, parsed.notes)

    return make


def test_stage_1_is_the_distributed_optimizer(ask):
    request = ask(INTERNVL_ZERO1)
    assert request.run["parallel"] == {"data_parallel_sharding": "optimizer", "overlap_grad_reduce": True}
    assert request.run["optimizer"] == {"adam_eps": 1e-8, "adam_beta1": 0.9, "adam_beta2": 0.999}
    assert request.sharding_asked is None and "training" not in request.run
    (said, without) = request.notes
    assert "stage 1 is the distributed optimizer" in said
    assert "steps_per_print" in without and "zero_optimization.reduce_bucket_size" in without


def test_stage_0_shards_nothing(ask):
    request = ask({"zero_optimization": {"stage": 0}}, "--use_deepspeed True --deepspeed_config FILE")
    assert "parallel" not in request.run and request.sharding_asked is None and "no sharding" in request.notes[0]


def test_none_that_is_said_wins_over_the_file_of_the_run(ask):
    """A recipe shards and offloads; the options say that nothing is, or no offload."""
    both = {"parallel": {"data_parallel_sharding": "parameters", "offload": "optimizer"}}
    off = {"stage": 0, "offload_optimizer": {"device": "none"}}
    for file in (both, {"parallel": {"use_distributed_optimizer": True, "offload": "optimizer"}}):
        run = ask({"zero_optimization": off}, file=file).run
        assert run["parallel"] == {"data_parallel_sharding": "none", "offload": "none"}
    assert ask(None, "--fsdp no_shard", both).run["parallel"]["data_parallel_sharding"] == "none"
    request = ask({"zero_optimization": {**off, "stage": 3}}, file=both).complete({}, None, 1, keep_sharding=True)
    assert request.run["parallel"] == {"data_parallel_sharding": "parameters", "offload": "none"}
    request = ask({"zero_optimization": {"stage": 1}}, file=both)  # a key that is absent means none to DeepSpeed
    assert request.run["parallel"] == {"data_parallel_sharding": "optimizer", "offload": "none"}
    assert "parallel.offload optimizer of the config is left out" in request.notes[-1]
    with pytest.raises(ConfigError, match=r"asks for parallel\.data_parallel_sharding = none, .* says optimizer"):
        ask({"zero_optimization": off}, "--deepspeed FILE --use-distributed-optimizer")


def test_what_goes_with_a_recipes_sharding_goes_with_it(ask):
    shards = {"data_parallel_sharding": "parameters", "sharding_group_size": 2}
    for more in ({"offload": "optimizer+parameters"}, {"offload": "optimizer", "offload_fraction": 0.5}):
        recipe = {"parallel": {**shards, **more}}
        for data, words in [({"zero_optimization": {"stage": n}}, "--deepspeed FILE") for n in (0, 1, 3)] + [
            (None, "--fsdp no_shard"),
            (None, "--fsdp full_shard offload"),
        ]:
            request = ask(data, words, recipe)
            start = ParallelConfig.from_dict(request.run["parallel"])  # what the layout search starts with
            kept = request.complete({}, None, 1, keep_sharding=True).run["parallel"]
            assert start.offload == "none" and start.sharding_group_size is None
            assert ParallelConfig.from_dict(kept).offload == ("optimizer+parameters" if "offload" in words else "none")
            assert "sharding_group_size 2 of the config is left out" in "".join(request.notes)
    host = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert ask(host, file=recipe).run["parallel"]["offload_fraction"] == 0.5  # the same offload
    parallel = ask(host, "--deepspeed FILE --sharding-group-size 4", recipe).run["parallel"]
    assert parallel["sharding_group_size"] == "4"


def test_numbers_of_the_file_are_taken_where_the_command_line_says_nothing(ask):
    data = {
        "gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3,
        "train_batch_size": 24, "fp16": {"enabled": True, "initial_scale_power": 16, "hysteresis": 4, "loss_scale": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.8, 0.9], "weight_decay": 0.2}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": 7, "warmup_max_lr": 3e-4, "total_num_steps": "auto"},
        },
    }  # fmt: skip
    request = ask(data)
    assert request.run["optimizer"] == {
        "clip_grad": 0.5, "initial_loss_scale": 65536.0, "loss_scale_window": 1000, "hysteresis": 4, "min_loss_scale": 1,
        "lr": 3e-4, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 1e-8, "weight_decay": 0.2, "lr_decay_style": "linear",
        "lr_warmup_iters": 7, "lr_warmup_style": "log", "lr_warmup_init": 0.0, "min_lr": 0.0,
    }  # fmt: skip
    assert request.run["training"] == {"precision": "fp16", "global_batch_size": 24}
    assert (request.launch.per_device_train_batch_size, request.launch.gradient_accumulation_steps) == (2, 3)
    assert request.complete({}, registry.get("idefics2"), 4).run["training"]["micro_batch_size"] == 2
    with pytest.raises(ConfigError, match=r"global_batch_size 24 is not 2 per device x accumulation 3 x 8 .* = 48"):
        request.complete({}, registry.get("idefics2"), 8)


@pytest.mark.parametrize(
    ("data", "flags", "named"),
    [
        ({"gradient_clipping": 0.5}, "--max_grad_norm 1.0", "gradient_clipping is 0.5, but .* optimizer.clip_grad = 1.0"),
        ({"train_batch_size": 64}, "--global-batch-size 32", "train_batch_size is 64, but .* training.global_batch_size = 32"),
        ({"train_micro_batch_size_per_gpu": 4}, "--per_device_train_batch_size 2", "but --per_device_train_batch_size says 2"),
        ({"gradient_accumulation_steps": 4}, "--gradient_accumulation_steps 2", "is 4, but --gradient_accumulation_steps says 2"),
        ({"bf16": {"enabled": True}}, "--fp16 True", "bf16.enabled is bf16, but the command line says training.precision = fp16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "", "bf16 and fp16 are both enabled"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, "--learning_rate 2e-5", "lr is 1e-05, .* optimizer.lr = 2e"),
        ({"optimizer": {"type": "OneBitAdam"}}, "", "optimizer.type OneBitAdam is not built yet"),
        ({"scheduler": {"type": "OneCycle"}}, "", "scheduler.type OneCycle is not built yet"),
        ({"zero_optimization": {"stage": 4}}, "", "stage must be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": [1]}, "", "zero_optimization must be an object"),
        ({"gradient_clipping": "much"}, "", "gradient_clipping must be a number or auto, got 'much'"),
        ("{", "", "is not valid JSON"),
        ("[]", "", "must hold a JSON object, got list"),
        (None, "", "cannot read .*ds.json: No such file"),
        ({}, "--fsdp full_shard auto_wrap", "--deepspeed .*ds.json and --fsdp full_shard auto_wrap: both shard"),
        ({}, "--use_fsdp True", "both shard the model over the same ranks"),
    ],
)  # fmt: skip
def test_contradictions_are_errors_with_the_numbers(ask, data, flags, named):
    with pytest.raises(ConfigError, match=named):
        ask(data, f"--deepspeed FILE {flags}")


def curve(request, updates: int, total: int) -> list[float]:
    """Learning rates of the first updates of a run of ``total``."""
    config = OptimizerConfig.from_dict(request.run["optimizer"])
    schedule = Schedule.of(config, total)
    return [schedule.lr(step) for step in range(updates)]


def test_schedulers_follow_deepspeeds_formulas_and_defaults(ask):
    """Expected: min + (max - min) x log(1 + n) / log(N), or n / N, then the decay, by hand."""
    params = {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-3, "warmup_num_steps": 4}
    rise = [1e-4 + 9e-4 * math.log(n + 1) / math.log(4) for n in range(4)]
    found = curve(ask({"scheduler": {"type": "WarmupLR", "params": params}}), 7, 50)
    assert found == pytest.approx([*rise, 1e-3, 1e-3, 1e-3])
    straight = ask({"scheduler": {"type": "WarmupLR", "params": {**params, "warmup_type": "linear"}}})
    assert curve(straight, 6, 50) == pytest.approx([1e-4 + 9e-4 * min(1, n / 4) for n in range(6)])
    assert not any("warmup_type" in note for note in straight.notes)

    decay = {"type": "WarmupDecayLR", "params": {**params, "total_num_steps": 10}}
    assert curve(ask({"scheduler": decay}), 12, 50) == pytest.approx(
        [*rise, *(1e-4 + 9e-4 * (10 - n) / 6 for n in range(4, 10)), 1e-4, 1e-4]
    )
    shares = {"warmup_min_ratio": 0.1, "cos_min_ratio": 0.2, "warmup_num_steps": 4, "total_num_steps": 10}
    cosine = ask({"scheduler": {"type": "WarmupCosineLR", "params": shares}}, "--deepspeed FILE --learning_rate 1e-3")
    fall = [1e-3 * (0.2 + 0.8 * (1 + math.cos(math.pi * (n - 4) / 6)) / 2) for n in range(4, 11)]
    assert curve(cosine, 11, 50) == pytest.approx([*rise, *fall])

    # What is not written: 1,000 updates by a logarithm, 1e-3, a floor of 1e-4 of the rate.
    bare = ask({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 5000}}}).run["optimizer"]
    assert (bare["lr_warmup_iters"], bare["lr_warmup_style"], bare["lr"]) == (1000, "log", 1e-3)
    data = {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 5000}}}
    bare = ask(data, "--deepspeed FILE --learning_rate 2e-5").run["optimizer"]
    assert bare["min_lr"] == pytest.approx(2e-9) and bare["lr_warmup_start_factor"] == 0
    one = ask({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1}}}).run["optimizer"]
    assert one["lr_warmup_iters"] == 2
    auto = {"warmup_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto"}
    words = "--deepspeed FILE --learning_rate 2e-5 --warmup_ratio 0.1"
    mine = ask({"scheduler": {"type": "WarmupLR", "params": auto}}, words).run["optimizer"]
    assert (float(mine["lr_warmup_fraction"]), mine["lr_warmup_style"]) == (0.1, "log")


def test_what_a_file_leaves_out_is_deepspeeds_default(ask):
    """No clipping, no weight decay, a rate of 1e-3, a loss scale of 2^16; `auto` leaves each to the command line."""
    request = ask({"optimizer": {"type": "AdamW"}, "fp16": {"enabled": True}})
    assert request.run["optimizer"] == {
        "clip_grad": 0.0, "lr": 1e-3, "weight_decay": 0.0, "adam_eps": 1e-8, "adam_beta1": 0.9, "adam_beta2": 0.999,
        "initial_loss_scale": 2.0**16, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1,
    }  # fmt: skip
    words = "--deepspeed FILE --max_grad_norm 1.0 --weight_decay 0.1 --learning_rate 2e-5"
    auto = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "eps": "auto", "betas": "auto"}}
    request = ask({"gradient_clipping": "auto", "optimizer": auto}, words)
    assert {key: float(value) for key, value in request.run["optimizer"].items() if value is not None} == {
        "clip_grad": 1.0, "weight_decay": 0.1, "lr": 2e-5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "flags", "named"),
    [
        ({}, "--max_grad_norm 1.0", "gradient_clipping is not written, which means 0.0 to DeepSpeed, but .*clip_grad = 1.0"),
        ({"scheduler": {"type": "WarmupLR"}}, "--warmup_ratio 0.03", "warmup_num_steps is not written, which means 1000"),
        ({"scheduler": {"type": "WarmupLR"}}, "--warmup_steps 30", "warmup_num_steps is not written, which means 1000"),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "", "WarmupDecayLR needs params.total_num_steps"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cubic"}}}, "", "must be log or linear, got 'cubic'"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}, "", "at least 1, got 0"),
        ({"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}}, "", "add --learning_rate"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "", "adam_w_mode False is not built"),
        ({"amp": {"enabled": True}}, "", "amp is on, which is not built yet"),
        ({"curriculum_learning": {"enabled": True}}, "", "curriculum_learning is on"),
        ({"fp16": {"enabled": False}}, "--fp16 True", "fp16.enabled is false, but the command line says training.precision"),
    ],
)  # fmt: skip
def test_defaults_that_contradict_the_command_line(ask, data, flags, named):
    with pytest.raises(ConfigError, match=named):
        ask(data, f"--deepspeed FILE {flags}")


ZERO2 = {"zero_optimization": {"stage": 2}}
ZERO3 = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}}


@pytest.mark.parametrize(
    ("data", "flags", "named"),
    [
        (ZERO2, "--deepspeed FILE", "sharding of gradients .ZeRO stage 2"),
        (ZERO3, "--deepspeed FILE", "weights, gradients and optimizer state .* with offload of optimizer state to the host"),
        ({"zero_optimization": {"stage": 1, "cpu_offload": True}}, "--deepspeed FILE", "offload of optimizer state"),
        (None, "--use_deepspeed True", "sharding of gradients .* with offload of optimizer state"),
        (None, "--fsdp full_shard auto_wrap", "--fsdp full_shard auto_wrap asks for sharding of weights"),
        (None, "--use_fsdp True --fsdp_policy SHARD_GRAD_OP", "--use_fsdp SHARD_GRAD_OP asks for sharding of gradients"),
        (None, "--fsdp full_shard offload", "with offload of weights and optimizer state"),
        (None, "--use_fsdp", "--use_fsdp asks for sharding of weights"),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_kept_or_for_the_layout_search_to_do_without(ask, data, flags, named):
    request = ask(data, flags)
    assert re.search(named, request.sharding_asked)
    kept, notes = request.sharding.kept(adapts=False)
    words = {"weights, grad": "parameters", "of gradients": "gradients"}
    shared = next((kind for word, kind in words.items() if word in request.sharding_asked), None)
    assert kept.get("parallel.data_parallel_sharding") == shared
    both = "optimizer+parameters" if "weights and optimizer state" in named else "optimizer"
    assert kept.get("parallel.offload") == (both if "offload" in named else None) and len(notes) == 1
    parallel = request.complete({}, registry.get("idefics2"), 1).run["parallel"]
    assert parallel == {"data_parallel_sharding": "optimizer"}  # whoever asks: the search begins with the same
    parallel = request.complete({}, registry.get("idefics2"), 1, keep_sharding=True).run["parallel"]
    assert parallel["data_parallel_sharding" if shared else "offload"] == (shared or "optimizer")


@pytest.mark.parametrize(
    "name", ["deepspeed_zero1", "deepspeed_zero2_offload", "deepspeed_zero3", "zero3_offload", "zero2"]
)
def test_presets_have_names(name):
    from megatron_vlm.options.resolve import resolve

    config, notes = resolve(
        ["--load", "x", "--data-path", "y", "--deepspeed", name, "--train-iters", "1", "--seq-length", "8"]
    )
    shared = {"1": "optimizer", "2": "gradients", "3": "parameters"}[re.search(r"\d", name)[0]]
    assert config.parallel.data_parallel_sharding == shared and config.optimizer.clip_grad == 1.0
    offloads = {"deepspeed_zero2_offload": "optimizer", "zero3_offload": "optimizer+parameters"}
    assert config.parallel.offload == offloads.get(name, "none") and not any("stay" in note for note in notes)


def test_stage_2_has_nothing_to_shard_beside_adapters(ask):
    for flags, file in (("--use_lora True", None), ("", {"peft": {"target_modules": ["q_proj"]}})):
        request = ask(ZERO2, f"--deepspeed FILE {flags}", file)
        assert request.sharding_asked is None and request.run["parallel"]["data_parallel_sharding"] == "optimizer"
        assert len([note for note in request.notes if "nothing else has gradients" in note]) == 1
    assert ask(ZERO3, "--deepspeed FILE --use_lora True").sharding_asked is not None


@pytest.mark.parametrize(
    ("data", "flags", "named"),
    [
        (ZERO2, "--data-parallel-sharding parameters", "= gradients, but the command line says parameters"),
        (ZERO3, "--data-parallel-sharding optimizer", "= parameters, but the command line says optimizer"),
        (ZERO3, "--use-distributed-optimizer", "= parameters, but the command line says optimizer"),
        (ZERO3, "--offload none", "offload = optimizer, but the command line says none"),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, "--offload optimizer", "= none, .* says optimizer"),
        (None, "--fsdp full_shard --data-parallel-sharding gradients", "= parameters, but the command line says gradients"),
        (None, "--fsdp no_shard --data-parallel-sharding optimizer", "= none, but the command line says optimizer"),
        (None, "--fsdp full_shard offload --offload none", "= optimizer.parameters, but the command line says none"),
    ],
)  # fmt: skip
def test_the_command_lines_own_sharding_never_gives_way(ask, data, flags, named):
    with pytest.raises(ConfigError, match=named):
        ask(data, f"--deepspeed FILE {flags}" if data else flags)


def test_the_command_line_may_say_the_same_or_more(ask):
    for data, flags in (
        (ZERO3, "--deepspeed FILE --data-parallel-sharding parameters"),
        (ZERO2, "--deepspeed FILE --offload optimizer"),
        (None, "--fsdp full_shard --data-parallel-sharding parameters --offload optimizer"),
    ):
        request = ask(data, flags)
        assert request.sharding.named  # launch looks for no other
        parallel = request.complete({}, registry.get("idefics2"), 1, keep_sharding=True).run["parallel"]
        assert ("offload" in parallel) == ("offload" in flags or data is ZERO3)
        assert parallel["data_parallel_sharding"] == ("gradients" if data is ZERO2 else "parameters")
    assert not ask(ZERO3).sharding.named


def test_options_that_are_switched_off(ask):
    request = ask(None, "--use_deepspeed False --use_fsdp False --fsdp_policy FULL_SHARD --fsdp none --deepspeed none")
    assert request.sharding_asked is None and "parallel" not in request.run
    assert ask(None, "--fsdp no_shard").sharding_asked is None
    assert not any("adapters" in note for note in ask(ZERO2).notes)


def test_a_schedule_of_the_command_line_replaces_the_files(ask):
    request = ask({"scheduler": {"type": "WarmupLR"}}, "--deepspeed FILE --lr_scheduler_type cosine")
    assert request.run["optimizer"]["lr_decay_style"] == "cosine"
    assert "scheduler WarmupLR, as --lr_scheduler_type is given" in request.notes[-1]


def test_what_offload_leaves_out_is_said(ask):
    part = ask({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.25}}})
    assert "zero_optimization.offload_optimizer.ratio" in "".join(part.notes)
    weights = ask({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    kept, notes = weights.sharding.kept(adapts=False)
    both = {"parallel.data_parallel_sharding": "parameters", "parallel.offload": "optimizer+parameters"}
    assert kept == both and "the optimizer goes to the host with the weights" in notes[0]
    kept, notes = ask(None, "--fsdp shard_grad_op offload").sharding.kept(adapts=False)
    assert kept["parallel.offload"] == "optimizer" and "weights stay on the device" in notes[0]
    with pytest.raises(ConfigError, match=r"offload_param.device nvme is not built yet; use cpu"):
        ask({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}})
