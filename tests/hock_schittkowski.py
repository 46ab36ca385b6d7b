"""Problems of Hock & Schittkowski (1981), *Test examples for nonlinear programming codes*, written for rows.

Each: objective, equalities (zero), inequalities (at most zero), standard start, minimum.
"""

from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Nonlinear(NamedTuple):
    """A problem, for any solver: the context has no say."""

    f: Any
    c: Any
    d: Any
    start: tuple[float, ...]
    minimum: float

    def objective(self, b, a):
        return self.f(*b.unbind(1))

    def equality(self, b, a) -> Tensor:
        return torch.stack(self.c(*b.unbind(1)), 1) if self.c else b.new_zeros(len(b), 0)

    def inequality(self, b, a) -> Tensor:
        return torch.stack(self.d(*b.unbind(1)), 1) if self.d else b.new_zeros(len(b), 0)


def box(low, high):
    return lambda *x: [low - v for v in x] + [v - high for v in x]


def _100(x1, x2, x3, x4, x5, x6, x7):
    quartic = (x1 - 10) ** 2 + 5 * (x2 - 12) ** 2 + x3**4 + 3 * (x4 - 11) ** 2 + 10 * x5**6
    return quartic + 7 * x6**2 + x7**4 - 4 * x6 * x7 - 10 * x6 - 8 * x7


def _78(x1, x2, x3, x4, x5):
    return [x1**2 + x2**2 + x3**2 + x4**2 + x5**2 - 10, x2 * x3 - 5 * x4 * x5, x1**3 + x2**3 + 1]


