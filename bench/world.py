"""How fast the embedded world makes users, and how many requests its generator answers over HTTP.

    python -m bench.world [--users 10000] [--requests 1500]

Users are made on one core. Requests (8 pairs each) go through the client that devices use; the endpoint has a process,
and so another core, of its own.
"""

from __future__ import annotations

import argparse
import time

from untether.clients.cloud.client import CloudClient
from untether.clients.device.augmentation import samples_from, samples_requests
from untether.server.background import start_background
from untether.sim.experiment import Experiment
from untether.sim.population.source import open_population
from untether.sim.population.tasks import get_task

TASK, ITEMS, PAIRS, WARM_UP = "LaMP_4", 16, 8, 50


def measure(users: int, count: int) -> None:
    """Prints both rates."""
    fields = {"population.users": users, "population.tasks": TASK, "population.history": [ITEMS, ITEMS]}
    experiment = Experiment.read(None, {key: str(value) for key, value in fields.items()})
    population = open_population(experiment, 1)
    begun = time.perf_counter()
    histories = [population.user(index).of_task(TASK) for index in range(users)]
    took = time.perf_counter() - begun
    print(f"{users:,} users, {sum(map(len, histories)):,} interactions of one task: {took:.1f} s on one core")

    requests = [
        request
        for number in range(count + WARM_UP)
        for request in samples_requests(
            get_task(TASK), histories[number % users], PAIRS, request_id=str(number), device_id=str(number), seed=1,
            round=0,
        )
    ]  # fmt: skip
    with start_background("world", {}) as gateway:

        def ask(some):
            client = CloudClient(experiment.cloud, base_url=gateway.base_url, model=gateway.model, api_key="")
            return client.ask_sync(some)

        ask(requests[:WARM_UP])
        begun = time.perf_counter()
        replies = ask(requests[WARM_UP:])
        took = time.perf_counter() - begun
    pairs = len(samples_from(requests[WARM_UP:], replies))
    print(f"{count:,} requests of {PAIRS} pairs in {took:.1f} s: {count / took:.0f} a second ({pairs:,} usable pairs)")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=1_500)
    options = parser.parse_args()
    measure(options.users, options.requests)


if __name__ == "__main__":
    main()
