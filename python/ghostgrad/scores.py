"""Scores of the samples of a data set, by which data are pruned, ordered and looked at; written to a file that can be resumed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import itertools
import json
import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from .errors import GhostgradError
from .inputs import _NoBatchStatistics
from .norms import _backward, _call, _loss, _tapped
from .trace import _Buffers, _check_reduction, _Generators, _loaded, _size

__all__ = ["ScoresFileError", "scores"]


class ScoresFileError(GhostgradError):
    """A file of scores cannot be written or resumed. The message names the file, the rule and a way out."""


# ---------------------------------------------------------------------------------------------------------------------------------------
# One batch


def _classes(output: Any, target: Any, kind: str) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and class numbers (B,)."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not isinstance(target, Tensor) or target.shape != logits.shape[:1] or target.is_floating_point():
        shapes = " and ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in (output, target))
        raise TypeError(f"ghostgrad.scores: {kind!r} is of a classifier, with logits (B, C) and class numbers (B,), got {shapes}; choose other kinds=(...)")
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32)), target.long()


def _el2n(output: Any, target: Any) -> Tensor:
    logits, classes = _classes(output, target, "el2n")
    return (logits.softmax(1) - nn.functional.one_hot(classes, logits.shape[1])).norm(dim=1)


def _margin(output: Any, target: Any) -> Tensor:
    logits, classes = _classes(output, target, "margin")
    own = logits.gather(1, classes[:, None])
    return (own - logits.scatter(1, classes[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]


_OF_OUTPUT: dict[str, Callable[[Any, Any], Tensor]] = {"el2n": _el2n, "margin": _margin}
KINDS = ("grand", "el2n", "loss", "margin")


@torch.no_grad()
def _single_losses(loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any, loss: Tensor, size: int, reduction: str) -> Tensor:
    """(B,) losses, by calling ``loss_fn`` on one sample's output after the other where it has reduced them."""
    if loss.dim():
        return loss.detach()

    def one(i: int) -> Tensor:
        args = pytree.tree_map(lambda t: t[i : i + 1] if isinstance(t, Tensor) and t.dim() and len(t) == size else t, (output, target))
        return loss_fn(*args).detach()

    losses = torch.stack([one(i) for i in range(size)])
    total = losses.mean() if reduction == "mean" else losses.sum()
    if not torch.allclose(
        total, loss, rtol=torch.finfo(loss.dtype).eps ** 0.5, atol=float(torch.finfo(loss.dtype).eps ** 0.5 * losses.abs().max()), equal_nan=True
    ):
        raise ValueError(
            f"ghostgrad.scores: the loss of the batch, {float(loss):.6g}, is not the {reduction} of the single samples' losses, {float(total):.6g}: class "
            "weights, ignored labels or a mean over tokens make a sample's share depend on the others. Return one loss per sample (reduction='none')"
        )
    return losses


def _score(model: nn.Module, loss_fn: Any, batch: tuple[Any, ...], kinds: Sequence[str], reduction: str, params: Any, options: dict[str, Any]) -> list[Tensor]:
    """(B,) of each kind, float64 on the CPU."""
    seen: list[tuple[Any, Tensor]] = []

    def watched(output: Any, target: Any) -> Tensor:
        loss = loss_fn(output, target)
        seen.append((output, loss))
        return loss

    *inputs, target = batch
    found: dict[str, Tensor] = {}
    if "grand" in kinds:
        with torch.enable_grad(), _tapped(model, params, reduction=reduction, **options) as tap:
            found["grand"] = _backward(tap, _loss("scores", tap, model, watched, batch, False), False)[""].detach().double().sqrt()
        output, loss = seen[0]
    else:
        with torch.no_grad(), _NoBatchStatistics(model):
            output = _call(model, tuple(inputs))
            loss = loss_fn(output, target) if "loss" in kinds else torch.empty(0)
    output = pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, output)
    if "grand" in kinds or "loss" in kinds:
        found["loss"] = _single_losses(loss_fn, output, target, loss, _size(batch), reduction)
    for kind in set(kinds) & _OF_OUTPUT.keys():
        found[kind] = _OF_OUTPUT[kind](output, target)
    wrong = next((kind for kind in kinds if found[kind].shape != (_size(batch),)), None)
    if wrong is not None:
        raise ValueError(f"ghostgrad.scores: {wrong!r} has shape {tuple(found[wrong].shape)} in a batch of {_size(batch)} samples")
    return [found[kind].double().cpu() for kind in kinds]


