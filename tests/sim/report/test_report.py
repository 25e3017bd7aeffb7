"""The report must say what the numbers say, need nothing from outside, and come out the same twice."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pandas as pd
import pytest

from untether.sim.core.seeding import generator
from untether.sim.experiment import Experiment
from untether.sim.report import write_report
from untether.sim.report.fleet import FleetSummary
from untether.sim.report.funnel import Funnel, faults, precision
from untether.sim.report.prose import answer, captions, method, notes
from untether.sim.report.summary import Summary
from untether.sim.run.directory import RunDirectory

TASKS = {"LaMP_2": ("accuracy", "macro_f1"), "LaMP_3": ("mae", "rmse"), "LaMP_4": ("rouge1", "rougeL"),
         "LaMP_5": ("rouge1", "rougeL")}  # fmt: skip
_LEVEL = {"frozen": 0.40, "majority": 0.38, "rag": 0.43, "local": 0.47, "local_matched": 0.48, "placebo": 0.49,
          "unfiltered_matched": 0.52, "collaborative": 0.56, "cloud": 0.60}  # fmt: skip
_TRUTHS = ("good", "good", "good", "good", "hallucination", "off_topic", "duplicate", "verbose")
_CAUGHT = {"off_topic": ("semantic", 0.9), "duplicate": ("diversity", 0.95), "verbose": ("length", 0.8),
           "hallucination": ("semantic", 0.1), "good": ("semantic", 0.08)}  # fmt: skip
_SYSTEM = "You write <b>new</b> samples & nothing else."


def summary_row(task="LaMP_2", arm="collaborative", metric="accuracy", reference=None, mean=None, ci=(None, None),
                diff=None, diff_ci=(None, None), counts=(None, None, None), p=None, p_holm=None, n=24):  # fmt: skip
    return {
        "task": task, "arm": arm, "metric": metric, "reference": reference, "mean": mean, "ci_low": ci[0],
        "ci_high": ci[1], "diff": diff, "diff_ci_low": diff_ci[0], "diff_ci_high": diff_ci[1], "wins": counts[0],
        "ties": counts[1], "losses": counts[2], "p": p, "p_holm": p_holm, "n_users": n, "n_queries": 10 * n,
        "steps": 24.0, "tokens": 4096.0,
    }  # fmt: skip


def contrast_row(task, reference, diff, low, high, p_holm=None, metric="accuracy"):
    judged = reference == "cloud" and metric in ("accuracy", "mae", "rouge1")
    margin = {"margin": 0.1 if metric == "mae" else 0.02} if judged else {}
    return summary_row(task, metric=metric, reference=reference, diff=diff, diff_ci=(low, high), counts=(12, 4, 8),
                       p=None if p_holm is None else p_holm / 4, p_holm=p_holm) | margin  # fmt: skip


def synthetic_summary(rng: np.random.Generator, arms: tuple[str, ...]) -> dict:
    rows = []
    for index, (task, metrics) in enumerate(TASKS.items()):
        sign = -1 if task == "LaMP_3" else 1
        for metric in metrics:
            for arm in arms:
                if arm == "majority" and task in ("LaMP_4", "LaMP_5"):
                    continue
                mean = _LEVEL[arm] - 0.05 * index + rng.normal(0, 0.01) + (0.6 if sign < 0 else 0)
                rows.append(summary_row(task, arm, metric, mean=mean, ci=(mean - 0.04, mean + 0.04)))
            for reference, gain in (("local_matched", 0.06 - 0.025 * index), ("placebo", 0.05 - 0.02 * index),
                                    ("cloud", -0.005 - 0.02 * index)):  # fmt: skip
                low, high = sorted((sign * (gain - 0.025), sign * (gain + 0.025)))
                tested = reference != "cloud" and metric == metrics[0]
                rows.append(contrast_row(task, reference, sign * gain, low, high, metric=metric,
                                         p_holm=float(min(1.0, 0.002 * 6**index)) if tested else None))  # fmt: skip
    facts = {
        "exclusions": {"too little history (fewer than 3 items)": 7, "gold without a question": 1},
        "order": "time",
        "cloud": {"provider": "world", "model": "world", "wrote_by_language_model": False},
        "notes": ["Two requests were repeated after a 429."],
    }
    return {"rows": rows, "facts": facts}


def synthetic_run(path, users: int = 24, **changes) -> RunDirectory:
    """A finished run directory without a run: seeded numbers through the RunDirectory's own door."""
    experiment = Experiment.model_validate({"name": "synthetic", "population": {"users": users}, **changes})
    run = RunDirectory.create(path, experiment)
    arms = tuple(arm for arm in experiment.arms if arm in _LEVEL)
    for seed in experiment.seeds:
        rng = generator(seed, "report fixture")
        tables = {name: [] for name in ("metrics", "events", "samples", "predictions", "ledger", "training")}
        for user in range(users):
            device, user_id = f"d{user:04d}", f"{seed}-{user}"
            for task, (metric, _) in TASKS.items():
                request = f"{device}-{task}"
                late = rng.random() < 0.08
                tables["events"].append({
                    "event_id": request, "request_id": request, "attempt": 0, "device_id": device, "arm": None,
                    "kind": "augment", "outcome": "rate_limited" if late else "ok",
                    "duration_s": float(rng.gamma(2, 0.6)),
                    "bytes_up": 2100, "bytes_down": 0 if late else 3300, "tokens_in": 520,
                    "tokens_out": 0 if late else 790, "time_s": 0.0,
                })  # fmt: skip
                for item in range(int(rng.integers(4, 9))):
                    tables["ledger"].append({"time_s": 0.0, "device_id": device, "request_id": request, "masked": 0,
                                             "item_id": f"{task}-{item}", "chars": 210, "tokens": 52})  # fmt: skip
                for index in range(0 if late else 22):
                    truth = str(rng.choice(_TRUTHS))
                    caught = _CAUGHT[truth]
                    verdict = f"rejected_by:{caught[0]}" if rng.random() < caught[1] else "accepted"
                    tables["samples"].append({
                        "sample_id": f"{request}-{index}", "request_id": request, "device_id": device,
                        "user_id": user_id, "task": task, "form": "query", "input": "a film", "output": "comedy",
                        "semantic": 0.5, "diversity": 0.4, "length_ratio": 1.0, "verdict": verdict, "truth": truth,
                    })  # fmt: skip
                for arm in arms:
                    for query in range(3):
                        away = arm == "cloud" and rng.random() < 0.03
                        tables["predictions"].append({
                            "device_id": device, "user_id": user_id, "arm": arm, "task": task,
                            "query_id": f"{user_id}-{task}-{query}", "query_time_s": 1.0, "answered_time_s": 1.0,
                            "input": "a film", "prediction": None if away else "comedy", "gold": "comedy",
                            "score": float(not away), "outcome": "no_answer" if away else "ok", "answered_by": arm,
                        })  # fmt: skip
                    tables["metrics"].append({"time_s": 1.0, "device_id": device, "user_id": user_id, "arm": arm,
                                              "task": task, "metric": metric, "value": 0.5, "n": 3})  # fmt: skip
        parts = {name: [run.write_part(name, seed, 0, "0", rows)] for name, rows in tables.items()}
        run.commit(seed, 0, parts, {})
    run.merge(experiment)
    run.write_json("summary.json", synthetic_summary(generator(1, "summary"), arms))
    run.write_json("environment.json", {
        "packages": {"torch": "2.13.0", "flwr": "1.41.0"}, "hardware": {"cores": 2, "memory_gib": 8.0},
        "commit": "0123abcd", "started": "2026-01-01T00:00:00Z", "ended": "2026-01-01T00:04:10Z",
        "prompts": {"augmentation": {"system": _SYSTEM, "user": "Here are 8 samples:"}},
        "models": {"base": "embedded", "cloud": "world"},
    })  # fmt: skip
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = synthetic_run(tmp_path_factory.mktemp("runs") / "run", users=6, seeds=[1, 2])
    write_report(run)
    return run


