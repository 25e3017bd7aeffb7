"""Downloads LaMP's official files, whole or not at all: resumed where it broke off, and refused where it is no data."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import ijson

from untether.sim.core.clock import Clock, WallClock
from untether.sim.core.durable import settle
from untether.sim.core.errors import ResumableStop, UserError

SITE = "https://ciir.cs.umass.edu/downloads/LaMP"
TASKS = ("1", "2", "2N", "3", "4", "5", "6", "7")
TRIES = 5
CHUNK = 1 << 16


def lamp_urls(task: str, split: str, time: bool = False, site: str = SITE) -> dict[str, str]:
    """Returns the addresses of a task's files by the name that LaMP's reader expects. Raises UserError for another
    task.
    """
    task = task.removeprefix("LaMP_").removeprefix("LaMP-")
    if task not in TASKS:
        raise UserError(f"data fetch lamp: --task {task}: must be one of {', '.join(TASKS)}")
    if split not in ("train", "dev", "test"):
        raise UserError(f"data fetch lamp: --split {split}: must be train, dev or test")
    # The movies lie in a folder of their own; news categorization is LaMP_2 there.
    folder = f"LaMP_{task.removesuffix('N')}" + ("/new" if task == "2" else "")
    root = f"{site}/time/{folder}" if time else f"{site}/{folder}"
    kinds = ("questions",) if split == "test" else ("questions", "outputs")
    return {f"{split}_{kind}.json": f"{root}/{split}/{split}_{kind}.json" for kind in kinds}


def fetch(
    url: str, to: Path, clock: Clock | None = None, say: Callable[[int, int | None], None] = lambda done, whole: None
) -> None:
    """Downloads a JSON file to `to`, going on with what an earlier try left beside it.

    A broken connection is tried again; `say` is told the bytes that are there, of how many. Raises UserError where the
    server answers with something else than JSON (LaMP's answers a wrong path with a page), and ResumableStop where it
    cannot be reached: the same command again goes on.
    """
    clock, part = clock or WallClock(), to.with_name(to.name + ".part")
    to.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(TRIES):
        try:
            if _once(url, part, say):
                break
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # there is no more than what we have
                part.unlink(missing_ok=True)
                reason = "the file changed meanwhile"
            elif error.code < 500 and error.code != 429:
                said = f"{error.code} {error.reason}"
                raise UserError(f"{url}: the server answers {said}. Is there such a split?") from None
            else:
                reason = f"the server answers {error.code}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if attempt + 1 < TRIES:
            clock.sleep(2.0**attempt)
    else:
        raise ResumableStop(f"{url}: {reason}, {TRIES} times. The same command goes on where it stopped")
    _check(url, part)
    settle(part, to)


def _once(url: str, part: Path, say: Callable[[int, int | None], None]) -> bool:
    """One try. Returns whether all is there."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        kind = answer.headers.get_content_type()
        if "html" in kind:
            raise UserError(f"{url}: the server answers with a page ({kind}), not with data. Is there such a split?")
        if answer.status != 206:  # it sends everything anew
            have = 0
        length = answer.headers.get("Content-Length")
        whole = have + int(length) if length and length.isdigit() else None
        with part.open("ab" if have else "wb") as file:
            try:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    have += len(chunk)
                    say(have, whole)
            except http.client.IncompleteRead as error:
                file.write(error.partial)
                return False
    return whole is None or have == whole


def _check(url: str, part: Path) -> None:
    """Refuses what is no whole JSON document."""
    try:
        with part.open("rb") as file:
            for _ in ijson.basic_parse(file):  # never held whole
                pass
    except (ijson.JSONError, UnicodeDecodeError) as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{url}: what came is no JSON: {error}. It was thrown away: fetch it again") from None
