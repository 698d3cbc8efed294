"""Retraining many copies of a network at once, without and with the loop over them.

    python -m benchmarks.bench_ensemble [--quick]

The plain way trains one network after another: gather a batch, forward, backward, ``torch.optim.SGD`` with momentum
0.9 and weight decay. Ours takes one step of all of them. Both see the same batches of noise images, a permutation of
its own for each network, and end with the same weights, which is checked. The rows bear out
``src.training.ensemble.vectorised_is_faster``: on one thread of a CPU perceptrons, whose gradients are written by
hand, gain at short steps, while convolutions lose, as ``vmap`` turns them into grouped ones. Each row says what the
rule chooses.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.common import Row, in_turn, run
from mpe.retraining import one_epoch
from mpe.schedules import Orders, as_positions, own_orders
from src.models import build_model
from src.training.ensemble import Ensemble, vectorised_is_faster

LR, L2 = 1e-3, 1e-3


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: The network.
        members: How many of it.
        batch: Examples per step.
        steps: Steps of each.
        target: Ratio asked for.
        channels: Of the images.
        size: Of the images.
    """

    name: str
    members: int
    batch: int
    steps: int
    target: float | None = None
    channels: int = 1
    size: int = 28


CASES = (
    Case("small_mlp", 32, 32, 20, 4.0),
    Case("small_mlp", 32, 256, 5, 1.5),
    Case("small_mlp", 32, 1024, 3),
    Case("mlp", 32, 256, 2),
    Case("large_mlp", 32, 32, 2),
    Case("large_mlp", 32, 256, 1),
    Case("lenet", 8, 32, 1),
    Case("lenet", 8, 256, 1),
    Case("cnn_deepobs", 2, 32, 1, channels=3, size=32),
)
QUICK = (Case("small_mlp", 3, 4, 2, 4.0, size=8), Case("lenet", 2, 3, 1))


def one_after_another(
    models: list[nn.Module], images: Tensor, labels: Tensor, orders: Orders, batch: int
) -> Callable[[], None]:
    """The plain way: an epoch of each network in turn."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=L2) for model in models]

    def epoch() -> None:
        for model, optimizer, order in zip(models, optimizers, orders.table, strict=True):
            for index in order.split(batch):
                optimizer.zero_grad()
                chosen, targets = images.index_select(0, index), labels.index_select(0, index)
                nn.functional.cross_entropy(model(chosen), targets).backward()
                optimizer.step()

    return epoch


def compare(name: str, models: list[nn.Module], ensemble: Ensemble) -> None:
    """Raise if a network's weights differ between the ways by more than single precision explains."""
    for number, model in enumerate(models):
        found = ensemble.member(number)
        for key, value in model.state_dict().items():
            if not torch.allclose(found[key], value, rtol=1e-3, atol=1e-5):
                raise RuntimeError(f"{name}: the two ways disagree on {key} of network {number}")


def measure_case(case: Case, repeats: int) -> Row:
    """Time one network both ways, in milliseconds per step and network.

    Raises:
        RuntimeError: The two ways disagree.
    """
    total = case.batch * case.steps
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(total, case.channels, case.size, case.size, generator=draw)
    labels = torch.randint(10, (total,), generator=draw)
    base = build_model(case.name, 10, case.channels, case.size, seed=0)
    removed = [as_positions((), total)] * case.members
    orders = own_orders(removed, range(case.members), total)
    models = [copy.deepcopy(base) for _ in range(case.members)]
    ensemble = Ensemble(base, case.members, l2=L2)
    plain = one_after_another(models, images, labels, orders, case.batch)
    times = in_turn((plain, lambda: one_epoch(ensemble, images, labels, orders, case.batch, LR)), repeats)
    compare(case.name, models, ensemble)
    each = [1_000 * seconds / case.members / case.steps for seconds in times]
    choice = "chosen" if vectorised_is_faster(base, "cpu", case.batch) else "not chosen on a CPU"
    return Row(
        f"retraining {case.members} {case.name} at batch {case.batch} at once ({choice})",
        *each,
        "ms per step and network",
        case.target,
    )


def measure(quick: bool = False) -> list[Row]:
    """Time all networks both ways."""
    torch.set_num_threads(1)
    return [measure_case(case, 1 if quick else 3) for case in (QUICK if quick else CASES)]


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
