"""The command line, the config, the table of bad inputs, every README command, and real input."""

import dataclasses
import glob
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from conftest import FEW_ROWS, ROOT, TINY_RUN, losses_of, read_lines, shared, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from losses import OBJECTIVES

README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()


def config_of(*arguments):
    return train.load_config(list(arguments))[0]


# ---------------------------------------------------------------- config


def test_command_line_values():
    config = config_of("loss=dpo", "lr=1e-5", "data=[a.jsonl,b.jsonl]", "dpo.beta=0.3", "optimizer_args.alpha=0.9",
                       "optimizer_args.eps=1e-6", "reference=null", "max_grad_norm=null", "resume=auto", "exp_name=2024")
    assert (config.lr, config.data, config.dpo["beta"]) == (1e-5, ["a.jsonl", "b.jsonl"], 0.3)
    assert config.optimizer_args == {"alpha": 0.9, "eps": 1e-6}
    assert config.reference is None and config.max_grad_norm is None and config.resume == "auto"
    assert [config_of(f"reference_cache={x}").reference_cache for x in ("true", "false", "kept")] == [True, False, "kept"]
    assert config.exp_name == "2024" and config.run_dir == os.path.abspath("runs/2024")
    assert config_of("loss=ipo").exp_name == "ipo"


def test_a_file_of_settings_and_the_command_line_over_it():
    open("mine.yaml", "w").write("loss: ipo\nlr: 5e-7\nipo:\n  beta: 0.4\n")
    config = config_of("--config", "mine.yaml", "lr=1e-6")
    assert (config.loss, config.lr, config.ipo["beta"], config.ipo["average_logps"]) == ("ipo", 1e-6, 0.4, False)


def test_every_key_has_a_rule_that_its_default_obeys():
    defaults, rules = train.read_schema()
    assert set(defaults) == set(rules)
    text = open(os.path.join(ROOT, "config.yaml")).read()
    for key, rule in rules.items():
        assert f"# {rule}." in text, key
        assert any(train.fits(defaults[key], alternative) for alternative in rule.split(" or ")), key


def test_every_key_is_read():
    code = "".join(open(os.path.join(ROOT, name)).read() for name in ("train.py", "trainers.py", "data.py"))
    defaults, _ = train.read_schema()
    for key in defaults:
        block, _, name = key.rpartition(".")
        if not block:
            assert re.search(rf"config\.{key}\b", code), key
        elif block == "fsdp" or name not in OBJECTIVES[block].loss.__code__.co_varnames:  # by its name
            assert f'"{name}"' in code, key


def test_help_is_the_config_file():
    output = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), "--help"], capture_output=True, text=True)
    assert output.returncode == 0 and open(os.path.join(ROOT, "config.yaml")).read() in output.stdout


@pytest.mark.parametrize("value, rule, allowed", [
    (1, "int >= 1", True), (0, "int >= 1", False), (True, "int >= 0", False), (1.0, "int >= 0", False),
    (0, "float > 0", False), (1, "float > 0", True), (math.inf, "float > 0", False), (math.nan, "float >= 0", False),
    (0.5, "float in [0, 0.5)", False), (0, "float in [0, 0.5)", True), (1, "float in (0, 1]", True),
    (0, "float in (0, 1]", False), ("auto", "false | true | auto", True), (True, "false | true | auto", True),
    (1, "false | true | auto", False), ("x", "false | true | auto", False), (None, "null", True),
    ([], "list of str", False), (["a"], "list of str", True), ([1], "list of str", False),
    ([0.1, 2], "list of float > 0", True), ([0.1, 0], "list of float > 0", False), ([], "list of float > 0", False),
    ({}, "mapping", True), ("yes", "bool", False),
])
def test_rules(value, rule, allowed):
    assert train.fits(value, rule) is allowed


# ---------------------------------------------------------------- bad input: what is given, what is said

