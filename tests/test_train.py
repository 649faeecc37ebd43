"""What main refuses, in one sentence, before it writes anything; what a run leaves, and that it repeats."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import (DATA, ROOT, TINY_RUN, config_of, copy_model, losses_of, make_trainer, numbers,
                      read_lines, shared, write_lines)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import data
import train
from losses import OBJECTIVES

BAD_INPUT = [  # arguments, and what is said
    (["learning_rate=1"], "learning_rate is no key of config.yaml; here it is lr"),
    (["weight_decay=0.1"], "weight_decay is no key of config.yaml; here it is optimizer_args.weight_decay"),
    (["beta=0.1"], "beta is no key of config.yaml; here it is dpo.beta, ipo.beta or that of another loss"),
    (["min_lr=1e-4", "lr_schedule=constant"], "min_lr=0.0001 is not read with lr_schedule=constant"),
    (["min_lr=1.0"], "min_lr=1.0 is above the rate from which it is reached, 0.002"),
    (["xyz=1"], "xyz is no key of config.yaml: --help lists them"),
    (["btach_size=1"], "btach_size is no key of config.yaml; the nearest is batch_size"),
    (["dpo.betta=1"], "dpo.betta is no key of config.yaml; the nearest is dpo.beta"),
    (["LR=1"], "LR is no key of config.yaml; the nearest is lr"),
    (["loss=dpo", "dpo=0.1"], "dpo=0.1 is not allowed: dpo is a block with keys of its own, dpo.beta, "
     "dpo.label_smoothing, dpo.average_logps, dpo.sft_weight"),
    (["--config", "block.yaml"],
     "fsdp=True is not allowed: fsdp is a block with keys of its own, fsdp.replicas"),
    (["--config", "twice.yaml"], "dpo.beta stands twice, dotted and in its block: keep one of the two"),
    (["--config", "twice2.yaml"], "dpo.beta stands twice, dotted and in its block: keep one of the two"),
    (["dpo.beta=7"], "dpo.beta is not read with loss=sft: leave it out, or give loss=dpo"),
    (["loss=ipo", "--config", "dpo.yaml", "dpo={beta: 7}"], "dpo is not read with loss=ipo: leave it out"),
    (["loss=spin", "rm.center_weight=1"], "rm.center_weight is not read with loss=spin: leave it out"),
    (["dry_run=true", "loss=kd", "reference=run2", "dpo.beta=7"], "dpo.beta is not read with loss=kd"),
    (["max_hours=23:30"], "max_hours='23:30' is not allowed: it must be float > 0 or null"),
    (["seed=010"], "seed='010' is not allowed: it must be int in [0, 4294967295]"),
    (["lr=1_000"], "lr='1_000' is not allowed: it must be float >= 0"),
    (["lr=1_0.5"], "lr='1_0.5' is not allowed: it must be float >= 0"),
    (["lr=01.5"], "lr='01.5' is not allowed: it must be float >= 0"),
    (["batch_size=0x10"], "batch_size='0x10' is not allowed: it must be int >= 1"),
    (["batch_size=0b10"], "batch_size='0b10' is not allowed: it must be int >= 1"),
    (["spin.beta=[0.1,1_0]"], "spin.beta=[0.1, '1_0'] is not allowed: it must be float > 0 or list of"),
    (["--config", "hours.yaml"], "max_hours='1:30' is not allowed: it must be float > 0 or null"),
    (["--config", "octal.yaml"], "seed='010' is not allowed: it must be int in [0, 4294967295]"),
    (["exp_name=a/b"], "exp_name='a/b' names no folder in runs: give one name of at most 100 bytes, without "
     "/, or a place of your own by run_dir="),
    (["exp_name=.."], "exp_name='..' names no folder in runs: give one name of at most 100 bytes"),
    (["exp_name=."], "exp_name='.' names no folder in runs: give one name of at most 100 bytes"),
    (["exp_name=" + 50 * "é" + "x"], "éx' names no folder in runs: give one name of at most 100 bytes"),
    (["loss=DPO"], f"loss=DPO is not one of {', '.join(OBJECTIVES)}; the nearest is dpo"),
    (["--lr=3"], "'--lr=3' is not understood"),
    (["fast"], "'fast' is not understood"),
    (["--config"], "'--config' is not understood"),
    (["--config", "none.yaml"], "config file none.yaml cannot be read: No such file"),
    (["lr=[1"], "'[1' is not YAML"),
    (["batch_size=0"], "batch_size=0 is not allowed: it must be int >= 1"),
    (["batch_size=1.5"], "batch_size=1.5 is not allowed: it must be int >= 1"),
    (["batch_size=four"], "batch_size='four' is not allowed: it must be int >= 1"),
    (["seed=20240101123456"], "seed=20240101123456 is not allowed: it must be int in [0, 4294967295]"),
    (["lr=2024-13-45"], "'2024-13-45' is not YAML"),
    (["--config", "latin.yaml"], "config file latin.yaml is not YAML"),
    (["run_dir=single.jsonl/run"], "cannot be a run's folder"),
    (["attention=flex_attention"], "attention=flex_attention has no backward on a CPU"),
    (["optimizer_args.centered=banana"],
     "optimizer_args.centered='banana' is not allowed: it must be true or false"),
    (["optimizer_args.capturable=true"], "RMSprop with {'capturable': True} is refused"),
    (["optimizer=Adam", "optimizer_args.betas=[0.9]"], "Adam with {'betas': [0.9]} is refused"),
    (["data=half.jsonl"], "half.jsonl line 1 holds half a character"),
    (["model=run"], "is no model's folder, it has no config.json: model="),
    (["model=corrupt"], "cannot be loaded"),
    (["exp_name=mine", "resume=auto"], "has a config.yaml that no run wrote"),
    (["max_length=1"], "max_length=1 is not allowed"),
    (["max_prompt_length=0"], "max_prompt_length=0 is not allowed"),
    (["max_length=256"], "max_length=256 leaves no room for a response after max_prompt_length=256"),
    (["lr=-1"], "lr=-1 is not allowed: it must be float >= 0"),
    (["lr=.inf"], "lr=inf is not allowed"),
    (["lr=.nan"], "lr=nan is not allowed"),
    (["lr=fast"], "lr='fast' is not allowed"),
    (["num_epochs=0"], "num_epochs=0 is not allowed: it must be float > 0"),
    (["max_steps=-1"], "max_steps=-1 is not allowed: it must be int >= 0 or null"),
    (["eval_every=1.5"], "eval_every=1.5 is not allowed: it must be int >= 0 or float in (0, 1]"),
    (["eval_every=2.0"], "eval_every=2.0 is not allowed: it must be int >= 0 or float in (0, 1]"),
    (["save_every=0.0"], "save_every=0.0 is not allowed: it must be int >= 0 or float in (0, 1]"),
    (["save_every=-1"], "save_every=-1 is not allowed: it must be int >= 0 or float in (0, 1]"),
    (["save_every=1e3"], "save_every=1000.0 is not allowed: it must be int >= 0 or float in (0, 1]"),
    (["dpo.beta=0"], "dpo.beta=0 is not allowed: it must be float > 0"),
    (["ipo.beta=-0.1"], "ipo.beta=-0.1 is not allowed: it must be float > 0"),
    (["dpo.label_smoothing=0.5"], "dpo.label_smoothing=0.5 is not allowed: it must be float in [0, 0.5)"),
    (["rpo.divergence=kl"], "rpo.divergence='kl' is not allowed: it must be bwd_kl | fwd_kl | sq"),
    (["truncation=middle"], "truncation='middle' is not allowed: it must be keep_end | keep_start | drop"),
    (["sft.average=words"], "sft.average='words' is not allowed"),
    (["compute_dtype=float64"], "compute_dtype=float64 does not go with dtype=float32"),
    (["loss=dqo"], f"loss=dqo is not one of {', '.join(OBJECTIVES)}; the nearest is dpo"),
    (["optimizer=Adma"], "optimizer=Adma is not one of ASGD, Adadelta, Adafactor"),
    (["optimizer=LBFGS"], "optimizer=LBFGS is not one of"),
    (["optimizer_args.beta=1"], "optimizer_args.beta is no argument of RMSprop, which has alpha, eps"),
    (["optimizer_args.lr=1"], "optimizer_args.lr is no argument of RMSprop"),
    (["optimizer_args.alpha=-1"], "RMSprop with {'alpha': -1} is refused: Invalid alpha value: -1"),
    (["dry_run=true", "optimizer=ASGD", "optimizer_args.alpha=a"], "ASGD with {'alpha': 'a'} is refused"),
    (["data=toyy"], "'toyy' cannot be read, did you mean toy?"),
    (["data=none.jsonl"], "'none.jsonl' cannot be read, no such file"),
    (["data=bad.jsonl"], "bad.jsonl line 2 is not JSON"),
    (["data=single.jsonl", "loss=dpo"],
     "single.jsonl line 1 has values in the columns prompt, response; this objective needs"),
    (["data=typed.jsonl"], "typed.jsonl line 1: column response is 3; it must be text"),
    (["data=pairs.jsonl", "loss=rpo"], "pairs.jsonl line 1: the objective needs a column chosen_reward"),
    (["data=chat.jsonl"], "lists of messages, but the tokenizer has no chat template"),
    (["data=empty.jsonl"], "/empty.jsonl leaves no row to work with: 0 of 0 rows used"),
    (["data=[empty.jsonl,blank.jsonl]"], "/blank.jsonl'] leaves no row to work with: 0 of 1 rows used"),
    (["data=blank.jsonl"],
     "/blank.jsonl leaves no row to work with: 0 of 1 rows used, 1 dropped, 0 cut to fit;   dropped 1: "
     "response is white space only (blank.jsonl line 1)"),
    (["data=single.jsonl", "eval_data=blank.jsonl"],
     "/blank.jsonl leaves no row to work with: 0 of 1 rows used, 1 dropped"),
    (["data=huge.jsonl", "loss=rpo"], "huge.jsonl line 1: column chosen_reward is 1" + 59 * "0"
     + "; it must be a finite number"),
    (["data=heavy.jsonl"],
     "heavy.jsonl line 1: column response_weights must hold spans [start, stop, weight]"),
    (["data=latin.csv"], "/latin.csv line 3 is not UTF-8: save the file so"),
    (["model=none/there/LATEST"], "model=none/there/LATEST: there is no such folder"),
    (["model=nobody/nothing"], "the tokenizer of nobody/nothing cannot be loaded"),
    (["model=notes"], "notes is no model's folder"),
    (["model=endless", "data=single.jsonl"], "has no end-of-sequence token"),
    (["add_bos=true", "data=single.jsonl"],
     "add_bos=true, but the tokenizer of tiny has no begin-of-sequence token"),
    (["max_length=4096", "data=single.jsonl"], "max_length=4096 is beyond the 2048 positions of tiny"),
    (["attention=sdpaa", "data=single.jsonl"], "the model tiny cannot be loaded"),
    (["loss=dpo", "reference_cache=single.jsonl"],
     "/single.jsonl is in its way: name another folder, or set it to false"),
    (["loss=dpo", "reference_cache=single.jsonl/cache"],
     "reference_cache=single.jsonl/cache cannot be written, "),
    (["exp_name=taken"], "taken holds a run already: start it over by resume=auto"),
    (["data=single.jsonl", "max_steps=0"], "max_steps=0 only evaluates and samples, and there is nothing to"),
    (["resume=true"], "has no complete checkpoint to resume"),
    (["loss=spin", "reference=notes"],
     "does not go with loss=spin, whose reference is the policy at the start"),
    (["loss=spin", "spin.beta=[0.1,0.2,0.3]"],
     "spin.beta=[0.1, 0.2, 0.3] is a list of 3 where spin.iterations=2"),
    (["loss=spin", "spin.iterations=1", "spin.lr=[1e-4,1e-5]"],
     "spin.lr=[0.0001, 1e-05] is a list of 2 where spin.iterations=1"),
    (["loss=sft", "reference=notes"], "notes is not read with loss=sft: leave it out"),
    (["loss=rm", "reward_model=x"], "reward_model=x is not read with loss=rm"),
    (["loss=rm", "prompt_template={prompt} {tone}", "sample_attributes.tone=dry"],
     "sample_attributes={'tone': 'dry'} is not read with loss=rm"),
    (["loss=dpo", "reward_model=tiny"], "reward_model=tiny would judge at random"),
    (["data=half_rewarded.jsonl", "loss=rpo", "reward_model=run2"],
     "half_rewarded.jsonl line 1: the objective needs a column rejected_reward"),
    (["spin.beta=[0.1,0]"], "spin.beta=[0.1, 0] is not allowed: it must be float > 0 or list of float > 0"),
    (["spin.iterations=0"], "spin.iterations=0 is not allowed: it must be int >= 1"),
    (["spin.top_k=-1"], "spin.top_k=-1 is not allowed: it must be int >= 0"),
    (["loss=kd"], "loss=kd needs a teacher: name one of the same tokenizer by reference="),
    (["kd.temperature=0"], "kd.temperature=0 is not allowed: it must be float > 0"),
    (["kd.divergence=sq"], "kd.divergence='sq' is not allowed: it must be fwd_kl | bwd_kl"),
    (["loss=dpo", "reference=runs/nope"], "runs/nope: there is no such folder"),
    (["loss=dpo", "reward_model=none/there/LATEST"],
     "reward_model=none/there/LATEST: there is no such folder"),
    (["data=pairs.jsonl", "loss=kd", "reference=notes"],
     "notes is no model's folder, it has no config.json: give a folder that has"),
    (["prompt_template={prompt} {quality:.1f} {"], "has braces that hold no name"),
    (["data=single.jsonl", "prompt_template="],
     "/single.jsonl leaves no row to work with: 0 of 1 rows used, 1 dropped, 0 cut to fit;   dropped 1: the "
     "prompt is empty"),
    (["prompt_template=[{attributes}] {prompt:{x}}"], "has braces that hold no name"),
    (["prompt_template={prompt} {attributes}", "sample_attributes.prompt=x"],
     "are not read by prompt_template"),
    (["data=single.jsonl", "prompt_template=Quality {quality}:"],
     "single.jsonl line 1 has no quality among its columns or in its column attributes"),
    (["--config", "former.yaml"],
     "attribute_template is called prompt_template now: give it under that name"),
    (["attribute_template={prompt} {quality}"],
     "attribute_template is called prompt_template now: give it under that name"),
    (["sample_attributes.quality=4"],
     "sample_attributes={'quality': 4} are not read by prompt_template=None"),
    (["prompt_template={prompt} {tone}", "sample_attributes.quality=4"],
     "are not read by prompt_template='{prompt} {tone}'"),
    (["data=single.jsonl", "prompt_template={prompt} {quality}"],
     "single.jsonl line 1 has no quality among its columns"),
]


@pytest.fixture
def bad_files():
    """What BAD_INPUT's arguments name."""
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name, row in (("single", {"prompt": "p", "response": "r"}), ("typed", {"prompt": "p", "response": 3}),
                      ("pairs", pair), ("half_rewarded", pair | {"score_chosen": 2}),
                      ("blank", {"prompt": "p", "response": " "}), ("chat", {"messages": chat})):
        write_lines(f"{name}.jsonl", [row])
    files = {"bad.jsonl": '{"prompt": "p", "response": "r"}\n{"prompt" "p"}\n', "empty.jsonl": "",
             "half.jsonl": '{"prompt": "p", "response": "\\ud83d"}\n', "run2/config.json": "{}",
             "runs/mine/config.yaml": "mine: 1\n", "runs/taken/config.yaml": "loss: sft\n",
             "former.yaml": "attribute_template: '{prompt} {quality}'\n", "block.yaml": "fsdp: true\n",
             "twice.yaml": "loss: dpo\ndpo.beta: 1\ndpo:\n  beta: 1\n", "hours.yaml": "max_hours: 1:30\n",
             "twice2.yaml": "dpo:\n  beta: 1\ndpo.beta: 1\n", "octal.yaml": "seed: 010\n",
             "dpo.yaml": "dpo.beta: 3\n",
             "huge.jsonl": json.dumps(pair | {"chosen_reward": 10**400, "rejected_reward": 0}),
             "heavy.jsonl": json.dumps(
                 {"prompt": "p", "response": "r", "response_weights": [[0, 1, 10**400]]})}
    files |= {f"corrupt/{name}.json": "[]" for name in ("config", "tokenizer", "tokenizer_config")}
    for name in ("notes", "corrupt", "run2", "run/LATEST", "runs/mine", "runs/taken"):
        os.makedirs(name)
    for name, text in files.items():
        pathlib.Path(name).write_text(text)
    pathlib.Path("latin.yaml").write_bytes("exp_name: \xe9\n".encode("latin-1"))
    pathlib.Path("latin.csv").write_bytes("prompt,response\np,r\np,\xe9\n".encode("latin-1"))


