"""Maps that make a prediction feasible, each a solver of one differentiable step: ``--model.refine Gauge``."""
