"""The terminal must stay readable where it is narrow, and plain where it is not a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from untether.sim.launch.console import LiveProgress, arms_table, make_console

ARMS = {"frozen": 0.40, "local_matched": 0.481, "placebo": 0.49, "collaborative": 0.56}
TASKS = {"LaMP_1": "accuracy", "LaMP_2": "accuracy", "LaMP_3": "mae", "LaMP_4": "rouge1", "LaMP_5": "rouge1",
         "LaMP_7": "rouge1"}  # fmt: skip


def rows() -> list[dict]:
    made = []
    for task, metric in TASKS.items():
        common = {"task": task, "metric": metric, "n_users": 24, "n_queries": 240, "steps": 10.0, "tokens": 900.0}
        for arm, mean in ARMS.items():
            around = {"mean": mean, "ci_low": mean - 0.04, "ci_high": mean + 0.04}
            made.append({**common, "arm": arm, "reference": None, **around})
        for reference in ("local_matched", "placebo", "cloud"):
            made.append({**common, "arm": "collaborative", "reference": reference, "mean": 0.56, "diff": 0.08,
                         "diff_ci_low": 0.031, "diff_ci_high": 0.129, "wins": 15, "ties": 3, "losses": 6, "p": 0.0021,
                         "p_holm": 0.0252 if reference != "cloud" else None,
                         "margin": 0.02 if reference == "cloud" else None})  # fmt: skip
    return made


def printed(width: int, terminal: bool, content=None) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=terminal, color_system=None, highlight=False).print(
        arms_table(rows() if content is None else content)
    )
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 72, 100, 160])
@pytest.mark.parametrize("terminal", [True, False])
def test_no_line_is_wider_than_the_terminal_and_every_task_is_there(width, terminal):
    text = printed(width, terminal)
    assert max(map(len, text.splitlines())) <= width
    for task in TASKS:
        assert task in text


def test_at_100_columns_nothing_is_cut():
    text = printed(100, terminal=True)
    assert "…" not in text
    assert "0.560 [0.520 0.600]" in text
    assert "+0.080 [+0.031 +0.129]" in text and "15/3/6" in text and "0.025" in text


def test_a_pipe_gets_no_boxes_and_no_colour():
    file = io.StringIO()
    console = make_console(file)
    console.print(arms_table(rows()))
    assert console.width == 100
    assert not any(0x2500 <= ord(character) <= 0x257F or character == "\x1b" for character in file.getvalue())


def test_arms_stand_in_the_designs_order_with_the_direction_of_each_metric():
    lines = printed(160, terminal=False).splitlines()
    assert [line.split()[0] for line in lines[3:7]] == list(ARMS)
    assert "MAE ↓" in lines[1] and "accuracy ↑" in lines[1]


def test_the_verdict_knows_that_more_error_is_worse():
    lines = [line for line in printed(100, terminal=False).splitlines() if "LaMP_3 ↓" in line]
    assert len(lines) == 3 and all(line.rstrip().endswith("worse") for line in lines)


def test_an_empty_summary_says_so():
    assert "No results" in printed(80, terminal=False, content={"rows": [], "facts": {}})


# --- progress --------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def progress(terminal: bool = False) -> tuple[LiveProgress, Clock, io.StringIO]:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, width=100, force_terminal=terminal, get_time=clock, color_system=None, highlight=False)
    return LiveProgress(console=console), clock, file


def test_a_log_gets_a_line_a_stage_and_one_every_five_seconds():
    shown, clock, file = progress()
    with shown:
        shown.start(seeds=(1, 2), rounds=1)
        shown.begin(seed=2, round=0)
        for done in range(21):
            shown.update("learn", done, 20)
            clock.now_s += 1
        for _ in range(5):
            shown.update("learn", 20, 20)
    lines = file.getvalue().splitlines()
    counts = [line.split("learn  ")[1].split(" devices")[0] for line in lines]
    assert counts == ["0/20", "5/20", "10/20", "15/20", "20/20"]
    assert lines[1].startswith("seed 2 (2 of 2)  learn  5/20 devices, 1/s  0:05 elapsed")


def test_rate_and_time_left_follow_what_was_measured():
    shown, clock, _ = progress()
    shown.start(seeds=(1,), rounds=2)
    shown.begin(1, 0)
    shown.update("fetch", 0, 10)
    assert shown.rate() is None and shown.left_s() is None
    clock.now_s += 10
    shown.update("fetch", 10, 10)
    shown.update("learn", 0, 10)
    assert shown.left_s() == pytest.approx(30 + 40)  # Learning is taken for three times fetching until it is measured.
    clock.now_s += 15
    shown.update("learn", 5, 10)
    assert shown.rate() == pytest.approx(1 / 3)
    # A round takes 10 s of fetching and 30 s of learning; 15 s of this one are left, then one whole round.
    assert shown.left_s() == pytest.approx(15 + 40)
    clock.now_s += 15
    shown.update("learn", 10, 10)
    shown.end()
    assert shown.left_s() == pytest.approx(40)


def test_what_is_shared_is_made_once_a_seed():
    shown, clock, out = progress()
    shown.start(seeds=(1, 2), rounds=2)
    shown.begin(1, 0)
    for stage, seconds in (("fetch", 10), ("share", 20), ("learn", 30)):
        shown.update(stage, 0, 6)
        clock.now_s += seconds
        shown.update(stage, 6, 6)
    assert "share  6/6 users" in out.getvalue()
    # Three more rounds of 40 s, of which one begins a seed.
    assert shown.left_s() == pytest.approx(3 * 40 + 20)
    shown.end()
    assert shown.left_s() == pytest.approx(3 * 40 + 20)


def test_rounds_that_a_resumed_run_has_behind_it_are_not_waited_for():
    shown, clock, _ = progress()
    shown.start(seeds=(1,), rounds=4, rounds_done=3)
    shown.begin(1, 3)
    shown.update("fetch", 0, 4)
    clock.now_s += 4
    shown.update("fetch", 4, 4)
    shown.update("learn", 0, 4)
    clock.now_s += 6
    shown.update("learn", 3, 4)
    assert shown.left_s() == pytest.approx(2)


def test_time_left_of_several_runs_follows_their_size():
    shown, clock, file = progress()
    shown.cell(1, 3, "small", work=10, ahead=40)
    shown.start(seeds=(1,))
    shown.begin(1, 0)
    shown.update("fetch", 0, 10)
    assert shown.left_s() is None
    clock.now_s += 10
    shown.update("fetch", 10, 10)
    shown.update("learn", 0, 10)
    clock.now_s += 30
    shown.update("learn", 10, 10)
    shown.end()
    assert shown.left_s() == pytest.approx(4 * 40)  # 40 s for 10 of work, 40 of work ahead
    clock.now_s += 10  # the report of the first run
    shown.cell(2, 3, "middle", work=20, ahead=20)
    shown.start(seeds=(1,))
    shown.begin(1, 0)
    shown.update("fetch", 0, 20)
    clock.now_s += 15
    assert shown.left_s() == pytest.approx(100 - 15 + 100)  # 5 s a piece of work, as the first run needed
    assert shown.elapsed_s() == pytest.approx(65)
    said = file.getvalue()
    assert "cell 1 of 3: small" in said and "cell 2 of 3, seed 1  fetch  0/20 devices" in said


def test_a_terminal_gets_one_line_that_goes_away():
    shown, clock, file = progress(terminal=True)
    with shown:
        shown.start(seeds=(1,))
        shown.begin(1, 0)
        shown.update("fetch", 3, 12)
        clock.now_s += 2
        shown.update("fetch", 5, 12)
        shown.note("[not markup]")
    assert "5/12 devices" in file.getvalue() and "[not markup]" in file.getvalue()
    assert "\x1b[2K" in file.getvalue()
