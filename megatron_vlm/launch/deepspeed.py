"""DeepSpeed and FSDP options -> what does the same here; never ignored.

    --deepspeed zero1.json --read_sharding--> Sharding(stage 1): distributed optimizer, clipping, batch, loss scale
    stage 2, 3, offload, --fsdp            --> Sharding.refused(): what is not built, refused with the nearest setting that fits

docs/from-deepspeed.md holds the whole table.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.launch.config import LaunchConfig
from megatron_vlm.launch.trainer_flags import ADAMW

if TYPE_CHECKING:
    from megatron_vlm.launch.arguments import Told

NEAREST = (
    "--use-distributed-optimizer (ZeRO stage 1); tensor and pipeline parallel sizes, which cut weights and gradients too "
    "(--tensor-model-parallel-size 2, 4, ...); --recompute-granularity full; adapters on a base in 4 bits (--use_lora "
    "--quantize nf4)"
)
"""In words, where no estimate is at hand."""

# Keys of a DeepSpeed file that are read; of the others the top ones are named as without effect.
_SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_READ = {
    "zero_optimization", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps", "fp16", "bf16", "optimizer", "scheduler", "zero_allow_untested_optimizer",
}  # fmt: skip
_ZERO_READ = {"stage", "offload_optimizer", "offload_param", "cpu_offload", "overlap_comm"}
_NONE = (None, "", "none", "None", "no", "False", "false")


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What DeepSpeed or FSDP options ask for.

    Attributes:
        stage: ZeRO stage; FSDP's policies are 3 (FULL_SHARD), 2 (SHARD_GRAD_OP) and 0 (NO_SHARD); None: nothing was asked for.
        offload: what is to lie in the host's memory.
        source: the option, for messages.
        settings: keys of the run that it sets.
        batch: the same of LaunchConfig.
        notes: lines to print.
    """

    stage: int | None = None
    offload: tuple[str, ...] = ()
    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def refused(self, *, adapts: bool) -> str | None:
        """What is not built of it, in words. With adapters stage 2 has next to no gradients to shard: it is stage 1."""
        parts = []
        if self.stage == 3:
            parts.append("sharding of weights, gradients and optimizer state (ZeRO stage 3, FSDP FULL_SHARD)")
        elif self.stage == 2 and not adapts:
            parts.append("sharding of gradients (ZeRO stage 2, FSDP SHARD_GRAD_OP)")
        if self.offload:
            parts.append(f"offload of {' and '.join(self.offload)} to the host's memory")
        return f"{self.source} asks for {' with '.join(parts)}" if parts else None

    def refusal(self, *, adapts: bool, nearest: str | None = None) -> str | None:
        """The error's text; ``nearest``: settings that fit the memory found, by the estimate. None: nothing is refused."""
        refused = self.refused(adapts=adapts)
        if refused is None:
            return None
        instead = f"nearest setting that fits: {nearest}" if nearest else f"nearest: {NEAREST}"
        return (
            f"{refused}, which is not built yet; {instead}. Leave {self.source.split()[0]} out (docs/from-deepspeed.md)"
        )


def read_sharding(told: "Told", given: Mapping[str, Any], launch: LaunchConfig) -> Sharding:
    """Reads the flags and the DeepSpeed file that they name.

    Args:
        told: the flags.
        given: keys that the command line sets -> values; numbers of the file must agree with them.
        launch: settings of the start, for the batch.

    Raises:
        ConfigError: both kinds at once, a file that cannot be read, or one whose numbers contradict the command line's.
    """
    fsdp = [word for value in told.fsdp for word in value.split() if word not in _NONE]
    wants_fsdp = bool(told.use_fsdp or (told.use_fsdp is None and (fsdp or told.fsdp_policy not in _NONE)))
    file = None if told.deepspeed in _NONE or told.use_deepspeed is False else told.deepspeed
    wants_deepspeed = bool(told.use_deepspeed or file)
    if wants_fsdp and wants_deepspeed:
        raise ConfigError(
            f"--deepspeed {file or ''} and --fsdp {' '.join(fsdp) or told.fsdp_policy or ''}: both shard the model over the same "
            "ranks; leave one of them out".replace("  ", " ")
        )
    notes = []
    settings = (told.fsdp_wrap_cls, told.fsdp_config, told.fsdp_transformer_layer_cls_to_wrap, told.fsdp_policy)
    if not wants_fsdp and any(value not in _NONE for value in settings):
        notes.append("--fsdp_policy, --fsdp_wrap_cls and --fsdp_config have no effect without --use_fsdp or --fsdp")
    if told.deepspeed not in _NONE and told.use_deepspeed is False:
        notes.append(f"--deepspeed_config {told.deepspeed} has no effect with --use_deepspeed False")
    if wants_fsdp:
        return _fsdp(told, fsdp, notes)
    if not wants_deepspeed:
        return Sharding(notes=tuple(notes))
    if file is None:
        # FT.py writes a file of its own then.
        return Sharding(stage=2, offload=("optimizer state",), source="--use_deepspeed without --deepspeed_config")
    return _File(str(file), given, launch).read()


