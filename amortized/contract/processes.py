"""What the processes of a run know, together."""

from __future__ import annotations

from typing import Any

import torch


def of_every_process(mine: Any, processes: int) -> list[Any]:
    """What each of the run's processes gives, in their order, for all of them; every one has to call it.

    Args:
        mine: what this one gives; it is pickled, so tensors are to be on the CPU.
        processes: how many there are (the trainer's ``world_size``).
    """
    if processes == 1:
        return [mine]
    every: list[Any] = [None] * processes
    torch.distributed.all_gather_object(every, mine)
    return every
