"""The report: settings in processes of their own, a crash or an interrupt that loses no other, and a page that says what was found."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from ghostgrad.cli import main
from ghostgrad.papers import SETTINGS
from ghostgrad.report import Entry, Report, ReportOptions, _of_paper, collect, plan, report, write_page
from ghostgrad.training import Claim, RunDirectoryError, train

ONE, MANY = "label-noise/one-point", "label-noise/*"
TINY = {"steps": 60, "read_every": 20, "num_seeds": 2}


def finished(options: ReportOptions, name: str, **fields: object) -> Entry:
    """A tiny run of the setting, as if it were the report's."""
    (entry,) = plan(replace(options, only=(name,)))
    entry = replace(entry, setting=replace(entry.setting, **fields))  # type: ignore[arg-type]
    train(entry.setting, entry.directory, compiled=False, progress=False)
    return collect(entry)


class _Nothing(SETTINGS[ONE]):  # type: ignore[misc]
    """One of its claims has no value for one seed."""

    def claims(self) -> list[Claim]:
        return [_Missing("nothing", "tanh, with noise", "reg_over_floor", "<=", 1.0)]


class _Missing(Claim):
    def values(self, metrics: pd.DataFrame) -> dict[int, float]:
        return super().values(metrics) | {0: math.nan}


