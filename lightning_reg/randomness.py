"""Random numbers that are the same on every rank and after a resume: they depend on a key alone."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch

__all__ = ["check_seed", "generator_for", "hashed"]


def generator_for(device: torch.device | str, *key: object) -> torch.Generator:
    """Return a generator whose numbers depend on a key alone; the global one is left as it is.

    The key is hashed, since torch's generator for the CPU keeps only 32 bits of a seed.

    Example:
        >>> one, same, other = (torch.rand(1, generator=generator_for("cpu", "name", step)) for step in (7, 7, 8))
        >>> (one == same).item(), (one == other).item()
        (True, False)
    """
    return torch.Generator(device).manual_seed(hashed(*key))


def hashed(*key: object) -> int:
    """Return 32 bits that depend on a key alone.

    Example:
        >>> hashed("name", 7) == hashed("name", 7), hashed("name", 7) == hashed("name", 8)
        (True, False)
    """
    return int.from_bytes(blake2b("/".join(map(str, key)).encode(), digest_size=4).digest(), "big")


def check_seed(what: str, seed: Any) -> int:
    """Return a seed, or raise an error that says what was expected.

    Raises:
        ValueError: If it is no whole number in [0, 2^31).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ValueError(f"{what} must be a whole number in [0, 2^31), got {seed!r}")
    return seed
