"""QLoRA against PEFT on bitsandbytes' 4-bit HF model, its product's gradient and memory, and codes that are stored."""

import pytest
import torch

from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.load import load_model
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.conversion.verify import verify
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import (
    adapted_mapping,
    gradient_errors,
    hf_inputs,
    layout_logits,
    layout_run,
    merge_gradients,
    random_samples,
)
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.internvl3 import hf_inputs as internvl_inputs
from megatron_vlm.testing.twins.internvl3 import make_samples, write_tiny_internvl3
from megatron_vlm.testing.twins.peft import peft_gradients, peft_twin, twin_in_4bit
from megatron_vlm.weights.nf4.tensor import Quantization, quantise

LOGITS = 2e-5  # of the largest logit, fp32; measured 1.1e-5
LOSS = 2e-6  # relative; measured 1.3e-7
GRADIENT = 1e-4  # of the gradient's norm; measured 8.1e-6
HALF = 1.5  # bf16: times the distance of PEFT in bf16 from PEFT in fp32; measured 0.94 for logits, 0.92 for gradients
SAMPLES = [([(40, 50)], 14), ([], 23), ([(56, 56), (17, 33)], 9)]
TARGETS = dict(target_modules=r".*text_model.*_proj", r=4, alpha=8)
# Of a row cut over 2 ranks, q, k, v, o and up lie in whole blocks (128 / 2), and down does not (192 / 2).
MODEL = dict(text_hidden=128, ffn=192, layers=2, dtype=torch.bfloat16)
DOUBLE = pytest.mark.parametrize(
    "double", [pytest.param(False, id="plain", marks=pytest.mark.full), pytest.param(True, id="double")]
)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """(directory of weights in bf16, samples)."""
    directory = str(tmp_path_factory.mktemp("idefics2"))
    write_tiny_idefics2(directory, **MODEL)
    with open_source(directory) as source:
        return directory, random_samples(source.config, SAMPLES)


@DOUBLE
def test_equals_peft_on_bitsandbytes(twin, double):
    """fp32: the parity bars of full precision, at tp 1 and 2; bf16: as near to PEFT in fp32 as PEFT in bf16 is."""
    directory, samples = twin
    check_equals_peft(directory, samples, double=double)


@pytest.mark.full
def test_qwen3_equals_peft_on_bitsandbytes(tmp_path):
    """Norms of queries and keys between linears in 4 bits."""
    sizes = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, head_dim=48)
    write_tiny_internvl3(tmp_path, text=dict(model_type="qwen3", num_key_value_heads=2, **sizes))
    with open_source(tmp_path) as source:
        samples = make_samples(source.config, [([3], 14), ([], 23)])
    settings = {**TARGETS, "target_modules": r".*language_model.*_proj"}
    check_equals_peft(str(tmp_path), samples, settings, inputs=internvl_inputs)


def check_equals_peft(directory, samples, settings=TARGETS, *, double=True, inputs=hf_inputs):
    row = row_from_samples(samples)
    model, tensors = peft_twin(twin_in_4bit(directory, torch.float32, double=double), settings)
    loss, logits, grads = peft_gradients(model, samples, inputs)
    peft = {"tensors": tensors, "quantize": "nf4", **({} if double else {"double_quant": False}), **settings}
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


def test_bf16_is_as_near_as_peft(tmp_path):
    directory = str(tmp_path)
    write_tiny_idefics2(
        directory, std=0.05, **MODEL
    )  # does not amplify rounding, which processors do in ways of their own
    with open_source(directory) as source:
        samples = random_samples(source.config, SAMPLES)
    exact, tensors = peft_twin(twin_in_4bit(directory, torch.float32), TARGETS)
    rounded, again = peft_twin(twin_in_4bit(directory, torch.bfloat16), TARGETS)
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


def on_codes(directories, parallel: dict, quantizations) -> list[dict[str, bytes]]:
    """On a rank: what it holds of each directory's linears, by global name, and that every other parameter is full."""
    from megatron_vlm.models.built import global_named_modules
    from megatron_vlm.models.options import ModelOptions
    from megatron_vlm.parallel.config import ParallelConfig
    from megatron_vlm.parallel.topology import build_topology

    found = []
    for directory, quantization in zip(directories, quantizations, strict=True):
        with open_source(directory) as source:
            layers = source.config.text.num_layers
            topology = build_topology(ParallelConfig(**parallel), num_layers=layers, device=torch.device("cpu"))
            wanted = None if quantization is None else Quantization.from_dict(quantization)
            options = ModelOptions(params_dtype="bf16", make_vocab_size_divisible_by=8)
            model = load_model(source, topology, options, wanted)
        held = {}
        for stage in model:
            for name, module in global_named_modules(stage):
                if hasattr(module, "nf4"):
                    parts = {"codes": module.weight, **dict(module.nf4.named_buffers())}
                    held |= {f"{name}.{part}": tensor.numpy().tobytes() for part, tensor in parts.items()}
            kept = [*dict(stage.named_parameters()), *stage.state_dict()]
            assert not any(".nf4." in name or name.endswith(("fc1.weight", "_proj.weight")) for name in kept)
        found.append(held)
    return found


