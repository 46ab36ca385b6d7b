"""Strategies of Lightning's that this package does not train with: those that split a model over devices."""

from __future__ import annotations

from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)

from amortized.contract import ProblemError

SPLITTING = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


def check_strategy(strategy: Strategy | str) -> None:
    """Refuse a strategy under which a process does not have the whole model and its optimizer.

    Solvers, certificates and checkpoints need both, outside of the training step.

    Args:
        strategy: an instance, or a name of Lightning's; names that it does not know are left to it.

    Raises:
        ProblemError: naming the strategy, and what to write in its place.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    kind = type(strategy)
    if isinstance(strategy, str):
        kind = StrategyRegistry[strategy]["strategy"] if strategy in StrategyRegistry else Strategy
    if issubclass(kind, SPLITTING):
        raise ProblemError(
            f"strategy {name} splits the model or its optimizer over processes, and the gap, certificates and checkpoints need "
            "the whole of both on each: write --trainer.strategy ddp, with a model that one device can hold"
        )
