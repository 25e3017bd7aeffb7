"""The two ways a run ends other than done: the user's mistake (exit code 2) and a stop that can be resumed (1)."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the experiment or the input. The message names the place, the value, the rule and the fix."""


class ResumableStop(Exception):
    """The run stopped before its end (interrupt, unreachable cloud, full disk); what was committed stays valid."""
