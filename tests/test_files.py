"""Files of every kind: each row as it stands, with its place; what is no such file gets one sentence."""

import gzip
import json
import os

import datasets
import pyarrow.parquet
import pytest
from conftest import write_lines

import data
from engine import InputError
from engine.files import read_source, strip_html
from losses import OBJECTIVES

ROWS = [{"prompt": "p1", "chosen": "a, \"b\"\nc", "rejected": "None"},
        {"prompt": "p2", "chosen": "é", "rejected": "1"}]


def write(path, rows):
    if path.endswith(".jsonl"):
        write_lines(path, rows)
    elif path.endswith(".json"):
        with open(path, "w") as file:
            json.dump(rows, file)
    elif path.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).to_csv(path)
    return path


def write_bytes(path, content):
    with open(path, "wb") as file:
        file.write(content)


@pytest.mark.parametrize("name, places", [
    ("f.jsonl", ["line 1", "line 2"]), ("f.json", ["row 1", "row 2"]), ("f.parquet", ["row 1", "row 2"]),
    ("f.csv", ["line 3", "line 4"])])  # a cell holds a line's end
def test_every_kind_of_file_gives_the_same_rows(name, places):
    os.mkdir("folder")
    places_and_rows = read_source(write(f"folder/{name}", ROWS), "train", data.DATASETS)
    assert list(places_and_rows) == [(f"{name} {place}", row) for place, row in zip(places, ROWS)]


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.parquet"])
def test_values_that_are_no_text_stay_what_they_are(name):
    rows = [{"messages": [{"role": "user", "content": "q"}], "score": 1.5, "n": 2, "none": None, "x": True}]
    (_, row), = read_source(write(name, rows), "train", data.DATASETS)
    assert row == rows[0] and type(row["n"]) is int and row["x"] is True


def test_lists_of_sources_blank_lines_and_json_lines_under_the_other_name():
    write("a.jsonl", ROWS[:1])
    write_bytes("b.json", b"\n" + json.dumps(ROWS[1]).encode() + b"\n \n" + json.dumps(ROWS[0]).encode())
    rows, report = data.load_rows(["a.jsonl", "b.json"], "train", OBJECTIVES["sft"])
    assert [row.where for row in rows] == ["a.jsonl line 1", "b.json line 2", "b.json line 4"]
    assert [row.prompt for row in rows] == ["p1", "p2", "p1"] and report.rows == 3


@pytest.mark.parametrize("name, text", [
    ("f.jsonl", '{"prompt": "p", "response": "r"}'), ("f.json", '[{"prompt": "p", "response": "r"}]'),
    ("f.csv", "prompt,response\np,r\n")])
def test_a_byte_order_mark_is_no_part_of_a_column(name, text):
    write_bytes(name, text.encode("utf-8-sig"))
    assert [row for _, row in read_source(name, "train", data.DATASETS)] == [{"prompt": "p", "response": "r"}]


@pytest.mark.parametrize("name, content, said", [
    ("f.jsonl", b'{"prompt": "p", "response": "r"}\n{"prompt": \n', "f.jsonl line 2 is not JSON"),
    ("f.json", b'[{"prompt": "p"},\n 7 8]', "f.json is not JSON: .* line 2"),
    ("f.csv", b"a,b\n1,2,3\n", "f.csv line 2 begins no row of CSV: it has not the header's 2 cells"),
    ("f.csv", b"a,b\n1,2\n1\n", "f.csv line 3 begins no row of CSV: it has not the header's 2 cells"),
    ("f.csv", b'a,b\n1,"2\n3"\n4,"5\n6,7\n', "f.csv line 4 begins no row of CSV: unexpected end of data"),
    ("f.csv", b'a,b\n1,"2" x\n', "f.csv line 2 begins no row of CSV: ',' expected after '\"'"),
    ("f.csv", b'a,"b\n', "f.csv line 1 begins no row of CSV: unexpected end of data"),
    ("f.csv", b'a,b\n1,"2\n3"\n4,\xff\n', "f.csv line 4 is not UTF-8: save the file so"),
    ("f.parquet", b"nothing", "f.parquet is no .parquet file"),
    ("f.jsonl", b'\xef\xbb\xbf{"prompt": "p"}\n\n{"prompt": "\xff", "response": "r"}\n',
     "f.jsonl line 3 is not UTF-8: save the file so"),
    ("f.jsonl.gz", gzip.compress(b'{"prompt": "p"}\n"\xff"\n', mtime=0), "f.jsonl.gz line 2 is not UTF-8"),
    ("f.json", '[{"prompt": "p"},\n "\xe9"]'.encode("latin-1"), "f.json line 2 is not UTF-8"),
    ("f.json", '[{"prompt": "p"}]'.encode("utf-16"), "f.json line 1 is not UTF-8"),
])
def test_malformed_files_stop_the_run(name, content, said):
    write_bytes(name, content)
    with pytest.raises(InputError, match=said):
        list(read_source(name, "train", data.DATASETS))


def test_a_table_whose_text_is_not_utf8_names_the_row():
    cells = pyarrow.array([b"p", b"q", b"\xff", b"\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": cells}), "f.parquet")
    with pytest.raises(InputError, match="^f.parquet row 3 is not UTF-8: save the file so$"):
        list(read_source("f.parquet", "train", data.DATASETS))


@pytest.mark.parametrize("name, why", [
    ("missing.jsonl", "no such file"), ("toyy", "did you mean toy?"), ("notes.txt", "no dataset")])
def test_unknown_sources_are_refused(name, why):
    write_bytes("notes.txt", b"text")
    with pytest.raises(InputError) as refusal:
        read_source(name, "train", data.DATASETS)
    assert str(refusal.value) == (
        f"'{name}' cannot be read, {why}: give one of {', '.join(data.DATASETS)}, an existing file, "
        "folder or glob of files ending in .jsonl, .jsonl.gz, .json, .parquet, .csv, or a hub id "
        "org/name[/config][:split]")


@pytest.mark.parametrize("name, what", [
    ("nobody/nothing", "config None, split test"), ("nobody/nothing/main:extra", "config main, split extra")])
def test_hub_data_that_cannot_be_had_are_refused(name, what):
    with pytest.raises(InputError, match=f"dataset nobody/nothing, {what} cannot be loaded: "):
        read_source(name, "test", data.DATASETS)


def test_strip_html():
    assert strip_html("<p>Use <code>a &lt; b</code></p><pre>x\n  y</pre>") == "Use a < b\n\nx\n  y"
    assert strip_html("a<ul><li>b</li><li>c</li></ul><blockquote><p>d</p></blockquote>\n\ne") == (
        "a\n\nb\n\nc\n\nd\n\ne")
    assert strip_html("Tom &amp; <b>Jerry</b> &#39;s<br>") == "Tom & Jerry 's"
