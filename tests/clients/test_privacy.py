"""What leaves a device: ledger, journal and the bytes that a recording endpoint received say the same, item by item."""

from __future__ import annotations

import json
import threading

import pytest

from tests.clients.scripted_cloud import client, cut_mid_body, fails, good
from untether.clients.cloud.client import CloudClient
from untether.clients.cloud.journal import Journal
from untether.clients.cloud.privacy import masking, shown_items
from untether.clients.device.augmentation import answer_request, samples_requests
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.core.records import Interaction
from untether.sim.experiment import Experiment
from untether.sim.experiment.privacy import Privacy
from untether.sim.population.tasks import get_task

pytestmark = pytest.mark.usefixtures("cloud_key")
TASK = get_task("LaMP_4")


def items(count: int = 6) -> list[Interaction]:
    return [Interaction(f"i{k}", "LaMP_4", f"private article {k}.", f"private headline {k}.") for k in range(count)]


EVERY = Privacy(redact=("email", "phone", "handle", "url", "name"), names=("Ada Moss", "Lee"))


@pytest.mark.parametrize(("text", "masked", "count"), [
    ("write to ada.moss+x@mail.example.org!", "write to [email]!", 1),
    ("see https://ada.example.org/me?x=1 or www.moss.example", "see [url] or [url]", 2),
    ("call 202-555-0143 or +49 30 901820 at 12:30", "call [phone] or [phone] at 12:30", 2),
    ("thanks @ada_m and (@lee)", "thanks [handle] and ([handle])", 2),
    ("ADA MOSS met lee, not Leeds", "[name] met [name], not Leeds", 2),
    ("nothing to mask in 1984, at 5 o'clock", "nothing to mask in 1984, at 5 o'clock", 0), ("", "", 0),
])  # fmt: skip
def test_what_is_masked_is_counted(text, masked, count):
    assert masking(EVERY)(text) == (masked, count)
    assert masking(Privacy())(text) == (text, 0)


def test_only_what_is_named_is_masked():
    text, count = masking(Privacy(redact=("handle",)))("@ada at ada@mail.example.org")
    assert (text, count) == ("[handle] at ada@mail.example.org", 1)


def test_what_is_shown_can_be_the_latest_a_random_part_or_what_was_tagged(tmp_path):
    own = items(200)
    assert shown_items(own, Privacy(), 1, "d") == own
    assert shown_items(own, Privacy(share="latest", share_items=3), 1, "d") == own[-3:]
    part = Privacy(share="random", share_part=0.3)
    drawn = shown_items(own, part, 1, "d")
    assert 35 < len(drawn) < 85 and drawn == [item for item in own if item in drawn]
    assert shown_items(own[:100], part, 1, "d") == [item for item in drawn if item in own[:100]]  # once for ever
    assert shown_items(own, part, 1, "e") != drawn
    (tmp_path / "ids").write_text("i3\n\ni5\nunknown\n")
    tagged = Privacy(share="tagged", tagged=str(tmp_path / "ids"))
    assert [item.item_id for item in shown_items(own, tagged, 1, "d")] == ["i3", "i5"]
    with pytest.raises(UserError, match="privacy.tagged"):
        shown_items(own, Privacy(share="tagged", tagged=str(tmp_path / "none")), 1, "d")


@pytest.mark.parametrize("values", [
    {"privacy.redact": "name"}, {"privacy.share": "tagged"}, {"privacy.never": "input,output"},
    {"privacy.never": "input", "arms": "local,collaborative,cloud"}, {"privacy.redact": "everything"},
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(values):
    with pytest.raises(UserError, match="privacy"):
        Experiment.read(None, values)


def orders(privacy: Privacy, own: list[Interaction]):
    shown = shown_items(own, privacy, 0, "d0")
    mask = masking(privacy)
    names = dict(device_id="d0", seed=0, round=0, mask=mask)
    question = answer_request(TASK, shown, "a question for ada@mail.example.org", "q0", request_id="a", **names)
    return [*samples_requests(TASK, shown, 2, request_id="s", **names), question]


@pytest.mark.parametrize("script", [[good], [fails(500), good], [cut_mid_body, fails(429, retry_after="0"), good]])
@pytest.mark.parametrize("privacy", [
    Privacy(), Privacy(share="latest", share_items=2), Privacy(redact=("email",)), Privacy(never=("output",)),
])  # fmt: skip
def test_the_journal_says_what_the_endpoint_received(cloud, tmp_path, script, privacy):
    own = [*items(3), Interaction("i9", "LaMP_4", "write to me@mail.example.org", "private headline 9.")]
    cloud.script = script
    journal = Journal(tmp_path / "sent.jsonl")
    requests = orders(privacy, own)
    asked = CloudClient(client(cloud).config, backoff_s=0.01, journal=journal)
    asked.ask_sync(requests)
    lines = journal.lines()
    assert len(lines) == len(cloud.bodies)
    received = sorted(_item_lines(body) for body in cloud.bodies)
    told = sorted(sum(item["chars"] for item in line["items"]) for line in lines)
    assert told == sorted(sum(len(text) for text in texts) for texts in received)
    for body in cloud.bodies:
        text = json.dumps(body["messages"])
        assert ("me@mail.example.org" in text) == ("email" not in privacy.redact)
        assert ("private headline" in text) == ("output" not in privacy.never)
        assert ("article 0" in text) == (privacy.share == "all")
    masked = sum(item["masked"] for line in lines for item in line["items"])
    assert (masked > 0) == ("email" in privacy.redact)


def _item_lines(body: dict) -> list[str]:
    """The texts of the user in a request, as the endpoint sees them."""
    found = []
    for line in body["messages"][-1]["content"].split("\n"):
        if line.startswith('{"input"') or line.startswith('{"form"'):
            found += [json.loads(line)["input"], json.loads(line).get("output", "")]
    return found


def test_what_was_sent_is_noted_also_where_the_run_stops_in_between(cloud, tmp_path):
    journal = Journal(tmp_path / "sent.jsonl")
    stop = threading.Event()

    def then_stop(handler):
        stop.set()
        handler.server.released.wait(5)

    cloud.script = [good, then_stop]
    asked = CloudClient(client(cloud).config, backoff_s=0.01, journal=journal)
    many = [
        request for k in range(6)
        for request in samples_requests(TASK, items(), 2, request_id=f"s{k}", device_id=f"d{k}", seed=k, round=0)
    ]  # fmt: skip
    with pytest.raises(ResumableStop):
        asked.ask_sync(many, stop=stop)
    noted = {line["request_id"] for line in journal.lines()}
    assert len(cloud.bodies) <= len(noted) <= 6 and all(line["items"] for line in journal.lines())


def test_a_line_that_was_cut_is_left_out(tmp_path):
    journal = Journal(tmp_path / "sent.jsonl")
    for request in orders(Privacy(), items(2)):
        journal.note(request, 0, "host")
    with journal.path.open("a") as file:
        file.write('{"request_id": "s')
    assert [line["request_id"] for line in journal.lines()] == ["s", "a"]
