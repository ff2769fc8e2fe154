"""Flags of `megatron-vlm train`: Megatron's and the original recipes' names as aliases of config keys, in one table.

    --lr 1e-4   optimizer.lr=1e-4   -->  ("optimizer.lr", 1e-4)  -->  RunConfig

Hyphens equal underscores. A recipe's flag that means nothing here is accepted with one line that says why; one that
asks for something that is not built is refused by name; an unknown one is an error that names the nearest.
"""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_vlm.config import nearest
from megatron_vlm.errors import ConfigError

# flag -> config key; the flag takes one value
VALUES = {
    # model
    "family": "model.family",
    "fix-vit": "model.freeze_vision",
    "fix-sampler": "model.freeze_connector",
    "make-vocab-size-divisible-by": "model.make_vocab_size_divisible_by",
    # data
    "seq-length": "data.seq_length",
    "image-size": "data.image_size",
    "shortest-edge": "data.shortest_edge",
    "max-image-num": "data.max_image_num",
    "img-size": "data.image_size",
    "hd-num": "data.hd_num",
    "force-image-size": "data.image_size",
    "dynamic-image-size": "data.dynamic_image_size",
    "min-dynamic-patch": "data.min_dynamic_patch",
    "max-dynamic-patch": "data.max_dynamic_patch",
    "use-thumbnail": "data.use_thumbnail",
    "conv-style": "data.template",
    "drop-path-rate": "model.drop_path_rate",
    "num-workers": "data.num_workers",
    "prefetch-mb": "data.prefetch_mb",
    "max-patches-per-row": "data.max_patches_per_row",
    "on-too-long": "data.on_too_long",
    "on-bad-sample": "data.on_bad_sample",
    # parallel
    "tensor-model-parallel-size": "parallel.tensor_model_parallel_size",
    "pipeline-model-parallel-size": "parallel.pipeline_model_parallel_size",
    "num-layers-per-virtual-pipeline-stage": "parallel.num_layers_per_virtual_pipeline_stage",
    "context-parallel-size": "parallel.context_parallel_size",
    "recompute-granularity": "parallel.recompute_granularity",
    "ddp-bucket-size": "parallel.ddp_bucket_size",
    "distributed-timeout-minutes": "parallel.distributed_timeout_minutes",
    # optimizer
    "lr": "optimizer.lr",
    "min-lr": "optimizer.min_lr",
    "vision-lr": "optimizer.vision_lr",
    "connector-lr": "optimizer.connector_lr",
    "lr-decay-style": "optimizer.lr_decay_style",
    "lr-decay-iters": "optimizer.lr_decay_iters",
    "lr-warmup-iters": "optimizer.lr_warmup_iters",
    "lr-warmup-fraction": "optimizer.lr_warmup_fraction",
    "lr-warmup-init": "optimizer.lr_warmup_init",
    "lr-warmup-start-factor": "optimizer.lr_warmup_start_factor",
    "weight-decay": "optimizer.weight_decay",
    "adam-beta1": "optimizer.adam_beta1",
    "adam-beta2": "optimizer.adam_beta2",
    "adam-eps": "optimizer.adam_eps",
    "clip-grad": "optimizer.clip_grad",
    "loss-scale": "optimizer.loss_scale",
    "initial-loss-scale": "optimizer.initial_loss_scale",
    "min-loss-scale": "optimizer.min_loss_scale",
    "loss-scale-window": "optimizer.loss_scale_window",
    "hysteresis": "optimizer.hysteresis",
    # training
    "train-iters": "training.train_iters",
    "train-samples": "training.train_samples",
    "train-epochs": "training.train_epochs",
    "micro-batch-size": "training.micro_batch_size",
    "global-batch-size": "training.global_batch_size",
    "seed": "training.seed",
    "device": "training.device",
    "precision": "training.precision",
    "eval-interval": "training.eval_interval",
    "eval-iters": "training.eval_iters",
    "world-size": "training.dry_run_world_size",
    # checkpoint
    "load": "checkpoint.load",
    "save": "checkpoint.save",
    "save-interval": "checkpoint.save_interval",
    "save-epochs": "checkpoint.save_epochs",
    "ckpt-step": "checkpoint.ckpt_step",
    "keep-last": "checkpoint.keep_last",
    # logging
    "log-interval": "logging.log_interval",
    "output-dir": "logging.output_dir",
    "tensorboard-dir": "logging.tensorboard_dir",
    "name": "logging.name",
}

