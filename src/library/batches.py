"""A user's loaders and models in the form that the library takes.

A batch is ``(x, y)``, ``(x, y, indices)``, or a dict with the key ``labels`` or ``label``, possibly ``indices``,
``index`` or ``idx``, and the model's inputs. ``x`` is a tensor, or a dict of tensors; the entries of a dict are
passed to the model as keyword arguments. Without indices, an example's index is its position in the pass, so the
loader must not shuffle. A model returns logits ``(b, C)``, or a dict or an object that has them as ``logits``.

Models run in eval mode on their own device. Their modes, buffers and gradients, and the states of the random number
generators of torch, NumPy, Python and the loader are as before afterwards. Every pass over a loader starts from the
same states, so shuffling and augmentation repeat.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mpe.estimates import reads_in_order
from mpe.posterior import given_indices
from src.datasets import Batch
from src.errors import ArgumentError
from src.models.base import eval_mode

_LABELS, _INDICES = ("labels", "label"), ("indices", "index", "idx")
Inputs = Tensor | dict[str, Tensor]


class Indexed(Dataset):
    """A data set whose examples also have their index.

    ``(x, y)`` becomes ``(x, y, index)``; a dict gets the key ``indices``. Take a ``Subset`` of this, not the other
    way around, so that indices remain those of all examples.

    Args:
        dataset: A data set with ``len`` and integer indices.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        return {**item, "indices": index} if isinstance(item, Mapping) else (*item, index)


def logits_from(outputs: Any) -> Tensor:
    """Find the logits in a model's outputs: the tensor itself, or the entry or attribute ``logits``.

    Raises:
        ArgumentError: There are none.
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(found, Tensor):
        raise ArgumentError(
            "model",
            f": returns {type(outputs).__name__} without logits; return logits (b, C), or a dict or an object that "
            "has them as logits",
        )
    return found


def class_logits(outputs: Any, *, binary: bool = True) -> Tensor:
    """The logits ``(b, C)`` of a model's outputs. One logit z, ``(b,)`` or ``(b, 1)``, becomes two: ``(0, z)``.

    Args:
        outputs: See ``logits_from``.
        binary: Whether to accept one logit.

    Raises:
        ArgumentError: There are no logits, they have another shape, or there is one and ``binary`` is False.
    """
    found = logits_from(outputs)
    single = found.ndim == 1 or (found.ndim == 2 and found.shape[1] == 1)
    if single and not binary:
        raise ArgumentError(
            "model", ": returns one logit z per example; return the two logits (0, z), which are equivalent"
        )
    if single:
        z = found.reshape(-1)
        return torch.stack([torch.zeros_like(z), z], dim=1)
    if found.ndim != 2:
        raise ArgumentError("model", f": returns logits of shape {tuple(found.shape)}; return (b, C)")
    return found


def class_labels(labels: Any, count: int, classes: int) -> Tensor:
    """Labels as int64 ``(b,)``; floats (of a binary model) and shape ``(b, 1)`` are converted.

    Args:
        labels: The labels.
        count: b.
        classes: C.

    Raises:
        ArgumentError: They are not ``count`` integers from 0 to C - 1.
    """
    found = torch.as_tensor(labels)
    if found.shape == (count, 1):
        found = found[:, 0]
    if found.shape != (count,):
        raise ArgumentError("labels", f": have shape {tuple(found.shape)}; give one class index for each of {count}")
    whole = found.long()
    bad = ((whole != found) | (whole < 0) | (whole >= classes)).nonzero()
    if len(bad):
        raise ArgumentError("labels", f"{found[bad[0, 0]].item()}: is not a class index from 0 to {classes - 1}")
    return whole


def run_model(model: nn.Module, inputs: Inputs) -> Any:
    """Run a model on a batch's inputs; it may modify them in place."""
    if isinstance(inputs, Tensor):
        return model(inputs.clone())
    return model(**{name: tensor.clone() for name, tensor in inputs.items()})


