"""Which GPUs the native CUDA kernels are chosen for: by capability and by what a first launch says. Devices here are made up."""

import logging
from types import SimpleNamespace

import pytest
import torch

from fastedit import dispatch
from fastedit.ops import cuda_device


class Library:
    """kernels/cuda/probe.cu on a machine that answers as it is told."""

    def __init__(self, error=0, driver=13000, built=13000):
        self.error, self.versions, self.probed = error, {1: driver, 0: built}, []

    def fastedit_cuda_probe(self, device):
        self.probed.append(device)
        return self.error

    def fastedit_cuda_error_name(self, error):
        return {209: b"cudaErrorNoKernelImageForDevice", 35: b"cudaErrorInsufficientDriver"}[error]

    def fastedit_cuda_error_string(self, error):
        return {209: b"no kernel image is available", 35: b"CUDA driver version is insufficient"}[error]

    def fastedit_cuda_version(self, of_driver):
        return self.versions[of_driver]


def test_a_device_that_runs_a_launch_is_served():
    library = Library()
    assert cuda_device.why_not(1, library, (9, 0)) is None and library.probed == [1]


def test_an_old_device_is_not_even_probed():
    library = Library()
    assert "7.5" in cuda_device.why_not(0, library, (7, 5)) and library.probed == []


def test_another_architecture_says_its_name_and_how_to_build_for_it():
    reason = cuda_device.why_not(0, Library(209), (10, 3))
    assert "cudaErrorNoKernelImageForDevice (209)" in reason and "FASTEDIT_CUDA_ARCHITECTURES=103" in reason


def test_an_older_driver_says_both_versions():
    reason = cuda_device.why_not(0, Library(35, driver=12040), (9, 0))
    assert "cudaErrorInsufficientDriver (35)" in reason and "12.4" in reason and "13.0" in reason


@pytest.fixture
def machine(monkeypatch):
    """Two GPUs, the first of a kind that no kernel is built for, with a native module whose kernels are built."""
    library, capabilities = Library(209), [(12, 1), (12, 1)]
    caches = (cuda_device.why_not_here, cuda_device._library, dispatch.select, dispatch.why_not, dispatch._announce)
    monkeypatch.setattr(cuda_device, "_library", lambda: library)
    monkeypatch.setattr(torch.version, "hip", None)
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: len(capabilities), "current_device": lambda: 1,
        "get_device_capability": lambda device: capabilities[device],
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(dispatch, "load", lambda name: SimpleNamespace(__name__=name))
    monkeypatch.delenv("FASTEDIT_BACKEND", raising=False)
    for cache in caches:
        cache.cache_clear()
    yield SimpleNamespace(library=library, capabilities=capabilities)
    for cache in caches:
        cache.cache_clear()


def test_the_dispatch_takes_triton_and_says_why_once(machine, caplog):
    with caplog.at_level(logging.WARNING, "fastedit"):
        assert [dispatch.select("cuda", dtype).__name__ for dtype in (torch.bfloat16, torch.float32)] == ["triton", "triton"]
    assert len(caplog.records) == 1 and "cudaErrorNoKernelImageForDevice" in caplog.text
    assert machine.library.probed == [1]  # not the other device of that kind: a launch makes a context


def test_a_forced_backend_refuses_with_the_reason(machine, monkeypatch):
    monkeypatch.setenv("FASTEDIT_BACKEND", "cuda")
    with pytest.raises(dispatch.BackendError, match="no kernel image"):
        dispatch.select("cuda", torch.bfloat16)


def test_a_device_of_another_kind_is_asked_too(machine):
    machine.library.error, machine.capabilities[0] = 0, (7, 5)
    assert "GPU 0" in cuda_device.why_not_here() and "CUDA_VISIBLE_DEVICES" in cuda_device.why_not_here()
    assert machine.library.probed == [1]
    cuda_device.why_not_here.cache_clear()
    machine.capabilities[0] = (9, 0)
    assert cuda_device.why_not_here() is None and machine.library.probed == [1, 1, 0]
