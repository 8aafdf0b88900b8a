"""README.md: its Python runs as it is written, and the defaults that it states are the code's."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import slipstream

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
# What a reader has and a test does not.
THERE = {
    'remote_dir="s3://bucket/imagenet/train/"': 'local_dir="photos"',
    "batch_size=256": "batch_size=4",
    "SlipstreamLoader(dataset, 64": "SlipstreamLoader(dataset, 4",
    '["epoch"], 100)': '["epoch"], 2)',
}


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks use beside what they make; photographs in ./photos."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIPSTREAM_DEVICE", "cpu")
    matplotlib.use("Agg")
    rng = np.random.default_rng(0)
    for index in range(6):
        folder = tmp_path / "photos" / f"class_{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / f"{index}.jpg")
    images = slipstream.SlipstreamDataset("photos", decode_images=True)
    return {
        **{name: getattr(slipstream, name) for name in slipstream.__all__},
        "slipstream": slipstream,
        "torch": torch,
        "dataclasses": dataclasses,
        "images": [images[i]["image"] for i in range(4)],
        "ids": range(4),
        "np": np,
        "rows": [(f"photos/class_{i % 2}/{i}.jpg", i % 2) for i in range(6)],
        "checkpoint": None,
        "model": torch.nn.Linear(1, 1),
        "time_to_save": lambda: True,
        "saved": [],
        "trained": [],
    }


def test_its_python_runs(names: dict[str, Any]) -> None:
    names["save"] = names["saved"].append
    names["train_step"] = lambda batch, weight: names["trained"].append((batch["_indices"], weight))
    for block in BLOCKS:
        for reader, test in THERE.items():
            block = block.replace(reader, test)
        exec(compile(block, "README.md", "exec"), names)
    assert len(BLOCKS) == 6 and Path("plan.npz").exists() and Path("crops.png").exists()
    assert [len(ids) for ids, _ in names["trained"]] == [4, 2, 4, 2]
    assert names["saved"][-1]["loader"]["epoch"] == 1
    with slipstream.SlipstreamLoader(names["dataset"], 6, verbose=False) as loader:
        batch = next(iter(loader))
    assert batch["label"].tolist() == [0, 1, 0, 1, 0, 1] and names["dataset"][5]["label"] == 1
    assert torch.equal(batch["image"][1], slipstream.SlipstreamDataset("photos", decode_images=True)[3]["image"])


def test_the_loaders_defaults_are_as_stated() -> None:
    rows = re.search(r"### The loader's arguments\n\n\|.*?\n\|.*?\n(.*?)\n\n", TEXT, re.DOTALL)
    assert rows is not None
    stated = {}
    for row in rows[1].splitlines():
        arguments, defaults = (re.findall(r"`(.*?)`", cell) for cell in row.split("|")[1:3])
        stated |= dict(zip(arguments, defaults * len(arguments) if len(defaults) == 1 else defaults, strict=True))
    actual = inspect.signature(slipstream.SlipstreamLoader).parameters
    assert list(stated) and set(stated) == set(actual) - {"dataset", "batch_size", "pipelines"}
    assert {name: ast.literal_eval(value) for name, value in stated.items()} == {
        name: actual[name].default for name in stated
    }
