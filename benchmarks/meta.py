"""Meta-learning: methods on one table, and what held-out tasks say of them.

``python -m benchmarks.meta [--quick] [--only PART ...] [--updates N] [--json FILE]``; ``--pictures docs``

* Sinusoids, 10 points seen: every method trained here for the same number of updates, on the same tasks, 25 an update, AdamW with
  one-cycle rates (0.01 where there is an initialization alone, 0.004 with a hypernetwork; those of the recipes). Mean squared
  error on the query sets of 1,000 held-out tasks, with its 95 % interval. Seconds are of an update (median), memory is what
  autograd holds for the backward pass of one, in MB. The solver is L-BFGS on each support set, from the template's own weights.
* Gaussian processes: the divergence from the exact posterior, in nats per point, of ``checkpoints/gp_regression.ckpt``, on 1,000
  held-out functions.
* Omniglot (needs its file) and glyphs: accuracy of ``checkpoints/omniglot.ckpt`` and ``checkpoints/glyphs.ckpt`` on 1,000
  held-out tasks (20-way: 250) of alphabets that training never saw, and that of a solver of the support sets, on the
  same features.
* The gradient that two processes average, against that of one on the same tasks, in float64.
* A step of second-order MAML beside a loop over tasks and beside parallel-metalearn: :mod:`benchmarks.maml_step`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amortized import AmortizedModule, checkpoint
from amortized.contract import ProblemError, evaluate, leaves, map_leaves, take
from amortized.networks import MLP, ConvBlocks, DeepSet, LearnedInitialization
from amortized.problems import (
    FewShotClassification,
    FewShotRegression,
    GaussianProcesses,
    GaussianProcessRegression,
    Glyphs,
    NeuralProcess,
    Omniglot,
    Prototypes,
    SinusoidContexts,
    Template,
)
from amortized.problems.meta import CharacterTasks, generalization, interval
from amortized.solvers import LBFGS, GradientDescent, Implicit
from benchmarks import maml_step

FOLDER = Path(__file__).parent.parent / "checkpoints"
P, LAST = 1761, 41


def curves(network: nn.Module, adapt: Any = "all", **settings: Any) -> FewShotRegression:
    return FewShotRegression(network, Template(MLP(1, 1, [40, 40], "tanh"), adapt), **settings)


def hypernetwork() -> DeepSet:
    return DeepSet(["support_x", "support_y"], 2, P, activation="gelu")


def descent(lr: float = 0.02, **settings: Any) -> GradientDescent:
    return GradientDescent(5, lr=lr, learn_lr=True, **settings)


METHODS: dict[str, tuple[Callable[[], FewShotRegression], float]] = {
    "hypernetwork": (lambda: curves(hypernetwork()), 0.004),
    "hybrid": (lambda: curves(hypernetwork(), refine=descent(0.002, per_step=True)), 0.004),
    "MAML": (lambda: curves(LearnedInitialization(P), refine=descent(per_step=True)), 0.01),
    "first-order MAML": (lambda: curves(LearnedInitialization(P), refine=descent(per_step=True, unroll=0)), 0.01),
    "Meta-SGD": (lambda: curves(LearnedInitialization(P), refine=descent(features=P)), 0.01),
    "ANIL": (lambda: curves(LearnedInitialization(LAST), "last", refine=descent(per_step=True)), 0.01),
    "iMAML": (
        lambda: curves(LearnedInitialization(P), refine=Implicit(LBFGS(10, tol=1e-2), anchor=0.5, products=5)),
        0.01,
    ),
}
"""And the learning rate of each."""


def row(name: str, value: float, detail: str, goal: float | None = None, above: bool = False) -> dict[str, Any]:
    holds = None if goal is None else bool(value >= goal if above else value <= goal)
    return {"id": f"meta: {name}", "value": float(f"{value:.4g}"), "goal": goal, "holds": holds, "detail": detail}


def train(module: AmortizedModule, data: Any, updates: int, lr: float) -> float:
    """The median seconds of an update."""
    optimizer = torch.optim.AdamW(module.parameters(), lr)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(updates, 10), pct_start=0.1)
    spent = []
    for number in range(updates):
        a, started = data.batch("train", number), time.perf_counter()
        loss = module.amortized_step(a).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        rates.step()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def held_for_backward(module: AmortizedModule, a: Any) -> float:
    """MB that autograd keeps for the backward pass of one training signal, each storage once; not the parameters."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    held: dict[int, int] = {}
    kept = []  # so that no storage is freed and its address used again

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        module.amortized_step(a).mean()
    return sum(held.values()) / 1e6


