"""The one table of flags: own names, Megatron's, and those of the original fine-tuning programs (Hugging Face's Trainer,
InternVL's internvl_chat_finetune.py, InternLM-XComposer2's FT.py, finetune.py and their scripts).

    flag -> a config key ("optimizer.lr"), a launch setting ("launch.meta_path"), or a field of FlagValues
            ("--max_steps": what it means depends on other flags, on the model or on the number of ranks)

Hyphens equal underscores. Flags are written without their two hyphens here, with hyphens inside.
"""

from typing import Any


def _inverted(table: dict[str, str]) -> dict[str, str]:
    return {flag: key for key, flags in table.items() for flag in flags.split()}


# config key -> flags; each takes one value
VALUES = _inverted(
    {
        # model
        "model.family": "family",
        "model.make_vocab_size_divisible_by": "make-vocab-size-divisible-by",
        "model.drop_path_rate": "drop-path-rate",
        "model.rope_scaling.rope_type": "rope-scaling",
        "model.rope_scaling.factor": "rope-scaling-factor",
        "model.transformer_impl": "transformer-impl",
        "model.fp8": "fp8-recipe",
        "model.attention": "attention",
        "model.vision_head_multiple": "vision-head-multiple",
        # data
        "data.seq_length": """
            seq-length max-length max-seq-length model-max-length decoder-seq-length max-packed-tokens
            cutoff-len""",
        "data.image_size": "image-size img-size force-image-size",
        "data.shortest_edge": "shortest-edge",
        "data.max_image_num": "max-image-num",
        "data.hd_num": "hd-num",
        "data.min_dynamic_patch": "min-dynamic-patch",
        "data.max_dynamic_patch": "max-dynamic-patch max-num-tiles",
        "data.min_pixels": "min-pixels image-min-pixels",
        "data.max_pixels": "max-pixels image-max-pixels",
        "data.video_min_pixels": "video-min-pixels",
        "data.video_max_pixels": "video-max-pixels",
        "data.video_total_pixels": "video-total-pixels",
        "data.template": "conv-style template",
        "data.num_workers": "num-workers dataloader-num-workers",
        "data.prefetch_mb": "prefetch-mb",
        "data.prefetch_rows": "prefetch-rows",
        "data.max_patches_per_row": "max-patches-per-row",
        "data.on_too_long": "on-too-long",
        "data.on_bad_sample": "on-bad-sample",
        "data.max_bad_fraction": "max-bad-fraction",
        # parallel
        "parallel.tensor_model_parallel_size": "tensor-model-parallel-size",
        "parallel.pipeline_model_parallel_size": "pipeline-model-parallel-size",
        "parallel.num_layers_per_virtual_pipeline_stage": "num-layers-per-virtual-pipeline-stage",
        "parallel.decoder_layers_per_stage": "decoder-layers-per-stage",
        "parallel.decoder_first_pipeline_num_layers": "decoder-first-pipeline-num-layers",
        "parallel.decoder_last_pipeline_num_layers": "decoder-last-pipeline-num-layers",
        "parallel.context_parallel_size": "context-parallel-size sequence-parallel-size",
        "parallel.context_parallel_exchange": "context-parallel-exchange",
        "parallel.vision_parallel": "vision-parallel",
        "parallel.recompute_granularity": "recompute-granularity",
        "parallel.offload": "offload",
        "parallel.offload_fraction": "offload-fraction optimizer-offload-fraction",
        "parallel.data_parallel_sharding": "data-parallel-sharding",
        "parallel.sharding_group_size": "sharding-group-size",
        "parallel.ddp_bucket_size": "ddp-bucket-size",
        "parallel.distributed_timeout_minutes": "distributed-timeout-minutes",
        # optimizer
        "optimizer.lr": "lr",
        "optimizer.min_lr": "min-lr",
        "optimizer.vision_lr": "vision-lr vit-lr",
        "optimizer.connector_lr": "connector-lr aligner-lr",
        "optimizer.lr_decay_style": "lr-decay-style",
        "optimizer.lr_decay_iters": "lr-decay-iters",
        "optimizer.lr_warmup_iters": "lr-warmup-iters",
        "optimizer.lr_warmup_fraction": "lr-warmup-fraction",
        "optimizer.lr_warmup_init": "lr-warmup-init",
        "optimizer.lr_warmup_start_factor": "lr-warmup-start-factor",
        "optimizer.weight_decay": "weight-decay",
        "optimizer.adam_beta1": "adam-beta1",
        "optimizer.adam_beta2": "adam-beta2",
        "optimizer.adam_eps": "adam-eps adam-epsilon",
        "optimizer.clip_grad": "clip-grad max-grad-norm",
        "optimizer.loss_scale": "loss-scale",
        "optimizer.initial_loss_scale": "initial-loss-scale",
        "optimizer.min_loss_scale": "min-loss-scale",
        "optimizer.loss_scale_window": "loss-scale-window",
        "optimizer.hysteresis": "hysteresis",
        # training
        "training.train_iters": "train-iters",
        "training.train_samples": "train-samples",
        "training.train_epochs": "train-epochs",
        "training.micro_batch_size": "micro-batch-size",
        "training.global_batch_size": "global-batch-size",
        "training.seed": "seed",
        "training.device": "device",
        "training.precision": "precision",
        "training.eval_interval": "eval-interval",
        "training.eval_iters": "eval-iters",
        "training.dry_run_world_size": "world-size",
        # adapters
        "peft.adapter": "adapter adapter-name-or-path",
        "peft.quantize": "quantize",
        # checkpoint
        "checkpoint.load": "load",
        "checkpoint.save": "save",
        "checkpoint.save_interval": "save-interval",
        "checkpoint.save_epochs": "save-epochs",
        "checkpoint.ckpt_step": "ckpt-step",
        "checkpoint.keep_last": "keep-last",
        "checkpoint.keep_best": "keep-best metric-for-best-model",
        "checkpoint.base": "base",
        # logging
        "logging.log_interval": "log-interval logging-steps",
        "logging.tensorboard_dir": "tensorboard-dir logging-dir",
        "logging.name": "name run-name",
        "logging.output_dir": "output-dir work-dir",
    }
)

