"""A user's own model, and weights from elsewhere, through the scripts."""

import json
import re

import numpy as np
import pytest
import torch
from support import ROOT, TRAIN, call, folders, succeed

from src.artifacts.io import read_pickle
from src.models import build_model, model_name, registry
from src.models.base import two_images

(NET,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-models.md").read_text(), re.DOTALL)
DATA = ("--dataset=digits", "--subset=200")
QUICK = ("--batch_size=50", "--learning_rate=0.1", "--lr_sched=const")
ROUGH = ("--lanczos_steps=4", "--max_steps=4", "--trace_probes=0", "--top_n=1", "--probes=1")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A file with a model, and runs of it with SGD and SAM."""
    base = tmp_path_factory.mktemp("own_models")
    (base / "net.py").write_text(NET)
    for optimizer in ("sgd", "sam"):
        succeed("train_full.py", *DATA, *QUICK, f"--model={base}/net.py:MyNet", f"--optimizer={optimizer}",
                "--epochs=2", *folders(base, *TRAIN))  # fmt: skip
    return base


@pytest.fixture
def run(world):
    """The folder of the SGD-trained checkpoints."""
    return (
        world / "models" / f"standard_{model_name(f'{world}/net.py:MyNet')}_over_digits_with_sgd_sched_const/seed_1"
    )


@pytest.fixture
def foreign(world, run):
    """The weights of both epochs as another program saves them."""
    files = []
    for epoch in (1, 2):
        weights = torch.load(run / f"epoch_{epoch}.pt", weights_only=True)["model_state"]
        files.append(world / f"foreign_{epoch}.pt")
        torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, files[-1])
    return files


def test_scores_and_selections_of_an_own_model(world, run):
    model, name = f"--model={world}/net.py:MyNet", model_name(f"{world}/net.py:MyNet")
    assert re.fullmatch(r"mynet-[0-9a-f]{8}", name)
    settings = json.loads((run / "results.json").read_text())["settings"]
    assert settings["model"] == name
    result = succeed("compute_sam_sgd.py", *DATA, model, "--epochs=2", *folders(world, *TRAIN[:3]))
    assert f"--model={world}/net.py:MyNet" in result.out  # the next command
    succeed("average_scores.py", "--dataset=digits", model, "--seeds", "1", *folders(world, "metrics"))
    scores = read_pickle(world / "metrics/sam_sgd/samis_loss_digits.pkl")
    assert sum(np.isfinite(value) for value in scores.values()) == 200

    picked = world / "picked.npz"
    succeed("select_coreset.py", *DATA, model, "--coreset_func=craig", "--coreset_fraction=0.1",
            "--coreset_pretrain_epochs=1", f"--out={picked}", *folders(world, *TRAIN))  # fmt: skip
    assert len(np.load(picked)["indices"]) == 20
    (world / "soft.py").write_text(NET.replace("return self.out(", "return 2 * self.out("))
    refused = call("select_coreset.py", *DATA, f"--model={world}/soft.py:MyNet", "--coreset_func=craig",
                   "--coreset_fraction=0.1", f"--out={world}/no.npz", *folders(world, *TRAIN))  # fmt: skip
    assert refused.status == 2
    assert "craig needs embeddings, but its logits are not the outputs of a linear layer" in refused.complaint
    assert not list(world.glob(f"models/pretrain/digits/{model_name(f'{world}/soft.py:MyNet')}"))


def test_changed_source_is_another_model(world, run, monkeypatch):
    changed = world / "changed"
    changed.mkdir()
    (changed / "net.py").write_text(NET.replace("0.1", "0.2"))
    before = sorted((run / "epoch_2.pt").parent.iterdir())
    model = f"--model={changed}/net.py:MyNet"
    succeed("train_full.py", *DATA, *QUICK, model, "--epochs=1", "--resume", *folders(world, *TRAIN))
    assert sorted(run.iterdir()) == before
    other = (
        world
        / "models"
        / run.parent.name.replace(model_name(f"{world}/net.py:MyNet"), model_name(f"{changed}/net.py:MyNet"))
    )
    assert (other / "seed_1" / "epoch_1.pt").exists()
    monkeypatch.setattr(registry, "_sources", {})  # a new process, which knows only what its flags name
    asked = ("compute_hessian_eigen.py", "--dataset=digits", f"--checkpoint={run}/epoch_2.pt")
    for flags in ([], [model]):
        refused = call(*asked, *flags, *folders(world, "datasets", "hessian"))
        assert refused.status == 1
        assert "the source is needed; give --model=FILE.py:NAME, unchanged since training with" in refused.complaint


def test_curvature_of_weights_from_elsewhere(world, run, foreign):
    model, hessian = f"--model={world}/net.py:MyNet", folders(world, "datasets", "models", "hessian")
    own = succeed("compute_hessian_eigen.py", *DATA, *ROUGH, model, "--epochs=2", *hessian)
    same = succeed("compute_hessian_eigen.py", *DATA, *ROUGH, model, f"--checkpoint={foreign[1]}", *hessian)
    assert own.out.splitlines()[:2] == same.out.splitlines()[:2]  # loss, gradient norm, eigenvalue
    path = (
        world
        / "hessian"
        / f"train_all_{model_name(f'{world}/net.py:MyNet')}_over_digits_with_unknown_sched_unknown_bn"
    )
    assert len(list(path.glob("0/checkpoint_*/pyhessian_eigen_lanczos.pkl"))) == 1
    refused = call("compute_hessian_eigen.py", *DATA, f"--checkpoint={foreign[1]}", *hessian)
    assert refused.status == 1
    assert "is not a checkpoint of this project; give --model" in refused.complaint


def test_kernel_velocity_between_files(world, run, foreign):
    np.save(world / "planted.npy", np.arange(1438.0))
    succeed("register_score.py", world / "planted.npy", "--mode=planted", "--high=atypical", "--dataset=digits",
            *folders(world, "datasets", "metrics"))  # fmt: skip
    flags = ("--dataset=digits", f"--model={world}/net.py:MyNet", "--ntk_chosen_metric=planted", "--m_samples=4",
             "--lower_index", "0", "100", *folders(world, "datasets", "models", "metrics", "ntk"))  # fmt: skip
    found = {}
    for files in (foreign, [foreign[0], run / "epoch_1.pt"]):
        result = succeed("compute_ntk.py", *flags, "--checkpoint", *files)
        folder = result.out.splitlines()[-1]
        found[files[1]] = read_pickle(f"{folder}/file_1/vs.pkl")
    assert list(found[foreign[1]].values()) != [0.0, 0.0]
    np.testing.assert_allclose(list(found[run / "epoch_1.pt"].values()), 0.0, atol=1e-6)  # the same weights
    assert call("compute_ntk.py", *flags, "--checkpoint", *foreign, "--seeds", "1").status == 2


def test_sensitivities_of_weights_from_elsewhere(world, run, foreign):
    flags = (*DATA, f"--model={world}/net.py:MyNet", "--bs=50", "--delta=1", f"--checkpoint={foreign[1]}",
             *folders(world, "datasets", "models", "log", "resume_ckpts", "pickles"))  # fmt: skip
    succeed("examples/1_loo_iterations.py", *flags, "--name_exp=measured")
    result = read_pickle(world / "pickles" / "measured_iter.pkl")
    last = json.loads((run / "results.json").read_text())["history"][-1]
    np.testing.assert_allclose(result["test_accs"], [last["test_accuracy"]])
    np.testing.assert_allclose(result["test_nlls"], [last["test_loss"]], rtol=1e-5)
    assert np.isfinite(result["estimated_nll"]).all()
    assert not (world / "models" / "mpe" / "measured_iter").exists()  # not trained

    succeed(
        "examples/3_validation_sensitivities.py", *flags, "--name_exp=base", "--n_retrain=1", "--epochs_retrain=1"
    )
    scores = read_pickle(world / "pickles" / "base_scores.pkl")
    model = build_model(f"{world}/net.py:MyNet", 10, 1, 8, seed=5, init=foreign[1])
    from mpe.retraining import weights_hash

    assert scores["base_weights"] == weights_hash(model)
    refused = call("examples/1_loo_iterations.py", *flags, "--name_exp=measured", "--epochs=2")
    assert (refused.status, "--epochs: has no effect with --checkpoint" in refused.complaint) == (2, True)

    # a checkpoint of this project records its examples: leave-one-out estimates of others would be wrong
    flags = [f"--checkpoint={run}/epoch_2.pt" if "checkpoint" in flag else flag for flag in flags]
    succeed("examples/1_loo_iterations.py", *flags, "--name_exp=own")
    flags = [flag.replace("--subset=200", "--subset=300") for flag in flags]
    refused = call("examples/1_loo_iterations.py", *flags, "--name_exp=others")
    assert (refused.status, "subset" in refused.complaint) == (1, True)


def test_training_starts_from_given_weights(world, foreign):
    """With a learning rate near 0, the model after training is the given one, except for BatchNorm's statistics."""
    flags = (*DATA, "--batch_size=50", "--learning_rate=1e-30", f"--model={world}/net.py:MyNet", "--epochs=1",
             *folders(world, *TRAIN))  # fmt: skip
    succeed("train_split.py", *flags, f"--init={foreign[1]}")
    file = next(world.glob("models/split_mynet*/seed_1/last.pt"))
    found = torch.load(file, weights_only=True)["model_state"]
    given = torch.load(foreign[1], weights_only=True)["state_dict"]
    assert all(
        torch.equal(value, given[f"module.{key}"])
        for key, value in found.items()
        if "running" not in key and "num_b" not in key
    )
    refused = call("train_split.py", *flags, f"--init={foreign[0]}")
    assert refused.status == 1
    assert "was made with different settings: init (" in refused.complaint
    refused = call("train_full.py", *flags, f"--init={foreign[0]}", "--pretrained")
    assert refused.status == 2


def test_torchvision_model_in_a_script(tmp_path):
    flags = (*DATA, "--subset=60", "--model=torchvision:resnet18", "--epochs=1", "--batch_size=30")
    succeed("train_full.py", *flags, *folders(tmp_path, *TRAIN))
    assert (
        tmp_path / "models/standard_torchvision-resnet18_over_digits_with_sgd_sched_cosine/seed_1/last.pt"
    ).exists()
    x = two_images(1, 8)
    assert build_model("torchvision-resnet18", 10, 1, 8, seed=1)(x).shape == (2, 10)


UNUSUAL = """
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.out = nn.Linear(in_channels * image_size**2, num_classes)

    def forward(self, x):
        return self.out(x.flatten(1))

class Mixing(Plain):
    def forward(self, x):
        return super().forward(x - x.mean(0, keepdim=True))

class Branching(Plain):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)

class FixedBatch(Plain):
    def forward(self, x):
        return self.out(x.view(2, -1))

class Frozen(Plain):
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__(num_classes, in_channels, image_size)
        self.out.bias.requires_grad_(False)
"""
BASE = ("--epochs=1", "--bs=20", "--n_retrain=2", "--epochs_retrain=1")


@pytest.mark.parametrize(
    ("name", "command", "message"),
    [
        (
            "Mixing",
            ("train_full.py", "--epochs=1", "--measure_proxies"),
            "--end_scores: per-example gradients are not",
        ),
        (
            "Mixing",
            ("select_coreset.py", "--coreset_func=grand", "--grand_gradient=full", "--coreset_fraction=0.5"),
            "grand needs gradients, but per-example gradients are not defined",
        ),
        ("Mixing", ("examples/1_loo_iterations.py", "--epochs=1"), "per-example gradients are not defined"),
        (
            "Branching",
            ("examples/3_validation_sensitivities.py", *BASE, "--ensemble=vectorised"),
            "--ensemble vectorised: the forward pass does not support torch.vmap",
        ),
        (
            "Frozen",
            ("examples/3_validation_sensitivities.py", *BASE),
            "retraining trains all parameters, but out.bias is frozen",
        ),
    ],
)
def test_what_a_model_does_not_support_is_refused_before_training(tmp_path, name, command, message):
    (tmp_path / "unusual.py").write_text(UNUSUAL)
    script, *flags = command
    where = (*TRAIN[:2], *TRAIN[3:], "pickles" if "examples" in script else "metrics")
    result = call(script, *flags, "--dataset=digits", "--subset=40", f"--model={tmp_path}/unusual.py:{name}",
                  *folders(tmp_path, *where))  # fmt: skip
    assert (result.status, message in result.complaint) == (2, True), result.err
    assert not list(tmp_path.rglob("*.pt"))


def test_errors_of_a_model_during_training_name_its_line(tmp_path):
    """The forward pass supports the two images that are checked before training, but no other number."""
    (tmp_path / "unusual.py").write_text(UNUSUAL)
    result = call("train_full.py", "--dataset=digits", "--subset=40", f"--model={tmp_path}/unusual.py:FixedBatch",
                  "--epochs=1", *folders(tmp_path, *TRAIN))  # fmt: skip
    line = UNUSUAL.splitlines().index("        return self.out(x.view(2, -1))") + 1
    assert result.status == 1
    assert f"unusual.py, line {line}: RuntimeError: mat1 and mat2" in result.complaint


def test_branching_model_is_retrained_one_at_a_time(tmp_path):
    (tmp_path / "unusual.py").write_text(UNUSUAL)
    flags = (*BASE, "--dataset=digits", "--subset=40", f"--model={tmp_path}/unusual.py:Branching")
    succeed("examples/3_validation_sensitivities.py", *flags,
            *folders(tmp_path, *TRAIN[:2], *TRAIN[3:], "pickles"))  # fmt: skip
