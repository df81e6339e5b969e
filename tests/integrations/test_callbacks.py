"""What both callbacks share with the penalty, and what happens where their packages are missing."""

import importlib
import inspect
import sys

import pytest

from gradbalance import ConflictAwarePenalty
from tests import needs


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_callback_takes_the_options_of_the_penalty_with_the_same_defaults(name):
    needs(name)
    module = importlib.import_module(f"gradbalance.integrations.{name}")
    own = inspect.signature(module.BalanceCallback).parameters
    expected = dict(inspect.signature(ConflictAwarePenalty).parameters)
    del expected["optimizer"]
    assert list(own) == list(expected)
    for option in own.keys() - {"groups"}:
        assert own[option] == expected[option]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("lightning", "pip install lightning"),
        ("transformers", "pip install transformers accelerate"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, command, monkeypatch):
    for module in (name, f"{name}.pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"gradbalance.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"`gradbalance.integrations.{name}` must .*`{command}`"):
        importlib.import_module(f"gradbalance.integrations.{name}")
