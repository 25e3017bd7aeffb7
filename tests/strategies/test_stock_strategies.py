"""Flower's own strategies in the place of the mean: each device is a node's reply to them, and the oracle is Flower."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

from tests.strategies.test_lora_strategies import Fleet, strategy_of
from untether.sim.core.errors import UserError
from untether.strategies.factors import factors_in
from untether.strategies.stock import AGGREGATES


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch):
    """For the oracle's own messages: Flower lets nobody make one outside of a run."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def replies(fleet, devices):
    """What the devices uploaded, as any Flower client would reply."""
    made = []
    for device in devices:
        begin = f"all/device/{device}/"
        arrays = {k.removeprefix(begin): v for k, v in fleet.reply(device, 0).arrays.items() if k.startswith(begin)}
        weight = float(arrays.pop("weight"))
        asked = Message(RecordDict(), dst_node_id=device + 1, message_type=MessageType.TRAIN)
        content = RecordDict({
            "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            "metrics": MetricRecord({"num-examples": weight}),
        })  # fmt: skip
        made.append(Message(content, reply_to=asked))
    return made


class Nodes:
    def __init__(self, count):
        self.count = count

    def get_node_ids(self):
        return list(range(1, self.count + 1))


def theirs(made, fleet, devices):
    """Flower's result on the same replies."""
    current = ArrayRecord({name: Array(array) for name, array in fleet.own().items() if not name.startswith("server/")})
    list(made.configure_train(1, current, ConfigRecord(), Nodes(len(devices))))
    return {name: array.numpy() for name, array in made.aggregate_train(1, replies(fleet, devices))[0].items()}


OPTIONS = {"FedTrimmedAvg": {"beta": 0.25}, "Krum": {"num_malicious_nodes": 1}, "MultiKrum": {"num_malicious_nodes": 1}}


@pytest.mark.parametrize("name", sorted(set(AGGREGATES) - {"Bulyan"}))
def test_every_one_gives_what_flower_gives(name):
    options = OPTIONS.get(name, {})
    given = str(options).replace("'", '"')
    fleet = Fleet(strategy_of("fedit", strategy__aggregate=name, strategy__options=given), [5, 1, 2, 8])
    made = getattr(flower, name)(min_train_nodes=1, min_available_nodes=1, **options)
    expected = theirs(made, fleet, range(4))
    fleet.round(0, range(4), hosts=2)
    ours = {name: array for name, array in fleet.own().items() if not name.startswith("server/")}
    assert ours.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(ours[key], array)


def test_our_mean_is_fedavg_but_for_the_last_digit():
    """Flower multiplies each array by n_k / n before it adds; we add n_k times the array and divide once."""
    plain = Fleet(strategy_of("fedit"), [5, 1, 2, 8])
    stock = Fleet(strategy_of("fedit", strategy__aggregate="FedAvg"), [5, 1, 2, 8])
    for fleet in (plain, stock):
        fleet.round(0, range(4))
    for name, array in plain.own().items():
        np.testing.assert_allclose(array, stock.own()[name], rtol=0, atol=1e-14)


def test_fedadam_does_not_correct_for_bias():
    """m = (1 - b1) d, v = b2 tau^2 + (1 - b2) d^2 in Flower's first round: the textbook divides by 1 - b1, 1 - b2."""
    fleet = Fleet(strategy_of("fedit", strategy__aggregate="FedAdam"), [1, 1])
    before = fleet.own()
    fleet.round(0, [0, 1])
    made = flower.FedAdam()
    for name, array in before.items():
        target, side = name.split("/")[2], "AB".index(name.split("/")[1])
        mean = sum(fleet.trained[d]["lora"][target][side] for d in (0, 1)) / 2
        delta = mean - array
        m = (1 - made.beta_1) * delta
        textbook = array + made.eta * (m / (1 - made.beta_1)) / (np.abs(delta) + made.tau)
        assert np.abs(fleet.own()[name] - textbook).max() > 0.01


