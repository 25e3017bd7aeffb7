"""What must be true of any answer to "how long does an adapter stay good?": four users, six days, really trained.

Users change on day 2, for good (`abrupt`) or until day 4 (`recurring`), or never and learn nothing new (`none`).
"""

from __future__ import annotations

import pandas as pd
import pytest
from fleet import make_worker, run_in_process, tiny
from pandas.testing import assert_frame_equal

from untether.clients.device.worker import Endpoint
from untether.server.background import start_background
from untether.sim.core.kinds import ANALYSES
from untether.sim.population.source import FromWorld
from untether.sim.run.directory import RunDirectory
from untether.sim.studies import Study
from untether.sim.studies.drift.drift import COLUMNS, DriftCase, measure
from untether.sim.studies.drift.measures import KEYS, along, paired, read_answers

TEXT = """
name = "days"
question = "What does age cost?"
analysis = "drift"
[base]
rounds = 6
arms = ["frozen", "collaborative"]
population.users = 4
population.tasks = ["LaMP_4"]
population.queries = 12
population.history = [6, 6]
population.replay = true
population.arrivals = 3.0
population.max_history = 6
cloud.samples = 6
training = { epochs = 3, batch_size = 2, start = "anew" }
drift = { jitter_days = 0.0, day = 2.0 }
evaluation.resamples = 200
engine.threads = 1
[variants.change]
none = { drift.kind = "none", population.arrivals = 0.0 }
abrupt = { drift.kind = "abrupt" }
recurring = { drift.kind = "recurring", drift.period = 4.0 }
[variants.policy]
never = { drift.policy = "never" }
second = { drift.policy = "every", drift.every = 2 }
"""
MARGIN = 0.05
"""Of ROUGE-1. Four users and 48 answers: what a change of person costs is five times as much."""


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """(study, its runs by (change, policy), run(name, experiment) for more of them)."""
    folder = tmp_path_factory.mktemp("days")
    (folder / "days.toml").write_text(TEXT)
    study = Study.read(str(folder / "days.toml"), {"engine.cache": str(folder / "cache")})
    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        warm = make_worker(RunDirectory.create(folder / "warm", tiny()), endpoint)
        warm.base, warm.encoder  # noqa: B018  (loads them once for all)

        def run(name, experiment, hosts=1):
            made = run_in_process(folder / name, experiment, endpoint, hosts, warm)
            if experiment.drift.kind != "none":
                made.write_truth(FromWorld(experiment, 1).truth())
            return made

        runs = {cell.name: run(cell.name, cell.experiment) for cell in study.cells}
        yield study, runs, run


def answers(days, change, policy):
    return read_answers(days[1][f"change={change},policy={policy}"])


def adapters(days, change, policy):
    told = answers(days, change, policy)
    return told[told["arm"] == "collaborative"].sort_values(KEYS, ignore_index=True)


def good(told, *rounds):
    return told.loc[told["round"].isin(rounds), "good"].mean()


def test_without_a_change_and_with_the_same_data_a_fresh_adapter_is_no_better(days):
    both = paired(adapters(days, "none", "second"), adapters(days, "none", "never"))
    later = both[both["age"] >= 2]
    assert len(later) == 4 * 8
    assert (both.loc[both["age"] < 2, "apart"] == 0).all()  # the same adapter, trained once
    assert (later["apart"] != 0).any()  # another one, and yet:
    assert abs(later["apart"].mean()) < MARGIN


def test_an_adapter_is_worth_having_at_all(days):
    told = answers(days, "none", "never").groupby("arm")["good"].mean()
    assert told["collaborative"] > told["frozen"] + 2 * MARGIN


def test_an_abrupt_change_shows_on_its_day_and_not_before(days):
    still, moved = adapters(days, "none", "never"), adapters(days, "abrupt", "never")
    columns = [*KEYS, "input", "prediction", "score"]
    assert_frame_equal(still.loc[still["round"] < 2, columns], moved.loc[moved["round"] < 2, columns])
    assert abs(good(still, 2, 3, 4, 5) - good(still, 0, 1)) < 2 * MARGIN
    assert good(moved, 2) < good(still, 2) - 2 * MARGIN
    assert good(moved, 2, 3, 4, 5) < good(moved, 0, 1) - 2 * MARGIN
    assert (moved["since"] == moved["round"] - 2).all() and set(moved["users"]) == {"changed"}


