"""Row 5: a row of ``metadata.csv`` has as many fields as the header, and only a line end ends it."""

from __future__ import annotations

import pytest

from sdmodule.data.sources.folder import find_examples
from sdmodule.errors import SettingsError
from tests.reported.drawing import numbered


@pytest.fixture
def folder(tmp_path):
    for file in numbered(tmp_path, 4).glob("*.txt"):
        file.unlink()
    return tmp_path


def captions(folder, *lines: str, header: str = "file_name,text") -> list[str]:
    (folder / "metadata.csv").write_bytes("\n".join([header, *lines]).encode())
    return [example.caption for example in find_examples(folder)]


def test_a_caption_with_a_comma_and_no_quotes_is_refused(folder):
    with pytest.raises(SettingsError, match=r"metadata\.csv, line 3 has 3 fields, and the header has 2; put a caption"):
        captions(folder, "p0.png,a dog", "p1.png,a cat, a mat")


def test_a_row_with_too_few_fields_is_refused(folder):
    with pytest.raises(SettingsError, match=r"line 2 has 1 field, and the header has 2"):
        captions(folder, "p0.png", "p1.png,a cat")


def test_a_quoted_comma_is_part_of_the_caption(folder):
    assert captions(folder, 'p0.png,"a cat, a mat"', "p1.png,") == ["a cat, a mat", ""]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_a_line_end_ends_a_row(folder, separator):
    text = f"a cat{separator}p3.png,stolen" if separator == "\x0c" else f"a cat{separator}on a mat"
    row = f'p0.png,"{text}"' if "," in text else f"p0.png,{text}"
    assert captions(folder, row, "p1.png,a dog") == [text, "a dog"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_kind_of_line_end_is_read(folder, end):
    (folder / "metadata.csv").write_bytes(end.join([b"file_name,text", b"p0.png,a cat", b"p1.png,a dog", b""]))
    assert [example.caption for example in find_examples(folder)] == ["a cat", "a dog"]


def test_a_line_end_in_quotes_is_part_of_the_caption(folder):
    assert captions(folder, 'p0.png,"a cat\non a mat"', "p1.png,b") == ["a cat\non a mat", "b"]
