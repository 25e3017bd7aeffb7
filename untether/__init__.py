"""Untether: simulate a fleet of phones that each personalize a small language model with a cloud model's help."""

from pathlib import Path

# One import name. In a checkout the packages stand beside this folder, in an installed distribution inside it.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "sim").is_dir():
    __path__.append(str(_CHECKOUT))
