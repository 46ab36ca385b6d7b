"""Networks that bring their weights from a checkpoint of another run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from amortized.checkpoint import CheckpointError, load


class Pretrained(nn.Module):
    """A network with the weights that a part of a trained module had: ``Pretrained(x) = network(x)``.

    Args:
        network: of the same layers as that part.
        checkpoint: path of a run's checkpoint.
        part: name of the part in the trained module: ``network`` (the encoder of a VAE), ``decoder``.

    Raises:
        CheckpointError: if the file is no good checkpoint (see :func:`amortized.checkpoint.load`), or holds no such
        part, or one of other layers; the message says which.
    """

    def __init__(self, network: nn.Module, checkpoint: str, part: str) -> None:
        super().__init__()
        weights = load(checkpoint)["state_dict"]
        own = {name.removeprefix(f"{part}."): w for name, w in weights.items() if name.startswith(f"{part}.")}
        if not own:
            parts = ", ".join(sorted({name.partition(".")[0] for name in weights}))
            raise CheckpointError(f"{checkpoint} holds no part {part!r}; it has {parts}")
        try:
            network.load_state_dict(own)
        except RuntimeError as error:
            why = str(error).replace("\n\t", " ")
            raise CheckpointError(
                f"{part} of {checkpoint} has other layers than {type(network).__name__}: {why}"
            ) from error
        self.network = network

    def forward(self, *args: torch.Tensor) -> Any:
        return self.network(*args)
