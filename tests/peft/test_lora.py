"""LoRA equals PEFT on the HF twin: same A and B, fp32, dropout 0: logits, every gradient, 20 updates."""

import pytest

from megatron_vlm.conversion.source import open_source
from megatron_vlm.data.types import row_from_samples
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import (
    adapted_mapping,
    gradient_errors,
    layout_logits,
    layout_run,
    merge_gradients,
    random_samples,
)
from megatron_vlm.testing.peft_twin import peft_gradients, peft_training, peft_twin
from megatron_vlm.testing.twins import write_tiny_idefics2

LOGITS = 2e-5  # of the largest logit; measured
LOSS = 2e-6  # relative; measured
GRADIENT = 1e-4  # of the gradient's norm; measured
TRAINING = 2e-4  # of the loss of each of 20 updates; measured
STEPS, LR = 20, 1e-3
SAMPLES = [([(40, 50)], 14), ([], 23), ([(56, 56), (17, 33)], 9)]

SETTINGS = {
    "decoder and head": dict(target_modules=r"(.*text_model.*_proj)|lm_head", r=4, alpha=8),
    "all linear": dict(target_modules="all-linear", r=3, alpha=6),
    "mixed": dict(
        target_modules=("q_proj", "v_proj", "up_proj", "fc2"),
        exclude_modules=r".*modality_projection.*",
        modules_to_save=("modality_projection",),
        r=4,
        alpha=8,
        rslora=True,
        rank_pattern={"v_proj": 2, r"model\.vision_model\..*": 3},
        alpha_pattern={"q_proj": 5.0},
        bias="lora_only",
    ),
    "biases": dict(target_modules=("k_proj", "o_proj"), r=4, alpha=8, bias="all"),
}


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """(directory, HF model, samples, WeightSource) of an Idefics2."""
    directory = str(tmp_path_factory.mktemp("idefics2"))
    hf = write_tiny_idefics2(directory)
    with open_source(directory) as source:
        yield directory, hf, random_samples(source.config, SAMPLES), source


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_peft(twin, name):
    directory, hf, samples, source = twin
    settings = SETTINGS[name]
    model, tensors = peft_twin(hf, settings)
    loss, logits, grads = peft_gradients(model, samples)
    row = row_from_samples(samples)
    peft = {"tensors": tensors, **settings}

    (ours,) = run_distributed(layout_logits, directory, [row], {}, {}, peft)
    difference = float((ours["logits"][0] - logits).abs().max()) / float(logits.abs().max())
    results = run_distributed(layout_run, directory, [row], {}, {}, STEPS, LR, peft)
    our_loss, our_grads = merge_gradients(results, adapted_mapping(source, settings, 1), source.config.text.vocab_size)
    frozen = [our_grads.pop(name) for name in set(our_grads) - set(grads)]  # parts of a fused bias that do not train
    assert not any(grad.any() for grad in frozen) and bool(frozen) == (settings.get("bias") == "lora_only")
    errors = gradient_errors(our_grads, grads)
    worst = max((e, n) for n, e in errors.items() if not n.endswith("k_proj.bias"))
    history = peft_training(model, samples, STEPS, LR)
    training = max(abs(a - b) / b for (a, _), (b, _) in zip(results[0]["history"], history, strict=True))
    norms = max(abs(a - b) / b for (_, a), (_, b) in zip(results[0]["history"], history, strict=True))
    print(
        f"{name}: {len(grads)} tensors; logits {difference:.1e}, loss {abs(our_loss - loss) / loss:.1e}, worst gradient "
        f"{worst[0]:.1e} {worst[1]}; training {history[0][0]:.3f} -> {history[-1][0]:.3f}, off {training:.1e}, norm {norms:.1e}"
    )
    assert difference <= LOGITS and abs(ours["loss"] - loss) <= LOSS * loss and abs(our_loss - loss) <= LOSS * loss
    assert worst[0] <= GRADIENT
    assert training <= TRAINING and history[-1][0] < history[0][0]
