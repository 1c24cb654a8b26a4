"""Files that appear whole and once on any file system, room and rights that are looked at first, and one driver per folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from harness import files as exclusive
from harness.command import OK, WRONG
from harness.errors import BankError, RequestError, RunError, is_of_the_place, portable
from harness.features.bank import BankStore
from harness.files import LOCK, STALE_SECONDS, create, only_driver
from harness.plan.cost import bytes_of_banks, least_bytes
from harness.sweep import main
from tests.helpers import here, tiny

NAMES = ("key", "part.arrow")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A file system without hard links; the list grows with every attempt at one."""
    attempts: list[int] = []

    def refuse(*_: Any, **__: Any) -> None:
        attempts.append(1)
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    return attempts


def left_behind(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


# --- publishing -------------------------------------------------------------------------------------------------------


NO_LINKS = (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL, errno.ENOTTY, 524)


@pytest.mark.parametrize("number", NO_LINKS)
def test_without_hard_links_a_part_is_published_once_and_the_first_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    attempts: list[int] = []

    def refuse(*_: Any, **__: Any) -> None:
        attempts.append(1)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    store = BankStore(str(tmp_path))
    assert store.publish(NAMES, b"first")
    assert not store.publish(NAMES, b"second")
    assert store.read_bytes(*NAMES) == b"first"
    assert store.publish(NAMES, b"third", replace=True)
    assert store.publish(("key", "other.arrow"), b"other")
    assert store.read_bytes(*NAMES) == b"third"
    assert left_behind(tmp_path) == ["other.arrow", "part.arrow"]
    assert len(attempts) == 1, "what the file system lacks is remembered"


@pytest.mark.parametrize("number", sorted(exclusive.OF_THE_DISK))
def test_what_has_nothing_to_do_with_links_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises((RunError, BankError), match=os.strerror(number)) as caught:
        BankStore(str(tmp_path)).publish(NAMES, b"first")
    assert isinstance(caught.value, BankError) == (number in (errno.EIO, errno.ESTALE))
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "error", [ConnectionResetError(errno.ECONNRESET, "reset"), TimeoutError("slow"), OSError(errno.ESTALE, "Stale file handle")], ids=repr
)
@pytest.mark.parametrize("replace", [False, True])
def test_a_write_that_may_go_better_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: OSError, replace: bool) -> None:
    """Of a folder and of a store behind a URL; a full disk would end the run at once."""

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    for root in (str(tmp_path), f"memory://{tmp_path.name}"):
        with pytest.raises(BankError, match=r"cannot write .*; once it can be reached again, run again") as caught:
            BankStore(root).publish(NAMES, b"first", replace=replace)
        assert is_of_the_place(portable(caught.value))


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_publish_at_once_one_does_and_readers_see_it_whole(tmp_path: Path, request: pytest.FixtureRequest, links: bool) -> None:
    if not links:
        request.getfixturevalue("no_links")
    writers, size = 8, 2**20
    gate, done, published, read = threading.Barrier(writers + 1), threading.Event(), [], set()

    def write(number: int) -> None:
        store = BankStore(str(tmp_path))
        gate.wait()
        if store.publish(NAMES, bytes([number]) * size):
            published.append(number)

    def watch() -> None:
        store = BankStore(str(tmp_path))
        gate.wait()
        while not done.is_set():
            data = store.read_bytes(*NAMES)
            if data is not None:
                read.add((len(data), data[:1], len(set(data))))

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    (first,) = published
    assert BankStore(str(tmp_path)).read_bytes(*NAMES) == bytes([first]) * size
    assert read <= {(size, bytes([first]), 1)}
    assert left_behind(tmp_path) == ["part.arrow"]


def claim_of(root: Path) -> Path:
    path = root / NAMES[0] / f".{NAMES[1]}.claim"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.usefixtures("no_links")
def test_a_claim_that_a_dead_process_left_blocks_nobody(tmp_path: Path) -> None:
    claim = claim_of(tmp_path)
    old = claim.stat().st_mtime - STALE_SECONDS - 1
    os.utime(claim, (old, old))
    assert BankStore(str(tmp_path)).publish(NAMES, b"first")
    assert left_behind(tmp_path) == ["part.arrow"]


@pytest.mark.usefixtures("no_links")
def test_a_claim_that_is_held_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, waits = claim_of(tmp_path), []

    def finish(seconds: float) -> None:
        waits.append(seconds)
        (claim.parent / NAMES[1]).write_bytes(b"theirs")
        claim.unlink()

    monkeypatch.setattr(exclusive.time, "sleep", finish)
    assert not BankStore(str(tmp_path)).publish(NAMES, b"ours")
    assert BankStore(str(tmp_path)).read_bytes(*NAMES) == b"theirs"
    assert len(waits) == 1


