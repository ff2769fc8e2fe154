"""PEFT on an HF twin: the same pairs as ours, its gradients and its training, under the names that our weight map has."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.testing.parity import adapted_plan, hf_inputs, hf_reference

_WORDS = {"alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}


def peft_twin(model: Any, settings: dict[str, Any], seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """Wraps a copy of ``model`` by a section ``peft`` (its fields that PEFT has) and draws every A and B: B = 0 hides mistakes.

    Returns:
        (PEFT's model, all A and B by the names in PEFT's files).
    """
    from peft import LoraConfig, get_peft_model

    values: dict[str, Any] = {"lora_alpha": 16}
    values |= {_WORDS.get(key, key): list(v) if isinstance(v, tuple) else v for key, v in settings.items()}
    wrapped: Any = get_peft_model(copy.deepcopy(model), LoraConfig(**values))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in sorted(wrapped.named_parameters()):
        if ".lora_" in name:
            parameter.data.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
            tensors[our_name(name)] = parameter.detach().clone()
    return wrapped.eval(), tensors


def random_pairs(source: Any, settings: dict[str, Any], seed: int = 1, std: float = 0.05) -> dict[str, Tensor]:
    """Every A and B of a section ``peft`` by the names in PEFT's files, drawn: B = 0 would hide mistakes in A."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for target in adapted_plan(source, settings).targets:
        name = f"base_model.model.{target.hf_module}.lora_"
        tensors[f"{name}A.weight"] = std * torch.randn(target.r, target.inputs, generator=generator)
        tensors[f"{name}B.weight"] = std * torch.randn(target.shape[0], target.r, generator=generator)
    return tensors


def twin_in_4bit(directory: str, dtype: torch.dtype, *, double: bool = True, device: str = "cpu") -> Any:
    """transformers' own 4-bit model: its decoder's linears quantised by bitsandbytes from ``dtype``, computing in it."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", *(f".*{part}.*" for part in ("vision_", "visual", "connector", "projector"))],
    )
    model: Any = AutoModelForImageTextToText.from_pretrained(
        directory, quantization_config=config, dtype=dtype, attn_implementation="eager", device_map={"": device}
    ).eval()
    linears = multiply_dequantised(model)
    if len(linears) != 7 * model.config.text_config.num_hidden_layers:
        raise AssertionError(f"{len(linears)} linears are in 4 bits")
    return model


def multiply_dequantised(model: Any) -> dict[str, Any]:
    """Returns bitsandbytes' 4-bit linears by name, set to multiply by dequantised weights on every processor.

    On a CPU with AVX512_BF16 they would repack their weights in place, multiply in bf16 whatever the inputs are, and give no
    gradient afterwards.
    """
    from bitsandbytes.nn import Linear4bit

    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    for linear in linears.values():
        linear.support_avx512bf16_for_cpu = False
    return linears


def our_name(name: str) -> str:
    """A parameter's name in PEFT's model -> the HF name of our weight map."""
    name = name.replace(".default", "")
    if ".lora_" in name:
        return name
    return name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".base_layer", "")


def peft_gradients(model: Any, samples: Any, inputs: Any = hf_inputs) -> tuple[float, Tensor, dict[str, Tensor]]:
    """(loss, logits, gradients of what trains by our names), as ``hf_reference``."""
    loss, logits, grads = hf_reference(model, samples, inputs=inputs)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return loss, logits, {our_name(name): grad for name, grad in grads.items() if name in trained}


def peft_training(
    model: Any, samples: Any, steps: int, lr: float, inputs: Any = hf_inputs
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each of ``steps`` updates with our default AdamW: clipping at 1, no decay of biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return adamw_training(parameters, lambda: hf_reference(model, samples, inputs=inputs)[0], steps, lr)


def adamw_training(
    parameters: Sequence[Tensor], loss: Callable[[], float], steps: int, lr: float
) -> list[tuple[float, float]]:
    """The same of any model: ``loss`` gives it and leaves gradients in ``parameters``."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=lr)
    history = []
    for _ in range(steps):
        value = loss()
        history.append((value, float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))))
        adam.step()
    return history
