"""Runs what CONTRIBUTING.md adds, in the copy of the package that is the working folder; what came of it, as JSON, into `outcome.json`.

A process of its own: registries read their folders once, and the results' schema is a module's constant. The sweep is run by tests/helpers/here.py.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import harness
from harness.core import Rows
from harness.encoders import EncoderSpec, known_names, load
from harness.probes import probe, row_probe, stream_probe
from harness.report.run import read_run
from tests.helpers import here


def built(arguments: list[str]) -> int:
    """The exit status of `python -m shards.cutouts`."""
    before, sys.argv = sys.argv, ["shards.cutouts", *arguments]
    try:
        runpy.run_module("shards.cutouts", run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("the recipe did not end by its exit status")


def colours() -> dict[str, Any]:
    """The encoder that the page adds, beside a mean that is taken by hand."""
    encoder = load(EncoderSpec.parse("colours"))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tokens = encoder.encode(images, blocks=(0,))
    expected = images[0, :, 48:64, 80:96].mean(dim=(1, 2))
    return {
        "listed": "colours" in known_names(),
        "grid": encoder.info.grid,
        "cell": tokens.patches[0, 3, 5].tolist(),
        "expected": expected.tolist(),
        "block": torch.equal(tokens.blocks[0].patches, tokens.patches),
    }


def cosines() -> dict[str, Any]:
    """The probe that the page adds, on rows that it can tell apart: its answers, and those of a head that was restored."""
    targets = np.arange(60) % 3
    features = (np.eye(3)[targets] + np.random.default_rng(0).normal(0, 0.1, (60, 3))).astype(np.float32)
    keys = [str(number) for number in range(60)]
    rows = Rows(keys=keys, groups=keys, targets=targets, features=features)
    setting: dict[str, Any] = {"classes": 3, "protocol": probe("cosines").fields(batch_size=20), "seed": 0, "device": torch.device("cpu")}
    stack = row_probe("cosines").fit(rows, [1e-4, 1e-3], **setting)
    predictions = stack.predict(rows, 1)
    restored = row_probe("cosines").restore(stack.state(1), None, **setting).predict(rows, 0)
    return {
        "right": bool((predictions.predictions == targets).all()),
        "restored": np.array_equal(restored.scores, predictions.scores),
        "rungs": stream_probe("cosines").rungs(probe("cosines").fields()),
    }


def main(tree: Path) -> None:
    assert Path(harness.__file__).parent == tree / "harness", harness.__file__
    status = built(["--source", "pictures", "--out", "shards/data/cutouts", "--workers", "1"])
    records = here.run(tree, (tree / "added.yaml").read_text())
    (score,) = (score for score in harness.evaluate("colours", "cutouts/figure-knn", "shards/data") if score.metric == "accuracy")
    outcome = {
        "status": status,
        "colours": colours(),
        "records": records,
        "evaluated": score.value,
        "cosines": cosines(),
        "earlier": read_run(tree / "earlier").results,
    }
    (tree / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path.cwd())
