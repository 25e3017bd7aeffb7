"""One's own data: JSON lines with a task, commits, chats, PersonaMem, LongLaMP, and downloads from a bad server."""

from __future__ import annotations

import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from untether.sim.core.clock import VirtualClock
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.experiment import Experiment
from untether.sim.population.formats.convert import (
    TYPES,
    from_chat,
    from_git,
    from_personamem,
    git_task,
    hashed,
    write_rows,
)
from untether.sim.population.formats.fetch import fetch, lamp_urls
from untether.sim.population.formats.longlamp import from_longlamp
from untether.sim.population.formats.look import look
from untether.sim.population.order import one_shot_history
from untether.sim.population.source import open_population
from untether.sim.population.tasks import get_task
from untether.sim.terminal.data import data_app

TASK = {"name": "greeting", "instruction": "Greet as this person would: {content}", "max_new_tokens": 12}


def line(user="ann", day=1, said="hi", answer="hello", **more):
    return {"user": user, "time": f"2024-03-{day:02d}", "input": said, "output": answer, **more}


def experiment(path, rows, task=TASK, **population):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Experiment.build(
        {"task": task, "population": {"source": "jsonl", "path": str(path), "users": 1, **population}}, None, "the test"
    )


def test_the_latest_interactions_are_asked_and_the_earlier_ones_are_history(tmp_path):
    rows = [line(day=day, said=f"in {day}", answer=f"out {day}") for day in range(1, 11)]
    given = experiment(tmp_path / "data.jsonl", rows[::-1], queries=3)
    users = open_population(given, 1)
    user = users.user(0)
    assert [query.gold for query in user.queries] == ["out 8", "out 9", "out 10"]
    assert [item.output for item in one_shot_history(user, "greeting")] == [f"out {day}" for day in range(1, 8)]
    assert users.order == "time"
    assert get_task("greeting").prompt("hi") == "Greet as this person would: hi"


def test_a_line_may_say_what_it_is_for(tmp_path):
    rows = [line(day=day, said=f"in {day}", split="history") for day in range(1, 5)]
    rows += [line(day=6, said="asked", answer="so", split="query"), line(user="eve", day=7, split="history")]
    user = open_population(experiment(tmp_path / "data.jsonl", rows), 1).user(0)
    assert [(query.input, query.gold) for query in user.queries] == [("asked", "so")]


def test_seeds_draw_disjoint_users_whatever_the_order_of_the_lines(tmp_path):
    rows = [line(user=f"user {k}", day=day, said=f"{k} {day}") for k in range(9) for day in range(1, 9)]
    drawn = []
    for order in (rows, rows[::-1]):
        given = experiment(tmp_path / "data.jsonl", order, users=4).model_copy(update={"seeds": (5, 6)})
        drawn.append([[open_population(given, seed).user(k).user_id for k in range(4)] for seed in (5, 6)])
    assert drawn[0] == drawn[1]
    assert len({*drawn[0][0], *drawn[0][1]}) == 8
    with pytest.raises(UserError, match="Ask for fewer users or seeds"):
        open_population(given.model_copy(update={"seeds": (5, 6, 7)}), 7).user(0)


