"""The world's cloud generator: sees the request alone, writes the asked persona, and makes faults at their rates."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from untether.server.generator import GenerationRequest
from untether.server.generator.world import NotOfThisWorld, WorldGenerator, read_truth
from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction
from untether.sim.population.tasks import get_task
from untether.sim.population.world import WORLD_TASKS, World, world_task
from untether.sim.prompts.protocol import Request, build_answer_request, build_samples_request, parse_samples

SOUND = {
    "hallucination_rate": 0.0,
    "off_topic_rate": 0.0,
    "duplicate_rate": 0.0,
    "malformed_rate": 0.0,
    "verbosity": 0.0,
}


def asked(task: str, index: int = 0, count: int = 8) -> Request:
    return Request("samples", task, World(11).user(index, "validation", (task,)).history, count)


def over_the_wire(task: str, count: int, seed: int = 0) -> GenerationRequest:
    user = World(11).user(0, "validation", (task,))
    prompt = build_samples_request(get_task(task), user.of_task(task), count)
    return GenerationRequest(prompt.messages, seed, max_tokens=8192)


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_a_sound_generator_writes_query_shaped_pairs_closer_to_the_user_than_to_others(task):
    generator, world, mine = WorldGenerator(**SOUND), World(11), world_task(task)
    own = other = total = 0
    for index in range(12):
        taste = world.persona(world.user_id(index, "validation"), task).taste
        stranger = world.persona(world.user_id(index + 1, "validation"), task).taste
        pairs = generator.complete(asked(task, index, 10), seed=1)
        assert len({pair[0] for pair in pairs}) == 10
        assert {truth for _, _, truth in pairs} == {"good"}
        for text, output, _ in pairs:
            scene = mine.read(text)
            own += output == mine.answer(scene, taste)
            other += output == mine.answer(scene, stranger)
            total += 1
    assert own > other
    assert own / total > 0.3


def test_the_same_request_gets_the_same_answer_and_another_seed_another():
    generator = WorldGenerator()
    first, again = generator.generate([over_the_wire("LaMP_4", 8), over_the_wire("LaMP_4", 8)])
    assert first == again
    assert generator.generate([over_the_wire("LaMP_4", 8, seed=1)])[0].text != first.text


def test_faults_come_at_their_rates_and_are_what_they_are_called():
    rates = {"hallucination_rate": 0.2, "off_topic_rate": 0.2, "duplicate_rate": 0.2, "malformed_rate": 0.2}
    generator, mine = WorldGenerator(**rates, verbosity=0.5), world_task("LaMP_2")
    request = asked("LaMP_2", count=1000)
    pairs = generator.complete(request, seed=3)
    counts = Counter(truth for _, _, truth in pairs)
    for kind in ("hallucination", "off_topic", "duplicate", "malformed"):
        assert 150 < counts[kind] < 250
    assert 60 < counts["verbose"] < 140
    taste = {o: i for i, o, truth in pairs if truth == "good"}
    assert set(taste) <= set(get_task("LaMP_2").labels)
    shown = {(item.input, item.output) for item in request.items}
    for text, output, truth in pairs:
        if truth == "duplicate":
            assert (text, output) in shown
        if truth == "off_topic":
            assert mine.read(text) is None
        if truth == "malformed":
            assert output not in get_task("LaMP_2").labels or mine.read(text) is None or len(mine.read(text).facts) < 2


def test_truth_stays_here_and_joins_with_what_was_sent(tmp_path):
    path = tmp_path / "truth.jsonl"
    generator = WorldGenerator(truth=str(path), malformed_rate=0.0)
    sent = parse_samples(generator.generate([over_the_wire("LaMP_7", 40)])[0].text)
    truths = read_truth(path)
    assert len(sent.pairs) == 40 and not sent.problems
    assert {truths[("LaMP_7", *pair)] for pair in sent.pairs} > {"good"}
    path.write_text(path.read_text() + '{"task": "LaMP_7", "inp')
    assert read_truth(path) == truths
    assert read_truth(tmp_path / "absent") == {}
    assert set(json.loads(path.read_text().splitlines()[0])) == {"task", "input", "output", "truth"}


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_it_answers_queries_better_than_a_stranger_would(task):
    generator, world, mine = WorldGenerator(**SOUND), World(11), world_task(task)
    cloud = stranger = 0
    for index in range(25):
        user = world.user(index, "validation", (task,))
        taste = world.persona(world.user_id(index + 1, "validation"), task).taste
        for query in user.queries:
            prompt = build_answer_request(get_task(task), user.of_task(task), query.input)
            answer = generator.generate([GenerationRequest(prompt.messages, 0)])[0].text
            cloud += answer == query.gold
            stranger += mine.answer(mine.read(query.input), taste) == query.gold
    assert cloud > stranger


def test_texts_of_another_world_are_refused():
    real = Interaction("a", "LaMP_4", "Stocks fell sharply in early trading.", "Markets tumble")
    with pytest.raises(NotOfThisWorld):
        WorldGenerator().complete(Request("samples", "LaMP_4", (real,), 4), 0)
    with pytest.raises(NotOfThisWorld):
        WorldGenerator().complete(Request("samples", "LaMP_2N", (real,), 4), 0)
    history = World(11).user(0, tasks=("LaMP_4",)).history
    with pytest.raises(NotOfThisWorld):
        WorldGenerator().answer(Request("answer", "LaMP_4", history, 0, "Stocks fell sharply."), 0)


def test_impossible_dials_are_refused():
    with pytest.raises(UserError, match="omniscient"):
        WorldGenerator(knowledge="omniscient")
    with pytest.raises(UserError, match="add up"):
        WorldGenerator(hallucination_rate=0.7, off_topic_rate=0.6)


def test_truth_lies_beside_the_answers_that_runs_share(tmp_path):
    """Two runs with one cache and the same dials: the second, which is answered from it, knows the truth as well."""
    from untether.server.cloud import open_cloud
    from untether.sim.experiment import Experiment
    from untether.sim.run.directory import RunDirectory

    def cloud(name, **changes):
        values = {"cloud.cache": str(tmp_path / "answers.sqlite"), **changes}
        experiment = Experiment.read(None, values)
        return open_cloud(experiment, RunDirectory.create(tmp_path / name, experiment))

    with cloud("first") as first:
        first.truth_path.write_text('{"task": "LaMP_4", "input": "a", "output": "b", "truth": "good"}\n')
    with cloud("second") as second:
        assert second.truth() == {("LaMP_4", "a", "b"): "good"}
    with cloud("other", **{"cloud.hallucination_rate": "0.5"}) as other:
        assert other.truth() == {}, "another cloud, and another truth of equal words"
    with cloud("alone", **{"cloud.cache": ""}) as alone:
        assert alone.truth() == {} and alone.truth_path.parent == (tmp_path / "alone" / "state").resolve()
