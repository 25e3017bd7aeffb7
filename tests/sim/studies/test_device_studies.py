"""The studies of hardware, rank and filters on small tables: by hand, and sentences that follow the numbers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.studies import Study
from untether.sim.studies.claims import filters, hardware, rank
from untether.sim.time.cost import CostModel, model_shape
from untether.sim.time.hardware import built_in


def trained(seconds, outcome="ok", arm="collaborative"):
    return {"kind": "train", "arm": arm, "outcome": outcome, "duration_s": seconds, "energy_j": 5.0 * seconds,
            "tokens_in": None, "tokens_out": None}  # fmt: skip


class Run(SimpleNamespace):
    """A finished run's tables, by hand."""

    def read(self, name):
        return getattr(self, name)


# --- hardware -------------------------------------------------------------------------------------------------------


def test_the_study_of_hardware_has_every_device():
    cells = Study.read("hardware").cells
    assert {cell.values["hardware.profiles"][0] for cell in cells} == set(built_in()) and len(cells) == len(built_in())


def test_the_cloud_by_hand():
    """1,256 tokens up at 4 bytes each and 500 more, over 10 Mbit/s; 16 down; 1.256 s to read, 0.32 s to write."""
    experiment = Study.read("hardware").cells[0].experiment
    link, prompt = hardware.LinkSpeed(20.0, 10.0, 0.1, 2.0), hardware.PromptSize(256, 16)
    up, down = 8 * (4 * 1256 + 500) / 10e6, 8 * (4 * 16 + 500) / 20e6
    assert hardware.cloud_s(experiment, link, prompt) == pytest.approx(0.3 + up + down + 2.0 + 1.256 + 0.32)


def test_storage_by_hand():
    """0.5B in 16 bits against 7.6B in 16 bits: 1 - 494,032,768 / 7,615,616,512 but for adapter and samples."""
    experiment = Experiment.build({"hardware": {"profiles": ["pixel-8"]}}, None, "it")
    table = hardware.storage(experiment, 0.5).set_index(["model", "bits"])
    row = table.loc[("Qwen2.5-0.5B", 16)]
    kept = 2 * 494_032_768 + 1e6 * row["adapter_mb"] + 0.5e6
    assert row["saved"] == pytest.approx(1 - kept / (2 * 7_615_616_512))
    assert table["saved"].is_monotonic_increasing is False and (table["saved"] > 0.8).sum() == 6
    assert table.loc[("Qwen2.5-3B", 16), "saved"] < 0.8 < table.loc[("Qwen2.5-3B", 4), "saved"]


def test_a_device_by_hand():
    experiment = Experiment.build({"hardware": {"profiles": ["iphone-13"]}}, None, "it")
    samples = pd.DataFrame({"seed": 1, "device_id": ["a", "a", "b"], "input": ["x" * 10] * 3, "output": ["y" * 5] * 3})
    events = pd.DataFrame([trained(10.0), trained(30.0), trained(1e6, "out_of_memory"), trained(7.0, arm="local")])
    row = hardware.measure(experiment, Run(events=events, samples=samples))
    cost = CostModel(built_in()["iphone-13"], model_shape("Qwen2.5-0.5B"))
    assert (row["train_s"], row["train_kj"], row["trained"], row["out_of_memory"]) == (20.0, 0.1, 2, 1)
    assert row["battery"] == pytest.approx(100 / (3600 * 12.41)) and row["samples_mb"] == pytest.approx(30e-6)
    assert row["write_per_s"] == pytest.approx(1 / cost.token_s(256)) and row["hot_write_per_s"] < row["write_per_s"]
    assert row["memory_gb"] > row["lean_memory_gb"] and row["usable_gb"] == pytest.approx(0.6 * 4 * 2**30 / 1e9)


