"""From names to a plan: which linears get a pair A, B, and which weights train in full.

    PeftConfig + the family's Mapping --make_plan--> PeftPlan(targets, saved, biases)

Names are PEFT's (name_rules.py): those of HF's modules in memory, or the family's own where HF has no such model.
"""

import math
import re
from collections.abc import Iterable, Sequence
from collections.abc import Mapping as Dict
from dataclasses import dataclass
from typing import Any

from megatron_vlm.errors import ConfigError, nearest
from megatron_vlm.models.family_config import FamilyConfig
from megatron_vlm.peft.adapter_map import PeftPlan, Target
from megatron_vlm.peft.config import ALL_LINEAR, PeftConfig
from megatron_vlm.peft.name_rules import by_pattern, last_name, lies_under, matches, pattern_matches
from megatron_vlm.registry import FamilySpec
from megatron_vlm.sources.quantised import HEAD, is_linear
from megatron_vlm.weights.mapping import Entry, Mapping, TensorInfo, group_of


def make_plan(
    spec: FamilySpec, model_config: FamilyConfig, config: PeftConfig, infos: Dict[str, TensorInfo]
) -> PeftPlan:
    """Decides what trains.

    Args:
        spec, model_config: the model.
        config: the names; ``adapter`` is resolved by the caller (its targets become ``target_modules``).
        infos: full tensors by global name, as of a WeightSource.

    Raises:
        ConfigError: names that match nothing (with those that could be matched), a tied head, settings without effect.
    """
    mapping = named_mapping(spec, model_config, config.names)
    modules = _Modules(mapping, infos)
    saved = _saved(modules, config.modules_to_save)
    targets = _targets(modules, config, set(saved))
    for prefix in ("vision", "connector"):
        given = [f"peft.{prefix}_{name}" for name in ("r", "alpha") if getattr(config, f"{prefix}_{name}") is not None]
        if given and not any(group_of(target.linear) == prefix for target in targets):
            raise ConfigError(
                f"{' and '.join(given)} without effect: no target lies in the {prefix} part of family {spec.name}; could be "
                f"matched: {modules.listed()}"
            )
    biases = {} if config.bias == "none" else _biases(mapping, config.bias, targets, set(saved))
    return PeftPlan(
        targets=targets,
        saved=saved,
        biases=biases,
        bias_entries={entry.name: entry for entry in mapping if entry.name in biases},
        init=config.init,
    )


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """An HF linear that may be a target."""

    entry: Entry
    index: int
    module: str
    part_rows: tuple[int, ...]
    inputs: int
    full_rows: int

    @property
    def group(self) -> str:
        return group_of(self.entry.name)


class _Modules:
    """The HF modules of a mapping, by their names in memory."""

    def __init__(self, mapping: Mapping, infos: Dict[str, TensorInfo]):
        self.mapping = mapping
        self.tensors = {hf: (mapping.module_name(hf), entry) for entry in mapping for hf in entry.hf}
        self.linears = [
            _Linear(
                entry=entry,
                index=index,
                module=mapping.module_name(hf.removesuffix(".weight")),
                part_rows=rows,
                inputs=infos[entry.name].shape[1],
                full_rows=infos[entry.name].shape[0],
            )
            for entry in mapping
            if is_linear(entry.name, infos[entry.name])
            for rows in [tuple(part.shape[0] for part in entry.from_full(infos[entry.name].meta()))]
            for index, hf in enumerate(entry.hf)
        ]
        self.tied = {mapping.module_name(hf).rpartition(".")[0] for pair in mapping.hf_tied.items() for hf in pair}

    def listed(self) -> str:
        """The last names of all linears, by part of the model."""
        parts = []
        for group in ("llm", "vision", "connector"):
            names = dict.fromkeys(last_name(linear.module) for linear in self.linears if linear.group == group)
            if names:
                parts.append(f"{group}: {', '.join(names)}")
        return "; ".join(parts)


def named_mapping(spec: FamilySpec, model_config: FamilyConfig, names: str | None) -> Mapping:
    """The map whose names a run goes by: the model's own, or that of one of the family's exports."""
    if names is None:
        return spec.mapping(model_config)
    if names not in spec.exports:
        raise ConfigError(f"peft.names {names!r} is no layout of family {spec.name}{nearest(names, spec.exports)}")
    return spec.exports[names].mapping(model_config)


