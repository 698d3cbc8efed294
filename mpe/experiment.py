"""What the five experiments share: data, network, base training, variances, and results that survive."""

import logging
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpe.config import ORDERS
from mpe.laplace_torch import LaplaceTorchVariances
from mpe.posterior import EPS, Predictions, laplace_posterior, optimizer_posterior, predict
from src.artifacts import (
    experiment_folder,
    label_hash,
    mpe_experiment,
    pickle_path,
    require_writable,
    resume_folder,
    without_idle,
)
from src.datasets import Batches, ImageSet, load_dataset, parse_subset
from src.devices import PRECISIONS, prepare, resolve_device
from src.errors import FlagError
from src.jacobians import OutputVariances, Posterior
from src.models import MODELS, build_model
from src.training import (
    RunFiles,
    Trainer,
    TrainingConfig,
    evaluate,
    image_facts,
    model_description,
    run_training,
)

log = logging.getLogger(__name__)

NORMALISATION = "mpe"
LOSS_CAP = -math.log(EPS)  # nats
SHARED_SETTINGS = (
    "dataset",
    "image_size",
    "channels",
    "labels",
    "images",
    "decoding",
    "subset",
    "examples",
    "model",
    "initialization",
    "base_shuffle",
)
_RESULT_FREE = (  # flags that change neither a result nor what it is called
    "device",
    "resume",
    "overwrite",
    "datasets_folder",
    "models_folder",
    "metrics_folder",
    "log_folder",
    "resume_ckpts_folder",
    "pickles_folder",
    "memory_mb",
    "bs_jacs",
    "ensemble_size",
    "ensemble",
    "write_scores",
)


