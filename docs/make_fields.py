"""Writes fields.md: every field of an experiment, from its declaration."""

from pathlib import Path

from untether.sim.experiment import Experiment, guide


def page() -> str:
    """The page's text."""
    lines = [
        "# Every field of an experiment", "",
        "In the TOML file, or by `--set KEY=VALUE`. `untether experiment explain FIELD` says more of one. Made by",
        "`docs/make_fields.py`.",
    ]  # fmt: skip
    for section in ["", *guide.sections()]:
        rows = [name for name in guide.names() if name.rpartition(".")[0] == section]
        title = f"`[{section}]`" if section else "Of the whole run"
        meaning = _meaning(section)
        lines += ["", f"## {title}", "", *([meaning, ""] if meaning else []), "| field | default | values | meaning |",
                  "|---|---|---|---|"]  # fmt: skip
        for name in rows:
            found = guide.explain(name, places=False)
            cells = (f"`{name}`", f"`{found.default}`", found.values, found.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _meaning(section: str) -> str:
    model = Experiment
    for part in section.split(".") if section else ():
        model = type(model.model_fields[part].default)
    return " ".join((model.__doc__ or "").split()) if section else ""


if __name__ == "__main__":
    Path(__file__).with_name("fields.md").write_text(page(), encoding="utf-8")
