"""The commands of the five guides that users come from, in order, on tiny twins: the program's name and paths are changed, and
what makes a run small is added at the end; nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2
from megatron_vlm.testing.twins.internvl3 import write_chat_layout, write_tiny_internvl3
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_parts
from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2
from tests.examples.shell import environment, free_port
from tests.launch.conftest import write_records

pytestmark = pytest.mark.full
SMALL = "--device cpu training.precision=fp32 data.num_workers=0 --shard_cache cache --make-vocab-size-divisible-by 8"
FEW = f"{SMALL} --max_steps 2 --logging_steps 1"
PROGRAM = [sys.executable, "-m", "megatron_vlm"]
ADAPTER = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_log.txt",
)


def run(folder: Path, words: str, more: str = "", start: list[str] | None = None, typed: str | None = None) -> str:
    """Runs a command in ``folder`` and returns what it printed."""
    argv = [*(PROGRAM if start is None else start), *words.split(), *more.split()]
    done = subprocess.run(
        argv, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900, check=False, input=typed
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def left(folder: Path, *names: str) -> None:
    for name in names:
        assert (folder / name).exists(), (name, sorted(path.name for path in folder.iterdir()))


def test_ft_py(tmp_path):
    (tmp_path / "model").mkdir()
    write_tiny_xcomposer2(tmp_path / "model", "4khd-7b", std=0.05, max_position_embeddings=16384)
    made = json.loads(write_records(tmp_path, 24).read_text())
    for record in made:
        record["image"] = [str(tmp_path / record["image"])]
        record["conversations"] = [
            {"from": turn["from"].replace("gpt", "assistant"), "value": turn["value"].replace("<image>", "")}
            for turn in record["conversations"]
        ]
    for name, part in (("train.json", made), ("val.json", made[:4])):
        (tmp_path / name).write_text(json.dumps(part))
    zero3 = {
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu"},
            "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 5e8, "sub_group_size": 1e9,
        },
        "gradient_accumulation_steps": "auto", "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
    }  # fmt: skip
    (tmp_path / "ds_config_zero3.json").write_text(json.dumps(zero3))
    data = "--model_name_or_path model --train_json train.json --val_json val.json --use_lora True"
    assert "all checks passed" in run(tmp_path, f"launch --no_launch {data}", FEW)
    run(tmp_path, f"launch --output_dir run {data}", FEW)
    left(tmp_path / "run", *ADAPTER, "checkpoint-2")
    run(tmp_path, f"launch --single_process --output_dir one {data}", FEW)
    said = run(tmp_path, f"launch --use_deepspeed --output_dir two {data}", FEW)
    assert "with offload" in said or "offload of optimizer state" in said
    said = run(
        tmp_path, f"launch --use_deepspeed --deepspeed_config ds_config_zero3.json --output_dir three {data}", FEW
    )
    assert "and is faster" in said
    fsdp = "--use_fsdp --fsdp_policy full_shard --fsdp_wrap_cls InternLM2DecoderLayer"
    assert "and is faster" in run(tmp_path, f"launch {fsdp} --output_dir four {data}", FEW)
    run(tmp_path, f"launch --save_merged_model --output_dir five {data}", FEW)
    left(tmp_path / "five", *ADAPTER, "merged_model/config.json", "merged_model/model.safetensors")


def edit(path: Path, **values: object) -> None:
    """A user's edit of a config: each value replaces the one of its line."""
    lines = path.read_text().splitlines()
    for name, value in values.items():
        (number,) = [i for i, line in enumerate(lines) if line.startswith(f"{name} = ")]
        lines[number] = f"{name} = {value!r}"
    path.write_text("\n".join(lines) + "\n")


def test_xtuner_text(tmp_path):
    (tmp_path / "llm").mkdir()
    write_tiny_internlm2(tmp_path / "llm", std=0.05, max_position_embeddings=2048)
    turns = [{"role": "user", "content": "who are you?"}, {"role": "assistant", "content": "a small model"}]
    (tmp_path / "personal_assistant.json").write_text(json.dumps([{"messages": turns}] * 200))
    assert run(tmp_path, "list-cfg").count("\n") > 10
    assert "internlm2_1_8b_full_alpaca_e3" in run(tmp_path, "list-cfg -p internlm2_1_8b")
    run(tmp_path, "copy-cfg internlm2_1_8b_qlora_alpaca_e3 config")
    config = tmp_path / "config" / "X.py"
    shutil.move(config.with_name("internlm2_1_8b_qlora_alpaca_e3_copy.py"), config)
    edit(
        config, pretrained_model_name_or_path="llm", data_path="personal_assistant.json", max_length=128, batch_size=1,
        accumulative_counts=4, max_epochs=1, save_steps=8, save_total_limit=3, evaluation_freq=8, SYSTEM="You are small.",
        evaluation_inputs=["who are you?"],
    )  # fmt: skip
    for number, zero in enumerate(("zero2", "zero3_offload")):
        said = run(tmp_path, f"train config/X.py --work-dir ./train{number} --deepspeed deepspeed_{zero}", SMALL)
        assert "'who are you?' ->" in said
    run(tmp_path, "convert pth_to_hf config/X.py ./train0/iter_40.pth ./hf")
    run(tmp_path, "convert merge llm ./hf ./merged --max-shard-size 2GB")
    left(tmp_path / "merged", "config.json", "tokenizer.model")
    run(
        tmp_path, "chat ./merged --prompt-template internlm2_chat", "--max-new-tokens 4", typed="who are you?\n\nEXIT\n"
    )


