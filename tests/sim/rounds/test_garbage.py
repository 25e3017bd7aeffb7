"""The pause of the search for cycles: nothing is searched meanwhile or at its end, and what dies is found later."""

import gc
import weakref

from untether.sim.rounds.garbage import uncollected


class Loop:
    def __init__(self):
        self.own = self


def test_a_pause_is_over_at_its_end_and_searches_nothing():
    searches = []
    gc.callbacks.append(lambda phase, info: searches.append(info["generation"]))
    try:
        with uncollected():
            assert not gc.isenabled()
            made = [[number] for number in range(100_000)]
            cycle = weakref.ref(Loop())
            assert not searches
        few = [[number] for number in range(2000)]
        assert gc.isenabled() and set(searches) == {0} and made and few and cycle() is not None
    finally:
        gc.callbacks.pop()
    gc.collect()
    assert cycle() is None and not gc.get_freeze_count()


def test_where_nothing_is_searched_it_stays_so():
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