@pytest.fixture
def endless(sft_run):
    """A model whose tokenizer has no end token."""
    copy_model(f"{sft_run}/LATEST", "endless")
    path = pathlib.Path("endless/tokenizer_config.json")
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in settings.items() if name != "eos_token"}))


def everything_here():
    """Hidden files too, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in pathlib.Path(".").rglob("*")}


@pytest.mark.parametrize("arguments, said", BAD_INPUT, ids=[" ".join(case[0]) for case in BAD_INPUT])
def test_bad_input_gets_one_sentence(arguments, said, bad_files, refused, request):
    if "model=endless" in arguments:
        request.getfixturevalue("endless")
    before = everything_here()
    message = refused(*arguments)
    assert said in message
    assert len(message) < 600 and (". " not in message or "attention" in message)  # which quotes transformers
    assert everything_here() == before


def test_the_entry_point_prints_the_sentence_and_exits_with_2(tmp_path):
    """And does not wait for torch, which is none here."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    done = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), "lr=-1"], capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: lr=-1 is not allowed: it must be float >= 0\n"


def test_errors_in_the_code_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(data.Encoder, "examples", lambda *arguments, **options: [][0])
    with pytest.raises(IndexError):
        train.main([*TINY_RUN])


# ---------------------------------------------------------------- the run


