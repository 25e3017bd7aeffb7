"""What an experiment will take before it runs: requests, tokens, answers, minutes on this machine, disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from untether.sim.core.learning import TrainSettings
from untether.sim.core.records import Interaction, User
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import ARMS, CLOUD, METHOD, SHARED, records, trained
from untether.sim.launch.progress import duration
from untether.sim.launch.speed import LANGUAGE_MODELS, Speed, speed_of
from untether.sim.launch.time_left import NAMES, STEPS, Guess, Step
from untether.sim.population.order import known_history
from untether.sim.population.source import Population, open_population
from untether.sim.population.tasks import get_task
from untether.sim.prompts.protocol import CHARS_PER_TOKEN, estimate_tokens

LOOKED_AT = 16
"""Users whose histories are read for it."""

ACCEPTED = 0.75
"""The share of samples that filters are taken to keep."""

ASKING, FILTERING = ("fetch", "requests"), ("fetch", "samples")
VIRTUAL_S: Mapping[Step, float] = {
    ("plan", "devices"): 4e-5, ("deliver", "devices"): 4e-5, ("schedule", "devices"): 10e-5,
}  # fmt: skip
"""Seconds of a device's day in virtual time, with one request and two adapters, on Zen 5: one process does it."""

DEVICE_BYTES, REQUEST_BYTES, TRAINED_BYTES = 800.0, 1700.0, 700.0
"""A device's day in virtual time, in memory, about: and each request and adapter of it. `MUCH` is told."""
MUCH = 1e9

