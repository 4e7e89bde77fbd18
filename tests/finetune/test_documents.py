"""Reading: what is accepted, and one clear error, with its place, for everything else."""

from __future__ import annotations

import json

import pytest

from tierflow.finetune.documents import DataError, read_documents


def read(path):
    return list(read_documents([path]))


def write(tmp_path, name, raw):
    path = tmp_path / name
    path.write_bytes(raw)
    return path


def test_text_is_one_document_with_plain_newlines(tmp_path):
    path = write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\ntwo\n")
    (document,) = read(path)
    assert (document.where, document.text, document.messages) == (str(path), "one\ntwo\n", None)


def test_jsonl_is_a_document_a_line_and_skips_blank_lines_and_texts(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [json.dumps({"text": "é one", "id": 4}), "", json.dumps({"text": " "}), json.dumps({"messages": talk})]
    path = write(tmp_path, "a.jsonl", "\r\n".join(rows).encode())
    first, second = read(path)
    assert (first.where, first.text) == (f"{path}:1", "é one")
    assert (second.where, second.messages) == (f"{path}:4", talk)


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n ", "is empty"),
        ("binary.txt", b"MZ\x90\0\x03", "zero byte at offset 3"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "byte 0xe9 at offset 3"),
        ("mark.txt", b"\xef\xbb\xbfab\xff", "byte 0xff at offset 5"),
        ("wide.txt", "text".encode("utf-16"), "UTF-16"),
        ("data.csv", b"a,b", "ending"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "byte 0xe9 at offset 24"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', r"cut.jsonl:2: not JSON: .* column 10"),
        ("list.jsonl", b"[1]", "list.jsonl:1: expected an object .* found a list"),
        ("keys.jsonl", b'{"txt": "a", "id": 1}', r"keys.jsonl:1: has neither .* \(keys: id, txt\)"),
        ("both.jsonl", b'{"text": "a", "messages": []}', "has both"),
        ("number.jsonl", b'{"text": 3}', "`text` must be a string, found a number"),
        ("null.jsonl", b'{"text": null}', "found null"),
        ("blank.jsonl", b'{"text": ""}\n', "every line's text is empty"),
        ("none.jsonl", b'{"messages": []}', "at least one message"),
        ("message.jsonl", b'{"messages": ["hi"]}', r"messages\[0\] must be an object, found a string"),
        ("role.jsonl", b'{"messages": [{"content": "a"}]}', r"messages\[0\] needs a string `role`, found keys content"),
        ("part.jsonl", b'{"messages": [{"role": "user", "content": []}]}', "`content`, found a list"),
        ("silent.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn from"),
    ],
)
def test_bad_files_name_their_place(tmp_path, name, raw, says):
    with pytest.raises(DataError, match=says) as caught:
        read(write(tmp_path, name, raw))
    assert name in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)
