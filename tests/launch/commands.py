"""Whole commands of the original programs, as their scripts give them, their program's name left out; and how they resolve."""

from megatron_vlm import registry
from megatron_vlm.options.flags import parse_flags
from megatron_vlm.options.request import read_request

VL = {"model_type": "internlmxcomposer2", "img_size": 490, "max_length": 4096}
HD = {"model_type": "internlmxcomposer2", "max_length": 16384}
CHAT = {"model_type": "internvl_chat", "select_layer": -1, "downsample_ratio": 0.5, "ps_version": "v2"}
NATIVE = {"model_type": "internvl", "vision_feature_layer": -1, "downsample_ratio": 0.5}

FINETUNE_LORA = """
    --model_name_or_path internlm/internlm-xcomposer2-vl-7b --data_path data.txt --img_size 490 --given_num True
    --bf16 True --fix_vit True --fix_sampler True --use_lora True --output_dir output/finetune --num_train_epochs 1
    --batch_size 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 8
    --evaluation_strategy no --save_strategy epoch --save_total_limit 1 --learning_rate 5e-5 --weight_decay 0.1
    --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1 --report_to none --max_length
    4096 --gradient_checkpointing True
"""

FINETUNE = """
    --model_name_or_path internlm/internlm-xcomposer2-4khd-7b --data_path data.txt --img_size 490 --hd_num 16
    --given_num True --bf16 True --fix_vit False --fix_sampler False --use_lora False --output_dir output/finetune
    --num_train_epochs 1 --batch_size 2 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
    --gradient_accumulation_steps 8 --evaluation_strategy no --save_strategy epoch --save_total_limit 1
    --learning_rate 1e-5 --weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine
    --logging_steps 1 --report_to none --max_length 4096 --gradient_checkpointing True
"""

FT_EVERY_OPTION = """
    --model_name_or_path M --train_json train.json --val_json val.json --work_dir work --cache_dir cache
    --overwrite_output_dir True --num_train_epochs 2 --max_steps 10 --per_device_train_batch_size 2
    --per_device_eval_batch_size 1 --gradient_accumulation_steps 4 --learning_rate 1e-5 --weight_decay 0.05
    --adam_beta2 0.98 --warmup_ratio 0.02 --lr_scheduler_type linear --logging_steps 2 --save_strategy steps
    --save_steps 5 --save_total_limit 3 --eval_strategy steps --eval_steps 4 --report_to tensorboard --bf16 True
    --fp16 False --tf32 True --gradient_checkpointing False --optim adamw_torch --max_length 8192 --img_size 490
    --hd_num 6 --batch_size 1 --fix_vit True --fix_sampler True --use_lora True --lora_r 32 --lora_alpha 16
    --lora_dropout 0.1 --lora_target_modules attention.wqkv attention.wo --lora_bias none --use_deepspeed False
    --deepspeed_config ds.json --use_fsdp False --fsdp_policy FULL_SHARD --fsdp_wrap_cls InternLM2DecoderLayer
    --given_num True --master_port 0 --cuda_visible_devices 0,1 --single_process --save_merged_model --no_launch
"""

INTERNVL3 = """
    --model_name_or_path OpenGVLab/InternVL3-8B --conv_style internvl2_5 --use_fast_tokenizer False --output_dir
    work_dirs/x --meta_path meta.json --overwrite_output_dir True --force_image_size 448 --max_dynamic_patch 12
    --down_sample_ratio 0.5 --drop_path_rate 0.0 --freeze_llm True --freeze_mlp True --freeze_backbone True
    --use_llm_lora 16 --vision_select_layer -1 --dataloader_num_workers 4 --bf16 True --num_train_epochs 1
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --evaluation_strategy no --save_strategy steps
    --save_steps 200 --save_total_limit 1 --learning_rate 4e-5 --weight_decay 0.05 --warmup_ratio 0.03
    --lr_scheduler_type cosine --logging_steps 1 --max_seq_length 16384 --do_train True --grad_checkpoint True
    --group_by_length True --dynamic_image_size True --use_thumbnail True --ps_version v2 --deepspeed ZERO1
    --report_to tensorboard
"""

MEGATRON = """
    --use-mcore-models --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --sequence-parallel
    --use-distributed-optimizer --micro-batch-size 1 --global-batch-size 128 --seq-length 4096 --train-iters 1000
    --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-iters 30 --weight-decay 0.1 --adam-beta1 0.9
    --adam-beta2 0.95 --clip-grad 1.0 --seed 42 --bf16 --load ckpt --save out --save-interval 500 --eval-interval
    100 --eval-iters 10 --log-interval 1 --data-path shards --valid-data-path held --tensorboard-dir tb
    --num-workers 4 --no-load-optim --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --accumulate-allreduce-grads-in-fp32 --freeze-clip-vision-tower --freeze-perceiver --image-size 378
    --shortest-edge 378 --max-image-num 5 --answer-loss-only --num-layers 32 --hidden-size 4096 --attention-dropout
    0.0 --hidden-dropout 0.0 --transformer-impl local --tokenizer-type HF --distributed-backend nccl
"""


def request_of(words: str, command="launch", file=None, **replaced):
    argv = [replaced.get(word, word) for word in words.split()]
    parsed = parse_flags(argv, command)
    return read_request(file or {}, parsed.settings, parsed.notes, command=command)


def resolve(words: str, hf_config=VL, family="xcomposer2", dp=8, **replaced):
    """(RunConfig, LaunchConfig, notes) of a command of `launch`; data that exists already stands for the raw one."""
    from megatron_vlm.training.run_config import RunConfig

    request = request_of(words, **replaced)
    completed = request.complete(hf_config, registry.get(family), dp)
    run = {**completed.run, "data": {**completed.run["data"], "train": ["shards"], "valid": ["shards"]}}
    return RunConfig.from_dict(run), request.launch, completed.notes
