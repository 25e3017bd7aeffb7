"""What was trained once is not trained again, by whomever; and nothing that matters is left out of the key."""

from __future__ import annotations

import dataclasses
import resource
import signal
from types import SimpleNamespace

import pytest
import torch

from tests.clients import tiny_engine as engine
from untether.clients.engine.jobs import Example, TrainJob
from untether.clients.engine.training import TrainResult, train
from untether.clients.stores import adapter_cache
from untether.clients.stores.adapter_cache import content_key, train_once
from untether.sim.core.errors import ResumableStop
from untether.sim.core.learning import LoraSpec, TrainSettings

BASE = SimpleNamespace(fingerprint="f00", arithmetic="torch.float32")
STATE = {"layer.lora_A.weight": torch.ones(2, 3), "layer.lora_B.weight": torch.zeros(3, 2)}
JOB = TrainJob(
    "d0", [Example([5, 6, 7], [8]), Example([5], [9, 1])], TrainSettings(steps=4, batch_size=2), LoraSpec(2), seed=1,
    init_seed=2, state=STATE,
)  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return engine.tiny_base("llama", torch.float32)[0]


@pytest.fixture
def trained(monkeypatch):
    """The keys of the jobs that were really trained."""
    seen = []

    def spy(base, jobs, **options):
        seen.extend(job.key for job in jobs)
        return train(base, jobs, **options)

    monkeypatch.setattr(adapter_cache, "train", spy)
    return seen


def job(key, data=1, **changes):
    made = TrainJob(key, engine.random_examples(data, 6), TrainSettings(steps=3, batch_size=2), LoraSpec(2), seed=data)
    return dataclasses.replace(made, **changes)


def same(a: TrainResult, b: TrainResult) -> bool:
    return engine.largest_difference(a.state, b.state) == 0 and (a.losses, a.learning_rates, a.tokens_by_step) == (
        b.losses, b.learning_rates, b.tokens_by_step)  # fmt: skip


def changed(**fields):
    return dataclasses.replace(JOB, **fields)


OTHERS = {
    "base": (SimpleNamespace(fingerprint="f01", arithmetic="torch.float32"), JOB),
    "arithmetic": (SimpleNamespace(fingerprint="f00", arithmetic="mixed"), JOB),
    "seed": (BASE, changed(seed=3)),
    "fresh adapter's seed": (BASE, changed(init_seed=3)),
    "fresh adapter's seed derived": (BASE, changed(init_seed=None)),
    "no start": (BASE, changed(state=None)),
    "start's content": (BASE, changed(state={**STATE, "layer.lora_B.weight": torch.full((3, 2), 1e-6)})),
    "a prompt token": (BASE, changed(examples=[Example([5, 6, 8], [8]), JOB.examples[1]])),
    "a target token": (BASE, changed(examples=[Example([5, 6, 7], [9]), JOB.examples[1]])),
    "where the answer begins": (BASE, changed(examples=[Example([5, 6], [7, 8]), JOB.examples[1]])),
    "where an example begins": (BASE, changed(examples=[Example([5, 6, 7], [8, 5]), Example([9], [1])])),
    "the order of examples": (BASE, changed(examples=JOB.examples[::-1])),
    "one example less": (BASE, changed(examples=JOB.examples[:1])),
    **{f"lora {name}": (BASE, changed(spec=dataclasses.replace(JOB.spec, **{name: value}))) for name, value in {
        "rank": 3, "alpha": 8, "dropout": 0.1, "target_modules": ("q_proj",), "use_rslora": True}.items()},
    **{f"training {name}": (BASE, changed(settings=dataclasses.replace(JOB.settings, **{name: value})))
       for name, value in {"learning_rate": 1e-3, "steps": 5, "batch_size": 3, "schedule": "cosine",
                           "warmup_ratio": 0.1, "weight_decay": 0.02, "max_grad_norm": 0.5, "betas": (0.9, 0.99),
                           "eps": 1e-6}.items()},
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_every_ingredient_counts(what):
    assert content_key(*OTHERS[what]) != content_key(BASE, JOB)


def test_every_field_of_shape_and_settings_is_among_the_ingredients():
    for prefix, kind, besides in (("lora ", LoraSpec, set()), ("training ", TrainSettings, {"epochs"})):
        names = {field.name for field in dataclasses.fields(kind)} - besides
        assert names == {name.removeprefix(prefix) for name in OTHERS if name.startswith(prefix)}


def test_what_makes_no_difference_does_not_count():
    key = content_key(BASE, JOB)
    assert key == content_key(BASE, changed(key="another device and arm"))
    by_epochs = dataclasses.replace(JOB.settings, steps=0, epochs=4)  # of one batch: four steps
    assert key == content_key(BASE, changed(settings=by_epochs))
    assert key == "6d705c37d25c397ede7ba52fe5366634371da9aa", "else adapters that were kept are lost"


def test_the_engines_version_counts(monkeypatch):
    before = content_key(BASE, JOB)
    monkeypatch.setattr(adapter_cache, "ENGINE", adapter_cache.ENGINE + 1)
    assert content_key(BASE, JOB) != before


def test_equal_jobs_are_trained_once_in_a_call(base, trained):
    results = train_once(base, [job("a"), job("b", data=2), job("c")])
    assert trained == ["a", "b"] and list(results) == ["a", "b", "c"]
    assert same(results["a"], results["c"]) and not same(results["a"], results["b"])
    with pytest.raises(ValueError, match="same key"):
        train_once(base, [job("a"), job("a", data=2)])


def test_a_later_run_finds_what_an_earlier_one_trained(base, trained, tmp_path):
    first = train_once(base, [job("a"), job("b", data=2)], tmp_path)
    trained.clear()
    again = train_once(base, [job("x", data=2), job("y"), job("z", data=3)], tmp_path)
    assert trained == ["z"]
    assert same(again["x"], first["b"]) and same(again["y"], first["a"]) and again["x"].outcome == "ok"
    assert again["x"].steps == 3 and again["x"].tokens == first["b"].tokens > 0
    plain = train(base, [job("b", data=2)])["b"]
    assert engine.largest_difference(again["x"].state, plain.state) < 1e-5


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"no",
                                    lambda whole: whole[:-9] + b"\x07" + whole[-8:]])  # fmt: skip
def test_a_damaged_file_is_trained_again(base, trained, tmp_path, damage):
    first = train_once(base, [job("a")], tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    trained.clear()
    assert same(train_once(base, [job("a")], tmp_path)["a"], first["a"]) and trained == ["a"]
    assert path.read_bytes() == whole, "and mended"


def test_what_ran_out_of_memory_is_not_kept(base, monkeypatch, tmp_path):
    gone = TrainResult(STATE, outcome="out_of_memory")
    monkeypatch.setattr(adapter_cache, "train", lambda base, jobs, **options: {job.key: gone for job in jobs})
    assert train_once(base, [job("a")], tmp_path)["a"].outcome == "out_of_memory"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_full_disk_is_a_resumable_stop_and_leaves_nothing_half(base, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[0][1]))
    try:
        with pytest.raises(ResumableStop, match="resume the run"):
            train_once(base, [job("a")], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
