"""The gap is exact on any number of processes, each context counted once, and honest about what it does not know."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from runs import Run, metrics
from toy import DeclaredMeanField, FiniteGaussians, Gaussians, MeanField, Precisions, Quadratic

from amortized.callbacks import GapMonitor, measure_gap
from amortized.evaluation.advice import advice
from amortized.evaluation.budget import measure_budget
from amortized.evaluation.metric import AmortizationGap, GapRows, gap_statistics
from amortized.solvers import LBFGS, GaussNewton, GradientDescent, MultiStart


def trainer(*callbacks, **kwargs):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **kwargs,
    )


def rows(network, reference, cold=None, converged=None):
    n = len(network)
    as_tensor = lambda x, default: torch.tensor(x if x is not None else default, dtype=torch.float64)  # noqa: E731
    return GapRows(
        torch.arange(n),
        torch.tensor(network),
        torch.tensor(reference),
        as_tensor(cold, reference),
        as_tensor(converged, [1.0] * n),
        torch.ones(n),
    )


def test_statistics():
    found = gap_statistics(
        rows([3.0, 2.0, 5.0, 1.0], [1.0, 2.5, 1.0, 1.0], cold=[1.0, 2.5, 6.0, 1.0], converged=[1, 1, 0, 1])
    )
    assert float(found["mean"]) == pytest.approx(5.5 / 4)
    assert float(found["median"]) == pytest.approx(1.0)
    assert float(found["p95"]) == pytest.approx(torch.quantile(torch.tensor([2.0, -0.5, 4.0, 0.0]), 0.95).item())
    assert float(found["relative"]) == pytest.approx(5.5 / 5.5)
    assert float(found["converged"]) == 0.75
    assert float(found["lost"]) == 0.5  # the cold solver alone: 2.5 > 2 and 6 > 5
    assert float(found["diverged"]) == 0


def test_rows_that_are_not_finite_are_counted_and_left_out_of_the_mean():
    found = gap_statistics(rows([3.0, float("nan"), 2.0], [1.0, 1.0, float("inf")]))
    assert float(found["mean"]) == 2.0
    assert float(found["diverged"]) == pytest.approx(2 / 3)
    assert float(found["total"]) == 3


def test_nothing_measured_is_not_zero_gap():
    found = AmortizationGap().compute()
    assert torch.isnan(found["mean"])
    assert float(found["total"]) == 0


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_gap_of_a_known_problem(noise):
    problem = Quadratic(noise=noise).eval()
    a = torch.randn(50, 3)
    b = 2 * a + torch.randn(50, 3)
    measured, best = measure_gap(problem, a, b, LBFGS(steps=100), torch.arange(50))
    gap = (b - 2 * a).square().sum(1)
    if (
        noise
    ):  # a solver cannot see through its fixed draws: off by noise^2 / 4 a dimension, and the noise of the evaluation
        assert abs(float(measured.gap.mean()) - float(gap.mean()) + 3 * noise**2 / 4) < 0.5
    else:
        assert torch.allclose(measured.gap, gap.double(), atol=1e-4)
        assert torch.allclose(best, 2 * a, atol=1e-3)
        assert (measured.converged == 1).all()


def test_the_reference_is_the_better_of_cold_and_warm_and_says_when_cold_lost():
    problem = Quadratic().eval()
    a = torch.randn(40, 3)
    b = 2 * a + 1e-3
    measured, _ = measure_gap(problem, a, b, GradientDescent(steps=1, lr=1e-3), torch.arange(40))
    assert (measured.reference <= measured.network).all()
    found = gap_statistics(measured)
    assert float(found["lost"]) == 1.0
    assert float(found["converged"]) == 0.0


def mean_field_rows(problem, steps, n=64):
    a = Precisions(num_test=n).contexts("test")
    with torch.no_grad():
        b = problem(a)
    return a, measure_gap(problem, a, b, GradientDescent(steps=steps, lr=0.1), torch.arange(n), decompose=True)[0]


@pytest.mark.parametrize("problem", [MeanField, DeclaredMeanField])
def test_decomposition_of_a_family_that_lacks_the_optimum(problem):
    """Total = amortization + solver error + approximation; the last is known in closed form."""
    a, measured = mean_field_rows(problem().eval(), steps=60)
    found = {k.removeprefix("decomposition/"): float(v) for k, v in gap_statistics(measured).items()}
    known = DeclaredMeanField().family_optimum(a).double()
    assert found["total"] == pytest.approx(float(measured.network.mean()), rel=1e-6)
    assert found["total"] == pytest.approx(found["amortization"] + found["solver"] + found["approximation"], rel=1e-12)
    assert found["amortization"] == pytest.approx(found["mean"], rel=1e-12)
    assert found["approximation"] == pytest.approx(float(known.mean()), abs=1e-3)
    assert found["approximation_stderr"] == pytest.approx(float(known.std()) / 8, rel=0.01)
    assert found["amortization_stderr"] == found["stderr"]


def test_the_solvers_own_error_falls_with_its_steps_and_is_never_in_the_family():
    errors = []
    for steps in (1, 10, 100):
        _, measured = mean_field_rows(DeclaredMeanField().eval(), steps)
        found = gap_statistics(measured)
        errors.append(float(found["decomposition/solver"]))
        assert (measured.reference >= measured.family - 1e-5).all()
    assert errors[0] > 5 * errors[1] > 25 * errors[2] >= -1e-5


def test_no_decomposition_where_no_optimum_is_declared(monkeypatch):
    problem = MeanField().eval()
    monkeypatch.delattr(MeanField, "optimum")
    assert not [name for name in gap_statistics(mean_field_rows(problem, 5)[1]) if name.startswith("decomposition")]


def test_the_noise_of_a_random_objective_is_what_repeating_the_measurement_shows():
    """With solutions that do not change from one measurement to the next: cold always the best."""
    problem, n = Quadratic(noise=2.0).eval(), 200
    a, off = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(0))
    b = 2 * a + 10 + off
    problem.initial = lambda a: 2 * a
    means, noise = [], []
    for seed in range(0, 400, 4):
        measured, _ = measure_gap(problem, a, b, LBFGS(steps=0), torch.arange(n), seed=seed)
        found = gap_statistics(measured)
        means.append(float(found["mean"]))
        noise.append(float(found["noise"]))
    assert np.mean(noise) == pytest.approx(np.std(means), rel=0.25)
    assert np.mean(noise) < float(found["stderr"])
    certain, _ = measure_gap(Quadratic().eval(), a, b, LBFGS(steps=5), torch.arange(n))
    assert float(gap_statistics(certain)["noise"]) == 0


def test_fit_validate_test_and_predict_in_one_process():
    module, data, monitor = Quadratic(), Gaussians(num_val=96, num_test=96), GapMonitor(LBFGS(steps=30), max_fraction=1)
    fit = trainer(monitor, max_steps=20, val_check_interval=10, check_val_every_n_epoch=None)
    fit.fit(module, data)
    assert monitor.results["total"] == 96
    for command in ("validate", "test"):
        monitor.results = {}
        found = getattr(fit, command)(module, data, verbose=False)[0]
        split = {"validate": "val", "test": "test"}[command]
        assert found[f"{split}/gap/total"] == 96
        assert found[f"{split}/gap/mean"] == pytest.approx(monitor.results["mean"], rel=1e-6)
        assert monitor.results["converged"] == 1.0
        assert found[f"{split}/gap/decomposition/total"] == pytest.approx(monitor.results["mean"], abs=1e-5)
        assert not any("shifted" in name for name in found)
    assert sum(len(batch["b"]) for batch in fit.predict(module, data)) == 96


def test_named_sets_of_contexts_are_measured_beside_the_others_and_do_not_change_them():
    results = []
    for further in (
        None,
        {"shifted": FiniteGaussians(num_eval=50, scale=3.0), "few": FiniteGaussians(num_eval=5)},
    ):
        torch.manual_seed(0)
        data = FiniteGaussians(num_eval=70, eval_batch_size=32, evaluations=further)
        module, monitor = Quadratic(noise=0.3), GapMonitor(LBFGS(steps=30), max_fraction=1)
        run = trainer(monitor, max_steps=4, val_check_interval=2, check_val_every_n_epoch=None)
        run.fit(module, data)
        assert "val/shifted/gap/mean" not in run.callback_metrics
        results.append([getattr(run, command)(module, data, verbose=False)[0] for command in ("validate", "test")])
        assert list(monitor.evaluations) == list(further or {})
    for split, alone, both in zip(("val", "test"), *results, strict=True):
        assert alone == {name: value for name, value in both.items() if not {"shifted", "few"} & {*name.split("/")}}
        assert both[f"{split}/shifted/gap/total"] == 50
        assert both[f"{split}/few/gap/total"] == 5
        assert both[f"{split}/shifted/gap/mean"] > 3 * both[f"{split}/gap/mean"]
        assert both[f"{split}/shifted/objective"] > both[f"{split}/objective"]
        assert both[f"{split}/shifted/gap/decomposition/total"] > 0


def test_a_set_of_contexts_has_a_name():
    with pytest.raises(ValueError, match="data.evaluations: 'far away' is no name"):
        FiniteGaussians(evaluations={"far away": FiniteGaussians()})


def test_contexts_of_a_test_do_not_move_the_random_numbers_of_training():
    curves = []
    for monitored in (False, True):
        torch.manual_seed(0)
        module = Quadratic(noise=0.5, dropout=0.1)
        callbacks = [GapMonitor(LBFGS(steps=10), max_fraction=1)] if monitored else []
        trainer(*callbacks, max_steps=9, val_check_interval=3, check_val_every_n_epoch=None).fit(
            module, Gaussians(num_val=64)
        )
        curves.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*curves)


@pytest.mark.parametrize("noise", [0, 0.3])
def test_processes_agree_to_1e_6(noise):
    """N = 833, which neither 2 nor 3 divides; a network with buffers; one rank of three has fewer batches."""
    args = [
        "fit",
        "--model=toy.Quadratic",
        f"--model.noise={noise}",
        "--model.batch_norm=true",
        "--data=toy.FiniteGaussians",
        "--data.evaluations={shifted: {class_path: toy.FiniteGaussians, init_args: {scale: 2, num_eval: 401}}}",
        "--trainer.callbacks=toy.SaveRows",
    ]
    args += ["--data.eval_batch_size=200", "--trainer.max_steps=12", "--trainer.val_check_interval=6"]
    args += [
        "--trainer.check_val_every_n_epoch=null",
        "--gap.solver=LBFGS",
        "--gap.solver.steps=40",
        "--trainer.accelerator=cpu",
    ]
    args += ["--trainer.enable_progress_bar=false", "--budget.enabled=false"]
    first = Run([*args, "--run_folder=fit"])
    assert first.wait() == 0, first.output()
    args = ["test", *args[1:], "--ckpt_path=fit/checkpoints/step=00000012.ckpt"]
    found, predicted = {}, {}
    for processes in (1, 2, 3):
        strategy = ["--trainer.strategy=ddp_fork"] if processes > 1 else []
        for command in ("test", "predict"):
            run = Run(
                [command, *args[1:], f"--trainer.devices={processes}", *strategy, f"--run_folder={command}-{processes}"]
            )
            assert run.wait() == 0, run.output()
        found[processes] = json.loads(Path(f"test-{processes}/results.json").read_text())
        predicted[processes] = np.load(f"predict-{processes}/predictions.npz")
    gap = {k: GapRows(*torch.load(f"test-{k}/rows.pt")).gap for k in (1, 2, 3)}
    counts, edges = np.histogram(gap[1], bins=40)
    assert counts.sum() == 833
    for processes in (2, 3):
        assert np.array_equal(np.histogram(gap[processes], bins=edges)[0], counts)
        groups = [(found[1][name], found[processes][name]) for name in ("gap", "rows", "objective", "decomposition")]
        further = [found[k]["evaluations"]["shifted"] for k in (1, processes)]
        groups += [(group, further[1][name]) for name, group in further[0].items()]
        for one, several in groups:
            assert one.keys() == several.keys()
            for name, value in one.items():
                assert several[name] == pytest.approx(value, abs=1e-6), (processes, name)
        dealt = [int(Path(f"test-{processes}/dealt-{rank}").read_text()) for rank in range(processes)]
        assert sum(dealt) == 833 + 401  # the work is shared, and nobody solves what another does
        assert max(dealt) < 0.7 * sum(dealt)
        assert predicted[processes]["name"].tolist() == [f"{row:06d}" for row in range(833)]
        for key in set(predicted[1]) - {"name"}:
            assert np.allclose(predicted[processes][key], predicted[1][key], atol=1e-6)
    assert found[1]["rows"]["total"] == 833
    assert found[1]["evaluations"]["shifted"]["rows"]["total"] == 401
    assert found[1]["gap"]["mean"] > 0.01
    assert (found[1]["gap"]["noise"] > 0) == (noise > 0)


def test_the_usual_pattern_is_wrong_on_the_same_contexts():
    """A padding sampler and metrics averaged over processes, in a real run on 3 processes; and ours, one without rows."""
    args = ["test", "--model=toy.Usual", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    args += ["--budget.enabled=false", "--trainer.callbacks=toy.SaveRows", "--data.eval_batch_size=500"]
    args += ["--ckpt_path=untrained"]
    three = ["--trainer.devices=3", "--trainer.strategy=ddp_fork"]
    runs = {
        "usual": ["--data=toy.UsualGaussians", "--trainer.use_distributed_sampler=true", *three],
        "ours": ["--data=toy.FiniteGaussians", *three],
        "exact": ["--data=toy.FiniteGaussians"],
    }
    found = {}
    for name, settings in runs.items():
        run = Run([*args[:2], *settings, *args[2:], f"--run_folder={name}"])
        assert run.wait() == 0, run.output()
        found[name] = json.loads(Path(f"{name}/results.json").read_text())
    rows = GapRows(*torch.load("exact/rows.pt"))
    exact = float((rows.network - 1).mean())  # the minimum is 1
    usual = float(metrics("usual")[-1]["usual/gap"])
    assert found["ours"]["gap"]["mean"] == pytest.approx(exact, abs=1e-6)
    assert found["ours"]["rows"]["total"] == found["exact"]["rows"]["total"] == 833
    assert [int(Path(f"ours/dealt-{rank}").read_text()) for rank in range(3)] == [500, 333, 0]
    assert abs(usual - exact) > 1e-4
    assert [int(Path(f"usual/dealt-{rank}").read_text()) for rank in range(3)] == [278, 278, 278]  # 834


def test_metrics_file_has_the_curves(tmp_path):
    from amortized.cli.app import main

    main(
        [
            "fit",
            "--model=toy.Quadratic",
            "--gap.max_fraction=1",
            "--data=toy.Gaussians",
            "--data.num_val=64",
            "--data.num_test=64",
            "--trainer.max_steps=20",
            "--trainer.val_check_interval=10",
            "--trainer.check_val_every_n_epoch=null",
            "--trainer.log_every_n_steps=5",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--budget.enabled=false",
            "--run_folder=run",
        ]
    )
    lines = metrics("run")
    assert [line["step"] for line in lines if line["train/loss"]] == ["4", "9", "14", "19"]
    assert [line["step"] for line in lines if line["val/gap/mean"]] == ["9", "19"]
    assert [line["step"] for line in lines if line["test/gap/p95"]] == ["20"]


def test_the_monitor_keeps_to_its_fraction_and_says_how_many_it_measured():
    args = ["fit", "--model=toy.Quadratic", "--data=toy.Gaussians", "--data.num_val=8192", "--data.num_test=64"]
    args += ["--trainer.max_steps=1000", "--trainer.val_check_interval=100", "--trainer.check_val_every_n_epoch=null"]
    args += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--budget.enabled=false"]
    slow = [
        "--gap.max_fraction=0.5",
        "--gap.solver=GradientDescent",
        "--gap.solver.steps=300",
        "--gap.solver.tol=0",
        "--gap.solver.lr=1e-5",
    ]
    run = Run([*args, *slow, "--run_folder=run"])
    assert run.wait() == 0, run.output()
    measured = {float(line["val/gap/total"]) for line in metrics("run") if line.get("val/gap/total")}
    assert len(measured) <= 1  # none, where a machine is too slow for 30
    assert all(30 <= n <= 8192 for n in measured)
    assert float(metrics("run")[-1]["test/gap/total"]) == 64


class Totals(Callback):
    """How many contexts each validation reported, and which."""

    def __init__(self):
        self.seen, self.tables = [], []

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        (monitor,) = (c for c in trainer.callbacks if isinstance(c, GapMonitor))
        total = trainer.callback_metrics.get("val/gap/total")
        self.seen.append(None if total is None else float(total))
        self.tables.append(monitor.metric.rows().index.tolist())


EVERY_TWO = {"val_check_interval": 2, "check_val_every_n_epoch": None}


def test_nothing_is_reported_while_there_is_no_time_for_30_contexts():
    monitor, totals = (
        GapMonitor(GradientDescent(steps=500, tol=0, lr=1e-5)),
        Totals(),
    )  # far longer than 5 % of two steps
    trainer(monitor, totals, max_steps=2, **EVERY_TWO).fit(Quadratic(), Gaussians(num_val=4096, eval_batch_size=4096))
    assert totals.seen == [None]
    assert monitor.count is None


def test_all_validations_measure_the_same_contexts_and_after_a_resume_too(tmp_path, monkeypatch):
    """A clock that runs by 1 s with every look: what is afforded differs from one validation to the next."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    data = lambda: Gaussians(num_val=300, eval_batch_size=100)  # noqa: E731
    monitor, totals = GapMonitor(LBFGS(steps=5), max_fraction=0.9), Totals()
    first = trainer(monitor, totals, max_steps=40, **EVERY_TWO)
    module = Quadratic()
    first.fit(module, data())
    reported = [(total, table) for total, table in zip(totals.seen, totals.tables, strict=True) if table]
    assert len(reported) > 2
    assert 30 <= reported[0][0] <= 300
    assert all(each == reported[0] for each in reported)
    first.save_checkpoint(tmp_path / "a.ckpt")
    again, after = GapMonitor(LBFGS(steps=5), max_fraction=0.9), Totals()
    trainer(again, after, max_steps=60, **EVERY_TWO).fit(module, data(), ckpt_path=tmp_path / "a.ckpt")
    assert again.count == monitor.count
    reported_after = [table for table in after.tables if table]
    assert reported_after
    assert all(table == reported[0][1] for table in reported_after)


