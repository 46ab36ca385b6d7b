"""Solvers × problems × known minima, and what every solver promises about rows."""

import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import amortized
from amortized.solvers import BFGS, LBFGS, Adam, GradientDescent, GradientSolver, MultiStart, Solver, Status
from amortized.solvers.engine.compiled import _compiler
from amortized.solvers.tune import STEP_SIZES, adams, descents, tune


class Curvature(NamedTuple):
    scale: Tensor
    at: Tensor


class Bowl:
    """½ Σ scale (b − at)², minimum 0 at ``at``."""

    def objective(self, b: Tensor, a: Curvature) -> Tensor:
        return (0.5 * a.scale * (b - a.at) ** 2).flatten(1).sum(1)


class Rosenbrock:
    """(a − x)² + 10 (y − x²)², minimum 0 at (a, a²)."""

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return (a[:, 0] - b[:, 0]) ** 2 + 10 * (b[:, 1] - b[:, 0] ** 2) ** 2


class Noisy:
    """Mean of ½ (b − a − z)² over 4 draws of z."""

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        z = torch.randn(4, *b.shape, dtype=b.dtype, device=b.device)
        return (0.5 * (b - a - z) ** 2).sum(2).mean(0)


class Broken:
    """½ (b − 1)², but NaN beyond |b| = ``a``."""

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        value = (0.5 * (b - 1) ** 2).sum(1)
        return torch.where(b.abs().amax(1) > a[:, 0], torch.nan, value)


class Quadratic(NamedTuple):
    p: Tensor
    q: Tensor


class Quadratics:
    """½ bᵀPb + qᵀb."""

    def objective(self, b: Tensor, a: Quadratic) -> Tensor:
        return (0.5 * b * torch.bmm(a.p, b.unsqueeze(2)).squeeze(2) + a.q * b).sum(1)


