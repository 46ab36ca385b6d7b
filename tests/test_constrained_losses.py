"""Losses of constrained problems: what they are at known points, and where training by them ends."""

import pytest
import torch
from torch import nn

from amortized import AmortizedModule
from amortized.contract import Polyhedron, ProblemError, bounded, violation
from amortized.losses import FixedPointLoss, KKTLoss, PenaltyLoss, PrimalDualLoss
from amortized.networks import MLP
from amortized.solvers import AugmentedLagrangian


class Nearest(AmortizedModule):
    """``½ ‖b − a‖²`` on the line ``b_1 + b_2 = 1`` where ``b_1 ≤ 0.8``; the multipliers are known."""

    def __init__(self, **kwargs):
        super().__init__(MLP(2, 2, [64, 64], "silu"), **kwargs)

    def objective(self, b, a):
        return (b - a).square().sum(1) / 2

    def equality(self, b, a):
        return b.sum(1, keepdim=True) - 1

    def inequality(self, b, a):
        return b[:, :1] - 0.8

    def truth(self, a):
        first = ((a[:, 0] - a[:, 1] + 1) / 2).clamp(max=0.8)
        b = torch.stack([first, 1 - first], 1)
        line = a[:, 1] - b[:, 1]
        return b, torch.stack([line, a[:, 0] - b[:, 0] - line], 1)


class Exact(Nearest):
    """Which predicts the solution and its multipliers."""

    def iterates(self, a):
        return [self.truth(a)[0].requires_grad_()]

    def dual(self, a):
        return self.truth(a)[1]


def contexts(n=64):
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(0)) * 2 - 0.5


def trained(model, steps, lr=3e-3):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    a = contexts(128)
    for _ in range(steps):
        optimizer.zero_grad()
        model.amortized_step(a).mean().backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return a


def test_the_known_multipliers_are_those_of_the_solver():
    model, a = Exact(), contexts().double()
    found = AugmentedLagrangian(tol=1e-9).solve(model, a, torch.zeros_like(a))
    b, y = model.truth(a)
    torch.testing.assert_close(found.b, b, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.dual, y, atol=1e-5, rtol=0)


def test_penalties_are_what_they_say_and_weigh_each_constraint():
    model, a = Nearest(), contexts()
    b = model(a)
    c, d = model.equality(b, a), model.inequality(b, a).clamp(min=0)
    value = model.objective(b, a)
    torch.testing.assert_close(PenaltyLoss(3.0)(model, a), value + 3 * (c.square() + d.square())[:, 0])
    torch.testing.assert_close(PenaltyLoss([2.0, 5.0], 1)(model, a), value + (2 * c.abs() + 5 * d)[:, 0])
    with pytest.raises(ProblemError, match="3 weights, the problem 2 constraints"):
        PenaltyLoss([1.0, 1.0, 1.0])(model, a)
    with pytest.raises(ValueError, match="norm must be 1 or 2"):
        PenaltyLoss(norm=3)


@pytest.mark.parametrize("loss", [KKTLoss(), PrimalDualLoss(rho=0.7)], ids=["KKT", "primal-dual"])
def test_at_solution_and_multipliers_there_is_nothing_left_to_learn(loss):
    model, a = Exact(loss=loss), contexts()
    value = model.amortized_step(a)
    b, y = model.truth(a)
    if isinstance(loss, KKTLoss):
        assert value.abs().max() < 1e-10
    else:  # the augmented Lagrangian is the optimum and ‖y‖² / 2ρ
        torch.testing.assert_close(value, model.objective(b, a) + y.square().sum(1) / 1.4)
    predicted = model.truth(a)[0].requires_grad_()
    model.iterates = lambda a: [predicted]
    (slope,) = torch.autograd.grad(model.amortized_step(a).sum(), predicted)
    assert slope.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("loss", "off", "missed"),
    [
        (PenaltyLoss(1.0), 0.25, 0.25),
        (PrimalDualLoss(rho=2.0, every=200, largest=20), 0.03, 0.03),
        (KKTLoss(), 0.06, 0.05),
    ],
    ids=["penalty", "primal-dual", "KKT"],
)
def test_training_ends_at_the_solution_and_the_multipliers(loss, off, missed):
    torch.manual_seed(0)
    multipliers = None if isinstance(loss, PenaltyLoss) else MLP(2, 2, [64, 64], "silu")
    model = Nearest(loss=loss, multipliers=multipliers)
    a = trained(model, 1000)
    with torch.no_grad():
        b, y = model.truth(a)
        found, dual = model(a), model.dual(a)
        assert (found - b).norm(dim=1).mean() < off
        mean = violation(model, found, a).mean()
        assert mean < missed
        if multipliers is None:
            assert mean > 0.01  # a penalty of this size is always outside
            assert dual is None
        else:
            assert (dual - y).norm(dim=1).mean() < 2 * off


