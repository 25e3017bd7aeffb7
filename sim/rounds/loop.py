"""The round loop, on one screen. Everything else is called from it; it knows no Flower, no Ray and no path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from untether.sim.population.source import open_population
from untether.sim.rounds.messages import Reply, complete, errors, gather, materials, totals
from untether.sim.rounds.planner import Rounds, sizes_of
from untether.sim.run.directory import RunDirectory


class Backend(Protocol):
    """How orders reach the hosts of devices, and their replies come back."""

    def send(self, work: str, order: Mapping[str, Any], progress: Callable[[float], None]) -> list[Reply]:
        """Has each host do its part of a pass: `fetch`, `filter` and `learn` for the devices that the order names, or
        `share`, which is for no device. `progress` is told how many devices are done.

        Raises UserError, ResumableStop or Failure as hosts do.
        """


class Progress(Protocol):
    """Who watches a run."""

    def start(self, seeds: Sequence[int], rounds: int, rounds_done: int) -> None: ...

    def begin(self, seed: int, round: int) -> None: ...

    def update(self, stage: str, done: int, total: int) -> None: ...

    def end(self) -> None: ...


class Endpoint(Protocol):
    """Where devices ask the cloud."""

    @property
    def base_url(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


def run_rounds(run: RunDirectory, backend: Backend, cloud: Endpoint, progress: Progress) -> None:
    """Runs every round of a run directory that is not committed yet."""
    experiment = run.experiment
    done = sum(run.committed(s, r) is not None for s in experiment.seeds for r in range(experiment.rounds))
    progress.start(experiment.seeds, experiment.rounds, done)
    for seed in experiment.seeds:
        population = open_population(experiment, seed)
        devices = list(range(len(population)))
        rounds = [round for round in range(experiment.rounds) if not run.committed(seed, round)]
        virtual = Rounds(experiment, seed, population, run.carried(seed, rounds[0] - 1)) if rounds else None
        for round in rounds:
            progress.begin(seed, round)
            told = {
                "seed": seed, "round": round, "base_url": cloud.base_url, "model": cloud.model,
                "fingerprint": cloud.fingerprint,
            }  # fmt: skip

            def send(work: str, order: Mapping[str, Any], total: int, told: Mapping[str, Any] = told) -> list[Reply]:
                def tell(done: float) -> None:
                    progress.update(work, min(int(done), total), total)

                return backend.send(work, {**told, **order}, tell)

            # 1. plan: who asks and trains, and whose requests get through.
            agenda = virtual.plan(round, devices)

            # 2. fetch: ask the cloud, filter what it wrote.
            asked = send("fetch", {**agenda.order(), "devices": agenda.asking}, len(agenda.asking))
            parts = gather(asked)

            # 3. schedule: whose answer arrives and when everything ends, from what it really took.
            answers = run.read_rows(parts.pop("events", []))
            delivered = virtual.deliver(agenda, sizes_of(answers))
            owned = materials(asked)
            if delivered.short:  # filters must not have seen what never came
                order = {**delivered.order(), "devices": delivered.short, "sample_parts": parts["samples"]}
                again = send("filter", order, len(delivered.short))
                parts["samples"] = run.replace_rows(parts["samples"], delivered.short, gather(again).get("samples", []))
                owned = {d: own for d, own in owned.items() if d not in delivered.short} | materials(again)
                asked += again
            day = virtual.schedule(delivered, owned)

            # 4. learn: train, answer, score.
            if "shared" in experiment.arms and round == 0:  # the adapters that belong to no device, once a seed
                send("share", {}, experiment.population.shared_users)
            staged = {"sample_parts": run.sample_parts(seed, round, parts), "answer_parts": parts.pop("answers", [])}
            learned = send("learn", {**virtual.order(day), **staged, "devices": devices}, len(devices))

            # 5. commit: what is not named here never happened.
            complete(devices, learned)
            for table, paths in gather(learned).items():
                parts.setdefault(table, []).extend(paths)
            events = virtual.event_rows(day, answers, run.read_rows(parts.pop("events", [])))
            parts["events"] = [run.write_part("events", seed, round, "round", events)]
            virtual.advance(day, errors(learned))
            facts = {
                "totals": totals(learned),
                "models": {name: value for reply in (*asked, *learned) for name, value in reply.models.items()},
                "failures": [failure for reply in (*asked, *learned) for failure in reply.failures],
            }
            run.commit(seed, round, parts, facts, virtual.state() if round + 1 < experiment.rounds else None)
            progress.end()
