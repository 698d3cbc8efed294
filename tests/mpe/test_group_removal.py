"""Removing groups: the estimates against refits and explicit Jacobians, the binary problem, and the file."""

import numpy as np
import pytest
import torch
from mpe_problems import examples, network
from support import example

import mpe
from mpe.config import STRUCTURES, ExperimentConfig
from mpe.experiment import Experiment
from mpe.posterior import laplace_posterior
from src.artifacts.paths import Folders
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.errors import ArgumentError
from src.training.ensemble import Ensemble

script = example("6_group_removal")
N, D, DELTA, GROUP = 30, 4, 0.8, torch.tensor([3, 7, 8, 20, 29])


def logistic_problem():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=draw, dtype=torch.float64)
    y = (x @ torch.ones(D, dtype=torch.float64) + torch.randn(N, generator=draw, dtype=torch.float64) > 0).double()
    return x, y


def gradient_and_hessian(x, y, w, weights):
    """Of the loss of logistic regression with example weights ``(N,)``."""
    p = (x @ w).sigmoid()
    hessian = (x.mT * (weights * p * (1 - p))) @ x + DELTA * torch.eye(D, dtype=torch.float64)
    return x.mT @ (weights * (p - y)) + DELTA * w, hessian


def refit(x, y, weights):
    """Minimize the loss by Newton's method."""
    w = torch.zeros(D, dtype=torch.float64)
    for _ in range(30):
        gradient, hessian = gradient_and_hessian(x, y, w, weights)
        w = w - torch.linalg.solve(hessian, gradient)
    assert gradient.abs().max() < 1e-12
    return w


def test_the_estimates_of_logistic_regression_against_refits():
    x, y = logistic_problem()
    kept = torch.ones(N, dtype=torch.float64)
    kept[GROUP] = 0
    w = refit(x, y, torch.ones_like(kept))
    _, hessian = gradient_and_hessian(x, y, w, torch.ones_like(kept))
    own, f = x[GROUP], x[GROUP] @ w
    covariances = own @ torch.linalg.inv(hessian) @ own.mT
    two = [torch.stack([values, values.flip(-1)]) for values in (f, y[GROUP])]  # another group, in another order
    found = mpe.removed_groups(torch.stack([covariances, covariances.flip(0, 1)]), *two)
    for change in found.values():
        torch.testing.assert_close(change[0], change[1].flip(0), rtol=1e-10, atol=1e-14)
    # the full form is the derivative of the predictions with respect to the group's weight, minus one
    ends = [own @ refit(x, y, 1 - sign * 1e-4 * (1 - kept)) for sign in (1, -1)]
    derivative = (ends[0].sigmoid() - ends[1].sigmoid()) / 2e-4
    torch.testing.assert_close(found["full"][0], derivative, rtol=1e-6, atol=1e-9)
    # woodbury is one Newton step on the problem without the group
    gradient, hessian = gradient_and_hessian(x, y, w, kept)
    stepped = own @ (w - torch.linalg.solve(hessian, gradient))
    torch.testing.assert_close(found["woodbury"][0], stepped.sigmoid() - f.sigmoid(), rtol=1e-10, atol=1e-12)
    # the diagonal form removes each member alone
    for member, index in enumerate(GROUP):
        alone = mpe.removed_groups(
            covariances[member, member].view(1, 1, 1), f[member].view(1, 1), y[index].view(1, 1)
        )
        torch.testing.assert_close(found["diag"][0, member], alone["full"][0, 0])
    true = own @ refit(x, y, kept)
    off = {form: (change[0] - (true.sigmoid() - f.sigmoid())).abs().sum() for form, change in found.items()}
    assert off["woodbury"] < off["full"] < off["diag"]


def test_an_impossible_newton_step_is_replaced(caplog):
    covariances = torch.eye(2, dtype=torch.float64).expand(2, 2, 2) * torch.tensor([0.5, 50.0]).view(2, 1, 1)
    logits, labels = torch.tensor([[0.3, -0.2]] * 2, dtype=torch.float64), torch.tensor([[1, 1]] * 2)
    found = mpe.removed_groups(covariances, logits, labels)
    assert (found["woodbury"][1] == found["full"][1]).all()
    assert (found["woodbury"][0] != found["full"][0]).all()
    assert "for 1 of 2 groups" in caplog.text


def experiment(base, *, classes, structure="kfac", **data):
    """An untrained experiment on two classes of the digits, in float64."""
    own = {"model": "small_mlp", "bs_jacs": 40, "var_version": structure}
    config = ExperimentConfig(name_exp="t", pickles_folder=base / "pickles", **own)
    where = Folders(
        datasets_folder=base, models_folder=base, log_folder=base / "logs", resume_ckpts_folder=base / "resume"
    )
    return Experiment(
        config, DataConfig(dataset="digits", **data), ComputeConfig(precision="fp64"), where, "group", {}, classes
    )


