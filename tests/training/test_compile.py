"""--compile changes speed, not names and not results beyond rounding."""

import shutil

import pytest
import torch
from support import TRAIN, folders, succeed, write_blobs

from src.artifacts.io import read_checkpoint

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")


def test_compiled_training_writes_plain_checkpoints(tmp_path):
    blobs = write_blobs(tmp_path / "blobs.npz")
    flags = (f"--dataset=npz:{blobs}", "--model=mlp", "--optimizer=sam", "--epochs=2", "--batch_size=50",
             "--learning_rate=0.05", "--lr_sched=const", "--precision=fp64")  # fmt: skip
    succeed("train_full.py", *flags, *folders(tmp_path / "plain", *TRAIN))
    succeed("train_full.py", *flags, "--compile", *folders(tmp_path / "compiled", *TRAIN))
    plain, compiled = (
        read_checkpoint(next((tmp_path / name / "models").glob("*/seed_1/last.pt")))["model_state"]
        for name in ("plain", "compiled")
    )
    assert list(plain) == list(compiled)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-9, atol=1e-11)
    torch._dynamo.reset()