BAD_INPUT = [
    (["learning_rate=1"], "learning_rate is no key of config.yaml; the nearest is "),
    (["btach_size=1"], "btach_size is no key of config.yaml; the nearest is batch_size"),
    (["dpo.betta=1"], "dpo.betta is no key of config.yaml; the nearest is dpo.beta"),
    (["dpo=3"], "dpo is no key of config.yaml"),
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
    (["optimizer_args.centered=banana"], "optimizer_args.centered='banana' is not allowed: it must be true or false"),
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
    (["eval_every=1.5"], "eval_every=1.5 is not allowed: it must be whole steps, or below 1 a fraction"),
    (["dpo.beta=0"], "dpo.beta=0 is not allowed: it must be float > 0"),
    (["ipo.beta=-0.1"], "ipo.beta=-0.1 is not allowed: it must be float > 0"),
    (["dpo.label_smoothing=0.5"], "dpo.label_smoothing=0.5 is not allowed: it must be float in [0, 0.5)"),
    (["rpo.divergence=kl"], "rpo.divergence='kl' is not allowed: it must be bwd_kl | fwd_kl | sq"),
    (["truncation=middle"], "truncation='middle' is not allowed: it must be keep_end | keep_start | drop"),
    (["sft.average=words"], "sft.average='words' is not allowed"),
    (["compute_dtype=float64"], "compute_dtype=float64 does not go with dtype=float32"),
    (["loss=dqo"], "loss=dqo is not one of sft, dpo, ipo, rpo, spin, rm, kd; the nearest is dpo"),
    (["optimizer=Adma"], "optimizer=Adma is not one of ASGD, Adadelta, Adafactor"),
    (["optimizer=LBFGS"], "optimizer=LBFGS is not one of"),
    (["optimizer_args.beta=1"], "optimizer_args.beta is no argument of RMSprop, which has alpha, eps"),
    (["optimizer_args.lr=1"], "optimizer_args.lr is no argument of RMSprop"),
    (["optimizer_args.alpha=-1"], "RMSprop with {'alpha': -1} is refused: Invalid alpha value: -1"),
    (["data=toyy"], "'toyy' cannot be read, did you mean toy?"),
    (["data=none.jsonl"], "'none.jsonl' cannot be read, no such file"),
    (["data=bad.jsonl"], "bad.jsonl line 2 is not JSON"),
    (["data=single.jsonl", "loss=dpo"], "single.jsonl line 1 has values in the columns prompt, response; this objective needs"),
    (["data=typed.jsonl"], "typed.jsonl line 1: column response is 3; it must be text"),
    (["data=pairs.jsonl", "loss=rpo"], "pairs.jsonl line 1: the objective needs a column chosen_reward"),
    (["data=chat.jsonl"], "chat.jsonl line 1 is a list of messages, but the tokenizer has no chat template"),
    (["data=empty.jsonl"], "data leaves no row to work with: 0 of 0 rows used"),
    (["data=blank.jsonl"], "data leaves no row to work with: 0 of 1 rows used, 1 dropped, 0 cut to fit;   dropped 1: "
                           "response is white space only (blank.jsonl line 1)"),
    (["data=single.jsonl", "eval_data=blank.jsonl"], "eval_data leaves no row"),
    (["model=none/there/LATEST"], "model=none/there/LATEST: there is no such folder"),
    (["model=nobody/nothing"], "the tokenizer of nobody/nothing cannot be loaded"),
    (["model=notes"], "notes is no model's folder"),
    (["model=endless"], "has no end-of-sequence token"),
    (["add_bos=true"], "add_bos=true, but the tokenizer of tiny has no begin-of-sequence token"),
    (["max_length=4096"], "max_length=4096 is beyond the 2048 positions of tiny"),
    (["attention=sdpaa"], "the model tiny cannot be loaded"),
    (["loss=dpo", "reference_cache=single.jsonl"], "reference_cache=single.jsonl is no folder: name one"),
    (["exp_name=taken"], "taken holds a run already: start it over by resume=auto"),
    (["data=single.jsonl", "max_steps=0"], "max_steps=0 only evaluates and samples, and there is nothing to"),
    (["resume=true"], "has no complete checkpoint to resume"),
    (["loss=spin", "reference=notes"], "does not go with loss=spin, whose reference is the policy at the start"),
    (["loss=spin", "spin.beta=[0.1,0.2,0.3]"], "spin.beta=[0.1, 0.2, 0.3] is a list of 3 where spin.iterations=2"),
    (["loss=spin", "spin.iterations=1", "spin.lr=[1e-4,1e-5]"], "spin.lr=[0.0001, 1e-05] is a list of 2 where spin.iterations=1"),
    (["loss=sft", "reference=notes"], "notes is not read with loss=sft: leave it out"),
    (["loss=rm", "reward_model=x"], "reward_model=x is not read with loss=rm"),
    (["loss=rm", "attribute_template={prompt} {tone}", "sample_attributes.tone=dry"], "is not read with loss=rm"),
    (["loss=dpo", "reward_model=tiny"], "reward_model=tiny would judge at random"),
    (["data=half_rewarded.jsonl", "loss=rpo", "reward_model=run2"], "half_rewarded.jsonl line 1: the objective needs a column rejected_reward"),
    (["spin.beta=[0.1,0]"], "spin.beta=[0.1, 0] is not allowed: it must be float > 0 or list of float > 0"),
    (["spin.iterations=0"], "spin.iterations=0 is not allowed: it must be int >= 1"),
    (["spin.top_k=-1"], "spin.top_k=-1 is not allowed: it must be int >= 0"),
    (["loss=kd"], "loss=kd needs a teacher: name the model, with the same tokenizer, by reference="),
    (["kd.temperature=0"], "kd.temperature=0 is not allowed: it must be float > 0"),
    (["kd.divergence=sq"], "kd.divergence='sq' is not allowed: it must be fwd_kl | bwd_kl"),
    (["loss=dpo", "reference=runs/nope"], "runs/nope: there is no such folder"),
    (["loss=dpo", "reward_model=none/there/LATEST"], "reward_model=none/there/LATEST: there is no such folder"),
    (["data=pairs.jsonl", "loss=kd", "reference=notes"], "notes is no model's folder, it has no config.json: give a folder that has"),
    (["attribute_template={prompt} {quality:.1f} {"], "and no other braces"),
    (["attribute_template="], "attribute_template='' must hold {prompt}"),
    (["attribute_template=[{attributes}] {prompt:{x}}"], "and no other braces"),
    (["attribute_template={prompt} {attributes}", "sample_attributes.prompt=x"], "are not read by attribute_template"),
    (["attribute_template=Quality {quality}:"], "must hold {prompt}, and {attributes} or an attribute's name in braces"),
    (["attribute_template={prompt}"], "must hold {prompt}, and {attributes} or an attribute's name"),
    (["sample_attributes.quality=4"], "sample_attributes={'quality': 4} are not read by attribute_template=None"),
    (["attribute_template={prompt} {tone}", "sample_attributes.quality=4"], "are not read by attribute_template='{prompt} {tone}'"),
    (["data=single.jsonl", "attribute_template={prompt} {quality}"], "single.jsonl line 1 has no quality in its column"),
]


