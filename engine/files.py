"""How are files and the hub's data read? As (place, row) pairs, a row just as it stands there."""

import contextlib
import csv
import difflib
import glob
import gzip
import html.parser
import itertools
import json
import os
import re
import zlib

import pyarrow.parquet

from engine import InputError, first_line

COLUMNS = {"prompt", "chosen", "messages", "conversations", "instruction", "input"}  # of which a row has one


def read_source(name, split, datasets):
    """The rows of a file, a folder or glob of files, or a hub id as (place, row), in order; `split` where the
    hub id names none.

    Raises InputError for an unknown or unreadable source. datasets: the names that would have been known.
    """
    if is_saved(name):
        return with_name(os.path.basename(name), number_rows(load_hub(name, split=split)))
    pattern = os.path.join(glob.escape(name), "*") if os.path.isdir(name) else name
    paths = [name] if os.path.isfile(name) else sorted(glob.glob(pattern))
    paths = [path for path in paths if ending_of(path) and os.path.isfile(path)]
    if paths:
        return itertools.chain.from_iterable(map(read_file, paths))
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?::(.+))?", name)
    if hub and not ending_of(name) and not os.path.isfile(name):
        return with_name(name, number_rows(load_hub(hub[1], hub[2], hub[3] or split)))
    near = difflib.get_close_matches(name, datasets, 1)
    why = "no such file" if ending_of(name) else f"did you mean {near[0]}?" if near else "no dataset"
    raise InputError(f"{name!r} cannot be read, {why}: give one of {', '.join(datasets)}, an existing file, "
                     f"folder or glob of files ending in {', '.join(FILES)}, or a hub id "
                     "org/name[/config][:split]")


def read_file(path):
    try:
        return with_name(os.path.basename(path), list(FILES[ending_of(path)](path)))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} {find_undecodable(path)} is not UTF-8: save the file so") from error
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is no {ending_of(path)} file: {first_line(error)}") from error


def find_undecodable(path):
    """The place of the first line, or row of a table, that is not UTF-8."""
    is_table = path.endswith(".parquet")
    open_bytes = gzip.open if path.endswith(".gz") else open
    with open_bytes(path, "rb") as lines:
        parts = pyarrow.parquet.read_table(path).to_batches(1) if is_table else lines
        for number, part in enumerate(parts, 1):
            try:
                part.to_pylist() if is_table else part.decode()
            except UnicodeDecodeError:
                return f"row {number}" if is_table else f"line {number}"


def ending_of(path):
    return next((ending for ending in FILES if path.endswith(ending)), None)


def short_names(sources):
    """Sources by the last part of their names, without its ending; a name that is taken gets a number."""
    names = []
    for source in sources:
        short = name = os.path.basename(source.rstrip("/")).removesuffix(ending_of(source) or "")
        numbers = itertools.count(2)
        while name in names:
            name = f"{short}-{next(numbers)}"
        names.append(name)
    return names


def load_hub(name, config=None, split="train"):
    """One split of a Hugging Face dataset, or of a folder that save_to_disk wrote. Raises InputError where it
    cannot be had."""
    import datasets  # takes a second, and only hub data need it

    try:
        if not is_saved(name):
            return datasets.load_dataset(name, config, split=split)
        saved = datasets.load_from_disk(name)
        if isinstance(saved, dict) and split not in saved:
            raise ValueError(f"it has {', '.join(saved)}; one alone is read as {name}/<split>")
        return saved[split] if isinstance(saved, dict) else saved
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"dataset {name}, config {config}, split {split} cannot be loaded: "
                         f"{first_line(error)}") from error


def is_saved(path):
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def read_jsonl(path):
    open_text = gzip.open if path.endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", parse_json(line, f"{path} line {number}")


def read_json(path):
    with open(path, encoding="utf-8-sig") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        return number_rows(parse_json(text, path))
    with contextlib.suppress(ValueError, RecursionError):
        whole = json.loads(text)
        if isinstance(whole, dict) and not {*whole} & COLUMNS:
            lists = [value for value in whole.values() if isinstance(value, list)]
            if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
                return number_rows(lists[0])
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
        reader, begin = csv.DictReader(file, strict=True), 1
        try:
            begin = reader.fieldnames and reader.line_num + 1
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error(f"it has not the header's {len(reader.fieldnames)} cells")
                yield f"line {reader.line_num}", row
                begin = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{path} line {begin} begins no row of CSV: {error}") from error


def read_parquet(path):
    return number_rows(pyarrow.parquet.read_table(path).to_pylist())


FILES = {".jsonl": read_jsonl, ".jsonl.gz": read_jsonl, ".json": read_json, ".parquet": read_parquet,
         ".csv": read_csv}


def number_rows(rows):
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def with_name(name, rows):
    return ((f"{name} {place}", row) for place, row in rows)


def strip_html(text):
    """The text of an HTML fragment; blocks stand between blank lines."""
    pieces = []
    parser = html.parser.HTMLParser(convert_charrefs=True)
    parser.handle_data = pieces.append
    blocks = ("p", "pre", "li", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6")
    parser.handle_endtag = lambda tag: pieces.append("\n\n" if tag in blocks else "")
    parser.handle_starttag = lambda tag, _: pieces.append("\n") if tag == "br" else parser.handle_endtag(tag)
    parser.feed(text)
    parser.close()
    return re.sub(r"\n{3,}", "\n\n", "".join(pieces)).strip()
