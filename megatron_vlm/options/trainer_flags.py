"""Flags of transformers' Trainer -> settings of a run, with the Trainer's own rules where two flags speak of one thing.

So are Megatron's flags of recomputation, whose meaning depends on each other.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.options.flag_values import FlagValues
from megatron_vlm.training.metrics.trackers import TRACKERS

# lr_scheduler_type -> optimizer.lr_decay_style
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_hf", "adamw_apex_fused")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
REPORTS = ("tensorboard", *TRACKERS)
STRATEGIES = ("no", "steps", "epoch")
_MODULES = {"core_attn": "core_attention", "layernorm": "norm"}  # Megatron's name -> ours
_SAVE_STEPS = 500
"""The Trainer's default."""

Settings = dict[str, Any]


def settings(flags: FlagValues, run: Mapping[str, Any], *, has_valid: bool) -> tuple[Settings, list[str]]:
    """Returns what the flags set, and lines about those that give way to others.

    Raises:
        ConfigError: a value that is not built, or two flags that contradict each other.
    """
    made: Settings = {}
    notes: list[str] = []
    for part in (_length, _schedule, _precision, _saving, _reports):
        part(flags, made, notes)
    _evaluation(flags, run, made, notes, has_valid)
    if flags.gradient_checkpointing is not None:
        made["parallel.recompute_granularity"] = "full" if flags.gradient_checkpointing else None
    _recomputation(flags, made)
    if flags.optim is not None and flags.optim.lower() not in ADAMW:
        raise ConfigError(
            f"--optim {flags.optim} is not built yet: AdamW is the only optimizer; use --optim adamw_torch"
        )
    if flags.do_train is False:
        if not flags.do_eval:
            raise ConfigError(
                "--do_train False leaves nothing to do: leave it out, or add --do_eval True to evaluate only"
            )
        made["training.skip_train"] = True
    return made, notes


def settle(flags: FlagValues, run: dict[str, Any], given: frozenset[str]) -> list[str]:
    """Applies flags whose effect depends on other settings; returns lines about those without effect here."""
    notes = []
    training, data = run.setdefault("training", {}), run.setdefault("data", {})
    precision = training.get("precision") or "fp32"
    dtype = (flags.bnb_4bit_compute_dtype or "auto").lower().removeprefix("torch.")
    if dtype != "auto" and DTYPES.get(dtype, dtype) != precision:
        raise ConfigError(
            f"--bnb_4bit_compute_dtype {dtype}: this run computes in {precision}, layers in 4 bits too (--bf16, --fp16, "
            "training.precision): change one, or leave it out"
        )
    if flags.tf32 and precision == "fp32":
        training.setdefault("tf32", True)
    elif flags.tf32:
        notes.append(
            f"--tf32 has no effect here: it speaks of fp32 matrix products, and this run computes in {precision}"
        )
    if flags.group_by_length and data.get("packing"):
        notes.append("--group_by_length has no effect here: rows are packed, so that no length is padded to another")
    elif flags.group_by_length is not None and "data.group_by" not in given:
        data["group_by"] = "length" if flags.group_by_length else None
    return notes


def _recomputation(flags: FlagValues, made: Settings) -> None:
    """Megatron's flags; without a method ``recompute_num_layers`` is the setting of that name."""
    method, count = flags.recompute_method, flags.recompute_num_layers
    if method not in (None, "uniform", "block"):
        raise ConfigError(f"--recompute-method must be uniform or block, got {method}")
    if method == "uniform" and (count or 1) != 1:
        raise ConfigError(
            f"--recompute-method uniform --recompute-num-layers {count}: recomputation goes layer by layer; chunks of several "
            "layers are not built yet: set it to 1"
        )
    if method != "uniform" and count is not None:
        made["parallel.recompute_num_layers"] = count
    if flags.recompute_activations:
        made["parallel.recompute_granularity"] = "selective"
    if flags.recompute_modules:
        made["parallel.recompute_modules"] = [_MODULES.get(name, name) for name in flags.recompute_modules]


def _length(flags: FlagValues, made: Settings, notes: list[str]) -> None:
    if flags.max_steps is not None and flags.max_steps > 0:
        made["training.train_iters"] = flags.max_steps
        if flags.num_train_epochs is not None:
            notes.append(f"--num_train_epochs {flags.num_train_epochs:g} gives way to --max_steps {flags.max_steps}")
    elif flags.num_train_epochs is not None:
        made["training.train_epochs"] = flags.num_train_epochs


