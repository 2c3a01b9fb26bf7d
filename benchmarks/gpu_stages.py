"""What benchmarks/gpu.py measures in processes of their own: the argument is a request in JSON, each item's result a line of the file that it names."""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Row = dict[str, Any]
FRESH_PROCESS = 75  # exit status: an error has poisoned the device's context, start me again for the rest


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def environment(device: str) -> Row:
    from importlib import metadata

    versions = {}
    for package in ("numpy", "opacus", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found: Row = {"device": "cpu", "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0], "versions": versions}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)  # raises where there is none
        torch.zeros(1, device="cuda").add_(1).item()
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}", "multiprocessors": properties.multi_processor_count}
        found |= {"memory_gib": round(properties.total_memory / 2**30, 1), "l2_mib": round(cache_bytes() / 2**20, 1)}
    return found


def cache_bytes() -> int:
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 64 << 20


# ---------------------------------------------------------------------------------------------------------------------------------------
# Time


def seconds_per_call(calls: list[Callable[[], object]], device: str, budget: float = 0.6) -> tuple[float, str]:
    """The median time of one of the calls, which are run in turn, and how it was found: on a GPU by replays of a graph of all of them, so that the time to
    launch does not show; where they cannot be captured, by events around eager rounds."""
    for call in calls:
        call()
    synchronize(device)
    if device == "cpu":
        times = []
        for call in itertools.islice(itertools.cycle(calls), 5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times), "eager"
    way = "graph"
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
        once: Callable[[], object] = graph.replay
    except RuntimeError as error:
        torch.cuda.synchronize()
        way = f"eager: {str(error).splitlines()[0][:100]}"
        once, kept = (lambda: [call() for call in calls]), []
    for _ in range(3):
        once()
    torch.cuda.synchronize()
    times, start = [], time.perf_counter()
    while len(times) < 7 or (time.perf_counter() - start < budget and len(times) < 200):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        once()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3 / len(calls))
    del kept
    return statistics.median(times), way


def drawn_sets(make: Callable[[], tuple[Any, ...]], device: str) -> list[tuple[Any, ...]]:
    """Operands drawn at random as often as it takes to be four times larger than the cache, at least twice."""
    sets = [make()]
    size = sum(t.numel() * t.element_size() for t in sets[0] if isinstance(t, Tensor))
    wanted = 2 if device == "cpu" else min(32, max(2, math.ceil(4 * cache_bytes() / max(size, 1))))
    return sets + [make() for _ in range(wanted - 1)]


# ---------------------------------------------------------------------------------------------------------------------------------------
# The roofline


def roofline_items() -> list[str]:
    from roofline import ITEMS

    return ["copy", "product bfloat16", "product tf32", "product float32", *ITEMS]


