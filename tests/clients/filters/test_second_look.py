"""The filters that look beyond a device's texts: adversarial validation, self-consistency, a person's review."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from fleet import make_worker, run_in_process, tiny
from sklearn.linear_model import LogisticRegression

from untether.clients.device.fetch import filter_again
from untether.clients.device.worker import Endpoint, Inputs
from untether.clients.filters import Beside, judge
from untether.clients.filters.adversarial import out_of_fold
from untether.clients.filters.beside import decided, simulated
from untether.clients.filters.self_consistency import agreement
from untether.server.background import start_background
from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction, Sample
from untether.sim.experiment import Experiment
from untether.sim.experiment.sections import AdversarialFilter, Filters, HumanFilter, SelfConsistencyFilter
from untether.sim.population.world import World
from untether.sim.rounds.messages import Refilter, RequestOf
from untether.sim.run.reviews import Reviewed, ReviewFile

EVERY = "length,adversarial,self_consistency,human"


class Compass:
    """An encoder of texts such as "30": the unit vector at 30 degrees."""

    def encode(self, texts, *, remember=None):
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def sample(name: str, angle: float, output: str = "one two") -> Sample:
    return Sample(name, "r", "T", f"{angle}", output)


def item(angle: float) -> Interaction:
    return Interaction(f"i{angle}", "T", f"{angle}", "one two")


def judged(samples, real, filters, beside=None):
    found = judge({"d": samples}, {"d": real}, filters, Compass(), beside={"d": beside} if beside else None)["d"]
    return {each.sample.sample_id: (each.verdict, each.extra) for each in found}


def test_each_sample_is_judged_by_a_classifier_that_did_not_see_it():
    """Of four samples and nine real ones in two parts; scikit-learn on the others, and a rank among the real."""
    random = np.random.default_rng(3)
    real, made = random.normal(size=(9, 5)).astype(np.float32), random.normal(size=(4, 5)).astype(np.float32)
    found = out_of_fold(real, made, 2)
    for index in range(4):
        known, seen = (kind[[i for i in range(len(kind)) if i % 2 != index % 2]] for kind in (real, made))
        vectors, labels = np.concatenate([known, seen]).astype(float), [True] * len(known) + [False] * 2
        oracle = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000).fit(vectors, labels)
        held_out = oracle.predict_proba(real[index % 2 :: 2].astype(float))[:, 1]
        assert found[index] == np.mean(held_out <= oracle.predict_proba(made[[index]].astype(float))[0, 1])


def test_what_can_be_told_from_real_is_turned_away():
    """Users write around 0 degrees; two samples do too, six stand at 90."""
    filters = Filters(order=("adversarial",), adversarial=AdversarialFilter(reads="input", low=0.1))
    samples = [sample(f"s{i}", -9.0 + i if i < 2 else 88.0 + i) for i in range(8)]
    others = [item(angle) for angle in (-3.0, -2.0, 1.0, 3.0, 4.0, 5.0, 6.0)]
    found = judged(samples, [item(0.0)], filters, Beside(others=others))
    assert [name for name, (verdict, _) in found.items() if verdict == "accepted"] == ["s0", "s1"]
    assert [extra["adversarial"] for _, extra in found.values()] == [1.0, 1.0] + [0.0] * 6


def test_without_anything_to_tell_it_from_a_sample_passes():
    filters = Filters(order=("adversarial",), adversarial=AdversarialFilter(reads="input"))
    assert judged([sample("a", 10.0)], [item(0.0)], filters) == {"a": ("accepted", {})}
    found = judged([sample("a", 10.0), sample("b", 80.0)], [], filters)
    assert {verdict for verdict, _ in found.values()} == {"accepted"}
    few = judged([sample(f"s{i}", 10.0 * i) for i in range(8)], [item(0.0)], filters)
    assert list(few.values()) == [("accepted", {})] * 8, "fewer real samples than parts"


def test_no_device_changes_anothers_verdict():
    filters = Filters(order=("adversarial",), adversarial=AdversarialFilter(reads="input"))
    others = [item(angle) for angle in (5.0, 15.0, 25.0)]
    candidates = {n: [sample(f"{n}{i}", 20.0 * n + 10 * i) for i in range(4)] for n in range(3)}
    real = {n: [item(30.0 * n)] for n in range(3)}
    beside = {n: Beside(others=others) for n in range(3)}
    together = judge(candidates, real, filters, Compass(), beside=beside)
    for n in range(3):
        alone = judge({n: candidates[n]}, {n: real[n]}, filters, Compass(), beside={n: beside[n]})
        assert alone[n] == together[n]


@pytest.mark.parametrize(
    ("task", "output", "again", "score"),
    [
        ("LaMP_2", "comedy", "comedy", 1.0), ("LaMP_2", "comedy", "classic", 0.0), ("LaMP_3", "5", "3", 0.5),
        ("LaMP_3", "1", "5", 0.0), ("LaMP_3", "It was fine.", "5", 0.0), ("LaMP_3", "nan", "5", 0.0),
        ("LaMP_3", "5", "It was fine.", 0.0), ("LaMP_4", "a walk in town", "a walk at night", 0.5),
    ],
)  # fmt: skip
def test_agreement_by_hand(task, output, again, score):
    assert agreement(task, output, again) == pytest.approx(score)


def test_what_the_cloud_would_not_say_again_is_turned_away():
    filters = Filters(order=("self_consistency",), self_consistency=SelfConsistencyFilter(low=0.5))
    samples = [sample(name, 0.0) for name in "abc"]
    found = judged(samples, [], filters, Beside(agreement={"a": 0.5, "b": 0.49}))
    assert found["a"] == ("accepted", {"self_consistency": 0.5})
    assert found["b"] == ("rejected_by:self_consistency", {"self_consistency": 0.49})
    assert found["c"] == ("accepted", {}), "not asked again"


@pytest.mark.parametrize("undecided", ["accept", "reject"])
def test_decisions_of_a_review_are_followed(tmp_path, undecided):
    user = World(1).user(0, tasks=("LaMP_4",))
    reviews = ReviewFile(tmp_path / "reviews.jsonl")
    samples = [sample(name, 0.0, output=name) for name in ("yes", "no", "skipped", "new")]
    for one, said in zip(samples, ("accept", "reject", "skip"), strict=False):
        reviews.decide(Reviewed(user.user_id, one.task, one.input, one.output), said)
    filters = Filters(order=("human",), human=HumanFilter(undecided=undecided))
    found = judged(samples, [], filters, Beside(review=decided(ReviewFile(reviews.path), user)))
    other = "accepted" if undecided == "accept" else "rejected_by:human"
    assert [verdict for verdict, _ in found.values()] == ["accepted", "rejected_by:human", other, other]
    assert found["yes"][1] == {"human": 1.0} and found["new"][1] == {}


def test_the_worlds_user_knows_their_own_answers():
    world, tasks = World(1), ("LaMP_4",)
    user = world.user(0, tasks=tasks)
    (query, *_), own = user.queries, user.history[0]
    right = Sample("a", "r", "LaMP_4", query.input, query.gold)
    wrong = Sample("b", "r", "LaMP_4", query.input, "Not me")
    copy, foreign = Sample("c", "r", "LaMP_4", own.input, own.output), Sample("d", "r", "LaMP_4", "xyzzy", query.gold)
    exact = simulated(world, user, 0, 0.0, 1)
    assert [exact(each) for each in (right, wrong, copy, foreign)] == [True, False, False, False]
    assert [simulated(world, user, 0, 1.0, 1)(each) for each in (right, wrong)] == [False, True]
    owner = World(1).user(2, tasks=tasks, queries=400)
    made = [Sample(f"{n}", "r", "LaMP_4", each.input, each.gold) for n, each in enumerate(owner.queries)]
    slips = [not simulated(world, owner, 0, 0.25, 1)(each) for each in made]
    assert 0.18 < np.mean(slips) < 0.32
    assert slips == [not simulated(world, owner, 0, 0.25, 1)(each) for each in made], "the same sample, the same slip"


def test_a_review_of_real_users_needs_decisions():
    data = {"population": {"source": "lamp", "path": "x"}, "filters": {"order": ["human"]}}
    with pytest.raises(UserError, match="untether review RUN"):
        Experiment.build(data, None, "it")
    Experiment.build({**data, "filters": {"order": ["human"], "human": {"decisions": "r.jsonl"}}}, None, "it")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Two runs on the same samples, with the three filters and without any; the first one's worker."""
    folder = tmp_path_factory.mktemp("look")
    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        fields = {"arms": "local,collaborative", "population__users": 3, "population__shared_users": 4}
        experiment = tiny(**fields, filters__order=EVERY)
        run = run_in_process(folder / "every", experiment, endpoint)
        worker = make_worker(run, endpoint)
        plain = run_in_process(folder / "none", tiny(**fields, filters__order=""), endpoint, worker=worker)
        yield run, plain, worker


