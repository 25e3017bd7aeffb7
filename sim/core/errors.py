"""The ways a run ends other than done: the user's mistake (exit code 2), a resumable stop and a defect (both 1)."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the experiment or the input. The message names the place, the value, the rule and the fix."""


class ResumableStop(Exception):
    """The run stopped before its end (interrupt, unreachable cloud, full disk); what was committed stays valid."""


class Failure(Exception):
    """A host failed for a reason that is neither the user's mistake nor a planned stop: a defect, and its traceback."""


def unknown(what: str, value: str, known: Iterable[str]) -> str:
    """Returns the message about an unknown name: the value, the nearest known one, all known ones."""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return f"unknown {what} `{value}`.{hint} Known: {', '.join(names)}"


def disk_is_full(error: BaseException) -> bool:
    """Returns whether an error, or one of its causes, says that a disk or a quota is full (Arrow, SQLite, safetensors).
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        text = str(found)
        if getattr(found, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if "No space left on device" in text or "disk is full" in text or "Disk quota exceeded" in text:
            return True
        found = found.__cause__ or found.__context__
    return False
