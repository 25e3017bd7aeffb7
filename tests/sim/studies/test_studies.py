"""Studies: what a grid becomes, that finished cells are not run again, and what the numbers are said to be."""

import csv
import re

import pandas as pd
import pytest

from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.core.kinds import ANALYSES
from untether.sim.launch import arithmetic
from untether.sim.run.directory import RunDirectory
from untether.sim.studies import Study, run_study
from untether.sim.studies.frames import mean_interval, paired_interval, tables, user_scores
from untether.sim.studies.study import FOLDER

TEXT = """
name = "toy"
question = "Does it?"
[base]
arms = ["local_matched", "placebo", "collaborative"]
population.users = 5
[grid]
"population.history" = [[4, 4], [4, 8]]
"cloud.samples" = [0, 8]
[figure]
x = "cloud.samples"
label = "samples"
"""

VARIANTS = """
[variants.policy.weekly]
"drift.policy" = "every"
drift.every = 7
[variants.policy.never]
drift.policy = "never"
[variants.policy.alarm]
optional = true
drift.policy = "on_drift"
"""


def _rows(gain):
    common = {"task": "LaMP_3", "metric": "mae", "arm": "collaborative", "n_users": 5}
    return [
        {**common, "reference": "local_matched", "diff": -gain, "diff_ci_low": -gain - 0.1, "diff_ci_high": 0.1 - gain},
        {**common, "reference": "placebo", "diff": gain, "diff_ci_low": gain - 0.1, "diff_ci_high": gain + 0.1},
        {**common, "reference": None, "diff": None, "diff_ci_low": None, "diff_ci_high": None},
    ]


class Cells:
    """Runs cells by writing their summaries; stops before number `stop` of its own."""

    def __init__(self, stop=99):
        self.ran, self.stop = [], stop

    def __call__(self, runs):
        for run in runs:
            if run.finished:
                continue
            if len(self.ran) == self.stop:
                raise ResumableStop("interrupted")
            self.ran.append(run.path.name)
            gain = 0.5 if run.experiment.cloud.samples else 0.0
            run.write_json("summary.json", {"rows": _rows(gain), "facts": {}})
            run.drop_parts()


@pytest.fixture
def study(tmp_path):
    (tmp_path / "toy.toml").write_text(TEXT)
    return Study.read(str(tmp_path / "toy.toml"))


def test_a_grid_is_all_combinations_of_valid_experiments(study):
    assert [cell.name for cell in study.cells] == [
        "history=4,samples=0", "history=4,samples=8", "history=4-8,samples=0", "history=4-8,samples=8",
    ]  # fmt: skip
    assert [(c.experiment.population.history, c.experiment.cloud.samples) for c in study.cells][1] == ((4, 4), 8)
    assert all(cell.experiment.population.users == 5 for cell in study.cells)


def test_a_study_goes_on_where_it_stopped(study, tmp_path):
    out = tmp_path / "out"
    first = Cells(stop=2)
    with pytest.raises(ResumableStop):
        run_study(study, out, first)
    second = Cells()
    run_study(study, out, second)
    assert first.ran + second.ran == [cell.name for cell in study.cells]
    third = Cells()
    run_study(study, out, third)
    assert third.ran == []


def test_the_answer_turns_errors_so_that_more_is_better_and_says_where_it_is_clear(study, tmp_path):
    out = run_study(study, tmp_path / "out", Cells())
    table = (out / "table.csv").read_text().splitlines()
    assert table[0].startswith("cell,population.history,cloud.samples,task,metric,arm,reference,gain,low,high")
    assert '"history=4,samples=8",4,8,LaMP_3,mae,collaborative,local_matched,0.5000,0.4000,0.6000,5' in table
    found = (out / "findings.md").read_text()
    what = "collaborative over local_matched, history 4-8 (MAE, 5 users)"
    assert f"{what}: +0.000 [-0.100, +0.100] at samples = 0, +0.500 [+0.400, +0.600] at 8; better at 8." in found
    assert "better at 8" in found and "worse at 8" in found
    assert (out / "figures" / "toy.svg").exists() and (out / "figures" / "toy.pdf").exists()


