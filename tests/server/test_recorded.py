"""A cloud's answers, recorded and replayed: the same answers to the same requests, without the cloud."""

import pytest

from tests.conftest import untether
from untether.clients.cloud.client import CloudClient
from untether.clients.cloud.recording import record
from untether.clients.device.augmentation import answer_request, samples_requests
from untether.server.background import start_background
from untether.server.generator import create
from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction
from untether.sim.experiment import Experiment
from untether.sim.experiment.models.recording import Recording
from untether.sim.population.tasks import get_task

HISTORY = [
    Interaction(f"i{n}", "LaMP_4", f"The council met {n} times. It voted on the bridge. Nobody came.", f"Vote {n}")
    for n in range(6)
]


def orders(seed: int = 1):
    named = {"device_id": "d0", "seed": seed, "round": 0}
    task = get_task("LaMP_4")
    return [
        *samples_requests(task, HISTORY, 6, request_id="r", samples_per_request=3, **named),
        answer_request(task, HISTORY, "A new school opens.", "q0", request_id="a", **named),
    ]


def asked(gateway, requests, cache="", **changes):
    settings = Experiment().cloud.model_copy(update={"max_retries": 0, "cache": str(cache), **changes})
    client = CloudClient(settings, base_url=gateway.base_url, model=gateway.model, api_key="")
    return client.ask_sync(requests)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(what a cloud answered, the answers' cache, the file)."""
    folder = tmp_path_factory.mktemp("recorded")
    with start_background("recombine") as gateway:
        replies = asked(gateway, orders(), folder / "answers.sqlite")
    record(folder / "answers.sqlite", "CC0", "made in a test").write(folder / "answers.jsonl.gz")
    return replies, folder / "answers.sqlite", folder / "answers.jsonl.gz"


def test_the_same_requests_get_the_same_answers_without_the_cloud(recorded):
    replies, _, file = recorded
    with start_background("recorded", {"path": str(file)}) as gateway:
        assert gateway.model == "recombine"
        again = asked(gateway, orders())
        plainly = asked(gateway, orders(), structured=False)  # how JSON was asked for does not matter
    for reply, same, plain in zip(replies, again, plainly, strict=True):
        assert (reply.text, reply.pairs, reply.outcome) == (same.text, same.pairs, same.outcome)
        assert plain.text == reply.text
        assert [a.tokens_in for a in reply.attempts] == [a.tokens_in for a in same.attempts]


def test_what_is_not_recorded_is_an_error_that_says_the_fix_or_another_provider_answers_it(recorded):
    replies, _, file = recorded
    with start_background("recorded", {"path": str(file)}) as gateway:
        with pytest.raises(UserError, match="has no answer to this request, .* cloud.otherwise"):
            asked(gateway, orders(seed=2))
    with start_background("recorded", {"path": str(file), "otherwise": "recombine"}) as gateway:
        assert asked(gateway, orders())[0].text == replies[0].text
        assert all(reply.ok for reply in asked(gateway, orders(seed=2)))


def test_a_recording_says_whose_it_is_and_is_the_same_each_time(recorded, tmp_path):
    _, cache, file = recorded
    found = Recording.read(file)
    assert (found.model, found.licence, found.note, len(found.answers)) == ("recombine", "CC0", "made in a test", 3)
    done = untether("cloud", "record", str(tmp_path / "again.jsonl.gz"), "--cache", str(cache), "--licence", "CC0",
                    "--note", "made in a test")  # fmt: skip
    assert done.returncode == 0 and "wrote 3 answers of recombine" in done.stdout
    assert (tmp_path / "again.jsonl.gz").read_bytes() == file.read_bytes()


def test_what_is_no_recording_is_refused_with_its_place(recorded, tmp_path):
    _, _, file = recorded
    path = tmp_path / "bad.jsonl"
    Recording.read(file).write(path)
    whole = path.read_text().splitlines(keepends=True)
    cases = {"": "line 1: not what", "{}\n": "line 1: not what", "".join(whole[:-1]): "is cut short: 2 of 3 answers",
             whole[0] + "{}\n": "line 2: not what", whole[0].replace(": 1,", ": 9,", 1): "is of format 9"}  # fmt: skip
    for text, says in cases.items():
        path.write_text(text)
        with pytest.raises(UserError, match="bad.jsonl") as refused:
            create("recorded", {"path": str(path)})
        assert says in str(refused.value)
    with pytest.raises(UserError, match="cannot be read"):
        create("recorded", {"path": str(tmp_path / "none.jsonl")})
    with pytest.raises(UserError, match="no such cache of answers"):
        record(tmp_path / "none.sqlite", "CC0")


@pytest.mark.parametrize(("changes", "says"), [
    ({"cloud.provider": "recorded"}, "needs cloud.recording"),
    ({"cloud.recording": "a.jsonl"}, 'recording is for provider = "recorded"'),
    ({"cloud.provider": "recorded", "cloud.recording": "a", "cloud.otherwise": "openai"}, "that the run itself serves"),
    ({"cloud.provider": "recorded", "cloud.recording": "a", "cloud.otherwise": "llama_cpp"}, "needs cloud.model"),
])  # fmt: skip
def test_an_experiment_says_what_is_missing_or_of_no_use(changes, says):
    with pytest.raises(UserError) as refused:
        Experiment.read(None, changes)
    assert says in str(refused.value)
