"""Supervised classification as amortized optimization over the simplex: digits, MNIST, Fashion-MNIST."""

from amortized.problems.classification.accuracy import Accuracy
from amortized.problems.classification.images import LabelledDigits, LabelledImages
from amortized.problems.classification.problem import Classification, Labelled

__all__ = ["Accuracy", "Classification", "Labelled", "LabelledDigits", "LabelledImages"]
