"""What must hold of whole rounds, whatever the links do: asked, learned and answered for real, in process."""

import pandas as pd
import pytest
from fleet import KEYS, answers, losses, make_worker, run_in_process, tiny, verdicts
from pandas.testing import assert_frame_equal

from untether.clients.device.worker import Endpoint
from untether.server.background import start_background
from untether.sim.core.clock import DAY_S
from untether.sim.population.source import open_population
from untether.sim.rounds.planner import question_names, request_names
from untether.sim.run.directory import RunDirectory

USERS, ROUNDS = 4, 2

UNLIMITED = {
    "network__kind": "onoff", "network__mean_up_s": 1e12, "network__mean_down_s": 1e-6, "network__scale": 1e3,
    "cloud__capacity__concurrency": 1000, "cloud__capacity__queue": 1000, "cloud__capacity__output_tokens_per_s": 1e6,
    "cloud__capacity__requests_per_minute": 1e6, "cloud__capacity__tokens_per_minute": 1e9,
    "hardware__queries": "day", "hardware__train_when": "schedule", "hardware__train_hours": "0,23",
}  # fmt: skip
"""Every limit is named and none binds: who asks in the first hour is trained before the first question, at seven."""

HARD = {
    "network__availability": 0.4, "network__mean_down_s": 120, "network__uplink_mbps": 0.0008,
    "network__downlink_mbps": 0.002, "network__fallback": "stale_samples", "cloud__timeout_s": 300,
    "cloud__capacity__concurrency": 1, "cloud__capacity__output_tokens_per_s": 20, "cloud__capacity__retries": 1,
    "hardware__queries": "day", "hardware__train_when": "charging",
    "hardware__profiles": "pixel-8,galaxy-a14,raspberry-pi-5",
}  # fmt: skip
"""Spells of a minute, uploads of half a minute, one place in the cloud: much goes wrong, at all places."""

