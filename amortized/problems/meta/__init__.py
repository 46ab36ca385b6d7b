r"""Meta-learning: ``min_f E_T [ L(m_{f(T)}; T) ]``, the parameters of a small model for each task.

``template`` runs any module with parameters of each task's own, ``few_shot`` is the problem, and says what MAML and
its kin are here, ``regression`` and ``classification`` its two kinds, ``characters`` and ``gaussian_process`` tasks,
``neural_process`` a network for the latter, ``generalization`` says where amortizing beats solving. Source: Shu
(2017), *Amortized optimization*.
"""

from amortized.problems.meta.characters import CharacterTask, CharacterTasks, Glyphs, Omniglot
from amortized.problems.meta.classification import FewShotClassification, Prototypes
from amortized.problems.meta.few_shot import Embedded, FewShot
from amortized.problems.meta.gaussian_process import (
    GaussianProcesses,
    GaussianProcessRegression,
    GaussianProcessTask,
    Points,
)
from amortized.problems.meta.generalization import Generalization, generalization, interval
from amortized.problems.meta.neural_process import NeuralProcess
from amortized.problems.meta.regression import FewShotRegression
from amortized.problems.meta.template import Template

__all__ = [
    "CharacterTask",
    "CharacterTasks",
    "Embedded",
    "FewShot",
    "FewShotClassification",
    "FewShotRegression",
    "GaussianProcessRegression",
    "GaussianProcessTask",
    "GaussianProcesses",
    "Generalization",
    "Glyphs",
    "NeuralProcess",
    "Omniglot",
    "Points",
    "Prototypes",
    "Template",
    "generalization",
    "interval",
]
