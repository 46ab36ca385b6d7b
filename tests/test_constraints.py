"""Feasibility in the core: what is violated, by how much, and which of two solutions is the better one."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from runs import Run
from torch import nn
from toy import Allocation, FiniteGaussians, Sums

from amortized import AmortizedModule, ProblemError, RegressionLoss
from amortized.callbacks import Checkpoint, GapMonitor
from amortized.cli.app import main
from amortized.contract import (
    QuadraticProgram,
    best_of,
    better,
    constrained,
    feasibility_tol,
    feasible_value,
    violation,
)
from amortized.evaluation.advice import advice
from amortized.evaluation.best_known import BestKnown
from amortized.evaluation.budget import default_rivals, measure_budget
from amortized.evaluation.gap import Cases, measure_gap, worst_of
from amortized.evaluation.metric import GapRows, gap_statistics
from amortized.evaluation.results import Results
from amortized.report.table import lines
from amortized.solvers import (
    ADMM,
    FISTA,
    LBFGS,
    Adam,
    AugmentedLagrangian,
    GaussNewton,
    InteriorPoint,
    MultiStart,
    ProjectedGradient,
    solver_for,
)

D = torch.float64


class Sphere:
    """The nearest point to ``a`` of the unit sphere: an equality alone."""

    def objective(self, b, a):
        return (b - a).square().sum(1)

    def equality(self, b, a):
        return b.square().sum(1, keepdim=True) - 1


class Disc(Sphere):
    """The nearest point to ``a`` of the unit disc."""

    equality = property()  # none: an AttributeError

    def inequality(self, b, a):
        return b.square().sum(1, keepdim=True) - 1


class Box:
    """``min (b - a)^2``, b in ``[0, 1]``, as a program."""

    def objective(self, b, a):
        return (b - a).square().sum(1)

    def program(self, a):
        eye = torch.eye(a.shape[1], dtype=a.dtype)
        return QuadraticProgram(2 * eye, -2 * a, eye, torch.zeros_like(a), torch.ones_like(a))


class Projected:
    """The same with a projection."""

    objective = Box.objective

    def project(self, b, a):
        return b.clamp(0, 1)


class Free:
    objective = Box.objective


class Wave:
    """``min b`` subject to ``b^3 - 3 b = 2.5``, so 2.0536: a solver that starts at -1 stays there, infeasible and lower."""

    def objective(self, b, a):
        return b.sum(1)

    def equality(self, b, a):
        return b**3 - 3 * b - 2.5


class At(nn.Module):
    def __init__(self, at):
        super().__init__()
        self.at = nn.Parameter(torch.as_tensor(at, dtype=D))

    def forward(self, a):
        return self.at.to(a).expand(len(a), -1)


class Constant(AmortizedModule):
    """A model that predicts ``at`` for every context, of one of the problems above; solvers start cold from ``start``."""

    def __init__(self, problem, at, start=2.06, dual=None, **kwargs):
        super().__init__(At(at), **kwargs)
        self.start, self.multipliers = start, dual
        for name in ("equality", "inequality", "program", "project"):
            if hasattr(problem, name):
                setattr(self, name, getattr(problem, name))
        self.of = problem

    def objective(self, b, a):
        return self.of.objective(b, a)

    def dual(self, a):
        return self.multipliers

    def initial(self, a):
        return torch.full_like(self(a), self.start)


def test_violation_is_the_largest_of_a_rows_constraints():
    b, a = torch.tensor([[0.6, 0.8], [2.0, -0.5], [0.0, 0.5]], dtype=D), torch.zeros(3, 2, dtype=D)
    named = Free()
    named.project = nn.Linear(2, 2)  # a network of a model that is called so
    for problem, expected in (
        (named, [0, 0, 0]),
        (Sphere(), [0, 3.25, 0.75]),
        (Disc(), [0, 3.25, 0]),
        (Box(), [0, 1, 0]),
        (Projected(), [0, 1, 0]),
        (Free(), [0, 0, 0]),
    ):
        torch.testing.assert_close(violation(problem, b, a), torch.tensor(expected, dtype=D))
        assert constrained(problem) == (type(problem) is not Free)
        assert violation(problem, b[:0], a[:0]).shape == (0,)
    bad = torch.tensor([[math.nan, 0.0], [0.5, 0.5]], dtype=D)
    assert violation(Box(), bad, a[:2]).isnan().tolist() == [True, False]
    assert feasible_value(Box(), b, b[:, 0], a).tolist() == [0.6, math.inf, 0.0]
    assert feasibility_tol(Box()) == 1e-4


def test_better_ranks_feasible_first_then_lower_then_closer_and_nan_last():
    nan, inf = math.nan, math.inf
    ranked = [(-inf, 0), (1, 0), (2, 5e-5), (-9, 0.1), (-99, 0.2)]  # value and violation, the best first
    last = [(nan, 0), (0, nan), (inf, 0), (0, inf), (nan, nan)]
    value, off = torch.tensor(ranked + last, dtype=D).T
    i = torch.arange(len(value)).clamp(max=len(ranked))  # none of the last is better than another
    mask = better(value[:, None], off[:, None], value[None], off[None], tol=1e-4)
    assert torch.equal(mask, i[:, None] < i[None])
    for order in (torch.arange(10), torch.arange(10).flip(0)):
        assert best_of(value[order], off[order], tol=1e-4) == order.argmin()


@pytest.mark.parametrize(
    ("problem", "solver"),
    [
        (Sphere(), AugmentedLagrangian()),
        (Disc(), AugmentedLagrangian()),
        (Box(), ADMM(polish=False)),
        (Projected(), ProjectedGradient()),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_solution_has_its_violation_and_its_multipliers_start_the_next(problem, solver):
    a = torch.tensor([[2.0, 0.5], [0.2, 0.3], [-1.0, 3.0]], dtype=D)
    start = torch.full_like(a, 0.4)
    found = solver.solve(problem, a, start)
    assert found.converged.all()
    torch.testing.assert_close(found.violation, violation(problem, found.b, a), rtol=0, atol=0)
    assert found.violation.max() < 1e-5
    again = solver.solve(problem, a, found.b, dual=found.dual)
    assert again.iterations.max() == 0
    if found.dual is not None:
        without = solver.solve(problem, a, found.b)
        assert without.iterations.max() > 0, "the primal solution alone is no start to stop at"
        # L + dual' constraints is stationary.
        b = found.b.requires_grad_()
        c = (
            b
            if isinstance(problem, Box)
            else problem.equality(b, a)
            if type(problem) is Sphere
            else problem.inequality(b, a)
        )
        (grad,) = torch.autograd.grad((problem.objective(b, a) + (found.dual * c).sum(1)).sum(), b)
        assert grad.abs().max() < 1e-4
        with pytest.raises(ValueError, match="dual must"):
            solver.solve(problem, a, found.b.detach(), dual=found.dual[:2])
    nothing = solver.solve(problem, a[:0], start[:0])
    assert nothing.violation.shape == (0,)


def test_the_start_that_ignores_constraints_does_not_win():
    a = torch.zeros(4, 1, dtype=D)
    torch.manual_seed(0)
    starts = MultiStart(AugmentedLagrangian(steps=12, inner=LBFGS(steps=40)), starts=32, spread=3.0)
    found = starts.explore(Wave(), a, a - 1)
    assert found.best.violation.max() < 1e-4
    torch.testing.assert_close(found.best.b, torch.full_like(a, 2.0536), atol=1e-3, rtol=0)
    assert (found.values >= found.best.value[:, None] - 1e-4).all()
    assert LBFGS(50).solve(Wave(), a, a).violation.min() > 1, "it passes over the constraints, and its solution says so"


def test_a_trace_has_points_whose_feasibility_can_be_told():
    a = torch.tensor([[2.0, 0.5], [-1.0, 3.0]], dtype=D)
    for problem, solver in (
        (Sphere(), AugmentedLagrangian()),
        (Box(), ADMM()),
        (Box(), MultiStart(ADMM(polish=False), 3)),
    ):
        seen = []
        found = solver.solve(problem, a, torch.full_like(a, 4.0), trace=lambda *x, seen=seen: seen.append(x))
        (_, first, at_first), (_, last, value) = seen[0], seen[-1]
        assert last.shape == first.shape == a.shape
        torch.testing.assert_close(last, found.b, atol=1e-8, rtol=0)
        torch.testing.assert_close(value, found.value, atol=1e-8, rtol=0)
        torch.testing.assert_close(at_first, problem.objective(first, a))
        assert feasible_value(problem, last, value, a).isfinite().all()


QUICK = AugmentedLagrangian(steps=12, inner=LBFGS(steps=40))


def measured(problem, a, b=None, solver=None, **kwargs):
    b = problem(a).detach() if b is None else b
    rows, best = measure_gap(problem, a, b, solver or solver_for(problem), torch.arange(len(a)), **kwargs)
    return rows, best, {k: float(v) for k, v in gap_statistics(rows).items()}


def test_an_infeasible_point_is_no_reference_though_the_warm_run_ended_there():
    """The warm run stays at -1, where the objective is lower than anywhere: the gap of that prediction was 0, and a win."""
    a = torch.zeros(3, 1, dtype=D)
    rows, best, found = measured(Constant(Wave(), [-1.0]), a, solver=QUICK)
    torch.testing.assert_close(best, torch.full_like(a, 2.0536), atol=1e-3, rtol=0)
    assert not rows.feasible.any()
    assert rows.solved.all()
    assert found["feasible"] == found["lost"] == found["unsolved"] == 0
    assert found["reference_feasible"] == found["converged"] == 1
    assert found["violation/mean"] == found["violation/max"] == 0.5
    assert math.isnan(found["mean"])
    assert found["all/mean"] == pytest.approx(-3.0536, abs=1e-3)


def test_feasible_predictions_are_compared_and_the_cold_solver_may_lose_to_them():
    a = torch.zeros(2, 1, dtype=D)
    model = Constant(Wave(), [2.05362], start=-1.0)  # from where the cold solver gets nowhere
    rows, _, found = measured(model, a, solver=QUICK)
    assert rows.feasible.all()
    assert found["lost"] == 1
    assert 0 <= found["mean"] < 1e-3
    assert found["feasible"] == 1


def test_contexts_without_a_solution_stand_apart_and_touch_no_other():
    torch.manual_seed(0)
    problem, a = Allocation().double().eval(), Sums().batch("test", 0).double()[:60]
    a[7, 1] = math.nan
    none = a[:, 0] > 3
    assert 2 < none.sum() < 10
    rows, best, found = measured(problem, a)
    assert torch.equal(~rows.solved, none | (torch.arange(60) == 7))
    assert torch.equal(rows.impossible > 0, none)
    assert found["unsolved"] == pytest.approx(float((none.sum() + 1) / 60))
    assert found["impossible"] == pytest.approx(float(none.double().mean()))
    assert found["diverged"] == pytest.approx(1 / 60)
    assert 0 < found["feasible"] < found["reference_feasible"]
    fine = rows.solved
    alone, best_alone, others = measured(problem, a[fine], problem(a[fine]))
    torch.testing.assert_close(best[fine], best_alone, atol=1e-5, rtol=0)
    for key in ("mean", "median", "p95", "reference"):
        assert found[key] == pytest.approx(others[key], abs=1e-5)
    assert (alone.gap[alone.feasible] > -1e-4).all()
    # Infeasible ones by their violation, then feasible ones by their gap, then what nobody could solve.
    worst = worst_of(Cases(rows, a, problem(a), best), 60).rows
    count = int((~rows.feasible & rows.solved).sum())
    assert worst.index[0] == 7
    assert (worst.violation[1 : count + 1].diff() <= 0).all()
    assert (worst.gap[count + 1 : int(fine.sum()) + 1].diff() <= 0).all()
    assert none[worst.index[int(fine.sum()) + 1 :].long()].all()


class Own(AmortizedModule):
    """A program of each row's own."""

    def __init__(self):
        super().__init__(At([0.5, 0.25]))

    def objective(self, b, a):
        return (0.5 * (b @ a.P * b if a.P.ndim == 2 else torch.bmm(b[:, None], a.P)[:, 0] * b) + a.q * b).sum(1)

    def program(self, a):
        return a

    def initial(self, a):
        return torch.zeros_like(a.q)

    def forward(self, a):
        return torch.tensor([0.5, 0.25], dtype=a.q.dtype).expand(len(a.q), 2)