def _fsdp(told: "Told", words: list[str], notes: list[str]) -> Sharding:
    source = f"--fsdp {' '.join(words)}" if words else f"--use_fsdp {told.fsdp_policy or ''}".strip()
    asked = {word.lower() for word in words} | {(told.fsdp_policy or "").lower()}
    offload = ("weights and optimizer state",) if "offload" in asked else ()
    stage = 3
    if asked & {"shard_grad_op", "hybrid_shard_zero2"}:
        stage = 2
    elif "no_shard" in asked:
        stage = 0
        notes = [*notes, f"{source}: plain data parallel replicas, which is what runs here without any option"]
    settings = {"parallel.use_distributed_optimizer": True} if stage == 2 else {}
    if stage == 2:
        notes = [*notes, f"{source} becomes the distributed optimizer"]
    return Sharding(stage=stage, offload=offload, source=source, settings=settings, notes=tuple(notes))


class _File:
    """One DeepSpeed JSON on its way to settings."""

    def __init__(self, path: str, given: Mapping[str, Any], launch: LaunchConfig):
        self.path, self.given, self.launch = path, given, launch
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read the DeepSpeed file {path}: {error.strerror}") from error
        try:
            self.data = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the DeepSpeed file {path} is not valid JSON: {error}") from error
        if not isinstance(self.data, dict):
            raise ConfigError(f"the DeepSpeed file {path} must hold an object, got {type(self.data).__name__}")
        self.settings: dict[str, Any] = {}
        self.batch: dict[str, int] = {}
        self.without: list[str] = sorted(self.data.keys() - _READ)

    def read(self) -> Sharding:
        """Returns what the file says.

        Raises:
            ConfigError: a number contradicts the command line's, or a value is not built.
        """
        zero = self._section("zero_optimization")
        stage = self._number(zero.get("stage", 0), "zero_optimization.stage")
        if stage not in (0, 1, 2, 3):
            raise ConfigError(f"{self.path}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage}")
        offload = []
        for key, what in (("offload_optimizer", "optimizer state"), ("offload_param", "weights")):
            device = (zero.get(key) or {}).get("device", "none") if isinstance(zero.get(key) or {}, dict) else "cpu"
            if device not in ("none", None):
                offload.append(what)
        if zero.get("cpu_offload") and "optimizer state" not in offload:
            offload.append("optimizer state")
        if stage:
            self._set("parallel.use_distributed_optimizer", True, f"zero_optimization.stage {int(stage)}")
        if stage and zero.get("overlap_comm") is True:
            self.settings.setdefault("parallel.overlap_grad_reduce", True)
        self.without += [f"zero_optimization.{key}" for key in sorted(zero.keys() - _ZERO_READ)]
        self._batch()
        self._precision()
        self._optimizer()
        self._scheduler()
        if self._told(self.data.get("gradient_clipping")):
            clip = float(self._number(self.data["gradient_clipping"], "gradient_clipping"))
            self._set("optimizer.clip_grad", clip, "gradient_clipping")
        words = {0: "no sharding: plain data parallel replicas", 1: "stage 1 is the distributed optimizer"}
        words[2] = "stage 2 with adapters alone is the distributed optimizer: nothing else has gradients"
        notes = [f"{self.path}: {words[int(stage)]}"] if int(stage) in words else []
        if self.without:
            notes.append(f"{self.path}: no effect here: {', '.join(self.without)}")
        return Sharding(
            stage=int(stage),
            offload=tuple(offload),
            source=f"--deepspeed {self.path}",
            settings=self.settings,
            batch=self.batch,
            notes=tuple(notes),
        )

    def _batch(self) -> None:
        for key, name in (
            ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
            ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ):
            if not self._told(self.data.get(key)):
                continue
            value = int(self._number(self.data[key], key))
            flag = getattr(self.launch, name)
            said = flag * (self.launch.batch_size or 1) if flag and name.startswith("per") else flag
            if said is not None and said != value:
                raise ConfigError(f"{self.path}: {key} is {value}, but --{name} says {said}: change one, or write auto")
            self.batch[name] = flag or value
        if self._told(self.data.get("train_batch_size")):
            value = int(self._number(self.data["train_batch_size"], "train_batch_size"))
            self._set("training.global_batch_size", value, "train_batch_size")

    def _precision(self) -> None:
        on = {}
        for name in ("bf16", "fp16"):
            enabled = self._section(name).get("enabled", False)
            if enabled is True:
                on[name] = True
        if len(on) == 2:
            raise ConfigError(f"{self.path}: bf16 and fp16 are both enabled; enable one of them")
        for name in on:
            self._set("training.precision", name, f"{name}.enabled")
        fp16 = self._section("fp16")
        if self.given.get("training.precision", self.settings.get("training.precision")) != "fp16":
            return
        if self._told(fp16.get("loss_scale")) and fp16["loss_scale"]:
            self._set("optimizer.loss_scale", float(fp16["loss_scale"]), "fp16.loss_scale")
        if self._told(fp16.get("initial_scale_power")):
            power = self._number(fp16["initial_scale_power"], "fp16.initial_scale_power")
            self._set("optimizer.initial_loss_scale", 2.0**power, "fp16.initial_scale_power")
        for key, name in (
            ("loss_scale_window", "loss_scale_window"),
            ("hysteresis", "hysteresis"),
            ("min_loss_scale", "min_loss_scale"),
        ):
            if self._told(fp16.get(key)):
                self._set(f"optimizer.{name}", self._number(fp16[key], f"fp16.{key}"), f"fp16.{key}")

    def _optimizer(self) -> None:
        section = self._section("optimizer")
        kind = section.get("type")
        if kind is not None and kind.lower() not in ("adamw", "adam", *ADAMW):
            raise ConfigError(f"{self.path}: optimizer.type {kind} is not built yet: AdamW is the only optimizer")
        params = section.get("params") or {}
        names = {"lr": "lr", "eps": "adam_eps", "weight_decay": "weight_decay"}
        for key, name in names.items():
            if self._told(params.get(key)):
                self._set(
                    f"optimizer.{name}", self._number(params[key], f"optimizer.params.{key}"), f"optimizer.params.{key}"
                )
        if self._told(params.get("betas")):
            for name, value in zip(("adam_beta1", "adam_beta2"), params["betas"]):
                self._set(f"optimizer.{name}", self._number(value, "optimizer.params.betas"), "optimizer.params.betas")
        self.without += [f"optimizer.params.{key}" for key in sorted(params.keys() - {*names, "betas"})]

    def _scheduler(self) -> None:
        section = self._section("scheduler")
        kind = section.get("type")
        if kind is None:
            return
        if kind not in _SCHEDULERS:
            raise ConfigError(
                f"{self.path}: scheduler.type {kind} is not built yet: use one of {', '.join(_SCHEDULERS)}"
            )
        if "optimizer.lr_decay_style" in self.given:
            self.without.append(f"scheduler {kind}, as --lr_scheduler_type is given")
            return
        self._set("optimizer.lr_decay_style", _SCHEDULERS[kind], "scheduler.type")
        params = section.get("params") or {}
        names = {
            "warmup_max_lr": "lr",
            "warmup_min_lr": "lr_warmup_init",
            "warmup_num_steps": "lr_warmup_iters",
            "total_num_steps": "lr_decay_iters",
        }
        for key, name in names.items():
            if self._told(params.get(key)):
                where = f"scheduler.params.{key}"
                self._set(f"optimizer.{name}", self._number(params[key], where), where)
        self.without += [f"scheduler.params.{key}" for key in sorted(params.keys() - names.keys())]

    def _set(self, key: str, value: Any, where: str) -> None:
        """Sets a key of the run, unless the command line sets it; another value there is an error."""
        if key not in self.given or self.given[key] is None:
            self.settings[key] = value
        elif not _equal(self.given[key], value):
            raise ConfigError(
                f"{self.path}: {where} is {value}, but the command line says {key} = {self.given[key]}: change one, or write auto"
            )

    def _section(self, key: str) -> dict[str, Any]:
        value = self.data.get(key) or {}
        if not isinstance(value, dict):
            raise ConfigError(f"{self.path}: {key} must be an object, got {value!r}")
        return value

    def _number(self, value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.path}: {where} must be a number or auto, got {value!r}")
        return value

    def _told(self, value: Any) -> bool:
        return value is not None and value != "auto"


def _equal(one: Any, other: Any) -> bool:
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one).lower() == str(other).lower()
