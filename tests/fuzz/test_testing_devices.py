"""Which devices kernel tests run on, and how many processes at once."""

import os
import threading
import time

import pytest
import torch

from kernelfuzz.fuzz.testing import devices
from kernelfuzz.strategies.errors import KernelfuzzError

CUDA = torch.device("cuda", 0)


@pytest.fixture
def two_gpus(monkeypatch):
    """A torch that says it has two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_here_is_a_cpu():
    assert devices.default_device(("cuda", "cpu")) == "cpu"
    assert devices.default_device(("cuda",)) == "cuda"
    assert devices.expanded([devices.ALL]) == ["cpu"]
    assert devices.why_not("cpu", ("cpu",)) is None
    assert "no cuda device here" in str(devices.why_not("cuda:1", ("cuda", "cpu")))


def test_a_kernel_that_is_not_for_a_device_says_so():
    assert devices.why_not("cpu", ("cuda", "xpu")) == "the kernel is not for cpu, but for cuda, xpu"


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "meta", ""])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(KernelfuzzError, match="unknown device"):
        devices.expanded([name])


def test_all_are_all_gpus_and_the_cpu(two_gpus):
    assert devices.default_device(("cuda", "cpu")) == "cuda"
    assert devices.expanded(["cpu", devices.ALL]) == ["cpu", "cuda:0", "cuda:1"]


def test_processes_share_the_gpus(two_gpus):
    assert [devices.device_of_worker("cuda", worker).index for worker in range(4)] == [0, 1, 0, 1]
    assert [devices.device_of_worker("cuda:1", worker).index for worker in range(2)] == [1, 1]
    assert devices.device_of_worker("cpu", 3) == torch.device("cpu")


def test_so_many_launch_on_a_gpu_at_once_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path))
    inside, most = 0, 0
    lock = threading.Lock()

    def launch():
        nonlocal inside, most
        for _ in range(5):
            with devices.slot(CUDA):
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.002)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=launch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == devices.SLOTS


def test_a_process_that_dies_gives_its_slot_back(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path))
    monkeypatch.setattr(devices, "SLOTS", 1)
    child = os.fork()
    if child == 0:
        with devices.slot(CUDA):
            os._exit(0)
    os.waitpid(child, 0)
    with devices.slot(CUDA):
        assert [path.name for path in (tmp_path / "devices").iterdir()] == ["cuda-0.0"]


def test_a_cpu_needs_no_slot(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path))
    with devices.slot(torch.device("cpu")):
        assert list(tmp_path.iterdir()) == []
