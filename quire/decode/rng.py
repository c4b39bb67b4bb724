"""Random numbers without state: a function of (seed, counter).

Sampling must not depend on what else is in the batch, so every draw is a hash of the sequence's
seed and its position. The mixer is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def splitmix64(state: ArrayLike) -> NDArray[np.uint64]:
    """The SplitMix64 output for each 64-bit ``state`` (before its increment)."""
    with np.errstate(over="ignore"):
        z = np.asarray(state, dtype=np.uint64) + np.uint64(_GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def uniform(seeds: ArrayLike, counters: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for each pair of a seed and a counter."""
    with np.errstate(over="ignore"):
        mixed = splitmix64(np.asarray(seeds, dtype=np.uint64))
        step = np.asarray(counters, dtype=np.uint64) * np.uint64(_GAMMA)
        bits = splitmix64(mixed + step) >> np.uint64(11)
        return np.asarray(bits * 2.0**-53, dtype=np.float64)


def row_seed(seed: int, index: int) -> int:
    """The 56-bit seed of row ``index`` (from 0) of a job with ``seed``, wherever the row runs."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=7)
    return int.from_bytes(digest.digest(), "big")


def derive_seed(base: int, sample: int) -> int:
    """A 64-bit seed for one sample of a request with seed ``base`` (any integer)."""
    first = int(splitmix64(base & _MASK))
    return int(splitmix64((first + sample) & _MASK))
