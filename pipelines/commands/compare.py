"""``sluice compare``: which arm is better, and could it be chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.options import Config, Override
from pipelines.commands.result import Json, write_json
from pipelines.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.config import RunConfig
    from pipelines.experiments.experiment import Experiment
    from pipelines.experiments.offline import OfflineResult

EPILOG = """
Examples:

sluice compare -c ctr.yaml --arm none --arm sigmoid2

sluice compare -c ctr.yaml --arm "open=model.gates.cross=none" --arm "gated=model.gates.cross=sigmoid" --seeds 5

sluice compare -c ctr.yaml --arm base --arm "deep=model.cross_layers=5,model.mlp.dropout=0.2"

sluice compare -c aw_moe.yaml --arm t0.1 --arm t0.05=model.contrast.temperature=0.05

sluice compare -c ctr.yaml --experiment experiment.yaml --json -
"""


def register(app: typer.Typer) -> None:
    """Add ``sluice compare``."""

    @app.command(epilog=EPILOG)
    def compare(
        config: Config = None,
        arm: Annotated[
            list[str] | None,
            typer.Option(
                help="name=model.key=value,... lays values over the model section; the name of a gate puts it into "
                "every slot that takes it; another name alone is the configuration as it stands. Repeatable."
            ),
        ] = None,
        experiment: Annotated[
            Path | None, typer.Option(help="YAML of an experiment, instead of --arm, --control, --seeds, --name.")
        ] = None,
        control: Annotated[str | None, typer.Option(help="Arm the others are compared with; the first.")] = None,
        seeds: Annotated[int, typer.Option(min=1, help="Trainings of each arm.")] = 3,
        name: Annotated[
            str, typer.Option(help="Of the experiment; its folder under <workdir>/experiments.")
        ] = "compare",
        override: Override = None,
        report: Annotated[
            Path | None, typer.Option(help="HTML report. Default: report.html in the experiment's folder.")
        ] = None,
        json: Json = None,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    ) -> None:
        """Train arms on the same rows and compare them.

        Prints the differences in AUC and logloss with intervals from a paired bootstrap that resamples users and
        counts the training seeds. What is trained already is not trained again. Exit code 0 whatever the verdict,
        2 for a mistake in the configuration or the data.
        """
        from rich.console import Console

        from pipelines.config import load_config
        from pipelines.experiments.offline import run_offline

        console, talk = Console(stderr=json == "-"), Console(stderr=True, quiet=quiet)
        run = load_config(config, override or ())
        plan = _experiment(run, experiment, arm or [], control, seeds, name)
        result = run_offline(
            plan, run, progress=not quiet, say=lambda text: talk.print(text, style="dim", highlight=False)
        )
        _print(result, console)
        path = result.write_report(report or run.workdir / "experiments" / plan.name / "report.html")
        write_json(json, {**result.to_dict(), "report": str(path)})
        console.print(f"report: {path}", highlight=False, soft_wrap=True)


def _experiment(
    run: RunConfig, path: Path | None, arms: list[str], control: str | None, seeds: int, name: str
) -> Experiment:
    from ctr_models.errors import ConfigError
    from ctr_models.gates.base import GATES
    from pipelines.experiments.experiment import Arm, Experiment

    if path is not None:
        if arms or control:
            raise ConfigError(
                "--experiment names the arms itself",
                where="command line",
                remedy="give either --experiment or --arm",
            )
        return Experiment.load(path)
    if len(arms) < 2:
        raise ConfigError(
            f"a comparison needs two arms, got {len(arms)}",
            where="command line: --arm",
            remedy='for example --arm none --arm sigmoid2, or --arm base --arm "deep=model.cross_layers=5"',
        )
    made = [Arm.of_gate(text, run.model) if text in GATES else Arm.parse(_no_slip(text)) for text in arms]
    return Experiment.from_tree(
        {
            "name": name,
            "control": control or made[0].name,
            "arms": [one.model_dump(exclude_none=True) for one in made],
            "decision": {"seeds": [run.seed + i for i in range(seeds)]},
        },
        "command line",
    )


def _no_slip(text: str) -> str:
    """Return an arm's text, unless it is all but a gate's name: as a name it would change nothing, silently."""
    from difflib import get_close_matches

    from ctr_models.errors import ConfigError
    from ctr_models.gates.base import GATES

    if close := get_close_matches(text, list(GATES), n=1, cutoff=0.8):
        raise ConfigError(
            f"no gate {text!r}",
            where="command line: --arm",
            remedy=f"did you mean {close[0]!r}? a name for the configuration as it stands must differ more",
        )
    return text


def _print(result: OfflineResult, console: Console) -> None:
    from rich.table import Table

    from pipelines.experiments.report import NAMES

    seeds = len(result.experiment.decision.seeds)
    table = Table(title=f"Test rows, mean of {counted(seeds, 'seed')}", title_justify="left")
    table.add_column("arm")
    for metric in NAMES:
        table.add_column(NAMES[metric], justify="right")
    table.add_column("rows/s", justify="right")
    for arm in result.arms:
        speed = sum(arm.rows_per_second) / len(arm.rows_per_second)
        table.add_row(arm.name, *(_with_deviation(arm, metric) for metric in NAMES), f"{speed:,.0f}")
    if result.truth:
        table.add_row("best possible", *(f"{result.truth[m]:.5f}" for m in NAMES), "", style="dim")
    console.print(table)
    _print_gates(result, console)

    level = f"{100 * (1 - result.experiment.decision.alpha):g} %"
    by = "users" if result.clustered else "rows"
    together = ", all challengers together (Holm)" if len(result.arms) > 2 else ""
    title = f"Difference from {result.experiment.control}, {level} interval over {by} and seeds{together}"
    table = Table(title=title, title_justify="left")
    for column in ("arm", "metric", "difference", "interval", "p", "verdict"):
        table.add_column(column, justify="left" if column in ("arm", "metric", "verdict") else "right")
    style = {"better": "green", "worse": "red", "noise": "dim"}
    for d in result.differences:
        interval = f"{d.low:+.5f} to {d.high:+.5f}"
        verdict = f"[{style[d.verdict]}]{d.verdict}[/]"
        table.add_row(d.challenger, NAMES[d.metric], f"{d.value:+.5f}", interval, f"{d.p:.4f}", verdict)
    console.print(table)
    if seeds == 1:
        console.print("one seed: the intervals do not cover how training again would turn out", style="yellow")
    for reason in result.reasons:
        console.print(reason, highlight=False)
    console.print(f"winner: [bold]{result.winner}[/]", highlight=False)


def _print_gates(result: OfflineResult, console: Console) -> None:
    """Print the telemetry of gates that do something."""
    from rich.table import Table

    told = [(arm.name, path, own) for arm in result.arms for path, own in arm.telemetry().items() if own.get("std")]
    figures = [f for f in dict.fromkeys(f for *_, own in told for f in own) if not f.startswith("choice_")]
    if not told:
        return
    table = Table(title="Gates on the first valid rows, best epoch", title_justify="left")
    for column in ("arm", "gate", *figures):
        table.add_column(column, justify="left" if column in ("arm", "gate") else "right")
    for arm, path, own in told:
        table.add_row(arm, path, *(f"{own[f]:.4f}" if f in own else "" for f in figures))
    console.print(table)


def _with_deviation(arm: Any, metric: str) -> str:
    mean = f"{arm.mean(metric):.5f}"
    return mean if len(arm.metrics) == 1 else f"{mean} ± {arm.deviation(metric):.5f}"
