"""Frechet distance between two sets of features, as in the Frechet inception distance (Heusel et al. 2017, section 2).

    d^2 = |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))

m and S are mean and covariance. Unlike clean-fid, which calls `scipy.linalg.sqrtm`, this code never takes the root of a
product: the product is singular whenever there are fewer pictures than features, and SciPy 1.18 removed the call's
`disp=False`. With S_x = A^T A and S_y = B^T B, the eigenvalues of S_x S_y are the squared singular values of A B^T, so

    tr (S_x S_y)^(1/2) = sum of the singular values of A B^T,

where A is the triangular factor of the QR decomposition of the centred features. A is at most d x d and has at most one
row per picture, and no rounding error is ever under a square root.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Features = NDArray[Any]


def frechet_distance(x: Features, y: Features) -> float:
    """d^2 between two sets of features.

    Args:
        x, y: shapes (n, d) and (m, d), n and m at least 2. With fewer than about 10 d pictures, the distance between
            *independent* sets is biased upwards; compare only values with the same n and m.

    Returns:
        0 for equal sets; never negative.

    Raises:
        ValueError: a set has fewer than two rows.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a covariance needs two pictures, found {len(x)} and {len(y)}")
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = _root_of_covariance(x), _root_of_covariance(y)
    both = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    apart = np.square(x.mean(0) - y.mean(0)).sum()
    return max(0.0, float(apart + np.square(a).sum() + np.square(b).sum() - 2 * both))


def _root_of_covariance(x: Features) -> Features:
    """A with A^T A the covariance of the rows of x, shape (min(n, d), d)."""
    return np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1)).R
