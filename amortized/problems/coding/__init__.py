"""Sparse coding: a signal as few columns of a dictionary."""

from amortized.problems.coding.dictionaries import CosineDictionary, Dictionary, GaussianDictionary
from amortized.problems.coding.lasso import SparseCoding
from amortized.problems.coding.signals import Patches, SparseSignals
from amortized.problems.coding.unrolled import ALISTA, LISTA

__all__ = [
    "ALISTA",
    "LISTA",
    "CosineDictionary",
    "Dictionary",
    "GaussianDictionary",
    "Patches",
    "SparseCoding",
    "SparseSignals",
]