def _split(batch: Any) -> tuple[Inputs, Tensor, Tensor | None]:
    """Inputs, labels and indices (or None) of a batch.

    Raises:
        ArgumentError: The batch has another form.
    """
    if isinstance(batch, Mapping):
        inputs: Any = dict(batch)
        labels, indices = (
            next(iter([inputs.pop(key) for key in keys if key in inputs]), None) for keys in (_LABELS, _INDICES)
        )
        if labels is None:
            raise ArgumentError("loader", f": a batch has the keys {', '.join(inputs)}, but no labels")
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        inputs, labels, indices = batch[0], batch[1], None
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    else:
        raise ArgumentError("loader", f": a batch is {type(batch).__name__}; give (x, y), (x, y, indices), or a dict")
    labels = torch.as_tensor(labels)
    if not labels.ndim:
        raise ArgumentError("loader", ": yields single examples; give batches")
    if isinstance(batch, Mapping) and indices is not None:
        indices = torch.as_tensor(indices).cpu()
        if indices.is_floating_point() or indices.shape != (len(labels),):
            raise ArgumentError("loader", f": its indices have shape {tuple(indices.shape)}; give b integers")
    elif not isinstance(batch, Mapping):
        indices = given_indices(batch)
    for name, tensor in inputs.items() if isinstance(inputs, dict) else [("x", inputs)]:
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != (len(labels),):
            what = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArgumentError(
                "loader", f": {name} is {what}; give a tensor with one row for each of {len(labels)} labels"
            )
    return inputs, labels, indices