def test_each_bad_row_is_found_and_named_and_touches_no_other():
    """Sound; an equality twice; one that contradicts itself; an objective that falls for ever; not a number; sound."""
    one = torch.ones(6, dtype=D)
    P = torch.eye(2, dtype=D).repeat(6, 1, 1)
    P[3] = 0
    q = torch.zeros(6, 2, dtype=D)
    q[3, 0], q[4, 0] = -1, math.nan
    A = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=D).repeat(6, 1, 1)
    A[[0, 3, 5], 1] = torch.tensor([1.0, 0.0], dtype=D)
    bound = torch.stack([one, one], 1)
    bound[2, 1] = 2
    lower, upper = bound.clone(), bound.clone()
    upper[[0, 3, 5]] = math.inf
    a = QuadraticProgram(P, q, A, lower, upper)
    rows, best, found = measured(Own(), a)
    fine = torch.tensor([0, 1, 5])
    assert rows.solved[fine].all()
    assert not rows.solved[2]
    assert rows.impossible.tolist() == [0, 0, 1, 1, 0, 0]
    assert not rows.gap[4].isfinite()
    assert rows.converged.tolist() == [1, 1, 0, 0, 0, 1]
    torch.testing.assert_close(best[1], torch.tensor([0.5, 0.5], dtype=D), atol=1e-5, rtol=0)
    alone, *_ = measured(Own(), QuadraticProgram(*(leaf[fine] for leaf in a)))
    torch.testing.assert_close(rows.reference[fine], alone.reference, atol=1e-6, rtol=0)
    assert found["impossible"] >= 1 / 6


