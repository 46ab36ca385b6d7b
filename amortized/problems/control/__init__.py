"""Control: a state in, a plan out; the cost is that of the path that a differentiable model says the plan will take."""

from amortized.problems.control.chain import ChainStates, MassChain
from amortized.problems.control.closed_loop import ClosedLoop, receding_horizon
from amortized.problems.control.mpc import (
    DoubleIntegrator,
    IntegratorStates,
    LinearControl,
    Plant,
    PlantStates,
    SpeedLimit,
)
from amortized.problems.control.pendulum import CartPole, Pendulum, Policy, SwingUp, System, SystemStates

__all__ = [
    "CartPole",
    "ChainStates",
    "ClosedLoop",
    "DoubleIntegrator",
    "IntegratorStates",
    "LinearControl",
    "MassChain",
    "Pendulum",
    "Plant",
    "PlantStates",
    "Policy",
    "SpeedLimit",
    "SwingUp",
    "System",
    "SystemStates",
    "receding_horizon",
]
