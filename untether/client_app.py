"""The ClientApp under the name by which `flwr run` finds it.

Flower looks for one app while a thread imports the other. A submodule of a package that is being imported is looked for
without waiting, on the path that the package has so far; this file is on it from the beginning, and waits.
"""

import untether  # noqa: F401  (returns once the package is whole)
from untether.clients.app import app

__all__ = ["app"]
