"""How are files and the hub's data read? As (place, row) pairs, a row just as it stands there."""

import csv
import difflib
import html.parser
import json
import os
import re

import pyarrow.parquet

from engine import InputError, first_line


def read_source(name, split, datasets):
    """The rows of a file or hub id as (place, row), in order; `split` where the hub id names none.

    Raises InputError for an unknown or unreadable source. datasets: the names that would have been known.
    """
    ending = os.path.splitext(name)[1]
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?::(.+))?", name)
    if ending in FILES and os.path.isfile(name):
        try:
            rows = list(FILES[ending](name))
        except (OSError, UnicodeError, csv.Error, pyarrow.ArrowException) as error:
            raise InputError(f"{name} is no {ending} file in UTF-8: {error}") from error
        return with_name(os.path.basename(name), rows)
    if hub and ending not in FILES and not os.path.isfile(name):
        return with_name(name, number_rows(load_hub(hub[1], hub[2], hub[3] or split)))
    near = difflib.get_close_matches(name, datasets, 1)
    why = "no such file" if ending in FILES else f"did you mean {near[0]}?" if near else "no dataset"
    raise InputError(f"{name!r} cannot be read, {why}: give one of {', '.join(datasets)}, an existing "
                     f"file ending in {', '.join(FILES)}, or a hub id org/name[/config][:split]")


def load_hub(name, config=None, split="train"):
    """One split of a Hugging Face dataset. Raises InputError where it cannot be had."""
    import datasets  # takes a second, and only hub data need it

    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"dataset {name}, config {config}, split {split} cannot be loaded: "
                         f"{first_line(error)}") from error


def read_jsonl(path):
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", parse_json(line, f"{path} line {number}")


def read_json(path):
    with open(path, encoding="utf-8-sig") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        return number_rows(parse_json(text, path))
    return read_jsonl(path)  # JSON lines under the other name


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error


def read_csv(path):
    """Cells are text, as they stand; a number is read where a number is needed."""
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"line {reader.line_num} has not the header's {len(reader.fieldnames)} cells")
            yield f"line {reader.line_num}", row


def read_parquet(path):
    return number_rows(pyarrow.parquet.read_table(path).to_pylist())


FILES = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet, ".csv": read_csv}


def number_rows(rows):
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def with_name(name, rows):
    return ((f"{name} {place}", row) for place, row in rows)


def strip_html(text):
    """The text of an HTML fragment; blocks end in a blank line."""
    pieces = []
    parser = html.parser.HTMLParser(convert_charrefs=True)
    parser.handle_data = pieces.append
    blocks = ("p", "pre", "li", "blockquote")
    parser.handle_endtag = lambda tag: pieces.append("\n\n" if tag in blocks else "")
    parser.feed(text)
    parser.close()
    return re.sub(r"\n{3,}", "\n\n", "".join(pieces)).strip()
