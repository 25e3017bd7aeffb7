"""Devices that train together, through the run's own loop: splits, stops, links that break, and what is made of it."""

import numpy as np
import pandas as pd
import pytest
from fleet import NOWHERE, answers, make_worker, run_in_process, tiny
from pandas.testing import assert_frame_equal
from safetensors.numpy import load_file

from untether.clients.hosting.executors import InProcess
from untether.clients.hosting.in_process import InProcessBackend
from untether.clients.stores.adapter_store import AdapterStore
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.population.source import open_population
from untether.sim.rounds.loop import run_rounds
from untether.sim.rounds.messages import Reply, Update, outcomes
from untether.sim.run.directory import RunDirectory
from untether.sim.studies import Study, run_study
from untether.strategies import open_strategy
from untether.strategies.factors import factors_in, factors_of, products

CHANGES = {"arms": "frozen,federated", "rounds": 2, "cloud__samples": 0, "training__learning_rate": 0.03,
           "training__steps": 2, "population__queries": 1}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharing")
    warm = make_worker(RunDirectory.create(folder / "warm", tiny()), NOWHERE)

    def run(name, hosts=1, **changes):
        return run_in_process(folder / name, tiny(**{**CHANGES, **changes}), NOWHERE, hosts, warm)

    run.worker, run.folder = warm, folder
    return run


def shared_part(run, round=1):
    return load_file(run.path / "adapters" / "seed-1" / "federated" / f"round-{round}.safetensors")


@pytest.mark.parametrize(
    ("name", "more"),
    [("fedsa", {}), ("flexlora", {"strategy__ranks": "2,4"}), ("fedit", {"strategy__aggregate": "FedAdam"})],
)  # fmt: skip
def test_hosts_and_shards_change_nothing(run, name, more):
    one = run(f"{name}-one", strategy__name=name, **more)
    many = run(f"{name}-many", hosts=3, strategy__name=name, engine__shard=1, **more)
    ours, theirs = shared_part(many), shared_part(one)
    assert ours.keys() == theirs.keys() and len(theirs)
    for key, array in theirs.items():
        # Not entry by entry: where a gradient is about 0, Adam's step follows the sign of a rounding error.
        assert np.linalg.norm(ours[key] - array) < 0.03 * np.linalg.norm(array)
        assert array.dtype == np.float64
    columns = [column for column in answers(one).columns if column != "prediction"]
    assert_frame_equal(answers(many)[columns], answers(one)[columns])
    federated = answers(one).query("arm == 'federated'")
    assert set(federated["answered_by"]) == {"federated"} and not federated.empty


def test_only_the_last_round_is_kept_and_it_is_the_mean_of_the_devices(run):
    """Against the arm `local`'s own recipe: one device alone is FedAvg of itself."""
    done = run("one-device", strategy__name="fedit", population__users=1)
    folder = done.path / "adapters" / "seed-1" / "federated"
    assert [path.name for path in folder.iterdir()] == ["round-1.safetensors"]
    assert not list((done.path / "adapters" / "seed-1").glob("round-*")), "nothing stays on the device"
    assert done.committed(1, 1)["facts"]["shared_part"] == "adapters/seed-1/federated/round-1.safetensors"


def test_a_stopped_run_goes_on_from_the_committed_part(run):
    """Stopped in the middle of training together, after one round of three; Flower's FedAdam remembers its moments."""
    changes = {"strategy__name": "dual", "rounds": 3, "strategy__aggregate": "FedAdam"}
    whole = run("undisturbed", **changes)
    experiment = tiny(**{**CHANGES, **changes})
    stopped = RunDirectory.create(run.folder / "stopped", experiment)
    worker = make_worker(stopped, NOWHERE, run.worker)

    class Breaks(InProcessBackend):
        orders = 0

        def send(self, order, progress):
            found = super().send(order, progress)
            Breaks.orders += isinstance(order, Update)
            if Breaks.orders == 2:
                raise ResumableStop("interrupted")
            return found

    with pytest.raises(ResumableStop):
        run_rounds(stopped, Breaks(stopped, InProcess(lambda: worker)), open_strategy(experiment), Silent())
    assert stopped.committed(1, 0) and not stopped.committed(1, 1)
    again = run_in_process_again(stopped, worker)
    for key, array in shared_part(whole, 2).items():
        np.testing.assert_allclose(shared_part(again, 2)[key], array, atol=1e-6)
    assert_frame_equal(answers(again), answers(whole))


def run_in_process_again(run, worker):
    run_rounds(run, InProcessBackend(run, InProcess(lambda: worker)), open_strategy(run.experiment), Silent())
    run.merge(run.experiment)
    return run


class Silent:
    def __getattr__(self, name):
        return lambda *_: None