def test_xtuner_llava(tmp_path):
    write_tiny_parts(tmp_path / "parts", std=0.05)
    path = write_records(tmp_path / "images", 16)
    stage1 = "llava_internlm2_chat_1_8b_clip_vit_large_p14_336_e1_gpu8_pretrain"
    stage2 = "llava_internlm2_chat_1_8b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune"
    own = dict(
        llm_name_or_path="parts/llm", visual_encoder_name_or_path="parts/vision", data_path=str(path), batch_size=2
    )
    own |= dict(image_folder=str(path.parent), max_length=600, save_steps=4)
    for name, more in ((stage1, {}), (stage2, {"pretrained_pth": "one/iter_8.pth"})):
        run(tmp_path, f"copy-cfg {name} .")
        edit(tmp_path / f"{name}_copy.py", **own, **more)
    run(tmp_path, f"train {stage1}_copy.py --work-dir one --deepspeed deepspeed_zero2", SMALL)
    run(tmp_path, f"convert pth_to_hf {stage1} one/iter_8.pth iter_8_hf")
    left(tmp_path / "iter_8_hf", "projector")
    run(tmp_path, f"train {stage2}_copy.py --work-dir two --deepspeed deepspeed_zero2", SMALL)
    run(tmp_path, f"convert pth_to_hf {stage2}_copy.py two/iter_8.pth iter_1200_hf")
    left(tmp_path / "iter_1200_hf", "projector", "llm_adapter", "visual_encoder_adapter")
    for llava in ("iter_8_hf", "iter_1200_hf"):
        words = f"chat parts/llm --visual-encoder parts/vision --llava {llava} --prompt-template internlm2_chat"
        run(tmp_path, f"{words} --image images/red.png", "--max-new-tokens 4", typed="which one is it?\n\nEXIT\n")


def test_internvl3(tmp_path):
    native = write_tiny_internvl3(tmp_path / "native", std=0.05, text=dict(max_position_embeddings=16384))
    write_chat_layout(tmp_path / "model", native)
    records = json.loads(write_records(tmp_path / "images", 64).read_text())
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {"root": "images", "annotation": "train.jsonl", "data_augment": False, "repeat_time": 1, "length": 64}
    (tmp_path / "meta.json").write_text(json.dumps({"colours": entry}))
    zero3 = {
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True, "contiguous_gradients": True,
            "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_clipping": 1.0, "train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4,
    }  # fmt: skip
    (tmp_path / "zero_stage3_config.json").write_text(json.dumps(zero3))
    words = """
        --model_name_or_path model --conv_style internvl2_5 --use_fast_tokenizer False --output_dir work_dirs/x --meta_path
        meta.json --overwrite_output_dir True --force_image_size 32 --max_dynamic_patch 12 --down_sample_ratio 0.5
        --drop_path_rate 0.0 --freeze_llm True --freeze_mlp True --freeze_backbone True --use_llm_lora 32
        --vision_select_layer -1 --dataloader_num_workers 1 --num_train_epochs 1 --per_device_train_batch_size 4
        --gradient_accumulation_steps 4 --evaluation_strategy steps --eval_steps 100 --save_strategy steps --save_steps 200
        --save_total_limit 2 --learning_rate 2e-5 --weight_decay 0.05 --warmup_ratio 0.03 --lr_scheduler_type cosine
        --logging_steps 10 --max_seq_length 8192 --do_train True --do_eval True --grad_checkpoint True --group_by_length
        True --dynamic_image_size True --use_thumbnail True --ps_version v2 --deepspeed zero_stage3_config.json
        --report_to tensorboard
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1"]
    torchrun += ["--nproc_per_node=2", f"--master_port={free_port()}", "-m", "megatron_vlm", "launch"]
    said = run(tmp_path, words, SMALL.replace("data.num_workers=0", ""), start=torchrun)
    assert "and is faster" in said
    left(tmp_path / "work_dirs" / "x", *ADAPTER, "tensorboard", "checkpoint-2")
    assert "done: 2 iterations" in (tmp_path / "work_dirs" / "x" / "training_log.txt").read_text()
    run(tmp_path, "convert mg2hf --load work_dirs/x --out merged --merge")
    left(tmp_path / "merged", "config.json")


def test_idefics2_on_megatron(tmp_path):
    write_tiny_idefics2(tmp_path / "hf", layers=2)
    path = write_records(tmp_path / "images", 24)
    run(tmp_path, "convert hf2mg --hf hf --out mg --tp 1 --pp 1")
    run(tmp_path, f"data build --format llava --input {path} --image-root images --out shards")
    flags = """
        --use-mcore-models --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --micro-batch-size 1
        --global-batch-size 4 --seq-length 96 --train-iters 4 --lr 1e-4 --image-size 24 --shortest-edge 24
        --max-image-num 2 --data-path shards --save-interval 4 --answer-loss-only --bf16
        --accumulate-allreduce-grads-in-fp32 --no-load-optim
    """
    bare = "--device cpu --num-workers 0 --make-vocab-size-divisible-by 8 --no-tensorboard"
    frozen = "--freeze-llm --freeze-clip-vision-tower --freeze-perceiver"
    run(tmp_path, f"train {flags} --load mg --save one", bare)
    (tmp_path / "one" / "iter_0000004").rename(tmp_path / "one" / "release")
    (tmp_path / "one" / "latest_checkpointed_iteration.txt").write_text("release")
    run(tmp_path, f"train {flags.replace('--no-load-optim', '')} --load one --save two --finetune", bare)
    run(tmp_path, f"train {flags} --load two --save two --skip-train --valid-data-path shards {frozen}", bare)
    run(tmp_path, "convert mg2hf --load two --out export")
    left(tmp_path / "export", "config.json", "model.safetensors")
