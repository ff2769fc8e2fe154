"""DeepSpeed and FSDP options -> what does the same here; never ignored.

    --deepspeed zero1.json --read_sharding--> Sharding(stage 1): distributed optimizer, clipping, batch, loss scale
    stage 2, 3, offload, --fsdp            --> Sharding.kept(): parameters, gradients shared; the optimizer on the host

`train` keeps what was asked for. `launch` does where the run does not fit without, or launch.strict_sharding says so: each costs
time.

docs/from-deepspeed.md holds the whole table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.options.deepspeed import DeepSpeedFile
from megatron_vlm.options.flag_values import FlagValues
from megatron_vlm.options.launch_config import LaunchConfig

_NONE = (None, "", "none", "None", "no", "False", "false")
_SHARDS = "parallel.data_parallel_sharding"
_WITH_STAGE = {"parallel.offload": "none", "parallel.offload_fraction": 1.0, "parallel.sharding_group_size": None}
"""What goes with a kind of sharding, and its default."""


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
        keeps: it says that the optimizer stays on the device.
        named: the command line names sharding or offload as well: `launch` looks for nothing else.
    """

    stage: int | None = None
    offload: tuple[str, ...] = ()
    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    keeps: bool = False
    named: bool = False

    def asks_for(self, *, adapts: bool) -> str | None:
        """What it asks for beyond stage 1, in words. With adapters stage 2 has next to no gradients to shard: it is stage 1."""
        parts = []
        if self.stage == 3:
            parts.append("sharding of weights, gradients and optimizer state (ZeRO stage 3, FSDP FULL_SHARD)")
        elif self.stage == 2 and not adapts:
            parts.append("sharding of gradients (ZeRO stage 2, FSDP SHARD_GRAD_OP)")
        if self.offload:
            parts.append(f"offload of {' and '.join(self.offload)} to the host's memory")
        return f"{self.source} asks for {' with '.join(parts)}" if parts else None

    def kept(self, *, adapts: bool) -> tuple[dict[str, str], tuple[str, ...]]:
        """Keys of the run that keep what it asks for beyond stage 1, and lines about what they leave out."""
        wanted, notes = self._wanted(adapts=adapts), []
        settings = {key: value for key, value in wanted.items() if value != self.start.get(key, "none")}
        if self._weights and self.stage != 3:
            notes.append(
                f"{self.source}: weights stay on the device: they are offloaded with ZeRO stage 3, FSDP FULL_SHARD, alone"
            )
        elif self._weights and not self._optimizer:
            notes.append(
                f"{self.source}: the optimizer goes to the host with the weights, which are its main parameters"
            )
        if settings:
            notes.append(f"{self.source} becomes {', '.join(f'{key}={value}' for key, value in settings.items())}")
        return settings, tuple(notes)

    def beside(self, given: Mapping[str, Any], file: Mapping[str, Any], *, adapts: bool) -> "Sharding":
        """The same beside what the command line says, with ``start`` among its settings, and "none" where the section
        ``parallel`` of the ``file`` says otherwise: options that name a stage say all of sharding and offload.

        Raises:
            ConfigError: the command line says another sharding or offload.
        """
        wanted, settings = self._wanted(adapts=adapts), {**self.start, **self.settings}
        if given.get("parallel.use_distributed_optimizer") and wanted.get(_SHARDS) == "none":
            given = {**given, _SHARDS: "optimizer"}
        for key, value in wanted.items():
            held = file.get(key.removeprefix("parallel.")) or (key == _SHARDS and file.get("use_distributed_optimizer"))
            if value == "none" and held:
                settings[key] = value
            if given.get(key) not in (None, value):
                raise ConfigError(
                    f"{self.source}: it asks for {key} = {value}, but the command line says {given[key]}: change one, or leave "
                    "one out"
                )
        notes = self.notes
        stays = wanted.get("parallel.offload") == file.get("offload") == "optimizer"
        for key, none in _WITH_STAGE.items() if self.stage is not None else ():
            held = file.get(key.removeprefix("parallel."))
            if given.get(key) is None and held not in (None, none) and not (stays and "offload" in key):
                settings[key] = none
                if key not in wanted:
                    notes = (*notes, f"{self.source}: {key} {held} of the config is left out; its flag would keep it")
        if self.stage == 2 and adapts:
            notes = (*notes, f"{self.source}: with adapters the distributed optimizer: nothing else has gradients")
        settings = {key: value for key, value in settings.items() if given.get(key) is None}
        named = any(given.get(key) is not None for key in (_SHARDS, "parallel.offload", "parallel.sharding_group_size"))
        return replace(self, settings=settings, notes=notes, named=named)

    @property
    def start(self) -> dict[str, str]:
        """What the layout search has in its place: of each stage the distributed optimizer, which costs no time."""
        return {_SHARDS: "optimizer"} if self.stage else {}

    def _wanted(self, *, adapts: bool) -> dict[str, str]:
        """The keys of the run that say all that it asks for. With adapters stage 2 has next to no gradients to shard: stage 1."""
        wanted: dict[str, str] = {}
        if self.stage is not None:
            kinds = ("none", "optimizer", "optimizer" if adapts else "gradients", "parameters")
            wanted[_SHARDS] = kinds[self.stage]
        if self._weights and self.stage == 3:
            wanted["parallel.offload"] = "optimizer+parameters"
        elif self.keeps or self._optimizer:
            wanted["parallel.offload"] = "none" if self.keeps else "optimizer"
        return wanted

    @property
    def _weights(self) -> bool:
        return any("weights" in part for part in self.offload)

    @property
    def _optimizer(self) -> bool:
        return any("optimizer" in part for part in self.offload)


