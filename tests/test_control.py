"""Control: programs and paths are what they say, plans keep their limits, and the loop is closed as it should be."""

import json
import math

import pytest
import torch
from lightning import Trainer

from amortized.callbacks import GapMonitor
from amortized.cli.app import main
from amortized.contract import violation
from amortized.networks import MLP
from amortized.problems import (
    CartPole,
    ChainStates,
    ClosedLoop,
    DoubleIntegrator,
    IntegratorStates,
    MassChain,
    Pendulum,
    Policy,
    Sphere,
    SwingUp,
    SystemStates,
)
from amortized.problems.control import LinearControl, SpeedLimit, receding_horizon
from amortized.problems.control.chain import chain
from amortized.problems.control.closed_loop import planners
from amortized.solvers import ADMM, Box, Gauge, Sequence

SYSTEMS = [Pendulum, CartPole]


def integrator(**kwargs):
    torch.manual_seed(0)
    return DoubleIntegrator(MLP(2, 20), refine=Sequence([SpeedLimit(), Gauge()]), **kwargs)


def masses(**kwargs):
    torch.manual_seed(0)
    return MassChain(MLP(8, 60), refine=Sequence([Box(-1, 1), Gauge()]), **kwargs)


def states(n=256, **kwargs):
    return IntegratorStates(num_test=n, **kwargs).contexts("test")


def possible(problem, a):
    return ~ADMM(tol=1e-7).solve(problem, a, problem.initial(a)).infeasible


def along(problem, b, a):
    """The costs of the moves of a plan, one after another."""
    x, total = a, 0
    for u in problem.controls(b, a).unbind(1):
        total = total + problem.cost(x, u)
        x = problem.step(x, u)
    return total, x


