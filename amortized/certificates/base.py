"""What a certificate is."""

from __future__ import annotations

import abc
from typing import Any, Literal

from torch import Tensor

from amortized.contract import Context


class Certificate(abc.ABC):
    """What predictions lack at most, or by estimate: a subclass has a ``kind`` and writes :meth:`bound`."""

    kind: str
    """What it is called: ``duality``, ``gradient``, ``fixed point``, ``conformal``."""
    needs: tuple[str, ...] = ("objective",)
    """The methods of a problem that it calls."""

    @property
    @abc.abstractmethod
    def claim(self) -> Literal["bound", "estimate", "residual"]:
        """What the number is: never too small, too small at a stated rate, or zero just where nothing lacks."""

    @abc.abstractmethod
    def bound(self, problem: Any, b: Tensor, a: Context) -> Tensor:
        """The number of each row ``(B,)``, without a graph; infinite where nothing can be said.

        Raises:
            TypeError: if the problem lacks what the certificate needs.
        """

    def require(self, problem: Any) -> None:
        """Raises ``TypeError``, which names them, unless the problem has the methods that the certificate needs."""
        missing = [method for method in self.needs if not hasattr(problem, method)]
        if missing:
            raise TypeError(
                f"the {self.kind} certificate needs more of a problem than {type(problem).__name__} has: "
                f"{', '.join(missing)} (see amortized.contract)"
            )
