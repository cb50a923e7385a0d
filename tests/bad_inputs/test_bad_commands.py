"""What a wrong command line is told, word for word: one line on stderr, exit code 2, nothing on stdout."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest

from ctr_models.gates.base import GATES
from pipelines import cli
from pipelines.release.example import example_bundle, example_log

Told = Callable[..., str]
DATABASE = "give --events the database that the server writes."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, logs good and bad, and files that are something else than what is asked for."""
    made = tmp_path_factory.mktemp("made")
    example_bundle(made / "bundle")
    (made / "nothing").mkdir()
    example_log(20).drop("clicked").write_parquet(made / "log.parquet")
    pl.DataFrame(schema={"click": pl.Int8, "user_id": pl.Int64}).write_parquet(made / "norows.parquet")
    for name, separator in (("odd.csv", "~"), ("log.csv", ";")):
        rows = ((separator.join(map(str, row))) for row in (("click", "ad"), (0, 1), (1, 2), (0, 2)))
        (made / name).write_text("\n".join(rows))
    (made / "ctr.yaml").write_text("model: gdcn")
    return made


@pytest.fixture
def told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], process_as_it_was: None
) -> Iterator[Told]:
    """Run ``sluice`` and return what it says on stderr, without the word error."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sluice", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert (caught.value.code, out.strip()) == (2, ""), err
        assert "Traceback" not in err
        return err.strip().removeprefix("error: ")

    yield run
    assert not (folder / "out").exists()


# (command, message)
LINES = [
    (
        "init --data missing.csv --out out",
        "missing.csv: nothing found; looked for a CSV file, a folder of them, or files that the pattern matches. "
        "check data.path.",
    ),
    (
        "init --data nothing --out out",
        "nothing: nothing found; looked for files named *.csv, *.tsv, *.txt, *.gz. check data.path.",
    ),
    (
        "init --data norows.parquet --out out",
        "norows.parquet: there are no rows. give a log with a header and rows.",
    ),
    (
        "init --data odd.csv --out out",
        "odd.csv: its only column is 'click~ad', and does not hold 0 and 1. if that is several, put commas, tabs, "
        "semicolons or bars between them.",
    ),
    (
        "init --data log.csv --label clikc --out out",
        "log.csv: no column 'clikc'. did you mean 'click'? known: 'ad', 'click'.",
    ),
    (
        "init --data log.csv",
        "ctr.yaml: is there already. give another --out, or --force to replace it.",
    ),
    (
        "init --data log.csv --out log.csv/ctr.yaml",
        "log.csv/ctr.yaml: can't be used (a file is in the way). give another path, or see to its rights and room.",
    ),
    (
        "init --data log.csv --out nothing --force",
        "nothing: can't be used (Is a directory). give another path, or see to its rights and room.",
    ),
    ("features -c nothing", "nothing: can't be read (Is a directory)"),
    (
        "train --resume nothing",
        "nothing: no run to resume here. give the folder of a run, which holds config.yaml.",
    ),
    ("train --run a/b", "--run: 'a/b' can't name a folder. use letters, digits, - _ ."),
    (
        "compare -c ctr.yaml --arm none",
        "command line: --arm: a comparison needs two arms, got 1. for example --arm none --arm sigmoid2, or "
        '--arm base --arm "deep=model.cross_layers=5".',
    ),
    (
        "compare -c ctr.yaml --arm none --arm sigmod2",
        "command line: --arm: no gate 'sigmod2'. did you mean 'sigmoid2'? a name for the configuration as it "
        "stands must differ more.",
    ),
    ("compare --experiment missing.yaml", "missing.yaml: no such file. give the YAML of an experiment."),
    (
        "gates check sigmod",
        f"unknown gate 'sigmod'. did you mean 'sigmoid'? known: {', '.join(map(repr, sorted(GATES)))}.",
    ),
    (
        "gates check missing.py:MyGate",
        "missing.py: no such file. give the path of a .py file that holds a gate.",
    ),
    ("promote clicks", "sluice promote: give one of --version, --run and --rollback"),
    (
        "score -m nothing --data log.parquet --out out",
        "nothing/bundle.json: no bundle here. a bundle is a folder with bundle.json; sluice train makes one.",
    ),
    (
        "score -m models:/clicks --data log.parquet --out out",
        "models:/clicks: not a model's URI. write models:/name@alias, models:/name/version, or a path.",
    ),
    (
        "score -m bundle --data nothing --out out.csv",
        "nothing: this is a folder. give one .parquet or .csv file of raw rows.",
    ),
    (
        "score -m bundle --data log.parquet --out nothing",
        "nothing: scores are written into one file. let it end in .parquet or .csv.",
    ),
    (
        "score -m bundle --data odd.csv --out out.csv",
        "odd.csv: holds none of the model's columns. it reads user_id, city, clicked, hour, item_id, price, tags.",
    ),
    ("materialize --out out --redis redis://x", "sluice materialize: give --out or --redis, one of them"),
    ("serve", "no model to serve. give --model models:/name@champion, or set SLUICE_MODEL."),
    ("serve -m bundle --port -1", "server settings: port: must be at least 0, got -1"),
    (
        "serve -m bundle --keys missing.json",
        "missing.json: the keys can't be read (No such file or directory). sluice keys new makes one.",
    ),
    ("keys list log.csv", "log.csv: not valid JSON: expected value at line 1 column 1"),
    (
        "keys new out --scopes scroe",
        "--scopes: no scope 'scroe'. did you mean 'score'? known: 'admin', 'events', 'score'.",
    ),
    (
        "experiments results gates --events sqlite:///missing.db",
        f"sqlite:///missing.db: the database can't be used (there is no such file). {DATABASE}",
    ),
    (
        "events export --events sqlite:///missing.db --out out",
        f"sqlite:///missing.db: the database can't be read (there is no such file). {DATABASE}",
    ),
    (
        "score -m bundle --data log.parquet --out out.csv --json nothing",
        "--json nothing: this is a folder. name a file, or - to have it printed.",
    ),
    (
        "bench truth --json nothing",
        "--json nothing: this is a folder. name a file, or - to have it printed.",
    ),
    ("bench tasks --at-least auc", "--at-least 'auc': a bar is written key=number"),
    ("bench gates --data . --part 3", "--part: '3' is no part. write 1/2 and, beside it, 2/2."),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=[line for line, _ in LINES])
def test_a_wrong_line_is_told_in_one(line: str, message: str, told: Told) -> None:
    assert told(*line.split()) == message


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("serv", "Did you mean 'serve'?"),
        ("bench nosuch", "No such command 'nosuch'"),
        ("train --epoch 3", "No such option: --epoch"),
        ("compare --seeds -1", "'--seeds'"),
        ("bench accuracy", "Missing option '--data'"),
        ("events export --day 2026-13-01", "'2026-13-01' does not match"),
    ],
)
def test_a_line_that_is_no_command_is_told_by_its_part(line: str, part: str, told: Told) -> None:
    assert part in told(*line.split())


def test_a_port_that_is_taken(told: Told) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = told("serve", "-m", "bundle", "--port", port)
    assert message == f"127.0.0.1:{port}: the port is taken. give another with --port; 0 takes any."


def test_a_result_that_could_not_be_written_is_told_before_the_work(
    folder: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = "name a file, or - to have it printed."
    for target in ("log.csv/told.json", "log.csv/deep/told.json"):
        assert told("train", "--json", target) == (
            f"--json {target}: nothing can be written into {folder}/log.csv. {remedy}"
        )
    monkeypatch.setattr("pipelines.commands.result.os.access", lambda *_: False)
    assert (
        told("train", "--json", "told.json") == f"--json told.json: nothing can be written into {folder}. {remedy}"
    )


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.EACCES, "Permission denied"), (errno.ENOSPC, "No space left on device")]
)
def test_a_place_that_may_not_be_written_or_is_full(
    code: int, reason: str, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **options: str) -> None:
        raise OSError(code, reason, f"{options['dir']}/.ctr.tmp")

    monkeypatch.setattr("pipelines.features.files.tempfile.mkstemp", fail)
    assert told("init", "--data", "log.csv", "--out", "out") == (
        f"out: can't be used ({reason}). give another path, or see to its rights and room."
    )