def sinusoids(updates: int, tasks: int) -> list[dict[str, Any]]:
    data = SinusoidContexts(batch_size=25, num_test=tasks)
    a = data.contexts("test")
    rows, errors = [], {}
    for name, (make, lr) in METHODS.items():
        torch.manual_seed(0)
        module = make()
        memory = held_for_backward(module, data.batch("train", 0))
        seconds = train(module, data, updates, lr)
        with torch.no_grad():
            b = module(a)
        errors[name] = evaluate(module, b, a)
        solved = generalization(module, a, b, LBFGS(100)) if name == "MAML" else None
        rows.append(
            row(
                f"sinusoids, {name}",
                float(errors[name].mean()),
                f"± {interval(errors[name]):.2g} query error after {updates} updates; {1e3 * seconds:.3g} ms an update, "
                f"{memory:.3g} MB held for its backward pass",
            )
        )
        print(rows[-1]["id"], rows[-1]["value"], rows[-1]["detail"], flush=True)
        if solved is not None:
            rows.append(
                row(
                    "sinusoids, solver of the support set",
                    float(solved["query_solver"].mean()),
                    f"± {interval(solved['query_solver']):.2g} query error, {solved['support_solver'].mean():.2g} on the "
                    f"support set, where MAML has {solved['support_network'].mean():.2g}; "
                    f"MAML is better on {solved['wins'].mean():.1%}",
                )
            )
    apart = errors["hybrid"] - errors["MAML"]
    rows.append(row("hybrid minus MAML, query error", float(apart.mean()), f"± {interval(apart):.2g}, paired", 0.0))
    return rows


def trained(module: AmortizedModule, name: str) -> Any:
    """The module with the weights of a reference checkpoint; where it tells other classes apart, with a last layer of its own."""
    weights = checkpoint.load(FOLDER / f"{name}.ckpt")["state_dict"]
    module.load_state_dict(weights | {k: v for k, v in module.state_dict().items() if k.startswith("template.model.")})
    return module.eval()


def predictive() -> GaussianProcessRegression:
    return trained(GaussianProcessRegression(NeuralProcess(features=64, layers=4, heads=4)), "gp_regression")


def prototypes(name: str, ways: int = 5) -> FewShotClassification:
    model = checkpoint.load(FOLDER / f"{name}.ckpt")[checkpoint.RECIPE]["model"]["init_args"]
    blocks = model["template"]["init_args"]["model"]["init_args"] | {"out_features": ways}
    refine = GradientDescent(**model["refine"]["init_args"]) if model.get("refine") else None
    return trained(FewShotClassification(Prototypes(ways), Template(ConvBlocks(**blocks), "last"), refine=refine), name)


def gaussian_processes(tasks: int) -> list[dict[str, Any]]:
    module, a = predictive(), GaussianProcesses(num_test=tasks).contexts("test")
    apart = evaluate(module, module(a).detach(), a) - module.optimum(a)
    detail = f"± {interval(apart):.2g} nats per point above the exact posterior, {tasks} functions; aim 0.05"
    return [row("Gaussian process", float(apart.mean()), detail, 0.1)]


