r"""Learning from few examples as amortized optimization: the parameters of a small model for each task.

A context is a task T: a support set to learn from and a query set to be judged on. The solution is the task's own parameters b
of a :class:`~amortized.problems.meta.Template` m, and

    ``L(b; T) = mean_k loss(m(b, x_k), y_k)``   over the query set.

The model observes the support set alone, so that its refinement descends the support error. What is called by many names is one
choice of ``network`` and ``refine`` each:

====================  ==========================================  ================================================  ===========
method                network                                     refine                                            template
====================  ==========================================  ================================================  ===========
MAML                  ``LearnedInitialization``                   ``GradientDescent``                               ``all``
first-order MAML      ``LearnedInitialization``                   ``GradientDescent(unroll=0)``                     ``all``
Meta-SGD              ``LearnedInitialization``                   ``GradientDescent(learn_lr=True, features=P)``    ``all``
ANIL                  ``LearnedInitialization``                   ``GradientDescent``                               ``last``
iMAML                 ``LearnedInitialization``                   ``Implicit(LBFGS(20), anchor=0.5)``               ``all``
CAVIA                 ``LearnedInitialization``                   ``GradientDescent``                               ``film``
hypernetwork          ``DeepSet``, ``SetTransformer``             none                                              any
hybrid                ``DeepSet``, ``SetTransformer``             ``GradientDescent``                               any
neural process        ``DeepSet``, ``SetTransformer``             none                                              ``film``
prototypes            ``Prototypes``                              none, or ``GradientDescent``                      ``last``
====================  ==========================================  ================================================  ===========

A solver that is given the query set can fit it, so the gap is nearly all of the query error. What a solver would do
in the model's place, on the support set, is measured by :class:`~amortized.problems.meta.Generalization`.

Source: Shu (2017), *Amortized optimization*; Finn, Abbeel & Levine (2017), *Model-agnostic meta-learning*; Hospedales et al.
(2021), *Meta-learning in neural networks: a survey*; Li et al. (2017), *Meta-SGD*; Raghu et al. (2020), *Rapid
learning or feature reuse?* (ANIL); Rajeswaran et al. (2019), *Meta-learning with implicit gradients*; Zintgraf et al.
(2019), *Fast context adaptation via meta-learning* (CAVIA).
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amortized.contract import num_rows
from amortized.module import AmortizedModule
from amortized.problems.meta.template import Template


class Embedded(NamedTuple):
    """B tasks, their points gone through the shared layers of a template, and which of the points there are."""

    support_x: Tensor
    """``(B, K, *)``."""
    support_y: Tensor
    """``(B, K, *)``; labels ``(B, K)``."""
    support_mask: Tensor
    """``(B, K)``: whether there is a point."""
    query_x: Tensor
    """``(B, Q, *)``."""
    query_y: Tensor
    """``(B, Q, *)``; labels ``(B, Q)``."""
    query_mask: Tensor
    """``(B, Q)``."""


class FewShot(AmortizedModule, abc.ABC):
    """Few-shot learning. Solutions ``(B, P)``: changes b to the parameters that a template leaves to each task.

    Contexts are any ``NamedTuple`` with ``support_x`` ``(B, K, *)``, ``support_y``, ``query_x`` ``(B, Q, *)`` and
    ``query_y``; where sets differ in size also ``support_mask`` ``(B, K)`` or ``query_mask`` ``(B, Q)``, which say
    where there is a point.

    Args:
        network: ``Embedded -> (B, P)``; it sees support sets alone, after the layers that all tasks share.
        template: the model of a task.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    def __init__(self, network: nn.Module, template: Template, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        self.template = template

    @abc.abstractmethod
    def error(self, out: Tensor, y: Tensor) -> Tensor:
        """The loss at each point, ``(B, K)``, of the template's outputs ``(B, K, *)``."""

    def objective(self, b: Tensor, a: Any) -> Tensor:
        a = self.prepare(a, support=False)
        error = self.error(self.template.head(b, a.query_x), a.query_y)
        return (error * a.query_mask).sum(1) / a.query_mask.sum(1).clamp(min=1)

    def prepare(self, a: Any, support: bool = True) -> Embedded:
        """The tasks with their points gone through the template's shared layers, which no solver changes."""
        if isinstance(a, Embedded):
            return a
        support_x, query_x = points(a.support_x), points(a.query_x)
        return Embedded(
            self.template.features(support_x) if support else support_x,
            a.support_y,
            mask(a, "support"),
            self.template.features(query_x),
            a.query_y,
            mask(a, "query"),
        )

    def observe(self, a: Any) -> Embedded:
        """The task with its support set in the place of the query set."""
        x = a.support_x if isinstance(a, Embedded) else self.template.features(points(a.support_x))
        part = x, a.support_y, mask(a, "support")
        return Embedded(*part, *part)

    def initial(self, a: Any) -> Tensor:
        """``w_0`` itself."""
        return a.support_x.new_zeros(num_rows(a), self.template.size)

    def decode(self, b: Tensor, a: Any) -> Tensor:
        """The tasks' own parameters ``w_0 + b``, ``(B, P)``; ``template.weights(b)`` has them by name."""
        return torch.cat([w.flatten(1) for w in self.template.weights(b).values()], 1)


def points(x: Tensor) -> Tensor:
    """Points ``(B, K, *)``: those of one number may come as ``(B, K)``."""
    return x.unsqueeze(2) if x.ndim == 2 else x


def mask(a: Any, part: str) -> Tensor:
    """Which points of the ``support`` or the ``query`` set there are, ``(B, K)``; all, where a context does not say."""
    given: Tensor | None = getattr(a, f"{part}_mask", None)
    x: Tensor = getattr(a, f"{part}_x")
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if given is None else given
