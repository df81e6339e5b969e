import pytest

from tests.engine.models import TwoBranches


@pytest.fixture
def model():
    return TwoBranches()
