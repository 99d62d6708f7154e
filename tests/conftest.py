"""Shared by every test: a fixed seed, and GPU tests that are skipped in plain sight."""

import pytest
import torch

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
    from moka import _C  # here, so that the tests of a missing extension can be collected

    if not _C.set_cpu_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _C.set_cpu_isa("auto")
