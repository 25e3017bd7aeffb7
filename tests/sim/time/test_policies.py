"""The policies of asking again, each by hand; what a fleet remembers; and how often a detector cries wolf."""

from __future__ import annotations

import json

import numpy as np
import pytest

from untether.sim.core.errors import UserError
from untether.sim.core.kinds import POLICIES
from untether.sim.experiment.virtual_sections import Drift
from untether.sim.time.policies import Memory, Policies, PolicyCase, alarm

CALM, BAD = [0.0] * 40, [1.0] * 20


def decide(policy, round, *, since=None, tokens=0, errors=(), expected=100, online=True, **drift):
    memory = Memory(since, tokens, list(errors))
    return POLICIES.get(policy)(PolicyCase(Drift(policy=policy, **drift), round, memory, expected, lambda: online))


@pytest.mark.parametrize(
    ("policy", "round", "situation", "due"),
    [
        ("every", 0, {}, True),  # the first time is every policy's
        ("every", 1, {"since": 0}, True),
        ("every", 6, {"since": 0, "every": 7}, False),
        ("every", 7, {"since": 0, "every": 7}, True),
        ("every", 7, {"since": 0, "every": 7, "online": False}, True),
        ("never", 5, {}, True),
        ("never", 29, {"since": 0}, False),
        ("when_online", 0, {"online": False}, False),
        ("when_online", 3, {"since": 0, "every": 3}, True),
        ("when_online", 3, {"since": 0, "every": 3, "online": False}, False),
        ("when_online", 2, {"since": 0, "every": 3}, False),
        ("budget", 0, {"tokens": 300}, False),  # `tokens` is what was spent; see below for what may be
        ("on_drift", 0, {}, True),
        ("on_drift", 60, {"since": 0, "errors": CALM}, False),
        ("on_drift", 60, {"since": 0, "errors": CALM + BAD}, True),
        ("on_drift", 60, {"since": 0, "errors": BAD + CALM}, False),  # better is no reason
        ("on_drift", 60, {"since": 0, "errors": CALM + BAD, "detector": "page_hinkley"}, True),
        ("on_drift", 1, {"since": 0}, False),
    ],
)
def test_a_policy_by_hand(policy, round, situation, due):
    assert decide(policy, round, **situation) is due


def test_a_budget_is_never_overspent():
    drift = Drift(policy="budget", tokens=250)
    policy = POLICIES.get("budget")
    assert policy(PolicyCase(drift, 3, Memory(2, 150), 100, lambda: True))  # 150 + 100 is what there is
    assert not policy(PolicyCase(drift, 3, Memory(2, 151), 100, lambda: True))
    assert not policy(PolicyCase(Drift(policy="budget", tokens=250, every=2), 3, Memory(2, 0), 100, lambda: True))


def test_a_link_is_only_looked_at_by_who_needs_one():
    def no_link():
        raise AssertionError("asked for a link")

    policies = Policies(Drift(policy="every", every=2))
    assert policies.due(0, 0, 0, no_link)


def fleet(rounds, devices, drift, tokens=100):
    """(round, device) of all times, where each succeeds."""
    policies, found = Policies(drift), []
    for round in range(rounds):
        for device in range(devices):
            if policies.due(round, device, tokens, lambda: True):
                found.append((round, device))
                policies.served(round, device, tokens, True)
    return found


def test_devices_begin_one_after_another_and_keep_their_own_rhythm():
    assert fleet(5, 5, Drift(policy="never", stagger=3)) == [(0, 0), (0, 3), (1, 1), (1, 4), (2, 2)]
    assert fleet(6, 3, Drift(policy="every", every=3, stagger=2)) == [(0, 0), (0, 2), (1, 1), (3, 0), (3, 2), (4, 1)]
    assert fleet(9, 1, Drift(policy="budget", every=2, tokens=250)) == [(0, 0), (2, 0)]


