"""Text files as people have them: gzip, byte order marks, UTF-16, any line ends; what is no Unicode is named, never guessed."""

from __future__ import annotations

import codecs
import gzip
import io
import re
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, TextIO

from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.stores import AnyFile

_BLOCK = 1 << 20
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip or Excel file; unpack or export it",
    b"\x1f\x8b": "packed by gzip; unpack it",
    b"BZh[1-9]1AY&SY": "packed by bzip2; unpack it",
    b"\xfd7zXZ\x00": "packed by xz; unpack it",
    b"[(]\xb5/\xfd": "packed by zstd; unpack it",
    b"7z\xbc\xaf\x27\x1c": "packed by 7-Zip; unpack it",
    b"PAR1": "a Parquet file; name it .parquet",
    b"ARROW1|FEA1": "an Arrow or Feather file; write it as Parquet or JSON lines",
    b"\xff\xff\xff\xff": "an Arrow stream; name the folder that it was saved in, or write it as Parquet",
    b"%PDF": "a PDF; take the text out of it",
    b"\xd0\xcf\x11\xe0": "an Excel file; export it as CSV",
}
"""By a pattern of what a file begins with, what it is and what to do."""
_DAMAGE = re.compile("[\udc80-\udcff]+")
_CUT = re.compile(
    "(\udced[\udca0-\udcbf][\udc80-\udcbf]|[\udce0-\udcef][\udc80-\udcbf]|[\udcf0-\udcf4][\udc80-\udcbf]{1,2}"
    "|[\udcc2\udcc3\udce2\udcf0])+"
)
"""What is left where UTF-8 was cut within a character, or wrote surrogates; alone, first bytes of its commonest characters."""
_TELLING = frozenset(b"\x85\x91\x92\x93\x94\x96\x97") | frozenset(range(0xC0, 0xFF)) - frozenset(b"\xd7\xf7")
"""Quotes, dashes and letters of Windows-1252: one of them tells of another encoding."""
_WESTERN = (_TELLING | frozenset(b"\x80\x84\xa0\xa7\xab\xb0\xbb")) - frozenset(b"\xd0\xdd\xde\xf0\xfd\xfe")
"""What Windows-1252 text holds beside ASCII; without letters that are commoner in other encodings."""
_LONGEST_WESTERN = 2
_LONGEST_DAMAGE = 3
_SURROGATE = re.compile("[\ud800-\udfff]")


def open_text(path: AnyFile) -> TextIO:
    """Open a text file, compressed by gzip or not; line ends are those of the file.

    A byte that is no UTF-8 is read as a lone surrogate, which `mended` replaces: one damaged row is not the end of a file.

    Raises:
        CorpusError: the file is empty, no text, or in another encoding than UTF-8, or UTF-16 and UTF-32 with their mark; what
            shows itself only farther on in the file is refused where that is read.
    """
    raw = _unpacked(path)
    try:
        first = raw.read(_BLOCK)
        if not first.strip():
            raise CorpusError(f"{path} is empty, expected at least one row; check the file.")
        return _text(raw, str(path), raw.read, first)
    except BaseException:
        raw.close()
        raise


def lines_of(raw: BufferedIOBase, name: str) -> Iterator[str]:
    """Draw the lines of a stream as they come, decoded as those of a file; an empty stream has none."""
    first = raw.read1(_BLOCK)
    if first:
        yield from _text(raw, name, raw.read1, first)


def _text(raw: BufferedIOBase, name: str, read: Callable[[int], bytes], first: bytes) -> TextIO:
    encoding = _encoding(name, first)
    is_utf8 = encoding.startswith("utf-8")
    checked = io.BufferedReader(_Checked(raw, name, read, first, is_utf8))
    return io.TextIOWrapper(
        checked, encoding=encoding, errors="surrogateescape" if is_utf8 else "surrogatepass", newline=""
    )


