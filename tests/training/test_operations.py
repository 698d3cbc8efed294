"""The overhead of a training step on a GPU: kernel launches and synchronizations.

Without a GPU, operations are counted on the CPU, and tensors on the device ``meta``, which have no values, stand in
for GPU tensors: code that reads a value, or a shape that depends on values, fails.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpe.retraining import one_epoch
from mpe.schedules import own_schedules, shared_schedules
from src.coresets.infobatch import InfoBatchPlan
from src.datasets import Augmentation, Batches, DatasetEntry, ImageSet, Normalization
from src.models import MODELS, build_model
from src.training import Dynamics, Trainer, TrainingConfig
from src.training.ensemble import Ensemble

NORMAL = Normalization((0.5,) * 3, (0.2,) * 3)
SIZE, BATCH = 8, 2
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
MARKS = {"_record_function_enter_new", "_record_function_exit", "lift_fresh", "is_same_size"}
COPIES = {"_to_copy", "copy_"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"}


class Operations(TorchDispatchMode):
    """Counts operations that launch GPU kernels, and lists those that synchronize or run on the CPU."""

    def __init__(self):
        super().__init__()
        self.launched, self.waits, self.on_cpu = Counter(), [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        name = operation._schema.name.split("::")[1]
        view = any(part.alias_info is not None and not part.alias_info.is_write for part in operation._schema.returns)
        if view or name in ALLOCATIONS | MARKS:
            return found
        if name in WAITS:
            self.waits.append(name)
        self.launched[name] += 1
        touched = (found, args) if name in COPIES else found  # a copy from pageable CPU memory also synchronizes
        tensors = [leaf for leaf in tree_leaves(touched) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.on_cpu.append(name)
        return found


def make(model, steps, *, device="cpu", dynamics=False, plan=False, weighted=False, after_step=(), **settings):
    count = steps * BATCH
    augmentation = Augmentation(crop_padding=1, flip=True, cutout_holes=1, cutout_length=2)
    entry = DatasetEntry("made", 10, 3, SIZE, {"samis": NORMAL}, "npz")
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=draw)
    images = ImageSet(entry, "train", pixels, torch.arange(count) % 10)
    shared = {"normalization": NORMAL, "device": device, "channels_last": MODELS[model].channels_last}
    optimizer = {"optimizer": "sgd", "learning_rate": 1e-3, **settings}
    layout = torch.channels_last if MODELS[model].channels_last else torch.contiguous_format
    return Trainer(
        build_model(model, 10, 3, SIZE, seed=0).to(device, memory_format=layout),
        Batches(images.to(device), BATCH, order="shuffled", augmentation=augmentation, seed=1, **shared),
        Batches(images.subset(torch.arange(2)).to(device), BATCH, **shared),
        TrainingConfig(epochs=1, **optimizer),
        dynamics=Dynamics(count, 10, torch.device(device)) if dynamics else None,
        plan=InfoBatchPlan(images.indices, prune_ratio=0.5, epochs=1, seed=1, device=device) if plan else None,
        weights=torch.ones(count) if weighted else None,
        after_step=after_step,
    )


@pytest.mark.parametrize(
    ("model", "settings", "ceiling"),
    [
        ("resnet8", {}, 80),
        ("resnet8", {"dynamics": True, "weighted": True}, 81),
        ("resnet8", {"optimizer": "sam"}, 200),  # 13 of them update BatchNorm's statistics
        ("large_mlp", {}, 21),
        ("large_mlp", {"optimizer": "adam"}, 22),
        ("large_mlp", {"optimizer": "iblr"}, 39),
    ],
)
def test_operations_of_a_step(model, settings, ceiling, monkeypatch):
    """The average over 64 steps, including one report and the preparation of 64 steps' images."""
    monkeypatch.setattr("src.datasets.batches.PREPARED_ON_CPU", 64 * BATCH * 3 * SIZE**2 * 4)
    counts = []
    trainer = make(model, 66, after_step=[lambda *_: counts.append(mode.launched.total())], **settings)
    with Operations() as mode:
        trainer.fit()
    assert (counts[64] - counts[0]) / 64 <= ceiling


