"""The report must say what the numbers say, need nothing from outside, and come out the same twice."""

from __future__ import annotations

import csv
import html
import json
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from finished_run import TASKS, contrast_row, summary_row, synthetic_run

from untether.sim.experiment import Experiment
from untether.sim.report import write_report
from untether.sim.report.curves import availability
from untether.sim.report.fleet import FleetSummary
from untether.sim.report.funnel import Funnel, faults, precision
from untether.sim.report.people import gain_of, user_scores
from untether.sim.report.prose import answer, captions, method, notes
from untether.sim.report.summary import Summary
from untether.sim.report.texts import free_text, lengths, repeats, samples_beside
from untether.sim.run.directory import RunDirectory


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
    assert not re.search(r"@import|<script\s|<link|url\((?!#)|fetch\(|XMLHttp", page)


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
    section = changed[changed.index('<h2 id="settings">') :]
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


def test_what_did_not_fit_into_the_base_model_is_said():
    facts = {"context": {"examples_cut": 1, "prompts_cut": 12}}
    said = " ".join(notes(Summary({"rows": [], "facts": facts}), Experiment(), {}))
    assert "1 training example and 12 prompts did not fit into the device's model" in said
    none = Summary({"rows": [], "facts": {"context": {"examples_cut": 0, "prompts_cut": 0}}})
    assert "did not fit" not in " ".join(notes(none, Experiment(), {}))


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
    for name in ("contrasts", "contrasts-narrow", "filters", "users", "gains", "outcomes"):
        svg = (run.path / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert "<svg" in svg and "<dc:date>" not in svg
        assert (run.path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


# --- users, texts, time ----------------------------------------------------------------------------------------------


def test_user_scores_weigh_rounds_by_their_answers():
    rows = [
        {"seed": 1, "user_id": "u", "arm": "local", "task": "LaMP_2", "metric": "accuracy", "value": 1.0, "n": 3},
        {"seed": 1, "user_id": "u", "arm": "local", "task": "LaMP_2", "metric": "accuracy", "value": 0.0, "n": 1},
        {"seed": 2, "user_id": "u", "arm": "local", "task": "LaMP_2", "metric": "accuracy", "value": 0.5, "n": 1},
    ]  # fmt: skip
    summary = Summary({"rows": [summary_row(arm="local", mean=0.6)]})
    assert user_scores(pd.DataFrame(rows), summary)["LaMP_2"]["local"].to_dict() == {(1, "u"): 0.75, (2, "u"): 0.5}


def test_gains_are_turned_where_less_is_better():
    summary = Summary({"rows": [summary_row("LaMP_3", metric="mae", mean=1.0)]})
    table = pd.DataFrame({"collaborative": [0.5, 1.0], "placebo": [1.0, 0.75]})
    assert list(gain_of(summary, "LaMP_3", table, "collaborative", "placebo")) == [0.5, -0.25]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the cat sat on the mat and then it went home again", False),
        ("I like it very very very very very much", True),
        ("so good to see you so good to see you so good to see you", True),
        ("comedy", False),
        ("", False),
    ],
)
def test_repetitions_are_found(text, expected):
    assert repeats(text) is expected


def test_lengths_count_empty_answers_and_leave_labels_out(run):
    found = lengths(run)
    by_arm = {(row.task, row.arm): row for row in found}
    predictions = run.read("predictions", ("arm", "task", "prediction"))
    cloud = predictions[(predictions["arm"] == "cloud") & (predictions["task"] == "LaMP_2")]["prediction"]
    assert by_arm["LaMP_2", "cloud"].n == len(cloud)
    assert by_arm["LaMP_2", "cloud"].empty == pytest.approx(cloud.isna().mean())
    assert free_text(found) == []


def test_samples_are_shown_by_verdict_beside_the_users_own(run, page):
    beside = samples_beside(run)
    assert [one.task for one in beside] == sorted(TASKS)
    verdicts = {verdict for one in beside for verdict, *_ in one.samples}
    assert {"accepted", "rejected_by:semantic"} <= verdicts
    assert all(one.own for one in beside), "the world can always be asked for a user's own items"
    assert beside[0].own[0][1] in html.unescape(page)


def test_links_are_drawn_only_where_somebody_lost_one():
    assert availability(Experiment()) is None
    away = Experiment.model_validate({"network": {"availability": 0.5, "mean_down_s": 21600.0}, "rounds": 2})
    figure = availability(away)
    strip = figure.axes[1].images[0].get_array()
    assert 0 <= strip.min() < 1 and strip.shape[0] == Experiment().population.users
    plt.close(figure)
