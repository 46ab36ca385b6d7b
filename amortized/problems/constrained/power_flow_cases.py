"""Networks of electric power: the IEEE cases of 14, 30, 57 and 118 buses, as matrices in per unit.

The data in ``cases/`` are those of PYPOWER and MATPOWER, under the licence that lies beside them; the optimum of each case's
own loads is what :class:`~amortized.solvers.InteriorPoint` finds, to 1e-8.
Source: Zimmerman, Murillo-Sánchez & Thomas (2011), *MATPOWER*, section 3, for the model of a branch.
"""

from __future__ import annotations

import json
from importlib.resources import files

import torch
from torch import Tensor, nn

UNLIMITED = 9000.0
"""From this rating on, in MVA, a branch has no limit; 0 means none too."""


def case_names() -> list[str]:
    """The cases that there are, by size."""
    folder = files("amortized.problems.constrained") / "cases"
    names = [path.name.removesuffix(".json") for path in folder.iterdir() if path.name.endswith(".json")]
    return sorted(names, key=lambda name: int(name.removeprefix("case")))


class Grid(nn.Module):
    """A network of N buses, G generators and L branches; powers and voltages in per unit, angles in radians.

    The current that flows from the buses into the network is ``I = Y V``, that from a branch's first bus into it
    ``I = Y_from V``, from its second ``I = Y_to V``, with complex voltages V. Matrices are kept as real and imaginary parts;
    all tensors are buffers in float64, and :meth:`of` gives them in another dtype.

    Args:
        case: ``case14``, ``case30``, ``case57`` or ``case118``.

    Raises:
        ValueError: if there is no such case.
    """

    names: tuple[str, ...]
    """Of the buses, as engineers number them."""
    at: Tensor
    """The bus of each generator ``(G,)``."""
    limited: Tensor
    """Branches with a rating."""
    limited_from: Tensor
    limited_to: Tensor
    load_p: Tensor
    load_q: Tensor
    optimum: Tensor

    def __init__(self, case: str) -> None:
        super().__init__()
        if case not in case_names():
            raise ValueError(f"case must be one of {', '.join(case_names())}; got {case!r}")
        data = json.loads((files("amortized.problems.constrained") / "cases" / f"{case}.json").read_text())
        bus, gen, branch, cost = (
            torch.tensor(data[key], dtype=torch.float64) for key in ("bus", "generator", "branch", "cost")
        )
        number, kind, pd, qd, gs, bs, vmax, vmin = bus.T
        self.base = float(data["base_mva"])
        self.names = tuple(str(int(n)) for n in number)
        place = {int(n): i for i, n in enumerate(number)}
        at = [place[int(n)] for n in gen[:, 0]]
        if len(set(at)) < len(at):
            raise ValueError(f"{case}: generators that share a bus must be joined to one")
        self.slack = int((kind == 3).nonzero()[0])
        n, per_mva = len(bus), 1 / self.base
        optimum = torch.tensor(data["optimum"], dtype=torch.float64)

        start, end = ([place[int(b)] for b in branch[:, k]] for k in (0, 1))
        r, x, charging, rating, ratio, shift = branch[:, 2:].T
        tap = torch.polar(torch.where(ratio == 0, 1.0, ratio), shift.deg2rad())
        series = 1 / torch.complex(r, x)
        own = series + 0.5j * charging
        first, second = (torch.zeros(len(branch), n, dtype=torch.complex128) for _ in range(2))
        rows = torch.arange(len(branch))
        first[rows, start], first[rows, end] = own / tap.abs() ** 2, -series / tap.conj()
        second[rows, end], second[rows, start] = own, -series / tap
        y = torch.diag(torch.complex(gs, bs) * per_mva)
        y = y.index_add(0, torch.tensor(start), first).index_add(0, torch.tensor(end), second)
        limited = ((rating > 0) & (rating < UNLIMITED)).nonzero()[:, 0]

        def keep(**tensors: Tensor) -> None:
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor.contiguous(), persistent=False)

        keep(
            load_p=pd * per_mva, load_q=qd * per_mva, g=y.real, b=y.imag,
            from_g=first[limited].real, from_b=first[limited].imag,
            to_g=second[limited].real, to_b=second[limited].imag, rating=rating[limited] * per_mva,
            p_max=gen[:, 1] * per_mva, p_min=gen[:, 2] * per_mva, q_max=gen[:, 3] * per_mva, q_min=gen[:, 4] * per_mva,
            v_max=vmax, v_min=vmin,
            cost_2=cost[:, 0] * self.base**2, cost_1=cost[:, 1] * self.base, cost_0=cost[:, 2],
            optimum=optimum, at=torch.tensor(at), limited=limited,
            limited_from=torch.tensor(start)[limited], limited_to=torch.tensor(end)[limited],
        )  # fmt: skip
        self.buses, self.generators = n, len(gen)

    def of(self, like: Tensor, *names: str) -> tuple[Tensor, ...]:
        """The named tensors, in the dtype of another."""
        return tuple(getattr(self, name).to(like.dtype) for name in names)
