"""Every figure about the cohort engine, in one run: `make bench`, or

    python -m bench [--devices 64] [--workers 2] [--out bench.json] [--skip stock]

Writes JSON with commit, versions and hardware beside the figures. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from pathlib import Path

import torch

from bench import lifecycle, mixed, profile, training
from untether.sim.core import limits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--workers", type=int, default=limits.cores())
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--skip", nargs="*", default=[], choices=("stock", "tuned"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {"environment": environment(), "training": {}}
    found["lifecycle"] = lifecycle.measure(
        arguments.devices, workers=arguments.workers, skip=tuple(arguments.skip)
    )  # fmt: skip
    lifecycle.show(found["lifecycle"])
    for dtype in ("float32", "bfloat16"):
        found["training"][dtype] = training.measure(dtype=dtype)
        print(json.dumps(found["training"][dtype], indent=1))
    found["profile_us_per_token"] = profile.measure()
    print(json.dumps(found["profile_us_per_token"], indent=1))
    found["mixed"] = mixed.measure()
    print(json.dumps(found["mixed"], indent=1))
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def environment() -> dict[str, str | int | None]:
    """Commit, versions, processor."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = bool(subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout.strip())
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((line.split(":")[1].strip() for line in cpuinfo.open() if line.startswith("model name")), name)
    return {
        "commit": commit + ("-dirty" if dirty else ""), "processor": name, "cores": limits.cores(),
        "python": platform.python_version(), "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
