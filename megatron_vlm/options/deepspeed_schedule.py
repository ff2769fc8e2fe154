"""Section ``scheduler`` of a DeepSpeed file -> the schedule of a run, with DeepSpeed's own defaults.

    WarmupLR        warm-up to warmup_max_lr, which stays
    WarmupDecayLR   the same, then in a line to warmup_min_lr at total_num_steps
    WarmupCosineLR  warm-up from warmup_min_ratio, then a cosine to cos_min_ratio, in shares of the learning rate

Source of formulas and defaults: deepspeed/runtime/lr_schedules.py. DeepSpeed steps a scheduler after each update, so that its own
runs have every rate one update later than the formula says; here the update after n others has the rate of n.
"""

from typing import TYPE_CHECKING, Any

from megatron_vlm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_vlm.options.deepspeed import DeepSpeedFile

STYLES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
WARMUP_STEPS, WARMUP_TYPE, DECAY_MAX_LR, COSINE_FLOOR = 1000, "log", 1e-3, 1e-4
_LEAST_WARMUP = 2
_PARAMS = {
    "warmup_num_steps",
    "warmup_type",
    "warmup_min_lr",
    "warmup_max_lr",
    "total_num_steps",
    "last_batch_iteration",
}
_OF_COSINE = {"warmup_min_ratio", "cos_min_ratio"} | _PARAMS - {"warmup_min_lr", "warmup_max_lr"}


def read_scheduler(file: "DeepSpeedFile") -> None:
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
    known = _OF_COSINE if kind == "WarmupCosineLR" else _PARAMS
    file.without += [f"scheduler.params.{key}" for key in sorted(params.keys() - known)]


def _warmup(file: "DeepSpeedFile", params: dict[str, Any]) -> None:
    """Length and form of the warm-up; DeepSpeed's take 1,000 updates and rise by a logarithm unless the file says otherwise."""
    form = params.get("warmup_type", WARMUP_TYPE)
    if file.told(form):
        if form not in ("log", "linear"):
            raise ConfigError(f"{file.path}: scheduler.params.warmup_type must be log or linear, got {form!r}")
        file.set("optimizer.lr_warmup_style", form, "scheduler.params.warmup_type", written="warmup_type" in params)
    steps = params.get("warmup_num_steps", WARMUP_STEPS)
    if not file.told(steps):
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


def _shares(file: "DeepSpeedFile", params: dict[str, Any]) -> None:
    """What WarmupCosineLR says in shares of the learning rate."""
    file.take(params, "warmup_min_ratio", "optimizer.lr_warmup_start_factor", 0.0, "scheduler.params")
    floor = params.get("cos_min_ratio", COSINE_FLOOR)
    if not file.told(floor):
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
