"""Studies that really run: one runtime for all cells, a stop and a resumption, and nothing trained twice."""

from __future__ import annotations

import dataclasses

import fleet
import pytest
from fleet import answers, losses, make_post, metrics, run_in_process, tiny
from pandas.testing import assert_frame_equal
from survival import Untether, wait_for

from untether.clients.device import answering
from untether.clients.device.worker import Endpoint, Models
from untether.clients.engine.generation import generate
from untether.clients.engine.training import train
from untether.clients.filters.embedding import Encoder
from untether.clients.hosting.process import WorkerProcess
from untether.clients.stores import adapter_cache
from untether.server.background import start_background
from untether.sim.run.directory import RunDirectory

TEXT = """
name = "toy"
question = "Does it?"
[base]
arms = ["local_matched", "placebo", "collaborative"]
population = {users = 2, tasks = ["LaMP_3"], queries = 2}
training.steps = 2
engine = {workers = 1, threads = 1}
evaluation.resamples = 100
[grid]
"model.base" = ["embedded", "no/such-model"]
"cloud.samples" = [4, 6]
"""


@pytest.mark.timeout(1200)
def test_one_worker_serves_all_cells_a_stopped_study_goes_on_and_a_cell_that_fails_is_named(tmp_path):
    (tmp_path / "toy.toml").write_text(TEXT)
    out = tmp_path / "out"
    cells = [out / "cells" / f"base={base},samples={n}" for base in ("embedded", "no_such-model") for n in (4, 6)]
    finished = [cell / "state" / "finished.json" for cell in cells]
    pids: list[set[int]] = [set(), set()]

    def second_has_begun():
        seen = {process.pid for process in study.workers()}
        pids[finished[0].exists()] |= seen
        return finished[0].exists() and seen and list((cells[1] / "state" / "parts").rglob("*.parquet"))

    with Untether(str(tmp_path / "toy.toml"), "--out", str(out), command="study") as study:
        wait_for(second_has_begun, study)
        study.interrupt()
        code, said = study.end()
        assert code == 1 and "stopped: " in said and "untether study" in said
        assert study.orphans() == []
    assert len(pids[0] | pids[1]) == 1 and pids[0] == pids[1], "the worker of the first cell serves the second"
    assert not finished[1].exists()
    first = (cells[0] / "summary.json").stat().st_mtime_ns

    with Untether(str(tmp_path / "toy.toml"), "--out", str(out), command="study") as study:
        code, said = study.end()
    assert code == 2 and "error: base=no_such-model,samples=4: " in said and "Traceback" not in said
    assert "cell 2 of 4: base=embedded,samples=6" in said and "cell 1 of 4" not in said
    assert (cells[0] / "summary.json").stat().st_mtime_ns == first
    assert [path.exists() for path in finished] == [True, True, False, False]

    second = RunDirectory.open(cells[1])
    assert second.read_json("environment.json")["commit"] is not None
    assert second.read("samples")["truth"].notna().all(), "answers from the cache keep their truth"


def test_a_cell_like_another_trains_embeds_and_decodes_nothing(tmp_path, monkeypatch):
    trained, embedded, decoded = [], [], []
    small = {"rounds": 2, "population__users": 2, "engine__cache": tmp_path / "kept"}
    monkeypatch.setattr(fleet, "MODELS", Models())
    forward = Encoder._forward

    def spy(base, jobs, **options):
        trained.extend(job.key for job in jobs)
        return train(base, jobs, **options)

    monkeypatch.setattr(adapter_cache, "train", spy)
    monkeypatch.setattr(Encoder, "_forward", lambda self, texts: embedded.extend(filter(None, texts)) or
                        forward(self, texts))  # fmt: skip
    monkeypatch.setattr(answering, "generate", lambda base, stack, rows, **options: decoded.extend(rows) or
                        generate(base, stack, rows, **options))  # fmt: skip
    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        first = run_in_process(tmp_path / "first", tiny(**small), endpoint)
        assert len(trained) == 3 * 2 * 2 and len(embedded) > 20, "arms, devices, rounds"
        assert len(decoded) > 6
        trained.clear(), embedded.clear(), decoded.clear()
        other = tiny(**small, evaluation__margin=0.1)
        second = run_in_process(tmp_path / "second", other, endpoint)
        assert trained == embedded == decoded == []
        short = tiny(**small, generation__max_new_tokens=2)
        third = run_in_process(tmp_path / "third", short, endpoint)
        assert trained == embedded == [] and len(decoded) > 6, "an answer of two tokens is another answer"
    for table in (answers, metrics, losses):
        assert_frame_equal(table(second), table(first), check_exact=True)
    assert (answers(third)["prediction"] != answers(first)["prediction"]).any()


@pytest.mark.parametrize("dtype, base, encoder", [("auto", "torch.float32", "float32"), ("mixed", "mixed", "bfloat16")])
def test_a_run_computes_in_what_was_asked_for_and_says_so(tmp_path, dtype, base, encoder):
    small = {"population__users": 1, "arms": "collaborative", "engine__device": "cpu", "model__dtype": dtype}
    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        run = run_in_process(tmp_path / "run", tiny(**small), endpoint)
    models = run.committed(run.experiment.seeds[0], 0)["facts"]["models"]
    said = {name.split()[0]: words.split()[-1] for name, words in models.items()}
    assert (said["base"], said["encoder"]) == (base, encoder)


def test_models_stay_until_another_is_asked_for(tmp_path, monkeypatch):
    loaded = []
    load = "untether.clients.engine.base.FrozenBase.load"
    monkeypatch.setattr(load, lambda *words, **given: loaded.append(words) or object())
    process, posts = WorkerProcess(), []
    for number, dtype in enumerate(["float32", "float32", "bfloat16"]):
        run = RunDirectory.create(tmp_path / str(number), tiny(model__dtype=dtype))
        posts.append(make_post(run))
    bases = [process.at(post).base for post in posts]
    assert bases[0] is bases[1] and bases[1] is not bases[2]
    assert process.at(posts[2]).base is bases[2] and len(loaded) == 2
    assert process.at(posts[2]) is not process.at(dataclasses.replace(posts[2], threads=2)), "another post"
    assert Models().base("embedded", "float32", "cpu") is not bases[0]
