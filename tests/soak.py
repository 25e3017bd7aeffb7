"""`make soak`: one run, killed with SIGKILL twenty times at random, coordinator or worker, against an undisturbed one.

    python tests/soak.py [KILLS] [SEED]

A kill falls somewhere into the start, or within seconds of the moment at which workers are at work or a round is
committed, so that rounds are hit in all their stages and yet the run gets on.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from fleet import run_in_process, tiny  # noqa: E402
from survival import Untether, assert_whole, commits, wait_for  # noqa: E402

from untether.clients.device.worker import Endpoint  # noqa: E402
from untether.server.background import start_background  # noqa: E402
from untether.sim.run.directory import RunDirectory  # noqa: E402

ROUNDS_A_KILL = 2
MOMENTS = {"start": (0.2, 15.0), "at work": (0.4, 6.0), "committed": (0.4, 3.0)}
"""How often a kill follows each, and within how many seconds."""


def soak(kills: int, seed: int) -> None:
    draw, rounds = random.Random(seed), ROUNDS_A_KILL * kills
    folder = Path(tempfile.mkdtemp(prefix="untether-soak-"))
    path, file = folder / "run", folder / "experiment.toml"
    experiment = tiny(rounds=rounds, engine__hosts=2, engine__shard=2)
    file.write_text(experiment.to_toml())
    done, run, deaths = 0, None, {"worker": 0, "coordinator": 0}
    while done < kills:
        if run is None:
            run = Untether("--resume", str(path)) if path.exists() else Untether(str(file), "--out", str(path))
        moment = draw.choices(list(MOMENTS), [share for share, _ in MOMENTS.values()])[0]
        so_far = commits(path)
        if moment == "at work":
            wait_for(lambda run=run: run.workers() or run.process.poll() is not None, run)
        elif moment == "committed":
            wait_for(lambda run=run, n=so_far: commits(path) > n or run.process.poll() is not None, run, 1800)
        time.sleep(draw.uniform(0, MOMENTS[moment][1]))
        if run.process.poll() is not None:
            code, said = run.end()
            if code == 0:
                break  # finished before it could be killed often enough
            assert "Resume with" in said, said  # Ray does not always start in time on a busy machine
            run = None
            continue
        workers = run.workers()
        what = "worker" if workers and draw.random() < 0.5 else "coordinator"
        if what == "worker":
            draw.choice(workers).kill()
        else:
            run.kill()
            assert run.orphans() == [], "orphans"
            run = None
        done, deaths[what] = done + 1, deaths[what] + 1
        print(f"kill {done}: {what} ({moment}), {commits(path)} of {rounds} rounds committed", flush=True)
    code, said = (Untether("--resume", str(path)) if run is None or run.process.poll() is not None else run).end(3600)
    assert code == 0, said
    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        # In the same shards: rounding of another split would grow from round to round, as adapters are trained on.
        reference = run_in_process(folder / "undisturbed", experiment, endpoint, hosts=2)
    assert_whole(RunDirectory.open(path), reference, rounds)
    print(f"{done} kills {deaths} (seed {seed}): the same results as the undisturbed run. {folder}")


if __name__ == "__main__":
    words = [int(word) for word in sys.argv[1:]]
    soak(*(words + [20, random.SystemRandom().randrange(10**6)][len(words) :]))
