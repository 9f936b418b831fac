"""Text files as people have them: gzip, byte order marks, UTF-16, any line ends; what is no Unicode is named, never guessed."""

from __future__ import annotations

import codecs
import gzip
import io
import re
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from coreinfer_sim.base.errors import CorpusError

_SAMPLE = 1 << 20
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip or Excel file",
    b"PAR1": "a Parquet file",
    b"%PDF": "a PDF",
    b"\xd0\xcf\x11\xe0": "an Excel file",
}
_ESCAPED = re.compile("[\udc80-\udcff]")
_CUT_SHORT = re.compile("[\udcc2-\udcf4][\udc80-\udcbf]")
_USUAL_CUTS = frozenset(b"\xc2\xc3\xe2\xf0")
"""First bytes of the commonest characters of UTF-8; alone they are what is left of one that was cut."""
_WINDOWS_1252 = (
    frozenset(b"\x85\x91\x92\x93\x94\x96\x97") | frozenset(range(0xC0, 0xFF)) - frozenset(b"\xd7\xf7") - _USUAL_CUTS
)
"""Quotes, dashes and letters: what Windows-1252 text holds beside ASCII."""
_NO_CHARACTER = frozenset(b"\x81\x8d\x8f\x90\x9d")
"""Bytes that Windows-1252 leaves open."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def open_text(path: Path) -> TextIO:
    """Open a text file, compressed by gzip or not; line ends are those of the file.

    A byte that is no UTF-8 is read as a lone surrogate, which `mended` replaces: one damaged row is not the end of a file.

    Raises:
        CorpusError: the file is empty, no text, or in another encoding than UTF-8, or UTF-16 and UTF-32 with their mark.
    """
    raw = _unpacked(path)
    try:
        sample = raw.read(_SAMPLE)
        encoding = _encoding(path, sample)
        raw.seek(0)
    except BaseException:
        raw.close()
        raise
    errors = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
    return io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline="")


def mended(text: str) -> str:
    """Return a text with U+FFFD in place of what is no Unicode: half of a surrogate pair, or a byte that was no UTF-8."""
    if _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _unpacked(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb")


def _encoding(path: Path, sample: bytes) -> str:
    if not sample.strip():
        raise CorpusError(f"{path} is empty, expected at least one row; check the file.")
    kind = next((kind for magic, kind in _OTHER_KINDS.items() if sample.startswith(magic)), None)
    if kind is not None:
        raise CorpusError(f"{path} is {kind}, expected the text that its name promises; rename or convert it.")
    for mark, encoding in _MARKS:
        if sample.startswith(mark):
            return encoding
    n_zeros = sample.count(0)
    if n_zeros > len(sample) // 5:
        raise CorpusError(
            f"{path} seems to be UTF-16 without a byte order mark, as every other byte is zero; expected UTF-8; convert it, for "
            "example with iconv -f UTF-16LE -t UTF-8."
        )
    if n_zeros > len(sample) // 100:
        raise CorpusError(f"{path} holds {n_zeros} zero bytes, and is no text; expected UTF-8; check the file.")
    _refuse_windows_1252(path, sample)
    return "utf-8"


def _refuse_windows_1252(path: Path, sample: bytes) -> None:
    """Raise CorpusError if a file is in Windows-1252, rather than in UTF-8 with a damaged row."""
    text = sample.decode("utf-8", "surrogateescape")
    if len(sample) == _SAMPLE:
        text = text[:-3]  # where a character may have been cut
    escaped = _ESCAPED.findall(text)
    if not escaped or _CUT_SHORT.search(text) or len(escaped) < sum(ord(c) > 127 for c in text):
        return
    found = {ord(character) - 0xDC00 for character in escaped}
    if found & _NO_CHARACTER or not found & _WINDOWS_1252:
        return
    first = next(match for match in _ESCAPED.finditer(text) if ord(match[0]) - 0xDC00 in _WINDOWS_1252)
    byte, line = ord(first[0]) - 0xDC00, text.count("\n", 0, first.start()) + 1
    raise CorpusError(
        f"{path} is not UTF-8: line {line} holds the byte 0x{byte:02X}, which is {bytes([byte]).decode('cp1252')!r} in "
        "Windows-1252; convert it, for example with iconv -f WINDOWS-1252 -t UTF-8."
    )
