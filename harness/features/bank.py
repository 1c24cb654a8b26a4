"""Feature banks: what an encoder said of every item of a split, on disk, under a key that hashes everything that could change a byte.

A bank is one (encoder, split, view, readout); the readouts that one forward pass gives are banks of their own, so that a later sweep finds whichever
it needs. `<cache>/<key>/bank.json` says in words what the key hashes; `<cache>/<key>/<shard>.arrow` is one shard's part, an Arrow IPC file whose
metadata carries the shard's account. Parts appear under their names whole or not at all, and the first one stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from harness.core import Rows
from harness.data.item_key import sample_of
from harness.data.shards import ShardAudit
from harness.errors import BankError, RunError
from harness.features.mapped import joined_arrays
from harness.features.rows import take
from harness.files import Publisher, create
from harness.versions import EXTRACTION_VERSION

_UNREADABLE = (FileNotFoundError, pa.ArrowInvalid, KeyError, TypeError, ValueError)
DIGEST_BYTES = 16
INDEX_PREFIX = "index-"
"""How the files of a bank begin that repeat what its parts say (see harness.features.index)."""
_PASSING = frozenset(
    {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOLCK}
    | {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN}
)
"""What a write may end with that goes well a moment later; of a network it is ConnectionError or TimeoutError as well."""

_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""What file systems of fsspec call that which changes with a file's contents, the surest first."""


class ShardList(tuple[tuple[str, str, int], ...]):
    """(file, sha256, samples) of every shard of a split, in the manifest's order. One list serves all banks of the split."""

    @functools.cached_property
    def text(self) -> str:
        """As a bank's key hashes it: JSON, worked out once."""
        return json.dumps(self)

    def __reduce__(self) -> tuple[type[ShardList], tuple[tuple[tuple[str, str, int], ...]]]:
        return ShardList, (tuple(self),)


@dataclass(frozen=True, kw_only=True)
class LeasedBank:
    """A bank as one shard of it needs to know it: what is sent to actors, whatever number of shards it has."""

    key: str
    dataset: str
    split: str
    readout: str
    view: str


@dataclass(frozen=True, kw_only=True)
class BankSpec:
    """Identity of a bank. Two specs with one key hold the same bytes."""

    dataset: str
    split: str
    shards: tuple[tuple[str, str, int], ...]
    """(file, sha256, samples) of every shard, in the manifest's order; a `ShardList` where several specs share it."""
    readout: str
    view: str
    identity: tuple[tuple[str, Any], ...]
    """Everything else that could change a byte: weights, architecture, preprocessing, precision, batch size, device type, versions."""

    @functools.cached_property
    def key(self) -> str:
        """Digest of the JSON of all fields, which are sorted by name."""
        plain = asdict(dataclasses.replace(self, shards=()))
        before = json.dumps({name: plain[name] for name in ("dataset", "identity", "readout")}, sort_keys=True)
        after = json.dumps({name: plain[name] for name in ("split", "view")}, sort_keys=True)
        shards = self.shards.text if isinstance(self.shards, ShardList) else json.dumps(self.shards)
        return hashlib.sha256(f'{before[:-1]}, "shards": {shards}, {after[1:]}'.encode()).hexdigest()[:32]

    @functools.cached_property
    def leased(self) -> LeasedBank:
        return LeasedBank(key=self.key, dataset=self.dataset, split=self.split, readout=self.readout, view=self.view)

    def describe(self) -> dict[str, Any]:
        return {**asdict(self), "identity": dict(self.identity), "key": self.key, "extraction_version": EXTRACTION_VERSION}


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A shard's account as its bank part carries it."""

    bank_key: str
    shard: str
    expected: int
    seen: int
    failed: int
    duplicates: int
    reasons: Mapping[str, Sequence[str]]
    sha256: str
    attempts: int
    node: str
    rows: int
    seconds: float
    """Time that the encoder took for the pass, which all its readouts share."""
    images: int
    """Items that the encoder saw for this part, before padding."""

    @property
    def status(self) -> str:
        return "ok" if not self.reasons and self.seen == self.expected else "incomplete"

    @staticmethod
    def of(audit: ShardAudit, **fields: Any) -> Receipt:
        account = {name: getattr(audit, name) for name in ("shard", "expected", "seen", "failed", "duplicates", "reasons", "sha256")}
        return Receipt(**account, **fields)


