"""What one place writes and another reads means the same to both: columns followed from where a number arises (the
engine, the wire) through the tables of a real run to the summary and the report.
"""

import json
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request, urlopen

import pytest
from fleet import make_worker, run_in_process, tiny

import untether.clients.device.learn
from untether.clients.device.arms import training_pairs
from untether.clients.device.augmentation import questions, sample_orders
from untether.clients.device.device import Device
from untether.clients.device.materials import Materials
from untether.clients.device.worker import Endpoint
from untether.clients.hosting.store import DeviceStore
from untether.server.background import start_background
from untether.sim.evaluation.statistics import summarize
from untether.sim.population.source import open_population
from untether.sim.prompts.protocol import parse_request
from untether.sim.report.fleet import FleetSummary
from untether.sim.report.funnel import Funnel
from untether.sim.rounds.messages import Learn, Order, Samples
from untether.sim.rounds.planner import Rounds
from untether.sim.run.directory import RunDirectory

HARD = {
    "network__kind": "onoff", "network__availability": 0.5, "network__mean_down_s": 60, "network__uplink_mbps": 0.001,
    "network__downlink_mbps": 0.002, "cloud__timeout_s": 60, "cloud__capacity__concurrency": 1,
    "cloud__capacity__output_tokens_per_s": 20, "cloud__capacity__retries": 2, "cloud__capacity__price_in": 1.0,
    "cloud__capacity__price_out": 2.0, "cloud__capacity__budget": 1.0,
}  # fmt: skip


