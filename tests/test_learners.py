"""A fleet of which some devices learn: these as if all did, the others in virtual time alone."""

from __future__ import annotations

import pytest
from fleet import Silent, answers, losses, make_worker, run_in_process, tiny, verdicts
from pandas.testing import assert_frame_equal
from pydantic import ValidationError
from test_determinism import assert_same_results

from untether.clients.device.worker import Endpoint
from untether.clients.hosting.executors import InProcess
from untether.clients.hosting.in_process import InProcessBackend
from untether.server.background import start_background
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.experiment import Experiment
from untether.sim.population.source import device_id
from untether.sim.report import prose
from untether.sim.report.summary import Summary
from untether.sim.rounds.learners import Learners
from untether.sim.rounds.loop import run_rounds
from untether.sim.rounds.material import Material
from untether.sim.run.directory import RunDirectory
from untether.strategies import open_strategy

USERS, LEARNERS = 10, 4
BUSY = {
    "population__users": USERS, "rounds": 2, "network__availability": 0.4, "network__mean_down_s": 60_000,
    "cloud__capacity__concurrency": 1, "cloud__capacity__output_tokens_per_s": 20, "cloud__capacity__retries": 0,
    "cloud__timeout_s": 60, "network__ask_within_h": 0.01, "hardware__train_when": "charging",
    "hardware__profiles": "pixel-8,galaxy-a14", "hardware__queries": "day",
}  # fmt: skip
"""Links that break, one place at the cloud: some requests fail, and who asks at once waits for the others."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learners")
    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        warm = make_worker(RunDirectory.create(folder / "warm", tiny()), endpoint)

        def run(name, hosts=1, **changes):
            return run_in_process(folder / name, tiny(**changes), endpoint, hosts, warm)

        yield run


@pytest.fixture(scope="module")
def busy(runs):
    """A run in which four of ten devices learn, and their names."""
    run = runs("busy", **BUSY, engine__learners=LEARNERS)
    chosen = Learners(run.experiment, 1, USERS).devices
    return run, [device_id(device) for device in chosen]


def test_those_that_learn_learn_as_if_all_did(runs):
    """Where nobody waits for anybody. Not in question: a placebo, which is of the next user who asked."""
    same = {"population__users": USERS, "rounds": 2, "arms": "local,collaborative,cloud", "drift__samples": "keep"}
    whole, some = runs("whole", **same), runs("some", **same, engine__learners=LEARNERS)
    learn = {device_id(device) for device in Learners(some.experiment, 1, USERS).devices}
    assert len(learn) == LEARNERS
    for table in (answers, losses, verdicts):
        expected, found = table(whole), table(some)
        expected = expected[expected["device_id"].isin(learn)].reset_index(drop=True)
        assert len(expected) and set(found["device_id"]) == learn
        assert_frame_equal(found, expected, rtol=1e-4)
    of_learners = [run.read("ledger")["device_id"].isin(learn).sum() for run in (whole, some)]
    assert of_learners[0] == of_learners[1] == len(some.read("ledger"))


def test_everybody_asks_waits_and_trains_in_virtual_time(busy):
    run, learn = busy
    events = run.read("events")
    asked, trained = (events[events["kind"] == kind] for kind in ("augment", "train"))
    everybody = {device_id(device) for device in range(USERS)}
    assert set(asked["device_id"]) == everybody and set(trained["device_id"]) == everybody
    others = asked[~asked["device_id"].isin(learn)]
    assert {"ok"} < set(others["outcome"]) and others["queued_s"].max() > 0
    assert not events["event_id"].duplicated().any()
    for table in ("predictions", "metrics", "samples", "ledger", "training"):
        assert set(run.read(table)["device_id"]) <= set(learn), table
    assert set(run.read("predictions")["device_id"]) == set(learn)


def test_the_others_get_what_a_learner_got(busy):
    run, learn = busy
    events = run.read("events")
    came = events[(events["kind"] == "augment") & (events["outcome"] == "ok")]
    own = came["device_id"].isin(learn)
    for column in ("bytes_up", "tokens_in", "tokens_out"):
        assert set(came[~own][column]) <= set(came[own][column]), column
    assert came[~own]["tokens_out"].nunique() > 2


def test_hosts_change_nothing(busy, runs):
    run, _ = busy
    assert_same_results(runs("hosts", hosts=3, **BUSY, engine__learners=LEARNERS, engine__shard=1), run)


def test_a_run_that_was_stopped_between_rounds_ends_the_same(busy, tmp_path):
    """What the others have comes of learners of the day before, too."""
    undisturbed, _ = busy
    experiment = undisturbed.experiment
    run = RunDirectory.create(tmp_path / "run", experiment)

    class Stops(Silent):
        def begin(self, seed, round):
            if round:
                raise ResumableStop("interrupted")

    with start_background("world", {}) as gateway:
        worker = make_worker(run, Endpoint(gateway.base_url, gateway.model, gateway.fingerprint))
        backend = InProcessBackend(run, InProcess(lambda: worker), 1)
        with pytest.raises(ResumableStop):
            run_rounds(run, backend, open_strategy(experiment), Stops())
        assert run.committed(1, 0) and not run.committed(1, 1)
        run_rounds(run, backend, open_strategy(experiment), Silent())
    run.merge(experiment)
    assert_same_results(run, undisturbed)
    columns = ["event_id", "device_id", "kind", "outcome", "time_s", "duration_s", "tokens_out"]
    assert_frame_equal(run.read("events")[columns], undisturbed.read("events")[columns])


def test_the_report_says_who_learned(busy):
    run, _ = busy
    notes = prose.notes(Summary({"rows": [], "facts": {}}), run.experiment, {})
    assert any(f"{LEARNERS} of {USERS} devices a seed" in note for note in notes)
    assert not any("devices a seed" in note for note in prose.notes(Summary({"rows": [], "facts": {}}), tiny(), {}))


def test_state_goes_on(busy):
    """In a round in which nobody of the learners is due, the others train on what a learner had before."""
    run, _ = busy
    learners = Learners(run.experiment, 1, USERS)
    first = learners.devices[0]
    learners.materials(0, range(USERS), lambda device: 2, {first: Material(5, 100, 4, 80, 6, 120)})
    again = Learners(run.experiment, 1, USERS, learners.state())
    found = again.materials(1, range(USERS), lambda device: device % 3, {})
    others = [device for device in range(USERS) if device not in learners]
    assert set(found) == set(others)
    for device in others:
        assert found[device].real == 5 and found[device].accepted == 2 * min(device % 3, 2), device


def test_who_learns_stays_when_a_run_goes_on(busy):
    run, _ = busy
    for changes in ({"engine__learners": LEARNERS + 1}, {}):
        with pytest.raises(UserError, match="engine.learners: 4 there"):
            run.check_resumable(tiny(**BUSY, **changes))
    run.check_resumable(tiny(**BUSY, engine__learners=LEARNERS, engine__workers=1))


@pytest.mark.parametrize("other, why", [
    ({"strategy": {"name": "fedit"}, "arms": ["federated", "local"]}, "nothing to share"),
    ({"drift": {"policy": "on_drift"}}, "no answer that could be watched"),
    ({"hardware": {"clock": "wall"}, "arms": ["local"]}, "virtual time alone"),
])  # fmt: skip
def test_what_the_others_cannot_do_is_refused(other, why):
    with pytest.raises(ValidationError, match=why):
        Experiment.model_validate({"engine": {"learners": 3}, **other})


def test_no_fewer_than_all_is_all():
    experiment = Experiment.model_validate({"engine": {"learners": 12}})
    learners = Learners(experiment, 1, 12)
    assert learners.everybody and list(learners.devices) == list(range(12)) and 11 in learners
    assert learners.sizes(0, [], frozenset(), {}) == {}
