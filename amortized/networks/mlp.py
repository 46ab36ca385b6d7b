"""Multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amortized.contract import Context, leaves

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class MLP(nn.Sequential):
    """Fully connected layers on a context whose parts are flattened and joined: ``(B, *) -> (B, out_features)``.

    Args:
        in_features: numbers in one context.
        out_features: numbers in one solution.
        hidden: widths of the hidden layers.
        activation: ``relu``, ``gelu``, ``silu`` or ``tanh``.
    """

    def __init__(
        self, in_features: int, out_features: int, hidden: Sequence[int] = (128, 128), activation: str = "relu"
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        widths = [in_features, *hidden]
        layers: list[nn.Module] = []
        for inward, outward in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(inward, outward), ACTIVATIONS[activation]()]
        super().__init__(*layers, nn.Linear(widths[-1], out_features))

    def forward(self, a: Context) -> Tensor:
        parts = [leaf.flatten(1) for leaf in leaves(a)]
        return super().forward(parts[0] if len(parts) == 1 else torch.cat(parts, 1))


class ResidualMLP(nn.Module):
    """``f(a) = W a + c + MLP(a)``: an affine map and what it lacks, ``(B, *) -> (B, out_features)``.

    For solutions that are nearly affine in their context, or affine in pieces, as those of programs are in what their bounds and
    linear terms say: the layers then learn what bends.

    The arguments are those of :class:`MLP`.
    """

    def __init__(
        self, in_features: int, out_features: int, hidden: Sequence[int] = (128, 128), activation: str = "relu"
    ) -> None:
        super().__init__()
        self.affine = MLP(in_features, out_features, ())
        self.residual = MLP(in_features, out_features, hidden, activation)

    def forward(self, a: Context) -> Tensor:
        return self.affine(a) + self.residual(a)
