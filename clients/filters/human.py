"""A person's review: what the user decided on each sample, beside their own."""

from __future__ import annotations

from typing import Any

from untether.clients.filters.case import Case, Finding, Fixed


class Human:
    """Accepts what the user accepted. `case.beside.review` says what they decided (None: nothing; `undecided` tells).

    The score is 1 for accepted, 0 for rejected, and none where nobody decided.
    """

    embeds = None
    reviewed = True

    def __init__(self, section: Any) -> None:
        self._otherwise = section.undecided == "accept"

    def examine(self, case: Case) -> Fixed:
        review = case.beside.review
        decisions = [review(sample) if review is not None else None for sample in case.samples]
        return Fixed([
            Finding(None, self._otherwise) if decided is None else Finding(float(decided), decided)
            for decided in decisions
        ])  # fmt: skip
