"""XTuner's configs: their names, a file of ours in their form, and what a file of theirs says.

    internlm2_1_8b_qlora_alpaca_e3 --NAMES--> recipe internlm2/qlora_internlm2
                                   --copy---> NAME_copy.py: values under XTuner's names, for the user to edit
    FILE.py --read_config--> recipe's sections, settings on top, lines about what is not read

A file is read as text, never executed: assignments of numbers, texts and lists, sums of them, ``int(...)`` and ``dict(...)``. Its
iterations are forward passes; ours are updates, so that intervals are divided by ``accumulative_counts``.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.files import describe, read_json, read_text, writing
from megatron_vlm.log import get_logger
from megatron_vlm.weights.checkpoint_dir import STATE, folder_name, iterations

_SIZES = ("1_8b", "7b", "20b")
_TOWER = "clip_vit_large_p14_336"
NAMES = {
    name: recipe
    for size in _SIZES
    for name, recipe in {
        f"internlm2_{size}_full_alpaca_e3": "internlm2/finetune_internlm2",
        f"internlm2_{size}_qlora_alpaca_e3": "internlm2/qlora_internlm2",
        f"internlm2_chat_{size}_full_alpaca_e3": "internlm2/finetune_internlm2",
        f"internlm2_chat_{size}_qlora_alpaca_e3": "internlm2/qlora_internlm2",
        f"llava_internlm2_chat_{size}_{_TOWER}_e1_gpu8_pretrain": "llava_internlm2/pretrain_llava_internlm2",
        f"llava_internlm2_chat_{size}_{_TOWER}_e1_gpu8_finetune": "llava_internlm2/finetune_llava_internlm2",
        f"llava_internlm2_chat_{size}_qlora_{_TOWER}_lora_e1_gpu8_finetune": "llava_internlm2/qlora_llava_internlm2",
    }.items()
}
"""XTuner's name -> recipe. https://github.com/InternLM/xtuner/tree/v0.1.17/xtuner/configs"""
_IMAGE_TOKENS = 576
"""Of CLIP ViT-L/14 at 336 pixels: XTuner's ``max_length`` leaves them out, ``data.seq_length`` counts them."""

# variable -> the setting that it is
_SAME = {
    "pretrained_model_name_or_path": "checkpoint.load",
    "llm_name_or_path": "launch.llm",
    "visual_encoder_name_or_path": "launch.vision",
    "pretrained_pth": "launch.projector",
    "image_folder": "launch.image_root",
    "data_path": "launch.data_path",
    "data_files": "launch.data_path",
    "alpaca_en_path": "launch.data_path",
    "prompt_template": "data.template",
    "pack_to_max_length": "data.packing",
    "batch_size": "launch.per_device_train_batch_size",
    "accumulative_counts": "launch.gradient_accumulation_steps",
    "dataloader_num_workers": "data.num_workers",
    "max_epochs": "training.train_epochs",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "max_norm": "optimizer.clip_grad",
    "warmup_ratio": "optimizer.lr_warmup_fraction",
    "freeze_llm": "model.freeze_llm",
    "freeze_visual_encoder": "model.freeze_vision",
}
# what is read below, and what has no other value here than XTuner's
_READ = {
    "recipe",
    "max_length",
    "betas",
    "save_steps",
    "save_total_limit",
    "evaluation_freq",
    "evaluation_inputs",
    "SYSTEM",
}
_READ |= {"evaluation_images", "optim_type", "data_root", "image_processor", "tokenizer", "model", "use_varlen_attn"}
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: lambda a, b: a**b if abs(a) < 1e6 and abs(b) < 20 else None,
}


def is_config(text: str | None) -> bool:
    """Whether ``--config`` names a config of XTuner: one of its names, or a Python file."""
    return text is not None and (text in NAMES or text.endswith(".py"))


def copy(name: str, directory: str | Path) -> Path:
    """Writes ``NAME_copy.py`` into a folder, which is made; returns where it lies.

    Raises:
        ConfigError: the file is there already, or cannot be written.
    """
    target = Path(directory, f"{name}_copy.py")
    if target.exists():
        raise ConfigError(f"{target} exists already: name another folder, or remove it")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text_of(name), encoding="utf-8")
    return target


