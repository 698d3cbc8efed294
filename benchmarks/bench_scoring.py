"""SAMIS scores of a pair of networks, in batches and one example at a time, reading and normalising included.

    python -m benchmarks.bench_scoring [--quick]

The plain way is a loop over a DataLoader of batch size one, over PIL images with ToTensor and Normalize; ours is
``score_pair`` at the batch size of ``compute_sam_sgd.py``. The scores of both ways are compared on the way.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import PlainImages, Row, in_turn, random_images, run
from src.datasets import Batches
from src.metrics.pairs import score_pair
from src.models import MODELS, build_model

BATCH = 512
# model, data set, examples, target
CASES = (("mlp", "mnist", 2_000, 20.0), ("lenet", "mnist", 2_000, 8.0), ("resnet18", "cifar10", 128, 2.0))


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


def measure_case(model: str, dataset: str, count: int, target: float | None, repeats: int) -> Row:
    """Time one model both ways."""
    images = random_images(dataset, count)
    entry, layout = images.entry, MODELS[model].channels_last
    loader = torch.utils.data.DataLoader(PlainImages(images, augmented=False), 1)
    batches = Batches(images, BATCH, normalisation=entry.normalisations["samis"], channels_last=layout)
    shape = (entry.num_classes, entry.channels, entry.image_size)
    plain_pair = [build_model(model, *shape, seed=seed) for seed in (1, 2)]
    memory = torch.channels_last if layout else torch.contiguous_format
    our_pair = [build_model(model, *shape, seed=seed).to(memory_format=memory) for seed in (1, 2)]
    found = {}
    plain, ours = in_turn(
        (
            lambda: found.update(plain=one_by_one(*plain_pair, loader)),
            lambda: found.update(ours=score_pair(*our_pair, batches)[1]),
        ),
        repeats,
    )
    both = np.stack([found["ours"]["s_l"], found["ours"]["s_p"]], axis=1)
    if not np.allclose(both, found["plain"], rtol=1e-3, atol=1e-4):
        raise RuntimeError(f"{model}: the two ways disagree by {np.abs(both - found['plain']).max()}")
    scale = 1_000 / count
    return Row(f"SAMIS scores of a pair, {model}", plain * scale, ours * scale, "s per 1,000 images", target)


def measure(quick: bool = False) -> list[Row]:
    """Time every model both ways.

    Raises:
        RuntimeError: The two ways disagree.
    """
    torch.set_num_threads(1)
    cases = [(*case[:2], 8, case[3]) for case in CASES[:2]] if quick else CASES
    return [measure_case(*case, repeats=1 if quick else 2) for case in cases]


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
