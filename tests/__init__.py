"""The tests; a folder for each idea."""

from types import ModuleType

import pytest


def needs(package: str, extra: str = "integrations") -> ModuleType:
    """The imported package, else a skip of the test or, at the top of a module, of the module, that names the extra."""
    __tracebackhide__ = True  # the skip is reported where the package is needed
    return pytest.importorskip(package, reason=f"needs {package}: install the extra `{extra}`")
