"""The filters by hand-worked numbers on vectors of known angles, by properties, and on real sentences."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untether.clients.filters import Case, Finding, Fixed, create_filters, judge, text_of
from untether.clients.filters.embedding import Encoder
from untether.plugins import apart, register
from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction, Sample
from untether.sim.experiment.sections import DiversityFilter, Filters, LengthFilter, SemanticFilter


class Compass:
    """An encoder of texts such as "30 and more": the unit vector at 30 degrees. Counts the texts it embeds."""

    def __init__(self) -> None:
        self.embedded: Counter[str] = Counter()

    def encode(self, texts, *, remember=None):
        self.embedded.update(texts)
        angles = np.radians([float(text.split()[0]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def sample(name: str, angle: float, output: str = "one two", task: str = "T", form: str = "query") -> Sample:
    return Sample(name, "r", task, f"{angle}", output, form)


def item(angle: float, output: str = "one two", task: str = "T", form: str = "query") -> Interaction:
    return Interaction(f"i{angle}", task, f"{angle}", output, None, form)


def section(**changes) -> Filters:
    """All three filters on the input's vectors; wide open unless changed."""
    given_sections = {
        "semantic": SemanticFilter(reads="input", reduce="max", low=-1, high=1),
        "diversity": DiversityFilter(reads="input", max_similarity=1),
        "length": LengthFilter(reads="output", low=0, high=1000),
    }
    return Filters(**(given_sections | changes))


def verdicts(samples, real, filters, **options) -> dict[str, str]:
    judged = judge({"d": samples}, {"d": real}, filters, Compass(), **options)["d"]
    return {j.sample.sample_id: j.verdict for j in judged}


def cos(degrees: float) -> float:
    return math.cos(math.radians(degrees))


def test_semantic_scores_by_hand():
    real = [item(0), item(60)]
    for reduce, at_0, at_30, at_180 in (("max", 1.0, cos(30), -0.5), ("mean", 0.75, cos(30), -0.75)):
        filters = section(semantic=SemanticFilter(reads="input", reduce=reduce, low=-0.6, high=0.9))
        copy, near, far = judge(
            {"d": [sample("copy", 0), sample("near", 30), sample("far", 180)]}, {"d": real}, filters, Compass()
        )["d"]
        assert copy.semantic == pytest.approx(at_0)
        assert near.semantic == pytest.approx(at_30)
        assert far.semantic == pytest.approx(at_180)
        assert near.verdict == "accepted"
        assert copy.verdict == ("rejected_by:semantic" if reduce == "max" else "accepted")
        assert far.verdict == ("accepted" if reduce == "max" else "rejected_by:semantic")


def test_diversity_is_greedy_and_only_accepted_samples_stand_in_the_way():
    filters = section(
        diversity=DiversityFilter(reads="input", max_similarity=cos(20)), length=LengthFilter(low=0.5, high=2)
    )
    samples = [
        sample("beside_real", 10),
        sample("too_long", 90, "so many words that it is turned away by another filter"),
        sample("first", 95),
        sample("beside_first", 110),
        sample("clear", 130),
    ]
    judged = judge({"d": samples}, {"d": [item(0)]}, filters, Compass())["d"]
    assert [j.verdict for j in judged] == [
        "rejected_by:diversity",
        "rejected_by:length",
        "accepted",
        "rejected_by:diversity",
        "accepted",
    ]
    expected = [1 - cos(10), 1 - cos(90), 1 - cos(95), 1 - cos(15), 1 - cos(35)]
    assert [j.diversity for j in judged] == pytest.approx(expected, abs=1e-6)


