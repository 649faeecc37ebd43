"""What all tests share: an empty folder each, offline, on one thread; small runs that are made once."""

import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
if "PYTEST_XDIST_WORKER" not in os.environ and not any("test_gpu.py" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the other tests are of a CPU, on a machine with a card too
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
DATA = os.path.join(HERE, "data")
SHARED = os.path.join(os.path.dirname(ROOT), "shared")

import dataclasses
import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import (CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, LlamaConfig)

import data
import train
from engine import InputError
from engine.batches import COMPUTED_COLUMNS
from engine.checkpoints import load_config
from engine.config import as_namespace, read_arguments, read_schema
from engine.objectives import parameters
from engine.toy import toy
from losses import OBJECTIVES

torch.set_num_threads(1)  # on models this small several threads wait for each other
TOY = data.DATASETS["toy"]
data.DATASETS["toy"] = dataclasses.replace(TOY, num_samples=16)  # a test that needs all 1,024 puts TOY back
TEMPORARY = tempfile.TemporaryDirectory()
FEW_ROWS = os.path.join(TEMPORARY.name, "few.jsonl")  # 400 pairs of toy: a run starts in no time
FORTY = os.path.join(TEMPORARY.name, "forty.jsonl")
TINY_RUN = [f"data={FEW_ROWS}", "eval_data=toy", "num_eval_examples=8", "batch_size=4", "max_steps=3",
            "sample_max_tokens=8", "num_samples=2"]
OWN = ("sft", "dpo", "ipo", "rpo", "spin", "rm", "kd")  # the project's; a fork's table has more
UNREPEATABLE = ("split", "time", "examples_per_second", "tokens_per_second")


# ---------------------------------------------------------------- files


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def write_bare_pairs(count=400):
    """Toy's pairs without their rewards."""
    return write_lines("bare.jsonl", [{name: row[name] for name in ("prompt", "chosen", "rejected")}
                                      for row in toy("train", True)[:count]])


def shared(*parts):
    """A path in ../shared; the test is skipped where that is absent."""
    path = os.path.join(SHARED, *parts)
    if not os.path.exists(path):
        pytest.skip("../shared is not beside this clone")
    return path


write_lines(FEW_ROWS, toy("train", True)[:400])
write_lines(FORTY, toy("train", True)[:40])


# ---------------------------------------------------------------- forks


PLACES = {  # of a page's pieces of code: what parts them, the file, what they come before or after
    "loss_function": (r"^(?=def )", "losses.py", "def check(", None),
    "loss_row": (r'^(?=    ")', "losses.py", None, "OBJECTIVES = {\n"),
    "loss_config": (r"^(?=\w)", "config.yaml", None, None),
    "dataset_function": (r"^(?=def )", "data.py", "@dataclass(frozen=True)\nclass Dataset:", None),
    "dataset_row": (r'^(?=    ")', "data.py", None, "DATASETS = {\n")}


def pieces_of(page):
    """{name: code} of a page's blocks that have a name."""
    return dict(re.findall(r"<!-- (\w+) -->\n```(?:python|yaml)\n(.*?)```", page, re.S))


def copy_project(folder):
    """A copy of what runs."""
    shutil.copytree(os.path.join(ROOT, "engine"), folder / "engine",
                    ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "losses.py", "trainers.py", "data.py", "config.yaml"):
        shutil.copy(os.path.join(ROOT, name), folder)
    return folder


def adopt(copy, page):
    """Puts a page's pieces of code into a copy, where the README says; what stands there already stays."""
    for name, code in pieces_of(page).items():
        parting, path, before, after = PLACES[name]
        text = (copy / path).read_text(encoding="utf-8")
        for piece in filter(str.strip, re.split(parting, code, flags=re.M)):
            first = re.match(r" *(def \w+\(|\"?\w+\"?:)", piece)[0]
            if re.search("^" + re.escape(first), text, re.M):
                continue
            if before or after:
                assert text.count(before or after) == 1
            if before:
                text = text.replace(before, piece.rstrip() + "\n\n\n" + before)
            else:
                text = text.replace(after, after + piece) if after else text + piece
        (copy / path).write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- runs in this process


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run():
    """run("loss=dpo", ...) runs main in this process and returns the run's folder."""
    def run_main(*arguments, status=0):
        assert train.main(list(arguments)) == status
        return as_namespace(read_arguments(arguments), data.DATASETS).run_dir
    return run_main


@pytest.fixture
def refused():
    """refused("lr=-1") returns the sentence with which main refuses these arguments."""
    def refusal(*arguments):
        with pytest.raises(InputError) as caught:
            train.main(list(arguments))
        message = str(caught.value)
        assert "\n" not in message
        return message
    return refusal


def config_of(*arguments):
    return load_config(read_arguments(arguments), OBJECTIVES, data.DATASETS)[0]


def make_trainer(*arguments):
    """The Trainer of a small run that has not begun, with its folder."""
    trainer = train.build_trainer(config_of(*TINY_RUN, *arguments))
    os.makedirs(trainer.config.run_dir, exist_ok=True)
    trainer.optimizer.register_step_post_hook(keep_gradients)
    return trainer


def keep_gradients(optimizer, *_):
    for p in optimizer.param_groups[0]["params"]:
        p.kept_gradient = p.grad


def last_gradient(p):
    """A weight's: of a trainer's last step, which lets go of it, or the one that stands there."""
    return getattr(p, "kept_gradient", p.grad)


def needed(loss, sft_run):
    """The settings without which a loss does not start, and those that make it quick; of one that a fork has
    adopted, rows with all that it may read."""
    if loss in OWN:
        return {"kd": [f"reference={sft_run}/LATEST"], "spin": ["spin.max_tokens=8"]}.get(loss, [])
    objective, keys, rows = OBJECTIVES[loss], read_schema()[0], toy("train", True)[:40]
    for i, row in enumerate(rows):
        texts = [row["chosen"], row["rejected"], rows[i - 1]["chosen"], rows[i - 1]["rejected"]]
        row |= {name: [1, 2, 3, 4] if objective.needs_lists else i % 2
                for name in objective.columns if name not in (*COMPUTED_COLUMNS, *row)} | {"responses": texts}
    path = write_lines(os.path.join(TEMPORARY.name, f"{loss}.jsonl"), rows)
    judged = "scores" in parameters(objective.self_play)[0]
    return [f"model={sft_run}/LATEST", f"data={path}", f"eval_data={'toy' if judged else path}",
            *([f"reference={sft_run}/LATEST"] if objective.needs_teacher else []),
            *([f"{loss}.max_tokens=32"] if f"{loss}.max_tokens" in keys else [])]


# ---------------------------------------------------------------- runs that many tests use


def made_once(factory, name, make):
    """The folder that make(folder) filled, for the first of pytest-xdist's workers that asked."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / f"{name}.done").exists():
            shutil.rmtree(base / name, ignore_errors=True)
            make(str(base / name))
            (base / f"{name}.done").touch()
    return str(base / name)


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory):
    """A finished small SFT run on toy: its folder."""
    def make(folder):
        assert train.main([*TINY_RUN, "max_steps=60", "batch_size=32", "num_epochs=10", "eval_every=0",
                           f"run_dir={folder}"]) == 0
    return made_once(tmp_path_factory, "sft", make)


@pytest.fixture(scope="session")
def rm_run(sft_run, tmp_path_factory):
    """A reward model trained on toy for 150 steps: its folder."""
    def make(folder):
        assert train.main(["loss=rm", f"model={sft_run}/LATEST", "max_steps=150", "lr=5e-4",
                           "eval_every=1000", "eval_first=false", "num_eval_examples=null",
                           f"run_dir={folder}"]) == 0
    return made_once(tmp_path_factory, "rm", make)


def save_random_judge(sft_run):
    """A small reward model of random weights with that run's tokenizer, in the folder judge."""
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_labels=1,
        num_attention_heads=2, initializer_range=0.5, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained("judge")
    tokenizer.save_pretrained("judge")
    return model, tokenizer


# ---------------------------------------------------------------- runs in processes of their own


def start(*arguments):
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *arguments],
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        is_alive = process is None or process.poll() is None
        assert is_alive and time.monotonic() < end, process and process.stdout.read()
        time.sleep(0.005)