def test_what_hardware_says_follows_the_numbers():
    devices = pd.DataFrame({
        "device": ["a", "b"], "train_s": [30.0, 7200.0], "train_kj": [0.1, 9.0], "battery": [0.25, np.nan],
        "memory_gb": [3.0, 3.0], "lean_memory_gb": [1.0, 1.0], "usable_gb": [2.0, 4.0],
    })  # fmt: skip
    speeds = pd.DataFrame({
        "device": ["a", "b", "a", "b"], "link": ["Wi-Fi", "Wi-Fi", "3G", "3G"], "prompt": "tag",
        "times": [0.5, 1.5, 2.0, 6.0],
    })  # fmt: skip
    stored = pd.DataFrame({"model": ["S", "S", "L"], "bits": [16, 4, 16], "saved": [0.85, 0.95, 0.4]})
    said = list(hardware.findings(devices, speeds, stored))
    assert "40% to 95% less" in said[0] and "less: S in 16 or 4 bits; not: L in 16 bits" in said[0]
    assert "over Wi-Fi on 1 (0 at least 3 times); over 3G on 2 (1 at least 3 times)" in said[1]
    assert "At most 6.0 times, on b over 3G" in said[1]
    assert "30 s (a) to 2.0 h (b)" in said[2] and "25.0% of a battery (a)" in said[3]
    assert "Too much for a; with checkpointing it fits a of these" in said[4]
    notes = list(hardware.notes(Study.read("hardware").cells[0].experiment))
    assert "`Qwen2.5-0.5B`, weights of 16 bits" in notes[0] and "published measurements" in notes[1]


# --- rank -----------------------------------------------------------------------------------------------------------


def ranks():
    """Ten users; rank 1 gains 0.1, 8 and 64 gain 0.3 but for noise that favours 64 a little."""
    study = Study.read("rank", grid={"rank": "1,8,64"})
    random, runs = np.random.default_rng(0), {}
    for cell, gain in zip(study.cells, (0.1, 0.3, 0.305), strict=True):
        rows = [
            {"seed": 1, "user_id": f"u{user}", "task": "LaMP_4", "arm": arm, "score": score}
            for user in range(10)
            for arm, score in (("frozen", 0.4), ("collaborative", 0.4 + gain + 0.02 * random.standard_normal()))
        ]
        runs[cell.name] = Run(predictions=pd.DataFrame(rows), events=pd.DataFrame([trained(5.0), trained(7.0)]))
    return study, runs


def test_ranks_keep_their_scale():
    cells = Study.read("rank").cells
    assert [cell.experiment.lora.rank for cell in cells] == [1, 2, 4, 8, 16, 32, 64]
    assert {cell.experiment.lora.alpha / cell.experiment.lora.rank for cell in cells} == {2.0}


def test_where_more_stops_paying(monkeypatch):
    monkeypatch.setattr(
        rank, "user_scores", lambda frame, by: frame.assign(cluster=frame["user_id"])[[*by, *rank.USER, "score"]]
    )
    study, runs = ranks()
    points = rank.measure(study, runs)
    assert points["rank"].tolist() == [1, 8, 64] and points["best"].sum() == 1
    assert points["gain"].tolist() == pytest.approx([0.1, 0.3, 0.305], abs=0.02)
    assert rank.enough(points)["rank"] == 8, "8 is not shown to be worse than the best, 1 is"
    adapter = CostModel(built_in()["pixel-8"], model_shape("Qwen2.5-0.5B"), lora=study.cells[0].experiment.lora)
    assert points["adapter_mb"].tolist() == pytest.approx([adapter.adapter_bytes() * r / 1e6 for r in (1, 8, 64)])
    assert points["train_s"].tolist() == [6.0] * 3 and points["train_kj"].tolist() == [0.03] * 3
    first, costs = rank.findings(points)
    assert "rank 8 has +0.2" in first and "10 users" in first and "from there on more is not shown to pay" in first
    assert "at rank 1 and" in costs
    rank.draw(points)


# --- filters --------------------------------------------------------------------------------------------------------


def judged(passed, truths, scores=None, **more):
    count = len(passed)
    frame = pd.DataFrame({
        "seed": 1, "round": 0, "sample_id": [f"s{n}" for n in range(count)], "task": "LaMP_4", "truth": truths,
        "verdict": ["accepted" if each else "rejected_by:length" for each in passed], "semantic": np.nan,
        "diversity": np.nan, "length_ratio": np.nan, "scores": [json.dumps(each) for each in scores or [{}] * count],
    }).assign(**more)  # fmt: skip
    return filters.of_samples(frame)


def test_rates_by_hand():
    """Of five: two faults, one turned away; three sound, one turned away; one whose truth nobody knows."""
    truths = ["malformed", "hallucination", "good", "good", "good", None]
    frame = judged([False, True, False, True, True, False], truths)
    assert filters.rates(frame) == {"precision": 0.5, "recall": 0.5, "lost": pytest.approx(1 / 3)}
    assert np.isnan(filters.rates(judged([True], ["good"]))["recall"])


def test_what_was_not_received_or_leaks_is_left_out():
    frame = judged([True, True, True], ["good"] * 3)
    assert len(filters.of_samples(frame.assign(verdict=["accepted", "rejected_by:leak", "not_received"]))) == 1


