"""bf16 runs of fp32 weights train those weights, not their rounded copies, and give them back."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.conversion.convert import mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.runs import train
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.weights.rank_files import RankFiles

UNMOVED = "--bf16 --train-iters 1 --lr-warmup-fraction 0.5"  # the only update has a learning rate of 0
LAYOUTS = {
    "dp": "--use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 3000",
    "tp": "--tensor-model-parallel-size 2 --freeze-clip-vision-tower",
    "pp": "--pipeline-model-parallel-size 2",
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    write_tiny_idefics2(folder, text="llama", tie=True)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_main_parameters_are_the_weights_on_disk(command, twin, tied, tmp_path, layout):
    """Bit for bit: merged q, k and v, tensors cut over ranks, tied copies; frozen ones as the model has them."""
    start = tied if layout == "pp" else twin
    argv = command("out", f"{UNMOVED} {LAYOUTS[layout]} --save {tmp_path / 'run'}", load=start)
    assert [code for code, _ in run_distributed(train, argv, dp=2)] == [0, 0]
    with open_source(start) as source, RankFiles(tmp_path / "run" / "iter_0000001") as files:
        frozen = {name for name in source.infos if layout == "tp" and name.startswith("vision_model")}
        assert set(files.names("param")) == set(source.infos) - frozen
        for name in source.infos:
            weight = source.read(name)
            assert torch.equal(files.read(name), weight.bfloat16()) and not torch.equal(
                weight, weight.bfloat16().float()
            )
            assert name in frozen or torch.equal(files.read(name, "param"), weight), name
    mg2hf(tmp_path / "run", tmp_path / "fp32", dtype="fp32")
    mg2hf(tmp_path / "run", tmp_path / "bf16")
    fine, coarse = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16"))
    for name, weight in load_file(start / "model.safetensors").items():
        rounded = layout == "tp" and "vision_model" in name
        assert torch.equal(fine[name], weight.bfloat16().float() if rounded else weight), name
        assert torch.equal(coarse[name], weight.bfloat16()), name


def test_saved_modules_of_adapters(command, twin, tmp_path):
    """What trains in full beside adapters starts from the fp32 base and comes back in fp32, merged and alone."""
    peft = "peft.target_modules=[q_proj] peft.r=2 peft.modules_to_save=[lm_head] --use-distributed-optimizer"
    argv = command("out", f"{UNMOVED} {peft} --save {tmp_path / 'run'}")
    assert [code for code, _ in run_distributed(train, argv, dp=2)] == [0, 0]
    mg2hf(tmp_path / "run", tmp_path / "merged", merge=True, dtype="fp32")
    mg2hf(tmp_path / "run", tmp_path / "adapter", adapter_only=True, dtype="fp32")
    before, after = (load_file(folder / "model.safetensors") for folder in (twin, tmp_path / "merged"))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())  # B is 0
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (head,) = (tensor for name, tensor in adapter.items() if "lm_head" in name)
    assert torch.equal(head, before["lm_head.weight"])
