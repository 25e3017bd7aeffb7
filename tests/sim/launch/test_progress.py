"""Progress counts work, says what it cannot know yet, and is plain where there is no terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from untether.sim.launch.progress import LiveProgress, duration
from untether.sim.launch.time_left import REPORT, STEPS, Guess, TimeLeft

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.jsonl"))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def progress(terminal: bool = False, **options) -> tuple[LiveProgress, Clock, io.StringIO]:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, width=140, force_terminal=terminal, get_time=clock, color_system=None, highlight=False)
    return LiveProgress(console=console, **options), clock, file


def counted(unit: str, done: float, due: float, devices: int, **more: float) -> dict[str, float]:
    return {unit: done, f"{unit}_due": due, f"{unit}_of": devices, **more}


def test_a_log_gets_a_line_a_step_and_one_every_thirty_seconds():
    shown, clock, file = progress()
    with shown:
        shown.start(seeds=(1, 2), rounds=1)
        shown.begin(seed=2, round=0)
        for done in range(0, 91):
            shown.update("learn", counted("tokens", 100 * done, 9000, 4), 4)
            clock.now_s += 1
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[1:3][-1].split(",")[0] for line in lines[:3]] == [
        "0 of 9000 tokens", "3000 of 9000 tokens", "6000 of 9000 tokens",
    ]  # fmt: skip
    assert len(lines) == 4 and "answering" in lines[3]
    assert lines[1].startswith("seed 2 (2 of 2)  training  3000 of 9000 tokens, 100/s  0:30 elapsed")


def test_steps_of_a_stage_are_named_in_turn_and_the_clouds_health_shows():
    shown, clock, file = progress()
    shown.start(seeds=(1,))
    shown.begin(1, 0)
    asked = {"cloud.ok": 9.0, "cloud.timeout": 1.0, "cloud_s": 5.0}
    shown.update("fetch", counted("requests", 3, 10, 2), 2)
    clock.now_s += 5
    shown.update("fetch", counted("requests", 10, 10, 2) | counted("samples", 4, 60, 2) | asked, 2)
    text = file.getvalue()
    assert "asking the cloud  3 of 10 requests" in text and "filtering samples  4 of 60 samples" in text
    assert "cloud: 9 ok, 1 timeout, 0.5 s each" in text
    shown.update(REPORT, {}, 0)
    assert "writing tables and report" in file.getvalue()


def test_work_of_devices_that_have_not_begun_is_taken_to_be_like_that_of_the_others():
    shown, _, file = progress()
    shown.start(seeds=(1,))
    shown.begin(1, 0)
    shown.update("learn", counted("tokens", 500, 1000, 5), 20)
    assert "500 of 4000 tokens" in file.getvalue()


def test_programs_are_told_by_lines_of_json():
    shown, clock, file = progress(voice="json")
    with shown:
        shown.start(seeds=(3,), rounds=2)
        shown.begin(3, 0)
        shown.update("learn", counted("answers", 5, 20, 1), 1)
        shown.note("something")
        shown.end()
    events = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["start", "round", "progress", "note", "committed"]
    assert events[2]["seed"] == 3 and events[2]["done"] == 5 and events[2]["due"] == 20
    assert events[3]["text"] == "something"


def test_quiet_is_quiet():
    shown, _, file = progress(voice="quiet", terminal=True)
    with shown:
        shown.start(seeds=(1,))
        shown.begin(1, 0)
        shown.update("fetch", counted("requests", 5, 20, 1), 1)
        shown.note("something")
        shown.end()
    assert file.getvalue() == ""


def test_a_terminal_gets_lines_that_go_away():
    shown, clock, file = progress(terminal=True)
    with shown:
        shown.start(seeds=(1,))
        shown.begin(1, 0)
        shown.update("fetch", counted("requests", 3, 12, 1), 1)
        clock.now_s += 2
        shown.update("fetch", counted("requests", 5, 12, 1, **{"cloud.ok": 5.0}), 1)
        shown.note("[not markup]")
    text = file.getvalue()
    assert "5 of 12 requests" in text and "[not markup]" in text and "cloud: 5 ok" in text
    assert "\x1b[2K" in text


def test_time_left_of_several_runs_follows_their_size():
    shown, clock, file = progress()
    shown.cell(1, 3, "small", work=10, ahead=40)
    shown.start(seeds=(1,))
    clock.now_s += 50
    shown.cell(2, 3, "middle", work=20, ahead=20)
    shown.start(seeds=(1,))
    shown.begin(1, 0)
    clock.now_s += 15
    assert shown.left_s() == pytest.approx(100 - 15 + 100)  # 5 s a piece of work, as the first run needed
    assert shown.elapsed_s() == pytest.approx(65)
    assert "cell 1 of 3: small" in file.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations(seconds, text):
    assert duration(seconds) == text


# --- time left -------------------------------------------------------------------------------------------------------


def test_time_left_by_hand():
    left = TimeLeft(2, guess=Guess(
        {("fetch", "requests"): 10, ("fetch", "samples"): 0, ("learn", "tokens"): 100, ("learn", "answers"): 0},
        {step: 1.0 for step in STEPS}, round_s=0.0, report_s=0.0,
    ))  # fmt: skip
    left.begin(0)
    left.update(0, "fetch", counted("requests", 0, 10, 1), 1)
    assert left.left_s(0) == pytest.approx(220)
    left.update(10, "fetch", counted("requests", 10, 10, 1), 1)
    left.update(10, "learn", counted("tokens", 0, 100, 1), 1)
    left.update(60, "learn", counted("tokens", 50, 100, 1), 1)
    assert left.left_s(60) == pytest.approx(50 + 110, rel=0.01)
    left.update(110, "learn", counted("tokens", 100, 100, 1), 1)
    left.end(110)
    assert left.left_s(110) == pytest.approx(110, rel=0.01)


def test_what_a_device_does_once_is_not_left_to_rounds_after_it():
    """All ten devices trained in the first of four rounds, and ten more in each of the others were expected."""
    left = TimeLeft(4, guess=Guess(
        {("fetch", "requests"): 0, ("fetch", "samples"): 0, ("learn", "tokens"): 25, ("learn", "answers"): 10},
        dict.fromkeys(STEPS, 1.0), round_s=0.0, report_s=0.0, once=frozenset({("learn", "tokens")}),
    ))  # fmt: skip
    left.begin(0)
    left.update(0, "learn", counted("tokens", 0, 100, 1), 1)
    left.update(100, "learn", counted("tokens", 100, 100, 1), 1)
    left.update(110, "learn", counted("tokens", 100, 100, 1) | counted("answers", 10, 10, 1), 1)
    left.end(110)
    assert left.left_s(110) == pytest.approx(3 * 10, rel=0.01)


def test_a_slow_cloud_says_nothing_of_how_fast_this_machine_trains():
    """Of requests that took 40 s instead of 0.02 a whole day of training was once concluded."""
    left = TimeLeft(1, guess=Guess(
        {("fetch", "requests"): 24, ("fetch", "samples"): 0, ("learn", "tokens"): 300, ("learn", "answers"): 0},
        dict.fromkeys(STEPS, 1.0) | {("fetch", "requests"): 4.0}, round_s=0.0, report_s=0.0,
        elsewhere=frozenset({("fetch", "requests")}),
    ))  # fmt: skip
    left.begin(0)
    for done in range(13):
        left.update(40 * done, "fetch", counted("requests", done, 24, 1), 1)
    assert left.left_s(480) == pytest.approx(300 + 12 * 40, rel=0.15)


def test_without_a_guess_nothing_is_said_before_every_step_has_begun():
    left = TimeLeft(1)
    left.begin(0)
    left.update(0, "fetch", counted("requests", 0, 10, 1), 1)
    left.update(5, "fetch", counted("requests", 5, 10, 1), 1)
    assert left.left_s(5) is None
    assert left.share_done() is None


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.floats(1e-3, 2.0), min_size=4, max_size=4),
    slower=st.floats(0.2, 8.0), rounds=st.integers(1, 4), ticks=st.integers(15, 40),
)  # fmt: skip
def test_a_machine_of_any_speed_is_known_once_a_fifth_is_over(costs, slower, rounds, ticks):
    """Steps cost what was guessed but for one factor: the time left is right long before each step has been seen, once
    three reports have come: of the first wait nobody knows what was setting up.
    """
    steps = [step for step in STEPS if step[0] in ("fetch", "learn")]
    work = {step: 100.0 for step in steps}
    guess = Guess(work, dict(zip(steps, costs, strict=True)), round_s=0.0, report_s=0.0)
    whole = rounds * 100 * sum(costs) * slower
    left, now = TimeLeft(rounds, guess=guess), 0.0
    for _ in range(rounds):
        left.begin(now)
        done: dict[str, float] = {}
        for (stage, unit), cost in zip(steps, costs, strict=True):
            if stage == "learn" and unit == "tokens":
                done = {}
            for tick in range(ticks + 1):
                done |= counted(unit, 100.0 * tick / ticks, 100.0, 1)
                now += 100 * cost * slower / ticks if tick else 0
                left.update(now, stage, done, 1)
                if now >= max(0.2 * whole, 20.0):
                    said = left.left_s(now)
                    assert said is not None
                    assert abs(said - (whole - now)) <= (whole - now) / 3 + 3
        left.end(now)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_from_a_fifth_on_a_recorded_run_ends_within_a_third_of_when_it_was_said_to(path):
    """What hosts said in a real run, when they said it: see `recorded/record.py`. Three seconds are nobody's."""
    calls = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    shown, clock, _ = progress()
    begun, end_s = clock.now_s, calls[-1][0]
    wrong = []
    for at_s, name, *words in calls[:-1]:
        clock.now_s = begun + at_s
        if name == "expect":
            by_step = {part: {(a, b): n for a, b, n in words[0][part]} for part in ("work", "cost_s", "setup_s")}
            shown.expect(Guess(**words[0] | by_step))
        else:
            getattr(shown, name)(*words)
        left_s, really_s = shown.left_s(), end_s - at_s
        if at_s >= 0.2 * end_s and name != "expect":
            if left_s is None or abs(left_s - really_s) > really_s / 3 + 3:
                wrong.append((round(at_s), name, words[:1], None if left_s is None else round(left_s), round(really_s)))
    assert wrong == []