@pytest.mark.parametrize(
    ("at", "name", "shown"), [(Sphere, "equality", "(5,): add"), (Disc, "inequality", "(5, 1, 1): flatten")]
)
def test_constraints_of_another_shape_are_told(at, name, shown):
    model = Constant(at(), [0.1, 0.2])
    right = getattr(model, name)
    setattr(model, name, lambda b, a: right(b, a)[:, 0] if at is Sphere else right(b, a)[..., None])
    with pytest.raises(ProblemError) as error:
        model.check(torch.zeros(5, 2, dtype=D))
    assert f"Constant.{name}(b, a) must return the constraints of each row, shape (5, number); got {shown}" in str(
        error.value
    )


def test_constraints_that_mix_rows_are_told():
    model = Constant(Disc(), [0.1, 0.2])
    radius = model.inequality
    model.inequality = lambda b, a: radius(b, a) - b[:, 0]  # (B, 1) - (B,): a row for each column
    with pytest.raises(ProblemError, match="Constant.inequality mixes rows: row 0 changes with the other rows"):
        model.check(torch.zeros(5, 2, dtype=D))
    model.inequality = lambda b, a: radius(b, a) + a.mean()
    with pytest.raises(ProblemError, match="Constant.inequality mixes rows"):
        model.check(torch.arange(10, dtype=D).view(5, 2))


