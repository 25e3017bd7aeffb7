"""Signals stop a run resumably, also after a library has put handlers of its own in the place of ours."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from untether.sim.launch.runtime import STOPS, renew_signals, stopping


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_stops_also_after_a_library_took_it(number):
    before = signal.getsignal(number)
    stop = threading.Event()
    with stopping(stop):
        signal.signal(number, signal.SIG_IGN)  # as Ray does when it starts
        os.kill(os.getpid(), number)
        assert not stop.is_set()
        renew_signals()
        os.kill(os.getpid(), number)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            signal.pause()
    assert signal.getsignal(number) == before
    renew_signals()  # outside of it nothing is anybody's
    assert signal.getsignal(number) == before
