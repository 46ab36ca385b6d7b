"""24 problems of Moré, Garbow & Hillstrom, Testing unconstrained optimization software (1981), batched over rows.

Each is a sum of squares ``L(b) = Σ r_i(b)²``; a row of ``residuals`` is one problem. ``minima`` are known local ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

D = torch.float64


class Least(NamedTuple):
    """One problem of the set: it has ``objective`` and ``residuals``, and takes any context."""

    name: str
    start: list[float]
    minima: list[float]
    r: Callable[[Tensor], Tensor]

    def residuals(self, b: Tensor, a: Tensor) -> Tensor:
        return self.r(b)

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return (self.r(b) ** 2).sum(1)

    def starts(self, size: int) -> Tensor:
        """The standard start, and others that differ by a tenth."""
        g = torch.Generator().manual_seed(3)
        b = torch.tensor(self.start, dtype=D).repeat(size, 1)
        b[1:] += 0.1 * torch.randn(size - 1, len(self.start), generator=g, dtype=D) * (b[1:].abs() + 0.1)
        return b


def stack(*r: Tensor) -> Tensor:
    return torch.stack(r, 1)


def grid(first: float, last: float, step: float = 1.0) -> Tensor:
    return torch.arange(round((last - first) / step) + 1, dtype=D) * step + first


def rosenbrock(b: Tensor) -> Tensor:
    return torch.cat([10 * (b[:, 1::2] - b[:, 0::2] ** 2), 1 - b[:, 0::2]], 1)


def freudenstein_roth(b: Tensor) -> Tensor:
    x, y = b.unbind(1)
    return stack(-13 + x + ((5 - y) * y - 2) * y, -29 + x + ((y + 1) * y - 14) * y)


def powell_badly_scaled(b: Tensor) -> Tensor:
    x, y = b.unbind(1)
    return stack(1e4 * x * y - 1, (-x).exp() + (-y).exp() - 1.0001)


def brown_badly_scaled(b: Tensor) -> Tensor:
    x, y = b.unbind(1)
    return stack(x - 1e6, y - 2e-6, x * y - 2)


def beale(b: Tensor) -> Tensor:
    x, y = b.unbind(1)
    return stack(*(c - x * (1 - y**i) for i, c in enumerate((1.5, 2.25, 2.625), 1)))


def jennrich_sampson(b: Tensor) -> Tensor:
    i = grid(1, 10)
    return 2 + 2 * i - (i * b[:, :1]).exp() - (i * b[:, 1:]).exp()


def helical_valley(b: Tensor) -> Tensor:
    x, y, z = b.unbind(1)
    turns = torch.atan2(y, x) / (2 * math.pi)
    return stack(10 * (z - 10 * turns), 10 * ((x**2 + y**2).sqrt() - 1), z)


def bard(b: Tensor) -> Tensor:
    seen = [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39]
    u, (x, y, z) = grid(1, 15), b.split(1, 1)
    return torch.tensor(seen, dtype=D) - x - u / ((16 - u) * y + torch.minimum(u, 16 - u) * z)


def gaussian(b: Tensor) -> Tensor:
    half = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521]
    t, (x, y, z) = (8 - grid(1, 15)) / 2, b.split(1, 1)
    return x * (-y * (t - z) ** 2 / 2).exp() - torch.tensor([*half, 0.3989, *half[::-1]], dtype=D)


def box(b: Tensor) -> Tensor:
    t, (x, y, z) = grid(1, 10) / 10, b.split(1, 1)
    return (-t * x).exp() - (-t * y).exp() - z * ((-t).exp() - (-10 * t).exp())


def powell_singular(b: Tensor) -> Tensor:
    p, q, s, t = (b[:, i::4] for i in range(4))
    return torch.cat([p + 10 * q, 5**0.5 * (s - t), (q - 2 * s) ** 2, 10**0.5 * (p - t) ** 2], 1)


def wood(b: Tensor) -> Tensor:
    p, q, s, t = b.unbind(1)
    ten, ninety = 10**0.5, 90**0.5
    return stack(10 * (q - p**2), 1 - p, ninety * (t - s**2), 1 - s, ten * (q + t - 2), (q - t) / ten)


def kowalik_osborne(b: Tensor) -> Tensor:
    seen = [0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246]
    u = torch.tensor([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625], dtype=D)
    p, q, s, t = b.split(1, 1)
    return torch.tensor(seen, dtype=D) - p * (u**2 + u * q) / (u**2 + u * s + t)


def brown_dennis(b: Tensor) -> Tensor:
    t, (p, q, s, u) = grid(1, 20) / 5, b.split(1, 1)
    return (p + t * q - t.exp()) ** 2 + (s + u * t.sin() - t.cos()) ** 2


def biggs(b: Tensor) -> Tensor:
    t, x = grid(1, 13) / 10, b.split(1, 1)
    seen = (-t).exp() - 5 * (-10 * t).exp() + 3 * (-4 * t).exp()
    return x[2] * (-t * x[0]).exp() - x[3] * (-t * x[1]).exp() + x[5] * (-t * x[4]).exp() - seen


def watson(b: Tensor) -> Tensor:
    t, j = grid(1, 29)[:, None] / 29, torch.arange(b.shape[1], dtype=D)
    powers, slopes = t**j, j * t ** (j - 1).clamp(min=0)
    rest = stack(b[:, 0], b[:, 1] - b[:, 0] ** 2 - 1)
    return torch.cat([b @ slopes.T - (b @ powers.T) ** 2 - 1, rest], 1)


def penalty(b: Tensor) -> Tensor:
    return torch.cat([1e-5**0.5 * (b - 1), (b * b).sum(1, keepdim=True) - 0.25], 1)


def variably_dimensioned(b: Tensor) -> Tensor:
    total = (grid(1, b.shape[1]) * (b - 1)).sum(1, keepdim=True)
    return torch.cat([b - 1, total, total**2], 1)


def trigonometric(b: Tensor) -> Tensor:
    n = b.shape[1]
    return n - b.cos().sum(1, keepdim=True) + grid(1, n) * (1 - b.cos()) - b.sin()


def brown_almost_linear(b: Tensor) -> Tensor:
    return torch.cat([b[:, :-1] + b.sum(1, keepdim=True) - b.shape[1] - 1, b.prod(1, keepdim=True) - 1], 1)


def neighbours(b: Tensor) -> tuple[Tensor, Tensor]:
    edge = torch.zeros_like(b[:, :1])
    return torch.cat([edge, b[:, :-1]], 1), torch.cat([b[:, 1:], edge], 1)


def boundary_value(b: Tensor) -> Tensor:
    (before, after), h = neighbours(b), 1 / (b.shape[1] + 1)
    return 2 * b - before - after + h**2 * (b + h * grid(1, b.shape[1]) + 1) ** 3 / 2


def broyden_tridiagonal(b: Tensor) -> Tensor:
    before, after = neighbours(b)
    return (3 - 2 * b) * b - before - 2 * after + 1


EVERY = [
    Least("rosenbrock", [-1.2, 1], [0], rosenbrock),
    Least("freudenstein-roth", [0.5, -2], [0, 48.98425367924], freudenstein_roth),
    Least("powell badly scaled", [0, 1], [0], powell_badly_scaled),
    Least("brown badly scaled", [1, 1], [0], brown_badly_scaled),
    Least("beale", [1, 1], [0], beale),
    Least("jennrich-sampson", [0.3, 0.4], [124.36218235561], jennrich_sampson),
    Least("helical valley", [-1, 0, 0], [0], helical_valley),
    Least("bard", [1, 1, 1], [8.2148773065790e-3, 17.4286], bard),
    Least("gaussian", [0.4, 1, 0], [1.1279327696e-8], gaussian),
    Least("box", [0, 10, 20], [0], box),
    Least("powell singular", [3, -1, 0, 1], [0], powell_singular),
    Least("wood", [-3, -1, -3, -1], [0], wood),
    Least("kowalik-osborne", [0.25, 0.39, 0.415, 0.39], [3.0750560385e-4, 1.02734e-3], kowalik_osborne),
    Least("brown-dennis", [25, 5, -5, -1], [85822.20162635], brown_dennis),
    Least("biggs exp6", [1, 2, 1, 1, 1, 1], [0, 5.65565e-3], biggs),
    Least("watson", [0] * 6, [2.28767005355e-3], watson),
    Least("extended rosenbrock", [-1.2, 1] * 10, [0], rosenbrock),
    Least("extended powell", [3, -1, 0, 1] * 5, [0], powell_singular),
    Least("penalty", [float(i) for i in range(1, 11)], [7.08765e-5], penalty),
    Least("variably dimensioned", [1 - i / 10 for i in range(1, 11)], [0], variably_dimensioned),
    Least("trigonometric", [0.1] * 10, [0, 2.79506e-5], trigonometric),
    Least("brown almost linear", [0.5] * 10, [0, 1], brown_almost_linear),
    Least("boundary value", [i / 11 * (i / 11 - 1) for i in range(1, 11)], [0], boundary_value),
    Least("broyden tridiagonal", [-1] * 10, [0], broyden_tridiagonal),
]