def test_a_run_scores_every_sample_by_every_filter(ran):
    run, plain, _ = ran
    samples = run.read("samples").sort_values("sample_id")
    scores = samples["scores"].map(json.loads)
    assert len(samples) and all({"adversarial", "self_consistency", "human"} <= set(each) for each in scores)
    assert scores.map(lambda each: each["human"]).isin([0.0, 1.0]).all()
    assert samples["input"].tolist() == plain.read("samples").sort_values("sample_id")["input"].tolist()
    assert (samples["verdict"] != "accepted").any()


def test_asking_again_is_paid_for(ran):
    """By the request whose samples were asked about: its tokens are those of the order and of a question a sample."""
    run, plain, _ = ran
    events = [each.read("events").query("kind == 'augment'") for each in (run, plain)]
    more, less = (each.set_index("event_id").sort_index() for each in events)
    assert list(more.index) == list(less.index)
    counts = run.read("samples").groupby("request_id").size()
    for name, row in more.iterrows():
        if counts.get(row["request_id"], 0):
            assert row["tokens_in"] > less.loc[name, "tokens_in"] * (1 + 0.5 * counts[row["request_id"]])
            assert row["bytes_up"] > less.loc[name, "bytes_up"] and row["duration_s"] >= less.loc[name, "duration_s"]


def test_answers_that_were_lost_are_not_asked_about_again(ran):
    """The second pass needs no cloud: what it said the first time stands with the samples."""
    run, _, worker = ran
    samples = run.read("samples").query("device_id == 'd00000'")
    lost = sorted(set(samples["request_id"]))[0]
    order = Refilter(seed=1, round=0, devices=(0,), lost=(RequestOf(0, lost),))
    outcome = filter_again(worker, order, Inputs(samples=pa.Table.from_pandas(samples, preserve_index=False)))
    again = {row["sample_id"]: row for row in outcome.tables["samples"]}
    for row in samples.itertuples():
        if row.request_id == lost:
            assert again[row.sample_id]["verdict"] == "not_received"
        else:
            mine, before = json.loads(again[row.sample_id]["scores"]), json.loads(row.scores)
            assert mine["self_consistency"] == before["self_consistency"] and mine["human"] == before["human"]