# flag -> config key; the flag takes one value or more
LISTS = {
    "data-path": "data.train",
    "train-data-path": "data.train",
    "valid-data-path": "data.valid",
}

# flag -> (config key, value); the flag stands alone, or says true or false
SWITCHES: dict[str, tuple[str, Any]] = {
    "bf16": ("training.precision", "bf16"),
    "fp16": ("training.precision", "fp16"),
    "skip-train": ("training.skip_train", True),
    "dry-run": ("training.dry_run", True),
    "sequence-parallel": ("parallel.sequence_parallel", True),
    "use-distributed-optimizer": ("parallel.use_distributed_optimizer", True),
    "overlap-grad-reduce": ("parallel.overlap_grad_reduce", True),
    "accumulate-allreduce-grads-in-fp32": ("parallel.accumulate_allreduce_grads_in_fp32", True),
    "no-accumulate-allreduce-grads-in-fp32": ("parallel.accumulate_allreduce_grads_in_fp32", False),
    "freeze-llm": ("model.freeze_llm", True),
    "freeze-clip-vision-tower": ("model.freeze_vision", True),
    "freeze-vision": ("model.freeze_vision", True),
    "freeze-perceiver": ("model.freeze_connector", True),
    "freeze-connector": ("model.freeze_connector", True),
    "freeze-backbone": ("model.freeze_vision", True),
    "freeze-mlp": ("model.freeze_connector", True),
    "answer-loss-only": ("data.answer_loss_only", True),
    "allow-data-change": ("data.allow_data_change", True),
    "group-by-length": ("data.group_by", "length"),
    "group-by-modality-length": ("data.group_by", "modality"),
    "packing": ("data.packing", True),
    "no-packing": ("data.packing", False),
    "finetune": ("checkpoint.finetune", True),
    "no-load-optim": ("checkpoint.no_load_optim", True),
    "no-load-rng": ("checkpoint.no_load_rng", True),
    "no-save-optim": ("checkpoint.no_save_optim", True),
    "no-tensorboard": ("logging.tensorboard", False),
}

# why it means nothing here -> flags; whatever values follow are dropped
_IGNORED = {
    "it comes from the checkpoint's config": """
        num-layers hidden-size ffn-hidden-size num-attention-heads num-query-groups group-query-attention kv-channels
        max-position-embeddings position-embedding-type use-rotary-position-embeddings rotary-base rotary-percent
        no-position-embedding add-position-embedding normalization norm-epsilon layernorm-epsilon swiglu add-qkv-bias
        disable-bias-linear untie-embeddings-and-output-weights init-method-std vocab-size padded-vocab-size patch-dim
        img-h img-w num-channels sliding-window window-size use-checkpoint-args down-sample-ratio vision-select-layer
        ps-version pad2square""",
    "padding rows of the vocabulary never train and are not exported; convert hf2mg takes it": "extra-vocab-size",
    "tokenizer and processor come with the checkpoint": """
        tokenizer-type tokenizer-model tokenizer-name-or-path tokenizer-path patch-tokenizer-type vocab-file merge-file
        vocab-extra-ids image-processor-path""",
    "attention and fused kernels are picked by device and dtype": """
        use-flash-attn attention-backend attention-softmax-in-fp32 no-masked-softmax-fusion no-bias-gelu-fusion
        no-bias-swiglu-fusion no-bias-dropout-fusion bias-gelu-fusion no-gradient-accumulation-fusion no-rope-fusion
        no-async-tensor-model-parallel-allreduce no-persist-layer-norm apply-query-key-layer-scaling
        no-query-key-layer-scaling use-fused-rmsnorm use-fused-swiglu tp-comm-overlap""",
    "there is one implementation here, which needs no switch": """
        use-mcore-models use-legacy-models distributed-backend local-rank use-cpu-initialization split dataloader-type
        train-mode task dataset dataset-name eod-mask-loss reset-position-ids reset-attention-mask
        no-create-attention-mask-in-dataloader calculate-per-token-loss variable-seq-lengths manual-gc
        manual-gc-interval no-initialization perform-initialization no-check-for-nan-in-loss-and-grad delay-grad-reduce
        no-delay-grad-reduce overlap-p2p-communication no-overlap-p2p-communication deallocate-pipeline-outputs""",
    "metrics.jsonl always has what this asks for, or it belongs to Megatron's timers": """
        log-throughput log-params-norm log-num-zeros-in-grad log-timers-to-tensorboard log-batch-size-to-tensorboard
        log-learning-rate-to-tensorboard log-loss-scale-to-tensorboard log-validation-ppl-to-tensorboard
        log-memory-to-tensorboard log-world-size-to-tensorboard timing-log-level timing-log-option
        tensorboard-queue-size tensorboard-log-interval log-progress""",
    "checkpoints have one format here, which any layout loads": """
        ckpt-format use-dist-ckpt auto-detect-ckpt-format ckpt-fully-parallel-save no-save-rng""",
    "the schedule is always the one of this run's config": """
        override-opt-param-scheduler use-checkpoint-opt-param-scheduler""",
    "a checkpoint that is missing is always an error": "exit-on-missing-checkpoint",
    "SIGTERM and SIGUSR1 always save and stop": "exit-signal-handler",
}
IGNORED = {flag: reason for reason, flags in _IGNORED.items() for flag in flags.split()}

