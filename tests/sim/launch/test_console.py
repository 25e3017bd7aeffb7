"""The terminal must stay readable where it is narrow, and plain where it is not a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from untether.sim.launch.console import arms_table, make_console

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