SETTINGS = {
    "free": {}, "unlimited": UNLIMITED, "never": {"network__availability": 0}, "late": {"network__outages": "0h+24h"},
    "hard": HARD, "shuffled": HARD | {"engine__shard": 1, "hosts": 3, "backwards": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run by name, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("invariants")
    made: dict[str, RunDirectory] = {}
    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        warm = make_worker(RunDirectory.create(folder / "warm", tiny()), endpoint)

        def run(name):
            if name not in made:
                changes = dict(SETTINGS[name])
                how = {word: changes.pop(word) for word in ("hosts", "backwards") if word in changes}
                experiment = tiny(population__users=USERS, rounds=ROUNDS, **changes)
                made[name] = run_in_process(folder / name, experiment, endpoint, worker=warm, **how)
            return made[name]

        yield run


def of_arm(run, arm):
    """Predictions of one arm, in one order, without its name."""
    frame = run.read("predictions").sort_values(KEYS)
    return frame[frame["arm"] == arm].drop(columns="arm").reset_index(drop=True)


def requests(run):
    """The rows of `events` that are attempts, by request and attempt."""
    events = run.read("events")
    return events[events["request_id"].notna()].sort_values(["request_id", "attempt"], ignore_index=True)


def test_without_a_cloud_collaborative_is_local(runs):
    """Adapter for adapter and answer for answer; of the cloud nothing is asked, sent or learned."""
    run = runs("never")
    local = of_arm(run, "local")
    assert (local["answered_by"] == "adapter").all() and local["adapter_version"].nunique() == USERS * ROUNDS
    for arm in ("collaborative", "placebo"):
        own = of_arm(run, arm).drop(columns="adapter_time_s")  # it was asked for in vain first
        assert_frame_equal(own, local.drop(columns="adapter_time_s"))
    assert len(run.read("samples")) == len(run.read("ledger")) == 0
    asked = requests(run)
    assert set(asked["outcome"]) == {"offline"} and asked["request_id"].is_unique
    assert asked[["bytes_up", "bytes_down", "tokens_in", "tokens_out", "energy_j"]].sum().sum() == 0
    cloud = of_arm(run, "cloud")
    assert set(cloud["outcome"]) == {"no_answer"} and set(cloud["prediction"]) == {""} and len(cloud) == len(local)


def test_local_needs_no_cloud(runs):
    """It learns the same whether there is one or not (but for rounding: others trained beside it)."""
    never, free = (of_arm(runs(name), "local").drop(columns="adapter_version") for name in ("never", "free"))
    assert_frame_equal(never, free)
    local, own = (of_arm(runs("free"), arm)["adapter_version"] for arm in ("local", "collaborative"))
    assert (local != own).all()


def test_limits_that_do_not_bind_change_nothing(runs):
    free, unlimited = runs("free"), runs("unlimited")
    assert_frame_equal(answers(unlimited), answers(free))
    assert_frame_equal(losses(unlimited), losses(free))
    assert_frame_equal(verdicts(unlimited), verdicts(free))
    for arm in ("local", "placebo", "collaborative"):
        made, same = of_arm(free, arm), of_arm(unlimited, arm)
        assert_frame_equal(made[["adapter_version", "data_until_s"]], same[["adapter_version", "data_until_s"]])
        assert (same["answered_time_s"] < (same["round"] + 1) * DAY_S).all()
    assert set(requests(unlimited)["outcome"]) == set(requests(free)["outcome"])


def test_a_round_with_nobody_online_is_a_round(runs):
    """That day local trains, collaborative is local, the cloud arm has no answer. The next day is as any other."""
    run = runs("late")
    for day, online in enumerate((False, True)):
        local, own, cloud = (of_arm(run, arm).query(f"round == {day}") for arm in ("local", "collaborative", "cloud"))
        assert (local["answered_by"] == "adapter").all()
        assert (own["adapter_version"] == local["adapter_version"]).all() != online
        assert set(cloud["outcome"]) == ({"ok"} if online else {"no_answer"})
        assert set(requests(run).query(f"round == {day}")["outcome"]) == ({"ok"} if online else {"offline"})
    assert set(run.read("samples")["round"]) == {1}
    assert set(run.read("ledger")["round"]) == {1}


def test_the_order_of_devices_and_their_hosts_change_nothing(runs):
    run, other = runs("hard"), runs("shuffled")
    finals = requests(run).groupby("request_id")["outcome"].last()
    assert {"ok", "dropped"} <= set(finals) and (requests(run)["attempt"] > 0).any(), "otherwise nothing was hard"
    events = run.read("events")
    on = events[(events["arm"] == "collaborative") & (events["kind"] == "train")]["detail"].str.extract(r"on (\w+)")[0]
    assert set(on) == {"real", "samples", "stale_samples"}
    assert_frame_equal(answers(other), answers(run))
    assert_frame_equal(verdicts(other), verdicts(run), check_exact=False, atol=5e-3, rtol=0)
    assert_frame_equal(losses(other), losses(run), check_exact=False, atol=1e-4, rtol=0)
    events, others = (
        each.read("events").drop(columns="detail").sort_values("event_id", ignore_index=True) for each in (run, other)
    )
    assert_frame_equal(others, events)
    when, same = (each.read("predictions").sort_values(KEYS, ignore_index=True) for each in (run, other))
    assert_frame_equal(same[["answered_time_s", "adapter_time_s"]], when[["answered_time_s", "adapter_time_s"]])


@pytest.mark.parametrize("name", ["free", "hard", "late", "never"])
def test_every_request_ends_once(runs, name):
    """Each that a device wanted, whether it could be made or not: in attempts one after another, only the last of which
    may be ok.
    """
    run = runs(name)
    population = open_population(run.experiment, 1)
    wanted = set()
    for device in range(USERS):
        user = population.user(device)
        for round in range(ROUNDS):
            wanted |= {*request_names(run.experiment, 1, round, device, user.tasks)}
            wanted |= {*question_names(1, round, device, [query.task for query in user.queries])}
    found = requests(run)
    assert set(found["request_id"]) == wanted
    for _, tries in found.groupby("request_id"):
        assert tries["attempt"].tolist() == list(range(len(tries)))
        assert not (tries["outcome"].iloc[:-1] == "ok").any()
        starts, ends = tries["time_s"], tries["time_s"] + tries["duration_s"]
        assert (starts.iloc[1:].to_numpy() >= ends.iloc[:-1].to_numpy()).all()


def test_every_byte_is_received_or_wasted(runs):
    """What came is what a link that never fails moves for it; an attempt before that failed over a part of it. Nothing
    is answered before it is asked.
    """
    free, hard = requests(runs("free")), requests(runs("hard"))
    assert set(free["outcome"]) == {"ok"} and free["request_id"].is_unique
    tries = hard.join(free.set_index("request_id")[["bytes_up", "bytes_down"]], on="request_id", rsuffix="_whole")
    ok = tries["outcome"] == "ok"
    made = tries["request_id"].isin(tries.loc[ok, "request_id"])  # the others failed with the size expected of them
    short = pd.Series(False, index=tries.index)
    for way in ("bytes_up", "bytes_down"):
        assert (tries.loc[ok, way] == tries.loc[ok, f"{way}_whole"]).all()
        assert (tries.loc[made, way] <= tries.loc[made, f"{way}_whole"]).all()
        short |= tries[way] < tries[f"{way}_whole"]
    assert (made & ~ok).sum() > 3 and short[made & ~ok].all()
    answering = made & (tries["bytes_down"] > 0)
    assert (tries.loc[answering, "bytes_up"] == tries.loc[answering, "bytes_up_whole"]).all()
    cloud = of_arm(runs("hard"), "cloud")
    assert 0 < (cloud["outcome"] == "ok").sum() == (ok & (tries["kind"] == "answer")).sum() < len(cloud)


def test_nothing_is_known_before_it_could_be(runs):
    """No adapter answers before it is live, none is live before its samples have come."""
    run = runs("hard")
    own = run.read("predictions").query("arm == 'collaborative' and answered_by == 'adapter'")
    assert (own["adapter_time_s"] <= own["answered_time_s"]).all()
    events = run.read("events")
    made = events[(events["kind"] == "train") & events["detail"].str.startswith("on samples")]
    came = events[(events["kind"] == "augment") & (events["outcome"] == "ok")]
    came = came.assign(came_s=came["time_s"] + came["duration_s"]).groupby(["round", "device_id"])["came_s"].min()
    began = made.set_index(["round", "device_id"])["time_s"]
    assert len(began) and (began >= came.reindex(began.index) - 1e-6).all()
