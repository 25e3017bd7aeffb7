"""For plug-ins: `register` makes a thing known by name, `Section` is what its settings are derived from.

`docs/extending.md` shows one of each kind. `apart` is for their tests.
"""

from untether.sim.experiment.plugins import apart, register
from untether.sim.experiment.section import Section

__all__ = ["Section", "apart", "register"]
