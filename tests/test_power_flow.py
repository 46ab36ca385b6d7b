"""Optimal power flow: the published optima, completion of the network's dispatch, and its limits."""

import pytest
import torch

from amortized.contract import violation
from amortized.problems import OperatingPoint, PowerFlow, PowerFlowContexts, PowerFlowLoss
from amortized.problems.constrained.power_flow_cases import Grid, case_names
from amortized.solvers import Completion, InteriorPoint

PUBLISHED = {"case14": 8081.53, "case30": 576.89, "case57": 41737.79, "case118": 129660.69}
"""$/h, of MATPOWER's manual and its runs."""


def problem(case="case14", **kwargs):
    torch.manual_seed(0)
    return PowerFlow(OperatingPoint(case, [16]), case, **kwargs)


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_optimum_of_the_case_is_the_published_one(case):
    module = problem(case)
    b, a = module.nominal()
    assert abs(float(module.objective(b, a)) - PUBLISHED[case]) < 0.01
    assert float(violation(module, b, a)) < 1e-5  # of numbers with eight digits
    assert len(module.dependent) == 2 * module.grid.buses


def test_the_interior_point_finds_it_from_the_flat_start():
    module = problem("case30")
    b, a = module.nominal()
    found = InteriorPoint(tol=1e-8).solve(module, a, module.initial(a))
    assert found.converged.all()
    torch.testing.assert_close(found.value, module.objective(b, a), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.b, b, rtol=0, atol=1e-3)


def test_ten_rows_of_fourteen_buses_converge_in_a_few_rounds():
    module, a = problem(), PowerFlowContexts(num_val=10).contexts("val")
    found = InteriorPoint().solve(module, a, module.initial(a))
    assert found.converged.all()
    assert found.iterations.max() < 20
    assert (found.violation < 1e-4).all()


@pytest.mark.parametrize("case", ["case14", "case30"])
def test_completed_predictions_are_in_balance_and_corrected_ones_within_limits(case):
    module = problem(case, refine=Completion(corrections=5)).eval()
    a = PowerFlowContexts(case, num_val=16).contexts("val")
    with torch.no_grad():
        first, completed, corrected = module.iterates(a)
    assert (module.equality(first, a).abs().amax(1) > 1e-2).all()
    for b in (completed, corrected):
        assert module.equality(b, a).abs().max() < 5e-5
    possible = 16 if case == "case14" else 10  # of case30's rows some have no feasible dispatch
    assert (violation(module, corrected, a) <= 1e-4).sum() >= possible
    assert (violation(module, completed, a) <= 1e-4).sum() < possible


def test_the_gradient_of_the_loss_is_that_of_the_completed_dispatch():
    module = problem(refine=Completion(steps=40, tol=1e-12), loss=PowerFlowLoss(start=0.0)).double()
    a = PowerFlowContexts(num_val=2).contexts("val")
    a = a._replace(p=a.p.double(), q=a.q.double())
    bias = module.network.mlp[-1].bias
    (grad,) = torch.autograd.grad(module.amortized_step(a).sum(), bias)
    for k in (1, 10 + 13, 10 + 13 + 2):  # a generator's power, a voltage at the slack, one at another generator
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[k] += sign * 1e-5
                values.append(module.amortized_step(a).sum())
                bias[k] -= sign * 1e-5
        torch.testing.assert_close(grad[k], (values[0] - values[1]) / 2e-5, rtol=1e-4, atol=1e-7)


def test_flows_at_their_limit_are_zero_and_beyond_it_at_least_the_excess():
    module = problem("case30")
    b, a = module.nominal()
    b = b + 0.05 * torch.randn(b.shape, generator=torch.Generator().manual_seed(1), dtype=b.dtype)
    grid = module.grid
    _, _, theta, v = module.parts(b)
    voltage = torch.polar(v, theta)[0]
    current = torch.complex(grid.from_g, grid.from_b) @ voltage
    power = (voltage[grid.limited_from] * current.conj()).abs()
    over = module.inequality(b, a)[0, -2 * len(power) : -len(power)]
    excess = power - grid.rating
    assert (torch.sign(over) == torch.sign(excess)).all()
    assert (over >= excess - 1e-12).all()
    near = excess.abs() < 0.02 * grid.rating
    assert ((over - excess).abs() <= 0.03 * excess.abs() + 1e-12)[near].all()


def test_loads_are_within_the_spread_of_the_case():
    a, grid = PowerFlowContexts("case57", spread=0.2, num_val=300).contexts("val"), Grid("case57")
    for found, nominal in ((a.p, grid.load_p), (a.q, grid.load_q)):
        share = (found.double() / nominal)[:, nominal != 0]
        assert share.min() >= 0.8 - 1e-6
        assert share.max() <= 1.2 + 1e-6
        assert share.std() == pytest.approx(0.2 / 3**0.5, rel=0.05)


def test_a_case_that_there_is_not():
    assert case_names() == list(PUBLISHED)
    with pytest.raises(ValueError, match="case must be one of case14, case30, case57, case118; got 'case9'"):
        Grid("case9")
