r"""Distributions and finite sets of contexts, as a LightningDataModule.

Contexts are a pure function of ``(seed, split, number of the batch)``. So every process, loader worker and resumed run
sees the same ones; training batches are dealt to processes in turn, evaluation batches too, each exactly once, without
padding; and the only state of the stream is how many batches training has used.
"""

from amortized.contexts.data_module import Batch, ContextDataModule
from amortized.contexts.files import load_contexts
from amortized.contexts.solutions import SolutionSet

__all__ = ["Batch", "ContextDataModule", "SolutionSet", "load_contexts"]
