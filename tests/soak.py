"""`make soak`: one run, killed with SIGKILL twenty times at random, coordinator or worker, against an undisturbed one.

    python tests/soak.py [KILLS] [SEED]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from fleet import run_in_process, tiny  # noqa: E402
from survival import Untether, commits  # noqa: E402
from test_survival import assert_whole  # noqa: E402

from clients.worker import Endpoint  # noqa: E402
from server.background import start_background  # noqa: E402
from sim.results import RunDirectory  # noqa: E402

ROUNDS = 8


def soak(kills: int, seed: int) -> None:
    draw = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="untether-soak-"))
    path, file = folder / "run", folder / "experiment.toml"
    file.write_text(tiny(rounds=ROUNDS, engine__hosts=2, engine__shard=2).to_toml())
    done, run = 0, None
    while done < kills:
        if run is None:
            run = Untether("--resume", str(path)) if path.exists() else Untether(str(file), "--out", str(path))
        time.sleep(draw.uniform(0, 30))
        if run.process.poll() is not None:
            break  # finished before it could be killed often enough
        workers = run.workers()
        if workers and draw.random() < 0.5:
            what = "worker"
            draw.choice(workers).kill()
        else:
            what = "coordinator"
            run.kill()
            assert run.orphans() == [], "orphans"
            run = None
        done += 1
        print(f"kill {done}: {what}, {commits(path)} of {ROUNDS} rounds committed", flush=True)
    code, said = (run or Untether("--resume", str(path))).end(timeout_s=3600)
    assert code == 0, said
    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        reference = run_in_process(folder / "undisturbed", tiny(rounds=ROUNDS), endpoint)
    assert_whole(RunDirectory.open(path), reference, ROUNDS)
    print(f"{done} kills (seed {seed}): the same results as the undisturbed run. {folder}")


if __name__ == "__main__":
    words = [int(word) for word in sys.argv[1:]]
    soak(*(words + [20, random.SystemRandom().randrange(10**6)][len(words) :]))