ROW_BYTES = 400
"""A row of the tables, about."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run is expected to take, in all.

    Args:
        rounds: Rounds of all seeds.
        work: Units of each step in a round of one seed; of `share`, a seed.
        seeds: How many.
        cloud_tokens: Prompt and output tokens of all requests.
        price: What they cost by `cloud.capacity`'s prices; 0 where none are given.
        seconds: By step and, beside them, for setting up and reporting; all workers together.
        disk_bytes: Of the finished run directory.
        measured: Whether the speed is this machine's, or a default.
        day_bytes: Memory of a round of the whole fleet in virtual time, in one process.
    """

    rounds: int
    seeds: int
    work: Mapping[Step, float]
    cloud_tokens: tuple[float, float]
    price: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    disk_bytes: float = 0.0
    measured: bool = False
    day_bytes: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds from the start to the report."""
        return sum(self.seconds.values())

    def total(self, *steps: Step) -> float:
        """Units of steps in the whole run."""
        return sum(self.work.get(step, 0.0) * (self.seeds if step[0] == "share" else self.rounds) for step in steps)

    def lines(self) -> list[tuple[str, str]]:
        """Returns what a person is told: (what, how much)."""
        read, written = self.cloud_tokens
        price = f", price {self.price:.2f}" if self.price else ""
        by = "as measured on this machine" if self.measured else "by the speed of another machine"
        return [
            ("requests", f"{_round(self.total(ASKING))} to the cloud, about {_round(read)} tokens in and "
             f"{_round(written)} out{price}"),
            ("samples", f"{_round(self.total(FILTERING))} to filter"),
            ("training", f"{_round(self.total(('learn', 'tokens'), ('share', 'tokens')))} tokens"),
            ("answers", f"{_round(self.total(('learn', 'answers')))} by the on-device model"),
            ("time", f"about {duration(self.total_s)} {by}: "
             + ", ".join(f"{name} {duration(s)}" for name, s in self.seconds.items() if s >= 1)),
            ("disk", f"about {max(1.0, self.disk_bytes / 1e6):.0f} MB"),
            *([("memory", f"about {self.day_bytes / 1e9:.1f} GB for a day of the fleet, beside models and adapters")]
              if self.day_bytes >= MUCH else []),
        ]  # fmt: skip

    def sentence(self) -> str:
        """Returns the same in a line."""
        return (
            f"expected: {_round(self.total(ASKING))} requests to the cloud, "
            f"{_round(self.total(('learn', 'tokens'), ('share', 'tokens')))} tokens of training, "
            f"{_round(self.total(('learn', 'answers')))} answers; about {duration(self.total_s)}, "
            f"{max(1.0, self.disk_bytes / 1e6):.0f} MB of disk"
            + (f", {self.day_bytes / 1e9:.1f} GB of memory for the fleet" if self.day_bytes >= MUCH else "")
        )


def estimate(experiment: Experiment, speed: Speed | None = None, workers: int = 1) -> Estimate:
    """Returns what a run of the experiment will take on this machine with so many workers. None: a default machine's
    speed.
    """
    population = open_population(experiment, experiment.seeds[0])
    work, tokens = expected_work(experiment, population, (speed or Speed()).chars_per_token)
    seeds, rounds = len(experiment.seeds), experiment.rounds * len(experiment.seeds)
    guess = guess_of(experiment, work, speed or speed_of(experiment), workers)
    cloud = (tokens[0] * rounds, tokens[1] * rounds)
    capacity = experiment.cloud.capacity
    seconds = {
        NAMES[step]: work.get(step, 0.0) * guess.cost_s.get(step, 0.0) * (seeds if step[0] == "share" else rounds)
        for step in STEPS
    }
    seconds |= {
        "setting up": START_S + sum(guess.setup_s.values()) + rounds * guess.round_s, "report": guess.report_s
    }
    requests = work.get(ASKING, 0.0) / max(1, experiment.engine.learning(len(population)))  # a device and round
    devices, adapter_bytes = len(population), (speed or Speed()).adapter_bytes
    adapters = seeds * experiment.engine.learning(devices) * len(trained(experiment.arms)) * adapter_bytes
    rows = rounds * (sum(work.get(step, 0.0) for step in STEPS if step[1] in ("samples", "answers")) + 8 * devices)
    return Estimate(
        rounds, seeds, work, cloud, (cloud[0] * capacity.price_in + cloud[1] * capacity.price_out) / 1e6, seconds,
        adapters + rows * ROW_BYTES + 2e6, speed is not None,
        devices * (DEVICE_BYTES + REQUEST_BYTES * requests + TRAINED_BYTES * len(trained(experiment.arms))),
    )  # fmt: skip


START_S = 9.0
"""Flower and Ray, before the first round."""


def guess_of(experiment: Experiment, work: Mapping[Step, float], speed: Speed, workers: int) -> Guess:
    """Returns what progress goes by until it has measured."""
    costs = {"requests": speed.request_s, "samples": speed.sample_s, "tokens": speed.token_s, "answers": speed.answer_s}
    answers = work.get(("learn", "answers"), 0.0)
    alone = {ASKING} if experiment.cloud.provider in LANGUAGE_MODELS else ()  # more workers make it no faster
    once = frozenset({ASKING, FILTERING, ("learn", "tokens")} if experiment.drift.policy == "never" else ())
    return Guess(
        work,
        {step: costs[step[1]] / (1 if step in alone else max(1, workers)) for step in STEPS if step not in VIRTUAL_S}
        | VIRTUAL_S,
        {FILTERING: speed.encoder_setup_s, ("learn", "tokens"): speed.base_setup_s},
        report_s=2.0 + 1e-3 * answers, elsewhere=frozenset({ASKING}), once=once,
    )  # fmt: skip


def expected_work(
    experiment: Experiment, population: Population, chars_per_token: float = CHARS_PER_TOKEN
) -> tuple[dict[Step, float], tuple[float, float]]:
    """Units of each step in a round of one seed, and the tokens that its requests send and get, from a look at some
    users.
    """
    devices = len(population)
    looked = [population.user(index) for index in range(0, devices, max(1, devices // LOOKED_AT))][:LOOKED_AT]
    scale, asks = experiment.engine.learning(devices) / max(1, len(looked)), _asks(experiment)
    work: dict[Step, float] = dict.fromkeys(STEPS, 0.0)
    tokens = [0.0, 0.0]
    for user in looked:
        most = experiment.population.max_history
        items = [item for task in user.tasks for item in known_history(user, task, 0, most)]
        queries = sum(1.0 if query.round is None else 1 / experiment.rounds for query in user.queries)
        _add_cloud(experiment, user, items, queries, asks, work, tokens)
        work["learn", "tokens"] += asks * _trained_tokens(experiment, user, items) * CHARS_PER_TOKEN / chars_per_token
        for query in user.queries:
            kinds = [arm.answers_kind(get_task(query.task).kind) for arm in records(experiment.arms)
                     if arm.answers not in ("cloud", "majority")]  # fmt: skip
            work["learn", "answers"] += sum(kinds) * (1.0 if query.round is None else 1 / experiment.rounds)
    work = {step: units * scale for step, units in work.items() if step[0] != "filter"}
    work |= dict.fromkeys(VIRTUAL_S, float(devices))
    if SHARED in experiment.arms:
        work["share", "tokens"] = _shared_tokens(experiment, looked) * CHARS_PER_TOKEN / chars_per_token
    else:
        del work["share", "tokens"]
    return work, (tokens[0] * scale, tokens[1] * scale)


def _asks(experiment: Experiment) -> float:
    """How often a device asks and trains, a round."""
    drift, rounds = experiment.drift, experiment.rounds
    if drift.policy in ("every", "budget", "when_online"):
        return max(1, rounds // drift.every) / rounds
    return 1 / rounds if drift.policy == "never" else 1.0


def _add_cloud(
    experiment: Experiment, user: User, items: Sequence[Interaction], queries: float, asks: float,
    work: dict[Step, float], tokens: list[float],
) -> None:  # fmt: skip
    cloud = experiment.cloud
    wanted = cloud.samples if any(arm.needs_samples for arm in records(experiment.arms)) else 0
    requests = -(-wanted // cloud.samples_per_request)
    shown, pair = {}, {}
    for task in user.tasks:
        own = [item for item in items if item.task == task][-cloud.show_items :]
        shown[task] = min(sum(len(item.input) + len(item.output) for item in own), cloud.show_chars) + 600
        pair[task] = sum(len(item.input) + len(item.output) + 30 for item in own) / max(1, len(own))
    work["fetch", "requests"] += asks * requests * len(user.tasks)
    work["fetch", "samples"] += asks * wanted * len(user.tasks)
    tokens[0] += asks * requests * sum(shown.values()) / CHARS_PER_TOKEN
    tokens[1] += asks * wanted * sum(pair.values()) / CHARS_PER_TOKEN
    if CLOUD in experiment.arms and user.tasks:
        work["fetch", "requests"] += queries
        mean = sum(shown.values()) / len(shown)
        tokens[0] += queries * (mean + sum(pair.values()) / len(pair)) / CHARS_PER_TOKEN
        tokens[1] += queries * 24


def _trained_tokens(experiment: Experiment, user: User, items: Sequence[Interaction]) -> float:
    """Tokens that one device trains on when it trains, over all arms."""
    if not items:
        return 0.0
    each = sum(map(_tokens, items)) / len(items)
    received = experiment.cloud.samples * len(user.tasks)
    counts = {"real": len(items), "accepted": ACCEPTED * received, "received": received}
    steps: dict[str, int] = {}
    tokens = 0.0
    for name in trained(experiment.arms):
        arm = ARMS[name]
        examples = sum(counts.get(kind, 0) for kind in arm.learns)
        settings = TrainSettings.of(experiment.for_arm(name)[1])
        whole = settings.total_steps(round(examples))
        if arm.steps_of:
            like = TrainSettings.of(experiment.for_arm(arm.steps_of)[1])
            whole = like.total_steps(round(sum(counts.get(kind, 0) for kind in ARMS[METHOD].learns)))
        steps[name] = whole
        tokens += whole * min(settings.batch_size, examples) * each
    return tokens


def _shared_tokens(experiment: Experiment, looked: Sequence[User]) -> float:
    settings = TrainSettings.of(experiment.for_arm(SHARED)[1])
    users = experiment.population.shared_users
    tokens = 0.0
    for task in {task for user in looked for task in user.tasks}:
        own = [item for user in looked for item in user.of_task(task)]
        count = round(len(own) / max(1, len(looked)) * users)
        mean = sum(map(_tokens, own)) / max(1, len(own))
        tokens += settings.total_steps(count) * min(settings.batch_size, count) * mean
    return tokens


def _tokens(item: Interaction) -> int:
    return estimate_tokens(get_task(item.task).prompt(item.input, item.form) + item.output)


def _round(value: float) -> str:
    """Two or three digits are all that an estimate has."""
    for size, unit in ((1e9, "billion"), (1e6, "million"), (1e4, "thousand")):
        if value >= size:
            return f"{value / (1e3 if unit == 'thousand' else size):.3g} {unit}"
    return f"{value:.0f}"


