r"""Certificates: what a prediction lacks at most, without a solver that has to converge.

A certificate gives a number ``(B,)`` to predictions ``b`` for contexts ``a``, and says what the number means:

=========================  =====================================================  =======================================