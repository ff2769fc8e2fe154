"""The original programs' whole commands, their program's name changed: what they resolve to, worked out by hand."""

import dataclasses
import json
import re

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.options.launch_config import LaunchConfig
from megatron_vlm.options.request import read_command
from megatron_vlm.parallel.config import ParallelConfig
from tests.launch.commands import (
    CHAT,
    FINETUNE,
    FINETUNE_LORA,
    FT_EVERY_OPTION,
    HD,
    INTERNVL3,
    MEGATRON,
    NATIVE,
    VL,
    request_of,
    resolve,
)

WQKV = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


def differences(config, default, prefix="") -> dict[str, object]:
    """Fields that are not at their default, by dotted name."""
    found = {}
    for item in dataclasses.fields(config):
        value, usual = getattr(config, item.name), getattr(default, item.name, None)
        if dataclasses.is_dataclass(value):
            found |= differences(value, usual, f"{prefix}{item.name}.")
        elif value != usual:
            found[prefix + item.name] = value
    return found


def changed(config):
    from megatron_vlm.data.config import DataConfig
    from megatron_vlm.training.run_config import RunConfig, TrainingConfig

    plain = RunConfig(
        data=DataConfig(seq_length=2, train=("shards",), valid=("shards",)),
        training=TrainingConfig(train_iters=1),
        checkpoint=type(config.checkpoint)(load="x"),
    )
    return {
        key: str(value) if key == "logging.output_dir" else value for key, value in differences(config, plain).items()
    }


RECIPE = {
    "data.answer_loss_only": True,
    "data.on_too_long": "truncate",
    "data.on_bad_sample": "skip",
    "data.num_workers": 4,
    "parallel.data_parallel_sharding": "optimizer",
    "parallel.overlap_grad_reduce": True,
}
"""What FT.py and finetune.sh leave to themselves, and the packaged recipe of the family says."""
EPOCH = {"training.train_iters": None, "training.train_epochs": 1.0}
PUBLISHED = {
    "parallel.recompute_granularity": "full",
    "optimizer.lr_warmup_fraction": 0.01,
    "optimizer.weight_decay": 0.1,
    "optimizer.adam_beta2": 0.95,
    "training.precision": "bf16",
    "checkpoint.keep_last": 2,
}


def test_ft_py_with_its_defaults():
    config, launch, notes = resolve("--model_name_or_path M --train_json train.json --val_json val.json", HD, dp=2)
    assert changed(config) == {
        **RECIPE,
        **EPOCH,
        **PUBLISHED,
        "data.seq_length": 8192,
        "data.hd_num": 6,
        "model.freeze_vision": True,
        "optimizer.lr": 1e-5,
        "training.global_batch_size": 16,  # 1 x 8 x 2 replicas
        "training.eval_epochs": 1.0,
        "checkpoint.load": "M",
        "checkpoint.save": "runs/train",
        "checkpoint.save_interval": 500,
        "logging.output_dir": "runs/train",
        "logging.name": "finetune_xcomposer2_4khd",
    }
    assert launch == LaunchConfig(train_json=("train.json",), val_json=("val.json",)) and launch.master_port == 29501
    assert notes[-1].startswith("settings that no flag names come from recipe xcomposer2/finetune_xcomposer2_4khd")


def test_ft_py_with_every_option():
    config, launch, notes = resolve(FT_EVERY_OPTION, HD, dp=2)
    assert changed(config) == {
        **RECIPE,
        "data.seq_length": 8192,
        "data.image_size": 490,
        "data.hd_num": 6,
        "optimizer.lr": 1e-5,
        "optimizer.lr_decay_style": "linear",
        "optimizer.lr_warmup_fraction": 0.02,
        "optimizer.weight_decay": 0.05,
        "optimizer.adam_beta2": 0.98,
        "training.train_iters": 10,
        "training.micro_batch_size": 2,
        "training.global_batch_size": 16,  # 2 x 4 x 2 replicas
        "training.eval_interval": 4,
        "training.precision": "bf16",
        "peft.target_modules": ("attention.wqkv", "attention.wo"),
        "peft.r": 32,
        "peft.dropout": 0.1,  # an alpha of 16 is PeftConfig's own
        "checkpoint.load": "M",
        "checkpoint.save": "work",
        "checkpoint.save_interval": 5,
        "checkpoint.keep_last": 3,
        "logging.output_dir": "work",
        "logging.name": "lora_xcomposer2_4khd",
        "logging.log_interval": 2,
    }
    assert launch == LaunchConfig(
        train_json=("train.json",),
        val_json=("val.json",),
        output_dir="work",
        overwrite_output_dir=True,
        save_merged_model=True,
        per_device_train_batch_size=2,
        batch_size=1,
        gradient_accumulation_steps=4,
        given_num=True,
        single_process=True,
        cuda_visible_devices="0,1",
        master_port=0,
        cache_dir="cache",
        no_launch=True,
    )
    said = " | ".join(notes)
    assert "--num_train_epochs 2 gives way to --max_steps 10" in said
    assert "--tf32 has no effect here" in said and "computes in bf16" in said
    assert "--deepspeed_config ds.json has no effect with --use_deepspeed False" in said
    assert "have no effect without --use_fsdp" in said and "--per_device_eval_batch_size has no effect here" in said


