"""Control: a state in, a plan out; the cost is that of the path that a differentiable model says the plan will take."""

from amortized.problems.control.closed_loop import ClosedLoop, receding_horizon
from amortized.problems.control.mpc import DoubleIntegrator, IntegratorStates, SpeedLimit
from amortized.problems.control.pendulum import CartPole, Pendulum, Policy, SwingUp, System, SystemStates

__all__ = [
    "CartPole",
    "ClosedLoop",
    "DoubleIntegrator",
    "IntegratorStates",
    "Pendulum",
    "Policy",
    "SpeedLimit",
    "SwingUp",
    "System",
    "SystemStates",
    "receding_horizon",
]
