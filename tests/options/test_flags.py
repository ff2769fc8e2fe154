"""The flag table: aliases of config keys, flags without effect, refused and unknown ones."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.options.aliases import LISTS, SWITCHES, VALUES
from megatron_vlm.options.flags import FLAG_FIELDS, flags_help, parse_flags

# design.md, "Public interface"
AGREED = """
    tensor-model-parallel-size pipeline-model-parallel-size num-layers-per-virtual-pipeline-stage sequence-parallel
    use-distributed-optimizer micro-batch-size global-batch-size seq-length train-iters lr min-lr lr-decay-style
    lr-warmup-iters weight-decay clip-grad seed bf16 load save save-interval eval-interval eval-iters log-interval
    data-path valid-data-path tensorboard-dir num-workers no-load-optim skip-train recompute-granularity
    accumulate-allreduce-grads-in-fp32 freeze-llm freeze-clip-vision-tower freeze-perceiver image-size shortest-edge
    max-image-num answer-loss-only
"""


@pytest.mark.parametrize("flag", AGREED.split())
def test_agreed_flags_set_something(flag):
    value = [] if flag in SWITCHES or flag == "bf16" else ["1"]
    assert len(parse_flags([f"--{flag}", *value]).settings) == 1


def test_spellings_and_order():
    parsed = parse_flags(
        ["--config", "a.yaml", "--micro_batch_size=2", "optimizer.lr=3e-4", "--data-path", "x", "y", "--lr", "1e-4"]
    )
    assert parsed.config == "a.yaml"
    assert parsed.settings == [
        ("training.micro_batch_size", "2"),
        ("optimizer.lr", "3e-4"),
        ("data.train", ["x", "y"]),
        ("optimizer.lr", "1e-4"),
    ]


def test_folders_with_megatrons_weights():
    weighted = [{"path": "a", "weight": 0.3}, {"path": "b", "weight": 1.0}]
    for words, value in (
        ("0.3 a 1 b", weighted),
        ("a b", ["a", "b"]),
        ("0.3 a b", ["0.3", "a", "b"]),
        ("1 2", ["1", "2"]),
    ):
        assert parse_flags(["--data-path", *words.split()]).settings == [("data.train", value)]
    assert parse_flags(["data.train=[{path: a, weight: 0.3}, {path: b, weight: 1}]"]).settings == [
        ("data.train", weighted)
    ]


def test_overrides_are_yaml():
    assert parse_flags(["data.train=[a, b]", "data.packing=true", "training.eval_interval=null"]).settings == [
        ("data.train", ["a", "b"]),
        ("data.packing", True),
        ("training.eval_interval", None),
    ]


def test_recipe_flags_without_effect_say_why():
    line = (
        "--use-mcore-models --distributed-backend nccl --transformer-impl local --num-layers 32 --attention-dropout 0.0 "
        "--tokenizer-type HF --log-throughput --lr 1e-5"
    )
    parsed = parse_flags(line.split())
    assert parsed.settings == [("model.transformer_impl", "local"), ("optimizer.lr", "1e-5")]
    assert [note.split()[0] for note in parsed.notes] == [
        "--use-mcore-models", "--distributed-backend", "--num-layers", "--tokenizer-type", "--log-throughput",
    ]  # fmt: skip
    assert all(": " in note for note in parsed.notes)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--cpu-offload"], "offload"),
        (["--attention-dropout", "0.1"], "dropout"),
        (["--learning-rat", "1"], "unknown flag --learning-rat .did you mean 'learning-rate'"),
        (["--micro-batch-sizes", "1"], "did you mean 'micro-batch-size'"),
        (["--modle-name-or-path", "x"], "did you mean 'model-name-or-path'"),
        (["--dataset-name", "x"], "--dataset-name x: data is named by its files or folders"),
        (["--train-mode", "pretrain"], "--train-mode pretrain: what is supervised is a setting: --answer-loss-only"),
        (["--split", "949,50,1"], "--split 949,50,1: held-out data is named by itself"),
        (["--lr"], "--lr needs one value, got none"),
        (["--lr", "1", "2"], "--lr needs one value"),
        (["--packing", "yes"], "--packing stands alone or says True or False, got 'yes'"),
        (["--data-path"], "--data-path needs at least one value"),
        (["--save", ""], "--save is given an empty value: name one, or leave it out"),
        (["--data-path", "a", ""], "--data-path is given an empty value"),
        (["--deepspeed="], "--deepspeed is given an empty value"),
        (["--bf16", "lr=1", "lr"], "cannot read argument|needs one value"),
    ],
)
def test_errors_name_the_culprit(argv, named):
    with pytest.raises(ConfigError, match=named):
        parse_flags(argv)


def test_the_model_has_its_short_name():
    """`--model` was taken for a mistyped --train-mode; a flag without effect is never what is suggested."""
    assert parse_flags(["--model", "x"]).settings == parse_flags(["--model_name_or_path", "x"]).settings
    with pytest.raises(ConfigError) as caught:
        parse_flags(["--num-layerz", "x"])
    assert "did you mean 'num-layers'" not in str(caught.value)


def test_help_lists_every_flag_that_sets_something():
    text = flags_help()
    assert all(f"--{flag}" in text for flag in (*VALUES, *LISTS, *SWITCHES, *FLAG_FIELDS))


def test_flags_of_internvls_own_recipe():
    """The lines of internvl3_8b_dynamic_res_2nd_finetune_full.sh that speak of the model and its images."""
    words = """
        --conv_style internvl2_5 --force_image_size 448 --max_dynamic_patch 12 --down_sample_ratio 0.5 --drop_path_rate 0.0
        --freeze_llm False --freeze_mlp False --freeze_backbone True --vision_select_layer -1
        --dynamic_image_size True --use_thumbnail True --ps_version v2"""
    parsed = parse_flags(words.split())
    assert dict(parsed.settings) == {
        "data.template": "internvl2_5",
        "data.image_size": "448",
        "data.max_dynamic_patch": "12",
        "model.drop_path_rate": "0.0",
        "model.freeze_llm": False,
        "model.freeze_connector": False,
        "model.freeze_vision": True,
        "data.dynamic_image_size": True,
        "data.use_thumbnail": True,
        "--down_sample_ratio": "0.5",  # these three are checked against the model
        "--vision_select_layer": "-1",
        "--ps_version": "v2",
    }
    assert not parsed.notes


SWIFT = """
    --model M --train_type lora --dataset a.jsonl b.jsonl --val_dataset v.jsonl --torch_dtype bfloat16 --num_train_epochs 1
    --per_device_train_batch_size 1 --learning_rate 1e-4 --lora_rank 8 --lora_alpha 32 --target_modules all-linear
    --freeze_vit true --gradient_accumulation_steps 16
    --eval_steps 50 --save_steps 50 --save_total_limit 2 --logging_steps 5 --max_length 2048
    --output_dir output --warmup_ratio 0.05 --dataloader_num_workers 4 --dataset_num_proc 4
    --attn_impl flash_attn --deepspeed zero1