def test_finetune_lora_sh():
    config, launch, notes = resolve(FINETUNE_LORA, VL, dp=8)
    assert changed(config) == {
        **RECIPE,
        **EPOCH,
        **PUBLISHED,
        "data.seq_length": 4096,
        "data.image_size": 490,
        "optimizer.lr": 5e-5,
        "training.global_batch_size": 64,  # 1 x 8 x 8
        "peft.target_modules": WQKV,
        "peft.r": 64,
        "peft.alpha": 64.0,
        "peft.dropout": 0.05,
        "checkpoint.load": "internlm/internlm-xcomposer2-vl-7b",
        "checkpoint.save": "output/finetune",
        "checkpoint.save_epochs": 1.0,
        "logging.output_dir": "output/finetune",
        "logging.name": "lora_xcomposer2",
        "logging.log_interval": 1,
        "logging.tensorboard": False,
    }
    assert launch.data_path == ("data.txt",) and launch.given_num is True
    assert "--save_total_limit 1: two checkpoints are kept, as the newest may turn out damaged" in notes


def test_finetune_sh():
    config, _, _ = resolve(FINETUNE, HD, dp=8)
    assert changed(config) == {
        **RECIPE,
        **EPOCH,
        **PUBLISHED,
        "data.seq_length": 4096,
        "data.image_size": 490,
        "data.hd_num": 16,
        "optimizer.lr": 1e-5,
        "training.micro_batch_size": 2,  # batch_size 2 x 1 per device
        "training.global_batch_size": 128,
        "checkpoint.load": "internlm/internlm-xcomposer2-4khd-7b",
        "checkpoint.save": "output/finetune",
        "checkpoint.save_epochs": 1.0,
        "logging.output_dir": "output/finetune",
        "logging.name": "finetune_xcomposer2_4khd",
        "logging.log_interval": 1,
        "logging.tensorboard": False,
    }


@pytest.mark.parametrize("hf_config", [CHAT, NATIVE], ids=["chat", "hf"])
def test_internvl3s_torchrun_line(tmp_path, hf_config):
    zero = tmp_path / "zero_stage1_config.json"
    asked = {"zero_optimization": {"stage": 1, "overlap_comm": True}, "gradient_clipping": "auto"}
    zero.write_text(json.dumps({**asked, "bf16": {"enabled": "auto"}}))
    config, launch, notes = resolve(INTERNVL3, hf_config, "internvl3", dp=8, ZERO1=str(zero))
    targets = config.peft.target_modules
    assert changed(config) == {
        **{**RECIPE, "data.on_too_long": "drop"},
        **EPOCH,
        "data.seq_length": 16384,
        "data.template": "internvl2_5",
        "data.image_size": 448,
        "data.dynamic_image_size": True,
        "data.max_dynamic_patch": 12,
        "data.use_thumbnail": True,
        "data.group_by": "length",
        "parallel.recompute_granularity": "full",
        "optimizer.lr": 4e-5,
        "optimizer.lr_warmup_fraction": 0.03,
        "optimizer.weight_decay": 0.05,
        "training.micro_batch_size": 4,
        "training.global_batch_size": 128,  # 4 x 4 x 8
        "training.precision": "bf16",
        "peft.target_modules": targets,
        "peft.r": 16,
        "peft.alpha": 32.0,
        "peft.dropout": 0.05,
        "checkpoint.load": "OpenGVLab/InternVL3-8B",
        "checkpoint.save": "work_dirs/x",
        "checkpoint.save_interval": 200,
        "checkpoint.keep_last": 2,
        "logging.output_dir": "work_dirs/x",
        "logging.name": "lora_internvl3",
        "logging.log_interval": 1,
    }
    assert launch.meta_path == "meta.json" and launch.overwrite_output_dir
    assert any("stage 1 is the distributed optimizer" in note for note in notes)
    prefix = "language_model.model" if hf_config is CHAT else "model.language_model"
    tower = (
        "vision_model.encoder.layers.0.attn.qkv"
        if hf_config is CHAT
        else "model.vision_tower.encoder.layer.0.attention.q_proj"
    )
    linears = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert all(re.fullmatch(targets, f"{prefix}.layers.27.{linear}") for linear in linears)
    assert not re.fullmatch(targets, tower) and not re.fullmatch(targets, "language_model.lm_head")