def test_a_small_set_is_reported_whole():
    monitor, totals = GapMonitor(LBFGS(steps=5), max_fraction=0.99), Totals()
    trainer(monitor, totals, max_steps=40, **EVERY_TWO).fit(Quadratic(), Gaussians(num_val=12))
    assert set(totals.seen) <= {None, 12}
    assert totals.seen[-1] == 12


def test_processes_agree_on_the_contexts():
    args = ["fit", "--model=toy.Quadratic", "--data=toy.Gaussians", "--data.num_val=300", "--data.num_test=64"]
    args += ["--data.eval_batch_size=50", "--trainer.max_steps=60", "--trainer.val_check_interval=10"]
    args += ["--trainer.check_val_every_n_epoch=null", "--trainer.accelerator=cpu", "--gap.solver=LBFGS"]
    args += ["--trainer.enable_progress_bar=false", "--budget.enabled=false", "--gap.max_fraction=0.9"]
    args += ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--run_folder=run", "--gap.solver.steps=5"]
    run = Run(args)
    assert run.wait() == 0, run.output()
    measured = [float(line["val/gap/total"]) for line in metrics("run") if line["val/gap/total"]]
    assert len(set(measured)) == 1
    assert measured[0] >= 30


def test_max_fraction_holds():
    monitor = GapMonitor(GradientDescent(steps=100, tol=0, lr=1e-5), max_fraction=0.2)
    started = time.perf_counter()
    settings = {"max_steps": 600, "val_check_interval": 50, "check_val_every_n_epoch": None}
    trainer(monitor, **settings).fit(Quadratic(), Gaussians(num_val=4096, eval_batch_size=4096))
    assert 0.02 < monitor.seconds / (time.perf_counter() - started) < 0.3


