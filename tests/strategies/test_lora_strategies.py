"""Every strategy's arithmetic, against sums written out by hand: no model, no fleet."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untether.sim.core.errors import UserError
from untether.sim.core.kinds import STRATEGIES
from untether.sim.experiment import Experiment
from untether.sim.rounds.messages import Reply, joined
from untether.strategies import open_strategy
from untether.strategies.factors import best, compact, cut, factors_in, named, padded, products, rank_of
from untether.strategies.shared_lora import Site, compacted, same_shape

SHAPES = {"wide": (3, 7), "tall": (6, 4), "square": (4, 4)}
"""(in, out) of the targets; rank 4 is the width of a square one."""

SHARING = [name for name in STRATEGIES if STRATEGIES.fact(name, "shares")]
EXACT = ["ffa", "rolora", "flora", "fedex", "flexlora"]
"""Whose aggregate is the mean of the products B A (flexlora: where the ranks suffice)."""


def strategy_of(name, rank=2, **fields):
    changes = {"arms": "frozen,federated", "strategy.name": name, "lora.rank": str(rank)}
    return open_strategy(Experiment.read(None, changes | {key.replace("__", "."): v for key, v in fields.items()}))


def factors(seed, rank, zero=False):
    draw = np.random.default_rng(seed)
    return {
        name: (draw.normal(size=(rank, i)), np.zeros((o, rank)) if zero else draw.normal(size=(o, rank)))
        for name, (i, o) in SHAPES.items()
    }  # fmt: skip


class Fleet:
    """Devices whose training is a random move of whatever they may move."""

    def __init__(self, strategy, counts, ranks=None, rank=2):
        self.strategy, self.counts = strategy, counts
        self.ranks = ranks or [rank] * len(counts)
        self.most = max([*self.ranks, *strategy.experiment.ranks])
        self.init = factors(99, self.most, zero=True)
        self.shared = {f"all/{k}": v for k, v in strategy.begin(self.init).items()}
        self.private, self.trained = {}, {}

    def own(self):
        return {name.removeprefix("all/"): array for name, array in self.shared.items()}

    def site(self, device, round):
        return Site(
            device, round, self.ranks[device], self.counts[device], cut(self.init, self.ranks[device]),
            lambda: factors(1000 + 10 * round + device, self.ranks[device], zero=True), self.private.get(device, {}),
        )  # fmt: skip

    def reply(self, device, round):
        site = self.site(device, round)
        blocks = self.strategy.local(self.own(), site)
        draw = np.random.default_rng([device, round])
        trained = {}
        for block in blocks:
            if not (block.A or block.B):
                continue
            trained[block.name] = {
                target: (A + block.A * draw.normal(size=A.shape), B + block.B * draw.normal(size=B.shape))
                for target, (A, B) in block.factors.items()
            }
        self.trained[device] = trained
        if stays := self.strategy.keep(self.own(), trained, site):
            self.private[device] = stays
        up = self.strategy.upload(self.own(), trained, site)
        return Reply(arrays={f"all/{name}": array for name, array in up.items()})

    def round(self, round, devices, hosts=1, order=1):
        replies = {device: self.reply(device, round) for device in devices}
        split = [[replies[d] for d in devices if d % hosts == host][::order] for host in range(hosts)]
        sent = []
        for own in split[::order]:
            if own:
                one = joined(own)
                sent.append(Reply(arrays=compacted(one.arrays)))
        self.shared = self.strategy.aggregate(1, round, self.shared, sent)

    def worn(self, device, round=0):
        return products(self.strategy.worn(self.own(), self.site(device, round)))

    def mean_product(self, devices):
        """The mean of what was trained, weighed by examples; what is frozen under it left out."""
        weights = np.array([self.counts[d] for d in devices], float) / sum(self.counts[d] for d in devices)
        block = next(iter(self.trained[devices[0]]))
        found = [products(self.trained[d][block]) for d in devices]
        return {t: sum(w * each[t] for w, each in zip(weights, found, strict=True)) for t in SHAPES}


def close(ours, theirs, atol=1e-12):
    assert set(ours) == set(theirs)
    for target in ours:
        np.testing.assert_allclose(ours[target], theirs[target], rtol=0, atol=atol)


@pytest.mark.parametrize("name", SHARING)
def test_a_fleet_of_one_gets_back_what_it_trained(name):
    fleet = Fleet(strategy_of(name, **{"strategy.mix": "1.0"} if name == "fedalt" else {}), [7])
    fleet.round(0, [0])
    wanted = {target: 0 for target in SHAPES}
    for block in fleet.trained[0].values():
        wanted = {target: wanted[target] + product for target, product in products(block).items()}
    close(fleet.worn(0), wanted)


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("hosts", [2, 3, 5])
def test_hosts_sums_are_those_of_devices(name, hosts):
    alone, split = (Fleet(strategy_of(name), [3, 9, 1, 4, 2]) for _ in range(2))
    for round in range(3):
        alone.round(round, range(5))
        split.round(round, range(5), hosts=hosts, order=-1)
    for device in range(5):
        close(split.worn(device), alone.worn(device), atol=1e-11)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("devices", [[0, 1, 2, 3], [1, 3]])
def test_exact_where_it_is_claimed(name, devices):
    rank = 4 if name == "flexlora" else 2  # enough for any product of these layers
    fleet = Fleet(strategy_of(name, rank), [5, 1, 2, 8], rank=rank)
    before = fleet.worn(0)
    fleet.round(0, devices)
    mean = fleet.mean_product(devices)
    if name in ("fedex", "flora"):  # on top of what was frozen
        close(fleet.worn(0), mean if name == "fedex" else {t: before.get(t, 0) + mean[t] for t in mean})
    else:
        close(fleet.worn(0), mean, atol=1e-11)


def test_fedit_is_not_exact():
    fleet = Fleet(strategy_of("fedit"), [5, 1, 2])
    fleet.round(0, [0, 1, 2])
    off = max(np.abs(fleet.worn(0)[t] - product).max() for t, product in fleet.mean_product([0, 1, 2]).items())
    assert off > 0.1


def test_fedit_by_hand():
    """Two devices of 3 and 1 examples: A' = (3 A_1 + A_2) / 4, and B' likewise."""
    fleet = Fleet(strategy_of("fedit"), [3, 1])
    fleet.round(0, [0, 1])
    for target, (A, B) in factors_in(fleet.own(), "lora").items():
        (A1, B1), (A2, B2) = (fleet.trained[device]["lora"][target] for device in (0, 1))
        np.testing.assert_allclose(A, (3 * A1 + A2) / 4, atol=1e-14)
        np.testing.assert_allclose(B, (3 * B1 + B2) / 4, atol=1e-14)


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_exact_after_rounds_that_fill_every_rank(name):
    """The frozen part is a sum over rounds; its ranks stop at the layers' widths, and nothing is lost."""
    fleet = Fleet(strategy_of(name, 4), [2, 1, 5], rank=4)
    wanted = {target: 0 for target in SHAPES}
    for round in range(4):
        under = products(factors_in(fleet.own(), "residual")) if name == "fedex" else None
        fleet.round(round, [0, 1, 2])
        mean = fleet.mean_product([0, 1, 2])
        wanted = {t: (under.get(t, 0) if under is not None else wanted[t]) + mean[t] for t in mean}
    close(fleet.worn(0), wanted, atol=1e-10)
    block = "residual" if name == "fedex" else "past"
    assert max(len(A) for A, _ in factors_in(fleet.own(), block).values()) <= 4


