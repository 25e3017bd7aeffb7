"""Studies: what a grid becomes, that finished cells are not run again, and what the numbers are said to be."""

import pytest

from sim.errors import ResumableStop, UserError
from sim.studies import Study, run_study
from sim.studies.study import FOLDER

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
    ],
)
def test_mistakes_in_a_study_are_named(tmp_path, old, new, said):
    (tmp_path / "toy.toml").write_text(TEXT.replace(old, new))
    with pytest.raises(UserError, match=said):
        Study.read(str(tmp_path / "toy.toml"))


def test_studies_that_come_with_the_package_are_valid():
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    assert names and all(Study.read(name).spec.name == name for name in names)
    with pytest.raises(UserError, match="Did you mean `history`"):
        Study.read("histori")