@dataclass(kw_only=True, eq=False)
class ShardRows:
    """The rows of one part while they are being made."""

    keys: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    masks: dict[str, list[np.ndarray]] = field(default_factory=dict)


def part_name(shard: str) -> str:
    """File name of a shard's part in the folder of a bank."""
    return shard.removesuffix(".tar").replace("/", "__") + ".arrow"


class BankStore:
    """A folder or URL (anything fsspec knows) that holds banks."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._system, self._path = fsspec.core.url_to_fs(self.root)
        self._local = isinstance(self._system, fsspec.implementations.local.LocalFileSystem)
        self._publisher = Publisher()
        self.read_only: str | None = None
        """Why nothing can be written, if so."""

    def _file(self, *names: str) -> str:
        return "/".join((self._path, *names))

    @staticmethod
    def _part(key: str, shard: str) -> tuple[str, str]:
        return key, part_name(shard)

    def publish(self, names: Sequence[str], data: bytes, *, replace: bool = False) -> bool:
        """Write `data` whole under `names`; False (and nothing written) where the name is taken and `replace` is not asked for.

        Raises RunError where it cannot be written, and BankError where another try may do better: of a network, or a device that did not answer.
        """
        target = self._file(*names)
        try:
            if not self._local:
                if not replace:
                    return create(self._system, target, data)
                self._system.pipe_file(target, data)  # object stores publish an object when its upload ends
                return True
            return self._publisher.publish(Path(target), data, replace=replace)
        except OSError as error:
            message = f"cannot write {target}: {error.strerror or error}"
            if isinstance(error, ConnectionError | TimeoutError) or error.errno in _PASSING:
                raise BankError(f"{message}; once it can be reached again, run again") from error
            raise RunError(f"{message}; free some space or choose another --cache, then run again") from error

    def try_out(self) -> None:
        """Publish a file twice, and remove it. Raises RunError where that fails, or where the first one does not stay."""
        name = (f".tried-{uuid.uuid4().hex[:8]}",)
        try:
            if not self.publish(name, b"1") or self.publish(name, b"2") or self.read_bytes(*name) != b"1":
                raise RunError("a file that is published keeps its name from a later one on every file system but this")
        finally:
            self.discard(*name)

    def exists(self) -> bool:
        """Whether there is such a folder; raises what its file system raises."""
        return bool(self._system.exists(self._path))

    @property
    def free_bytes(self) -> int | None:
        """Room that is left for this user, where the store is a local folder."""
        if not self._local:
            return None
        place = Path(self._path)
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def read_bytes(self, *names: str) -> bytes | None:
        """Contents of a file of the store, or None where it is not there."""
        try:
            data: bytes = self._system.cat_file(self._file(*names))
        except FileNotFoundError:
            return None
        return data

    def discard(self, *names: str) -> None:
        """Remove a folder of the store, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(self._file(*names), recursive=True)

    def describe(self, spec: BankSpec) -> None:
        """Publish `bank.json`, which says in words what the bank's key hashes."""
        self.publish((spec.key, "bank.json"), json.dumps(spec.describe(), indent=2).encode())

    def write_part(self, spec: BankSpec | LeasedBank, rows: ShardRows, receipt: Receipt) -> None:
        """Publish one shard's part. A complete part that is there already stays; an incomplete or unreadable one is replaced.

        A leased bank has been described by whoever leased it.
        """
        existing = self.receipt(spec, receipt.shard)
        if existing is not None and existing.status == "ok":
            return
        if isinstance(spec, BankSpec):
            self.describe(spec)
        part, data = self._part(spec.key, receipt.shard), _serialise(rows, receipt)
        if not self.publish(part, data, replace=existing is not None) and self.receipt(spec, receipt.shard) is None:
            self.publish(part, data, replace=True)  # what stands there cannot be read

    def receipt(self, spec: BankSpec | LeasedBank, shard: str) -> Receipt | None:
        """The account that a part carries, or None where there is no (readable) part."""
        try:
            with self._reader(spec.key, shard, whole=False) as reader:
                return _receipt(reader)
        except _UNREADABLE:
            return None

    def complete(self, spec: BankSpec | LeasedBank, shards: Iterable[str]) -> set[str]:
        """Those of `shards` whose parts are there and have every sample."""
        receipts = {shard: self.receipt(spec, shard) for shard in shards}
        return {shard for shard, receipt in receipts.items() if receipt is not None and receipt.status == "ok"}

    def marks(self, key: str) -> dict[str, str | None]:
        """Name to mark of every file of a bank, in one look at its folder: a file that was replaced has another mark.

        That is its size and its time, or the tag that the store gives it; None where the store gives neither.
        """
        folder = self._file(key)
        try:
            if self._local:
                return dict(_local_marks(folder))
            self._system.invalidate_cache(folder)
            listed = self._system.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {str(about["name"]).rsplit("/", 1)[-1]: _mark(about) for about in listed}

    def receipt_and_keys(self, spec: BankSpec | LeasedBank, shard: str) -> tuple[Receipt, bytes] | None:
        """The account of a part and a digest of the keys of its items, in one opening; None where there is no (readable) part."""
        try:
            with self._reader(spec.key, shard, whole=False, columns=[0]) as reader:
                return _receipt(reader), _digest(reader.read_all()["key"])
        except _UNREADABLE:
            return None

    def repeated(self, spec: BankSpec, *, without: Sequence[str] = ()) -> dict[str, dict[str, str]]:
        """Shard to the keys of those of its samples that a shard before it, in the manifest's order, has as well, and that shard.

        Shards without such samples are left out, and so are those in `without` and those whose part cannot be read.
        """
        return _repeated((file, self._keys(spec.key, file)) for file, _, samples in spec.shards if samples and file not in without)

    def rows(self, spec: BankSpec, *, mask: str | None = None, without: Sequence[str] = ()) -> Rows:
        """All rows of a bank, shards in the manifest's order but for those in `without`; of a sample that several shards have, those of the first.

        Features of up to 4 GiB are copied into memory; larger ones are read from the mapped parts as they are asked for. `mask` names the label map
        that comes along. Raises BankError where a part is missing or damaged, or has no such label map.
        """
        loaded = {file: self._load(spec, file, mask) for file, _, samples in spec.shards if samples and file not in without}
        repeated = _repeated((file, part.keys) for file, part in loaded.items())
        parts = [part for part in (_without(part, repeated.get(file, {})) for file, part in loaded.items()) if len(part)]
        if len(parts) == 1:
            return parts[0]
        masks = [part.masks for part in parts if part.masks is not None]
        return Rows(
            keys=[key for part in parts for key in part.keys],
            groups=[group for part in parts for group in part.groups],
            targets=np.concatenate([part.targets for part in parts]) if parts else np.zeros(0, np.int64),
            features=joined_arrays([part.features for part in parts]) if parts else np.zeros((0, 0), np.float32),
            masks=np.concatenate(masks) if masks else None,
        )

    @contextlib.contextmanager
    def _reader(self, key: str, shard: str, *, whole: bool, columns: Sequence[int] = ()) -> Iterator[pa.ipc.RecordBatchFileReader]:
        """A part: to be read whole, or its schema and some columns alone, and then nothing else of a file that is not local."""
        path, options = self._file(*self._part(key, shard)), pa.ipc.IpcReadOptions(included_fields=list(columns))
        if self._local:
            yield pa.ipc.open_file(pa.memory_map(path), options=options)  # what was read keeps the mapping alive
        elif whole:
            yield pa.ipc.open_file(io.BytesIO(self._system.cat_file(path)), options=options)
        else:
            with self._system.open(path, "rb", cache_type="none") as file:
                yield pa.ipc.open_file(file, options=options)

    def _keys(self, key: str, shard: str) -> Sequence[str]:
        """Keys of a part's items; none where it cannot be read."""
        with contextlib.suppress(OSError, pa.ArrowInvalid), self._reader(key, shard, whole=False, columns=[0]) as reader:
            keys: list[str] = reader.read_all()["key"].to_pylist()
            return keys
        return ()

    def _discard_indexes(self, key: str) -> None:
        """So that the next run reads the parts of a bank themselves, one of which is not what an index may say of it."""
        with contextlib.suppress(Exception):  # there is something worse to tell
            for name in self.marks(key):
                if name.startswith(INDEX_PREFIX):
                    self.discard(key, name)

    def _load(self, spec: BankSpec, shard: str, mask: str | None) -> Rows:
        try:
            with self._reader(spec.key, shard, whole=True) as reader:
                table = reader.read_all()
        except (OSError, pa.ArrowInvalid) as error:
            self._discard_indexes(spec.key)
            raise BankError(f"bank {spec.key}, {shard}: {error}; run the sweep again to encode this shard anew") from error
        return Rows(
            keys=table["key"].to_pylist(),
            groups=table["group"].to_pylist(),
            targets=table["target"].to_numpy(),
            features=_tensor(table, "feature"),
            masks=_tensor(table, f"mask_{mask}") if mask is not None else None,
        )


