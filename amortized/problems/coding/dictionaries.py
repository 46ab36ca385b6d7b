"""Dictionaries: matrices ``D`` whose n columns, the atoms, have unit length; fixed, or trained with what codes in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class Dictionary(nn.Module):
    """``D``, ``(m, n)``, with columns of unit length.

    Args:
        atoms: where the columns start, ``(m, n)``; they are brought to unit length.
        learn: make them parameters, which train jointly with the module; the length stays one.
    """

    atoms: Tensor
    largest: Tensor

    def __init__(self, atoms: Tensor, learn: bool = False) -> None:
        super().__init__()
        atoms = normalize(atoms.to(torch.get_default_dtype()), dim=0)
        self.learn = learn
        if learn:
            self.atoms = nn.Parameter(atoms)
        else:
            self.register_buffer("atoms", atoms, persistent=False)
            self.register_buffer("largest", _largest(atoms), persistent=False)

    def forward(self) -> Tensor:
        """The matrix ``(m, n)``, on the graph of the atoms where they are learned."""
        return normalize(self.atoms, dim=0) if self.learn else self.atoms

    def curvature(self) -> Tensor:
        """``‖D‖₂²``, the largest curvature of ``½ ‖D b − a‖²``, without a graph: a step of its inverse is safe."""
        return _largest(self()) if self.learn else self.largest


class GaussianDictionary(Dictionary):
    """Independent standard normal entries, columns then brought to unit length: a function of its arguments.

    Args:
        features: m, numbers in a signal.
        atoms: n, columns.
        seed: of the entries.
        learn: see :class:`Dictionary`.
    """

    def __init__(self, features: int, atoms: int, seed: int = 0, learn: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        super().__init__(torch.randn(features, atoms, generator=draw, dtype=torch.float64), learn)


class CosineDictionary(Dictionary):
    """Products of two cosines on a square patch, an overcomplete cosine transform.

    Column ``(p, q)`` is ``cos((i + ½) p π / F) cos((j + ½) q π / F)``, without its mean but for ``p = q = 0``.

    Source: Elad & Aharon (2006), *Image denoising via sparse and redundant representations*, section V.

    Args:
        side: of the patch, in pixels; m is its square.
        frequencies: F, along each side, at least ``side``; n is its square.
        learn: see :class:`Dictionary`.

    Raises:
        ValueError: if there are fewer frequencies than pixels along a side.
    """

    def __init__(self, side: int = 8, frequencies: int = 12, learn: bool = False) -> None:
        if frequencies < side:
            raise ValueError(f"CosineDictionary: frequencies must be at least the side, {side}; got {frequencies}")
        at, frequency = (torch.arange(count, dtype=torch.float64) for count in (side, frequencies))
        waves = torch.cos((at + 0.5).unsqueeze(1) * frequency * math.pi / frequencies)
        waves[:, 1:] -= waves[:, 1:].mean(0)
        super().__init__(torch.einsum("ip,jq->ijpq", waves, waves).reshape(side**2, frequencies**2), learn)


@torch.no_grad()
def _largest(atoms: Tensor) -> Tensor:
    """The largest eigenvalue of ``D Dᵀ``."""
    return torch.linalg.eigvalsh(atoms @ atoms.T)[-1]
