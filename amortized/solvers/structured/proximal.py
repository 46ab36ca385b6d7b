"""Proximal maps and projections, row by row: what :class:`~amortized.solvers.FISTA` asks of a problem, ready made.

``prox_t(b) = argmin_x r(x) + ‖x − b‖² / 2t``; where r is the indicator of a set, the projection on it, whatever t.

Source: Parikh & Boyd (2014), Proximal algorithms, chapter 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amortized.solvers.engine.rows import over


def l1(b: Tensor, t: Tensor) -> Tensor:
    """Soft thresholding, ``r = ‖x‖₁``: every entry moves ``t`` towards zero.

    Args:
        b: points ``(B, *)``.
        t: step times weight ``(B,)``.
    """
    threshold = over(t, b)
    return b.sign() * (b.abs() - threshold).clamp(min=0)


def group(b: Tensor, t: Tensor) -> Tensor:
    """Block soft thresholding, ``r = Σ_g ‖x_g‖₂``, groups along the last dimension: each gets shorter by ``t``.

    Args:
        b: points ``(B, groups, size)``.
        t: step times weight ``(B,)``.
    """
    length = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    left = (length - t[:, None, None]).clamp(min=0)
    return b * torch.where(length > 0, left / length, 0)


def box(b: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
    """The nearest point with ``lower ≤ x ≤ upper``."""
    return torch.clamp(b, torch.as_tensor(lower).to(b), torch.as_tensor(upper).to(b))


def ball(b: Tensor, radius: float = 1.0) -> Tensor:
    """The nearest point with ``‖x‖₂ ≤ radius`` in each row ``(B, *)``."""
    length = over(torch.linalg.vector_norm(b.flatten(1), dim=1), b)
    return b * (radius / length).clamp(max=1).nan_to_num(1.0)


def simplex(b: Tensor) -> Tensor:
    """The nearest point with ``x ≥ 0`` and ``Σ x = 1`` along the last dimension.

    Source: Held, Wolfe & Crowder (1974); Duchi et al. (2008), figure 1.
    """
    n = b.shape[-1]
    ranked = b.sort(-1, descending=True).values
    excess = ranked.cumsum(-1) - 1
    count = torch.arange(1, n + 1, device=b.device, dtype=b.dtype)
    support = (ranked * count > excess).sum(-1, keepdim=True).clamp(min=1)
    shift = excess.gather(-1, support - 1) / support
    return (b - shift).clamp(min=0)


def second_order_cone(b: Tensor) -> Tensor:
    """The nearest point with ``‖x‖₂ ≤ t`` for ``b = (x, t)`` along the last dimension, t the last number.

    Source: Parikh & Boyd (2014), section 6.3.2.
    """
    x, t = b[..., :-1], b[..., -1:]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    half = (length + t).clamp(min=0) / 2
    onto = torch.cat([x * (half / length).nan_to_num(0.0), half], -1)
    return torch.where(length <= t, b, onto)
