"""Adapter flags of the original programs -> section ``peft`` of a run, in the family's module names."""

from collections.abc import Mapping
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.options.flag_values import FlagValues
from megatron_vlm.registry import AdapterSpec, FamilySpec
from megatron_vlm.yaml_values import as_bool

DEFAULTS = {"r": 64, "alpha": 64.0, "dropout": 0.05}
"""Of finetune.py's LoraArguments."""
_DROPOUT = 0.05
"""Of InternVL's adapters."""


def peft_section(
    flags: FlagValues, run: dict[str, Any], given: frozenset[str], spec: FamilySpec | None, hf_config: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns section ``peft`` (None: there is none) and lines about flags without effect.

    With adapters everything else is frozen, so the freeze flags leave section ``model`` of ``run``; one that says False
    names a part that trains in full beside them.

    Raises:
        ConfigError: flags of two programs at once, or a part that the family lacks.
    """
    section, notes = dict(run.get("peft") or {}), list[str]()
    if flags.load_in_4bit:
        section.setdefault("quantize", "nf4")
    own: dict[str, Any] = {
        "r": flags.lora_r,
        "alpha": flags.lora_alpha,
        "dropout": flags.lora_dropout,
        "bias": flags.lora_bias,
    }
    own = {key: value for key, value in own.items() if value is not None and f"peft.{key}" not in given}
    if flags.lora_target_modules:
        targets = [word for value in flags.lora_target_modules for word in value.replace(",", " ").split()]
        own["target_modules"] = "all-linear" if targets in (["all-linear"], ["all"]) else targets
    if not flags.adapts:
        if own and not (section.get("target_modules") or section.get("adapter")):
            notes.append(f"{', '.join(f'--lora_{key}' for key in own)}: no effect without --use_lora True")
        else:
            section |= own
        return section or None, notes
    assert spec is not None
    if flags.use_lora and (flags.use_llm_lora or flags.use_backbone_lora):
        raise ConfigError(
            f"--use_lora with --use_llm_lora {flags.use_llm_lora or 0} or --use_backbone_lora {flags.use_backbone_lora or 0}: "
            "the first is of finetune.py, the others are InternVL's, and each sets the rank; leave one kind out"
        )
    if flags.use_lora:
        section |= own
        section.setdefault("target_modules", spec.adapters.language)
        for key, value in DEFAULTS.items():
            section.setdefault(key, value)
    else:
        _internvl(flags, section, given, spec)
    section.setdefault("modules_to_save", [])
    saved = list(section["modules_to_save"])
    saved += _trained_in_full(flags, run, given, spec.adapters, hf_config, notes)
    section["modules_to_save"] = list(dict.fromkeys(saved))
    for name in ("freeze_llm", "freeze_vision", "freeze_connector"):
        (run.get("model") or {}).pop(name, None)
    return section, notes


def _internvl(flags: FlagValues, section: dict[str, Any], given: frozenset[str], spec: FamilySpec) -> None:
    """Rank R means r = R, alpha = 2 R, dropout 0.05."""
    llm, vision = flags.use_llm_lora or 0, flags.use_backbone_lora or 0
    for flag, rank in (("use_llm_lora", llm), ("use_backbone_lora", vision)):
        if rank < 0:
            raise ConfigError(f"--{flag} is a rank, at least 0 (none), got {rank}")
    if vision and spec.adapters.vision is None:
        raise ConfigError(f"--use_backbone_lora {vision}: a model of family {spec.name} has no tower; leave it out")
    language = spec.adapters.language
    if not isinstance(language, str):
        language = r"model\.layers\.\d+\.(" + "|".join(name.replace(".", r"\.") for name in language) + ")"
    made: dict[str, Any] = {"r": llm or vision, "alpha": 2.0 * (llm or vision), "dropout": _DROPOUT}
    chosen = [language if llm else None, spec.adapters.vision if vision else None]
    made["target_modules"] = "|".join(filter(None, chosen))
    if llm and vision and llm != vision:
        made |= {"vision_r": vision, "vision_alpha": 2.0 * vision}
    section |= {key: value for key, value in made.items() if f"peft.{key}" not in given}


def _trained_in_full(
    flags: FlagValues,
    run: Mapping[str, Any],
    given: frozenset[str],
    adapters: AdapterSpec,
    hf_config: Mapping[str, Any],
    notes: list[str],
) -> list[str]:
    """Modules that a freeze flag with the value False, or --unfreeze_lm_head, names."""
    model, saved, parts = run.get("model") or {}, list[str](), adapters.whole(hf_config)
    for part in ("connector", "vision"):
        key = f"model.freeze_{part}"
        if (
            key in given
            and as_bool(model.get(f"freeze_{part}")) is False
            and not (part == "vision" and flags.use_backbone_lora)
        ):
            saved += parts.get(part, ())
            if flags.use_lora and part in adapters.frozen_beside:
                notes.append(
                    f"--{adapters.frozen_beside[part]} False trains {' and '.join(parts[part])} in full; "
                    "with --use_lora the original froze it"
                )
    if (
        "model.freeze_llm" in given
        and as_bool(model.get("freeze_llm")) is False
        and (flags.use_lora or flags.use_llm_lora)
    ):
        notes.append(
            "--freeze_llm False has no effect with adapters: the language model's own weights stay as they are"
        )
    if flags.unfreeze_lm_head:
        saved += parts["head"]
    return saved