def read_sharding(flags: FlagValues, given: Mapping[str, Any], launch: LaunchConfig) -> Sharding:
    """Reads the flags and the DeepSpeed file that they name.

    Args:
        flags: those of the command line.
        given: keys that the command line sets -> values; numbers of the file must agree with them.
        launch: settings of the start, for the batch.

    Raises:
        ConfigError: both kinds at once, a file that cannot be read, or one whose numbers contradict the command line's.
    """
    fsdp = [word for value in flags.fsdp for word in value.split() if word not in _NONE]
    wants_fsdp = bool(flags.use_fsdp or (flags.use_fsdp is None and (fsdp or flags.fsdp_policy not in _NONE)))
    file = None if flags.deepspeed in _NONE or flags.use_deepspeed is False else flags.deepspeed
    wants_deepspeed = bool(flags.use_deepspeed or file)
    if wants_fsdp and wants_deepspeed:
        raise ConfigError(
            f"--deepspeed {file or ''} and --fsdp {' '.join(fsdp) or flags.fsdp_policy or ''}: both shard the model over the "
            "same ranks; leave one of them out".replace("  ", " ")
        )
    notes = []
    settings = (flags.fsdp_wrap_cls, flags.fsdp_config, flags.fsdp_transformer_layer_cls_to_wrap, flags.fsdp_policy)
    if not wants_fsdp and any(value not in _NONE for value in settings):
        notes.append("--fsdp_policy, --fsdp_wrap_cls and --fsdp_config have no effect without --use_fsdp or --fsdp")
    if flags.deepspeed not in _NONE and flags.use_deepspeed is False:
        notes.append(f"--deepspeed_config {flags.deepspeed} has no effect with --use_deepspeed False")
    if wants_fsdp:
        return _fsdp(flags, fsdp, notes)
    if not wants_deepspeed:
        return Sharding(notes=tuple(notes))
    if file is None:
        # FT.py writes a file of its own then.
        return Sharding(stage=2, offload=("optimizer state",), source="--use_deepspeed without --deepspeed_config")
    read = DeepSpeedFile(str(file), given, launch)
    return Sharding(
        stage=read.stage,
        offload=tuple(read.offload),
        source=f"--deepspeed {read.path}",
        settings=read.settings,
        batch=read.batch,
        notes=tuple(read.notes),
        keeps=read.keeps,
    )


def _fsdp(flags: FlagValues, words: list[str], notes: list[str]) -> Sharding:
    source = f"--fsdp {' '.join(words)}" if words else f"--use_fsdp {flags.fsdp_policy or ''}".strip()
    asked = {word.lower() for word in words} | {(flags.fsdp_policy or "").lower()}
    offload = ("weights and optimizer state",) if "offload" in asked else ()
    stage = 3
    if asked & {"shard_grad_op", "hybrid_shard_zero2"}:
        stage = 2
    elif "no_shard" in asked:
        stage = 0
        notes = [*notes, f"{source}: plain data parallel replicas, which is what runs here without any option"]
    return Sharding(stage=stage, offload=offload, source=source, notes=tuple(notes))
