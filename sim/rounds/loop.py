"""The round loop, on one screen. Everything else is called from it; it knows no Flower, no Ray and no path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from untether.sim.experiment.arms import FEDERATED, SHARED
from untether.sim.population.source import open_population
from untether.sim.rounds.day import sizes_of
from untether.sim.rounds.garbage import uncollected
from untether.sim.rounds.messages import Order, Reply, Share, complete, errors, joined, materials, outcomes
from untether.sim.rounds.planner import Rounds
from untether.sim.rounds.work import Work
from untether.sim.run.directory import RunDirectory
from untether.sim.run.environment import began_s
from untether.sim.run.shared import SharedAdapters, SharedPart


class Backend(Protocol):
    """How orders reach the hosts of devices, and their replies come back."""

    def send(self, order: Order, progress: Callable[[Work], None]) -> list[Reply]:
        """Has each host do its part of an order. `progress` is told how far they are.

        Raises UserError, ResumableStop or Failure as hosts do.
        """


class Sharing(Protocol):
    """What devices share with each other: a strategy (see `strategies.fleet`)."""

    def sides(self, round: int) -> str:
        """Returns which sides of an adapter a device uploads: A, B, AB; none where nothing is shared."""
        ...

    def aggregate(self, seed: int, round: int, shared: Mapping[str, Any], replies: Sequence[Reply]) -> dict[str, Any]:
        """Returns what is shared after a round, of what was before and what the hosts' devices uploaded."""
        ...


class Progress(Protocol):
    """Who watches a run."""

    def start(self, seeds: Sequence[int], rounds: int, rounds_done: int) -> None: ...

    def begin(self, seed: int, round: int) -> None: ...

    def update(self, stage: str, work: Work, total: int) -> None: ...

    def end(self) -> None: ...

    def note(self, text: str) -> None: ...


def run_rounds(run: RunDirectory, backend: Backend, strategy: Sharing, progress: Progress) -> None:
    """Runs every round of a run directory that is not committed yet."""
    experiment = run.experiment
    done = sum(run.committed(s, r) is not None for s in experiment.seeds for r in range(experiment.rounds))
    progress.start(experiment.seeds, experiment.rounds, done)

    def send(order: Order, total: int | None = None) -> Reply:
        most = len(order.devices) if total is None else total
        return joined(backend.send(order, lambda work: progress.update(order.work, work, most)))

    def planned(stage: str, done: int) -> None:
        progress.update(stage, {"devices": float(done)}, len(devices))

    for seed in experiment.seeds:
        population, shared = open_population(experiment, seed), SharedAdapters(run, seed)
        devices = range(len(population))
        rounds = [round for round in range(experiment.rounds) if not run.committed(seed, round)]
        if not rounds:
            continue
        carried = run.carried(seed, rounds[0] - 1) or {"timeline": {"began_s": began_s(run)}}
        virtual = Rounds(experiment, seed, population, carried, planned)
        part = SharedPart(run, seed, rounds[0] - 1)
        if virtual.federates and part.arrays is None:
            begun = send(virtual.begin(0, devices))
            part.begin(begun.arrays, begun.facts["whole"])
        for round in rounds:
            progress.begin(seed, round)

            # 1. plan: who asks and trains, and whose requests get through.
            agenda = virtual.plan(round, devices)

            # 2. fetch: ask the cloud, filter what it wrote.
            asked = send(virtual.fetch(agenda))
            answers, parts, owned = asked.events, run.parts(seed, round, asked.parts), materials(asked)

            # 3. schedule: whose answer arrives and when everything ends, from what it really took.
            delivered = virtual.deliver(agenda, sizes_of(answers))
            del agenda  # what was expected, of many devices
            if delivered.short:  # filters must not have seen what never came
                again = send(virtual.filter(delivered, run.samples(seed, round, parts, this_round=True)))
                parts["samples"] = run.replace_rows(
                    parts["samples"], delivered.short, run.parts(seed, round, again.parts)["samples"]
                )
                owned = {d: own for d, own in owned.items() if d not in delivered.short} | materials(again)
                asked = joined([asked, again])
            day = virtual.schedule(delivered, owned, part.travels(strategy.sides(round)))

            # 4. learn: what is shared together, what is not alone; answer, score.
            before, updated = part.sent(), Reply()
            if day.cohort.took_part:
                updated = send(virtual.update(day, before))
                day = day.after(outcomes(updated))
                part.arrays = strategy.aggregate(seed, round, part.arrays or {}, [updated])
            if SHARED in experiment.arms and not shared.there:  # what belongs to no device, once a seed
                reply = send(Share(seed=seed, round=round), experiment.population.shared_users)
                shared.write(reply.arrays, reply.facts.get("left_out", {}))
            samples, came = run.samples(seed, round, parts), run.named(parts.pop("answers", []))
            answering = before if virtual.by_day else part.sent()
            arrays = shared.arrays() | {f"{FEDERATED}/{name}": array for name, array in answering.items()}
            learned = send(virtual.learn(day, samples, came, arrays))

            # 5. commit: what is not named here never happened.
            with uncollected():  # many small objects of a large fleet
                complete(virtual.learners.devices, learned)
                for table, paths in run.parts(seed, round, joined([updated, learned]).parts).items():
                    parts.setdefault(table, []).extend(paths)
                events = virtual.event_rows(day, answers, [*updated.events, *learned.events])
                parts["events"] = [run.write_part("events", seed, round, "round", events)]
                if left := virtual.ledger_rows(day):
                    parts.setdefault("ledger", []).append(run.write_part("ledger", seed, round, "uploads", left))
                facts = {"totals": learned.counts(), **_facts(asked, updated, learned), **part.write(round)}
                state = None
                if round + 1 < experiment.rounds:
                    virtual.advance(day, errors(learned), learned.lost)
                    state = virtual.state()
                run.commit(seed, round, parts, facts, state)
            part.prune(round)
            progress.end()


def _facts(*replies: Reply) -> dict[str, Any]:
    """What a commit keeps of a round's replies beside their parts."""
    reply = joined(replies)
    return {"models": reply.models, "failures": reply.failures, **reply.facts}
