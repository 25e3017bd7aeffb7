"""Untether: simulate a fleet of phones that each personalize a small language model with a cloud model's help.

Scripts and notebooks use `untether.api`, whose names are available here too, loaded on first use.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from untether.api import Callback as Callback
    from untether.api import Experiment as Experiment
    from untether.api import Failure as Failure
    from untether.api import ResumableStop as ResumableStop
    from untether.api import Run as Run
    from untether.api import UserError as UserError
    from untether.api import open as open
    from untether.api import run as run

__all__ = ["Callback", "Experiment", "Failure", "ResumableStop", "Run", "UserError", "open", "run"]

# One import name. In a checkout the packages stand beside this folder, in an installed distribution inside it.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "sim").is_dir():
    __path__.append(str(_CHECKOUT))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from untether import api

    return getattr(api, name)