def test_length_is_relative_to_the_median_of_the_same_form():
    filters = section(length=LengthFilter(reads="output", low=0.5, high=2))
    real = [item(0, "a"), item(1, "a b"), item(2, "a b c d e f"), item(3, "w " * 10, form="complete")]
    samples = [
        sample("short", 40, ""),
        sample("half", 50, "a"),
        sample("double", 60, "a b c d"),
        sample("long", 70, "a b c d e"),
        sample("other_form", 80, "a b c d e", form="complete"),
        sample("unseen_form", 90, "a b", form="title"),
    ]
    judged = judge({"d": samples}, {"d": real}, filters, Compass())["d"]
    assert [j.length_ratio for j in judged] == [0.0, 0.5, 2.0, 2.5, 0.5, 2 / 4]  # all four: median of 1, 2, 6, 10
    assert [j.accepted for j in judged] == [False, True, True, False, True, True]


def test_length_reads_input_or_pair():
    real = [Interaction("1", "T", "0 b c d", "x")]
    sampled = [Sample("s", "r", "T", "90 b", "x y z")]
    for reads, ratio in (("input", 2 / 4), ("output", 3 / 1), ("pair", 5 / 5)):
        filters = section(length=LengthFilter(reads=reads, low=0, high=9))
        assert judge({"d": sampled}, {"d": real}, filters, Compass())["d"][0].length_ratio == ratio


def test_a_closed_label_is_never_too_long_but_a_rambling_one_is():
    filters = section(length=LengthFilter(reads="output", low=0.5, high=2))
    real = [item(0, "travel", "LaMP_2N"), item(1, "travel", "LaMP_2N")]
    samples = [
        sample("label", 90, "style & beauty", "LaMP_2N"),
        sample("ramble", 140, "style and also beauty", "LaMP_2N"),
    ]
    assert verdicts(samples, real, filters) == {"label": "accepted", "ramble": "rejected_by:length"}
    judged = judge({"d": samples}, {"d": real}, filters, Compass())["d"]
    assert judged[0].length_ratio == 3.0


def test_the_verdict_names_the_first_filter_in_the_configured_order():
    tight = {
        "semantic": SemanticFilter(reads="input", low=0.5, high=0.9),
        "diversity": DiversityFilter(reads="input", max_similarity=0.9),
        "length": LengthFilter(reads="output", low=0.9, high=1.1),
    }
    copy = [sample("copy", 0, "far too many words")]
    for first in ("semantic", "diversity", "length"):
        rest = [name for name in ("length", "diversity", "semantic") if name != first]
        filters = section(**tight, order=(first, *rest))
        judged = judge({"d": copy}, {"d": [item(0)]}, filters, Compass())["d"][0]
        assert judged.verdict == f"rejected_by:{first}"
        assert (judged.semantic, judged.diversity, judged.length_ratio) == pytest.approx((1.0, 0.0, 2.0), abs=1e-6)


def test_a_disabled_or_unlisted_filter_neither_scores_nor_embeds():
    filters = section(semantic=SemanticFilter(enabled=False), order=("semantic", "length"))
    judged = judge({"d": [sample("s", 90)]}, {"d": [item(0)]}, filters, encoder=None)["d"][0]
    assert (judged.semantic, judged.diversity, judged.length_ratio) == (None, None, 1.0)


def test_leaks_come_last_and_change_nothing_else():
    filters = section(diversity=DiversityFilter(reads="input", max_similarity=cos(20)))
    samples = [sample("leak", 90), sample("twin", 95), sample("copy", 0), sample("fine", 140)]
    without = verdicts(samples, [item(0)], filters)
    assert without == {
        "leak": "accepted",
        "twin": "rejected_by:diversity",
        "copy": "rejected_by:diversity",
        "fine": "accepted",
    }

    def check(s: Sample) -> bool:
        return s.sample_id in ("leak", "copy")

    assert verdicts(samples, [item(0)], filters, leaks=check) == without | {"leak": "rejected_by:leak"}
    judged = judge({"d": samples}, {"d": [item(0)]}, filters, Compass(), leaks=check)["d"]
    assert [j.extra.get("leak") for j in judged] == [1.0, None, 1.0, None]


def test_each_device_has_its_own_leak_check():
    both = {"a": [sample("x", 90)], "b": [sample("x", 90)]}
    real = {"a": [item(0)], "b": [item(0)]}
    judged = judge(both, real, section(), Compass(), leaks={"a": lambda s: True})
    assert (judged["a"][0].verdict, judged["b"][0].verdict) == ("rejected_by:leak", "accepted")


