"""The functions of src.library on a user's models and loaders, against slow computations in float64."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from user_code import (
    CLASSES,
    COUNT,
    ImageData,
    Output,
    TextData,
    Wrapped,
    image_model,
    shuffled,
    text_model,
    trimmed,
    untouched,
)

import mpe
from src.coresets import METHODS
from src.errors import ArgumentError, MeasurementError, UserError
from src.jacobians import Posterior
from src.library import (
    DynamicsRecorder,
    Indexed,
    hessian_spectrum,
    ntk,
    samis_scores,
    select,
    sensitivities,
    velocity,
)

CASES = {
    "images": (image_model, ImageData(), None),
    "text": (text_model, TextData(), None),  # three inputs of different dtypes, outputs with .logits
    "text of different lengths": (text_model, TextData(), trimmed),
}


def inputs_of(data, indices):
    """Inputs and labels of some examples, as the model takes them."""
    items = [data[i] for i in indices]
    if isinstance(items[0], dict):
        names = ("input_ids", "attention_mask", "values")
        return {name: torch.stack([item[name] for item in items]) for name in names}, [
            int(item["labels"]) for item in items
        ]
    return {"x": torch.stack([item[0] for item in items])}, [int(item[1]) for item in items]


def plain_logits(model, data, indices):
    found, labels = inputs_of(data, indices)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    outputs = model(found["x"]) if "x" in found else model(**found).logits
    for module, mode in modes.items():
        module.training = mode
    return outputs, torch.tensor(labels)


@pytest.mark.parametrize("case", CASES)
def test_samis_scores_are_those_of_one_example_at_a_time(case):
    build, data, collate = CASES[case]
    sgd, sam, loader = build(0), build(1), shuffled(data, 2, collate)
    with untouched(loader, sgd, sam):
        found = samis_scores(sgd, sam, loader)
    assert found.indices.tolist() == list(range(COUNT))
    for i in range(COUNT):
        (a, label), (b, _) = (plain_logits(model, data, [i]) for model in (sgd, sam))
        p, q = (np.exp(z) / np.exp(z).sum() for z in (a[0].detach().numpy(), b[0].detach().numpy()))
        losses = -np.log(p[label]), -np.log(q[label])
        expected = [abs(losses[0] - losses[1]), abs(p - q).sum(), sum(losses) / 2, *losses]
        values = [found.samis_loss, found.samis_prob, found.mean_loss, found.loss_sgd, found.loss_sam]
        np.testing.assert_allclose([v[i] for v in values], np.ravel(expected), rtol=1e-12, atol=1e-14)
        assert (found.correct_sgd[i], found.correct_sam[i]) == (p.argmax() == label, q.argmax() == label)


def test_indexed_data_sets_keep_their_indices_in_subsets():
    pairs, texts = Indexed(ImageData(indexed=False)), Indexed(TextData())
    kept = [5, 2, 19]
    for data, model in ((pairs, image_model), (texts, text_model)):
        everything = samis_scores(model(0), model(1), DataLoader(data, 7))
        some = samis_scores(model(0), model(1), DataLoader(Subset(data, kept), 2, shuffle=True))
        assert some.indices.tolist() == sorted(kept)
        np.testing.assert_allclose(some.samis_loss, everything.samis_loss[sorted(kept)], rtol=1e-10)


@pytest.mark.parametrize("column", [False, True])
def test_one_logit_means_two_classes(column):
    """With float labels, as binary cross-entropy takes them."""
    data = ImageData(binary=True)
    shape = (-1, 1) if column else (-1,)
    loader = DataLoader(TensorDataset(data.x, data.y.double().view(shape)), 4)
    one = [image_model(seed, outputs=1) for seed in (0, 1)]
    if not column:
        one = [nn.Sequential(model, nn.Flatten(0)) for model in one]
    found = samis_scores(*one, loader)
    z = [plain_logits(model, data, range(COUNT))[0].detach().numpy().ravel() for model in one]
    p = [1 / (1 + np.exp(-values)) for values in z]
    losses = [-np.log(np.where(data.y == 1, values, 1 - values)) for values in p]
    np.testing.assert_allclose(found.samis_loss, abs(losses[0] - losses[1]), rtol=1e-10)
    np.testing.assert_allclose(found.samis_prob, 2 * abs(p[0] - p[1]), rtol=1e-10)
    for function in (hessian_spectrum, ntk, lambda m, d: sensitivities(m, d, "diag", delta=1.0)):
        with pytest.raises(ArgumentError, match=r"model: returns one logit z .* \(0, z\)"):
            function(one[0], loader)


@pytest.mark.parametrize("case", CASES)
def test_the_hessian_spectrum_is_that_of_the_full_matrix(case):
    build, data, collate = CASES[case]
    model, loader = build(0), shuffled(data, 4, collate)
    with untouched(loader, model):
        found = hessian_spectrum(model, loader, top_n=4, lanczos_steps=60, trace_probes=10)
    names = [name for name, _ in model.named_parameters()]
    inputs, labels = inputs_of(data, range(COUNT))
    keywords = {"input": inputs["x"]} if "x" in inputs else inputs
    modes = model.training
    model.eval()

    def loss(*values):
        outputs = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (), keywords)
        return nn.functional.cross_entropy(getattr(outputs, "logits", outputs), torch.tensor(labels))

    parameters = tuple(p.detach() for p in model.parameters())
    blocks = torch.autograd.functional.hessian(loss, parameters)
    model.train(modes)
    sizes = [p.numel() for p in parameters]
    dense = torch.cat([torch.cat([b.reshape(m, n) for b, n in zip(row, sizes, strict=True)], 1)
                       for row, m in zip(blocks, sizes, strict=True)])  # fmt: skip
    values = torch.linalg.eigvalsh(dense).flip(0)
    np.testing.assert_allclose(found.eigenvalues, values[:4], rtol=1e-8)
    trace, error = found.trace.mean_and_error
    assert abs(trace - dense.trace()) <= 4 * error + 1e-9
    assert found.size == len(dense)


@pytest.mark.parametrize("case", ["images", "text"])
def test_kernel_and_velocity_are_those_of_the_jacobian_one_row_at_a_time(case):
    build, data, _ = CASES[case]
    models, loader = [build(0), build(1)], shuffled(data)
    with untouched(loader, *models):
        kernels = [ntk(model, loader) for model in models]
    slow = []
    for model in models:
        rows = []
        for i in range(COUNT):
            logits, _ = plain_logits(model, data, [i])
            for z in logits[0]:
                grads = torch.autograd.grad(z, list(model.parameters()), retain_graph=True)
                rows.append(torch.cat([g.flatten() for g in grads]))
        slow.append(torch.stack(rows) @ torch.stack(rows).T)
    for found, expected in zip(kernels, slow, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    expected = 1 - (slow[0] * slow[1]).sum() / (slow[0].norm() * slow[1].norm())
    assert velocity(*kernels) == pytest.approx(float(expected), rel=1e-4)
    chosen = ntk(models[0], loader, classes="true_label")
    labels = np.array([int(label) for label in inputs_of(data, range(COUNT))[1]])
    rows = np.arange(COUNT) * CLASSES + labels
    np.testing.assert_allclose(chosen, slow[0].numpy()[np.ix_(rows, rows)], rtol=1e-5, atol=1e-5)


def test_sensitivities_of_a_wrapped_model_are_those_of_the_model():
    """Dict batches and dict outputs change nothing, for a Laplace posterior, Adam's, and one given by name."""
    data, model = ImageData(), image_model()
    wrapped, loader = Wrapped(model), shuffled(data)

    def collate(items):
        x, y, i = torch.utils.data.default_collate(items)
        return {"pixel_values": x, "labels": y, "index": i}

    dicts = DataLoader(data, 5, collate_fn=collate)
    adam = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adam.step()
    given = {name: torch.full_like(p, 0.1) for name, p in model.named_parameters()}
    inner = {f"inner.{name}": variances for name, variances in given.items()}
    posteriors = [("kfac", "kfac"), (adam, adam), (Posterior(given), Posterior(inner))]
    for plain, other in posteriors:
        expected = mpe.sensitivities(model, loader, plain, delta=2.0)
        with untouched(dicts, wrapped):
            found = sensitivities(wrapped, dicts, other, delta=2.0)
        assert found.indices.tolist() == list(range(COUNT))
        np.testing.assert_allclose(found.scores[expected.indices], expected.scores, rtol=1e-10)
        np.testing.assert_allclose(found.losses[expected.indices], expected.losses, rtol=1e-10)