def test_an_augmented_lagrangian_in_single_precision_ends_feasible():
    a = torch.tensor([[2.0, 0.5], [0.2, 0.3], [-1.0, 3.0]])
    for problem in (Sphere(), Disc()):
        found = AugmentedLagrangian().solve(problem, a, torch.full_like(a, 0.4))
        assert found.converged.all()
        assert (found.violation <= 1e-4).all()


def test_without_constraints_there_is_nothing_of_them():
    a = torch.randn(5, 2, dtype=D)
    rows, _, found = measured(Constant(Free(), [0.0, 0.0]), a)
    assert not {"feasible", "all/mean", "unsolved", "stored"} & set(found)
    assert not rows.constrained
    assert rows.comparable.all()
    assert "constraints" not in Results.of(found).to_json()


def test_a_model_that_predicts_multipliers_starts_the_warm_run_with_them():
    a = torch.tensor([[2.0, 0.5], [0.2, 0.3], [-1.0, 3.0]], dtype=D)
    exact = ADMM().solve(Box(), a, torch.zeros_like(a))
    evaluations = {}
    for name, dual in (("without", None), ("with", exact.dual)):
        model = Constant(Box(), [0.0, 0.0], dual=dual)
        model.forward = lambda a: exact.b.to(a)
        budget = measure_budget(model, a, default_rivals(model, ADMM(polish=False)), repeats=1)
        assert [curve.name for curve in budget.cold] == ["ADMM"], "Adam ignores constraints, so it is no rival"
        evaluations[name] = int(budget.warm[0].evaluations[-1])
    assert evaluations["with"] < evaluations["without"]


