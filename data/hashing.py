"""One mixing function for all random choices that depend on numbers alone: the split of a corpus, the order of windows."""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: the step of splitmix64


def mix64(x: np.ndarray) -> np.ndarray:
    """For each 64-bit number another one that looks random: the output of splitmix64 (Steele et al. 2014) in state x.

    (…) uint64 → (…) uint64. A permutation of the 64-bit numbers: two that differ never become equal.
    """
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
