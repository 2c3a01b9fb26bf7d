"""The benchmarks: what is timed is right, and the statistic is the one that is stated. Never a time."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ghostgrad as gg
from ghostgrad.bench import measure, steps
from ghostgrad.bench.problems import PROBLEMS, SMALL, Problem, build
from ghostgrad.cli import main
from helpers import in_own_process, needs_peak_memory, relative_error

ROOT = Path(__file__).resolve().parent.parent


def exact_sqnorms(problem: Problem) -> Tensor:
    """(B,): autograd in float64, one sample at a time."""
    model = copy.deepcopy(problem.model).double()
    inputs = [t.double() if t.is_floating_point() else t for t in problem.inputs]
    target = problem.target.double() if problem.target.is_floating_point() else problem.target
    norms = []
    for i in range(len(target)):
        loss = problem.loss_fn(model(*(t[i : i + 1] for t in inputs)), target[i : i + 1])
        norms.append(sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))))
    return torch.stack(norms)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_steps_of_a_problem_are_right(name: str) -> None:
    problem, other = build(name, **SMALL[name]), build(name, **SMALL[name])
    torch.testing.assert_close(problem.losses(problem.model(*problem.inputs), problem.target).mean(), problem.loss_fn(other.model(*other.inputs), other.target))
    exact = exact_sqnorms(problem)
    assert relative_error(steps.alone(problem)(), exact) < 1e-4
    assert all(p.grad is None for p in problem.model.parameters())
    assert relative_error(steps.in_a_tap(problem)(), exact) < 1e-4
    steps.plain(other)()  # for the LSTM another way to write the same function
    for p, q in zip(problem.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_building_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = build("tiny"), build("tiny")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.inputs[0], second.inputs[0]) and torch.equal(first.model[0].weight, second.model[0].weight)  # type: ignore[index]


# ---------------------------------------------------------------------------------------------------------------------------------------
# The statistic


def test_a_ratio_is_the_median_over_pairs() -> None:
    times = [(1.0, 2.0), (10.0, 30.0), (100.0, 100.0), (1.0, 9.0), (2.0, 5.0)]  # ratios 2, 3, 1, 9, 2.5; the ratio of the medians would be 4.5
    assert measure.summary(times) == {"pairs": 5, "plain_ms": 2000.0, "ratio": 2.5, "low": 2.0, "high": 3.0}
    assert measure.summary([(2.0, 3.0)]) == {"pairs": 1, "plain_ms": 2000.0, "ratio": 1.5, "low": 1.5, "high": 1.5}


def test_processes_give_median_and_range() -> None:
    assert measure.over_processes([{"ratio": 1.2}, {"ratio": 1.0}, {"ratio": 1.1}]) == (1.1, 1.0, 1.2)
    assert measure.over_processes([{"ratio": 1.2, "plain_ms": 3.0}], "plain_ms") == (3.0, 3.0, 3.0)


def recorded(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> tuple[list[str], dict[str, Callable[[], None]]]:
    """Steps that take made-up times, and the order in which the clock was put to them."""
    order: list[str] = []
    made = {name: (lambda name=name: order.append(name)) for name in seconds}
    clock = {step: seconds[name] for name, step in made.items()}

    def read(step: Callable[[], None], repeat: int = 1, **_: object) -> float:
        step()
        return clock[step]

    monkeypatch.setattr(measure, "_clock", read)
    return order, made


def test_each_step_follows_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    order, made = recorded(monkeypatch, {"plain": 1.0, "a": 3.0, "b": 0.5})
    plain = made.pop("plain")
    times = measure.interleave(plain, made, pairs=2)
    assert order == ["plain", "a", "b"] + ["plain", "a", "plain", "b"] * 2  # the first round warms up
    assert times == {"a": [(1.0, 3.0)] * 2, "b": [(1.0, 0.5)] * 2}


def test_slow_steps_get_fewer_pairs_but_not_less_than_three(monkeypatch: pytest.MonkeyPatch) -> None:
    _, made = recorded(monkeypatch, {"plain": 1.0, "a": 1.0})
    assert len(measure.interleave(made["plain"], {"a": made["a"]}, pairs=50, seconds=0.0)["a"]) == 3
    assert len(measure.interleave(made["plain"], {"a": made["a"]}, pairs=2, seconds=0.0)["a"]) == 2


def test_short_steps_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SHORTEST", 1e-3)
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1

    ((plain, other),) = measure.interleave(lambda: None, {"a": step}, pairs=1)["a"]
    assert calls > 2 and math.isfinite(plain + other)


# ---------------------------------------------------------------------------------------------------------------------------------------
# What may be timed


def test_wrong_norms_are_not_timed() -> None:
    def scaled(factor: float) -> steps.Method:
        return lambda problem: lambda: factor * steps.alone(problem)()

    def by_parameter(*names: str) -> steps.Method:
        def prepare(problem: Problem) -> Callable[[], dict[str, Tensor]]:
            norms = gg.sqnorms(problem.model, problem.loss_fn, *problem.inputs, problem.target, by_param=True)
            return lambda: {name: norms[name] for name in names}

        return prepare

    def broken(problem: Problem) -> Callable[[], Tensor]:
        raise NotImplementedError("not for this\nmodel")

    methods: dict[str, steps.Method] = {
        "right": scaled(1.0),
        "2 % off": scaled(1.02),
        "nan": scaled(math.nan),
        "all": by_parameter("0.weight", "0.bias", "2.weight", "2.bias"),
        "some": by_parameter("0.weight", "2.bias"),
        "mean": lambda problem: lambda: steps.alone(problem)().mean(),
        "broken": broken,
    }
    answer = steps.respond({"problem": "tiny", "methods": list(methods), "compiled": False, "pairs": 1, "seconds": 0.0}, methods)
    assert {name: found["verdict"] for name, found in answer.items()} == {
        "right": "ok",
        "2 % off": "wrong 2e-02",
        "nan": "wrong nan",
        "all": "ok",
        "some": "missing 2 of 4",
        "mean": "wrong shape",
        "broken": "error (NotImplementedError)",
    }
    assert answer["broken"]["message"] == "not for this model"
    assert {name for name, found in answer.items() if "ratio" in found} == {"right", "all"}


# ---------------------------------------------------------------------------------------------------------------------------------------
# Processes


def child(code: str) -> list[str]:
    return [sys.executable, "-c", f"import json, os, sys; {code}"]


def test_a_child_gets_threads_and_allocator() -> None:
    echo = child("print('noise'); print(json.dumps({'request': json.loads(sys.argv[-1]), 'environment': dict(os.environ)}))")
    for allocator, settings in measure.ALLOCATORS.items():
        answer = measure.in_child(echo, {"problem": "x"}, threads=2, allocator=allocator)
        assert answer["request"] == {"problem": "x", "threads": 2}
        assert answer["environment"]["OMP_NUM_THREADS"] == "2"
        assert {name: value for name, value in answer["environment"].items() if name.startswith("MALLOC_")} == settings


@pytest.mark.parametrize(
    ("code", "message"),
    [("sys.exit(3)", "status 3"), ("raise ValueError('why')", "status 1: ValueError: why"), ("import time; time.sleep(60)", "no answer in 0.5 s")],
)
def test_a_child_without_an_answer(code: str, message: str) -> None:
    with pytest.raises(measure.ChildError, match=message):
        measure.in_child(child(code), {}, threads=1, timeout=0.5 if "sleep" in code else None)


def test_the_child_process_measures() -> None:
    command = [sys.executable, "-m", "ghostgrad.bench.steps"]
    request = {"problem": "tiny", "methods": ["null", "tap", "alone"], "compiled": False, "pairs": 2, "seconds": 60.0}
    answer = measure.in_child(command, request, threads=1)
    for found in answer.values():
        assert found["verdict"] == "ok" and found["pairs"] == 2
        assert found["low"] <= found["ratio"] <= found["high"] and found["plain_ms"] > 0


@needs_peak_memory
def test_peak_memory_counts_what_a_step_takes() -> None:
    code = """
