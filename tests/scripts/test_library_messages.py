"""What the library says names arguments; what scripts print names their flags."""

import numpy as np
import pytest
from PIL import Image
from refusals import FLAG, refuse

from src.coresets import find_method
from src.coresets.budgets import make_groups
from src.datasets import load_dataset, lookup, parse_subset
from src.devices import resolve_device
from src.errors import UserError
from src.metrics import Proxy, get_score
from src.metrics.published import published_files
from src.models import build_model
from src.optimizers.schedules import rate

LABELS = np.arange(6) % 2


@pytest.mark.parametrize(
    ("call", "argument", "flag"),
    [
        (lambda: get_score("x"), "mode", "--modes"),
        (lambda: Proxy("x"), "mode", "--modes"),
        (lambda: Proxy("mem", "a/b"), "dataset", "--dataset"),
        (lambda: published_files("digits"), "dataset", "--dataset"),
        (lambda: lookup("x"), "dataset", "--dataset"),
        (lambda: load_dataset("x", "."), "dataset", "--dataset"),
        (lambda: load_dataset("digits", ".", channels=3), "channels", "--channels"),
        (lambda: load_dataset("digits", ".", image_size=5), "image_size", "--image_size"),
        (lambda: lookup("svhn").training_augmentation(True, cutout_holes=1), "cutout_holes", "--cutout_holes"),
        (lambda: parse_subset("7", 6, LABELS), "subset", "--subset"),
        (lambda: build_model("x", 2, 1, 8, 0), "model", "--model"),
        (lambda: build_model("inception", 2, 1, 2, 0), "model", "--model"),
        (lambda: build_model("lenet", 2, 1, 32, 0, True), "pretrained", "--pretrained"),
        (lambda: rate("cosine", 1, 2, 0.1, 0.2), "floor", "--lr_min"),
        (lambda: find_method("x"), "method", "--coreset_func"),
        (lambda: make_groups(LABELS, 2, fraction=2.0), "fraction", "--coreset_fraction"),
        (lambda: make_groups(LABELS, 2, shots=9), "shots", "--shots"),
        (lambda: resolve_device("tpu"), "device", "--device"),
    ],
)
def test_arguments_and_flags(call, argument, flag):
    with pytest.raises(UserError) as caught:
        call()
    error = caught.value
    assert str(error).startswith(argument)
    assert "--" not in str(error)
    assert error.line.startswith(flag)
    assert error.status == FLAG


def test_files_that_an_argument_mends(tmp_path):
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / "oblong" / part / name).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 6), np.uint8)).save(tmp_path / "oblong" / part / name / "0.png")
    images = np.zeros((2, 8, 6), np.uint8)
    np.savez(tmp_path / "oblong.npz", x_train=images, y_train=[0, 1], x_test=images, y_test=[0, 1])
    for dataset in (f"folder:{tmp_path / 'oblong'}", f"npz:{tmp_path / 'oblong.npz'}"):
        with pytest.raises(UserError, match=r" or set image_size$"):
            load_dataset(dataset, ".")


def test_scripts_name_the_flag(tmp_path):
    for flags, says in (
        (("--dataset=digits", "--image_size=5"), "^train_full.py: --image_size 5: applies to own data"),
        (("--dataset=digits", "--subset=0"), "^train_full.py: --subset 0: must be from 1"),
        (("--dataset=digits", "--model=lenet", "--lr_min=2"), "^train_full.py: --lr_min 2: must be between"),
    ):
        refuse("train_full.py", *flags, f"--log_folder={tmp_path}", status=FLAG, says=(says,))