# ---------------------------------------------------------------------------------------------------------------------------------------
# The data, in an order that a resumed run meets again


class _Source:
    """Batches in the order of the data set."""

    def __init__(self, loader: Any):
        self.loader = loader
        self.samples: int | None = None  # known of data sets; other iterables are read as they come
        self.batch_size = 0
        sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            ordered = not isinstance(sampler, RandomSampler)
        elif batches is None:
            ordered = isinstance(sampler, SequentialSampler)
        else:
            everything = isinstance(sampler, SequentialSampler) or (
                isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(sampler.data_source)
            )
            ordered = type(batches) is BatchSampler and everything
            if ordered and type(loader) is DataLoader:
                dataset: Any = loader.dataset
                self.samples, self.batch_size = len(dataset), loader.batch_size or 0
            else:
                ordered = ordered and isinstance(sampler, SequentialSampler) and not loader.drop_last
        if not ordered:
            raise ValueError(
                f"ghostgrad.scores: the loader's sampler ({type(sampler).__name__}) has an order or a choice of its own, so scores cannot be told from each "
                "other when a run is resumed. Pass DataLoader(torch.utils.data.Subset(dataset, indices), batch_size): index i of the result is then indices[i]"
            )

    def start(self, done: int) -> tuple[int, Iterable[Any]]:
        """Batches from the one that has sample ``done``, and the number of their first sample."""
        loader = self.loader
        assert self.samples is not None
        first = done // self.batch_size * self.batch_size
        same = "num_workers collate_fn pin_memory timeout worker_init_fn multiprocessing_context generator prefetch_factor".split()
        options = {name: getattr(loader, name) for name in same}
        order: Any = range(first, self.samples)
        return first, DataLoader(loader.dataset, self.batch_size, sampler=order, **options)

    def first_batch(self) -> tuple[dict[str, Any], Iterable[Any] | None]:
        """What is known of the data without scoring them; and, of an iterable that cannot be asked twice, its batches."""
        batches = None
        if self.samples is None:
            iterator = iter(self.loader)
            first = list(itertools.islice(iterator, 1))
            batches = itertools.chain(first, iterator)
        else:
            dataset, size = self.loader.dataset, min(self.batch_size, self.samples)
            first = [self.loader.collate_fn([dataset[i] for i in range(size)])] if size else []
        targets = pytree.tree_leaves([batch[-1] for batch in first if isinstance(batch, (tuple, list))])
        return {"samples": self.samples, "batch_size": self.batch_size, "first targets": _digest(targets)}, batches


def _digest(tensors: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for t in tensors:
        if isinstance(t, Tensor):
            found.update(repr((t.dtype, tuple(t.shape))).encode())
            found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(t).encode())
    return found.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------------------------
# The table, in memory and in a file


