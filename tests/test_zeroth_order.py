"""Losses that know the objective by its values alone, black boxes, and the problem that shows them."""

import warnings

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.distributions import Independent, Normal, OneHotCategorical
from toy import Quadratic

from amortized import AmortizedModule, ContextDataModule, HardContexts, ObjectiveLoss, ProblemError, RegressionLoss
from amortized.callbacks import GapMonitor
from amortized.certificates.conformal import squared_gradient
from amortized.contract import check_objective, differentiable
from amortized.evaluation.budget import default_rivals
from amortized.losses import ScoreFunctionLoss, ZerothOrderLoss
from amortized.networks import MLP
from amortized.problems import BlackBoxInventory, Inventory, InventoryContexts
from amortized.problems.inventory import Chain, simulate
from amortized.solvers import CMAES, LBFGS, Adam, GradientDescent, MultiStart, solver_for


class Fixed(Quadratic):
    """Predicts one point for every context; ``L`` may be replaced."""

    def __init__(self, b, value=None):
        super().__init__()
        self.b, self.value = nn.Parameter(b), value

    def iterates(self, a):
        return [self.b.expand(len(a), -1)]

    def objective(self, b, a):
        return self.value(b) if self.value else super().objective(b, a)


def gradients(loss, value, b, rows):
    """Many independent estimates of a gradient, ``(rows, n)``."""
    model, a = Fixed(b, value), torch.zeros(rows, 3)
    at = b.expand(rows, -1).clone().requires_grad_()
    model.iterates = lambda a: [at]
    signal = loss(model, a)
    signal.sum().backward()
    return at.grad, signal