def test_a_shared_part_that_is_gone_is_named(run):
    experiment = tiny(**{**CHANGES, "strategy__name": "fedit"})
    stopped = RunDirectory.create(run.folder / "gone", experiment)
    worker = make_worker(stopped, NOWHERE, run.worker)

    class AfterOne(Silent):
        def begin(self, seed, round):
            if round == 1:
                raise ResumableStop("interrupted")

    backend = InProcessBackend(stopped, InProcess(lambda: worker))
    with pytest.raises(ResumableStop, match="interrupted"):
        run_rounds(stopped, backend, open_strategy(experiment), AfterOne())
    path = stopped.path / "adapters" / "seed-1" / "federated" / "round-0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ResumableStop, match="round-0.safetensors.*Put the file back"):
        run_rounds(stopped, backend, open_strategy(experiment), Silent())


def test_who_cannot_upload_is_a_straggler(run):
    """Devices 0 and 1 have no link in the first round: their part is not in the mean, and the tables say so."""
    broken = run("broken", strategy__name="fedit", network__outages="0h+24h:0-1")
    events = broken.read("events").query("round == 0")
    late = set(events[events["kind"] == "straggler"]["device_id"])
    sent = set(events[(events["kind"] == "upload") & (events["outcome"] == "ok")]["device_id"])
    assert late == {"d00000", "d00001"} and sent == {f"d0000{device}" for device in (2, 3)}
    assert set(broken.read("training").query("round == 0")["device_id"]) == sent, "and nothing is trained in vain"
    ledger = broken.read("ledger")
    assert set(ledger[ledger["round"] == 0]["device_id"]) == sent and set(ledger["kind"]) == {"adapter"}
    uploads = broken.read("events").query("kind == 'upload'")
    assert (uploads["bytes_up"] > 0).all() and (uploads["energy_j"] > 0).all() and (uploads["duration_s"] > 0).all()
    second = set(uploads[uploads["round"] == 1]["device_id"])
    assert second == {f"d0000{device}" for device in range(4)}


def test_a_round_without_candidates_is_a_normal_round(run):
    nobody = run("nobody", strategy__name="fedit", network__outages="0h+24h")
    answered = answers(nobody)
    first = answered[answered["round"] == 0]
    frozen, federated = (first[first["arm"] == arm]["prediction"].tolist() for arm in ("frozen", "federated"))
    assert federated == frozen, "a fresh adapter is the base"
    second = answered[answered["round"] == 1]
    frozen, federated = (second[second["arm"] == arm]["prediction"].tolist() for arm in ("frozen", "federated"))
    assert federated != frozen


@pytest.mark.parametrize(
    ("select", "more", "count"),
    [
        ("all", {}, 4), ("random", {"strategy__fraction": 0.5}, 2), ("stalest_first", {"strategy__fraction": 0.5}, 2),
        ("least_data_first", {"strategy__fraction": 0.5}, 2), ("available", {"network__outages": "0h+48h:0-1"}, 2),
        ("within_budget", {"strategy__budget_tokens": 1}, 0),
    ],
)  # fmt: skip
def test_selection(run, select, more, count):
    done = run(f"select-{select}", strategy__name="ffa", strategy__select=select, training__steps=1, **more)
    trained = done.read("events").query("kind == 'train'").groupby("round")["device_id"].agg(set).to_dict()
    assert [len(trained.get(round, ())) for round in (0, 1)] == [count, count]
    if select == "stalest_first":
        assert trained[0].isdisjoint(trained[1])
    if select == "least_data_first":
        users = open_population(done.experiment, 1)
        items = {f"d0000{device}": len(users.user(device).history) for device in range(4)}
        for chosen in trained.values():
            assert max(items[d] for d in chosen) <= min(items[d] for d in set(items) - chosen)


def test_a_private_adapter_begins_as_what_is_shared_or_sits_on_top_of_it(run):
    changes = {"arms": "frozen,federated,local", "rounds": 1, "strategy__name": "fedit"}
    alone = run("starts-alone", **changes)
    part = factors_in({name.removeprefix("all/"): array for name, array in shared_part(alone, 0).items()}, "lora")
    store = {}
    for start in ("shared", "on_shared"):
        done = run(f"starts-{start}", **changes, training__start=start)
        store[start] = AdapterStore(done.path, 1).load(0, "d00002", "local")
        assert products(part).keys() == products(factors_of(store[start])).keys()
    on_top = factors_of(store["on_shared"])
    below = {target: (A[:8], B[:, :8]) for target, (A, B) in on_top.items()}
    for target, product in products(below).items():
        np.testing.assert_allclose(product, products(part)[target], atol=1e-6)
    own = {target: (A[8:], B[:, 8:]) for target, (A, B) in on_top.items()}
    assert max(np.abs(product).max() for product in products(own).values()) > 0
    away = max(np.abs(p - products(part)[t]).max() for t, p in products(factors_of(store["shared"])).items())
    assert 0 < away


