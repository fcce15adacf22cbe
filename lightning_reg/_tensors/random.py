"""Random numbers that depend only on a key, so that they are equal on every rank and after a resume."""

from __future__ import annotations

from hashlib import blake2b

import torch


def generator_for(device: torch.device | str, *key: object) -> torch.Generator:
    """Return a generator whose numbers depend only on a key. The global generator is not touched.

    The key is hashed, because torch's CPU generator keeps only 32 bits of a seed.

    Example:
        >>> one, same, other = (torch.rand(1, generator=generator_for("cpu", "name", step)) for step in (7, 7, 8))
        >>> (one == same).item(), (one == other).item()
        (True, False)
    """
    return torch.Generator(device).manual_seed(hashed(*key))


def hashed(*key: object) -> int:
    """Return an integer of 32 bits that depends only on a key.

    Example:
        >>> hashed("name", 7) == hashed("name", 7), hashed("name", 7) == hashed("name", 8)
        (True, False)
    """
    return int.from_bytes(blake2b("/".join(map(str, key)).encode(), digest_size=4).digest(), "big")
