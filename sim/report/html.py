"""Writes a run's report: one HTML file that needs nothing else, and the figures and tables beside it.

Only what the run directory holds is shown. A fact that is missing leaves its part out; nothing is guessed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from untether.sim.core.durable import write_atomically
from untether.sim.core.package_data import find
from untether.sim.experiment import Experiment, fields
from untether.sim.experiment.arms import ARMS, CONTRASTS, METHOD
from untether.sim.report import curves, figures, people, prose, texts
from untether.sim.report import summary as reading
from untether.sim.report.fleet import FleetSummary
from untether.sim.report.funnel import Funnel, faults, precision
from untether.sim.report.summary import Summary
from untether.sim.report.tables import write_tables
from untether.sim.run.directory import RunDirectory
from untether.sim.run.tables import TABLES
from untether.sim.run.whole import refuse_links

TEXTS = ("input", "output", "prediction", "gold")
"""Columns that the report counts nothing in."""
EVENTS = (
    "seed", "request_id", "kind", "outcome", "time_s", "queued_s", "duration_s", "energy_j", "bytes_up", "bytes_down",
    "tokens_in", "tokens_out",
)  # fmt: skip
"""The columns of `events` that it counts something in: a large fleet's table is gigabytes."""


def write_report(run: RunDirectory) -> Path:
    """As `sim.report.write_report`."""
    refuse_links(run.path, ("tables", "figures", "report.html"))
    experiment = run.experiment
    summary = Summary(run.read_json("summary.json"))
    environment = run.read_json("environment.json") or {}
    tables = {name: _read(run, name) for name in TABLES if name not in ("metrics", "training")}
    asked = summary.facts.get("asked")
    funnel = Funnel(tables["samples"], tables["predictions"], experiment, asked if isinstance(asked, Mapping) else None)
    truth = faults(tables["samples"], funnel.filters)

    write_tables(run, summary)
    scores = people.user_scores(_read(run, "metrics"), summary)
    drawn = {}
    captions = prose.captions(summary)
    for name, figure in (
        ("contrasts", figures.forest(summary)), ("contrasts-narrow", figures.forest(summary, narrow=True)),
        ("filters", figures.filters(funnel)), ("users", people.lines(summary, scores)),
        ("gains", people.gains(summary, scores)), ("learning", curves.learning(_read(run, "training"))),
        ("outcomes", curves.outcomes(tables["events"])), ("availability", curves.availability(experiment)),
    ):  # fmt: skip
        if figure is not None:
            drawn[name] = inline(figures.save(figure, run.path / "figures", name), name, captions.get(name, ""))
    answer_lengths = texts.lengths(run)

    page = template("sim/report/report.html.jinja").render(
        experiment=experiment,
        summary=summary,
        failures=summary.facts.get("failures") or [],
        contrasts=summary.contrasts(),
        others=[contrast for contrast in summary.contrasts(everything=True) if contrast not in summary.contrasts()],
        method=prose.method(summary, experiment),
        arms={name: arm.meaning for name, arm in ARMS.items()},
        method_arm=METHOD,
        title=reading.title,
        meaning={pair: reference.settles for pair, reference in CONTRASTS.items()},
        answer=prose.answer(summary),
        scale=prose.scale(summary, experiment),
        notes=prose.notes(summary, experiment, environment),
        figures=drawn,
        captions=captions,
        beside=texts.samples_beside(run),
        answered=texts.answers(run),
        lengths=texts.free_text(answer_lengths),
        looked_at=texts.LOOKED_AT,
        price=_price(experiment, tables["events"]),
        funnel=funnel,
        truth=truth,
        precision=lambda name: precision(truth, name),
        fleet=FleetSummary(tables["events"], tables["ledger"], tables["predictions"]),
        purposes={"augment": "write samples", "answer": "answer queries"},
        exclusions=_exclusions(summary.facts),
        settings=list(_settings(experiment)),
        environment=_environment(environment),
        prompts=_prompts(environment),
        command=f"untether run {run.path.name}/experiment.toml",
        commit=environment.get("commit"),
    )
    path = run.path / "report.html"
    write_atomically(path, page)
    return path


def _read(run: RunDirectory, table: str) -> pd.DataFrame:
    try:
        if table == "events":
            return run.read(table, EVENTS, fixed=True)
        return run.read(table, [name for name in TABLES[table].names if name not in TEXTS])
    except FileNotFoundError:
        return pd.DataFrame(columns=TABLES[table].names)