def test_labels_are_closed_and_others_are_counted(tmp_path):
    task = {"name": "mood", "kind": "label", "labels": ["good", "bad"], "instruction": "Mood of: {content}"}
    rows = [line(day=day, said=f"day {day}", answer="good" if day % 2 else "bad") for day in range(1, 9)]
    given = experiment(tmp_path / "data.jsonl", [*rows, line(day=9, answer="so so")], task)
    tasks, left_out, users = look(given)
    assert (users, tasks[0].kind, tasks[0].queries) == (1, "classification", 4)
    assert left_out["output is no label of the task"] == 1
    assert (tasks[0].first, tasks[0].last, tasks[0].order) == ("2024-03-01", "2024-03-08", "time")
    assert get_task("mood").primary == "accuracy"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"user": "a", "input": "b"', "line 2: not JSON"),
        ('{"user": "a", "input": "b"}', "line 2: output = None"),
        ('{"user": "a", "input": "b", "output": "c", "tim": 3}', "unknown field `tim`"),
        ('{"user": "a", "input": "b", "output": "c", "time": "yesterday"}', "line 2: time: 'yesterday' is no date"),
        ('{"user": "a", "input": "b", "output": "c", "task": "LaMP_99"}', "unknown task"),
        ('{"user": "a", "input": "b", "output": "c", "split": "dev"}', "must be `history` or `query`"),
        ("[1]", "line 2 is a list"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, row, words):
    given = experiment(tmp_path / "data.jsonl", [line()])
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(UserError) as error:
        open_population(given, 1).user(0)
    assert words in str(error.value) and "data.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"name": "a", "instruction": "no place"}, "must hold {content} once"),
        ({"name": "a", "kind": "label"}, "needs two labels or more"),
        ({"name": "a", "labels": ["x"]}, "Leave them empty"),
        ({"name": "a", "metric": "bleu"}, "unknown metric `bleu`"),
        ({"name": "LaMP_4"}, "another task has that name"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(task, words):
    with pytest.raises(UserError) as error:
        Experiment.build({"task": task}, None, "the test")
    assert words in str(error.value)


# --- what people have ------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repo"
    folder.mkdir()

    def git(*words, **environment):
        subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True,
                       env={"PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(tmp_path), **environment})  # fmt: skip

    git("init", "-q", "-b", "main")
    for number, (who, subject) in enumerate([
        ("Ann@example.org", "feat(api): add a door"), ("bob@example.org", "fix: close the door\u00e9"),
        ("ann@example.org", "Paint it"), ("ann@example.org", "docs!: say how"),
    ]):  # fmt: skip
        (folder / f"file{number}.py").write_text(str(number))
        date = f"2024-01-{number + 1:02d}T10:00:00+00:00"
        git("add", "-A")
        git("commit", "-q", "-m", subject, "-m", "A body, which is not shown.", GIT_AUTHOR_NAME="x",
            GIT_AUTHOR_EMAIL=who, GIT_COMMITTER_NAME="x", GIT_COMMITTER_EMAIL=who, GIT_AUTHOR_DATE=date,
            GIT_COMMITTER_DATE=date)  # fmt: skip
    return folder


def test_commits_become_dated_histories_of_hashed_authors(repository, tmp_path):
    rows = list(from_git(repository))
    assert [row["output"] for row in rows] == [
        "feat(api): add a door", "fix: close the door\u00e9", "Paint it", "docs!: say how",
    ]  # fmt: skip
    assert [row["input"] for row in rows] == [f"file{number}.py" for number in range(4)]
    assert rows[0]["user"] == rows[2]["user"] == hashed("ann@EXAMPLE.org") != rows[1]["user"]
    assert "example.org" not in json.dumps(rows)
    assert rows[1]["time"] == "2024-01-02T10:00:00+00:00" or rows[1]["time"] == "2024-01-02T10:00:00Z"
    assert write_rows(rows, tmp_path / "out.jsonl") == 4


def test_types_of_commits_are_labels_and_the_experiment_that_it_prints_is_one(repository, tmp_path):
    rows = list(from_git(repository, "type"))
    assert [(row["input"], row["output"]) for row in rows] == [
        ("add a door", "feat"), ("close the door\u00e9", "fix"), ("say how", "docs"),
    ]  # fmt: skip
    path = tmp_path / "git.toml"
    path.write_text(git_task("type") + f'[population]\nsource = "jsonl"\npath = "{tmp_path}"\n')
    assert Experiment.read(path).task.labels == TYPES


def test_a_folder_without_history_is_named(tmp_path):
    with pytest.raises(UserError, match="Give a repository's folder"):
        list(from_git(tmp_path))


def test_chats_become_pairs_of_turns(tmp_path):
    chats = [
        {"user": "ann", "created": "2024-05-01", "messages": [
            {"role": "system", "content": "Be nice."}, {"role": "user", "content": "One"},
            {"role": "user", "content": [{"type": "text", "text": "more"}]}, {"role": "assistant", "content": "Two"},
            {"role": "assistant", "content": "unasked"}, {"role": "user", "content": "no answer"},
        ]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]  # fmt: skip
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, chats)))
    rows = list(from_chat(path))
    assert [(row["user"], row["input"], row["output"], row.get("time")) for row in rows] == [
        ("ann", "One\nmore", "Two", "2024-05-01"), ("mine", "a", "b", None),
    ]  # fmt: skip
    path.write_text(json.dumps(chats))
    assert list(from_chat(path)) == rows


def test_personamem_asks_at_the_turn_that_a_question_refers_to(tmp_path):
    talk = [{"role": "system", "content": "persona"}]
    for turn in range(8):
        talk += [{"role": "user", "content": f"I say {turn}"}, {"role": "assistant", "content": f"you hear {turn}"}]
    (tmp_path / "contexts.jsonl").write_text(json.dumps({"abcdef0123": talk}) + "\n")
    (tmp_path / "questions.csv").write_text(
        "persona_id,question_id,user_question_or_message,correct_answer,all_options,shared_context_id,"
        "end_index_in_shared_context\n"
        '7,q1,What do I like?,(b),"[\'(a) tea\', \'(b) coffee\']",abcdef0123,12\n'
    )
    out = tmp_path / "memory.jsonl"
    write_rows(from_personamem(tmp_path / "questions.csv", tmp_path / "contexts.jsonl"), out)
    given = Experiment.build(
        {"task": {"name": "personamem"}, "population": {"source": "jsonl", "path": str(out), "users": 1}}, None, "test"
    )
    user = open_population(given, 1).user(0)
    assert [(query.input, query.gold) for query in user.queries] == [("What do I like?", "coffee")]
    known = one_shot_history(user, "personamem")
    assert [item.output for item in known] == [f"you hear {turn}" for turn in range(5)], "what was said by turn 12"


LONGLAMP = {
    "longlamp_abstract": ("name", {"title": "On {n}", "abstract": "We study {n} at length."}),
    "longlamp_review": ("reviewerId", {"overall": 5.0, "description": "a lamp {n}", "summary": "bright {n}",
                                       "reviewText": "It shines {n}."}),
    "longlamp_topic": ("author", {"summary": "about {n}", "content": "So I went to {n}."}),
}  # fmt: skip