@contextmanager
def _random_states_kept(loader: Any) -> Iterator[None]:
    """Restore the random number generators of torch, NumPy, Python and the loader on exit."""
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    holders = (loader, sampler, batches, getattr(batches, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    own = [generator for generator in found if isinstance(generator, torch.Generator)]
    states, python, numpy = [generator.get_state() for generator in own], random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)


class Examples:
    """A loader's examples: iterates over ``(inputs, labels, indices)``, with inputs and labels on the models' device.

    Args:
        loader: See the module's docstring.
        models: The models by the name of their argument. All must have as many classes.
        binary: Whether models with one logit are accepted.
        ordered: Whether examples must be known by index.

    Attributes:
        classes: C.
        plain: Whether inputs and outputs of the models are tensors.

    Raises:
        ArgumentError: The loader or a model does not have the form that the module's docstring describes, the models
            are on different devices or have different numbers of classes, or the loader may shuffle but has no
            indices. While iterating: a label is not a class index, or the pass differs from the previous one.
    """

    def __init__(
        self, loader: Iterable[Any], models: Mapping[str, nn.Module], *, binary: bool = False, ordered: bool = True
    ) -> None:
        if isinstance(loader, Iterator):
            raise ArgumentError("loader", ": is an iterator, which can be read only once; give the DataLoader")
        self.loader, self.classes = loader, 0
        self._pass: list[float] | None = None
        devices = {p.device for model in models.values() for p in model.parameters()}
        if len(devices) > 1:
            raise ArgumentError(
                "model", f": parameters are on {', '.join(sorted(map(str, devices)))}; use one device"
            )
        self._device = next(iter(devices), None)
        with _random_states_kept(loader):
            first = next(iter(loader), None)
        if first is None or not len((split := _split(first))[1]):
            raise ArgumentError("loader", ": has no examples in its first batch")
        inputs, _, indices = split
        if ordered and indices is None and not reads_in_order(loader):
            raise ArgumentError(
                "loader",
                ": may shuffle but has no indices, so scores cannot be assigned to examples; use shuffle=False "
                "and no sampler, or batches (x, y, indices)",
            )
        few = self._moved({name: x[:2] for name, x in inputs.items()} if isinstance(inputs, dict) else inputs[:2])
        self.plain = isinstance(inputs, Tensor)
        for name, model in models.items():
            with eval_mode(model), torch.no_grad():
                outputs = run_model(model, few)
            try:
                classes = class_logits(outputs, binary=binary).shape[1]
            except ArgumentError as error:
                raise ArgumentError(name, error.text) from error
            if self.classes not in (0, classes):
                raise ArgumentError(name, f": returns {classes} logits, but the other model {self.classes}")
            self.classes, self.plain = classes, self.plain and isinstance(outputs, Tensor)

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
        seen, sums = 0, []
        with _random_states_kept(self.loader):
            for batch in self.loader:
                inputs, labels, indices = _split(batch)
                labels = class_labels(labels, len(labels), self.classes)
                if indices is None:
                    indices = torch.arange(seen, seen + len(labels))
                seen += len(labels)
                sums.append(_weighted_sum(inputs, labels))
                if len(labels):
                    yield self._moved(inputs), self._moved(labels), indices.long()
        if self._pass is not None and not np.array_equal(self._pass, sums, equal_nan=True):
            raise ArgumentError(
                "loader", ": its examples change from pass to pass; switch off augmentation and random sampling"
            )
        self._pass = sums

    def _moved(self, inputs: Any) -> Any:
        if isinstance(inputs, dict):
            return {name: self._moved(tensor) for name, tensor in inputs.items()}
        return inputs if self._device is None else inputs.to(self._device)


def _weighted_sum(inputs: Inputs, labels: Tensor) -> float:
    """A number that changes if an input changes, also if its entries change places (a flipped image)."""
    total = float(labels.sum())
    for tensor in inputs.values() if isinstance(inputs, dict) else [inputs]:
        entries = tensor.detach().sum(0, dtype=torch.float64).flatten()
        total += float(entries @ torch.linspace(1, 2, len(entries), dtype=torch.float64, device=entries.device))
    return total


def by_index(indices: Sequence[Tensor]) -> np.ndarray:
    """Positions of the examples in ascending order of their index, ``(n,)``.

    Raises:
        ArgumentError: An index occurs twice.
    """
    found = torch.cat(list(indices)).numpy()
    order = np.argsort(found, kind="stable")
    twice = np.flatnonzero(np.diff(found[order]) == 0)
    if len(twice):
        raise ArgumentError("loader", f": contains example {found[order][twice[0]]} twice; give each example once")
    return order


class _LogitModel(nn.Module):
    """A model as a function of one tensor, which is what per-example derivatives need. It returns logits ``(b, C)``.

    Args:
        model: A model with several inputs, or with outputs that contain logits.

    Attributes:
        layout: Name, shape without examples, and dtype of each input of the current batch.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layout: list[tuple[str, torch.Size, torch.dtype]] = []

    def _get_name(self) -> str:
        return self.model._get_name()  # for messages

    def pack(self, inputs: Inputs) -> Tensor:
        """Write the inputs into one tensor ``(b, entries)`` in which every dtype is exact, and set ``layout``."""
        if isinstance(inputs, Tensor):
            return inputs
        self.layout = [(name, x.shape[1:], x.dtype) for name, x in inputs.items()]
        if len(inputs) == 1:
            return next(iter(inputs.values()))
        dtype = torch.float64 if any(x.is_floating_point() for x in inputs.values()) else torch.int64
        return torch.cat([x.flatten(1).to(dtype) if x.ndim > 1 else x[:, None].to(dtype) for x in inputs.values()], 1)

    def forward(self, packed: Tensor) -> Tensor:
        """Map what ``pack`` returns, or some of its rows, to logits ``(b, C)``."""
        if not self.layout:
            return class_logits(self.model(packed), binary=False)
        if len(self.layout) == 1:
            return class_logits(self.model(**{self.layout[0][0]: packed}), binary=False)
        parts = packed.split([shape.numel() for _, shape, _ in self.layout], dim=1)
        inputs = {
            name: part.reshape(len(packed), *shape).to(dtype)
            for part, (name, shape, dtype) in zip(parts, self.layout, strict=True)
        }
        return class_logits(self.model(**inputs), binary=False)


class ModelBatches:
    """A loader's examples as ``Batch``es for ``module``, the model or its ``_LogitModel``.

    Args:
        loader: See the module's docstring.
        model: The model.
        ordered: See ``Examples``.
    """

    def __init__(self, loader: Iterable[Any], model: nn.Module, *, ordered: bool = True) -> None:
        model = getattr(model, "_orig_mod", model)  # hooks may not run under torch.compile
        self.examples = Examples(loader, {"model": model}, ordered=ordered)
        self.module: Any = model if self.examples.plain else _LogitModel(model)
        self.dataset = getattr(loader, "dataset", None)

    def __iter__(self) -> Iterator[Batch]:
        for inputs, labels, indices in self.examples:
            packed = inputs if self.examples.plain else self.module.pack(inputs)
            yield Batch(packed, labels, indices, torch.ones(len(labels)))
