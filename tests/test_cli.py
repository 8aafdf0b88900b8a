"""The command as users run it: help at once, errors on one line, a demo whose lines and picture say what happened."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slipstream import __version__, demo
from slipstream.cli import main
from slipstream.dataset import SlipstreamDataset

SMALL = ["--device", "cpu", "--batch-size", "4", "--steps", "2"]
CROPS = {f"global_{i}": ("[4, 3, 224, 224]", "float32") for i in range(2)}
CROPS |= {f"local_{i}": ("[4, 3, 96, 96]", "uint8") for i in range(4)}


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slipstream", *arguments], cwd=cwd, capture_output=True, text=True, timeout=200
    )


def image_folder(folder: Path, count: int = 3) -> Path:
    rng = np.random.default_rng(count)
    for number in range(count):
        (folder / f"class_{number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + 8 * number, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"class_{number % 2}" / f"{number}.jpg")
    return folder


@pytest.fixture
def shown(monkeypatch) -> dict[str, Any]:
    """What the demo gives to plot_crops."""
    shown = {}
    plot = demo.plot_crops
    monkeypatch.setattr(
        demo, "plot_crops", lambda batch, **rest: shown.update(rest, batch=batch) or plot(batch, **rest)
    )
    return shown


def check_output(printed: str, sheet: Path) -> None:
    lines = [line.split("  ") for line in printed.splitlines()]
    table = {line[0].strip(): [cell.strip() for cell in line[1:] if cell] for line in lines if len(line) > 3}
    for name, (shape, dtype) in CROPS.items():
        assert table[name][:2] == [shape, dtype]
        low, high = map(float, table[name][2].split(" to "))
        assert (low < 0 < high < 3) if dtype == "float32" else (0 <= low < high <= 255)
        assert re.fullmatch(r"[0-4] of 4", table[name][3])
    rate = r"\s+([\d,]+) images/s"
    decode = re.search(rf"^decode only{rate}$", printed, re.MULTILINE)
    crops = re.search(rf"^decode and six crops{rate}  \((\d+)% of decode only\)$", printed, re.MULTILINE)
    assert decode is not None
    assert crops is not None
    speeds = [float(found[1].replace(",", "")) for found in (decode, crops)]
    assert min(speeds) > 0
    assert abs(100 * speeds[1] / speeds[0] - int(crops[2])) <= 1 + 100 / speeds[0]
    assert re.search(r"batch size 4, \d+ CPU thread\(s\), 2 steps after 3 of warm-up", printed)
    assert printed.rstrip().endswith(f"contact sheet: {sheet}")
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > 600
    assert len(np.unique(pixels @ [1, 256, 65536])) > 1000
    for color in ((0xD6, 0x27, 0x28), (0x1F, 0x77, 0xB4), (0x2C, 0xA0, 0x2C)):  # boxes of the first three crops
        assert (np.abs(pixels - color).max(2) < 8).sum() > 500


def test_the_console_script_is_main():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="slipstream")
    assert script.load() is main


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"slipstream {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["demo", "pack", "inspect", "--version"]),
        (["demo", "--help"], ["--data", "--device", "--batch-size", "--steps", "--out", "s3://", "examples:"]),
        (
            ["pack", "--help"],
            ["SRC", "DST", "--chunk-size", "--workers", "--rank", "--world-size", "--format", "examples:"],
        ),
        (["pack", "--help"], ["--field", "--exclude-field", "--on-error", "Slurm", "torchrun", "aws s3 sync"]),
        (["inspect", "--help"], ["SOURCE", "--limit", "--seed", "--decode", "--json", "--field", "examples:", "S3"]),
    ],
)
def test_help_names_everything_within_80_columns(arguments, expected, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    printed = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert [word for word in expected if word not in printed] == []
    assert max(map(len, printed.splitlines())) <= 80


def test_help_loads_no_heavy_module(tmp_path):
    program = (
        "import sys; from slipstream.cli import main\n"
        "try: main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "print('loaded:', *sorted({'torch', 'numpy', 'nvidia.dali', 'litdata', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "'frobnicate' (choose from"),
        (["demo", "--bogus"], "--bogus"),
        (["demo", "--step", "3"], "--step"),
        (["demo", "--steps", "0"], "--steps: must be a whole number of 1 or more, got '0'"),
        (["demo", "--batch-size", "many"], "--batch-size: must be a whole number of 1 or more, got 'many'"),
        (["demo", "--data", "nowhere"], "'nowhere' does not exist"),
        (["demo", "--data", "ftp://host/x"], "ftp:// is not supported"),
        (["demo", "--data", "empty"], "holds no image file"),
        (["demo", "--data", "images", "--device", "tpu"], "device must be"),
        (["demo", "--data", "images", "--out", "images/class_0/0.jpg"], "File exists: images/class_0/0.jpg"),
        (["demo", "--data", "broken", *SMALL], "broken/1.jpg"),
        (["pack", "images"], "DST"),
        (["pack", "nowhere", "new"], "nowhere"),
        (["pack", "empty", "new"], "holds no image file"),
        (["pack", "images", "images"], "is not an empty folder"),
        (["pack", "images", "images/new"], "must not lie in src"),
        (["pack", "images", "s3://bucket/new"], "aws s3 sync FOLDER s3://bucket/new"),
        (["pack", "images", "new", "--chunk-size", "much"], "chunk_bytes must be a number of bytes"),
        (["pack", "images", "new", "--rank", "0"], "rank and world_size must be given together"),
        (["pack", "images", "new", "--on-error", "grey"], "--on-error: invalid choice: 'grey'"),
        (["pack", "images", "new", "--exclude-field", "depth"], "exclude_fields has 'depth'"),
        (
            ["pack", "gone", "new"],
            "gone/0.jpg): No such file or directory; mend or remove it, or give --on-error skip",
        ),
        (["pack", "none-*.tar", "new"], "there is no"),
        (["inspect"], "SOURCE"),
        (["inspect", "nowhere"], "'nowhere' does not exist"),
        (["inspect", "a-*.tar"], "there is no"),
        (["inspect", "empty"], "holds no image file"),
        (["inspect", "images", "--limit", "0"], "--limit: must be a whole number of 1 or more, got '0'"),
        (["inspect", "images", "--field", "label"], "field must be one of the source's image fields ['image']"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images")
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "0.jpg").symlink_to("nowhere")
    (tmp_path / "broken").mkdir()
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / "broken" / name).write_bytes((tmp_path / "images" / "class_0" / "0.jpg").read_bytes())
    (tmp_path / "broken" / "1.jpg").write_bytes((tmp_path / "broken" / "1.jpg").read_bytes()[:700])
    try:
        code = main(arguments)
    except SystemExit as exit_info:
        code = exit_info.code
    errors = capsys.readouterr().err
    assert code == 2
    assert message in errors
    assert errors.startswith("slipstream")
    assert errors.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_reader_that_ends_early_is_no_error(tmp_path):
    image_folder(tmp_path / "images")
    for unbuffered in ("", "1"):
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        shell = f"({sys.executable} -m slipstream inspect images 2>errors; echo $? >code) | true"
        subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=environment, check=True, timeout=100)
        assert (tmp_path / "code").read_text() == "141\n"
        assert "rror" not in (tmp_path / "errors").read_text()


def test_an_error_of_a_subprocess_shows_no_traceback(tmp_path):
    done = run("demo", "--data", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "slipstream demo: error: source 'nowhere' does not exist\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def faulty(*_: object, **__: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(demo, "run_demo", faulty)
    with pytest.raises(AssertionError, match="ours"):
        main(["demo"])


@pytest.mark.parametrize(
    ("missing", "data", "message"),
    [
        ({"skimage"}, [], "the demo needs scikit-image: pip install scikit-image"),
        ({"skimage", "sklearn", "matplotlib"}, [], "pip install matplotlib scikit-learn scikit-image"),
        ({"skimage", "matplotlib"}, ["--data", "."], "the demo needs matplotlib: pip install matplotlib\n"),
    ],
    ids=["one", "all", "with data"],
)
def test_missing_packages_are_named_with_the_command(missing, data, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = demo.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name in missing else found(name))
    assert main(["demo", *data]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_photographs_are_whole_and_made_once(tmp_path, monkeypatch):
    folder = demo.make_photographs(tmp_path / "set")
    dataset = SlipstreamDataset(folder, decode_images=True)
    names = {path.split("/")[-1] for path in (sample["path"] for sample in dataset)}
    assert names == {
        f"{name}.jpg"
        for name in ("china", "flower", "rocket", "retina", "hubble_deep_field", "astronaut", "chelsea", "coffee")
    }
    assert [sample["label"] for sample in dataset] == [0] * 6 + [1] * 2
    for sample in dataset:
        assert min(sample["image"].shape[1:]) >= 300
        assert sample["image"].float().std() > 20
    monkeypatch.setattr(demo, "pack", None)
    assert demo.make_photographs(tmp_path / "set") == folder


def test_demo_on_the_photographs(tmp_path):
    done = run("demo", *SMALL, "--out", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_output(
        done.stdout.replace("made/crops.png", str(tmp_path / "made" / "crops.png")), tmp_path / "made/crops.png"
    )
    assert "made/photographs: 8 images, repeated to fill 5 batches of 4" in done.stdout
    assert SlipstreamDataset(tmp_path / "made" / "photographs").fields["image"] == "image"


def test_demo_on_a_folder_of_images_and_on_what_pack_makes_of_it(tmp_path, capsys):
    images = image_folder(tmp_path / "images", count=30)
    assert main(["pack", str(images), str(tmp_path / "chunks")]) == 0
    packed = capsys.readouterr()
    lines = packed.out.splitlines()
    assert re.fullmatch(r"packed 30 samples in \d+\.\d s \([\d,]+ samples/s, \d+ MB/s\)", lines[0])
    assert lines[1:] == [f"30 samples, 0 MB in 1 chunks in {tmp_path / 'chunks'}"]
    assert "30/30" in packed.err  # the progress bar
    tables = []
    for data in (images, tmp_path / "chunks"):
        assert main(["demo", "--data", str(data), "--out", str(tmp_path / "out"), *SMALL]) == 0
        printed = capsys.readouterr()
        check_output(printed.out, tmp_path / "out" / "crops.png")
        assert f"{data}: 30 images, 20 of them used" in printed.out
        tables.append([line for line in printed.out.splitlines() if line.startswith(("global", "local"))])
    assert tables[0] == tables[1]  # the same samples, so the same crops


def test_inspect_prints_text_or_json_and_a_bar(tmp_path, capsys):
    images = image_folder(tmp_path / "images", count=5)
    (images / "class_1" / "3.jpg").write_bytes((images / "class_1" / "3.jpg").read_bytes()[:700])
    assert main(["inspect", str(images)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{images}: 5 samples, all looked at\n")
    assert "nothing was decoded: --decode does that" in printed.out
    assert "5/5" in printed.err
    assert main(["inspect", str(images), "--decode", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["source"], found["looked_at"], found["formats"]) == (str(images), 5, {"jpeg": 5})
    ((sample_id, path, reason),) = found["undecodable"]
    assert (sample_id, path) == (4, str(images / "class_1" / "3.jpg"))
    assert reason
    assert main(["inspect", str(images), "--limit", "2", "--seed", "3"]) == 0
    assert "2 of them looked at (a random subset, seed 3)" in capsys.readouterr().out


def test_demo_on_s3(tmp_path, monkeypatch, capsys, shown):
    import boto3  # not above: a GPU machine may lack what its own test does not need
    from moto.server import ThreadedMotoServer

    assert main(["pack", str(image_folder(tmp_path / "images", count=6)), str(tmp_path / "chunks")]) == 0
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        settings = {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "SLIPSTREAM_CACHE": str(tmp_path / "cache"),
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="photos")
        for path in (tmp_path / "chunks").iterdir():
            client.upload_file(str(path), "photos", f"val/{path.name}")
        client.close()
        assert main(["demo", "--data", "s3://photos/val/", "--out", str(tmp_path / "out"), *SMALL]) == 0
        check_output(capsys.readouterr().out, tmp_path / "out" / "crops.png")
        assert shown["batch"]["_indices"].tolist() == [0, 1, 2, 3]  # in order, so that few chunks are fetched
        assert main(["demo", "--data", "s3://photos/absent/", "--out", str(tmp_path / "out"), *SMALL]) == 2
        assert "s3://photos/absent/index.json does not exist" in capsys.readouterr().err
    finally:
        server.stop()


def test_the_sheet_has_each_image_once_below_its_own_source(tmp_path, shown):
    folder = str(image_folder(tmp_path / "images", count=3))
    demo.run_demo(folder, device="cpu", batch_size=8, steps=1, out=tmp_path)
    ids = shown["batch"]["_indices"].tolist()
    assert sorted(ids) == [0, 1, 2]
    decoded = SlipstreamDataset(folder, decode_images=True)
    crop_stage, named_stages = demo.dino_stages()
    for position, sample_id in enumerate(ids):
        assert torch.equal(shown["sources"][position], decoded[sample_id]["image"])
    crops = crop_stage.__class__(crop_stage.crops, seed=0, return_boxes=True)(shown["sources"], sample_ids=ids)
    for name in CROPS:  # a box is drawn where the sheet is given one
        assert torch.equal(shown["batch"][f"{name}_box"], crops[f"{name}_box"])
    flipped = shown["batch"]["local_3_flip"].view(-1, 1, 1, 1)
    assert len(named_stages.pipelines) == len(CROPS)
    assert torch.equal(shown["batch"]["local_3"], torch.where(flipped, crops["local_3"].flip(-1), crops["local_3"]))


def test_fields_that_the_demo_does_not_need_are_not_read(tmp_path, shown):
    from litdata.streaming.writer import BinaryWriter

    image = (image_folder(tmp_path / "images") / "class_0" / "0.jpg").read_bytes()
    writer = BinaryWriter(str(tmp_path / "chunks"), chunk_size=4)
    for position in range(4):
        writer[position] = {"what": object, "jpg": image, "n": position}
    writer.done()
    writer.merge()
    demo.run_demo(str(tmp_path / "chunks"), device="cpu", batch_size=4, steps=1, out=tmp_path)
    assert "what" not in shown["batch"]
    assert len(shown["sources"]) == 4


def test_a_large_folder_is_sampled_throughout(tmp_path, shown):
    demo.run_demo(str(image_folder(tmp_path / "images", count=40)), device="cpu", batch_size=6, steps=1, out=tmp_path)
    assert max(shown["batch"]["_indices"].tolist()) >= 20


def test_only_the_steps_after_the_warm_up_are_timed():
    class Loader:
        device = torch.device("cpu")

        def __iter__(self):
            for step in range(5):
                if step < 3:
                    clock[0] += 100.0
                else:
                    clock[0] += 0.5
                yield {"_indices": torch.arange(4), "image": [torch.zeros(3, 10, 20)] * 4, "step": step}

    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.time, "perf_counter", lambda: clock[0])
        measured = demo._measure(Loader(), "image")
    assert (measured.images, measured.seconds, measured.pixels) == (8, 1.0, 1600)
    assert measured.images_per_second == 8
    assert measured.first["step"] == 0


@pytest.mark.gpu
def test_demo_on_a_gpu(tmp_path, capsys):
    data = str(image_folder(tmp_path / "images"))
    assert main(["demo", "--data", data, "--out", str(tmp_path), *SMALL, "--device", "cuda"]) == 0
    printed = capsys.readouterr().out
    check_output(printed, tmp_path / "crops.png")
    assert torch.cuda.get_device_name() in printed
