"""What can be set: config.yaml is the schema, which command line and files obey before torch is imported."""

import glob
import math
import os
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, TINY_RUN, config_of

import data
import engine.config
import train
from engine import InputError
from engine.config import Dumper, Loader, as_namespace, check_typed, fits, read_arguments, read_schema
from losses import FUNCTIONS, OBJECTIVES


def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def read(*names):
    text = ""
    for name in names:
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            text += file.read()
    return text


def test_command_line_values():
    config = config_of("loss=dpo", "lr=1e-5", "data=[a.jsonl,b.jsonl]", "dpo.beta=0.3", "resume=auto",
                       "optimizer_args.alpha=0.9", "optimizer_args.eps=1e-6", "reference=null",
                       "max_grad_norm=null", "exp_name=2024", "lr=1e-4")
    assert (config.lr, config.data, config.dpo["beta"]) == (1e-4, ["a.jsonl", "b.jsonl"], 0.3)
    assert config.optimizer_args == {"alpha": 0.9, "eps": 1e-6}
    assert config.reference is None and config.max_grad_norm is None and config.resume == "auto"
    assert config.exp_name == "2024" and config.run_dir == os.path.abspath("runs/2024")
    assert config_of("loss=ipo").exp_name == "ipo"
    caches = [config_of(f"reference_cache={value}").reference_cache for value in ("true", "false", "kept")]
    assert caches == [True, False, "kept"]


def test_a_file_of_settings_and_the_command_line_over_it():
    write("mine.yaml", "loss: ipo\nlr: 5e-7\nipo:\n  beta: 0.4\nprovenance: {run_id: x}\n")
    config = config_of("--config", "mine.yaml", "lr=1e-6")
    assert (config.loss, config.lr, config.ipo["beta"], config.ipo["average_logps"]) == (
        "ipo", 1e-6, 0.4, False)
    for file in (["--config", "mine.yaml"], ["--config=mine.yaml"]):
        assert config_of("lr=1e-6", *file).lr == 5e-7  # the later over the earlier


def test_local_paths_become_absolute_and_names_stay():
    os.makedirs("toy")
    os.makedirs("base/step-000003")
    write("base/step-000003/config.json", "{}")
    os.symlink("step-000003", "base/LATEST")
    write("a.jsonl", "")
    config = config_of("loss=dpo", "data=[toy,a.jsonl,org/name]", "model=base/LATEST",
                       "reference=base/LATEST")
    assert config.data == ["toy", os.path.abspath("a.jsonl"), "org/name"]
    assert config.model == config.reference == os.path.abspath("base/step-000003")
    assert config_of().model == "tiny" and config_of().data == "toy"


def test_what_a_run_writes_is_what_it_reads():
    names = ["toy", "2"]
    settings = {"lr": 1e-5, "exp_name": "1e-5", "reference": None, "run_dir": "null", "model": "é",
                "data": names, "eval_data": names, "spin": {"lr": [1e-5, 5e-7], "mix_previous": True}}
    text = yaml.dump(settings, Dumper=Dumper, allow_unicode=True)
    assert yaml.load(text, Loader) == settings and "&" not in text and "é" in text


