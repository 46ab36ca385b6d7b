"""Contexts as rows: whatever their fields are, row i belongs to problem i."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from amortized.contract.error import ProblemError

Context: TypeAlias = Any
"""A tensor ``(B, *)``, or a (nested) ``NamedTuple`` of tensors that all have the leading dimension B."""


def map_leaves(f: Callable[[Tensor], Tensor], a: Context) -> Context:
    """The context with ``f`` applied to each of its tensors."""
    return f(a) if isinstance(a, Tensor) else type(a)(*(map_leaves(f, part) for part in _parts(a)))


def leaves(a: Context) -> list[Tensor]:
    """The tensors of a context, in order."""
    return [a] if isinstance(a, Tensor) else [leaf for part in _parts(a) for leaf in leaves(part)]


def num_rows(a: Context) -> int:
    """B, the number of problems in a batch of contexts."""
    return leaves(a)[0].shape[0]  # not len(), which a graph with a free batch size cannot hold


def _parts(a: Any) -> tuple[Any, ...]:
    """The fields of a ``NamedTuple``; anything else is refused, with what to write in its place."""
    if isinstance(a, tuple) and hasattr(a, "_fields"):
        return a
    given, fields = type(a).__name__, "x: Tensor; y: Tensor"
    if isinstance(a, dict):
        given = f"dict with the keys {', '.join(map(str, a))}"
        fields = "; ".join(f"{key}: Tensor" for key in a)
    elif isinstance(a, list | tuple):
        given = f"{given} of {len(a)}"
    wrap = f"write `class Fields(NamedTuple): {fields}` and give Fields({'**' if isinstance(a, dict) else ''}...)"
    if hasattr(a, "__array__"):
        wrap = "write torch.as_tensor(...)"
    raise ProblemError(
        f"a context is a tensor, or a NamedTuple of tensors, with one row for each problem; got a {given}: {wrap}"
    )


def take(a: Context, index: Tensor | slice) -> Context:
    """The rows of a context that ``index`` names: a slice, a tensor of row numbers, or one that says of each row whether."""
    if isinstance(index, slice):
        return map_leaves(lambda leaf: leaf[index], a)
    if index.dtype == torch.bool:
        if index.all():
            return a
        index = index.nonzero()[:, 0]
    return map_leaves(lambda leaf: leaf.index_select(0, index), a)


def rows_where(test: Callable[[Tensor], Tensor], a: Context) -> Tensor:
    """Whether ``test`` holds of all numbers of a row, ``(B,)``; it maps a tensor to one of truth values of that shape."""
    return torch.stack([test(leaf).unsqueeze(-1).flatten(1).all(1) for leaf in leaves(a)]).all(0)


def concatenate(parts: Sequence[Context]) -> Context:
    """One context of the rows of all of them, in order."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return type(parts[0])(*map(concatenate, zip(*map(_parts, parts), strict=True)))


def row_hashes(a: Context) -> Tensor:
    """A 64-bit hash of each row's bytes, shape ``(B,)`` on the CPU; equal rows hash alike on any machine."""
    total = None
    for number, leaf in enumerate(leaves(a)):
        rows = leaf.detach().flatten(1) if leaf.ndim > 1 else leaf.detach()[:, None]
        words = rows.cpu().contiguous().view(torch.uint8).to(torch.int64)
        odd = torch.randint(2**62, (words.shape[1],), generator=torch.Generator().manual_seed(number)) * 2 + 1
        mixed = ((words + 1) * odd).sum(1)
        total = mixed if total is None else total * 1_000_003 + mixed
    assert total is not None
    return total
