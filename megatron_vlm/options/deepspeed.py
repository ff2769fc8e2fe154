"""DeepSpeed and FSDP options -> what does the same here; never ignored.

    --deepspeed zero1.json --read_sharding--> Sharding(stage 1): distributed optimizer, clipping, batch, loss scale
    stage 2, 3, offload, --fsdp            --> Sharding.refused(): what is not built, refused with the nearest setting that fits

docs/from-deepspeed.md holds the whole table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.files import read_json
from megatron_vlm.options.deepspeed_schedule import read_scheduler
from megatron_vlm.options.launch_config import LaunchConfig
from megatron_vlm.options.trainer_flags import ADAMW

if TYPE_CHECKING:
    from megatron_vlm.options.arguments import Told

NEAREST = (
    "--use-distributed-optimizer (ZeRO stage 1); tensor and pipeline parallel sizes, which cut weights and gradients too "
    "(--tensor-model-parallel-size 2, 4, ...); --recompute-granularity full; adapters on a base in 4 bits (--use_lora "
    "--quantize nf4)"
)
"""In words, where no estimate is at hand."""

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
_NONE = (None, "", "none", "None", "no", "False", "false")
_ADAM = {"lr": ("lr", 1e-3), "eps": ("adam_eps", 1e-8), "weight_decay": ("weight_decay", 0.0)}
_FP16 = {"loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
_SCALE_POWER = 16
"""Defaults of DeepSpeed: deepspeed/ops/adam/fused_adam.py, deepspeed/runtime/constants.py, runtime/precision_config.py."""


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
    return DeepSpeedFile(str(file), given, launch).read()


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


class DeepSpeedFile:
    """One DeepSpeed JSON on its way to settings."""

    def __init__(self, path: str, given: Mapping[str, Any], launch: LaunchConfig):
        self.path, self.given, self.launch = path, given, launch
        self.data = read_json(path)
        self.settings: dict[str, Any] = {}
        self.batch: dict[str, int] = {}
        self.without: list[str] = sorted(self.data.keys() - _READ)
        self.notes: list[str] = []

    def read(self) -> Sharding:
        """Returns what the file says.

        Raises:
            ConfigError: a number contradicts the command line's, or a value is not built.
        """
        zero = self.section("zero_optimization")
        stage = self.number(zero.get("stage", 0), "zero_optimization.stage")
        if stage not in (0, 1, 2, 3):
            raise ConfigError(f"{self.path}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage}")
        offload = []
        for key, what in (("offload_optimizer", "optimizer state"), ("offload_param", "weights")):
            device = (zero.get(key) or {}).get("device", "none") if isinstance(zero.get(key) or {}, dict) else "cpu"
            if device not in ("none", None):
                offload.append(what)
        if zero.get("cpu_offload") and "optimizer state" not in offload:
            offload.append("optimizer state")
        self._refuse_changes(zero)
        if stage:
            self.set("parallel.use_distributed_optimizer", True, f"zero_optimization.stage {int(stage)}")
        if stage and zero.get("overlap_comm") is True:
            self.settings.setdefault("parallel.overlap_grad_reduce", True)
        self.without += [f"zero_optimization.{key}" for key in sorted(zero.keys() - _ZERO_READ)]
        self._batch()
        self._precision()
        self._optimizer()
        read_scheduler(self)
        self.take(self.data, "gradient_clipping", "optimizer.clip_grad", 0.0)
        words = {0: "no sharding: plain data parallel replicas", 1: "stage 1 is the distributed optimizer"}
        words[2] = "stage 2 with adapters alone is the distributed optimizer: nothing else has gradients"
        notes = [f"{self.path}: {words[int(stage)]}"] if int(stage) in words else []
        notes += [f"{self.path}: {note}" for note in self.notes]
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
            if not self.told(self.data.get(key)):
                continue
            value = int(self.number(self.data[key], key))
            flag = getattr(self.launch, name)
            said = flag * (self.launch.batch_size or 1) if flag and name.startswith("per") else flag
            if said is not None and said != value:
                raise ConfigError(f"{self.path}: {key} is {value}, but --{name} says {said}: change one, or write auto")
            self.batch[name] = flag or value
        if self.told(self.data.get("train_batch_size")):
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
        if self.told(fp16.get("loss_scale")) and fp16["loss_scale"]:
            self.set(
                "optimizer.loss_scale", float(self.number(fp16["loss_scale"], "fp16.loss_scale")), "fp16.loss_scale"
            )
        power = fp16.get("initial_scale_power", _SCALE_POWER)
        if self.told(power):
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
        if self.told(betas):
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
        elif self.told(section[key]):
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

    def told(self, value: Any) -> bool:
        """Whether the file says a value of its own."""
        return value is not None and value != "auto"


def _equal(one: Any, other: Any) -> bool:
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one).lower() == str(other).lower()
