"""The writer that every data set's recipe shares: records → deterministic tars → verified → published at once.

A recipe says what its samples are (`DataSet`: the items of each split, and a function that makes one item a `Record`) and calls `main`. The writer
cuts the items into shards, makes each shard in a worker process, reads every shard back from disk, and renames the finished folder into place. The
bytes do not depend on the number of workers; an interrupted build resumes where it stopped.

During the build, a data set `<out>` lies in `.<out>.building/` beside its final place: `data/` will be published, `receipts/` records which of its
shards are whole, `lock` keeps two builds apart, `replaced/` holds what is being overwritten.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from harness.data.manifest import FILE_NAME, Annotation, Manifest, MaskKind, Rules, Shard, Split
from harness.data.shards import printable
from harness.errors import HarnessError, RequestError, RunError, ShardError
from shards import counts
from shards.counts import Counts, Unfit
from shards.tars import EXTENSIONS, Record, shown, verify_record, verify_shard, write_tar

FORMAT = 1
"""Raised with every change of the writer that changes bytes; part of every shard's content key."""
NAMED = 10
"""Maximum number of unfit samples of a split that are printed; all are counted."""
LONGEST = 1200
"""Characters of an error's line."""
LOOKED_AT = 20_000
"""Maximum number of entries of a source that are examined for a message."""
_IMAGES = (*(f".{extension}" for extension in EXTENSIONS), ".jpeg", ".bmp", ".tif", ".tiff")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataSet(Generic[T]):
    """Everything that the writer needs to know about a data set."""

    name: str
    version: str
    license: str
    source: str
    classes: Sequence[str]
    annotations: Sequence[Annotation]
    splits: Mapping[str, Sequence[T]]
    """Items of each split, in the order of the shards. An item's repr must name it fully, and it must pickle."""
    make: Callable[[T], Record]
    """A pure function at a module's top level: workers import it."""
    content: str
    """A digest of everything that `make` reads apart from the items: a finished shard is kept only while this stays the same."""
    layout: str
    """Where in the source the recipe looks for images, as a noun, for the message that it finds none."""
    counts: Counts = field(default_factory=Counts)
    """Counts of the recipe itself so far, by the splits' official names."""
    parts: Sequence[str] = ()
    part_of: Mapping[str, str | None] = field(default_factory=dict)
    mask_classes: Mapping[MaskKind, Sequence[str]] = field(default_factory=dict)
    levels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    counterparts: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    official: Mapping[str, str] = field(default_factory=dict)
    """The data set's own name of a split, where that differs."""
    samples_per_shard: int = 1000
    """The maximum; a split's samples are spread evenly."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text files to lie beside the manifest, such as the licence: name → content."""


@dataclass(frozen=True, kw_only=True)
class _Job(Generic[T]):
    """One shard to be made, with everything that a worker needs."""

    split: str
    file: str
    items: Sequence[T]
    make: Callable[[T], Record]
    rules: Rules
    content: str
    leave_out: bool
    """Whether unfit items are left out."""


@dataclass(frozen=True, kw_only=True)
class _Receipt:
    """A shard that is whole on disk."""

    content: str
    samples: int
    bytes: int
    sha256: str
    keys: Sequence[str]
    unfit: Sequence[tuple[str, str]] = ()
    """(reason, message) of each item that is left out only with --partial."""
    lawful: Sequence[str] = ()
    """The reason of each item that is always left out."""

    @property
    def left_out(self) -> int:
        return len(self.unfit) + len(self.lawful)


# --- the command ------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)