# The same for launch settings: of `megatron-vlm launch`, but for the first three, which size the batch of `train` as well.
LAUNCH_VALUES = _inverted(
    {
        "launch.per_device_train_batch_size": "per-device-train-batch-size",
        "launch.batch_size": "batch-size",
        "launch.gradient_accumulation_steps": "gradient-accumulation-steps",
        "launch.llm": "llm llm-path",
        "launch.vision": "vision visual-encoder vision-path",
        "launch.projector": "projector mlp-path",
        "launch.meta_path": "meta-path",
        "launch.image_root": "image-root media-dir",
        "launch.data_format": "data-format",
        "launch.missing_placeholder": "missing-placeholder",
        "launch.given_num": "given-num",
        "launch.min_num_frame": "min-num-frame",
        "launch.max_num_frame": "max-num-frame video-max-frames",
        "launch.video_sampling": "video-sampling",
        "launch.video_fps": "video-fps",
        "launch.num_processes": "num-processes nproc-per-node",
        "launch.cuda_visible_devices": "cuda-visible-devices",
        "launch.master_port": "master-port",
        "launch.cache_dir": "cache-dir",
        "launch.shard_cache": "shard-cache",
        "launch.memory_gib": "memory-gib",
    }
)
BATCH_FLAGS = ("per-device-train-batch-size", "batch-size", "gradient-accumulation-steps")

# config key -> flags; each takes one value or more
LISTS = _inverted(
    {
        "data.train": "data-path train-data-path",
        "data.valid": "valid-data-path eval-data-path",
        "peft.modules_to_save": "modules-to-save",
        "evaluate.file": "eval-file",
        "evaluate.metrics": "eval-metrics",
    }
)
# What the flags say instead, and what comes on top, for `megatron-vlm launch`.
LAUNCH_LISTS = _inverted(
    {
        "launch.train_json": "train-json",
        "launch.val_json": "val-json",
        "launch.data_path": "data-path train-data-path dataset",
        "launch.eval_data_path": "valid-data-path eval-data-path val-dataset eval-dataset",
    }
)
OUTPUT_DIR = "launch.output_dir"
"""What logging.output_dir's flags set for `megatron-vlm launch`."""