"""
FACTORY = """
model_name_or_path: M
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
quantization_bit: 4
dataset: a.json
template: intern2
cutoff_len: 2048
media_dir: images
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: out
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
resume_from_checkpoint: null
"""


def test_the_spellings_of_ms_swift_and_llama_factory(tmp_path):
    from megatron_vlm.options.request import read_command

    swift = read_command(SWIFT.split(), "launch")
    assert (swift.launch.data_path, swift.launch.eval_data_path) == (("a.jsonl", "b.jsonl"), ("v.jsonl",))
    assert (swift.flags.use_lora, swift.flags.lora_r, swift.flags.lora_target_modules) == (True, 8, ("all-linear",))
    assert swift.flags.bf16 and swift.run["checkpoint"]["load"] == "M" and swift.run["data"]["seq_length"] == "2048"
    assert swift.run["model"]["freeze_vision"] is True and swift.sharding.stage == 1 and swift.defaults

    (tmp_path / "f.yaml").write_text(FACTORY)
    factory = read_command([str(tmp_path / "f.yaml"), "--lora_rank", "16"], "launch")
    assert (factory.flags.use_lora, factory.flags.lora_r, factory.flags.load_in_4bit) == (True, 16, True)
    assert factory.flags.lora_target_modules == ("all-linear",) and factory.run["data"]["template"] == "internlm2_chat"
    assert (factory.launch.image_root, factory.launch.data_path) == ("images", ("a.json",))
    assert factory.launch.overwrite_output_dir and float(factory.run["optimizer"]["lr"]) == 1e-4 and factory.defaults
    assert not parse_flags(["--finetuning_type", "full"]).settings[0][1]
    with pytest.raises(ConfigError, match="--finetuning_type freeze"):
        parse_flags(["--finetuning_type", "freeze"])
    with pytest.raises(ConfigError, match="--dataset belongs to `megatron-vlm launch`"):
        parse_flags(["--dataset", "a.json"])


def test_a_config_may_stand_first():
    assert parse_flags(["a.yaml", "--lr", "1"]).config == "a.yaml"
    assert parse_flags(["optimizer.lr=1"]).config is None


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("--vit_lr 1e-5 --aligner_lr 2e-5", {"optimizer.vision_lr": 1e-5, "optimizer.connector_lr": 2e-5}),
        (
            "--truncation_strategy delete --train_on_prompt false",
            {"data.on_too_long": "drop", "data.answer_loss_only": True},
        ),
        ("--quant_method bnb --bnb_4bit_quant_type nf4 --double_quantization true", {"peft.double_quant": True}),
        ("--packing true --neat_packing false", {"data.packing": True}),
        ("--neat_packing", {"data.packing": True}),
        ("--torch_dtype bfloat16 --bf16 true --train_type lora --use_lora", {"--bf16": "true", "--use_lora": True}),
        ("--neat_packing true --mix_strategy concat --use_unsloth false --streaming false", {"data.packing": True}),
        ("--metric_for_best_model eval_loss --split_dataset_ratio 0", {"checkpoint.keep_best": "loss"}),
        ("--lazy_tokenize true --use_liger_kernel true --padding_free true --dataset_shuffle true", {}),
    ],
)
def test_more_spellings_of_ms_swift_and_llama_factory(words, settings):
    found = dict(parse_flags(words.split(), "launch").settings)
    assert {key: type(settings[key])(value) for key, value in found.items()} == settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--max_samples 1000", "name a shorter file"),
        ("--val_size 0.1", "held-out data is named by itself"),
        ("--system hi", "its own system line"),
        ("--use_unsloth true", "--use_unsloth true is not built"),
        ("--truncation_strategy left", "known here: delete, right"),
        (
            "--train_on_prompt true --answer-loss-only",
            "--train-on-prompt true and --answer-loss-only True say different",
        ),
        (
            "--on-too-long truncate --truncation_strategy delete",
            "--on-too-long truncate and --truncation-strategy delete",
        ),
        ("--metric_for_best_model eval_loss --keep-best score", "different things of checkpoint.keep_best"),
        ("--neat_packing true --packing false", "different things of data.packing"),
    ],
)
def test_what_ms_swift_and_llama_factory_mean_and_is_not_here(words, said):
    with pytest.raises(ConfigError, match=said):
        parse_flags(words.split(), "launch")


def test_a_value_that_means_something_else_here_says_so():
    assert "whole turns are removed" in parse_flags(["--truncation_strategy", "right"]).notes[0]
    assert not parse_flags(["--truncation_strategy", "delete"]).notes