def test_the_folder_of_a_run(run, sft_run):
    os.symlink(sft_run, "link")
    folder = run(*TINY_RUN, "loss=dpo", "model=link/LATEST", "save_every=2")
    assert sorted(name for name in os.listdir(folder) if name != ".lock") == [
        "LATEST", "config.yaml", "metrics.jsonl", "samples.jsonl", "step-000002", "step-000003"]
    saved = yaml.safe_load(open(f"{folder}/config.yaml"))
    assert saved["model"] == os.path.realpath(f"{sft_run}/LATEST") and "LATEST" not in saved["model"]
    assert saved["dpo"]["beta"] == 0.1 and saved["batch_size"] == 4
    assert saved["provenance"]["versions"]["torch"] == torch.__version__
    assert {"git_commit", "git_dirty"} <= set(saved["provenance"])
    rerun = config_of("--config", f"{folder}/config.yaml", "run_dir=again")  # it is a config file itself
    assert rerun.model == saved["model"]


def test_a_tiny_reference_is_kept_for_resuming(run):
    """As the policy began."""
    folder = run(*TINY_RUN, "loss=dpo", "eval_every=0")
    kept = AutoModelForCausalLM.from_pretrained(f"{folder}/reference").state_dict()
    first = make_trainer("loss=dpo", "eval_every=0", "run_dir=first").policy.state_dict()
    assert kept.keys() == first.keys() and all(torch.equal(kept[name], first[name]) for name in kept)
    last = load_file(f"{folder}/LATEST/model.safetensors")
    assert not torch.equal(kept["lm_head.weight"], last["lm_head.weight"])