@pytest.mark.parametrize("problem", [integrator(), masses(), *(SwingUp(MLP(2, 60), make()) for make in SYSTEMS)])
def test_the_objective_is_the_cost_of_all_moves(problem):
    torch.manual_seed(1)
    linear = isinstance(problem, LinearControl)
    a = torch.rand(5, len(problem.dynamics) if linear else len(problem.system.names)) - 0.5
    b = torch.randn_like(problem.initial(a))
    total, end = along(problem, b, a)
    torch.testing.assert_close(problem.objective(b, a), total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(problem.states(b, a)[:, -1], end, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("problem", "limits"), [(integrator(), [5.0, 2.0]), (masses(), [2.0] * 8)])
def test_the_program_is_the_objective_but_for_the_cost_of_doing_nothing(problem, limits):
    a = torch.rand(8, len(limits)) - 0.5
    b = torch.randn_like(problem.initial(a))
    p = problem.program(a)
    value = (b @ p.P * b).sum(1) / 2 + (p.q * b).sum(1)
    torch.testing.assert_close(problem.objective(b, a) - problem.objective(0 * b, a), value, rtol=1e-3, atol=1e-3)
    pushed = torch.maximum(p.lower - b @ p.A.mT, b @ p.A.mT - p.upper)[:, b.shape[1] :].unflatten(1, (20, -1))
    beyond = problem.states(b, a).abs() - torch.tensor(limits)
    torch.testing.assert_close(pushed, beyond, rtol=1e-4, atol=1e-4)


def test_every_plan_keeps_all_limits_where_any_plan_does():
    problem, a = integrator(), states(1024)
    can = possible(problem, a)
    x, v = a.abs().unbind(1)
    assert 0.9 < can.float().mean() < 0.97
    heading = torch.where(a[:, 0] * a[:, 1] > 0, x, -x)
    assert (v[~can].square() / 2 > 0.98 * (5 - heading[~can])).all()  # what cannot be stopped before the wall
    p = problem.program(a)
    ax = problem.interior(a) @ p.A.mT
    assert (torch.minimum(p.upper - ax, ax - p.lower).amin(1) > 0)[can].all()
    for scale in (1, 30):
        b = problem.refine.iterates(problem, a, scale * torch.randn(1024, 20))
        assert violation(problem, list(b)[-1], a)[can].max() < 1e-5


def test_every_plan_for_a_chain_keeps_all_limits():
    problem, a = masses(), ChainStates(num_test=4096).contexts("test")
    p, inside = problem.program(a), problem.interior(a)
    ax = inside @ p.A.mT
    assert torch.minimum(p.upper - ax, ax - p.lower).amin() > 1e-4
    for scale in (1, 30):
        *_, b = problem.refine.iterates(problem, a, scale * torch.randn_like(inside))
        assert violation(problem, b, a).max() < 1e-5
    few = ADMM(tol=1e-7).solve(problem, a[:256], problem.initial(a[:256]))
    assert few.converged.all()
    pushed = problem.states(few.b, a[:256]).abs().flatten(1).amax(1)
    assert (pushed > 2 - 1e-4).any()  # displacements and velocities are limits too, not tensions alone
    assert (few.value < problem.objective(inside[:256], a[:256])).all()


def test_a_plant_is_exact_to_double_precision():
    plant = DoubleIntegrator(MLP(2, 20)).plant
    assert plant.push.tolist() == [[0.2**2 / 2], [0.2]]
    assert plant.dynamics.tolist() == [[1.0, 0.2], [0.0, 1.0]]


def test_a_chain_is_four_masses_and_five_springs():
    """Without tension it swings for ever; a tension moves two neighbours apart or together, and no other at first."""
    (dynamics, _), (_, push) = chain(4, 0.5), chain(4, 1e-3)
    x = torch.randn(8, dtype=torch.float64)

    def energy(x):
        stretch = torch.cat([x.new_zeros(1), x[:4], x.new_zeros(1)]).diff()
        return float(stretch.square().sum() + x[4:].square().sum()) / 2

    at = [x]
    for _ in range(200):
        at.append(dynamics @ at[-1])
    assert max(map(energy, at)) - min(map(energy, at)) < 1e-9 * energy(x)
    expected = 1e-3 * torch.tensor([[1, 0, 0], [-1, 1, 0], [0, -1, 1], [0, 0, -1]], dtype=torch.float64)
    torch.testing.assert_close(push[4:], expected, rtol=0, atol=1e-8)


def test_a_speed_limit_leaves_alone_what_keeps_it():
    problem, a = integrator(), states(64)
    a = a[possible(problem, a)]
    b = SpeedLimit().correct(problem, a, 3 * torch.randn(len(a), 20))
    assert b.abs().max() < 1 + 1e-5
    assert problem.states(b, a)[:, :, 1].abs().max() < 2 + 1e-5
    torch.testing.assert_close(SpeedLimit().correct(problem, a, b), b, rtol=0, atol=1e-5)
    with pytest.raises(TypeError, match="SpeedLimit is for plans of a DoubleIntegrator; got Sphere"):
        SpeedLimit().require(Sphere(MLP(16, 3)))


def test_states_without_a_plan_are_counted_apart():
    problem, data = integrator(), IntegratorStates(num_test=256, eval_batch_size=256)
    can = possible(problem, data.contexts("test"))
    monitor = GapMonitor(ADMM(tol=1e-7))
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[monitor])
    trainer.test(problem, data, verbose=False)
    a = data.contexts("test")[can]
    with torch.no_grad():
        gap = problem.objective(problem(a), a) - ADMM(tol=1e-7).solve(problem, a, problem.initial(a)).value
    assert monitor.results["mean"] == pytest.approx(float(gap.mean()), rel=1e-3)
    assert int(monitor.table.impossible.sum()) == int((~can).sum()) > 0


def test_a_wider_box_has_more_states_without_a_plan():
    a = states(scale=2)
    assert a.abs().amax(0).gt(torch.tensor([9.0, 3.6])).all()
    assert possible(integrator(), a).float().mean() < 0.5


