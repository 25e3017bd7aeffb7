"""What `untether compare` makes of runs that are a stranger's."""

import pandas as pd
import pytest
from typer.testing import CliRunner

from tests.finished_run import synthetic_run
from untether.sim.core.errors import UserError
from untether.sim.report.compare import write_comparison
from untether.sim.run.directory import RunDirectory
from untether.sim.terminal.cli import app

EVIL = "[red]<script>window.ran = true</script>\x1b[2J"


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "<b>[red]theirs"
    folder.mkdir()
    return synthetic_run(folder / "one"), synthetic_run(folder / "two", evil=EVIL, cloud={"model": "<i>evil</i>[red]"})


def rename(run, table, **names):
    """Other names of an arm and a task, as a stranger may have written them."""
    path = run.path / f"{table}.parquet"
    frame = pd.read_parquet(path)
    for column, (old, new) in names.items():
        frame[column] = frame[column].replace(old, new)
    frame.to_parquet(path)


def test_their_words_are_words(runs, tmp_path):
    one, two = runs
    for run in runs:
        for table in ("predictions", "metrics"):
            rename(run, table, arm=("local", f"../../{EVIL}"))
    page = write_comparison(runs, tmp_path / "out").read_text()
    assert "<script>window" not in page and "<i>evil" not in page and "\x1b" not in page
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"compare.html", "differences.csv", "figures/runs.svg", "figures/runs.pdf"}
    ran = CliRunner().invoke(app, ["compare", str(one.path), str(two.path), "--out", str(tmp_path / "again")])
    assert ran.exit_code == 0, ran.output
    assert "\x1b" not in ran.output
    assert "<i>evil</i>[red]" in ran.output and "<b>[red]theirs" not in page


def test_a_table_that_is_none_is_named(runs, tmp_path):
    (runs[1].path / "predictions.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"predictions\.parquet"):
        write_comparison([RunDirectory.open(run.path) for run in runs], tmp_path / "out")
    assert not (tmp_path / "out" / "compare.html").exists()