@pytest.mark.parametrize("name", ["FedAdam", "FedYogi", "FedAdagrad", "FedAvgM"])
def test_what_it_remembers_outlives_it(name):
    """Each round makes it anew of what is kept, as a resumed run does; one that lives on agrees."""
    options = {"server_momentum": 0.9} if name == "FedAvgM" else {}
    given = str(options).replace("'", '"')
    fleet = Fleet(strategy_of("fedit", strategy__aggregate=name, strategy__options=given), [3, 1])
    made = getattr(flower, name)(min_train_nodes=1, min_available_nodes=1, **options)
    for round in range(3):
        current = ArrayRecord({k: Array(v) for k, v in fleet.own().items() if not k.startswith("server/")})
        list(made.configure_train(round + 1, current, ConfigRecord(), Nodes(2)))
        expected = made.aggregate_train(round + 1, replies(fleet, range(2)))[0]
        for device in range(2):
            fleet.private.pop(device, None)
        arrays = [fleet.reply(device, 0) for device in range(2)]
        fleet.shared = fleet.strategy.aggregate(1, round, fleet.shared, arrays)
        for key, array in expected.items():
            np.testing.assert_allclose(fleet.own()[key], array.numpy(), rtol=1e-12, atol=1e-14)
    assert any(key.startswith("all/server/") for key in fleet.shared)


def test_central_privacy_clips_and_adds_the_noise_that_it_says():
    fields = {
        "strategy__aggregate": "FedAvg", "strategy__privacy": "DifferentialPrivacyServerSideFixedClipping",
        "strategy__privacy_options": '{"noise_multiplier": 2.0, "clipping_norm": 0.5}',
    }  # fmt: skip
    rounds = []
    for _ in range(2):
        fleet = Fleet(strategy_of("fedit", **fields), [1] * 4)
        before = fleet.own()
        fleet.round(0, range(4))
        rounds.append(np.concatenate([(fleet.own()[name] - before[name]).ravel() for name in sorted(before)]))
    np.testing.assert_array_equal(*rounds)  # drawn from (seed, round)
    noise = np.std(rounds[0])  # the mean of four moves of norm 0.5 over 70 weights is small beside it
    assert noise == pytest.approx(2.0 * 0.5 / 4, rel=0.25)
    other = Fleet(strategy_of("fedit", **fields), [1] * 4)
    other.shared = other.strategy.aggregate(2, 0, other.shared, [other.reply(d, 0) for d in range(4)])
    assert not np.array_equal(other.own()["lora/B/tall"], fleet.own()["lora/B/tall"])


def test_it_needs_no_run_of_flower(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    fleet = Fleet(strategy_of("fedit", strategy__aggregate="FedMedian"), [1, 2, 3])
    fleet.round(0, range(3))
    for target, (A, _) in factors_in(fleet.own(), "lora").items():
        np.testing.assert_allclose(A, np.median([fleet.trained[d]["lora"][target][0] for d in range(3)], axis=0))


def test_random_numbers_of_others_are_left_alone():
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    fleet = Fleet(strategy_of("fedit", strategy__aggregate="FedAvg"), [1, 2])
    fleet.round(0, [0, 1])
    assert np.random.random() == expected


def test_fedprox_of_flower_brings_its_term():
    strategy = strategy_of("fedit", strategy__aggregate="FedProx", strategy__options='{"proximal_mu": 0.3}')
    assert strategy.mu == 0.3
    assert strategy_of("fedprox", strategy__mu="0.2").mu == 0.2
    assert strategy_of("fedit").mu == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strategy__aggregate": "FedAdamm"}, "strategy.aggregate.*FedAdamm.*FedAdam"),
        ({"strategy__aggregate": "FedAvg", "strategy__privacy": "Noise"}, "strategy.privacy.*Noise"),
        ({"strategy__aggregate": "FedAdam", "strategy__options": '{"etta": 1}'}, "FedAdam says.*etta"),
        ({"strategy__aggregate": "FedAvg", "strategy__options": '{"fraction_train": 0.5}'}, "strategy.select"),
    ],
)
def test_mistakes_are_named(fields, words):
    with pytest.raises(UserError, match=words):
        strategy_of("fedit", **fields)