@pytest.fixture(scope="module")
def page(run):
    return (run.path / "report.html").read_text(encoding="utf-8")


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside(page):
    for attribute in re.findall(r"""(?:src|href|xlink:href|action)\s*=\s*["']([^"']*)""", page):
        assert attribute.startswith("#")
    assert not re.search(r"@import|<script|<link|url\((?!#)", page)


def test_ids_are_unique_and_references_resolve_in_the_page(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="|url\()#([^")]+)', page):
        assert target in ids


def test_the_page_shows_the_numbers_of_the_summary(run, page):
    summary = Summary(run.read_json("summary.json"))
    for task in TASKS:
        for arm in summary.arms:
            row = summary.mean(task, arm)
            if row:
                assert f"{row['mean']:.3f}" in page
    assert "too little history (fewer than 3 items)" in page
    assert "Two requests were repeated after a 429." in page


def test_prompts_are_verbatim_and_escaped(page):
    assert "You write &lt;b&gt;new&lt;/b&gt; samples &amp; nothing else." in page


def test_settings_that_differ_are_named_before_all_of_them(page):
    changed, _, rest = page.partition("All settings")
    section = changed[changed.index("<h2>Settings</h2>") :]
    assert "<code>seeds</code>" in section and "<code>lora.rank</code>" not in section
    assert "<code>lora.rank</code>" in rest


