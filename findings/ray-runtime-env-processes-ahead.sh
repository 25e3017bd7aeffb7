#!/usr/bin/env bash
# ray 2.55.1: a driver that gives `ray.init` a `runtime_env`, be it one environment variable, still has Ray start a
# process a CPU ahead of any work, and gets none of them: its first actors start processes of their own, and those that
# were started ahead end unused. Without a `runtime_env` the first actors live in the processes started ahead, so every
# start pays for twice as many Python processes with one as without. An environment variable that is set before
# `ray.init` reaches the workers as well, and costs nothing.
#
# Seen: no runtime_env: started ahead 2, used 2
#       runtime_env of one variable: started ahead 2, used 0
#       variable set before ray.init: started ahead 2, used 2, the actors see it
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.55.1 psutil==7.2.2
cat > "$folder/look.py" <<'PYTHON'
import os
import sys
import time

import psutil
import ray


def processes() -> set[int]:
    """Ray's processes for tasks and actors, idle or not."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if name.startswith("ray::") and "Agent" not in name:
            found.add(process.pid)
    return found


@ray.remote(num_cpus=1)
class Actor:
    def seen(self) -> tuple[int, str]:
        return os.getpid(), os.environ.get("MARK", "")


way = sys.argv[1]
if way == "before":
    os.environ["MARK"] = "here"
env = {"env_vars": {"MARK": "here"}} if way == "runtime_env" else None
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=env)
end = time.monotonic() + 60
while len(processes()) < 2 and time.monotonic() < end:
    time.sleep(0.2)
time.sleep(3)
ahead = processes()
actors = [Actor.remote() for _ in range(2)]
told = ray.get([actor.seen.remote() for actor in actors])
used, marks = sum(pid in ahead for pid, _ in told), {mark for _, mark in told}
print(f"{way}: started ahead {len(ahead)}, used {used}, the actors see {marks}")
assert len(ahead) == 2 and marks == ({""} if way == "nothing" else {"here"})
assert used == (0 if way == "runtime_env" else 2), "this has changed"
PYTHON
for way in nothing runtime_env before; do
    RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" "$folder/look.py" "$way" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
done
