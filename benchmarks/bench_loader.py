"""Images a second of the whole way on the CPU, files in RAM to batches: slipstream and torch's DataLoader from JPEGs,
and slipstream from what `pack --format yuv420` makes of them, at their size and at a short side of 256.

Every peer is an iterable of batches, one epoch each time it is iterated. Epochs are interleaved, so that what else the
machine does falls on all alike, and every peer's batches are checked before it is timed: slipstream's crops with the
two-pass Pillow oracle at the boxes it returned, byte for byte; the DataLoader's by shape, dtype and mean. From stored
YUV "decode" is its conversion to RGB, which crops do without.

On two cores of an AMD EPYC (Zen 4), 2026-11-24, 683873f, 108 ImageNet photographs, images/s: slipstream decodes 1323,
1x224 1162 (88 % of that), DINO-6 856 (65 %), its globals normalised 640 (48 %); the DataLoader 735, 906, 524 and 382;
from stored YUV 5589, 1769 and 933, with a short side of 256 7571, 2720 and 1225. Every sample is in
results/loader-cpu.json.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import photographs
import record
import torch
from torchvision import io
from torchvision.transforms import v2

from slipstream import MultiCropPipeline, MultiRandomResizedCrop, Normalize, SlipstreamDataset, SlipstreamLoader
from slipstream.pack import pack
from slipstream.stage import IMAGENET_MEAN, IMAGENET_STD

DINO_6 = {
    **{f"global_{index}": {"size": 224, "scale": (0.4, 1.0)} for index in range(2)},
    **{f"local_{index}": {"size": 96, "scale": (0.05, 0.4)} for index in range(4)},
}
GLOBALS = ("global_0", "global_1")
WORKERS = 2
# Both draw boxes from one law, so between their crops' means of a photograph there is chance (so many standard errors
# of the differences' mean are allowed), and between two JPEG decoders rounding (so much of 255).
STANDARD_ERRORS, ROUNDING = 5.0, 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is made of each image: crops by name (none: the decoded image), and which of them are normalised."""

    crops: dict[str, dict[str, Any]]
    normalised: tuple[str, ...] = ()

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.normalised else torch.uint8


WORKS = {
    "decode": Work(crops={}),
    "1x224": Work(crops={"crop": {"size": 224}}),
    "DINO-6": Work(crops=DINO_6),
    "DINO-6 normalised": Work(crops=DINO_6, normalised=GLOBALS),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """How long an epoch is: `images` of a folder's photographs, repeated in turn, in batches of `batch_size`."""

    folder: Path
    images: int
    batch_size: int


STORED = {"slipstream, stored YUV": None, "slipstream, stored YUV 256": 256}


def place_of(epoch: Epoch, provider: str) -> Path:
    """Where a provider's images are: the photographs' folder, or what is packed beside it."""
    return epoch.folder.parent / provider.replace(" ", "-") if provider in STORED else epoch.folder


def slipstream_loader(
    epoch: Epoch, work: Work, provider: str = "slipstream", *, return_boxes: bool = False
) -> SlipstreamLoader:
    """Slipstream on the CPU with two threads."""
    count = len(photographs.paths(epoch.folder))
    pipelines = None
    if work.crops:
        crops = MultiRandomResizedCrop(work.crops, return_boxes=return_boxes)
        pipelines = {"image": [crops, MultiCropPipeline({name: [Normalize()] for name in work.normalised})]}
    return SlipstreamLoader(
        SlipstreamDataset(local_dir=place_of(epoch, provider), indices=np.arange(epoch.images) % count),
        epoch.batch_size,
        shuffle=True,
        pipelines=pipelines,
        exclude_fields=["path"],
        device="cpu",
        num_threads=WORKERS,
        verbose=False,
    )


class Photographs(torch.utils.data.Dataset):
    """torchvision's way: one JPEG decoded once, then each crop by v2's transforms, in a worker process."""

    def __init__(self, epoch: Epoch, work: Work) -> None:
        found = photographs.paths(epoch.folder)
        classes = sorted({path.parent.name for path in found})
        labels = [classes.index(path.parent.name) for path in found]
        self._files = [(str(path), label, index) for index, (path, label) in enumerate(zip(found, labels, strict=True))]
        self._images = epoch.images
        self._crops = {name: _transform(work, name) for name in work.crops}

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, position: int) -> dict[str, Any]:
        path, label, index = self._files[position % len(self._files)]
        image: Any = io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)
        sample = {name: transform(image) for name, transform in self._crops.items()} or {"image": image}
        return {**sample, "label": label, "_indices": index}