def test_writing_it_again_gives_the_same_bytes(run):
    names = ["report.html", "tables/summary.tex"]
    names += [f"figures/{name}.{kind}" for name in ("contrasts", "filters") for kind in ("svg", "pdf")]
    before = [(run.path / name).read_bytes() for name in names]
    write_report(run)
    assert [(run.path / name).read_bytes() for name in names] == before


def test_a_run_without_results_still_gets_a_page(tmp_path):
    experiment = Experiment.model_validate({"name": "nothing", "arms": ["frozen"]})
    run = RunDirectory.create(tmp_path / "empty", experiment)
    run.merge(experiment)
    page = write_report(run).read_text(encoding="utf-8")
    assert "The summary holds no results." in page
    assert not (run.path / "figures").exists()


# --- the sentences ---------------------------------------------------------------------------------------------------


def test_a_positive_answer_names_tasks_sizes_and_p():
    rows = [contrast_row("LaMP_2", "local_matched", 0.06, 0.035, 0.085, 0.002),
            contrast_row("LaMP_2", "placebo", 0.05, 0.025, 0.075, 0.004)]  # fmt: skip
    found = answer(Summary(rows))
    assert found.headline == "Collaborative beat both local training and the placebo on LaMP-2."
    assert "better on 1 of 1 task: LaMP-2 (accuracy +0.060 [+0.035, +0.085], Holm p = 0.002)" in found.sentences[0]


def test_a_negative_answer_is_as_plain():
    rows = [contrast_row(task, reference, -0.03, -0.05, -0.01, 0.01) for task in ("LaMP_2", "LaMP_2N")
            for reference in ("local_matched", "placebo")]  # fmt: skip
    found = answer(Summary(rows))
    assert found.headline.startswith("On no task was collaborative shown to beat local training")
    assert "worse than one of them on LaMP-2 and LaMP-2N" in found.headline
    assert "It is worse on LaMP-2 (accuracy \N{MINUS SIGN}0.030" in found.sentences[0]


def test_beating_only_local_training_is_not_called_personal():
    rows = [contrast_row("LaMP_2", "local_matched", 0.06, 0.03, 0.08, 0.002),
            contrast_row("LaMP_2", "placebo", 0.0, -0.02, 0.02, 0.9)]  # fmt: skip
    assert "the gain is not shown to be personal" in answer(Summary(rows)).headline


def test_a_run_without_the_arms_says_so():
    rows = [summary_row(arm=arm, mean=0.5) for arm in ("frozen", "local")]
    found = answer(Summary(rows))
    assert "cannot answer" in found.headline
    assert "collaborative and placebo did not run" in found.sentences[1]


def test_an_error_metric_counts_as_better_when_it_falls():
    contrast = Summary([contrast_row("LaMP_3", "placebo", -0.2, -0.3, -0.1, 0.01, metric="mae")]).contrasts()[0]
    assert (contrast.gain, contrast.gain_low, contrast.gain_high) == (0.2, 0.1, 0.3)
    assert contrast.verdict() == "better"


def test_the_cloud_is_compared_by_margin_task_by_task():
    rows = [contrast_row("LaMP_2", "cloud", 0.0, -0.01, 0.01), contrast_row("LaMP_2N", "cloud", -0.1, -0.2, -0.05)]
    last = answer(Summary(rows)).sentences[-1]
    assert last.endswith("in its prompt: not worse by more than 0.02 on LaMP-2; worse on LaMP-2N.")
    rows += [contrast_row("LaMP_3", "cloud", 0.05, 0.01, 0.09, metric="mae")]
    last = answer(Summary(rows)).sentences[-1]
    assert "more than 0.02 on LaMP-2; not worse by more than 0.1 stars on LaMP-3; worse on LaMP-2N." in last
    assert [c.verdict() for c in Summary(rows).contrasts()][-1] == "not worse (margin 0.1 stars)"
    assert "margin of 0.02 or 0.1 stars" in captions(Summary(rows))["contrasts"]


