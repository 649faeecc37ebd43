"""Pictures and tables of several runs, from records written by hand."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from engine import InputError, plot


def write_run(folder, *records, config=None, torn=""):
    """A run's folder of (split, step, metrics), with what a crash left of a last line."""
    os.makedirs(folder)
    with open(f"{folder}/metrics.jsonl", "w", encoding="utf-8") as file:
        for split, step, metrics in records:
            place = {"step": step, "examples": 4 * step, "split": split, "time": 1.5}
            file.write(json.dumps(place | metrics) + "\n")
        file.write(torn)
    if config is not None:
        with open(f"{folder}/config.yaml", "w", encoding="utf-8") as file:
            file.write(config + "provenance:\n  run_id: abc\n")


@pytest.fixture
def two():
    """Two runs: both evaluate the loss at steps 0 and 4; only the first samples, and has no KL at step 0."""
    write_run("runs/a", ("eval", 0, {"loss": 0.5, "samples/kl": None}),
              ("train", 1, {"loss": 0.75, "lr": 0.1}), ("train", 2, {"loss": math.nan, "lr": 0.1}),
              ("eval", 4, {"loss": 0.25, "samples/kl": 2.0}), torn='{"step": 9, "spl',
              config="loss: dpo\nexp_name: a\nrun_dir: /x/a\nseed: 1\ndpo:\n  beta: 1.0\n")
    write_run("runs/b", ("eval", 0, {"loss": 3}), ("train", 3, {"loss": 1.5, "lr": 1e-5}),
              ("eval", 4, {"loss": 1.25}),
              config="loss: dpo\nexp_name: b\nrun_dir: /x/b\nseed: 1\ndpo:\n  beta: 0.5\nwandb: online\n")


def rows(text):
    """The words of each printed line that is not empty."""
    return [line.split() for line in text.splitlines() if line]


def refusal(*arguments):
    with pytest.raises(InputError) as caught:
        plot.main(list(arguments))
    assert "\n" not in str(caught.value) and not os.path.exists("compare.png")
    return str(caught.value)


def drawn(*folders, metrics):
    """{metric: [(color, marker, joined, points) of each line]} of the picture, and the legend's names."""
    pytest.importorskip("matplotlib")
    runs = {name: plot.read_records(folder) for name, folder in plot.label_runs(folders).items()}
    figure = plot.draw(runs, plot.choose_metrics(metrics, runs))
    panels = {axes.get_title(): [
        (line.get_color(), line.get_marker(), line.get_linestyle() == "-", list(zip(*line.get_data())))
        for line in axes.lines] for axes in figure.axes}
    assert {axes.get_xlabel() for axes in figure.axes} == {"step"} and len(panels) == len(figure.axes)
    legend, = figure.legends
    return panels, [text.get_text() for text in legend.get_texts()]


