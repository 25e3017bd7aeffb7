"""What belongs to no device and is kept with the run, of one seed: the adapters of the arm `shared`, and what the
strategy has devices share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from untether.sim.core.durable import written
from untether.sim.core.errors import ResumableStop
from untether.sim.experiment.arms import FEDERATED
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
        whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
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


class SharedPart:
    """What a strategy shares after each committed round: arrays, in `adapters/seed-S/federated/round-R.safetensors`.

    `arrays` are those of the last committed round, or what `begin` was given; None before that. `whole`: how many
    weights one adapter has by side, A and B.

    Raises:
        ResumableStop: A commit names a file that is gone or damaged.
    """

    def __init__(self, run: RunDirectory, seed: int, round: int):
        self.run, self.seed = run, seed
        self._fresh = True
        self.arrays: dict[str, np.ndarray] | None = None
        self.whole: dict[str, int] = {}
        commit = run.committed(seed, round) if round >= 0 else None
        if commit is not None and (name := commit["facts"].get("shared_part")):
            path = run.path / name
            try:
                with safe_open(path, framework="numpy") as file:
                    self.whole = json.loads(file.metadata()["whole"])
                    self.arrays = {key: file.get_tensor(key) for key in file.keys()}
                    self._fresh = False
            except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
                raise ResumableStop(
                    f"{path}: what devices share after round {round} of seed {seed} cannot be read ({error}). Put the "
                    "file back, or start the run anew in another directory"
                ) from error

    def begin(self, arrays: Mapping[str, np.ndarray], whole: Mapping[str, int]) -> None:
        """Sets what is shared before the first training."""
        self.arrays, self.whole = dict(arrays), dict(whole)

    def sent(self) -> dict[str, np.ndarray]:
        """Returns what devices get: all but the server's own state of the strategy."""
        return {name: array for name, array in (self.arrays or {}).items() if "/server/" not in name}

    def travels(self, sides: str) -> tuple[float, float]:
        """Returns the uploads and downloads of a device, in adapters.

        It uploads the `sides` of one and downloads everything that is sent; nothing before the first round, since each
        device can draw that from the seed.
        """
        one = sum(self.whole.values())
        down = 0 if self._fresh else sum(array.size for array in self.sent().values())
        return (sum(self.whole[side] for side in sides) / one, down / one) if one else (0.0, 0.0)

    def write(self, round: int) -> dict[str, str]:
        """Keeps what is shared after a round. Returns what its commit says of it; nothing where nothing is shared."""
        if self.arrays is None:
            return {}
        self._fresh, path = False, self._path(round)
        whole = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        with written(path, SafetensorError) as temporary:
            save_file(whole, temporary, metadata={"whole": json.dumps(self.whole)})
        return {"shared_part": str(path.relative_to(self.run.path))}

    def prune(self, round: int) -> None:
        """Deletes what was shared before `round`, which is committed."""
        for path in self._path(round).parent.glob("round-*.safetensors"):
            if path != self._path(round):
                path.unlink(missing_ok=True)

    def _path(self, round: int) -> Path:
        return self.run.path / "adapters" / f"seed-{self.seed}" / FEDERATED / f"round-{round}.safetensors"
