"""Killed for real, at random moments: the resumed run ends with the results of one that nobody disturbed.

The disturbed run has three hosts on two workers and goes through Flower and Ray; the undisturbed one is a single worker
in this process, so that this is also the test that hosts and workers change no number, though answers are lost.
"""

import random
import time

import pytest
from fleet import answers, metrics, run_in_process, tiny
from pandas.testing import assert_frame_equal
from survival import Untether, commits, wait_for
from test_determinism import FINITE, assert_same_results

from tests.conftest import untether_here
from untether.clients.device.worker import Endpoint
from untether.server.background import start_background
from untether.sim.run.directory import RunDirectory

#: Rounds that leave something to the next: gaps, batteries, work in flight, samples of earlier days.
VIRTUAL = {
    **FINITE, "rounds": 3, "arms": "local,collaborative,cloud", "network__availability": 0.6,
    "network__mean_down_s": 20_000, "hardware__queries": "day", "hardware__train_when": "charging",
    "drift__samples": "keep",
}  # fmt: skip
PLAIN = tiny(**VIRTUAL)
EXPERIMENT = tiny(**VIRTUAL, engine__hosts=3, engine__shard=2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        return run_in_process(tmp_path_factory.mktemp("undisturbed") / "run", PLAIN, endpoint)


@pytest.fixture
def moment(request):
    """Waits for a random moment; the draws are printed where the test fails."""
    draw = random.Random()

    def wait(most_s):
        duration_s = draw.uniform(0, most_s)
        print(f"waits {duration_s:.2f} s")
        time.sleep(duration_s)

    return wait


def assert_whole(run, undisturbed, rounds=3):
    """Every round is there once, and its results are those of the undisturbed run."""
    assert_same_results(run, undisturbed)
    assert not answers(run).duplicated(["seed", "round", "device_id", "arm", "query_id"]).any()
    assert sorted(metrics(run)["round"].unique()) == list(range(rounds))
    assert not run.read("events")["event_id"].duplicated().any()
    assert_frame_equal(_happened(run), _happened(undisturbed))


def _happened(run):
    """What happened in virtual time, whatever happened to the workers."""
    events = run.read("events")
    columns = ["seed", "round", "time_s", "event_id", "device_id", "arm", "kind", "outcome", "duration_s", "energy_j"]
    return events.loc[events["kind"] != "worker_died", columns].sort_values(columns[:4]).reset_index(drop=True)


@pytest.mark.timeout(1200)
def test_a_run_killed_three_times_ends_like_an_undisturbed_one(tmp_path, undisturbed, moment):
    path, file = tmp_path / "run", tmp_path / "experiment.toml"
    file.write_text(EXPERIMENT.to_toml())

    with Untether(str(file), "--out", str(path)) as first:  # a worker is killed, then the coordinator
        wait_for(lambda: first.workers(), first)
        moment(2)
        first.workers()[0].kill()
        wait_for(lambda: commits(path) >= 1, first)
        moment(2)
        first.kill()
        assert first.orphans() == []

    with Untether("--resume", str(path)) as second:  # a worker is killed once more
        wait_for(lambda: second.workers(), second)
        intruder = untether_here("run", "--resume", str(path))
        assert intruder.returncode == 2
        assert f"in use by another run (process {second.process.pid} on" in intruder.stderr
        moment(1)
        second.workers()[-1].kill()
        code, said = second.end()
        assert code == 0, said

    run = RunDirectory.open(path)
    assert_whole(run, undisturbed)
    events = run.read("events")
    assert (run.read("samples")["verdict"] == "not_received").any(), "a finite cloud"
    died = events[events["kind"] == "worker_died"]
    assert len(died) >= 1 and set(died["outcome"]) == {"crashed"} and died["detail"].str.len().min() > 40

    other = untether_here("run", "--resume", str(path), "--set", "rounds=4")
    assert other.returncode == 2 and "rounds: 3 there, 4 here" in other.stderr
    again = untether_here("run", "--resume", str(path))  # nothing is left to do
    assert again.returncode == 0 and "run directory:" in again.stdout


def test_ctrl_c_while_ray_starts_ends_at_once(tmp_path):
    file = tmp_path / "experiment.toml"
    file.write_text(EXPERIMENT.to_toml())
    with Untether(str(file), "--out", str(tmp_path / "run")) as run:
        wait_for(lambda: (tmp_path / "run" / "log.txt").exists(), run)
        time.sleep(0.5)
        run.interrupt()
        code, said = run.end(timeout_s=120)
        assert code == 1 and "Resume with: untether run --resume" in said
        assert run.orphans() == []