def quadratics(
    size: int, n: int, condition: float, dtype: torch.dtype = torch.float64
) -> tuple[Quadratic, Tensor, Tensor]:
    """Contexts with eigenvalues from 1 down to 1 / condition, starts at zero, and the least values."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, n, n, generator=g, dtype=torch.float64)).Q
    p = (basis * condition ** -torch.linspace(0, 1, n, dtype=torch.float64)) @ basis.mT
    q = torch.randn(size, n, generator=g, dtype=torch.float64)
    best = -0.5 * (q * torch.linalg.solve(p, q)).sum(1)
    return Quadratic(p.to(dtype), q.to(dtype)), torch.zeros(size, n, dtype=dtype), best.to(dtype)


def bowls(size: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Curvature, Tensor]:
    g = torch.Generator().manual_seed(0)
    scale = 0.2 + torch.rand(size, 3, 2, generator=g, dtype=torch.float64)
    a = Curvature(scale, torch.randn(size, 3, 2, generator=g, dtype=torch.float64))
    return Curvature(*(leaf.to(dtype) for leaf in a)), torch.zeros(size, 3, 2, dtype=dtype)


def valleys(size: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    a = 0.5 + torch.rand(size, 1, generator=g, dtype=torch.float64)
    return a, torch.randn(size, 2, generator=g, dtype=torch.float64)


SOLVERS = {
    "gradient descent": lambda: GradientDescent(steps=3000, lr=0.5),
    "momentum": lambda: GradientDescent(steps=3000, lr=0.3, momentum=0.8),
    "learned steps": lambda: GradientDescent(steps=3000, lr=0.5, learn_lr=True, per_step=True),
    "adam": lambda: Adam(steps=3000),
    "bfgs": lambda: BFGS(),
    "lbfgs": lambda: LBFGS(dense=0),
    "lbfgs, small n": lambda: LBFGS(),
    "lbfgs in chunks": lambda: LBFGS(memory=3, chunk=4, dense=0),
}
each_solver = pytest.mark.parametrize("solver", [make() for make in SOLVERS.values()], ids=list(SOLVERS))


@each_solver
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_bowl(solver: Solver, dtype: torch.dtype) -> None:
    a, b = bowls(dtype=dtype)
    found = solver.solve(Bowl(), a, b)
    assert found.converged.all()
    assert found.b.shape == b.shape
    assert found.b.dtype == dtype
    tol = 1e-6 if dtype == torch.float64 else 1e-4
    assert (found.residual <= tol).all()
    torch.testing.assert_close(found.b, a.at, atol=5 * tol, rtol=0)  # ‖b − at‖ ≤ ‖g‖ / 0.2
    assert (found.value <= tol**2 / 0.4).all()
    torch.testing.assert_close(found.value, Bowl().objective(found.b, a))


@pytest.mark.parametrize(
    "solver", [LBFGS(dense=0), LBFGS(memory=2, dense=0), BFGS(chunk=7)], ids=["lbfgs", "memory 2", "bfgs, chunk 7"]
)
def test_rosenbrock(solver: Solver) -> None:
    a, b = valleys()
    found = solver.solve(Rosenbrock(), a, b)
    assert found.converged.all()
    torch.testing.assert_close(found.b, torch.cat([a, a**2], 1), atol=1e-4, rtol=0)


def test_adam_comes_close_on_rosenbrock() -> None:
    a, b = valleys()
    found = Adam(steps=3000).solve(Rosenbrock(), a, b)
    assert (found.value < 0.5 * Rosenbrock().objective(b, a)).all()
    assert found.value.median() < 1e-9


@each_solver
def test_rows_are_independent_of_order_and_company(solver: Solver) -> None:
    a, b = bowls()
    found = solver.solve(Bowl(), a, b)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    permuted = solver.solve(Bowl(), Curvature(*(leaf[order] for leaf in a)), b[order])
    torch.testing.assert_close(permuted.b, found.b[order], atol=1e-6, rtol=0)
    parts = [solver.solve(Bowl(), Curvature(*(leaf[part] for leaf in a)), b[part]) for part in (slice(3), slice(3, 7))]
    torch.testing.assert_close(torch.cat([part.b for part in parts]), found.b, atol=1e-6, rtol=0)
    again = solver.solve(Bowl(), a, b)
    assert all(torch.equal(p, q) for p, q in zip(again[:-1], found[:-1], strict=True))


@each_solver
def test_a_row_that_breaks_leaves_the_others_alone(solver: Solver) -> None:
    a, b = bowls()
    clean = solver.solve(Bowl(), a, b)
    a.at[2], a.scale[4], b[5] = math.nan, math.inf, math.inf
    found = solver.solve(Bowl(), a, b)
    assert found.diverged.tolist() == [False, False, True, False, True, True, False]
    fine = [0, 1, 3, 6]
    torch.testing.assert_close(found.b[fine], clean.b[fine], atol=1e-6, rtol=0)
    assert found.converged[fine].all()
    assert torch.equal(found.b[[2, 4, 5]], b[[2, 4, 5]])


@each_solver
def test_the_best_finite_iterate_comes_back(solver: Solver) -> None:
    a, b = torch.tensor([[0.5], [10.0]], dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    found = solver.solve(Broken(), a, b)
    assert found.status[0] != Status.CONVERGED
    assert found.status[1] == Status.CONVERGED
    assert found.value[0].isfinite()
    assert found.value[0] <= 0.5
    assert found.b.abs()[0, 0] <= 0.5


@each_solver
def test_never_worsens(solver: Solver) -> None:
    a, b = valleys(200)
    b = 4 * b
    start = Rosenbrock().objective(b, a)
    found = solver.solve(Rosenbrock(), a, b)
    assert (found.value <= start * (1 + 1e-12)).all()
    torch.testing.assert_close(found.value, Rosenbrock().objective(found.b, a))


@each_solver
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(solver: Solver, mode: type) -> None:
    expected = solver.solve(Bowl(), *bowls())
    with mode():
        a, b = bowls()
        found = solver.solve(Bowl(), a, b)
        assert not torch.is_grad_enabled()
        refined = list(type(solver)(steps=3).iterates(Bowl(), a, b))
    assert torch.equal(found.b, expected.b)
    assert not any(leaf.requires_grad or leaf.is_inference() for leaf in found[:-1])
    assert len(refined) == 3
    assert not any(b.requires_grad for b in refined)


@each_solver
def test_empty_batch(solver: Solver) -> None:
    a, b = bowls(0)
    found = solver.solve(Bowl(), a, b)
    assert found.b.shape == (0, 3, 2)
    assert found.status.shape == found.converged.shape == (0,)


@each_solver
def test_a_random_objective_is_searched_with_its_draws_fixed(solver: Solver) -> None:
    a, b = torch.arange(12.0, dtype=torch.float64).reshape(4, 3), torch.zeros(4, 3, dtype=torch.float64)
    torch.manual_seed(0)
    found = solver.solve(Noisy(), a, b)
    assert found.converged.all()
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(solver.solve(Noisy(), a, b).b, found.b)
    assert torch.equal(torch.rand(()), after)
    torch.manual_seed(1)
    assert not torch.allclose(solver.solve(Noisy(), a, b).b, found.b)


def test_trace_counts_evaluations_and_only_improves() -> None:
    a, b = valleys()
    seen: list[tuple[int, Tensor]] = []
    found = LBFGS().solve(Rosenbrock(), a, b, trace=lambda count, b, best: seen.append((count, best)))
    counts = [count for count, _ in seen]
    assert counts == sorted(counts)
    assert counts[-1] == found.evaluations.max()
    values = torch.stack([best for _, best in seen])
    assert values.shape[1:] == (40,)
    assert (values[1:] <= values[:-1] + 1e-15).all()
    assert torch.equal(values[-1], found.value)


def test_rows_stop_on_their_own() -> None:
    a, b = valleys()
    b[:20] = torch.cat([a, a**2], 1)[:20]
    found = LBFGS().solve(Rosenbrock(), a, b)
    assert (found.evaluations[:20] == 1).all()
    assert (found.iterations[:20] == 0).all()
    assert (found.evaluations[20:] > 5).all()
    limited = LBFGS(steps=5).solve(Rosenbrock(), a, b)
    assert limited.evaluations.max() == 6
    assert (limited.status[20:] == Status.LIMIT).all()


def test_chunks_leave_the_answer_as_it_is() -> None:
    a, b = valleys()
    wide, narrow = LBFGS().solve(Rosenbrock(), a, b), LBFGS(chunk=3).solve(Rosenbrock(), a, b)
    torch.testing.assert_close(narrow.b, wide.b, atol=1e-6, rtol=0)
    assert narrow.converged.all()


@pytest.mark.parametrize(
    ("bad", "shape"),
    [(lambda b, a: b.sum(), r"\(\)"), (lambda b, a: b.flatten(1).sum(1, keepdim=True), r"\(7, 1\)")],
    ids=["scalar", "column"],
)
def test_objective_of_the_wrong_shape(bad: object, shape: str) -> None:
    problem = type("Bad", (), {"objective": staticmethod(bad)})()
    with pytest.raises(ValueError, match=f"returned shape {shape}.*one value per row, shape .7,."):
        LBFGS().solve(problem, *bowls())


def test_contexts_and_starts_must_match() -> None:
    a, b = bowls()
    with pytest.raises(ValueError, match="7 starts and contexts with 6 rows"):
        LBFGS().solve(Bowl(), Curvature(a.scale[:6], a.at), b)


@pytest.mark.parametrize(
    "arguments", [{"lr": 0.0}, {"momentum": 1.0}, {"per_step": True}, {"steps": -1}], ids=lambda a: next(iter(a))
)
def test_arguments_out_of_range(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        GradientDescent(**arguments)


@pytest.mark.parametrize("solver", [LBFGS(steps=1, first_step=0.25, dense=0), LBFGS(steps=1, first_step=0.25)])
def test_the_first_trial_is_as_long_as_first_step_says(solver: Solver) -> None:
    looked: list[Tensor] = []

    class Watched(Bowl):
        def objective(self, b: Tensor, a: Curvature) -> Tensor:
            looked.append(b.detach().clone())
            return super().objective(b, a)

    a, b = bowls()
    solver.solve(Watched(), a, b)
    torch.testing.assert_close((looked[-1] - b).flatten(1).norm(dim=1), torch.full((7,), 0.25, dtype=b.dtype))
    with pytest.raises(ValueError, match="first_step must be positive, got 0"):
        LBFGS(first_step=0)


@pytest.mark.parametrize(
    "solver",
    [GradientDescent(steps=3, learn_lr=True, momentum=0.5), Adam(steps=3, learn_lr=True)],
    ids=["gradient descent", "adam"],
)
def test_unrolled_steps_have_the_right_gradients(solver: Solver) -> None:
    a, b = valleys(3)
    a.requires_grad_()
    b.requires_grad_()
    solver = solver.double()

    def refined(a: Tensor, b: Tensor, log_lr: Tensor) -> Tensor:
        solver.log_lr.data.copy_(log_lr.data)
        del solver._parameters["log_lr"]
        solver._parameters["log_lr"] = log_lr
        return torch.stack(list(solver.iterates(Rosenbrock(), a, b)))

    log_lr = torch.full(solver.log_lr.shape, -5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(refined, (a, b, log_lr))


def test_first_order_gradients_take_the_inner_gradient_as_constant() -> None:
    a, b = valleys(3)
    b.requires_grad_()
    *_, last = GradientDescent(steps=4, lr=0.01, unroll=0).iterates(Rosenbrock(), a, b)
    (grad,) = torch.autograd.grad(last.sum(), b)
    assert torch.equal(grad, torch.ones_like(b))
    *_, last = GradientDescent(steps=4, lr=0.01, unroll=1).iterates(Rosenbrock(), a, b)
    (one,) = torch.autograd.grad(last.sum(), b)
    *_, near = GradientDescent(steps=3, lr=0.01).iterates(Rosenbrock(), a, b.detach())
    near = near.detach().requires_grad_()
    (step,) = GradientDescent(steps=1, lr=0.01).iterates(Rosenbrock(), a, near)
    (expected,) = torch.autograd.grad(step.sum(), near)
    torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("solver", [GradientDescent(steps=6, lr=0.5), Adam(steps=6), LBFGS(steps=6), BFGS(steps=6)])
def test_refining_helps_and_reaches_the_start(solver: Solver) -> None:
    a, b = bowls()
    b.requires_grad_()
    seen = list(solver.iterates(Bowl(), a, b))
    assert len(seen) == 6
    assert (Bowl().objective(seen[-1], a) < Bowl().objective(b, a)).all()
    (grad,) = torch.autograd.grad(Bowl().objective(seen[-1], a).sum(), b)
    assert grad.isfinite().all()
    assert (grad.flatten(1).abs().sum(1) > 0).all()


def test_a_learned_step_size_gets_a_gradient_for_each_step() -> None:
    a, b = bowls()
    solver = GradientDescent(steps=4, learn_lr=True, per_step=True)
    *_, last = solver.iterates(Bowl(), a, b)
    Bowl().objective(last, a).sum().backward()
    assert solver.log_lr.grad.shape == (4,)
    assert (solver.log_lr.grad != 0).all()


def test_tuning_picks_the_step_size_that_gets_furthest() -> None:
    a, b = valleys()
    found = tune(adams(steps=100), Rosenbrock(), a, b)
    assert found.gaps.shape == (7,)
    assert found.values.shape == (7, 40)
    assert found.solver.lr == STEP_SIZES[int(found.gaps.argmin())]
    assert found.gaps[0] > 10 * found.gaps.min()
    again = found.solver.solve(Rosenbrock(), a, b)
    assert torch.equal(again.value, found.values[found.gaps.argmin()])
    wild = tune(descents(steps=50), Rosenbrock(), a, 10 * b)
    assert wild.gaps.min().isfinite()
    with pytest.raises(ValueError, match="got 0 and 40"):
        tune([], Rosenbrock(), a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [BFGS(compile=True), LBFGS(dense=0, compile=True), Adam(compile=True)], ids=lambda s: type(s).__name__
)
def test_compiled_rounds_agree(solver: GradientSolver) -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    a, b = valleys()
    eager = type(solver)().solve(Rosenbrock(), a, b)
    for size, chunk in ((40, None), (40, 9), (23, None), (1, None)):
        solver.chunk = chunk
        found = solver.solve(Rosenbrock(), a[:size], b[:size])
        assert torch.equal(found.converged, eager.converged[:size])
        torch.testing.assert_close(found.b, eager.b[:size], atol=1e-5, rtol=0)


class Valleys(Rosenbrock):
    """Several of them in a row, which share its context."""

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        pairs = b.unflatten(1, (-1, 2)).flatten(0, 1)
        return super().objective(pairs, a.repeat_interleave(b.shape[1] // 2, 0)).unflatten(0, (len(b), -1)).sum(1)


class Untraceable(Valleys):
    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        if bool((b.detach() < -1e9).any()):  # a branch on data
            return super().objective(-b, a)
        return super().objective(b, a)


@pytest.mark.slow
@pytest.mark.parametrize("problem", [Valleys(), Untraceable()], ids=lambda p: type(p).__name__)
@pytest.mark.filterwarnings("ignore:Untraceable.objective stays uncompiled")
def test_pairs_that_wait_are_in_the_matrix_too(problem: Valleys) -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    a, b = valleys()[0], 2 * torch.randn(40, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    eager = BFGS().solve(problem, a, b)
    assert eager.converged.all()
    for solver in (BFGS(compile=True), BFGS(compile=True, chunk=16)):
        found = solver.solve(problem, a, b)
        assert found.converged.all()
        torch.testing.assert_close(found.b, eager.b, atol=1e-5, rtol=0)
        assert (found.evaluations - eager.evaluations).abs().double().mean() < 1
    traced: list[int] = []
    found = BFGS(compile=True).solve(problem, a, b, trace=lambda evaluations, b, value: traced.append(evaluations))
    torch.testing.assert_close(found.b, eager.b, atol=1e-5, rtol=0)
    assert max(traced) == found.evaluations.max()


@pytest.mark.slow
def test_an_objective_that_cannot_be_traced_is_left_as_it_is() -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")

    class Branching(Untraceable):
        """A class of its own, as each warns once."""

    a, b = valleys()
    with pytest.warns(UserWarning, match="Branching.objective stays uncompiled"):
        found = BFGS(compile=True).solve(Branching(), a, b)
    assert found.converged.all()


def test_a_trial_outside_of_the_domain_leaves_truncated_gradients_finite() -> None:
    class Root:
        def objective(self, b: Tensor, a: Tensor) -> Tensor:
            return (40 * (b.sqrt() - a) ** 2 + b**2).sum(1)

    a = torch.tensor([[0.1, 0.2], [0.5, 0.1], [1.0, 0.3]], dtype=torch.float64).requires_grad_()
    b = torch.tensor([[1.0, 0.5]] * 3, dtype=torch.float64)
    *_, last = LBFGS(steps=12, dense=0, memory=3, unroll=2).iterates(Root(), a, b)
    (grad,) = torch.autograd.grad(last.sum(), a)
    assert grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:Many.objective stays uncompiled")
def test_a_compiled_solver_says_what_is_wrong_with_an_objective() -> None:
    class Many:
        def objective(self, b: Tensor, a: Tensor) -> Tensor:
            return b - a

    with pytest.raises(ValueError, match="one value per row"):
        BFGS(compile=True).solve(Many(), torch.zeros(5, 2), torch.ones(5, 2))


forms = 1.0


class Transformed:
    """Its minimum is ``transforms * forms`` times the context: an attribute and a global that may change between solves."""

    transforms = 1.0

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return (b - self.transforms * forms * a).square().sum(1)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "n"), [(BFGS(compile=True), 2), (LBFGS(dense=0, compile=True), 9)])
def test_compiled_rounds_follow_the_problem(solver: Solver, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr(type(solver), "together", lambda self, n: 1)  # a graph of one round, which compiles soon
    problem, a = Transformed(), torch.arange(6.0 * n, dtype=torch.float64).reshape(6, n)
    for factor, other in ((1.0, 1.0), (2.0, 1.0), (2.0, 3.0)):
        problem.transforms = factor
        monkeypatch.setitem(globals(), "forms", other)
        torch.testing.assert_close(solver.solve(problem, a, torch.zeros_like(a)).b, factor * other * a)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "sizes"), [(BFGS(compile=True), (2, 4)), (LBFGS(dense=0, compile=True), (9, 10))])
def test_another_n_keeps_its_sizes(solver: Solver, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that vary only from one n to the next are constants of each one's code: the rows of a batch alone are not."""
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr(type(solver), "together", lambda self, n: 1)
    torch._dynamo.reset()
    _compiler.cache_clear()
    symbols = []
    handler = logging.Handler()
    handler.emit = lambda record: symbols.append(record.getMessage())
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        for n in sizes:
            a = torch.arange(6.0 * n, dtype=torch.float64).reshape(6, n)
            assert solver.solve(Transformed(), a, torch.zeros_like(a)).converged.all()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    created = [message for message in symbols if message.startswith("create_symbol")]
    assert created
    assert all(" = 6 for " in message for message in created)


def test_settings_may_change_after_a_solver_is_made() -> None:
    a, b = valleys()
    solver = LBFGS()
    solver.steps, solver.tol = 1, 0.5
    found = solver.solve(Rosenbrock(), a, b)
    assert found.evaluations.max() == 2
    assert torch.equal(found.converged, found.residual <= 0.5)
    several = MultiStart(solver, starts=2)
    solver.steps = 3
    assert several.steps == 3
    assert several.solve(Rosenbrock(), a, b).evaluations.max() <= 2 * 4


def test_importing_the_solvers_imports_torch_alone() -> None:
    code = """
import sys, types
package = types.ModuleType("amortized")
package.__path__ = [sys.argv[1]]
sys.modules["amortized"] = package  # without its own imports
import amortized.solvers
print(*(name for name in sys.modules if name.count(".") < 2))
"""
    run = [sys.executable, "-c", code, str(Path(amortized.__file__).parent)]
    names = set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())
    assert "torch" in names
    heavy = {"torch._dynamo", "torch._inductor", "lightning", "matplotlib", "sklearn", "torchmetrics", "jsonargparse"}
    assert not names & heavy
