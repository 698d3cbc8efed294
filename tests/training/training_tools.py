"""Comparisons of trained models."""

import numpy as np
import torch


def weights_of(trainer):
    return torch.cat([p.detach().double().reshape(-1) for p in trainer.model.state_dict().values()]).numpy()


def assert_same(a, b):
    np.testing.assert_array_equal(weights_of(a), weights_of(b))
    if a.dynamics is not None:
        for name, array in a.dynamics.arrays().items():
            np.testing.assert_array_equal(array, b.dynamics.arrays()[name], err_msg=name)