class Plain(MemoryFileSystem):
    """A store that knows nothing of exclusive creation."""

    store: ClassVar[dict[str, Any]] = {}

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        if options:
            raise TypeError("unexpected keyword")
        super().pipe_file(path, value)


class Racing(MemoryFileSystem):
    """A store in which another writer comes between the look and the writing, and which has an error of its own for that."""

    store: ClassVar[dict[str, Any]] = {}
    error: Exception = FileExistsError("taken")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        assert mode == "create"
        super().pipe_file(path, b"theirs")
        raise self.error


@pytest.mark.parametrize("make", [MemoryFileSystem, Plain])
def test_a_store_behind_a_url_keeps_the_first(make: Callable[..., Any]) -> None:
    system = make(skip_instance_cache=True)
    path = f"/exclusive/{make.__name__}"
    assert create(system, path, b"first")
    assert not create(system, path, b"second")
    assert system.cat_file(path) == b"first"


@pytest.mark.parametrize("error", [FileExistsError("taken"), RuntimeError("412: precondition failed")], ids=["exists", "own"])
def test_who_comes_second_in_a_store_that_creates_exclusively_is_told_so(error: Exception) -> None:
    system = Racing(skip_instance_cache=True)
    system.error, system.store = error, {}
    assert not create(system, "/exclusive/race", b"ours")
    assert system.cat_file("/exclusive/race") == b"theirs"


def test_an_error_of_a_store_that_wrote_nothing_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    system = MemoryFileSystem(skip_instance_cache=True)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(system, "pipe_file", fail)
    with pytest.raises(RuntimeError, match="no credentials"):
        create(system, "/exclusive/none", b"ours")


# --- what is looked at before anything runs ---------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    tiny.build(tmp_path / "shards", splits={"train": 8, "val": 4, "test": 4}, per_shard=4)
    return tmp_path / "shards"


def text(data: Path, *tasks: str) -> str:
    return tiny.sweep_text(data, tasks=list(tasks), search={"trials": 1, "stack": 1, "lr": [1e-2, 1e-1]}, protocol={"epochs": 1} if tasks else {})


def sweep(folder: Path, *arguments: str) -> int:
    return main([str(folder / "sweep.yaml"), "--out", str(folder / "out"), "--cache", str(folder / "cache"), *arguments])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Error" in line]
    return line


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cluster.cluster.Cluster.start", lambda _: pytest.fail("Ray was started"))


@pytest.mark.usefixtures("no_links")
def test_a_cache_that_can_neither_link_nor_create_exclusively_is_refused_in_a_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **how: Any) -> int:
        if flags & os.O_EXCL and str(path).endswith(".claim"):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *arguments, **how)

    monkeypatch.setattr(os, "open", refuse)
    (tmp_path / "sweep.yaml").write_text(text(data, "tiny/object-knn"))
    assert sweep(tmp_path) == WRONG
    line = refused(capsys)
    assert line.startswith(f"RequestError: --cache {tmp_path / 'cache'}: expected a folder that can be written, got: ")
    assert "Operation not supported" in line
    assert not (tmp_path / "out" / "sweep.yaml").exists()


def with_free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40 - count, count))  # type: ignore[attr-defined]


def test_a_sweep_that_cannot_fit_is_refused_with_what_it_takes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweep.yaml").write_text(text(data, "tiny/object-knn"))
    plan = here.planned(tmp_path, text(data, "tiny/object-knn"))
    least = least_bytes(plan, plan.shard_work)
    assert least == sum(
        4 * 16 * plan.infos["tiny_vit"].embed_dim * {"cls": 1, "mean": 1, "cls+mean": 2}[readout] for readout in plan.studies[0].banks["test"]
    )
    with_free(monkeypatch, least - 1)
    assert sweep(tmp_path) == WRONG
    assert "of free space for the feature banks to write, got" in refused(capsys)
    assert not (tmp_path / "out" / "sweep.yaml").exists()
    with_free(monkeypatch, least)
    assert sweep(tmp_path, "--dry-run") == OK


