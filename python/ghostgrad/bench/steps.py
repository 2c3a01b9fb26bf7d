"""The steps that are timed: the plain one, the same in a tap, and norms alone. As a program, the child process of ``measure.in_child``.

A method is a function of a :class:`Problem`: it prepares whatever can be prepared once and returns the step, a function that gives the norms, as a tensor (B,)
or for each parameter, or None. Before a step is timed, its norms are compared with those of ``gg.sqnorms``.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..norms import sqnorms
from ..tap import tap
from .measure import interleave, peak_memory, summary
from .problems import SMALL, Problem, build

__all__ = ["METHODS", "TITLES", "judge", "main", "respond"]

TOLERANCE = 1e-3

Norms = Tensor | dict[str, Tensor] | None  # the sum over the parameters, or what each parameter that has a value got
Method = Callable[[Problem], Callable[[], Norms]]


def plain(problem: Problem) -> Callable[[], None]:
    """Forward and backward of a training step."""
    forward = problem.forward or problem.model

    def step() -> None:
        problem.model.zero_grad()
        problem.loss_fn(forward(*problem.inputs), problem.target).backward()

    return step


def in_a_tap(problem: Problem) -> Callable[[], Tensor]:
    """The training step, and the norms read after it."""

    def step() -> Tensor:
        problem.model.zero_grad()
        with tap(problem.model) as tapped:
            problem.loss_fn(problem.model(*problem.inputs), problem.target).backward()
        norms: Tensor = tapped.sqnorms()
        return norms

    return step


def alone(problem: Problem) -> Callable[[], Tensor]:
    """``gg.sqnorms``: no weight gradients are formed."""

    def step() -> Tensor:
        norms: Tensor = sqnorms(problem.model, problem.loss_fn, *problem.inputs, problem.target)
        return norms

    return step


METHODS: dict[str, Method] = {"null": plain, "tap": in_a_tap, "alone": alone}
TITLES = {"null": "plain", "tap": "in a tap", "alone": "norms alone"}


def judge(norms: Norms, exact: Mapping[str, Tensor]) -> tuple[str, str]:
    """ "ok" or what is wrong with a method's norms, and the particulars; ``exact`` has every parameter's, (B,) each."""
    batch = next(iter(exact.values())).shape
    if isinstance(norms, dict):
        missing = [name for name, norm in exact.items() if name not in norms and norm.any()]
        if missing:
            return f"missing {len(missing)} of {len(exact)}", ", ".join(missing)
        odd = {name: tuple(norm.shape) for name, norm in norms.items() if norm.shape != batch}
        if odd:
            return "wrong shape", str(odd)
        norms = torch.stack([norm.detach().double() for norm in norms.values()]).sum(0)
    if norms is None or norms.shape != batch:
        return "wrong shape", str(None if norms is None else tuple(norms.shape))
    total = torch.stack([norm.double() for norm in exact.values()]).sum(0)
    error = ((norms.detach().double() - total).abs() / total).max().item()
    return ("ok" if error <= TOLERANCE else f"wrong {error:.0e}"), ""  # a nan is not <=


def attempt(method: Method, problem: Problem, exact: Mapping[str, Tensor]) -> tuple[str, str, Callable[[], Norms] | None]:
    """The verdict on a method, the particulars, and its step if that is right and may be timed."""
    try:
        step = method(problem)
        norms = step()
    except Exception as error:
        refused = type(error).__module__.startswith("ghostgrad")
        return f"{'refused' if refused else 'error'} ({type(error).__name__})", " ".join(str(error).split())[:300], None
    verdict, particulars = ("ok", "") if method is plain else judge(norms, exact)
    return verdict, particulars, step if verdict == "ok" else None


def respond(request: Mapping[str, Any], methods: Mapping[str, Method]) -> dict[str, Any]:
    """``{method: {"verdict": ..., "message": ..., ...}}`` for the request's problem and methods, with the :func:`summary` of those that are right.

    A request has "problem", "methods", "compiled", and "pairs" and "seconds" (the arguments of :func:`interleave`); or "memory", for one method that is known
    to be right: then its ``peak_mib``.
    """
    reference, problem = build(request["problem"]), build(request["problem"])  # the methods' own copy: some leave traces on the model
    if request["compiled"]:
        reference, problem = reference.compiled(), problem.compiled()
    plain_step = plain(reference)
    if request.get("memory"):
        (name,) = request["methods"]
        methods[name](build(request["problem"], **SMALL[request["problem"]]))()  # imports what it needs; else modules' code would be counted
        step = methods[name](problem)
        for _ in range(2):
            plain_step()  # what the vendor libraries take once and keep
        reference.model.zero_grad()
        return {name: {"verdict": "ok", "message": "", "peak_mib": peak_memory(step)}}
    eager = build(request["problem"])
    exact = sqnorms(eager.model, eager.loss_fn, *eager.inputs, eager.target, by_param=True)
    del eager
    answer: dict[str, dict[str, Any]] = {}
    right = {}
    for name in request["methods"]:
        verdict, message, timed = attempt(methods[name], problem, exact)
        answer[name] = {"verdict": verdict, "message": message}
        if timed is not None:
            right[name] = timed
    if right:
        for name, times in interleave(plain_step, right, request["pairs"], request["seconds"]).items():
            answer[name] |= summary(times)
    return answer


def main(methods: Mapping[str, Method] = METHODS) -> None:
    """The child process: its last argument is the request, the last line that it prints the answer."""
    request = json.loads(sys.argv[-1])
    torch.set_num_threads(request["threads"])
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of methods that a library names as slow, and the like
        answer = respond(request, methods)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