PROBLEMS = {
    6: Nonlinear(lambda x, y: (1 - x) ** 2, lambda x, y: [10 * (y - x**2)], None, (-1.2, 1), 0),
    7: Nonlinear(lambda x, y: (1 + x**2).log() - y, lambda x, y: [(1 + x**2) ** 2 + y**2 - 4], None, (2, 2), -sqrt(3)),
    10: Nonlinear(lambda x, y: x - y, None, lambda x, y: [3 * x**2 - 2 * x * y + y**2 - 1], (-10, 10), -1),
    11: Nonlinear(lambda x, y: (x - 5) ** 2 + y**2 - 25, None, lambda x, y: [x**2 - y], (4.9, 0.1), -8.498464223),
    12: Nonlinear(
        lambda x, y: x**2 / 2 + y**2 - x * y - 7 * x - 7 * y, None, lambda x, y: [4 * x**2 + y**2 - 25], (0, 0), -30
    ),
    14: Nonlinear(
        lambda x, y: (x - 2) ** 2 + (y - 1) ** 2,
        lambda x, y: [x - 2 * y + 1],
        lambda x, y: [x**2 / 4 + y**2 - 1],
        (2, 2),
        9 - 2.875 * sqrt(7),
    ),
    15: Nonlinear(
        lambda x, y: 100 * (y - x**2) ** 2 + (1 - x) ** 2,
        None,
        lambda x, y: [1 - x * y, -x - y**2, x - 0.5],
        (-2, 1),
        306.5,
    ),
    26: Nonlinear(
        lambda x, y, z: (x - y) ** 2 + (y - z) ** 4, lambda x, y, z: [(1 + y**2) * x + z**4 - 3], None, (-2.6, 2, 2), 0
    ),
    27: Nonlinear(
        lambda x, y, z: 0.01 * (x - 1) ** 2 + (y - x**2) ** 2, lambda x, y, z: [x + z**2 + 1], None, (2, 2, 2), 0.04
    ),
    35: Nonlinear(
        lambda x, y, z: 9 - 8 * x - 6 * y - 4 * z + 2 * x**2 + 2 * y**2 + z**2 + 2 * x * y + 2 * x * z,
        None,
        lambda x, y, z: [x + y + 2 * z - 3, -x, -y, -z],
        (0.5, 0.5, 0.5),
        1 / 9,
    ),
    39: Nonlinear(lambda a, b, c, d: -a, lambda a, b, c, d: [b - a**3 - c**2, a**2 - b - d**2], None, (2, 2, 2, 2), -1),
    40: Nonlinear(
        lambda a, b, c, d: -a * b * c * d,
        lambda a, b, c, d: [a**3 + b**2 - 1, a**2 * d - c, d**2 - b],
        None,
        (0.8, 0.8, 0.8, 0.8),
        -0.25,
    ),
    43: Nonlinear(
        lambda a, b, c, d: a**2 + b**2 + 2 * c**2 + d**2 - 5 * a - 5 * b - 21 * c + 7 * d,
        None,
        lambda a, b, c, d: [
            a**2 + b**2 + c**2 + d**2 + a - b + c - d - 8,
            a**2 + 2 * b**2 + c**2 + 2 * d**2 - a - d - 10,
            2 * a**2 + b**2 + c**2 + 2 * a - b - d - 5,
        ],
        (0, 0, 0, 0),
        -44,
    ),
    65: Nonlinear(
        lambda x, y, z: (x - y) ** 2 + (x + y - 10) ** 2 / 9 + (z - 5) ** 2,
        None,
        lambda x, y, z: [x**2 + y**2 + z**2 - 48, *box(-4.5, 4.5)(x, y), *box(-5, 5)(z)],
        (-5, 5, 0),
        0.9535288567,
    ),
    71: Nonlinear(
        lambda a, b, c, d: a * d * (a + b + c) + c,
        lambda a, b, c, d: [a**2 + b**2 + c**2 + d**2 - 40],
        lambda a, b, c, d: [25 - a * b * c * d, *box(1, 5)(a, b, c, d)],
        (1, 5, 5, 1),
        17.0140173,
    ),
    76: Nonlinear(
        lambda a, b, c, d: a**2 + b**2 / 2 + c**2 + d**2 / 2 - a * c + c * d - a - 3 * b + c - d,
        None,
        lambda a, b, c, d: [a + 2 * b + c + d - 5, 3 * a + b + 2 * c - d - 4, 1.5 - b - 4 * c, -a, -b, -c, -d],
        (0.5, 0.5, 0.5, 0.5),
        -4.681818181,
    ),
    77: Nonlinear(
        lambda a, b, c, d, e: (a - 1) ** 2 + (a - b) ** 2 + (c - 1) ** 2 + (d - 1) ** 4 + (e - 1) ** 6,
        lambda a, b, c, d, e: [a**2 * d + (d - e).sin() - 2 * sqrt(2), b + c**4 * d**2 - 8 - sqrt(2)],
        None,
        (2, 2, 2, 2, 2),
        0.24150513,
    ),
    78: Nonlinear(lambda a, b, c, d, e: a * b * c * d * e, _78, None, (-2, 1.5, 2, -1, -1), -2.91970041),
    79: Nonlinear(
        lambda a, b, c, d, e: (a - 1) ** 2 + (a - b) ** 2 + (b - c) ** 2 + (c - d) ** 4 + (d - e) ** 4,
        lambda a, b, c, d, e: [a + b**2 + c**3 - 2 - 3 * sqrt(2), b - c**2 + d + 2 - 2 * sqrt(2), a * e - 2],
        None,
        (2, 2, 2, 2, 2),
        0.0787768209,
    ),
    80: Nonlinear(
        lambda a, b, c, d, e: (a * b * c * d * e).exp(),
        _78,
        lambda a, b, c, d, e: [*box(-2.3, 2.3)(a, b), *box(-3.2, 3.2)(c, d, e)],
        (-2, 2, 2, -1, -1),
        0.0539498478,
    ),
    100: Nonlinear(
        _100,
        None,
        lambda x1, x2, x3, x4, x5, x6, x7: [
            2 * x1**2 + 3 * x2**4 + x3 + 4 * x4**2 + 5 * x5 - 127,
            7 * x1 + 3 * x2 + 10 * x3**2 + x4 - x5 - 282,
            23 * x1 + x2**2 + 6 * x6**2 - 8 * x7 - 196,
            4 * x1**2 + x2**2 - 3 * x1 * x2 + 2 * x3**2 + 5 * x6 - 11 * x7,
        ],
        (1, 2, 0, 4, 0, 1, 1),
        680.6300573,
    ),
}
