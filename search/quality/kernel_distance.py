"""Kernel distance between two sets of features, as in the kernel inception distance (Binkowski et al. 2018, section 4).

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
    k(a, b) = (a.b / d + 1)^3

For *independent* sets the estimate is unbiased for any number of pictures, so it can be negative. The pictures of a
quantized model and of its reference share prompts and seeds. For such pairs, k(x_i, y_i) is left out of the last mean
(Gretton et al. 2012, equation 4). Otherwise two equal sets would have a negative distance, far from what is measured.
"""

from __future__ import annotations

import numpy as np
from cleanfid import fid

from bitpolicy.search.quality.frechet import Features

_SUBSETS, _SUBSET = 100, 1000  # clean-fid's defaults


def kernel_distance(x: Features, y: Features) -> float:
    """clean-fid's MMD^2 of two independent sets, averaged over random subsets if the sets are large or unequal in size.

    Args:
        x, y: shapes (n, d) and (m, d), n and m at least 2.
    """
    _require_two(x, y)
    whole = len(x) == len(y) <= _SUBSET  # then every subset would be the whole set
    before = np.random.get_state()  # clean-fid draws from NumPy's global stream
    np.random.seed(0)
    try:
        return float(fid.kernel_distance(x.astype(np.float64), y.astype(np.float64), 1 if whole else _SUBSETS, _SUBSET))
    finally:
        np.random.set_state(before)


def paired_kernel_distance(x: Features, y: Features) -> float:
    """MMD^2 of two sets whose i-th pictures form pairs; 0 for equal sets.

    Args:
        x, y: shape (n, d), n at least 2.
    """
    _require_two(x, y)
    x, y = x.astype(np.float64), y.astype(np.float64)
    return _mean_of_others(x, x) + _mean_of_others(y, y) - 2 * _mean_of_others(x, y)


def _mean_of_others(x: Features, y: Features) -> float:
    """Mean of k(x_i, y_j) over i != j, a thousand rows at a time."""
    n, d = x.shape
    rows = (((x[i : i + _SUBSET] @ y.T) / d + 1) ** 3 for i in range(0, n, _SUBSET))
    own = ((x * y).sum(1) / d + 1) ** 3
    return float((sum(part.sum() for part in rows) - own.sum()) / (n * (n - 1)))


def _require_two(x: Features, y: Features) -> None:
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a kernel distance needs two pictures in each set, found {len(x)} and {len(y)}")