def test_asking_again_after_the_change_helps(days):
    both = paired(adapters(days, "abrupt", "second"), adapters(days, "abrupt", "never"))
    assert abs(both.loc[both["since"] < 0, "apart"].mean()) < MARGIN
    assert both.loc[both["since"] >= 2, "apart"].mean() > MARGIN  # from day 4 on it has met the new person


def test_who_returns_finds_the_old_adapter_as_good_as_it_was(days):
    still, moved = adapters(days, "none", "never"), adapters(days, "recurring", "never")
    assert good(moved, 2, 3) < good(still, 2, 3) - 2 * MARGIN
    back = moved[moved["round"] >= 4].merge(still, on=[*KEYS, "input"])
    assert len(back) > 0.8 * 4 * 4  # some texts are others: none is ever told twice
    assert (back["prediction_x"] == back["prediction_y"]).all() and (back["score_x"] == back["score_y"]).all()


def test_the_same_seed_gives_the_same_curve(days):
    """Without a cache, split over two hosts."""
    study, _, run = days
    (cell,) = (cell for cell in study.cells if cell.words == {"change": "abrupt", "policy": "second"})
    engine = cell.experiment.engine.model_copy(update={"cache": ""})
    again = run("again", cell.experiment.model_copy(update={"engine": engine}), hosts=2)
    stale = adapters(days, "abrupt", "never")
    curve = along(paired(adapters(days, "abrupt", "second"), stale), "age", "apart")
    assert curve["value"].abs().max() > MARGIN
    assert_frame_equal(along(paired(read_answers(again), stale), "age", "apart"), curve, check_exact=False, atol=1e-12)


def test_the_study_tells_it_all(days, tmp_path):
    study, runs, _ = days
    ANALYSES.get("drift")(study, tmp_path, runs)
    table = pd.read_csv(tmp_path / "table.csv").set_index(["change", "measure"])
    assert set(table.loc["abrupt"].index) >= {
        "score", "regret", "decay", "decay since the change", "half-life", "score on the now gold",
        "score on the before gold", "refreshes", "bytes", "tokens", "energy_j", "minutes", "on the front",
    }  # fmt: skip
    assert "score on the now gold" not in table.loc["none"].index
    seconds = table[table["policy"] == "second"]
    assert seconds.loc[("none", "refreshes"), "value"] == 3
    now, before = (
        seconds.loc[[("abrupt", f"score on the {name} gold")]].set_index("from")["value"] for name in ("now", "before")
    )
    assert now[-3] == before[-3]  # nobody has changed yet
    told = table.reset_index().set_index(["change", "policy", "users"]).sort_index()
    gained = told[(told["measure"] == "gain by age") & (told["from"] == 0)]["low"] > 0
    halved = told[told["measure"] == "half-life"]["value"].notna()
    assert len(halved) and (gained[halved.index] | ~halved).all(), "what is not there at first cannot halve"
    assert sorted(path.name for path in (tmp_path / "figures").glob("*.svg")) == [
        "1-decay.svg", "2-gain.svg", "3-days.svg", "4-memory.svg", "5-price.svg",
    ]  # fmt: skip
    found = (tmp_path / "findings.md").read_text()
    assert "abrupt, changed users: regret against `second`" in found and "mechanism check" in found


def test_a_detector_is_measured_on_its_own_run(days):
    """From the answers that were watched, by way of the real tables, to the rows of the study."""
    study, _, run = days
    (cell,) = (cell for cell in study.cells if cell.words == {"change": "abrupt", "policy": "second"})
    drift = cell.experiment.drift.model_copy(update={"policy": "on_drift"})
    case = DriftCase("abrupt", "watched", run("watched", cell.experiment.model_copy(update={"drift": drift})))
    told = pd.DataFrame(measure([case]), columns=COLUMNS).set_index("measure")
    assert told.loc["detected", "users"] == "changed" and 0 <= told.loc["detected", "value"] <= 1
    assert told.loc["raised a false alarm", "n_users"] > 0
