"""The host's memory: what stands for it on the CPU is not what torch's allocator hands out."""

import torch

from megatron_vlm.parallel.host import copy_stream, host_empty, on_stream
from megatron_vlm.testing.memory import PeakOnCpu


def test_on_the_cpu_the_hosts_share_is_told_from_the_devices():
    cpu, counted = torch.device("cpu"), PeakOnCpu()
    with counted:
        host = host_empty((300, 100), torch.bfloat16, cpu)
        here = torch.zeros(1000)
        host.view(-1)[:1000].copy_(here)
    assert host.shape == (300, 100) and host.dtype == torch.bfloat16
    assert 4000 <= counted.bytes < 8000
    assert copy_stream(cpu) is None
    with on_stream(None):
        assert host_empty((5,), torch.float32, torch.device("meta")).numel() == 0