@DOUBLE
def test_stored_codes_are_those_of_quantising_on_load(twin, tmp_path, double):
    """Whatever layout they were written for: read again at tp 2, on every rank, byte for byte."""
    directory, _ = twin
    settings = dict(double_quant=double, groups=["llm", "vision", "connector"])
    stored = dict(quantize="nf4", double_quant=double, quantize_groups=settings["groups"])
    hf2mg(directory, tmp_path / "a", tp=1, pp=1, **stored)
    hf2mg(directory, tmp_path / "b", tp=2, pp=2, **stored)
    hf2mg(tmp_path / "b", tmp_path / "c", tp=4)  # a new layout of what is stored
    directories = [directory, str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c")]
    parallel = dict(tensor_model_parallel_size=2)
    quantizations = [{"dtype": "bf16", **settings}, None, None, None]
    ranks = run_distributed(on_codes, directories, parallel, quantizations, tp=2)
    for fresh, *others in ranks:
        assert len(fresh) >= 8 * (5 if double else 2)
        assert all(other == fresh for other in others)
    with open_source(directories[2]) as source:
        source.check_digests()
        assert source.quantization == Quantization.from_dict({"dtype": "bf16", **settings})
        assert source.quantization.backend == "bitsandbytes"
        size = sum(path.stat().st_size for path in (tmp_path / "b").glob("nf4_*/*"))
        linears = sum(torch.Size(shape).numel() for shape in source._nf4.shapes.values())
        print(f"{size:,} bytes on disk for {linears:,} parameters: {8 * size / linears:.2f} bits each")
        assert 8 * size / linears < (5.1 if double else 5.3)  # small tensors, and a header


def test_what_needs_full_weights_is_refused(twin, tmp_path):
    directory, _ = twin
    stored = tmp_path / "nf4"
    hf2mg(directory, stored, quantize="nf4")
    with pytest.raises(
        ConversionError, match="linears in 4 bits, and writing an HF model needs them in full: give the model"
    ):
        mg2hf(stored, tmp_path / "hf")
    with pytest.raises(ConversionError, match="comparing it with an HF model needs them in full"):
        verify(directory, stored)
    with pytest.raises(
        ConfigError, match=r"quantised from bf16, the run computes in fp32: .* --quantize nf4 --dtype fp32"
    ):
        hf2mg(stored, tmp_path / "other", dtype="fp32")
    with pytest.raises(ConfigError, match="double_quant False against True; set them alike"):
        hf2mg(stored, tmp_path / "other", quantize="nf4", double_quant=False)
    with pytest.raises(ConfigError, match="cannot quantise 'tower'"):
        hf2mg(directory, tmp_path / "other", quantize="nf4", quantize_groups=("tower",))
    with pytest.raises(ConfigError, match=r"no effect without peft\.quantize"):
        PeftConfig(target_modules=("q_proj",), double_quant=False)
    assert not (tmp_path / "hf").exists() and not (tmp_path / "other").exists()
    damaged = next(stored.glob("nf4_*/model.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(ConversionError, match=r"nf4_000/model.safetensors has .* bytes, megatron.json says"):
        open_source(stored)


def on_families(directories) -> list[tuple[int, int, list[str]]]:
    """On a rank: for each model, (linears, those in 4 bits, those left out) with all of its parts quantised."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from megatron_vlm.models.built import global_named_modules
    from megatron_vlm.models.options import ModelOptions
    from megatron_vlm.parallel.config import ParallelConfig
    from megatron_vlm.parallel.topology import build_topology

    found = []
    for directory in directories:
        with open_source(directory) as source:
            layers = source.config.text.num_layers
            topology = build_topology(ParallelConfig(), num_layers=layers, device=torch.device("cpu"))
            wanted = Quantization(dtype="fp32", groups=("llm", "vision", "connector"))
            (stage,) = load_model(source, topology, ModelOptions(make_vocab_size_divisible_by=8), wanted)
        linears = {
            name: module
            for name, module in global_named_modules(stage)
            if isinstance(module, ColumnParallelLinear | RowParallelLinear)
        }
        left = [name for name, module in linears.items() if not hasattr(module, "nf4")]
        found.append((len(linears), len(linears) - len(left), left))
    return found


@pytest.mark.full
def test_linears_of_every_family(tmp_path):
    """All but the head, by the names of the weight map; XComposer2's own branches stay in full beside them."""
    from megatron_vlm.testing.twins.gemma3 import write_tiny_gemma3
    from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2
    from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_llava_internlm2
    from megatron_vlm.testing.twins.qwen2_5_vl import write_tiny_qwen2_5_vl
    from megatron_vlm.testing.twins.qwen3_vl import write_tiny_qwen3_vl
    from megatron_vlm.testing.twins.smolvlm import write_tiny_smolvlm
    from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2

    writers = (
        write_tiny_idefics2,
        write_tiny_internlm2,
        write_tiny_internvl3,
        write_tiny_llava_internlm2,
        write_tiny_xcomposer2,
        write_tiny_smolvlm,
        write_tiny_gemma3,
        write_tiny_qwen2_5_vl,
        write_tiny_qwen3_vl,
    )
    directories = [tmp_path / writer.__name__ for writer in writers]
    for writer, directory in zip(writers, directories):
        directory.mkdir()
        writer(directory)
    (found,) = run_distributed(on_families, [str(directory) for directory in directories])
    for directory, (linears, quantised, left) in zip(directories, found):
        print(f"{directory.name}: {quantised} of {linears} linears")
        assert left in ([], ["language_model.output_layer"]), directory.name
        assert quantised > 4


def on_product() -> tuple[bool, int, int]:
    """On a rank: gradcheck of the product, and bytes that it keeps for its backward pass."""
    from megatron_vlm.peft.qlora import Nf4Product
    from megatron_vlm.weights.mapping import ROW, direct
    from megatron_vlm.weights.nf4.shard import Lines, shard

    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(0))
    lines = Lines.of(direct("w", "w", ROW), [tuple(weight.shape)], 2, 1)  # 80 columns: not whole blocks
    codes, nf4 = shard(lines, [quantise(weight, double=True)], torch.float32)
    x = torch.randn(3, 2, 80, dtype=torch.float64, requires_grad=True)
    right = torch.autograd.gradcheck(lambda x: Nf4Product.apply(x, codes, nf4, None), [x], atol=1e-7, rtol=0)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        Nf4Product.apply(x, codes, nf4, None)
    others = [tensor for tensor in kept if tensor.data_ptr() != codes.data_ptr()]
    return right, len(kept), len(others)


def test_the_products_gradient_and_what_it_keeps():
    """fp64 inputs against finite differences; between the passes only the codes are kept, which the model holds anyway."""
    assert run_distributed(on_product) == [(True, 1, 0)]


def on_kept(directory: str, stored: str) -> tuple[list[str], str]:
    """On a rank: parameters of linears that stay because they train, and the refusal where they are stored in 4 bits."""
    from megatron_vlm.models.built import global_named_parameters
    from megatron_vlm.models.options import ModelOptions
    from megatron_vlm.parallel.config import ParallelConfig
    from megatron_vlm.parallel.topology import build_topology

    options, wanted = ModelOptions(params_dtype="bf16"), Quantization(dtype="bf16", groups=("connector",))
    keep = ("connector.modality_projection.linear_fc1.weight", "connector.modality_projection.linear_fc2.weight")
    message, names = "", []
    for path, quantization in ((directory, wanted), (stored, None)):
        with open_source(path) as source:
            topology = build_topology(ParallelConfig(), num_layers=2, device=torch.device("cpu"))
            try:
                (stage,) = load_model(source, topology, options, quantization, keep)
            except ConfigError as error:
                message = str(error)
            else:
                names = [name for name, _ in global_named_parameters(stage) if "connector" in name and "linear" in name]
    return names, message


def test_what_trains_in_full_is_not_quantised(twin, tmp_path):
    directory, _ = twin
    hf2mg(directory, tmp_path / "nf4", quantize="nf4", quantize_groups=("connector",))
    ((names, message),) = run_distributed(on_kept, directory, str(tmp_path / "nf4"))
    assert names == [f"connector.modality_projection.linear_fc{i}.weight" for i in (1, 2)]
    assert "linear_fc1.weight trains in full (peft.modules_to_save), but is stored in 4 bits" in message