def test_the_penalty_grows_with_the_calls_of_training_alone():
    loss = PrimalDualLoss(rho=1.0, growth=2.0, every=2, largest=3.0)
    model, a = Nearest(loss=loss, multipliers=MLP(2, 2)), contexts(4)
    sizes = []
    for _ in range(5):
        with torch.no_grad():
            loss(model, a)  # does not count
        sizes.append(float(loss(model, a).detach().sum()))
    assert int(loss.calls) == 5
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3] < sizes[4]
    again = PrimalDualLoss(rho=1.0, growth=2.0, every=2, largest=3.0)
    again.load_state_dict(loss.state_dict())
    assert int(again.calls) == 5


@pytest.mark.parametrize("loss", [KKTLoss(), PrimalDualLoss()], ids=["KKT", "primal-dual"])
def test_without_multipliers_the_message_says_what_to_write(loss):
    with pytest.raises(
        ProblemError, match="each of the 2 constraints, and the model predicts none: .*--model.multipliers MLP"
    ):
        Nearest(loss=loss).amortized_step(contexts())
    with pytest.raises(ProblemError, match="the model predicts 5"):
        Nearest(loss=loss, multipliers=nn.Linear(2, 5)).amortized_step(contexts())


def _both(rank, folder):
    """One of two processes: its own contexts, the same model."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Nearest(loss=PrimalDualLoss(every=2), multipliers=MLP(2, 2, [8]))
    parallel = nn.parallel.DistributedDataParallel(Signal(model))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for k in range(5):
        optimizer.zero_grad()
        parallel(torch.rand(8, 2, generator=torch.Generator().manual_seed(2 * k + rank))).mean().backward()
        optimizer.step()
    torch.save({**model.multipliers.state_dict(), **model.loss.state_dict()}, f"{folder}/{rank}.pt")
    # The last holder of a process group ends its thread, and only destroy_process_group lets go of the interpreter's lock
    # for that: the other order can wait for ever.
    del parallel
    torch.distributed.destroy_process_group()


class Signal(nn.Module):
    """A model's loss as its forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, a):
        return self.model.amortized_step(a)


def test_two_processes_have_the_same_multipliers_and_the_same_penalty(tmp_path):
    torch.multiprocessing.start_processes(_both, (str(tmp_path),), nprocs=2, start_method="fork")
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert int(one["calls"]) == 5
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_constraints_in_one_form():
    class Flat:
        def objective(self, b, a):
            return b.sum(1)

        def polyhedron(self, a):
            return Polyhedron(torch.eye(2), torch.tensor([[0.0, -1.0]]).expand(len(a), -1), torch.ones(len(a), 2))

    b = torch.tensor([[-0.5, 3.0], [0.5, 0.5]])
    v = bounded(Flat(), b, b)
    assert torch.equal(v.outside, torch.tensor([[0.5, 2.0], [0.0, 0.0]]))
    assert torch.equal(v.nearest(1.0), torch.tensor([[0.5, 1.0], [1.0, 1.0]]))
    crossed = v._replace(lower=v.upper + 1, value=v.upper + 1)
    assert (crossed.outside == 1).all()

    class Free:
        def objective(self, b, a):
            return b.sum(1)

    with pytest.raises(ProblemError, match="Free has no constraints"):
        bounded(Free(), b, b)


def test_fixed_point_residual_after_a_few_applications():
    class Halving(Nearest):
        def update(self, b, a):
            return b / 2 + a

    model, a = Halving(loss=FixedPointLoss(3)), contexts()
    residual = (model(a) / 2 - a).square().sum(1)  # at the prediction; each application halves it
    torch.testing.assert_close(model.amortized_step(a), residual / 4**3)
    with pytest.raises(ProblemError, match="needs Nearest to have a map"):
        Nearest(loss=FixedPointLoss()).amortized_step(a)