class Experiment:
    """One experiment: its data, network and device, from the flags of ``add_experiment_flags``.

    Args:
        args: The flags.
        kind: What its result file is called after the experiment's name.

    Raises:
        FlagError: Data and network do not fit each other, or a flag's value does not fit the data.
    """

    def __init__(self, args: Namespace, kind: str) -> None:
        self.args, self.kind = args, kind
        self.device, self.precision = resolve_device(args.device), PRECISIONS[args.precision]
        prepare(self.device, self.precision, args.deterministic)
        torch.manual_seed(args.seed)
        np.random.seed(args.seed)
        train, test = load_dataset(
            args.dataset, args.datasets_folder, image_size=args.image_size, channels=args.channels
        )
        self.whole_train, self.whole_labels = train, train.labels.cpu().numpy()
        if args.subset is not None:
            train = train.subset(parse_subset(args.subset, train.total, train.labels.cpu()))
            log.info("training on %d of %d examples (--subset)", len(train), train.total)
        self.train, self.test = train.to(self.device), test.to(self.device)
        self.entry = train.entry
        self.model = self.build()  # data that the network cannot take are refused here
        require_writable(args.pickles_folder)

    def build(self) -> nn.Module:
        """A fresh network: of one seed, always the same."""
        args, entry = self.args, self.entry
        model = build_model(args.model, entry.num_classes, entry.channels, entry.image_size, args.seed)
        return model.to(self.device, self.precision.dtype)

    @property
    def count(self) -> int:
        """N, the number of training examples."""
        return len(self.train)

    @property
    def labels(self) -> Tensor:
        """int64 ``(N,)``, on the device."""
        return self.train.labels.to(self.device)

    def batches(self, images: ImageSet, size: int, order: str = "sequential") -> Batches:
        """Batches under the paper's normalisation, not augmented."""
        return Batches(
            images,
            size,
            normalisation=self.entry.normalisations[NORMALISATION],
            device=self.device,
            order=order,
            seed=self.args.seed,
            dtype=self.precision.dtype,
        )

    def prepared(self, images: ImageSet) -> Tensor:
        """All images, normalised, ``(n, c, h, w)``: what is trained on many times over."""
        found, start = None, 0
        for batch in self.batches(images, 1000):
            if found is None:  # all of it at once: joining parts would hold them twice
                found = batch.images.new_empty((len(images), *batch.images.shape[1:]))
            stop = start + len(batch.images)
            found[start:stop] = batch.images
            start = stop
        return found

    def settings(self) -> dict[str, Any]:
        """Everything that determines the result."""
        flags = {name: value for name, value in vars(self.args).items() if name not in _RESULT_FREE}
        return {
            **without_idle({name: plain(value) for name, value in flags.items()}),
            **MODELS[self.args.model].settings,
            "dataset": self.entry.name,
            "image_size": self.entry.image_size,
            "channels": self.entry.channels,
            "labels": label_hash(self.whole_labels),
            **image_facts(self.whole_train),
            "subset": None if self.args.subset is None else label_hash(self.train.indices.cpu().numpy()),
            "examples": self.count,
        }

    def path(self, kind: str | None = None) -> Path:
        """A result file of this experiment."""
        return pickle_path(self.args.pickles_folder, self.args.name_exp, kind or self.kind)

    # ------------------------------------------------------------------------------------------- training

    @property
    def files(self) -> RunFiles:
        """Where the base run keeps checkpoint and resume state."""
        args, name = self.args, mpe_experiment(self.args.name_exp, self.kind)
        return RunFiles(
            experiment_folder(args.models_folder, name, args.seed),
            resume_folder(args.resume_ckpts_folder, name, args.seed),
        )

    def train_base(
        self,
        optimizer: str,
        *,
        measure: Callable[[Trainer], None] = lambda trainer: None,
        after_step: Sequence[Callable[[Trainer, int, int], None]] = (),
    ) -> Trainer:
        """Train the network on all examples, resumably; ``self.model`` is the trained one.

        The objective is ``mean CE + delta / (2 N) |w|^2``: as weight decay delta / N of sgd and adam, decoupled for
        adamw, in iblr's prior.

        Args:
            optimizer: sgd, adam, adamw or iblr.
            measure: Called after each epoch, before its state is written.
            after_step: Called after each step.

        Returns:
            The loop, which knows optimiser and history.
        """
        args = self.args
        prior = {"delta": args.delta} if optimizer == "iblr" else {"weight_decay": args.delta / self.count}
        config = TrainingConfig(
            epochs=args.epochs,
            optimizer=optimizer,
            learning_rate=args.lr,
            lr_sched="cosine",
            lr_min=args.lrmin,
            hess_init=getattr(args, "hess_init", 0.1),
            seed=args.seed,
            precision=args.precision,
            **prior,
        )
        trainer = Trainer(
            self.model,
            self.batches(self.train, args.bs, ORDERS[args.base_shuffle]),
            self.batches(self.test, max(args.bs, 1000)),
            config,
            compile_model=args.compile,
            after_step=after_step,
            test_loss_cap=LOSS_CAP,
        )
        description = model_description(args.model, self.whole_train, self.entry.normalisations[NORMALISATION])
        run_training(
            trainer,
            self.files,
            self.base_settings(config),
            description,
            resume=args.resume,
            overwrite=args.overwrite,
            save_epochs="last",
            measure=measure,
        )
        return trainer

    def base_settings(self, config: TrainingConfig) -> dict[str, Any]:
        """What determines the base run: the experiment's settings without those of what follows it."""
        return {**config.as_dict(), **self.shared_settings(), "batch_size": self.args.bs}

    def shared_settings(self) -> dict[str, Any]:
        """The settings of data and model, which base training and retraining have in common."""
        own = self.settings()
        return {name: own[name] for name in SHARED_SETTINGS if name in own}

    def test_metrics(self, model: nn.Module | None = None) -> tuple[float, float]:
        """Test accuracy and mean NLL of a network, by default ``self.model``."""
        loss, accuracy = evaluate(
            model or self.model,
            self.batches(self.test, max(self.args.bs, 1000)),
            precision=self.args.precision,
            loss_cap=LOSS_CAP,
        )
        return accuracy, loss

    # ------------------------------------------------------------------------------------------ variances

    @property
    def full(self) -> bool:
        """Whether the covariance of the classes is wanted."""
        return self.args.class_cov != "diag"

    def laplace(self, delta: float, structure: str = "kfac", model: nn.Module | None = None) -> Predictions:
        """Predictions on the training examples with variances of Laplace's posterior.

        Args:
            delta: Prior precision.
            structure: ``"kfac"`` or ``"diag"``.
            model: The network; default ``self.model``.
        """
        model, args = model or self.model, self.args
        batches = self.batches(self.train, args.bs_jacs)
        if args.laplace_backend == "laplace-torch":
            more = {"structure": structure, "full": self.full, "memory_mb": args.memory_mb}
            return self._predict(LaplaceTorchVariances(model, batches, delta, **more))
        posterior = laplace_posterior(
            model, batches, delta, structure=structure, memory_mb=args.memory_mb, progress=True
        )
        return self._predict(OutputVariances(model, posterior, full=self.full, memory_mb=args.memory_mb))

    def from_optimizer(self, trainer: Trainer) -> Predictions:
        """The same with the posterior that the optimiser's state holds (iblr, adam)."""
        posterior = optimizer_posterior(
            trainer.optimizer, trainer.model, num_examples=self.count, delta=self.args.delta
        )
        return self._predict(OutputVariances(trainer.model, posterior, full=self.full, memory_mb=self.args.memory_mb))

    def _predict(self, engine: Any) -> Predictions:
        with engine:
            return predict(engine, self.batches(self.train, self.args.bs_jacs), progress=True)

    def check_network(self) -> None:
        """Compute variances of two examples under a unit covariance; see ``check_variances``."""
        ones = {name: torch.ones_like(p) for name, p in self.model.named_parameters() if p.requires_grad}
        engine = OutputVariances(self.model, Posterior(ones), memory_mb=self.args.memory_mb)
        try:
            with engine:
                engine(next(iter(self.batches(self.train, 2))).images)
        except ValueError as error:
            raise FlagError(f"--model {self.args.model}: {error}") from error

    def check_variances(self, delta: float, structure: str) -> None:
        """Compute variances of two examples, so that a network which cannot have them is refused before training."""
        if self.args.laplace_backend == "fast":
            structure = "diag"  # refuses the same networks, without eigendecompositions, which may take minutes
        whole, self.train = self.train, self.train.subset(torch.arange(min(2, self.count)))
        try:
            self.laplace(delta, structure)
        except ValueError as error:
            raise FlagError(f"--model {self.args.model}: {error}") from error
        finally:
            self.train = whole


def plain(value: Any) -> Any:
    """A flag's value as a plain one."""
    return str(value) if isinstance(value, Path) else value


def plain_args(args: Namespace) -> dict[str, Any]:
    """The flags as a dictionary of plain values, for a result file."""
    return {name: plain(value) for name, value in vars(args).items()}
