"""The members of a shard, one after the other, for arbitrary bytes: read as a stream, never unpacked, and never larger than a shard may be."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from harness.errors import ShardError, in_one_line

TAR_END = 1024  # a complete tar ends in two zero blocks of 512 bytes
_START = 10  # bytes that identify a file's format
_HEADER_BYTES = 2**20
"""Maximum size of one extended header: a name of a megabyte is not a name."""
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_READS_AT_END = 3
"""How often `tarfile` may read at the end of a file; it would try for years to skip what a header promises."""
_META = re.compile(r"__[^/]*__($|/)")
"""WebDataset's own members, which do not belong to a sample."""
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_COMPRESSED = {
    b"\x1f\x8b": "gzip; decompress it (gunzip)",
    **{b"BZh%d1AY&SY" % level: "bzip2; decompress it (bunzip2)" for level in range(1, 10)},
    b"\xfd7zXZ\x00": "xz; decompress it (unxz)",
    b"\x28\xb5\x2f\xfd": "zstd; decompress it (unzstd)",
    b"\x04\x22\x4d\x18": "lz4; decompress it (unlz4)",
    b"PK\x03\x04": "zip; unzip it and pack its files with tar",
    b"7z\xbc\xaf\x27\x1c": "7-Zip; unpack it and pack its files with tar",
}
"""First bytes of files that are not a plain tar (which begins with a name, possibly BZhang.jpg) → the format and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Unread:
    """Stands for a member's bytes that were not read."""

    reason: str


class HashingReader(io.RawIOBase):
    """Passes a stream through, keeping its digest, its length and its last bytes. Raises OSError where the stream cannot be read, whatever the
    stream raises: a store's own exception must not be taken for a damaged tar."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._reads_at_end = 0
        self.length = 0
        self.tail = b""
        self.start = self._peeked = self._read(_START)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._next(size)
        self._reads_at_end += not data
        if self._reads_at_end > _READS_AT_END:
            raise tarfile.ReadError(f"unexpected end of data after {self.length} bytes")
        return data

    def drain(self) -> str:
        """Read to the end; the digest of everything."""
        while self._next(1 << 20):
            pass
        return self._digest.hexdigest()

    def _next(self, size: int) -> bytes:
        data, self._peeked = self._peeked or self._read(size), b""
        self._digest.update(data)
        self.length += len(data)
        self.tail = (self.tail + data)[-TAR_END:]
        return data

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except OSError:
            raise
        except Exception as error:  # of a store behind a URL: many of their exceptions are not an OSError
            raise OSError(in_one_line(error)) from error


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED and header.size > _HEADER_BYTES:
            raise tarfile.ReadError(f"extended header of {header.size} bytes")
        return header


def read_members(reader: HashingReader, most: int) -> Iterator[tuple[str, bytes | Unread]]:
    """(name, bytes) of every member of a tar that belongs to a sample, in order; none may have more than `most` bytes.

    Raises tarfile.TarError, or any other error of `tarfile` on a damaged header, where the tar is damaged, and OSError where it cannot be read.
    """
    with tarfile.open(fileobj=reader, mode="r|", tarinfo=_Header) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # which would keep every header
            if not member.isdir() and not _META.match(member.name):
                yield member.name, _contents(tar, member, most)


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes | Unread:
    if member.issym() or member.islnk():
        return Unread(reason="member that is a link; pack the file itself (tar --dereference --hard-dereference)")
    if not member.isreg():
        return Unread(reason="member that is no file")
    if member.issparse():
        return Unread(reason="sparse member; pack it without --sparse")
    if member.size > most:
        return Unread(reason="member larger than its shard should be")
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def key_and_member(name: str) -> tuple[str, str] | tuple[None, None]:
    """WebDataset's rule: the key is everything up to the first dot of the file's name, the member's name the rest; none for names without."""
    match = _NAME.fullmatch(name)
    if match is None or match[2].startswith("__"):  # reserved by WebDataset
        return None, None
    return match[1], match[2]


def refuse_compressed(url: str, start: bytes) -> None:
    """Raise ShardError where `start`, the first bytes of a file, are those of an archive that is not a plain tar."""
    for magic, remedy in _COMPRESSED.items():
        if start.startswith(magic):
            raise ShardError(f"{url}: expected a plain tar, got one compressed with {remedy}, and write its new bytes and sha256 into manifest.json")
