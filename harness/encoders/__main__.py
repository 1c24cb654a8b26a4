"""`python -m harness.encoders [NAME]`: list the families and names, or describe one encoder."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.command import OK, Parser, run_command
from harness.core import EncoderInfo
from harness.encoders import EncoderSpec, all_families, describe
from harness.errors import EncoderError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 2, with one line, where the request is wrong; 1 where the program failed."""
    parser = Parser(prog="python -m harness.encoders", description="List the encoders that a sweep file can name, or describe one.")
    parser.add_argument("name", nargs="?", help="a name, timm:<model>, or a sweep file's mapping, e.g. '{architecture: test_vit, random: true}'")
    parser.add_argument("--json", action="store_true", help="describe as JSON")
    return run_command(parser, arguments, _show)


def _show(options: argparse.Namespace) -> int:
    console = Console()
    if options.name is None:
        _list(console)
        return OK
    info = describe(EncoderSpec.parse(_entry(options.name)))
    if options.json:
        print(json.dumps(facts(info), indent=2))
    else:
        _describe(console, info)
    return OK


def facts(info: EncoderInfo) -> dict[str, str | int | list[str]]:
    """What is shown of an encoder, by label."""
    preprocessing, report = info.preprocessing, info.load_report
    described: dict[str, str | int | list[str]] = {
        "name": info.name,
        "family": info.family,
        "architecture": info.architecture,
        "source": info.source,
        "weights sha256": info.weights_sha256,
        "parameters": info.params,
        "tokens": _tokens(info),
        "patch": _patch(info),
        "width": info.embed_dim,
        "blocks": f"{len(info.block_dims)}, widths {', '.join(str(dim) for dim in dict.fromkeys(info.block_dims))}",
        "positions": info.positions,
        "projection": "none" if info.projection_dim is None else f"{info.projection_dim} dimensions",
        "preprocessing": (
            f"shorter side to {preprocessing.resize} ({preprocessing.interpolation}), centre crop {preprocessing.size[0]}x{preprocessing.size[1]}, "
            f"mean {_numbers(preprocessing.mean)}, std {_numbers(preprocessing.std)}"
        ),
        "preprocessing from": info.preprocessing_source,
    }
    if info.float32_only:
        described["precision"] = "float32 always"
    if report is not None:
        described["loaded"] = (
            f"{report.file} (sha256 {report.sha256[:12]}): {report.matched} matched, {len(report.missing)} missing, "
            f"{len(report.unexpected)} unexpected, {len(report.resized)} resized, {len(report.dropped)} dropped"
        )
        if report.dropped:
            described["dropped"] = list(report.dropped)
    if info.notes:
        described["notes"] = list(info.notes)
    return described


def _entry(name: str) -> object:
    if not name.lstrip().startswith("{"):
        return name
    try:
        return yaml.safe_load(name)
    except yaml.YAMLError as error:
        raise EncoderError(
            f"cannot read {name!r} as YAML: {' '.join(str(error).split())}; write e.g. {{architecture: test_vit, random: true}}"
        ) from error


def _list(console: Console) -> None:
    table = Table(title="Encoders", title_justify="left")
    for column in ("family", "name", "what it is"):
        table.add_column(column)
    for family in all_families():
        table.add_row(f"[bold]{escape(family.FAMILY)}[/bold]", "", escape(family.DESCRIPTION))
        for name, description in family.names().items():
            table.add_row("", escape(name), escape(description))
    console.print(table)
    console.print("Describe one: python -m harness.encoders NAME.")
    console.print("Any of them has a random twin, {encoder: NAME, random: true, seed: 0}; names without a size take it from checkpoint: FILE.")


def _describe(console: Console, info: EncoderInfo) -> None:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in facts(info).items():
        shown = "\n".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else value
        table.add_row(label, escape(shown))
    console.print(table)


def _tokens(info: EncoderInfo) -> str:
    kinds = ["cls"] if info.has_cls else []
    if info.registers:
        kinds.append(f"{info.registers} register{'s' if info.registers > 1 else ''}")
    return " + ".join([*kinds, f"{info.grid[0]}x{info.grid[1]} patches"])


def _patch(info: EncoderInfo) -> str:
    """Pixels from one cell to the next. A convolutional network's stride is a power of two, and its map rounded up or cut at its borders."""
    exact = info.positions != "none" and not any(side % cells for side, cells in zip(info.preprocessing.size, info.grid, strict=True))
    ratios = (side / cells for side, cells in zip(info.preprocessing.size, info.grid, strict=True))
    height, width = (round(ratio) if exact else 2 ** round(math.log2(ratio)) for ratio in ratios)
    return f"{height}x{width} px"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
