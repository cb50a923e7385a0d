from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ctr_models.errors import ConfigError
from ctr_models.gates import GATES
from ctr_models.gates import contract as contract_module

GOOD = """
import torch
from ctr_models.gates import Gate, register_gate


@register_gate("free")
class FreeGate(Gate):
    slots, bound = frozenset({"feature"}), 2.0

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.v = torch.nn.Parameter(torch.zeros(1, shape.width))

    def forward(self, x, context=None):
        return 2 * torch.sigmoid(self.v)
"""
BAD = GOOD.replace("2 * torch", "3 * torch").replace("free", "loud").replace("FreeGate", "LoudGate")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Compiling takes seconds and has its own test; gates imported from here are forgotten after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    quick = [check for check in contract_module.CHECKS if check.name not in ("compiled", "recall")]
    monkeypatch.setattr(contract_module, "CHECKS", quick)
    monkeypatch.setenv("COLUMNS", "120")
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def gates(app: typer.Typer, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["gates", *words])
    if isinstance(result.exception, ConfigError):
        raise result.exception
    return result.exit_code, result.output


def test_every_gate_is_listed_with_its_slots_cost_and_source(app: typer.Typer) -> None:
    code, output = gates(app)
    assert code == 0
    for name in GATES:
        assert f"\n {name} " in output
    assert "Beside gate none, for 10 fields of dimension 16" in output
    assert next(line for line in output.splitlines() if line.startswith(" none")).split()[1:3] == ["every", "slot"]


def test_the_list_as_json(app: typer.Typer, tmp_path: Path) -> None:
    code, output = gates(app, "--json", "-")
    listed = {gate["name"]: gate for gate in json.loads(output)}
    assert code == 0
    assert list(listed) == list(GATES)
    assert all(set(gate["slots"]) == GATES[name].slots for name, gate in listed.items())
    assert listed["sigmoid"]["slots"]["fusion"] == {"parameters": 32 * 160, "flops_per_row": 2 * 32 * 160 + 320}
    assert listed["sigmoid"]["source"] == "arXiv 2311.04635"
    assert gates(app, "--slot", "depth", "--json", str(tmp_path / "gates.json"))[0] == 0
    kept = json.loads((tmp_path / "gates.json").read_text())
    assert [gate["name"] for gate in kept] == [name for name in GATES if "depth" in GATES[name].slots]
    assert all(set(gate["slots"]) == {"depth"} for gate in kept)


def test_a_misspelt_slot_is_named(app: typer.Typer) -> None:
    with pytest.raises(ConfigError, match="--slot: no slot 'feild'. did you mean 'field'"):
        gates(app, "--slot", "feild")


def test_a_gate_that_holds_the_contract(app: typer.Typer) -> None:
    code, output = gates(app, "check", "squeeze_excite")
    assert code == 0
    assert "Contract of gate squeeze_excite" in output
    assert "checks passed" in output
    assert "failed" not in output
    assert "masks are in [floor, bound]" in " ".join(output.replace("│", " ").split())


def test_a_gate_that_does_not(app: typer.Typer) -> None:
    Path("loud.py").write_text(BAD)
    code, output = gates(app, "check", "loud.py")
    told = " ".join(output.replace("│", " ").split())
    assert code == 1
    assert "outside of [0.0, 2.0]" in told
    assert "Remedy: keep the mask in [floor, bound]" in told
    assert "feature: it differs from gate none" in told
    assert "checks failed" in told


def test_what_the_compilers_print_stays_out_of_the_report(
    app: typer.Typer, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("moody.py").write_text(GOOD.replace("self.v)", "self.v if float(x.sum()) > 0 else -self.v)"))
    code, output = gates(app, "check", "moody.py", "--json", "-")
    assert code == 1
    failed = [check["check"] for check in json.loads(output)["checks"] if not check["passed"]]
    assert "exported" in failed
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["free_gates", "free_gates.py", "free_gates.py:FreeGate", "free_gates.FreeGate"])
def test_a_gate_of_ones_own_by_file_or_dotted_path(app: typer.Typer, name: str) -> None:
    Path("free_gates.py").write_text(GOOD)
    code, output = gates(app, "check", name, "--json", "-")
    found = json.loads(output[output.index("{") :])
    assert code == 0, output
    assert found["passed"]
    assert {check["where"] for check in found["checks"]} == {"any slot", "feature"}


def test_files_without_a_gate_or_with_several_are_refused(app: typer.Typer) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.py: no such file"):
        gates(app, "check", "nowhere.py")
    Path("empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"empty.py: it holds no class derived from Gate"):
        gates(app, "check", "empty.py")
    Path("torn.py").write_text("import\n")
    with pytest.raises(ConfigError, match=r"torn.py: SyntaxError"):
        gates(app, "check", "torn.py")
    Path("two.py").write_text(GOOD + BAD.replace("import torch\n", ""))
    with pytest.raises(
        ConfigError, match=r"two.py: it holds 2 gates: FreeGate, LoudGate. say which: two.py:MyGate"
    ):
        gates(app, "check", "two.py")
    with pytest.raises(ConfigError, match=r"two: it holds 2 gates: FreeGate, LoudGate. say which: two.MyGate"):
        gates(app, "check", "two")
    with pytest.raises(ConfigError, match=r"two.py: no gate 'FreGate'. did you mean 'FreeGate'"):
        gates(app, "check", "two.py:FreGate")
    with pytest.raises(ConfigError, match="unknown gate 'sigmiod'. did you mean 'sigmoid'"):
        gates(app, "check", "sigmiod")