@pytest.mark.parametrize("name", ["hetlora", "flexlora", "flora"])
def test_ranks_may_differ_by_device(name):
    fleet = Fleet(strategy_of(name, strategy__ranks="1,2,4"), [3, 3, 2, 1], ranks=[1, 2, 4, 4])
    for round in range(2):
        fleet.round(round, range(4), hosts=2)
    if name != "flora":
        assert [rank_of(fleet.strategy.worn(fleet.own(), fleet.site(d, 2))) for d in range(4)] == [1, 2, 4, 4]
    else:
        before = fleet.worn(0)
        fleet.round(2, range(4))
        close(fleet.worn(0), {t: before[t] + p for t, p in fleet.mean_product([0, 1, 2, 3]).items()}, atol=1e-11)


def test_a_rank_of_hetlora_is_of_those_that_have_it():
    """Zeros of narrower devices do not shrink it: the paper's padding would halve the upper rank here."""
    fleet = Fleet(strategy_of("hetlora", strategy__ranks="1,2"), [3, 3], ranks=[1, 2])
    fleet.round(0, [0, 1])
    for target, (A, B) in factors_in(fleet.own(), "lora").items():
        theirs = fleet.trained[1]["lora"][target]
        np.testing.assert_allclose(A[1], theirs[0][1], atol=1e-14)
        np.testing.assert_allclose(B[:, 1], theirs[1][:, 1], atol=1e-14)


