"""What a shell completes: fields and their values, sections, studies."""

from __future__ import annotations

from untether.sim.core.package_data import find


def complete_setting(incomplete: str) -> list[str]:
    """`lora.r` becomes `lora.rank=`; behind the `=`, the names that the field knows."""
    from untether.sim.experiment import guide

    name, equals, value = incomplete.partition("=")
    if not equals:
        return [f"{field}=" for field in guide.names() if field.startswith(name)]
    if name not in guide.names():
        return []
    *before, last = value.split(",")
    start = "".join(f"{word}," for word in before)
    return [f"{name}={start}{known}" for known in guide.known_names(name) if known.startswith(last)]


def complete_field(incomplete: str) -> list[str]:
    """Fields by their beginning."""
    from untether.sim.experiment import guide

    return [field for field in guide.names() if field.startswith(incomplete)]


def complete_section(incomplete: str) -> list[str]:
    """Sections by their beginning."""
    from untether.sim.experiment import guide

    return [section for section in guide.sections() if section.startswith(incomplete)]


def complete_study(incomplete: str) -> list[str]:
    """Built-in studies by their beginning."""
    folder = find("sim/studies/scale.toml").parent
    return [path.stem for path in sorted(folder.glob("*.toml")) if path.stem.startswith(incomplete)]
