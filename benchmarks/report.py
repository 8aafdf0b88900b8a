"""Prints results as Markdown tables: those of README.md, from the JSON files in benchmarks/results.

report.py [--results FOLDER] [NAME ...] prints the named files' tables, or every file's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import record

Result = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def loader_tables(result: Result) -> list[str]:
    """Images a second by peer and work, and the ratios."""
    settings = result["settings"]
    works = list(next(iter(result["samples"].values())))
    rows = []
    for provider, samples in result["samples"].items():
        cells = [record.summary(samples[name]) for name in works]
        rows.append([provider, *(f"{s['median']:.0f} ({s['min']:.0f} - {s['max']:.0f})" for s in cells)])
    rounds = len(result["samples"]["slipstream"]["decode"])
    return [
        f"Images/s on {settings['workers']} threads, median (min - max) of {rounds} interleaved epochs of "
        f"{settings['images']} images. {circumstances(result)}",
        table(["", *works], rows),
        table(["ratio", ""], [[name, f"{value:.2f}"] for name, value in result["ratios"].items()]),
    ]


def pack_tables(result: Result) -> list[str]:
    """MB a second by work and peer."""
    peers = list(next(iter(result["samples"].values())))
    rows = []
    for work, samples in result["samples"].items():
        cells = [record.summary(samples[peer]) for peer in peers]
        rows.append([work, *(f"{s['median']:.0f} ({s['min']:.0f} - {s['max']:.0f})" for s in cells)])
    rounds = len(result["samples"][rows[0][0]][peers[0]])
    return [
        f"MB/s of images packed, median (min - max) of {rounds} interleaved rounds. {circumstances(result)}",
        table(["", *peers], rows),
    ]


def fetch_tables(result: Result) -> list[str]:
    """Seconds of an epoch from an empty cache by order and limit, and ranged GETs a second."""
    rows: dict[tuple[str, str], dict[str, list[float]]] = {}
    for epoch in result["epochs"]:
        case = (json.dumps(epoch["shuffle"]), epoch["max_cache_size"] or "none")
        rows.setdefault(case, {}).setdefault(epoch["code"], []).append(epoch["epoch_s"])
    codes = list(result["codes"])
    cells = [
        [*case, *(milliseconds(record.summary(times[code])) if code in times else "" for code in codes)]
        for case, times in rows.items()
    ]
    gets = [[f"{each['delay_s']:g}", str(each["threads"]), str(each["per_s"])] for each in result["ranged_gets"]]
    return [
        f"Seconds of an epoch of {result['samples']} samples from a store {result['delay_s']:g} s away, empty cache, "
        f"median (min - max). {circumstances(result)}",
        table(["shuffle", "max_cache_size", *(f"{code} ({result['codes'][code]})" for code in codes)], cells),
        table(["ranged GETs: delay, s", "threads", "a second"], gets),
    ]


def crop_tables(result: Result) -> list[str]:
    """Milliseconds of a batch by provider, one row for each set of crops, from pytest-benchmark's file."""
    cells: dict[str, dict[str, str]] = {}
    for benchmark in result["benchmarks"]:
        images = benchmark["extra_info"]["images"]
        seconds = benchmark["stats"]["median"]
        rate = benchmark["extra_info"]["bytes"] / seconds / 1e9
        cell = f"{seconds / images * 1e6:.0f} ({rate:.2f})"
        cells.setdefault(benchmark["group"], {})[benchmark["params"]["provider"]] = cell
    providers = list(dict.fromkeys(name for row in cells.values() for name in row))
    count = result["benchmarks"][0]["extra_info"].get("threads", 1)
    threads = "one thread" if count == 1 else f"{count} threads"
    return [
        f"Microseconds an image on {threads}, median (and GB/s of the bytes that must move). "
        f"{circumstances(result['machine_info'])}",
        table(["", *providers], [[group, *(row.get(name, "") for name in providers)] for group, row in cells.items()]),
    ]


def gpu_crop_tables(result: Result) -> list[str]:
    """The launches against the copy, the launch options, the peers: what there is of them."""
    errors = [f"{name}: {part['error']}" for name, part in result.items() if isinstance(part, dict) and "error" in part]
    result = {name: part for name, part in result.items() if not isinstance(part, dict) or "error" not in part}
    about = [f"{result['settings']['images']} ragged images, DINO's ten crops, bicubic, bfloat16:"]
    about.append(f"{result['moved_bytes'] / 1e6:.0f} MB must move.")
    tables = []
    if launch := result.get("launch"):
        rate, of_copy = launch["bytes_per_second"] / 1e9, f"{launch['fraction_of_copy']:.1%}"
        about.append(f"{rate:.0f} GB/s are {of_copy} of a copy's {result['copy']['bytes_per_second'] / 1e9:.0f} GB/s.")
        rows = [[name, milliseconds(times)] for name, times in launch["milliseconds"].items()]
        rows.append(["both launches", f"{launch['launches_milliseconds']:.3f}"])
        tables.append(table(["on the device", "ms (min - max)"], rows))
    options = [
        [
            " x ".join(str(row["options"][f"BLOCK_{axis}"]) for axis in "HW"),
            str(row["options"]["num_warps"]),
            str(row["options"].get("maxnreg", "")),
            row.get("error") or f"{row['launches_milliseconds']:.3f}",
            "" if "error" in row else f"{row['fraction_of_copy']:.1%}",
        ]
        for row in sorted(result.get("options", ()), key=lambda row: row.get("launches_milliseconds", 1e9))
    ]
    if options:
        tables.append(table(["BLOCK_H x W", "warps", "maxnreg", "ms", "of the copy"], options))
    peers = [[name, times.get("error") or milliseconds(times)] for name, times in result.get("peers", {}).items()]
    if peers:
        tables.append(table(["by the host's clock", "ms (min - max)"], peers))
    return [" ".join([*about, circumstances(result)]), *errors, *tables]