def test_tasks_are_judged_apart_and_results_keep_the_samples_order():
    filters = section(
        semantic=SemanticFilter(reads="input", low=0.5, high=1),
        diversity=DiversityFilter(reads="input", max_similarity=0.9),
    )
    samples = [sample("u1", 90, task="U"), sample("t1", 40), sample("u2", 0, task="U"), sample("t2", 90)]
    judged = judge({"d": samples}, {"d": [item(0), item(60, task="U")]}, filters, Compass())["d"]
    assert [j.sample.sample_id for j in judged] == ["u1", "t1", "u2", "t2"]
    assert [j.semantic for j in judged] == pytest.approx([cos(30), cos(40), cos(60), cos(90)], abs=1e-6)
    assert [j.accepted for j in judged] == [True, True, pytest.approx(True), False]


def test_without_real_samples_nothing_can_be_compared():
    filters = section(diversity=DiversityFilter(reads="input", max_similarity=0.9))
    judged = judge({"d": [sample("a", 0), sample("b", 5)]}, {}, filters, Compass())["d"]
    assert (judged[0].semantic, judged[0].diversity, judged[0].length_ratio) == (None, None, None)
    assert [j.verdict for j in judged] == ["accepted", "rejected_by:diversity"]


def test_each_text_is_embedded_once_in_one_call():
    encoder = Compass()
    candidates = {"a": [sample("1", 10), sample("2", 10)], "b": [sample("3", 10)], "none": []}
    real = {"a": [item(10)], "b": [item(20)], "stranger": [item(99)]}
    judged = judge(candidates, real, section(), encoder)
    assert encoder.embedded == {"10": 1, "20": 1}
    assert judged["none"] == []


def test_the_pair_puts_the_output_first():
    assert text_of(Sample("s", "r", "T", "in", "out"), "pair") == "out\nin"


def test_unknown_and_repeated_names():
    with pytest.raises(UserError, match="unknown filter `semantics`. Did you mean `semantic`.*semantic, diversity"):
        create_filters(section(order=("semantics",)))
    with pytest.raises(UserError, match='"length" twice'):
        create_filters(section(order=("length", "diversity", "length")))
    for name in ("diversity", "leak"):
        with pytest.raises(ValueError, match="registered already"):
            register("filter", name, lambda: None)


def test_another_filter_by_name():
    class Polite:
        embeds = None

        def examine(self, case: Case) -> Fixed:
            return Fixed([Finding(float(len(s.output)), "please" in s.output) for s in case.samples])

    with apart():
        register("filter", "polite", Polite)
        judged = judge(
            {"d": [sample("a", 90, "please"), sample("b", 120, "now")]},
            {"d": [item(0)]},
            section(order=("polite", "semantic")),
            Compass(),
        )["d"]
        assert [(j.verdict, j.extra) for j in judged] == [
            ("accepted", {"polite": 6.0}),
            ("rejected_by:polite", {"polite": 3.0}),
        ]
    with pytest.raises(UserError, match="unknown filter `polite`"):
        create_filters(section(order=("polite",)))


angles = st.integers(0, 359)
outputs = st.integers(0, 6).map(lambda count: " ".join(["w"] * count))
devices = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.tuples(
        st.lists(st.tuples(angles, outputs, st.sampled_from("TU")), max_size=12),
        st.lists(st.tuples(angles, outputs, st.sampled_from("TU")), max_size=5),
    ),
    max_size=5,
)
configs = st.builds(
    lambda low, span, near, order, reduce: section(
        semantic=SemanticFilter(reads="input", reduce=reduce, low=low, high=min(1.0, low + span)),
        diversity=DiversityFilter(reads="input", max_similarity=near),
        length=LengthFilter(reads="output", low=0.5, high=2),
        order=order,
    ),
    st.floats(-1, 0.8),
    st.floats(0.1, 2),
    st.floats(0.5, 1),
    st.permutations(["semantic", "diversity", "length"]).map(tuple),
    st.sampled_from(["max", "mean"]),
)


