"""Every command and piece of code in README.md and docs/ runs."""

import glob
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import (FEW_ROWS, ROOT, TINY_RUN, adopt, copy_project, losses_of, read_lines,
                      write_lines)
from transformers import AutoModelForCausalLM

README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
DOCS = sorted(glob.glob(os.path.join(ROOT, "docs", "*.md")))
PAGES = README + "".join(open(path, encoding="utf-8").read() for path in DOCS)
CI = open(os.path.join(ROOT, ".ci", "run")).read()


def blocks(language, text=PAGES):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands():
    """Every `python train.py` and `torchrun` line of the pages' code blocks."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    parts = [part.split("#")[0].strip().removeprefix("srun ") for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith(("python train.py", "torchrun"))]


def test_the_readme_has_its_two_commands_first():
    first, second = blocks("bash", README)[:2]
    for block, end in ((first, "python train.py loss=dpo"), (second, "python -m pytest")):
        assert block.startswith("pip install -r requirements.txt ") and end in block
        assert block.count("\n") == 1
    assert README.count("\n") <= 200
    pattern = re.search(r"grep -m 1 '(.*?)'", CI).group(1)  # with which CI finds the second
    assert re.findall(pattern + ".*", README, re.M) == [second.strip()]


def test_what_the_pages_show_is_there():
    """Pictures and links within the project."""
    for page in ("README.md", *glob.glob("docs/*.md", root_dir=ROOT)):
        text = open(os.path.join(ROOT, page), encoding="utf-8").read()
        for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text):
            path = os.path.join(ROOT, os.path.dirname(page), target)
            assert os.path.getsize(path) > (10_000 if target.endswith(".png") else 100), (page, target)


def test_commands_do_not_meet_in_one_folder():
    """Copied one after the other they all run: none finds the folder of an earlier one."""
    names = []
    for command in commands():
        given = dict(word.split("=", 1) for word in shlex.split(command) if "=" in word and word[0] != "-")
        if "--config" not in command and "dry_run" not in given and given.get("resume") != "true":
            names.append(given.get("exp_name", given.get("loss", "sft")))
    assert len(names) > 20 and len(set(names)) == len(names), sorted(names)


@pytest.fixture
def runs(sft_run, rm_run):
    """Folders of the names that the pages' commands go on from."""
    for name in ("sft", "dpo", "mine-sft", "pythia-sft", "short", "rm", "student-sft", "eight-sft"):
        source = rm_run if name == "rm" else sft_run
        shutil.copytree(os.path.realpath(f"{source}/LATEST"), f"runs/{name}/LATEST")
    shutil.copytree("runs/sft/LATEST", "student")


