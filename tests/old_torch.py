"""What an old torch cannot do, and what it warns of by itself: tests that need more are skipped by its name."""

import pytest
import torch

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

# Each with the first version of torch that has it.
FEATURES = {
    "FSDP2 on the CPU": (2, 7),
    "torch.optim.Muon": (2, 9),
    "Tensor.grad_dtype": (2, 10),
    "fused Adagrad under GradScaler": (2, 11),
    "Adagrad after add_param_group": (2, 11),
    # Not there in 2.6; nothing between was tried.
    "a trial that draws beside another thread": (2, 13),
}

# What torch warns of by itself, each with the last version that does; warnings are errors in these tests.
WARNINGS = {
    "torch.distributed is unavailable:UserWarning": (2, 6),
    "DTensor random operators may not have complete support:UserWarning": (2, 6),
    "TypedStorage is deprecated:UserWarning": (2, 6),
    "The epoch parameter in .scheduler.step:UserWarning": (2, 8),
    "Warning. Profiler clears events:UserWarning": (2, 10),
}


def has_torch(feature):
    """Whether this torch can do it."""
    return FEATURES[feature] <= VERSION


def needs_torch(feature):
    """A skip of the test, under the name of the feature, where torch is older than it."""
    __tracebackhide__ = True  # the skip is reported where the feature is needed
    if not has_torch(feature):
        major, minor = FEATURES[feature]
        pytest.skip(f"{feature} needs torch {major}.{minor}")


def filters():
    """Filters of warnings for pytest that let through what this torch warns of by itself."""
    return [f"ignore:{message}" for message, last in WARNINGS.items() if last >= VERSION]
