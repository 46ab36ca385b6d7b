"""What is said to a person whose problem breaks the contract."""

from __future__ import annotations


class ProblemError(ValueError):
    """A problem, or a network for it, breaks the contract; the message says what was given and what to write."""