def test_parts_that_train_in_full_beside_internvls_adapters():
    words = "--model_name_or_path M --use_llm_lora 8 --use_backbone_lora 4 --freeze_mlp False --unfreeze_lm_head True"
    for hf_config, projector in ((CHAT, "mlp1"), (NATIVE, "multi_modal_projector")):
        peft = resolve(words, hf_config, "internvl3")[0].peft
        assert (peft.r, peft.alpha, peft.vision_r, peft.vision_alpha) == (8, 16.0, 4, 8.0)
        assert peft.modules_to_save == (projector, "lm_head")
    config, _, notes = resolve("--model_name_or_path M --use_lora True --fix_sampler False --fix_vit True", HD)
    assert config.peft.modules_to_save == ("vision_proj", "plora_glb_GN", "plora_sub_GN") and not config.model.freeze
    assert any("with --use_lora the original froze it" in note for note in notes)


def test_the_megatron_scripts_of_idefics2():
    """Flags of Megatron are told to `train` and `launch` alike, and nothing is assumed beside them."""
    from megatron_vlm.options.resolve import resolve as resolve_train

    config, notes = resolve_train([*MEGATRON.split(), "--device", "cpu"])
    expected = {
        "data.valid": ("held",),
        "data.seq_length": 4096,
        "data.answer_loss_only": True,
        "data.image_size": 378,
        "data.shortest_edge": 378,
        "data.max_image_num": 5,
        "data.num_workers": 4,
        "model.freeze_vision": True,
        "model.freeze_connector": True,
        "parallel.tensor_model_parallel_size": 4,
        "parallel.pipeline_model_parallel_size": 2,
        "parallel.sequence_parallel": True,
        "parallel.data_parallel_sharding": "optimizer",
        "parallel.recompute_granularity": "full",
        "optimizer.lr": 1e-5,
        "optimizer.min_lr": 1e-6,
        "optimizer.lr_warmup_iters": 30,
        "optimizer.weight_decay": 0.1,
        "optimizer.adam_beta2": 0.95,
        "training.train_iters": 1000,
        "training.global_batch_size": 128,
        "training.seed": 42,
        "training.precision": "bf16",
        "training.eval_interval": 100,
        "training.eval_iters": 10,
        "checkpoint.load": "ckpt",
        "checkpoint.save": "out",
        "checkpoint.save_interval": 500,
        "checkpoint.no_load_optim": True,
        "logging.log_interval": 1,
    }
    found = changed(config)
    assert str(found.pop("logging.tensorboard_dir")) == "tb" and found.pop("training.device") == "cpu"
    assert {**found, "data.valid": ("held",)} == expected
    assert [note.split()[0] for note in notes] == [
        "--use-mcore-models", "--num-layers", "--hidden-size", "--tokenizer-type", "--distributed-backend",
    ]  # fmt: skip
    launched = resolve(MEGATRON, {}, "idefics2", dp=4)[0]
    found = changed(launched.replace(data=config.data))
    assert str(found.pop("logging.tensorboard_dir")) == "tb" and found.pop("logging.output_dir") == "out"
    assert {**found, "data.valid": ("held",)} == expected


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--bf16 True --fp16 True", "--bf16 True and --fp16 True"),
        ("--max_length 96 --max_seq_length 64", "--max-length 96 and --max-seq-length 64 say different things"),
        ("--learning_rate 1e-5 --lr 2e-5", "--learning-rate 1e-5 and --lr 2e-5 say different things of optimizer.lr"),
        ("--global-batch-size 100 --per_device_train_batch_size 4 --gradient_accumulation_steps 4",
         "global_batch_size 100 is not 4 per device x accumulation 4 x 8 data parallel replicas = 128"),
        ("--global-batch-size 100 --per_device_train_batch_size 4", "100 is not 4 per device x accumulation 3 x 8 .* = 96"),
        ("--micro-batch-size 2 --per_device_train_batch_size 4", "micro_batch_size 2 is not 4 per device = 4"),
        ("--use_lora True --use_llm_lora 8", "--use_lora with --use_llm_lora 8"),
        ("--optim adafactor", "--optim adafactor is not built yet: AdamW"),
        ("--lr_scheduler_type polynomial", "use one of cosine, linear, constant, constant_with_warmup"),
        ("--save_strategy best", "--save_strategy best is not built yet: use one of no, steps, epoch"),
        ("--save_steps 0.1", "--save_steps 0.1: a share of the run"),
        ("--report_to comet_ml", "--report_to comet_ml: reports go to tensorboard, wandb, mlflow, swanlab"),
        ("--do_train False", "--do_train False leaves nothing to do"),
        ("--warmup_ratio 3", "--warmup_ratio must be at least 0 and below 1, got 3"),
        ("--max_steps ten", "--max_steps must be int.*ten"),
        ("--vision_select_layer -2", "--vision_select_layer -2: a model of family xcomposer2 has no such setting"),
        ("--train_json a --data_path b", "the data is named more than once: .*train_json.* and .*data_path"),
        ("--unfreeze-vit-layers 2", "a tower trains whole or not at all"),
        ("--master_port 70000", "launch.master_port must lie between 0 .* and 65535, got 70000"),
        ("--fix_vit perhaps", "--fix-vit stands alone or says True or False, got 'perhaps'"),
        ("--per_device_train_batchsize 1", "did you mean 'per-device-train-batch-size'"),
    ],
)  # fmt: skip
def test_contradictions_and_mistakes_are_errors_with_the_numbers(words, named):
    with pytest.raises(ConfigError, match=named):
        resolve(f"--model_name_or_path M {words}", VL, dp=8)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--vision_select_layer -4", "--vision_select_layer is -4, but the model's config.json says -1"),
        ("--down_sample_ratio 1.0", "--down_sample_ratio is 1.0, but the model's config.json says 0.5"),
        ("--ps_version v1", "--ps_version is v1, but the model's config.json says v2"),
    ],
)
def test_what_is_said_of_the_model_is_checked_against_it(words, named):
    for hf_config in (CHAT, NATIVE):
        with pytest.raises(ConfigError, match=named):
            resolve(f"--model_name_or_path M {words}", hf_config, "internvl3")