def test_sensitivities_of_a_model_with_several_inputs():
    """With a posterior of equal variances v: score_i = sum_c |p_c (1 - p_c) v |J_c|^2 e_c|."""
    data, model = TextData(), text_model()
    equal = Posterior({name: torch.full_like(p, 0.1) for name, p in model.named_parameters()})
    found = sensitivities(model, shuffled(data, 2, trimmed), equal)
    scores = np.empty(COUNT)
    scores[found.indices] = found.scores
    for i in range(COUNT):
        logits, label = plain_logits(model, data, [i])
        p = logits[0].detach().softmax(0)
        squares = torch.stack([
            sum(g.square().sum() for g in torch.autograd.grad(z, list(model.parameters()), retain_graph=True))
            for z in logits[0]
        ])  # fmt: skip
        e = p - nn.functional.one_hot(label[0], CLASSES)
        assert scores[i] == pytest.approx(float((p * (1 - p) * 0.1 * squares * e).abs().sum()), rel=1e-9)


# ----------------------------------------------------------------------------------------------------- selection


def everything(seed=0):
    """Inputs for every method: features, logits, labels, scores and dynamics of 40 examples."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 4
    recorder = DynamicsRecorder(40)
    for _ in range(12):
        recorder.record(torch.randn(40, 4, generator=generator), labels, torch.arange(40))
        recorder.end_epoch()
    return {
        "labels": labels,
        "logits": torch.randn(40, 4, generator=generator, dtype=torch.float64),
        "features": torch.randn(40, 6, generator=generator, dtype=torch.float64),
        "scores": torch.rand(40, generator=generator, dtype=torch.float64).numpy(),
        "dynamics": recorder,
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_method_selects_or_says_what_is_missing(name):
    method, inputs = METHODS[name], everything()
    if method.dynamic:
        with pytest.raises(ArgumentError, match="selects again in each epoch"):
            select(name, fraction=0.3, **inputs)
        return
    found, again = (select(name, fraction=0.3, **inputs) for _ in range(2))
    assert np.array_equal(found.indices, again.indices)
    assert np.bincount(inputs["labels"][found.indices]).tolist() == [3] * 4  # 0.3 of 10 examples of each class
    assert method.weighted or not found.weighted
    assert len(select(name, shots=2, per_class=True, seed=2, **inputs).indices) == 8
    needs = method.needs
    required = [("scores", needs.stored), ("dynamics", needs.dynamics), ("logits", needs.logits),
                ("features", needs.embeddings)]  # fmt: skip
    used = {argument: inputs[argument] for argument, needed in required if needed}
    reduced = {"dynamics": inputs["dynamics"]} if needs.reduced else {}
    alone = select(name, fraction=0.3, labels=inputs["labels"], **{**used, **reduced})
    assert np.array_equal(alone.indices, found.indices)  # inputs that it does not use have no effect
    for left_out in [argument for argument, needed in required if needed]:
        with pytest.raises(ArgumentError, match=f"{name} needs .*; give {left_out}$"):
            select(name, fraction=0.3, **{**inputs, left_out: None})


def test_selections_against_plain_sorting():
    inputs = everything()
    labels, scores = inputs["labels"].numpy(), inputs["scores"]
    p = inputs["logits"].softmax(1).numpy()
    el2n = np.linalg.norm(p - np.eye(4)[labels], axis=1)
    twice = [inputs["logits"], inputs["logits"].flip(0)]
    second = np.linalg.norm(twice[1].softmax(1).numpy() - np.eye(4)[labels], axis=1)
    cases = [
        (select("min_of_my_own", labels=labels, scores=scores, fraction=0.2, per_class=False), scores, 8),
        (select("min_samis_loss", labels=labels, scores=scores, fraction=0.2, per_class=False,
                coreset_mode="few_shot"), -scores, 8),
        (select("el2n", labels=labels, logits=twice[0], fraction=0.5, per_class=False), el2n, 20),
        (select("el2n", labels=labels, logits=twice, fraction=0.5, per_class=False), el2n + second, 20),
        (select("aum", labels=labels, dynamics=inputs["dynamics"], fraction=0.5, per_class=False),
         inputs["dynamics"].scores("aum"), 20),
    ]  # fmt: skip
    for found, values, count in cases:
        assert found.indices.tolist() == sorted(np.argsort(values)[-count:].tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "nope"}, "nope: unknown; choose from random"),
        ({"method": "min_None"}, "method min_None needs scores|min_None needs scores"),
        ({"shots": 1}, "give one of fraction, shots and shots_up_to"),
        ({"fraction": None}, "give one of fraction"),
        ({"fraction": 1.5}, "fraction 1.5: must be above 0"),
        ({"epsilon": 1}, "epsilon: is not an option of craig; it has selection_"),
        ({"selection_memory": 0}, "selection_memory"),
        ({"logits": torch.zeros(40, 1)}, r"have shape \(40, 1\); give \(n, C\)"),
        ({"logits": [torch.zeros(40, 4)] * 2}, "of 2 models; craig takes those of one"),
        ({"features": torch.zeros(39, 6)}, "embeddings: has shape"),
        ({"method": "grand", "logits": [torch.zeros(40, 4)] * 2}, "features: of 1 models, but there are logits of 2"),
        ({"labels": torch.arange(40)}, "is not from 0 to 3"),
        ({"labels": []}, "labels: there are none"),
        ({"method": "min_mem", "coreset_mode": "small"}, "small: choose from large"),
        ({"method": "grand", "grand_gradient": "full"}, "needs the model; use last"),
    ],
)
def test_unsuitable_inputs_of_a_selection_are_refused(changes, message):
    arguments = {"method": "craig", "fraction": 0.3, **everything(), "scores": None, **changes}
    with pytest.raises(UserError, match=message) as error:
        select(**arguments)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------- refusals


class Augmented(Dataset):
    """Flips inputs at random, from a generator of its own, which nobody can restore."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        x = torch.linspace(0, 1, 4, dtype=torch.float64)
        return x.flip(0) if self.generator.random() < 0.5 else x, i % CLASSES