def test_what_anybody_is_scored_on_is_trained_on_by_nobody(run, monkeypatch):
    """Device 1's history gets the very pair that device 0 is scored on: it is left out, and counted."""
    from dataclasses import replace

    population = open_population(run.worker.experiment, 1)
    query = next(query for query in population.user(0).queries if query.task == "LaMP_7")
    plain = type(population).user

    def leaky(self, index):
        user = plain(self, index)
        if index != 1:
            return user
        first = user.of_task("LaMP_7")[0]
        leak = replace(first, item_id="leak", input=query.input, output=query.gold)
        return replace(user, history=tuple(leak if item is first else item for item in user.history))

    monkeypatch.setattr(type(population), "user", leaky)
    run.worker._population = None
    seen = []
    trained = __import__("untether.clients.device.sharing.federated", fromlist=["x"])
    plain_pairs = trained.training_pairs
    monkeypatch.setattr(trained, "training_pairs", lambda *a: seen.append(a[1].real) or plain_pairs(*a))
    done = run("leaky", strategy__name="fedit", rounds=1, training__steps=1)
    assert seen and not [item for items in seen for item in items if item.item_id == "leak"]
    assert sum(done.committed(1, 0)["facts"]["federated_left_out"].values()) >= 1


def test_a_rank_that_does_not_fit_is_refused(run):
    with pytest.raises(UserError, match="rank 8 and lora.rank is 4.*on_shared"):
        run("odd-rank", arms="frozen,federated,local", strategy__name="fedit", rounds=1, training__start="shared",
            by_arm='{"local": {"lora": {"rank": 4}}}')  # fmt: skip


def test_a_device_that_was_lost_leaves_the_cohort(run):
    """Its worker died: the strategy is told, and the others' mean goes on."""
    experiment = tiny(**{**CHANGES, "strategy__name": "fedit", "rounds": 1})
    directory = RunDirectory.create(run.folder / "lost", experiment)
    worker = make_worker(directory, NOWHERE, run.worker)
    told = []

    class Loses(InProcessBackend):
        def send(self, order, progress):
            if isinstance(order, Update):
                failed = Reply(lost={0: "host_failed"})
                return [*super().send(order.cut(order.devices[1:]), progress), failed]
            return super().send(order, progress)

    strategy = open_strategy(experiment)
    plain = strategy.aggregate
    strategy.aggregate = lambda *a: told.extend(outcomes(a[3][0]).values()) or plain(*a)
    run_rounds(directory, Loses(directory, InProcess(lambda: worker)), strategy, Silent())
    directory.merge(experiment)
    assert told == ["ok"] * 3 + ["host_failed"]
    events = directory.read("events")
    assert events[events["kind"] == "straggler"]["device_id"].tolist() == ["d00000"]


def test_the_study_tells_what_the_tables_say(run, tmp_path):
    """Two real cells: its sums are those of the events, its gain that of the answers."""
    changes = {"population.users": "3", "rounds": "2", "population.queries": "4", "engine.threads": "1",
               "generation.max_new_tokens": "6", "training.learning_rate": "0.03"}  # fmt: skip
    grid = {"strategy.name": "fedit", "population.history": "[8, 8]", "network.availability": "1,0.3"}
    study = Study.read("sharing", changes, grid)
    cells = {}

    def carry_out(directories):
        for directory in directories:
            worker = make_worker(directory, NOWHERE, run.worker)
            cells[directory.path.name] = run_in_process_again(directory, worker)
            directory.write_json("summary.json", {"rows": [], "facts": {}})

    run_study(study, tmp_path / "out", carry_out)
    table = pd.read_csv(tmp_path / "out" / "table.csv").set_index("cell")
    assert len(table) == 2 and (tmp_path / "out" / "figures" / "1-course.svg").exists()
    for cell in study.cells:
        done, row = cells[cell.name], table.loc[cell.name]
        events = done.read("events").query("arm == 'federated'")
        moved = events["bytes_up"].fillna(0).sum() + events["bytes_down"].fillna(0).sum()
        assert row["bytes"] == pytest.approx(moved / 3, rel=1e-6)
        assert row["energy_j"] == pytest.approx(events["energy_j"].fillna(0).sum() / 3, rel=1e-3)
        last = done.read("predictions").query("round == 1")
        means = last.groupby(["arm", "user_id"])["score"].mean().groupby("arm").mean()
        assert row["gain"] == pytest.approx(means["federated"] - means["local"], abs=1e-4)
    assert "robustness" in (tmp_path / "out" / "findings.md").read_text()
