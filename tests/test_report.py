"""A problem that the package has never seen, driven from YAML to ``report.html``; what the files of a run promise."""

import base64
import io
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from runs import Run
from toy import Drawn, Gaussians, Quadratic

from amortized.callbacks import BudgetMonitor, CertificateMonitor, GapMonitor, Report
from amortized.cli.app import main
from amortized.contract import CommonDraws
from amortized.evaluation.budget import Curve, first, measure_budget
from amortized.evaluation.metric import GapRows
from amortized.evaluation.results import Results
from amortized.report.pictures import draw_curves, draw_gap, histogram
from amortized.report.table import lines, table
from amortized.solvers import LBFGS, Adam, GradientDescent

PROBLEM = '''
"""Where a cannon must aim: b holds the tangent of its angle and the speed; a the target's distance and height."""
import torch
from matplotlib.figure import Figure
from torch import nn
from amortized import AmortizedModule, ContextDataModule

class Cannon(AmortizedModule):
    objective_name = "miss & effort <J>"

    def __init__(self, **kwargs):
        super().__init__(nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2)), **kwargs)

    def height(self, b, x):
        slope, speed = b[:, :1], 1 + b[:, 1:].exp()
        return slope * x - x.square() * (1 + slope.square()) / speed.square()

    def objective(self, b, a):
        return (self.height(b, a[:, :1]).squeeze(1) - a[:, 1]).square() + 0.1 * (2 * b[:, 1]).exp()

    def draw(self, a, solutions):
        figure = Figure(figsize=(6, 3))
        x = torch.linspace(0, 2, 50).expand(len(a), -1)
        for (name, b), style in zip(solutions.items(), "-:"):
            figure.gca().plot(x.T, self.height(b, x).T, style, color="k")
        figure.gca().plot(a[:, 0], a[:, 1], "ro")
        return figure

class Targets(ContextDataModule):
    def sample(self, n, generator):
        return 1 + torch.rand(n, 2, generator=generator, device=generator.device)

    def contexts(self, split):  # two of the test contexts are broken
        a = super().contexts(split)
        return a if split != "test" else torch.cat([a[:-2], torch.tensor([[1.0, torch.nan], [torch.inf, 1.0]])])
'''

RECIPE = """
trainer: {max_steps: 60, val_check_interval: 20, check_val_every_n_epoch: null, log_every_n_steps: 10,
          accelerator: cpu, enable_progress_bar: false}
model: {class_path: unseen.Cannon, init_args: {optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}}}
data: {class_path: unseen.Targets, init_args: {num_val: 64, num_test: 50, eval_batch_size: 50}}
gap: {solver: {class_path: LBFGS, init_args: {steps: 60}}, max_fraction: 1}
budget: {contexts: 50, rivals: {LBFGS: {class_path: LBFGS, init_args: {steps: 60}}}}
"""

FRACTION, NUMBER, COUNT, NAME, TEXT = "fraction", "number", "count", "name", "text"
SCHEMA = {
    "objective": {"network": NUMBER, "solver": NUMBER},
    "gap": {
        "mean": NUMBER,
        "median": NUMBER,
        "p95": NUMBER,
        "relative": NUMBER,
        "stderr": NUMBER,
        "noise": NUMBER,
        "rounding": NUMBER,
    },
    "rows": {"total": COUNT, "converged": FRACTION, "diverged": FRACTION, "lost": FRACTION, "unbounded": FRACTION},
    "time": {
        "network": NUMBER,
        "solver": NUMBER,
        "equal_quality_ratio": NUMBER,
        "contexts": COUNT,
        "rival": NAME,
        "not_finite": FRACTION,
        "row_ratio_median": NUMBER,
        "row_ratio_p95": NUMBER,
        "rows_never_reached": FRACTION,
        "warm_rival": NAME,
        "tolerance": FRACTION,
        "evaluations_cold": NUMBER,
        "evaluations_warm": NUMBER,
        "evaluations_saved": NUMBER,
        "rows_never_solved_cold": FRACTION,
        "rows_never_solved_warm": FRACTION,
    },
    "solver": {"advice": TEXT, "name": TEXT, "chosen_by": TEXT, "best_known": TEXT},
    "certificate": {
        "kind": NAME,
        "alpha": FRACTION,
        "calibrated_on": COUNT,
        "assumption": TEXT,
        "contexts": COUNT,
        "coverage": FRACTION,
        "low": FRACTION,
        "high": FRACTION,
        "median": NUMBER,
    },
}