@pytest.mark.parametrize("arguments, said", BAD_INPUT, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_gets_one_sentence(arguments, said, refused, sft_run):
    write_lines("single.jsonl", [{"prompt": "p", "response": "r"}])
    write_lines("typed.jsonl", [{"prompt": "p", "response": 3}])
    write_lines("pairs.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    write_lines("blank.jsonl", [{"prompt": "p", "response": " "}])
    write_lines("half_rewarded.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 2}])
    os.makedirs("run2")
    open("run2/config.json", "w").write("{}")
    write_lines("chat.jsonl", [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    open("bad.jsonl", "w").write('{"prompt": "p", "response": "r"}\n{"prompt" "p"}\n')
    open("empty.jsonl", "w").close()
    open("half.jsonl", "w").write('{"prompt": "p", "response": "\\ud83d"}\n')
    open("latin.yaml", "wb").write("exp_name: \xe9\n".encode("latin-1"))
    os.makedirs("notes")
    os.makedirs("corrupt")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        open(f"corrupt/{name}", "w").write("[]")
    os.makedirs("run/LATEST")
    os.makedirs("runs/mine")
    open("runs/mine/config.yaml", "w").write("mine: 1\n")
    os.makedirs("runs/taken")
    open("runs/taken/config.yaml", "w").write("loss: sft\n")
    if arguments == ["model=endless"]:
        shutil.copytree(os.path.realpath(f"{sft_run}/LATEST"), "endless")
        settings = json.load(open("endless/tokenizer_config.json"))
        json.dump({k: v for k, v in settings.items() if k != "eos_token"}, open("endless/tokenizer_config.json", "w"))
        arguments = ["model=endless", f"data={FEW_ROWS}"]
    before = {name: os.path.getmtime(name) for name in glob.glob("runs/**", recursive=True)}
    message = refused(*arguments)
    assert said in message
    assert len(message) < 600 and (". " not in message or "attention" in message)  # which quotes transformers
    assert {name: os.path.getmtime(name) for name in glob.glob("runs/**", recursive=True)} == before


def test_the_entry_point_prints_the_sentence_and_exits_with_2():
    done = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), "lr=-1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: lr=-1 is not allowed: it must be float >= 0\n"


def test_errors_in_the_code_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(train.data, "encode", lambda *a, **k: [][0])
    with pytest.raises(IndexError):
        train.main([*TINY_RUN])


def test_bad_files_of_settings(refused):
    for text, said in (("lr: 1\nlr: 2\n", "the key lr stands twice"), ("- a\n", "holds list"), ("a: [", "is not YAML"),
                       ("dpo:\n  gamma: 1\n", "dpo.gamma is no key"), ("batch_size: '4'\n", "batch_size='4' is not allowed")):
        open("mine.yaml", "w").write(text)
        assert said in refused("--config", "mine.yaml")


# ---------------------------------------------------------------- the run


def test_the_folder_of_a_run(run, sft_run):
    os.symlink(sft_run, "link")
    folder = run(*TINY_RUN, "loss=dpo", "model=link/LATEST", "save_every=2")
    assert sorted(name for name in os.listdir(folder) if name != ".lock") == [
        "LATEST", "config.yaml", "metrics.jsonl", "samples.jsonl", "step-000002", "step-000003"]
    saved = yaml.safe_load(open(f"{folder}/config.yaml"))
    assert saved["model"] == os.path.realpath(f"{sft_run}/LATEST") and "LATEST" not in saved["model"]
    assert saved["dpo"]["beta"] == 0.1 and saved["batch_size"] == 4
    assert set(saved["provenance"]["versions"]) >= {"torch", "transformers"}
    assert {"git_commit", "git_dirty"} <= set(saved["provenance"])
    rerun = config_of("--config", f"{folder}/config.yaml", "run_dir=again")  # it is a config file itself
    assert rerun.model == saved["model"]


def test_a_tiny_reference_is_kept_for_resuming(run):
    folder = run(*TINY_RUN, "loss=dpo")
    assert AutoModelForCausalLM.from_pretrained(f"{folder}/reference").config.model_type == "llama"


def test_attributes_in_training_and_in_samples(run, capsys):
    rows = [{"prompt": "Say:", "response": f" word {i}", "attributes": {"quality": i % 5}} for i in range(20)]
    write_lines("rated.jsonl", rows)
    settings = ["data=rated.jsonl", "eval_data=rated.jsonl", "attribute_template={prompt} Quality {quality}:",
                "batch_size=4", "max_steps=2", "num_samples=6", "sample_max_tokens=4"]
    own = run(*settings, "run_dir=own")
    given = run(*settings, "run_dir=given", "sample_attributes.quality=4")
    prompts = [[line["prompt"] for line in read_lines(f"{folder}/samples.jsonl")[:6]] for folder in (own, given)]
    assert prompts[0] == [f"Say: Quality {i % 5}:" for i in range(6)] and prompts[1] == ["Say: Quality 4:"] * 6
    assert [line["chosen"] for line in read_lines(f"{given}/samples.jsonl")[:2]] == [" word 0", " word 1"]
    assert losses_of(own) == losses_of(given)  # of training and evaluation the rows' own stay
    evals = [[line["loss"] for line in read_lines(f"{folder}/metrics.jsonl") if line["split"] == "eval"]
             for folder in (own, given)]
    assert evals[0] == evals[1]


def test_two_runs_are_the_same_value_by_value(run):
    curves = []
    for name in ("a", "b"):
        folder = run(*TINY_RUN, "loss=dpo", f"run_dir={name}", "eval_every=2")
        lines = read_lines(f"{folder}/metrics.jsonl")
        assert len(lines) == 6
        curves.append([{k: v for k, v in line.items() if k != "time" and "per_second" not in k} for line in lines])
    assert curves[0] == curves[1]
    assert open("a/samples.jsonl").read() == open("b/samples.jsonl").read()


def test_another_seed_is_another_run(run):
    assert losses_of(run(*TINY_RUN, "run_dir=a", "eval_every=0")) != losses_of(
        run(*TINY_RUN, "run_dir=b", "eval_every=0", "seed=1"))


def test_max_steps_0_evaluates_and_samples_only(run, capsys):
    folder = run(*TINY_RUN, "loss=dpo", "max_steps=0", "eval_first=false")
    lines = read_lines(f"{folder}/metrics.jsonl")
    assert [(line["step"], line["split"]) for line in lines] == [(0, "eval")]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(read_lines(f"{folder}/samples.jsonl")) == 2
    assert not os.path.exists(f"{folder}/LATEST")


def test_what_the_person_sees(run, capsys, sft_run):
    run(*TINY_RUN, "loss=dpo", f"model={sft_run}/LATEST", f"data=[{FEW_ROWS}]")
    output = capsys.readouterr().out
    for said in ("440,", "parameters in float32 on cpu", "400 of 400 rows used, 0 dropped", "3 of 4 examples",
                 "the model's starting weights", "loss       dpo beta=0.1", "step 0: eval/loss 0.6931",
                 "evaluation                            step 0        step 3", "checkpoint  runs/dpo/LATEST -> step-000003",
                 "next        python -c "):
        assert said in output, said
    code = output.split("next        python ")[1].strip()
    done = subprocess.run([sys.executable, *shlex.split(code)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Review of The ")


def test_a_file_without_evaluation_says_so(run, capsys):
    write_lines("r.jsonl", [{"prompt": "p", "response": "r"}] * 3)
    run("data=r.jsonl", "batch_size=2")
    output = capsys.readouterr().out
    assert "none, so no evaluation" in output and "python train.py loss=dpo model=runs/sft/LATEST lr=5e-7" in output
    assert "training                              step 1        step 3" in output


def test_the_next_command_of_a_reward_model_scores_a_text(run, capsys):
    run(*TINY_RUN, "loss=rm", "eval_every=0")
    code = capsys.readouterr().out.split("next        python ")[1].strip()
    done = subprocess.run([sys.executable, *shlex.split(code)], capture_output=True, text=True, check=True)
    assert math.isfinite(float(done.stdout))


def test_the_next_command_on_toy_is_the_readmes(run, capsys):
    run("max_steps=1", "eval_every=0")
    following = capsys.readouterr().out.split("next        ")[1].strip()
    assert following in README


# ---------------------------------------------------------------- README


def readme_commands():
    """Every `python train.py` and `torchrun` line of the README's code blocks, comments off."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part.split("#")[0].strip().removeprefix("srun ") for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith(("python train.py", "torchrun"))]


def test_the_readme_has_its_two_commands_first():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    for block, end in ((blocks[0], "python train.py loss=dpo"), (blocks[1], "python -m pytest")):
        assert block.count("\n") == 1 and block.startswith("pip install -r requirements.txt && ") and end in block


def test_the_readmes_pictures_are_there():
    paths = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert paths and all(os.path.getsize(os.path.join(ROOT, path)) > 10_000 for path in paths)


def test_readme_commands_do_not_meet_in_one_folder():
    """Copied one after the other they all run: none finds the folder of an earlier one."""
    commands = [dict(part.split("=", 1) for part in shlex.split(command)[2:] if "=" in part and part[0] != "-")
                for command in readme_commands() if "--config" not in command and "dry_run" not in command]
    names = [settings.get("exp_name", settings.get("loss", "sft")) for settings in commands
             if settings.get("resume") != "true"]
    assert len(names) > 8 and len(set(names)) == len(names)


def test_the_readmes_other_commands(sft_run, rm_run, capsys):
    """Its `python -c` lines make files of rows, its first Python block a checkpoint's answer, another a student."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()
             if line.startswith("python -c")]
    for line, name, count, columns in zip(lines, ("pairs.jsonl", "few.jsonl"), (16384, 128), (
            {"prompt", "chosen", "rejected"}, {"prompt", "response"}), strict=True):
        subprocess.run(line.replace("python", sys.executable, 1), shell=True, check=True,
                       env=os.environ | {"PYTHONPATH": ROOT})
        rows = read_lines(name)
        assert len(rows) == count and all(set(row) == columns for row in rows)
    for name in ("sft", "dpo", "rm"):
        os.makedirs(f"runs/{name}")
        shutil.copytree(os.path.realpath(f"{rm_run if name == 'rm' else sft_run}/LATEST"), f"runs/{name}/LATEST")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "import" in block]
    for block in blocks:
        exec(block, {})
    assert len(blocks) == 3
    praise, blame = map(float, re.findall(r"-?\d+\.\d+", capsys.readouterr().out.split("tensor")[1])[:2])
    assert praise > blame + 2
    student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in ("student", "runs/sft/LATEST"))
    assert student.num_parameters() < teacher.num_parameters() / 4


def test_the_frontier_command(sft_run):
    """On few steps: the table has a line for each beta, with the efficiency that the run recorded."""
    script = re.search(r"python (tests/benchmarks/frontier.py)", README).group(1)
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), "--methods", "IPO", "--steps", "2", "--sft_steps",
                           "150", "--runs", "f", "--picture", "f/picture.png"], capture_output=True, text=True)
    if importlib.util.find_spec("matplotlib"):
        assert done.returncode == 0 and os.path.getsize("f/picture.png") > 10_000, done.stderr
    else:
        assert done.returncode == 1 and done.stderr.endswith("for the picture: pip install matplotlib\n")
    table = [line for line in done.stdout.splitlines() if line.startswith("| IPO")]
    assert len(table) == 4
    last = read_lines("f/seed-0-150-2/IPO-0.1/metrics.jsonl")[-1]
    assert f"| {last['samples/reward']:.2f} | {last['samples/kl']:.2f} |" in table[0]