def test_a_rival_that_ignores_the_constraints_never_gets_there():
    a = torch.tensor([[2.0, 0.5], [1.5, 1.5]], dtype=D)  # outside of the disc
    model = Constant(Disc(), [0.5, 0.5], start=3.0)  # infeasible
    budget = measure_budget(model, a, {"Adam": Adam(200, lr=0.3), "AL": AugmentedLagrangian()}, repeats=1)
    assert budget.start.isinf().all()
    adam, ours = budget.cold
    assert adam.values.isinf().all()
    assert budget.needed(adam).isinf().all()
    assert budget.needed(ours).isfinite().all()
    assert budget.rival == budget.warm_rival == "AL"
    torch.testing.assert_close(budget.best, (a.norm(dim=1) - 1).square(), atol=1e-3, rtol=0)


def test_what_was_not_solved_is_no_target():
    problem, a = Allocation(), Sums().batch("train", 0)[:64]
    none = a[:, 0] > 3
    assert none.any()
    value = RegressionLoss(solver=ADMM())(problem, a)
    assert torch.equal(value == 0, none)
    exact = ADMM().solve(problem, a, problem.initial(a)).b
    torch.testing.assert_close(value[~none], (problem(a) - exact).square().mean(1)[~none], atol=1e-5, rtol=0)
    value.mean().backward()
    assert all(p.grad.isfinite().all() for p in problem.parameters())
    with pytest.raises(ProblemError, match="ADMM converged on none of 64 contexts"):
        RegressionLoss(solver=ADMM(steps=0))(problem, a)


