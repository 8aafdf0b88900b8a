"""The command `slipstream pack`: what it prints of a share, and what it takes."""

import re

import tar_samples
from pack_sets import write_images

from slipstream.cli import main


def test_pack_says_what_a_rank_did_and_what_is_left(tmp_path, capsys):
    images = write_images(tmp_path / "images", 30)
    (images / "class2" / "029.jpg").unlink()
    (images / "class2" / "029.jpg").symlink_to("nowhere")
    command = ["pack", str(images), str(tmp_path / "chunks"), "--chunk-size", "5KB", "--on-error", "skip"]
    assert main([*command, "--rank", "1", "--world-size", "2", "--workers", "2"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert re.match(r"rank 1 of 2: packed 1\d samples in ", first)
    assert re.fullmatch(r"left out: 1 samples, listed in skipped.json once it is whole; ids differ .*", second)
    assert re.match(
        r"not whole yet: \d blocks are left to other ranks; so far 1\d samples, 0 MB in \d chunks in ", third
    )
    assert main([*command, "--rank", "0", "--world-size", "2"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("rank 0 of 2: packed 1")
    assert second.startswith(f"left out: 1 samples, listed in {tmp_path / 'chunks' / 'skipped.json'}; ids differ")
    assert third.startswith("29 samples, 0 MB in ")
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("packed 0 samples in ")


def test_shards_by_a_glob(tmp_path, capsys):
    tar_samples.write_set(tmp_path / "shards")
    shards = str(tmp_path / "shards" / "train-*.tar")
    assert main(["pack", shards, str(tmp_path / "chunks"), "--exclude-field", "emb.npy"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("12 samples")
    for source in (shards, str(tmp_path / "chunks")):
        assert main(["inspect", source]) == 0
        assert capsys.readouterr().out.startswith(f"{source}: 12 samples, all looked at\n")