@pytest.mark.parametrize("make", SYSTEMS)
def test_a_policy_gives_the_cheapest_of_its_proposals(make):
    torch.manual_seed(0)
    system = make()
    problem = SwingUp(Policy(system, horizon=30, proposals=3, hidden=[16]), system, horizon=30)
    a = SystemStates(system, num_test=16).contexts("test")
    plans, costs = problem.network._rolled(a.repeat_interleave(3, 0))
    torch.testing.assert_close(problem.objective(plans, a.repeat_interleave(3, 0)), costs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(problem.objective(problem(a), a), costs.view(16, 3).amin(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", SYSTEMS)
def test_a_residual_policy_begins_with_the_rule(make):
    torch.manual_seed(0)
    system = make()
    problem = SwingUp(Policy(system, proposals=2, hidden=[8], residual=True), system)
    a = SystemStates(system, num_test=16).contexts("test")
    with torch.no_grad():
        problem.network.mlp[-1].weight.zero_()
        problem.network.mlp[-1].bias.zero_()
    torch.testing.assert_close(problem(a), problem.initial(a), rtol=1e-4, atol=1e-4)


def test_a_policy_learns_through_the_model():
    """The gradient of the first layer is that of finite differences."""
    torch.manual_seed(0)
    problem = SwingUp(Policy(horizon=20, proposals=1, hidden=[8]), horizon=20).double()
    a = SystemStates(num_test=4).contexts("test").double()
    weight = problem.network.mlp[0].weight
    value = problem.objective(problem(a), a).sum()
    (slope,) = torch.autograd.grad(value, weight)
    with torch.no_grad():
        weight[2, 1] += 1e-6
        moved = problem.objective(problem(a), a).sum()
    assert float(moved - value) / 1e-6 == pytest.approx(float(slope[2, 1]), rel=1e-3)


def test_a_pendulum_hangs_falls_and_keeps_its_energy():
    system, none = Pendulum(), torch.zeros(1, 1)
    hanging = torch.tensor([[math.pi, 0.0]])
    torch.testing.assert_close(system.step(hanging, none), hanging, atol=1e-5, rtol=0)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    energy = []
    for _ in range(200):
        x = system.step(x, none.double())
        energy.append(float(x[0, 1] ** 2 / 2 + 15 * x[0, 0].cos()))
    assert max(energy) - min(energy) < 0.15 * 30  # a symplectic step: it does not drift
    assert abs(sum(energy[:100]) - sum(energy[100:])) / 100 < 1


@pytest.mark.parametrize("make", SYSTEMS)
def test_solvers_start_from_a_rule_that_swings_up(make):
    system = make()
    problem = SwingUp(MLP(len(system.names), 200), system, horizon=200)
    a = SystemStates(system, num_test=64).contexts("test")
    b = problem.initial(a)
    upright = problem.states(b, a)[:, :, system.angles[0]].cos() > 0.95
    assert upright.any(1).float().mean() > 0.9
    assert (problem.objective(b, a) < problem.objective(0 * b, a)).float().mean() > 0.9


def test_forces_are_within_the_limit():
    problem = SwingUp(MLP(2, 60))
    a = SystemStates(num_test=8).contexts("test")
    assert problem.decode(100 * torch.randn(8, 60), a).abs().max() <= 2


def test_a_closed_loop_makes_the_first_move_of_every_plan():
    problem, a = integrator(), states(32)
    a = a[possible(problem, a)]
    found = receding_horizon(problem, lambda x: torch.full((len(x), 20), 0.5), a, 3)
    total, end = along(problem, torch.full((len(a), 3), 0.5), a)
    torch.testing.assert_close(found.cost, total)
    torch.testing.assert_close(found.states[:, -1], end)
    run = receding_horizon(problem, planners(problem, ADMM(tol=1e-7))["solver"], a, 40)
    assert run.violation.max() < 1e-5
    assert run.states[:, -1].abs().max() < 0.1
    with pytest.raises(ValueError, match="steps must be positive"):
        receding_horizon(problem, problem, a, 0)


def test_the_callback_needs_a_problem_of_control():
    with pytest.raises(TypeError, match="ClosedLoop measures a problem of control: Sphere has no controls, step"):
        ClosedLoop().setup(None, Sphere(MLP(16, 3)), "test")
    for wrong in ({"steps": 0}, {"contexts": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            ClosedLoop(**wrong)


@pytest.mark.parametrize("recipe", ["mpc_double_integrator", "mpc_chain", "pendulum_swingup", "cartpole_swingup"])
def test_the_loop_is_in_the_report(recipe, tmp_path):
    small = ["--data.init_args.num_test=8", "--data.init_args.num_val=8", "--budget.enabled=false"]
    small += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false"]
    small += ["--data.init_args.evaluations=null"]
    if recipe.endswith("swingup"):
        small += ["--gap.solver.init_args.starts=2", "--gap.solver.init_args.solver.init_args.steps=3"]
        loop = "{class_path: ClosedLoop, init_args: {steps: 3, solver: {class_path: LBFGS, init_args: {steps: 2}}}}"
    else:
        loop = "{class_path: ClosedLoop, init_args: {steps: 3}}"
    main(["fit", "-c", recipe, f"--run_folder={tmp_path}", *small, f"--trainer.callbacks=[{loop}]"])
    found = json.loads((tmp_path / "results.json").read_text())["closed_loop"]
    assert found["contexts"] + found["impossible"] == 8
    assert {"cost", "violation", "milliseconds"} == found["network"].keys()
    assert found["solver"]["cost"] > 0
    assert found["solver_from_the_network"]["violation"] < 1e-5
    assert (tmp_path / "pictures" / "closed_loop.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntegratorStates(scale=0), "scale must be positive"),
        (lambda: SystemStates(scale=-1), "scale must be positive"),
        (lambda: DoubleIntegrator(MLP(2, 20), horizon=0), "horizon must be positive"),
        (lambda: Policy(proposals=0), "proposals and horizon must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
