"""The interface for plug-ins: `register` registers a thing by name, `Section` is the base class of its settings.

`docs/extending.md` shows one of each kind. `apart` is for their tests.
"""

from untether.sim.experiment.plugins import apart, register
from untether.sim.experiment.section import Section

__all__ = ["Section", "apart", "register"]