def characters(name: str, data: type[CharacterTasks], tasks: int, goal: float | None) -> list[dict[str, Any]]:
    """Accuracy of a reference checkpoint, trained on 5-way 1-shot tasks, on these and on larger ones."""
    rows = []
    for ways, shots in ((5, 1), (5, 5), (20, 1), (20, 5)):
        module = prototypes(name, ways)
        set_ = data(ways=ways, shots=shots, num_test=tasks if ways == 5 else tasks // 4, eval_batch_size=100 // ways)
        found: dict[str, list[Tensor]] = {}
        for number in range(set_.num_batches("test")):
            with torch.no_grad():
                a = module.prepare(set_.batch("test", number))  # so that images go through the shared layers once
                b = module(a)
            for key, values in generalization(module, a, b, LBFGS(100)).items():
                found.setdefault(key, []).append(values)
        every = {key: torch.cat(parts) for key, parts in found.items()}
        network, solver = every["accuracy_network"], every["accuracy_solver"]
        nats = {key: f"{values.mean():.2g}" for key, values in every.items()}
        rows.append(
            row(
                f"{name}, {ways}-way {shots}-shot accuracy",
                float(network.mean()),
                f"± {interval(network):.2g}; solver of the support set {solver.mean():.4g} ± {interval(solver):.2g}; "
                f"cross-entropy on it {nats['support_network']} and {nats['support_solver']}, on the query set "
                f"{nats['query_network']} and {nats['query_solver']}; the network is better on {every['wins'].mean():.1%} "
                f"of {len(network)} tasks",
                goal if (ways, shots) == (5, 1) else None,
                above=True,
            )
        )
        print(rows[-1]["id"], rows[-1]["value"], rows[-1]["detail"], flush=True)
    return rows


class _Step(nn.Module):
    """The training signal as a module's forward pass, for DistributedDataParallel."""

    def __init__(self, module: AmortizedModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, a: Any) -> Tensor:
        return self.module.amortized_step(a).mean()


def _half(rank: int, module: AmortizedModule, a: Any, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    step = nn.parallel.DistributedDataParallel(_Step(module))
    n = len(leaves(a)[0]) // 2
    step(take(a, slice(rank * n, (rank + 1) * n))).backward()
    if rank == 0:
        torch.save([p.grad for p in module.parameters() if p.requires_grad], f"{folder}/gradient.pt")
    # The last holder of a process group ends its thread, and only destroy_process_group lets go of the interpreter's lock
    # for that: the other order can wait for ever.
    del step
    torch.distributed.destroy_process_group()


def two_processes_apart(module: AmortizedModule, a: Any) -> float:
    """The largest difference between the gradient that two processes average, each on half of the tasks, and that of one."""
    module, a = copy.deepcopy(module).double(), map_leaves(lambda x: x.double() if x.is_floating_point() else x, a)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_half, (module, a, folder), nprocs=2, start_method="fork")
        two = torch.load(Path(folder, "gradient.pt"), weights_only=True)
    _Step(module)(a).backward()
    one = [p.grad for p in module.parameters() if p.requires_grad]
    return max(float((x - y).abs().max()) for x, y in zip(one, two, strict=True) if x is not None and y is not None)


def processes() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    apart = two_processes_apart(METHODS["MAML"][0](), SinusoidContexts(batch_size=16).batch("train", 0))
    return [
        row("gradient of two processes", apart, "largest difference from that of one, MAML, 16 tasks, float64", 1e-6)
    ]


def draw(folder: Path) -> None:
    """The pictures of ``docs/meta_learning.md``, of test tasks."""
    for name, module, data in (
        ("gp_regression", predictive(), GaussianProcesses(num_test=8, queries=100)),
        ("glyphs", prototypes("glyphs"), Glyphs(num_test=8)),
    ):
        a = data.batch("test", 0)
        with torch.no_grad():
            module.draw(a, {"network": module(a)}).savefig(folder / f"{name}.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few updates and tasks: whether it runs")
    parser.add_argument("--only", nargs="+", help="of processes, maml_step, gp_regression, sinusoids, glyphs, omniglot")
    parser.add_argument("--updates", type=int, default=1000, help="of each method on sinusoids")
    parser.add_argument(
        "--pictures", type=Path, help="only draw the pictures of docs/meta_learning.md, into this folder"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.pictures:
        return draw(args.pictures)
    tasks = 50 if args.quick else 1000
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "processes": processes,
        "maml_step": lambda: maml_step.rows(3 if args.quick else 30),
        "gp_regression": lambda: gaussian_processes(tasks),
        "sinusoids": lambda: sinusoids(20 if args.quick else args.updates, tasks),
        "glyphs": lambda: characters("glyphs", Glyphs, tasks, None),
        "omniglot": lambda: characters("omniglot", Omniglot, tasks, 0.93),
    }
    rows = []
    for name in args.only or parts:
        try:
            rows += parts[name]()
        except ProblemError as error:
            print(f"{name} left out: {error}")
    print(f"\n{'':44}{'value':>10}{'goal':>8}  holds")
    for r in rows:
        goal = "" if r["goal"] is None else f"{r['goal']:g}"
        print(f"{r['id']:44}{r['value']:>10.4g}{goal:>8}  {'' if r['holds'] is None else r['holds']}  {r['detail']}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
