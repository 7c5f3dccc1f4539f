"""Schedules as functions of the iteration; the hook around them is a thin shell."""

from __future__ import annotations

from slope_mm.errors import ConfigError


def point_in_training(value: float | int | None, max_iters: int, what: str) -> int | None:
    """An iteration given as a number of iterations (int) or a share of training (float).

    Args:
        value: Iterations, or a share between 0 and 1, or None.
        max_iters: Length of training.
        what: How an error calls it.

    Raises:
        ConfigError: If it is neither. A number of iterations beyond the end is never reached.
    """
    if value is None:
        return None
    if isinstance(value, float) and 0 <= value <= 1:
        return round(value * max_iters)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ConfigError(
        f'{what}={value!r} is no point in training; give a number of iterations (int) or a share of'
        ' the training between 0.0 and 1.0 (float)'
    )


def warmup_factor(iteration: int, *, length: int) -> float:
    """``min(1, (iteration + 1) / length)``: lambda rises linearly over ``length`` iterations."""
    return 1.0 if length <= 0 else min(1.0, (iteration + 1) / length)


def decay_factor(iteration: int, *, begin: int | None, length: int) -> float:
    """``(length - iteration) / (length - begin)`` from ``begin`` on, 1 before: 0 at the end."""
    if begin is None or iteration < begin:
        return 1.0
    return max(0.0, (length - iteration) / max(length - begin, 1))


def ramped_kept(iteration: int, *, length: int, n: int, m: int) -> int:
    """Kept weights a group while an ``n:m`` pattern is approached from dense.

    ``m - floor((m - n) * iteration / length)``, so that ``n`` is reached at ``length`` exactly and
    never undershot.
    """
    if length <= 0 or iteration >= length:
        return n
    return m - (m - n) * iteration // length


def ramped_density(iteration: int, *, length: int, density: float) -> float:
    """Density while an unstructured pattern is approached from dense, linearly."""
    if length <= 0 or iteration >= length:
        return density
    return 1 - (1 - density) * iteration / length