def check_schema(found):
    """Exactly these keys; a number may be null where it is not finite, and all of time where it was not measured."""
    schema = {group: keys for group, keys in SCHEMA.items() if group in found or group != "certificate"}  # after a fit
    assert {group: list(values) for group, values in found.items()} == {g: list(keys) for g, keys in schema.items()}
    measured = found["time"]["network"] is not None
    for group, keys in schema.items():
        for key, kind in keys.items():
            value = found[group][key]
            if group == "time" and not measured:
                assert value is None, key
            elif kind is COUNT:
                assert type(value) is int, key
            elif kind is TEXT:
                assert value is None or value, key
            elif kind is NAME:
                assert type(value) is str, key
            elif kind is FRACTION:
                assert type(value) is float, key
                assert 0 <= value <= 1, key
            else:
                assert value is None or (type(value) is float and math.isfinite(value)), key


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text; every tag that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def unseen(tmp_path, monkeypatch):
    Path("unseen.py").write_text(PROBLEM)
    Path("cannon.yaml").write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("unseen", None)


def test_a_problem_never_seen_goes_from_yaml_to_report(unseen, capsys):
    assert len(PROBLEM.strip().splitlines()) <= 40
    main(["fit", "-c", "cannon.yaml", "--run_folder=run"])
    found = json.loads(Path("run/results.json").read_text())
    check_schema(found)
    assert found["rows"]["total"] == found["time"]["contexts"] == 50
    assert found["rows"]["diverged"] == pytest.approx(2 / 50)
    assert found["time"]["not_finite"] == pytest.approx(2 / 50)
    assert found["time"]["rows_never_solved_cold"] >= 2 / 50  # broken rows stay in the counts
    assert found["gap"]["mean"] > -1e-6
    assert found["time"]["evaluations_cold"] > 1

    text = Path("run/report.html").read_text()
    page = Page(text)
    assert {p.stem for p in Path("run/pictures").iterdir()} == {"curves", "gap", "budget", "solutions", "worst"}
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    start = "data:image/png;base64,"
    assert [base64.b64decode(src.removeprefix(start)) for src in images] == [
        Path(f"run/pictures/{name}.png").read_bytes() for name in ("curves", "gap", "budget", "solutions", "worst")
    ]
    assert Path("run/config.yaml").read_text() in page.text
    assert "amortized fit -c cannon.yaml --run_folder=run" in page.text
    assert "miss & effort <J>" in page.text
    for label, value in lines(Results.from_json(found), "miss & effort <J>"):
        assert label.strip() in page.text
        assert value in page.text
    assert "48 *" in page.text  # the broken contexts are the worst ones, and marked
    assert "49 *" in page.text
    assert capsys.readouterr().out.count("evaluations to 0.001 of the best") == 1


def test_the_report_needs_no_network(unseen):
    main(["fit", "-c", "cannon.yaml", "--run_folder=run", "--budget.enabled=false", "--trainer.max_steps=20"])
    check_schema(json.loads(Path("run/results.json").read_text()))
    text = Path("run/report.html").read_text()
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed"), tag
        for name in ("src", "href", "srcset", "data", "style"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import|//", style)


def test_a_row_that_never_gets_there_is_counted():
    at, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[5.0, 5, math.inf], [3, 4, math.nan], [2, 4, 4]])
    assert first(at, values, torch.tensor([3.0, 3, math.inf])).tolist() == [2, math.inf, 3]


