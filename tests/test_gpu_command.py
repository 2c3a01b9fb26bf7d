"""benchmarks/gpu.py without a GPU: every stage runs at toy sizes, and what goes wrong in one item costs no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "benchmarks/gpu.py"), *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_every_stage_but_the_build_runs_on_a_cpu(tmp_path: Path) -> None:
    done = command("--device", "cpu", "--only", "tests,sanitizer,roofline,steps", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert list(results["stages"]) == ["tests", "sanitizer", "roofline", "steps"]
    assert results["environment"]["torch"] == torch.__version__
    rows = {name: {row["item"]: row for row in stage["rows"]} for name, stage in results["stages"].items()}
    assert rows["tests"]["tests/test_cuda.py"]["passed"] > 20
    assert rows["roofline"]["copy"]["rate"] > 0
    assert all(row["verdict"] == "ok" for stage in rows.values() for row in stage.values())
    assert all(row["over_floor"] > 0 for item, row in rows["roofline"].items() if "," in item)
    for item, row in rows["steps"].items():
        assert row["methods"]["tap"]["ratio"] > 0, item
        assert row["error_of_first"] < (1e-4 if "float32" in item else 0.1), item
    for words in ("roofline", "x its floor", "gpt2 autocast: plain step", "passed, 0 failed"):
        assert words in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = command("--only", "steps")
    assert done.returncode == 1 and not done.stderr
    (line,) = done.stdout.splitlines()
    assert "no GPU" in line and "--device cpu" in line


def test_unknown_stages_are_refused() -> None:
    done = command("--only", "steps,roofs")
    assert done.returncode == 2 and "no such stage: roofs" in done.stderr


def test_what_dies_hangs_or_poisons_costs_no_other_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys, time\n"
        "request = json.loads(sys.argv[1])\n"
        "if request.get('list'):\n"
        "    print(json.dumps(['right', 'dies', 'poisons', 'right too', 'hangs', 'never']))\n"
        "for item in request.get('items', []):\n"
        "    if item == 'dies':\n"
        "        print('oh no', flush=True); os._exit(3)\n"
        "    if item == 'hangs':\n"
        "        time.sleep(60)\n"
        "    with open(request['rows'], 'a') as rows:\n"
        "        print(json.dumps({'item': item, 'verdict': 'error' if item == 'poisons' else 'ok', 'message': str(os.getpid())}), file=rows)\n"
        "    if item == 'poisons':\n"
        "        sys.exit(75)\n"
    )
    monkeypatch.setattr(gpu, "CHILD", child)
    rows = gpu.Session("cuda", 9 / 60, ["roofline"], tmp_path / "logs").child("roofline")
    found = {row["item"]: (row["verdict"], row["message"]) for row in rows}
    assert list(found) == ["right", "dies", "poisons", "right too", "hangs", "never"]
    assert found["right"][0] == found["right too"][0] == "ok"
    assert found["poisons"][0] == "error" and found["poisons"][1] != found["right too"][1], "a fresh process came after it"
    assert found["dies"] == ("error", "the process ended with status 3: oh no")
    assert found["hangs"][0] == "error" and "ran into the time limit" in found["hangs"][1]
    assert found["never"] == ("not run", "no time left")


def test_what_an_interrupted_suite_leaves_is_counted(tmp_path: Path) -> None:
    import gpu

    report = tmp_path / "junit.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="x"/><testcase classname="a" name="y"><failure message="no&#10;good">long</failure></testcase>'
        '<testcase classname="a" name="z"><skipped/></testcase><testcase classname="b" name="w"><error>did not load</error></testcase></testsuite></testsuites>'
    )
    assert gpu.count_tests(report) == {"passed": 1, "skipped": 1, "failed": 2, "failures": {"a::y": "no good", "b::w": "did not load"}}


def test_floors() -> None:
    from roofline import H100, ITEMS, Work, predictions, seconds

    assert seconds(Work(3 * 10**9, 0), torch.bfloat16, H100) == pytest.approx((1e-3, 0))
    assert seconds(Work(0, 8 * 10**11), torch.bfloat16, H100) == pytest.approx((0, 1e-3))
    for item in ITEMS.values():  # the bytes of its operands and of what it gives, counted once each
        from ghostgrad import ops

        def size(result: Any) -> int:
            return result.numel() * result.element_size() if isinstance(result, torch.Tensor) else sum(map(size, result)) if isinstance(result, tuple) else 0

        arguments = item.draw("cpu", small=True)
        assert item.total(small=True).bytes == size(arguments) + size(tuple(getattr(ops, item.op)(*arguments))), item.name
    name = next(iter(ITEMS))
    measured: dict[str, Any] = {
        "environment": {"device": "Abacus"},
        "stages": {"roofline": {"rows": [{"item": name, "verdict": "ok", "us": 123.4, "over_floor": 1.5}]}},
    }
    head, rows = predictions(files=[measured])
    assert head[-1] == "measured, µs, on Abacus (over the floor there)"
    assert rows[0][-1] == "123 (1.50)" and {row[-1] for row in rows[1:]} == {"not yet measured"}
    head, rows = predictions(files=[])
    assert head[-1] == "measured" and {row[-1] for row in rows} == {"not yet measured"}


def test_the_page_takes_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import roofline
    import tables
    from store import Results

    page = "<!-- table: gpu-measured -->\n<!-- end of table -->"
    nothing = Results({}, [])
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    assert "not yet measured." in tables.fill(page, nothing)
    rows = {
        "roofline": [{"item": "copy", "verdict": "ok", "us": 1.0, "rate": 3.0e12}, {"item": "product bfloat16", "verdict": "error", "message": "no"}],
        "steps": [
            {
                "item": "mlp float32",
                "verdict": "ok",
                "plain_ms": 1.25,
                "methods": {"null": {"ratio": 1.0}, "tap": {"ratio": 1.034}, "alone": {"verdict": "error"}},
            }
        ],
    }
    results = {"environment": {"device": "Abacus"}, "stages": {name: {"seconds": 1.0, "rows": found} for name, found in rows.items()}}
    (tmp_path / "abacus.json").write_text(json.dumps(results))
    (tmp_path / "cpu.json").write_text(json.dumps({"environment": {}, "rows": []}))  # of another program
    filled = tables.fill(page, nothing)
    assert "| Abacus | 3 | not yet measured | not yet measured | not yet measured |" in filled
    assert "| Abacus | mlp float32 | 1.25 | 1.000 | 1.034 | error |" in filled
