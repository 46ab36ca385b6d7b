"""Solution sets: contexts with their solutions, read from the folder of shards that ``amortized solve`` writes.

Shards are mapped into memory, not read into it: a batch costs the rows that it has, however many there are. A set that is small
is read whole, and then lies where training does. Which rows a batch has is a pure function of the data's seed and the
batch's number, as with any finite set; rows for which no solver found anything finite are in none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from amortized import npz
from amortized.contexts.files import fields
from amortized.contract import Context, ProblemError, Solved, leaves, map_leaves, num_rows, take

if TYPE_CHECKING:
    from amortized.contexts.data_module import ContextDataModule

MEMORY = 2**28
"""Bytes of a set up to which it is read whole."""

MAKE = "amortized solve -c RECIPE --ckpt_path untrained"


class SolutionSet:
    """The folder of a solution set, as ``amortized solve -c RECIPE --ckpt_path untrained --out FOLDER`` writes it.

    Args:
        folder: of the shards.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def prepare(self, data: ContextDataModule) -> None:
        """Called by one process of each machine before a training opens the set."""

    def open(self, data: ContextDataModule, like: Context) -> Context | SolvedRows:
        """All rows as :class:`~amortized.contract.Solved`, in memory if they are few, else read as they are needed.

        Args:
            data: whose contexts these are.
            like: contexts of the expected fields, shapes and types.

        Raises:
            ProblemError: if it is no such folder, is not finished, holds no contexts or those of evaluation, is of other
                contexts than the data's, is damaged, or holds no solution.
        """
        plan = self._plan()
        rows = SolvedRows(self.folder, plan["shards"], like)
        self._check_contexts(data, plan, rows)
        return rows if rows.bytes > MEMORY else rows.take(torch.arange(len(rows)))

    def _plan(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise ProblemError(
                f"there is no solution set in {self.folder}: make it with {MAKE} --contexts N --out {self.folder}"
            )
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        done = sum(1 for _ in self.folder.glob("shard-*.json"))
        if done < plan["shards"]:
            raise ProblemError(
                f"{self.folder} has {done} of {plan['shards']} shards: run the command that began it again, which goes on"
            )
        if not plan["with_contexts"]:
            raise ProblemError(f"{self.folder} has solutions without contexts: make it anew, --with_contexts true")
        if plan.get("source") == "test":
            raise ProblemError(
                f"{self.folder} is of test contexts, which training must not see: make it anew, --split train"
            )
        return plan

    def _check_contexts(self, data: ContextDataModule, plan: dict[str, Any], rows: SolvedRows) -> None:
        """The first contexts, drawn anew, must be the same; those of a file, or of a device that is not here, cannot be."""
        source, device = plan.get("source"), plan["device"]
        n = min(plan["batch_size"], plan["shard_size"], plan["contexts"])
        if source == "train":
            here = data.batch("solve", 0)
        elif source == "drawn" and (device == "cpu" or torch.cuda.is_available()):
            here = data.produce(0, n, device)
        else:
            return
        here = take(here, slice(0, n))
        there = rows.first(num_rows(here))
        pairs = zip(leaves(here), leaves(there), strict=True)
        if not all(bool(torch.isclose(x.cpu(), y, rtol=0, atol=0, equal_nan=True).all()) for x, y in pairs):
            raise ProblemError(
                f"{self.folder} is of other contexts than {type(data).__name__} has with these settings and seed {data.seed} "
                f"(that of the set is {plan['seed']}): solve them into another folder"
            )


class SolvedRows(Dataset):
    """The rows of a finished folder, through memory maps.

    Args:
        folder: of the shards.
        shards: how many there are.
        like: contexts of the expected fields, shapes and types.
    """

    def __init__(self, folder: Path, shards: int, like: Context) -> None:
        self.paths = [folder / f"shard-{shard:06d}.npz" for shard in range(shards)]
        self.like = map_leaves(lambda leaf: leaf[:0].cpu(), like)
        self.names = [f"a.{name}".removesuffix(".") for name in fields(like)]
        """Columns of the contexts."""
        self._shards: dict[int, dict[str, np.ndarray]] = {}
        self._check(folder)
        notes = [json.loads(path.with_suffix(".json").read_text()) for path in self.paths]
        self.usable = [
            np.isfinite(self._shard(shard)["objective"]).nonzero()[0] if note["finite"] < note["rows"] else None
            for shard, note in enumerate(notes)
        ]
        """Rows of a shard that have a finite solution, where that is not all of them."""
        self.ends = torch.tensor([note["finite"] for note in notes]).cumsum(0)
        self._tell(folder, sum(note["rows"] for note in notes), sum(note["paths"][0] for note in notes))

    def _check(self, folder: Path) -> None:
        expected = dict(zip(self.names, leaves(self.like), strict=True))
        found = {name: column for name, column in self._shard(0).items() if name == "a" or name.startswith("a.")}
        if {name: (column.shape[1:], column.dtype) for name, column in found.items()} != {
            name: (tuple(leaf.shape[1:]), leaf.numpy().dtype) for name, leaf in expected.items()
        }:
            forms = [
                ", ".join(f"{name[2:]} {tuple(leaf.shape[1:])} {leaf.dtype}".strip() for name, leaf in part.items())
                for part in (found, expected)
            ]
            raise ProblemError(f"{folder} is of other contexts: there a row has {forms[0]}; expected {forms[1]}")

    def _tell(self, folder: Path, rows: int, unsolved: int) -> None:
        """Say that some contexts are left out; what is learned from none is a mistake."""
        mend = "give the solver more steps or a larger tol, or drop contexts that have no solution"
        if unsolved == rows:
            raise ProblemError(f"{folder} has no solution: none of {rows} contexts was solved; {mend}")
        if unsolved:
            rank_zero_warn(
                f"{folder}: {unsolved} of {rows} contexts were not solved, or nothing feasible was found; RegressionLoss "
                f"gives them the weight `unsolved`, which is 0 unless it is set. To have more: {mend}"
            )

    @property
    def bytes(self) -> int:
        """Of all that is read."""
        return sum(path.stat().st_size for path in self.paths)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> Any:
        return map_leaves(lambda leaf: leaf[0], self.take(torch.tensor([row])))

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which makes maps of its own."""
        return self.__dict__ | {"_shards": {}}

    def take(self, index: Tensor) -> Solved:
        """The rows that ``index`` names, in its order."""
        shard = torch.searchsorted(self.ends, index, right=True).numpy()
        order = shard.argsort(kind="stable")
        touched, first = np.unique(shard[order], return_index=True)
        found: dict[str, np.ndarray] = {}
        for number, at in zip(touched.tolist(), np.split(order, first[1:]), strict=True):
            rows = index.numpy()[at] - (int(self.ends[number - 1]) if number else 0)
            usable, columns = self.usable[number], self._shard(number)
            rows = rows if usable is None else usable[rows]
            for name in ("b", "objective", "path", *self.names):
                if name not in found:
                    found[name] = np.empty((len(index), *columns[name].shape[1:]), columns[name].dtype)
                found[name][at] = columns[name][rows]
        b, objective, path = (torch.from_numpy(found[name]) for name in ("b", "objective", "path"))
        return Solved(self._context(found), b, objective, path != 0)

    def first(self, n: int) -> Context:
        """The first n contexts of the first shard, those without a solution too."""
        return self._context({name: self._shard(0)[name][:n].copy() for name in self.names})

    def _context(self, columns: dict[str, np.ndarray]) -> Context:
        parts = iter([torch.from_numpy(columns[name]) for name in self.names])
        return map_leaves(lambda _: next(parts), self.like)

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        if number not in self._shards:
            path = self.paths[number]
            try:
                self._shards[number] = npz.mapped(path)
            except (OSError, ValueError) as error:
                raise ProblemError(
                    f"{path} is damaged or missing: run the command that made it again, with --verify true"
                ) from error
        return self._shards[number]
