"""XTuner's configs: ours in their form, theirs as they are, and where the guide's paths lead."""

import json

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.options import recipes, xtuner
from megatron_vlm.options.request import read_command

THEIRS = """
# Copyright (c) OpenMMLab. All rights reserved.
import torch
from mmengine.dataset import DefaultSampler
from xtuner.model import LLaVAModel
llm_name_or_path = 'internlm/internlm2-chat-7b'
visual_encoder_name_or_path = 'openai/clip-vit-large-patch14-336'
# Specify the pretrained pth
pretrained_pth = './work/iter_2181.pth'  # noqa: E501
data_root = './data/llava_data/'
data_path = data_root + 'LLaVA-Instruct-150K/llava_v1_5_mix665k.json'
image_folder = data_root + 'llava_images'
prompt_template = PROMPT_TEMPLATE.internlm2_chat
max_length = int(2048 - (336 / 14)**2)
batch_size = 16  # per_device
accumulative_counts = 4
dataloader_num_workers = 0
max_epochs = 1
optim_type = AdamW
lr = 2e-4
betas = (0.9, 0.98)
weight_decay = 0
max_norm = 1
warmup_ratio = 0.03
save_steps = 500
save_total_limit = -1
evaluation_freq = 500
SYSTEM = ''
evaluation_images = 'https://x/view.jpg'
evaluation_inputs = ['Who?', 'What?']
tokenizer = dict(type=AutoTokenizer.from_pretrained, padding_side='right')
model = dict(
    type=LLaVAModel, freeze_llm=True, freeze_visual_encoder=True, pretrained_pth=pretrained_pth,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True)),
    llm_lora=dict(type=LoraConfig, r=512, lora_alpha=256, lora_dropout=0.05, bias='none', task_type='CAUSAL_LM'),
    visual_encoder_lora=dict(type=LoraConfig, r=64, lora_alpha=16, lora_dropout=0.05, bias='none'))
cfg_of_mine = 3
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)
"""


def test_a_file_of_theirs_is_read_as_text(tmp_path):
    (tmp_path / "x.py").write_text(THEIRS)
    recipe, settings, notes = xtuner.read_config(str(tmp_path / "x.py"))
    said = dict(settings)
    assert recipe == "llava_internlm2/qlora_llava_internlm2"
    assert said["launch.llm"] == "internlm/internlm2-chat-7b" and said["launch.projector"] == "./work/iter_2181.pth"
    assert said["launch.data_path"] == ["./data/llava_data/LLaVA-Instruct-150K/llava_v1_5_mix665k.json"]
    assert (said["data.template"], said["data.seq_length"]) == ("internlm2_chat", 2048)
    assert (said["launch.per_device_train_batch_size"], said["launch.gradient_accumulation_steps"]) == (16, 4)
    assert (said["optimizer.lr"], said["optimizer.adam_beta2"], said["checkpoint.keep_last"]) == (2e-4, 0.98, None)
    assert (said["checkpoint.save_interval"], said["evaluate.interval"]) == (125, 125)  # in updates
    assert said["evaluate.prompts"][1] == {"text": "What?", "images": ["https://x/view.jpg"]}
    assert (said["peft.r"], said["peft.alpha"], said["peft.vision_r"], said["peft.vision_alpha"]) == (512, 256, 64, 16)
    assert (said["model.freeze_llm"], said["model.freeze_vision"]) == (True, True)
    assert notes[1].endswith("not read: cfg_of_mine")
    assert xtuner.base_of(str(tmp_path / "x.py")) == "internlm/internlm2-chat-7b"
    (tmp_path / "y.py").write_text("optim_type = SGD\n")
    with pytest.raises(ConfigError, match=r"y.py: optim_type SGD: AdamW"):
        xtuner.read_config(str(tmp_path / "y.py"))
    (tmp_path / "z.py").write_text("x = (\n")
    with pytest.raises(ConfigError, match=r"z.py cannot be read as a config of XTuner's"):
        xtuner.read_config(str(tmp_path / "z.py"))
    trap = (
        f"lr = open({str(tmp_path / 'made')!r}, 'w')\nmax_norm = 10 ** 10 ** 10\nimport os\nos.system('touch made')\n"
    )
    (tmp_path / "t.py").write_text(trap)
    assert "optimizer.clip_grad" not in dict(xtuner.read_config(str(tmp_path / "t.py"))[1])
    assert not (tmp_path / "made").exists()


def test_every_name_is_listed_copied_and_read_back(tmp_path):
    assert recipes.names("internlm2_1_8b") == ["internlm2_1_8b_full_alpaca_e3", "internlm2_1_8b_qlora_alpaca_e3"]
    for name, recipe in xtuner.NAMES.items():
        assert recipes.path_of(name) == recipes.path_of(recipe)
        path = recipes.copy(name, tmp_path)
        assert path.name == f"{name}_copy.py"
        assert xtuner.read_config(str(path))[:2] == xtuner.read_config(name)[:2]
        words = [str(path), "--work-dir", "w", "--deepspeed", "deepspeed_zero1"]
        request = read_command(words, "launch")
        assert request.launch.output_dir == "w" and request.sharding.stage == 1
        assert (request.launch.llm is None) == name.startswith("internlm2")
        assert request.run["checkpoint"].get("load", "").replace("internlm/internlm2-", "").startswith(("", "chat-"))
        assert "peft" not in request.run or "qlora" in name
    with pytest.raises(ConfigError, match="exists already"):
        recipes.copy(name, tmp_path)
    read = dict(xtuner.read_config("internlm2_chat_7b_qlora_alpaca_e3")[1])
    assert read["checkpoint.load"] == "internlm/internlm2-chat-7b" and read["launch.gradient_accumulation_steps"] == 16


def test_a_flag_wins_over_the_config(tmp_path):
    request = read_command(["internlm2_1_8b_qlora_alpaca_e3", "--lr", "1e-5", "--model_name_or_path", "m"], "launch")
    assert request.run["optimizer"]["lr"] == "1e-5" and request.run["checkpoint"]["load"] == "m"
    completed = request.complete({}, None, 2) if not request.needs_model else None
    assert (
        completed is not None and completed.run["training"]["global_batch_size"] == 32
    )  # 1 x 16 x 2, as XTuner's GPUs


def test_paths_of_checkpoints_lead_to_ours(tmp_path):
    for number in (19, 20):
        folder = tmp_path / f"iter_{number:07d}"
        folder.mkdir()
        training = {"global_batch_size": 32, "micro_batch_size": 1}
        state = {"layout": "tp 1 pp 1 dp 2", "run": {"config": {"training": training}}}
        (folder / "state.json").write_text(json.dumps(state))
    assert xtuner.checkpoint_of(tmp_path / "iter_300.pth") == tmp_path / "iter_0000019"  # 19 x 16 passes hold the 300th
    assert xtuner.checkpoint_of(tmp_path / "iter_20.pth") == tmp_path / "iter_0000020"
    assert xtuner.checkpoint_of(tmp_path / "other") == tmp_path / "other"
    with pytest.raises(ConfigError, match=r"no checkpoint there is of that iteration \(16 passes an update\): 19, 20"):
        xtuner.checkpoint_of(tmp_path / "iter_999.pth")
