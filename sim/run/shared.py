"""The shared adapters, which belong to no device and are kept with the run: those of the arm `shared`, of one seed."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from untether.sim.core.durable import written
from untether.sim.run.directory import RunDirectory


class SharedAdapters:
    """Arrays named `task/PEFT's key`, in `adapters/seed-S/shared.safetensors`."""

    def __init__(self, run: RunDirectory, seed: int):
        self.path = run.path / "adapters" / f"seed-{seed}" / "shared.safetensors"

    @property
    def there(self) -> bool:
        """Whether they have been trained."""
        return self.path.exists()

    def write(self, arrays: Mapping[str, np.ndarray], left_out: Mapping[str, int]) -> None:
        """Keeps the adapters, and how many items of other users were left out of their training, by reason."""
        whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        with written(self.path, SafetensorError) as temporary:
            save_file(whole, temporary, metadata={"left_out": json.dumps(dict(left_out))})

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the adapters; none before they were trained."""
        return load_file(self.path) if self.there else {}

    def left_out(self) -> dict[str, int]:
        """Returns how many items were left out, as given to `write`."""
        if not self.there:
            return {}
        with safe_open(self.path, framework="numpy") as file:
            return json.loads((file.metadata() or {}).get("left_out", "{}"))
