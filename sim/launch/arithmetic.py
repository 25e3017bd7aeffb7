"""`model.dtype = "fastest"`: what this machine multiplies fastest in, measured once, before a run begins.

The measurement runs in a process of its own, so that whoever starts a run need not load PyTorch.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache

from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment

LIMIT_S = 120.0


def settled(experiment: Experiment, begun: Experiment | None = None) -> Experiment:
    """Returns the experiment with an arithmetic in place of `fastest`; another one as it is.

    Args:
        experiment: What was asked for.
        begun: What a run that goes on began with, whose arithmetic it keeps.

    Raises:
        UserError: PyTorch cannot be asked.
    """
    if experiment.model.dtype != "fastest":
        return experiment
    dtype = begun.model.dtype if begun is not None else _measured(experiment.engine.device)
    return experiment.model_copy(update={"model": experiment.model.model_copy(update={"dtype": dtype})})


@cache
def _measured(device: str) -> str:
    command = [sys.executable, "-m", "untether.sim.launch.arithmetic", device]
    found = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f'model.dtype = "fastest" could not be measured ({reason[0]}). Give float32 or mixed')
    return found.stdout.split()[-1]


def _main() -> None:
    import torch

    from untether.clients.engine.kernels.gemm import fastest

    torch.set_num_threads(1)  # as a worker's
    print(fastest(sys.argv[1]))


if __name__ == "__main__":
    _main()
