"""Whether the gradients are those of the last step, which must not be acted on twice."""

from itertools import chain
from weakref import ref

from torch import Tensor

from gradbalance._gradients.layout import Layout, local


class Fingerprint:
    """Knows the gradients of a step again, by one tensor of each group and bucket and its version.

    Args:
        layout: Of the parameters.
        norms: Of the gradients as they are now, for the engine to compare; or None.
    """

    def __init__(self, layout: Layout, norms: Tensor | None = None) -> None:
        self.norms = norms
        self._marks: list[tuple[Tensor, ref[Tensor], int]] = []
        for row in chain.from_iterable(bucket.parameters for bucket in layout.buckets):
            for p in row:
                if (gradient := p.grad) is not None:
                    self._marks.append((p, ref(gradient), _version(gradient)))
                    break

    def matches(self) -> bool:
        """Whether the gradients are the same tensors, and no operation of torch wrote to them since.

        What writes past torch's counter (``.data``, numpy, the replay of a CUDA graph) is not seen: the norms tell.
        """
        return bool(self._marks) and all(
            p.grad is not None and p.grad is known() and _version(p.grad) == version
            for p, known, version in self._marks
        )


def _version(gradient: Tensor) -> int:
    gradient = local(gradient)
    return -1 if gradient.is_inference() else gradient._version  # inference tensors have no counter