class Recorder(BaseHTTPRequestHandler):
    """Passes requests on to the gateway and keeps their bodies. Every third order of samples is answered with nonsense
    at first.
    """

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.bodies.append(body)
        passed = Request(self.server.to + self.path, body, {"content-type": "application/json"})
        with urlopen(passed, timeout=60) as reply:
            content = reply.read()
        known = [json.loads(sent)["messages"] for sent in self.server.bodies]
        if b"Write " in body and sum(body) % 3 == 0 and known.count(json.loads(body)["messages"]) == 1:
            answer = json.loads(content)
            answer["choices"][0]["message"]["content"] = "Sure!"
            content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(run of an undisturbed fleet, run of a hard one; of the first: bodies that it sent, results of the engine)."""
    folder = tmp_path_factory.mktemp("columns")
    engine, real_train = [], untether.clients.device.learn.train_once

    def train_once(base, jobs, *arguments, **options):
        found = real_train(base, jobs, *arguments, **options)
        engine.extend((key.arm, result) for key, result in found.items())
        return found

    with start_background("world", {}) as gateway, pytest.MonkeyPatch.context() as patch:
        recorder = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
        recorder.bodies, recorder.to = [], gateway.base_url.removesuffix("/v1")
        threading.Thread(target=recorder.serve_forever, daemon=True).start()
        patch.setattr(untether.clients.device.learn, "train_once", train_once)
        url = f"http://127.0.0.1:{recorder.server_address[1]}/v1"
        endpoint = Endpoint(url, gateway.model, gateway.fingerprint)
        common = {"population__users": 4, "rounds": 2, "training__steps": 3, "training__batch_size": 2}
        warm = make_worker(RunDirectory.create(folder / "warm", tiny()), endpoint)
        free = run_in_process(folder / "free", tiny(**common), endpoint, hosts=2, worker=warm)
        bodies, trained = list(recorder.bodies), list(engine)
        states, real_state = [], Rounds.state
        patch.setattr(Rounds, "state", lambda self: states.append(found := real_state(self)) or found)
        hard = run_in_process(folder / "hard", tiny(**{**common, **HARD, "rounds": 3}), endpoint, hosts=2, worker=warm)
        hard.states = json.loads(json.dumps(states))
        yield free, hard, bodies, trained
        recorder.shutdown()


def requests_of(run):
    """Every request that the devices of a run could make, by name."""
    experiment, found = run.experiment, {}
    population = open_population(experiment, 1)
    for round in range(experiment.rounds):
        for index in range(experiment.population.users):
            device, order = Device(index, population.user(index)), Order(seed=1, round=round)
            own = [*sample_orders(experiment, order, device), *(r for r, _ in questions(experiment, order, device))]
            found |= {request.request_id: request for request in own}
    return found


def test_steps_and_tokens_are_those_of_the_engine(runs):
    """Table by step, event by adapter, summary by device: of steps that differ."""
    run, _, _, trained = runs
    steps, tokens = Counter(), Counter()
    for arm, result in trained:
        steps[arm] += result.steps
        tokens[arm] += result.tokens
        assert len(set(result.tokens_by_step)) > 1, "equal steps would hide a running sum"
    table = run.read("training")
    assert table.groupby("arm")["tokens"].sum().to_dict() == tokens
    assert table.groupby("arm").size().to_dict() == steps
    events = run.read("events")
    assert events.groupby("arm")["tokens_in"].sum()[list(tokens)].to_dict() == tokens
    rows = summarize(run.read("predictions"), events, resamples=20)
    for arm in tokens:
        (own,) = {(row["steps"], row["tokens"]) for row in rows if row["arm"] == arm}
        assert own == (steps[arm] / 4, tokens[arm] / 4)


def test_bytes_are_those_on_the_wire(runs):
    run, _, bodies, _ = runs
    asked = run.read("events").dropna(subset=["request_id"])
    assert asked["bytes_up"].sum() == sum(map(len, bodies))
    by_request = asked.groupby("request_id")["bytes_up"].sum()
    on_wire = Counter()
    for body in bodies:
        on_wire[json.dumps(json.loads(body)["messages"], sort_keys=True)] += len(body)
    names = defaultdict(list)
    for name, request in requests_of(run).items():
        names[json.dumps(list(request.messages), sort_keys=True)].append(name)
    assert set(names) == set(on_wire)
    for messages, alike in names.items():
        assert by_request[alike].sum() == on_wire[messages]
    fleet = FleetSummary(run.read("events"), run.read("ledger"), run.read("predictions"))
    assert fleet.bytes_up == sum(map(len, bodies))


def test_the_ledger_is_what_the_wire_carried(runs):
    """Item by item: what each body shows of a user, the malformed answers' second uploads included."""
    run, _, bodies, _ = runs
    carried = Counter()
    for body in bodies:
        request = parse_request(json.loads(body)["messages"])
        for item in request.items:
            carried[request.task, item.input, item.output] += len(item.input) + len(item.output)
        if request.query:
            carried[request.task, request.query] += len(request.query)
    users = [open_population(run.experiment, 1).user(index) for index in range(4)]
    texts = {item.item_id: (item.task, item.input, item.output) for user in users for item in user.history}
    texts |= {query.query_id: (query.task, query.input) for user in users for query in user.queries}
    told = Counter()
    ledger = run.read("ledger")
    for row in ledger.itertuples():
        told[texts[row.item_id]] += row.chars
    assert told == carried and len(told) > 20
    assert set(ledger["kind"]) == {"history", "question"}
    assert all((row.kind == "question") == (len(texts[row.item_id]) == 2) for row in ledger.itertuples())
    copies = run.read("events").groupby("request_id")["attempt"].count()
    assert copies.max() == 1 and len(bodies) > len(copies), "some answers were drawn again within an attempt"


def test_the_ledger_follows_the_attempts(runs):
    """Each that sent anything, when it did: whole, or cut where the link broke; nothing else."""
    _, run, _, _ = runs
    events = run.read("events").dropna(subset=["request_id"])
    sent = events[events["bytes_up"] > 0].set_index(["request_id", "attempt"])
    ledger = run.read("ledger")
    asked, whole, cut = requests_of(run), 0, 0
    by_attempt = {key: rows for key, rows in ledger.groupby(["request_id", "attempt"])}
    assert set(by_attempt) <= set(sent.index)
    for key, event in sent.iterrows():
        rows = by_attempt.get(key)
        uploaded = {item.item_id: item.chars for item in asked[key[0]].uploaded}
        if event["tokens_in"] or event["bytes_down"]:  # it reached the cloud
            assert len(rows) == len(uploaded)
            assert all(row.chars % uploaded[row.item_id] == 0 and row.chars for row in rows.itertuples())
            whole += 1
        elif rows is not None:
            cut += any(row.chars % uploaded[row.item_id] for row in rows.itertuples())
        if rows is not None:
            assert set(rows["time_s"]) == {event["time_s"]} and set(rows["device_id"]) == {event["device_id"]}
    assert whole > 5 and cut > 2 and (ledger["attempt"] > 0).any()
    assert len(ledger) > len(ledger.drop_duplicates(["request_id", "item_id"])), "a retry uploads again"


