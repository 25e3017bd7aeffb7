"""Reviewing in a terminal: one key a sample, undo, go on, and what a later run makes of it."""

from __future__ import annotations

import io
import os
import pty
import sys
import termios

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction
from untether.sim.experiment import Experiment
from untether.sim.population.source import open_population
from untether.sim.run.directory import RunDirectory
from untether.sim.run.reviews import Reviewed, ReviewFile
from untether.sim.terminal.cli import app
from untether.sim.terminal.reviewing import Shown, decide, keys, samples_of

OWN = (Interaction("i", "T", "my input", "my output"),)
SHOWN = [Shown(Reviewed("u", "T", f"input {n}", f"output {n}"), "d00000", "accepted", OWN) for n in range(4)]


def pressed(path, text, shown=SHOWN):
    """What is decided after these keys, in order, and what was on the screen."""
    screen = Console(file=io.StringIO(), width=100)
    reviews = ReviewFile(path)
    decide(shown, reviews, iter(text), screen)
    return [(key.input[-1], said) for key, said in ReviewFile(path).items()], screen.file.getvalue()


def test_one_key_each(tmp_path):
    found, screen = pressed(tmp_path / "r", "arsA")
    assert found == [("0", "accept"), ("1", "reject"), ("2", "skip"), ("3", "accept")]
    assert "my input" in screen and "-> my output" in screen and "1/4" in screen and "output 3" in screen


def test_undo_takes_back_the_last_one_and_shows_it_again(tmp_path):
    found, screen = pressed(tmp_path / "r", "aaur")
    assert found == [("0", "accept"), ("1", "reject")] and screen.count("2/4") == 2
    assert pressed(tmp_path / "s", "u")[1].count("nothing to undo") == 1


def test_an_unknown_key_says_the_keys_and_decides_nothing(tmp_path):
    found, screen = pressed(tmp_path / "r", "xq")
    assert found == [] and screen.count("a accept   r reject") == 2


def test_the_same_again_goes_on(tmp_path):
    assert pressed(tmp_path / "r", "aq")[0] == [("0", "accept")]
    found, screen = pressed(tmp_path / "r", "rr")
    assert found == [("0", "accept"), ("1", "reject"), ("2", "reject")] and "input 0" not in screen and "1/3" in screen


def test_keys_need_no_return_in_a_terminal(monkeypatch):
    master, slave = pty.openpty()
    with os.fdopen(slave, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        before = termios.tcgetattr(slave)
        found = keys()
        os.write(master, b"a")
        assert next(found) == "a"
        os.write(master, b"u\x04")
        assert next(found) == "u" and list(found) == [] and termios.tcgetattr(slave) == before
    os.close(master)


@pytest.fixture
def run(tmp_path):
    """A run directory with two samples of the world's first user."""
    experiment = Experiment.build({"population": {"users": 1, "tasks": ["LaMP_4"]}}, None, "it")
    run = RunDirectory.create(tmp_path / "run", experiment)
    user = open_population(experiment, 1).user(0)
    frame = pd.DataFrame([
        {"seed": 1, "round": 0, "sample_id": f"s{n}", "request_id": "r", "device_id": "d00000", "user_id": user.user_id,
         "task": "LaMP_4", "form": "query", "input": f"made {n}", "output": f"said {n}", "verdict": verdict}
        for n, verdict in enumerate(("accepted", "rejected_by:length"))
    ])  # fmt: skip
    monkey = {"samples": frame}
    run.read = lambda name, columns=None: monkey[name]  # type: ignore[method-assign]
    return run, user


def test_samples_are_shown_beside_the_users_own(run):
    directory, user = run
    first, second = samples_of(directory)
    assert first.key == Reviewed(user.user_id, "LaMP_4", "made 0", "said 0") and second.verdict == "rejected_by:length"
    assert [item.item_id for item in first.own] == [item.item_id for item in user.of_task("LaMP_4")][-4:]
    with pytest.raises(UserError, match=r"--device d7: no samples of this device.*Devices: d00000"):
        list(samples_of(directory, "d7"))


def test_the_command_reads_keys_from_a_pipe_and_says_how_far_filters_agree(run, monkeypatch):
    directory, _ = run
    monkeypatch.setattr(RunDirectory, "open", classmethod(lambda cls, path: directory))
    result = CliRunner().invoke(app, ["review", str(directory.path)], input="aa\n")
    assert result.exit_code == 0, result.output
    assert "2 of 2 samples decided: 2 accepted, 0 rejected; 0 skipped." in result.output
    assert "decided alike on 50% of them" in result.output and "reviews.jsonl" in result.output
    assert len(ReviewFile(directory.path / "reviews.jsonl")) == 2