def main(
    describe: Callable[..., DataSet[T]], description: str, argv: Sequence[str] | None = None, options: argparse.ArgumentParser | None = None
) -> int:
    """A recipe's command line: `--source DIR --out DIR [--workers N] [--overwrite]`. `describe` gets the source folder.

    `options`, a parser made with add_help=False, holds the recipe's further options; `describe` gets their values by keyword.
    Returns the exit status: 0 published, or the same bytes were already there; 2 bad input, reported in one line, nothing published; 130 on Ctrl-C.
    """
    parser = _Parser(description=description, allow_abbrev=False, parents=[options] if options else [])
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="the data set as its makers publish it, unpacked")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to publish; its name need not exist yet")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace another version of the data set at --out")
    given = parser.parse_args(argv)
    try:
        if given.workers < 1:
            raise RequestError(f"--workers: expected at least 1, got {given.workers}")
        if not given.source.is_dir():
            raise RequestError(f"--source: expected a folder, got {given.source}, which is none")
        console = Console(stderr=True)
        recipe_options = {name: value for name, value in vars(given).items() if name not in ("source", "out", "workers", "overwrite")}
        with console.status("reading the source"):
            data_set = describe(given.source, **recipe_options)
        lenient = bool(recipe_options.get("partial"))
        manifest = build(
            data_set, given.out, workers=given.workers, overwrite=given.overwrite, leave_out=lenient, console=console, source=given.source
        )
    except (HarnessError, OSError) as error:
        print(_line(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 2
    except Exception as error:
        print(_line(_unforeseen(error, given.source)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from here", file=sys.stderr)
        return 130
    samples = ", ".join(f"{name} {split.samples}" for name, split in manifest.splits.items())
    print(_line(f"{given.out}: {manifest.dataset} {manifest.version}, {samples}"))
    return 0


def _unforeseen(error: Exception, source: Path) -> str:
    """The message for an unforeseen error, usually of a damaged source, with its place in the recipe."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == Path(__file__).parent]
    at = f" (shards/{Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"RequestError: {source}: expected the data set as its makers publish it, got {type(error).__name__}: {error!s:.200}{at}; unpack it again"


def _line(text: str) -> str:
    """Text as one line that a terminal can show; too long a text is cut in the middle, since the remedy stands at its end."""
    line = printable(" ".join(text.encode("utf-8", "backslashreplace").decode().split()))  # a file's name may have bytes that are not text
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 2 // 3]} … {line[-LONGEST // 3 :]}"


def build(
    data_set: DataSet[T],
    out: Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
    leave_out: bool = False,
    console: Console | None = None,
    source: Path | None = None,
) -> Manifest:
    """Make, verify and publish a data set; returns its manifest. `source`, if given, is searched for the message that a split is empty.

    With `leave_out`, items that the recipe refuses are printed on the console, counted in counts.json and the version, and left out. A split that
    becomes empty is still an error.

    Raises RequestError where `out` is something else, another build of it runs, a record cannot be made, or a split has no sample; ShardError where
    a shard does not read back correctly; RunError where a worker died. Nothing is published then, and finished shards are kept for the next try.
    """
    out = Path(os.path.abspath(out))
    _refuse_empty(data_set, {split: len(items) for split, items in data_set.splits.items()}, source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{out}: expected a place where a folder can be made, got {error.strerror}; choose another --out") from None
    with _building(out) as work:
        _refuse_what_is_no_data_set(out, data_set.name, overwrite)
        jobs = list(_jobs(data_set, leave_out))
        receipts = _make_all(jobs, work, workers, console)
        refuse_repeated_keys(receipts)
        data_set = _counted(data_set, jobs, receipts, console)
        manifest = _manifest(data_set, jobs, receipts)
        try:
            example = next((message for receipt in receipts for _, message in receipt.unfit), None)
            _refuse_empty(data_set, {name: split.samples for name, split in manifest.splits.items()}, source, example)
        except RequestError:
            shutil.rmtree(work / "receipts")  # another try over this source would fail in the same way
            raise
        _lay_beside(work / "data", [shard.file for split in manifest.splits.values() for shard in split.shards], _texts(data_set, manifest))
        _publish(work, out, overwrite)
    return manifest


# --- planning ---------------------------------------------------------------------------------------------------------


def _jobs(data_set: DataSet[T], leave_out: bool = False) -> Iterator[_Job[T]]:
    if data_set.samples_per_shard < 1:
        raise RequestError(f"{data_set.name}: expected at least one sample per shard, got {data_set.samples_per_shard}")
    rules = Rules(
        annotations=frozenset(data_set.annotations),
        classes=len(data_set.classes),
        parts=frozenset(data_set.parts),
        mask_values={kind: len(names) for kind, names in data_set.mask_classes.items()},
    )
    for split, items in data_set.splits.items():
        count = -(-len(items) // data_set.samples_per_shard)  # as few shards as possible, of sizes that differ by at most one
        for number in range(count):
            chunk = items[number * len(items) // count : (number + 1) * len(items) // count]
            identity = repr((FORMAT, data_set.name, data_set.content, sorted(rules.annotations), list(chunk)))
            yield _Job(
                split=split,
                file=f"{split}-{number:05d}.tar",
                items=chunk,
                make=data_set.make,
                rules=rules,
                content=hashlib.sha256(identity.encode()).hexdigest(),
                leave_out=leave_out,
            )


def _counted(data_set: DataSet[T], jobs: Sequence[_Job[T]], receipts: Sequence[_Receipt], console: Console | None) -> DataSet[T]:
    """The data set, with the samples left out during the build in its version and counts; prints all that is left out on the console."""
    unfit: dict[str, list[str]] = {}
    left_out: dict[str, Counter[str]] = {}
    for job, receipt in zip(jobs, receipts, strict=True):
        official = data_set.official.get(job.split, job.split)
        left_out.setdefault(official, Counter()).update([*(reason for reason, _ in receipt.unfit), *receipt.lawful])
        unfit.setdefault(job.split, []).extend(message for _, message in receipt.unfit)
    total = data_set.counts.with_left_out(left_out)
    if console is not None:
        for split, messages in unfit.items():
            for message in messages[:NAMED]:
                console.print(_line(f"left out of {split}: {message}"), markup=False, highlight=False, soft_wrap=True)
            if len(messages) > NAMED:
                console.print(f"left out of {split}: {len(messages) - NAMED} more, which {counts.FILE_NAME} counts", highlight=False, soft_wrap=True)
        for line in total.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    without = ", ".join(f"{len(messages)} unfit {split}" for split, messages in unfit.items() if messages)
    version = f"{data_set.version}, without {without}" if without else data_set.version
    return dataclasses.replace(data_set, version=version, counts=total)


def _refuse_empty(data_set: DataSet[T], samples: Mapping[str, int], source: Path | None, example: str | None = None) -> None:
    """Raise RequestError where a split has no sample, naming the layout that the recipe looks for, what was left out, and what the source has.

    `example`: why the first unfit item is unfit.
    """
    empty = [split for split, count in samples.items() if not count]
    if not empty:
        return
    names = {split: data_set.official.get(split, split) for split in empty}
    got = ", ".join(f"none in {split}" if split == name else f"none in {split} ({name})" for split, name in names.items())
    lost = "; ".join(f"left out of {name}: {reasons}" for name in names.values() if (reasons := data_set.counts.reasons(name, examples=True)))
    contents = "" if source is None else f"; {source} has {images_of(source)}"
    expected = f"expected samples in every split, from {data_set.layout}"
    raise RequestError(f"{data_set.name}: {expected}, got {got}{f'; {lost}' if lost else ''}{f' ({example})' if example else ''}{contents}")


def images_of(source: Path) -> str:
    """The images of a folder, in words, from its first entries."""
    images: list[str] = []
    looked = 0
    for folder, folders, files in os.walk(source):
        folders.sort()
        images += [os.path.relpath(os.path.join(folder, name), source) for name in sorted(files) if name.lower().endswith(_IMAGES)]
        looked += len(folders) + len(files)
        if looked > LOOKED_AT:
            return f"images such as {images[0]}" if images else f"no image among its first {looked} entries"
    if len(images) < 2:
        return f"one image, {images[0]}" if images else "no image"
    return f"{len(images)} images, such as {images[0]}"


def _manifest(data_set: DataSet[T], jobs: Sequence[_Job[T]], receipts: Sequence[_Receipt]) -> Manifest:
    made = list(zip(jobs, receipts, strict=True))
    splits = {
        name: Split(
            samples=sum(receipt.samples for job, receipt in made if job.split == name),
            official=data_set.official.get(name),
            shards=tuple(
                Shard(file=job.file, samples=receipt.samples, bytes=receipt.bytes, sha256=receipt.sha256)
                for job, receipt in made
                if job.split == name and receipt.samples
            ),
        )
        for name in data_set.splits
    }
    try:
        return Manifest(
            schema=1,
            dataset=data_set.name,
            version=data_set.version,
            license=data_set.license,
            source=data_set.source,
            classes=tuple(data_set.classes),
            parts=tuple(data_set.parts),
            part_of=dict(data_set.part_of),
            annotations=tuple(data_set.annotations),
            mask_classes={kind: tuple(names) for kind, names in data_set.mask_classes.items()},
            levels={name: tuple(of) for name, of in data_set.levels.items()},
            counterparts={name: tuple(tuple(labels) for labels in counterparts) for name, counterparts in data_set.counterparts.items()},
            splits=splits,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{data_set.name}: {where + ': ' if where else ''}{message}; {_whose(where or message)}") from None


def _whose(complaint: str) -> str:
    """The remedy for an invalid manifest: names come from the source, everything else from the recipe."""
    named = ("classes", "expected classes", "parts", "expected parts", "mask_classes", "annotations name")
    return "the source gives these names: rename them there" if complaint.startswith(named) else "correct the recipe"


# --- making -----------------------------------------------------------------------------------------------------------


def _make_all(jobs: Sequence[_Job[T]], work: Path, workers: int, console: Console | None) -> list[_Receipt]:
    """All shards, made or kept, each read back; in the order of `jobs`."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("samples"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=console is None) as progress:
        task = progress.add_task("building", total=sum(len(job.items) for job in jobs))
        if workers == 1:
            receipts = []
            for job in jobs:
                receipts.append(_make_shard(job, work))
                progress.advance(task, len(job.items))
            return receipts
        with _pool(min(workers, max(1, len(jobs)))) as pool:
            futures = [pool.submit(_make_shard, job, work) for job in jobs]
            for future, job in zip(futures, jobs, strict=True):
                future.add_done_callback(partial(_advance, progress, task, len(job.items)))
            return _results(futures)


def _advance(progress: Progress, task: TaskID, samples: int, future: Future[_Receipt]) -> None:
    if not future.cancelled():
        progress.advance(task, samples)


def _results(futures: Sequence[Future[_Receipt]]) -> list[_Receipt]:
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:  # of several failures the first by position, so that the message depends less on timing
        if future in done and future.exception() is not None:
            for other in futures:
                other.cancel()
            if isinstance(future.exception(), BrokenProcessPool):
                raise RunError("a worker process died (out of memory?); run the same command again, finished shards are kept")
    return [future.result() for future in futures]


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    # not plain forks: the progress display has a thread, and forking a process with threads can lock up. A server that has imported this module once
    # forks workers that share its memory and are there at once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_with_parent() -> None:
    """End this worker when the build is killed, since an executor's workers would wait for work for ever; leave Ctrl-C to the build itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make_shard(job: _Job[T], work: Path) -> _Receipt:
    """One shard: kept where a receipt says that it is whole, else written; read back either way."""
    tar = work / "data" / job.file
    note = work / "receipts" / f"{job.file}.json"
    receipt = _receipt(note)
    if receipt is not None and receipt.unfit and not job.leave_out:
        receipt = None
    if receipt is None or receipt.content != job.content or not tar.is_file() or _sha256(tar) != receipt.sha256:
        note.unlink(missing_ok=True)
        receipt = _write_shard(job, tar)
        _write_whole(note, json.dumps(dataclasses.asdict(receipt)).encode())
    else:
        verify_shard(tar, receipt.keys, job.rules)
    if receipt.samples + receipt.left_out != len(job.items):
        raise ShardError(f"{job.file}: expected {len(job.items)} samples, got {receipt.samples}")
    return receipt


def _write_shard(job: _Job[T], tar: Path) -> _Receipt:
    """A shard, written and read back. If it does not read back and samples may be left out, it is written again without the offending ones."""
    try:
        return _write_records(job, tar, checked=False)
    except HarnessError:
        if not job.leave_out:
            raise
        return _write_records(job, tar, checked=True)


def _write_records(job: _Job[T], tar: Path, checked: bool) -> _Receipt:
    unfit: list[tuple[str, str]] = []
    lawful: list[str] = []

    def records() -> Iterator[Record]:
        for item in job.items:
            try:
                record = _made(job, item)
                if checked:
                    _check(job, record)
            except Unfit as error:
                if not (error.lawful or job.leave_out):
                    raise RequestError(str(error)) from error
                if error.lawful:
                    lawful.append(error.reason)
                else:
                    unfit.append((error.reason, str(error)))
            else:
                yield record

    keys = write_tar(tar, records())
    verify_shard(tar, keys, job.rules)
    return _Receipt(content=job.content, samples=len(keys), bytes=tar.stat().st_size, sha256=_sha256(tar), keys=keys, unfit=unfit, lawful=lawful)


def _made(job: _Job[T], item: T) -> Record:
    """The item's record. Raises Unfit where the recipe refuses it, RequestError where its source cannot be read."""
    try:
        return job.make(item)
    except Unfit:
        raise
    except RequestError as error:
        raise Unfit(str(error), counts.UNFIT) from error
    except HarnessError:
        raise
    except Exception as error:  # a damaged source file may raise anything
        raise RequestError(f"{job.file}: expected a record of {shown(item)}, got {type(error).__name__}: {error}") from error


def _check(job: _Job[T], record: Record) -> None:
    """Raise Unfit where a record would not read back."""
    try:
        verify_record(record, job.rules)
    except HarnessError as error:
        raise Unfit(str(error), "samples that do not read back") from error


def _receipt(note: Path) -> _Receipt | None:
    try:
        return _Receipt(**json.loads(note.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def refuse_repeated_keys(receipts: Sequence[_Receipt]) -> None:
    seen: set[str] = set()
    for receipt in receipts:
        for key in receipt.keys:
            if key in seen:
                raise ShardError(
                    f"expected keys that differ over all shards, got {shown(key)} twice; rename one of the two files, or correct the recipe"
                )
            seen.add(key)


# --- publishing -------------------------------------------------------------------------------------------------------


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """The work folder beside `out`, locked for this build; removed after a success, kept for the next try after a failure."""
    work = out.with_name(f".{out.name}.building")
    for folder in ("data", "receipts"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(f"{out}: expected no other build of it, got a running one; wait for it") from None
        if (work / "replaced").is_dir() and not out.exists():  # an earlier build died between its two renames
            os.rename(work / "replaced", out)
        try:
            yield work
        except BaseException:
            if not any((work / "receipts").glob("*")) and not (work / "replaced").is_dir():
                shutil.rmtree(work)  # there is nothing to resume
            raise
        shutil.rmtree(work)


def _refuse_what_is_no_data_set(out: Path, name: str, overwrite: bool) -> None:
    """Raise RequestError, before hours of work, where the content of `out` cannot be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise RequestError(f"{out}: expected a folder or nothing, got a file or a link; choose another --out")
    if out.is_dir() and any(out.iterdir()):
        try:
            existing = json.loads((out / FILE_NAME).read_bytes())["dataset"]
        except (OSError, ValueError, TypeError, KeyError):
            raise RequestError(f"{out}: expected an empty folder or a data set, got other files; choose another --out") from None
        if existing != name and not overwrite:
            raise RequestError(f"{out}: expected data set {name!r}, got {existing!r}; choose another --out, or say --overwrite")


def _texts(data_set: DataSet[T], manifest: Manifest) -> dict[str, str]:
    """The text files of a data set, by name: its manifest, its counts where there are any, and the recipe's further files."""
    counted = data_set.counts.included or data_set.counts.left_out
    return {FILE_NAME: manifest.to_json(), **({counts.FILE_NAME: data_set.counts.to_json()} if counted else {}), **data_set.files}


def _lay_beside(data: Path, tars: Sequence[str], files: Mapping[str, str]) -> None:
    """Write the manifest and the other text files; remove what an earlier, different build left."""
    for path in data.iterdir():
        if path.name not in tars:
            path.unlink()
    for name, content in files.items():
        _write_whole(data / name, content.encode("utf-8", "replace"))


def _publish(work: Path, out: Path, overwrite: bool) -> None:
    data, replaced = work / "data", work / "replaced"
    if out.is_dir() and any(out.iterdir()):
        if _digests(out) == _digests(data):
            return
        if not overwrite:
            raise RequestError(f"{out}: expected the same bytes, got a data set that differs; say --overwrite to replace it")
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(out, replaced)
    os.rename(data, out)  # over an empty folder, too


def _digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