def test_attributes_in_training_and_in_samples(run):
    rows = [{"prompt": "Say:", "response": f" word {i}", "attributes": {"quality": i % 5}} for i in range(20)]
    write_lines("rated.jsonl", rows)
    settings = ["data=rated.jsonl", "eval_data=rated.jsonl", "prompt_template={prompt} Quality {quality}:",
                "batch_size=4", "max_steps=2", "num_samples=6", "sample_max_tokens=4"]
    own = run(*settings, "run_dir=own")
    given = run(*settings, "run_dir=given", "sample_attributes.quality=4")
    prompts = [[line["prompt"] for line in read_lines(f"{folder}/samples.jsonl")[:6]]
               for folder in (own, given)]
    assert prompts == [[f"Say: Quality {i % 5}:" for i in range(6)], ["Say: Quality 4:"] * 6]
    assert [line["chosen"] for line in read_lines(f"{given}/samples.jsonl")[:2]] == [" word 0", " word 1"]
    assert losses_of(own) == losses_of(given)  # of training and evaluation the rows' own stay
    evals = [[line["loss"] for line in read_lines(f"{folder}/metrics.jsonl") if line["split"] == "eval"]
             for folder in (own, given)]
    assert evals[0] == evals[1] and len(evals[0]) == 2


def test_two_runs_are_the_same_value_by_value(run):
    a, b = (run(*TINY_RUN, "loss=dpo", f"run_dir={name}", "eval_every=2") for name in "ab")
    assert numbers(a) == numbers(b) and len(numbers(a)) == 6
    assert open("a/samples.jsonl").read() == open("b/samples.jsonl").read()


