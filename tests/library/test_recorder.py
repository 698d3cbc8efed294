"""The recorder of training dynamics in a plain loop, against values computed example by example."""

import io
import itertools

import numpy as np
import pytest
import torch
from user_code import Output

from src.errors import ArgumentError, MeasurementError
from src.library import DynamicsRecorder
from src.metrics.dynamics import COUNTS, REDUCTIONS

TOTAL, EPOCHS, CLASSES = 12, 6, 3


def training(classes=CLASSES, seed=0):
    """By epoch, batches of logits, labels and indices; each epoch misses two examples; all miss the last."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (TOTAL,), generator=generator)
    epochs = []
    for _ in range(EPOCHS):
        order = torch.randperm(TOTAL - 1, generator=generator)[2:]
        logits = 3 * torch.randn(TOTAL, classes, generator=generator)
        epochs.append([(logits[part], labels[part], part) for part in order.split(4)])
    return epochs


def recorded(epochs, **options):
    recorder = DynamicsRecorder(TOTAL, **options)
    for batches in epochs:
        for logits, labels, indices in batches:
            recorder.record(logits, labels, indices, input_gradients=logits.norm(dim=1))
        recorder.end_epoch(torch.arange(CLASSES) / len(recorder._dynamics.rows or [1]))
    return recorder


def test_scores_are_those_of_each_examples_visits():
    epochs = training()
    recorder = recorded(epochs)
    visits = {i: [] for i in range(TOTAL)}
    for batches in epochs:
        for logits, labels, indices in batches:
            for z, y, i in zip(logits.double().numpy(), labels.tolist(), indices.tolist(), strict=True):
                p = np.exp(z) / np.exp(z).sum()
                others = np.delete(z, y).max()
                visits[i].append((z[y] - others, -np.log(p[y]), z.argmax() == y, np.linalg.norm(p - np.eye(3)[y]),
                                  np.linalg.norm(z)))  # fmt: skip
    expected = {"aum": [], "csl": [], "forg": [], "el2n": [], "csg": []}
    for i in range(TOTAL):
        margins, losses, correct, errors, norms = zip(*visits[i], strict=True) if visits[i] else [[np.nan]] * 5
        expected["aum"].append(-np.mean(margins))
        expected["csl"].append(EPOCHS * np.mean(losses))
        expected["el2n"].append(np.mean(errors))
        expected["csg"].append(EPOCHS * np.mean(norms))
        events = sum(a and not b for a, b in itertools.pairwise(correct))
        expected["forg"].append(events if visits[i] else np.nan)
    assert sum(expected["forg"][:-1]) > 3
    for name, values in expected.items():
        np.testing.assert_allclose(recorder.scores(name), values, rtol=2e-5, atol=1e-6, err_msg=name)
    assert np.isnan(recorder.arrays()["loss"]).sum() == 3 * EPOCHS


def test_every_score_of_dynamics_can_be_computed_and_takes_its_options():
    recorder = recorded(training())
    for score in (*COUNTS, *REDUCTIONS):
        assert recorder.scores(score.name).shape == (TOTAL,)
    assert not np.allclose(recorder.scores("dual", window=2)[:-1], recorder.scores("dual", window=4)[:-1])
    with pytest.raises(ArgumentError, match="window: is not an option of aum; it has none"):
        recorder.scores("aum", window=3)


def test_one_logit_means_two_classes_and_outputs_may_contain_logits():
    epochs = training(classes=2)
    two, one, wrapped = (DynamicsRecorder(TOTAL) for _ in range(3))
    for batches in epochs:
        for logits, labels, indices in batches:
            z = logits[:, 1]
            two.record(torch.stack([torch.zeros_like(z), z], 1), labels, indices)
            one.record(z[:, None], labels.float(), indices)
            wrapped.record(Output(z.requires_grad_()), labels[:, None], indices)
        for recorder in (two, one, wrapped):
            recorder.end_epoch()
    for recorder in (one, wrapped):
        for name, values in two.arrays().items():
            np.testing.assert_array_equal(recorder.arrays()[name], values)


def test_repeated_examples_are_refused_or_only_the_first_counts():
    epochs = training()
    plain, repeating = recorded(epochs), recorded([], repeats="first")
    for batches in epochs:
        for logits, labels, indices in batches:
            again = torch.cat([logits, -logits]), labels.repeat(2), indices.repeat(2)
            repeating.record(*again, input_gradients=again[0].norm(dim=1))
            repeating.record(-logits, labels, indices)
        repeating.end_epoch(torch.arange(CLASSES))
    for name in ("loss", "divergence", "margin"):
        np.testing.assert_array_equal(repeating.arrays()[name], plain.arrays()[name])
    logits, labels, indices = epochs[0][0]
    plain.record(logits, labels, indices)
    with pytest.raises(ArgumentError, match=f"indices {indices[0]}: was already recorded in this epoch; call end_ep"):
        plain.record(logits, labels, indices)
    with pytest.raises(ArgumentError, match="end_epoch: was not called after the last epoch"):
        plain.scores("aum")


def test_a_checkpoint_continues_the_record():
    epochs = training()
    complete, first = recorded(epochs), recorded(epochs[:3])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = DynamicsRecorder(TOTAL)
    second.load_state_dict(torch.load(file, weights_only=True))
    _, labels, indices = epochs[0][0]
    with pytest.raises(ArgumentError, match=f"{indices[0]}: had the label {labels[0]} before"):
        second.record(torch.zeros(1, CLASSES), [(labels[0] + 1) % CLASSES], indices[:1])
    for batches in epochs[3:]:
        for logits, labels, indices in batches:
            second.record(logits, labels, indices)
        second.end_epoch()
    for name in ("divergence", "correct", "loss"):
        np.testing.assert_array_equal(second.arrays()[name], complete.arrays()[name])
    with pytest.raises(ArgumentError, match="has 12 examples, not 5"):
        DynamicsRecorder(5).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(2, 3, 1)}, "logits of shape"),
        ({"logits": torch.zeros(2, 4)}, "logits: have 4 classes, but 3 before"),
        ({"labels": torch.tensor([0, 3])}, "labels 3: is not a class index from 0 to 2"),
        ({"labels": torch.tensor([2, 0])}, "0: had the label 0 before and now 2; give indices in the data set"),
        ({"indices": torch.tensor([5, 12])}, "range from 5 to 12, not 0 to 11"),
        ({"indices": torch.tensor([0])}, r"indices: have shape \(1,\)"),
        ({"indices": torch.tensor([0.0, 1.0])}, "give one integer for each of 2"),
        ({"input_gradients": torch.zeros(3)}, "give one norm per example"),
    ],
)
def test_unsuitable_batches_are_refused(changes, message):
    recorder = DynamicsRecorder(TOTAL)
    batch = {"logits": torch.zeros(2, 3), "labels": torch.tensor([0, 1]), "indices": torch.tensor([0, 1])}
    recorder.record(**batch)
    recorder.end_epoch()
    with pytest.raises(ArgumentError, match=message):
        recorder.record(**{**batch, **changes})
    recorder.record(**batch)  # nothing of the refused batch was recorded


def test_misuse_is_refused():
    recorder = DynamicsRecorder(TOTAL)
    with pytest.raises(ArgumentError, match="nothing was recorded"):
        recorder.end_epoch()
    with pytest.raises(MeasurementError, match="logits of example 4 are not finite"):
        recorder.record(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), [0, 1], [3, 4])
    recorder.record(torch.zeros(1, 2), [0], [3])
    with pytest.raises(ArgumentError, match=r"class_test_loss: has shape \(3,\); give one for each of 2"):
        recorder.end_epoch([1.0, 2.0, 3.0])
    recorder.end_epoch()
    for name, message in (("mem", "is not a score of training dynamics"), ("dual", "at least 2 recorded epochs"),
                          ("csg", "recorded no input_gradient")):  # fmt: skip
        with pytest.raises(ArgumentError, match=message):
            recorder.scores(name)
    with pytest.raises(ArgumentError, match="total 0"):
        DynamicsRecorder(0)
    with pytest.raises(ArgumentError, match="repeats twice: choose from refuse, first"):
        DynamicsRecorder(3, repeats="twice")
