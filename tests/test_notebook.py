"""Each notebook runs from top to bottom and shows pictures; what is committed holds no outputs."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

import slipstream

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PICTURES = {"multi_crop_named_fields": 10, "presets": 20}


@pytest.fixture(params=PICTURES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def notebook(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def run(notebook: nbformat.NotebookNode, folder: Path) -> list[np.ndarray]:
    """The pictures that it shows, as uint8 [H, W, 3]."""
    NotebookClient(
        notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    encoded = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")) for png in encoded]


def check(name: str, pictures: list[np.ndarray]) -> None:
    assert len(pictures) == PICTURES[name]
    for picture in pictures:
        assert min(picture.shape[:2]) > 200
        assert len(np.unique(picture @ np.array([1, 256, 65536]))) > 1000


def test_no_outputs_are_committed(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert [cell.execution_count for cell in code] == [None] * len(code)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_only_public_names_are_used(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    imported = re.search(r"from slipstream import \(([^)]*)\)", text)
    assert imported is not None
    assert set(re.findall(r"\w+", imported[1])) <= set(slipstream.__all__)
    assert re.findall(r"(?:from|import) slipstream[.]?\S*", text) == ["from slipstream", "from slipstream.demo"]
    assert re.findall(r"\._\w+", text) == []


@pytest.mark.timeout(200)
def test_it_runs_on_the_demo_photographs(name, notebook, tmp_path, monkeypatch):
    monkeypatch.delenv("SLIPSTREAM_DATA", raising=False)
    monkeypatch.setenv("SLIPSTREAM_DEVICE", "cpu")
    check(name, run(notebook, tmp_path))
    assert (tmp_path / "out/demo/photographs/index.json").exists()


@pytest.mark.timeout(200)
def test_it_runs_on_a_folder_of_classes(name, notebook, photos, tmp_path, monkeypatch):
    imagenet = next((path.parents[1] for path in photos if path.parts[-3] == "imagenet"), None)
    if imagenet is None:
        pytest.skip("../shared/photos/imagenet is not here")
    monkeypatch.setenv("SLIPSTREAM_DATA", str(imagenet))
    monkeypatch.setenv("SLIPSTREAM_DEVICE", "cpu")
    check(name, run(notebook, tmp_path))
    assert list(tmp_path.iterdir()) == []
