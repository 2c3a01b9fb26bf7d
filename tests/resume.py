"""What every family's test of a killed run does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from ghostgrad.cli import main
from ghostgrad.training import RunDirectory


def killed_and_whole(name: str, options: str, tmp_path: Path, begun: bool = True) -> tuple[Path, Path]:
    """The directories of a setting's run that was killed at its first checkpoint (``begun``: after step 0) and resumed, and of one that was not: of one and the
    same metrics.csv."""
    args = ["run", name, *options.split(), "--quiet", "--checkpoint-seconds", "0.05"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-m", "ghostgrad.cli", *args, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (killed / "checkpoint.pt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert not (killed / "summary.json").exists(), "it had finished before the signal"
    assert RunDirectory(killed).load_checkpoint()["step"] > 0 or not begun  # type: ignore[index]
    assert main(["run", name, "--resume", "--quiet", "--out", str(killed)]) == main([*args, "--out", str(whole)])
    assert (killed / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    return killed, whole
