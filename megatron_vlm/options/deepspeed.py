"""A DeepSpeed JSON -> settings of a run, with DeepSpeed's own defaults.

Its schedules:

    WarmupLR        warm-up to warmup_max_lr, which stays
    WarmupDecayLR   the same, then in a line to warmup_min_lr at total_num_steps
    WarmupCosineLR  warm-up from warmup_min_ratio, then a cosine to cos_min_ratio, in shares of the learning rate

Source of formulas and defaults: deepspeed/runtime/lr_schedules.py. DeepSpeed steps a scheduler after each update, so that its own
runs have every rate one update later than the formula says; here the update after n others has the rate of n.
"""

import re
from collections.abc import Mapping
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.files import read_json
from megatron_vlm.options.launch_config import LaunchConfig
from megatron_vlm.options.trainer_flags import ADAMW

# Keys of a DeepSpeed file that are read; of the others the top ones are named as without effect.
_READ = {
    "zero_optimization", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps", "fp16", "bf16", "optimizer", "scheduler", "zero_allow_untested_optimizer",
}  # fmt: skip
_ZERO_READ = {"stage", "offload_optimizer", "offload_param", "cpu_offload", "overlap_comm"}
# Sections that change what is computed where they are on, and their switch; off, they have no effect.
_CHANGES = {
    "amp": "enabled", "torch_autocast": "enabled", "curriculum_learning": "enabled", "data_efficiency": "enabled",
    "progressive_layer_drop": "enabled", "elasticity": "enabled", "quantize_training": "enabled", "sparse_attention": "mode",
    "compression_training": "",
}  # fmt: skip
_ZERO_CHANGES = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
_ADAM = {"lr": ("lr", 1e-3), "eps": ("adam_eps", 1e-8), "weight_decay": ("weight_decay", 0.0)}
_FP16 = {"loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
_SCALE_POWER = 16
"""Defaults of DeepSpeed: deepspeed/ops/adam/fused_adam.py, deepspeed/runtime/constants.py, runtime/precision_config.py."""

STYLES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
WARMUP_STEPS, WARMUP_TYPE, DECAY_MAX_LR, COSINE_FLOOR = 1000, "log", 1e-3, 1e-4
_LEAST_WARMUP = 2
_SCHEDULE_PARAMS = {
    "warmup_num_steps",
    "warmup_type",
    "warmup_min_lr",
    "warmup_max_lr",
    "total_num_steps",
    "last_batch_iteration",
}
_COSINE_PARAMS = {"warmup_min_ratio", "cos_min_ratio"} | _SCHEDULE_PARAMS - {"warmup_min_lr", "warmup_max_lr"}


def preset(name: str) -> dict[str, Any] | None:
    """What XTuner's and ms-swift's names of such files stand for (deepspeed_zero2_offload, zero3); None: it is no such name."""
    match = re.fullmatch(r"(?:deepspeed_)?zero([0-3])(_offload)?", name)
    if match is None:
        return None
    stage = int(match[1])
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True}
    if match[2]:
        parts = ("offload_optimizer", "offload_param") if stage == 3 else ("offload_optimizer",)
        zero |= {part: {"device": "cpu", "pin_memory": True} for part in parts}
    auto = ("gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {**dict.fromkeys(auto, "auto"), "zero_optimization": zero}


class DeepSpeedFile:
    """What a DeepSpeed JSON, or a ``preset``, asks for.

    Attributes:
        stage: of ZeRO.
        offload: what is to lie in the host's memory.
        keeps: the file says itself that the optimizer stays on the device.
        settings: keys of the run that it sets, sharding and offload left out: options/sharding.py says these.
        batch: the same of LaunchConfig.
        notes: lines to print.

    Raises:
        ConfigError: a number contradicts the command line's, or a value is not built.
    """

    def __init__(self, path: str, given: Mapping[str, Any], launch: LaunchConfig):
        self.path, self.given, self.launch = path, given, launch
        self.data = preset(path) or read_json(path)
        self.settings: dict[str, Any] = {}
        self.batch: dict[str, int] = {}
        self.offload: list[str] = []
        self.without: list[str] = sorted(self.data.keys() - _READ)
        zero = self.section("zero_optimization")
        stage = self.number(zero.get("stage", 0), "zero_optimization.stage")
        if stage not in (0, 1, 2, 3):
            raise ConfigError(f"{self.path}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage}")
        self.stage = int(stage)
        for key, what in (("offload_optimizer", "optimizer state"), ("offload_param", "weights")):
            device = (zero.get(key) or {}).get("device", "none") if isinstance(zero.get(key) or {}, dict) else "cpu"
            if device not in ("none", None, "cpu"):
                raise ConfigError(
                    f"{self.path}: {key}.device {device} is not built yet; use cpu, the host's memory, or none"
                )
            if device == "cpu":
                self.offload.append(what)
                ratio = isinstance(zero[key], dict) and "ratio" in zero[key]  # parallel.offload_fraction says it here
                self.without += [f"zero_optimization.{key}.ratio"] if ratio else []
        if zero.get("cpu_offload") and "optimizer state" not in self.offload:
            self.offload.append("optimizer state")
        offloads = any(key in zero for key in ("offload_optimizer", "cpu_offload"))
        self.keeps = offloads and "optimizer state" not in self.offload
        self._refuse_changes(zero)
        if stage and zero.get("overlap_comm") is True:
            self.set("parallel.overlap_grad_reduce", True, "zero_optimization.overlap_comm")
        self.without += [f"zero_optimization.{key}" for key in sorted(zero.keys() - _ZERO_READ)]
        self._batch()
        self._precision()
        self._optimizer()
        _read_scheduler(self)
        self.take(self.data, "gradient_clipping", "optimizer.clip_grad", 0.0)
        words = {0: "no sharding: plain data parallel replicas", 1: "stage 1 is the distributed optimizer"}
        self.notes = [f"{self.path}: {words[self.stage]}"] if self.stage in words else []
        if self.without:
            self.notes.append(f"{self.path}: no effect here: {', '.join(self.without)}")

    def _batch(self) -> None:
        for key, name in (
            ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
            ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ):
            if not self.says(self.data.get(key)):
                continue
            value = int(self.number(self.data[key], key))
            flag = getattr(self.launch, name)
            said = flag * (self.launch.batch_size or 1) if flag and name.startswith("per") else flag
            if said is not None and said != value:
                raise ConfigError(f"{self.path}: {key} is {value}, but --{name} says {said}: change one, or write auto")
            self.batch[name] = flag or value
        if self.says(self.data.get("train_batch_size")):
            value = int(self.number(self.data["train_batch_size"], "train_batch_size"))
            self.set("training.global_batch_size", value, "train_batch_size")

    def _precision(self) -> None:
        on = {}
        for name in ("bf16", "fp16"):
            enabled = self.section(name).get("enabled")
            if enabled is True:
                on[name] = True
            elif enabled is False and self.given.get("training.precision") == name:
                raise ConfigError(
                    f"{self.path}: {name}.enabled is false, but the command line says training.precision = {name}: change one, "
                    "or write auto"
                )
        if len(on) == 2:
            raise ConfigError(f"{self.path}: bf16 and fp16 are both enabled; enable one of them")
        for name in on:
            self.set("training.precision", name, f"{name}.enabled")
        if self.given.get("training.precision", self.settings.get("training.precision")) != "fp16":
            return
        fp16 = self.section("fp16")
        if self.says(fp16.get("loss_scale")) and fp16["loss_scale"]:
            self.set(
                "optimizer.loss_scale", float(self.number(fp16["loss_scale"], "fp16.loss_scale")), "fp16.loss_scale"
            )
        power = fp16.get("initial_scale_power", _SCALE_POWER)
        if self.says(power):
            where = "fp16.initial_scale_power"
            self.set("optimizer.initial_loss_scale", 2.0 ** self.number(power, where), where)
        for key, value in _FP16.items():
            self.take(fp16, key, f"optimizer.{key}", value, "fp16")

    def _optimizer(self) -> None:
        section = self.section("optimizer")
        kind = section.get("type")
        if kind is None:
            return
        if not isinstance(kind, str) or kind.lower() not in ("adamw", "adam", *ADAMW):
            raise ConfigError(f"{self.path}: optimizer.type {kind} is not built yet: AdamW is the only optimizer")
        params = self.params_of(section, "optimizer")
        for key, (name, value) in _ADAM.items():
            self.take(params, key, f"optimizer.{name}", value, "optimizer.params")
        betas = params.get("betas", [0.9, 0.999])
        if self.says(betas):
            if not isinstance(betas, list) or len(betas) != 2:
                raise ConfigError(f"{self.path}: optimizer.params.betas must be two numbers or auto, got {betas!r}")
            for name, value in zip(("adam_beta1", "adam_beta2"), betas):
                self.set(f"optimizer.{name}", self.number(value, "optimizer.params.betas"), "optimizer.params.betas")
        for key, only in (("adam_w_mode", True), ("bias_correction", True), ("amsgrad", False)):
            if params.get(key, only) is not only:
                raise ConfigError(f"{self.path}: optimizer.params.{key} {params[key]} is not built yet; leave it out")
        read = {*_ADAM, "betas", "adam_w_mode", "bias_correction", "amsgrad"}
        self.without += [f"optimizer.params.{key}" for key in sorted(params.keys() - read)]

    def _refuse_changes(self, zero: Mapping[str, Any]) -> None:
        """Raises ConfigError for what would change the numbers and is not built."""
        for key, switch in _CHANGES.items():
            value = self.data.get(key)
            on = value.get(switch) if isinstance(value, dict) and switch else value
            if on not in (None, False, {}, "none"):
                raise ConfigError(f"{self.path}: {key} is on, which is not built yet: switch it off, or leave it out")
        for key in _ZERO_CHANGES:
            if zero.get(key):
                raise ConfigError(f"{self.path}: zero_optimization.{key} is not built yet: leave it out")

    def take(self, section: Mapping[str, Any], key: str, setting: str, default: float | None, where: str = "") -> None:
        """Sets a key of the run from a number of the file, or from what DeepSpeed takes where it is not written."""
        name = f"{where}.{key}" if where else key
        if key not in section or section[key] is None:
            if default is not None:
                self.set(setting, default, name, written=False)
        elif self.says(section[key]):
            self.set(setting, self.number(section[key], name), name)

    def set(self, key: str, value: Any, where: str, *, written: bool = True) -> None:
        """Sets a key of the run, unless the command line sets it; another value there is an error."""
        if self.given.get(key) is None:
            self.settings[key] = value
        elif not _equal(self.given[key], value):
            said = f"is {value}" if written else f"is not written, which means {value} to DeepSpeed"
            raise ConfigError(
                f"{self.path}: {where} {said}, but the command line says {key} = {self.given[key]}: change one, or write auto"
            )

    def at(self, key: str) -> Any:
        """What the command line or the file says of a key so far."""
        return self.given.get(key) if self.given.get(key) is not None else self.settings.get(key)

    def params_of(self, section: Mapping[str, Any], name: str) -> dict[str, Any]:
        """``params`` of optimizer or scheduler."""
        params = section.get("params") or {}
        if not isinstance(params, dict):
            raise ConfigError(f"{self.path}: {name}.params must be an object, got {params!r}")
        return params

    def section(self, key: str) -> dict[str, Any]:
        """A section of the file."""
        value = self.data.get(key) or {}
        if not isinstance(value, dict):
            raise ConfigError(f"{self.path}: {key} must be an object, got {value!r}")
        return value

    def number(self, value: Any, where: str) -> float:
        """A value that must be a number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.path}: {where} must be a number or auto, got {value!r}")
        return value

    def says(self, value: Any) -> bool:
        """Whether the file says a value of its own."""
        return value is not None and value != "auto"


def _read_scheduler(file: DeepSpeedFile) -> None:
    """Puts the schedule into ``file.settings``; what has no effect goes to ``file.without``.

    Raises:
        ConfigError: a scheduler that is not built, a value that cannot be, or one that contradicts the command line.
    """
    section = file.section("scheduler")
    kind = section.get("type")
    if kind is None:
        return
    if kind not in STYLES:
        raise ConfigError(f"{file.path}: scheduler.type {kind} is not built yet: use one of {', '.join(STYLES)}")
    if "optimizer.lr_decay_style" in file.given:
        file.without.append(f"scheduler {kind}, as --lr_scheduler_type is given")
        return
    file.set("optimizer.lr_decay_style", STYLES[kind], "scheduler.type")
    params = file.params_of(section, "scheduler")
    _warmup(file, params)
    if kind != "WarmupLR":
        if "total_num_steps" not in params:
            raise ConfigError(
                f"{file.path}: scheduler {kind} needs params.total_num_steps: write it, or auto for the run's"
            )
        file.take(params, "total_num_steps", "optimizer.lr_decay_iters", None, "scheduler.params")
    if kind == "WarmupCosineLR":
        _shares(file, params)
    else:
        default = DECAY_MAX_LR if kind == "WarmupDecayLR" else None
        file.take(params, "warmup_max_lr", "optimizer.lr", default, "scheduler.params")
        file.take(params, "warmup_min_lr", "optimizer.lr_warmup_init", 0.0, "scheduler.params")
        if kind == "WarmupDecayLR":
            file.take(params, "warmup_min_lr", "optimizer.min_lr", 0.0, "scheduler.params")
    known = _COSINE_PARAMS if kind == "WarmupCosineLR" else _SCHEDULE_PARAMS
    file.without += [f"scheduler.params.{key}" for key in sorted(params.keys() - known)]


def _warmup(file: DeepSpeedFile, params: dict[str, Any]) -> None:
    """Length and form of the warm-up; DeepSpeed's take 1,000 updates and rise by a logarithm unless the file says otherwise."""
    form = params.get("warmup_type", WARMUP_TYPE)
    if file.says(form):
        if form not in ("log", "linear"):
            raise ConfigError(f"{file.path}: scheduler.params.warmup_type must be log or linear, got {form!r}")
        file.set("optimizer.lr_warmup_style", form, "scheduler.params.warmup_type", written="warmup_type" in params)
    steps = params.get("warmup_num_steps", WARMUP_STEPS)
    if not file.says(steps):
        return
    where, written = "scheduler.params.warmup_num_steps", "warmup_num_steps" in params
    steps = file.number(steps, where)
    if steps < 1 or steps != int(steps):
        raise ConfigError(f"{file.path}: {where} must be a whole number, at least 1, got {steps:g}")
    fraction = file.given.get("optimizer.lr_warmup_fraction")
    if fraction is not None:
        said = f"is {steps:g}" if written else f"is not written, which means {steps:g} to DeepSpeed"
        raise ConfigError(
            f"{file.path}: {where} {said}, but the command line says optimizer.lr_warmup_fraction = {fraction}: change one, or "
            "write auto"
        )
    file.set("optimizer.lr_warmup_iters", max(_LEAST_WARMUP, int(steps)), where, written=written)


def _shares(file: DeepSpeedFile, params: dict[str, Any]) -> None:
    """What WarmupCosineLR says in shares of the learning rate."""
    file.take(params, "warmup_min_ratio", "optimizer.lr_warmup_start_factor", 0.0, "scheduler.params")
    floor = params.get("cos_min_ratio", COSINE_FLOOR)
    if not file.says(floor):
        return
    lr = file.at("optimizer.lr")
    if lr is None:
        raise ConfigError(
            f"{file.path}: scheduler WarmupCosineLR ends at a share of the learning rate, which neither optimizer.params.lr nor "
            "the command line says: add --learning_rate"
        )
    where = "scheduler.params.cos_min_ratio"
    share = file.number(floor, where)
    file.set(
        "optimizer.min_lr", share * float(lr), f"{where} {share:g}, a floor that", written="cos_min_ratio" in params
    )


def _equal(one: Any, other: Any) -> bool:
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one).lower() == str(other).lower()
