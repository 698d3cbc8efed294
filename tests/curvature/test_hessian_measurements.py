"""Full measurements: one run for all quantities, interrupted and resumed runs, and power iteration."""

import copy
import json
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from curvature_ground import Matrix, batches, dense, images_and_labels, network, small_network

from src.artifacts.io import read_checkpoint, write_checkpoint
from src.artifacts.store import load_result
from src.curvature.config import STORAGES, SpectrumConfig
from src.curvature.operators import Hessian, power_iteration, true_residuals
from src.curvature.results import StoredSpectrum
from src.curvature.spectrum import SpectrumRun, SpectrumState, describe, measure_spectrum, select_by_score
from src.datasets import DATASETS, ImageSet
from src.errors import ArgumentError, FileError

CONFIG = SpectrumConfig(
    top_n=3, lanczos_steps=12, probes=2, trace_probes=15, trace_tolerance=0.0, max_steps=40, save_every=1
)
NOTHING = torch.zeros(0)
SPECTRUM = np.concatenate([[40.0, 20.0, 10.0], np.linspace(-1, 2, 77)])


class Interrupted(BaseException):
    pass


class Interrupting(Matrix):
    """Interrupts the run before a product, like Ctrl-C."""

    at = None

    def __matmul__(self, vector):
        if self.products == self.at:
            raise Interrupted
        return super().__matmul__(vector)


def same(a, b):
    assert np.array_equal(a.eigenvalues, b.eigenvalues)
    assert np.array_equal(a.residuals, b.residuals)
    assert (a.nodes, a.weights, a.steps, a.trace) == (b.nodes, b.weights, b.steps, b.trace)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("save_every", [1, 4])
def test_stopped_anywhere_and_resumed_gives_the_same_bits(storage, save_every, tmp_path):
    config = replace(CONFIG, basis=storage, save_every=save_every)
    matrix = Interrupting.of_spectrum(SPECTRUM, torch.float32)
    expected = SpectrumRun(matrix, config).run()
    total = matrix.products
    for at in range(1, total, 5):
        state = SpectrumState(tmp_path / f"{at}", {"a": 1})
        matrix.products, matrix.at = 0, at
        with pytest.raises(Interrupted):
            SpectrumRun(matrix, config, state).run()
        matrix.products, matrix.at = 0, None
        later = SpectrumRun(matrix, config, SpectrumState(state.folder, {"a": 1}))
        assert later.resume() == (at >= save_every)
        assert matrix.products >= at - save_every
        found = later.run()
        same(found, expected)
        assert matrix.products == total
        state.clear()
        assert not state.folder.exists()


def test_states_that_do_not_fit(tmp_path):
    matrix = Matrix.of_spectrum(SPECTRUM)
    state = SpectrumState(tmp_path / "s", {"a": 1})
    assert not SpectrumRun(matrix, CONFIG, state).resume()
    SpectrumRun(matrix, CONFIG, state).run()
    names = {p.name.split("_")[0] for p in state.folder.iterdir()}
    assert names == {"progress.pt", "vectors.pt"}, "vectors of ended runs are gone"
    other = SpectrumState(state.folder, {"a": 2})
    for resume in (True, False):
        with pytest.raises(FileError, match=r"different settings: a \(1 vs. 2\)"):
            other.prepare(resume, overwrite=False)
        state.prepare(True, overwrite=resume)
        assert names == {p.name.split("_")[0] for p in state.folder.iterdir()}
    (state.folder / "progress.pt").write_bytes(b"junk")
    with pytest.raises(FileError, match=r"progress\.pt: .*--overwrite"):
        state.prepare(True, overwrite=False)
    state.prepare(True, overwrite=True)
    assert not state.folder.exists()
    write_checkpoint(tmp_path / "other.pt", {"rows": []})
    for bad in (
        b"junk",
        (tmp_path / "other.pt").read_bytes(),
    ):  # an unreadable file does not prevent a run from scratch
        SpectrumRun(matrix, CONFIG, state).run()
        (state.folder / "progress.pt").write_bytes(bad)
        state.prepare(False, overwrite=False)
        assert not state.folder.exists()
    for resume, overwrite, settings in ((False, False, {"a": 1}), (True, True, {"a": 2})):
        SpectrumRun(matrix, CONFIG, state).run()
        assert state.folder.exists()
        SpectrumState(state.folder, settings).prepare(resume, overwrite)
        assert not state.folder.exists()