def test_a_time_that_brought_nothing_is_due_again_and_its_tokens_are_gone():
    policies = Policies(Drift(policy="every", every=7))
    assert policies.due(0, 0, 10, lambda: True)
    policies.served(0, 0, 10, False)
    assert policies.due(1, 0, 10, lambda: True)
    policies.served(1, 0, 10, True)
    assert [round for round in range(2, 10) if policies.due(round, 0, 10, lambda: True)] == [8, 9]
    spent = Policies(Drift(policy="budget", tokens=25))
    spent.served(0, 0, 10, False)
    spent.served(1, 0, 10, False)
    assert not spent.due(2, 0, 10, lambda: True)  # 20 + 10 is more than 25


def test_a_refresh_forgets_the_errors_before_it():
    policies = Policies(Drift(policy="on_drift"))
    policies.served(0, 0, 0, True)
    policies.observe(0, CALM + BAD)
    assert policies.due(60, 0, 0, lambda: True)
    policies.served(60, 0, 0, True)
    assert not policies.due(61, 0, 0, lambda: True)


def test_only_who_listens_for_drift_keeps_errors():
    policies = Policies(Drift(policy="every"))
    policies.observe(0, [1.0])
    assert policies.state() == {}


@pytest.mark.parametrize("policy", ["every", "never", "when_online", "budget", "on_drift"])
def test_what_a_fleet_remembers_survives_json(policy):
    drift = Drift(policy=policy, every=3, tokens=1000, stagger=2)
    policies = Policies(drift)
    policies.served(0, 0, 120, True)
    policies.served(0, 2, 70, False)
    policies.observe(0, [0.25] * 30 + [1.0] * 30)
    policies.observe(1, [0.5])
    again = Policies(drift, json.loads(json.dumps(policies.state())))
    assert again.state() == policies.state()
    for round in range(8):
        for device in range(4):
            assert again.due(round, device, 100, lambda: True) == policies.due(round, device, 100, lambda: True)


def test_policies_have_names():
    with pytest.raises(UserError, match="Did you mean `never`"):
        POLICIES.get("nevr")
    with pytest.raises(ValueError, match="registered already"):
        POLICIES.register("never", POLICIES.get("never"))


# --- detectors -----------------------------------------------------------------------------------------------------

STREAMS, LENGTH = 300, 200


def streams(law, mean, seed):
    rng = np.random.default_rng(seed)
    if law == "right or wrong":
        return (rng.random((STREAMS, LENGTH)) < mean).astype(float)
    return rng.beta(4 * mean, 4 * (1 - mean), (STREAMS, LENGTH))


@pytest.mark.parametrize("detector", ["adwin", "page_hinkley"])
@pytest.mark.parametrize("false_alarms", [0.05, 0.2])
@pytest.mark.parametrize("law", ["right or wrong", "more or less right"])
@pytest.mark.parametrize("mean", [0.1, 0.3, 0.5])
def test_users_who_do_not_change_raise_no_more_alarms_than_stated(detector, false_alarms, law, mean):
    """The stated share is of devices, over a whole stream. Three standard errors are luck's."""
    drift = Drift(policy="on_drift", detector=detector, false_alarms=false_alarms)
    found = [alarm(drift, errors) is not None for errors in streams(law, mean, seed=7).tolist()]
    luck = 3 * np.sqrt(false_alarms * (1 - false_alarms) / STREAMS)
    assert np.mean(found) <= false_alarms + luck


@pytest.mark.parametrize("detector", ["adwin", "page_hinkley"])
@pytest.mark.parametrize("law", ["right or wrong", "more or less right"])
def test_a_rise_is_found_after_it_happened(detector, law):
    """Otherwise silence above would prove nothing."""
    drift = Drift(policy="on_drift", detector=detector, false_alarms=0.05)
    before, after = streams(law, 0.1, seed=1)[:60, :60], streams(law, 0.8, seed=2)[:60, :60]
    found = [alarm(drift, errors) for errors in np.hstack([before, after]).tolist()]
    assert np.mean([place is not None and place >= 60 for place in found]) > 0.9