def gpu_recipe_tables(result: Result) -> list[str]:
    """Recipes by clock and bytes, each recipe's launches, DINOv2's peers."""
    recipes, errors, launches = [], [], []
    for name, measured in result["recipes"].items():
        if "error" in measured:
            errors.append(f"{name}: {measured['error']}")
            continue
        recipes.append(
            [
                name,
                *(milliseconds(measured["milliseconds"][clock]) for clock in ("device", "host", "call")),
                f"{len(measured['launches'])} ({len(measured['explained'])})",
                f"{measured['moved_bytes'] / 1e6:.0f} ({measured['fewest_bytes'] / 1e6:.0f})",
                f"{measured['fewest_fraction_of_copy']:.1%}",
            ]
        )
        for row in measured["launches"]:
            known = "read" in row
            moved = f"{(row['read'] + row['written']) / 1e6:.0f}" if known else ""
            share = f"{row['fraction_of_copy']:.1%}" if known else ""
            launches.append([f"{name}: {row['kernel']}", milliseconds(row["milliseconds"]), moved, share])
    peers = []
    for name, times in result["peers"].items():
        if "error" in times:
            peers.append([name, times["error"], "", ""])
        else:
            each = f"{times['median'] / times['images']:.3f}"
            peers.append([name, milliseconds(times), str(times["images"]), each])
    head = ["", "device ms (min - max)", "host ms", "host ms with draws", "launches (explain's)"]
    return [
        f"{result['settings']['images']} ragged decoded images, bfloat16 out; a copy's "
        f"{result['copy']['bytes_per_second'] / 1e9:.0f} GB/s. {circumstances(result)}",
        table([*head, "MB moved (must move)", "must move, of the copy"], recipes),
        *errors,
        table(["each launch alone", "ms (min - max)", "MB", "of the copy"], launches),
        table(["DINOv2, by the host's clock", "ms (min - max)", "images", "ms an image"], peers),
    ]


def gpu_loader_tables(result: Result) -> list[str]:
    """Images a second of decoding and of the loader."""
    rows = []
    for kind, label in (("decode", "decode, engines' share {}"), ("loader", "loader, {}")):
        for name, rate in result.get(kind, {}).items():
            value = rate["median"] if isinstance(rate, dict) else rate
            rows.append([label.format(name), value if isinstance(value, str) else f"{value:.0f}"])
    apart = [
        [pair, *(f"{told[key]:g}" for key in ("unlike", "images", "max")), f"{told['mean']:.2f}"]
        for pair, told in result.get("differences", {}).items()
        if isinstance(told, dict)
    ]
    tables = [table(["pixels of two decoders, of 255", "differ in", "of images", "max", "greatest mean"], apart)]
    about = f"Images/s from JPEG bytes in RAM. {circumstances(result)}"
    return [about, table(["", "images/s"], rows), *(tables if apart else [])]


def circumstances(result: Result) -> str:
    """Machine, versions, commit and date in one sentence."""
    gpu = result.get("gpu")
    machine = f"{gpu['name']}, " if gpu else ""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{machine}{result['cpu']} ({result['cores']} cores), {versions}; {result['commit']}, {result['date'][:10]}."


def milliseconds(times: dict[str, float]) -> str:
    """Median, least and largest."""
    return f"{times['median']:.3f} ({times['min']:.3f} - {times['max']:.3f})"


TABLES: dict[str, Callable[[Result], list[str]]] = {
    "loader": loader_tables,
    "pack": pack_tables,
    "fetch": fetch_tables,
    "crop": crop_tables,
    "gpu-crop": gpu_crop_tables,
    "gpu-recipe": gpu_recipe_tables,
    "gpu-loader": gpu_loader_tables,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="files without .json (all)")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="their folder (benchmarks/results)")
    given = parser.parse_args()
    files = [given.results / f"{name}.json" for name in given.names] or sorted(given.results.glob("*.json"))
    failed = False
    for file in files:
        if not file.exists():
            print(f"\n### {file.stem}\n\nno result in {given.results.name}")
            continue
        result = json.loads(file.read_text())
        kind = "crop" if "benchmarks" in result else result["benchmark"]
        try:
            text = "\n\n".join(TABLES[kind](result))
        except Exception as error:  # the other files' tables are still wanted
            text, failed = f"no table: {type(error).__name__}: {error}", True
        print(f"\n### {file.stem}\n\n{text}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
