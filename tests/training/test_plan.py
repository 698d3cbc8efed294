"""Epoch plans in the loop, batches of zero weight, and Nesterov momentum."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from support import ROOT, as_torchrun, write_blobs
from torch import nn
from training_tools import assert_same, weights_of

from src.errors import ArgumentError, FileError
from src.training import ProcessGroup, RunFiles, Trainer, TrainingConfig, run_training

DOUBLE = {"dropout": 0.0, "dtype": torch.float64, "precision": "fp64"}


class Thinning:
    """Choose all examples first; then those whose last loss is at least the median, weighted by loss."""

    def __init__(self, images, divide_by_size=False, depends_on_epochs=False):
        self.indices, self.divide_by_size, self.depends_on_epochs = images.indices, divide_by_size, depends_on_epochs
        self.losses = torch.zeros(images.total, dtype=torch.float64)
        self.chosen = []

    def choose(self, epoch, fits):
        losses = self.losses[self.indices]
        positions = (losses >= losses.median()).nonzero()[:, 0]
        self.chosen.append(positions)
        return positions, 0.5 + losses

    def record(self, indices, losses):
        self.losses[indices] = losses.double()

    def end_epoch(self, group):
        pass

    def state(self):
        return {"losses": self.losses}

    def restore(self, state):
        self.losses.copy_(state["losses"])


@pytest.fixture
def planned(make_trainer, digits):
    """Build a trainer with a plan."""

    def make(divide_by_size=False, depends_on_epochs=False, **settings):
        trainer = make_trainer(**settings)
        trainer.plan = Thinning(digits[0], divide_by_size, depends_on_epochs)
        return trainer

    return make


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("divide_by_size", [False, True])
def test_a_planned_run_is_the_plain_loop_over_what_is_chosen(planned, divide_by_size):
    trainer = planned(divide_by_size, epochs=3, lr_sched="const", **DOUBLE)
    twin = planned(divide_by_size, epochs=3, **DOUBLE)
    model, plan = twin.model, twin.plan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    expected = []
    for epoch in (1, 2, 3):
        model.train()
        positions, weights = plan.choose(epoch, None)
        loss = weight = correct = 0.0
        for batch in twin.train_batches.epoch(epoch, positions, weights):
            optimizer.zero_grad()
            logits = model(batch.images)
            losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
            total = (losses * batch.weights).sum()
            (total / (len(losses) if divide_by_size else batch.weights.sum())).backward()
            optimizer.step()
            plan.record(batch.indices, losses.detach())
            loss, weight = loss + total.item(), weight + batch.weights.sum().item()
            correct += (logits.argmax(1) == batch.labels).sum().item()
        expected.append((loss / weight, correct / len(positions), len(positions), -(-len(positions) // 64)))
    trainer.fit()
    torch.testing.assert_close(parameters(trainer.model), parameters(model), rtol=1e-12, atol=1e-14)
    assert [len(chosen) for chosen in trainer.plan.chosen] == [200, 101, 101]
    names = ("train_loss", "train_accuracy", "examples", "steps")
    for record, values in zip(trainer.history, expected, strict=True):
        assert [record[name] for name in names] == pytest.approx(values, rel=1e-12)


def test_dynamics_are_nan_where_an_epoch_did_not_look(planned, digits):
    trainer = planned(epochs=3)
    trainer.fit()
    loss = trainer.dynamics.arrays()["loss"]
    for row, positions in zip(loss, trainer.plan.chosen, strict=True):
        assert set(np.flatnonzero(~np.isnan(row))) == set(digits[0].indices[positions].tolist())


class KilledError(Exception):
    pass


def run(trainer, folder, **kwargs):
    files = RunFiles(folder / "ckpts", folder / "resume")
    run_training(trainer, files, trainer.config.as_dict(), {"format": "network-1", "model": "tiny"}, **kwargs)
    return files


def test_a_planned_run_resumes_with_the_same_bits_and_goes_on_counting_steps(planned, tmp_path):
    seen = []

    def note(trainer, epoch, step):
        seen.append((epoch, step))

    def kill(trainer, epoch, step):
        if step == 7:  # the first step of epoch 3: 4, 2, 2 and 2 steps
            raise KilledError

    whole = planned(after_step=(note,))
    run(whole, tmp_path / "whole")
    assert seen == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 5), (2, 6), (3, 7), (3, 8), (4, 9), (4, 10)]
    assert whole.steps == 10
    with pytest.raises(KilledError):
        run(planned(after_step=(kill,)), tmp_path / "killed")
    del seen[:]
    resumed = planned(after_step=(note,))
    run(resumed, tmp_path / "killed", resume=True)
    assert seen == [(3, 7), (3, 8), (4, 9), (4, 10)]
    assert_same(whole, resumed)
    assert torch.equal(whole.plan.losses, resumed.plan.losses)
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert {**a, "seconds": 0, "train_seconds": 0} == {**b, "seconds": 0, "train_seconds": 0}


def test_states_without_a_plan_load_where_there_is_none(make_trainer, planned):
    trainer = make_trainer(epochs=1, dynamics=False)
    trainer.fit()
    state = {**trainer.state(), "epoch": 1}
    del state["plan"]  # as in versions without plans
    again = make_trainer(epochs=1, dynamics=False)
    again.restore(state, {})
    assert_same(trainer, again)
    assert again.steps == 4
    with pytest.raises(ValueError, match="epoch plan"):
        planned(epochs=1, dynamics=False).restore(state, {})


def test_epochs_are_not_raised_under_a_plan_that_depends_on_them(planned, tmp_path):
    for depends in (False, True):
        folder = tmp_path / str(depends)
        settings = {"lr_sched": "const", "depends_on_epochs": depends}
        run(planned(epochs=1, **settings), folder)
        if depends:
            with pytest.raises(FileError, match=r"different settings: epochs \(1 vs. 2\)"):
                run(planned(epochs=2, **settings), folder, resume=True)
        else:
            run(planned(epochs=2, **settings), folder, resume=True)


def test_a_plan_is_told_which_sizes_fit(make_trainer):
    trainer = make_trainer()
    assert trainer._fits(65)  # its BatchNorm sees 8x8 values of a single example
    trainer.model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    for world, sync, misfits in ((1, False, [1]), (2, False, [1, 2, 3]), (2, True, [1])):
        trainer.group, trainer.sync_batchnorm = ProcessGroup(rank=world - 1, world=world), sync
        assert [last for last in range(64) if not trainer._fits(128 + last)] == misfits
        assert [count for count in range(1, 64) if not trainer._fits(count)] == misfits


def test_a_plan_excludes_weights_and_iblr(make_trainer, digits):
    trainer = make_trainer()
    parts = (trainer.model, trainer.train_batches, trainer.test_batches)
    with pytest.raises(ValueError, match="only one of plan and weights"):
        Trainer(*parts, trainer.config, weights=torch.ones(200), plan=Thinning(digits[0]))
    with pytest.raises(ArgumentError, match="optimizer iblr: its posterior needs the mean loss"):
        Trainer(*parts, replace(trainer.config, optimizer="iblr"), plan=Thinning(digits[0], divide_by_size=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "sam"])
def test_a_batch_without_weight_has_loss_zero(make_trainer, optimizer):
    weights = torch.zeros(200)
    weights[::20] = torch.linspace(0.1, 2, 10)
    settings = {**DOUBLE, "weights": weights, "batch_size": 8, "learning_rate": 0.01, "optimizer": optimizer}
    trainer = make_trainer(epochs=1, **settings)
    batches = trainer.train_batches.epoch(1, weights=weights)
    assert sum(not batch.weights.any() for batch in batches) > 10
    trainer.fit()
    assert np.isfinite(weights_of(trainer)).all()
    losses = torch.from_numpy(trainer.dynamics.arrays()["loss"])[:, trainer.train_batches.images.indices].double()
    for record, row in zip(trainer.history, losses, strict=True):
        assert record["train_loss"] == pytest.approx(((row * weights).sum() / weights.sum()).item(), rel=1e-6)

    still = make_trainer(epochs=1, **{**settings, "weights": torch.zeros(200)})
    before = parameters(still.model).clone()
    still.fit()
    assert torch.equal(parameters(still.model), before)
    assert still.history[0]["train_loss"] == 0.0


# --------------------------------------------------------------------------------------------------- processes

WORKER = """
import sys, torch
sys.path[:0] = [{root!r}]
from src.coresets.infobatch import InfoBatchPlan
from src.datasets import Batches, load_dataset
from src.models import build_model
from src.training import ProcessGroup, Trainer, TrainingConfig

