"""The ways a run ends other than done: the user's mistake (exit code 2), a resumable stop and a defect (both 1)."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the experiment or the input. The message names the place, the value, the rule and the fix."""


class ResumableStop(Exception):
    """The run stopped before its end (interrupt, unreachable cloud, full disk); what was committed stays valid."""


class Failure(Exception):
    """A host failed for a reason that is neither the user's mistake nor a planned stop: a defect, and its traceback."""
