"""The parts of a model, tried on the first batch: what does not fit together is told before anything is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from amortized.contract import Context, ProblemError, check_constraints, check_objective, value_and_grad, violation
from amortized.contract.faults import describe

if TYPE_CHECKING:
    from amortized.module import AmortizedModule


def check_network(module: AmortizedModule, a: Context) -> None:
    """Check network, start, objective and constraints on contexts.

    Raises:
        ProblemError: with what was given, what was expected and what to do.
    """
    name = type(module).__name__
    if module.refine is not None:
        try:
            module.refine.require(module)
        except TypeError as error:
            raise ProblemError(f"model.refine: {error}") from error
    with _told(f"{name}.observe fails on contexts of shape {_shapes(a)}"):
        seen = module.observe(a)
    with _told(f"network {type(module.network).__name__} fails on contexts of shape {_shapes(seen)}"):
        b = module.network(seen)
    with _told(f"{name}.initial fails on contexts of shape {_shapes(a)}"):
        start = module.initial(a)
    if start.shape != b.shape:
        raise ProblemError(
            f"the network must predict solutions like initial(a), of shape {tuple(start.shape)}; it gives {tuple(b.shape)} "
            f"for contexts of shape {_shapes(seen)}: change the network's output features"
        )
    with _told(f"{name}.objective fails on b of shape {tuple(b.shape)} and contexts of shape {_shapes(a)}"):
        check_objective(module, b, a)
    if not module.differentiable and module.loss.uses_gradient:
        raise ProblemError(
            f"{type(module.loss).__name__} follows the gradient of the objective, and {name} has none (differentiable = "
            "False): --model.loss ZerothOrderLoss"
        )
    if module.differentiable and module.loss.uses_gradient and not value_and_grad(module, b, a)[1].any():
        rank_zero_warn(
            f"the gradient of {name}.objective is zero in every row of the first batch: if the objective is piecewise "
            "constant, say `differentiable = False` in the class and train by ZerothOrderLoss"
        )
    with _told(f"{name}'s constraints fail on b of shape {tuple(b.shape)} and contexts of shape {_shapes(a)}"):
        check_constraints(module, b, a)
        violation(module, b, a)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Inside, whatever goes wrong in a user's code is one line, with its place."""
    try:
        yield
    except ProblemError:
        raise
    except Exception as error:
        raise ProblemError(f"{what}: {describe(error)}; AMORTIZED_DEBUG=1 shows all") from error


def _shapes(a: Context) -> Any:
    return tuple(a.shape) if isinstance(a, Tensor) else {k: _shapes(v) for k, v in a._asdict().items()}
