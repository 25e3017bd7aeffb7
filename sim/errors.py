"""The ways a run ends other than done: the user's mistake (exit code 2), a resumable stop and a defect (both 1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the experiment or the input. The message names the place, the value, the rule and the fix."""


class ResumableStop(Exception):
    """The run stopped before its end (interrupt, unreachable cloud, full disk); what was committed stays valid."""


class Failure(Exception):
    """A host failed for a reason that is neither the user's mistake nor a planned stop: a defect, and its traceback."""


def unknown(what: str, value: str, known: Iterable[str]) -> str:
    """One message for every unknown name: the value, the nearest known one, all known ones."""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return f"unknown {what} `{value}`.{hint} Known: {', '.join(names)}"