_FREEZE_VISION = (
    "freeze-vision freeze-clip-vision-tower freeze-backbone freeze-ViT freeze-vit freeze-vision-tower fix-vit"
)
_FREEZE_CONNECTOR = (
    "freeze-connector freeze-perceiver freeze-mlp freeze-aligner freeze-multi-modal-projector fix-sampler"
)
# flag -> (config key, value); the flag stands alone, or says true or false
SWITCHES: dict[str, tuple[str, Any]] = {
    "skip-train": ("training.skip_train", True),
    "dry-run": ("training.dry_run", True),
    "sequence-parallel": ("parallel.sequence_parallel", True),
    "use-distributed-optimizer": ("parallel.data_parallel_sharding", "optimizer"),
    **dict.fromkeys(("offload-activations", "cpu-offloading"), ("parallel.offload_activations", True)),
    "optimizer-cpu-offload": ("parallel.offload", "optimizer"),
    **dict.fromkeys(
        ("use-torch-fsdp2", "use-megatron-fsdp", "use-custom-fsdp"), ("parallel.data_parallel_sharding", "parameters")
    ),
    "overlap-grad-reduce": ("parallel.overlap_grad_reduce", True),
    "accumulate-allreduce-grads-in-fp32": ("parallel.accumulate_allreduce_grads_in_fp32", True),
    "no-accumulate-allreduce-grads-in-fp32": ("parallel.accumulate_allreduce_grads_in_fp32", False),
    **dict.fromkeys(("freeze-llm", "freeze-LM", "freeze-language-model"), ("model.freeze_llm", True)),
    **dict.fromkeys(_FREEZE_VISION.split(), ("model.freeze_vision", True)),
    **dict.fromkeys(_FREEZE_CONNECTOR.split(), ("model.freeze_connector", True)),
    **dict.fromkeys(("dynamic-image-size", "use-tiling"), ("data.dynamic_image_size", True)),
    "jpeg-scaled-decoding": ("data.jpeg_scaled_decoding", True),
    "use-thumbnail": ("data.use_thumbnail", True),
    "answer-loss-only": ("data.answer_loss_only", True),
    "allow-data-change": ("data.allow_data_change", True),
    "group-by-modality-length": ("data.group_by", "modality"),
    **dict.fromkeys(("packing", "use-packed-ds"), ("data.packing", True)),
    "no-packing": ("data.packing", False),
    **dict.fromkeys(("double-quantization", "bnb-4bit-use-double-quant"), ("peft.double_quant", True)),
    "finetune": ("checkpoint.finetune", True),
    "no-load-optim": ("checkpoint.no_load_optim", True),
    "no-load-rng": ("checkpoint.no_load_rng", True),
    **dict.fromkeys(("no-save-optim", "save-only-model"), ("checkpoint.no_save_optim", True)),
    "async-save": ("checkpoint.async_save", True),
    "no-tensorboard": ("logging.tensorboard", False),
    "use-rslora": ("peft.rslora", True),
    "fused-adamw": ("optimizer.fused", True),
    "no-fused-adamw": ("optimizer.fused", False),
}
LAUNCH_SWITCHES: dict[str, tuple[str, Any]] = {
    "overwrite-output-dir": ("launch.overwrite_output_dir", True),
    "save-merged-model": ("launch.save_merged_model", True),
    "export-each-epoch": ("launch.export_each_epoch", True),
    "single-process": ("launch.single_process", True),
    "strict-sharding": ("launch.strict_sharding", True),
    "no-launch": ("launch.no_launch", True),
}

# flag -> field of FlagValues, where that is spelt in another way
FLAG_ALIASES = {
    "evaluation-strategy": "eval_strategy",
    "grad-checkpoint": "gradient_checkpointing",
    "model": "model_name_or_path",
    "deepspeed-config": "deepspeed",
    "lora-rank": "lora_r",
    **dict.fromkeys(("lora-target", "target-modules"), "lora_target_modules"),
    "q-lora": "load_in_4bit",
    "use-qlora": "load_in_4bit",
}