def mended(text: str) -> str:
    """Return a text with U+FFFD in place of what is no Unicode: half of a surrogate pair, or a byte that was no UTF-8."""
    if _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _unpacked(path: AnyFile) -> BufferedIOBase:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed:
        return gzip.open(path if isinstance(path, Path) else path.open("rb"), "rb")
    return path.open("rb")


def _encoding(name: str, sample: bytes) -> str:
    kind = next((kind for magic, kind in _OTHER_KINDS.items() if re.match(magic, sample)), None)
    if kind is not None:
        found, _, remedy = kind.partition("; ")
        raise CorpusError(f"{name} is {found}, expected text; {remedy}.")
    for mark, encoding in _MARKS:
        if sample.startswith(mark):
            return encoding
    n_zeros = sample.count(0)
    if n_zeros > len(sample) // 5:
        raise CorpusError(
            f"{name} seems to be UTF-16 without a byte order mark, as every other byte is zero; expected UTF-8; convert it, for "
            "example with iconv -f UTF-16LE -t UTF-8."
        )
    if n_zeros > len(sample) // 100:
        raise CorpusError(f"{name} holds {n_zeros} zero bytes, and is no text; expected UTF-8; check the file.")
    return "utf-8"


class _Checked(io.RawIOBase):
    """The bytes of a text; what is not in UTF-8 is refused as soon as that can be told from UTF-8 with damage."""

    def __init__(
        self, raw: BufferedIOBase, name: str, read: Callable[[int], bytes], first: bytes, is_utf8: bool
    ) -> None:
        self._raw, self._name, self._read, self._is_utf8 = raw, name, read, is_utf8
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._block = memoryview(first)
        self._n_lines = self._n_whole = self._n_odd_bytes = self._n_odd = 0
        self._look(first)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block:
            block = self._read(_BLOCK)
            self._look(block)
            self._block = memoryview(block)
        n = min(len(buffer), len(self._block))
        buffer[:n], self._block = self._block[:n], self._block[n:]
        return n

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _look(self, block: bytes) -> None:
        """Count characters of UTF-8 and what is damaged in a block; raise CorpusError where there is more of the latter."""
        if not self._is_utf8:
            return
        text = self._decode(block, final=not block)
        self._n_whole += len(block) - len(text)  # every character beyond ASCII has further bytes
        odd = [found for found in _damage(text) if not _CUT.fullmatch(found[0])]
        runs = [[ord(character) - 0xDC00 for character in found[0]] for found in odd]
        self._n_odd += len(odd)
        self._n_odd_bytes += sum(map(len, runs))
        tells = self._n_odd > 1 or any(len(run) > _LONGEST_DAMAGE or _TELLING.intersection(run) for run in runs)
        if odd and tells and self._n_odd_bytes > self._n_whole:
            raise _foreign(self._name, self._n_lines + text.count("\n", 0, odd[0].start()) + 1, runs)
        self._n_lines += text.count("\n")


def _damage(text: str) -> Iterator[re.Match[str]]:
    try:
        text.encode()  # many times faster than to search, and almost always enough
    except UnicodeEncodeError:
        yield from _DAMAGE.finditer(text)


def _foreign(name: str, line: int, runs: Sequence[Sequence[int]]) -> CorpusError:
    """Return the error of a file in another encoding; Windows-1252 is named where it is likely."""
    if all(len(run) <= _LONGEST_WESTERN and _WESTERN.issuperset(run) for run in runs):
        byte = runs[0][0]
        return CorpusError(
            f"{name} is not UTF-8: line {line:,} holds the byte 0x{byte:02X}, which is {bytes([byte]).decode('cp1252')!r} in "
            "Windows-1252; convert it, for example with iconv -f WINDOWS-1252 -t UTF-8."
        )
    shown = "".join(f" 0x{byte:02X}" for run in runs[:1] for byte in run[:4])
    return CorpusError(
        f"{name} is not UTF-8: line {line:,} holds the bytes{shown}; find out its encoding, for example WINDOWS-1252 or GBK, and "
        "convert it with iconv -f ENCODING -t UTF-8."
    )