def test_a_dry_run_shows_what_is_free(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweep.yaml").write_text(text(data, "tiny/part-knn"))
    with_free(monkeypatch, 3 * 2**30)
    assert sweep(tmp_path, "--dry-run") == OK
    output = capsys.readouterr().out
    assert "3.0 GiB free in the cache" in output
    assert "more than there is room for" not in output
    with_free(monkeypatch, 100)
    assert sweep(tmp_path, "--dry-run") == OK, "how many patches there are, only the images tell"
    assert "that is more than there is room for" in capsys.readouterr().out


def test_views_whose_images_tell_how_many_items_count_for_nothing_certain(data: Path, tmp_path: Path) -> None:
    plan = here.planned(tmp_path, text(data, "tiny/part-knn"))
    assert least_bytes(plan, plan.shard_work) == 0
    dropped = here.planned(tmp_path, text(data, "tiny/dropped-tokens"))
    altered = [
        replace(work, passes=tuple(encoder_pass for encoder_pass in work.passes if encoder_pass.view.alteration is not None))
        for work in dropped.shard_work
    ]
    assert any(work.passes for work in altered)
    assert least_bytes(dropped, altered) == 0
    assert bytes_of_banks(plan, plan.shard_work, lambda *_: 4.0) > 0


# --- a cache that is read-only ----------------------------------------------------------------------------------------

TASKS = ("tiny/object-knn", "tiny/object-linear", "tiny/object-linear-streamed")


@pytest.fixture
def finished(data: Path, tmp_path: Path) -> Path:
    """A sweep that has come to its end, whose journal the command resumes from."""
    assert {row["status"] for row in here.run(tmp_path, text(data, *TASKS))} == {"ok"}
    return tmp_path


@pytest.fixture
def read_only(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in whose cache nothing can be written or removed any more."""

    def refuse(self: BankStore, *_: Any, **__: Any) -> bool:
        raise RunError(f"cannot write {self.root}: Read-only file system")

    monkeypatch.setattr(BankStore, "publish", refuse)
    monkeypatch.setattr(BankStore, "discard", lambda self, *names: None if names[0].startswith(".tried") else pytest.fail(f"{names} was discarded"))
    return finished


def test_a_finished_sweep_reports_from_a_cache_that_is_read_only(read_only: Path) -> None:
    assert sweep(read_only) == OK
    assert (read_only / "out" / "report.html").exists()


def test_what_a_read_only_cache_lacks_is_said_in_a_line(read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(read_only / "out" / "tune")
    assert sweep(read_only) == WRONG
    line = refused(capsys)
    assert "expected a folder that can be written, got" in line
    assert "Read-only file system" in line
    assert "3 studies are still to be searched" in line or "2 studies are still to be searched" in line
    (part, *_) = (read_only / "cache").glob("*/test-000.arrow")
    shutil.rmtree(part.parent)
    assert sweep(read_only) == WRONG
    assert "shards are still to be encoded" in refused(capsys)
    assert sweep(read_only, "--fresh") == WRONG
    assert "--fresh discards what it has" in refused(capsys)
    assert (read_only / "out" / "results.parquet").exists()


def may_mount() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs a mount namespace of its own")
def test_a_finished_sweep_reports_from_a_mount_that_is_read_only(finished: Path) -> None:
    cache = finished / "cache"
    script = f'mount --bind {cache} {cache} && mount -o remount,ro,bind {cache} && ! touch {cache}/x 2>/dev/null && exec "$@"'
    arguments = ["-m", "harness.sweep", str(finished / "sweep.yaml"), "--out", str(finished / "out"), "--cache", str(cache)]
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == OK, done.stderr


# --- one driver per folder --------------------------------------------------------------------------------------------


def test_the_second_driver_of_a_folder_is_told_of_the_first(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with only_driver(finished / "out"):
        assert sweep(finished) == WRONG
        line = refused(capsys)
        assert f"--out {finished / 'out'}: expected no other sweep in this folder, got process {os.getpid()} on " in line
        assert sweep(finished, "--dry-run") == OK, "which writes nothing"
    assert sweep(finished) == OK


HOLD = """
import sys, time
from pathlib import Path
from harness.files import only_driver
with only_driver(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_driver_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RequestError, match=f"got process {holder.pid} on "), only_driver(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid, "it could not clean up"
    with only_driver(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("content", "is_held"), [
    ('{"host": "HOST", "pid": RUNNING}', True),
    ('{"host": "HOST", "pid": GONE}', False),
    ('{"host": "elsewhere", "pid": RUNNING}', False),
    ("", False),
    ("no JSON", False),
    ("[1]", False),
])  # fmt: skip
def test_where_a_file_system_cannot_lock_a_process_that_runs_here_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, is_held: bool
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(exclusive.fcntl, "flock", refuse)
    monkeypatch.setattr(exclusive.socket, "gethostname", lambda: "HOST")
    (tmp_path / LOCK).write_text(content.replace("RUNNING", str(os.getppid())).replace("GONE", str(gone.pid)))
    if is_held:
        with pytest.raises(RequestError, match="expected no other sweep in this folder"), only_driver(tmp_path):
            pass
    else:
        with only_driver(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