class Valley(Quadratic):
    """Solved in the first dimension by the network, but for the last two rows: on these it is far off, or NaN."""

    def forward(self, a):
        b = 2 * a + 0.1
        b[-2], b[-1] = 1e3, math.nan
        return b


def test_budget_of_known_rows():
    """A quadratic with unit steps of gradient descent: after k of them the rest is r^k of what the cold start lacks."""
    a = 3 * torch.ones(8, 3)
    problem = Valley().eval()
    rate, tol = 0.5, 1e-3  # b - 2a halves with each step of size 1/4
    descent = GradientDescent(steps=40, lr=(1 - rate) / 2, tol=0.0, momentum=0.0)
    found = measure_budget(problem, a, {"descent": descent}, tol=tol)
    cold, warm = (found.needed(curves[0]) for curves in (found.cold, found.warm))
    # L - 1 = 3 * 36 cold, 3 * 0.01 from the prediction, which is solved already; one evaluation is the start itself
    steps = math.ceil(math.log(tol) / (2 * math.log(rate)))
    assert cold.tolist() == [1 + steps] * 8
    assert warm[:6].tolist() == [1] * 6
    assert warm[6] > cold[6]  # a bad prediction saves less than nothing
    assert warm[7] == math.inf
    assert found.saved[:6].tolist() == [steps] * 6
    assert found.saved[6] < 0
    assert found.saved[7] == -math.inf
    summary = found.summary()
    assert summary["evaluations_saved"] == steps
    assert summary["rows_never_solved_cold"] == 0
    assert summary["rows_never_solved_warm"] == summary["not_finite"] == 1 / 8
    reached = found.row_ratios
    assert (reached[:6] > reached[6]).all()  # its start is better than such a network
    assert reached[7] == reached[6]
    assert summary["rows_never_reached"] == 0


def test_a_rival_that_will_not_win_is_given_up():
    module, a = Quadratic().eval(), torch.randn(32, 3)
    slow = {"slow": GradientDescent(steps=500, lr=1e-3, momentum=0.0, tol=0.0)}
    found = measure_budget(module, a, {"LBFGS": LBFGS(50), **slow})
    for curves in (found.cold, found.warm):
        assert curves[1].evaluations[-1] < 200
    assert measure_budget(module, a, slow).cold[0].evaluations[-1] == 501
    summary = found.summary()
    assert summary["rival"] == summary["warm_rival"] == "LBFGS"
    assert summary["rows_never_solved_cold"] == 0


def test_a_rival_that_finds_lower_values_is_not_given_up():
    module, a = Quadratic().eval(), torch.randn(16, 3)
    short, long = (GradientDescent(steps=k, lr=0.05, momentum=0.0, tol=0.0) for k in (10, 300))
    found = measure_budget(module, a, {"short": short, "long": long})
    assert found.cold[1].evaluations[-1] == 301
    assert found.warm_rival == "long"


BROKEN = """
from toy import Drawn

class Broken(Drawn):
    def draw(self, a, solutions):
        raise IndexError("no such panel")
"""