def resumed(matrix, state):
    state.prepare(True, overwrite=False)
    return SpectrumRun(matrix, CONFIG, state).resume()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(
            (("result", name), value)
            for name in ("eigenvalues", "nodes", "samples")
            for value in (5, ["a"], [[None]])
        ),
        *((("lanczos", name), value) for name in ("alphas", "current", "previous") for value in (5, ["a"])),
        *((("lanczos", name), NOTHING) for name in ("current", "previous")),
        *((("lanczos",), value) for value in (5, {})),
        *(((name,), value) for name in ("products", "rows", "result") for value in ("a", [7], None)),
        (("settings",), "a"),
    ],
)
def test_damaged_states_are_one_line(tmp_path, place, value):
    matrix = Interrupting.of_spectrum(SPECTRUM, torch.float32)
    state = SpectrumState(tmp_path / "s", {"a": 1})
    matrix.at = 5
    with pytest.raises(Interrupted):
        SpectrumRun(matrix, CONFIG, state).run()
    content = read_checkpoint(state.folder / "progress.pt")
    inner = content[place[0]] if len(place) == 2 else content
    inner[place[-1]] = value
    write_checkpoint(state.folder / "progress.pt", content)
    matrix.at = None
    with pytest.raises(FileError, match=r"^[^\n]*s: its state is damaged|has no settings|is no state"):
        resumed(matrix, SpectrumState(state.folder, {"a": 1}))


def test_a_state_without_its_vectors_and_vectors_written_once(tmp_path):
    matrix = Matrix.of_spectrum(SPECTRUM)
    state, written = SpectrumState(tmp_path / "s", {"a": 1}), []
    keep, state.keep = state.keep, lambda name, values: (written.append(name), keep(name, values))
    SpectrumRun(matrix, CONFIG, state).run()
    assert written == ["vectors"]
    (state.folder / "vectors.pt").unlink()
    with pytest.raises(FileError, match="incomplete; remove it, or run without --resume"):
        SpectrumRun(matrix, CONFIG, SpectrumState(state.folder, {"a": 1})).resume()


def test_one_run_serves_eigenvalues_and_density():
    matrix = Matrix.of_spectrum(SPECTRUM)
    config = SpectrumConfig(top_n=3, lanczos_steps=12, trace_probes=0)
    found = SpectrumRun(matrix, config).run()
    assert matrix.products == found.steps == 12
    np.testing.assert_allclose(found.eigenvalues, SPECTRUM[:3], rtol=1e-4)
    assert len(found.nodes) == len(found.weights) == 1
    assert found.quadrature_trace() == pytest.approx(80 * np.dot(found.nodes[0], found.weights[0]))
    assert describe(found, config)["trace"] is None


def test_a_run_goes_on_until_eigenvalues_are_found_and_the_density_does_not_notice():
    spectrum = np.concatenate([[10.0, 9.9, 9.8], np.linspace(0, 9.5, 197)])
    short = SpectrumRun(
        Matrix.of_spectrum(spectrum), SpectrumConfig(top_n=3, lanczos_steps=8, max_steps=8, trace_probes=0)
    ).run()
    longer = SpectrumRun(Matrix.of_spectrum(spectrum), SpectrumConfig(top_n=3, lanczos_steps=8, trace_probes=0)).run()
    assert not describe(short, SpectrumConfig(top_n=3))["converged"]
    assert describe(longer, SpectrumConfig(top_n=3))["converged"]
    assert longer.steps > 8
    assert (short.nodes, short.weights) == (longer.nodes, longer.weights)
    np.testing.assert_allclose(longer.eigenvalues, spectrum[:3], rtol=1e-3)


def test_more_eigenvalues_than_the_matrix_has():
    found = SpectrumRun(
        Matrix.of_spectrum([3.0, 1.0]), SpectrumConfig(top_n=2, lanczos_steps=50, trace_probes=3)
    ).run()
    np.testing.assert_allclose(found.eigenvalues, [3, 1], atol=1e-12)
    assert found.trace.deflated == pytest.approx([4, 4, 4])