def benchmark(path):
    spec = importlib.util.spec_from_file_location("benchmark", os.path.join(ROOT, path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_necessary_arithmetic_by_hand():
    """tiny: 2 layers of 4 * 128 * 128 weights in attention and 3 * 128 * 256 behind it; forward and backward are 6
    operations for each weight and token; a score and a value are 2 * 2 * 128 for each token that is seen, thrice."""
    trainer = train.build_trainer(train.load_config([*TINY_RUN, "loss=dpo"])[0])
    pair = dataclasses.replace(trainer.train_examples[0], prompt=np.ones(3), responses=(np.ones(2), np.ones(1)))
    weights, vocabulary = 2 * (4 * 128 * 128 + 3 * 128 * 256), trainer.policy.config.vocab_size
    seen = (1 + 2 + 3) + (4 + 5) + 4
    assert benchmark("tests/benchmarks/throughput.py").necessary(trainer, [pair]) == {
        "prompt": 6 * weights * 3, "response": 6 * weights * 3, "head": 6 * 128 * vocabulary * 3,
        "attention": 3 * 2 * 2 * 2 * 128 * seen}


def test_the_benchmark_commands(sft_run):
    """On few steps: contenders agree in their losses, and every part of a step is there."""
    for name in ("throughput", "generation"):
        assert f"python tests/benchmarks/{name}.py --data pairs.jsonl" in README
    shutil.copytree(os.path.realpath(f"{sft_run}/LATEST"), "runs/sft/LATEST")
    script = os.path.join(ROOT, "tests", "benchmarks", "throughput.py")
    done = subprocess.run([sys.executable, script, "--data", FEW_ROWS, "tokenizer=runs/sft/LATEST", "--rounds", "2",
                           "--steps", "1", "--against", "layout=separate"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here, apart = (line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| here"))
    assert here[2] == "1.000" and apart[0] == "| here, layout=separate"
    assert float(apart[5]) < 1e-4 and 0 < float(apart[6].rstrip("% |")) < 100
    parts = re.findall(r"\n\| (prompt|response|head|attention|optimizer|batch making) \| ([\d.]+)%", done.stdout)
    assert len(parts) == 12 and all(float(share) > 0 for name, share in parts if name != "batch making")
    done = subprocess.run([sys.executable, script, "--data", FEW_ROWS], capture_output=True, text=True)
    assert done.returncode == 1 and "is a config without a tokenizer" in done.stderr
    script = os.path.join(ROOT, "tests", "benchmarks", "generation.py")
    done = subprocess.run([sys.executable, script, "--data", FEW_ROWS, "--model", "runs/sft/LATEST", "--prompts", "8",
                           "--rounds", "1", "spin.max_tokens=8"], capture_output=True, text=True)
    assert re.search(r"8 prompts .* [\d,]+ tokens/s here, .* times as many", done.stdout), done.stderr


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_run(command, run, sft_run, rm_run):
    """On the tiny model and few rows; what a command names and this machine lacks is put in its place."""
    for name in ("sft", "mine-sft", "pythia-sft", "short", "rm", "student-sft", "eight-sft"):
        os.makedirs(f"runs/{name}")
        shutil.copytree(os.path.realpath(f"{rm_run if name == 'rm' else sft_run}/LATEST"), f"runs/{name}/LATEST")
    shutil.copytree("runs/sft/LATEST", "student")
    words = shlex.split(command)
    options, arguments = words[:words.index("train.py")], words[words.index("train.py") + 1:]
    settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if "--help" in arguments:
        return
    if settings.get("resume") == "true":
        run(*TINY_RUN, "loss=dpo", "lr_schedule=constant")
        run(*arguments)
        return
    chats = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a {i}"}],
              "prompt": "p", "chosen": f"c {i}", "rejected": "r", "response": f"r {i}",
              "attributes": {"quality": 4, "humor": i}} for i in range(8)]
    for name in ("mine.jsonl", "held_out.jsonl", "pairs.jsonl", "few.jsonl", "rated.jsonl", "rated_test.jsonl"):
        write_lines(name, chats)
    write_lines("mine.yaml", [{"model": f"{sft_run}/LATEST", "data": "mine.jsonl"}])
    if settings.get("model", "").startswith(("EleutherAI", "Qwen", "meta-llama")):
        arguments.append(f"model={sft_run}/LATEST")
    if settings.get("data") in ("hh", "ultrafeedback"):
        arguments += [f"data={FEW_ROWS}", "eval_data=toy"]
    if settings.get("loss") == "spin":
        arguments.append(f"data={FEW_ROWS}")
    arguments += ["max_steps=2", "batch_size=2", "num_eval_examples=4", "sample_max_tokens=4", "max_length=400",
                  "exp_name=readme", "wandb=disabled", "lr_schedule=constant"]
    if options[0] == "torchrun":  # on this machine, with two processes
        here = {"--nnodes": "1", "--nproc_per_node": "2", "--rdzv_endpoint": "localhost:0"}
        options = [f"{name}={here.get(name, value)}" for name, _, value in (word.partition("=") for word in options[1:])]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *options, os.path.join(ROOT, "train.py"),
                        *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    else:
        run(*arguments)
    if settings.get("dry_run"):
        assert not os.path.exists("runs/readme")
    else:
        assert len(losses_of("runs/readme")) == 2 or settings.get("max_steps") == "0"


def test_adding_a_loss_and_a_dataset_as_the_readme_says(tmp_path):
    """The README's own code, put into a scratch copy, runs."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("train.py", "losses.py", "trainers.py", "data.py", "config.yaml"):
        shutil.copy(os.path.join(ROOT, name), copy)
    blocks = dict(re.findall(r"<!-- (\w+) -->\n```(?:python|yaml)\n(.*?)```", README, re.S))
    losses_py = (copy / "losses.py").read_text()
    losses_py = losses_py.replace("def check(", blocks["loss_function"] + "\n\ndef check(", 1)
    losses_py = losses_py.replace("OBJECTIVES = {\n", "OBJECTIVES = {\n" + blocks["loss_row"], 1)
    (copy / "losses.py").write_text(losses_py)
    with open(copy / "config.yaml", "a") as file:
        file.write(blocks["loss_config"])
    data_py = (copy / "data.py").read_text()
    data_py = data_py.replace("@dataclass(frozen=True)\nclass Dataset:",
                              blocks["dataset_function"] + "\n\n@dataclass(frozen=True)\nclass Dataset:", 1)
    data_py = data_py.replace("DATASETS = {\n", "DATASETS = {\n" + blocks["dataset_row"], 1)
    (copy / "data.py").write_text(data_py)
    name = re.match(r' *"(\w+)"', blocks["dataset_row"]).group(1)
    script = [sys.executable, str(copy / "train.py"), "loss=simpo", f"data={name}", "simpo.gamma=0.7", "max_steps=2",
              "batch_size=2", "eval_every=0", "wandb=disabled"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = read_lines(tmp_path / "runs/simpo/metrics.jsonl")[0]
    assert first["loss"] > 0 and first["rewards/chosen"] < 0
    refused = subprocess.run([*script, "simpo.gamma=-1", "exp_name=x"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and "simpo.gamma=-1 is not allowed: it must be float >= 0" in refused.stderr


# ---------------------------------------------------------------- real input


def test_hh_with_a_pretrained_model(run, capsys):
    model, hh = shared("models", "stories260K"), shared("data", "hh")
    settings = [f"model={model}", f"data={hh}/train.jsonl", f"eval_data={hh}/test.jsonl", "max_length=512",
                "batch_size=8", "max_steps=2", "num_eval_examples=16", "sample_max_tokens=16", "num_samples=2"]
    folder = run("loss=dpo", *settings)
    output = capsys.readouterr().out
    assert "1,993 of 2,000 rows used, 7 dropped" in output
    assert "train.jsonl line 1255, train.jsonl line 1689, train.jsonl line 1953" in output
    assert "dropped 4: chosen is white space only (train.jsonl line 87," in output
    assert "the tokenizer begins texts with <s>, but this run's prompts do not" in output
    first = read_lines(f"{folder}/metrics.jsonl")[0]
    assert first["rewards/chosen"] == first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    AutoTokenizer.from_pretrained(f"{folder}/LATEST")
    run("loss=sft", "add_bos=true", *settings)
    assert "begins texts with" not in capsys.readouterr().out
