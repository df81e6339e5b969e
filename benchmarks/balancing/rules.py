"""Rivals and parts of the default rule that are rules of the benchmark alone."""

import numpy as np

from gradbalance.rules import Measured, Rule, Useful


class SignalToNoise:
    """Coherence out of Adam's own state: the squared length of the first moment over the sum of the second.

    Args:
        groups: The param_groups of the branches.
        state: Of the optimizer.
        rule: What is done with it.
    """

    needs_coherence = False

    def __init__(self, groups: list[dict], state: dict, rule: Rule) -> None:
        self.groups, self.state, self.rule = groups, state, rule

    def __call__(self, measured: Measured) -> np.ndarray:
        moments = [
            [self.state[p] for p in group["params"] if p in self.state] for group in self.groups
        ]
        if not all(moments):  # before the first step
            return np.ones(len(measured.names))
        first = np.array(
            [sum(float(m["exp_avg"].square().sum()) for m in group) for group in moments]
        )
        second = np.array([sum(float(m["exp_avg_sq"].sum()) for m in group) for group in moments])
        chance = 0.1 / 1.9  # of pure noise, (1 - β)/(1 + β)
        return self.rule(measured._replace(coherences=first / second - chance))


def in_proportion(power: float) -> Rule:
    """MoLS's idea: the update of a module is scaled by its signal to noise, to a power of either sign."""

    def rule(measured: Measured) -> np.ndarray:
        ratio = (measured.coherences.clip(min=0) + 0.01) ** power
        return np.clip(ratio / np.exp(np.log(ratio).mean()), 0.5, 2.0)

    return rule


class Hypergradient:
    r"""Hypergradient descent on the learning rate of each branch: :math:`c \leftarrow c\,(1 + \beta \cos)`.

    The cosine is that of the gradient with the one of the step before, which is the derivative of the loss with respect
    to the learning rate of that step, scaled as in the multiplicative rule. Bounds of 100 keep it from running away.

    Reference:
        Baydin et al., Online Learning Rate Adaptation with Hypergradient Descent, ICLR 2018, section 3 and the
        multiplicative rule of its appendix; for each group by itself is ours.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.factors: np.ndarray | None = None

    def __call__(self, measured: Measured) -> np.ndarray:
        if self.factors is None:
            self.factors = np.ones(len(measured.names))
        self.factors = self.factors * (1 + self.beta * np.nan_to_num(measured.coherences))
        self.factors = self.factors.clip(0.01, 100.0)
        return self.factors


class UsefulAlone:
    """The useful part alone decides: the default rule without its square of the coherences."""

    def __init__(self, most: float = 10.0) -> None:
        self.most = most

    def __call__(self, measured: Measured) -> np.ndarray:
        equal = np.ones(len(measured.names))
        alike = measured._replace(coherences=equal, coherence_errors=0 * equal)
        return Useful(self.most)(alike)


def certain(rule: Rule) -> Rule:
    """A rule that takes every mean for certain: without the shrinkage."""

    def unshrunk(measured: Measured) -> np.ndarray:
        nothing = np.where(np.isfinite(measured.useful_errors), 0.0, np.inf)
        return rule(measured._replace(coherence_errors=nothing, useful_errors=nothing))

    return unshrunk
