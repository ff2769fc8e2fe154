"""What a command line and a YAML file ask for: settings of a run, and flags whose meaning needs the model and the ranks.

    command line, file --read_command--> Request --complete(model's config, spec, dp)--> RunConfig's sections and notes

Flags of Hugging Face's Trainer and of the original programs mean here what they mean there; where two of them contradict each
other, the error shows both numbers. ``section.key=value`` wins over a flag that says the same thing in another way.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_vlm.config import set_dotted
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import expand_text
from megatron_vlm.options import adapters, recipes, trainer_flags, xtuner
from megatron_vlm.options.flag_values import FLAG, FlagValues
from megatron_vlm.options.flags import Command, flat_flags, parse_flags
from megatron_vlm.options.launch_config import LaunchConfig
from megatron_vlm.options.sharding import Sharding, read_sharding
from megatron_vlm.registry import FamilySpec
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.weights.remote import fetch, is_url
from megatron_vlm.yaml_values import spelling

# Of each of these one at most holds: naming one drops what a file says of the others.
EXCLUSIVE = (
    ("training.train_iters", "training.train_samples", "training.train_epochs"),
    ("training.eval_interval", "training.eval_epochs"),
    ("checkpoint.save_interval", "checkpoint.save_epochs"),
    ("optimizer.lr_warmup_iters", "optimizer.lr_warmup_fraction"),
    ("optimizer.lr_warmup_init", "optimizer.lr_warmup_start_factor"),
    ("parallel.data_parallel_sharding", "parallel.use_distributed_optimizer"),
)


# Settings of the run that are paths, hub ids or lists of them.
PATHS = (
    "data.train", "data.valid", "data.cache_dir", "peft.adapter", "checkpoint.load", "checkpoint.save", "checkpoint.staging",
    "checkpoint.base", "evaluate.file", "evaluate.image_root", "logging.output_dir", "logging.tensorboard_dir",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Completed:
    """``run``: RunConfig's sections; ``notes``: lines about flags, defaults and replaced values."""

    run: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, as far as it needs no model.

    Attributes:
        run: sections of RunConfig as told; ``data.train`` is empty where raw data is named.
        launch: settings of this start.
        flags: those that need more to be understood.
        sharding: what DeepSpeed and FSDP flags ask for.
        notes: lines to print.
        given: keys that the command line sets itself.
        defaults: settings that nobody named come from the family's recipe.
    """

    run: dict[str, Any]
    launch: LaunchConfig
    flags: FlagValues
    sharding: Sharding
    notes: tuple[str, ...]
    given: frozenset[str]
    defaults: bool

    @property
    def adapts(self) -> bool:
        """Only adapters train (and what trains in full beside them)."""
        return _adapts(self.flags, self.run)

    @property
    def sharding_asked(self) -> str | None:
        """What DeepSpeed and FSDP flags ask for beyond the distributed optimizer, in words; None: nothing."""
        return self.sharding.asks_for(adapts=self.adapts)

    @property
    def needs_model(self) -> bool:
        """``complete`` looks at the model's config and family."""
        flags = self.flags
        facts = (flags.vision_select_layer, flags.ps_version, flags.down_sample_ratio)
        return self.defaults or flags.adapts or any(fact is not None for fact in facts)

    def complete(
        self, hf_config: Mapping[str, Any], spec: FamilySpec | None, dp: int, keep_sharding: bool = False
    ) -> Completed:
        """Returns the run's sections for a model of family ``spec`` (None: ``needs_model`` is False) on ``dp`` replicas.

        ``keep_sharding``: as DeepSpeed or FSDP options ask; else they are for the layout search to do without.
        Before the layout is known, ``dp`` may be the number of ranks: the batch then divides over any layout of them.

        Raises:
            ConfigError: flags contradict each other, the model or the number of replicas.
        """
        run, notes = copy.deepcopy(self.run), list(self.notes)
        published: dict[str, int] = {}
        if self.defaults:
            assert spec is not None
            recipe = recipes.defaults_of(spec, hf_config, self._kind())
            run = merge(recipe.settings, run, keep=self.given)
            published = recipe.batch
            if "data.packing" not in self.given:
                set_dotted(
                    run, "data.packing", False
                )  # as the original programs: whole samples, a given number of them
            notes.append(f"settings that no flag names come from recipe {recipe.name}, its packing of rows left out")
        check_facts(self.flags, hf_config, spec)
        section, more = adapters.peft_section(self.flags, run, self.given, spec, hf_config)
        notes += more
        if section is not None:
            run["peft"] = section
        for key, value in _batch(run, self.launch, self.given, dp, published).items():
            set_dotted(run, key, value)
        notes += trainer_flags.settle(self.flags, run, self.given)
        if keep_sharding:
            kept, lines = self.sharding.kept(adapts=self.adapts)
            for key, kind in kept.items():
                set_dotted(run, key, kind)
            notes += lines
        return Completed(run=run, notes=tuple(notes))

    def _kind(self) -> Literal["full", "lora", "qlora"]:
        if not self.adapts:
            return "full"
        quantized = self.flags.load_in_4bit or (self.run.get("peft") or {}).get("quantize")
        return "qlora" if quantized else "lora"