def train(group, blobs, planned):
    data, test = load_dataset("npz:" + blobs, "unused")
    data = data.subset(torch.arange(4, len(data)))
    cut = dict(normalization=data.entry.normalizations["samis"], dtype=torch.float64, rank=group.rank,
               world=group.world)
    weights = torch.zeros(len(data))
    weights[::6] = torch.linspace(0.1, 3, len(weights[::6]))
    plan = InfoBatchPlan(data.indices, prune_ratio=0.6, epochs=4, seed=2)
    trainer = Trainer(build_model("mlp", 3, 1, 8, seed=1).double(), Batches(data, 8, order="shuffled", seed=3, **cut),
                      Batches(test, 50, **cut), TrainingConfig(epochs=4, learning_rate=0.02, precision="fp64"),
                      weights=None if planned else weights, plan=plan if planned else None, group=group)
    trainer.fit()
    return {{"model": trainer.model.state_dict(), "history": trainer.history, "losses": plan.losses}}

if __name__ == "__main__":
    group = ProcessGroup.from_environment()
    group.start(torch.device("cpu"))
    results = [train(group, sys.argv[1], planned) for planned in (True, False)]
    torch.save(results, sys.argv[2] + str(group.rank))
    group.stop()
"""


def test_two_processes_equal_one_under_a_plan_and_with_batches_without_weight(tmp_path):
    blobs = write_blobs(tmp_path / "blobs.npz", n=121)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    for result in as_torchrun(2, script, blobs, tmp_path / "two"):
        assert result.status == 0, result.err[-3000:]
    names = {"__name__": "worker"}
    exec(script.read_text(), names)
    ranks = [torch.load(tmp_path / f"two{rank}", weights_only=True) for rank in (0, 1)]
    assert torch.equal(ranks[0][0]["losses"], ranks[1][0]["losses"])
    for planned, two in zip((True, False), ranks[0], strict=True):
        one = names["train"](ProcessGroup(), str(blobs), planned)
        for name, value in one["model"].items():
            torch.testing.assert_close(value, two["model"][name], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one["losses"], two["losses"], rtol=1e-10, atol=1e-12)
        for a, b in zip(one["history"], two["history"], strict=True):
            a, b = ({k: v for k, v in record.items() if "seconds" not in k} for record in (a, b))
            assert a == pytest.approx(b, rel=1e-10)
    assert [record["examples"] < 117 for record in ranks[0][0]["history"]] == [False, True, True, False]


# ---------------------------------------------------------------------------------------------------- nesterov


def test_nesterov_is_torchs_formula(make_trainer):
    settings = {"epochs": 2, "lr_sched": "const", "weight_decay": 0.01, **DOUBLE}
    trainer = make_trainer(nesterov=True, **settings)
    twin = make_trainer(**settings)
    velocities = [torch.zeros_like(p) for p in twin.model.parameters()]
    for epoch in (1, 2):
        twin.model.train()
        for batch in twin.train_batches.epoch(epoch):
            twin.model.zero_grad()
            nn.functional.cross_entropy(twin.model(batch.images), batch.labels).backward()
            with torch.no_grad():
                for p, v in zip(twin.model.parameters(), velocities, strict=True):
                    g = p.grad + 0.01 * p
                    v.mul_(0.9).add_(g)
                    p.sub_(0.05 * (g + 0.9 * v))
    trainer.fit()
    torch.testing.assert_close(parameters(trainer.model), parameters(twin.model), rtol=1e-11, atol=1e-13)


def test_settings_without_nesterov_are_those_of_older_runs(make_trainer, tmp_path):
    off, on = (TrainingConfig(epochs=3, lr_sched="const", nesterov=on) for on in (False, True))
    assert "nesterov" not in off.as_dict()
    assert on.as_dict() == {**off.as_dict(), "nesterov": True}
    idle = {"rho", "adaptive", "hess_init", "iblr_backend", "lr_min"}  # of sgd at a constant rate
    assert on.as_dict() == {name: value for name, value in asdict(on).items() if name not in idle}
    files = run(make_trainer(epochs=2), tmp_path)
    assert "nesterov" not in json.loads(files.results.read_text())["settings"]
    with pytest.raises(FileError, match=r"different settings: nesterov \(False vs. True\)"):
        run(make_trainer(epochs=2, nesterov=True), tmp_path, resume=True)
