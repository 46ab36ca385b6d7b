"""The best solution of each context that any run has found, kept in a file: one reference for all models of a problem."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from amortized import disk
from amortized.contract import Context, ProblemError, of_every_process, row_hashes, take


class Entries(NamedTuple):
    """Feasible solutions of N contexts, by the hashes of those, which are distinct and sorted."""

    keys: Tensor
    """``(N,)``, of :func:`~amortized.contract.row_hashes`."""
    b: Tensor
    """``(N, *)``, float64."""
    value: Tensor
    """``(N,)``, float64."""


class BestKnown:
    """Solutions of contexts, the best so far; a file that may be shared by runs, one after another or at once.

    Where a problem is not convex, what a solver finds depends on where it starts, and the gap on the model that is judged.
    With a store two models of the problem are judged by one reference. It holds the solutions, not their values alone, so
    that each run measures them itself. It is for objectives that are not random and have no trained parameters; contexts
    are told by their bytes, so those of another precision are others.

    Args:
        path: the file, made by :meth:`save` if it is not there.

    Raises:
        ProblemError: if the file is no such store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries = self._read()
        self.found: list[Entries] = []
        """What this run has found, better than what was known."""

    def _read(self) -> Entries | None:
        if not self.path.exists():
            return None
        try:
            found = Entries(**torch.load(self.path, weights_only=True))
            assert len(found.keys) == len(found.b) == len(found.value)
        except Exception as error:
            raise ProblemError(
                f"gap.best_known: {self.path} is not a file of best-known solutions ({type(error).__name__}): name another, "
                "which is made if it is not there"
            ) from error
        return found

    def look_up(self, a: Context, b: Tensor) -> tuple[Tensor, Tensor]:
        """The known solutions of contexts and their values; where none is known ``b`` ``(B, *)`` itself, with the value NaN.

        Raises:
            ProblemError: if the solutions in the file have another shape.
        """
        known, value = b.clone(), torch.full((len(b),), torch.nan, dtype=torch.float64, device=b.device)
        if self.entries is None or not len(self.entries.keys):
            return known, value
        if self.entries.b.shape[1:] != b.shape[1:]:
            raise ProblemError(
                f"gap.best_known: {self.path} holds solutions of shape {tuple(self.entries.b.shape[1:])}, those of this problem "
                f"have {tuple(b.shape[1:])}: name another file"
            )
        keys = row_hashes(a)
        at = torch.searchsorted(self.entries.keys, keys).clamp_max(len(self.entries.keys) - 1)
        row = (self.entries.keys[at] == keys).nonzero()[:, 0]
        known[row.to(b.device)] = self.entries.b[at[row]].to(known)
        value[row.to(b.device)] = self.entries.value[at[row]].to(value)
        return known, value

    def add(self, a: Context, b: Tensor, value: Tensor, better: Tensor) -> None:
        """Keep the solutions ``b`` ``(B, *)`` and their values in rows that are ``better`` ``(B,)`` than what was known."""
        if bool(better.any()):
            keys = row_hashes(take(a, better))
            self.found.append(Entries(keys, b[better].detach().double().cpu(), value[better].detach().double().cpu()))

    def save(self, world_size: int = 1, is_global_zero: bool = True) -> None:
        """Write what was found to the file, beside what other runs have put there; all processes call it together."""
        mine: list[Entries] = self.found
        new = [part for process in of_every_process(mine, world_size) for part in process]
        self.found = []
        if not new:
            return
        if is_global_zero:
            latest = self._read()
            self.entries = _lowest([*([latest] if latest is not None else []), *new])
            file = io.BytesIO()
            torch.save(self.entries._asdict(), file)
            disk.make(self.path.absolute().parent)
            disk.write(self.path, file.getvalue())
        else:
            self.entries = _lowest([*([self.entries] if self.entries is not None else []), *new])


def _lowest(parts: list[Entries]) -> Entries:
    """All of them, of each key the one with the lowest value."""
    every = Entries(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    order = every.value.argsort(stable=True)
    order = order[every.keys[order].argsort(stable=True)]
    keys = every.keys[order]
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    return Entries(*(column[order[first]] for column in every))
