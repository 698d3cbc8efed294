"""SAMIS-L and SAMIS-P compared with their definitions, and the per-seed files."""

import numpy as np
import pytest
import torch

from src.artifacts.io import read_npz, write_npz
from src.artifacts.paths import samis_path
from src.errors import FileError
from src.metrics.samis import precise_cross_entropy, read_seed, samis_prob, save_seed, score_batch


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    sgd, sam = 4 * torch.randn(2, 30, 7, generator=generator)
    return sgd, sam, torch.arange(30) % 7


def test_scores_are_their_definitions(logits):
    sgd, sam, labels = logits
    scores = score_batch(sgd, sam, labels)
    s_l, s_p = scores["samis_loss"], scores["samis_prob"]
    assert (s_l > 0).all()
    for i in range(30):
        p, q = softmax(sgd[i].double().numpy()), softmax(sam[i].double().numpy())
        assert s_l[i].item() == pytest.approx(abs(-np.log(p[labels[i]]) + np.log(q[labels[i]])), rel=1e-12, abs=1e-14)
        assert s_p[i].item() == pytest.approx(sum(abs(p - q)), rel=1e-12)


def test_arithmetic_is_float64_so_saturated_examples_do_not_tie():
    # in float32 both losses round to zero; in float64 they are exp(-20) and exp(-25)
    sgd, sam = torch.tensor([[20.0, 0.0]]), torch.tensor([[25.0, 0.0]])
    label = torch.tensor([0])
    assert torch.nn.functional.cross_entropy(sgd, label).item() == 0
    loss = score_batch(sgd, sam, label)["samis_loss"]
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(np.exp(-20) - np.exp(-25), rel=1e-6)


def test_bounds_symmetry_and_equal_models(logits):
    sgd, sam, labels = logits
    assert (score_batch(sgd, sgd, labels)["samis_loss"] == 0).all()
    assert torch.equal(score_batch(sgd, sam, labels)["samis_loss"], score_batch(sam, sgd, labels)["samis_loss"])
    assert (samis_prob(sam, sam) == 0).all()
    assert torch.equal(samis_prob(sgd, sam), samis_prob(sam, sgd))
    opposite = samis_prob(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]]))
    assert opposite.item() == pytest.approx(2.0)


def test_a_batch_is_the_sum_of_its_parts(logits):
    sgd, sam, labels = logits
    whole = score_batch(sgd, sam, labels)
    parts = [score_batch(sgd[i : i + 7], sam[i : i + 7], labels[i : i + 7]) for i in range(0, 30, 7)]
    for name, values in whole.items():
        torch.testing.assert_close(values, torch.cat([p[name] for p in parts]), rtol=1e-14, atol=1e-15)
    assert torch.equal(whole["correct_sgd"], sgd.argmax(1) == labels)
    torch.testing.assert_close(whole["loss_sam"], precise_cross_entropy(sam, labels))


def seed_file(folder, **changes):
    columns = {
        name: np.linspace(0, 1, 6) for name in ("samis_loss", "samis_prob", "loss_sgd", "loss_sam", "correct_sgd")
    }
    settings = {"dataset": "digits", "model": "mlp", "seed": 1, "epoch": 3, "protocol": "full"}
    return save_seed(folder, {**columns, **changes}, settings, "ab")


def test_seed_files_have_the_field_s_key_and_come_back(tmp_path):
    columns = {name: np.arange(6.0) for name in ("samis_loss", "samis_prob", "loss_sgd", "loss_sam", "correct_sgd")}
    for column in columns.values():
        column[2] = np.nan
    loss, prob = seed_file(tmp_path, **columns)
    assert loss == samis_path(tmp_path, "digits", "mlp", 1, "loss")
    np.testing.assert_array_equal(read_npz(prob)["arr_0"], [0, 1, np.nan, 3, 4, 5])
    back = read_seed(loss)
    assert back["indices"].tolist() == [0, 1, 3, 4, 5]
    assert (back["seed"], back["epoch"], back["protocol"], back["label_hash"]) == (1, 3, "full", "ab")


def test_scores_that_are_not_finite_are_never_written(tmp_path):
    for bad in (np.array([0, 1, np.inf, 3, 4, 5]), np.array([0, 1, np.nan, 3, 4, 5])):
        with pytest.raises(FileError, match="not finite"):
            seed_file(tmp_path, samis_loss=bad)
    assert not samis_path(tmp_path, "digits", "mlp", 1, "loss").exists()


def test_foreign_and_altered_seed_files_are_named(tmp_path):
    path = write_npz(tmp_path / "foreign.npz", arr_0=np.zeros(3), loss_sam=np.zeros(3))
    with pytest.raises(FileError, match=r"foreign.npz: has no array 'loss_sgd'.*compute_sam_sgd.py"):
        read_seed(path)
    loss, _ = seed_file(tmp_path)
    arrays = read_npz(loss)
    write_npz(loss, **{**arrays, "arr_0": arrays["arr_0"][:-1]})
    with pytest.raises(FileError, match="array 'loss_sgd' has shape"):
        read_seed(loss)
    write_npz(loss, **{**arrays, "arr_0": np.full(6, np.nan)})
    with pytest.raises(FileError, match="not finite"):
        read_seed(loss)