# flag of ms-swift or LLaMA-Factory -> its value in small letters -> the setting that it is; None: what runs here anyhow. A value
# that is not here is read as the flag of that name, or refused.
_KINDS: dict[str, tuple[str, Any] | None] = {"lora": ("--use_lora", True), "full": ("--use_lora", False)}
_DTYPES: dict[str, tuple[str, Any] | None] = {
    "bfloat16": ("--bf16", True),
    "float16": ("--fp16", True),
    "float32": ("training.precision", "fp32"),
    "auto": None,
}
TRANSLATED: dict[str, dict[str, tuple[str, Any] | None]] = {
    **dict.fromkeys(("train-type", "tuner-type", "sft-type", "finetuning-type"), _KINDS),
    **{key: {"4": ("--load_in_4bit", True)} for key in ("quantization-bit", "quant-bits")},
    **dict.fromkeys(("torch-dtype", "dtype"), _DTYPES),
    **{key: {"all": ("--lora_target_modules", ["all-linear"])} for key in ("lora-target", "target-modules")},
    "template": {"intern2": ("data.template", "internlm2_chat")},
    "stage": {"sft": None},
    "task-type": {"causal_lm": None},
    **{key: {"bnb": None, "nf4": None} for key in ("quantization-method", "quant-method", "bnb-4bit-quant-type")},
    **{key: {"true": None} for key in ("dataset-shuffle", "train-dataloader-shuffle", "init-weights")},
    **{key: {"false": None, "concat": None} for key in ("mask-history", "mix-strategy", "use-unsloth", "streaming")},
    "neat-packing": {"": ("data.packing", True), "true": ("data.packing", True), "false": None},
    "truncation-strategy": {"delete": ("data.on_too_long", "drop"), "right": ("data.on_too_long", "truncate")},
    "train-on-prompt": {"true": ("data.answer_loss_only", False), "false": ("data.answer_loss_only", True)},
    "metric-for-best-model": {"eval_loss": ("checkpoint.keep_best", "loss")},
    **{key: {"none": None, "": None} for key in ("llm-path", "vision-path", "mlp-path")},
}

