"""From files to optimizer: what adapters are trained on, and prompts show, holds nothing that is scored or late."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fleet import run_in_process, tiny

from tests.sim.population.lamp_files import write
from untether.clients.device import answering, learn
from untether.clients.device.sharing import disjoint
from untether.clients.device.worker import Endpoint
from untether.server.background import start_background
from untether.sim.population.others import NOT_OLDER, SCORED
from untether.sim.population.source import open_population
from untether.sim.report.finish import finish
from untether.sim.run.usage import Usage

ARMS = "shared,rag,local,placebo,collaborative,cloud"
PEOPLE = [f"author{n}" for n in range(6)]


def abstract(name: str, number: object) -> str:
    return f"We look at topic {number} of {name} and find that it is worth another look."


def paper(name: str, number: object, **more: str) -> dict:
    title = f"Another look at topic {number} of {name}"
    return {"id": f"{name}-{number}", "abstract": abstract(name, number), "title": title} | more


def question(name: str, profile: list[dict], **more: str) -> dict:
    before = "Generate a title for the following abstract of a paper: "
    return {"id": f"q-{name}", "user_id": name, "input": before + abstract(name, "asked"), "profile": profile} | more


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory):
    """Runs an experiment on files and gives back what every adapter was trained on and every prompt of a device."""
    with start_background("recombine", {}) as gateway, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")

        def run(path, arms=ARMS, **changes):
            learned, prompts = [], []
            for where in (disjoint, learn):
                original = where.train_once

                def spy(base, jobs, *rest, original=original, where=where, **options):
                    for job in jobs:
                        arm, device = ("shared", None) if where is disjoint else (job.key.arm, job.key.device)
                        told = [base.tokenizer.decode([*e.prompt_ids, *e.target_ids]) for e in job.examples]
                        learned.append((arm, device, " ".join(told)))
                    return original(base, jobs, *rest, **options)

                patch.setattr(where, "train_once", spy)
            encode = answering.encode_prompt
            patch.setattr(answering, "encode_prompt", lambda t, text: (prompts.append(text), encode(t, text))[1])
            experiment = tiny(
                arms=arms, population__source="lamp", population__path=path, population__users=3,
                population__shared_users=3, population__tasks="", training__steps=1, cloud__provider="recombine",
                **changes,
            )  # fmt: skip
            out = tmp_path_factory.mktemp("run") / "run"
            done = run_in_process(out, experiment, Endpoint(gateway.base_url, gateway.model, gateway.fingerprint))
            with Usage() as usage:
                finish(done, {}, {"provider": "recombine", "wrote_by_language_model": False}, usage)
            patch.undo()
            patch.setenv("HF_HUB_OFFLINE", "1")
            return SimpleNamespace(
                learned=learned, prompts=prompts, context=done.read_json("summary.json")["facts"]["context"],
                exclusions=done.read_json("summary.json")["facts"]["exclusions"],
                population=open_population(experiment, 1), report=(out / "report.html").read_text(),
                ledger=done.read("ledger"), predictions=done.read("predictions"),
            )  # fmt: skip

        yield run


def test_co_authors_do_not_hand_over_what_is_scored(trained_on, tmp_path):
    """Undated: everybody's profile holds everybody's scored paper, in other spelling."""
    shouted = [paper(name, "asked", title=paper(name, "asked")["title"].upper() + "!") for name in PEOPLE]
    quoting = [
        paper(name, "reply", abstract=f"This answers: {paper(other, 'asked')['title']}.")
        for name, other in zip(PEOPLE, PEOPLE[1:] + PEOPLE[:1], strict=True)
    ]
    asked = [
        question(name, [paper(name, n) for n in range(3)] + shouted + [quoting[place]])
        for place, name in enumerate(PEOPLE)
    ]
    golds = {f"q-{name}": paper(name, "asked")["title"] for name in PEOPLE}
    ran = trained_on(write(tmp_path / "LaMP_5", asked, golds))
    users = [ran.population.user(index) for index in range(3)]
    scored = {user.user_id: f"topic asked of {user.user_id}" for user in users}
    assert {arm for arm, _, _ in ran.learned} == {"shared", "local", "placebo", "collaborative"}
    for arm, device, told in ran.learned:
        wrong = scored.values() if arm == "shared" else [scored[users[device].user_id]]
        assert not [text for text in wrong if text in told.lower()], (arm, device)
        assert "topic 1 of" in told
    [shared] = [told for arm, _, told in ran.learned if arm == "shared"]
    own = {user.user_id for user in ran.population.shared_users()}
    assert all(f"topic 2 of {name}" in shared for name in own) and not own & scored.keys()
    for user in users:  # nor does retrieval: a question's prompt never holds its title
        asking, title = abstract(user.user_id, "asked"), paper(user.user_id, "asked")["title"].lower()
        mine = [prompt for prompt in ran.prompts if asking in prompt]
        assert mine and not [prompt for prompt in mine if title in prompt.lower()]
    quotes = sum(quoting[PEOPLE.index(name)]["abstract"].split(" of ")[-1].strip(".") in scored for name in own)
    assert ran.exclusions[SCORED] == 3 * 3 + quotes
    assert SCORED in ran.report


def test_a_perfect_cloud_is_made_of_the_users_own_older_items(trained_on, tmp_path):
    subjects = ("rivers", "glaciers", "harbours", "orchards", "deserts", "islands", "volcanoes", "meadows", "caves")
    own = {
        name: [paper(name, n, abstract=f"{name} on {subjects[n]}: where {subjects[n - 1]} begin.") for n in range(9)]
        for name in PEOPLE
    }
    asked = [question(name, [*own[name], paper(name, "asked")]) for name in PEOPLE]
    golds = {f"q-{name}": paper(name, "asked")["title"] for name in PEOPLE}
    data = write(tmp_path / "LaMP_5", asked, golds)
    ran = trained_on(data, arms="local,collaborative,oracle", population__max_history=3)
    by_arm = {(arm, device): told for arm, device, told in ran.learned}
    for device in range(3):
        name = ran.population.user(device).user_id
        local, oracle = by_arm["local", device], by_arm["oracle", device]
        assert all(f"topic {n} of {name}" in oracle for n in (6, 7, 8)) and "topic 5 of" not in local
        older = [n for n in range(6) if f"topic {n} of {name}" in oracle]
        assert older, "samples were accepted"
        assert "topic asked of" not in oracle and not [n for n in PEOPLE if n != name and f" of {n}" in oracle]


def test_what_does_not_fit_into_the_model_is_counted_and_said(trained_on, tmp_path):
    """Every user's question, and one item of three, are longer than the base model's context."""
    own = {name: [paper(name, n, abstract=f"Paper {n} by {name}.") for n in range(3)] for name in PEOPLE}
    asked = [question(name, own[name]) for name in PEOPLE]
    for one in asked:
        one["input"] += " and yet another remark," * 400
        one["profile"][1]["abstract"] += " or a thought that is further from it," * 250
    data = write(tmp_path / "LaMP_5", asked, {f"q-{name}": paper(name, "asked")["title"] for name in PEOPLE})
    ran = trained_on(data, arms="frozen,local", hardware__profiles="macbook-air-m2")
    assert ran.context == {"examples_cut": 3, "prompts_cut": 3 * 2}
    assert "3 training examples and 6 prompts did not fit" in ran.report


def test_a_year_that_may_be_later_trains_nobody(trained_on, tmp_path):
    """Headlines are asked in June 2018; papers of 2018, known by their year alone, may be of December."""
    news, papers = [], []
    for name in PEOPLE:
        told = [
            {"id": f"{name}-{day}", "text": f"news of {day} of {name}", "title": f"headline of {day}", "date": day}
            for day in ("2018-05-01", "2018-05-02", "2018-05-03")
        ]
        news.append({
            "id": f"n-{name}", "user_id": name, "date": "2018-06-10", "profile": told,
            "input": f"Generate a headline for the following article: news now of {name}",
        })  # fmt: skip
        dates = ("2016", "2017", "2018", "2018-06")
        years = [paper(name, f"{date}th{n}", date=date) for date in dates for n in (1, 2)]
        papers.append(question(name, years, date="2019-02-01"))
    write(tmp_path / "LaMP_4", news)
    write(tmp_path / "LaMP_5", papers)
    ran = trained_on(tmp_path)
    for arm, device, told in ran.learned:
        assert "2018th" not in told and "2018-06th" not in told, (arm, device)
    assert sum("2017th1" in told for _, _, told in ran.learned) == 1 + 3 * 3  # shared's papers, each device's arms
    assert not [prompt for prompt in ran.prompts if "topic 2018" in prompt]
    late = {item["id"] for asked in papers for item in asked["profile"] if item["date"].startswith("2018")}
    assert len(ran.ledger) and not late & set(ran.ledger["item_id"])
    until = ran.predictions[ran.predictions["data_until_s"].notna()]
    assert len(until) and (until["data_until_s"] < until["query_time_s"]).all()
    assert NOT_OLDER not in ran.exclusions  # the others, too, are asked in June
