"""A Ray of our own, on machines that are not as Ray likes them, beside other people's, and interrupted."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from ray.exceptions import RaySystemError
from rich.console import Console

from harness.cluster import cluster, local_ray
from harness.cluster.cluster import Cluster
from harness.cluster.local_ray import LONGEST_SOCKET, interrupt_later, make_folder, store_options, writable_token
from harness.config import Resources
from harness.errors import RequestError, RunError
from harness.progress import Progress
from tests.helpers import tiny
from tests.helpers.clusters import new
from tests.helpers.gates import Gates
from tests.helpers.runs import ROOT, Run, workers

pytestmark = pytest.mark.timeout(1200)  # on a machine that is busy with much else

LONG = "/tmp/" + "a-very-long-folder/" * 6


def test_sockets_in_the_folder_of_a_session_can_be_bound(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_folder()
    try:
        longest = folder / "session_2026-12-31_23-59-59_999999_4194304" / "sockets" / "plasma_store.99"
        assert len(os.fsencode(longest)) <= LONGEST_SOCKET
        longest.parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(longest))
    finally:
        local_ray.remove(folder)
    assert not folder.exists()


def test_the_longest_place_that_fits_is_taken_and_a_byte_more_is_not() -> None:
    left = LONGEST_SOCKET - local_ray.LONGEST_BELOW - local_ray.RANDOM_CHARACTERS - len(f"/{local_ray.PREFIX}")
    fits = Path("/tmp") / ("x" * (left - len("/tmp/")))
    fits.mkdir(exist_ok=True)
    try:
        folder = make_folder([str(fits)])
        assert folder.parent == fits
        local_ray.remove(folder)
        with pytest.raises(RequestError, match="sockets of 108 bytes"):
            make_folder([f"{fits}y"])
    finally:
        fits.rmdir()


def test_a_place_that_is_too_long_or_cannot_be_written_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", LONG)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    folder = make_folder()
    assert folder.parent == Path("/tmp")
    local_ray.remove(folder)
    with pytest.raises(RequestError) as caught:
        make_folder([LONG, "/proc/nowhere", "/dev/null"])
    message = str(caught.value)
    assert message.count("\n") == 0
    assert "/proc/nowhere (No such file or directory)" in message
    assert "/dev/null (Not a directory)" in message
    assert message.endswith("set TMPDIR to a short one")


def test_where_shared_memory_is_missing_or_small_the_store_lies_in_the_folder(tmp_path: Path) -> None:
    in_folder = {"_plasma_directory": str(tmp_path), "object_store_memory": 256 << 20}
    assert store_options(tmp_path, shared=tmp_path / "missing") == in_folder
    assert store_options(tmp_path, shared=Path("/proc")) == in_folder
    assert store_options(tmp_path, shared=tmp_path, enough=1 << 60) == in_folder
    assert store_options(tmp_path, shared=tmp_path, enough=1) == {}


@pytest.mark.parametrize("home", ["a file", "missing/folder"])
def test_where_the_home_cannot_be_written_the_token_lies_in_the_folder(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / home))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with writable_token(tmp_path):
        file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert (file.parent, file.stat().st_mode & 0o777) == (tmp_path, 0o600)
        assert len(file.read_text()) == 64
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    with writable_token(tmp_path):
        assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(file)
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "gone")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    with writable_token(tmp_path):
        assert "RAY_AUTH_TOKEN_PATH" not in os.environ


@pytest.fixture
def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.usefixtures("_interruptible")
def test_an_interruption_waits_for_the_end_of_the_block() -> None:
    done: list[int] = []

    def interrupted(times: int) -> None:
        with interrupt_later():
            for number in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                done.append(number)

    with pytest.raises(KeyboardInterrupt):
        interrupted(1)
    assert done == [0], "to its end"
    with pytest.raises(KeyboardInterrupt):
        interrupted(2)
    assert done == [0, 0], "a second one does not wait"
    with pytest.raises(ValueError, match="of the block"), interrupt_later():
        raise ValueError("of the block")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_dashboard_is_refused_before_anything_starts_where_there_can_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def new_dashboard(address: str | None) -> Cluster:
        return Cluster(address, Resources(), dashboard=True, progress=Progress(Console(file=io.StringIO())))

    monkeypatch.setitem(sys.modules, "ray.dashboard.optional_deps", None)
    with pytest.raises(RequestError, match=r"pip install 'ray\[default\]'"):
        new_dashboard(None)
    with pytest.raises(RequestError, match="--dashboard: expected no --address"):
        new_dashboard("auto")


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> None:
        assert options["address"] == "local"
        raise TimeoutError("no answer\nfrom the GCS")

    monkeypatch.setattr(cluster.ray, "init", fail)
    with new() as started, pytest.raises(RunError, match="Ray: expected to start one here, got: no answer from the GCS"):
        started.start()


@pytest.mark.usefixtures("_interruptible")
def test_an_interruption_while_ray_stops_waits_until_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def stop(**_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        done.append("stopped")

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "shutdown", stop)
    with pytest.raises(KeyboardInterrupt), new():
        pass
    assert done == ["stopped"]


def test_a_ray_that_is_lost_ends_the_run_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with pytest.raises(RunError, match="Ray was lost: System error: the GCS is gone; the same command resumes from here"), new():
        raise RaySystemError("the GCS is gone\nand more")


STARTS = """
from rich.console import Console
from harness.cluster.cluster import Cluster
from harness.config import Resources
from harness.progress import Progress
import ray
with Progress(Console(stderr=True)) as progress, Cluster(None, Resources(actors=1), dashboard=False, progress=progress) as cluster:
    cluster.start()
    print("value", ray.get(ray.remote(lambda: 7).remote()))