def put_in_place(arguments):
    """What a command names and this machine lacks, in its place: the tiny model, few rows, few steps."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a {i}"}],
             "prompt": "p", "chosen": f"c {i}", "rejected": "r", "response": f"r {i}",
             "attributes": {"quality": 4, "humor": i}} for i in range(8)]
    for name in ("mine", "held_out", "pairs", "few", "rated", "rated_test"):
        write_lines(f"{name}.jsonl", rows)
    write_lines("mine.yaml", [{"model": "runs/sft/LATEST", "data": "mine.jsonl"}])
    arguments = list(arguments)
    if given.get("model", "").startswith(("EleutherAI", "Qwen", "meta-llama", "allenai")):
        arguments.append("model=runs/sft/LATEST")
    if given.get("data", "toy") in ("hh", "ultrafeedback", "toy") or given["data"].startswith("allenai"):
        arguments += [f"data={FEW_ROWS}", "eval_data=toy"]
    if given.get("max_steps") != "0":
        arguments.append("max_steps=2")
    return [*arguments, "batch_size=2", "num_eval_examples=4", "sample_max_tokens=4",
            "max_length=400", "exp_name=page", "wandb=disabled", "lr_schedule=constant", "log_every=1"]


@pytest.mark.parametrize("command", [x for x in commands() if x.startswith("python")])
def test_a_command_runs(command, run, runs):
    arguments = shlex.split(command)[2:]
    if "resume=true" in arguments:
        shutil.rmtree("runs/dpo")
        run(*TINY_RUN, "loss=dpo", "lr_schedule=constant")
        run(*arguments)
        return
    run(*put_in_place(arguments))
    if "dry_run=true" in arguments:
        assert not os.path.exists("runs/page")
    else:
        assert len(losses_of("runs/page")) == (0 if "max_steps=0" in arguments else 2)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("command", [x if x in README else pytest.param(x, marks=pytest.mark.slow)
                                     for x in commands() if x.startswith("torchrun")])
def test_a_command_on_several_devices_runs(command, runs):
    """On this machine, with two processes."""
    words = shlex.split(command)
    options, arguments = words[1:words.index("train.py")], words[words.index("train.py") + 1:]
    here = {"--nnodes": "1", "--nproc_per_node": "2", "--rdzv_endpoint": "localhost:0"}
    options = [word.partition("=")[::2] for word in options]
    options = [f"{name}={here.get(name, value)}" for name, value in options]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *options, os.path.join(ROOT, "train.py"),
                    *put_in_place(arguments)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert len(losses_of("runs/page")) == 2


SRUN = """
import os, subprocess, sys
ranks = [subprocess.Popen(sys.argv[1:], env=os.environ | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank})
         for rank in "01"]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_the_script_for_slurm(sft_run):
    """With stand-ins for Slurm's commands: out of time it asks to be started again, and is done at last."""
    script, = (block for block in blocks("bash") if block.startswith("#!/bin/bash"))
    settings = [*TINY_RUN, f"model={sft_run}/LATEST", "run_dir=r"]
    with open("mine.yaml", "w") as file:
        file.writelines(setting.replace("=", ": ", 1) + "\n" for setting in settings)
    os.mkdir("bin")
    stand_ins = {"srun": f"#!{sys.executable}{SRUN}", "python": f'#!/bin/sh\nexec {sys.executable} "$@"',
                 "scontrol": "#!/bin/sh\n[ $1 = show ] && echo localhost || echo $* >> asked"}
    for name, text in stand_ins.items():
        with open(f"bin/{name}", "w") as file:
            file.write(text)
        os.chmod(f"bin/{name}", 0o755)
    shutil.copy(os.path.join(ROOT, "train.py"), ".")
    environment = os.environ | {
        "PATH": f"{os.path.abspath('bin')}:{os.environ['PATH']}", "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
    for hours, status in (("1e-9", 75), ("23.5", 0)):
        now = script.replace("23.5", hours).replace("29500", str(free_port()))
        done = subprocess.run(["bash", "-c", now], env=environment, timeout=200)
        assert done.returncode == status and open("asked").readlines() == ["requeue 7\n"]
    assert len(losses_of("r")) == 3


def free_port():
    with socket.socket() as here:
        here.bind(("localhost", 0))
        return here.getsockname()[1]


def test_lines_that_make_rows():
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python -c")]
    for line, name, count, columns in zip(lines, ("pairs.jsonl", "few.jsonl"), (16384, 128), (
            {"prompt", "chosen", "rejected"}, {"prompt", "response"}), strict=True):
        subprocess.run(line.replace("python", sys.executable, 1), shell=True, check=True,
                       env=os.environ | {"PYTHONPATH": ROOT})
        rows = read_lines(name)
        assert len(rows) == count and all(set(row) == columns for row in rows)


def test_pieces_of_python(runs, capsys):
    """A checkpoint's answer, a reward model's scores, a student."""
    shutil.rmtree("student")
    pieces = [block for block in blocks("python") if "import" in block]
    for piece in pieces:
        exec(piece, {})
    assert len(pieces) == 3
    praise, blame = map(float, re.findall(r"-?\d+\.\d+", capsys.readouterr().out.split("tensor")[1])[:2])
    assert praise > blame
    student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in ("student", "runs/sft/LATEST"))
    assert student.num_parameters() < teacher.num_parameters() / 4


def test_adding_losses_and_a_dataset_as_the_pages_say(tmp_path, sft_run):
    """Their own code, put into a scratch copy, runs, and with it the README's command."""
    copy = copy_project(tmp_path / "copy")
    adopt(copy, PAGES)

    def run(*arguments):
        script = [sys.executable, str(copy / "train.py"), "max_steps=2", "batch_size=2", "eval_every=0"]
        return subprocess.run([*script, *arguments], capture_output=True, text=True, cwd=tmp_path)
    for loss in ("simpo", "tdpo"):
        done = run(f"loss={loss}", "data=arithmetic")
        assert done.returncode == 0, done.stderr
        first = read_lines(tmp_path / f"runs/{loss}/metrics.jsonl")[0]
        assert first["rewards/chosen"] == 0 if loss == "tdpo" else first["rewards/chosen"] < 0 < first["loss"]
    command = " ".join(re.search(r"`(python train.py loss=aot [^`]*)`", README)[1].split())
    shutil.copytree(os.path.realpath(f"{sft_run}/LATEST"), tmp_path / "runs/sft/LATEST")
    assert run(*command.split()[2:], f"data={FEW_ROWS}").returncode == 0
    done = run("loss=simpo", "data=arithmetic", "simpo.gamma=-1")
    assert done.returncode == 2 and "simpo.gamma=-1 is not allowed: it must be float >= 0" in done.stderr
