"""What a trained solver says of each context: a solution, a bound on what it lacks, and where it comes from."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class Path(enum.IntEnum):
    """Where a row's solution comes from."""

    NONE = 0
    """Nothing met the tolerance: ``b`` is the best that was found."""
    NETWORK = 1
    """The network's prediction."""
    REFINED = 2
    """The solver, from the prediction."""
    SOLVER = 3
    """The solver, from the cold start (or the better of both)."""


class Answer(NamedTuple):
    """Of B contexts, row by row; tensors, or arrays where contexts were given as such."""

    b: Any
    """Solutions ``(B, *)``; NaN where neither network nor solver has a finite one."""
    decoded: Any
    """In the problem's own terms, of the rows that are ``finite``."""
    objective: Any
    """``L(b; a)``, ``(B,)``."""
    certificate: Any
    """The bound on ``L(b; a) - L*`` ``(B,)``, in the objective's unit; NaN where it is not known: of a context unlike those of
    training, whose solver converged, a conformal certificate says nothing."""
    path: Any
    """``"network"``, ``"refined"``, ``"solver"`` or, where nothing met the tolerance, ``"none"``: an array of words ``(B,)``."""
    violation: Any
    """Of the constraints, in their units ``(B,)``; 0 where there are none."""
    evaluations: Any
    """Of the objective, by solvers and certificates ``(B,)``."""
    unlike: Any
    """Which contexts are unlike those of training ``(B,)``."""
    finite: Any
    """Which rows have a finite solution ``(B,)``."""

    @property
    def solved(self) -> np.ndarray:
        """Which rows met the tolerance, or of unlike contexts the solver's own ``(B,)``."""
        found: np.ndarray = self.path != "none"
        return found


class Rows(NamedTuple):
    """An :class:`Answer` before it is decoded, as tensors."""

    b: Tensor
    objective: Tensor
    certificate: Tensor
    path: Tensor
    """A :class:`Path` of each row ``(B,)``, bytes."""
    violation: Tensor
    evaluations: Tensor
    unlike: Tensor


WORDS = np.array([path.name.lower() for path in Path])
