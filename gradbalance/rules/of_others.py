"""Rules of others, for any number of groups, with where they help and harm in our own tables.

The figures are changes against no balancing under AdamW at its default rate, ± half a 95 %
interval: points of accuracy, or 100 times a correlation for real audio and video. They were
measured before 0.3.0, and ``python -m benchmarks.balancing`` measures them again; its report has
none of them yet.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradbalance.rules.base import Measured, Vector, check_number
from gradbalance.rules.conflict_aware import DEAD_BAND, modulation


@dataclass(frozen=True)
class OGM:
    r"""On-the-fly gradient modulation: slows each branch that scores above the mean of the others.

    .. math::
        c_m = \begin{cases} 1 - \tanh(\alpha\,r_m) & r_m > 1 \\ 1 & \text{else} \end{cases},
        \qquad r_m = \frac{s_m}{\text{mean}_{k \ne m}\, s_k}, \qquad s_m = 1 - e_m

    - :math:`e_m` is the observed error: 1 minus the probability that the branch alone gives to the
      right class, its mean over the batch.
    - :math:`s_m`, in [0, 1], is the score of the branch.
    - OGM-GE of the paper is this rule with ``apply_to="gradient"``, ``smoothing=0`` and
      ``noise=1``, for classification under SGD.

    It helps where a branch that learns fast keeps the others from learning. It harms where the
    branch that leads deserves to, because the others are noise. Under Adam a constant factor on the
    gradient cancels, and what is left is mostly the noise. There OGM-GE changes the score by
    −2.4 ± 0.9 for speech beside noise, −1.8 ± 0.6 for a noisy image over faint speech, −2.1 ± 0.6
    for an image beside a sensor of noise and −0.0 ± 1.2 for real audio and video beside noise; the
    noise alone changes it by +2.6 ± 0.9, −2.0 ± 0.7, +0.6 ± 0.7 and −0.2 ± 0.5.

    Args:
        alpha: Strength of the modulation, > 0. The paper tunes it in (0, 1].

    Shape:
        Coefficients ``[N]``, in [0, 1]. 1 for a group that is not observed, which is left out of
        the mean; 1 for all before anything is observed.

    Raises:
        TypeError: If ``alpha`` is not a number.
        ValueError: If ``alpha`` is out of its range. At a step, if an observed error is above 1.

    Example:
        >>> import torch
        >>> from gradbalance import attach
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> sgd = torch.optim.SGD([*text.parameters(), *audio.parameters()], lr=0.1)
        >>> groups = {"text": text, "audio": audio}
        >>> penalty = attach(sgd, groups, rule=OGM(alpha=0.3), apply_to="gradient", smoothing=0)
        >>> penalty.observe(text=1 - 0.8, audio=1 - 0.4)
        >>> (text(torch.ones(1, 4)) + audio(torch.ones(1, 4))).sum().backward()
        >>> sgd.step()
        >>> {name: round(c, 3) for name, c in penalty.coefficients().items()}
        {'text': 0.463, 'audio': 1.0}

    Reference:
        Peng et al., Balanced Multimodal Learning via On-the-fly Gradient Modulation, CVPR 2022,
        equations 8 to 10. [R]: the mean of the others for more than two branches; equal scores are
        no lead, even where their mean is rounded.
    """

    alpha: float

    needs_coherence: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive("alpha", self.alpha, "The paper tunes it between 0 and 1.")

    def __call__(self, measured: Measured) -> Vector:
        """The coefficients, shape ``[N]``."""
        errors = measured.errors
        if errors is None:
            return np.ones(len(measured.names))
        members = measured.active & ~np.isnan(errors)
        largest = np.max(errors, where=members, initial=0)
        if largest > 1 + DEAD_BAND:
            raise ValueError(
                f"`observe` must be told errors in [0, 1] for OGM. Got {largest:.4g}. "
                "Pass 1 minus the probability of the right class."
            )
        scores = np.maximum(1 - errors, 0)
        return modulation(scores, members, self.alpha, centred=False)


@dataclass(frozen=True)
class Epochwise:
    r"""As MILES: a branch that is used more than the least used one moves less in the next epoch.

    .. math::
        c_m = \begin{cases} \text{factor} & u_m - \min_k u_k > \text{lead} \\ 1 & \text{else}
        \end{cases}, \qquad u_m = 1 - e_m, \qquad e_m = \frac{M_{-m}}{M}

    - :math:`M` is the score of the model on validation data, higher is better, and :math:`M_{-m}`
      its score without branch m: with the features of the branch set to their mean, say.
    - :math:`e_m` is what you observe, once an epoch: the part of the score that the model keeps
      without the branch, >= 0. It stays in force until the next call.
    - :math:`u_m` is the conditional utilization of the branch: how much of the score hangs on it.

    Build with ``smoothing=0``, so that the last epoch alone decides.

    It helps where a branch is used less only because another one learns faster. It harms where a
    branch is used less because it holds less: then the one that does the work is slowed. It changes
    the score by −13.5 ± 1.1 for speech beside noise, −16.1 ± 2.3 for an image beside a sensor of
    noise, −0.7 ± 0.5 for a noisy image over faint speech and −1.8 ± 0.7 for real audio and video
    beside noise. Nowhere in our tables does it gain.

    Args:
        lead: How much more a branch is used than the least used one before it is slowed, >= 0.
        factor: Coefficient of such a branch, in [0, 1].

    Shape:
        Coefficients ``[N]``, each 1 or ``factor``. 1 for a group that is not observed, which is not
        compared; 1 for all before anything is observed.

    Raises:
        TypeError: If an option is not a number.
        ValueError: If an option is out of its range.

    Example:
        >>> import torch
        >>> from gradbalance import attach
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW([*text.parameters(), *audio.parameters()])
        >>> rule = Epochwise(lead=0.2, factor=0.5)
        >>> penalty = attach(optimizer, {"text": text, "audio": audio}, rule, smoothing=0)
        >>> accuracy, without_text, without_audio = 0.9, 0.3, 0.8
        >>> penalty.observe(text=without_text / accuracy, audio=without_audio / accuracy)
        >>> (text(torch.ones(1, 4)) + audio(torch.ones(1, 4))).sum().backward()
        >>> optimizer.step()
        >>> penalty.coefficients()
        {'text': 0.5, 'audio': 1.0}

    Reference:
        Guerra-Manzanares and Shamout, MILES: Modality-Informed Learning Rate Scheduler for
        Balancing Multimodal Learning, arXiv 2510.17394. Written from its description. [R]: for more
        than two branches each is compared with the least used one.
    """

    lead: float = 0.2
    factor: float = 0.5

    needs_coherence: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("lead", self.lead)
        if not 0 <= self.lead < math.inf:
            raise ValueError(
                f"`lead` must be finite and >= 0. Got {self.lead}. "
                "It is a difference of utilizations, 0.2 say."
            )
        check_number("factor", self.factor)
        if not 0 <= self.factor <= 1:
            raise ValueError(
                f"`factor` must be in [0, 1]. Got {self.factor}. Take 0.5 to halve the step."
            )

    def __call__(self, measured: Measured) -> Vector:
        """The coefficients, shape ``[N]``."""
        errors = measured.errors
        coefficients = np.ones(len(measured.names))
        if errors is None:
            return coefficients
        # A branch without a gradient at this step has still been used in the epoch before.
        observed = ~np.isnan(errors)
        least_used = np.max(errors, where=observed, initial=0)
        coefficients[observed & (least_used - errors > self.lead)] = self.factor
        return coefficients


@dataclass(frozen=True)
class ClipGroups:
    r"""Clips each group by itself: no gradient of a group is longer than ``most``.

    .. math::
        c_m = \min\Bigl(1, \frac{\text{most}}{n_m}\Bigr)

    - :math:`n_m` is the gradient norm of the group at this step.
    - With ``apply_to="gradient"`` it is ``clip_grad_norm_`` for each group, right under sharding.
      With ``apply_to="update"`` the step of a group is scaled by what clipping would have done to
      its gradient.

    It helps where the gradient of one branch has outliers. It harms where the branch with the long
    gradients learns from them. With the best of three limits on validation data, and on the
    gradient, it changes the score by +4.7 ± 0.7 for speech beside noise, +1.3 ± 0.5 for an image
    beside a sensor of noise, +0.6 ± 0.2 for real audio and video beside noise and −0.0 ± 0.0 for a
    noisy image over faint speech. Under Adam a limit that always acts alike is a constant factor
    and cancels. It depends on the scale of the loss, which no other rule here does.

    Args:
        most: Largest gradient norm of a group, > 0, in units of the gradient.

    Shape:
        Coefficients ``[N]``, in (0, 1]. 1 for a group without a gradient.

    Raises:
        TypeError: If ``most`` is not a number.
        ValueError: If ``most`` is out of its range.

    Example:
        >>> import torch
        >>> from gradbalance import attach
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> sgd = torch.optim.SGD([*text.parameters(), *audio.parameters()], lr=0.1)
        >>> groups = {"text": text, "audio": audio}
        >>> penalty = attach(sgd, groups, rule=ClipGroups(most=3.0), apply_to="gradient")
        >>> (3 * text(torch.ones(1, 4)) + audio(torch.ones(1, 4))).sum().backward()
        >>> sgd.step()
        >>> {name: round(c, 3) for name, c in penalty.coefficients().items()}
        {'text': 0.447, 'audio': 1.0}

    Reference:
        Pascanu et al., On the difficulty of training recurrent neural networks, ICML 2013, applied
        to each group.
    """

    most: float

    needs_coherence: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive("most", self.most, "It is a gradient norm, 1.0 say.")

    def __call__(self, measured: Measured) -> Vector:
        """The coefficients, shape ``[N]``."""
        # Exactly 1 where the norm is below the limit, 0 included.
        coefficients: Vector = self.most / np.maximum(measured.norms, self.most)
        return coefficients


def _check_positive(name: str, value: float, what_to_do: str) -> None:
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be finite and > 0. Got {value}. {what_to_do}")
