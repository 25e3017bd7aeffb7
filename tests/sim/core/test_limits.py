"""What containers and nested groups leave of a machine: trees of files as kernels lay them out, and who asks."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from untether.clients.engine import memory
from untether.sim.core import limits
from untether.sim.experiment import Experiment
from untether.sim.launch import cluster
from untether.sim.launch import runtime as launch
from untether.sim.run import environment

GIB = 1 << 30
NONE_V1 = "9223372036854771712\n"


def tree(root: Path, files: dict[str, str], cgroup: str, mounts: str = "") -> Path:
    """A machine of 64 GiB, 32 of them free, with files of control groups."""
    meminfo = f"MemTotal:  {64 << 20} kB\nMemFree:  1 kB\nMemAvailable:  {32 << 20} kB\n"
    proc = {"proc/self/cgroup": cgroup, "proc/meminfo": meminfo, **({"proc/self/mountinfo": mounts} if mounts else {})}
    for name, text in {**proc, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def seen(root: Path) -> tuple[int, float, float]:
    return limits.cores(root), limits.memory_bytes(root) / GIB, limits.available_bytes(root) / GIB


def test_a_machine_without_groups(tmp_path):
    assert seen(tree(tmp_path, {}, "")) == (16, 64, 32)


def test_a_container_of_version_2(tmp_path):
    files = {
        "cpu.max": "400000 100000\n", "memory.max": f"{8 * GIB}\n", "memory.high": "max\n",
        "memory.current": f"{6 * GIB}\n", "memory.stat": f"anon 7\nfile 9\ninactive_file {2 * GIB}\nactive_file 5\n",
    }  # fmt: skip
    assert seen(tree(tmp_path, files, "0::/\n")) == (4, 8, 4)


def test_the_tightest_of_nested_groups_counts_for_each_thing(tmp_path):
    """Cores end two levels up, memory one level up, and the group's own limits are wider."""
    files = {
        "a/cpu.max": "250000 100000\n", "a/memory.max": "max\n", "a/b/cpu.max": "max 100000\n",
        "a/b/memory.high": f"{3 * GIB}\n", "a/b/memory.max": f"{4 * GIB}\n", "a/b/memory.current": f"{2 * GIB}\n",
        "a/b/c/cpu.max": "800000 100000\n", "a/b/c/memory.max": f"{6 * GIB}\n", "a/b/c/memory.current": f"{GIB}\n",
    }  # fmt: skip
    assert seen(tree(tmp_path, files, "0::/a/b/c\n")) == (2, 3, 1)


def test_version_1(tmp_path):
    stat = f"inactive_file 0\nhierarchical_memory_limit {NONE_V1}total_inactive_file {GIB}\n"
    files = {
        "cpu/cpu.cfs_quota_us": "-1\n", "cpu/job/cpu.cfs_quota_us": "150000\n", "cpu/job/cpu.cfs_period_us": "50000\n",
        "memory/memory.limit_in_bytes": NONE_V1, "memory/job/x/memory.limit_in_bytes": NONE_V1,
        "memory/job/memory.limit_in_bytes": f"{5 * GIB}\n", "memory/job/memory.usage_in_bytes": f"{4 * GIB}\n",
        "memory/job/memory.stat": stat,
    }  # fmt: skip
    assert seen(tree(tmp_path, files, "5:memory:/job/x\n4:cpu,cpuacct:/job\n1:name=systemd:/x\n")) == (3, 5, 2)


def test_a_limit_above_what_can_be_seen(tmp_path):
    """Version 1 tells the tightest limit of all groups above, those beyond the mount among them."""
    files = {
        "memory/memory.limit_in_bytes": NONE_V1, "memory/memory.usage_in_bytes": f"{GIB}\n",
        "memory/memory.stat": f"hierarchical_memory_limit {2 * GIB}\n",
    }  # fmt: skip
    assert seen(tree(tmp_path, files, "5:memory:/\n")) == (16, 2, 1)


HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 /docker/a\\040b /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /docker/a\\040b /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""