@pytest.mark.parametrize("text, value", [
    ("1e-5", 1e-5), ("-1", -1), ("+2.5E+3", 2500.0), (".5", 0.5), ("5.", 5.0), ("0", 0), ("-0.0", 0.0),
    ("10", 10), ("010", "010"), ("00", "00"), ("1_0", "1_0"), ("1_0.0", "1_0.0"), ("0x10", "0x10"),
    ("0b1", "0b1"), ("0o7", "0o7"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("٣", "٣"), ("1e", "1e"),
    (".", "."), ("-.inf", -math.inf)])
def test_numbers_are_decimal_and_text_that_looks_like_one_is_quoted(text, value):
    read = yaml.load(text, Loader)
    assert read == value and type(read) is type(value)
    written = yaml.dump([text, value], Dumper=Dumper, allow_unicode=True)
    assert yaml.load(written, Loader) == [text, value]
    assert yaml.safe_load(written)[0] == text  # by any other reader too


def test_intervals_are_steps_or_with_a_point_of_an_epoch(run):
    """Also in the settings of a run that began when 2.0 was two steps, and 0.0 never."""
    for text, value in (("1", 1), ("1.0", 1.0), ("0.25", 0.25), ("0", 0)):
        config = config_of(f"eval_every={text}", f"save_every={text}")
        assert [repr(config.eval_every), repr(config.save_every)] == [repr(value)] * 2
    folder = run(*TINY_RUN, "num_samples=0", "max_steps=1")
    settings = read(f"{folder}/config.yaml")
    assert "eval_every: 0.5\n" in settings and "save_every: 500\n" in settings
    write(f"{folder}/config.yaml", settings.replace("eval_every: 0.5", "eval_every: 1.0"))
    assert repr(config_of("resume=true", f"run_dir={folder}").eval_every) == "1.0"
    for eval_every, save_every in ("2.0", "1000.0"), ("0.0", "0.0"):
        write(f"{folder}/config.yaml", settings.replace("eval_every: 0.5", f"eval_every: {eval_every}")
              .replace("save_every: 500", f"save_every: {save_every}"))
        config = config_of("resume=true", f"run_dir={folder}")
        assert repr(config.eval_every) == eval_every[0] and repr(config.save_every) == save_every[:-2]
        assert config_of("--config", f"{folder}/config.yaml", "exp_name=new").save_every == float(save_every)


def test_keys_of_other_losses_may_stand_in_files(run):
    """Those of SFT are read in self-play, which evaluates with it."""
    write("mine.yaml", "dpo:\n  beta: 7\nkd.temperature: 2\n")
    folder = run(*TINY_RUN, "num_samples=0", "max_steps=1", "--config", "mine.yaml")
    settings = yaml.safe_load(read(f"{folder}/config.yaml"))
    assert (settings["loss"], settings["dpo"]["beta"], settings["kd"]["temperature"]) == ("sft", 7, 2)
    run("resume=true", f"run_dir={folder}", "eval_every=1", "sft.average=tokens")
    check_typed(["loss=spin", "sft.average=examples", "spin.beta=1", "--config", "dpo.beta=1.yaml"],
                config_of("loss=spin"), OBJECTIVES)


def test_an_empty_block_has_no_keys(monkeypatch):
    """A fork's loss without settings."""
    write("schema.yaml", read("config.yaml") + "mine: {}\n")
    monkeypatch.setattr(engine.config, "SCHEMA", os.path.abspath("schema.yaml"))
    monkeypatch.setattr(engine.config, "read_schema", engine.config.read_schema.__wrapped__)
    write("mine.yaml", "mine: {}\n")
    assert as_namespace(read_arguments(["--config", "mine.yaml"]), []).mine == {}
    assert as_namespace(read_arguments([]), []).mine == {}
    for text, said in (("mine={a: 1}", r"mine={'a': 1} is not allowed: it must be {}"),
                       ("mine.a=1", "mine.a is no key of config.yaml")):
        with pytest.raises(InputError, match=said):
            read_arguments([text])


def test_a_tilde_is_home(monkeypatch):
    monkeypatch.setenv("HOME", os.path.abspath("home"))
    assert config_of("run_dir=~/x").run_dir == os.path.abspath("home/x")
    assert config_of("exp_name=~").run_dir == os.path.abspath("runs/~")
    assert config_of("exp_name=" + 50 * "é").run_dir == os.path.abspath("runs/" + 50 * "é")


def test_a_link_to_a_file_keeps_its_name():
    """As in the hub's cache, where files are links to others without an ending."""
    os.makedirs("snapshots/abc")
    os.makedirs("blobs")
    write("blobs/0123", '{"prompt": "p", "response": "r"}\n')
    for name in ("train.jsonl", "other.jsonl"):
        os.symlink("../../blobs/0123", f"snapshots/abc/{name}")
    os.symlink("snapshots", "short")
    config = config_of("data=short/abc/train.jsonl", "eval_data=[short/abc]", "model=tiny")
    assert config.data == os.path.abspath("snapshots/abc/train.jsonl")
    assert config.eval_data == [os.path.abspath("snapshots/abc")]
    rows, _ = data.load_rows([config.data, *config.eval_data], "train", OBJECTIVES["sft"])
    assert [row.where for row in rows] == ["train.jsonl line 1", "other.jsonl line 1", "train.jsonl line 1"]


def test_an_absent_wandb_is_said_before_a_model_is_loaded(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(train, "build_trainer", None)
    assert refused("wandb=offline") == "wandb=offline needs the wandb library: pip install wandb"
    monkeypatch.delitem(sys.modules, "wandb")
    os.mkdir("wandb")  # which Python would import, if it found nothing else
    monkeypatch.setattr(sys, "path", [os.getcwd()])
    assert refused("wandb=online") == "wandb=online needs the wandb library: pip install wandb"
    assert not os.path.exists("runs")


def test_every_key_has_a_rule_that_its_default_obeys():
    defaults, rules = read_schema()
    assert set(defaults) == set(rules)
    for key, rule in rules.items():
        assert f"# {rule}." in read("config.yaml"), key
        assert any(fits(defaults[key], alternative) for alternative in rule.split(" or ")), key


def test_every_key_is_read():
    rooms = sorted(glob.glob("engine/*.py", root_dir=ROOT))
    code = read("train.py", "trainers.py", "data.py", "losses.py", *rooms)
    defaults, _ = read_schema()
    for key in defaults:
        block, _, name = key.rpartition(".")
        if not block:
            assert re.search(rf"config\.{key}\b", code), key
        elif block in ("fsdp", "lora") or not any(
                function and name in function.__code__.co_varnames for function in (
                    getattr(OBJECTIVES[block], x) for x in FUNCTIONS)):  # by its name
            assert f'"{name}"' in code, key


@pytest.mark.parametrize("arguments, said", [
    (["--help"], read("config.yaml")),
    (["loss=dpo", "-h"], read("config.yaml")),
    (["btach_size=1"], "error: btach_size is no key of config.yaml; the nearest is batch_size\n"),
    (["lr=0", "batch_size=0"], "error: batch_size=0 is not allowed: it must be int >= 1\n"),
    (["--config", "none.yaml"], "error: config file none.yaml cannot be read: No such file or directory\n"),
], ids=["help", "h", "key", "value", "file"])
def test_help_and_refused_settings_come_before_torch(arguments, said):
    is_help = said == read("config.yaml")
    done = subprocess.run([sys.executable, "-X", "importtime", os.path.join(ROOT, "train.py"), *arguments],
                          capture_output=True, text=True)
    imported = set(re.findall(r"import time:.*\| +([\w.]+)\n", done.stderr))
    assert "yaml" in imported and not {"torch", "transformers", "numpy"} & imported
    assert done.returncode == (0 if is_help else 2) and said in (done.stdout if is_help else done.stderr)


@pytest.mark.parametrize("value, rule, allowed", [
    (1, "int >= 1", True), (0, "int >= 1", False), (True, "int >= 0", False), (1.0, "int >= 0", False),
    (0, "int in [0, 4]", True), (4, "int in [0, 4]", True), (5, "int in [0, 4]", False),
    (0, "float > 0", False), (1, "float > 0", True), (math.inf, "float > 0", False),
    (math.nan, "float >= 0", False), (0, "float >= 0", True), (10**400, "float > 0", False),
    (0.5, "float in [0, 0.5)", False), (0, "float in [0, 0.5)", True), (1, "float in (0, 1]", True),
    (0, "float in (0, 1]", False), ("auto", "false | true | auto", True), (True, "false | true | auto", True),
    (1, "false | true | auto", False), ("x", "false | true | auto", False), (None, "null", True),
    ([], "list of str", False), (["a"], "list of str", True), ([1], "list of str", False),
    ([0.1, 2], "list of float > 0", True), ([0.1, 0], "list of float > 0", False),
    ([], "list of float > 0", False), ({}, "mapping", True), ("yes", "bool", False),
])
def test_rules(value, rule, allowed):
    assert fits(value, rule) is allowed


@pytest.mark.parametrize("text, said", [
    ("lr: 1\nlr: 2\n", "the key lr stands twice"), ("- a\n", "config file mine.yaml holds list"),
    ("a: [", "config file mine.yaml is not YAML"), ("dpo:\n  gamma: 1\n", "dpo.gamma is no key"),
    ("batch_size: '4'\n", "batch_size='4' is not allowed"), ("dpo: 3\n", "dpo is a block with keys of")])
def test_bad_files_of_settings(text, said, refused):
    write("mine.yaml", text)
    assert said in refused("--config", "mine.yaml")
