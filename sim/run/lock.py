"""The lock of a run directory: two coordinators at once would each commit what the other staged.

It is the operating system's own lock on an open file, so it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import TracebackType

from untether.sim.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock; there, nothing guards a run directory
    fcntl = None  # type: ignore[assignment]


class RunLock:
    """Holds `state/lock` of a run directory; a context manager.

    Raises:
        UserError: Another process holds it.
    """

    def __init__(self, run: Path):
        self.path = run / "state" / "lock"
        self._file: int | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited: children do not hold it
        if fcntl is None:
            return self
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._file, 200).decode(errors="replace").strip()
            os.close(self._file)
            self._file = None
            raise UserError(
                f"{self.path.parent.parent} is in use by another run{f' ({holder})' if holder else ''}. "
                "Wait until it ends, or stop it"
            ) from None
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError:  # a full disk: the lock holds without a name on it
            pass
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