def test_agreement_with_the_reviewer():
    one, two = judged([True, True, False, True], ["good"] * 4), judged([True, False, False, True], ["good"] * 4)
    found = filters.agreement(one, two)
    assert found == {"agreement": 0.75, "kappa": pytest.approx(cohen_kappa_score([1, 1, 0, 1], [1, 0, 0, 1]))}
    assert filters.agreement(one, None) == {} and np.isnan(filters.agreement(one, two.assign(sample_id="x"))["kappa"])


def test_curves_are_those_of_sklearn_and_missing_scores_suspect_least():
    scores = [{"adversarial": s} if s is not None else {} for s in (0.1, 0.9, 0.4, 0.8, None)]
    truths = ["malformed", "good", "good", "off_topic", "good"]
    frame = judged([True] * 5, truths, scores, length_ratio=[4, 1, 1.5, 0.2, 1])
    found = filters.scores_of(frame)
    assert set(found) == {"length", "adversarial"}
    assert filters.auc(found["adversarial"]) == roc_auc_score([1, 0, 0, 1, 0], [0.9, 0.1, 0.6, 0.2, 0.0])
    assert filters.auc(found["length"]) == 1.0, "both faults are four or five times too long or short"
    swept = filters.thresholds(found)
    strictest = swept[swept["filter"] == "length"].iloc[-1]
    assert (strictest["recall"], strictest["lost"], strictest["precision"]) == (0.5, 0.0, 1.0)
    filters.draw_roc(found)


def test_the_frontier():
    points = pd.DataFrame({
        "filters": ["a", "b", "c", "open"], "gain": [0.1, 0.3, 0.2, 0.9], "tokens": [10.0, 30.0, 40.0, 1.0],
    })  # fmt: skip
    assert filters.frontier(points).index.tolist() == ["a", "b"], "c pays more than b for less; `open` is no choice"


def test_filters_from_tables_to_findings(tmp_path, monkeypatch):
    study = Study.read("filters", grid={"filters": "paper,human,open"})
    truths = ["good", "good", "hallucination", "malformed"]
    passed = {"paper": [True, True, True, False], "human": [True, True, False, False], "open": [True] * 4}
    scores = {
        "open": [{"self_consistency": s} for s in (1.0, 0.9, 0.1, 0.0)],
        "human": [{"human": s} for s in (1, 1, 0, 0)],
    }
    runs = {}
    for cell in study.cells:
        name = cell.words["filters"]
        raw = judged(passed[name], truths, scores.get(name)).drop(columns=["fault", "passed"])
        events = pd.DataFrame([{"kind": "augment", "tokens_in": 1600.0, "tokens_out": 160.0}, trained(3.0)])
        rows = [
            {"seed": 1, "user_id": f"u{n}", "cluster": f"u{n}", "arm": arm, "task": "LaMP_4", "score": score}
            for n in range(4) for arm, score in (("frozen", 0.4), ("collaborative", 0.5))
        ]  # fmt: skip
        runs[cell.name] = Run(samples=raw, events=events, predictions=pd.DataFrame(rows))
    monkeypatch.setattr(filters, "user_scores", lambda frame: frame)
    filters.analyse(study, tmp_path, runs)
    table = pd.read_csv(tmp_path / "table.csv").set_index("filters")
    assert table.loc["paper", ["precision", "recall", "lost"]].tolist() == [1.0, 0.5, 0.0]
    assert table.loc["human", "recall"] == 1.0 and table["gain"].tolist() == [0.1] * 3
    assert table["tokens"].tolist() == [110.0] * 3
    assert table.loc["paper", "agreement"] == 0.75
    kinds = pd.read_csv(tmp_path / "kinds.csv").set_index(["filters", "truth"])
    assert kinds.loc[("paper", "malformed"), "turned_away"] == 1.0
    text = (tmp_path / "findings.md").read_text()
    assert "self_consistency 1.00" in text and "human 1.00" in text
    assert "`paper` turns away 50% of the faults and 0% of the sound samples (most of malformed)" in text
    assert "agrees with the reviewer on 75%" in text and "`open`" not in text
    assert {path.name for path in (tmp_path / "figures").glob("*.svg")} == {"1-roc.svg", "2-frontier.svg"}


def test_without_truth_the_study_of_filters_says_so(tmp_path):
    study = Study.read("filters", grid={"filters": "paper"})
    raw = judged([True], [None]).drop(columns=["fault", "passed"])
    with pytest.raises(UserError, match="no sample's truth is known"):
        filters.analyse(study, tmp_path, {study.cells[0].name: Run(samples=raw)})