_NOT_BUILT = "is not built yet"

# flag -> (values that are accepted without effect, what to say about any other)
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "transformer-impl": (("local",), f"Transformer Engine layers: {_NOT_BUILT}; use --transformer-impl local"),
    "attention-dropout": (("0", "0.0"), f"dropout in attention {_NOT_BUILT}; set it to 0"),
    "hidden-dropout": (("0", "0.0"), f"dropout on hidden states {_NOT_BUILT}; set it to 0"),
    "recompute-method": (
        ("uniform",),
        f"only the method 'uniform' is built, which recomputes each layer; another {_NOT_BUILT}",
    ),
    "recompute-num-layers": (
        ("1",),
        f"recomputation goes layer by layer; chunks of several layers: {_NOT_BUILT}; set it to 1",
    ),
    "optimizer": (("adam",), "AdamW is the only optimizer built; leave it out"),
    "expert-model-parallel-size": (("1",), f"expert parallelism {_NOT_BUILT}; set it to 1"),
    "start-weight-decay": ((), f"a weight decay that changes over the run {_NOT_BUILT}; use --weight-decay"),
    "end-weight-decay": ((), f"a weight decay that changes over the run {_NOT_BUILT}; use --weight-decay"),
    "rampup-batch-size": ((), f"a batch size that grows over the run {_NOT_BUILT}; leave it out"),
    "lr-warmup-samples": ((), "give the warm-up as --lr-warmup-iters or --lr-warmup-fraction"),
    "lr-decay-samples": ((), "give the decay as --lr-decay-iters"),
    "num-virtual-stages-per-pipeline-rank": ((), "give --num-layers-per-virtual-pipeline-stage instead"),
    "decoder-first-pipeline-num-layers": ((), f"stages of unequal numbers of layers: {_NOT_BUILT}; leave it out"),
    "decoder-last-pipeline-num-layers": ((), f"stages of unequal numbers of layers: {_NOT_BUILT}; leave it out"),
    **dict.fromkeys(
        ("use-torch-fsdp2", "use-megatron-fsdp", "use-custom-fsdp"),
        ((), f"fully sharded data parallelism (FSDP) {_NOT_BUILT}; use --use-distributed-optimizer"),
    ),
    **dict.fromkeys(
        ("cpu-offload", "cpu-offloading", "cpu-offloading-num-layers", "optimizer-cpu-offload"),
        ((), f"offload to CPU memory {_NOT_BUILT}; use --use-distributed-optimizer or --recompute-granularity full"),
    ),
    **dict.fromkeys(
        ("fp8-format", "fp8", "fp8-recipe"),
        ((), "fp8 needs Transformer Engine layers, which are not built yet; use --bf16"),
    ),
    "recompute-activations": ((), f"selective recomputation {_NOT_BUILT}; use --recompute-granularity full"),
    "use-precision-aware-optimizer": ((), f"a precision-aware optimizer {_NOT_BUILT}; leave it out"),
    # A row without images runs no module of the tower, so that ranks would gather parameters in different orders.
    "overlap-param-gather": ((), f"gathering parameters during the forward pass {_NOT_BUILT}; leave it out"),
    "async-save": ((), f"asynchronous saving {_NOT_BUILT}; leave it out"),
}


