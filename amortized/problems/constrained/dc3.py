r"""The two families of DC3: a hundred unknowns, fifty equalities that vary, fifty inequalities.

    ``min_b  ½ bᵀ diag(q) b + pᵀ b``        (:class:`ConvexDC3`)
    ``min_b  ½ bᵀ diag(q) b + pᵀ sin(b)``   (:class:`NonconvexDC3`)

    subject to ``E b = a``, ``G b ≤ h``,

where a context ``a`` is uniform on [-1, 1]^50 and ``h_i = ‖(G E⁺)_i‖₁``, so that the shortest solution of the equalities,
``E⁺ a``, is feasible whatever a. Data, matrices and splits are those of the source's own script: numpy's generator with seed 17.

Source: Donti, Rolnick & Kolter (2021), *DC3: a learning method for optimization with hard constraints*, sections 4.1 and 4.2.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from amortized.contexts.data_module import ContextDataModule
from amortized.contract import Polyhedron, ProblemError, QuadraticProgram
from amortized.module import AmortizedModule
from amortized.problems.constrained.pictures import draw_constrained
from amortized.solvers import Projection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIABLES, EQUALITIES, INEQUALITIES, CONTEXTS = 100, 50, 50, 10_000
SPLITS = {"train": slice(0, 8334), "val": slice(8334, 9167), "test": slice(9167, 10_000)}


class Data(NamedTuple):
    """The numbers of the source, in float64."""

    q: Tensor
    p: Tensor
    E: Tensor
    G: Tensor
    h: Tensor
    contexts: Tensor


@functools.cache
def data() -> Data:
    """Drawn in the order of the source's script."""
    draw = np.random.RandomState(17)
    q, p = draw.random_sample(VARIABLES), draw.random_sample(VARIABLES)
    E = draw.normal(size=(EQUALITIES, VARIABLES))
    contexts = draw.uniform(-1, 1, size=(CONTEXTS, EQUALITIES))
    G = draw.normal(size=(INEQUALITIES, VARIABLES))
    h = np.abs(G @ np.linalg.pinv(E)).sum(1)
    return Data(*(torch.from_numpy(x) for x in (q, p, E, G, h, contexts)))


class DC3(AmortizedModule):
    """What both families share; solutions ``(B, 100)``, contexts ``(B, 50)``.

    Args:
        network: ``(B, 50) -> (B, 100)``.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    q: Tensor
    p: Tensor
    A: Tensor
    h: Tensor

    def __init__(self, network: nn.Module, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        found, dtype = data(), torch.get_default_dtype()
        A = torch.cat([found.E, found.G])
        for name, value in {"q": found.q, "p": found.p, "A": A, "h": found.h}.items():
            self.register_buffer(name, value.to(dtype), persistent=False)

    def polyhedron(self, a: Tensor) -> Polyhedron:
        """``E b = a``, ``G b ≤ h``."""
        h = self.h.expand(len(a), -1)
        return Polyhedron(self.A, torch.cat([a, torch.full_like(h, -torch.inf)], 1), torch.cat([a, h], 1))

    def initial(self, a: Tensor) -> Tensor:
        return a.new_zeros(len(a), VARIABLES)

    def draw(self, a: Tensor, solutions: dict[str, Tensor]) -> Figure:
        """For each context its inequalities' slack, network beside solver: which are active, and which are broken."""
        return draw_constrained(self, a, solutions)


class ConvexDC3(DC3):
    """``½ bᵀ diag(q) b + pᵀ b``: a quadratic program. The mean optimum of the 833 test contexts is -15.0468586."""

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return b.square() @ self.q / 2 + b @ self.p

    def program(self, a: Tensor) -> QuadraticProgram:
        """The program of each context."""
        return QuadraticProgram(self.q.diag(), self.p.expand(len(a), -1), *self.polyhedron(a))


class NonconvexDC3(DC3):
    """``½ bᵀ diag(q) b + pᵀ sin(b)``. The mean of the best values known of the 833 test contexts is -11.592252."""

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return b.square() @ self.q / 2 + b.sin() @ self.p

    def equality(self, b: Tensor, a: Tensor) -> Tensor:
        """``E b − a``, ``(B, 50)``."""
        return b @ self.A[:EQUALITIES].T - a

    def inequality(self, b: Tensor, a: Tensor) -> Tensor:
        """``G b − h``, ``(B, 50)``."""
        return b @ self.A[EQUALITIES:].T - self.h

    def project(self, b: Tensor, a: Tensor) -> Tensor:
        """The nearest feasible point."""
        return Projection(tol=1e-8).correct(self, a, b)


class DC3Contexts(ContextDataModule):
    """The source's 10,000 right-hand sides ``(B, 50)``: 8,334 to train on, 833 to validate, 833 to test.

    ``num_val`` and ``num_test`` take the first of them; ``seed`` says only in which order training sees its own.
    """

    def __init__(self, batch_size: int = 512, num_val: int = 833, num_test: int = 833, **kwargs: Any) -> None:
        super().__init__(batch_size=batch_size, num_val=num_val, num_test=num_test, **kwargs)

    def contexts(self, split: str) -> Tensor:
        if split not in SPLITS:
            raise ProblemError(f"DC3Contexts has the splits train, val and test; got {split!r}")
        rows = data().contexts[SPLITS[split]].to(torch.get_default_dtype())
        return rows[: self.num_rows.get(split, len(rows))]
