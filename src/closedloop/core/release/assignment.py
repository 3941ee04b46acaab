"""Which variant answers a customer: a salted hash, so that a customer stays with it and a new release deals anew."""

from __future__ import annotations

import hashlib


def hash_share(salt: str, key: str) -> float:
    """A number in [0, 1) that follows from salt and key alone, spread evenly over keys.

    Examples
    --------
    >>> hash_share("r1", "C1") == hash_share("r1", "C1") != hash_share("r2", "C1")
    True
    """
    digest = hashlib.blake2b(key.encode(), key=salt.encode()[:64], digest_size=8).digest()
    return int.from_bytes(digest) / 2.0**64


def is_canary(salt: str, key: str, weight: float) -> bool:
    """Whether the challenger answers this customer; a larger ``weight`` keeps all that a smaller one had.

    Parameters
    ----------
    salt
        Of the release.
    key
        The customer's id, or the request's where no customer is named.
    weight
        The share that the challenger answers, from 0 to 1.

    Examples
    --------
    >>> sum(is_canary("r1", f"C{n}", 0.1) for n in range(10_000))
    980
    """
    return weight > 0 and hash_share(salt, key) < weight