def test_what_cannot_be_drawn_costs_its_picture_alone(tmp_path, monkeypatch, capsys):
    Path("undrawn.py").write_text(BROKEN)
    fit = ["fit", "--model=undrawn.Broken", "--data=toy.Gaussians", "--data.num_test=32", "--trainer.max_steps=2"]
    fit += ["--trainer.log_every_n_steps=1"]
    fit += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--budget.enabled=false"]
    main([*fit, "--run_folder=run"])
    told = capsys.readouterr()
    assert told.err.count("warning:") == 1
    assert "no picture of solutions, worst: IndexError: no such panel (undrawn.py, line 6, in draw)" in told.err
    assert "amortization gap, mean" in told.out
    assert json.loads(Path("run/results.json").read_text())["rows"]["total"] == 32
    Page(Path("run/report.html").read_text())
    assert {path.stem for path in Path("run/pictures").iterdir()} == {"curves", "gap"}


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e8, 1e30])
def test_equal_gaps_have_a_histogram(scale):
    gap = torch.tensor([1.0, 1.0, 1 + 1e-7, math.nan]) * scale
    counts, edges = histogram(gap)
    assert counts.sum() == 3
    assert (np.diff(edges) > 0).all()
    empty = torch.full_like(gap, math.nan)
    rows = GapRows(*[gap if name in ("network", "gap") else empty for name in GapRows._fields])._replace(
        reference=0 * gap
    )
    draw_gap(rows, "cost").savefig(io.BytesIO())


def test_a_run_shorter_than_a_validation_has_no_panel_of_the_gap():
    trained = [{"step": str(i), "train/loss": str(1.0 / (1 + i))} for i in range(3)]
    assert draw_curves([{"step": "0", "test/objective": "1"}], "cost") is None
    (axes,) = draw_curves(trained, "cost").axes
    assert axes.get_title() == "cost"
    assert [line.get_label() for line in axes.lines] == ["train/loss"]
    both = draw_curves([*trained, {"step": "3", "val/gap/mean": "0.1"}], "cost")
    assert [axes.get_title() for axes in both.axes] == ["cost", "amortization gap"]


@pytest.mark.parametrize(
    "name", ["cost", "the negative evidence lower bound of a model with a very long name, in nats, per row"]
)
def test_the_table_fits_a_terminal(name):
    found = measure_budget(Quadratic().eval(), torch.randn(16, 3), {"L-BFGS, a rival with a name": LBFGS(steps=20)})
    gap = dict.fromkeys(
        ("network", "reference", "mean", "median", "p95", "relative", "stderr", "noise", "rounding"), -1.2345678e-10
    )
    gap |= {"unbounded": 0.0, "total": 8.0, "converged": 1.0, "diverged": 1.0, "lost": 1.0, "relative": 1.67e15}
    gap |= {
        f"decomposition/{k}{e}": 1.2e-9
        for k in ("total", "amortization", "solver", "approximation")
        for e in ("", "_stderr")
    }
    told = Results.of(gap, found, {"shifted": gap, "large": gap})
    told = replace(told, measurements={"calibration": {"error": 0.5}})
    assert Results.from_json(json.loads(json.dumps(told.to_json()))) == told
    text = table(told, f"the problem of {name}", name)
    assert max(map(len, text.splitlines())) <= 80
    assert "the solver's is about 0" in text
    values = [value for _, value in lines(told, name)]
    assert all(line.endswith(value) for line, value in zip(text.splitlines()[2:], values, strict=False))


def test_a_rival_that_never_reaches_the_network_says_so():
    problem = Quadratic().eval()
    problem.forward = lambda a: 2 * a
    found = measure_budget(problem, torch.ones(8, 3), {"slow": GradientDescent(steps=3, lr=1e-3)})
    summary = found.summary()
    assert summary["rows_never_reached"] == summary["rows_never_solved_cold"] == 1
    assert summary["equal_quality_ratio"] == summary["row_ratio_median"] == summary["evaluations_saved"] == math.inf
    keys = ("network", "reference", "mean", "median", "p95", "relative", "stderr", "noise", "rounding")
    gap = dict.fromkeys(keys, math.nan)
    gap |= {"total": 8.0, "converged": 0.0, "diverged": 1.0, "lost": 0.0, "unbounded": 0.0, "relative": 16945.0}
    told = Results.of(gap, found)
    check_schema(told.to_json())
    assert told.time.equal_quality_ratio is None
    assert "never" in table(told, "name", "objective")
    assert "100.0%" in table(told, "name", "objective")
    assert "16,945x" in table(told, "name", "objective")