class Sinking(Constant):
    """Feasible at first; the objective falls as training leaves the constraints behind."""

    def __init__(self, problem, at):
        super().__init__(problem, at, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
        self.double()


@pytest.mark.parametrize(
    ("problem", "at", "best"), [(Wave(), [2.05362], 3), (Wave(), [2.2], None), (Free(), [2.0], 12)]
)
def test_the_best_checkpoint_is_feasible_first(problem, at, best, tmp_path):
    """Feasible at the first validation alone; never, so that the smallest violation counts; without constraints."""
    model, data = Sinking(problem, at), FiniteGaussians(dim=1, batch_size=10, num_eval=20)
    data.contexts = lambda split: torch.zeros(20, 1, dtype=D)
    data.augment = lambda a, generator: a
    if best == 3:
        model.optimizer = lambda p: torch.optim.SGD(p, lr=1e-6)
        later = model.training_step

        def training_step(batch, batch_idx):
            for group in model.optimizers().optimizer.param_groups:
                group["lr"] = 1e-6 if model.global_step < 3 else 0.1
            return later(batch, batch_idx)

        model.training_step = training_step
    keeper = Checkpoint(every_n_steps=12)
    trainer = Trainer(
        max_steps=12, val_check_interval=3, check_val_every_n_epoch=None, callbacks=[keeper], default_root_dir=tmp_path,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data)
    saved = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    if best is not None:
        assert saved["global_step"] == best
    else:  # the violation has its smallest value on the way down
        step = saved["global_step"]
        off = {k: float(violation(problem, torch.tensor([[2.2 - 0.01 * k]], dtype=D), None)) for k in (3, 6, 9, 12)}
        assert step == min(off, key=off.get)
    keeper.load_state_dict({"best": 0.5, "saved": []})  # of a run before there were constraints
    assert keeper.best == (-1.0, 0.5)


def test_a_solver_by_structure():
    class Sparse(Free):
        smooth = prox = Free.objective

    class Squares(Free):
        residuals = Free.objective

    kinds = {Box: ADMM, Sphere: InteriorPoint, Disc: InteriorPoint, Projected: ProjectedGradient}
    for problem, kind in (kinds | {Sparse: FISTA, Squares: GaussNewton, Free: LBFGS}).items():
        assert type(solver_for(problem())) is kind


def test_two_models_are_judged_by_the_best_that_either_found(tmp_path):
    class Double:
        """``min (b^2/3 - 3)^2 + b/6``: a deeper minimum at -3, another at 3; a start decides which is found."""

        def objective(self, b, a):
            return ((b**2 / 3 - 3) ** 2 + b / 6).sum(1)

        def inequality(self, b, a):
            return b - 9

    a = torch.arange(4, dtype=D)[:, None]
    left, right = Constant(Double(), [-3.2], start=3.1), Constant(Double(), [3.2], start=3.1)  # cold both go right
    path = tmp_path / "known" / "double.pt"
    *_, alone = measured(right, a)
    known = BestKnown(path)
    rows, _, first = measured(right, a, known=known)
    assert first["mean"] == pytest.approx(alone["mean"])
    assert first["stored"] == 0
    known.save()
    known = BestKnown(path)
    *_, found = measured(left, a[:3], known=known)
    assert found["stored"] == 0
    known.save()
    rows, best, judged = measured(right, a, known=BestKnown(path))
    assert rows.stored.tolist() == [1, 1, 1, 0]
    assert (best[:3] < -2.9).all()
    assert judged["reference"] < alone["reference"] - 0.5
    assert rows.reference[3] == pytest.approx(alone["reference"], abs=1e-6)
    # What the first of two runs at once has put there stays.
    one, two = BestKnown(path), BestKnown(path)
    for known, i in ((one, 3), (two, 2)):
        measured(left, a[i:] + (10 if i == 2 else 0), known=known)
    one.save()
    two.save()
    assert len(BestKnown(path).entries.keys) == 6
    assert (measured(right, a, known=BestKnown(path))[1] < -2.9).all()

    class Shifted(Double):
        def objective(self, b, a):
            return super().objective(b, a) + 1

    with pytest.raises(ProblemError, match=r"is of another objective \(a value there is -0\.5.*, now 0\.4"):
        measured(Constant(Shifted(), [1.0]), a, known=BestKnown(path))
    with pytest.raises(ProblemError, match=r"holds solutions of shape \(1,\), those of this problem have \(2,\)"):
        measured(Constant(Free(), [1.0, 1.0]), a.expand(4, 2), known=BestKnown(path))
    path.write_text("else")
    with pytest.raises(ProblemError, match="is not a file of best-known solutions"):
        BestKnown(path)


def test_results_table_page_and_processes(capsys):
    """One process and two agree, and a second run finds the solutions of the first."""
    args = ["--model=toy.Allocation", "--data=toy.Sums", "--data.num_val=32", "--data.num_test=90"]
    args += ["--data.eval_batch_size=30", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    steps = ["--trainer.max_steps=20", "--trainer.val_check_interval=10", "--trainer.check_val_every_n_epoch=null"]
    main(["fit", *args, *steps, "--gap.best_known=known.pt", "--run_folder=fit"])
    printed = capsys.readouterr().out
    found = json.loads(Path("fit/results.json").read_text())
    c = found["constraints"]
    assert Results.from_json(found).to_json() == found
    assert 0 < c["feasible"] < c["reference_feasible"] < 1
    assert c["unsolved"] == pytest.approx(c["impossible"]) == pytest.approx(1 - c["reference_feasible"])
    assert 0 < c["violation_mean"] < c["violation_p95"] <= c["violation_max"]
    assert found["solver"] == {"advice": None, "name": "ADMM", "chosen_by": "program", "best_known": 0}
    assert found["time"]["rival"] == "ADMM"
    page = Path("fit/report.html").read_text()
    for line in (
        "rows feasible within 0.0001: network, solver",
        f"{c['feasible']:.1%}, {c['reference_feasible']:.1%}",
        "violation of the network: mean, 95 %, largest",
        f"{c['unsolved']:.1%} ({c['impossible']:.1%} proved to have none)",
        "solver, chosen by the problem&#x27;s program",
    ):
        assert line in page
        assert line.replace("&#x27;", "'") in printed
    assert "Rows feasible" in page
    assert "solver&#x27;s violation" in page
    assert Path("fit/pictures/violation.png").exists()
    curves = Path("fit/metrics.csv").read_text().splitlines()[0]
    assert {"val/feasible", "val/violation", "test/gap/violation/p95", "test/gap/feasible"} <= set(curves.split(","))

    test = ["test", *args, "--ckpt_path=fit/checkpoints/step=00000020.ckpt", "--budget.enabled=false"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--gap.best_known=two.pt", "--run_folder=two"]
    run = Run([*test, *two])
    assert run.wait() == 0, run.output()
    both = json.loads(Path("two/results.json").read_text())
    for group in ("gap", "rows", "constraints", "objective"):
        assert both[group] == pytest.approx(found[group], abs=1e-6)
    one, other = (BestKnown(name).entries for name in ("known.pt", "two.pt"))
    assert set(other.keys.tolist()) <= set(one.keys.tolist())
    assert len(other.keys) == round(90 * c["reference_feasible"])

    with pytest.warns(UserWarning, match=r"\d+ of 90 are not feasible within 0.0001: row \d+, "):
        main(["predict", *args, "--ckpt_path=fit/checkpoints/step=00000020.ckpt", "--run_folder=predict"])
    off = np.load("predict/predictions.npz")["violation"]
    assert (off <= 1e-4).mean() == pytest.approx(c["feasible"])


def test_the_monitor_chooses_and_tells_its_solver():
    monitor = GapMonitor()
    Trainer(
        accelerator="cpu", logger=False, callbacks=[monitor], enable_progress_bar=False, enable_model_summary=False
    ).test(Allocation(), Sums(num_test=8), verbose=False)
    assert type(monitor.solver) is ADMM
    assert isinstance(monitor.table, GapRows)
    assert monitor.results["feasible"] <= 1


def test_a_model_that_breaks_its_constraints_is_no_win_and_is_told_so():
    """DC3's families, where such a model was reported as 63 % better than the optimum, and the solver as always lost."""
    a = torch.tensor([[2.0, 0.5], [-1.0, 3.0]], dtype=D)
    model = Constant(Sphere(), [2.0, 3.0])
    *_, found = measured(model, a)
    results = Results.of(found)
    shown = dict(lines(results, "distance"))
    assert shown["amortization gap, mean ± standard error"] == "none: no row is feasible on both sides"
    assert shown["distance, network"] == shown["distance, solver"] == "no row to compare"
    assert shown["rows where the cold solver lost to the network"] == "0.0%"
    assert shown["rows feasible within 0.0001: network, solver"] == "0.0%, 100.0%"
    assert Results.from_json(json.loads(json.dumps(results.to_json()))) == results
    assert advice(model, AugmentedLagrangian(), found).startswith(
        "only 0.0% of the predictions are feasible: a loss that"
    )
    assert "--gap.solver InteriorPoint" in advice(model, LBFGS(), found)
