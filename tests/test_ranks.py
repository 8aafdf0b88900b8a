"""Real processes under torchrun: the ranks' samples are the dataset, without overlap, the same bytes as one rank's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image
from test_resume import COUNT, folder, make, samples  # noqa: F401  (folder is a fixture)
from torch import distributed

from slipstream import SlipstreamDataset, SlipstreamLoader

RANK = textwrap.dedent(
    """
    import json, os, sys
    sys.path[:0] = [{tests!r}]
    from pathlib import Path
    import torch.distributed as distributed
    from test_resume import make, samples

    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")  # from torch.distributed, then
    result = {{}}
    for tail in ("pad", "uneven", "drop"):
        with make(Path(sys.argv[1]), batch_size=12 // world, tail=tail, num_threads=1) as loader:
            assert (loader.rank, loader.world_size) == (rank, world)
            steps = [[[n, float(crop.double().sum())] for n, crop in samples([batch])] for batch in loader]
            if tail == "pad":  # every rank takes as many steps, so none waits here for ever
                for _ in steps:
                    distributed.barrier()
            result[tail] = steps
    Path(sys.argv[2], f"{{rank}}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()
    """
)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_ranks_share_the_epoch(folder: Path, tmp_path: Path, world: int) -> None:  # noqa: F811
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    subprocess.run([*command, script, folder, tmp_path], check=True, timeout=200)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    with make(folder, batch_size=12) as loader:
        steps = [[(number, float(crop.double().sum())) for number, crop in samples([batch])] for batch in loader]
    for tail in ("pad", "uneven", "drop"):
        taken = [[tuple(pair) for step in each[tail] for pair in step] for each in ranks]
        together = [pair for each in taken for pair in each]
        expected = [pair for step in steps for pair in step]
        if tail == "drop":
            expected = expected[: COUNT // 12 * 12]
        assert len(together) == len(set(together)) == len(expected)
        assert sorted(together) == sorted(expected)
    for number, step in enumerate(steps):  # the same global batch at each step
        parts = [tuple(pair) for each in ranks for pair in (each["pad"][number] if number < len(each["pad"]) else [])]
        assert sorted(parts) == sorted(step)


def test_a_loader_made_before_the_process_group_is_told(folder: Path, monkeypatch) -> None:  # noqa: F811
    with make(folder) as early, make(folder, rank=0, world_size=1) as alone:
        next(iter(early))
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_rank", lambda: 1)
        monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
        with pytest.raises(RuntimeError, match=r"as rank 0 of 1, and torch.distributed has rank 1 of 2: make it after"):
            iter(early)
        assert len(list(alone)) == 10
        with make(folder) as late:
            assert len(list(late)) == 5


def test_one_rank_of_many_prints_the_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    for rank in (0, 1):
        SlipstreamLoader(SlipstreamDataset(folder), 4, device="cpu", rank=rank, world_size=2).shutdown()
    assert re.fullmatch(r"slipstream: 37 samples \(found in .* s\), batches of 4 on cpu\n", capsys.readouterr().out)


def test_the_line_counts_a_folders_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train/cat", "train/dog", "val/cat"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name / "0.jpg")
    for place, line in (
        (tmp_path, "3 samples of 2 classes (found "),
        (tmp_path / "val", "1 samples of 1 classes (found "),
    ):
        SlipstreamLoader(SlipstreamDataset(place), 4, device="cpu").shutdown()
        assert capsys.readouterr().out.startswith(f"slipstream: {line}")


def test_an_epoch_without_a_batch_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    make(folder, batch_size=18, drop_last=True, rank=0, world_size=2).shutdown()
    assert not caplog.records
    make(folder, batch_size=19, drop_last=True, rank=0, world_size=2).shutdown()
    assert "an epoch has no batch: tail='drop', and 37 samples do not fill a step of 2 x 19" in caplog.text
