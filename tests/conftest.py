"""Hypothesis draws the same examples in CI every time; on a developer's machine it keeps looking. And a test leaves the number of threads as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Sums are rounded as the threads share them, and what a test runs in a process of its own has torch's number."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
