"""GPUs of a start, as the driver's own tool lists them."""

import os
import stat

import pytest

from megatron_vlm.launch.checks import Report
from megatron_vlm.launch.devices import check_devices, list_gpus


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """``driver(*lines)``: a machine whose nvidia-smi prints these."""

    def make(*lines: str) -> None:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir()
        tool.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + "\nEND\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


H100 = "{}, GPU-{}, NVIDIA H100 80GB HBM3, 81559, {}, 9.0"
OF = dict(device=None, precision="bf16", visible=None, ranks=None, single=False, memory_gib=None)


def test_gpus_are_chosen_and_their_free_memory_counts(driver):
    driver(H100.format(0, "aa", 81000), H100.format(1, "bb", 40000), H100.format(2, "cc", 81000))
    assert [gpu.uuid for gpu in list_gpus()] == ["GPU-aa", "GPU-bb", "GPU-cc"]
    report = Report()
    every = check_devices(report, **OF)
    assert (every.ranks, every.memory) == (3, 40000 << 20) and report.findings[0].outcome == "warning"
    two = check_devices(report, **{**OF, "visible": "2,0"})
    assert (two.names, two.memory) == (("2", "0"), 81000 << 20)
    assert check_devices(report, **{**OF, "visible": "GPU-bb"}).memory == 40000 << 20
    assert check_devices(report, **{**OF, "single": True}).names == ("0",)
    assert check_devices(report, **{**OF, "memory_gib": 24.0}).memory == 24 << 30
    assert not report.failed
    assert check_devices(report, **{**OF, "visible": "7"}) is None and "GPUs '7'" in report.failed[-1].text
    assert check_devices(report, **{**OF, "ranks": 4}) is None and "--num_processes 3" in report.failed[-1].advice


def test_bf16_needs_a_gpu_that_has_it(driver):
    driver("0, GPU-aa, Tesla V100-SXM2-16GB, 16384, 16000, 7.0")
    report = Report()
    assert check_devices(report, **OF) is None
    assert "no bf16" in report.failed[0].text and "--fp16 True" in report.failed[0].advice
    assert check_devices(report, **{**OF, "precision": "fp16"}).kind == "cuda"
