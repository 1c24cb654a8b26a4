"""Wrong sweep files and command lines: exit status 2, one line, nothing run and nothing written."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from harness.sweep import main
from tests.helpers import tiny
from tests.helpers.gates import Gates
from tests.helpers.runs import ROOT, Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("requests")
    tiny.build(root / "shards", splits={"train": 3, "val": 3, "test": 3})
    (root / "good.yaml").write_text(tiny.sweep_text(root / "shards"))
    torch.save({"blocks.0.weight": torch.zeros(3, 3)}, root / "other.pth")
    (root / "cut.pth").write_bytes((root / "other.pth").read_bytes()[:100])
    return root


def changed(**fields: Any) -> Callable[[Path], str]:
    return lambda root: tiny.sweep_text(root / "shards", **fields)


def search(**fields: Any) -> Callable[[Path], str]:
    return changed(search={"trials": 1, "stack": 2, "lr": [0.01, 1.0], **fields})


def instead(key: str, other: str) -> Callable[[Path], str]:
    """A sweep whose key is called otherwise."""

    def text(root: Path) -> str:
        plain = json.loads(tiny.sweep_text(root / "shards"))
        return json.dumps({other if name == key else name: value for name, value in plain.items()})

    return text


def encoder(**fields: Any) -> Callable[[Path], str]:
    return lambda root: tiny.sweep_text(
        root / "shards", encoders=[{key: str(root / value) if key == "checkpoint" else value for key, value in fields.items()}]
    )


def manifest(**fields: Any) -> Callable[[Path], str]:
    """A sweep over a copy of the data set whose manifest differs."""

    def text(root: Path) -> str:
        name = f"m{abs(hash(json.dumps(fields, sort_keys=True)))}"
        folder = root / "others" / name / "tiny"
        folder.mkdir(parents=True, exist_ok=True)
        plain = json.loads((root / "shards" / "tiny" / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**plain, **fields}))
        return tiny.sweep_text(folder.parent)

    return text


FILES: dict[str, tuple[Callable[[Path], str | bytes], str]] = {
    "unknown key": (changed(tsaks=[]), "unknown key 'tsaks'; did you mean 'tasks'?; known keys are name, shards, encoders, tasks"),
    "unknown key in capitals": (changed(TASKS=[]), "unknown key 'TASKS'; did you mean 'tasks'?"),
    "unknown key in a section": (search(trails=3), "search: unknown key 'trails'; did you mean 'trials'?; known keys are trials, stack, lr, seed"),
    "unknown key of the resources": (changed(resources={"actor": 2}), "resources: unknown key 'actor'; did you mean 'actors'?"),
    "unknown key instead of a needed one": (instead("encoders", "encodrs"), "unknown key 'encodrs'; did you mean 'encoders'?"),
    "unknown key that is like no other": (changed(xyz=1), "unknown key 'xyz'; known keys are name, "),
    "unknown key beside a missing one": (lambda root: '{"nam": "x"}', "unknown key 'nam'; did you mean 'name'?"),
    "unknown key beside NaN": (search(lr=[float("nan"), 1.0], trails=3), "unknown key 'trails'; did you mean 'trials'?"),
    "unknown key beside wrong values": (
        changed(name="../evil", tasks=[], search={"trials": 0, "stak": 2}),
        "unknown key 'stak'; did you mean 'stack'?",
    ),
    "unknown key beside a section that is none": (
        changed(search=3, resources={"batchsize": 1}),
        "unknown key 'batchsize'; did you mean 'batch_size'?",
    ),
    "unknown key of an encoder beside no task": (
        changed(tasks=[], encoders=["nothing", {"nam": "x", "architecture": "test_vit"}]),
        "encoder test_vit: unknown key 'nam'",
    ),
    "unknown key of an encoder without a name": (changed(encoders=[{"encodr": "x"}]), "encoder without a name: unknown key 'encodr'"),
    "unknown key of a preprocessing beside no weights": (
        changed(encoders=[{"name": "x", "architecture": "test_vit", "preprocessing": {"sise": 3}}]),
        "encoder x: preprocessing: unknown key 'sise'; known keys: size, resize, interpolation, mean, std; did you mean 'size'?",
    ),
    "unknown option of an encoder beside no weights": (
        changed(encoders=[{"name": "x", "architecture": "test_vit", "options": {"num_head": 3}}]),
        "encoder x: unknown option 'num_head'",
    ),
    "missing key": (lambda root: '{"name": "x"}', "expected this key, got none"),
    "not a mapping": (lambda root: "- a\n- b\n", "expected a mapping"),
    "empty file": (lambda root: "", "expected a mapping"),
    "binary": (lambda root: b"\x80\x00\xff\xfe\x00", "binary"),
    "a Python tag": (lambda root: "name: !!python/object/apply:os.system [true]", "plain YAML"),
    "a YAML bomb": (lambda root: "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
    "nested too deeply": (lambda root: "a: " + "[" * 20000, "nested too deeply"),
    "a key twice": (lambda root: "name: a\nname: b", "comes twice"),
    "unclosed": (lambda root: "name: [a", "plain YAML"),
    "too large": (lambda root: "# " + "x" * (1 << 20), "a page of YAML"),
    "bad name": (changed(name="../evil"), "name"),
    "no encoders": (changed(encoders=[]), "empty list"),
    "an encoder that is a number": (changed(encoders=["vit_s14_focus", 3]), "encoders: expected a name or a mapping as entry 1, got '3'"),
    "an encoder that is a list": (changed(encoders=[["vit_s14_focus"]]), "encoders: expected a name or a mapping as entry 0"),
    "no tasks": (changed(tasks=[]), "empty list"),
    "zero trials": (search(trials=0), "search.trials"),
    "zero stack": (search(stack=0), "search.stack"),
    "fractional stack": (search(stack=1.5), "search.stack"),
    "zero actors": (changed(resources={"actors": 0}), "resources.actors"),
    "true for a number": (changed(resources={"batch_size": True}), "resources.batch_size"),
    "NaN learning rate": (lambda root: changed()(root).replace("[0.001, 1.0]", "[.nan, 1.0]"), "finite"),
    "infinite learning rate": (lambda root: changed()(root).replace("[0.001, 1.0]", "[0.1, .inf]"), "finite"),
    "negative learning rate": (search(lr=[-0.1, 1.0]), "0 < lowest"),
    "inverted learning rates": (search(lr=[1.0, 0.1]), "0 < lowest"),
    "one learning rate": (search(lr=0.1), "[lowest, highest]"),
    "text learning rate": (search(lr=["a", "b"]), "expected numbers"),
    "a list of one learning rate": (search(lr=[0.1]), "three or more rates"),
    "a learning rate twice": (search(lr=[0.1, 0.2, 0.1]), "no two the same"),
    "a negative rate among several": (search(lr=[0.1, -0.2, 0.3]), "positive, finite rates"),
    "text among several learning rates": (search(lr=[0.1, "b", 0.3]), "expected numbers"),
    "negative seed": (search(seed=-1), "search.seed"),
    "a seed of more than 63 bits": (search(seed=2**63), "search.seed"),
    "unknown precision": (changed(resources={"precision": "int8"}), "resources.precision"),
    "fp16 on a CPU": (changed(resources={"precision": "fp16", "gpus_per_actor": 0}), "fp16 needs a GPU"),
    "more actors than cores": (changed(resources={"actors": 4096, "gpus_per_actor": 0}), "resources.actors"),
    "a GPU and a half": (changed(resources={"gpus_per_actor": 1.5}), "a fraction of one GPU or a whole number"),
    "more threads than cores": (changed(resources={"threads": 250, "gpus_per_actor": 0}), "resources.threads"),
    "missing shards folder": (lambda root: tiny.sweep_text(root / "nowhere"), "no such file"),
    "unknown data set": (changed(tasks=["tinny/object-knn"]), "did you mean 'tiny'"),
    "unknown task": (changed(tasks=["tiny/object-kmn"]), "did you mean 'object-knn'"),
    "pattern without a match": (changed(tasks=["tiny/zzz*"]), "has no task"),
    "task without data set": (changed(tasks=["object-knn"]), "<data set>/<task>"),
    "unknown protocol": (changed(tasks=["tiny/part-retrieval@papre"]), "did you mean 'paper'"),
    "unknown protocol field": (changed(protocol={"epohcs": 3}), "did you mean 'epochs'"),
    "override of an unknown task": (changed(protocol={"object-kmn": {"k": [5]}}), "did you mean 'object-knn'"),
    "override of an unknown field of a task": (changed(protocol={"object-knn": {"epochs": 3}}), "protocol.object-knn.epochs"),
    "protocol field of another type": (changed(protocol={"epochs": "many"}), "protocol.epochs"),
    "protocol field out of range": (changed(protocol={"epochs": 0}), "epochs"),
    "unknown part": (changed(protocol={"parts": ["nose"]}), "parts"),
    "unknown readout": (changed(protocol={"readouts": ["clss"]}), "readout"),
    "unknown encoder": (changed(encoders=["efficientnet_lite9"]), "efficientnet_lite"),
    "unknown timm model": (changed(encoders=["timm:vit_smal_patch16_224"]), "vit_small_patch16_224"),
    "unknown encoder key": (encoder(name="x", architecture="test_vit", checkpont="a"), "did you mean 'checkpoint'"),
    "encoder without weights": (encoder(name="x", architecture="test_vit"), "no weights"),
    "an encoder's name that no file can have": (encoder(name="x" * 400, architecture="test_vit", random=True), "of 400"),
    "an encoder's name that no file can have, quoted": (encoder(name="é" * 40, architecture="test_vit", random=True), "'ééé"),
    "an encoder's name of two lines": (encoder(name="a\nb", architecture="test_vit", random=True), "one line"),
    "an encoder's name with a NUL": (encoder(name="a\0b", architecture="test_vit", random=True), "one line"),
    "an encoder twice": (changed(encoders=[{"name": "x", "architecture": "test_vit", "random": True}] * 2), "twice"),
    "missing checkpoint": (encoder(name="x", architecture="test_vit", checkpoint="none.pth"), "none.pth"),
    "checkpoint of another shape": (encoder(name="x", architecture="test_vit", checkpoint="other.pth"), "other.pth"),
    "truncated checkpoint": (encoder(name="x", architecture="test_vit", checkpoint="cut.pth"), "cut.pth"),
    "manifest of another schema": (manifest(schema=2), "schema 1, got 2"),
    "manifest of another data set": (manifest(dataset="other"), "expected the manifest of"),
    "manifest whose counts do not add up": (manifest(splits={"test": {"samples": 7, "official": None, "shards": []}}), "samples in all"),
    "manifest without a test split": (manifest(splits={"train": {"samples": 0, "official": None, "shards": []}}), "expected a split 'test'"),
}


def one_line(error: str) -> str:
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    return lines[0]


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_sweep_file_is_told_in_one_line(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, words = FILES[case]
    content = make(folder)
    file = tmp_path / "sweep.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert main([str(file), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 2
    printed = capfd.readouterr()
    assert words in one_line(printed.err)
    assert not printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.yaml"]


COMMANDS: dict[str, tuple[list[str], str]] = {
    "no file": ([], "SWEEP.yaml"),
    "missing file": (["nowhere.yaml"], "No such file"),
    "a folder": (["{folder}"], "sweep file"),
    "unknown option": (["{good}", "--otu", "x"], "--otu"),
    "--set without a value": (["{good}", "--set", "search.trials"], "KEY=VALUE"),
    "--set of an unknown key": (["{good}", "--set", "search.trails=1"], "did you mean 'trials'"),
    "--set of an unknown section": (["{good}", "--set", "serch.trials=1"], "unknown key 'serch'; did you mean 'search'?"),
    "--set of an unknown key beside a wrong value": (["{good}", "--set", "resources.actors=0", "--set", "tsks=[]"], "unknown key 'tsks'"),
    "--set below a value": (["{good}", "--set", "name.x=1"], "no section"),
    "--set of a wrong value": (["{good}", "--set", "resources.actors=0"], "resources.actors"),
    "--set of broken YAML": (["{good}", "--set", "tasks=[a"], "plain YAML"),
    "a GPU where there is none": (["{good}", "--set", "resources.gpus_per_actor=1"], "no GPU"),
    "out is a file": (["{good}", "--out", "{good}"], "--out"),
    "out below a file": (["{good}", "--out", "{good}/x"], "--out"),
    "out that cannot be written": (["{good}", "--out", "/proc/out"], "--out"),
    "cache that cannot be written": (["{good}", "--out", "{out}", "--cache", "/proc/cache"], "--cache"),
    "cache behind a URL that cannot be written": (["{good}", "--out", "{out}", "--cache", "file:///proc/cache"], "--cache file:///proc/cache"),
    "results at a URL": (["{good}", "--out", "s3://bucket/results"], "expected a folder, got a URL"),
    "cache of an unknown protocol": (["{good}", "--out", "{out}", "--cache", "foo://x"], "Protocol not known: foo"),
    "cache whose file system is not installed": (["{good}", "--out", "{out}", "--cache", "s3://bucket/partwise"], "Install s3fs"),
    "cache whose file system is not installed, planned": (
        ["{good}", "--out", "{out}", "--cache", "s3://bucket/partwise", "--dry-run"],
        "Install s3fs",
    ),
    "no address": (["{good}", "--address", "nowhere"], "--address nowhere"),
    "no cluster there": (["{good}", "--address", "127.0.0.1:1"], "running Ray cluster"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command_line_is_told_in_one_line(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    if case == "a GPU where there is none" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments, words = COMMANDS[case]
    if "s3fs" in words and find_spec("s3fs") is not None:
        pytest.skip("s3fs is installed")
    places = {"folder": folder, "good": folder / "good.yaml", "out": tmp_path / "out"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    printed = capfd.readouterr()
    assert words in one_line(printed.err)
    assert not (tmp_path / "out" / "sweep.yaml").exists()


@pytest.mark.parametrize("arguments", [["nowhere.yaml"], ["--no-such-option"]])
def test_the_command_itself_exits_with_2(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "harness.sweep", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    one_line(done.stderr)


@pytest.mark.parametrize("command", ["harness.report", "harness.encoders"])
def test_the_other_commands_tell_a_wrong_option_in_one_line(capfd: pytest.CaptureFixture[str], command: str) -> None:
    wrong = importlib.import_module(f"{command}.__main__").main(["--no-such-option"])
    assert wrong == 2
    assert "--help lists what there is" in one_line(capfd.readouterr().err)


def test_an_interruption_while_modules_are_imported_is_told_in_one_line(folder: Path) -> None:
    gates = Gates(folder / "gates")
    run = Run(sweep=folder / "good.yaml", out=folder / "interrupted", cache=folder / "cache", gates=gates)
    gates.close("import harness.results.tables")
    process = run.start()
    gates.wait("import harness.results.tables", 1, process)
    assert any("libtorch" in Path(place.path).name for place in psutil.Process(process.pid).memory_maps())
    process.send_signal(signal.SIGINT)
    assert run.finish(process) == 130, run.log
    assert one_line(run.log) == "interrupted: the same command resumes from here"
    assert not run.out.exists()
