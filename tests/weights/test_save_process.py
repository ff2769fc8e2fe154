"""The process that writes checkpoints: light, leaves signals to its parent, ends with it, and tells of its end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files import file_digest
from megatron_vlm.processes import state
from megatron_vlm.weights.save_process import HostImage, SaveProcess, write_image


@pytest.fixture
def image():
    image = HostImage()
    yield image
    image.close()


@pytest.fixture
def process(image):
    process = SaveProcess(image)
    yield process
    process.close()


def call(process, function, *arguments):
    process.start(function, *arguments)
    return process.result()


def test_it_writes_what_lies_in_shared_memory_that_grows_and_shrinks(process, image, tmp_path):
    for number, size in enumerate((5 << 20, 9 << 20, 1234)):  # the process was started with the first
        data = os.urandom(size)
        with image.resized(size) as memory:
            memory[:] = data
        path = tmp_path / str(number)
        record = call(process, write_image, path, image.descriptor, image.size)
        assert path.read_bytes() == data and record == file_digest(path)


def test_it_loads_no_framework_leaves_signals_to_the_run_and_is_named_when_it_ends(process):
    loaded = call(process, eval, "list(__import__('sys').modules)")
    assert not {"torch", "numpy", "megatron.core", "transformers"} & set(loaded) and "megatron_vlm.weights" in loaded
    first = process.pid
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(first, number)
    assert call(process, os.getpid) == first
    with pytest.raises(CheckpointError, match="No such file or directory: '/absent/x'"):
        call(process, os.mkdir, "/absent/x")
    with pytest.raises(CheckpointError, match=r"in the process that writes checkpoints:(?s:.*)ZeroDivisionError"):
        call(process, eval, "1 / 0")
    assert process.done
    process.start(eval, "__import__('time').sleep(60)")
    assert not process.done
    os.kill(first, signal.SIGKILL)
    with pytest.raises(CheckpointError, match=rf"process {first} that writes checkpoints ended with exit code -9"):
        process.result()
    assert call(process, os.getpid) not in (first, None)  # another one


def test_it_ends_with_its_parent_in_the_middle_of_a_job(tmp_path):
    code = (
        "import os, signal; from megatron_vlm.weights.save_process import *; p = SaveProcess(HostImage()); "
        "p.start(os.getpid); print(p.result(), flush=True); p.start(eval, \"__import__('time').sleep(60)\"); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    end = time.monotonic() + 5
    while state(int(done.stdout)) not in ("", "Z"):
        assert time.monotonic() < end
        time.sleep(0.01)
