"""`untether tune`: who is trained and judged, and what its analysis says of finished cells."""

import pandas as pd
import pytest

from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.run.directory import RunDirectory
from untether.sim.studies import Study
from untether.sim.studies.tuning import analyse, scored, validation, write_study

GRID = {"training.learning_rate": [0.001, 0.01]}


def test_validation_users_are_none_of_the_evaluated(tmp_path):
    world = validation(Experiment.read(None, {"arms": "frozen,shared,local,collaborative,cloud"}), users=5)
    assert world["arms"] == ["shared", "local", "collaborative"]
    assert (world["population"]["split"], world["population"]["users"]) == ("validation", 5)
    files = Experiment.read(None, {
        "population.source": "lamp", "population.path": str(tmp_path), "population.users": "20", "seeds": "1,2",
        "population.shared_users": "6", "arms": "shared,local", "cloud.provider": "recombine",
    })  # fmt: skip
    assert validation(files, users=5)["population"]["skip_users"] == 2 * 20 + 6
    with pytest.raises(UserError, match="nothing to tune"):
        validation(Experiment.read(None, {"arms": "frozen,rag"}), users=5)


def test_the_study_has_a_cell_a_value_and_is_written_to_be_run_again(tmp_path):
    path = write_study(tmp_path, Experiment.read(None, {"arms": "local"}), 4, GRID)
    study = Study.read(str(path))
    assert [cell.experiment.training.learning_rate for cell in study.cells] == [0.001, 0.01]
    assert all(cell.experiment.arms == ("local",) for cell in study.cells)
    assert all(cell.experiment.population.split == "validation" for cell in study.cells)


def test_the_best_place_of_each_arm_and_of_all_is_found(tmp_path):
    path = write_study(tmp_path, Experiment.read(None, {"arms": "local,collaborative"}), 4, GRID)
    study, runs = Study.read(str(path)), {}
    means = {  # accuracy, and error in stars, where less is better
        ("local", 0.001): (0.6, 1.0), ("local", 0.01): (0.5, 0.2), ("collaborative", 0.001): (0.7, 0.4),
        ("collaborative", 0.01): (0.4, 0.4),
    }  # fmt: skip
    for cell in study.cells:
        rate = cell.experiment.training.learning_rate
        runs[cell.name] = RunDirectory.create(tmp_path / cell.name, cell.experiment)
        rows = [
            {"task": task, "metric": metric, "arm": arm, "reference": reference, "mean": mean, "n_users": 4}
            for arm in ("local", "collaborative")
            for task, metric, mean in zip(("LaMP_2", "LaMP_3"), ("accuracy", "mae"), means[arm, rate], strict=True)
            for reference in (None, "frozen")
        ]
        runs[cell.name].write_json("summary.json", {"rows": rows})
    table = scored(study, pd.concat([
        pd.DataFrame(runs[cell.name].read_json("summary.json")["rows"]).assign(cell=cell.name, **cell.words)
        for cell in study.cells
    ]))  # fmt: skip
    assert len(table) == 4 and table["score"].round(3).tolist() == [0.675, 0.8, 0.725, 0.65]
    analyse(study, tmp_path, runs)
    said = (tmp_path / "findings.md").read_text()
    assert "local: best at training.learning_rate = 0.01 (score 0.725" in said
    assert "collaborative: best at training.learning_rate = 0.001 (score 0.800" in said
    assert "Over all arms alike: `training.learning_rate = 0.001` (mean score 0.738" in said
    assert len(pd.read_csv(tmp_path / "table.csv")) == 4
