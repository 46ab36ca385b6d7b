r"""Implicit differentiation: where a solver ends, as a function of all that its problem sees, at the memory of one step.

A solver ends where equations hold, ``F(w; θ) = 0``: a gradient is zero, a map has a fixed point, the conditions of Karush,
Kuhn and Tucker are met. However it came there, the implicit function theorem says how the root moves with θ, which is all
else that F sees (contexts, trained parameters, a prediction to project):

    ``dw/dθ = −(∂F/∂w)⁻¹ ∂F/∂θ``.

:func:`root` puts a root on the graph that way, :class:`Implicit` the end of any solver.

Source: Griewank & Walther (2008), chapter 15; Blondel et al. (2022), *Efficient and modular implicit differentiation*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amortized.contract import Context
from amortized.solvers.base import Solution, Solver, Trace, fixed
from amortized.solvers.engine.rows import over
from amortized.solvers.smooth.newton import jacobian

DENSE = 100
"""Up to so many unknowns ∂F/∂w is written out and factored; beyond, products with its transpose do."""
CYCLE = 20
"""Directions of a Krylov space before it starts over."""


def root(
    equations: Callable[[Tensor], Tensor],
    w: Tensor,
    adjoint: Callable[[Tensor], Tensor] | None = None,
    products: int = 100,
    tol: float = 1e-10,
) -> Tensor:
    """A root of ``F(w) = 0``, on the graph of all else that F sees: ``dw = −(∂F/∂w)⁻¹ dF``.

    One evaluation of F is kept for the backward pass, however long the root took to find. A row where ∂F/∂w is singular,
    or which is not finite, passes no gradient on, and touches no other. First derivatives only.

    Args:
        equations: F, ``(B, k) -> (B, k)``, row by row.
        w: the root ``(B, k)``, from any solver, with or without a graph.
        adjoint: ``v -> (∂F/∂w)⁻ᵀ v``, rows ``(B, k)``, where there is a way that is better than those here: a factored
            Jacobian up to 100 unknowns, GMRES beyond.
        products: of GMRES, products with ``(∂F/∂w)ᵀ`` at most; a few are enough for a gradient to learn by.
        tol: of GMRES, relative residual at which it ends.
    """
    w = w.detach()
    if not torch.is_grad_enabled():
        return w
    residual = equations(w)
    if not residual.requires_grad:
        return w
    transposed = adjoint or (lambda v: _adjoint(equations, w, v, products, tol))
    moved: Tensor = _Root.apply(residual, w, transposed)
    return moved


class _Root(torch.autograd.Function):
    """The root itself; backwards, what moves F moves it."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, w: Tensor, adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.adjoint = adjoint
        return w.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        u = ctx.adjoint(grad)
        return -torch.where(u.isfinite().all(1, keepdim=True), u, 0), None, None