LOSSES = {
    "pairs": ZerothOrderLoss(0.5, 8),
    "independent": ZerothOrderLoss(0.5, 8, antithetic=False),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_estimate_is_the_gradient_of_the_smoothed_objective(loss):
    """Of a cubic and of a step, whose smoothed gradients are known in closed form."""
    torch.manual_seed(0)
    b = torch.tensor([0.3, -0.2, 0.1])
    found, signal = gradients(loss, lambda x: x.pow(3).sum(1), b, 40_000)
    expected = 3 * b.square() + 3 * 0.25  # of E (b + sigma u)^3 = b^3 + 3 sigma^2 b
    error = found.std(0) / 200
    assert ((found.mean(0) - expected).abs() < 4 * error).all()
    assert signal.mean().item() == pytest.approx(float((b**3 + 0.75 * b).sum()), abs=0.02)
    found, _ = gradients(loss, lambda x: (x[:, 0] > 0).float(), b, 40_000)
    density = Normal(0.0, 1.0).log_prob(b[0] / 0.5).exp() / 0.5
    assert found[:, 0].mean().item() == pytest.approx(float(density), abs=4 * float(found[:, 0].std()) / 200)
    assert found[:, 1:].mean(0).abs().max() < 4 * found.std(0).max() / 200


def test_noise_is_what_the_docstring_says():
    """Of a linear objective far above zero: (n + 1) |g|^2 / pairs, and half of it from as many independent samples."""
    torch.manual_seed(0)
    slope, b = torch.tensor([1.0, 2.0, -2.0]), torch.zeros(3)
    for loss, expected in ((LOSSES["pairs"], 4 * 9 / 4), (LOSSES["independent"], 4 * 9 / 8)):
        found, _ = gradients(loss, lambda x: 1000 + x @ slope, b, 20_000)
        torch.testing.assert_close(found.mean(0), slope, atol=0.1, rtol=0)
        assert float(found.var(0).sum()) == pytest.approx(expected, rel=0.3)
    curved = {
        name: gradients(loss, lambda x: x.square().sum(1), b, 4000)[0].var(0).sum() for name, loss in LOSSES.items()
    }
    assert curved["pairs"] < 1e-6 < 0.1 < curved["independent"]


def test_score_function_of_a_normal_policy_is_gaussian_smoothing():
    class Policy(Fixed):
        def policy(self, b, a):
            return Independent(Normal(b, 0.5), 1)

    a, b = torch.zeros(6, 3), torch.tensor([0.3, -0.2, 0.1])
    found = []
    for loss in (ScoreFunctionLoss(8), LOSSES["independent"]):
        model = Policy(b.clone(), lambda x: x.pow(3).sum(1))
        torch.manual_seed(0)
        loss(model, a).mean().backward()
        found.append(model.b.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ProblemError, match=r"needs Fixed\.policy\(b, a\), a distribution of solutions; without one, Zeroth"
    ):
        ScoreFunctionLoss()(Fixed(b), a)
    Policy.policy = lambda self, b, a: Normal(b, 0.5)
    with pytest.raises(
        ProblemError, match=r"must have batch shape \(6,\) and samples of shape \(6, 3\); they are \(6, 3\)"
    ):
        ScoreFunctionLoss()(Policy(b), a)


class Choice(AmortizedModule):
    """Which of four numbers is the least: the objective takes the largest logit's."""

    differentiable = False

    def objective(self, b, a):
        return a.gather(1, b.argmax(1, keepdim=True)).squeeze(1)

    def policy(self, b, a):
        return OneHotCategorical(logits=b)


class Numbers(ContextDataModule):
    def sample(self, n, generator):
        return torch.randn(n, 4, generator=generator)


def fit(model, data, steps, **settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(max_steps=steps, accelerator="cpu", limit_val_batches=0, **quiet, **settings).fit(model, data)


def test_a_discrete_choice_is_learned():
    torch.manual_seed(0)
    model = Choice(MLP(4, 4, [32]), loss=ScoreFunctionLoss(8), optimizer=lambda p: torch.optim.Adam(p, 0.01))
    fit(model, Numbers(batch_size=128), 200)
    a = Numbers().contexts("test")
    with torch.no_grad():
        right = (model(a).argmax(1) == a.argmin(1)).float().mean()
    assert right > 0.9


def inventory(kind, loss=None):
    torch.manual_seed(0)
    return kind(MLP(9, 3, [32]), courses=8, periods=20, warm_up=4, loss=loss)


def test_bad_settings_are_refused():
    for settings, told in (
        ({"sigma": 0}, "sigma must be positive; got 0"),
        ({"samples": 3}, "even and at least 2; got 3"),
    ):
        with pytest.raises(ValueError, match=told):
            ZerothOrderLoss(**settings)
    with pytest.raises(ValueError, match="samples must be at least 2; got 1"):
        ScoreFunctionLoss(1)
    with pytest.raises(ValueError, match="warm_up must be less than periods; got 9 and 9"):
        Inventory(MLP(9, 3), periods=9, warm_up=9)


@pytest.mark.parametrize("loss", [ObjectiveLoss(), HardContexts()])
def test_a_black_box_is_not_trained_by_gradients(loss):
    with pytest.raises(
        ProblemError, match=rf"{type(loss).__name__} follows .* \(differentiable = False\): --model.loss Zeroth"
    ):
        inventory(BlackBoxInventory, loss).check(InventoryContexts().batch("train", 0))
    inventory(BlackBoxInventory, RegressionLoss(field="penalty")).check(InventoryContexts().batch("train", 0))
    inventory(BlackBoxInventory, HardContexts(ZerothOrderLoss())).check(InventoryContexts().batch("train", 0))


def test_who_does_not_say_so_is_told():
    """Of a gradient that is cut, an error; of one that is zero everywhere, a warning."""
    a = InventoryContexts().batch("train", 0)

    class Cut(Inventory):
        def objective(self, b, a):
            return super().objective(b.detach(), a)

    class Rounded(Inventory):
        def base_stock(self, b, a):
            return super().base_stock(b, a).round()

    with pytest.raises(ProblemError, match="no gradient reaches it.* say `differentiable = False`"):
        inventory(Cut).check(a)
    with pytest.warns(UserWarning, match=r"gradient of Rounded\.objective is zero in every row"):
        inventory(Rounded).check(a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inventory(Inventory).check(a)
        inventory(BlackBoxInventory, ZerothOrderLoss()).check(a)


def test_a_black_box_that_mixes_rows_is_refused():
    class Mixing(BlackBoxInventory):
        def objective(self, b, a):
            return super().objective(b + b.mean(), a)

    a = InventoryContexts().batch("train", 0)
    with pytest.raises(ProblemError, match="changes with the other rows"):
        check_objective(inventory(Mixing), torch.randn(len(a.demand), 3), a)


def test_solvers_that_follow_gradients_refuse_a_black_box():
    model = inventory(BlackBoxInventory)
    assert not differentiable(model)
    assert isinstance(solver_for(model), CMAES)
    assert list(default_rivals(model, CMAES())) == ["CMAES"]
    for solver in (LBFGS(), Adam(), MultiStart(LBFGS()), GradientDescent(2)):
        with pytest.raises(TypeError, match=r"follows gradients, and BlackBoxInventory has none .*: use CMAES"):
            solver.require(model)
    a = InventoryContexts(num_test=4).contexts("test")
    MultiStart(CMAES(3)).solve(model, a, model.initial(a))
    assert not squared_gradient(model, model.initial(a), a).any()


def test_the_twin_is_the_same_simulation():
    """Of whole base stocks; and one stage of unlimited capacity is a newsvendor, whose cost is a sum."""
    a = InventoryContexts(num_test=16).contexts("test")
    black_box, twin = inventory(BlackBoxInventory), inventory(Inventory)
    b = torch.randn(16, 3)
    whole = black_box.decode(b, a)
    course = twin.course(a)
    torch.testing.assert_close(simulate(whole, course, *a[1:], warm_up=4).mean(1), black_box.objective(b, a))
    plenty = torch.full((16, 3), 1e4)
    stock = torch.cat([whole[:, :1], plenty[:, 1:]], 1)
    free = a.holding * torch.tensor([1.0, 0.0, 0.0])
    left = whole[:, :1, None] - course
    newsvendor = (free[:, :1, None] * left.clip(min=0) + a.penalty[:, :, None] * (-left).clip(min=0))[:, :, 4:].mean(
        (1, 2)
    )
    torch.testing.assert_close(simulate(stock, course, plenty, free, a.penalty, warm_up=4).mean(1), newsvendor)


def test_the_gradient_of_the_twin_is_that_of_its_differences():
    a = InventoryContexts(num_test=8).contexts("test")
    a = Chain(*(leaf.double() for leaf in a))
    twin = inventory(Inventory).double()
    b = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(twin.objective(b, a).sum(), b)
    for j in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[j] = 1e-6
        slope = (twin.objective(b + step, a) - twin.objective(b - step, a)) / 2e-6
        torch.testing.assert_close(grad[:, j], slope.detach(), atol=1e-5, rtol=1e-4)


def test_values_alone_teach_what_gradients_teach():
    """The black box trained by its values is within 5 % of the same network trained by gradients of the twin."""
    data = InventoryContexts(batch_size=64, num_test=256)
    a, cost = data.contexts("test"), {}
    judge = inventory(BlackBoxInventory)
    for kind, loss in ((BlackBoxInventory, ZerothOrderLoss(0.3, 8)), (Inventory, ObjectiveLoss())):
        model = inventory(kind, loss)
        model.optimizer = lambda p: torch.optim.Adam(p, 0.01)
        with torch.no_grad():
            before = judge.objective(model(a), a).mean()
        fit(model, data, 120)
        with torch.no_grad():
            cost[kind] = judge.objective(model(a), a).mean()
        assert cost[kind] < 0.5 * before
    assert cost[BlackBoxInventory] < 1.05 * cost[Inventory]


def test_the_gap_of_a_black_box_is_measured_against_cma_es():
    model, data = inventory(BlackBoxInventory, ZerothOrderLoss(0.3, 8)), InventoryContexts(batch_size=16, num_test=32)
    monitor = GapMonitor(CMAES(30, tol=0.1))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", callbacks=[monitor], **quiet).test(model, data, verbose=False)
    assert monitor.results["mean"] > 0
    assert monitor.results["total"] == 32
