"""`untether data`: look at data, make them of what people have, download LaMP, write the embedded world as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from untether.sim.core.errors import UserError

data_app = typer.Typer(help="Data sets: check, convert, fetch, write.", no_args_is_help=True)
Out = Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="File to write.")]


@data_app.command("check")
def check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="LaMP files, a .jsonl file, or a folder of either.")],
    experiment: Annotated[
        Path | None, typer.Option("--experiment", metavar="FILE.toml", help="The experiment that declares the task.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field.")] = None,
) -> None:
    """Say what a data set holds: users, histories, dates, and what would be left out and why."""
    from untether.sim.experiment import Experiment, key_values
    from untether.sim.launch.progress import make_console
    from untether.sim.population.formats.look import look

    lines = path.suffix == ".jsonl" or (path.is_dir() and any(path.glob("*.jsonl")))
    said = {"population.source": "jsonl" if lines else "lamp", "population.path": str(path)}
    tasks, left_out, users = look(Experiment.read(experiment, {**said, **key_values(set_, "--set")}))
    console = make_console()
    console.print(f"{users} users can be asked something")
    table = _table("task", "kind", "users", "history (least, median, most)", "queries", "from", "to", "order")
    for row in tasks:
        least, median, most = row.history
        table.add_row(row.task, row.kind, str(row.users), f"{least}, {median:g}, {most}", str(row.queries), row.first,
                      row.last, row.order)  # fmt: skip
    console.print(table)
    table = _table("left out", "count")
    for reason, count in left_out.most_common():
        table.add_row(reason, str(count))
    console.print(table if left_out else "Nothing is left out.")


@data_app.command("from-git")
def from_git(
    repository: Annotated[Path, typer.Argument(metavar="REPOSITORY", help="A folder under git.")],
    out: Out,
    kind: Annotated[
        str, typer.Option(help="`subject`: from changed files to the subject; `type`: from the subject to its type.")
    ] = "subject",
) -> None:
    """Make histories of a repository's authors: dated, offline, e-mail addresses hashed."""
    from untether.sim.population.formats.convert import from_git as rows
    from untether.sim.population.formats.convert import git_task, write_rows

    if kind not in ("subject", "type"):
        raise UserError(f"--kind {kind}: must be subject or type")
    _say(write_rows(rows(repository, kind), out), out, git_task(kind))


@data_app.command("from-chat")
def from_chat(
    file: Annotated[Path, typer.Argument(metavar="CHATS", help="JSON or JSON lines of {messages: [...]}.")], out: Out
) -> None:
    """Make histories of chats in OpenAI's message form: each user turn, and the answer to it."""
    from untether.sim.population.formats.convert import from_chat as rows
    from untether.sim.population.formats.convert import write_rows

    _say(write_rows(rows(file), out), out, '[task]\nname = "chat"\ntitle = "Chat"\nmax_new_tokens = 128\n')


@data_app.command("from-personamem")
def from_personamem(
    questions: Annotated[Path, typer.Argument(metavar="QUESTIONS.csv")],
    contexts: Annotated[Path, typer.Argument(metavar="CONTEXTS.jsonl")],
    out: Out,
) -> None:
    """Make histories of PersonaMem's files: preferences that change, a turn a day."""
    from untether.sim.population.formats.convert import from_personamem as rows
    from untether.sim.population.formats.convert import write_rows

    task = '[task]\nname = "personamem"\ntitle = "PersonaMem"\nmax_new_tokens = 96\n'
    _say(write_rows(rows(questions, contexts), out), out, task)


@data_app.command("from-longlamp")
def from_longlamp(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A Parquet file of LongLaMP, or lines of JSON.")],
    out: Out,
) -> None:
    """Make histories of LongLaMP's files: abstracts, product reviews or posts, long and in their author's style."""
    from untether.sim.population.formats.convert import write_rows
    from untether.sim.population.formats.longlamp import from_longlamp as rows
    from untether.sim.population.formats.longlamp import longlamp_task

    made = list(rows(file))
    _say(write_rows(made, out), out, longlamp_task(made[0]["task"]))


@data_app.command("fetch")
def fetch(
    what: Annotated[str, typer.Argument(metavar="lamp", help="What to fetch: `lamp`.")],
    task: Annotated[str, typer.Option(help="1, 2, 2N, 3, 4, 5 or 7")],
    split: Annotated[str, typer.Option(help="train, dev or test")] = "dev",
    time: Annotated[bool, typer.Option("--time", help="the time-based split")] = False,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder of the tasks' folders")] = Path("data"),
    site: Annotated[str, typer.Option(help="where the files are, where not at their authors'")] = "",
) -> None:
    """Download LaMP's official files; the same command again goes on where it stopped."""
    from untether.sim.launch.progress import make_console
    from untether.sim.population.formats import fetch as download

    if what != "lamp":
        raise UserError(f"data fetch {what}: only `lamp` can be fetched")
    name = task.removeprefix("LaMP_")
    folder = out / f"LaMP_{name}"
    console = make_console()
    for file, url in download.lamp_urls(name, split, time, site or download.SITE).items():
        if (folder / file).exists():
            console.print(f"{folder / file}: there already", markup=False, soft_wrap=True)
            continue
        download.fetch(url, folder / file)
        size = (folder / file).stat().st_size / 1e6
        console.print(f"{folder / file}: {size:.1f} MB", markup=False, soft_wrap=True)
    console.print(f"look at it: untether data check {folder}", markup=False, soft_wrap=True)


@data_app.command("world")
def world(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    users: Annotated[int, typer.Option(min=1, help="how many users")] = 200,
    seed: Annotated[int, typer.Option(help="other seeds draw other users")] = 1,
    queries: Annotated[int, typer.Option(min=1, help="questions a user and task")] = 1,
    rounds: Annotated[int, typer.Option(min=0, help="days that users live on, in which their questions fall")] = 0,
    arrivals: Annotated[float, typer.Option(min=0, help="with --rounds: new items a user, task and day")] = 0.5,
    drift: Annotated[str, typer.Option(help="with --rounds: how users change: gradual, abrupt or recurring")] = "none",
) -> None:
    """Write users of the embedded world as ordinary LaMP files, with truth.parquet beside them."""
    from untether.sim.experiment import Experiment
    from untether.sim.population.world.export import write_lamp

    if drift != "none" and not rounds:
        raise UserError(f"--drift {drift}: nobody changes in 0 rounds. Give --rounds")
    experiment = Experiment.build({"drift": {"kind": drift}, "population": {"replay": rounds > 0}}, None, "--drift")
    write_lamp(
        out, users=users, seed=seed, queries=queries, rounds=rounds, arrivals=arrivals, drift=experiment.drift,
    )
    typer.echo(f"wrote {users} users to {out}")


def _say(count: int, out: Path, task: str) -> None:
    from untether.sim.launch.progress import make_console

    console = make_console()
    console.print(f"wrote {count} interactions to {out}", markup=False, soft_wrap=True)
    source = f'[population]\nsource = "jsonl"\npath = "{out}"\n'
    console.print(f"an experiment on them needs:\n\n{source}\n{task}", markup=False, soft_wrap=True)
    console.print(f"what they hold: untether data check {out} --experiment FILE.toml", markup=False, soft_wrap=True)


def _table(*names: str) -> Table:
    table = Table(box=None, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name)
    return table