# why it means nothing here -> flags; whatever values follow are dropped
_IGNORED = {
    "it comes from the checkpoint's config": """
        num-layers hidden-size ffn-hidden-size num-attention-heads num-query-groups group-query-attention kv-channels
        max-position-embeddings position-embedding-type use-rotary-position-embeddings rotary-base rotary-percent
        no-position-embedding add-position-embedding normalization norm-epsilon layernorm-epsilon swiglu add-qkv-bias
        disable-bias-linear untie-embeddings-and-output-weights init-method-std vocab-size padded-vocab-size patch-dim
        img-h img-w num-channels sliding-window window-size use-checkpoint-args pad2square normalize-type
        apply-layernorm-1p language-model-type vision-model-type disable-vision-class-token pixel-shuffle
        use-tile-tags num-frames""",
    "the checkpoint's config says how its RoPE is scaled; --rope-scaling yarn stretches it further": "use-rope-scaling",
    "padding rows of the vocabulary never train and are not exported; convert hf2mg takes it": "extra-vocab-size",
    "tokenizer and processor come with the checkpoint": """
        tokenizer-type tokenizer-model tokenizer-name-or-path tokenizer-path patch-tokenizer-type vocab-file merge-file
        vocab-extra-ids image-processor-path use-fast-tokenizer prompt-path
        tokenizer-prompt-format""",
    "attention and fused kernels are picked by device and dtype": """
        use-flash-attn attention-backend attention-softmax-in-fp32 no-masked-softmax-fusion no-bias-gelu-fusion
        no-bias-swiglu-fusion no-bias-dropout-fusion bias-gelu-fusion no-gradient-accumulation-fusion no-rope-fusion
        no-async-tensor-model-parallel-allreduce no-persist-layer-norm apply-query-key-layer-scaling
        no-query-key-layer-scaling use-fused-rmsnorm use-fused-swiglu tp-comm-overlap flash-attn
        attn-impl attn-implementation use-liger half-precision-backend fp16-opt-level
        use-liger-kernel enable-liger-kernel""",
    "there is one implementation here, which needs no switch": """
        use-mcore-models use-legacy-models distributed-backend local-rank use-cpu-initialization dataloader-type
        eod-mask-loss reset-position-ids reset-attention-mask
        no-create-attention-mask-in-dataloader calculate-per-token-loss variable-seq-lengths manual-gc
        manual-gc-interval no-initialization perform-initialization no-check-for-nan-in-loss-and-grad delay-grad-reduce
        no-delay-grad-reduce overlap-p2p-communication no-overlap-p2p-communication deallocate-pipeline-outputs
        dataloader-save allow-missing-vision-projection-checkpoint use-custom-trainer use-loss-scale
        gradient-checkpointing-kwargs ddp-find-unused-parameters ddp-backend ddp-bucket-cap-mb ddp-broadcast-buffers
        use-hf check-model model-type remove-unused-columns label-names lazy-preprocess trust-remote-code ddp-timeout
        add-version create-checkpoint-symlink padding-free""",
    "workers, prefetching and pinning are chosen here; their settings are data.num_workers and data.prefetch_mb": """
        dataloader-pin-memory dataloader-persistent-workers dataloader-prefetch-factor dataloader-drop-last
        preprocessing-num-workers dataset-num-proc overwrite-cache num-images-expected max-buffer-size log-freq strict-mode
        replacement allow-overflow lazy-tokenize load-from-cache-file""",
    "an evaluation lays held-out samples into rows as training does, which does not change its loss": """
        per-device-eval-batch-size eval-accumulation-steps bf16-full-eval fp16-full-eval""",
    "metrics.jsonl always has what this asks for, or it belongs to Megatron's timers": """
        log-throughput log-params-norm log-num-zeros-in-grad log-timers-to-tensorboard log-batch-size-to-tensorboard
        log-learning-rate-to-tensorboard log-loss-scale-to-tensorboard log-validation-ppl-to-tensorboard
        log-memory-to-tensorboard log-world-size-to-tensorboard timing-log-level timing-log-option
        tensorboard-queue-size tensorboard-log-interval log-progress logging-first-step logging-strategy log-level
        log-level-replica log-on-each-node logging-nan-inf-filter include-num-input-tokens-seen include-tokens-per-second
        skip-memory-metrics plot-loss disable-tqdm""",
    "checkpoints have one format here, which any layout loads": """
        ckpt-format use-dist-ckpt auto-detect-ckpt-format ckpt-fully-parallel-save no-save-rng save-safetensors
        save-on-each-node""",
    "the schedule is always the one of this run's config": """
        override-opt-param-scheduler use-checkpoint-opt-param-scheduler""",
    "what travels between host and device is always page-locked, in streams of its own": """
        overlap-cpu-optimizer-d2h-h2d no-pin-cpu-grads no-pin-cpu-params use-torch-optimizer-for-cpu-offload""",
    "a checkpoint that is missing is always an error": "exit-on-missing-checkpoint",
    "SIGTERM and SIGUSR1 always save and stop": "exit-signal-handler",
    "every generator and the data order are drawn from --seed": "data-seed full-determinism",
}
IGNORED = {flag: reason for reason, flags in _IGNORED.items() for flag in flags.split()}

_NOT_BUILT = "is not built yet"
_FALSE = ("False", "false")
_NONE = ("None", "none", "")