class Large(Quadratic):
    """The gap of ``Quadratic`` beside a constant that float32 cannot hold it with."""

    def objective(self, b, a):
        return (b - 2 * a).square().sum(1) + 1e8


class Held(Large):
    """The same, with a tensor that is neither parameter nor buffer, so that it cannot be evaluated in float64."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.metric = torch.eye(3)

    def objective(self, b, a):
        return ((b - 2 * a) @ self.metric).square().sum(1) + 1e8


class Slope(Quadratic):
    """Without a minimum."""

    def objective(self, b, a):
        return (b * a).sum(1)


class Squares(Quadratic):
    """With the structure of least squares."""

    def objective(self, b, a):
        return (b - 2 * a).square().sum(1)

    def residuals(self, b, a):
        return 2**0.5 * (b - 2 * a)


def measured(problem, solver, n=64):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, 3, generator=generator)
    b = 2 * a + 0.1 * torch.randn(n, 3, generator=generator)
    found = {
        k: float(v) for k, v in gap_statistics(measure_gap(problem.eval(), a, b, solver, torch.arange(n))[0]).items()
    }
    return found, float((b - 2 * a).square().sum(1).double().mean())


def test_no_times_to_equal_quality_of_values_that_are_all_the_same_to_float32():
    a = torch.randn(8, 3)
    assert not measure_budget(Large().eval(), a, {"L": LBFGS(steps=5)}, repeats=1).resolved
    assert measure_budget(Quadratic().eval(), a, {"L": LBFGS(steps=5)}, repeats=1).resolved


@pytest.mark.parametrize("solver", [LBFGS(), GradientDescent(steps=200, lr=0.1)], ids=lambda s: type(s).__name__)
def test_a_gap_that_float32_cannot_hold_is_resolved_in_float64(solver):
    problem = Large()
    found, true = measured(problem, solver)
    assert found["mean"] == pytest.approx(true, rel=1e-5)
    assert found["rounding"] < 1e-6
    assert advice(problem, solver, found) is None
    assert all(p.dtype == torch.float32 for p in problem.parameters())


def test_where_it_cannot_be_it_is_said():
    problem = Held()
    found, true = measured(problem, LBFGS())
    assert found["mean"] == 0
    assert true > 0.02
    assert "float32 does not resolve this gap: differences below 5e+01" in advice(problem, LBFGS(), found)


def test_a_model_in_float64_is_measured_in_float64():
    problem = Quadratic().double()
    a = torch.randn(8, 3, dtype=torch.float64)
    rows, best = measure_gap(problem, a, problem(a).detach(), LBFGS(), torch.arange(8))
    assert best.dtype == torch.float64
    assert (best - 2 * a).abs().max() < 1e-6  # the tolerance of float64
    assert (rows.converged == 1).all()


@pytest.mark.parametrize(
    ("problem", "solver", "said"),
    [
        (Slope, LBFGS(), "unbounded below on 100.0% of the rows: is a constraint missing"),
        (Squares, LBFGS(), "the problem has residuals, which LBFGS ignores: --gap.solver GaussNewton"),
        (Quadratic, GradientDescent(steps=2, lr=1e-3), "lost to the network on 100.0% .* --gap.solver MultiStart"),
        (Quadratic, MultiStart(GradientDescent(steps=2, lr=1e-3)), "converged on 0.0% of the rows only"),
        (Quadratic, LBFGS(), None),
        (Squares, GaussNewton(), None),
    ],
)
def test_advice_on_the_solver(problem, solver, said):
    problem = problem()
    told = advice(problem, solver, measured(problem, solver)[0])
    assert told is None if said is None else re.search(said, told), told


def test_relative_gaps_are_left_out_where_the_optimum_is_zero():
    assert torch.isnan(gap_statistics(rows([1.0, 2.0], [1e-9, 0.0]))["relative"])
    assert torch.isnan(gap_statistics(rows([0.0, 0.0], [0.0, 0.0]))["relative"])
    assert float(gap_statistics(rows([1.0, 2.0], [0.5, 0.5]))["relative"]) == 2


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(
    ("solver", "missing"),
    [("ADMM", "program"), ("FISTA", "smooth, prox"), ("AugmentedLagrangian", "equality or inequality")],
)
def test_a_solver_that_lacks_its_structure_is_refused_before_the_first_step(command, solver, missing, capsys):
    from amortized.cli.app import main

    with pytest.raises(SystemExit) as stop:
        main(
            [
                command,
                *([] if command == "fit" else ["--ckpt_path=untrained"]),
                "--model=toy.Quadratic",
                "--data=toy.Gaussians",
                f"--gap.solver={solver}",
                "--trainer.accelerator=cpu",
            ]
            + [
                "--trainer.max_steps=3",
                "--trainer.enable_progress_bar=false",
                "--budget.enabled=false",
                "--run_folder=run",
            ]
        )
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: gap.solver: {solver} needs more of a problem than Quadratic has: {missing}")
    assert not Path("run/checkpoints").exists()


def test_an_unbounded_objective_is_told_at_the_end(capsys):
    from amortized.cli.app import main

    main(
        ["fit", "--model=test_gap.Slope", "--data=toy.Gaussians", "--data.num_test=64", "--trainer.accelerator=cpu"]
        + ["--trainer.max_steps=5", "--trainer.enable_progress_bar=false", "--budget.enabled=false", "--run_folder=run"]
    )
    assert "unbounded below" in capsys.readouterr().out
    found = json.loads(Path("run/results.json").read_text())
    assert found["rows"]["unbounded"] == 1
    assert "is a constraint missing?" in found["solver"]["advice"]
