"""InfoBatch as one choice before training: all hard examples, and some easy ones that stand for the rest."""

import logging
from collections.abc import Sequence

import numpy as np

from src import draws
from src.coresets.material import Group, Material, Options, Selection

log = logging.getLogger(__name__)


def split_by_mean(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the losses at or above their mean, and of those below it.

    Args:
        losses: ``(m,)``.
    """
    mean = max(losses.mean(), losses.min())  # rounding must not lift the mean of equal losses above them
    mean = min(mean, losses.max())
    return np.flatnonzero(losses >= mean), np.flatnonzero(losses < mean)


def draw(losses: np.ndarray, budget: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The choice in one group.

    Args:
        losses: ``(m,)``.
        budget: k, at most m.
        generator: Draws which.

    Returns:
        Places ``(k,)`` and weights ``(k,)``.
    """
    high, low = split_by_mean(losses)
    room = budget - len(high)
    if room <= 0:
        return generator.choice(high, budget, replace=False), np.ones(budget)
    if not len(low):
        return high, np.ones(len(high))
    kept = generator.choice(low, room, replace=False)
    return np.concatenate([high, kept]), np.repeat([1.0, len(low) / room], [len(high), room])


def infobatch(material: Material, groups: Sequence[Group], options: Options) -> Selection:
    """A static form of InfoBatch (Qin et al., ICLR 2024, eqs. 4-6), by the losses of a pre-trained network.

    In each group: all examples whose loss is at least the group's mean are kept with weight 1; the rest of the
    budget is drawn uniformly, without replacement, from the m below it, each with weight m / kept. So the
    expectation of ``sum w_i g_i`` over the draws is the sum of all gradients. In one epoch that is the published
    method; published, it draws anew in each epoch, with losses seen in training.

    Weights are not rescaled to mean 1: they sum to the number of candidates, and the loss of training,
    ``sum(w l) / sum(w)``, does not depend on their scale.

    Where no example below the mean has room, a random part of those above it is kept with weight 1 (all, where the
    budget is as many); the expected gradient then is not the full one, and a notice says so.

    Args:
        material: One network; its losses are un-augmented, in eval mode.
        groups: The groups.
        options: None is read.
    """
    losses = material.networks[0].losses.cpu().numpy()
    generator = draws.numpy_generator(material.seed, 0, "infobatch")
    picks, weights, biased = [], [], 0
    for group in groups:
        places, weight = draw(losses[group.positions], group.budget, generator)
        picks.append(group.positions[places])
        weights.append(weight)
        biased += bool(group.budget < len(group.positions) and (weight == 1).all())
    if biased:
        log.warning(
            "infobatch: in %d of %d groups the examples of a loss at or above the mean fill the budget; a random "
            "part of them is kept with weight 1, so the expected gradient is not the full one; give a larger "
            "--coreset_fraction",
            biased,
            len(groups),
        )
    return Selection.of(picks, weights)
