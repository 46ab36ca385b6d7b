"""Networks on sets: contexts made of points whose order means nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amortized.contract import Context
from amortized.networks.mlp import MLP


class DeepSet(nn.Module):
    r"""``f({x_1, ..., x_K}) = rho(mean_k phi(x_k))``: the same for any order of the elements, defined for any number.

    With as many outputs as another network has parameters it is a set-conditioned hypernetwork.

    Source: Zaheer et al. (2017), *Deep sets*, theorem 2, with the mean in place of the sum.

    Args:
        fields: the parts of the context that make up an element, each ``(B, K)`` or ``(B, K, d)``.
        in_features: numbers in one element, over all ``fields``.
        out_features: numbers in one solution.
        features: width of the pooled ``phi``.
        hidden: widths of the hidden layers of ``phi`` and of ``rho``.
        activation: as for :class:`~amortized.networks.MLP`.
        mask: the part of the context ``(B, K)`` that says which elements there are, where sets differ in size; ``None``: all. The
            others may hold any finite numbers. A set of none has the mean 0.
    """

    def __init__(
        self,
        fields: Sequence[str],
        in_features: int,
        out_features: int,
        features: int = 128,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        mask: str | None = None,
    ) -> None:
        super().__init__()
        self.fields, self.mask = tuple(fields), mask
        self.phi = MLP(in_features, features, hidden, activation)
        self.rho = MLP(features, out_features, hidden, activation)

    def forward(self, a: Context) -> Tensor:
        x = elements(a, self.fields)
        return self.rho(mean_of(self.phi(x.flatten(0, 1)).unflatten(0, x.shape[:2]), there(a, self.mask)))


class SetTransformer(nn.Module):
    r"""Self-attention among the elements of a set, then their mean: any order gives the same, and any number will do.

    Elements see each other before they are pooled, so what depends on pairs (which of two minima is lower) is learned
    sooner than by a :class:`DeepSet`, at about twice its cost.

    Source: Lee et al. (2019), *Set transformer*, with the mean in place of pooling by attention; layers as in Xiong et
    al. (2020), with the normalisation first.

    Args:
        fields: the parts of the context that make up an element, each ``(B, K)`` or ``(B, K, d)``.
        in_features: numbers in one element, over all ``fields``.
        out_features: numbers in one solution.
        features: width of an element's representation; its layers have twice as many hidden units.
        layers: layers of self-attention.
        heads: attention heads; a divisor of ``features``.
        mask: as for :class:`DeepSet`; no element sees one that is not there.
    """

    def __init__(
        self,
        fields: Sequence[str],
        in_features: int,
        out_features: int,
        features: int = 64,
        layers: int = 2,
        heads: int = 4,
        mask: str | None = None,
    ) -> None:
        super().__init__()
        self.fields, self.mask = tuple(fields), mask
        layer = nn.TransformerEncoderLayer(
            features, heads, 2 * features, dropout=0, activation="gelu", batch_first=True, norm_first=True
        )
        self.embed = nn.Linear(in_features, features)
        self.attend = nn.TransformerEncoder(layer, layers, nn.LayerNorm(features), enable_nested_tensor=False)
        self.readout = nn.Linear(features, out_features)

    def forward(self, a: Context) -> Tensor:
        x, mask = self.embed(elements(a, self.fields)), there(a, self.mask)
        # Attention needs something to look at: of a set of none, what it finds is not counted.
        hidden = None if mask is None else ~(mask | ~mask.any(1, keepdim=True))
        return self.readout(mean_of(self.attend(x, src_key_padding_mask=hidden), mask))


class SetMoments(nn.Module):
    r"""``f({x_1, ..., x_K}) = rho(mean, log standard deviations, artanh of the correlations)``, for sets of K >= 2 elements.

    What these say is all that there is to know of elements drawn from one Gaussian, over any range of scales, where a
    :class:`DeepSet` would have to learn to tell points that are close together. No correlation counts as above 0.9999.

    Args:
        fields: the parts of the context that make up an element, each ``(B, K)`` or ``(B, K, d)``.
        in_features: numbers in one element, over all ``fields``.
        out_features: numbers in one solution.
        hidden: widths of the hidden layers of ``rho``.
        activation: as for :class:`~amortized.networks.MLP`.
    """

    above: Tensor

    def __init__(
        self,
        fields: Sequence[str],
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (128, 128),
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.fields = tuple(fields)
        self.register_buffer("above", torch.triu_indices(in_features, in_features, 1), persistent=False)
        self.rho = MLP(2 * in_features + self.above.shape[1], out_features, hidden, activation)

    def forward(self, a: Context) -> Tensor:
        x = elements(a, self.fields)
        mean = x.mean(1)
        x = x - mean.unsqueeze(1)
        deviations = x.square().mean(1).sqrt().clamp_min(1e-6)
        x = x / deviations.unsqueeze(1)
        i, j = self.above
        correlations = (x[..., i] * x[..., j]).mean(1).clamp(-0.9999, 0.9999)
        return self.rho(torch.cat([mean, deviations.log(), correlations.atanh()], 1))


def elements(a: Context, fields: Sequence[str]) -> Tensor:
    """The named parts of a context, ``(B, K)`` or ``(B, K, d)``, side by side: a set of K elements, ``(B, K, D)``."""
    parts = [getattr(a, field) for field in fields]
    return torch.cat([part.unsqueeze(2) if part.ndim == 2 else part for part in parts], 2)


def there(a: Context, mask: str | None) -> Tensor | None:
    """Which elements of each set there are, ``(B, K)``; ``None``: all."""
    return None if mask is None else getattr(a, mask).bool()


def mean_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean ``(B, D)`` of the elements that there are of sets ``(B, K, D)``; 0 of a set of none."""
    if mask is None:
        return x.mean(1)
    return x.masked_fill(~mask.unsqueeze(2), 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
