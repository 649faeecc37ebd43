"""Runs train.main on every rank that torchrun starts: torchrun on_ranks.py '[{"run": [key=value, ...]}, ...]'.

A job may name one of the troubles below as well, and the rank that has it.
"""

import json
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
from torch.distributed.tensor import DTensor

torch.set_num_threads(1)
import train
import trainers

ORIGINAL = {name: getattr(trainers, name) for name in ("fits_whole", "point_latest", "START")}
TRAIN_STEP = trainers.Trainer.train_step
WRITE = trainers.Trainer.write_checkpoint


def keep_in_step(mine):
    """No device holds all weights: generate() runs on sharded ones."""
    trainers.fits_whole = lambda model, config: False


def out_of_time(mine):
    trainers.START -= 3600 * mine


def no_number(mine):
    """At step 3 a loss of this rank is not finite."""
    losses = trainers.Trainer.losses

    def spoilt(self, batch):
        values, metrics = losses(self, batch)
        return values * (float("nan") if mine and self.step == 2 else 1), metrics
    trainers.Trainer.losses = spoilt


def die_in_save(mine):
    """This rank is killed within its second save, once, when the first rank has begun to write."""
    def write(self, counters, *state):
        if mine and counters["step"] == 4 and not os.path.exists("died"):
            open("died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        WRITE(self, counters, *state)
    trainers.Trainer.write_checkpoint = write


def reference_gone(mine):
    """At step 3 the reference's weights are deleted."""
    def step(self):
        if mine and self.step == 2:
            os.remove("reference/model.safetensors")
        return TRAIN_STEP(self)
    trainers.Trainer.train_step = step


def terminated(mine):
    """This rank gets SIGTERM at step 3."""
    def step(self):
        if mine and self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return TRAIN_STEP(self)
    trainers.Trainer.train_step = step


def measured(mine):
    """Notes the bytes that this rank holds after a step."""
    def step(self):
        metrics = TRAIN_STEP(self)
        weights = list(self.policy.parameters())
        held = {"weights": weights, "gradients": [p.grad for p in weights],
                "optimizer state": [x for state in self.optimizer.state.values() for x in state.values()]}
        held = {name: sum((x.to_local() if isinstance(x, DTensor) else x).numel() * x.element_size() for x in tensors)
                for name, tensors in held.items()}
        with open("held.json", "w") as file:
            json.dump(held, file)
        return metrics
    if mine:
        trainers.Trainer.train_step = step


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        for name, value in ORIGINAL.items():
            setattr(trainers, name, value)
        if trouble := job.get("trouble"):
            globals()[trouble](int(os.environ["RANK"]) == job.get("rank", 1))
        status = train.main(job["run"])
        if trouble in ("out_of_time", "terminated"):
            with open(f"status{os.environ['RANK']}", "w") as file:
                json.dump(status, file)
    trainers.leave_ranks()