def test_the_fastest_arithmetic_is_measured_when_a_cell_begins_and_kept(tmp_path, monkeypatch):
    (tmp_path / "toy.toml").write_text(TEXT.replace("[base]", '[base]\nmodel.dtype = "fastest"', 1))
    asked, out = Study.read(str(tmp_path / "toy.toml")), tmp_path / "out"
    monkeypatch.setattr(arithmetic, "_measured", lambda device: "mixed")
    with pytest.raises(ResumableStop):
        run_study(asked, out, Cells(stop=1))
    monkeypatch.setattr(arithmetic, "_measured", lambda device: "float32")  # another machine
    run_study(asked, out, Cells())
    assert {RunDirectory(out / "cells" / cell.name).experiment.model.dtype for cell in asked.cells} == {"mixed"}


def test_a_cell_of_another_experiment_is_refused(study, tmp_path):
    run_study(study, tmp_path / "out", Cells())
    (tmp_path / "out" / "cells" / "history=4,samples=0" / "state" / "finished.json").unlink()
    (tmp_path / "toy.toml").write_text(TEXT.replace("users = 5", "users = 6"))
    with pytest.raises(UserError, match="another experiment"):
        run_study(Study.read(str(tmp_path / "toy.toml")), tmp_path / "out", Cells())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("cloud.samples", "cloud.sample", "Did you mean `cloud.samples`"),
        ("[0, 8]", "[0, -8]", "greater than or equal to 0"),
        ('x = "cloud.samples"', 'x = "lora.rank"', "unknown axis `lora.rank`"),
        ("question =", "qestion =", "question"),
        ("question =", 'analysis = "gian"\nquestion =', "Did you mean `gain`"),
        ("[0, 8]", "[0, 8, 8]", "the same value twice"),
        ("[0, 8]", "[]", "the axis has no values"),
        ('name = "toy"', 'name = "../toy"', "name"),
    ],
)
def test_mistakes_in_a_study_are_named(tmp_path, old, new, said):
    (tmp_path / "toy.toml").write_text(TEXT.replace(old, new))
    with pytest.raises(UserError, match=said):
        Study.read(str(tmp_path / "toy.toml"))


@pytest.fixture
def varied(tmp_path):
    def read(text=VARIANTS, **grid):
        (tmp_path / "toy.toml").write_text(TEXT.split("[grid]")[0] + text)
        return Study.read(str(tmp_path / "toy.toml"), grid=grid)

    return read


def test_variants_are_an_axis_of_named_sets_of_fields(varied):
    study = varied('[grid]\n"lora.rank" = [2, 4]\n' + VARIANTS)
    assert study.axes == ("lora.rank", "policy")
    assert [cell.name for cell in study.cells] == [
        "rank=2,policy=weekly", "rank=2,policy=never", "rank=4,policy=weekly", "rank=4,policy=never",
    ]  # fmt: skip
    drift = [(cell.experiment.drift.policy, cell.experiment.drift.every) for cell in study.cells]
    assert drift == [("every", 7), ("never", 1)] * 2
    assert study.cells[0].words == {"lora.rank": "2", "policy": "weekly"}


def test_optional_variants_run_by_choice_only(varied):
    assert [cell.name for cell in varied(policy="alarm,weekly").cells] == ["policy=alarm", "policy=weekly"]
    assert varied(policy="alarm").cells[0].experiment.drift.policy == "on_drift"


def test_a_grid_axis_takes_other_values(tmp_path):
    (tmp_path / "toy.toml").write_text(TEXT)
    chosen = {"cloud.samples": "2,4", "population.history": "[3,5],[6,6]"}
    study = Study.read(str(tmp_path / "toy.toml"), {"seeds": "7"}, chosen)
    assert [cell.values["cloud.samples"] for cell in study.cells] == [2, 4, 2, 4]
    assert [cell.experiment.population.history for cell in study.cells] == [(3, 5), (3, 5), (6, 6), (6, 6)]
    assert {cell.experiment.seeds for cell in study.cells} == {(7,)}
    words = TEXT.replace('"cloud.samples" = [0, 8]', '"model.base" = ["embedded"]')
    (tmp_path / "words.toml").write_text(words.replace("cloud.samples", "model.base"))
    named = Study.read(str(tmp_path / "words.toml"), None, {"model.base": "embedded,some/model"})
    assert [cell.experiment.model.base for cell in named.cells[:2]] == ["embedded", "some/model"]
    assert named.cells[1].name == "history=4,base=some_model", "a folder of its own, not a path"


