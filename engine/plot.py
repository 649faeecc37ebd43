"""How do runs compare? Their curves in one picture, their evaluations, and the settings in which they differ.

    python -m engine.plot runs/a runs/b [metric ...] [out=compare.png]
"""

import itertools
import json
import math
import os
import re
import sys

from engine import InputError
from engine.config import flatten, nearest, read_schema, read_yaml

METRICS = ("loss", "rewards/accuracies", "rewards/margins", "samples/reward", "samples/kl")  # by default
PLACE = ("step", "examples", "split", "time")  # what a record holds besides metrics
NO_EFFECT = re.compile(  # settings that change no curve
    "exp_name|run_dir|resume|trust_remote_code|max_hours|dry_run|wandb.*|log_every|"
    "save_every|keep_checkpoints|keep_best|async_save|check_first_batch")
# The colours of Okabe and Ito, which colour-blind readers tell apart; without the yellow, pale as a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^v<>"


def main(arguments):
    out = next((word[4:] for word in arguments if word.startswith("out=")), "compare.png")
    words = [word for word in arguments if not word.startswith("out=")]
    folders = label_runs([word for word in words if os.path.isdir(word)])
    if os.path.splitext(out)[1] not in (".png", ".pdf", ".svg"):
        raise InputError(f"out={out} is no picture: its name must end in .png, .pdf or .svg")
    runs = {label: read_records(folder) for label, folder in folders.items()}
    metrics = choose_metrics([word for word in words if not os.path.isdir(word)], runs)
    print_evaluations(runs, metrics)
    print_settings(folders)
    print("\npicture  ", save(draw(runs, metrics), out))


# ---------------------------------------------------------------- what the runs wrote


def label_runs(folders):
    """{label: path}, each run once. Labels are the folders' names, or paths if two names are the same."""
    paths = list(dict.fromkeys(os.path.abspath(folder) for folder in folders))
    if not paths:
        raise InputError("no folder of a run is given that is there: python -m engine.plot runs/a runs/b "
                         "[metric ...] [out=compare.png]")
    names = [os.path.basename(path) for path in paths]
    if len({*names}) < len(names):
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
        names = [os.path.relpath(path, shared) for path in paths]
    return dict(zip(names, paths))


def read_records(folder):
    """(split, step, record) of each line of metrics.jsonl. One without its newline is still being written."""
    path = os.path.join(folder, "metrics.jsonl")
    try:
        with open(path, "rb") as file:
            records = [json.loads(line) for line in file if line.endswith(b"\n")]
        records = [(record["split"], record["step"], record) for record in records]
    except OSError as error:
        raise InputError(f"{folder} is no run's folder: {path} cannot be read, {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged: a line of it is no record of a run") from error
    if not records:
        raise InputError(f"{path} holds no record yet: leave {folder} out until its run has begun")
    return records


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def choose_metrics(named, runs):
    """The metrics that are named, each once; if none is, those of METRICS that all runs have."""
    known = [{name for *_, record in records for name, value in record.items()
              if name not in PLACE and is_number(value)} for records in runs.values()]
    every = sorted(set().union(*known))
    for name in named:
        if name not in every:
            raise InputError(f"{name} is neither a folder nor a metric of these runs, which have "
                             f"{', '.join(every)}{nearest(name, every)}")
    chosen = list(dict.fromkeys(named)) or [name for name in METRICS if all(name in own for own in known)]
    if not chosen:
        raise InputError(f"not all runs have one of {', '.join(METRICS)}: name some of {', '.join(every)}")
    return chosen


def curve(records, split, metric):
    """Steps and values of a metric; NaN for a value that is no finite number."""
    points = [(step, record[metric]) for its_split, step, record in records
              if its_split == split and metric in record]
    return [step for step, _ in points], [value if is_number(value) else math.nan for _, value in points]


# ---------------------------------------------------------------- what is shown


def print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def print_evaluations(runs, metrics):
    """Each metric's first and last evaluation; its training lines in a run that does not evaluate it."""
    rows = [("metric", "run", "split", "step", "first", "step", "last")]
    for metric, (label, records) in itertools.product(metrics, runs.items()):
        split = "eval" if curve(records, "eval", metric)[0] else "train"
        cells = [(str(step), "-" if math.isnan(value) else f"{value:.4g}")
                 for step, value in zip(*curve(records, split, metric))]
        rows.append((metric, label, split, *cells[0], *cells[-1]) if cells else (metric, label, *"-----"))
    print_table(rows)


def print_settings(folders):
    """The settings that differ; a loss's own only for runs with that loss."""
    settings, (defaults, rules) = {}, read_schema()
    for label, folder in folders.items():
        try:
            settings[label] = defaults | flatten(read_yaml(os.path.join(folder, "config.yaml")), rules)
        except InputError as error:
            print(f"\nsettings of {label} are not compared: {error}")
    losses = {own["loss"] for own in settings.values()}
    rows = [("setting", *settings)]
    for key in defaults:
        block = {key.partition(".")[0]} & losses
        values = ["-" if block - {own["loss"]} else json.dumps(own[key], ensure_ascii=False).strip('"')
                  for own in settings.values()]
        if len({*values}) > 1 and not NO_EFFECT.fullmatch(key):
            rows.append((key, *values))
    if len(settings) > 1:
        print_table(rows if len(rows) > 1 else [("no setting differs",)])


def draw(runs, metrics):
    """A panel for each metric; a colour and a marker for each run, different ones for 49 runs."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise InputError("there is no matplotlib to draw the picture: pip install matplotlib") from error
    styles = [{"color": COLORS[number % 7], "marker": MARKERS[(number + number // 7) % 7],
               "markersize": 7, "markeredgecolor": "white"} for number in range(len(runs))]
    num_columns = math.ceil(len(metrics) ** 0.5)
    num_rows = math.ceil(len(metrics) / num_columns)
    figure = Figure(figsize=(4 * num_columns + 1, 3 * num_rows + 1), layout="constrained")
    for place, metric in enumerate(metrics, 1):
        axes = figure.add_subplot(num_rows, num_columns, place)
        axes.set_title(metric, parse_math=False)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        for style, records in zip(styles, runs.values()):
            steps, values = curve(records, "train", metric)
            axes.plot(steps, values, color=style["color"], linewidth=0.7, alpha=0.5,
                      marker="." if len(steps) < 20 else "")  # one alone makes no line
            # Evaluations are joined only where no training line shows what lies between them.
            axes.plot(*curve(records, "eval", metric), linestyle="" if steps else "-", **style)
    legend_columns = max(1, 44 * num_columns // (6 + max(map(len, runs))))  # about as wide as the panels
    legend = figure.legend([Line2D([], [], **style) for style in styles], list(runs), frameon=False,
                           loc="outside lower center", ncols=legend_columns,
                           title="points: evaluations; thin lines: training")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a run's name is no formula
    return figure


def save(figure, path):
    """Writes the picture, under a name that is free: compare-2.png where compare.png is there."""
    name, ending = os.path.splitext(path)
    names = itertools.chain([path], (f"{name}-{number}{ending}" for number in itertools.count(2)))
    path = next(free for free in names if not os.path.lexists(free))
    try:
        with open(path, "xb") as file:
            figure.savefig(file, format=ending[1:], dpi=100, bbox_inches="tight")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    return path


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # what a screen cannot show ends nothing
    try:
        main(sys.argv[1:])
    except InputError as refused:
        print(f"error: {refused}", file=sys.stderr)
        sys.exit(2)
