"""The notebooks run from top to bottom in an empty folder. Their cells assert their claims."""

import nbclient
import nbformat
import pytest

from test_flm import HERE

NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))
assert len(NOTEBOOKS) == 5

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_an_empty_folder(path, tmp_path, monkeypatch):
    """It uses the pretrained models or trains its own: the folder contains no run."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("TEXTS", "60")  # fewer samples in notebook 04
    work = tmp_path / "notebooks"
    work.mkdir()
    notebook = nbformat.read(path, as_version=4)
    nbclient.execute(notebook, cwd=str(work), timeout=900)

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_small_and_has_its_outputs(path):
    """It was executed once in order, with figures and without errors or warnings."""
    assert path.stat().st_size <= 500 * 1024
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
