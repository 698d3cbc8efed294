"""The same variances through laplace-torch (Daxberger et al. 2021): an oracle, and a backend to choose.

Its fit, its backend's Jacobians and its functional variance; much slower than the engine of this project, and for
fewer models: which of its backends can treat a model is tried on two examples before any long work.
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

_TRIED = 2  # examples of the trial
_AGREES = 1e-3  # relative difference in the trial; rounding is far below, a wrong rule far above


class LaplaceTorchVariances:
    """Called like `src.jacobians.OutputVariances`: logits and variances under a Laplace posterior.

    Works on a copy of the model, so that nothing that laplace-torch does to a model (attributes, gradients, modes,
    hooks) remains. Everything is in the model's own precision; the Jacobians of ``memory_mb`` are alive at a time.

    Args:
        model: the model, with outputs (b, C).
        batches: the training examples, ``(images, labels, ...)``; run through several times.
        delta: prior precision.
        structure: a name of ``mpe.config.STRUCTURES``.
        full: the (C, C) covariance of each example instead of its diagonal.
        memory_mb: see above.

    Raises:
        ArgumentError: laplace-torch cannot treat the model.
        UserError: It is not installed, or its eigendecomposition fails.
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
            loader.cut = 1  # its diagonal takes Jacobians whose memory grows with the square of the batch
        with _foreign_code():
            self._posterior = _fitted(self.model, loader, delta, structure, backend)
        example = self._posterior.n_outputs * self._posterior.mean.nbytes  # bytes of one example's Jacobian
        self._step = 1 if slow else max(1, int(memory_mb * 2**20 // (3 * example)))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and variances of one batch.

        Args:
            images: (b, ...) inputs.

        Returns:
            (b, C) logits without their graph, and float64 variances (b, C), or covariances (b, C, C) where ``full``.
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
    """The backend class of laplace-torch that treats a model correctly.

    ASDL's is the faster; the other (curvlinops, with torch.func's Jacobians) serves where ASDL's Jacobians or
    diagonals differ from torch.func's on the given images.

    Args:
        model: the model; left as it was.
        images: examples (b, ...), of which the first few are tried.
        structure: a name of ``mpe.config.STRUCTURES``.

    Raises:
        ArgumentError: There is none.
        UserError: The package is missing.
    """
    from src import _torchvision  # noqa: F401  prepares torchvision, which laplace-torch imports

    try:
        from laplace.curvature.asdl import AsdlGGN
        from laplace.curvature.curvlinops import CurvlinopsGGN
    except ImportError as error:
        raise UserError(
            "laplace-torch: is not installed; run 'pip install laplace-torch', or use the laplace_backend fast"
        ) from error
    images = images[:_TRIED].to(next(model.parameters()).device)
    if structure == "kfac":
        _refuse_without_factors(model, images)
    reason = ""
    for backend in (AsdlGGN, CurvlinopsGGN):
        try:
            with _foreign_code():
                agrees = _tried(model, images, structure, backend, CurvlinopsGGN)
        except Exception as error:  # whatever a library raises on what it does not know
            reason = f" ({type(error).__name__})"
            continue
        if agrees:
            return backend
    raise _cannot(f"cannot fit {structure} to this model{reason}")


def _refuse_without_factors(model: nn.Module, images: Tensor) -> None:
    """Raise unless each trainable parameter belongs to one Linear or Conv2d that runs once.

    For any other, laplace-torch leaves blocks out without a word, or means something else by KFAC.
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
    """Whether a backend runs on a few examples, with the Jacobians and diagonals of torch.func."""
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    copied = copy.deepcopy(model).eval()
    copied.output_size = copied(images).shape[-1]  # as its fit would set it
    curvature = backend(copied, "classification")
    jacobians, _ = curvature.jacobians(images)
    if structure == "kfac":
        _, found = curvature.kron(images, labels, N=len(images))
        if len(found.kfacs) != sum(p.requires_grad for p in model.parameters()):
            return False  # blocks that it leaves out would be taken for the prior's
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
    """laplace-torch's posterior, fitted on a copy of the model."""
    import laplace

    posterior = laplace.Laplace(
        copy.deepcopy(model).eval(),
        "classification",
        subset_of_weights="all",
        hessian_structure={"kfac": "kron", "diag": "diag"}[structure],
        prior_precision=delta,
        backend=backend,
    )
    try:
        posterior.fit(loader)
    except (SystemExit, torch.linalg.LinAlgError) as error:  # it leaves Python where eigh fails twice
        dtype = next(model.parameters()).dtype
        raise UserError(
            f"laplace-torch: its eigendecomposition does not converge in {dtype}; give --laplace_backend=fast"
        ) from error
    return posterior


@contextmanager
def _foreign_code() -> Iterator[None]:
    """Run their code with gradients on and its warnings (of old interfaces) off."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield


class _Loader:
    """Batches as laplace-torch wants them: pairs on the device, and a ``dataset`` that has a length.

    Attributes:
        first: the images of the first batch.
        dataset: something as long as the examples are many.
        cut: how many examples a batch may hold.
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
