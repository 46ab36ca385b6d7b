"""A safeguarded line search that every row runs on its own, one trial a round, told in numbers of shape ``(L,)``.

Along ``φ(t) = L(b + t d; a)`` a trial is accepted where it descends enough and the slope has flattened (strong Wolfe),
or where ``φ`` is within its rounding of ``φ(0)`` and the slopes alone say so (approximate Wolfe): near a minimum the
gradient is known far more precisely than the value, and a test on values alone stalls there.

Source: Nocedal & Wright (2006), section 3.5; Hager & Zhang (2005), section 4, for the approximate conditions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DECREASE, FLATTENING = 1e-4, 0.9
"""c₁ and c₂ of the Wolfe conditions, the usual ones for quasi-Newton directions."""
TRIALS = 25
"""Trials after which a direction is given up."""


class Search(NamedTuple):
    """A line search under way: the trial step, and the bracket known to hold an acceptable one."""

    t: Tensor
    lo: Tensor
    hi: Tensor
    value_lo: Tensor
    slope_lo: Tensor
    value_hi: Tensor
    slope_hi: Tensor
    trials: Tensor


def start(t: Tensor, value: Tensor, slope: Tensor) -> Search:
    """A search from ``φ(0)`` and ``φ'(0)`` whose first trial is ``t``."""
    zero, unknown = torch.zeros_like(t), torch.full_like(t, torch.inf)
    return Search(t, zero, unknown, value, slope, unknown, unknown, torch.zeros_like(t, dtype=torch.int32))


def step(
    search: Search, value: Tensor, slope: Tensor, value0: Tensor, slope0: Tensor, noise: float
) -> tuple[Tensor, Search]:
    """What ``φ(t)`` and ``φ'(t)`` say: whether the trial is accepted, and the search with its next trial.

    Args:
        search: the searches under way.
        value: φ(t); NaN or infinite counts as too far.
        slope: φ'(t).
        value0: φ(0).
        slope0: φ'(0), negative.
        noise: relative rounding of the values.
    """
    t, lo, hi, value_lo, slope_lo, value_hi, slope_hi, trials = search
    finite = value.isfinite() & slope.isfinite()
    close = value <= value0 + noise * value0.abs()
    descends = value <= value0 + DECREASE * t * slope0
    flat = slope.abs() <= -FLATTENING * slope0
    nearly = close & (slope >= FLATTENING * slope0) & (slope <= (2 * DECREASE - 1) * slope0)
    accepted = finite & ((descends & flat) | nearly)

    far = ~finite | (slope >= 0) | (~descends & ~close)
    value = torch.where(finite, value, torch.inf)
    lo, value_lo, slope_lo = (torch.where(far, p, q) for p, q in ((lo, t), (value_lo, value), (slope_lo, slope)))
    hi, value_hi, slope_hi = (torch.where(far, p, q) for p, q in ((t, hi), (value, value_hi), (slope, slope_hi)))
    inside = _between(lo, value_lo, slope_lo, hi, value_hi, slope_hi)
    # The secant of the slopes, kept to a growth between 2 and 10; with no bracket, lo is the trial just made.
    old_t, old_slope = search.lo, search.slope_lo
    secant = t - slope * (t - old_t) / (slope - old_slope)
    beyond = torch.where(secant > t, secant, torch.inf).clamp(2 * t, 10 * t)
    return accepted, Search(
        torch.where(hi.isfinite(), inside, beyond), lo, hi, value_lo, slope_lo, value_hi, slope_hi, trials + 1
    )


def _between(lo: Tensor, value_lo: Tensor, slope_lo: Tensor, hi: Tensor, value_hi: Tensor, slope_hi: Tensor) -> Tensor:
    """The minimizer of the cubic through both ends, a tenth away from them; near ``lo`` if ``hi`` was not finite."""
    width = hi - lo
    d1 = slope_lo + slope_hi - 3 * (value_hi - value_lo) / width
    d2 = (d1 * d1 - slope_lo * slope_hi).clamp(min=0).sqrt()
    share = (1 - (slope_hi + d2 - d1) / (slope_hi - slope_lo + 2 * d2)).clamp(0.1, 0.9)
    share = torch.where(share.isfinite(), share, 0.5)
    return lo + width * torch.where(value_hi.isfinite(), share, 0.1)