from ghostgrad.bench.measure import peak_memory
kept = []
def step():
    kept.append(torch.ones(2 ** 20))  # 4 MiB stay after each of three calls
    torch.ones(2 ** 23).sum()  # 32 MiB go
torch.ones(1000).sum()
print(peak_memory(step))
"""
    assert 43 < in_own_process(code, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0") < 48


@needs_peak_memory
def test_the_child_process_measures_memory() -> None:
    request = {"problem": "tiny", "methods": ["tap"], "compiled": False, "memory": True}
    answer = measure.in_child([sys.executable, "-m", "ghostgrad.bench.steps"], request, threads=1, allocator="returned")
    assert answer["tap"]["peak_mib"] >= 0


# ---------------------------------------------------------------------------------------------------------------------------------------
# The command


def test_bench_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", "tiny", "--pairs", "1", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("tiny"))
    assert row.split()[2] == "ms"
    assert all(float(cell) > 0 for cell in (row.split()[1], *row.split()[3:]))
    stored = json.loads(out.read_text())
    assert stored["threads"] == 1 and stored["environment"]["torch"] == torch.__version__
    assert list(stored["rows"]["tiny"]) == ["null", "tap", "alone"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tinny"], "unknown problem 'tinny'. Did you mean tiny?"),
        (["zzz"], "There are tiny, mlp"),
        (["tiny", "--pairs", "0"], "must be at least 1, got 0"),
        (["tiny", "--pairs", "many"], "--pairs"),
        (["tiny", "--allocator", "mine"], "--allocator"),
        (["tiny", "--out", "nowhere/bench.json"], "there is no directory nowhere"),
        (["--threds=2"], "--threds"),
    ],
)
def test_bench_does_not_guess(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *args]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_bench_exits_with_1_where_there_are_no_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from ghostgrad.bench import command

    monkeypatch.setattr(command, "CHILD", child("sys.exit('no memory')"))
    assert main(["bench", "tiny", "mlp", "--pairs", "1"]) == 1
    captured = capsys.readouterr()
    assert "mlp: error. the process ended with status 1: no memory" in captured.err
    assert [line.split() for line in captured.out.splitlines() if line.startswith("tiny")] == [["tiny", "-", "-", "-", "-"]]


# ---------------------------------------------------------------------------------------------------------------------------------------
# benchmarks/: the file of results, the tables, the peers that are PyTorch's own


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def made_up(problem: str, method: str, *ratios: float, verdict: str = "ok", message: str = "", **more: Any) -> dict[str, Any]:
    processes = [{"pairs": 9, "plain_ms": 10.0, "ratio": ratio, "low": ratio, "high": ratio} for ratio in ratios]
    key = {"problem": problem, "method": method, "threads": 1, "compiled": False, "allocator": "kept"}
    return {**key, "verdict": verdict, "message": message, "processes": processes, **more}


ENVIRONMENT = {"processor": "abacus", "cpu_capability": "FINGERS", "cores": 1, "system": "x", "python": "3", "torch": "2", "versions": {"ghostgrad": "0"}}


def test_results_are_merged(scripts: None, tmp_path: Path) -> None:
    from store import Results

    results = Results(ENVIRONMENT, [])
    for row in (made_up("mlp", "null", 1.0), made_up("mlp", "tap", 1.5), made_up("mlp", "tap", 1.2, threads=2), made_up("mlp", "tap", 1.1)):
        results.put(row)
    results.save(tmp_path / "results.json")
    again = Results.load(tmp_path / "results.json")
    assert again.rows == [made_up("mlp", "null", 1.0), made_up("mlp", "tap", 1.1), made_up("mlp", "tap", 1.2, threads=2)]
    assert again.problems() == ["mlp"] and again.problems(threads=2) == []
    again.merge_environment(ENVIRONMENT | {"versions": {"opacus": "1"}})
    assert again.environment == ENVIRONMENT | {"versions": {"ghostgrad": "0", "opacus": "1"}}
    for other in ({"torch": "3"}, {"versions": {"opacus": "2"}}):
        with pytest.raises(ValueError, match="another environment"):
            again.merge_environment(ENVIRONMENT | other)


def test_a_run_over_processes(scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    import run

    arguments = argparse.Namespace(processes=3, pairs=2, seconds=1.0, threads=1, compile=False, allocator="kept")
    right, wrong = {"verdict": "ok", "message": ""}, {"verdict": "wrong 1e-01", "message": ""}

    def rows(*answers: dict[str, dict[str, Any]]) -> list[tuple[str, str, list[float]]]:
        script = iter(copy.deepcopy(answers))
        monkeypatch.setattr(run, "ask", lambda *args, **request: next(script))
        found = run.time_them("mlp", tuple(answers[0]), arguments)
        assert next(script, None) is None, "fewer processes than expected"
        return [(row["method"], row["verdict"], [process["ratio"] for process in row["processes"]]) for row in found]

    def timed(ratio: float, pairs: int = 2) -> dict[str, Any]:
        return {**right, "pairs": pairs, "plain_ms": 1.0, "ratio": ratio, "low": ratio, "high": ratio}

    assert rows({"a": timed(1.1), "b": wrong}, {"a": timed(1.2), "b": wrong}, {"a": timed(1.3), "b": right}) == [
        ("a", "ok", [1.1, 1.2, 1.3]),
        ("b", "wrong 1e-01", []),
    ]
    assert rows({"b": wrong}) == [("b", "wrong 1e-01", [])]  # no further process
    assert rows({"a": timed(9.0, pairs=1)}) == [("a", "ok", [9.0])]  # slow: nor here
    assert rows({"a": timed(1.1)}, {"a": wrong}) == [("a", "wrong 1e-01", [1.1])]


def test_tables_say_what_the_results_say(scripts: None) -> None:
    from store import Results
    from tables import fill

    rows = [
        made_up("mlp", "null", 1.0, 1.01, 0.99, peak_mib=20.0),
        made_up("mlp", "tap", 1.1, 1.3, 1.2, peak_mib=21.0),
        made_up("mlp", "alone", 0.7, peak_mib=15.5),
        made_up("mlp", "tap", 1.4, allocator="default"),
        made_up("mlp", "opacus-ghost", 123.4, peak_mib=220.0),
        made_up("mlp", "backpack", verdict="missing 2 of 6", message="a.weight, a.bias"),
        made_up("mlp", "torchjd", verdict="error (ValueError)", message="no"),
    ]
    rows[4]["processes"][0]["pairs"] = 3
    text = "".join(f"{name}\n<!-- table: {name} -->\nold\n<!-- end of table -->\n" for name in ("ours", "peers", "memory", "refusals"))
    filled = fill(text, Results(ENVIRONMENT, rows))
    assert "old" not in filled
    assert "| 1 | 10 | 1.00 [0.99-1.01] | 1.20 [1.10-1.30] | 1.03 | 0.70 |  | 1.40 |" in filled
    assert "| Opacus ghost | 123° |" in filled
    assert "| BackPACK | missing 2 of 6 |" in filled
    assert "| TorchJD | error |" in filled
    assert "| plain step, MiB | 20.0 |" in filled and "+1.0 (+5 %)" in filled and "-4.5 (-22 %)" in filled and "+200.0 (+1000 %)" in filled
    assert "- TorchJD, mlp: error (ValueError): no" in filled
    assert fill(filled, Results(ENVIRONMENT, rows)) == filled


def test_the_documents_tables_are_those_of_the_results(scripts: None) -> None:
    from store import RESULTS, Results
    from tables import fill

    text = (ROOT / "docs/performance.md").read_text()
    assert "<!-- table: ours -->" in text
    assert fill(text, Results.load(RESULTS)) == text, "make them anew: python benchmarks/tables.py --into docs/performance.md"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("peer", ["loop", "vmap", "vmap-chunked"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "lm", "vit"])
def test_pytorchs_own_ways_are_right(name: str, peer: str, scripts: None) -> None:
    from peers import PEERS

    problem = build(name, **SMALL[name])
    exact = gg.sqnorms(problem.model, problem.loss_fn, *problem.inputs, problem.target, by_param=True)
    assert steps.attempt(PEERS[peer].prepare, problem, exact)[:2] == ("ok", "")