# flag -> (values that are accepted without effect, what to say about any other)
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "attention-dropout": (("0", "0.0"), f"dropout in attention {_NOT_BUILT}; set it to 0"),
    "hidden-dropout": (("0", "0.0"), f"dropout on hidden states {_NOT_BUILT}; set it to 0"),
    **dict.fromkeys(
        ("dataset-name", "task"),
        (
            (),
            "data is named by its files or folders, whose content tells what it is: --data-path DIR (train), "
            "--train-json FILE (launch)",
        ),
    ),
    "rotary-seq-len-interpolation-factor": (("1",), "give --rope-scaling linear --rope-scaling-factor N instead"),
    "train-mode": (
        (),
        "what is supervised is a setting: --answer-loss-only for the answers alone (fine-tuning), without it all text; what is "
        "frozen, --freeze-llm, --freeze-vision, --freeze-connector",
    ),
    "split": (
        ("100,0,0", "1,0,0", "100", "1"),
        "held-out data is named by itself, --valid-data-path DIR; `data build --val-fraction` makes it",
    ),
    **dict.fromkeys(
        ("val-size", "split-dataset-ratio"),
        (("0", "0.0"), "held-out data is named by itself, --val_json FILE; `data build --val-fraction` makes it"),
    ),
    "max-samples": ((), "a data set is taken whole: name a shorter file"),
    "dataset-dir": ((), "data sets are files here: --dataset FILE ..."),
    **dict.fromkeys(("system", "default-system"), ((), "each record has its own system line, its first turn")),
    "optimizer": (("adam",), "AdamW is the only optimizer built; leave it out"),
    "expert-model-parallel-size": (("1",), f"expert parallelism {_NOT_BUILT}; set it to 1"),
    "start-weight-decay": ((), f"a weight decay that changes over the run {_NOT_BUILT}; use --weight-decay"),
    "end-weight-decay": ((), f"a weight decay that changes over the run {_NOT_BUILT}; use --weight-decay"),
    "rampup-batch-size": ((), f"a batch size that grows over the run {_NOT_BUILT}; leave it out"),
    "lr-warmup-samples": ((), "give the warm-up as --lr-warmup-iters or --lr-warmup-fraction"),
    "lr-decay-samples": ((), "give the decay as --lr-decay-iters"),
    "num-virtual-stages-per-pipeline-rank": ((), "give --num-layers-per-virtual-pipeline-stage instead"),
    "cpu-offload": ((), "say of what: --offload optimizer, --offload-activations"),
    "cpu-offloading-num-layers": (
        (),
        f"offload of some layers' activations {_NOT_BUILT}; --offload-activations is of all",
    ),
    **dict.fromkeys(
        ("fp8-format", "fp8"),
        ((), "give --fp8-recipe tensorwise, blockwise or mxfp8: E4M3, and E5M2 for the gradients of tensorwise"),
    ),
    "use-precision-aware-optimizer": ((), f"a precision-aware optimizer {_NOT_BUILT}; leave it out"),
    # In evaluation a row without images runs no module of the tower: ranks would gather parameters in different orders.
    "overlap-param-gather": ((), f"gathering parameters during the forward pass {_NOT_BUILT}; leave it out"),
    # of the original programs
    "unfreeze-vit-layers": (("0",), "a tower trains whole or not at all; set it to 0, or use --freeze_backbone False"),
    "use-data-resampling": (
        _FALSE,
        "weights by the root of each data set's size: name the folders with weights, data.train=[{path, weight}, ...]",
    ),
    "loss-reduction": (("token",), "the loss is the mean over supervised tokens; set it to token"),
    "loss-reduction-all-gather": (("True", "true"), "tokens are always counted over all ranks; set it to True"),
    "resume-from-checkpoint": (
        ("True", "true", *_NONE),
        "a run whose output_dir holds checkpoints goes on from the last; another: --load FOLDER, one iteration's or all",
    ),
    "label-smoothing-factor": (("0", "0.0"), f"label smoothing {_NOT_BUILT}; set it to 0"),
    "neftune-noise-alpha": (("0", "0.0", *_NONE), f"noise on embeddings {_NOT_BUILT}; leave it out"),
    "auto-find-batch-size": (_FALSE, "launch chooses by memory before it starts; leave it out"),
    "load-best-model-at-end": (_FALSE, f"going back to the best checkpoint {_NOT_BUILT}; leave it out"),
    "lr-scheduler-kwargs": (("{}",), "give the floor of the decay as --min-lr"),
    "torch-compile": (_FALSE, f"compilation {_NOT_BUILT}; leave it out"),
    "push-to-hub": (_FALSE, "upload what output_dir holds with the hub's own command; leave it out"),
    "load-in-8bit": (_FALSE, f"8-bit weights: {_NOT_BUILT}; use --quantize nf4"),
    "use-dora": (_FALSE, f"DoRA {_NOT_BUILT}; leave it out"),
    "lora-weight-path": (_NONE, "go on from an adapter with --adapter FOLDER"),
}
