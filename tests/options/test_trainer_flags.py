"""Flags of transformers' Trainer: one by one, and where two speak of one thing."""

import pytest

from megatron_vlm import registry
from megatron_vlm.errors import ConfigError
from tests.launch.commands import VL, request_of, resolve


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--bf16 True", {"precision": "bf16"}),
        ("--bf16", {"precision": "bf16"}),
        ("--bf16 False --fp16 False", {"precision": "fp32"}),
        ("--tf32 True", {"precision": "bf16"}),
        ("--bf16 False --tf32 True", {"precision": "fp32", "tf32": True}),
        ("--max_steps -1 --num_train_epochs 3", {"train_epochs": 3.0, "train_iters": None}),
        ("--max_steps 7", {"train_epochs": None, "train_iters": 7}),
        ("--eval_strategy epoch --eval_data_path e", {"eval_epochs": 1.0}),
        ("--evaluation_strategy steps --logging_steps 3 --eval_data_path e", {"eval_interval": 3}),
        ("--do_train False --do_eval True --eval_data_path e", {"skip_train": True}),
    ],
)
def test_the_trainers_flags_set_section_training(words, told):
    training = resolve(f"--model_name_or_path M {words}", VL)[0].training
    assert {name: getattr(training, name) for name in told} == told


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--lr_scheduler_type constant --warmup_ratio 0.1", "optimizer.lr_warmup_fraction", None),
        ("--lr_scheduler_type constant_with_warmup --warmup_steps 5", "optimizer.lr_warmup_iters", 5),
        ("--warmup_ratio 0.1 --warmup_steps 5", "optimizer.lr_warmup_fraction", None),
        ("--save_steps 50", "checkpoint.save_interval", 50),
        ("--save_strategy steps", "checkpoint.save_interval", 500),
        ("--save_strategy no", "checkpoint.save_interval", None),
        ("--report_to wandb tensorboard", "logging.tensorboard", True),
        ("--report_to none", "logging.tensorboard", False),
        ("--gradient_checkpointing False", "parallel.recompute_granularity", None),
        ("--dataloader-num-workers 7", "data.num_workers", 7),
        ("--recompute-activations", "parallel.recompute_granularity", "selective"),
        (
            "--recompute-modules core_attn layernorm mlp",
            "parallel.recompute_modules",
            ["core_attention", "norm", "mlp"],
        ),
        ("--recompute-method block --recompute-num-layers 3", "parallel.recompute_num_layers", 3),
        ("--recompute-method uniform --recompute-num-layers 1", "parallel.recompute_num_layers", None),
        ("--load_in_4bit True --use_lora", "peft.quantize", "nf4"),
        ("--packing", "data.packing", True),
    ],
)
def test_the_trainers_flags_set_other_sections(words, key, value):
    section, name = key.split(".")
    request = request_of(f"--model_name_or_path M --output_dir o {words}")
    found = request.complete(VL, registry.get("xcomposer2"), 1).run[section].get(name)
    assert found == value or str(found) == str(value)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--recompute-method uniform --recompute-num-layers 2", "chunks of several layers are not built yet"),
        ("--recompute-method other", "must be uniform or block, got other"),
        ("--bnb_4bit_compute_dtype float16 --bf16 True", "compute_dtype float16: this run computes in bf16"),
    ],
)
def test_what_is_not_built(words, named):
    with pytest.raises(ConfigError, match=named):
        resolve(f"--model_name_or_path M {words}", VL)