@pytest.mark.parametrize("name", ["small", "batchnorm", "custom"])  # "custom" has an unused parameter
def test_power_iteration_against_the_dense_matrix(name):
    net, (images, labels) = small_network() if name == "small" else network(name), images_and_labels(11)
    net.train()
    net[0].weight.requires_grad_(False) if name == "small" else None
    first = next(iter(net.parameters()))
    first.grad = torch.ones_like(first)
    before, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    flags = [p.requires_grad for p in net.parameters()]
    operator = Hessian(net, batches(images, labels, 4), 11)
    products = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, vectors = power_iteration(
            operator, 3, iterations=3000, tolerance=1e-10, done=lambda: products.append(operator.products)
        )
    assert net.training
    assert [p.requires_grad for p in net.parameters()] == flags
    assert (first.grad == 1).all()
    assert all(p.grad is None for p in list(net.parameters())[1:])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert products == list(range(1, operator.products + 1))
    expected = torch.linalg.eigvalsh(dense(net.eval(), images, labels)).numpy()
    expected = expected[np.argsort(-np.abs(expected))][:3]
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert (true_residuals(operator, values, vectors) < 2e-2 * np.abs(values)).all()
    first, again = (power_iteration(operator, 3, iterations=20, tolerance=1e-10)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


class Loss(Interrupting):
    """A matrix operator with a loss."""

    examples = 7

    def loss_and_gradient(self):
        return 0.5, torch.ones(self.size)


@pytest.mark.parametrize("damaged", ["rows_*.pt", "vectors.pt"])
def test_damaged_vectors_are_replaced_on_request(tmp_path, damaged):
    matrix, path = Loss.of_spectrum(SPECTRUM, torch.float32), tmp_path / "spectrum.pkl"
    wanted = measure_spectrum(matrix, CONFIG, tmp_path / "whole.pkl", {"a": 1})
    last = wanted["products"] - 2  # of the trace
    matrix.products, matrix.at = 0, 5 if damaged.startswith("rows") else last
    with pytest.raises(Interrupted):
        measure_spectrum(matrix, CONFIG, path, {"a": 1})
    matrix.at = None
    files = list(path.with_suffix(".state").glob(damaged))
    assert files
    for file in files:
        file.write_bytes(b"junk")
    config = replace(CONFIG, resume=True)
    with pytest.raises(FileError, match="damaged"):
        measure_spectrum(matrix, config, path, {"a": 1})
    matrix.products = 0
    found = measure_spectrum(matrix, replace(config, overwrite=True), path, {"a": 1})
    assert not found["resumed"]
    assert not path.with_suffix(".state").exists()
    for name in ("eigenvalues", "products", "trace"):
        assert found[name] == wanted[name]


def test_files(tmp_path):
    path = tmp_path / "a" / "pyhessian_eigen_lanczos.pkl"
    record = measure_spectrum(Loss.of_spectrum(SPECTRUM), CONFIG, path, {"a": 1}, {"more": 2})
    stored = pickle.loads(path.read_bytes())  # as old plotting code does
    assert set(stored) == {"eigenvals", "trace", "density_eigen", "density_weight"}
    assert [len(stored[key]) for key in stored] == [3, 15, 2, 2]
    assert [len(run) for run in stored["density_eigen"]] == [12, 12]
    assert all(isinstance(value, float) for key in ("eigenvals", "trace") for value in stored[key])
    found = StoredSpectrum.read(path)
    lists = {"eigenvals": found.eigenvalues, "trace": found.traces, "density_eigen": found.nodes}
    assert {**lists, "density_weight": found.weights} == stored
    assert json.loads(path.with_suffix(".json").read_text()) == record == found.record
    assert record["eigenvalues"] == stored["eigenvals"]
    assert (record["loss"], record["more"]) == (0.5, 2)
    assert load_result(path, {"a": 1}) == record
    assert not path.with_suffix(".state").exists()
    arrays = {key: [np.array(run) for run in stored[key]] for key in ("density_eigen", "density_weight")}
    arrays |= {key: np.array(stored[key]) for key in ("eigenvals", "trace")}
    path.write_bytes(pickle.dumps(arrays))  # other writers store arrays
    assert StoredSpectrum.read(path) == found
    assert isinstance(StoredSpectrum.read(path).eigenvalues[0], float)
    old = {**stored, "density_weight": [[complex(w) for w in run] for run in stored["density_weight"]]}
    path.write_bytes(pickle.dumps(old))  # the papers' code stored complex weights
    assert StoredSpectrum.read(path) == found
    path.with_suffix(".json").unlink()
    assert StoredSpectrum.read(path).record == {}
    for bad in ([1], {"eigenvals": [1.0]}, {**stored, "density_eigen": [[1.0]]}, {**stored, "density_eigen": []},
                {**stored, "density_eigen": [[float("nan")] * 12] * 2}, {**stored, "eigenvals": "x"},
                {**stored, "eigenvals": []}, {**stored, "eigenvals": [float("nan")]}, {**stored, "trace": None},
                {**stored, "trace": [float("inf")]}, {**stored, "density_eigen": 1.0}):  # fmt: skip
        path.write_bytes(pickle.dumps(bad))
        with pytest.raises(FileError, match="is not a spectrum"):
            StoredSpectrum.read(path)


def test_examples_by_score():
    whole = ImageSet(DATASETS["digits"], "train", torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.zeros(6).long())
    images = whole.subset(torch.tensor([1, 2, 3, 4, 5]))
    scores = np.array([np.nan, 0.5, 0.1, 0.5, 0.9, 0.1])

    def chosen(side, fraction):
        return select_by_score(images, scores, side, fraction).indices.tolist()

    assert chosen("low", 0.2) == [2]
    assert chosen("low", 0.4) == [2, 5]
    assert chosen("low", 0.6) == [1, 2, 5]  # ties by index
    assert chosen("high", 0.4) == [3, 4]
    assert chosen("high", 1.0) == [1, 2, 3, 4, 5]
    with pytest.raises(ArgumentError, match="none"):
        chosen("high", 0.05)
    with pytest.raises(FileError, match="1 of 6 examples have no score"):
        select_by_score(whole, scores, "low", 0.5)