@pytest.mark.parametrize(
    ("text", "grid", "said"),
    [
        (VARIANTS, {"policy": "weakly"}, "Did you mean `weekly`"),
        (VARIANTS, {"polcy": "weekly"}, "Did you mean `policy`"),
        (VARIANTS.replace("drift.policy", "drift.polcy"), {}, "Did you mean `drift.policy`"),
        ('[grid]\n"drift.every" = [1]\n' + VARIANTS, {}, "drift.every is set by two axes, drift.every and policy"),
        (VARIANTS.replace("policy.", "policy.alarm.").replace("optional = true", ""), {}, "unknown field"),
        ("[variants.policy.alarm]\noptional = true\n", {}, "the axis has no values"),
        ("", {}, "needs an axis"),
    ],
)
def test_mistakes_in_axes_are_named(varied, text, grid, said):
    with pytest.raises(UserError, match=said):
        varied(text, **grid)


def test_a_field_that_the_study_varies_is_not_set_beside_it(study, tmp_path):
    with pytest.raises(UserError, match="--grid"):
        Study.read(str(tmp_path / "toy.toml"), {"cloud.samples": "4"})


def test_analyses_have_names(varied, tmp_path, monkeypatch):
    monkeypatch.setattr(ANALYSES, "_added", {})
    seen = {}

    def analyse(study, out, runs):
        seen.update(runs)
        (out / "findings.md").write_text(f"# {study.spec.question}\n\n- `a < b`\n\nOne note.\n")

    ANALYSES.register("mine", analyse)
    with pytest.raises(ValueError, match="registered already"):
        ANALYSES.register("mine", analyse)
    study = varied()
    study = type(study)(study.spec.model_copy(update={"analysis": "mine"}), study.axes, study.cells)
    monkeypatch.setattr("untether.sim.studies.runner.check", lambda experiment: None)  # no run follows [drift] yet
    out = run_study(study, tmp_path / "out", Cells(), "untether study mine")
    assert list(seen) == ["policy=weekly", "policy=never"] and seen["policy=never"].experiment.drift.policy == "never"
    page = (out / "report.html").read_text()
    assert "<code>a &lt; b</code>" in page and "One note." in page and "<svg" not in page
    assert "untether study mine" in page and "drift.policy" not in page.split("What the variants set")[0]


def test_the_report_needs_nothing_else_and_holds_every_number(study, tmp_path):
    out = run_study(study, tmp_path / "out", Cells())
    page = (out / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page) and "<script src" not in page
    assert page.count("<svg") == 1 and "Gain along samples" in page
    for row in csv.reader((out / "table.csv").open()):
        for value in row:
            assert f">{value}<" in page, value


def test_cells_share_the_studys_caches_unless_the_base_says_otherwise(study, tmp_path):
    out = run_study(study, tmp_path / "out", Cells())
    own = [RunDirectory.open(path).experiment for path in (out / "cells").iterdir()]
    assert {e.engine.cache for e in own} == {str((out / "cache").resolve())}
    assert {e.cloud.cache for e in own} == {str((out / "cache" / "answers.sqlite").resolve())}
    (tmp_path / "toy.toml").write_text(TEXT.replace("[base]", '[base]\nengine.cache = ""\ncloud.cache = "mine.sqlite"'))
    out = run_study(Study.read(str(tmp_path / "toy.toml")), tmp_path / "other", Cells())
    own = [RunDirectory.open(path).experiment for path in (out / "cells").iterdir()]
    assert {(e.engine.cache, e.cloud.cache) for e in own} == {("", "mine.sqlite")}


def test_a_study_that_was_moved_goes_on(study, tmp_path):
    with pytest.raises(ResumableStop):
        run_study(study, tmp_path / "out", Cells(stop=1))
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    second = Cells()
    run_study(study, moved, second)
    assert len(second.ran) == 3
    last = RunDirectory.open(moved / "cells" / second.ran[-1])
    assert last.experiment.engine.cache == str((moved / "cache").resolve())


