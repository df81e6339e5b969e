"""Rules: by how much the step of each group is scaled, from what was measured.

A rule is host arithmetic on a few numpy vectors: anything that is called with a :class:`Measured`
and returns a coefficient for each group. The engine handles the rest: skipped steps, mixed
precision, sharding, checkpoints, ``every``, recording.

Example:
    >>> import torch
    >>> from gradbalance import attach
    >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
    >>> sgd = torch.optim.SGD([*text.parameters(), *audio.parameters()], lr=0.1)
    >>> groups = {"text": text, "audio": audio}
    >>> penalty = attach(sgd, groups, rule=lambda m: m.shares.min() / m.shares)
    >>> (3 * text(torch.ones(1, 4)) + audio(torch.ones(1, 4))).sum().backward()
    >>> sgd.step()
    >>> {name: round(c, 3) for name, c in penalty.coefficients().items()}
    {'text': 0.333, 'audio': 1.0}
"""

from gradbalance.rules.base import Measured, Rule
from gradbalance.rules.conflict_aware import ConflictAware
from gradbalance.rules.constant import ByHand, Watch
from gradbalance.rules.of_others import OGM, ClipGroups, Epochwise
from gradbalance.rules.useful import Useful

__all__ = [
    "OGM",
    "ByHand",
    "ClipGroups",
    "ConflictAware",
    "Epochwise",
    "Measured",
    "Rule",
    "Useful",
    "Watch",
]
