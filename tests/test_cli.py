"""The command line: what it prints and how it exits."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ghostgrad as gg
from ghostgrad.cli import main
from ghostgrad.papers import SETTINGS, suggest

TINY = ["run", "label-noise/one-point", "--steps", "60", "--read-every", "20", "--num-seeds", "1", "--compile", "no", "--quiet"]


def test_list_names_papers_and_claims(capsys: pytest.CaptureFixture[str]) -> None:
    """All settings briefly; of those that are named, every claim with its bound."""
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name, cls in SETTINGS.items():
        assert name in out
        assert cls.paper in out
    assert main(["list", "label-noise/*", "dynamics/lmnt"]) == 0
    out = capsys.readouterr().out
    for name in ("label-noise/one-point", "label-noise/relu-1d", "dynamics/lmnt"):
        for claim in SETTINGS[name]().claims():
            assert claim.text in out
            assert claim.criterion in out
    assert "stability" not in out.replace("ghostgrad list", "")
    assert main(["list", "relu1d"]) == 2
    assert "Did you mean label-noise/relu-1d" in capsys.readouterr().err


def test_a_reader_that_stops_reading_is_no_error() -> None:
    command = f"{sys.executable} -m ghostgrad.cli list | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("label-noise/one-point\n", "")


def test_the_docs_name_every_setting() -> None:
    """The table of docs/papers.md, and, of all but the label-noise settings, a section on what was found."""
    docs = Path(__file__).parents[1] / "docs"
    papers, found = (docs / "papers.md").read_text(), (docs / "papers.md").read_text() + (docs / "findings.md").read_text()
    for name in SETTINGS:
        assert f"`{name}`" in papers or f"`{name.split('/')[1]}`" in papers, name
        assert f"## {name}\n" in found or name.startswith("label-noise/"), name


@pytest.mark.parametrize("name", SETTINGS)
def test_help_shows_every_field(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", name, "--help"]) == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(SETTINGS[name]):
        assert f"--{field.name.replace('_', '-')}" in out
    for option in ("--out", "--resume", "--overwrite", "--device"):
        assert option in out


@pytest.mark.parametrize(
    ("typed", "meant"), [("relu-1d", "label-noise/relu-1d"), ("label-noise/relu1d", "label-noise/relu-1d"), ("onepoint", "label-noise/one-point")]
)
def test_unknown_settings_suggest_near_ones(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert meant in suggest(typed)
    assert main(["run", typed]) == 2
    assert f"Did you mean {meant}" in capsys.readouterr().err


def test_a_name_in_two_families_suggests_both() -> None:
    assert {"label-noise/matrix-sensing", "noise-stability/matrix-sensing"} <= set(suggest("matrix-sensing"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "usage: ghostgrad COMMAND"),
        (["lst"], "Did you mean list?"),
        (["run"], "NAME is one of"),
        (["run", "zzz"], "unknown setting 'zzz'"),
        ([*TINY, "--lr=-1"], "lr must be positive and finite, got -1.0"),
        ([*TINY, "--steps", "many"], "--steps"),
        ([*TINY, "--wdith", "3"], "--wdith"),
        ([*TINY, "--device", "nonsense"], "--device"),
        (["run", "label-noise/matrix-sensing", "--num-measurements", "300"], "statistical dimension 247.5"),
    ],
)
def test_usage_errors_exit_with_2(args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
    assert not list(tmp_path.iterdir()), "nothing is written for a command that was not understood"


def test_a_run_prints_its_claims_and_exits_by_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(TINY) == 1  # 60 steps do not do it
    out = capsys.readouterr().out
    assert "tanh: exactly one unit stays active" in out
    assert "does not hold here" in out
    run = tmp_path / "runs" / "label-noise" / "one-point-0"
    for file in (
        "config.json",
        "metrics.csv",
        "timings.csv",
        "checkpoint.pt",
        "summary.json",
        "figures/label-noise-one-point.png",
        "figures/label-noise-one-point.svg",
    ):
        assert (run / file).exists(), file
    assert main(TINY) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*TINY, "--resume"]) == 1
    assert main([*TINY, "--resume", "--width", "7"]) == 2
    assert "width: 5 there, 7 asked for" in capsys.readouterr().err


def test_a_claim_that_holds_exits_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*TINY, "--activation", "tanh", "--width", "2", "--target", "1.0", "--steps", "4000", "--settle", "0.3", "--out", str(tmp_path / "run")]
    assert main(args) == 0, capsys.readouterr().out
    assert "holds" in capsys.readouterr().out


def test_divergence_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["run", "label-noise/matrix-sensing", "--steps", "200", "--read-every", "10", "--lr", "0.01", "--compile", "no", "--quiet"]
    assert main([*args, "--num-seeds", "1", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "noise', seed 0" in error
    assert "--lr 0.005" in error


def test_missing_extras_say_how_to_install_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["run", "label-noise/relu-1d"]) == 2
    assert 'pip install "ghostgrad[papers]"' in capsys.readouterr().err


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_says_what_a_report_needs(name: str) -> None:
    """A title, what each size changes, and calls of the library that exist and that its module makes."""
    cls = SETTINGS[name]
    assert cls.title
    for size in ("small", "default", "paper"):
        assert cls.sized(size).claims()
    source = inspect.getsource(sys.modules[cls.__module__])
    assert cls.ops
    for op in cls.ops:
        assert op.startswith("gg.")
        assert callable(functools.reduce(getattr, op.split(".")[1:], gg)), op
        assert op in source, f"{name} names {op} but does not call it"


def test_size_changes_the_defaults_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--size picks the defaults; an option that is given wins."""
    monkeypatch.setattr(SETTINGS["label-noise/one-point"], "SMALL", {"steps": 40, "read_every": 10, "num_seeds": 2})
    args = ["run", "label-noise/one-point", "--size", "small", "--num-seeds", "1", "--compile", "no", "--quiet", "--out", str(tmp_path / "r")]
    assert main(args) == 1
    fields = json.loads((tmp_path / "r" / "config.json").read_text())["fields"]
    assert (fields["steps"], fields["read_every"], fields["num_seeds"]) == (40, 10, 1)
    assert main(["run", "label-noise/one-point", "--size", "huge"]) == 2