"""


def test_no_other_ray_no_long_path_no_home_and_no_memory_keeps_ours_from_starting(tmp_path: Path) -> None:
    temporary = tmp_path / "a-very-long-folder-for-temporary-files" / "of-a-batch-system"
    (temporary / "ray").mkdir(parents=True)
    (temporary / "ray" / "ray_current_cluster").write_text("127.0.0.1:6399")  # as a Ray that was killed leaves it
    code = "from harness.cluster import local_ray; from pathlib import Path\n"
    code += f"local_ray.SHARED_MEMORY = Path({str(tmp_path / 'no-shared-memory')!r})\n"
    code += "local_ray.store_options.__defaults__ = (local_ray.SHARED_MEMORY, local_ray.ENOUGH_SHARED)\n" + STARTS
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {"RAY_ADDRESS": "127.0.0.1:6399", "TMPDIR": str(temporary), "HOME": str(tmp_path / "no-home")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stdout) == (0, "value 7\n"), done.stderr
    assert (temporary / "ray" / "ray_current_cluster").read_text() == "127.0.0.1:6399", "another's file is another's"


def test_an_interruption_while_ray_starts_ends_the_run_and_leaves_no_process(tmp_path: Path) -> None:
    tiny.build(tmp_path / "shards", splits={"train": 3, "val": 3, "test": 3})
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(tmp_path / "shards", tasks=["tiny/object-knn"]))
    gates = Gates(tmp_path / "gates")
    run = Run(sweep=tmp_path / "sweep.yaml", out=tmp_path / "out", cache=tmp_path / "cache", gates=gates)
    gates.close("ray")
    process = run.start()
    gates.wait("ray", 1, process)
    below = workers(process)
    assert below, "some of Ray's processes are there"
    process.send_signal(signal.SIGINT)
    gates.open("ray")
    assert run.finish(process) == 130, run.log
    assert run.log.splitlines()[-1] == "interrupted: the same command resumes from here"
    assert "Traceback" not in run.log
    assert not psutil.wait_procs(below, timeout=60)[1]