def _transform(work: Work, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    crop = v2.RandomResizedCrop(**work.crops[name], antialias=True)
    if name not in work.normalised:
        return crop
    return v2.Compose([crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize([*IMAGENET_MEAN], [*IMAGENET_STD])])


def _as_lists(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {key: torch.tensor([sample[key] for sample in samples]) for key in ("label", "_indices")}
    return {**batch, "image": [sample["image"] for sample in samples]}


def data_loader(epoch: Epoch, work: Work) -> torch.utils.data.DataLoader:
    """torch's DataLoader with two workers (each of which runs torch on one thread) on torchvision v2."""
    return torch.utils.data.DataLoader(
        Photographs(epoch, work),
        batch_size=epoch.batch_size,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
        collate_fn=None if work.crops else _as_lists,
    )


# The DataLoader comes first: its workers are forked before DALI's threads exist.
PROVIDERS: dict[str, Callable[[Epoch, Work], Iterable[dict[str, Any]]]] = {
    "DataLoader": data_loader,
    "slipstream": slipstream_loader,
    **{name: functools.partial(slipstream_loader, provider=name) for name in STORED},
}


def check_slipstream(epoch: Epoch, work: Work, provider: str = "slipstream") -> dict[str, np.ndarray]:
    """Every photograph's crops against the oracle, bit for bit; gives each crop's mean by photograph, in [0, 255].

    Raises AssertionError.
    """
    files = photographs.paths(epoch.folder)
    stored = SlipstreamDataset(place_of(epoch, provider), decode_images=True) if provider in STORED else None
    once = Epoch(folder=epoch.folder, images=len(files), batch_size=epoch.batch_size)
    means = {name: np.full(len(files), np.nan) for name in work.crops or ("image",)}
    with slipstream_loader(once, work, provider, return_boxes=True) as loader:
        for batch in loader:
            for row, sample_id in enumerate(batch["_indices"].tolist()):
                if stored is None:
                    pixels = photographs.decoded(files[sample_id])
                else:
                    pixels = stored[sample_id]["image"].permute(1, 2, 0).numpy()
                for name, mean in means.items():
                    expected = pixels
                    if work.crops:
                        size = work.crops[name]["size"]
                        box = tuple(batch[f"{name}_box"][row].tolist())
                        expected = photographs.two_passes(pixels, box, (size, size), bicubic=False)
                    mean[sample_id] = expected.mean()
                    wanted = torch.from_numpy(expected.copy()).permute(2, 0, 1)
                    if name in work.normalised:
                        wanted = v2.functional.to_dtype(wanted, torch.float32, scale=True)
                        wanted = v2.functional.normalize(wanted, [*IMAGENET_MEAN], [*IMAGENET_STD])
                    got = batch[name][row]
                    assert got.dtype == work.dtype(name), (name, got.dtype)
                    assert torch.equal(got, wanted), f"{name} of {files[sample_id].name} differs from the oracle"
    for name, mean in means.items():
        assert not np.isnan(mean).any(), f"{name}: an epoch must give every photograph"
    return means


def check_data_loader(
    loader: Iterable[dict[str, Any]], epoch: Epoch, work: Work, expected: dict[str, np.ndarray]
) -> None:
    """One epoch's shapes, dtypes and, photograph by photograph, means. Raises AssertionError."""
    totals = {name: np.zeros_like(means) for name, means in expected.items()}
    counts = np.zeros(len(photographs.paths(epoch.folder)))
    for batch in loader:
        indices = batch["_indices"].numpy()
        np.add.at(counts, indices, 1)
        for name, total in totals.items():
            size = work.crops[name]["size"] if work.crops else None
            for index, image in zip(indices, batch[name], strict=True):
                assert image.dtype == work.dtype(name), (name, image.dtype)
                assert image.shape[0] == 3, (name, image.shape)
                assert size is None or image.shape[1:] == (size, size), (name, image.shape)
                means = image.double().mean((1, 2))
                if name in work.normalised:
                    means = (means * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)) * 255
                total[index] += means.mean().item()
    assert counts.sum() == epoch.images, (counts.sum(), epoch.images)
    for name, means in expected.items():
        seen = counts > 0
        difference = totals[name][seen] / counts[seen] - means[seen]
        allowed = ROUNDING + STANDARD_ERRORS * difference.std() / seen.sum() ** 0.5
        assert abs(difference.mean()) < allowed, (
            f"{name}: means differ by {difference.mean():.2f}, {allowed:.2f} is chance"
        )


def images_per_second(peer: Iterable[dict[str, Any]]) -> float:
    """One epoch's rate, its start and end counted in."""
    begin = time.perf_counter()
    count = sum(len(batch["label"]) for batch in peer)
    return count / (time.perf_counter() - begin)


def measure(epoch: Epoch, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Images a second by provider and work, one number for each of the interleaved rounds."""
    peers = {
        (provider, name): make(epoch, work) for provider, make in PROVIDERS.items() for name, work in WORKS.items()
    }
    try:
        for peer in (peer for (provider, _), peer in peers.items() if provider == "DataLoader"):
            next(iter(peer))
        for name, work in WORKS.items():
            means = check_slipstream(epoch, work)
            for provider in STORED:
                check_slipstream(epoch, work, provider)
            check_data_loader(peers["DataLoader", name], epoch, work, means)
            print(f"checked: {name}", flush=True)
        for (provider, _), peer in peers.items():
            if provider != "DataLoader":
                images_per_second(peer)  # the DataLoader's warm-up was its check
        samples = {provider: {name: [] for name in WORKS} for provider in PROVIDERS}
        for turn in range(rounds):
            for (provider, name), peer in peers.items():
                samples[provider][name].append(images_per_second(peer))
            print(f"round {turn + 1} of {rounds}", flush=True)
        return samples
    finally:
        for peer in peers.values():
            if isinstance(peer, SlipstreamLoader):
                peer.shutdown()


def ratios(samples: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Medians over decode-only, and over the DataLoader at the same work."""
    median = {
        (provider, name): record.summary(values)["median"]
        for provider, works in samples.items()
        for name, values in works.items()
    }
    ours = {name: median["slipstream", name] for name in WORKS}
    return {
        **{f"{name} / decode": ours[name] / ours["decode"] for name in WORKS if name != "decode"},
        **{f"{name} / DataLoader": ours[name] / median["DataLoader", name] for name in WORKS},
        **{
            f"{name}, {provider.partition(', ')[2]} / JPEG": median[provider, name] / ours[name]
            for provider in STORED
            for name in WORKS
            if name != "decode"
        },
    }


def main() -> None:
    """Measure, print, and save where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder with one folder of JPEGs for each class")
    parser.add_argument("--images", type=int, default=2048, help="images an epoch (2048)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each peer (5)")
    parser.add_argument("--out", metavar="NAME", help="save as benchmarks/results/NAME.json")
    given = parser.parse_args()
    with photographs.in_memory(given.data) as folder:
        epoch = Epoch(folder=folder, images=given.images, batch_size=given.batch_size)
        files = photographs.paths(folder)
        data = {"photographs": len(files), "bytes": sum(path.stat().st_size for path in files)}
        result = {"benchmark": "loader", **record.circumstances()}
        for provider, short_side in STORED.items():
            place = place_of(epoch, provider)
            data[provider] = pack(folder, place, format="yuv420", short_side=short_side, progress=False).n_bytes
        samples = measure(epoch, given.rounds)
    settings = {"images": epoch.images, "batch_size": epoch.batch_size, "workers": WORKERS, "data": data}
    result |= {"unit": "images/s", "settings": settings, "samples": samples, "ratios": ratios(samples)}
    print(f"\nimages/s on two threads: median (min - max) of {given.rounds} epochs of {epoch.images}")
    for provider, works in samples.items():
        for name, values in works.items():
            s = record.summary(values)
            print(f"{provider:26} {name:20} {s['median']:8.0f} ({s['min']:.0f} - {s['max']:.0f})")
    for name, value in result["ratios"].items():
        print(f"{name:40} {value:6.2f}")
    if given.out:
        print(record.write(given.out, record.RESULTS, result))


if __name__ == "__main__":
    main()