def test_what_a_device_spent_is_what_its_attempts_cost(runs):
    """Of the budget; what was asked for in vain included."""
    _, run, _, _ = runs
    events = run.read("events").dropna(subset=["request_id"])
    left = events[events["detail"].str.contains("while the cloud wrote")]
    assert (left["tokens_in"] > 0).any() and (left["tokens_out"] > 0).any()
    events = events[events["round"] < 2]
    carried = run.states[1]["timeline"]["spent"]
    for lane, kind in (("augment", "augment"), ("cloud", "answer")):
        own = events[events["kind"] == kind]
        costs = (own["tokens_in"] * 1.0 + own["tokens_out"] * 2.0).groupby(own["device_id"]).sum() / 1e6
        spent = {f"d{int(device):05d}": amount for device, amount in carried.get(lane, {}).items()}
        assert spent == pytest.approx({device: cost for device, cost in costs.items() if cost})


def test_samples_are_counted_alike(runs):
    """In the table, the funnel, and what was trained on."""
    _, run, _, _ = runs
    samples, events = run.read("samples"), run.read("events")
    arrived = set(events[(events["kind"] == "augment") & (events["outcome"] == "ok")]["request_id"])
    assert set(samples.loc[samples["verdict"] != "not_received", "request_id"]) <= arrived
    assert not set(samples.loc[samples["verdict"] == "not_received", "request_id"]) & arrived
    funnel = Funnel(samples, run.read("predictions"), run.experiment)
    accepted = samples[samples["verdict"] == "accepted"]
    for task in funnel.tasks:
        assert funnel.count(task, "accepted") == (accepted["task"] == task).sum()
        assert funnel.received(task) == samples["request_id"][samples["task"] == task].isin(arrived).sum()


def test_a_placebo_is_one_other_user(runs):
    """The next one that asked; a second one only fills up tasks of which that one has too little, and is counted."""
    run, _, _, _ = runs
    samples = run.read("samples")
    samples = samples[(samples["round"] == 0) & (samples["verdict"] == "accepted")]
    owner = samples.set_index("sample_id")["device_id"]
    has = samples.groupby(["device_id", "task"]).size()
    mine = (0, 1, 2, 3)
    parts = run.named(path for path in run.path.rglob("round-0/samples/*.parquet"))
    trains = tuple(Samples(device, 0, 0, "samples") for device in mine)
    order = Learn(seed=1, round=0, devices=mine, due=mine, trains=trains, samples=parts)
    inputs = DeviceStore(run, order).inputs(order)
    materials, drawn, of_second = Materials(run.experiment, order, inputs), 0, 0
    population = open_population(run.experiment, 1)
    for device in (Device(index, population.user(index)) for index in mine):
        first, second = (f"d{(device.index + step) % 4:05d}" for step in (1, 2))
        material = materials.of(device, "samples")
        assert {owner[sample.sample_id] for sample in material.foreign} <= {first, second}
        extra = [sample for sample in material.foreign if owner[sample.sample_id] == second]
        for sample in extra:
            assert has.get((first, sample.task), 0) < has[device.device_id, sample.task]
        assert material.of_second == len(extra)
        pairs = training_pairs("placebo", material, 1, device.device_id, 0)
        drawn, of_second = drawn + len(pairs) - len(material.real), of_second + len(extra)
    counted = run.committed(1, 0)["facts"]["totals"]
    assert counted["placebo_samples"] == drawn > 20 and counted["placebo_samples_of_second"] == of_second
    assert counted["placebos"] == 4