def _local_marks(folder: str) -> Iterator[tuple[str, str]]:
    with os.scandir(folder) as files:
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # another process has renamed what it wrote
                about = file.stat()
                yield file.name, f"{about.st_size}:{about.st_mtime_ns}"


def _mark(about: Mapping[str, Any]) -> str | None:
    """Of what fsspec says of a file."""
    tag = next((about[name] for name in _TAGS if about.get(name)), None)
    return None if tag is None else f"{about.get('size')}:{tag}"


def _receipt(reader: pa.ipc.RecordBatchFileReader) -> Receipt:
    return Receipt(**json.loads(reader.schema.metadata[b"receipt"]))


def _digest(column: pa.ChunkedArray) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for chunk in column.chunks:
        for buffer in chunk.buffers():
            if buffer is not None:
                digest.update(buffer)
    return digest.digest()


def _repeated(shards: Iterable[tuple[str, Iterable[str]]]) -> dict[str, dict[str, str]]:
    """Of shards and the keys of their items, shard to the keys of samples that a shard before it has as well, and that shard."""
    first: dict[str, str] = {}
    repeated: dict[str, dict[str, str]] = {}
    for shard, items in shards:
        for key in map(sample_of, items):
            if first.setdefault(key, shard) != shard:
                repeated.setdefault(shard, {})[key] = first[key]
    return repeated