def test_what_is_printed(two, capsys):
    """First and last evaluations, and what differs but for names and what no curve shows."""
    pytest.importorskip("matplotlib")
    plot.main(["runs/a", "runs/b", "loss", "samples/kl", "lr"])
    assert rows(capsys.readouterr().out) == [
        "metric run split step first step last".split(),
        "loss a eval 0 0.5 4 0.25".split(),
        "loss b eval 0 3 4 1.25".split(),
        "samples/kl a eval 0 - 4 2".split(),
        "samples/kl b - - - - -".split(),
        "lr a train 1 0.1 2 0.1".split(),
        "lr b train 3 1e-05 3 1e-05".split(),
        "setting a b".split(),
        "dpo.beta 1.0 0.5".split(),
        "picture compare.png".split()]
    with open("compare.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_what_is_drawn(two):
    """Training is a line; evaluations are points, joined where no training is drawn."""
    panels, names = drawn("runs/a", "runs/b", metrics=["loss", "samples/kl", "loss"])
    assert list(panels) == ["loss", "samples/kl"] and names == ["a", "b"]
    (blue, _, joined, training), (color, marker, loose, evaluations), *of_b = panels["loss"]
    assert joined and len(training) == 2 and training[0] == (1, 0.75)
    assert training[1][0] == 2 and math.isnan(training[1][1])
    assert color == blue and not loose and evaluations == [(0, 0.5), (4, 0.25)]
    assert [points for *_, points in of_b] == [[(3, 1.5)], [(0, 3), (4, 1.25)]]
    assert of_b[1][0] == of_b[0][0] != blue and of_b[1][1] != marker
    _, (_, _, joined, points), *of_b = panels["samples/kl"]
    assert joined and points[1] == (4, 2.0) and math.isnan(points[0][1]) and points[0][0] == 0
    assert [points for *_, points in of_b] == [[], []]


def test_metrics_that_all_runs_have_are_drawn_if_none_is_named(two):
    panels, _ = drawn("runs/a", "runs/b", metrics=[])
    assert list(panels) == ["loss"]
    panels, _ = drawn("runs/a", metrics=[])
    assert list(panels) == ["loss", "samples/kl"]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_run_of_one_kind_of_line(split, capsys):
    """Its only point is seen, and the table has it."""
    write_run("c", (split, 2, {"loss": 0.5}))
    panels, _ = drawn("c", metrics=[])
    assert [(points, marker not in ("", "None")) for _, marker, _, points in panels["loss"] if points] == [
        ([(2, 0.5)], True)]
    plot.main(["c"])
    assert rows(capsys.readouterr().out)[1:2] == [["loss", "c", split, "2", "0.5", "2", "0.5"]]


def test_runs_of_one_name_are_told_apart(two):
    write_run("more/a", ("eval", 0, {"loss": 2.0}))
    here = os.getcwd()
    assert plot.label_runs(["runs/a", "runs/b/"]) == {"a": f"{here}/runs/a", "b": f"{here}/runs/b"}
    assert plot.label_runs(["runs/a", "more/a", "runs/b"]) == {
        "runs/a": f"{here}/runs/a", "more/a": f"{here}/more/a", "runs/b": f"{here}/runs/b"}
    assert list(plot.label_runs(["runs/a", "runs/../runs/a"])) == ["a"]


def test_names_with_signs_of_matplotlib_are_shown_as_they_are():
    """matplotlib leaves _x out of its legends, and takes $x$ for a formula."""
    for name in ("_x", "$y$"):
        write_run(name, ("eval", 0, {"$z$": 2.0}))
    panels, names = drawn("_x", "$y$", metrics=["$z$"])
    assert list(panels) == ["$z$"] and names == ["_x", "$y$"]
    figure = plot.draw({name: plot.read_records(name) for name in names}, ["$z$"])
    texts = [*figure.legends[0].get_texts(), figure.axes[0].title]
    assert len(texts) == 3 and not any(text.get_parse_math() for text in texts)


def test_many_runs_look_different():
    for number in range(49):
        write_run(f"r{number}", ("eval", 0, {"loss": number}))
    panels, _ = drawn(*(f"r{number}" for number in range(49)), metrics=["loss"])
    assert len({line[:2] for line in panels["loss"] if line[3]}) == 49


def test_a_losses_settings_are_those_of_its_runs(two, capsys):
    """And a config.yaml that cannot be read is named, and the others are compared."""
    write_run("runs/i", ("eval", 0, {"loss": 2.0}), config="loss: ipo\nseed: 2\nipo:\n  beta: 0.3\n")
    write_run("runs/n", ("eval", 0, {"loss": 2.0}), config="no_such_key: 1\n")
    plot.print_settings(plot.label_runs(["runs/a", "runs/i", "runs/n"]))
    printed = rows(capsys.readouterr().out)
    assert " ".join(printed[0]).startswith("settings of n are not compared: no_such_key is no key")
    assert printed[1:] == [
        "setting a i".split(), "loss dpo ipo".split(), "seed 1 2".split(), "dpo.beta 1.0 -".split(),
        "dpo.label_smoothing 0.0 -".split(), "dpo.average_logps false -".split(),
        "dpo.sft_weight 0.0 -".split(), "ipo.beta - 0.3".split(),
        "ipo.average_logps - false".split(), "ipo.sft_weight - 0.0".split()]


def test_equal_settings(two, capsys):
    plot.print_settings({"x": "runs/a", "y": "runs/a"})
    assert capsys.readouterr().out == "\nno setting differs\n"
    plot.print_settings({"x": "runs/a"})
    assert capsys.readouterr().out == ""


def test_nothing_that_is_there_is_written_over(two, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("compare.png", "x.svg", "x-2.svg"):
        with open(name, "w") as file:
            file.write("mine")
    for words, written in (([], "compare-2.png"), ([], "compare-3.png"), (["out=x.svg"], "x-3.svg")):
        plot.main(["runs/a", *words])
        assert rows(capsys.readouterr().out)[-1] == ["picture", written]
        assert os.path.getsize(written) > 1000
    monkeypatch.setattr(os.path, "lexists", lambda path: False)  # another process takes the name meanwhile
    with pytest.raises(InputError, match="x.svg cannot be written: File exists"):
        plot.main(["runs/a", "out=x.svg"])
    assert {open(name).read() for name in ("compare.png", "x.svg", "x-2.svg")} == {"mine"}


def test_what_is_refused(two):
    assert refusal() == refusal("loss") == (
        "no folder of a run is given that is there: python -m engine.plot runs/a runs/b [metric ...] "
        "[out=compare.png]")
    assert refusal("runs/a", "sample/kl") == (
        "sample/kl is neither a folder nor a metric of these runs, which have loss, lr, samples/kl; "
        "the nearest is samples/kl")
    assert "runs/q is neither a folder nor a metric" in refusal("runs/a", "runs/q")
    assert "step is neither" in refusal("runs/a", "step")
    assert "samples/kl is neither" in refusal("runs/b", "samples/kl")
    assert "is no run's folder" in refusal("runs/a", "runs")
    for name in ("x", "x.jpg", ".png", "x/"):
        assert refusal("runs/a", f"out={name}").startswith(f"out={name} is no picture: its name must end")
    write_run("new", torn='{"step": 0')
    assert "holds no record yet" in refusal("runs/a", "new")
    write_run("nan", ("eval", 0, {"loss": math.nan, "kl": math.inf, "reward": None, "lr": 1.0}))
    assert all("neither a folder nor a metric of these runs, which have lr" in refusal("nan", name)
               for name in ("loss", "kl", "reward"))
    write_run("other", ("eval", 0, {"ours": 2.0}))
    assert refusal("runs/a", "other").endswith("name some of loss, lr, ours, samples/kl")


@pytest.mark.parametrize("line", ['{"step": 1, "spl', "[1]", "3", '{"step": 1, "loss": 2}', "\0\0"])
def test_a_damaged_line_within_is_named(two, line):
    with open("runs/b/metrics.jsonl", "a") as file:
        file.write(line + '\n{"step": 9, "split": "eval", "loss": 1}\n')
    assert refusal("runs/a", "runs/b").endswith(
        "runs/b/metrics.jsonl is damaged: a line of it is no record of a run")


def test_a_folder_that_is_not_there(two):
    pytest.importorskip("matplotlib")
    assert refusal("runs/a", "out=q/x.png") == "q/x.png cannot be written: No such file or directory"


def test_without_matplotlib_the_tables_stand(two, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert refusal("runs/a") == "there is no matplotlib to draw the picture: pip install matplotlib"
    assert ["loss", "a", "eval", "0", "0.5", "4", "0.25"] in rows(capsys.readouterr().out)


def test_commands_of_the_pages():
    pytest.importorskip("matplotlib")
    paths = [os.path.join(ROOT, page) for page in ("README.md", "docs/records.md")]
    commands = [re.findall(r"python -m engine.plot (runs/[^`\n]*)", open(path).read()) for path in paths]
    assert [len(found) for found in commands] == [1, 1]
    for folder in {word for (command,) in commands for word in command.split() if word.startswith("runs/")}:
        write_run(folder, ("eval", 0, dict.fromkeys(plot.METRICS, 1.0)))
    for command, in commands:
        plot.main(command.split())
    assert os.path.exists("compare-2.png")


def test_the_command_starts_without_torch(two):
    """And ends with a sentence and status 2 where it is refused."""
    pytest.importorskip("matplotlib")
    code = ("import runpy, sys; sys.argv = ['plot', *sys.argv[1:]]; "
            "runpy.run_module('engine.plot', run_name='__main__'); print('torch' in sys.modules)")
    done = [subprocess.run([sys.executable, "-c", code, *words], env=os.environ | {"PYTHONPATH": ROOT},
                           capture_output=True, text=True) for words in (["runs/a", "runs/b"], ["runs"])]
    drawn, refused = done
    assert drawn.returncode == 0 and drawn.stdout.endswith("compare.png\nFalse\n") and not drawn.stderr
    assert refused.returncode == 2 and re.fullmatch("error: .* is no run's folder: .*\n", refused.stderr)