@pytest.mark.parametrize("task", LONGLAMP)
def test_longlamp_is_read_as_the_hub_has_it(task, tmp_path):
    owner, item = LONGLAMP[task]

    def filled(n):
        return {name: value.format(n=n) if isinstance(value, str) else value for name, value in item.items()}

    lines = [
        {owner: f"u{n % 3}", "input": f"Write about {n}", "output": f"Asked {n}",
         "profile": [filled(f"{n % 3}-{place}") for place in range(5)]}
        for n in range(6)
    ]  # fmt: skip
    file, out = tmp_path / "train.parquet", tmp_path / "long.jsonl"
    pq.write_table(pa.Table.from_pylist(lines), file)
    ran = CliRunner().invoke(data_app, ["from-longlamp", str(file), str(out)])
    assert ran.exit_code == 0 and f'name = "{task}"' in ran.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3 * 5 + 6, "a profile that comes twice is told once"
    given = Experiment.build(
        {"task": {"name": task}, "population": {"source": "jsonl", "path": str(out), "users": 3}}, None, "test"
    )
    user = open_population(given, 1).user(0)
    assert {query.gold for query in user.queries} <= {f"Asked {n}" for n in range(6)}
    answer = list(item)[-1]
    assert {known.output for known in user.history} == {filled(f"{user.user_id[1]}-{n}")[answer] for n in range(5)}
    lines[0]["profile"][2].pop(answer)
    (tmp_path / "bad.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(UserError, match=f"bad.jsonl, line 1, profile item 2: no `{answer}`"):
        list(from_longlamp(tmp_path / "bad.jsonl"))


# --- downloads -------------------------------------------------------------------------------------------------------

CONTENT = json.dumps({"task": "LaMP_4", "golds": [{"id": str(k), "output": "x" * 50} for k in range(400)]}).encode()


class Misbehaving(BaseHTTPRequestHandler):
    """A server with a mood by path."""

    asked: list[tuple[str, str | None]] = []

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Range")))
        mood, have = self.path.strip("/"), self.headers.get("Range")
        start = int(have.removeprefix("bytes=").rstrip("-")) if have else 0
        times = sum(path == self.path for path, _ in self.asked)
        if mood == "page":
            return self.answer(200, b"<html>no such file</html>", "text/html")
        if mood == "gone":
            return self.answer(404, b"", "text/plain")
        if mood == "busy" and times < 3:
            return self.answer(503, b"", "text/plain")
        if mood == "garbage":
            return self.answer(200, b'{"task": "LaMP_4", "golds": [', "application/json")
        if mood == "breaks" and times < 4:
            body = CONTENT[start : start + 7000]
            return self.answer(206 if have else 200, body, "application/json", len(CONTENT) - start)
        if mood == "forgets" and times == 1:
            return self.answer(200, CONTENT[:5000], "application/json", len(CONTENT))
        if mood == "forgets":  # it knows no ranges, and sends all of it again
            return self.answer(200, CONTENT, "application/json")
        if mood == "down":
            return self.answer(500, b"", "text/plain")
        return self.answer(206 if have else 200, CONTENT[start:], "application/json")

    def answer(self, status, body, kind, length=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def site():
    Misbehaving.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("mood", ["fine", "busy", "breaks", "forgets"])
def test_a_file_arrives_whole_whatever_the_server_does(site, tmp_path, mood):
    fetch(f"{site}/{mood}", tmp_path / "file.json", VirtualClock())
    assert (tmp_path / "file.json").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
    if mood == "breaks":
        assert [have for _, have in Misbehaving.asked] == [None, "bytes=7000-", "bytes=14000-", "bytes=21000-"][
            : len(Misbehaving.asked)
        ]


@pytest.mark.parametrize(
    ("mood", "words"), [("page", "answers with a page"), ("gone", "answers 404"), ("garbage", "is no JSON")]
)
def test_what_is_no_data_is_refused_and_leaves_no_file(site, tmp_path, mood, words):
    with pytest.raises(UserError, match=words):
        fetch(f"{site}/{mood}", tmp_path / "file.json", VirtualClock())
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_stays_down_stops_resumably(site, tmp_path):
    with pytest.raises(ResumableStop, match="goes on where it stopped"):
        fetch(f"{site}/down", tmp_path / "file.json", VirtualClock())


def test_the_addresses_are_the_official_ones():
    found = lamp_urls("4", "dev")
    assert found["dev_outputs.json"] == "https://ciir.cs.umass.edu/downloads/LaMP/LaMP_4/dev/dev_outputs.json"
    assert lamp_urls("2", "dev")["dev_questions.json"].endswith("/LaMP_2/new/dev/dev_questions.json")
    assert "/time/LaMP_3/" in lamp_urls("3", "train", time=True)["train_questions.json"]
    assert list(lamp_urls("7", "test")) == ["test_questions.json"]
    with pytest.raises(UserError, match="must be one of"):
        lamp_urls("9", "dev")