def test_another_seed_is_another_run(run):
    settings = [*TINY_RUN, "eval_every=0", "max_steps=1"]
    assert losses_of(run(*settings, "run_dir=a")) != losses_of(run(*settings, "run_dir=b", "seed=1"))


def test_max_steps_0_evaluates_and_samples_only(run):
    folder = run(*TINY_RUN, "loss=dpo", "max_steps=0", "eval_first=false")
    line, = read_lines(f"{folder}/metrics.jsonl")
    assert (line["step"], line["split"], line["rewards/margins"]) == (0, "eval", 0)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(read_lines(f"{folder}/samples.jsonl")) == 2
    assert not os.path.exists(f"{folder}/LATEST")


# ---------------------------------------------------------------- real input


def test_real_pairs_with_a_real_tokenizer(run, capsys):
    """A slice of HH, by stories260K's tokenizer and form, with random weights."""
    source = os.path.join(DATA, "stories260K")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained("model")
    shutil.copytree(source, "model", dirs_exist_ok=True)
    settings = ["model=model", f"data={DATA}/hh.jsonl", f"eval_data={DATA}/hh.jsonl", "max_length=192",
                "max_prompt_length=128", "batch_size=4", "max_steps=1", "num_eval_examples=8",
                "sample_max_tokens=8", "num_samples=2"]
    folder = run("loss=dpo", *settings)
    output = capsys.readouterr().out
    assert "data       57 of 64 rows used, 7 dropped" in output
    for reason, lines in (("chosen is white space only", (2, 14, 25, 32)),
                          ("rejected does not start with the prompt of chosen", (37, 55, 64))):
        places = ", ".join(f"hh.jsonl line {number}" for number in lines)
        assert f"dropped {len(lines)}: {reason} ({places})" in output
    assert "the tokenizer begins texts with <s>, but this run's prompts do not" in output
    first = read_lines(f"{folder}/metrics.jsonl")[0]
    assert first["rewards/chosen"] == first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    kept = AutoTokenizer.from_pretrained(f"{folder}/LATEST")
    assert kept("To be")["input_ids"] == AutoTokenizer.from_pretrained(source)("To be")["input_ids"]
    run("loss=sft", "add_bos=true", "eval_every=0", *settings)
    assert "begins texts with" not in capsys.readouterr().out


def test_hh_with_a_pretrained_model(run, capsys):
    model, hh = shared("models", "stories260K"), shared("data", "hh")
    folder = run("loss=dpo", f"model={model}", f"data={hh}/train.jsonl", f"eval_data={hh}/test.jsonl",
                 "max_length=256", "max_prompt_length=128", "batch_size=4", "max_steps=1",
                 "num_eval_examples=8", "sample_max_tokens=8", "num_samples=2")
    output = capsys.readouterr().out
    assert "1,993 of 2,000 rows used, 7 dropped" in output
    assert "train.jsonl line 1255, train.jsonl line 1689, train.jsonl line 1953" in output
    assert "dropped 4: chosen is white space only (train.jsonl line 87," in output
    first = read_lines(f"{folder}/metrics.jsonl")[0]
    assert first["rewards/chosen"] == first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
