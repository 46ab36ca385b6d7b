"""Solution sets that are made when training first needs them."""

from __future__ import annotations

import json

import torch

from amortized.contexts.data_module import ContextDataModule
from amortized.contexts.solutions import SolutionSet
from amortized.contract import ProblemError
from amortized.module import AmortizedModule
from amortized.shipping.production import Plan, described, produce, size, source
from amortized.shipping.trained import TrainedSolver
from amortized.solvers import Solver, solver_for


class SolveOnce(SolutionSet):
    """Solves contexts of the data before the first training, into a folder that later ones read.

    It is what ``amortized solve --ckpt_path untrained`` does: killed, it goes on where it was; a folder of another solver or of
    other numbers is refused. One process of each machine works, the others wait: for sets of hours run ``amortized solve`` on
    many, and give the data its folder.

    Args:
        folder: of the shards.
        contexts: how many to solve; ``None``: all training contexts of a finite set.
        solver: from the cold start; ``None``: that of the problem's structure.
        shard_size: contexts in a shard, and solved together.
        tol: where the problem can prove what a solution lacks, what it may.
    """

    def __init__(
        self,
        folder: str,
        contexts: int | None = None,
        solver: Solver | None = None,
        shard_size: int = 4096,
        tol: float = 1e-3,
    ) -> None:
        super().__init__(folder)
        for name, value in (("contexts", contexts), ("shard_size", shard_size)):
            if value is not None and value < 1:
                raise ValueError(f"SolveOnce: {name} must be at least 1; got {value}")
        self.contexts, self.solver, self.shard_size, self.tol = contexts, solver, shard_size, tol

    def prepare(self, data: ContextDataModule) -> None:
        trainer = data.trainer
        module = trainer.lightning_module if trainer is not None else None
        if trainer is None or not isinstance(module, AmortizedModule):
            raise ProblemError("SolveOnce solves the problem of an AmortizedModule: fit one with these data")
        on_gpu = trainer.strategy.root_device.type == "cuda"
        self.make(module, data, str(trainer.precision), "cuda" if on_gpu else "cpu")

    def make(
        self, module: AmortizedModule, data: ContextDataModule, precision: str | None = None, device: str = "cpu"
    ) -> None:
        """Solve what is not solved yet.

        Args:
            module: whose problem it is.
            data: whose contexts.
            precision: of the trainer.
            device: to solve on; a folder that was begun on another goes on there.

        Raises:
            ProblemError: if the folder is of another plan.
        """
        solver = self.solver if self.solver is not None else solver_for(module)
        manifest, training, place = self.folder / "manifest.json", module.training, module.device
        if manifest.is_file():
            device = json.loads(manifest.read_text(encoding="utf-8"))["device"]
        found = TrainedSolver(module, data, solver, None, type(module).__name__, precision, trained=False)
        try:
            data.solutions = None  # meanwhile
            taken = source(found, "train")
            if self.contexts is None and taken == "drawn":
                raise ProblemError(
                    f"SolveOnce: {type(data).__name__} draws contexts without end: give `contexts`, how many to solve"
                )
            contexts = self.contexts if self.contexts is not None else size(found, taken)
            plan = Plan(
                recipe=type(module).__name__,
                checkpoint="untrained",
                contexts=contexts,
                shard_size=min(self.shard_size, contexts),
                batch_size=self.shard_size,
                tol=self.tol,
                seed=data.seed,
                with_contexts=True,
                device=device,
                source=taken,
                solver=described(solver),
            )
            if device == "cpu" or torch.cuda.is_available():
                found.to(device)
            produce(found, self.folder, plan)
        finally:
            data.solutions = self
            module.train(training)
            found.to(place)
