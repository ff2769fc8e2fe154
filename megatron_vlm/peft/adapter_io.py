"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors.

    DIR --read_adapter--> Adapter (adapter.py) --write_adapter--> DIR

PEFT itself warns of missing keys and ignores unknown ones; here both are errors. Names of older transformers are understood.
What is written names every module so that nothing else wakes up where it is loaded.
Source of the format: peft 0.21.2, utils/save_and_load.py, tuners/lora/config.py, utils/other.py.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from collections.abc import Mapping as Dict
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_vlm.errors import ConversionError
from megatron_vlm.files import read_json, write_json
from megatron_vlm.peft.adapter import WEIGHT, Adapter, Pair, hf_infos
from megatron_vlm.peft.name_rules import by_pattern, last_name, targeted
from megatron_vlm.weights.mapping import Mapping, TensorInfo
from megatron_vlm.weights.safetensors_io import SafetensorsFile, SafetensorsWriter, aligned_order
from megatron_vlm.weights.torch_files import TorchFile

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
MARK = "megatron_vlm.base"
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
# What LoraConfig holds that changes nothing here, or is read below.
_UNDERSTOOD = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
    "eva_config", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_PLAIN_INIT = (None, True, False, "gaussian", "eva", "orthogonal")
_MAX_LISTED = 20


def is_adapter(directory: Path) -> bool:
    """The folder holds an adapter of PEFT."""
    return (directory / CONFIG).is_file()


def read_adapter(directory: Path, mapping: Mapping, infos: Dict[str, TensorInfo], folder: str = "") -> Adapter:
    """Reads an adapter whose modules ``mapping`` names, in the spelling of any version of transformers.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors (or .bin).
        mapping: of the naming that the adapter belongs to.
        infos: of the base's full tensors.
        folder: of the mapping's HF names that the adapter's are in.

    Raises:
        ConversionError: keys missing, unknown, stored twice or of wrong shapes (all listed), or a kind of adapter that a
            LoRA pair cannot express.
    """
    config = _read_config(directory)
    tensors, mark = _read_tensors(directory)
    reader = _Reader(config, mapping, hf_infos(mapping, infos), folder)
    for key, tensor in tensors.items():
        reader.take(key, tensor)
    adapter = reader.adapter(mark)
    if reader.problems:
        more = [f"and {len(reader.problems) - _MAX_LISTED} more"] if len(reader.problems) > _MAX_LISTED else []
        raise ConversionError(
            f"the adapter {directory} does not fit the model:\n  " + "\n  ".join(reader.problems[:_MAX_LISTED] + more)
        )
    return adapter


def unknown_modules(directory: Path, mapping: Mapping) -> int:
    """How many of an adapter's pairs lie on modules that ``mapping`` has not: 0 where it is of that naming."""
    tensors, _ = _read_tensors(directory)
    names, reader = mapping.hf_names(), _Reader({}, mapping, {}, "")
    return sum(1 for key in tensors if (m := _LORA.fullmatch(key)) and reader.hf_name(m[1] + WEIGHT) not in names)


