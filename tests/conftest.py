import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
SHARED = os.path.join(os.path.dirname(ROOT), "shared")

import json
import tempfile

import pytest
import torch

import data
import train

torch.set_num_threads(2)
FEW_ROWS = os.path.join(tempfile.mkdtemp(), "few.jsonl")  # of toy: a run starts in no time
TINY_RUN = [f"data={FEW_ROWS}", "eval_data=toy", "num_eval_examples=8", "batch_size=4", "max_steps=3",
            "sample_max_tokens=8", "num_samples=2"]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run():
    """run("loss=dpo", ...) runs main in this process and returns the run's folder."""
    def run_main(*arguments, status=0):
        assert train.main(list(arguments)) == status
        defaults, rules = train.read_schema()
        return train.as_namespace(defaults | train.read_arguments(arguments, rules)).run_dir
    return run_main


@pytest.fixture
def refused():
    """refused("lr=-1") returns the sentence with which main refuses these arguments."""
    def refusal(*arguments):
        with pytest.raises(train.InputError) as caught:
            train.main(list(arguments))
        message = str(caught.value)
        assert "\n" not in message
        return message
    return refusal


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory):
    """A finished small SFT run on toy: its folder."""
    folder = str(tmp_path_factory.mktemp("sft") / "run")
    arguments = [*TINY_RUN, "max_steps=60", "batch_size=32", "num_epochs=10", "eval_every=0", f"run_dir={folder}"]
    assert train.main(arguments) == 0
    return folder


@pytest.fixture(scope="session")
def rm_run(sft_run, tmp_path_factory):
    """A reward model trained on toy for 150 steps: its folder."""
    folder = str(tmp_path_factory.mktemp("rm") / "run")
    assert train.main(["loss=rm", f"model={sft_run}/LATEST", "max_steps=150", "lr=5e-4", "num_eval_examples=null",
                       "eval_every=1000", f"run_dir={folder}"]) == 0
    return folder


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


write_lines(FEW_ROWS, data.toy("train", True)[:400])


def losses_of(folder):
    return [line["loss"] for line in read_lines(os.path.join(folder, "metrics.jsonl")) if line["split"] == "train"]


def shared(*parts):
    """A path in ../shared; the test is skipped where that is absent."""
    path = os.path.join(SHARED, *parts)
    if not os.path.exists(path):
        pytest.skip("../shared is not beside this clone")
    return path
