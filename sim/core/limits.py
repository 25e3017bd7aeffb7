"""The cores and memory that affinity and control groups leave to this process.

A container, a batch job or a systemd unit has less than the machine, and only affinity and the files of its control
group show it. Groups nest, and each may be tighter than the one within it, so the tightest from the process's own up to
the root counts. Both versions are read, alone or side by side: `cpu.max`, `memory.max`, `memory.high` (v2);
`cpu.cfs_quota_us`, `memory.limit_in_bytes`, `hierarchical_memory_limit` (v1). See docs.kernel.org: Control Group v2;
Memory Resource Controller; CFS Bandwidth Control; and proc_pid_mountinfo(5).

`root` is the folder that holds `/proc` and `/sys`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")
UNLIMITED = 1 << 60
"""Version 1 says 2^63 less a page where there is no limit."""


def cores(root: Path = ROOT) -> int:
    """Returns the cores that this process may use: those of its affinity, or the whole ones in its quota; at least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    else:  # macOS, Windows
        usable = os.cpu_count() or 1
    quota = min((share for group in _groups("cpu", root) if (share := _quota(group)) is not None), default=usable)
    return max(1, min(usable, int(quota)))


def memory_bytes(root: Path = ROOT) -> int:
    """Returns the memory that this process and those of its group may have at most."""
    total = _meminfo(root).get("MemTotal", 0) or psutil.virtual_memory().total
    return min([total, *(limit for group in _groups("memory", root) for limit in _memory_limits(group))])


def available_bytes(root: Path = ROOT) -> int:
    """Returns the memory that is still available: the machine's, or a group's limit less what its processes hold.

    Cached files that were not used lately count as available, as they do on the machine.
    """
    left = _meminfo(root).get("MemAvailable", 0) or psutil.virtual_memory().available
    for group in _groups("memory", root):
        limits = _memory_limits(group)
        if limits:
            left = min(left, min(limits) - _used_bytes(group))
    return max(0, left)


# --- control groups -------------------------------------------------------------------------------------------


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders that may limit this process: its group's, and all above it that can be seen; of both versions."""
    mounts = _mounts(root)
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            kind = ""
        elif controller in names.split(","):
            kind = controller
        else:
            continue
        if kind in mounts:
            within, mount = mounts[kind]
            inner = _below(PurePosixPath(path), within)
            for parent in (inner, *inner.parents):
                yield mount / parent


def _mounts(root: Path) -> dict[str, tuple[PurePosixPath, Path]]:
    """Where each controller of version 1 is mounted, and version 2 (``""``): (the group that is its top, folder)."""
    found: dict[str, tuple[PurePosixPath, Path]] = {}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = (part.split() for part in line.partition(" - "))
        if len(before) < 5 or len(after) < 3 or after[0] not in ("cgroup", "cgroup2"):
            continue
        group, folder = (_unescaped(word) for word in before[3:5])
        place = PurePosixPath(group), root / folder.lstrip("/")
        for name in [""] if after[0] == "cgroup2" else after[2].split(","):
            found.setdefault(name, place)
    if not found:  # no such file: the usual places
        usual, top = root / "sys/fs/cgroup", PurePosixPath("/")
        found = {name: (top, usual / name) for name in ("cpu", "memory")}
        found[""] = top, usual / "unified" if (usual / "unified").is_dir() else usual
    return found


def _below(path: PurePosixPath, top: PurePosixPath) -> PurePosixPath:
    """A group's folder within a mount whose top is `top`; the mount itself where the group lies outside of it, as seen
    from a container with the host's names.
    """
    if ".." in path.parts or not path.is_relative_to(top):
        return PurePosixPath()
    return path.relative_to(top)


def _quota(group: Path) -> float | None:
    words = _text(group / "cpu.max").split() or [
        _text(group / f"cpu.cfs_{what}_us").strip() for what in ("quota", "period")
    ]
    quota, period = (_whole(word) for word in (*words, "")[:2])
    return quota / period if quota and period else None  # `max` and -1 are no quota


def _memory_limits(group: Path) -> list[int]:
    limits = [_whole(_text(group / name)) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    limits.append(_counts(group / "memory.stat").get("hierarchical_memory_limit"))
    return [limit for limit in limits if limit is not None and limit < UNLIMITED]


def _used_bytes(group: Path) -> int:
    used = _whole(_text(group / "memory.current"))
    if used is None:
        used = _whole(_text(group / "memory.usage_in_bytes")) or 0
    counts = _counts(group / "memory.stat")  # version 1 counts its own processes alone, and in all (`total_`)
    return max(0, used - counts.get("total_inactive_file", counts.get("inactive_file", 0)))


# --- files ----------------------------------------------------------------------------------------------------


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes by name."""
    found = re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.M)
    return {name: int(kib) * 1024 for name, kib in found}


def _counts(file: Path) -> dict[str, int]:
    return {name: int(count) for name, count in re.findall(r"^(\w+) (\d+)$", _text(file), re.M)}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no such file, or not ours to read: it limits nothing that we know of
        return ""


def _whole(text: str) -> int | None:
    text = text.strip()
    return int(text) if re.fullmatch(r"[0-9]+", text) else None


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)
