"""QLoRA against PEFT on bitsandbytes' 4-bit HF model, its product's gradient and memory, and codes that are stored."""

import pytest
import torch

from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.source import load_stages, open_source
from megatron_vlm.conversion.verify import verify
from megatron_vlm.data.types import row_from_samples
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.nf4 import Quantization, get_backend, quantise
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import (
    adapted_mapping,
    gradient_errors,
    layout_logits,
    layout_run,
    merge_gradients,
    random_samples,
)
from megatron_vlm.testing.peft_twin import peft_gradients, peft_twin
from megatron_vlm.testing.twins import write_tiny_idefics2

LOGITS = 2e-5  # of the largest logit, fp32; measured
LOSS = 2e-6  # relative; measured
GRADIENT = 1e-4  # of the gradient's norm; measured
HALF = 2.0  # bf16: times the distance of PEFT in bf16 from PEFT in fp32; measured
SAMPLES = [([(40, 50)], 14), ([], 23), ([(56, 56), (17, 33)], 9)]
TARGETS = dict(target_modules=r".*text_model.*_proj", r=4, alpha=8)
# Of a row cut over 2 ranks, q, k, v, o and up lie in whole blocks (128 / 2), and down does not (192 / 2).
MODEL = dict(text_hidden=128, ffn=192, layers=2, dtype=torch.bfloat16)
SKIPPED = ["lm_head", ".*vision_model.*", ".*connector.*"]


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """(directory of weights in bf16, samples)."""
    directory = str(tmp_path_factory.mktemp("idefics2"))
    write_tiny_idefics2(directory, **MODEL)
    with open_source(directory) as source:
        return directory, random_samples(source.config, SAMPLES)


def hf_in_4bit(directory: str, dtype: torch.dtype, double: bool):
    """transformers' own 4-bit model, its decoder quantised by bitsandbytes, computing in ``dtype``."""
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig, Idefics2ForConditionalGeneration

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=SKIPPED,
    )
    model = Idefics2ForConditionalGeneration.from_pretrained(
        directory, quantization_config=config, dtype=dtype, attn_implementation="eager", device_map={"": "cpu"}
    ).eval()
    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for linear in linears:
        linear.support_avx512bf16_for_cpu = (
            False  # it would repack the weight in place, and give no gradient afterwards
        )
    assert len(linears) == 2 * 7
    return model


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_equals_peft_on_bitsandbytes(twin, double):
    """fp32: the parity bars of full precision, at tp 1 and 2; bf16: as near to PEFT in fp32 as PEFT in bf16 is."""
    directory, samples = twin
    row = row_from_samples(samples)
    model, tensors = peft_twin(hf_in_4bit(directory, torch.float32, double), TARGETS)
    loss, logits, grads = peft_gradients(model, samples)
    peft = {"tensors": tensors, "quantize": "nf4", **({} if double else {"double_quant": False}), **TARGETS}
    with open_source(directory) as source:
        mappings = {tp: adapted_mapping(source, {k: v for k, v in peft.items() if k != "tensors"}, tp) for tp in (1, 2)}
        vocab = source.config.text.vocab_size
    for tp in (1, 2):
        parallel = dict(tensor_model_parallel_size=tp)
        ours = run_distributed(layout_logits, directory, [row], parallel, {}, peft, tp=tp)[0]
        results = run_distributed(layout_run, directory, [row], parallel, {}, peft=peft, tp=tp)
        our_loss, our_grads = merge_gradients(results, mappings[tp], vocab)
        difference = float((ours["logits"][0] - logits).abs().max()) / float(logits.abs().max())
        worst = max((error, name) for name, error in gradient_errors(our_grads, grads).items())
        print(f"tp {tp}: {difference=:.1e} loss {abs(our_loss - loss) / loss:.1e} gradient {worst[0]:.1e} {worst[1]}")
        assert difference <= LOGITS and abs(our_loss - loss) <= LOSS * loss and worst[0] <= GRADIENT


def test_bf16_is_as_near_as_peft(twin):
    directory, samples = twin
    exact, tensors = peft_twin(hf_in_4bit(directory, torch.float32, True), TARGETS)
    rounded, again = peft_twin(hf_in_4bit(directory, torch.bfloat16, True), TARGETS)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    expected, theirs = peft_gradients(exact, samples), peft_gradients(rounded, samples)
    peft = {"tensors": tensors, "quantize": "nf4", **TARGETS}
    row, options = row_from_samples(samples), {"params_dtype": "bf16"}
    (ours,) = run_distributed(layout_logits, directory, [row], {}, options, peft)
    results = run_distributed(layout_run, directory, [row], {}, options, peft=peft)
    with open_source(directory) as source:
        mapping = adapted_mapping(source, {"quantize": "nf4", **TARGETS}, 1)
        _, grads = merge_gradients(results, mapping, source.config.text.vocab_size)
    ratio = float((ours["logits"][0].float() - expected[1]).norm() / (theirs[1].float() - expected[1]).norm())
    ours_off, theirs_off = (
        torch.stack([(other[name].float() - grad).norm() for name, grad in expected[2].items()]).norm()
        for other in (grads, theirs[2])
    )
    scale = float(expected[1].norm())
    print(f"logits: {ratio:.2f} times PEFT's {float((theirs[1].float() - expected[1]).norm()) / scale:.1e}")
    print(f"gradients: {float(ours_off / theirs_off):.2f} times PEFT's")
    assert ratio <= HALF and float(ours_off / theirs_off) <= HALF
