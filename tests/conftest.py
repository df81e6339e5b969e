"""Settings shared by all tests."""

import os
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tensors of the tests are small: a second thread would only wait, and for long on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

# torch's first call of a kind takes hundreds of milliseconds: a deadline would only measure that.
settings.register_profile(
    "torch", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("torch")
torch.set_num_threads(1)


def pytest_configure(config):
    """Where Triton is not installed the module of its kernels cannot be searched for doctests."""
    if find_spec("triton") is None:
        config.option.ignore = [*(config.option.ignore or []), "gradbalance/statistics/_triton.py"]