def _world(drawn):
    candidates = {
        key: [sample(f"{key}{n}", a, o, t) for n, (a, o, t) in enumerate(made)] for key, (made, _) in drawn.items()
    }
    return candidates, {key: [item(a, o, t) for a, o, t in own] for key, (_, own) in drawn.items()}


@settings(max_examples=75, deadline=None)
@given(devices, configs)
def test_properties(drawn, filters):
    candidates, real = _world(drawn)
    judged = judge(candidates, real, filters, Compass())
    bounds = {
        "semantic": lambda j: j.semantic is None or filters.semantic.low <= j.semantic <= filters.semantic.high,
        "diversity": lambda j: j.diversity is None or j.diversity >= 1 - filters.diversity.max_similarity,
        "length": lambda j: j.length_ratio is None or 0.5 <= j.length_ratio <= 2,
    }
    for key, rows in judged.items():
        assert [j.sample for j in rows] == candidates[key]
        for j in rows:  # the verdict follows from the recorded scores
            failing = [name for name in filters.order if not bounds[name](j)]
            assert j.verdict == (f"rejected_by:{failing[0]}" if failing else "accepted")
        for task in "TU":
            kept = [float(j.sample.input) for j in rows if j.accepted and j.sample.task == task]
            own = [float(i.input) for i in real[key] if i.task == task]
            for n, angle in enumerate(kept):
                for other in own + kept[:n]:
                    assert cos(angle - other) <= filters.diversity.max_similarity + 1e-6


@settings(max_examples=60, deadline=None)
@given(devices, configs, st.randoms())
def test_a_device_does_not_depend_on_the_others(drawn, filters, random):
    candidates, real = _world(drawn)
    together = judge(candidates, real, filters, Compass())
    keys = list(candidates)
    random.shuffle(keys)
    assert judge({key: candidates[key] for key in keys}, real, filters, Compass()) == together
    for key in keys:
        assert judge({key: candidates[key]}, {key: real[key]}, filters, Compass())[key] == together[key]


def test_real_sentences():
    """Default thresholds on a writer of gardening headlines, with the real encoder."""
    own = [
        ("Late frost can kill tomato seedlings planted too early.", "Why Your Tomatoes Died In May"),
        ("A compost heap needs air, water and patience.", "How To Build A Compost Heap That Works"),
        ("Roses want pruning before the first leaves open.", "Prune Your Roses Now, Thank Yourself Later"),
    ]
    made = {
        "good": ("Young pepper plants suffer when nights are cold.", "Why Your Peppers Hate Cold Nights"),
        "copy": own[1],
        "near_copy": ("A compost heap needs air, water, and patience!", "How to build a compost heap that works"),
        "off_topic": (
            "The central bank left interest rates unchanged on Thursday.",
            "Rates Unchanged As Inflation Cools",
        ),
        "rambling": ("Slugs eat lettuce at night.", "Why " + "slugs and snails really do love to eat lettuce " * 3),
        "again": ("Young pepper plants suffer when the nights are cold.", "Why Your Peppers Hate Cold Nights"),
    }
    real = {"d": [Interaction(str(n), "LaMP_4", source, target) for n, (source, target) in enumerate(own)]}
    samples = {"d": [Sample(name, "r", "LaMP_4", source, target) for name, (source, target) in made.items()]}
    judged = {j.sample.sample_id: j for j in judge(samples, real, Filters(), Encoder(device="cpu"))["d"]}
    assert {name: j.verdict for name, j in judged.items()} == {
        "good": "accepted",
        "copy": "rejected_by:semantic",
        "near_copy": "rejected_by:semantic",
        "off_topic": "rejected_by:semantic",
        "rambling": "rejected_by:length",
        "again": "rejected_by:diversity",
    }
    assert judged["copy"].semantic == pytest.approx(1.0, abs=1e-2)
    assert judged["copy"].diversity == pytest.approx(0.0, abs=1e-2)
