"""Python's search for objects that only refer to each other, which a large fleet cannot afford all the time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Pauses the search for reference cycles: a large fleet's round makes a great many small objects and no cycle, and
    searching them again and again took half of its time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()  # and old at once: else all of it would be searched as soon as the search goes on
            gc.unfreeze()
            gc.enable()