def test_the_binary_problem(tmp_path):
    whole, found = experiment(tmp_path, classes=None), experiment(tmp_path, classes=[5, 3])
    for part in ("train", "test"):
        images, of_all = ((getattr(each.context, part)) for each in (found, whole))
        wanted = of_all.labels[images.indices]
        assert set(wanted.tolist()) == {3, 5}
        assert len(images) == int(((of_all.labels == 3) | (of_all.labels == 5)).sum())
        assert images.labels.tolist() == (wanted == 3).long().tolist()
        assert images.class_names == ["5", "3"]
        assert torch.equal(images.fetch(torch.arange(9)), of_all.fetch(images.indices[:9]))
    assert found.model(found.prepared(found.train)[:2]).shape == (2, 2)
    small = experiment(tmp_path, classes=[3, 5], subset="200")
    assert small.train.labels.tolist() == (whole.train.labels[small.train.indices] == 5).long().tolist()
    assert small.count == experiment(tmp_path, classes=[5, 3], subset="200").count < 60
    with pytest.raises(ArgumentError, match="two different classes"):
        experiment(tmp_path, classes=[3, 3])
    with pytest.raises(ArgumentError, match="have none of class 12; its classes are 0 to 9"):
        experiment(tmp_path, classes=[3, 12])


def test_covariances_are_those_of_explicit_jacobians(tmp_path):
    groups = torch.tensor([[4, 0, 9], [1, 2, 3]])
    of = {
        structure: experiment(tmp_path, classes=[3, 5], structure=structure, subset="200") for structure in STRUCTURES
    }
    found = of["ggn"]
    images, model = found.prepared(found.train), found.model
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def difference(values, image):
        logits = torch.func.functional_call(model, values, (image[None],))[0]
        return logits[1] - logits[0]

    rows = torch.func.vmap(torch.func.grad(difference), (None, 0))(parameters, images)
    jacobian = torch.cat([rows[name].flatten(1) for name in parameters], dim=1)  # (N, P)
    p = torch.func.vmap(difference, (None, 0))(parameters, images).sigmoid()
    hessian = (jacobian.mT * (p * (1 - p))) @ jacobian
    hessian.diagonal().add_(2.0)
    variances = laplace_posterior(model, [(images,)], 2.0, structure="diag").blocks
    of_diagonal = torch.cat([variances[name].flatten() for name in parameters])
    for structure, product in (
        ("ggn", torch.linalg.solve(hessian, jacobian.mT)),
        ("diag", of_diagonal.unsqueeze(1) * jacobian.mT),
    ):
        covariances = of[structure].group_covariances(2.0, groups)
        for group, block in zip(groups, covariances, strict=True):
            torch.testing.assert_close(block, (jacobian @ product)[group][:, group], rtol=1e-8, atol=1e-10)
    kfac = of["kfac"].group_covariances(2.0, groups)
    assert torch.linalg.eigvalsh(kfac).min() > 0
    assert not torch.allclose(kfac, covariances, rtol=0.01)


def test_each_model_is_measured_on_the_group_that_it_lacks():
    net, (images, labels) = network(), examples(12)
    groups, ensemble = torch.tensor([[6, 2], [8, 0], [1, 3]]), Ensemble(net, 3)
    ensemble.step(images.view(3, 4, 2, 6, 6), labels.view(3, 4), None, 0.5)

    def alone(member, group):
        net.load_state_dict(ensemble.member(member))
        logits = net(images[group]).detach()
        return (logits[:, 1] - logits[:, 0]).numpy()

    measure = script.measure_groups(images, groups)
    first, later = measure(ensemble, range(3)), measure(ensemble, range(1, 4))
    assert np.isnan(first["outputs"][0]).all()
    np.testing.assert_allclose(first["outputs"][1:], [alone(1, groups[0]), alone(2, groups[1])], rtol=1e-12)
    np.testing.assert_allclose(first["control"], [[alone(0, group) for group in groups]], rtol=1e-12)
    np.testing.assert_allclose(later["outputs"], [alone(k, groups[k]) for k in range(3)], rtol=1e-12)
    assert later["control"].shape == (0, 3, 2)


@pytest.mark.parametrize("models", [1, 2, 3])
def test_what_the_file_contains(models):
    """After only the control, in the middle, and at the end."""
    draw = np.random.default_rng(0)
    outputs, control, base = draw.normal(size=(3, 4)), draw.normal(size=(1, 2, 4)), draw.normal(size=(2, 4))
    estimated = {form: torch.from_numpy(draw.normal(size=(2, 4))) for form in ("diag", "full", "woodbury")}
    groups = np.arange(8).reshape(2, 4) * 10
    rows = {"outputs": outputs[:models], "control": control}
    found = script.content(rows, groups, torch.from_numpy(base), estimated)
    done = models - 1
    sigma = [1 / (1 + np.exp(-values)) for values in (outputs[1:models], base[:done], control[0, :done])]
    np.testing.assert_allclose(found["probability_deviations"], sigma[0] - sigma[1], rtol=1e-12)
    np.testing.assert_allclose(found["softmax_deviations"], np.abs(sigma[0] - sigma[1]).sum(1), rtol=1e-12)
    np.testing.assert_allclose(found["softmax_deviations_corrected"], np.abs(sigma[0] - sigma[2]).sum(1), rtol=1e-12)
    for form, change in estimated.items():
        np.testing.assert_allclose(found[f"estimated_deviations_{form}"], change[:done], rtol=1e-12)
        np.testing.assert_allclose(found[f"sensitivities_{form}"], change[:done].abs().sum(1), rtol=1e-12)
    assert found["groups"].tolist() == groups[:done].tolist()
    assert len(found) == 12
