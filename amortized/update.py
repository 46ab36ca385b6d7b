"""One update of training as one graph of ``torch.compile``: the loss, its gradient, clipping and the optimizer's step.

Small networks train at the speed of what lies around their arithmetic: a call for each operation, of the optimizer too. In one
graph there is little of that left, and the compiler fuses what it finds. The graph is traced through the same Python that runs
without it, so any objective, loss, refinement (second derivatives too) and any optimizer that PyTorch can trace will do. What
it cannot trace is trained without, after one warning that names the line.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from amortized.contract import Context, ProblemError
from amortized.contract.faults import describe, known_cause

if TYPE_CHECKING:
    from amortized.module import AmortizedModule

Update: TypeAlias = Callable[[Context], tuple[Tensor, Tensor] | None]
"""Makes one update; gives the losses ``(B,)`` and whether loss and gradient were finite. ``None``: it could not, and did not."""

SCHEDULED = ("lr", "betas")
"""Numbers of an optimizer that schedulers change: tensors in the graph. All others are constants of it."""

_NUMBER = itertools.count()

BETWEEN = ("on_before_optimizer_step", "configure_gradient_clipping")
"""Hooks that come between gradient and step."""


def compiled_update(module: AmortizedModule, optimizer: torch.optim.Optimizer) -> Update:
    """One update of the module's parameters as one graph: the mean loss, its gradient, clipped as the Trainer says, and the step.

    The first call compiles, and says how long that took; PyTorch keeps what it compiled on disk, for later runs. Where loss or
    gradient is not finite the step is made with zeros in place of the gradient: parameters stay finite, moved by the
    optimizer's momentum and decay alone.

    Raises:
        ProblemError: if the run does something that one call has no room for; from a call, if a scheduler changed what is a
            constant of the graph.
    """
    refuse(module)
    trainer, device = module.trainer, module.device
    at_most = trainer.gradient_clip_val
    clip: Callable[..., Any] = clip_grad_value_ if trainer.gradient_clip_algorithm == "value" else clip_grad_norm_
    # What PyTorch decorates it with is for profilers and hooks, and breaks the graph.
    step = inspect.unwrap(type(optimizer).step)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = [torch.zeros_like(p) for p in parameters]

    def update(a: Context) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            signal = module.amortized_step(a)
            loss = signal.mean()
            with torch.autocast(device.type, enabled=False):
                found = torch.autograd.grad(loss, parameters)
        finite = loss.isfinite() & get_total_norm(found).isfinite()
        for gradient, new in zip(gradients, found, strict=True):
            gradient.copy_(torch.where(finite, new, 0))
        if at_most is not None:
            clip(parameters, at_most)
        step(optimizer)
        return signal.detach(), finite

    # A name of its own: the compiler limits how many graphs it makes of one.
    update.__code__ = update.__code__.replace(co_name=f"update_{next(_NUMBER)}")
    torch._dynamo.config.trace_autograd_ops = True  # gradients are part of the graph
    graph = torch.compile(update, fullgraph=True, dynamic=False)
    inside = _in_graph(optimizer)
    constants: list[dict[str, Any]] | None = None  # known once it is compiled

    def call(a: Context) -> tuple[Tensor, Tensor] | None:
        nonlocal constants
        if constants is not None and _constants(optimizer) != constants:
            raise ProblemError(
                "compile: true takes the optimizer's numbers but lr and betas for constants, and the scheduler changes others "
                "(momentum?): write cycle_momentum: false for it, or compile: false"
            )
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient  # Lightning takes them off after each training step
        started = time.perf_counter()
        try:
            with torch.no_grad(), _held(optimizer, inside):  # without gradients outside, it writes parameters in place
                made: tuple[Tensor, Tensor] = graph(a)
        except Exception as error:
            why = known_cause(error) or f"this cannot be compiled: {_where(error)}"
            tracing = constants is None or isinstance(error, TorchDynamoException | FailOnRecompileLimitHit)
            if not tracing or why.startswith("out of memory"):
                raise
            rank_zero_warn(f"compile: true is left out: {why}")
            return None
        if constants is None:
            constants = _constants(optimizer)
            module.print(f"the update is compiled, in {time.perf_counter() - started:.1f} s")
        return made

    return call


def refuse(module: AmortizedModule) -> None:
    """Say what one call has no room for.

    Raises:
        ProblemError: in one line, with what to write instead.
    """
    trainer = module.trainer
    alone = trainer.world_size == 1 and isinstance(trainer.strategy, SingleDeviceStrategy)
    if not alone or trainer.accumulate_grad_batches > 1:
        raise ProblemError(
            "compile: true makes an update in one call, which needs one process (strategy auto) and accumulate_grad_batches=1; "
            f"there are {trainer.world_size} ({type(trainer.strategy).__name__}) and {trainer.accumulate_grad_batches}: write "
            "compile: false"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ProblemError("compile: true does not scale losses for float16: use precision bf16-mixed or 32")
    if module.finite_updates.action == "skip":
        raise ProblemError(
            "not_finite: skip looks at each gradient before its step, which compile: true makes in one call: write one of them"
        )
    for part in (module, *trainer.callbacks):  # type: ignore[attr-defined]
        for hook in BETWEEN:
            where = next((cls.__module__ for cls in type(part).__mro__ if hook in vars(cls)), "lightning.")
            if not where.startswith(("lightning.", "amortized.module")):
                raise ProblemError(
                    f"compile: true makes gradient and step in one call, and {type(part).__name__}.{hook} comes between them: "
                    "write compile: false"
                )


def _in_graph(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What each group has in the graph in place of its own: tensors for what schedulers change, and no kernel of its own."""
    groups = []
    for group in optimizer.param_groups:
        p = group["params"][0]
        new = functools.partial(torch.empty, (), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        here: dict[str, Any] = {"lr": new()}
        if "betas" in group:
            here["betas"] = tuple(new() for _ in group["betas"])
        if "fused" in group:
            here["fused"] = None
        groups.append(here)
    return groups


@contextlib.contextmanager
def _held(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> Iterator[None]:
    """Inside, the optimizer has those settings, with the present values of its own."""
    before = [{key: group[key] for key in here} for group, here in zip(optimizer.param_groups, groups, strict=True)]
    for group, here, now in zip(optimizer.param_groups, groups, before, strict=True):
        here["lr"].fill_(now["lr"])
        for beta, value in zip(here.get("betas", ()), now.get("betas", ()), strict=True):
            beta.fill_(value)
        group.update(here)
    try:
        yield
    finally:
        for group, now in zip(optimizer.param_groups, before, strict=True):
            group.update(now)


def _constants(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in group.items() if key != "params" and key not in SCHEDULED}
        for group in optimizer.param_groups
    ]


def _where(error: Exception) -> str:
    """An error in words, with the line under it that the compiler came to last."""
    lines = re.findall(r'File "(.+)", line (\d+), in (\S+)', str(error))
    file, number, name = lines[-1] if lines else ("", "", "")
    return describe(error) + (f" ({Path(file).name}, line {number}, in {name})" if lines else "")