def text_of(name: str) -> str:
    """What a config of XTuner's says, in its own names, as far as it is to be edited."""
    recipe, size = NAMES[name], next(size for size in _SIZES if f"_{size}_" in name)
    model = f"internlm/internlm2-{'chat-' if '_chat_' in name else ''}{size}"
    lines = [
        f"# XTuner's {name}: `megatron-vlm train FILE --work-dir DIR` reads these values, and executes nothing.",
        f"# What is not named here comes from the recipe {recipe} (`megatron-vlm recipe show {recipe}`).",
        f'recipe = "{recipe}"',
        "",
    ]
    if name.startswith("llava"):
        stage1 = name.endswith("pretrain")
        data = "blip_laion_cc_sbu_558k.json" if stage1 else "llava_v1_5_mix665k.json"
        images = "LLaVA-Pretrain/images" if stage1 else "llava_images"
        lines += [f'llm_name_or_path = "{model}"', 'visual_encoder_name_or_path = "openai/clip-vit-large-patch14-336"']
        lines += [] if stage1 else ["pretrained_pth = None  # the projector of stage 1: its folder, checkpoint or .pth"]
        lines += ["", 'data_root = "./data/llava_data/"', f'data_path = data_root + "{data}"']
        lines += [f'image_folder = data_root + "{images}"', 'prompt_template = "internlm2_chat"']
        lines += ["max_length = int(2048 - (336 / 14) ** 2)", ""]
        batch, accumulation, epochs, saves = (32, 1, 1, 500) if stage1 else (16, 1, 1, 500)
        rate = 1e-3 if stage1 else 2e-4 if "qlora" in name else 2e-5
    else:
        lines += [f'pretrained_model_name_or_path = "{model}"', ""]
        lines += ['data_path = "tatsu-lab/alpaca"  # a json of conversations', 'prompt_template = "internlm2_chat"']
        lines += ["max_length = 2048", "pack_to_max_length = True", ""]
        batch, accumulation, epochs, saves, rate = 1, 16, 3, 500, 2e-4 if "qlora" in name else 2e-5
    lines += [f"batch_size = {batch}", f"accumulative_counts = {accumulation}", "dataloader_num_workers = 0"]
    lines += [f"max_epochs = {epochs}", f"lr = {rate:g}", "betas = (0.9, 0.999)", "weight_decay = 0"]
    lines += ["max_norm = 1", "warmup_ratio = 0.03", "", f"save_steps = {saves}", "save_total_limit = 2", ""]
    lines += [f"evaluation_freq = {saves}", 'SYSTEM = ""', "evaluation_inputs = []", ""]
    return "\n".join(lines)


def read_config(config: str) -> tuple[str, list[tuple[str, Any]], list[str]]:
    """Reads a config by its name, or a file.

    Returns:
        Name of the recipe that holds what the config does not say; settings; lines to print.

    Raises:
        ConfigError: the file is no Python, or says what is not built.
    """
    text = text_of(config) if config in NAMES else read_text(config, ConfigError)
    values, calls = _values(text, config), _calls(text, config)
    recipe = values.get("recipe") or _recipe_of(values, calls)
    if values.get("optim_type", "AdamW") not in ("AdamW", "PagedAdamW32bit", "DeepSpeedCPUAdam"):
        raise ConfigError(f"{describe(config)}: optim_type {values['optim_type']}: AdamW is the only optimizer built")
    settings = [(key, values[name]) for name, key in _SAME.items() if values.get(name) is not None]
    settings = [(key, [value] if key == "launch.data_path" else value) for key, value in settings]
    if values.get("max_length") is not None:
        more = _IMAGE_TOKENS if "llm_name_or_path" in values else 0
        settings.append(("data.seq_length", int(values["max_length"]) + more))
    if isinstance(values.get("betas"), list) and len(values["betas"]) == 2:
        settings += zip(("optimizer.adam_beta1", "optimizer.adam_beta2"), values["betas"])
    passes = int(values.get("accumulative_counts") or 1)
    if values.get("save_steps"):
        settings.append(("checkpoint.save_interval", math.ceil(values["save_steps"] / passes)))
    if values.get("save_total_limit") is not None:
        limit = values["save_total_limit"]
        settings.append(("checkpoint.keep_last", None if limit < 0 else max(2, limit)))
    settings += _evaluation(values, passes)
    settings += [setting for call in calls for setting in _lora(call)]
    skipped = sorted(name for name in values.keys() - _SAME.keys() - _READ if values[name] is not None)
    notes = [f"{describe(config)} on top of recipe {recipe}; intervals in updates of {passes} passes"]
    if skipped:
        notes.append(f"{describe(config)}: not read: {', '.join(skipped)}")
    return recipe, settings, notes