def test_means_over_users_and_their_intervals(study, tmp_path):
    """By hand: users a and b, queries averaged first; of the paired difference only a and b are shared."""
    out = run_study(study, tmp_path / "out", Cells())
    runs = {cell.name: RunDirectory.open(out / "cells" / cell.name) for cell in study.cells}
    for number, run in enumerate(runs.values()):
        frame = pd.DataFrame({"arm": "local", "task": "LaMP_2", "seed": 1, "user_id": ["a", "a", "b"],
                              "score": [0.0, 1.0, float(number)], "input": "x"})  # fmt: skip
        frame.to_parquet(run.path / "predictions.parquet")
    rows = tables(study, runs, "predictions", ["arm", "task", "seed", "user_id", "score"])
    assert list(rows)[:3] == ["cell", "population.history", "cloud.samples"] and "input" not in rows
    scores = user_scores(rows, ["cell"]).set_index(["cell", "user_id"])["score"]
    assert scores["history=4,samples=0"].tolist() == [0.5, 0.0] and scores["history=4,samples=8"].tolist() == [0.5, 1.0]
    mean, low, high = mean_interval(scores["history=4,samples=8"])
    reach = 12.706 * 0.25  # Student's t with one degree of freedom, times the standard error of 0.5 and 1
    assert (mean, low, high) == pytest.approx((0.75, 0.75 - reach, 0.75 + reach), abs=1e-3)
    alike = scores["history=4,samples=8"].to_frame().assign(cluster="x").set_index("cluster", append=True)["score"]
    assert pd.isna(mean_interval(alike)[1]), "one cluster"
    more = pd.concat([scores["history=4,samples=0"], pd.Series({"c": 9.0})])
    expected = (0.5, 0.5 - 2 * reach, 0.5 + 2 * reach, 2)
    assert paired_interval(scores["history=4,samples=8"], more) == pytest.approx(expected, abs=1e-3)
    assert mean_interval([0.3])[0] == 0.3 and pd.isna(mean_interval([0.3])[1]) and pd.isna(mean_interval([])[0])


def test_studies_that_come_with_the_package_are_valid():
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    assert names and all(Study.read(name).spec.name == name for name in names)
    with pytest.raises(UserError, match="Did you mean `history`"):
        Study.read("histori")


def test_a_grid_is_counted_before_it_is_built(tmp_path, monkeypatch):
    (tmp_path / "toy.toml").write_text(TEXT)
    monkeypatch.setattr("untether.sim.studies.study.MAX_CELLS", 3)
    monkeypatch.setattr("untether.sim.studies.study.Experiment.build", None)  # nothing may be built
    with pytest.raises(UserError, match="its axes make 4 cells, and a study has at most 3"):
        Study.read(str(tmp_path / "toy.toml"))


def test_a_contrast_that_no_summary_has_is_computed_from_the_answers(tmp_path):
    """Of the arms that a cell runs; the summary itself compares those of the design alone."""
    (tmp_path / "own.toml").write_text(
        TEXT.replace('"local_matched", "placebo", "collaborative"', '"shared", "collaborative"')
        .replace("[[4, 4], [4, 8]]", "[[4, 4]]")
        .replace("[figure]", '[figure]\ncontrasts = [["collaborative", "shared"], ["collaborative", "local"]]')
    )
    study = Study.read(str(tmp_path / "own.toml"))

    def ran(runs):
        for run in runs:
            better = 0.5 if run.experiment.cloud.samples else 0.0
            rows = [
                {"seed": 1, "round": 0, "device_id": f"d{user}", "user_id": f"u{user}", "arm": arm, "task": "LaMP_2N",
                 "query_id": f"q{query}", "prediction": "yes" if right else "no", "gold": "yes", "score": float(right),
                 "outcome": "ok", "cluster": f"u{user}"}
                for user in range(5) for query in range(2)
                for arm, right in (("shared", False), ("collaborative", bool(better) and query == 0))
            ]  # fmt: skip
            pd.DataFrame(rows).to_parquet(run.path / "predictions.parquet")
            run.write_json("summary.json", {"rows": _rows(0.0)[2:], "facts": {}})
            run.drop_parts()

    out = run_study(study, tmp_path / "out", ran)
    table = list(csv.DictReader((out / "table.csv").open()))
    assert [(row["arm"], row["reference"], float(row["gain"])) for row in table] == [
        ("collaborative", "shared", 0.0), ("collaborative", "shared", 0.5),
    ]  # fmt: skip
    assert "+0.000 [+0.000, +0.000] at samples = 0, +0.500 [+0.500, +0.500] at 8" in (out / "findings.md").read_text()


def test_one_point_is_told_once(study, tmp_path):
    (tmp_path / "toy.toml").write_text(TEXT.replace("[0, 8]", "[8]").replace("[[4, 4], [4, 8]]", "[[4, 4]]"))
    out = run_study(Study.read(str(tmp_path / "toy.toml")), tmp_path / "out", Cells())
    assert "(MAE, 5 users): +0.500 [+0.400, +0.600] at samples = 8; better." in (out / "findings.md").read_text()
