"""Models of scripts 2, 3 and 5 compared with plain loops over torch's optimizer."""

import numpy as np
import pytest
import torch
from mpe_runs import BATCH, CLASSES, DELTA, EPOCHS, L2REG, LOCO, VALIDATION, N, flags, result, run
from support import succeed

import mpe
from mpe.posterior import laplace_posterior, sgd_time
from src.artifacts.io import read_checkpoint
from src.datasets import load_dataset
from src.models import MODELS, build_model
from src.optimizers import rate


def material(base, indices):
    """Images and labels of the training examples, normalized by hand, in float64."""
    train, test = load_dataset("digits", base)
    norm = train.entry.normalizations["mpe"]
    mean, deviation = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (norm.mean, norm.std))
    parts = (train.subset(torch.as_tensor(indices)), test)
    return [((part.fetch(torch.arange(len(part))).double() / 255 - mean) / deviation, part.labels) for part in parts]


def plainly(model, images, labels, batches, *, epochs, lr, lrmin, delta):
    """Train with torch's SGD on fixed batches."""
    steps = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=delta / len(labels))
    for epoch in range(1, epochs + 1):
        steps.param_groups[0]["lr"] = rate("cosine", epoch, epochs, lr, lrmin)
        for batch in batches:
            steps.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            steps.step()
    return model


def drawn():
    """Draw one number from torch's global generator, like a loader."""
    return int(torch.empty((), dtype=torch.int64).random_())


def replayed(trained, images, labels, removed, extra):
    """Models retrained one after another with the random numbers of the paper's code."""
    torch.manual_seed(1)
    MODELS["small_mlp"].build(CLASSES, 1, 8)
    for _ in range(6):
        drawn()
    for left in removed:
        kept = np.setdiff1d(np.arange(len(labels)), left)
        drawn()
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(drawn()))
        model = build_model("small_mlp", CLASSES, 1, 8, 1).double()
        model.load_state_dict(trained)
        yield plainly(
            model, images[kept], labels[kept], order.split(BATCH), epochs=3, lr=0.05, lrmin=0.02, delta=DELTA
        ).eval()
        for _ in range(extra):
            drawn()


EXACT = ("--precision=fp64", "--retrain_shuffle=replay")


@pytest.fixture
def global_generator():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def trained_weights(base):
    return read_checkpoint(next(base.glob("models/**/last.pt")))["model_state"]


@pytest.mark.parametrize("start", ["base", "initial"])
def test_script_3_retrains_as_a_plain_loop(start, tmp_path, global_generator):
    more = {"base": (), "initial": ("--finite_time", "--var_version=diag")}[start]
    found = run(VALIDATION, tmp_path, *EXACT, f"--retrain_from={start}", *more)
    scores = result(VALIDATION, tmp_path, "scores")
    (images, labels), _ = material(tmp_path, scores["indices"])
    removed = found["indices_retrain"]
    weights = trained_weights(tmp_path)
    initial = build_model("small_mlp", CLASSES, 1, 8, 1).double().state_dict()
    begun = weights if start == "base" else initial
    if more:  # the estimates account for the length of retraining, not of training
        model = build_model("small_mlp", CLASSES, 1, 8, 1).double()
        model.load_state_dict(weights)
        time = sgd_time(3, 0.05, 0.02, N - 1, BATCH)
        posterior = laplace_posterior(model, [images], DELTA, structure="diag", time=time)
        wanted = mpe.sensitivities(model, [(images, labels)], posterior).scores
        np.testing.assert_allclose(scores["sensitivities"], wanted, rtol=1e-8)
    for row, model in enumerate(replayed(begun, images, labels, removed, extra=0)):
        example = images[[removed[row]]]
        moved = model(example).softmax(1)[0]
        model.load_state_dict(weights)
        wanted = (moved - model(example).softmax(1)[0]).detach().numpy()
        np.testing.assert_allclose(found["probability_deviations"][row], wanted, rtol=1e-9, atol=1e-13)


def test_script_5_retrains_as_a_plain_loop(tmp_path, global_generator):
    found = run(LOCO, tmp_path, *EXACT)
    (images, labels), (test_images, test_labels) = material(tmp_path, subset_of_digits(tmp_path))
    removed = [np.flatnonzero(labels == c) for c in range(4)]
    for c, model in enumerate(replayed(trained_weights(tmp_path), images, labels, removed, extra=1)):
        logits = model(test_images)
        wanted = torch.nn.functional.cross_entropy(logits, test_labels).item()
        assert found["perturb_nll"][c] == pytest.approx(wanted, rel=1e-10)
        assert found["perturb_acc"][c] == (logits.argmax(1) == test_labels).double().mean().item()


def subset_of_digits(base):
    """The original indices of ``--subset``, from a small run of script 3."""
    succeed(VALIDATION, *flags(VALIDATION, base / "s", "--epochs=1", "--epochs_retrain=1", "--n_retrain=1"))
    return result(VALIDATION, base / "s", "scores")["indices"]


@pytest.mark.parametrize("more", [(), ("--var_version=diag", "--finite_time")], ids=["kfac", "diag, finite time"])
def test_script_2_trains_as_a_plain_loop(more, tmp_path):
    found = run(L2REG, tmp_path, "--precision=fp64", *more)
    estimates = {"estimated_nll": {}}
    if more:
        diagonal = {"structure": "diag"}  # ggn takes half a minute per model
        time = sgd_time(EPOCHS, 0.05, 0.01, N, BATCH)
        estimates = {"estimated_nll": {**diagonal, "time": time}, "estimated_nll_diag_converged": diagonal}
    (images, labels), (test_images, test_labels) = material(tmp_path, subset_of_digits(tmp_path))
    for number in (0, 4):
        model = build_model("small_mlp", CLASSES, 1, 8, 1).double()
        batches = torch.arange(N).split(BATCH)  # in the order of the data
        rates = {"epochs": EPOCHS, "lr": 0.05, "lrmin": 0.01}
        plainly(model, images, labels, batches, delta=found["deltas"][number], **rates)
        wanted = torch.nn.functional.cross_entropy(model(test_images), test_labels).item()
        assert found["test_nlls"][number] == np.float32(wanted)
        wanted = torch.nn.functional.cross_entropy(model(images), labels).item()
        assert found["train_nll"][number] == pytest.approx(wanted, rel=1e-10)
        for key, fit in estimates.items():
            posterior = laplace_posterior(model, [images], found["deltas"][number], **fit)
            wanted = mpe.sensitivities(model, [(images, labels)], posterior).loo_nll
            assert found[key][number] == pytest.approx(wanted, rel=1e-8)