def template(path: str) -> jinja2.Template:
    """Returns a page's template, given relative to the project's root; it may include `report.css` and what lies beside
    it.
    """
    place = find(path)
    folders = [place.parent, find("sim/report/report.css").parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(
        number=reading.number, interval=reading.interval, p=reading.p_value, metric=reading.metric_name,
        arrow=reading.arrow, count=_count, size=_size, words=lambda text: str(text).replace("_", " "),
        whole=_whole, ticks=_ticks,
    )  # fmt: skip
    return environment.get_template(place.name)


def _price(experiment: Experiment, events: pd.DataFrame) -> float | None:
    """What the cloud's tokens cost in all, by the experiment's prices; None where it names none."""
    capacity = experiment.cloud.capacity
    if not (capacity.price_in or capacity.price_out) or not len(events):
        return None
    asked = events[events["request_id"].notna()]
    read, written = (float(asked[name].fillna(0).sum()) for name in ("tokens_in", "tokens_out"))
    return (read * capacity.price_in + written * capacity.price_out) / 1e6


def inline(svg: str, name: str, said: str = "") -> Markup:
    """Returns an SVG's text for the middle of a page: its ids its own, its ink the page's text colour, and no figure so
    wide that its letters outgrow the page's. `said`: for those who cannot see it.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="|href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(figures.INK, "currentColor").replace(figures.PAPER, "var(--paper)")
    label = f'aria-label="{escape(said)}" ' if said else ""
    points = re.match(r'<svg [^>]*?width="([\d.]+)pt"', svg)
    width = f'style="max-width: min(58rem, {2.4 * float(points[1]):.0f}px)" ' if points else ""
    return Markup(svg.replace("<svg ", f'<svg role="img" {label}{width}', 1))


def _exclusions(facts: Mapping[str, Any]) -> list[tuple[str, int]]:
    counted = facts.get("exclusions") or {}
    pairs = [(str(reason), int(count)) for reason, count in counted.items()]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def _settings(experiment: Experiment) -> Iterator[tuple[str, str, str, bool]]:
    """Every field as (name, value, meaning, whether it differs from the default)."""
    values, defaults = experiment.model_dump(mode="json"), Experiment().model_dump(mode="json")
    for name, _, meaning in fields():
        value, default = (functools.reduce(dict.__getitem__, name.split("."), given) for given in (values, defaults))
        yield name, _show(value), meaning, value != default


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_show, value)) or "\N{EN DASH}"
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False) if value else "\N{EN DASH}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if value not in ("", None) else "\N{EN DASH}"


def _environment(environment: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The environment, flat, without the prompts, the chat template's text and the package list's length of lines."""
    rows: list[tuple[str, str]] = []
    for key, value in environment.items():
        if (key == "prompts" and not prefix) or key == "template":
            continue
        if key == "packages" and isinstance(value, Mapping):
            versions = [f"{name} {version}" for name, version in sorted(value.items()) if version]
            rows.append(("packages", ", ".join(versions)))
        elif isinstance(value, Mapping):
            rows += _environment(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}".replace("_", " "), _show(value)))
    return rows


def _prompts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every prompt as (where it stands, its text), however deep the record nests them."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, str):
            yield name, value
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                yield from walk(inner, f"{name} / {key}" if name else str(key))
        elif isinstance(value, (list, tuple)):
            for index, inner in enumerate(value, 1):
                yield from walk(inner, f"{name} {index}".strip())

    return list(walk(environment.get("prompts") or {}, ""))


def _whole(sentence: str) -> Markup:
    """A sentence whose names, intervals and p-values do not break over lines."""
    pattern = r"(?:LaMP|ROUGE)-\w+|\[[^\]]*\]|Holm p [=<] [\d.]+"
    pieces = re.split(f"({pattern})", sentence)
    spans = [Markup('<span class="whole">{}</span>').format(p) if i % 2 else escape(p) for i, p in enumerate(pieces)]
    return Markup("").join(spans)


def _ticks(text: str) -> Markup:
    """A text whose `backticked` words are set as code."""
    pieces = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(pieces))


def _count(value: float | int | None) -> str:
    """A count with thin spaces between thousands."""
    if value is None or pd.isna(value):
        return "\N{EN DASH}"
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _size(value: float | int | None) -> str:
    """Bytes as people read them (powers of 1000)."""
    if value is None or pd.isna(value):
        return "\N{EN DASH}"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