def test_answers_that_were_cut_or_never_came_are_said():
    rows = [contrast_row("LaMP_2", "cloud", None, None, None) | {"margin": None, "n_queries": 4}]
    facts = {"answers": {"attempts": 6, "unusable": 6, "cut": 5}}
    said = " ".join(notes(Summary({"rows": rows, "facts": facts}), Experiment(), {}))
    assert "5 of 6 attempts at the cloud ended before the answer began" in said and "cloud.max_tokens" in said
    assert "6 of 6 attempts at the cloud brought an answer that could not be used" in said
    assert "answered no question on LaMP-2" in said
    fine = Summary({"rows": [contrast_row("LaMP_2", "cloud", 0.0, -0.01, 0.01)], "facts": {"answers": {"attempts": 6}}})
    assert "at the cloud" not in " ".join(notes(fine, Experiment(), {}))


def test_how_intervals_are_made_names_clusters_and_margins():
    rows = [contrast_row("LaMP_2", "cloud", 0.0, -0.01, 0.01) | {"n_clusters": 21}]
    text = method(Summary(rows), Experiment())
    assert "they make one cluster (here 21)" in text and text.endswith("Against the cloud the margin is 0.02.")
    files = Experiment.model_validate({"population": {"source": "lamp", "path": "data"}})
    assert "each user is a cluster" in method(Summary(rows), files)


@pytest.mark.parametrize(
    ("reference", "low", "high", "p_holm", "verdict"),
    [
        ("placebo", 0.01, 0.09, 0.01, "better"),
        ("placebo", 0.01, 0.09, 0.06, "better, not after Holm"),
        ("placebo", -0.01, 0.09, 0.3, "no difference shown"),
        ("placebo", 1e-17, 0.09, 0.06, "no difference shown"),
        ("placebo", -0.09, -0.01, 0.01, "worse"),
        ("placebo", None, None, None, "cannot be told"),
        ("unfiltered_matched", 0.01, 0.09, None, "better (uncorrected)"),
        ("cloud", 0.01, 0.09, None, "better"),
        ("cloud", -0.019, 0.03, None, "not worse (margin 0.02)"),
        ("cloud", -0.02, 0.03, None, "undecided"),
        ("cloud", -0.05, -0.01, None, "worse"),
    ],
)
def test_verdicts(reference, low, high, p_holm, verdict):
    diff = None if low is None else (low + high) / 2
    contrast = Summary([contrast_row("LaMP_2", reference, diff, low, high, p_holm)]).contrasts()[0]
    assert contrast.verdict() == verdict


def test_notes_say_what_limits_the_answer():
    rows = [summary_row(mean=0.5, n=8)]
    facts = {"order": "unknown", "cloud": {"provider": "recombine", "wrote_by_language_model": False}}
    lamp = Experiment.model_validate({"population": {"source": "lamp", "path": "data"}})
    found = " ".join(notes(Summary({"rows": rows, "facts": facts}), lamp, {}))
    few = "Few users (under 20) on LaMP-2"
    for words in ("Order unknown", "No language model wrote", "recombined", few, "One seed"):
        assert words in found
    assert "synthetic. The embedded world" not in found
    written = Summary({"rows": rows, "facts": {"cloud": {"provider": "openai", "wrote_by_language_model": True}}})
    assert "No language model" not in " ".join(notes(written, lamp, {}))


# --- samples, fleet --------------------------------------------------------------------------------------------------


def samples_frame(*rows: tuple[str, str, str]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["user_id", "verdict", "truth"])
    return frame.assign(seed=1, round=0, task="LaMP_2")


