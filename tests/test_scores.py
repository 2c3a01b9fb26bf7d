"""Scores of data sets: by hand, in files that are killed and resumed, and of nothing else than what was asked for."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import ghostgrad as gg
from ghostgrad.scores import KINDS
from helpers import in_own_process, needs_peak_memory

N = 23


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()


def dataset(n: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 1, 6, 6, generator=generator), torch.randint(5, (n,), generator=generator))


def by_hand(model: nn.Module, data: TensorDataset) -> dict[str, Tensor]:
    """In float64, one sample at a time."""
    model, rows = copy.deepcopy(model).double(), []
    for x, y in data:
        logits = model(x[None].double())[0]
        loss = F.cross_entropy(logits[None], y[None])
        norm = sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)) ** 0.5
        error = logits.softmax(0) - torch.eye(5, dtype=torch.float64)[y]
        margin = logits[y] - torch.cat([logits[:y], logits[y + 1 :]]).max()
        rows.append([float(value.detach()) for value in (norm, error.square().sum() ** 0.5, loss, margin)])
    return dict(zip(KINDS, torch.tensor(rows, dtype=torch.float64).T))


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="none"), nn.CrossEntropyLoss(reduction="sum")], ids=str)
def test_against_a_loop(loss: Callable[..., Tensor]) -> None:
    exact = by_hand(network(), dataset())
    reduction = "sum" if getattr(loss, "reduction", "") == "sum" else "mean"
    found = gg.scores(network(), DataLoader(dataset(), 8), loss, kinds=KINDS, reduction=reduction)
    assert list(found) == ["index", *KINDS]
    assert found["index"].tolist() == list(range(N))
    for kind, e in exact.items():
        torch.testing.assert_close(found[kind], e, rtol=1e-5, atol=1e-6 if kind == "margin" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_alone(kind: str) -> None:
    both = gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy, kinds=KINDS)
    alone = gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy, kinds=[kind])
    torch.testing.assert_close(alone[kind], both[kind], rtol=1e-6, atol=0)
    assert alone.keys() == {"index", kind}


def test_several_models_are_averaged() -> None:
    models = [network(seed) for seed in range(3)]
    found = gg.scores(models, DataLoader(dataset(), 8), F.cross_entropy)
    single = [gg.scores(model, DataLoader(dataset(), 8), F.cross_entropy) for model in models]
    for kind in ("grand", "el2n", "loss"):
        torch.testing.assert_close(found[kind], torch.stack([one[kind] for one in single]).mean(0), rtol=1e-12, atol=0)


def test_parameters_can_be_restricted() -> None:
    last = gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy, kinds=["grand"], params=["4.weight"])["grand"]
    model = network()
    x, y = dataset().tensors
    torch.testing.assert_close(last, gg.sqnorms(model, F.cross_entropy, x, y, params=["4.weight"]).double().sqrt(), rtol=1e-5, atol=0)


# --- order ---


def test_shuffling_does_not_matter() -> None:
    expected = gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy)
    loaders: list[Any] = [
        DataLoader(dataset(), 8, shuffle=True),
        DataLoader(dataset(), 8, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(3)),
        DataLoader(dataset(), 8, shuffle=True, num_workers=1),
        list(DataLoader(dataset(), 8)),
        iter(list(DataLoader(dataset(), 8))),
        DataLoader(TensorDataset(*(t.unsqueeze(1) for t in dataset().tensors)), batch_size=None),  # each element of the data set is a batch
    ]
    for loader in loaders:
        found = gg.scores(network(), loader, F.cross_entropy)
        for kind, scores in expected.items():
            torch.testing.assert_close(found[kind], scores, rtol=1e-6, atol=0)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(dataset())


def test_a_stream_is_read_as_it_comes() -> None:
    expected = gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy)
    found = gg.scores(network(), DataLoader(Stream(), 8), F.cross_entropy)
    assert all(torch.equal(found[kind], expected[kind]) for kind in expected)


class Permuted(DataLoader[Any]):
    """A loader of a library."""


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(dataset(), 8, sampler=SubsetRandomSampler(range(10))),
        lambda: DataLoader(dataset(), 8, sampler=WeightedRandomSampler([1.0] * N, N)),
        lambda: DataLoader(dataset(), 8, sampler=RandomSampler(dataset(), replacement=True)),
        lambda: DataLoader(dataset(), 8, sampler=RandomSampler(dataset(), num_samples=5)),
        lambda: DataLoader(dataset(), 8, sampler=list(range(N - 1, -1, -1))),
        lambda: DataLoader(dataset(), batch_sampler=[[3, 1], [2, 0]]),
        lambda: DataLoader(dataset(), batch_size=None, shuffle=True),
        lambda: Permuted(dataset(), 8, shuffle=True),
    ],
)
def test_other_orders_are_refused(loader: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="order or a choice of its own.*Subset"):
        gg.scores(network(), loader(), F.cross_entropy)


def test_a_subset_is_the_way_out() -> None:
    everything = gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy)
    found = gg.scores(network(), DataLoader(Subset(dataset(), [7, 3, 11]), 2), F.cross_entropy)
    torch.testing.assert_close(found["grand"], everything["grand"][[7, 3, 11]], rtol=1e-6, atol=0)


# --- what is left untouched ---


@pytest.mark.filterwarnings("ignore:ghostgrad. parameter")
def test_nothing_is_changed() -> None:
    model = nn.Sequential(network(), nn.Dropout(0.5).train(), nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))).train()
    model[0].eval()
    generator = torch.Generator().manual_seed(5)
    before, state, own = copy.deepcopy(model.state_dict()), torch.get_rng_state(), generator.get_state()
    modes = [module.training for module in model.modules()]
    with pytest.warns(UserWarning, match="dropout is active"):
        first = gg.scores(model, DataLoader(dataset(), 8, shuffle=True, generator=generator), F.cross_entropy)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(generator.get_state(), own)
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    with pytest.warns(UserWarning, match="dropout is active"):
        again = gg.scores(model, DataLoader(dataset(), 8, shuffle=True, generator=generator), F.cross_entropy)
    assert all(torch.equal(first[kind], again[kind]) for kind in first)
    model, state = network(), torch.get_rng_state()
    gg.scores(model, DataLoader(dataset(), 8), F.cross_entropy)  # whose iterator takes a seed from torch's own generator
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:ghostgrad")
def test_a_batch_does_not_depend_on_those_before_it(tmp_path: Path) -> None:
    """Dropout, and buffers that a forward changes: a resumed run ends with the same bytes."""
    out = tmp_path / "scores.csv"
    model = nn.Sequential(network(), nn.Dropout(0.5).train(), nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)).train())
    loader = DataLoader(dataset(), 8)
    gg.scores(model, loader, F.cross_entropy, out=out)
    text = out.read_bytes()
    out.write_bytes(text[: len(text) // 2])
    gg.scores(model, loader, F.cross_entropy, out=out)
    assert out.read_bytes() == text


class Augmented(TensorDataset):
    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        return x + torch.randn(x.shape), y


def test_random_data_are_those_of_a_plain_loop() -> None:
    model, data = network(), Augmented(*dataset().tensors)
    torch.manual_seed(3)
    expected = gg.scores(model, list(DataLoader(data, 8)), F.cross_entropy)
    torch.manual_seed(3)
    found = gg.scores(model, DataLoader(data, 8), F.cross_entropy)
    assert all(torch.equal(found[kind], expected[kind]) for kind in found)


@pytest.mark.parametrize("kinds", [["grand"], ["el2n"]])
def test_batch_statistics_are_refused(kinds: list[str]) -> None:
    model = network().train()
    mean = model[1].running_mean.clone()  # type: ignore[index,union-attr,operator]
    with pytest.raises(gg.BatchCouplingError, match=r"module '1' \(BatchNorm2d\)"):
        gg.scores(model, DataLoader(dataset(), 8), F.cross_entropy, kinds=kinds)
    assert torch.equal(model[1].running_mean, mean) and model[1].num_batches_tracked == 0  # type: ignore[index,arg-type]


def test_losses_that_are_not_the_samples_are_refused() -> None:
    weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    with pytest.raises(ValueError, match=r"not the mean of the single samples' losses.*reduction='none'"):
        gg.scores(network(), DataLoader(dataset(), 8), weighted)
    with pytest.raises(ValueError, match="not the mean"):
        gg.scores(network(), DataLoader(dataset(), 8), lambda out, y: F.cross_entropy(out, y, reduction="sum"), kinds=["loss"])
    gg.scores(network(), DataLoader(dataset(), 8), nn.CrossEntropyLoss(weighted.weight, reduction="none"))


def test_arguments() -> None:
    loader, model = DataLoader(dataset(), 8), network()
    for kinds in ("grand", ["accuracy"], [], ["loss", "loss"]):
        with pytest.raises(ValueError, match="kinds must be"):
            gg.scores(model, loader, F.cross_entropy, kinds=kinds)
    with pytest.raises(TypeError, match="module or several"):
        gg.scores([], loader, F.cross_entropy)
    with pytest.raises(ValueError, match="reduction='sum'"):
        gg.scores(model, loader, nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(TypeError, match="of a classifier.*choose other kinds"):
        gg.scores(model, [(x, y.float()) for x, y in loader], lambda out, y: (out.mean(1) - y).square().mean())
    with pytest.raises(ValueError, match="no batches"):
        gg.scores(model, [], F.cross_entropy)
    with pytest.raises(TypeError, match="batches must be"):
        gg.scores(model, [torch.randn(2, 1, 6, 6)], F.cross_entropy)


# --- files ---


def test_the_file_opens_in_pandas(tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    found = gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy, out=out)
    frame = pd.read_csv(out)
    assert list(frame.columns) == ["index", "grand", "el2n", "loss"]
    for column in frame:
        torch.testing.assert_close(torch.from_numpy(frame[column].to_numpy(copy=True)), found[column], rtol=1e-15, atol=0)
    text, when = out.read_bytes(), out.stat().st_mtime_ns
    again = gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy, out=out)  # is complete
    assert all(torch.equal(again[kind], found[kind]) for kind in found)
    assert (out.read_bytes(), out.stat().st_mtime_ns) == (text, when)


def test_resumed_at_every_byte(tmp_path: Path) -> None:
    """Whatever a killed process has left, and whether the loader is a data set's or an iterable: the same bytes in the end, only what lacks is computed."""
    calls = 0

    def loss(out: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(out, y, reduction="none")

    out, model = tmp_path / "scores.csv", network()
    for loader in (DataLoader(dataset(), 8, shuffle=True), list(DataLoader(dataset(), 8))):
        whole = gg.scores(model, loader, loss, out=out, overwrite=True)
        text = out.read_bytes()
        ends = [i + 1 for i, byte in enumerate(text) if byte == 10]  # of the header and of the rows
        for size in [*range(30), *random.Random(0).sample(range(30, len(text)), 40), len(text)]:
            out.write_bytes(text[:size])
            calls = 0
            found = gg.scores(model, loader, loss, out=out)
            assert out.read_bytes() == text
            assert all(torch.equal(found[kind], whole[kind]) for kind in whole)
            rows = max(0, sum(end <= size for end in ends) - 1)
            assert calls == (3 - rows // 8 if rows < N else 0)


_SLOWLY = """
import sys, time
import torch, torch.nn.functional as F
from torch.utils.data import DataLoader
import ghostgrad as gg
from test_scores import dataset, network

def slow_loss(out, y):
    time.sleep(0.02)
    return F.cross_entropy(out, y, reduction="none")

slow_loss.__qualname__ = "loss"
gg.scores(network(), DataLoader(dataset(400), 4, shuffle=True), slow_loss, out=sys.argv[1])
"""


def test_killed_and_resumed(tmp_path: Path) -> None:
    """By SIGKILL, several times: no row is lost, none is there twice."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    out, expected = tmp_path / "scores.csv", tmp_path / "expected.csv"

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction="none")

    loss.__qualname__ = "loss"
    gg.scores(network(), DataLoader(dataset(400), 4), loss, out=expected)
    sizes = [0]
    for wanted in (1000, 4000):
        process = subprocess.Popen([sys.executable, "-c", _SLOWLY, str(out)], env=environment)
        deadline = time.monotonic() + 120
        while not (out.exists() and out.stat().st_size > wanted) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        sizes.append(out.stat().st_size)
    assert sizes[0] < sizes[1] < sizes[2] < expected.stat().st_size
    gg.scores(network(), DataLoader(dataset(400), 4), loss, out=out)
    assert out.read_bytes() == expected.read_bytes()
    assert pd.read_csv(out)["index"].tolist() == list(range(400))


def refused(out: Path, match: str, **changes: Any) -> None:
    """Nothing is written then."""
    before = {path: path.read_bytes() for path in out.parent.iterdir() if path.is_file()}
    arguments = {"model": network(), "loader": DataLoader(dataset(), 8), "loss_fn": F.cross_entropy, "out": out} | changes
    with pytest.raises(gg.ScoresFileError, match=match) as raised:
        gg.scores(**arguments)
    assert out.name in str(raised.value)
    assert {path: path.read_bytes() for path in out.parent.iterdir() if path.is_file()} == before


def test_other_configurations_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy, out=out)
    refused(out, r"another configuration:\n  models: .*\n.*overwrite=True", model=network(1))
    refused(out, "models:", model=[network(), network(1)])
    refused(out, r"kinds: \['grand', 'el2n', 'loss'\] there, \['loss'\] now", kinds=["loss"])
    refused(out, "samples: 23 there, 9 now", loader=DataLoader(dataset(9), 8))
    refused(out, "batch_size: 8 there, 4 now", loader=DataLoader(dataset(), 4))
    refused(out, "first targets:", loader=DataLoader(TensorDataset(dataset().tensors[0], dataset().tensors[1].flip(0)), 8))
    refused(out, "loss: 'cross_entropy' there", loss_fn=nn.CrossEntropyLoss())
    refused(out, "params: None there", params=["4.weight"])
    gg.scores(network(1), DataLoader(dataset(), 8), F.cross_entropy, out=out, overwrite=True)
    gg.scores(network(1), DataLoader(dataset(), 8), F.cross_entropy, out=out)


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    out.write_text("name,value\na,1\n")
    refused(out, r"not written by gg.scores.*another out=")
    refused(out, "not written by gg.scores", overwrite=True)
    out.unlink()
    gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy, out=out)
    text, beside = out.read_bytes(), tmp_path / "scores.csv.json"
    lines = text.splitlines(keepends=True)
    for line, number in ((b"7,1.0,2.0\n", 9), (b"8,1.0,2.0,3.0\n", 9), (b"7,1.0,2.0,x\n", 9), (b"\n", 9)):
        out.write_bytes(b"".join([*lines[: number - 1], line, *lines[number:]]))
        refused(out, rf"line {number}: not the row of sample 7.*overwrite=True")
    out.write_bytes(b"".join([*lines[:5], lines[4], *lines[5:]]))
    refused(out, "line 6: not the row of sample 4")
    out.write_bytes(b"a,b\n" + text)
    refused(out, "the first line is not 'index,grand,el2n,loss'")
    out.write_bytes(text)
    config = beside.read_text()
    for damaged in (config[:40], "{}", "[]", ""):
        beside.write_text(damaged)
        refused(out, "not a configuration that gg.scores wrote, or only half of one.*overwrite=True")
    gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy, out=out, overwrite=True)
    assert (out.read_bytes(), json.loads(beside.read_text())) == (text, json.loads(config))


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    for out in (tmp_path / "missing" / "scores.csv", tmp_path):
        with pytest.raises(gg.ScoresFileError, match="(No such file|Is a directory|not written by).*another out=|that you may write to"):
            gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy, out=out)
    out = tmp_path / "scores.csv"
    gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy, out=out)
    with open(out, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(out, "being written by another process")


def test_a_shorter_stream_is_refused(tmp_path: Path) -> None:
    out, batches = tmp_path / "scores.csv", list(DataLoader(dataset(), 8))
    gg.scores(network(), batches, F.cross_entropy, out=out)
    with pytest.raises(gg.ScoresFileError, match="has 23 rows, and the loader only 8 samples"):
        gg.scores(network(), batches[:1], F.cross_entropy, out=out)


def test_progress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tqdm

    bars: list[Any] = []

    class Bar:
        def __init__(self, **options: Any):
            self.options, self.n, self.closed = options, options["initial"], False
            bars.append(self)

        def update(self, n: int) -> None:
            self.n += n

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    out = tmp_path / "scores.csv"
    gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy, out=out)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:13]))
    gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy, out=out, progress=False)
    assert [(bar.options["initial"], bar.options["total"], bar.options["disable"], bar.n, bar.closed) for bar in bars] == [
        (0, N, None, N, True),
        (12, N, True, N, True),
    ]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    gg.scores(network(), DataLoader(dataset(), 8), F.cross_entropy)


# --- memory ---


class Drawn(Dataset[Any]):
    """Made when it is asked for, so that it takes no memory itself."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        if i >= self.n:
            raise IndexError(i)
        return torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(i)), i % 5


@needs_peak_memory
def test_memory_is_flat(tmp_path: Path) -> None:
    """Nine times the samples take at most 3 MiB more (half of one is their result); holding on to activations or per-sample gradients would take 20."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch.nn.functional as F
from torch.utils.data import DataLoader
import ghostgrad as gg
from test_scores import Drawn, network
torch.set_num_threads(1)
def scored(n):
    return lambda: gg.scores(network(), DataLoader(Drawn(n), 64), F.cross_entropy, out={str(tmp_path)!r} + f"/{{n}}.csv")
peak(scored(640))
few = peak(scored(1024))
print(peak(scored(9216)) - few)
"""
    assert in_own_process(code, PYTHONPATH=os.pathsep.join(sys.path)) < 3
