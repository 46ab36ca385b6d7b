r"""The model of a task: any ``torch.nn.Module``, run with other parameters for each task of a batch.

Task i has the parameters ``w_i = w_0 + b_i`` for itself, and shares all others with every task:

    ``m(b, x)_i = model(x_i; w_0 + b_i, shared)``,   b ``(B, P)``, x ``(B, K, *)``.

All tasks of a batch run at once: ``torch.func.functional_call`` under ``torch.vmap``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from amortized.contract import ProblemError

Adapt = Literal["all", "last", "film", "low_rank"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_WHOLE_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Template(nn.Module):
    """``m(b, x)``, the model of each task at its own points: ``(B, P), (B, K, *) -> (B, K, *)``.

    What a task has for itself:

    * ``all``: every parameter. P grows with the model.
    * ``last``: the last layer that has parameters, a linear one, which starts at zero. The layers before it are shared and run
      once for all tasks (ANIL: Raghu et al. 2020, *Rapid learning or feature reuse?*).
    * ``film``: a factor and an offset for each channel that a linear or convolutional layer puts out (Perez et al. 2018, *FiLM*).
    * ``low_rank``: ``W + U V`` in place of each layer's weight W, U and V of ``rank`` (Hu et al. 2022, *LoRA*; in convolutions U
      mixes channels).

    Shared parameters train with the network, as a decoder does. ``w_0``, what the model came with, does not train: it is where
    ``b = 0``, and moving it would be moving ``b``. A task sees only its own points, so layers that look at a whole batch
    (``BatchNorm``) are refused; ``GroupNorm``, ``LayerNorm`` and ``InstanceNorm`` are as good here.

    Args:
        model: maps K points ``(K, *)`` to K outputs ``(K, *)``, each from its own point, or from all K.
        adapt: what a task has for itself.
        rank: of ``low_rank``.

    Raises:
        ValueError: if the model has nothing to adapt, or a layer that would mix tasks.
    """

    def __init__(self, model: nn.Module, adapt: Adapt = "all", rank: int = 4) -> None:
        super().__init__()
        for name, layer in model.named_modules():
            if isinstance(layer, _WHOLE_BATCH):
                raise ValueError(
                    f"Template: {type(layer).__name__} ({name or 'the model'}) mixes the tasks of a batch: write GroupNorm, "
                    "LayerNorm or InstanceNorm"
                )
        self.base: nn.Module = nn.Identity()
        if adapt == "last":
            self.base, model = _without_last_layer(model)
        elif adapt == "film":
            model = _each_layer(model, FiLM)
        elif adapt == "low_rank":
            model = _each_layer(model, lambda layer: LowRank(layer, rank))
        elif adapt != "all":
            raise ValueError(f"Template: adapt must be all, last, film or low_rank; got {adapt!r}")
        self.model = model
        # One parameter under two names: functional_call would look for such in every call.
        names, all_names = (dict(model.named_parameters(remove_duplicate=once)) for once in (True, False))
        self.tied = len(names) < len(all_names)
        self.shapes = {
            name: p.shape
            for name, p in model.named_parameters()
            if adapt in ("all", "last") or name.rpartition(".")[2].startswith("task_")
        }
        if not self.shapes:
            raise ValueError(f"Template: {type(model).__name__} has no layer for adapt={adapt!r}")
        for name in self.shapes:
            model.get_parameter(name).requires_grad_(False)

    @property
    def size(self) -> int:
        """P, the parameters that a task has for itself."""
        return sum(shape.numel() for shape in self.shapes.values())

    def weights(self, b: Tensor) -> dict[str, Tensor]:
        """``w_0 + b`` by name, each ``(B, *)``.

        Raises:
            ProblemError: if solutions are not of P numbers.
        """
        if b.shape[1] != self.size:
            raise ProblemError(
                f"a task of this template has {self.size} parameters of its own; solutions have {b.shape[1]}: give the network "
                f"out_features: {self.size}"
            )
        w = torch.cat([self.model.get_parameter(name).flatten() for name in self.shapes]) + b
        parts = w.split([shape.numel() for shape in self.shapes.values()], 1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def features(self, x: Tensor) -> Tensor:
        """What the shared layers make of points ``(B, K, *)``; the points themselves, unless ``adapt`` is ``last``."""
        if isinstance(self.base, nn.Identity):
            return x
        return self.base(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def head(self, b: Tensor, features: Tensor) -> Tensor:
        """The outputs ``(B, K, *)`` of each task's own model at its :meth:`features` ``(B, K, *)``."""

        def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            out: Tensor = functional_call(self.model, weights, (x,), tie_weights=self.tied)
            return out

        if not len(b):  # vmap needs a row
            return self.model(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return torch.vmap(one, randomness="different")(self.weights(b), features)

    def forward(self, b: Tensor, x: Tensor) -> Tensor:
        return self.head(b, self.features(x))


class FiLM(nn.Module):
    """``(1 + s_c) layer(x)_c + t_c`` for each output channel c, with s and t a task's own."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        channels, self.beyond = len(layer.weight), layer.weight.ndim - 2
        self.task_scale, self.task_offset = (nn.Parameter(torch.zeros(channels)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        s, t = (p.view(-1, *[1] * self.beyond) for p in (self.task_scale, self.task_offset))
        return (1 + s) * self.layer(x) + t


class LowRank(nn.Module):
    """``layer(x) + U V x``: V as the layer but to ``rank`` channels, U, at first zero, from these to its own; both a task's."""

    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"Template: rank must be at least 1; got {rank}")
        self.layer = layer
        channels, *fan = layer.weight.shape
        self.task_down = nn.Parameter(torch.randn(rank, *fan) / math.sqrt(math.prod(fan)))
        self.task_up = nn.Parameter(torch.zeros(channels, rank))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return self.layer(x) + nn.functional.linear(nn.functional.linear(x, self.task_down), self.task_up)
        down = functional_call(self.layer, {"weight": self.task_down, **self._no_bias()}, (x,))
        return self.layer(x) + torch.einsum("cr,kr...->kc...", self.task_up, down)

    def _no_bias(self) -> dict[str, Tensor]:
        return {} if self.layer.bias is None else {"bias": self.task_down.new_zeros(len(self.task_down))}


def _each_layer(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The model with every linear and convolutional layer wrapped."""
    if isinstance(model, _LAYERS):
        return wrap(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, _LAYERS):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, wrap(layer))
    return model


def _without_last_layer(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model with nothing in the place of its last layer, and that layer, at zero."""
    name, last = [
        (name, m) for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None
    ][-1]
    if not isinstance(last, nn.Linear) or not name:
        raise ValueError(
            f"Template: adapt='last' needs a model that ends in a linear layer; the last with parameters is "
            f"{name or 'all of it'}, a {type(last).__name__}"
        )
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, nn.Identity())
    for p in last.parameters():
        nn.init.zeros_(p)
    return model, last
