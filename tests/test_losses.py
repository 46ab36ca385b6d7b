import pytest
import torch
from toy import Pair, Quadratic

from amortized import IterateLoss, ObjectiveLoss, ProblemError, RegressionLoss
from amortized.contract import num_rows, row_hashes
from amortized.losses.objective import LogObjectiveLoss
from amortized.solvers import LBFGS, GradientDescent, Solver


class Counting(LBFGS):
    """Counts the rows it is asked to solve."""

    rows = 0

    def solve(self, problem, a, b, **kwargs):
        Counting.rows += num_rows(a)
        return super().solve(problem, a, b, **kwargs)


@pytest.fixture(autouse=True)
def _start_counting():
    Counting.rows = 0


def test_objective_loss_is_the_objective_of_the_prediction():
    model, a = Quadratic(), torch.randn(6, 3)
    assert torch.equal(ObjectiveLoss()(model, a), model.objective(model(a), a))


def test_log_objective_loss_is_its_logarithm():
    model, a = Quadratic(), torch.randn(6, 3)
    value = model.objective(model(a), a)
    torch.testing.assert_close(LogObjectiveLoss()(model, a), value.log())


def test_iterate_loss_weighs_the_iterates():
    model, a = Quadratic(refine=GradientDescent(steps=2, lr=0.1)), torch.randn(6, 3)
    values = [model.objective(b, a) for b in model.iterates(a)]
    expected = (0.25 * values[0] + 0.5 * values[1] + values[2]) / 1.75
    assert torch.allclose(IterateLoss(decay=0.5)(model, a), expected)
    with pytest.raises(ValueError, match="decay must be in"):
        IterateLoss(decay=0)


def test_regression_to_solutions_in_the_data():
    class Known(Quadratic):
        def observe(self, a):
            return a.x

        def objective(self, b, a):
            return super().objective(b, a.x)

    model, a = Known(), Pair(torch.randn(6, 3), torch.randn(6, 3))
    assert torch.allclose(RegressionLoss(field="y")(model, a), (model(a) - a.y).square().mean(1))
    with pytest.raises(ProblemError, match="no field 'z'; it has x, y"):
        RegressionLoss(field="z")(model, a)


def test_regression_to_solutions_by_a_solver_solves_each_context_once(tmp_path):
    model, a = Quadratic(), torch.randn(6, 3)
    loss = RegressionLoss(solver=Counting(steps=50), cache=str(tmp_path / "solutions"))
    expected = (model(a) - 2 * a).square().mean(1)
    assert torch.allclose(loss(model, a), expected, atol=1e-4)
    mixed = torch.cat([a[2:4], torch.randn(2, 3), a[:1], a[:1]])
    assert torch.allclose(loss(model, mixed), (model(mixed) - 2 * mixed).square().mean(1), atol=1e-4)
    assert Counting.rows == 8
    again = RegressionLoss(solver=Counting(steps=50), cache=str(tmp_path / "solutions"))
    assert torch.allclose(again(model, mixed), loss(model, mixed))
    assert Counting.rows == 8  # from the disk


def test_a_cache_of_another_objective_is_refused(tmp_path):
    a = torch.randn(6, 3)
    RegressionLoss(solver=LBFGS(), cache=str(tmp_path))(Quadratic(), a)

    class Other(Quadratic):
        def objective(self, b, a):
            return super().objective(b, a - 1)

    with pytest.raises(ProblemError, match="of another objective"):
        RegressionLoss(solver=LBFGS(), cache=str(tmp_path))(Other(), a)


def test_rows_hash_by_their_bytes():
    a = torch.randn(1000, 4)
    pair = Pair(a, a.flip(0))
    assert len(row_hashes(pair).unique()) == 1000
    assert torch.equal(row_hashes(pair)[:10], row_hashes(Pair(a[:10], a.flip(0)[:10])))
    assert not torch.equal(row_hashes(pair), row_hashes(Pair(a.flip(0), a)))


def test_a_new_loss_needs_nothing_of_the_core():
    class Worst(ObjectiveLoss):
        def __call__(self, model, a):
            return super().__call__(model, a).max().expand(len(a))

    model = Quadratic(loss=Worst())
    assert model.amortized_step(torch.randn(5, 3)).unique().numel() == 1


def test_solver_is_abstract():
    with pytest.raises(TypeError):
        Solver()
