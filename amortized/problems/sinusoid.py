r"""Meta-learning: the weights of a small network for each task, the tasks being sinusoids.

A context is a task: points ``(x_k, y_k)`` on one sinusoid, a support set to learn from and a query set to be judged on.
The solution is the weights of a network ``h_w: R -> R`` with two hidden layers, ``w = w_0 + b`` with one random ``w_0``
for all tasks (where all weights are zero, no gradient leads away), and

    ``L(b; a) = mean_k (h_{w_0 + b}(x_k) - y_k)^2`` over the query set.

The model observes the support set alone, so its refinement descends the support error. A few steps of gradient descent
from a :class:`~amortized.networks.LearnedInitialization` are MAML; a :class:`~amortized.networks.DeepSet` that puts out
weights is a hypernetwork. A solver is given the query set and can fit it, so nearly all of the query error is gap.

Source: Finn, Abbeel & Levine (2017), section 5.1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from amortized.contexts.data_module import ContextDataModule
from amortized.contract import draws
from amortized.module import AmortizedModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Task(NamedTuple):
    """B regression tasks with K support and Q query points each."""

    support_x: Tensor
    """``(B, K)``."""
    support_y: Tensor
    """``(B, K)``."""
    query_x: Tensor
    """``(B, Q)``."""
    query_y: Tensor
    """``(B, Q)``."""


class Sinusoid(AmortizedModule):
    """Few-shot regression. Solutions ``(B, P)``: changes ``b`` to the weights and biases of an MLP, one MLP a task.

    Args:
        network: ``Task -> (B, P)``; P = 1761 with 40 hidden units.
        hidden: units in each of the two hidden layers (tanh).
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    objective_name = "query error"

    def __init__(self, network: nn.Module, hidden: int = 40, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        with draws(0, torch.device("cpu")):
            layers = nn.Linear(1, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
        self.shapes = [p.shape for layer in layers for p in layer.parameters()]
        self.w0: Tensor
        self.register_buffer("w0", parameters_to_vector(nn.Sequential(*layers).parameters()).detach())

    def objective(self, b: Tensor, a: Task) -> Tensor:
        return (self.predict(b, a.query_x) - a.query_y).square().mean(1)

    def predict(self, b: Tensor, x: Tensor) -> Tensor:
        """``h_{w_0 + b}(x)`` of each row's own network at its own points: ``(B, P), (B, K) -> (B, K)``."""
        parts = (self.w0 + b).split([shape.numel() for shape in self.shapes], 1)
        w1, c1, w2, c2, w3, c3 = (part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True))
        h = torch.tanh(torch.baddbmm(c1.unsqueeze(1), x.unsqueeze(2), w1.mT))
        h = torch.tanh(torch.baddbmm(c2.unsqueeze(1), h, w2.mT))
        return torch.baddbmm(c3.unsqueeze(1), h, w3.mT).squeeze(2)

    def observe(self, a: Task) -> Task:
        """The task with its support set in the place of the query set."""
        return Task(a.support_x, a.support_y, a.support_x, a.support_y)

    def decode(self, b: Tensor, a: Task) -> Tensor:
        """The weights ``w_0 + b``, ``(B, P)``; a row suits ``torch.nn.utils.vector_to_parameters``."""
        return self.w0 + b

    def draw(self, a: Task, solutions: dict[str, Tensor]) -> Figure:
        """The support and query points of each task, and the curve that each solution draws through them."""
        from matplotlib.figure import Figure

        n = len(a.query_x)
        x = torch.linspace(-5, 5, 201, dtype=a.query_x.dtype, device=a.query_x.device).expand(n, -1)
        curves = {name: self.predict(b, x).cpu() for name, b in solutions.items()}
        figure = Figure(figsize=(10, 1.8 * math.ceil(n / 4) + 0.4), layout="constrained")
        panels = figure.subplots(math.ceil(n / 4), 4, squeeze=False, sharey=True).flat
        for i, axes in zip(range(n), panels, strict=False):
            axes.set(xticks=[], ylim=(-6, 6))
            for (name, curve), style in zip(curves.items(), ("-", ":"), strict=False):
                axes.plot(x[0].cpu(), curve[i], style, color="C3", label=name)
            axes.plot(a.support_x[i].cpu(), a.support_y[i].cpu(), "ok", markersize=4, label="support")
            axes.plot(a.query_x[i].cpu(), a.query_y[i].cpu(), "xk", markersize=4, label="query")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        return figure


class SinusoidContexts(ContextDataModule):
    """Tasks ``y = A sin(x - phi)`` without end: A uniform on ``amplitude``, phi on [0, pi], all x on [-5, 5]; no noise.

    Args:
        shots: points in the support set.
        queries: points in the query set.
        amplitude: the least and the greatest A.
        log_uniform: log A is uniform, not A: every scale as likely as any other (Jeffreys' prior of a scale).
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        amplitude: tuple[float, float] = (0.1, 5.0),
        log_uniform: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.shots, self.queries, self.amplitude, self.log_uniform = shots, queries, amplitude, log_uniform

    def sample(self, n: int, generator: torch.Generator) -> Task:
        u = torch.rand(n, 2 + self.shots + self.queries, generator=generator, device=generator.device)
        least, greatest = self.amplitude
        amplitude = (
            least * (greatest / least) ** u[:, :1] if self.log_uniform else least + (greatest - least) * u[:, :1]
        )
        phase, x = math.pi * u[:, 1:2], 10 * u[:, 2:] - 5
        y = amplitude * torch.sin(x - phase)
        sizes = [self.shots, self.queries]
        (support_x, query_x), (support_y, query_y) = x.split(sizes, 1), y.split(sizes, 1)
        return Task(support_x, support_y, query_x, query_y)
