"""Variances computed by laplace-torch (Daxberger et al. 2021), as a test reference and an optional backend.

This module uses laplace-torch's fit, its backends' Jacobians, and its functional variance. It is much slower than
this project's engine and supports fewer models. Before any long computation, its backends are tested on two examples.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import ArgumentError, UserError
from src.models.base import eval_mode

_TRIED = 2  # number of examples in the backend test
_AGREES = 1e-3  # relative tolerance of the backend test: rounding is far below, a wrong rule far above


class LaplaceTorchVariances:
    """Logits and variances under a Laplace posterior, with the interface of `src.jacobians.OutputVariances`.

    It works on a copy of the model, since laplace-torch changes a model's attributes, gradients, modes, and hooks.
    Computations use the model's precision.

    Args:
        model: the model, with outputs (b, C).
        batches: the training examples, ``(images, labels, ...)``; iterated several times.
        delta: prior precision.
        structure: one of ``mpe.config.STRUCTURES``.
        full: whether to compute the (C, C) covariance of each example instead of its diagonal.
        memory_mb: upper limit on the Jacobians in memory at a time, in MiB.

    Raises:
        ArgumentError: laplace-torch does not support the model.
        UserError: laplace-torch is not installed, or its eigendecomposition fails.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Sequence[Tensor]],
        delta: float,
        *,
        structure: str = "kfac",
        full: bool = False,
        memory_mb: float = 512.0,
    ) -> None:
        self.model = getattr(model, "_orig_mod", model)
        self._full = full
        loader = _Loader(batches, next(self.model.parameters()).device)
        backend = laplace_backend(self.model, loader.first, structure)
        slow = not backend.__name__.startswith("Asdl")
        if slow and structure == "diag":
            loader.cut = 1  # the memory of the diagonal's Jacobians is quadratic in the batch size
        with _foreign_code():
            self._posterior = _fitted(self.model, loader, delta, structure, backend)
        example = self._posterior.n_outputs * self._posterior.mean.nbytes  # bytes of one example's Jacobian
        self._step = 1 if slow else max(1, int(memory_mb * 2**20 // (3 * example)))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits and variances of one batch.

        Args:
            images: (b, ...) inputs.

        Returns:
            (b, C) detached logits, and float64 variances (b, C), or covariances (b, C, C) if ``full``.
        """
        logits, variances = [], []
        with _foreign_code():
            for part in images.split(self._step):
                jacobians, outputs = self._posterior.backend.jacobians(part)
                with torch.no_grad():
                    found = self._posterior.functional_variance(jacobians).double()
                logits.append(outputs.detach())
                variances.append(found if self._full else found.diagonal(dim1=1, dim2=2))
        return torch.cat(logits), torch.cat(variances)


def laplace_backend(model: nn.Module, images: Tensor, structure: str) -> type:
    """Find the laplace-torch backend class that handles a model correctly.

    The ASDL backend is faster. The curvlinops backend, which uses torch.func's Jacobians, is the fallback if ASDL's
    Jacobians or diagonals differ from torch.func's on the given images.

    Args:
        model: the model; unchanged.
        images: examples (b, ...); the first few are used for the test.
        structure: one of ``mpe.config.STRUCTURES``.

    Raises:
        ArgumentError: No backend supports the model.
        UserError: The package is not installed.
    """
    from src import _torchvision  # noqa: F401  prepares torchvision, which laplace-torch imports

    try:
        from laplace.curvature.asdl import AsdlGGN
        from laplace.curvature.curvlinops import CurvlinopsGGN
    except ImportError as error:
        raise UserError(
            "laplace-torch: is not installed; run 'pip install laplace-torch', or use --laplace_backend=fast"
        ) from error
    images = images[:_TRIED].to(next(model.parameters()).device)
    if structure == "kfac":
        _refuse_without_factors(model, images)
    reason = ""
    for backend in (AsdlGGN, CurvlinopsGGN):
        try:
            with _foreign_code():
                agrees = _tried(model, images, structure, backend, CurvlinopsGGN)
        except Exception as error:  # the libraries raise various exceptions for unsupported models
            reason = f" ({type(error).__name__})"
            continue
        if agrees:
            return backend
    raise _cannot(f"cannot fit {structure} to this model{reason}")


def _refuse_without_factors(model: nn.Module, images: Tensor) -> None:
    """Raise unless each trainable parameter belongs to a single Linear or Conv2d that runs once.

    For other parameters, laplace-torch silently omits blocks or uses a different definition of KFAC.
    """
    calls: Counter[nn.Module] = Counter()
    trained = {
        name: module
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    }
    handles = [module.register_forward_hook(lambda own, *_: calls.update([own])) for module in trained.values()]
    try:
        with eval_mode(model), torch.no_grad():
            model(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module in trained.items():
        what = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        shared = any(owners[id(p)] > 1 for p in module.parameters(recurse=False))
        if type(module) not in (nn.Linear, nn.Conv2d):
            why = f"has no Kronecker factors for {what}"
        elif shared or calls[module] != 1:
            why = f"has no Kronecker factors for {what}, which runs more than once or shares its weights"
        elif not all(p.requires_grad for p in module.parameters(recurse=False)):
            why = f"has no Kronecker factors for the partly frozen {what}"
        else:
            continue
        raise _cannot(why)


def _cannot(why: str) -> ArgumentError:
    return ArgumentError("laplace_backend", f"laplace-torch: {why}; use fast")


def _tried(model: nn.Module, images: Tensor, structure: str, backend: type, exact: type) -> bool:
    """Whether a backend runs on a few examples and matches the Jacobians and diagonals of torch.func."""
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    copied = copy.deepcopy(model).eval()
    copied.output_size = copied(images).shape[-1]  # normally set by laplace-torch's fit
    curvature = backend(copied, "classification")
    jacobians, _ = curvature.jacobians(images)
    if structure == "kfac":
        _, found = curvature.kron(images, labels, N=len(images))
        if len(found.kfacs) != sum(p.requires_grad for p in model.parameters()):
            return False  # omitted blocks would be treated as having only the prior
    else:
        _, found = curvature.diag(images, labels)
    if backend is exact:
        return True
    other = exact(copy.deepcopy(model).eval(), "classification")
    pairs = [(jacobians.detach(), other.jacobians(images)[0])]
    if structure == "diag":
        pairs.append((found, other.diag(images, labels)[1]))
    return all(a.shape == b.shape and bool((a - b).norm() <= _AGREES * b.norm()) for a, b in pairs)


def _fitted(model: nn.Module, loader: "_Loader", delta: float, structure: str, backend: type) -> Any:
    """Fit laplace-torch's posterior on a copy of the model."""
    import laplace

    posterior = laplace.Laplace(
        copy.deepcopy(model).eval(),
        "classification",
        subset_of_weights="all",
        hessian_structure={"kfac": "kron", "diag": "diag", "ggn": "full"}[structure],
        prior_precision=delta,
        backend=backend,
    )
    try:
        posterior.fit(loader)
    except (SystemExit, torch.linalg.LinAlgError) as error:  # laplace-torch exits if eigh fails twice
        dtype = next(model.parameters()).dtype
        raise UserError(
            f"laplace-torch: its eigendecomposition does not converge in {dtype}; give --laplace_backend=fast"
        ) from error
    return posterior


@contextmanager
def _foreign_code() -> Iterator[None]:
    """Run laplace-torch's code with gradients enabled and its deprecation warnings suppressed."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield


class _Loader:
    """Batches in the form that laplace-torch requires: pairs on the device, and a ``dataset`` with a length.

    Attributes:
        first: the images of the first batch.
        dataset: an object whose length is the number of examples.
        cut: the maximum batch size.
    """

    def __init__(self, batches: Iterable[Sequence[Tensor]], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self.cut: int | None = None
        self.first = next(iter(batches))[0]
        self.dataset = range(sum(len(batch[0]) for batch in batches))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._batches:
            images, labels = batch[0].to(self._device), torch.as_tensor(batch[1]).to(self._device)
            size = self.cut or len(images)
            yield from zip(images.split(size), labels.split(size), strict=True)
