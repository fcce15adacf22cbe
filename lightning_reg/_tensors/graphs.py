"""The graph that autograd has recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def leaves(tensor: Tensor) -> set[int]:
    """Return the identities of the parameters that a tensor depends on.

    Example:
        >>> import torch
        >>> one, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> leaves((one * 2).sum()) == {id(one)}
        True
    """
    found: set[int] = set()
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        waiting.extend(earlier for earlier, _ in node.next_functions)
    return found
