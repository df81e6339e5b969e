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


# What cannot be imported, and not be searched for doctests, without a package.
OPTIONAL = {
    "gradbalance/_figure.py": "matplotlib",
    "gradbalance/integrations/lightning.py": "lightning",
    "gradbalance/integrations/transformers.py": "transformers",
    "gradbalance/statistics/_triton.py": "triton",
    "tests/statistics/compiled.py": "triton",
}


def pytest_configure(config):
    """Let through what an old torch warns of, and leave out modules whose package is not installed."""
    from tests.old_torch import filters

    for line in filters():
        config.addinivalue_line("filterwarnings", line)
    missing = [path for path, package in OPTIONAL.items() if find_spec(package) is None]
    config.option.ignore = [*(config.option.ignore or []), *missing]
