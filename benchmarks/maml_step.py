"""A step of second-order MAML, all tasks at once, beside one task after another and beside parallel-metalearn.

16 sinusoids, five steps of gradient descent on the 10 points of each, differentiated through; then backward and a step of SGD.
The sides take turns in one process on the same tasks and from the same weights; a side's time is the median over its turns,
and its gradient is compared with that of the loop. One thread. ``pip install --no-deps parallel-metalearn`` for the third side.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from amortized.networks import MLP, LearnedInitialization
from amortized.problems import FewShotRegression, SinusoidContexts, Template
from amortized.problems.meta.few_shot import points
from amortized.solvers import GradientDescent

TASKS, STEPS, LR = 16, 5, 0.02


class Side:
    """A step on tasks a, and the gradient that it leaves behind; the rate of the update is 0, so that all stay where they are."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.0)

    def step(self, a: Any) -> None:
        self.optimizer.zero_grad()
        self.backward(a)
        self.optimizer.step()

    def backward(self, a: Any) -> None:
        raise NotImplementedError

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])


class Ours(Side):
    """All tasks at once."""

    def __init__(self, model: nn.Module) -> None:
        template = Template(model)
        network = LearnedInitialization(template.size)
        self.module = FewShotRegression(network, template, refine=GradientDescent(STEPS, lr=LR))
        super().__init__(network.parameters())

    def backward(self, a: Any) -> None:
        self.module.amortized_step(a).mean().backward()


class Loop(Side):
    """A clone of the weights for each task, adapted by itself, as the usual implementations do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters())
        self.model = model

    def error(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(self.model, weights, (x,)).squeeze(1) - y).square().mean()

    def backward(self, a: Any) -> None:
        total = torch.zeros(())
        for x, y, query_x, query_y in zip(points(a.support_x), a.support_y, points(a.query_x), a.query_y, strict=True):
            weights = {name: p.clone() for name, p in self.model.named_parameters()}
            for _ in range(STEPS):
                slopes = torch.autograd.grad(self.error(weights, x, y), list(weights.values()), create_graph=True)
                weights = {name: w - LR * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
            total = total + self.error(weights, query_x, query_y)
        (total / len(a.support_x)).backward()


class ParallelMetalearn(Side):
    """The same by parallel-metalearn, which maps over tasks by ``torch.func``."""

    def __init__(self, model: nn.Module) -> None:
        from metalearn.algorithms import MAML
        from metalearn.inner_optimizers import InnerSGD
        from metalearn.loss.base import BaseLoss
        from metalearn.model_wrappers import MAML_Model

        class Part(nn.Module):  # of theirs, a part is called with flags that plain layers do not know
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor, **flags: Any) -> Tensor:
                out: Tensor = self.inner(x)
                return out

        class Squared(BaseLoss):  # type: ignore[misc]
            def forward(self, out_dict: Any, targets: Tensor, model_states: Any = None, **rest: Any) -> Any:
                error = (out_dict["logits"].squeeze(1) - targets).square().mean()
                return error, error

        wrapped = MAML_Model(Part(model), Part(nn.Identity()))
        super().__init__(wrapped.parameters())
        inner = InnerSGD(
            wrapped.get_fast_weights(), first_order=False, inner_lr=LR, max_inner_steps=STEPS, learn_lr=False
        )
        self.algorithm = MAML(
            model=wrapped,
            optimizer=self.optimizer,
            inner_optimizer=inner,
            support_loss_fn=Squared(),
            inner_steps=STEPS,
            device=torch.device("cpu"),
        )

    def step(self, a: Any) -> None:
        """Its own step has ``zero_grad``, the backward pass and the optimizer in it."""
        self.algorithm.step(iter([(points(a.support_x), a.support_y, points(a.query_x), a.query_y)]))


def sides() -> dict[str, Side]:
    """Each with a model of its own, all with the same weights."""
    made: dict[str, Callable[[nn.Module], Side]] = {"ours": Ours, "loop": Loop}
    if importlib.util.find_spec("metalearn"):
        made["parallel-metalearn"] = ParallelMetalearn
    found = {}
    for name, make in made.items():
        torch.manual_seed(0)
        found[name] = make(MLP(1, 1, [40, 40], "tanh"))
    return found


def compare(turns: int) -> dict[str, tuple[float, float]]:
    """Of each side the median seconds of a step, and how far its gradient is from the loop's, over the norm of that one."""
    data = SinusoidContexts(batch_size=TASKS)
    made = sides()
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(turns + 2):
        a = data.batch("train", number)
        for name, side in made.items():
            started = time.perf_counter()
            side.step(a)
            seconds[name].append(time.perf_counter() - started)
    true = made["loop"].gradient()
    return {
        name: (statistics.median(seconds[name][2:]), float((side.gradient() - true).norm() / true.norm()))
        for name, side in made.items()
    }


def rows(turns: int) -> list[dict[str, Any]]:
    """How many times as fast as the other sides ours is; the goals are 5 over the loop, and 1e-5 between the gradients."""
    found = compare(turns)
    mine, apart = found.pop("ours")
    table: list[tuple[str, float, float | None, str]] = [
        (
            "MAML step, gradient off the loop's",
            apart,
            1e-5,
            f"over its norm; {TASKS} tasks, {STEPS} inner steps, float32",
        )
    ]
    for name, (seconds, off) in found.items():
        detail = f"{1e3 * mine:.3g} ms against {1e3 * seconds:.3g} ms, medians of {turns} turns"
        if name != "loop":
            detail += f"; its gradient is {off:.1g} off the loop's"
        table.append((f"MAML step, times as fast as {name}", seconds / mine, 5.0 if name == "loop" else None, detail))
    if "parallel-metalearn" not in found:
        print("parallel-metalearn left out: pip install --no-deps parallel-metalearn")
    return [
        {
            "id": f"meta: {name}",
            "value": float(f"{value:.4g}"),
            "goal": goal,
            "holds": None if goal is None else (value <= goal if goal < 1 else value >= goal),
            "detail": detail,
        }
        for name, value, goal, detail in table
    ]
