"""The notebook examples/quickstart.ipynb runs (here with one epoch); its stored outputs are complete and small."""

import nbformat
from nbclient import NotebookClient
from support import ROOT

PATH = ROOT / "examples" / "quickstart.ipynb"


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook):
    return [output for cell in code(notebook) for output in cell.outputs if "image/png" in output.get("data", {})]


def test_it_runs(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    notebook = nbformat.read(PATH, as_version=4)
    (settings,) = [cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", ())]
    settings.source += f"\nEPOCHS, FOLDER = 1, Path({str(tmp_path)!r})"
    for cell in code(notebook):
        cell.outputs = []
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    assert printed(notebook).count("test accuracy") == 6
    assert len(pictures(notebook)) == 2
    assert "nan" not in printed(notebook)
    runs = {path.parent.parent.name for path in (tmp_path / "models").rglob("results.json")}
    assert len(runs) == 6  # the pair, three pruned models, and the model of the sensitivities


def test_the_stored_outputs():
    notebook = nbformat.read(PATH, as_version=4)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert printed(notebook).count("test accuracy") == 6
    assert len(pictures(notebook)) == 2
    assert {output.get("name", "stdout") for cell in code(notebook) for output in cell.outputs} == {"stdout"}
    assert PATH.stat().st_size < 200_000