class Noisy(ImageData):
    """Draws noise from the global generators."""

    def __getitem__(self, i):
        x, y, index = super().__getitem__(i)
        return x + torch.rand(4) + random.random() + np.random.random(), y, index


def test_every_pass_repeats_the_same_random_numbers():
    """So the Hessian of one draw of the augmentation is measured; a generator of the data set's own is refused."""
    model, loader = image_model(), DataLoader(Noisy(), 5, shuffle=True)
    with untouched(loader, model):
        found = hessian_spectrum(model, loader, top_n=1, lanczos_steps=10, trace_probes=0)
    assert np.isfinite(found.eigenvalues).all()
    with pytest.raises(ArgumentError, match="examples change from pass to pass"):
        hessian_spectrum(model, DataLoader(Augmented(), 4), lanczos_steps=2, trace_probes=0)


def pairs(x=None, y=None, **options):
    data = ImageData()
    return DataLoader(TensorDataset(data.x if x is None else x, data.y if y is None else y), 5, **options)


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value, self.weight = value, nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return self.value(x * self.weight)


@pytest.mark.parametrize(
    ("loader", "model", "message"),
    [
        (lambda: pairs(shuffle=True), image_model, "loader: may shuffle but has no indices"),
        (lambda: iter(pairs()), image_model, "is an iterator, which can be read only once"),
        (list, image_model, "has no examples"),
        (lambda: [torch.zeros(3, 4)], image_model, r"a batch is Tensor; give \(x, y\)"),
        (lambda: [{"x": torch.zeros(3, 4)}], image_model, "has the keys x, but no labels"),
        (lambda: [(torch.zeros(3, 4), torch.zeros(2))], image_model, r"x is shape \(3, 4\); give a tensor with"),
        (lambda: [({"text": ["a", "b"]}, torch.zeros(2))], image_model, "text is list; give a tensor"),
        (lambda: DataLoader(ImageData(), batch_size=None), image_model, "yields single examples; give batches"),
        (lambda: pairs(y=torch.full((COUNT,), 3)), image_model, "labels 3: is not a class index from 0 to 2"),
        (lambda: pairs(y=torch.full((COUNT,), 0.5)), image_model, "labels 0.5: is not a class index"),
        (lambda: pairs(y=torch.zeros(COUNT, 3)), image_model, r"labels: have shape \(5, 3\)"),
        (lambda: [(torch.ones(2, 4, dtype=torch.float64), torch.zeros(2), torch.tensor([7, 7]))], image_model,
         "contains example 7 twice"),
        (pairs, lambda: Returns(lambda x: (x, x)), "returns tuple without logits"),
        (pairs, lambda: Returns(lambda x: {"loss": x}), "returns dict without logits"),
        (pairs, lambda: Returns(lambda x: x[:, :, None]), r"returns logits of shape \(2, 4, 1\)"),
        (pairs, lambda: Returns(lambda x: x[:, :2]), "model_sam: returns 3 logits, but the other model 2"),
    ],
)  # fmt: skip
def test_unsuitable_loaders_and_models_are_refused_in_one_line(loader, model, message):
    first = model()
    with pytest.raises(ArgumentError, match=message) as error:
        samis_scores(first, image_model(), loader())
    assert "\n" not in str(error.value)


def test_losses_that_are_not_finite_and_unknown_settings_are_refused():
    broken = image_model(1)
    with torch.no_grad():
        broken[0].weight.fill_(float("nan"))
    with pytest.raises(MeasurementError, match=r"model_sam: the losses of 23 examples are not finite \(first 0\)"):
        samis_scores(image_model(), broken, pairs())
    with pytest.raises(ArgumentError, match="steps: is not a setting of hessian_spectrum; it has top_n"):
        hessian_spectrum(image_model(), pairs(), steps=3)
    with pytest.raises(ArgumentError, match="operator"):
        hessian_spectrum(image_model(), pairs(), operator="fisher")
    with pytest.raises(ArgumentError, match="classes none: choose from all"):
        ntk(image_model(), pairs(), classes="none")
    ragged = [({"x": torch.zeros(2, k, dtype=torch.float64)}, torch.zeros(2)) for k in (3, 4)]
    with pytest.raises(ArgumentError, match="different shapes; pad them"):
        ntk(Returns(lambda x: Output(x[:, :2])), ragged)