def test_hetlora_weighs_by_what_was_learned():
    fleet = Fleet(strategy_of("hetlora"), [1, 1])
    fleet.round(0, [0, 1])
    s = [np.sqrt(sum(np.sum(p**2) for p in products(fleet.trained[d]["lora"]).values())) for d in (0, 1)]
    for target, (A, _) in factors_in(fleet.own(), "lora").items():
        (A1, _), (A2, _) = (fleet.trained[d]["lora"][target] for d in (0, 1))
        np.testing.assert_allclose(A, (s[0] * A1 + s[1] * A2) / sum(s), atol=1e-13)


def test_rank_weights_keep_upper_ranks_from_being_diluted():
    """raFLoRA: one of four devices has rank 4; what it alone knows counts in full, not as a quarter."""
    plain, weighed = (
        Fleet(strategy_of("flexlora", strategy__ranks="1,4", strategy__rank_weights=on), [1] * 4, ranks=[1, 1, 1, 4])
        for on in ("false", "true")
    )
    for fleet in (plain, weighed):
        fleet.round(0, range(4))
    low = {d: {t: B[:, :1] @ A[:1] for t, (A, B) in weighed.trained[d]["lora"].items()} for d in range(4)}
    high = {t: B[:, 1:] @ A[1:] for t, (A, B) in weighed.trained[3]["lora"].items()}
    wanted = {t: sum(low[d][t] for d in range(4)) / 4 + high[t] for t in high}
    close(products(factors_in(weighed.own(), "lora")), wanted, atol=1e-11)
    close(products(factors_in(plain.own(), "lora")), {
        t: sum(low[d][t] for d in range(4)) / 4 + high[t] / 4 for t in high
    }, atol=1e-11)  # fmt: skip


def test_flexlora_gives_each_device_the_nearest_of_its_rank():
    fleet = Fleet(strategy_of("flexlora", strategy__ranks="1,4"), [1, 2, 3], ranks=[1, 4, 4])
    fleet.round(0, range(3))
    for target, product in products(fleet.strategy.worn(fleet.own(), fleet.site(0, 1))).items():
        U, S, V = np.linalg.svd(fleet.mean_product([0, 1, 2])[target])
        np.testing.assert_allclose(product, S[0] * np.outer(U[:, 0], V[0]), atol=1e-11)


def test_rolora_moves_one_side_a_round():
    fleet = Fleet(strategy_of("rolora"), [1, 2])
    for round, moved in ((0, "B"), (1, "A"), (2, "B")):
        before = fleet.own()
        fleet.round(round, [0, 1])
        changed = {name.split("/")[1] for name, array in fleet.own().items() if not np.array_equal(array, before[name])}
        assert changed == {moved}


