"""The steps after which sensitivities are measured, and the contents of their file."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mpe_problems import random_predictions
from support import example

from mpe.estimates import estimate, sampled_errors, sensitivity
from mpe.experiment import Result
from mpe.posterior import Predictions
from src.artifacts.io import read_pickle
from src.errors import FileError, FlagError
from src.rng import generator

script = example("4_evolving_sensitivities")


@pytest.mark.parametrize(
    ("dataset", "steps", "wanted"),
    [
        ("mnist", 23500, [10, 1000, 5000, 12250]),
        ("fmnist", 12250, [10, 1000, 5000, 12250]),
        ("cifar10", 29400, [10, 2000, 10000, 24500]),
        ("digits", 23500, [10, 1000, 5000, 12250]),  # the same fractions of the run
        ("digits", 2350, [1, 100, 500, 1225]),
        ("fmnist", 12249, [5, 521, 2606, 6385]),  # too short for the paper's steps
        ("cifar10", 24499, [10, 1043, 5213, 12771]),
        ("own-12ab34cd", 3, [1, 2]),  # some coincide
        ("digits", 1, [1]),
    ],
)
def test_the_papers_steps_or_their_shares(dataset, steps, wanted):
    assert script.checkpoints_of(dataset, steps) == wanted


def test_given_steps():
    assert script.checkpoints_of("mnist", 50, [7, 3, 50, 3]) == [3, 7, 50]
    with pytest.raises(FlagError, match="--checkpoints 51: the run has 50 steps; give steps from 1 to 50"):
        script.checkpoints_of("mnist", 50, [51, 3])


TRAINER = SimpleNamespace(device=torch.device("cpu"), require_finite=lambda epoch: None)


def evolving(path, checkpoints, resume=False, class_cov="full", found=None):
    found = random_predictions() if found is None else found

    def predict(trainer):
        torch.rand(1)  # as a model with dropout might
        return found

    result = Result(path, {}, {}, resume=resume, overwrite=False)
    return script.Evolving(result, predict, checkpoints, class_cov, seed=3), found


def test_rows_are_written_as_they_come(tmp_path):
    path = tmp_path / "t_evolving.pkl"
    run, found = evolving(path, [2, 5])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for step in (1, 2, 3):
        run(TRAINER, 1, step)
    assert torch.equal(torch.get_rng_state(), state)
    half = read_pickle(path)
    assert half["steps"].tolist() == [2]
    run(TRAINER, 1, 5)
    run.finish(test_acc=0.5)
    whole = read_pickle(path)
    assert whole["steps"].tolist() == [2, 5]
    assert whole["iterations_list"].tolist() == [3, 6]
    assert whole["sensitivity"].shape == (2, 6)
    assert whole["test_acc"] == 0.5
    np.testing.assert_array_equal(whole["sensitivity"], whole["sensitivity_full"])
    np.testing.assert_array_equal(whole["sensitivity"][0], half["sensitivity"][0])
    for row, step in enumerate((2, 5)):
        for form in ("diag", "full", "woodbury"):
            draws = generator(3, step, "logit samples")
            errors = sampled_errors(found, samples=150, generator=draws, correlated=form != "diag")
            wanted = sensitivity(estimate(found, form, errors)).numpy()
            np.testing.assert_array_equal(whole[f"sensitivity_{form}"][row], wanted)


@pytest.mark.parametrize("gauge", [torch.ones(4), torch.tensor([2.0, 1.0, 0.5, 3.0])])
@pytest.mark.parametrize("shift", [0.5, 40.0])
def test_gauge(tmp_path, gauge, shift):
    """Only the diagonal form counts a shift of all logits, on its own or together with a change of one logit."""
    given = random_predictions()
    half = shift * gauge.double().expand(4, 4)
    moved = Predictions(given.indices, given.labels, given.logits, given.variances + half + half.mT)
    rows = []
    for name, found in {"a": given, "b": moved}.items():
        run, _ = evolving(tmp_path / f"{name}_evolving.pkl", [2], class_cov="woodbury", found=found)
        run(TRAINER, 1, 2)
        rows.append(read_pickle(run.result.path))
    for form in ("full", "woodbury"):
        first, second = (row[f"sensitivity_{form}"] for row in rows)
        np.testing.assert_allclose(second, first, rtol=1e-6)
        assert not np.allclose(first, sensitivity(estimate(given, form)), rtol=0.01)  # the number of samples matters
    assert not np.allclose(rows[0]["sensitivity_diag"], rows[1]["sensitivity_diag"], rtol=0.1)


def test_the_diagonal_forms_errors_are_the_papers(tmp_path):
    """Independent logits, clamped; the same whether or not other forms are measured beside it."""
    full = random_predictions()
    only = Predictions(full.indices, full.labels, full.logits, full.diagonal.clone())
    rows = []
    for form, found in {"full": full, "diag": only}.items():
        run, _ = evolving(tmp_path / f"{form}_evolving.pkl", [2], class_cov=form, found=found)
        run(TRAINER, 1, 2)
        rows.append(read_pickle(run.result.path)["sensitivity_diag"])
    np.testing.assert_array_equal(*rows)


def test_rows_of_before_are_kept_up_to_where_training_goes_on(tmp_path):
    path = tmp_path / "t_evolving.pkl"
    run, _ = evolving(path, [1, 2, 3])
    for step in (1, 2, 3):
        run(TRAINER, 1, step)
    before = read_pickle(path)
    again, _ = evolving(path, [1, 2, 3], resume=True)
    again(TRAINER, 1, 2)  # training continues after step 1
    assert read_pickle(path)["steps"].tolist() == [1, 2]
    again(TRAINER, 1, 3)
    np.testing.assert_array_equal(read_pickle(path)["sensitivity"], before["sensitivity"])


def test_a_row_that_is_gone_is_not_passed_over(tmp_path):
    run, _ = evolving(tmp_path / "t_evolving.pkl", [1, 4], resume=True)
    with pytest.raises(FileError, match="has no sensitivities after step 1"):
        run(TRAINER, 2, 4)
    run, _ = evolving(tmp_path / "u_evolving.pkl", [1, 4])
    run(TRAINER, 1, 1)
    with pytest.raises(FileError, match="has no sensitivities after step 4"):
        run.finish()