def num_lines(path):
    try:
        with open(path, "rb") as file:
            return file.read().count(b"\n")
    except FileNotFoundError:
        return 0


# ---------------------------------------------------------------- what came out


def losses_of(folder):
    lines = read_lines(os.path.join(folder, "metrics.jsonl"))
    return [line["loss"] for line in lines if line["split"] == "train"]


def numbers(folder):
    """The lines of metrics.jsonl without what no two runs share."""
    return [{name: value for name, value in line.items() if name not in UNREPEATABLE}
            for line in read_lines(f"{folder}/metrics.jsonl")]


def copy_model(folder, to):
    """A checkpoint as a model alone, which may be changed."""
    shutil.copytree(os.path.realpath(folder), to)
    shutil.rmtree(f"{to}/trainer_state")


def hash_again(checkpoint, state=None):
    """As somebody would who changes a checkpoint and knows how: its files, or its state, as they are now."""
    path = f"{checkpoint}/trainer_state/state.json"
    state = state or json.load(open(path))
    state = {name: x for name, x in state.items() if name != "sha256"}
    for name in state["files"]:
        content = open(f"{checkpoint}/{name}", "rb").read()
        state["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    with open(path, "w") as file:
        json.dump(state | {"sha256": digest}, file)


def same_weights(a, b, name="LATEST"):
    """Of two runs' last checkpoints, or merged adapters."""
    first, second = (load_file(f"{folder}/{name}/model.safetensors") for folder in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def latest(folder):
    """The step of a run's last checkpoint; -1 where there is none."""
    return int(os.readlink(f"{folder}/LATEST").split("-")[1]) if os.path.lexists(f"{folder}/LATEST") else -1


# ---------------------------------------------------------------- models, and what they say, plainly


FAMILIES = {  # where a window is possible, of 8 tokens
    "llama": {}, "gpt2": {}, "gpt_neox": {}, "opt": {}, "qwen2": {}, "qwen3": {}, "olmo2": {}, "cohere": {},
    "mistral": {"sliding_window": 8}, "gemma2": {"sliding_window": 8}, "gemma3_text": {"sliding_window": 8},
    "phi3": {"sliding_window": 8}, "gpt_oss": {"sliding_window": 8}, "mixtral": {"sliding_window": 8},
    "llama4_text": {"attention_chunk_size": 8, "intermediate_size_mlp": 48}}


def tiny_of(model_type, **more):
    """A small random causal model of a family, without its special defaults for size."""
    more = FAMILIES.get(model_type, {}) | more
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if model_type == "opt":
        size |= {"word_embed_proj_dim": 32, "ffn_dim": 48, "init_std": 0.3}
    elif model_type not in ("gpt2", "bloom", "mpt", "gpt_neo", "mamba"):
        size |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    if model_type == "gpt_neo":
        size |= {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
                 "window_size": 8}
        del size["num_hidden_layers"], size["num_attention_heads"]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**size | {"initializer_range": 0.3} | more)
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config).eval()


def obvious_logp(model, example, response):
    """log pi of one response: its own row, full logits, log_softmax, gather."""
    ids = torch.tensor([[*example.prompt, *response]])
    logps = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
    start = len(example.prompt)
    return sum(logps[at - 1, ids[0, at]] for at in range(start, ids.shape[1]))
