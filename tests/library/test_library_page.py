"""docs/library.md: its program runs in another folder, and its table lists every method."""

import os
import re
import subprocess
import sys

from support import ROOT

from src.coresets import METHODS
from src.library import __all__ as exported

PAGE = (ROOT / "docs" / "library.md").read_text()


def test_the_program_of_the_page_runs_in_another_project(tmp_path):
    """With PYTHONPATH, outside of the checkout."""
    (tmp_path / "theirs.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)) + CHECKS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "theirs.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") >= 5


CHECKS = """
n = len(data)
model_sgd.eval(), model_sam.eval()
with torch.no_grad():
    losses = [cross_entropy(model(x), y, reduction="none") for model in (model_sgd, model_sam)]
assert all((model(x).argmax(1) == y).float().mean() > 0.9 for model in (model_sgd, model_sam))
again = samis_scores(model_sgd, model_sam, DataLoader(data, 500, shuffle=True))
assert torch.allclose(torch.from_numpy(again.samis_loss).float(), (losses[0] - losses[1]).abs(), atol=1e-4)
assert aum.shape == found.samis_loss.shape == (n,)
assert torch.corrcoef(torch.stack([torch.from_numpy(aum).float(), losses[0]]))[0, 1] > 0.3
assert abs(len(subset) - 0.3 * n) <= 10 and len(weighted) == -(-len(subset) // 64)
assert abs(selection.weights.mean() - 1) < 1e-9 and selection.weights.max() > 1
lowest = set(range(n)) - set(hardest.indices.tolist())
assert found.samis_loss[list(hardest.indices)].mean() > 2 * found.samis_loss[list(lowest)].mean()
assert spectrum.eigenvalues[0] > spectrum.eigenvalues[1] > 0 and kernel.shape == (200, 200)
assert len(mpe.scores) == n
"""


def test_the_table_of_inputs_lists_every_method():
    table = PAGE.split("| inputs besides `labels` |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", table, re.MULTILINE)
    listed = {name: inputs for inputs, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert listed.pop("min_NAME") == "`scores`"
    assert sorted(listed) == sorted(m.name for m in METHODS.values() if not m.needs.stored and not m.dynamic)
    for name, inputs in listed.items():
        needs = METHODS[name].needs
        reads = {
            "dynamics": bool(needs.dynamics or needs.reduced),
            "logits": needs.logits,
            "features": needs.embeddings,
        }
        reads["scores"] = bool(needs.reduced and not needs.dynamics)
        assert {key for key, read in reads.items() if read} == set(re.findall(r"`(\w+)`", inputs)), name


def test_everything_exported_is_on_the_page():
    types = {"SamisScores", "Selection", "Sensitivities", "Spectrum"}  # what the functions return
    assert [name for name in exported if name not in PAGE and name not in types] == []