def _saved(modules: _Modules, wanted: Sequence[str]) -> tuple[str, ...]:
    tensors = list(modules.tensors.values())
    for name in wanted:
        if not any(lies_under(tensor, name) for tensor, _ in tensors):
            parents = {parent for tensor, _ in tensors for parent in _parents(tensor)}
            raise ConfigError(
                f"peft.modules_to_save: no module is called {name!r}{nearest(name, parents)}; linears are {modules.listed()}"
            )
        tied = next((module for module in modules.tied if lies_under(f"{module}.weight", name)), None)
        if tied is not None:
            raise ConfigError(
                f"peft.modules_to_save {name!r}: {tied} is tied to another module of the model, and training it in full would "
                "untie them: leave it out"
            )
    saved = []
    for entry in modules.mapping:
        found = [any(lies_under(modules.tensors[hf][0], name) for name in wanted) for hf in entry.hf]
        if any(found) and not all(found):
            there = next(hf for hf, yes in zip(entry.hf, found) if yes)
            raise ConfigError(
                f"peft.modules_to_save takes {there}, one of {', '.join(entry.hf)}, which are one tensor here: name all of them"
            )
        if any(found):
            saved.append(entry.name)
    return tuple(saved)


def _parents(tensor: str) -> Iterable[str]:
    """Names by which the modules around a tensor can be called in ``modules_to_save``, numbers left out."""
    return (part for part in re.split(r"[./]", tensor)[:-1] if not part.isdecimal())


def _targets(modules: _Modules, config: PeftConfig, saved: set[str]) -> tuple[Target, ...]:
    wanted = config.target_modules
    if not wanted:
        return ()
    matched = _matched(modules, wanted)
    excluded = _matches(modules.linears, config.exclude_modules) if config.exclude_modules else set()
    for name in (config.exclude_modules,) if isinstance(config.exclude_modules, str) else config.exclude_modules:
        if not _matches(modules.linears, (name,) if isinstance(config.exclude_modules, tuple) else name) & matched:
            raise ConfigError(
                f"peft.exclude_modules {name!r} leaves out none of the targets. A list names linears as target_modules does; "
                "a whole part of the model takes one regular expression, as '.*vision_model.*'"
            )
    chosen = [
        linear for linear in modules.linears if linear.module in matched - excluded and linear.entry.name not in saved
    ]
    if not chosen:
        raise ConfigError("peft.exclude_modules and modules_to_save leave no target: leave target_modules out as well")
    names = [linear.module for linear in chosen]
    _check_patterns("rank_pattern", config.rank_pattern, names)
    _check_patterns("alpha_pattern", config.alpha_pattern, names)
    return tuple(_target(linear, config) for linear in chosen)


def _target(linear: _Linear, config: PeftConfig) -> Target:
    r, alpha = config.rank_of(linear.group)
    r = by_pattern(config.rank_pattern, linear.module, r)
    alpha = by_pattern(config.alpha_pattern, linear.module, alpha)
    return Target(
        entry=linear.entry,
        index=linear.index,
        hf_module=linear.module,
        part_rows=linear.part_rows,
        full_rows=linear.full_rows,
        inputs=linear.inputs,
        r=r,
        alpha=alpha,
        dropout=config.dropout,
        scaling=alpha / (math.sqrt(r) if config.rslora else r),
    )


def _matched(modules: _Modules, wanted: str | Sequence[str]) -> set[str]:
    """Names of the linears that ``target_modules`` names.

    Raises:
        ConfigError: nothing is called so, or it is tied.
    """
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return {linear.module for linear in modules.linears if linear.entry.name != HEAD}
    for name in (wanted,) if isinstance(wanted, str) else wanted:
        one = wanted if isinstance(wanted, str) else (name,)
        if _matches(modules.linears, one):
            continue
        tied = [module for module in modules.tied if matches(module, one)]
        if tied:
            raise ConfigError(
                f"peft.target_modules {name!r}: {tied[0]} is tied to another module of the model, and a pair on it would change "
                "both: leave it out, or untie the head first"
            )
        what = "no linear's whole name matches the expression" if isinstance(wanted, str) else "no linear is called"
        raise ConfigError(f"peft.target_modules: {what} {name!r}; could be matched: {modules.listed()}")
    return _matches(modules.linears, wanted)


def _matches(linears: Sequence[_Linear], wanted: str | Sequence[str]) -> set[str]:
    return {linear.module for linear in linears if matches(linear.module, wanted)}


def _check_patterns(name: str, patterns: Dict[str, Any], modules: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(pattern_matches(pattern, module) for module in modules):
            raise ConfigError(
                f"peft.{name}: {pattern!r} matches no target; it must match the end of a name such as {modules[0]!r}"
            )


def _biases(mapping: Mapping, bias: str, targets: Sequence[Target], saved: set[str]) -> dict[str, tuple[str, ...]]:
    """Entry of each bias that trains -> HF names of its parts that do."""
    adapted = {target.entry.hf[target.index].removesuffix("weight") + "bias" for target in targets}
    found = {}
    for entry in mapping:
        parts = tuple(hf for hf in entry.hf if hf.endswith(".bias") and (bias == "all" or hf in adapted))
        if parts and entry.name not in saved:
            found[entry.name] = parts
    if not found:
        raise ConfigError(f"peft.bias {bias}: there is no such bias: set it to none")
    return found
