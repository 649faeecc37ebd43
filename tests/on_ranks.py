"""Runs train.main on several ranks, or on one, in forks of a process that has imported everything.

A fork is there at once, and what befalls it, the troubles at the end included, stays its own. Tests call
`begin` and `answers`, or `on_ranks`, which is both. torchrun runs on_ranks.py TROUBLE RANK key=value ...
"""

import dataclasses
import faulthandler
import functools
import importlib
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest.mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULES = ("engine", "losses", "data", "trainers", "train")  # the project's
NUMBERS = itertools.count()
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # by gloo, whatever GPUs there are


# ---------------------------------------------------------------- in a test's process


@functools.cache
def server():
    """The process that forks, its folder, and the store where ranks meet, which torchrun would keep."""
    from torch.distributed import TCPStore
    folder = tempfile.TemporaryDirectory()
    with open(os.path.join(folder.name, "log"), "w") as log:
        process = subprocess.Popen([sys.executable, os.path.abspath(__file__)], env=os.environ | ENVIRONMENT,
                                   stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)
    return process, folder, TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def begin(num_ranks, *arguments, function="main", trouble=None, rank=None, seconds=90, project=ROOT):
    """Starts a function of this module on so many ranks, which end after so many seconds; returns the job.

    trouble: one of those below, with its arguments, of this rank or of all. project: whose modules run.
    """
    process, folder, store = server()
    number = next(NUMBERS)
    job = {"folder": os.path.join(folder.name, str(number)), "cwd": os.getcwd(), "num_ranks": num_ranks,
           "function": function, "arguments": arguments, "trouble": trouble, "rank": rank, "seconds": seconds,
           "project": project}
    if num_ranks > 1:  # what torchrun tells the ranks
        job["environment"] = {
            "WORLD_SIZE": str(num_ranks), "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(number)}  # of which each has its own part of the store
    os.mkdir(job["folder"])
    assert process.poll() is None, "the process that forks has ended: " + read(folder.name, "log")
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    return job


def answers(job):
    """What each rank's function returned or raised, -9 if it was killed; and what all of them printed."""
    wait(job, lambda: False)
    return json.loads(read(job["folder"], "answers")), printed(job)


def on_ranks(num_ranks, *arguments, answer=0, **options):
    """Runs it to its end, which must be this answer on every rank; returns what they printed."""
    given, text = answers(begin(num_ranks, *arguments, **options))
    assert given == [answer] * num_ranks, f"{given}\n{text[-5000:]}"
    return text


def kill(job, condition, delay=0.0, number=signal.SIGKILL):
    """Sends a job of one process a signal, so many seconds after the condition holds; returns its answer."""
    wait(job, lambda: condition() and read(job["folder"], "pids"))
    time.sleep(delay)
    assert not has_ended(job), printed(job)
    os.kill(json.loads(read(job["folder"], "pids"))[0], number)
    return answers(job)[0][0]


def wait(job, condition):
    """Waits until the condition holds or the job has ended."""
    process, folder, _ = server()
    end = time.monotonic() + job["seconds"] + 60  # for the imports
    while not (condition() or has_ended(job)):
        assert time.monotonic() < end and process.poll() is None, (read(folder.name, "log"), printed(job))
        time.sleep(0.005)


def has_ended(job):
    return os.path.exists(os.path.join(job["folder"], "answers"))


def printed(job):
    return read(job["folder"], "log")


def read(folder, name):
    path = os.path.join(folder, name)
    with open(path if os.path.exists(path) else os.devnull, errors="replace") as file:
        return file.read()


# ---------------------------------------------------------------- in the process that forks, and in its forks


def serve():
    """Forks a leader for each job, a line of JSON; ends when the tests' process does."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the leaders
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            lead(json.loads(line))
            os._exit(0)


def lead(job):
    """Forks the ranks, waits for them and writes down what became of each."""
    started = [os.fork() or work(job, rank) for rank in range(job["num_ranks"])]
    write(job, "pids", started)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
    texts = [read(job["folder"], f"answer{rank}") for rank in range(job["num_ranks"])]
    write(job, "answers", [json.loads(text) if text else code for text, code in zip(texts, codes)])


def work(job, rank):
    """One rank, from its fork to its end."""
    os.chdir(job["cwd"])
    log = os.open(os.path.join(job["folder"], "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    torch.set_num_threads(1)  # here: a fork has none of the threads that there were before
    faulthandler.dump_traceback_later(job["seconds"], exit=True)  # rather than hang
    if job["num_ranks"] > 1:
        os.environ.update(job["environment"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    try:
        if job["project"] != ROOT:
            import_from(job["project"])
        engine.distributed.START = time.monotonic()
        if job["trouble"] and job["rank"] in (rank, None):
            meet(job["trouble"])
        answer = globals()[job["function"]](*job["arguments"])
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except SystemExit as end:
        answer = end.code
    except BaseException as error:
        traceback.print_exc()
        answer = f"{type(error).__name__}: {error}"
    for file in (sys.stdout, sys.__stdout__, sys.stderr):
        file.flush()
    write(job, f"answer{rank}", answer)
    os._exit(0)


def import_from(folder):
    """The project's modules anew, as they are in a copy; what they import stays."""
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    globals().update({name: importlib.import_module(name) for name in MODULES})
    importlib.import_module("engine.distributed")


def write(job, name, value):
    path = os.path.join(job["folder"], name)
    with open(path + ".partial", "w") as file:
        json.dump(value, file)
    os.replace(path + ".partial", path)


# ---------------------------------------------------------------- what ranks do


def meet(trouble):
    name, *arguments = trouble.split()
    globals()[name](*arguments)


def main(*arguments):
    return train.main(list(arguments))


def several(*runs):
    """Runs in one process, one after another."""
    return [main(*arguments) for arguments in runs]


def rows(name, count):
    """The first rows of a dataset of the table."""
    return list(data.DATASETS[name].load("train", True))[:count]


def script(*arguments):
    """python train.py"""
    sys.argv = [os.path.join(ROOT, "train.py"), *arguments]
    with unittest.mock.patch("os._exit", sys.exit):  # the answer is still to be written
        runpy.run_path(sys.argv[0], run_name="__main__")


def imported(name, *arguments):
    """Whether a run imports this module."""
    main(*arguments)
    return name in sys.modules


def talk():
    """What each hears of numbers that each says."""
    start_ranks()
    own = rank()
    sums = sum_over_ranks([2.0**24 if own else 1.0, own])
    return {"num_ranks": num_ranks(), "from_all": from_all(10 * own), "from_first": from_first(7 - own),
            "sum_over_ranks": sums, "max_over_ranks": max_over_ranks(-own)}


# ---------------------------------------------------------------- troubles


def exact_norms():
    """transformers' RMSNorm computes in float32 even in float64 models: its last bit is 6e-8, not 1e-16."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    LlamaRMSNorm.forward = lambda self, x: self.weight * x * torch.rsqrt(
        x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def keep_in_step():
    """No device holds all weights: generate() runs on sharded ones."""
    engine.distributed.fits_unsharded = lambda model, compute_dtype: False


def cannot_read():
    """The data are not there, on one machine alone."""
    def refuse(*arguments):
        raise InputError("f.jsonl is not here")
    data.load_source = refuse


def out_of_time():
    engine.distributed.START -= 3600


def before_step(step, function):
    """Calls the function before the optimizer step of this number."""
    train_step = Trainer.train_step

    def patched(self):
        if self.step == step - 1:
            function()
        return train_step(self)
    Trainer.train_step = patched


def terminated():
    before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))


def killed(step):
    before_step(int(step), lambda: os.kill(os.getpid(), signal.SIGKILL))


def killed_writing(name, times):
    """Killed when it writes to this file for this time, and has written half of it."""
    write, left = RunFolder.write, [int(times)]

    def dying(self, to, records):
        left[0] -= to == name
        if left[0]:
            write(self, to, records)
            return
        write(self, to, records[:len(records) // 2])
        with open(self.path(to), "a") as file:
            file.write('{"row": 1, "id')
        os.kill(os.getpid(), signal.SIGKILL)
    RunFolder.write = dying


def reference_gone():
    before_step(3, lambda: shutil.rmtree("reference"))


def no_number():
    """At step 3 the losses are not finite."""
    compute_losses = Trainer.compute_losses

    def spoilt(self, batch, objective):
        losses, metrics = compute_losses(self, batch, objective)
        return losses * (float("nan") if self.step == 2 else 1), metrics
    Trainer.compute_losses = spoilt


def reads_wrong():
    """Each token is predicted where the next one is."""
    collate = engine.batches.collate

    def spoilt(*arguments):
        batch = collate(*arguments)
        return dataclasses.replace(batch, targets=batch.targets.roll(1))
    engine.batches.collate = spoilt


def die_in_save():
    """Killed when it begins its second save, once; the others have begun theirs or are about to."""
    write = Checkpoints.write

    def dying(self, state, *arguments):
        if state["step"] == 4 and not os.path.exists("died"):
            open("died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, state, *arguments)
    Checkpoints.write = dying


def row(name, instead_of="dpo"):
    """A row of fork_rows.py stands in another's place."""
    from fork_rows import ROWS
    from losses import OBJECTIVES
    OBJECTIVES[instead_of] = ROWS[name]


def compiled():
    """With a compiler that changes nothing, and takes no time."""
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **options: compile_module(self, backend="eager", **options)


def measured():
    """Notes the bytes that are held after a step."""
    train_step = Trainer.train_step

    def noting(self):
        weights, gradients = list(self.policy.parameters()), []
        self.optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad for p in weights))
        metrics = train_step(self)
        held = {"weights": weights, "gradients": gradients,
                "optimizer state": [x for state in self.optimizer.state.values() for x in state.values()]}
        parts = {name: [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
                 for name, tensors in held.items()}
        with open("held.json", "w") as file:
            json.dump({name: sum(x.numel() * x.element_size() for x in tensors)
                       for name, tensors in parts.items()}, file)
        return metrics
    Trainer.train_step = noting


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    sys.path.insert(0, ROOT)
    import shutil

    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from torch.distributed.tensor import DTensor

    import data
    import engine.dry_run  # noqa: F401
    import train
    from engine import InputError
    from engine.checkpoints import Checkpoints, RunFolder
    from engine.distributed import (from_all, from_first, max_over_ranks, num_ranks, rank, start_ranks,
                                    sum_over_ranks)
    from trainers import Trainer
    if len(sys.argv) == 1:
        serve()
    else:
        trouble, unlucky, *arguments = sys.argv[1:]
        if os.environ["RANK"] == unlucky:
            meet(trouble)
        engine.distributed.leave_ranks(main(*arguments))