def read_command(argv: Sequence[str], command: Command) -> Request:
    """Reads what `megatron-vlm train` or `launch` is told, and the file that it names.

    Raises:
        ConfigError: what is wrong, by name.
    """
    parsed = parse_flags(argv, command)
    if xtuner.is_config(parsed.config):
        recipe, settings, notes = xtuner.read_config(str(parsed.config))
        parsed.config, parsed.settings, parsed.notes = recipe, [*settings, *parsed.settings], [*notes, *parsed.notes]
    file = recipes.load_config(parsed.config) if parsed.config else {}
    if (words := flat_flags(file)) is not None:
        below = parse_flags(words, command)
        file, parsed.settings, parsed.notes = {}, [*below.settings, *parsed.settings], [*below.notes, *parsed.notes]
    return read_request(file, parsed.settings, parsed.notes, command=command)


def read_request(
    file: Mapping[str, Any],
    settings: Sequence[tuple[str, Any]],
    notes: Sequence[str] = (),
    *,
    command: Command = "launch",
) -> Request:
    """Sorts a YAML mapping and the settings of a command line, in their order, and works out what they say together.

    Raises:
        ConfigError: unknown or wrong values, or settings that contradict each other.
    """
    run = copy.deepcopy(dict(file))
    launch: dict[str, Any] = dict(run.pop("launch", None) or {})
    if launch and command == "train":
        raise ConfigError("section launch is for `megatron-vlm launch`, which starts the processes; leave it out here")
    named: dict[str, Any] = {}
    given: set[str] = set()
    for key, value in settings:
        if key.startswith(FLAG):
            named[key.removeprefix(FLAG)] = value
        elif key.startswith("launch."):
            launch[key.removeprefix("launch.")] = value
        else:
            _put(run, key, value, given)
    _expand_paths(run)
    flags = _flags(named)
    config = LaunchConfig.from_dict(launch, "launch")
    _name_outputs(run, config, flags, given, command)
    if flags.model_name_or_path is not None:
        _put(run, "checkpoint.load", flags.model_name_or_path, given)
    _fetch(run)
    derived, more = trainer_flags.settings(flags, run, has_valid=bool(_at(run, "data.valid") or config.valid_inputs))
    if command == "launch" and config.val_json and flags.eval_strategy is None and not _evaluates(run):
        derived["training.eval_epochs"] = 1.0  # FT.py evaluates its held-out file after each epoch
    directly = set(given)
    for key, value in derived.items():
        if key not in directly:
            _put(run, key, value, given)
    said = {key: _at(run, key) for key in given}
    sharding = read_sharding(flags, said, config).beside(said, run.get("parallel") or {}, adapts=_adapts(flags, run))
    for key, value in sharding.settings.items():
        _put(run, key, value, given)
    return Request(
        run=run,
        launch=config.replace(**sharding.batch),
        flags=flags,
        sharding=sharding,
        notes=(*notes, *more, *sharding.notes),
        given=frozenset(given),
        defaults=command == "launch" and not file and flags.model_name_or_path is not None,
    )


def merge(base: Mapping[str, Any], over: Mapping[str, Any], keep: frozenset[str] | set[str]) -> dict[str, Any]:
    """Returns ``base`` with ``over`` on it, section by section; a key of ``keep`` drops what excludes it from ``base``."""
    merged = copy.deepcopy(dict(base))
    for group in EXCLUSIVE:
        if any(key in keep for key in group):
            for key in group:
                section, name = key.split(".")
                (merged.get(section) or {}).pop(name, None)
    for section, values in over.items():
        if isinstance(values, Mapping) and isinstance(merged.get(section), Mapping):
            merged[section] = {**merged[section], **values}
        else:
            merged[section] = values
    return merged


def check_facts(flags: FlagValues, hf_config: Mapping[str, Any], spec: FamilySpec | None) -> None:
    """Checks what flags say of the model against its config.json.

    Raises:
        ConfigError: they differ, with both values, or the family has no such setting.
    """
    for flag in ("vision_select_layer", "down_sample_ratio", "ps_version"):
        said = getattr(flags, flag)
        if said is None:
            continue
        assert spec is not None
        if flag not in spec.facts:
            raise ConfigError(f"--{flag} {said}: a model of family {spec.name} has no such setting; leave it out")
        names, default = spec.facts[flag]
        real = next((hf_config[name] for name in names if name in hf_config), default)
        if said != real:
            raise ConfigError(
                f"--{flag} is {said}, but the model's config.json says {real}: a model computes as it was trained; "
                f"set --{flag} {real}, or leave it out"
            )


