"""What ends a run reaches whoever started it."""

import threading

import flwr.simulation
import pytest
from fleet import Silent, tiny

from untether.server import coordinator
from untether.sim.core.errors import UserError
from untether.sim.launch import runtime
from untether.sim.run.directory import RunDirectory


class Watched(Silent):
    """A display that only takes notes."""

    def note(self, *_): ...

    def expect(self, *_): ...


def test_an_error_that_flower_keeps_to_itself_is_raised(tmp_path, monkeypatch):
    """As flwr 1.41 does it where its caller handles another exception."""

    def simulate(server, client, **_):
        with pytest.raises(UserError):
            server._main(None, None)

    def fail(*_):
        raise UserError("cloud.model: no such model")

    monkeypatch.setattr(flwr.simulation, "run_simulation", simulate)
    monkeypatch.setattr(coordinator, "coordinate", fail)
    monkeypatch.setattr(runtime, "start_here", lambda *_: None)
    run = RunDirectory.create(tmp_path / "run", tiny())
    with pytest.raises(UserError, match="no such model"):
        runtime._simulate([run], Watched(), threading.Event(), "")
