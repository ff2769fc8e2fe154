"""PeftConfig: what a run adapts, trains in full and keeps in 4 bits. PEFT's own words and rules where it has them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from megatron_vlm.config import Config, PathText
from megatron_vlm.errors import ConfigError

ALL_LINEAR = "all-linear"
_GONE = ("quantize_backend",)
"""Settings of earlier versions, which checkpoints may have recorded."""


@dataclass(frozen=True, kw_only=True)
class PeftConfig(Config):
    """LoRA (arXiv 2106.09685), modules trained in full beside it, and a base in 4 bits (QLoRA, arXiv 2305.14314).

    With any of ``target_modules``, ``modules_to_save``, ``adapter`` and ``quantize`` given, everything else is frozen.

    Attributes:
        target_modules: linears that get a pair A, B: a list of names (the whole name, or what follows its last dots),
            ``all-linear``, or one regular expression that matches whole names. Names are those of transformers' modules in
            memory, or of the family's own files where transformers has no such model.
        exclude_modules: linears that get none after all, by a list or a regular expression as above.
        modules_to_save: modules (all that lies under a name) that are trained in full.
        r, alpha: rank of A and B, and the scale of their product: alpha / r.
        dropout: probability, in training, that an input of A is left out; each linear draws its own.
        rslora: scale by alpha / sqrt(r) (arXiv 2312.03732).
        vision_r, vision_alpha, connector_r, connector_alpha: of those parts of the model; None: ``r`` and ``alpha``.
        rank_pattern, alpha_pattern: end of a module's name, as a regular expression -> its rank or alpha; the first that
            matches decides, and wins over the settings of a part.
        bias: biases that train: ``none``, ``all`` of the model, or those of adapted linears (``lora_only``).
        init: how A starts; B is zero. ``kaiming``: uniform within 1 / sqrt(inputs); ``gaussian``: N(0, 1 / r).
        names: another HF naming of the family (as in ``convert mg2hf --as``) whose module names are meant, with one pair for
            each linear of that naming; None: the model's own.
        adapter: folder of a PEFT adapter to go on from; its adapter_config.json says targets, ranks and scales.
        quantize: 4-bit format of the frozen linears of ``quantize_groups``; None: as loaded.
        double_quant: keep the scales of 4-bit blocks in 8 bits.
        quantize_groups: parts of the model that are quantised: llm, vision, connector.
    """

    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    vision_r: int | None = None
    vision_alpha: float | None = None
    connector_r: int | None = None
    connector_alpha: float | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    init: Literal["kaiming", "gaussian"] = "kaiming"
    names: str | None = None
    adapter: PathText | None = None
    quantize: Literal["nf4"] | None = None
    double_quant: bool = True
    quantize_groups: tuple[str, ...] = ("llm",)

    def __post_init__(self) -> None:
        ranks = {"r": self.r, "vision_r": self.vision_r, "connector_r": self.connector_r}
        ranks |= {f"rank_pattern[{key!r}]": value for key, value in self.rank_pattern.items()}
        for name, value in ranks.items():
            if value is not None and value < 1:
                raise ConfigError(
                    f"peft.{name} must be at least 1, got {value}: to leave modules out, do not target them"
                )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"peft.dropout must be at least 0 and below 1, got {self.dropout}")
        if self.target_modules is not None and not self.target_modules:
            raise ConfigError("peft.target_modules is empty: name modules, or leave it out")
        if self.target_modules and self.adapter:
            raise ConfigError(
                f"peft.target_modules {self.target_modules!r} and peft.adapter {self.adapter!r}: the adapter's own config says "
                "what it adapts; leave target_modules out"
            )
        for group in self.quantize_groups:
            if group not in ("llm", "vision", "connector"):
                raise ConfigError(f"peft.quantize_groups: {group!r} is none of llm, vision, connector")
        self._refuse_without_effect()

    @classmethod
    def from_checkpoint(cls, data: Mapping[str, Any]) -> Self:
        """The section as a checkpoint recorded it, without settings that are gone since."""
        return cls.from_dict({key: value for key, value in data.items() if key not in _GONE})

    @property
    def active(self) -> bool:
        """Something of this section is in use."""
        return bool(self.target_modules or self.modules_to_save or self.adapter or self.quantize)

    @property
    def adapts(self) -> bool:
        """There are pairs of A and B."""
        return bool(self.target_modules or self.adapter)

    def rank_of(self, group: str) -> tuple[int, float]:
        """(r, alpha) of a part of the model: llm, vision or connector."""
        r, alpha = {
            "llm": (None, None),
            "vision": (self.vision_r, self.vision_alpha),
            "connector": (self.connector_r, self.connector_alpha),
        }[group]
        return r or self.r, self.alpha if alpha is None else alpha

    def _refuse_without_effect(self) -> None:
        """Raises ConfigError for settings that do nothing."""
        changed = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != _default(f)}
        if self.quantize is None and changed & {"double_quant", "quantize_groups"}:
            raise ConfigError(
                "peft.double_quant and quantize_groups have no effect without peft.quantize: leave them out"
            )
        of_pairs = changed - {"target_modules", "modules_to_save", "names", "adapter", "bias"}
        of_pairs -= {"quantize", "double_quant", "quantize_groups"}
        given = ", ".join(f"peft.{name}" for name in sorted(of_pairs))
        if of_pairs and not self.adapts:
            raise ConfigError(f"{given} without effect: set peft.target_modules as well, or leave them out")
        said = of_pairs - {"dropout"}
        if said and self.adapter:
            raise ConfigError(f"{given}: the config of peft.adapter {self.adapter!r} says them; leave them out")
        if "names" in changed and not (self.adapts or self.modules_to_save):
            raise ConfigError("peft.names without effect: set peft.target_modules or modules_to_save as well")
        if self.bias == "lora_only" and not self.adapts:
            raise ConfigError(
                "peft.bias lora_only trains the biases of adapted linears: set peft.target_modules as well"
            )
        if self.bias != "none" and not self.active:
            raise ConfigError("peft.bias without effect: set peft.target_modules as well, or leave it out")


def _default(item: dataclasses.Field) -> object:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
