"""--compile changes neither names nor, up to rounding, results."""

import shutil

import pytest
import torch
from support import TRAIN, folders, succeed, write_blobs
from training_tools import weights_of

from src.artifacts.io import read_checkpoint
from src.devices import CUDA_GRAPHS


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
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


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "iblr"])
@pytest.mark.parametrize("mode", [True, *CUDA_GRAPHS])
def test_a_model_is_compiled_for_batch_sizes_alone(make_trainer, monkeypatch, mode, optimizer):
    """One graph each for full batches, other batches and evaluation; CUDA graphs depend on dynamic sizes."""
    sizes, modes, compile_model = [], [], torch.compile

    def backend(graph, inputs):
        sizes.append(sum(not isinstance(value, torch.Tensor) for value in inputs))
        return graph.forward

    def follow(model, *, mode):
        modes.append(mode)
        return compile_model(model, backend=backend)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", follow)
    settings = {"optimizer": optimizer, "learning_rate": 0.01, "epochs": 3}
    compiled, plain = make_trainer(compile_model=mode, **settings), make_trainer(**settings)
    compiled.fit()
    plain.fit()
    torch._dynamo.reset()
    assert modes == [None if mode is True else mode]
    assert sizes == [0, 1, 1]
    assert (weights_of(compiled) == weights_of(plain)).all()