def test_both_versions_and_a_mount_that_shows_the_container_alone(tmp_path):
    """The group has the host's name, its mount begins at the container; CPU here is limited by version 2 as well."""
    files = {
        "cpu,cpuacct/cpu.cfs_quota_us": "600000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "memory/inner/memory.limit_in_bytes": f"{7 * GIB}\n", "memory/inner/memory.usage_in_bytes": "0\n",
        "unified/u/cpu.max": "500000 100000\n",
    }  # fmt: skip
    groups = "4:memory:/docker/a b/inner\n3:cpu,cpuacct:/docker/a b\n0::/u\n"
    assert seen(tree(tmp_path, files, groups, HYBRID)) == (5, 7, 7)


def test_a_group_outside_of_its_mount_is_the_mount(tmp_path):
    files = {"cpu.max": "300000 100000\n", "memory.max": f"{GIB}\n", "memory.current": f"{GIB + 5}\n"}
    assert seen(tree(tmp_path, files, "0::/../../other\n")) == (3, 1, 0), "and what is over its limit has nothing left"
    mount = "30 23 0:26 /docker/x /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    assert seen(tree(tmp_path, files, "0::/elsewhere\n", mount)) == (3, 1, 0)


@pytest.mark.parametrize(
    ("said", "cores"),
    [("50000 100000", 1), ("1000 100000", 1), ("199999 100000", 1), ("3200000 100000", 16), ("max 100000", 16),
     ("", 16), ("nonsense", 16), ("100000 0", 16)],
)  # fmt: skip
def test_quotas(tmp_path, said, cores):
    assert limits.cores(tree(tmp_path, {"cpu.max": said}, "0::/\n")) == cores


def test_a_limit_beyond_the_machine_is_none(tmp_path):
    files = {"memory.max": f"{100 * GIB}\n", "memory.current": "0\n"}
    assert seen(tree(tmp_path, files, "0::/\n")) == (16, 64, 32)


def test_here():
    """Whatever this is run in: no more than the machine, and something."""
    assert 1 <= limits.cores() <= 16 and 0 < limits.available_bytes() <= limits.memory_bytes()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_for_real():
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    code = f"{one}; from untether.sim.core import limits; print(limits.cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


# --- who asks -------------------------------------------------------------------------------------------------


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Three cores and 4 GiB, one of them taken, on a machine of 16 (64) cores and 64 GiB."""
    files = {"a/cpu.max": "300000 100000\n", "memory.max": "max\n", "a/memory.max": f"{4 * GIB}\n",
             "a/memory.current": f"{GIB}\n"}  # fmt: skip
    root = tree(tmp_path, files, "0::/a/b\n")
    for name in ("cores", "memory_bytes", "available_bytes"):
        monkeypatch.setattr(limits, name, partial(getattr(limits, name), root))


def test_a_run_is_laid_out_over_what_is_ours(container):
    assert launch.Resources.of(Experiment(engine={"device": "cpu"}), 100) == launch.Resources(3, 3, 1, 0)
    assert launch.Resources.of(Experiment(engine={"device": "cpu", "workers": 1}), 100).threads == 3
    assert launch.Resources.of(Experiment(engine={"device": "cpu", "workers": 8}), 100) == launch.Resources(8, 8, 1, 0)


def test_a_cohorts_budget_is_half_of_what_is_left_to_us(container):
    assert memory.free_bytes(torch.device("cpu")) == 3 * GIB
    assert memory.budget_bytes(None, torch.device("cpu")) == 3 * GIB // 2


def test_the_record_of_a_run_names_both(container):
    found = environment.describe(Experiment())["hardware"]
    assert (found["cores"], found["memory_gib"]) == (3, 4.0)
    assert found["machine_cores"] == 64 and found["machine_memory_gib"] > 0


def test_ray_is_told(container, monkeypatch):
    told = {}
    monkeypatch.setattr("ray.init", lambda **arguments: told.update(arguments))
    cluster.start_here(3, 0, 3)
    assert told["num_cpus"] == 3 and told["resources"] == {"worker": 3}
    assert told["object_store_memory"] + told["_memory"] == 3 * GIB
    assert told["object_store_memory"] == int(0.3 * 3 * GIB)
