"""The CPU seams leave the rest of torch alone. A process of its own: installed seams stay for good."""

import subprocess
import sys


def test_factories_still_follow_a_device_context():
    """from_pretrained loads under such a context; a factory that ignores it leaves rotary tables uninitialised."""
    code = """
import torch
from megatron_vlm.parallel import cpu
cpu.install()
with torch.device("meta"):
    devices = {torch.arange(3).device.type, torch.zeros(3).device.type, torch.empty(3).device.type}
assert devices == {"meta"}, devices
assert torch.zeros(3, device="cuda").device.type == "cpu"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
