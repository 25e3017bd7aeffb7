"""What is paid for once: the cache of the cloud's answers."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.clients.scripted_cloud import Settings, client, fails, good, orders, says
from untether.clients.cloud.answer_cache import AnswerCache
from untether.clients.cloud.client import CloudClient
from untether.sim.core.errors import ResumableStop, UserError

pytestmark = pytest.mark.usefixtures("cloud_key")


def test_the_cache_pays_once_and_a_replicate_is_a_new_draw(cloud, tmp_path):
    cache = str(tmp_path / "sub" / "cache.sqlite")
    cloud.script = [says("not json"), good]
    [first] = client(cloud, cache=cache).ask_sync(orders())
    assert not first.cached and len(cloud.bodies) == 2
    [again] = client(cloud, cache=cache).ask_sync(orders())
    assert again.cached and again.ok and again.pairs == first.pairs and len(cloud.bodies) == 2
    same = [(a.draw, a.outcome, a.tokens_in, a.bytes_up, a.bytes_down) for a in first.attempts]
    assert [(a.draw, a.outcome, a.tokens_in, a.bytes_up, a.bytes_down) for a in again.attempts] == same
    for changed in (orders(seed=1), orders(round=1), orders(items=1)):
        client(cloud, cache=cache).ask_sync(changed)
    client(cloud, cache=cache, temperature=0.1).ask_sync(orders())
    client(cloud, cache=cache, model="other").ask_sync(orders())
    assert len(cloud.bodies) == 7


def test_the_cache_knows_the_variant_but_not_the_port(cloud, tmp_path):
    config = Settings(cache=str(tmp_path / "c"))
    CloudClient(config, base_url=cloud.base_url, variant="fp_a").ask_sync(orders())
    [same] = CloudClient(config, base_url="http://127.0.0.1:9/v1", variant="fp_a").ask_sync(orders())
    assert same.cached
    [other] = CloudClient(config, base_url=cloud.base_url, variant="fp_b").ask_sync(orders())
    assert not other.cached


def test_every_answer_is_paid_for_once_and_a_stopped_run_keeps_it(cloud, tmp_path):
    """A refusal and a malformed answer, too; only what the wire broke is asked again."""
    cache = str(tmp_path / "c")
    cloud.script = [good, good, says(None, refusal="no"), fails(500)]
    with pytest.raises(ResumableStop):
        client(cloud, cache=cache, concurrency=1, max_retries=1).ask_sync(orders(5))
    asked = len(cloud.bodies)
    cloud.script = [good]
    replies = client(cloud, cache=cache, concurrency=1).ask_sync(orders(5))
    assert [reply.cached for reply in replies] == [True, True, True, False, False]
    assert [reply.outcome for reply in replies] == ["ok", "ok", "refused", "ok", "ok"]
    assert len(cloud.bodies) == asked + 2


def test_a_run_that_stopped_between_two_draws_goes_on_with_the_next(cloud, tmp_path):
    cache = str(tmp_path / "c")
    cloud.script = [says("not json"), fails(500)]
    with pytest.raises(ResumableStop):
        client(cloud, cache=cache, max_retries=1).ask_sync(orders())
    cloud.script = [says("nor this")]
    [reply] = client(cloud, cache=cache, max_retries=1).ask_sync(orders())
    assert reply.outcome == "malformed" and [(a.draw, a.cached) for a in reply.attempts] == [(0, True), (1, False)]
    asked = len(cloud.bodies)
    [again] = client(cloud, cache=cache, max_retries=1).ask_sync(orders())
    assert again.cached and again.outcome == "malformed" and len(cloud.bodies) == asked
    [more] = client(cloud, cache=cache, max_retries=2).ask_sync(orders())
    assert [(a.draw, a.cached) for a in more.attempts] == [(0, True), (1, True), (2, False)]


def test_a_file_that_is_no_cache_is_refused(cloud, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("these are my notes, and they are longer than a header " * 20)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE mine (x)")
    for path in (text, other, tmp_path):
        with pytest.raises(UserError, match="cloud.cache"):
            client(cloud, cache=str(path)).ask_sync(orders())
    assert text.read_text().startswith("these are my notes") and not cloud.bodies


def test_a_full_disk_stops_resumably(tmp_path):
    cache = AnswerCache(tmp_path / "c")
    cache._database.execute("PRAGMA max_page_count = 4")  # SQLite's own way to be out of room
    with pytest.raises(ResumableStop, match="full"):
        for number in range(100):
            cache.put(f"key-{number}", {"text": "x" * 1000})
    assert len(cache) > 0
    cache.close()


def _fill(path: str, start: int) -> None:
    cache = AnswerCache(path)
    for number in range(start, start + 60):
        cache.put(f"key-{number}", {"by": start})
    cache.close()


def test_several_processes_may_share_a_cache_from_its_first_moment(tmp_path):
    with ProcessPoolExecutor(6, mp_context=get_context("fork")) as pool:
        for attempt in range(8):
            path = str(tmp_path / f"cache-{attempt}")
            list(pool.map(_fill, [path] * 6, [0, 0, 30, 100, 200, 300]))
            cache = AnswerCache(path)
            assert len(cache) == 90 + 3 * 60
            assert cache.several(["nothing", "key-250"]) == [None, {"by": 200}]
            cache.close()
