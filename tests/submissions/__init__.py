"""Typical wrong submissions of the problem sets, and what each deserves; tests/test_assignments.py grades them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Submission:
    """The full solution of a set, but for one mistake.

    answers: {solution cell: source}; the source stands at the end of that cell, so that its functions replace those
    of the solution. loses: the tests that must fail, and no other. points: what is left of the automatic points.
    """

    mistake: str
    answers: dict
    loses: tuple
    points: int