def test_all_sides_have_the_same_draws_whatever_their_layout():
    torch.manual_seed(0)
    problem, b, a = CommonDraws(Quadratic(noise=1.0), seed=0), torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(problem.objective(b, a), problem.objective(b.T.contiguous().T, a))
    module = Quadratic(noise=1.0).eval()
    found = measure_budget(module, torch.randn(64, 3), {"A": Adam(steps=400, lr=0.1), "L": LBFGS(steps=50)})
    ends = [curve.values[-1] for curve in [*found.cold, *found.warm]]
    assert all(torch.allclose(end, ends[0], atol=1e-3) for end in ends)


def test_warm_time_includes_the_network_and_values_never_rise():
    found = measure_budget(Quadratic(noise=0.1).eval(), torch.randn(16, 3), {"L": LBFGS(steps=20), "A": Adam(steps=20)})
    for curve in [*found.cold, *found.warm]:
        assert isinstance(curve, Curve)
        assert len(curve.seconds) == len(curve.evaluations) == len(curve.values)
        assert (curve.values.diff(dim=0) <= 1e-6).all()
        assert (curve.evaluations.diff() >= 0).all()
        assert curve.seconds[0] >= (found.network_seconds if curve.warm else 0)


def test_the_worst_contexts_are_those_of_the_whole_set():
    module, data = Drawn().eval(), Gaussians(num_test=96, eval_batch_size=40)
    monitor = GapMonitor(LBFGS(steps=30), keep_worst=5)
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "use_distributed_sampler")
    Trainer(accelerator="cpu", callbacks=[monitor, BudgetMonitor(enabled=False)], **dict.fromkeys(off, False)).test(
        module, data, verbose=False
    )
    a = data.contexts("test")
    gap = (module(a) - 2 * a).square().sum(1)
    values, index = gap.topk(5)
    assert monitor.worst.rows.index.tolist() == index.tolist()
    assert torch.equal(monitor.worst.a, a[index])
    assert torch.allclose(monitor.worst.rows.gap, values.double(), atol=1e-4)
    assert torch.allclose(monitor.worst.network, module(a[index]))


def test_processes_gather_the_worst_contexts():
    args = ["--model=toy.Quadratic", "--data=toy.FiniteGaussians", "--data.eval_batch_size=300", "--gap.solver=LBFGS"]
    args += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--budget.enabled=false"]
    args += ["--ckpt_path=untrained"]
    tables = []
    for processes in (1, 2):
        strategy = ["--trainer.strategy=ddp_fork"] if processes > 1 else []
        run = Run(["test", *args, f"--trainer.devices={processes}", *strategy, f"--run_folder=run-{processes}"])
        assert run.wait() == 0, run.output()
        text = Path(f"run-{processes}/report.html").read_text()
        worst = text[text.index('<section id="worst">') : text.index('<section id="numbers">')]
        tables.append(re.findall(r"<tr><td>(\d+)</td>", worst))
    assert len(tables[0]) == 8
    assert tables[0] == tables[1]
    assert any(300 <= int(index) < 600 for index in tables[0])  # of the second process


def test_the_page_says_what_was_solved_and_how_often_the_certificate_holds(tmp_path):
    class Described(Quadratic):
        """Twice the context. And more that nobody asked for."""

    module, gap, certificate = Described(), GapMonitor(), CertificateMonitor()
    data = Gaussians(num_val=64, num_test=64)
    report = Report("described", gap)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[gap, certificate, report], accelerator="cpu", **quiet)
    certificate.calibrate(trainer, module, data, gap)
    trainer.test(module, data, verbose=False)
    html = (tmp_path / "report.html").read_text()
    assert "<p>Twice the context. Network against solver on 64 held-out contexts.</p>" in html
    assert re.search(r"Certificate holds</span><b>[\d.]+%</b><span>of 64 test contexts, of 90% promised", html)
    assert "prefers-color-scheme: dark" in html
