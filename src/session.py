"""What the training scripts share: from parsed flags to a trained network and its files."""

import copy
import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from src.artifacts import (
    differences,
    dynamics_folder,
    experiment_folder,
    file_digest,
    label_hash,
    require_writable,
    resume_folder,
)
from src.cli import start_logging
from src.datasets import Augmentation, Batches, DatasetEntry, ImageSet, load_dataset, parse_subset
from src.devices import PRECISIONS, prepare, resolve_device
from src.errors import FileError, FlagError
from src.metrics.dynamics import (
    has_end_of_training_scores,
    remove_end_of_training_scores,
    write_end_of_training_scores,
)
from src.models import MODELS, build_model
from src.training import (
    DYNAMICS_FILE,
    Dynamics,
    EpochPlan,
    ProcessGroup,
    RunFiles,
    Trainer,
    TrainingConfig,
    image_facts,
    model_description,
    read_dynamics,
    run_training,
)

log = logging.getLogger(__name__)

NORMALISATION = "samis"


class Session:
    """One start of a training script: its processes, device, data, and the runs that it makes.

    Use it as a context manager: leaving it leaves the group of processes.

    Args:
        args: The flags of ``add_data_flags``, ``add_model_flags``, ``add_training_flags``, ``add_run_flags``,
            ``add_compute_flags`` and the folders.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.group = ProcessGroup.from_environment() if args.distributed_training else ProcessGroup.local()
        if self.group.world > 1 and args.device not in (None, "cpu", "cuda"):
            raise FlagError(f"--device {args.device}: several processes need a GPU each; give cuda or cpu")
        self.device = resolve_device(args.device, self.group.local_rank)
        self.precision = PRECISIONS[args.precision]
        prepare(self.device, self.precision, args.deterministic)
        torch.manual_seed(args.seed)
        np.random.seed(args.seed)
        if args.distributed_training:
            self.group.start(self.device)
        self.train, self.test = self._load()
        self.whole_train = self.train
        if args.subset is not None:
            self.train = self.train.subset(parse_subset(args.subset, self.train.total, self.train.labels.cpu()))
            log.info("training on %d of %d examples (--subset)", len(self.train), self.train.total)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.group.stop()

    def variant(self, **changes: Any) -> "Session":
        """This session under other flags, with the same data, device and processes."""
        other = copy.copy(self)
        other.args = Namespace(**{**vars(self.args), **changes})
        return other

    def _load(self) -> tuple[ImageSet, ImageSet]:
        """The whole training and test part; the leading process loads first, so that data are fetched once."""
        args = self.args
        for turn in (True, False):
            if self.group.is_main_process == turn:
                parts = load_dataset(
                    args.dataset, args.datasets_folder, image_size=args.image_size, channels=args.channels
                )
            self.group.wait()
        return parts[0].to(self.device), parts[1].to(self.device)

    @property
    def entry(self) -> DatasetEntry:
        """The data set."""
        return self.train.entry

    def config(self) -> TrainingConfig:
        """The loop's settings, from the flags."""
        names = TrainingConfig.__dataclass_fields__.keys() & vars(self.args).keys()
        return TrainingConfig(**{name: getattr(self.args, name) for name in names})

    def augmentation(self) -> Augmentation | None:
        """What training images undergo, from the flags and the data set."""
        args = self.args
        return self.entry.training_augmentation(
            args.data_augmentation, cutout_holes=args.cutout_holes, cutout_length=args.cutout_length
        )

    def run(
        self,
        experiment: str,
        train: ImageSet,
        *,
        weights: torch.Tensor | None = None,
        plan: EpochPlan | None = None,
        more_settings: Mapping[str, Any] | None = None,
        final_scores: bool = True,
    ) -> list[dict[str, Any]]:
        """Train one network on ``train`` and write everything that a run writes.

        Args:
            experiment: The run's name in paths.
            train: The training examples, with their original indices.
            weights: Sample weights, one per example of ``train``.
            plan: Which examples each epoch visits, where that is not all of them.
            more_settings: Settings beside those of the flags, such as the split left out.
            final_scores: With ``--measure_proxies``, whether to measure the scores of the trained network too.

        Returns:
            The history: one record per epoch.
        """
        args, config = self.args, self.config()
        if self.group.is_main_process:
            start_logging(args.log_folder / experiment / f"seed_{args.seed}.log")
        log.info("%s: %d training and %d test examples", experiment, len(train), len(self.test))
        if MODELS[args.model].pretrain is not None and not args.pretrained:
            log.info(
                "%s starts from random weights; the SAMIS experiments start from ImageNet weights (--pretrained)",
                args.model,
            )
        if args.measure_proxies and self.group.is_main_process:
            require_writable(dynamics_folder(args.metrics_folder, experiment, args.seed))
        model = self._model()
        dynamics = Dynamics(train.total, self.entry.num_classes, self.device) if args.measure_proxies else None
        trainer = Trainer(
            model,
            self.batches(train, order="shuffled", augmentation=self.augmentation()),
            self.batches(self.test),
            config,
            weights=weights,
            plan=plan,
            dynamics=dynamics,
            group=self.group,
            compile_model=args.compile,
            sync_batchnorm=args.sync_bn,
        )
        settings = self.settings(train, more_settings)
        whole_labels = self.whole_train.labels.cpu().numpy()
        history = run_training(
            trainer,
            self.files(experiment),
            settings,
            model_description(args.model, self.whole_train, self.entry.normalisations[NORMALISATION]),
            resume=args.resume,
            overwrite=args.overwrite,
            save_epochs=args.save_epochs,
        )
        if dynamics is not None and self.group.is_main_process:
            folder = dynamics_folder(args.metrics_folder, experiment, args.seed)
            remove_end_of_training_scores(folder)  # an older run's, which would pass for this run's
            dynamics.write(folder / DYNAMICS_FILE, whole_labels, settings)
            if final_scores:
                write_end_of_training_scores(folder, model, self.batches(train, alone=True), dynamics.arrays())
            log.info("per-example dynamics and scores are in %s", folder)
        self.group.wait()
        return history

    def is_done(
        self,
        experiment: str,
        train: ImageSet,
        more_settings: Mapping[str, Any] | None = None,
        final_scores: bool = True,
    ) -> bool:
        """Whether a run with these very settings has finished, and left all its scores."""
        settings = self.settings(train, more_settings)
        try:
            results = self.files(experiment).read_results()
            if not results.get("finished") or differences(results["settings"], settings):
                return False
            if not self.args.measure_proxies:
                return True
            folder = dynamics_folder(self.args.metrics_folder, experiment, self.args.seed)
            stored = read_dynamics(folder / DYNAMICS_FILE)["settings"]
        except FileError:  # starting the run says so, or replaces it
            return False
        complete = not final_scores or has_end_of_training_scores(folder)
        return complete and not differences(stored, settings)

    def files(self, experiment: str) -> RunFiles:
        """Where a run keeps its files."""
        args = self.args
        return RunFiles(
            experiment_folder(args.models_folder, experiment, args.seed),
            resume_folder(args.resume_ckpts_folder, experiment, args.seed),
        )

    def _model(self) -> torch.nn.Module:
        args, entry = self.args, self.entry
        model = build_model(
            args.model, entry.num_classes, entry.channels, entry.image_size, args.seed, pretrained=args.pretrained
        ).to(self.device, self.precision.dtype)
        if MODELS[args.model].channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model

    def batches(
        self,
        images: ImageSet,
        *,
        order: str = "sequential",
        augmentation: Augmentation | None = None,
        alone: bool = False,
    ) -> Batches:
        """Batches of ``--batch_size``, shared among the processes unless ``alone``."""
        args, entry = self.args, self.entry
        return Batches(
            images,
            args.batch_size,
            normalisation=entry.normalisations[NORMALISATION],
            device=self.device,
            order=order,
            augmentation=augmentation,
            seed=args.seed,
            dtype=self.precision.dtype,
            channels_last=MODELS[args.model].channels_last,
            rank=0 if alone else self.group.rank,
            world=1 if alone else self.group.world,
        )

    def settings(self, train: ImageSet, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Everything that determines a run's result."""
        args, entry = self.args, self.entry
        subset = None if args.subset is None else label_hash(self.train.indices.cpu().numpy())
        return {
            **self.config().as_dict(),
            "dataset": entry.name,
            "image_size": entry.image_size,
            "channels": entry.channels,
            **image_facts(self.whole_train),
            "labels": label_hash(self.whole_train.labels.cpu().numpy()),
            "examples": len(train),
            "subset": subset,
            "model": args.model,
            **MODELS[args.model].settings,
            "pretrained": file_digest(args.pretrained) if isinstance(args.pretrained, str) else args.pretrained,
            "batch_size": args.batch_size,
            "data_augmentation": args.data_augmentation,
            "cutout_holes": args.cutout_holes,
            "cutout_length": args.cutout_length if args.cutout_holes else None,
            "sync_bn": args.sync_bn,
            "measure_proxies": args.measure_proxies,
            **(more or {}),
        }