@pytest.mark.parametrize(("name", "stays"), [("ffa", "A"), ("fedsa", "B")])
def test_what_stays_never_travels(name, stays):
    fleet = Fleet(strategy_of(name), [1, 2])
    reply = fleet.reply(0, 0)
    assert not [sent for sent in reply.arrays if f"/{stays}/" in sent]
    assert not [shared for shared in fleet.shared if f"/{stays}/" in shared]


def test_private_parts_of_dual_and_fedalt_are_kept_and_go_on():
    for name in ("dual", "fedalt"):
        fleet = Fleet(strategy_of(name), [1, 1])
        fleet.round(0, [0, 1])
        kept = fleet.private[0]
        blocks = {block.name: block for block in fleet.strategy.local(fleet.own(), fleet.site(0, 1))}
        scale = 0.5 if name == "fedalt" else 1.0
        close(products(blocks["own"].factors), {t: scale * p for t, p in products(factors_in(kept, "own")).items()})


def test_fedalt_leaves_a_device_out_of_its_rest_of_the_world():
    fleet = Fleet(strategy_of("fedalt"), [3, 1, 4])
    fleet.round(0, [0, 1, 2])
    rest = next(b for b in fleet.strategy.local(fleet.own(), fleet.site(0, 1)) if b.name == "rest")
    for target, (A, B) in rest.factors.items():
        (A1, B1), (A2, B2) = (factors_in(fleet.private[d], "own")[target] for d in (1, 2))
        np.testing.assert_allclose(A, (A1 + 4 * A2) / 5, atol=1e-12)
        np.testing.assert_allclose(B, 0.5 * (B1 + 4 * B2) / 5, atol=1e-12)
    fleet.round(1, [1, 2])  # not of the cohort: nothing to leave out
    rest = next(b for b in fleet.strategy.local(fleet.own(), fleet.site(0, 2)) if b.name == "rest")
    for target, (A, _) in rest.factors.items():
        (A1, _), (A2, _) = (factors_in(fleet.private[d], "own")[target] for d in (1, 2))
        np.testing.assert_allclose(A, (A1 + 4 * A2) / 5, atol=1e-12)


def test_a_round_without_anybody_changes_nothing():
    for name in SHARING:
        strategy = strategy_of(name)
        shared = {f"all/{k}": v for k, v in strategy.begin(factors(1, 2, zero=True)).items()}
        assert strategy.aggregate(1, 0, shared, [Reply()]).keys() == shared.keys()


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="rank 4 and the device's 2.*hetlora"):
        same_shape(factors(1, 2), factors(1, 4))
    other = {name: pair for name, pair in factors(1, 2).items() if name != "tall"}
    with pytest.raises(UserError, match="tall.*target_modules"):
        same_shape(factors(1, 2), other)
    wider = dict(factors(1, 2), tall=(np.zeros((2, 9)), np.zeros((4, 2))))
    with pytest.raises(UserError, match="maps 6 to 4 in one and 9 to 4.*base model"):
        same_shape(factors(1, 2), wider)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_compact_and_best_are_the_product(inputs, outputs, rank, seed):
    draw = np.random.default_rng(seed)
    A, B = draw.normal(size=(rank, inputs)), draw.normal(size=(outputs, rank))
    fewer = compact(A, B)
    assert len(fewer[0]) <= max(min(inputs, outputs), 0) or len(fewer[0]) == rank <= min(inputs, outputs)
    np.testing.assert_allclose(fewer[1] @ fewer[0], B @ A, atol=1e-10)
    whole = best(A, B, min(inputs, outputs))
    np.testing.assert_allclose(whole[1] @ whole[0], B @ A, atol=1e-10)
    U, S, V = np.linalg.svd(B @ A)
    one = best(A, B, 1)
    np.testing.assert_allclose(one[1] @ one[0], S[0] * np.outer(U[:, 0], V[0]), atol=1e-9)


def test_padding_changes_no_product():
    plain = factors(3, 2)
    close(products(padded(plain, 5)), products(plain))
    assert named("x", plain).keys() == {f"x/{side}/{t}" for side in "AB" for t in SHAPES}