def _read_config(directory: Path) -> dict[str, Any]:
    config = read_json(directory / CONFIG, ConversionError)
    if config.get("peft_type") != "LORA":
        raise ConversionError(f"{directory / CONFIG}: peft_type {config.get('peft_type')!r} is not read, only LORA is")
    if config.get("init_lora_weights") not in _PLAIN_INIT:
        raise ConversionError(
            f"{directory / CONFIG}: init_lora_weights {config['init_lora_weights']!r} changes the base weights as well: "
            "convert the adapter with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    other = {key: v for key, v in config.items() if key not in _UNDERSTOOD and key != "init_lora_weights" and v}
    if other:
        raise ConversionError(
            f"{directory / CONFIG}: {', '.join(f'{k} {v!r}' for k, v in other.items())} is not built: merge the adapter with "
            "PEFT (merge_and_unload) and take the merged model"
        )
    return config


def _read_tensors(directory: Path) -> tuple[dict[str, Tensor], tuple[float, ...] | None]:
    for name in (WEIGHTS, OLD_WEIGHTS):
        if (directory / name).is_file():
            file = SafetensorsFile(directory / name) if name == WEIGHTS else TorchFile(directory / name)
            tensors = {key: file.read(key) for key in file.infos}
            file.close()
            mark = file.metadata.get(MARK) if isinstance(file, SafetensorsFile) else None
            return tensors, tuple(json.loads(mark)) if mark else None
    raise ConversionError(f"{directory} has {CONFIG}, and neither {WEIGHTS} nor {OLD_WEIGHTS}")


class _Reader:
    """Sorts the keys of one file, and keeps what is wrong with them."""

    def __init__(self, config: dict[str, Any], mapping: Mapping, infos: Dict[str, TensorInfo], folder: str):
        self.config, self.mapping, self.infos, self.folder = config, mapping, infos, folder
        self.problems: list[str] = []
        self.halves: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.spelling: dict[str, str] = {}  # HF name of a linear -> its name in this file
        self.full: dict[str, Tensor] = {}

    def hf_name(self, key: str) -> str:
        """The mapping's name of a tensor that PEFT calls ``key``."""
        name = key.removeprefix(PREFIX)
        return self.mapping.hf_aliases(f"{self.folder}/{name}" if self.folder else name)

    def take(self, key: str, tensor: Tensor) -> None:
        """Puts one tensor of the file where it belongs."""
        if ".original_module." in key:  # of a module that modules_to_save replaces: in no computation
            return
        if match := _LORA.fullmatch(key):
            module = self.hf_name(match[1] + WEIGHT).removesuffix(WEIGHT)
            if module + WEIGHT not in self.infos:
                self.problems.append(f"{key}: unknown, the model has no such linear")
            elif match[2] in self.halves[module]:
                self.problems.append(f"{key}: a second lora_{match[2]} of {module}")
            else:
                self.halves[module][match[2]] = tensor
                self.spelling[module] = match[1].removeprefix(PREFIX)
            return
        name = self.hf_name(_SAVED.sub("", key).replace(".base_layer.", "."))
        if name not in self.infos or "lora_" in name:
            self.problems.append(f"{key}: unknown")
        elif name in self.full:
            self.problems.append(f"{key}: {name} a second time")
        elif tuple(tensor.shape) != self.infos[name].shape:
            self.problems.append(f"{key}: {list(tensor.shape)}, the model has {list(self.infos[name].shape)}")
        else:
            self.full[name] = tensor

    def _saved(self, name: str) -> bool:
        """The tensor lies in a module of modules_to_save."""
        saved = self.config.get("modules_to_save") or ()
        return any(f".{wanted}." in f".{spelling}" for wanted in saved for spelling in self._spellings(name))

    def _trained(self, name: str) -> bool:
        """The config accounts for the tensor in full; PEFT also copies embedding and head of the base."""
        return self._saved(name) or (name.endswith(".bias") and (self.config.get("bias") or "none") != "none")

    def _spellings(self, name: str) -> set[str]:
        return {self.mapping.module_name(name), name.rpartition("/")[2]}

    def adapter(self, mark: tuple[float, ...] | None) -> Adapter:
        """All that was taken; ``problems`` tells whether it may be used."""
        pairs = {}
        for module, halves in self.halves.items():
            if pair := self._pair(module, halves):
                pairs[module] = pair
        self._check_missing(pairs)
        return Adapter(
            pairs=pairs,
            full={name: tensor for name, tensor in self.full.items() if self._trained(name)},
            copies={name: tensor for name, tensor in self.full.items() if not self._trained(name)},
            bias=self.config.get("bias") or "none",
            dropout=float(self.config.get("lora_dropout") or 0.0),
            base=self.config.get("base_model_name_or_path"),
            mark=mark,
        )

    def _pair(self, module: str, halves: dict[str, Tensor]) -> Pair | None:
        shape, name = self.infos[module + WEIGHT].shape, self.spelling[module]
        for half in "AB":
            if half not in halves:
                self.problems.append(f"{name}.lora_{half}: missing")
                return None
        a, b = halves["A"], halves["B"]
        r = by_pattern(self.config.get("rank_pattern"), name, self.config.get("r", 8))
        if len(shape) != 2 or tuple(a.shape) != (r, shape[1]) or tuple(b.shape) != (shape[0], r):
            self.problems.append(
                f"{name}: A {list(a.shape)} and B {list(b.shape)} do not fit rank {r} of {CONFIG} and a weight {list(shape)}"
            )
            return None
        alpha = float(by_pattern(self.config.get("alpha_pattern"), name, self.config.get("lora_alpha", 8)))
        return Pair(a=a, b=b, alpha=alpha, rslora=bool(self.config.get("use_rslora")))

    def _check_missing(self, pairs: dict[str, Pair]) -> None:
        bias = self.config.get("bias") or "none"
        for name in self.infos:
            if self.folder != name.rpartition("/")[0]:
                continue
            modules = {spelling.rpartition(".")[0] for spelling in self._spellings(name)}
            if self._saved(name):
                if name not in self.full:
                    self.problems.append(f"{name}: missing, {CONFIG} has it in modules_to_save")
            elif name.endswith(WEIGHT) and name.removesuffix(WEIGHT) not in self.halves:
                if any(targeted(self.config, module) for module in modules):
                    self.problems.append(f"{name.removesuffix(WEIGHT)}: missing, {CONFIG} targets it")
            elif name.endswith(".bias") and name not in self.full:
                adapted = name.removesuffix(".bias") in pairs
                if bias == "all" or (bias == "lora_only" and adapted):
                    self.problems.append(f"{name}: missing, {CONFIG} says bias {bias}")


# ---- out ----


def lora_settings(adapter: Adapter, mapping: Mapping, folder: str | None = None) -> dict[str, Any]:
    """What adapter_config.json says of an adapter: targets, ranks, scales and modules trained in full, in exact names.

    Args:
        adapter: under the names of ``mapping``.
        mapping: its naming.
        folder: only modules in this folder of the naming, named without it; None: all, named with it.

    Raises:
        ConversionError: tensors trained in full that are no whole modules, which PEFT cannot hold.
    """

    def spelled(name: str) -> str:
        return mapping.module_name(name) if folder is None else mapping.module_name(name).removeprefix(f"{folder}/")

    def inside(name: str) -> bool:
        return folder is None or name.rpartition("/")[0] == folder

    tensors = [spelled(name) for name in sorted(mapping.hf_names()) if inside(name)]
    pairs = {spelled(module): pair for module, pair in adapter.pairs.items() if inside(module)}
    saved = _whole_modules([spelled(name) for name in adapter.full if inside(name)], tensors, adapter.bias)
    beneath = tuple(f"{module}." for module in saved)
    others = {name.rpartition(".")[0] for name in tensors if not name.startswith(beneath)} - set(pairs)
    ranks = {module: pair.r for module, pair in pairs.items()}
    alphas = {module: pair.alpha for module, pair in pairs.items()}
    r, rank_pattern = _patterns(ranks, 8)
    alpha, alpha_pattern = _patterns(alphas, 8.0)
    return {
        "r": r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": [name.replace("/", ".") for name in short_names(pairs, others)],
        "modules_to_save": [name.replace("/", ".") for name in saved] or None,
        "bias": adapter.bias,
        "use_rslora": any(pair.rslora for pair in pairs.values()),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def short_names(chosen: Collection[str], others: Iterable[str]) -> list[str]:
    """Names that select ``chosen`` and none of ``others`` by PEFT's rule: last parts where they do, else whole names."""
    taken = {last_name(name) for name in others}
    return sorted({name if last_name(name) in taken else last_name(name) for name in chosen})


def _patterns(values: dict[str, Any], default: Any) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and regular expressions with the others."""
    counts = Counter(values.values())
    usual = max(counts, key=lambda value: (counts[value], value)) if counts else default
    patterns: dict[str, Any] = {}
    for value in sorted(set(counts) - {usual}):
        chosen = [name for name, v in values.items() if v == value]
        others = [name for name, v in values.items() if v != value]
        parts = chosen[0].split(".")
        prefixes = (".".join(parts[:i]) + "." for i in range(1, len(parts)))
        common = (
            p for p in prefixes if all(n.startswith(p) for n in chosen) and not any(n.startswith(p) for n in others)
        )
        if prefix := next(common, None):
            patterns[re.escape(prefix) + ".*"] = value
        else:
            patterns |= {re.escape(name): value for name in short_names(chosen, others)}
    return usual, patterns


def _whole_modules(full: list[str], tensors: list[str], bias: str) -> list[str]:
    """The fewest modules that hold ``full``, and nothing else, beside loose biases."""
    children: dict[str, set[str]] = defaultdict(set)
    total, trained = Counter[str](), Counter[str]()
    for name in tensors:
        parts = name.split(".")
        for i in range(1, len(parts)):
            total[".".join(parts[:i])] += 1
            children[".".join(parts[:i])].add(parts[i])
    for name in full:
        parts = name.split(".")
        trained.update(".".join(parts[:i]) for i in range(1, len(parts)))
    modules: dict[str, None] = {}
    for name in full:
        parts = name.split(".")
        above = [".".join(parts[:i]) for i in range(1, len(parts))]
        # PEFT cannot wrap a list of modules.
        whole = [m for m in above if trained[m] == total[m] and not all(part.isdecimal() for part in children[m])]
        if whole:
            modules[whole[0]] = None
        elif bias == "none" or not name.endswith(".bias"):
            raise ConversionError(
                f"{name} is trained in full, its module {above[-1] if above else ''!r} is not: PEFT holds modules"
            )
    return sorted(modules)


def write_adapter(
    directory: Path,
    adapter: Adapter,
    mapping: Mapping,
    *,
    base: str | None,
    hf_config: Dict[str, Any],
    folder: str | None = None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
        directory: exists.
        adapter: under the names of ``mapping``; A and B are written as they are.
        base: what PEFT calls base_model_name_or_path.
        hf_config: of the base, which says what class loads it.
        folder: as of ``lora_settings``.

    Raises:
        ConversionError: as ``lora_settings``.
    """
    identity = {"peft_type": "LORA", "base_model_name_or_path": base, **auto_class(hf_config), "inference_mode": True}
    config = identity | lora_settings(adapter, mapping, folder)
    tensors = dict(sorted(peft_tensors(adapter, mapping, folder).items()))
    infos = aligned_order({name: TensorInfo.of(tensor) for name, tensor in tensors.items()})
    metadata = {"format": "pt"} | ({MARK: json.dumps(adapter.mark)} if adapter.mark else {})
    writer = SafetensorsWriter(directory / WEIGHTS, infos, metadata)
    try:
        for name in infos:
            writer.write(name, tensors[name])
        writer.close()
    except BaseException:
        writer.abort()
        raise
    write_json(directory / CONFIG, config)


def peft_tensors(adapter: Adapter, mapping: Mapping, folder: str | None = None) -> dict[str, Tensor]:
    """PEFT's keys -> tensors; ``folder`` as of ``lora_settings``."""

    def key(name: str) -> str:
        return PREFIX + (mapping.module_name(name) if folder is None else name.removeprefix(f"{folder}/"))

    tensors: dict[str, Tensor] = {}
    for module, pair in adapter.pairs.items():
        if folder is None or module.rpartition("/")[0] == folder:
            tensors |= {f"{key(module)}.lora_A.weight": pair.a, f"{key(module)}.lora_B.weight": pair.b}
    for name, tensor in (adapter.full | adapter.copies).items():
        if folder is None or name.rpartition("/")[0] == folder:
            module, _, kind = name.rpartition(".")
            inner = f"{module}.base_layer.{kind}" if module in adapter.pairs else name
            tensors[key(inner)] = tensor
    return tensors


def auto_class(hf_config: Dict[str, Any]) -> dict[str, Any]:
    """How PEFT's automatic classes load the base: a task type, or transformers' class by name.

    Neither for a class that only the model's own code has and that is no causal language model.
    """
    name = (hf_config.get("architectures") or [""])[0]
    if name.endswith("ForCausalLM"):
        return {"task_type": "CAUSAL_LM", "auto_mapping": None}
    import transformers

    native = getattr(transformers, name, None) if name and "auto_map" not in hf_config else None
    found = {"base_model_class": name, "parent_library": native.__module__} if native else None
    return {"task_type": None, "auto_mapping": found}