def test_a_flag_drops_what_a_file_says_of_what_it_excludes():
    file = {
        "training": {"train_epochs": 1},
        "checkpoint": {"save_interval": 5},
        "optimizer": {"lr_warmup_fraction": 0.03},
    }
    request = request_of("--max_steps 3 --save_strategy epoch --warmup_steps 2", file=file)
    assert request.run["training"] == {"train_iters": 3} and not request.defaults
    assert request.run["checkpoint"]["save_epochs"] == 1.0 and "save_interval" not in request.run["checkpoint"]
    assert request.run["optimizer"] == {"lr_warmup_iters": 2}
    assert file["training"] == {"train_epochs": 1}


def test_the_old_name_of_the_distributed_optimizer_and_the_new_one_are_one_setting(tmp_path):
    (old := tmp_path / "old.yaml").write_text("parallel: {use_distributed_optimizer: true}\n")
    for name in ("finetune_idefics2", "video_idefics2", "documents_idefics2", str(old)):
        for words, wanted in (
            ("", "optimizer"),
            ("parallel.use_distributed_optimizer=false", "none"),
            ("--data-parallel-sharding none", "none"),
            ("--use-distributed-optimizer", "optimizer"),
        ):
            run = read_command(["--config", name, *words.split()], "train").run
            assert ParallelConfig.from_dict(run["parallel"]).data_parallel_sharding == wanted, (name, words)


def test_section_key_value_wins_over_a_flag_of_the_trainer():
    request = request_of("--bf16 True training.precision=fp32 --learning_rate 1e-5 optimizer.lr=3e-4")
    assert request.run["training"]["precision"] == "fp32" and request.run["optimizer"]["lr"] == "3e-4"


def test_data_that_is_trained_on_is_no_held_out_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ("--train_json a.json --val_json ./a.json", f"--data_path a b --eval_data_path {tmp_path / 'b'}"):
        with pytest.raises(ConfigError, match="is named to train on and as held-out data"):
            request_of(f"--load m {words}")


def test_without_evaluation_data_there_is_nothing_to_evaluate():
    """As in a guide that asks for it while its program takes none."""
    request = request_of("--model_name_or_path M --do_eval True --evaluation_strategy steps --eval_steps 5")
    assert request.run["training"]["eval_interval"] is None
    assert any("no held-out data is named" in note for note in request.notes)