class _Table:
    """Columns of numbers, one row for each sample. The file is a CSV that grows by whole batches; beside it lies the configuration, as JSON."""

    def __init__(self, kinds: Sequence[str], path: Path | None):
        self.kinds, self.path = kinds, path
        self.file: BinaryIO | None = None
        self.columns = [array("d") for _ in kinds]
        self.header = ",".join(("index", *kinds)).encode() + b"\n"
        self.ends = array("q", [len(self.header)])  # of the header and of the rows, in bytes
        self.beside = None if path is None else path.with_name(path.name + ".json")

    def __len__(self) -> int:
        return len(self.columns[0])

    @contextlib.contextmanager
    def opened(self, config: Mapping[str, Any], overwrite: bool) -> Iterator[_Table]:
        if self.path is None or self.beside is None:
            yield self
            return
        try:
            if self.path.exists() and self.path.stat().st_size and not self.beside.exists():
                raise ScoresFileError(f"{self.path} exists and was not written by gg.scores (no {self.beside.name} beside it). Pass another out=.")
            fresh = overwrite or not self.beside.exists()
            if not fresh:
                self._check_same(config)
            with open(self.path, "ab+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ScoresFileError(f"{self.path} is being written by another process. Wait for it, or pass another out=.") from None
                if fresh:
                    file.truncate(0)
                    self._write_config(config)
                self.file = file
                self._read(file)
                yield self
        except OSError as error:
            if error.filename is None or Path(error.filename) not in (self.path, self.beside, self.path.parent):
                raise
            raise ScoresFileError(f"cannot write scores to {self.path}: {error.strerror or error}. Pass an out= that you may write to.") from error
        finally:
            self.file = None

    def _write_config(self, config: Mapping[str, Any]) -> None:
        assert self.beside is not None
        part = self.beside.with_name(self.beside.name + ".part")
        part.write_text(json.dumps(config, indent=2) + "\n")
        os.replace(part, self.beside)

    def _check_same(self, config: Mapping[str, Any]) -> None:
        assert self.beside is not None
        try:
            stored = json.loads(self.beside.read_text())
            missing = set(config) - set(stored)
            if not isinstance(stored, dict) or missing:
                raise KeyError(", ".join(sorted(missing)))
        except (ValueError, KeyError, TypeError) as error:
            raise ScoresFileError(
                f"{self.beside} is not a configuration that gg.scores wrote, or only half of one ({type(error).__name__}). Pass overwrite=True to start again, "
                "or another out=."
            ) from error
        differing = [f"  {key}: {stored[key]!r} there, {config[key]!r} now" for key in config if stored[key] != config[key]]
        if differing:
            raise ScoresFileError(
                f"{self.path} holds scores of another configuration:\n" + "\n".join(differing) + "\nPass overwrite=True to replace them, or another out=."
            )

    def _read(self, file: BinaryIO) -> None:
        """Takes over the rows that are there. What a killed process left of a row is cut off; any other row that is not one is an error."""
        file.seek(0)
        text = file.read()
        if not text.startswith(self.header):
            if not self.header.startswith(text):
                raise ScoresFileError(
                    f"{self.path}: the first line is not {self.header.decode().strip()!r}; the file was changed. Pass overwrite=True, or another out=."
                )
            file.truncate(0)
            file.write(self.header)
            file.flush()
            return
        lines = text[len(self.header) :].split(b"\n")
        for number, line in enumerate(lines[:-1]):  # after the last line's end nothing follows, or half a row
            try:
                index, *values = line.split(b",")
                if int(index) != number or len(values) != len(self.kinds):
                    raise ValueError
                row = [float(value) for value in values]
            except ValueError:
                raise ScoresFileError(
                    f"{self.path}, line {number + 2}: not the row of sample {number}; the file was changed. Pass overwrite=True, or another out=."
                ) from None
            for column, value in zip(self.columns, row):
                column.append(value)
            self.ends.append(self.ends[-1] + len(line) + 1)
        if lines[-1]:
            file.truncate(self.ends[-1])

    def cut(self, rows: int) -> None:
        """Drops all rows from this one on."""
        for column in self.columns:
            del column[rows:]
        if len(self.ends) > rows + 1:
            del self.ends[rows + 1 :]
            if self.file is not None:
                self.file.truncate(self.ends[-1])

    def append(self, values: Sequence[Tensor]) -> None:
        """A batch: (B,) of each kind."""
        first = len(self)
        for column, more in zip(self.columns, values):
            column.extend(more.tolist())
        lines = [",".join((str(i), *(repr(column[i]) for column in self.columns))).encode() + b"\n" for i in range(first, len(self))]
        for line in lines:
            self.ends.append(self.ends[-1] + len(line))
        if self.file is not None:
            self.file.write(b"".join(lines))
            self.file.flush()

    def result(self) -> dict[str, Tensor]:
        found = {kind: torch.tensor(column, dtype=torch.float64) for kind, column in zip(self.kinds, self.columns)}
        return {"index": torch.arange(len(self)), **found}


def _bar(progress: bool, total: int | None, done: int) -> Any:
    """A progress bar on a terminal, if tqdm is there."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, unit="sample", disable=None if progress else True)


def scores(
    model: nn.Module | Sequence[nn.Module],
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    kinds: Sequence[str] = ("grand", "el2n", "loss"),
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    reduction: str = "mean",
    params: Any = None,
    progress: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """A score of every sample of a data set, for pruning, curricula, and finding wrong labels.

    >>> table = gg.scores(model.eval(), loader, F.cross_entropy, out="scores.csv")
    >>> hardest = table["el2n"].argsort(descending=True)[:100]

    ==========  =====================================================================  ==============================
    kind        of sample i                                                            cost
    ==========  =====================================================================  ==============================
    ``grand``   ``||g_i||``, the norm of its loss's gradient (Paul et al. 2021)        a step without weight gradients
    ``el2n``    ``||softmax(f(x_i)) - onehot(y_i)||_2`` (Paul et al. 2021)             a forward pass
    ``loss``    its loss                                                               a forward pass
    ``margin``  its class's logit minus the largest other one                          a forward pass
    ==========  =====================================================================  ==============================

    Args:
        model: a module, or several (trained from different seeds, say) whose scores are averaged. Modes are as they are: call ``eval()`` first.
        loader: batches (inputs ..., target). A :class:`~torch.utils.data.DataLoader` that shuffles, or drops the last batch, is read in the order of its data
            set and to its end; one with a sampler of another kind is refused. Any other iterable is read as it comes, and must come in the same order again
            if the run is to be resumed.
        loss_fn: ``loss_fn(output, target)``: one loss per sample (B,), or a scalar that is their mean or sum, which is verified in every batch.
        kinds: which scores.
        out: a CSV file, with the columns ``index`` and ``kinds``, to which every batch is appended; beside it ``<out>.json`` says what it was made from. If it
            is there already, from the same models, loss, kinds and targets (those of the first batch are compared), the run goes on where it was stopped, by
            SIGKILL too, and ends with the same bytes as one that was not.
        overwrite: start again instead. Files that this function did not write are never touched.
        reduction: "mean" or "sum", how a scalar loss was reduced.
        params, options: as for :func:`ghostgrad.sqnorms`.
        progress: a bar on the terminal, if tqdm is installed.

    Returns:
        ``{"index": (N,), kind: (N,) ...}`` float64 on the CPU, in the order of the data set.

    Parameters, ``.grad``, buffers, modes and torch's random number generators are afterwards what they were. Memory: that of a batch, and 8 bytes for each
    score. Cost: see the table; the loss is called once more for each sample if it is a scalar.

    Raises:
        ScoresFileError: the file is someone else's, of another configuration, was changed, or is being written; the message says what to do.
        ValueError: a loader without a fixed order; a loss that is not made of the samples' losses; ``kinds`` that do not exist.
        the errors of :func:`ghostgrad.tap`, BatchCouplingError among them: batch normalisation that is not in eval mode.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    if not models or not all(isinstance(one, nn.Module) for one in models):
        raise TypeError(f"ghostgrad.scores: model must be a module or several of them, got {type(model).__name__}")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if isinstance(kinds, str) or unknown or not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"ghostgrad.scores: kinds must be some of {KINDS}, each once, got {kinds!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"ghostgrad.scores: reduction must be 'mean' or 'sum', got {reduction!r}")
    _check_reduction("scores", loss_fn, reduction)
    if any(isinstance(part, _DropoutNd) and part.training and part.p > 0 for one in models for part in one.modules()):
        warnings.warn("ghostgrad.scores: dropout is active, so scores are random; call model.eval() first", stacklevel=2)
    params = None if params is None else list(params)
    source, table = _Source(loader), _Table(kinds, None if out is None else Path(out))
    devices = {t.device for one in models for t in one.parameters()}
    buffers, generators, own = _Buffers(), _Generators(devices), getattr(loader, "generator", None)
    own_state = None if own is None else own.get_state()
    for one in models:
        for part in one.modules():
            buffers.keep(part)

    def restore(states: _Generators) -> None:
        buffers.restore()
        states.restore()

    try:
        config, batches = source.first_batch()
        generators.restore()
        config |= {
            "kinds": list(kinds),
            "models": [_digest(t for pair in one.state_dict().items() for t in pair) for one in models],
            "loss": getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__),
            "reduction": reduction,
            "params": None if params is None else sorted(str(p) if isinstance(p, str) else _digest([p]) for p in params),
        }
        with table.opened(config, overwrite):
            done = len(table)
            if source.samples is not None and done >= source.samples:
                table.cut(source.samples)
                return table.result()
            row, rest = source.start(done) if batches is None else (0, batches)
            bar = _bar(progress, source.samples, done)
            for batch in _loaded("scores", models[0], rest):
                size = _size(batch)
                if row + size <= done:
                    row += size
                    continue
                table.cut(row)
                before = _Generators(devices)
                of_models = []
                for one in models:
                    of_models.append(_score(one, loss_fn, batch, kinds, reduction, params, options))
                    restore(before)
                table.append([torch.stack(list(of_kind)).mean(0) for of_kind in zip(*of_models)])
                row += size
                if bar is not None:
                    bar.update(row - max(done, row - size))
            if bar is not None:
                bar.close()
            if row < done:
                raise ScoresFileError(f"{table.path} has {done} rows, and the loader only {row} samples. Pass overwrite=True, or another out=.")
            return table.result()
    finally:
        restore(generators)
        if own is not None:
            own.set_state(own_state)
