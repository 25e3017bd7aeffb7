"""The tables of a run as files: CSV for spreadsheets and scripts, LaTeX for papers, LaMP's own format for its scorer.

`tables/summary.csv` and `.tex` hold the arms, `tables/contrasts.csv` and `.tex` the comparisons, and
`tables/predictions/seed-S/<arm>/<task>.json` the answers as the LaMP evaluation script reads them.
"""

from __future__ import annotations

import csv
import io
import json

import pandas as pd

from untether.sim.core.durable import write_atomically
from untether.sim.population.tasks import higher_is_better
from untether.sim.report.summary import Contrast, Summary, interval, metric_name, number, p_value
from untether.sim.run.directory import RunDirectory
from untether.sim.run.whole import plain_name

SUMMARY_COLUMNS = (
    "task", "metric", "arm", "mean", "ci_low", "ci_high", "n_users", "n_clusters", "n_queries", "steps", "tokens",
)  # fmt: skip
CONTRAST_COLUMNS = (
    "task", "metric", "arm", "reference", "diff", "diff_ci_low", "diff_ci_high", "wins", "ties", "losses", "p",
    "p_holm", "n_users", "n_queries", "verdict",
)  # fmt: skip
_ESCAPES = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{",
            "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$"}  # fmt: skip


def write_tables(run: RunDirectory, summary: Summary) -> None:
    """Writes everything under `tables/`. Running it again replaces the files."""
    folder = run.path / "tables"
    for name, text in (
        ("summary.csv", summary_csv(summary)),
        ("summary.tex", summary_latex(summary)),
        ("contrasts.csv", contrasts_csv(summary)),
        ("contrasts.tex", contrasts_latex(summary)),
    ):
        write_atomically(folder / name, text)
    write_predictions(run)


def summary_csv(summary: Summary) -> str:
    """Returns every arm on every task and metric; full precision, empty where there is no value."""
    rows = [
        summary.mean(task, arm, metric)
        for task in summary.tasks
        for metric in summary.metrics(task)
        for arm in summary.arms
    ]
    return _csv(SUMMARY_COLUMNS, [[row.get(name) for name in SUMMARY_COLUMNS] for row in rows if row])


def contrasts_csv(summary: Summary) -> str:
    """Returns every comparison on every metric, with its verdict; full precision, empty where there is no value."""
    rows = []
    for contrast in summary.contrasts(everything=True):
        rows.append([getattr(contrast, name) for name in CONTRAST_COLUMNS[:-1]] + [contrast.verdict()])
    return _csv(CONTRAST_COLUMNS, rows)


def summary_latex(summary: Summary) -> str:
    """Arms by task on the primary metric, mean and 95% interval; needs the booktabs package."""
    head = " & ".join(["Arm", *(_tex(task) for task in summary.tasks)])
    metrics = " & ".join(
        ["", *(f"{_tex(metric_name(m))} {_tex_arrow(m)}" for m in map(summary.primary, summary.tasks))]
    )
    lines = []
    for arm in summary.arms:
        cells = []
        for task in summary.tasks:
            row = summary.mean(task, arm)
            if row is None or row.get("mean") is None:
                cells.append("--")
                continue
            mean = _math(number(row["mean"]))
            mean = rf"\textbf{{{mean}}}" if row["mean"] == summary.best(task) else mean
            around = interval(row.get("ci_low"), row.get("ci_high"))
            cells.append(f"{mean} {{\\scriptsize {_math(around)}}}" if around else mean)
        lines.append(" & ".join([rf"\texttt{{{_tex(arm)}}}", *cells]) + r" \\")
    return _tabular("l" + "r" * len(summary.tasks), [head + r" \\", metrics + r" \\"], lines)


def contrasts_latex(summary: Summary) -> str:
    """Returns the contrasts on the primary metrics; needs the booktabs package."""
    head = r"Contrast & Task & Difference & 95\% CI & W/T/L & $p$ (Holm) & Verdict \\"
    return _tabular("llrrrrl", [head], [_latex_row(contrast) for contrast in summary.contrasts()])


def _latex_row(contrast: Contrast) -> str:
    counts = (contrast.wins, contrast.ties, contrast.losses)
    cells = (
        rf"\texttt{{{_tex(contrast.arm)}}} $-$ \texttt{{{_tex(contrast.reference)}}}",
        f"{_tex(contrast.task)} {_tex(metric_name(contrast.metric))} {_tex_arrow(contrast.metric)}",
        _math(number(contrast.diff, signed=True)),
        _math(interval(contrast.diff_ci_low, contrast.diff_ci_high, signed=True)) or "--",
        "/".join(map(str, counts)) if None not in counts else "--",
        _tex(p_value(contrast.p_holm)),
        _tex(contrast.verdict()),
    )
    return " & ".join(cells) + r" \\"


def write_predictions(run: RunDirectory) -> None:
    """Writes every arm's answers in LaMP's format, a file a seed, arm and task: `{"task", "golds": [{"id",
    "output"}]}`.

    Of a query answered in several rounds the last answer counts. A query without an answer has the output "", which
    LaMP's scorer counts as wrong.
    """
    try:
        frame = run.read("predictions", ("seed", "round", "device_id", "arm", "task", "query_id", "prediction"))
    except FileNotFoundError:
        return
    if frame.empty:
        return
    frame = frame.sort_values(["seed", "arm", "task", "round", "device_id"], kind="stable")
    frame = frame.drop_duplicates(["seed", "arm", "task", "device_id", "query_id"], keep="last")
    for (seed, arm, task), group in frame.groupby(["seed", "arm", "task"], sort=True):
        golds = [
            {"id": query, "output": "" if pd.isna(answer) else answer}
            for query, answer in zip(group["query_id"], group["prediction"], strict=True)
        ]
        table = run.path / "predictions.parquet"
        arm, task = plain_name(arm, "the arm", table), plain_name(task, "the task", table)
        path = run.path / "tables" / "predictions" / f"seed-{seed}" / arm / f"{task}.json"
        write_atomically(path, json.dumps({"task": task, "golds": golds}, ensure_ascii=False, indent=1) + "\n")


def _csv(columns: tuple[str, ...], rows: list[list[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue()


def _tabular(columns: str, head: list[str], lines: list[str]) -> str:
    start = ["% needs \\usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    return "\n".join([*start, *head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", ""])


def _tex(text: str) -> str:
    return "".join(_ESCAPES.get(character, character) for character in text)


def _math(text: str) -> str:
    if not text or text == "\N{EN DASH}":
        return "--" if text else ""
    return "$" + text.replace("\N{MINUS SIGN}", "-") + "$"


def _tex_arrow(metric: str) -> str:
    return r"$\uparrow$" if higher_is_better(metric) else r"$\downarrow$"
