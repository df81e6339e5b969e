"""Warnings at the line of the user, however deep in an optimizer's step they come up."""

import sys
import warnings
from pathlib import Path

import torch

_INSIDE = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


def warn(message: str) -> None:
    """Give a UserWarning at the first line outside gradbalance and torch."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
        level += 1
    warnings.warn(message, UserWarning, stacklevel=level + 1)
