"""The benchmark of planted label noise: the noise, the precision, and a run on few examples."""

import json
import sys

import numpy as np
import pytest
from support import succeed

from benchmarks import label_noise
from benchmarks.label_noise import plant, precision


def test_planted_noise():
    labels = np.arange(1000) % 5
    for kind in label_noise.NOISE:
        noisy = plant(labels, kind, 12.5, 5, seed=1)
        shift = (noisy - labels) % 5
        assert np.count_nonzero(shift) == 125
        assert set(shift) == ({0, 1, 2, 3, 4} if kind == "symmetric" else {0, 1})
        assert (plant(labels, kind, 12.5, 5, seed=2) != noisy).any()


def test_precision_breaks_ties_at_random():
    wrong = np.array([1, 1, 1, 0, 0, 0, 0], bool)
    assert precision(np.array([7, 6, 5, 4, 3, 2, 1.0]), wrong) == 1
    assert precision(np.array([1, 2, 3, 4, 5, 6, 7.0]), wrong) == 0
    assert precision(np.array([9, 1, 0, 1, 1, 1, 0.0]), wrong) == pytest.approx((1 + 2 * 1 / 4) / 3)
    assert precision(np.zeros(7), wrong) == pytest.approx(3 / 7)


def test_a_run_on_few_examples(tmp_path, monkeypatch, capsys):
    """Every score and method is in the table, and a finished case is not repeated."""
    monkeypatch.setattr(label_noise, "run", succeed)
    flags = [
        "--examples=200",
        "--test=40",
        "--rates",
        "10",
        "--seeds",
        "1",
        "--noise",
        "symmetric",
        f"--out={tmp_path}",
    ]
    training = [
        "--",
        "--model=small_mlp",
        "--epochs=12",
        "--batch_size=32",
        "--learning_rate=0.05",
        "--lr_sched=const",
    ]
    monkeypatch.setattr(sys, "argv", ["label_noise", *flags, "--samis", *training])
    label_noise.main()
    (case,) = json.loads((tmp_path / "label_noise.json").read_text())
    assert case["wrong"] == 20
    names = {"aum", "forg", "samis_loss", "out_prob", "mem", label_noise.OWN, label_noise.COMBINED}
    assert names <= case["scores"].keys()
    folds = 5 * (12 * 160 + (200 + 40) / 3) / 200
    assert case["scores"]["out_prob"]["cost"] == pytest.approx(folds, abs=1e-3)
    assert case["scores"][label_noise.OWN]["auroc"] > 0.8
    assert 0.3 < case["estimates"][label_noise.OWN] / 20 < 3
    assert "| label_error and aum |" in capsys.readouterr().out
    monkeypatch.setattr(label_noise, "run", None)
    label_noise.main()
    monkeypatch.setattr(sys, "argv", ["label_noise", *flags, *training])
    with pytest.raises(SystemExit):  # other settings
        label_noise.main()
