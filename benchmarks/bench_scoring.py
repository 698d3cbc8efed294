"""SAMIS scores of a pair of networks, in batches and one example at a time, reading and normalising included.

    python -m benchmarks.bench_scoring [--quick]

The plain way is a loop over a DataLoader of batch size one, over PIL images with ToTensor and Normalize; ours is
``score_pair`` as ``compute_sam_sgd.py`` calls it. The scores of both ways are compared on the way. A row on all cores
takes the time of the wall: on one thread, convolutions in batches run at the speed of a matrix product, which for
resnet18 is not quite twice that of single images; on two, single images gain less from the second.
"""

import os
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import PlainImages, Row, in_turn, random_images, run
from src.datasets import Batches
from src.devices import PRECISIONS, prepare
from src.metrics.pairs import score_pair
from src.models import MODELS, build_model

BATCH = 512


@dataclass(frozen=True)
class Case:
    """A model, the data set whose images it sees, how many of them, and what is asked for."""

    model: str
    dataset: str
    count: int
    target: float | None
    all_cores: bool = False


CASES = (
    Case("mlp", "mnist", 2_000, 20.0),
    Case("lenet", "mnist", 2_000, 8.0),
    Case("resnet18", "cifar10", 128, None),
    Case("resnet18", "cifar10", 64, 2.0, all_cores=True),
)


def one_by_one(sgd: nn.Module, sam: nn.Module, loader: torch.utils.data.DataLoader) -> np.ndarray:
    """SAMIS-L and SAMIS-P, ``(n, 2)``."""
    sgd.eval()
    sam.eval()
    scores = []
    with torch.no_grad():
        for image, label, _ in loader:
            first, second = sgd(image), sam(image)
            loss = (F.cross_entropy(first, label) - F.cross_entropy(second, label)).abs()
            prob = (first.softmax(dim=1) - second.softmax(dim=1)).abs().sum()
            scores.append([loss.item(), prob.item()])
    return np.array(scores)


def measure_case(case: Case, repeats: int) -> Row:
    """Time one model both ways.

    Raises:
        RuntimeError: The two ways disagree.
    """
    torch.set_num_threads((os.cpu_count() or 1) if case.all_cores else 1)
    images = random_images(case.dataset, case.count)
    entry, layout = images.entry, MODELS[case.model].channels_last
    loader = torch.utils.data.DataLoader(PlainImages(images, augmented=False), 1)
    batches = Batches(images, BATCH, normalisation=entry.normalisations["samis"], channels_last=layout)
    shape = (entry.num_classes, entry.channels, entry.image_size)
    plain_pair = [build_model(case.model, *shape, seed=seed) for seed in (1, 2)]
    memory = torch.channels_last if layout else torch.contiguous_format
    our_pair = [build_model(case.model, *shape, seed=seed).to(memory_format=memory) for seed in (1, 2)]
    found = {}
    plain, ours = in_turn(
        (
            lambda: found.update(plain=one_by_one(*plain_pair, loader)),
            lambda: found.update(ours=score_pair(*our_pair, batches)[1]),
        ),
        repeats,
        time.perf_counter if case.all_cores else time.process_time,
    )
    both = np.stack([found["ours"]["s_l"], found["ours"]["s_p"]], axis=1)
    if not np.allclose(both, found["plain"], rtol=1e-3, atol=1e-4):
        raise RuntimeError(f"{case.model}: the two ways disagree by {np.abs(both - found['plain']).max()}")
    scale = 1_000 / case.count
    name, unit = f"SAMIS scores of a pair, {case.model}", "s per 1,000 images"
    if case.all_cores:
        name, unit = f"{name}, all cores", f"{unit} (wall)"
    return Row(name, plain * scale, ours * scale, unit, case.target)


def measure(quick: bool = False) -> list[Row]:
    """Time every model both ways, with the allocator set as the scripts set it.

    Raises:
        RuntimeError: The two ways disagree.
    """
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)
    if quick:
        return [
            measure_case(replace(case, model=case.model.replace("resnet18", "resnet8"), count=4), 1) for case in CASES
        ]
    return [measure_case(case, 2) for case in CASES]


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