def _adjoint(equations: Callable[[Tensor], Tensor], w: Tensor, v: Tensor, products: int, tol: float) -> Tensor:
    """``u`` with ``(∂F/∂w)ᵀ u = v``."""
    with torch.enable_grad():
        at = w.clone().requires_grad_()
        f = equations(at)
    if w.shape[1] <= DENSE:
        u, info = torch.linalg.solve_ex(jacobian(f, at).mT, v)
        return torch.where((info == 0).unsqueeze(1), u, torch.nan)

    def times(u: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(f, at, u, retain_graph=True)
        return product

    return gmres(times, v, products, tol)


def gmres(times: Callable[[Tensor], Tensor], v: Tensor, products: int, tol: float) -> Tensor:
    """``u`` with ``M u = v`` for rows ``(B, n)``, by minimal residuals over Krylov spaces of 20 directions at a time.

    Args:
        times: ``u -> M u``, row by row.
        v: the right-hand sides.
        products: of M with rows, at most.
        tol: residual over ``‖v‖`` at which all rows are done.

    Source: Saad & Schultz (1986).
    """
    u, residual = torch.zeros_like(v), v
    tiny, aim = torch.finfo(v.dtype).tiny, tol * v.norm(dim=1)
    while products > 0 and bool((residual.norm(dim=1) > aim).any()):
        size = residual.norm(dim=1, keepdim=True)
        basis = [residual / (size + tiny)]
        images: list[Tensor] = []
        for _ in range(min(CYCLE, products, v.shape[1])):
            images.append(times(basis[-1]))
            here, ahead = torch.stack(basis, 2), images[-1]
            for _ in range(2):  # once more, for what rounding left
                ahead = ahead - (here @ (here.mT @ ahead.unsqueeze(2))).squeeze(2)
            length = ahead.norm(dim=1, keepdim=True)
            # Nothing new: the space holds the solution already.
            new = length > 100 * torch.finfo(v.dtype).eps * images[-1].norm(dim=1, keepdim=True)
            basis.append(torch.where(new, ahead / (length + tiny), 0))
        products -= len(images)
        image, space = torch.stack(images, 2), torch.stack(basis[:-1], 2)
        # ‖residual − image·c‖ is least in coordinates of the basis, where columns of zeros have no say.
        whole = torch.stack(basis, 2)
        c = torch.linalg.pinv(whole.mT @ image) @ (whole.mT @ residual.unsqueeze(2))
        before, u = residual, u + (space @ c).squeeze(2)
        residual = residual - (image @ c).squeeze(2)
        if bool((residual.norm(dim=1) > 0.99 * before.norm(dim=1)).all()):
            break
    return u


class Anchored(NamedTuple):
    """A context with the point that its solution is held to."""

    a: Any
    at: Tensor


class _Held:
    """``L(b; a) + λ/2 ‖b − at‖²``, subject to what the problem is subject to."""

    def __init__(self, problem: Any, anchor: float) -> None:
        self.problem, self.anchor = problem, anchor
        for name in ("equality", "inequality", "project"):
            if method := getattr(problem, name, None):
                setattr(self, name, lambda b, a, method=method: method(b, a.a))
        if hasattr(problem, "feasibility_tol"):
            self.feasibility_tol = problem.feasibility_tol

    def objective(self, b: Tensor, a: Anchored) -> Tensor:
        value: Tensor = self.problem.objective(b, a.a)
        return value + self.anchor / 2 * (b - a.at).square().flatten(1).sum(1)


class Implicit(Solver):
    r"""Where a solver ends, differentiated there by the implicit function theorem instead of through its steps.

    As ``refine`` it runs the solver to its end, without a graph, and gives one iterate, whose gradient reaches the
    contexts, the objective's parameters and whatever else the problem sees: deep equilibrium models (:class:`Anderson`),
    projections and programs as layers (:class:`ADMM`), MAML with implicit gradients (``anchor``). Memory does not grow
    with steps. The gradient is that of an exact solution: as wrong as the solution is, and in rows that did not converge
    a direction at best. First derivatives only.

    What holds at the end is the solver's to say (:meth:`Solver.optimality`): a gradient is zero unless it knows better.

    The start is only a start and gets no gradient, except with ``anchor`` λ > 0, where ``min_x L(x; a) + λ/2 ‖x − b‖²`` is
    solved: the proximal map of L at the start b, which then learns through it (a network's prediction, or a
    meta-learned initialization).

    Source: Blondel et al. (2022), sections 2 and 3; with ``anchor``, Rajeswaran et al. (2019), (3) and (6).

    Args:
        solver: finds the solutions.
        anchor: λ, in units of L over those of b²; 0 for none.
        products: where there are more than 100 unknowns, products of a Jacobian with a vector at most in each backward
            pass (GMRES); up to 100 unknowns the Jacobian is factored.

    Raises:
        ValueError: if ``anchor`` is negative or ``products`` is not positive.

    Example:
        >>> class Root:
        ...     def update(self, b, a):
        ...         return (b + a / b) / 2
        >>> from amortized.solvers import Anderson
        >>> a = torch.tensor([[4.0], [9.0]], dtype=torch.float64, requires_grad=True)
        >>> (b,) = Implicit(Anderson()).iterates(Root(), a, torch.ones(2, 1, dtype=torch.float64))
        >>> torch.autograd.grad(b.sum(), a)[0].flatten()  # 1 / (2 √a)
        tensor([0.2500, 0.1667], dtype=torch.float64)
    """

    def __init__(self, solver: Solver, anchor: float = 0.0, products: int = 100) -> None:
        super().__init__(solver.steps, solver.tol)
        if anchor < 0 or products < 1:
            raise ValueError(f"anchor must not be negative and products positive, got {anchor} and {products}")
        self.solver, self.anchor, self.products = solver, anchor, products

    def require(self, problem: Any) -> None:
        """As the solver's own."""
        self.solver.require(problem)

    def _held(self, problem: Any, a: Context, b: Tensor) -> tuple[Any, Context]:
        return (_Held(problem, self.anchor), Anchored(a, b)) if self.anchor else (problem, a)

    def _solve(self, problem: Any, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        problem, a = self._held(problem, a, b)
        return self.solver.solve(problem, a, b, dual=dual, trace=trace)

    def _iterates(self, problem: Any, a: Context, b: Tensor) -> Iterator[Tensor]:
        """As :meth:`Solver.iterates`: one iterate, the end."""
        with torch.no_grad():
            problem = fixed(problem, b, a)
        problem, a = self._held(problem, a, b)
        found = self.solver.solve(problem, a, b)
        if not torch.is_grad_enabled() or not len(b):
            yield found.b
            return
        optimality = self.solver.optimality(problem, a, found)
        w = root(optimality.equations, optimality.w, optimality.adjoint, self.products)
        fine = over(~(found.diverged | found.infeasible), b)
        yield torch.where(fine, w[:, : b[0].numel()].reshape(b.shape), found.b)