def _expand_paths(run: Mapping[str, Any]) -> None:
    """Expands paths of the sections in place: they are used before RunConfig, which imports megatron-core, reads the whole."""

    def expanded(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [expanded(item, f"{key}[{number}]") for number, item in enumerate(value)]
        if isinstance(value, dict):
            return {**value, "path": expanded(value["path"], f"{key}.path")} if "path" in value else value
        return value if value is None else expand_text(spelling(value), key)

    for key in PATHS:
        section, name = key.split(".")
        values = run.get(section)
        if isinstance(values, dict) and name in values:
            values[name] = expanded(values[name], key)


def _flags(named: Mapping[str, Any]) -> FlagValues:
    try:
        return FlagValues.from_dict(named)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error


def _put(run: dict[str, Any], key: str, value: Any, given: set[str]) -> None:
    """Sets a key that the command line names; what a file says of settings that it excludes goes."""
    if value is not None:
        for other in (name for group in EXCLUSIVE if key in group for name in group if name != key):
            section, name = other.split(".")
            if other not in given and isinstance(run.get(section), dict):
                run[section].pop(name, None)
    set_dotted(run, key, value)
    given.add(key)


def _adapts(flags: FlagValues, run: Mapping[str, Any]) -> bool:
    peft = run.get("peft") or {}
    return flags.adapts or bool(peft.get("target_modules") or peft.get("adapter"))


def _at(run: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".", 1)
    return (run.get(section) or {}).get(name)


def _evaluates(run: Mapping[str, Any]) -> bool:
    return bool(_at(run, "training.eval_interval") or _at(run, "training.eval_epochs"))


def _name_outputs(
    run: dict[str, Any], launch: LaunchConfig, flags: FlagValues, given: set[str], command: Command
) -> None:
    """One folder for all that is left: --output_dir of `launch`; for `train` where flags of the Trainer ask for saving."""
    if command == "launch":
        folder = launch.output_dir or _at(run, "logging.output_dir") or _at(run, "checkpoint.save")
        folder = folder or f"runs/{_at(run, 'logging.name') or 'train'}"
        here = CheckpointConfig(save=str(folder)).folder
        places = {"checkpoint.save": str(folder), "logging.output_dir": str(here)}
        if is_url(_at(run, "checkpoint.save") or folder):
            places["checkpoint.staging"] = str(here)
        for key, place in places.items():
            if _at(run, key) is None:
                _put(run, key, spelling(place), given)
    elif (flags.save_strategy or flags.save_steps) and _at(run, "checkpoint.save") is None:
        folder = _at(run, "logging.output_dir")
        if folder is not None:
            _put(run, "checkpoint.save", folder, given)


def _fetch(run: dict[str, Any]) -> None:
    """Brings what ``checkpoint.load`` names by a URL here; into its staging folder, if the run saves to that very URL."""
    section = run.get("checkpoint") or {}
    if is_url(section.get("load")):
        load = str(section["load"])
        places = CheckpointConfig(save=section.get("save"), staging=section.get("staging"))
        own = places.url is not None and places.url.rstrip("/") == load.rstrip("/")
        section["load"] = str(fetch(load, places.folder if own else None, section.get("ckpt_step")))


def _batch(
    run: Mapping[str, Any], launch: LaunchConfig, given: frozenset[str], dp: int, published: Mapping[str, int]
) -> dict[str, int]:
    """Micro-batch and global batch: per device x accumulation x dp.

    Raises:
        ConfigError: numbers that are told contradict each other.
    """
    micro, wanted = _at(run, "training.micro_batch_size"), _at(run, "training.global_batch_size")
    items, inner = launch.per_device_train_batch_size, launch.batch_size
    accumulation = launch.gradient_accumulation_steps
    per_device = None if items is None and inner is None else (items or 1) * (inner or 1)
    words = f"{items or 1} per device" + (f" x batch_size {inner}" if inner is not None else "")
    if per_device is not None and "training.micro_batch_size" in given and int(micro) != per_device:
        raise ConfigError(f"micro_batch_size {micro} is not {words} = {per_device}: leave one of them out")
    if per_device is None and accumulation is None and (wanted is not None or not published):
        return {}  # training.* says all
    if per_device is None and accumulation is None:
        accumulation = published.get("accumulation")
        if accumulation is None:
            unit = int(micro or 1) * dp
            return {"training.global_batch_size": -(-published["global"] // unit) * unit}
    size = per_device or int(micro or 1)
    if wanted is not None and ("training.global_batch_size" in given or accumulation is None):
        unit = size * dp
        steps = accumulation or max(1, int(wanted) // unit)
        if unit * steps != int(wanted):
            raise ConfigError(
                f"global_batch_size {wanted} is not {words if per_device else size} x accumulation {steps} x {dp} data parallel "
                f"replicas = {unit * steps}: change one of them"
            )
        return {"training.micro_batch_size": size}
    steps = accumulation or published.get("accumulation", 1)
    return {"training.micro_batch_size": size, "training.global_batch_size": size * steps * dp}