def checkpoint_of(path: Path) -> Path:
    """``DIR/iter_300.pth`` in a folder of checkpoints: iteration 300, or the update that holds XTuner's 300th forward pass.

    Any other path is returned as it is.

    Raises:
        ConfigError: there is no such checkpoint; the message lists those there.
    """
    match = re.fullmatch(r"iter_(\d+)\.pth", path.name)
    if match is None or path.exists() or not path.parent.is_dir():
        return path
    number, there = int(match[1]), iterations(path.parent)
    passes = _passes_of(path.parent / folder_name(there[-1])) if there else 1
    for wanted in (number, -(-number // passes)):
        if wanted in there:
            found = path.parent / folder_name(wanted)
            get_logger(__name__).info(f"{path.name} is {found.name} here ({passes} forward passes an update)")
            return found
    known = ", ".join(map(str, there)) or "none"
    raise ConfigError(
        f"{path} does not exist, and no checkpoint there is of that iteration ({passes} passes an update): {known}"
    )


def _passes_of(folder: Path) -> int:
    """Forward passes of a replica that make up an update of the run that wrote a checkpoint."""
    state = read_json(folder / STATE, CheckpointError)
    training = ((state.get("run") or {}).get("config") or {}).get("training") or {}
    dp = re.search(r"dp (\d+)", str(state.get("layout")))
    rows = training.get("micro_batch_size", 1) * (int(dp[1]) if dp else 1)
    return max(1, training.get("global_batch_size", 1) // rows)


def base_of(config: str) -> str | None:
    """The language model that a config of XTuner's names, or a file of its form."""
    settings = dict(read_config(config)[1])
    return settings.get("launch.llm") or settings.get("checkpoint.load")


def _evaluation(values: Mapping[str, Any], passes: int) -> Iterator[tuple[str, Any]]:
    inputs = [text for text in values.get("evaluation_inputs") or [] if isinstance(text, str)]
    if not inputs:
        return
    images, system = values.get("evaluation_images"), values.get("SYSTEM")
    images = [images] if isinstance(images, str) else images or []
    prompts = [
        {
            "text": text,
            **({"images": [images[i % len(images)]]} if images else {}),
            **({"system": system} if system else {}),
        }
        for i, text in enumerate(inputs)
    ]
    yield "evaluate.prompts", prompts
    if values.get("evaluation_freq"):
        yield "evaluate.interval", math.ceil(values["evaluation_freq"] / passes)


def _lora(call: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings of one ``lora=``, ``llm_lora=`` or ``visual_encoder_lora=``."""
    prefix = "peft.vision_" if call["name"] == "visual_encoder_lora" else "peft."
    for theirs, ours in (("r", "r"), ("lora_alpha", "alpha")):
        if isinstance(call.get(theirs), int | float):
            yield f"{prefix}{ours}", call[theirs]
    if prefix == "peft." and isinstance(call.get("lora_dropout"), int | float):
        yield "peft.dropout", call["lora_dropout"]


def _recipe_of(values: Mapping[str, Any], calls: list[dict[str, Any]]) -> str:
    """Of a file of XTuner's own: by what it trains."""
    adapts = bool(calls)
    if "llm_name_or_path" not in values:
        return f"internlm2/{'qlora' if adapts else 'finetune'}_internlm2"
    if values.get("freeze_llm") and not adapts:
        return "llava_internlm2/pretrain_llava_internlm2"
    return f"llava_internlm2/{'qlora' if adapts else 'finetune'}_llava_internlm2"


def _parse(text: str, config: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{describe(config)} cannot be read as a config of XTuner's: {error}") from error


def _values(text: str, config: str) -> dict[str, Any]:
    """Names that the file assigns -> values; None where they are none of those that are read. Freezing, inside its model, too."""
    values: dict[str, Any] = {}
    tree = _parse(text, config)
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = _value(node.value, values)
    for item in ast.walk(tree):
        if isinstance(item, ast.keyword) and item.arg in ("freeze_llm", "freeze_visual_encoder"):
            values[item.arg] = _value(item.value, values)
    return {name: value for name, value in values.items() if not isinstance(value, dict)}


def _calls(text: str, config: str) -> list[dict[str, Any]]:
    """``lora=dict(type=LoraConfig, ...)`` of the model: its arguments, and ``name`` of the keyword."""
    found = []
    for node in ast.walk(_parse(text, config)):
        if isinstance(node, ast.keyword) and node.arg and re.fullmatch(r"(llm_|visual_encoder_)?lora", node.arg):
            value = _value(node.value, {})
            if isinstance(value, dict):
                found.append({**value, "name": node.arg})
    return found


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """A number, text, list or mapping; the last part of a dotted name; None for all else."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return known.get(name, name)
        case ast.Attribute(attr=name):
            return name
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, known) for item in items]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            value = _value(inner, known)
            return -value if isinstance(value, int | float) else None
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left, known), _value(right, known)
            try:
                return _OPERATORS[type(op)](a, b)
            except (TypeError, ArithmeticError):
                return None
        case ast.Call(func=ast.Name(id="int"), args=[inner]):
            value = _value(inner, known)
            return int(value) if isinstance(value, int | float) else None
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return {item.arg: _value(item.value, known) for item in keywords if item.arg}
    return None