def _schedule(flags: FlagValues, made: Settings, notes: list[str]) -> None:
    if flags.learning_rate is not None:
        made["optimizer.lr"] = flags.learning_rate
        made["optimizer.vision_lr"] = made["optimizer.connector_lr"] = None
    kind = flags.lr_scheduler_type
    if kind is not None:
        if kind not in SCHEDULES:
            raise ConfigError(f"--lr_scheduler_type {kind} is not built yet: use one of {', '.join(SCHEDULES)}")
        made["optimizer.lr_decay_style"] = SCHEDULES[kind]
        made["optimizer.min_lr"] = 0.0
    ratio, steps = flags.warmup_ratio, flags.warmup_steps
    if ratio is not None and not 0 <= ratio < 1:
        raise ConfigError(f"--warmup_ratio must be at least 0 and below 1, got {ratio}")
    if kind == "constant" and (ratio or steps):
        notes.append("the warm-up is left out: --lr_scheduler_type constant has none (constant_with_warmup has)")
        ratio, steps = None, 0
    if steps:
        made["optimizer.lr_warmup_iters"] = steps
        if ratio:
            notes.append(f"--warmup_ratio {ratio:g} gives way to --warmup_steps {steps}")
    elif ratio is not None:
        made["optimizer.lr_warmup_fraction"] = ratio
    elif steps is not None:
        made["optimizer.lr_warmup_iters"] = 0


def _precision(flags: FlagValues, made: Settings, notes: list[str]) -> None:
    if flags.bf16 and flags.fp16:
        raise ConfigError("--bf16 True and --fp16 True: weights and activations have one of them; leave the other out")
    if flags.bf16 is not None or flags.fp16 is not None:
        made["training.precision"] = "bf16" if flags.bf16 else "fp16" if flags.fp16 else "fp32"


def _strategy(flag: str, value: str) -> str:
    if value not in STRATEGIES:
        raise ConfigError(f"--{flag} {value} is not built yet: use one of {', '.join(STRATEGIES)}")
    return value


def _whole(flag: str, value: float) -> int:
    if value < 1 or value != int(value):
        raise ConfigError(
            f"--{flag} {value:g}: a share of the run is not built yet; give a number of steps, at least 1"
        )
    return int(value)


def _saving(flags: FlagValues, made: Settings, notes: list[str]) -> None:
    strategy = flags.save_strategy and _strategy("save_strategy", flags.save_strategy)
    if strategy in ("no", "epoch"):
        made["checkpoint.save_epochs" if strategy == "epoch" else "checkpoint.save_interval"] = (
            1.0 if strategy == "epoch" else None
        )
        if strategy == "no":
            made["checkpoint.save_epochs"] = None
        if flags.save_steps is not None:
            notes.append(f"--save_steps {flags.save_steps:g} has no effect with --save_strategy {strategy}")
    elif strategy == "steps" or flags.save_steps is not None:
        steps = _SAVE_STEPS if flags.save_steps is None else flags.save_steps
        made["checkpoint.save_interval"] = _whole("save_steps", steps)
    if flags.save_total_limit is not None:
        made["checkpoint.keep_last"] = flags.save_total_limit
        if flags.save_total_limit == 1:
            made["checkpoint.keep_last"] = 2
            notes.append("--save_total_limit 1: two checkpoints are kept, as the newest may turn out damaged")


def _evaluation(flags: FlagValues, run: Mapping[str, Any], made: Settings, notes: list[str], has_valid: bool) -> None:
    strategy = flags.eval_strategy and _strategy("eval_strategy", flags.eval_strategy)
    if flags.eval_steps is not None and strategy != "steps":
        notes.append(f"--eval_steps {flags.eval_steps:g} has no effect without --eval_strategy steps")
    if (strategy in ("steps", "epoch") or flags.do_eval) and not has_valid:
        notes.append(
            f"--{'do_eval' if strategy in (None, 'no') else f'eval_strategy {strategy}'} has no effect: no held-out data is "
            "named (--eval_data_path, --val_json)"
        )
        strategy = "no" if strategy else None
    if strategy is None:
        return
    made["training.eval_interval"] = made["training.eval_epochs"] = None
    if strategy == "steps":
        logging = (run.get("logging") or {}).get("log_interval")
        steps = flags.eval_steps if flags.eval_steps is not None else float(logging or _SAVE_STEPS)
        made["training.eval_interval"] = _whole("eval_steps", steps)
    elif strategy == "epoch":
        made["training.eval_epochs"] = 1.0


def _reports(flags: FlagValues, made: Settings, notes: list[str]) -> None:
    wanted = {word.lower() for value in flags.report_to for word in value.replace(",", " ").split()}
    if not wanted:
        return
    if wanted == {"all"}:  # what is installed
        wanted = {name for name in REPORTS if name == "tensorboard" or importlib.util.find_spec(name) is not None}
    if wanted == {"none"}:
        wanted = set()
    unknown = sorted(wanted - set(REPORTS))
    if unknown:
        raise ConfigError(
            f"--report_to {' '.join(unknown)}: reports go to {', '.join(REPORTS)}, all that are installed (all), or none"
        )
    made["logging.tensorboard"] = "tensorboard" in wanted
    made |= {f"logging.{name}": name in wanted for name in TRACKERS}
