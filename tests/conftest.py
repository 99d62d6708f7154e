"""Shared by every test: a fixed seed, where a test runs, and GPU tests that are skipped in plain sight."""

import pytest
import torch

from helpers import BACKENDS, running_on

NO_GPU = "no CUDA device"


def pytest_collection_modifyitems(items):
    """Skips tests marked `cuda` on a machine without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter):
    """Says how many GPU tests did not run, so that a green run on a CPU is not taken for more."""
    reports = terminalreporter.stats.get("skipped", [])
    count = sum(NO_GPU in str(report.longrepr) for report in reports)
    terminalreporter.write_line(f"GPU tests skipped: {count}" + (f" ({NO_GPU})" if count else ""))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run of a test."""
    torch.manual_seed(0)


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    """Runs a test once per instruction set that this CPU has."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs a test once per instruction set that this CPU has, and on the GPU."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=["auto", BACKENDS[-1]], ids=["cpu", "cuda"])
def device(request):
    """Runs a test on the CPU and on the GPU, where its tensors are made unless it says otherwise."""
    with running_on(request.param):
        yield torch.get_default_device()


@pytest.fixture(scope="session", params=["gloo", pytest.param("nccl", marks=pytest.mark.cuda)])
def processes(request, tmp_path_factory):
    """Two processes for the tests of a session: on the CPU, or with a GPU each."""
    from processes import WORLD, Processes

    if request.param == "nccl" and torch.cuda.device_count() < WORLD:
        pytest.skip(f"{NO_GPU} for a second process")
    workers = Processes(request.param, tmp_path_factory.mktemp("processes"))
    yield workers
    workers.stop()
