"""The notebooks run from top to bottom, in an empty folder, and the claims in their cells hold."""

from pathlib import Path

import nbclient
import nbformat
import pytest

HERE = Path(__file__).parent.parent
NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_claims_hold(path, tmp_path, monkeypatch):
    """It trains its own models there, as there is no ../runs/words."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    work = tmp_path / "notebooks"
    work.mkdir()
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(work)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_pictures_and_is_small(path):
    assert path.stat().st_size < 500 * 1024
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