def test_the_funnel_adds_up_to_what_was_asked():
    samples = samples_frame(("a", "accepted", "good"), ("a", "rejected_by:semantic", "off_topic"),
                            ("a", "rejected_by:leak", "good"))  # fmt: skip
    predictions = pd.DataFrame({"seed": 1, "round": 0, "user_id": ["a", "a", "b"], "task": "LaMP_2"})
    funnel = Funnel(samples, predictions, Experiment.model_validate({"cloud": {"samples": 4}}))
    assert funnel.fates == ["accepted", "semantic", "leak", "not received"]
    assert funnel.asked("LaMP_2") == 8
    assert [funnel.count("LaMP_2", fate) for fate in funnel.fates] == [1, 1, 1, 5]


def test_precision_and_recall_of_the_filters():
    rows = faults(
        samples_frame(("a", "accepted", "good"), ("a", "rejected_by:semantic", "good"), ("a", "accepted", "off_topic"),
                      ("a", "rejected_by:semantic", "off_topic"), ("a", "rejected_by:length", "off_topic"),
                      ("a", "rejected_by:semantic", "off_topic")),
        ["semantic", "length"],
    )  # fmt: skip
    found = [(row.kind, row.sound, row.n, row.caught) for row in rows]
    assert found == [("good", True, 2, 0.5), ("off_topic", False, 4, 0.75)]
    assert precision(rows, "semantic") == pytest.approx(2 / 3)
    assert precision(rows, "length") == 1.0
    assert precision(rows, "") == 0.75
    assert precision(rows, "diversity") is None


def test_tokens_a_device_trained_on_are_not_the_clouds(run):
    events = run.read("events")
    trained = events.head(1).assign(request_id=None, kind="train", tokens_in=10**9)
    with_training = FleetSummary(pd.concat([events, trained]), run.read("ledger"), run.read("predictions"))
    assert with_training.tokens_in == int(events["tokens_in"].sum())
    assert [upload.kind for upload in with_training.uploads] == ["augment"]
    assert with_training.uploads[0].chars == int(run.read("ledger")["chars"].sum())


# --- tables and figures ----------------------------------------------------------------------------------------------


def test_csv_tables_hold_the_summary_at_full_precision(run):
    summary = Summary(run.read_json("summary.json"))
    with (run.path / "tables" / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["task"], row["arm"], row["metric"]): row for row in csv.DictReader(file)}
    assert float(rows["LaMP_3", "collaborative", "mae"]["mean"]) == summary.mean("LaMP_3", "collaborative")["mean"]
    with (run.path / "tables" / "contrasts.csv").open(encoding="utf-8", newline="") as file:
        contrasts = list(csv.DictReader(file))
    assert len(contrasts) == len(summary.contrasts(everything=True)) == 24
    assert contrasts[0]["verdict"] == "better"


def test_latex_rows_have_as_many_cells_as_columns_and_no_bare_underscore(run):
    for name, columns in (("summary", 1 + len(TASKS)), ("contrasts", 7)):
        text = (run.path / "tables" / f"{name}.tex").read_text(encoding="utf-8")
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert rows and all(len(re.split(r"(?<!\\)&", row)) == columns for row in rows)
        assert not re.search(r"(?<!\\)_", text)


def test_predictions_are_in_lamps_own_format(run):
    answers = json.loads((run.path / "tables/predictions/seed-2/collaborative/LaMP_4.json").read_text(encoding="utf-8"))
    assert answers["task"] == "LaMP_4"
    assert len(answers["golds"]) == 6 * 3
    assert all(set(gold) == {"id", "output"} and isinstance(gold["output"], str) for gold in answers["golds"])


def test_of_a_query_answered_twice_the_last_answer_counts(tmp_path):
    experiment = Experiment.model_validate({"arms": ["frozen"], "rounds": 2})
    run = RunDirectory.create(tmp_path / "rounds", experiment)
    for round, said in ((0, "first"), (1, "second")):
        row = {"device_id": "d", "user_id": "u", "arm": "frozen", "task": "LaMP_4", "query_id": "7", "prediction": said}
        run.commit(1, round, {"predictions": [run.write_part("predictions", 1, round, "0", [row])]}, {})
    run.merge(experiment)
    write_report(run)
    answers = json.loads((run.path / "tables/predictions/seed-1/frozen/LaMP_4.json").read_text(encoding="utf-8"))
    assert answers["golds"] == [{"id": "7", "output": "second"}]


def test_figures_are_svg_and_pdf(run):
    for name in ("contrasts", "filters"):
        svg = (run.path / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert "<svg" in svg and "<dc:date>" not in svg
        assert (run.path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
