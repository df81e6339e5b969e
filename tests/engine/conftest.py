import pytest

from gradbalance._engine import errors, state
from gradbalance._gradients import coherence, layout
from tests.engine.models import TwoBranches


@pytest.fixture
def model():
    return TwoBranches()


@pytest.fixture
def off_host(monkeypatch):
    """The code takes the way that it takes on an accelerator, where to look at a tensor is a host read."""
    for module in (errors, state, coherence, layout):
        monkeypatch.setattr(module, "on_host", lambda device: False)


@pytest.fixture(params=["on the host", "off the host"])
def host(request):
    """Both ways."""
    if request.param == "off the host":
        request.getfixturevalue("off_host")
    return request.param == "on the host"
