"""What is in another encoding than UTF-8 is refused wherever that shows itself; what is damaged is read on."""

from __future__ import annotations

import gzip

import pytest
from corpora import read

from coreinfer_sim.base.errors import CorpusError

BEYOND = 1 << 20
"""More bytes than are read at once."""
FOREIGN = [
    ("gbk", ["恒星是怎样形成的？", "面包为什么会发酵？"]),
    ("big5", ["為什麼天空是藍色的"]),
    ("shift_jis", ["こんにちは世界", "パンはなぜふくらむのですか"]),
    ("euc_kr", ["별은 어떻게 만들어지나요"]),
    ("cp1251", ["Как образуются звёзды?", "Почему трава зелёная?"]),
    ("koi8_r", ["Как образуются звёзды?"]),
    ("mac_roman", ["Où est le café créé à l’été ?"]),
    ("cp1250", ["Dlaczego źdźbła są zielone? Żółć!"]),
    ("cp1254", ["Yıldızlar nasıl oluşur? Işığın hızı"]),
]


@pytest.mark.parametrize("before", ["", "plain words\n" * (BEYOND // 12 + 9)], ids=["short", "long"])
@pytest.mark.parametrize(("encoding", "texts"), FOREIGN, ids=lambda value: value if isinstance(value, str) else "")
def test_a_foreign_encoding_is_refused_without_a_wrong_guess(tmp_path, encoding, texts, before):
    (tmp_path / "a.txt").write_bytes(before.encode() + "\n".join([*texts, "and more", ""]).encode(encoding))
    line = before.count("\n") + 1
    with pytest.raises(
        CorpusError, match=rf"is not UTF-8: line {line:,} .*find out its encoding.*iconv -f ENCODING -t UTF-8"
    ):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("n_before", [0, BEYOND // 12 + 9], ids=["short", "long"])
@pytest.mark.parametrize("text", ["Das Café ist schön", "don\u2019t", "\u201eGänsefüßchen\u201c", "naïve façade"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_windows_1252_is_refused_by_name_wherever_it_begins(tmp_path, name, text, n_before, pack):
    kind = {"a.jsonl": '{{"text": "{}"}}\n', "a.csv": "{},c\n", "a.txt": "{}\n"}[name]
    body = "text,b\n" * (name == "a.csv") + kind.format("plain words") * n_before + kind.format(text)
    path = tmp_path / (name + (".gz" if pack is gzip.compress else ""))
    path.write_bytes(pack(body.encode("cp1252")))
    line = body.count("\n")
    with pytest.raises(
        CorpusError, match=rf"not UTF-8: line {line:,} holds the byte 0x.*Windows-1252; convert it, for"
    ):
        read(path)


@pytest.mark.parametrize(
    "damage", [b"caf\xe9", b"\xcf\xf0\xe8\xe2\xe5\xf2", b"\x8e x \x8f", b"\xe2\x82", b"\xff\xfe\xff\xfe\xff"]
)
@pytest.mark.parametrize("n_whole", [3, 70_000])
def test_utf8_with_a_few_damaged_rows_is_read(tmp_path, damage, n_whole):
    path = tmp_path / "a.txt"
    path.write_bytes("Gebäude {}\n".replace("{}", "建物").encode() * n_whole + damage + b"\nlast\n")
    rows, report = read(path)
    assert "\ufffd" in rows[-2].text and rows[-1].text == "last"
    assert f"1 row with U+FFFD for what is no Unicode text (line {n_whole + 1:,})" in str(report)