@dataclass
class ParsedFlags:
    """What a command line says: the config file, settings in order, and lines to print about flags without effect."""

    config: str | None = None
    settings: list[tuple[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_flags(argv: Sequence[str]) -> ParsedFlags:
    """Reads `--config FILE`, `section.key=value` and flags, in order; a later one wins.

    Raises:
        ConfigError: unknown or refused flag, missing or surplus value.
    """
    parsed = ParsedFlags()
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            key, sep, value = word.partition("=")
            if not sep or "." not in key:
                raise ConfigError(f"cannot read argument {word!r}: expected --flag or section.key=value")
            parsed.settings.append((key.strip(), _plain(value)))
            continue
        name, sep, inline = word[2:].partition("=")
        flag = name.replace("_", "-")
        values = ([inline] if sep else []) + _take_values(words)
        if flag == "config":
            parsed.config = _one(word, values)
        elif flag in VALUES:
            parsed.settings.append((VALUES[flag], _one(word, values)))
        elif flag in LISTS:
            if not values:
                raise ConfigError(f"--{flag} needs at least one value")
            parsed.settings.append((LISTS[flag], _folders(values)))
        elif flag in SWITCHES:
            key, value = SWITCHES[flag]
            said = " ".join(values).lower()
            if said and (said not in ("true", "false") or not isinstance(value, bool)):
                raise ConfigError(f"--{flag} takes no value, got {' '.join(values)!r}")
            parsed.settings.append((key, not value if said == "false" else value))
        elif flag in REFUSED:
            accepted, message = REFUSED[flag]
            if not values or any(value not in accepted for value in values):
                raise ConfigError(f"--{flag} {' '.join(values)}".rstrip() + f": {message}")
        elif flag in IGNORED:
            parsed.notes.append(f"--{flag} has no effect here: {IGNORED[flag]}")
        else:
            known = ["config", *VALUES, *LISTS, *SWITCHES, *REFUSED, *IGNORED]
            raise ConfigError(f"unknown flag --{flag}{nearest(flag, known)}")
    return parsed


def flags_help() -> str:
    """The table as text."""
    lines = ["flags (hyphens equal underscores) and the config keys they set:", ""]
    rows = [("--config FILE", "YAML with the sections above"), ("--help", "this text")]
    rows += [(f"--{flag} VALUE", key) for flag, key in VALUES.items()]
    rows += [(f"--{flag} DIR ...", key) for flag, key in LISTS.items()]
    rows += [(f"--{flag}", f"{key}={str(value).lower()}") for flag, (key, value) in SWITCHES.items()]
    lines += [f"  {left:<48} {right}" for left, right in rows]
    lines += ["", "accepted without effect, each with a line that says why:", *_wrap(IGNORED)]
    lines += ["", "refused by name where they ask for what is not built:", *_wrap(REFUSED)]
    return "\n".join(lines)


def _wrap(flags: Iterable[str]) -> list[str]:
    return textwrap.wrap(" ".join(flags), 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _take_values(words: list[str]) -> list[str]:
    """Removes and returns the words up to the next flag or ``section.key=value``; negative numbers are values."""
    values = []
    while words and not words[0].startswith("--") and not _is_override(words[0]):
        values.append(words.pop(0))
    return values


def _is_override(word: str) -> bool:
    key, sep, _ = word.partition("=")
    return bool(sep) and all(part.isidentifier() for part in key.split(".")) and "." in key


def _folders(values: list[str]) -> list[Any]:
    """Megatron's blends: ``0.3 A 0.7 B`` gives each folder a weight; folders alone stay as they are."""
    pairs = list(zip(values[::2], values[1::2]))
    if len(values) % 2 or not all(_is_number(weight) for weight, _ in pairs) or any(_is_number(p) for _, p in pairs):
        return list(values)
    return [{"path": path, "weight": float(weight)} for weight, path in pairs]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _one(word: str, values: list[str]) -> str:
    if len(values) != 1:
        raise ConfigError(f"{word.split('=')[0]} needs one value, got {' '.join(values) or 'none'}")
    return values[0]


def _plain(text: str) -> Any:
    """A value as YAML reads it, so that none, true and lists can be written."""
    try:
        return yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read value {text!r}: {error}") from error
