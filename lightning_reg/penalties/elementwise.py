"""The base class of penalties whose gradient can be computed entry by entry."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, TypeGuard

from lightning_reg.penalties.base import Penalty

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class ElementwisePenalty(Penalty):
    """Base class of penalties whose gradient can be computed for any part of the weights, entry by entry.

    The gradient may depend on a constant for each entry, such as its starting point.
    """

    @abstractmethod
    def entry_gradients(self, weights: Tensor, out: Tensor, *constants: Tensor) -> Tensor:
        """Return ∇R(θ), without the strength, for entries of a tensor.

        Args:
            weights: The entries, not to be changed.
            out: A tensor of the same shape, in which the result may be written.
            constants: The constants of the entries, if the penalty has any.
        """

    def entry_constants(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return a tensor of constants for each parameter, of the shape of this rank's part, or an empty list."""
        return []

    @classmethod
    def is_sum_over_tensors(cls) -> bool:
        """Return whether ``entry_gradients`` belongs to the formula. A subclass may have overridden the formula."""
        return "entry_gradients" in vars(cls.formula_class())


def is_elementwise(penalty: Penalty) -> TypeGuard[ElementwisePenalty]:
    """Return whether the gradient of a penalty can be computed entry by entry."""
    return isinstance(penalty, ElementwisePenalty) and penalty.is_sum_over_tensors()