class _Page(HTMLParser):
    """The text, the images' bytes, and whether every element that was opened was closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.images, self.open = "", list[bytes](), list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            kind, data = (dict(attrs)["src"] or "").split(",", 1)
            assert kind == "data:image/png;base64"
            self.images.append(base64.b64decode(data))
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_setting_has_a_place(tmp_path: Path) -> None:
    for size in ("small", "default", "paper"):
        entries = plan(ReportOptions(size=size, out=tmp_path))  # type: ignore[arg-type]
        assert [entry.name for entry in entries] == list(SETTINGS)
        assert all(size in entry.command for entry in entries)


def test_a_folder_of_images_reaches_every_setting_that_reads_some(tmp_path: Path) -> None:
    entries = plan(ReportOptions(data="some/folder", out=tmp_path))
    reading = [entry for entry in entries if "--data" in entry.command]
    assert {entry.name for entry in reading} == {name for name, cls in SETTINGS.items() if "data" in cls.__dataclass_fields__}
    assert len(reading) >= 1
    assert all(asdict(entry.setting)["data"] == "some/folder" and "some/folder" in entry.setting.data_used() for entry in reading)


def test_the_page_tells_claims_measured_values_and_verdicts(tmp_path: Path) -> None:
    options = ReportOptions(out=tmp_path, only=(MANY,))
    entry = finished(options, ONE, **TINY)
    others = [collect(other) for other in plan(options) if other.name != ONE]
    page = write_page([entry, *others], options, 1.0)
    html, markdown = _Page(page.read_text()), (tmp_path / "report.md").read_text()
    assert not html.open
    assert entry.summary is not None
    for text in (html.text, markdown):
        for claim in entry.summary["claims"]:
            assert claim["text"] in text
            assert claim["verdict"] in text
        assert entry.setting.title in text
        assert "gg.output_sqnorms" in text
        assert f"{100 * entry.share:.1f} %" in text
        assert f"ghostgrad run {ONE} --size small" in text
        assert "synthetic" in text
        assert "It was not run to its end" in text
        assert ", ".join(other.name for other in others) in text
    assert html.images == [entry.figure.read_bytes()]
    (linked,) = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert (tmp_path / linked).read_bytes() == entry.figure.with_suffix(".svg").read_bytes()


def test_what_a_page_says_is_escaped(tmp_path: Path) -> None:
    options = ReportOptions(out=tmp_path, only=(ONE,))
    entry = finished(options, ONE, **TINY)
    assert entry.summary is not None
    entry.summary["claims"][0] |= {"text": "a < b | c", "formula": "‖x‖² < |y|"}
    write_page([entry], options, 1.0)
    assert "a &lt; b | c" in (tmp_path / "report.html").read_text()
    assert "| a < b \\| c | `‖x‖² < \\|y\\|` |" in (tmp_path / "report.md").read_text()


def test_what_is_no_number_is_null_in_the_summary_and_said_on_the_page(tmp_path: Path) -> None:
    """JSON has neither NaN nor infinity."""
    options = ReportOptions(out=tmp_path, only=(ONE,))
    (entry,) = plan(options)
    entry = replace(entry, setting=_Nothing(steps=60, read_every=20, num_seeds=2))
    train(entry.setting, entry.directory, compiled=False, progress=False)
    text = (entry.directory / "summary.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    write_page([collect(entry)], options, 1.0)
    assert "no value for 1 of 2 seeds" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        (["holds", "holds"], "holds"),
        (["holds", "does not hold here"], "holds in part"),
        (["holds in part", "does not hold here"], "holds in part"),
        (["does not hold here", "does not hold here"], "does not hold here"),
        (["not testable at this size", "holds"], "holds"),
        (["not testable at this size"], "not testable at this size"),
    ],
)
def test_a_papers_verdict(words: list[str], verdict: str) -> None:
    assert _of_paper(words) == verdict


def test_only_a_finished_run_of_the_same_fields_is_collected(tmp_path: Path) -> None:
    options = ReportOptions(out=tmp_path)
    entry = finished(options, ONE, **TINY)
    assert entry.summary is not None
    other = collect(replace(entry, summary=None, setting=replace(entry.setting, num_seeds=3)))
    assert other.summary is None
    assert "num_seeds: 2 there, 3 here" in other.problem
    assert "--overwrite" in other.problem
    file = entry.directory / "summary.json"
    whole = file.read_text()
    for broken in (whole[: len(whole) // 2], "[]", json.dumps({"fields": asdict(entry.setting)})):
        file.write_text(broken)
        assert "cannot be read" in collect(replace(entry, summary=None)).problem
    file.unlink()
    assert collect(replace(entry, summary=None)).problem == "It was not run to its end."


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The label-noise settings, so small that a report runs them in seconds, here and in its processes.

    A file called slow makes relu-1d long, one called crash kills it.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, pathlib\n"
        "if any('ghostgrad' in word for word in sys.orig_argv):\n"
        "    from ghostgrad.papers import SETTINGS\n"
        "    here = pathlib.Path(__file__).parent\n"
        f"    for name in {[name for name in SETTINGS if name.startswith('label-noise')]!r}:\n"
        f"        SETTINGS[name].SMALL = {TINY!r} | ({{'steps': 400_000}} if 'relu' in name and (here / 'slow').exists() else {{}})\n"
        "    if (here / 'crash').exists():\n"
        "        SETTINGS['label-noise/relu-1d'].problem = lambda *args: os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH", "")))))
    for name in SETTINGS:
        if name.startswith("label-noise"):
            monkeypatch.setattr(SETTINGS[name], "SMALL", TINY)
    return tmp_path


def run(here: Path, **options: object) -> Report:
    return report(ReportOptions(out=here / "out", only=(MANY,), quiet=True, **options))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_crash_loses_no_other_and_the_same_command_goes_on(small: Path) -> None:
    (small / "crash").touch()
    first = run(small, jobs=2)
    assert first.complete
    lost = [entry for entry in first.entries if entry.summary is None]
    assert [entry.name for entry in lost] == ["label-noise/relu-1d"]
    assert "ended by signal 9" in lost[0].problem
    assert "ended by signal 9" in first.page.read_text()
    kept = {entry.name: (entry.directory / "metrics.csv").stat().st_mtime_ns for entry in first.entries if entry.summary}
    (small / "crash").unlink()
    again = run(small, jobs=1)
    assert all(entry.summary for entry in again.entries)
    assert {name: (small / "out" / name / "metrics.csv").stat().st_mtime_ns for name in kept} == kept, "finished runs are collected, not run again"
    assert len(_Page(again.page.read_text()).images) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_report_writes_its_page_and_goes_on(small: Path, kind: signal.Signals) -> None:
    (small / "slow").touch()
    command = [sys.executable, "-m", "ghostgrad.cli", "report", "--out", str(small / "out"), "--only", MANY, "--jobs", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (small / "out" / "label-noise" / "relu-1d" / "timings.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(kind)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "goes on from here" in err
    page = (small / "out" / "report.md").read_text()
    assert "label-noise/relu-1d" in page.split("**No result:**")[1].splitlines()[0]
    assert (small / "out" / "label-noise" / "one-point" / "summary.json").exists()
    assert (small / "out" / "label-noise" / "relu-1d" / "checkpoint.pt").exists(), "what ran was asked to save itself"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "nothing/*"], "no setting is called 'nothing/*'"),
        (["--jobs", "-1", "--collect"], "jobs must be at least 0, got -1"),
        (["--size", "huge"], "huge"),
        (["--out", "/proc/nowhere", "--collect"], "cannot write a report to /proc/nowhere"),
    ],
)
def test_bad_options_exit_with_2(args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *args]) == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_begun_is_its_own_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here a folder stands where its log would be."""
    (tmp_path / f"{ONE}.log").mkdir(parents=True)
    assert main(["report", "--out", str(tmp_path), "--only", ONE, "--quiet"]) == 1
    assert "0 of 1 settings have a result" in capsys.readouterr().out
    assert "It could not be run (IsADirectoryError" in (tmp_path / "report.md").read_text()


def test_a_report_beside_another_writes_its_own_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has its page half written, and ends a run that this one saw unfinished; a page that is a folder is refused before anything is run."""
    options = ReportOptions(out=tmp_path, only=(ONE,), quiet=True)
    monkeypatch.setattr(SETTINGS[ONE], "SMALL", TINY)
    monkeypatch.setattr("ghostgrad.report._run", lambda entries, options: ([collect(entry) for entry in entries], bool(finished(options, ONE))))
    theirs = tmp_path / ".report.md.1.part"
    theirs.write_text("half")
    done = report(options)
    assert done.entries[0].summary is not None
    assert "No result" not in done.page.read_text()
    assert theirs.read_text() == "half"
    assert {path.name for path in tmp_path.iterdir() if path.name != "label-noise"} == {theirs.name, "report.html", "report.md"}
    done.page.unlink()
    done.page.mkdir()
    with pytest.raises(RunDirectoryError, match=r"cannot write a report to .*: report\.html is a directory there"):
        report(options)


def test_collecting_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--collect", "--out", str(tmp_path), "--only", MANY]) == 1
    assert "0 of 3 settings have a result" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]