def _without(rows: Rows, samples: Collection[str]) -> Rows:
    """The rows, but for those of some samples."""
    if not samples:
        return rows
    return take(rows, np.array([index for index, key in enumerate(rows.keys) if sample_of(key) not in samples], np.int64))


def _serialise(rows: ShardRows, receipt: Receipt) -> bytes:
    columns: dict[str, pa.Array] = {
        "key": pa.array(rows.keys, pa.string()),
        "group": pa.array(rows.groups, pa.string()),
        "target": pa.array(rows.targets, pa.int64()),
    }
    shapes: dict[str, list[int]] = {}
    for name, arrays in {"feature": rows.features, **{f"mask_{kind}": masks for kind, masks in rows.masks.items()}}.items():
        stacked = np.stack(arrays) if arrays else np.zeros((0, 1), np.float32)
        shapes[name] = list(stacked.shape[1:])
        width = int(np.prod(stacked.shape[1:]))
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(stacked.reshape(-1)), width)
    metadata = {"receipt": json.dumps(asdict(receipt)), "shapes": json.dumps(shapes)}
    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _tensor(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        raise BankError(f"bank: expected a column {name!r}, got {', '.join(table.column_names)}; does the data set have these label maps?")
    shape = json.loads(table.schema.metadata[b"shapes"])[name]
    flat = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in table[name].chunks]
    joined = flat[0] if len(flat) == 1 else np.concatenate(flat) if flat else np.zeros(0, np.float32)
    result: np.ndarray = joined.reshape(table.num_rows, *shape)
    return result
