"""What becomes of models that learn from models, where it can be computed: linear regression and Gaussians.

Regression: X (T, d), w_1 fitted to y = X w + sigma e; then, on the same X, y_(i+1) = X w_i + sigma e_(i+1). Error E_n = E |w_n - w|^2:

    replace       fit y_n alone              n sigma^2 tr (X'X)^-1
    accumulate    fit y_1 ... y_n            sigma^2 tr (X'X)^-1 (1 + 1/4 + ... + 1/n^2)   <=  pi^2 / 6 of the first

Gaussians: mean and (biased) covariance are fitted to N points of the last fit. Per generation under replace

    E log det changes by  sum_(j=1..d) psi((N - j) / 2) + d log(2 / N)          E trace by the factor  (N - 1) / N

"Is Model Collapse Inevitable? Breaking the Curse of Recursion by Accumulating Real and Synthetic Data".
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cairn.errors import InputError

Array = NDArray[np.float64]
Keeping = Literal["replace", "accumulate"]


def regression_error(design: Array, sigma: float, generation: int, keeping: Keeping, test: Array | None = None) -> float:
    """E_n in closed form for design (T, d) of full rank; test (d, d): covariance of the inputs on which the error counts, default the identity."""
    inverse = np.linalg.inv(design.T @ design)
    trace = float(np.trace(inverse if test is None else test @ inverse))
    return sigma**2 * trace * factor(generation, keeping)


def factor(generation: int, keeping: Keeping) -> float:
    """The error of a generation as a multiple of the first one's."""
    if generation < 1:
        raise InputError(f"Generations are counted from 1, not {generation}.")
    return float(generation) if keeping == "replace" else sum(1 / i**2 for i in range(1, generation + 1))


def expected_trace(rows: int, columns: int) -> float:
    """E tr (X'X)^-1 for a standard Gaussian X (rows, columns); needs rows >= columns + 2."""
    if rows < columns + 2:
        raise InputError(f"The mean trace of {rows} rows and {columns} columns is infinite; take at least {columns + 2} rows.")
    return columns / (rows - columns - 1)


def regression_chain(design: Array, truth: Array, sigma: float, generations: int, keeping: Keeping, repetitions: int, random: np.random.Generator) -> Array:
    """Simulate: squared errors |w_n - w|^2 of every generation, shape (generations, repetitions). All labels of a generation are new."""
    solve = np.linalg.pinv(design)
    known = np.repeat(truth[:, None], repetitions, axis=1)
    sums, errors = np.zeros((len(design), repetitions)), []
    for generation in range(1, generations + 1):
        labels = design @ known + sigma * random.standard_normal((len(design), repetitions))
        sums = labels if keeping == "replace" else sums + labels
        # All blocks have the same inputs: least squares over them is least squares on the mean of their labels.
        known = solve @ (sums if keeping == "replace" else sums / generation)
        errors.append(((known - truth[:, None]) ** 2).sum(0))
    return np.array(errors)


def log_determinant_drift(points: int, dimensions: int) -> float:
    """Change of E log det of the covariance in one generation of replacement, for fits to `points` points."""
    from scipy.special import digamma

    return float(sum(digamma((points - j) / 2) for j in range(1, dimensions + 1)) + dimensions * math.log(2 / points))


def gaussian_chain(dimensions: int, points: int, generations: int, keeping: Keeping, repetitions: int, random: np.random.Generator) -> tuple[Array, Array]:
    """Simulate from a standard Gaussian: log det and trace of every generation's fitted covariance, each (generations, repetitions)."""
    logs, traces = np.empty((generations, repetitions)), np.empty((generations, repetitions))
    for repetition in range(repetitions):
        mean, root = np.zeros(dimensions), np.eye(dimensions)
        pool = np.empty((0, dimensions))
        for generation in range(generations):
            drawn = mean + random.standard_normal((points, dimensions)) @ root.T
            pool = drawn if keeping == "replace" else np.concatenate([pool, drawn])
            mean = pool.mean(0)
            covariance = (pool - mean).T @ (pool - mean) / len(pool)
            root = np.linalg.cholesky(covariance)
            logs[generation, repetition] = 2 * np.log(np.diag(root)).sum()
            traces[generation, repetition] = np.trace(covariance)
    return logs, traces
