"""Scores, selections, spectra and kernels of a user's models on a user's examples: see ``batches`` for their form."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import mpe
from mpe import Sensitivities
from src.cli import check_options
from src.coresets import METHODS, LastLayer, Needs, Selection, SelectionInputs, find_method, make_groups
from src.curvature.config import SpectrumConfig
from src.curvature.ntk import NTK_CLASSES, kernel_bytes, ntk_kernel, velocity
from src.curvature.operators import OPERATORS
from src.curvature.spectrum import Spectrum, SpectrumRun
from src.devices import available_memory
from src.errors import ArgumentError, MeasurementError
from src.formatting import gib
from src.jacobians import Posterior
from src.library.batches import Examples, ModelBatches, by_index, class_logits, run_model
from src.library.recorder import DynamicsRecorder, build_options
from src.metrics.samis import FIELDS, mean_loss, score_batch
from src.models.base import eval_mode

__all__ = [
    "SamisScores",
    "Selection",
    "Sensitivities",
    "Spectrum",
    "hessian_spectrum",
    "ntk",
    "samis_scores",
    "select",
    "sensitivities",
    "velocity",
]


@dataclass(frozen=True, eq=False)
class SamisScores:
    """SAMIS scores of n examples, ordered by index; float64 ``(n,)`` unless noted. High means memorized.

    Attributes:
        indices: int64, ascending: the position of each example in the loader, or the indices that its batches have.
        samis_loss: ``|l_SGD - l_SAM|``.
        samis_prob: ``sum_c |p_SGD,c - p_SAM,c|``.
        mean_loss: The mean loss of both models.
        loss_sgd: Cross-entropy of the SGD-trained model.
        loss_sam: Cross-entropy of the SAM-trained model.
        correct_sgd: bool, whether the SGD-trained model is correct.
        correct_sam: bool, whether the SAM-trained model is correct.
    """

    indices: np.ndarray
    samis_loss: np.ndarray
    samis_prob: np.ndarray
    mean_loss: np.ndarray
    loss_sgd: np.ndarray
    loss_sam: np.ndarray
    correct_sgd: np.ndarray
    correct_sam: np.ndarray


def samis_scores(model_sgd: nn.Module, model_sam: nn.Module, loader: Iterable[Any]) -> SamisScores:
    """Compute how much an SGD-trained and a SAM-trained model disagree about each example.

    Args:
        model_sgd: The model trained with SGD. One logit z means two classes with logits (0, z).
        model_sam: The model of the same architecture trained with SAM.
        loader: The examples without augmentation; see `batches`.

    Raises:
        ArgumentError: The loader, a batch or a model has an unsuitable form, or an example occurs twice.
        MeasurementError: A loss is not finite.
    """
    models = {"model_sgd": model_sgd, "model_sam": model_sam}
    indices, parts = [], []
    with eval_mode(model_sgd), eval_mode(model_sam), torch.no_grad():
        for inputs, labels, given in Examples(loader, models, binary=True):
            sgd, sam = (class_logits(run_model(model, inputs)) for model in models.values())
            indices.append(given)
            parts.append(score_batch(sgd, sam, labels))
    order = by_index(indices)
    fields = {name: torch.cat([part[name] for part in parts]).cpu().numpy()[order] for name in FIELDS}
    found = torch.cat(indices).numpy()[order]
    for name in models:
        wrong = np.flatnonzero(~np.isfinite(fields[name.replace("model", "loss")]))
        if len(wrong):
            raise MeasurementError(
                f"{name}: the losses of {len(wrong)} examples are not finite (first {found[wrong[0]]})"
            )
    return SamisScores(indices=found, mean_loss=mean_loss(fields["loss_sgd"], fields["loss_sam"]), **fields)


def select(
    method: str,
    *,
    labels: Any,
    fraction: float | None = None,
    shots: int | None = None,
    shots_up_to: int | None = None,
    features: Any = None,
    logits: Any = None,
    scores: Any = None,
    dynamics: DynamicsRecorder | None = None,
    per_class: bool = True,
    seed: int = 1,
    **options: Any,
) -> Selection:
    """Select a subset of n examples.

    Inputs that the method does not use are ignored, so that several methods can be called alike. Arrays may be NumPy
    arrays or tensors; for ``el2n`` and ``grand``, those of several models may be given as a list.

    Args:
        method: A method of ``train_prune.py`` (docs/pruning.md), or ``min_NAME``, which ranks by ``scores``.
        labels: ``(n,)``.
        fraction: Fraction to keep, in (0, 1].
        shots: Examples per class, instead.
        shots_up_to: The same, but a class with fewer examples is kept in full.
        features: ``(n, d)``, inputs of a trained model's last linear layer.
        logits: ``(n, C)``, its outputs.
        scores: ``(n,)``, for ``min_NAME``. Without ``dynamics``, also for methods that need only one score of them
            (``aum``, for example); high values must mean atypical.
        dynamics: The recorded dynamics of a training run.
        per_class: Whether to select within each class.
        seed: Seed of the method's random draws.
        **options: Options of the method, such as ``coreset_mode="few_shot"``.

    Returns:
        The selection: ``indices``, ascending positions in the arrays, and ``weights`` for training.

    Raises:
        ArgumentError: The method or an option does not exist, an input is missing, or the amount does not fit.
        UserError: Arrays have different lengths, or values that are not finite; a label is not a class index.
    """
    entry = {f"min_{m.needs.stored}": m for m in METHODS.values() if m.needs.stored}.get(method) or find_method(
        method
    )
    if entry.select is None:
        raise ArgumentError("method", f"{method}: selects again in each epoch; train with train_prune.py")
    if sum(amount is not None for amount in (fraction, shots, shots_up_to)) != 1:
        raise ArgumentError("fraction", ": give one of fraction, shots and shots_up_to")
    needs, chosen = entry.needs, build_options(entry.options, options, method, entry.option_names)
    if getattr(chosen, "coreset_mode", "large") not in ("large", "few_shot"):
        raise ArgumentError("coreset_mode", f"{chosen.coreset_mode}: choose from large, few_shot")
    if getattr(chosen, "grand_gradient", "last") == "full":
        raise ArgumentError("grand_gradient", "full: needs the model; use last, or select_coreset.py")
    required = {
        "scores": needs.stored,
        "dynamics": needs.dynamics or (needs.reduced and scores is None),
        "logits": needs.logits,
        "features": needs.embeddings,
    }
    given = {"scores": scores, "dynamics": dynamics, "logits": logits, "features": features}
    missing = [name for name, needed in required.items() if needed and given[name] is None]
    if missing:
        everything = " and ".join(name for name in required if required[name])
        raise ArgumentError(missing[0], f": {method} needs {everything} besides labels; give {' and '.join(missing)}")
    labels = np.asarray(torch.as_tensor(labels).cpu())
    if not labels.size:
        raise ArgumentError("labels", ": there are none")
    layers = _last_layers(method, needs, labels, logits, features)
    classes = layers[0].logits.shape[1] if layers else int(labels.max()) + 1
    if needs.reduced and dynamics is not None:
        windows = {"window": chosen.score_window} if "score_window" in entry.option_names else {}
        scores = dynamics.scores(needs.reduced, **windows)
    arrays = dynamics.arrays() if dynamics is not None and needs.dynamics else {}
    inputs = SelectionInputs(
        labels,
        classes,
        seed,
        None if scores is None or not (needs.stored or needs.reduced) else np.asarray(torch.as_tensor(scores).cpu()),
        {name: arrays[name] for name in needs.dynamics},
        layers,
    )
    groups = make_groups(
        labels.astype(np.int64), classes, fraction=fraction, shots=shots, shots_up_to=shots_up_to, per_class=per_class
    )
    return entry.select(inputs, groups, chosen)


def _last_layers(method: str, needs: Needs, labels: np.ndarray, logits: Any, features: Any) -> list[LastLayer]:
    """The last layer of each model, with those of logits and features that the method reads.

    Raises:
        ArgumentError: The method takes another number of models, or logits have another shape.
        UserError: See ``LastLayer``.
    """
    columns: list[list[Any]] = []
    for name, values, read in (("logits", logits, needs.logits), ("features", features, needs.embeddings)):
        if read:
            several = values if isinstance(values, list | tuple) else [values]
            columns.append([torch.as_tensor(part).detach().cpu() for part in several])
            if len(columns[-1]) > 1 and not needs.ensemble:
                raise ArgumentError(name, f": of {len(columns[-1])} models; {method} takes those of one")
    if len({len(column) for column in columns}) > 1:
        raise ArgumentError("features", f": of {len(columns[1])} models, but there are logits of {len(columns[0])}")
    if needs.logits:
        for outputs in columns[0]:
            if outputs.ndim != 2 or outputs.shape[1] < 2:
                raise ArgumentError("logits", f": have shape {tuple(outputs.shape)}; give (n, C), at least 2 classes")
    elif columns:  # embeddings alone
        columns.insert(0, [torch.zeros(len(labels), int(labels.max()) + 1)])
    if needs.logits and not needs.embeddings:
        columns.append([None] * len(columns[0]))
    classes = torch.from_numpy(labels)
    return [LastLayer(outputs, classes.long(), inputs) for outputs, inputs in zip(*columns, strict=True)]


def hessian_spectrum(
    model: nn.Module, loader: Iterable[Any], *, operator: str = "hessian", progress: bool = False, **settings: Any
) -> Spectrum:
    """Measure the spectrum of the Hessian of the mean cross-entropy over a loader's examples, by Lanczos.

    Args:
        model: The model; all parameters that require a gradient count.
        loader: The examples without augmentation; see `batches`. It may shuffle.
        operator: ``"hessian"`` or ``"ggn"``, the generalized Gauss-Newton matrix.
        progress: Whether to show a progress bar.
        **settings: ``top_n`` (5), ``eigen_order``, ``tolerance``, ``lanczos_steps`` (100), ``max_steps`` (300),
            ``probes``, ``trace_probes`` (100; 0 for no trace), ``trace_tolerance``, ``probe_seed`` and ``basis`` of
            ``src.curvature.config.SpectrumConfig``.

    Returns:
        ``eigenvalues`` with ``residuals``, ``nodes`` and ``weights`` of the density, and ``trace.mean_and_error``.

    Raises:
        ArgumentError: The loader, the model or a setting is unsuitable, or examples change from pass to pass.
        MeasurementError: A value is not finite.
        ValueError: No parameter requires a gradient, or a BatchNorm layer has no running statistics.
    """
    for name in settings:
        if name not in _SPECTRUM:
            raise ArgumentError(name, f": is not a setting of hessian_spectrum; it has {', '.join(_SPECTRUM)}")
    config = SpectrumConfig(operator=operator, **settings)
    check_options(config)
    batches = ModelBatches(loader, model, ordered=False)
    count = sum(len(batch.labels) for batch in batches)
    return SpectrumRun(OPERATORS[operator](batches.module, batches, count), config).run(progress)


_SPECTRUM = ("top_n", "eigen_order", "tolerance", "lanczos_steps", "max_steps", "probes", "trace_probes",
             "trace_tolerance", "probe_seed", "basis")  # fmt: skip


def ntk(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    classes: str = "all",
    projection_dim: int | None = None,
    seed: int = 0,
    memory_mb: float = 2048.0,
) -> np.ndarray:
    """Compute the empirical neural tangent kernel of a loader's examples, ordered by index.

    ``velocity(ntk(first, loader), ntk(second, loader))`` is how far the kernel moved between two models.

    Args:
        model: The model; all parameters that require a gradient count.
        loader: A few hundred examples without augmentation, all inputs of the same shape.
        classes: ``"all"`` logits, or one value per example: ``"sum_logits"`` or ``"true_label"``.
        projection_dim: Size of a random sketch of each gradient; None for the exact kernel.
        seed: Seed of the sketch.
        memory_mb: Memory limit for intermediate values, in MiB.

    Returns:
        float32 ``(n C, n C)``, with row ``i C + c`` for logit c of the i-th example; otherwise ``(n, n)``.

    Raises:
        ArgumentError: The loader, the model or ``classes`` is unsuitable, or the kernel does not fit in memory.
        ValueError: The model mixes the examples of a batch.
    """
    if classes not in NTK_CLASSES:
        raise ArgumentError("classes", f"{classes}: choose from {', '.join(NTK_CLASSES)}")
    batches = ModelBatches(loader, model)
    parts = [(batch.images, batch.labels, batch.indices) for batch in batches]
    if len({images.shape[1:] for images, _, _ in parts}) > 1:
        raise ArgumentError("loader", ": inputs have different shapes; pad them to the same length")
    columns = list(zip(*parts, strict=True))
    order = torch.from_numpy(by_index(columns[2]))
    rows = len(order) * (batches.examples.classes if classes == "all" else 1)
    free = available_memory(columns[0][0].device)
    if free is not None and kernel_bytes(rows) > free:
        raise ArgumentError(
            "loader",
            f": a kernel of {len(order)} examples has {rows} rows and takes {gib(kernel_bytes(rows))}, but "
            f"{gib(free)} are free; give fewer examples, or another value of classes",
        )
    images, labels = (torch.cat(column)[order.to(column[0].device)] for column in columns[:2])
    return ntk_kernel(
        batches.module, images, labels, classes, projection_dim=projection_dim, seed=seed, memory_mb=memory_mb
    )


def sensitivities(
    model: nn.Module, loader: Iterable[Any], posterior: Posterior | Optimizer | str, **settings: Any
) -> Sensitivities:
    """Sensitivity of a trained model to each training example: ``mpe.sensitivities`` for all batches and models.

    Args:
        model: The model.
        loader: The training examples without augmentation; see `batches`.
        posterior: ``"kfac"`` or ``"diag"``, with ``delta``; the optimizer that trained the model; or a `Posterior`.
        **settings: ``delta``, ``num_examples``, ``class_cov``, ``memory_mb`` and ``progress`` of
            ``mpe.sensitivities``.

    Raises:
        ArgumentError: The loader or the model is unsuitable.
        ValueError: A setting is missing or invalid.
        MeasurementError: A score is not finite.
    """
    batches = ModelBatches(loader, model)
    if isinstance(posterior, Posterior) and not batches.examples.plain:
        posterior = Posterior({f"model.{name}": block for name, block in posterior.blocks.items()})
    return mpe.sensitivities(batches.module, batches, posterior, **settings)
