"""What every problem must keep, to be checked in three lines of your own tests.

    from amortized.testing import check_problem

    def test_ellipse():
        check_problem(Ellipse(), Ellipses())

Each check is a function of a module and its contexts that raises ``AssertionError``; :data:`CHECKS` has all of them, for
``pytest.mark.parametrize``.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from amortized.contexts.data_module import ContextDataModule
from amortized.contract import (
    Context,
    check_objective,
    differentiable,
    draws,
    evaluate,
    is_random,
    leaves,
    map_leaves,
    num_rows,
    take,
)
from amortized.losses import ObjectiveLoss
from amortized.module import AmortizedModule
from amortized.solvers import CMAES, LBFGS, Status

Check: TypeAlias = Callable[[AmortizedModule, ContextDataModule], None]

ROWS = 8
"""Contexts in a check, at most."""

_CPU = torch.device("cpu")


def check_problem(module: AmortizedModule, data: ContextDataModule) -> None:
    """Run every check on copies of a problem and its contexts; where the data have solutions, without these, by the objective.

    Raises:
        AssertionError: named after the first check that does not hold, with what was found.
        ProblemError: where the contract of ``objective`` is broken; the message says how to mend it.
    """
    if data.solutions is not None:
        module, data = copy.deepcopy(module), copy.deepcopy(data)
        module.loss, data.solutions = ObjectiveLoss(), None
    for name, check in CHECKS.items():
        try:
            check(copy.deepcopy(module), copy.deepcopy(data))
        except AssertionError as error:
            raise AssertionError(f"{type(module).__name__}: {name}: {error}") from error


def some(data: ContextDataModule, split: str = "train") -> Context:
    """A few contexts of a split."""
    return take(data.batch(split, 0), slice(0, ROWS))


def equal(a: Context, other: Context) -> bool:
    """Whether two contexts hold the same numbers."""
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(other), strict=True))


def shapes(module: AmortizedModule, data: ContextDataModule) -> None:
    """One value and one solution for each row, also of no rows; solutions as the cold start is."""
    a = some(data)
    B, b = num_rows(a), module(a)
    assert {len(leaf) for leaf in leaves(a)} == {B}, "the leaves of a context must share their leading dimension"
    assert b.shape == module.initial(a).shape, (
        f"predictions {tuple(b.shape)}, cold start {tuple(module.initial(a).shape)}"
    )
    assert b.is_floating_point(), f"solutions must be real numbers, got {b.dtype}"
    for values in (module.objective(b, a), module.amortized_step(a)):
        assert values.shape == (B,), f"expected one value for each row, ({B},); got {tuple(values.shape)}"
    assert num_rows(module.observe(a)) == B, "observe must keep the rows"
    nothing = take(a, slice(0, 0))
    assert module.objective(module.initial(nothing), nothing).shape == (0,), "no rows must give no values"


def rows_do_not_mix(module: AmortizedModule, data: ContextDataModule) -> None:
    """Row i of predictions and objective depends on row i alone."""
    a = some(data)
    with torch.no_grad():
        b = module.network(module.observe(a))
        check_objective(module, b, a)
        check_objective(module, module.initial(a), a)
        index = torch.arange(num_rows(a)).flip(0)[::2]
        random = is_random(module, b, a)
        # A refinement by a random objective may draw, row by row.
        predict = (lambda a: module.network(module.observe(a))) if random else module
        torch.testing.assert_close(predict(a)[index], predict(take(a, index)), rtol=1e-3, atol=1e-5)
    if not random:
        torch.testing.assert_close(evaluate(module, b, a)[index], evaluate(module, b[index], take(a, index)))


def no_rows_are_no_fault(module: AmortizedModule, data: ContextDataModule) -> None:
    """A process that has nothing left to evaluate is given contexts without rows."""
    a = take(some(data, "test"), slice(0, 0))
    with torch.no_grad():
        b = module(a)
        assert b.shape == (0, *module.initial(some(data, "test")).shape[1:]), f"{b.shape} for no rows"
        assert module.objective(b, a).shape == (0,)
        module.predict_step(a, 0)


def gradients_reach_every_parameter(module: AmortizedModule, data: ContextDataModule) -> None:
    """The training signal moves all that is to be trained."""
    module.amortized_step(some(data)).mean().backward()
    without = [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any() or not p.grad.isfinite().all())
    ]
    assert not without, f"no finite gradient reaches {', '.join(without)}"


def training_lowers_the_loss(module: AmortizedModule, data: ContextDataModule) -> None:
    """Twenty small steps on one batch."""
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    a, losses = some(data), []
    for _ in range(21):
        with draws(0, _CPU):
            loss = module.amortized_step(a).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.6g} to {losses[-1]:.6g} in 20 steps of Adam"


def solver_never_worsens_a_row(module: AmortizedModule, data: ContextDataModule) -> None:
    """From the cold start and from the prediction, a solver ends finite and no higher."""
    module.eval()
    a = some(data, "val")
    solver = LBFGS(30) if differentiable(module) else CMAES(30)
    for start in (module.initial(a), module(a).detach()):
        with draws(0, _CPU):
            solution = solver.solve(module, a, start)
        assert solution.b.shape == start.shape
        assert not (solution.status == Status.DIVERGED).any(), f"{type(solver).__name__} met values that are not finite"
        assert solution.value.isfinite().all()
        if not is_random(module, start, a):
            was = evaluate(module, start, a)
            most = was + 1e-5 * was.abs()
            assert (evaluate(module, solution.b, a) <= most).all()
            assert (solution.value <= most).all()


def declared_optimum_is_attained(module: AmortizedModule, data: ContextDataModule) -> None:
    """Where a problem with a gradient declares its true minimum: a solver gets there (in float64), and nothing is below it."""
    a = map_leaves(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, some(data, "val"))
    module.double().eval()
    problem: Any = module
    if not hasattr(problem, "optimum") or not differentiable(problem) or is_random(problem, problem.initial(a), a):
        return
    best = problem.optimum(a)
    if best is None:
        return
    assert best.shape == (num_rows(a),)
    family = problem.family_optimum(a) if hasattr(problem, "family_optimum") else best
    assert (family >= best).all(), "family_optimum is below optimum"
    solution = LBFGS(500).solve(module, a, module.initial(a))
    assert solution.converged.all(), "L-BFGS does not converge on every row"
    above = float((solution.value - family).detach().abs().max())
    assert above < 1e-6 * (1 + float(family.detach().abs().max())), (
        f"L-BFGS ends {above:.3g} from the declared optimum: where the solutions are a family that does not attain it, "
        "declare family_optimum too"
    )
    with torch.no_grad():
        for b in (module(a), torch.randn_like(solution.b)):
            assert (module.objective(b, a) >= best - 1e-9 * (1 + best.abs())).all(), "a value is below the optimum"


def copies_and_pickles(module: AmortizedModule, data: ContextDataModule) -> None:
    """Deep copies, pickles and reloaded weights are the same problem, and none holds on to the original."""
    module.eval()
    a = some(data, "val")
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    weights = torch.load(saved, weights_only=True)
    pickled, copied, loaded = pickle.loads(pickle.dumps(module)), copy.deepcopy(module), copy.deepcopy(module)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_state_dict(weights)
    # What the original becomes later is not theirs: a method bound to it would show here.
    found = _all_of(module, a)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    for kind, other in {"pickle": pickled, "deep copy": copied, "reloaded module": loaded}.items():
        for name, value in _all_of(other, a).items():
            assert torch.equal(value, found[name]), f"{name} of the {kind} differs from that of the original"


def _all_of(module: Any, a: Context) -> dict[str, Tensor]:
    """The prediction, its objective and, where it is declared, the optimum, with the same draws."""
    with draws(0, _CPU):
        b = module(a).detach()
        values: dict[str, Any] = {"prediction": b, "objective": evaluate(module, b, a)}
        if hasattr(module, "optimum"):
            values["optimum"] = module.optimum(a)
    return {name: value.detach() for name, value in values.items() if value is not None}


def contexts_are_a_function_of_seed_split_and_number(module: AmortizedModule, data: ContextDataModule) -> None:
    """Whatever was drawn before; and other seeds and numbers give others."""
    again = copy.deepcopy(data)
    for split, number in (("train", 5), ("train", 0), ("val", 0), ("test", 0)):
        torch.manual_seed(number)
        assert equal(data.batch(split, number), again.batch(split, number)), (
            f"{split} batch {number} differs when drawn anew"
        )
    assert not equal(data.batch("train", 0), data.batch("train", 1)), "training batches 0 and 1 are the same"


def splits_are_disjoint(module: AmortizedModule, data: ContextDataModule) -> None:
    """No context of training is evaluated."""
    rows = {}
    for split in ("train", "val", "test"):
        a = data.batch(split, 0)
        rows[split] = {tuple(row) for row in torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves(a)], 1).tolist()}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not rows[one] & rows[other], f"{one} and {other} share contexts"


def draws_a_picture(module: AmortizedModule, data: ContextDataModule) -> None:
    """Of one context, and of several, where the problem draws at all."""
    for n in (1, 6):
        a = take(some(data, "val"), slice(0, n))
        with torch.no_grad():
            figure = module.draw(a, {"network": module(a), "solver": module.initial(a)})
        if figure is not None:
            written = io.BytesIO()
            figure.savefig(written, format="png")
            assert written.tell() > 5000, f"the picture of {n} contexts is empty"


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        shapes,
        rows_do_not_mix,
        no_rows_are_no_fault,
        gradients_reach_every_parameter,
        training_lowers_the_loss,
        solver_never_worsens_a_row,
        declared_optimum_is_attained,
        copies_and_pickles,
        contexts_are_a_function_of_seed_split_and_number,
        splits_are_disjoint,
        draws_a_picture,
    )
}
"""By name: what a problem must keep."""