def measure_machine(item: str, device: str, small: bool) -> Row:
    """Bandwidth of a large copy, or the rate of a large product, both on random data."""
    if item == "copy":
        count = 1 << (16 if small else 30)  # 2 GiB read, 2 GiB written
        pairs = [(torch.randn(count // 2, device=device), torch.empty(count // 2, device=device)) for _ in range(2)]
        time_, way = seconds_per_call([lambda x=x, y=y: y.copy_(x) for x, y in pairs], device)
        return {"us": 1e6 * time_, "rate": 2 * 4 * (count // 2) / time_, "unit": "B/s", "way": way}
    n, precision = 128 if small else 8192, item.split()[1]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    x, y = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        time_, way = seconds_per_call([lambda: x @ y, lambda: y @ x], device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"us": 1e6 * time_, "rate": 2 * n**3 / time_, "unit": "operations/s", "way": way}


def measure_op(name: str, device: str, small: bool, before: dict[str, Row]) -> Row:
    from roofline import ITEMS, Machine, dtype_name, seconds

    from ghostgrad import ops

    item = ITEMS[name]
    function, work, sets = getattr(ops, item.op), item.total(small), drawn_sets(lambda: item.draw(device, small), device)
    with torch.no_grad():
        time_, way = seconds_per_call([lambda arguments=arguments: function(*arguments) for arguments in sets], device)
        row: Row = {"us": 1e6 * time_, "way": way, "bytes": work.bytes, "operations": work.operations, "over_floor": None}
        ceilings = ["copy", f"product {dtype_name(item.dtype)}"]
        if all(before.get(ceiling, {}).get("verdict") == "ok" for ceiling in ceilings):
            machine = Machine(device, before["copy"]["rate"], {dtype_name(item.dtype): before[ceilings[1]]["rate"]})
            row["over_floor"] = time_ / max(seconds(work, item.dtype, machine))
        start = time.perf_counter()
        for arguments in sets:
            function(*arguments)
        row["host_us"] = 1e6 * (time.perf_counter() - start) / len(sets)  # of which the GPU knows nothing unless it runs dry
        synchronize(device)
        if item.op in ("wgrad_sqnorm", "wgrad_moments"):
            plain, _ = seconds_per_call([lambda a=a, b=b: b.flatten(0, 1).mT @ a.flatten(0, 1) for a, b in sets], device)
            row |= {"plain": "torch's weight gradient", "plain_us": 1e6 * plain, "over_plain": time_ / plain}
        if item.op.startswith("conv_"):
            x, b = sets[0][:2]
            weight = torch.empty(b.shape[2], x.shape[2], 3, 3, device=device, dtype=x.dtype)
            backward = torch.ops.aten.convolution_backward
            calls = [
                lambda x=x, b=b: backward(b[:, 0], x[:, 0], weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, (False, True, False)) for x, b, *_ in sets
            ]
            plain, _ = seconds_per_call(calls, device)
            row |= {"plain": "torch's weight gradient", "plain_us": 1e6 * plain, "over_plain": time_ / plain}
    return row


def roofline(item: str, request: Row, before: dict[str, Row]) -> Row:
    device, small = request["device"], request["small"]
    return measure_op(item, device, small, before) if "," in item else measure_machine(item, device, small)


# ---------------------------------------------------------------------------------------------------------------------------------------
# What runs under compute-sanitizer: every op at odd sizes, against the CPU's


def sanitizer_items() -> list[str]:
    from roofline import ITEMS

    return list(dict.fromkeys(item.op for item in ITEMS.values()))


def sanitizer(op: str, request: Row, before: dict[str, Row]) -> Row:
    from roofline import ITEMS

    from ghostgrad import ops

    item = next(item for item in ITEMS.values() if item.op == op)
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        arguments = replace(item, dtype=dtype).draw("cpu", small=True)
        if dtype == torch.float64:
            arguments = tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments)
        there = tuple(t.to(request["device"]) if isinstance(t, Tensor) else t for t in arguments)
        for value, truth in zip(tensors(getattr(ops, op)(*there)), tensors(getattr(ops, op)(*arguments)), strict=True):
            difference = (value.cpu().double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)
            tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4, torch.float64: 1e-11}[truth.dtype]
            worst = max(worst, difference.item() / tolerance)
    if not worst <= 1:
        raise ValueError(f"{op} on {request['device']} is {worst:.3g} times the tolerance away from the CPU's")
    return {"of_tolerance": worst}


def tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from tensors(part)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Training steps


class Autocast(nn.Module):
    """A model under autocast to bfloat16."""

    def __init__(self, model: nn.Module, device: str):
        super().__init__()
        self.model, self.device = model, device

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            out: Tensor = self.model(*inputs)
        return out.float()


def gpt2(batch: int, length: int, vocabulary: int, width: int, heads: int, blocks: int) -> Any:
    from ghostgrad.bench.problems import LanguageModel, classification

    torch.manual_seed(0)
    return classification(LanguageModel(vocabulary, width, heads, blocks), torch.randint(vocabulary, (batch, length)), vocabulary, batch, length)


def problem_of(name: str, device: str, small: bool) -> Any:
    """A fresh problem on the device."""
    from ghostgrad.bench.problems import SMALL, build

    family, way = name.split()
    if family == "gpt2":
        problem = gpt2(2, 5, 13, 16, 2, 2) if small else gpt2(8, 1024, 50304, 768, 12, 12)
    elif family == "mlp-wide":
        problem = build("mlp", **(SMALL["mlp"] if small else {"batch": 1024, "width": 4096}))
    else:
        problem = build(family, **(SMALL[family] if small else {"cnn": {"batch": 256}}.get(family, {})))
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32

    def moved(t: Tensor) -> Tensor:
        return t.to(device, dtype if t.is_floating_point() else t.dtype)

    model = problem.model.to(device, dtype)
    model = Autocast(model, device) if way == "autocast" else model
    return replace(problem, model=model, inputs=tuple(map(moved, problem.inputs)), target=moved(problem.target))


def steps_items() -> list[str]:
    return ["mlp float32", "mlp-wide bfloat16", "cnn float32", "block float32", "gpt2 autocast", "gpt2 bfloat16"]


def peak_mib(step: Callable[[], object], device: str) -> float | None:
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def error_of_first(problem: Any, norms: Tensor) -> float:
    """Of the first sample's norm, against the gradient of that sample's own loss."""
    loss = problem.loss_fn(problem.model(*(t[:1] for t in problem.inputs)), problem.target[:1])
    truth = sum(g.double().square().sum() for g in torch.autograd.grad(loss, list(problem.model.parameters())))
    return float(abs(norms[0].double() - truth) / truth)


def steps(item: str, request: Row, before: dict[str, Row]) -> Row:
    from peers import PEERS, installed

    from ghostgrad.bench import measure
    from ghostgrad.bench.steps import METHODS, judge, plain
    from ghostgrad.norms import sqnorms

    device, small = request["device"], request["small"]
    narrow = item.split()[1] != "float32"
    peers = {name: PEERS[name].prepare for name in ("vmap", "vmap-chunked", "opacus-hooks", "opacus-ghost") if installed(PEERS[name])}
    problem = problem_of(item, device, small)
    exact = sqnorms(problem.model, problem.loss_fn, *problem.inputs, problem.target, by_param=True)
    row: Row = {"methods": {}, "error_of_first": error_of_first(problem, torch.stack([norm.double() for norm in exact.values()]).sum(0))}
    plain_step = plain(problem)
    several = 1 if small else 4

    def batched(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(several):
                step()
            synchronize(device)

        return run

    plain_step()
    row["plain_peak_mib"] = peak_mib(plain_step, device)
    for name, method in (METHODS | peers).items():
        found: Row = {"verdict": "ok", "message": ""}
        row["methods"][name] = found
        other = problem if name in METHODS else None
        try:
            other = other or problem_of(item, device, small)
            step = method(other)
            norms = step()
            if name != "null":
                verdict, found["message"] = judge(norms, exact)
                if verdict.startswith("wrong ") and narrow and float(verdict.split()[1]) < 0.1:
                    verdict, found["message"] = "ok", verdict  # of two roundings of bfloat16 neither is the truth: the difference is recorded
                found["verdict"] = verdict
            del norms
            if found["verdict"] == "ok":
                found["peak_mib"] = peak_mib(step, device)
                times = measure.interleave(batched(plain_step), {name: batched(step)}, 3 if small else 9, 3.0)[name]
                numbers = measure.summary(times)
                found |= {key: numbers[key] for key in ("pairs", "ratio", "low", "high")}
                row.setdefault("plain_ms", numbers["plain_ms"] / several)
        except Exception as error:
            if poisoned(error):
                raise
            found |= {"verdict": f"error ({type(error).__name__})", "message": " ".join(str(error).split())[:300]}
        finally:
            del other
            step = None
            if device == "cuda":
                torch.cuda.empty_cache()
    wrong = [name for name in METHODS if row["methods"][name]["verdict"] != "ok"]
    if wrong or "plain_ms" not in row:
        row |= {"verdict": "error", "message": f"{', '.join(wrong)}: {[row['methods'][name] for name in wrong]}"[:600]}
    return row


# ---------------------------------------------------------------------------------------------------------------------------------------


def poisoned(error: BaseException) -> bool:
    """Whether nothing more can be done on the device in this process."""
    text = f"{type(error).__name__}: {error}"
    return "out of memory" not in text and any(word in text for word in ("CUDA error", "AcceleratorError", "CUBLAS_STATUS", "cudaError", "did not start"))


STAGES = {"roofline": (roofline_items, roofline), "sanitizer": (sanitizer_items, sanitizer), "steps": (steps_items, steps)}


def main() -> int:
    request = json.loads(sys.argv[1])
    if request["stage"] == "environment":
        print(json.dumps(environment(request["device"])))
        return 0
    items, measure = STAGES[request["stage"]]
    if request.get("list"):
        print(json.dumps(items()))
        return 0
    warnings.simplefilter("ignore")
    path = Path(request["rows"])
    torch.manual_seed(0)
    for item in request.get("items") or items():
        before = {row["item"]: row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
        start, row = time.perf_counter(), {"item": item, "verdict": "ok"}
        fresh = False
        try:
            row |= measure(item, request, copy.deepcopy(before))
        except Exception as error:
            traceback.print_exc()
            row |= {"verdict": "error", "message": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}
            fresh = poisoned(error)
        with open(path, "a") as rows:
            print(json.dumps(row), file=rows, flush=True)
        print(f"{item}: {row['verdict']} in {time.perf_counter() - start:.1f} s", flush=True)
        if fresh:
            return FRESH_PROCESS
        if request["device"] == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