@pytest.mark.parametrize("steps", [1, 64, 70, 200])
def test_values_are_looked_at_once_in_64_steps(steps, monkeypatch):
    waits, looks, check = [], [], Trainer._check_finite

    def look(trainer, bad, epoch):
        looks.append(len(waits))
        check(trainer, bad, epoch)
        mode.waits.clear()

    monkeypatch.setattr(Trainer, "_check_finite", look)
    trainer = make("large_mlp", steps, dynamics=True, after_step=[lambda *_: waits.append(list(mode.waits))])
    with Operations() as mode:
        trainer.fit()
    assert waits == [[]] * steps
    assert looks == [*range(64, steps + 1, 64), steps]


class StopError(Exception):
    pass


CASES = [
    ("resnet8", {}),
    ("resnet8", {"optimizer": "sam", "dynamics": True}),
    ("resnet8", {"plan": True}),
    ("large_mlp", {"optimizer": "iblr", "weighted": True}),
]


@pytest.mark.parametrize(("model", "settings"), CASES)
def test_an_epoch_is_computed_on_the_models_device(model, settings, monkeypatch):
    monkeypatch.setattr(Trainer, "_check_finite", lambda *_: None)
    if settings.get("plan"):  # the selection depends on losses, once per epoch
        monkeypatch.setattr(
            InfoBatchPlan, "choose", lambda plan, *_: (torch.arange(0, 140, 2), torch.ones(140, dtype=torch.float64))
        )

    def follow(trainer, epoch, step):
        if step == 1:
            mode.on_cpu.clear()
        if step == trainer.train_batches.steps(70 if settings.get("plan") else 140):
            raise StopError

    trainer = make(model, 70, device="meta", after_step=[follow], **settings)
    with pytest.raises(StopError), Operations() as mode:
        trainer.fit()
    assert not mode.on_cpu, "between the first step and the last, nothing is computed on the CPU"
    assert not mode.waits
    batches = list(trainer.train_batches.epoch(2, weights=torch.ones(140)))
    assert all(part.is_meta for batch in batches for part in (*batch, batch.shares))


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_an_ensembles_epoch_is_computed_on_its_device(vectorised, shared):
    total, removed = 140, [np.arange(0), np.array([7]), np.arange(50)]
    schedules = own_schedules(removed, [1, 2, 3], total)
    if shared:
        schedules = shared_schedules(removed, torch.arange(total))
    with torch.device("meta"):
        images, labels = torch.empty(total, 3, SIZE, SIZE), torch.empty(total, dtype=torch.int64)
    schedules = schedules.to("meta", masks="meta" if vectorised else "cpu")
    ensemble = Ensemble(build_model("small_mlp", 10, 3, SIZE, seed=0).to("meta"), 3, l2=0.1, vectorised=vectorised)
    finite = one_epoch(ensemble, images, labels, schedules, BATCH, 0.1)
    assert finite.is_meta
    assert schedules.batch(0 if shared else 69, BATCH).weights.is_meta == vectorised


def test_operations_of_an_ensembles_step():
    found = []
    for steps in (64, 128):
        total = steps * BATCH
        images, labels = torch.randn(total, 3, SIZE, SIZE), torch.arange(total) % 10
        schedules = own_schedules([np.arange(1), np.arange(1)], [1, 2], total)
        ensemble = Ensemble(build_model("small_mlp", 10, 3, SIZE, seed=0), 2, l2=1e-3)
        with Operations() as mode:
            one_epoch(ensemble, images, labels, schedules, BATCH, 0.1)
        assert not mode.waits
        found.append(mode.launched)
    assert sum((found[1] - found[0]).values()) / 64 <= 40


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("model", "settings"), CASES)
def test_a_gpu_is_not_waited_for_within_an_epoch(model, settings, monkeypatch):
    check = Trainer._check_finite

    def look(self, bad, epoch):
        torch.cuda.set_sync_debug_mode("default")
        check(self, bad, epoch)

    def watch(trainer, epoch, step):
        last = step >= trainer.train_batches.steps(len(trainer.train_batches.images))
        torch.cuda.set_sync_debug_mode("default" if last else "error")

    monkeypatch.setattr(Trainer, "_check_finite", look)
    try:
        make(model, 70, device="cuda", after_step=[watch], **settings).fit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
