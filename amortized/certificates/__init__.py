r"""Certificates: what a prediction lacks at most, without a solver that has to converge.

A certificate gives a number ``(B,)`` to predictions ``b`` for contexts ``a``, and says what the number means:

=========================  =====================================================  ==============================================
kind                       number                                                 holds
=========================  =====================================================  ==============================================
:class:`Duality`           ``L(b; a) − D(y; a)``, D the dual function             bound on the gap of quadratic programs, always
:class:`Gradient`          ``‖∇L(b; a)‖² / 2μ``; ``‖∇L(b; a)‖`` without μ         bound on the gap where L is μ-strongly convex
:class:`FixedPoint`        ``‖T(b; a) − b‖ / (1 − q)``; without q the residual    bound on ``‖b − b*‖`` where T contracts by q
:class:`Conformal`         ``q (c + ‖∇L(b; a)‖²)``, q calibrated on contexts      bound on the gap to what solvers find,
                           held out                                               for 1 − α of exchangeable contexts
=========================  =====================================================  ==============================================

A bound on the gap says nothing of feasibility: an infeasible prediction's gap may be negative, and its violation is a
number of its own.
"""

from amortized.certificates.base import Certificate
from amortized.certificates.conformal import Conformal
from amortized.certificates.duality import Dual, Duality
from amortized.certificates.smooth import FixedPoint, Gradient

__all__ = ["Certificate", "Conformal", "Dual", "Duality", "FixedPoint", "Gradient"]
