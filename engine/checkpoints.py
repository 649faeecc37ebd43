"""What does a checkpoint hold, and when may a run go on from it?"""

import base64
import concurrent.futures
import contextlib
import fcntl
import glob
import hashlib
import itertools
import os
import re
import shutil
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from engine import InputError, first_line
from engine.config import (PATHS, as_flat, as_namespace, check_changes, check_config, check_kept, flatten,
                           read_schema, read_yaml)
from engine.distributed import (TIMEOUT, check_devices, copy_full, from_all, from_first, full_state_dict,
                                full_tensor, num_ranks, raise_on_all_ranks, rank, wait_for_all)
from engine.folder import Best, RunFolder, complete_folder, digests, files_in, point, read_provenance, writing
from engine.lora import AdaptersOff, adapted_layers, base_of, is_adapter, makes_base, save_adapter
from engine.models import (check_optimizer, load_adapted, optimizer_state, restore_optimizer, save_shards)
from engine.objectives import check_table
from engine.state import (FORMAT, check_model, check_whole, checkpoints_of, fault_of, parse_state, read_state,
                          step_of, write_state)

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process needs none
LINKS = ("LATEST", "BEST", "merged", ".LATEST", ".BEST", ".merged")  # a run's own
FINGERPRINTS = ("data", "tokens", "reference", "reward_model", "base")  # which a resumed run finds again


# ---------------------------------------------------------------- which run goes on, and nobody else in it


def load_config(given: dict, objectives: dict, datasets: dict):
    """The config, a namespace with blocks as dicts, and the checkpoint to go on from, or None.

    given: settings by dotted key. A resumed run's config is the one in its folder, with these laid over it.
    objectives, datasets: the tables of losses and named sources. Raises InputError for what is refused.
    """
    config, checkpoint = as_namespace(given, datasets), None
    if config.resume or not config.dry_run:  # a dry run from step 0 needs no folder
        checkpoint = find_checkpoint(config.run_dir, config.resume)
    if checkpoint:
        if os.environ.get("RANK", "0") == "0":
            check_whole(checkpoint)
        _, rules = read_schema()
        path = os.path.join(config.run_dir, "config.yaml")
        settings = read_yaml(path)
        try:
            own = flatten(settings, rules)
        except InputError as refused:
            raise InputError(f"{path} is not what a run wrote, {refused}: put it back") from refused
        for key in ("resume", "run_dir", "trust_remote_code"):  # of this call alone; code is run by its leave
            own.pop(key, None)
        before, run_dir = as_namespace(own, datasets), config.run_dir
        config = as_namespace(own | given, datasets)
        config.run_dir = run_dir  # the folder may have been moved
        objective = objectives[before.loss]
        kept = as_namespace(read_state(checkpoint)["config"], datasets)  # a path may lead elsewhere by now
        check_kept(own, as_flat(before), as_flat(kept), before, objective)
        check_changes(before, config, given, objective)
    for key in PATHS if os.environ.get("RANK", "0") == "0" else ():
        check_model(key, getattr(config, key))
    check_table(objectives, read_schema()[0])
    check_config(config, objectives, knows_base=bool(checkpoint and config.lora["rank"]))
    check_devices(config)
    check_optimizer(config)
    return config, checkpoint


def find_checkpoint(run_dir: str, resume: bool | str) -> str | None:
    """The checkpoint to go on from, or None for a fresh run. Raises InputError if that is not possible."""
    latest, steps = os.path.join(run_dir, "LATEST"), checkpoints_of(run_dir)
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    traces = [name for name in names if re.fullmatch(r"config\.yaml|metrics\.jsonl|LATEST|step-\d+", name)]
    if resume is False and traces:
        how = "go on with it by resume=true" if "LATEST" in names else "start it over by resume=auto"
        how = "go on with it by resume=auto" if steps and "LATEST" not in names else how
        raise InputError(f"{run_dir} holds a run already: {how}, or choose another exp_name or run_dir")
    if resume and os.path.isdir(latest) and not os.path.islink(latest):
        raise InputError(f"{latest} is a folder and no link, as in a copy without links: remove it, and "
                         "resume=auto goes on from the newest checkpoint")
    if isinstance(resume, str) and resume != "auto":
        if resume not in map(os.path.basename, steps):
            has = ", ".join(map(os.path.basename, steps)) or "none"
            raise InputError(f"resume={resume}: {run_dir} has no such checkpoint, it has {has}")
        return os.path.join(run_dir, resume)
    if resume and os.path.islink(latest) and os.path.exists(latest):
        path = os.path.realpath(latest)
        if path not in steps:
            raise InputError(f"{latest} points to {os.readlink(latest)}, which is no checkpoint of this run: "
                             "remove it, and resume=auto goes on from the newest one")
        return path
    if resume is True and steps:
        raise InputError(f"{run_dir} has no LATEST: resume=auto goes on from the newest checkpoint")
    if resume is True:
        raise InputError(f"{run_dir} has no complete checkpoint to resume; resume=auto starts at step 0")
    if resume and steps:
        if whole := next((path for path in steps if not fault_of(path)), None):
            return whole
        if "is of code before" in (fault := fault_of(steps[0])):
            raise InputError(fault)
        raise InputError(f"{run_dir} has checkpoints, but none is whole, {fault}: move them aside to start "
                         "over")
    if "config.yaml" in names and not read_provenance(os.path.join(run_dir, "config.yaml")):
        raise InputError(f"{run_dir} has a config.yaml that no run wrote: choose another run_dir")
    if foreign := {"base", "reference"}.intersection(names if "config.yaml" not in names else ()):
        raise InputError(f"{run_dir} has a folder {min(foreign)} that no run wrote: choose another run_dir")
    return None


def free_name(path):
    """Under which something is put aside."""
    return next(f"{path}.{n}" for n in itertools.count(1) if not os.path.lexists(f"{path}.{n}"))


@contextlib.contextmanager
def lock_folder(run_dir, resume, checkpoint):
    """Makes the run's folder and keeps other processes out of it meanwhile; what its disk does not take ends
    in one sentence. Raises InputError where another process has it, or has written there since `checkpoint`
    was found, and where something in it leads elsewhere."""
    with writing(run_dir), take_lock(run_dir, resume, checkpoint):
        yield


@raise_on_all_ranks
def take_lock(run_dir, resume, checkpoint):
    """The lock, of the first rank for all; its `with` releases it, as does the end of the process."""
    if rank() > 0:
        return contextlib.nullcontext()
    with writing(run_dir):
        os.makedirs(run_dir, exist_ok=True)
        for entry in os.scandir(run_dir):
            is_own = entry.name in LINKS and entry.is_symlink()
            kinds = entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False), is_own
            if not any(kinds):
                kind = "a link" if entry.is_symlink() else "no file"
                raise InputError(f"{entry.path} is {kind}, and a run writes to its own folder alone: put "
                                 "what it leads to in its place, or choose another run_dir")
        lock = open(os.path.join(run_dir, ".lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise InputError(f"{run_dir} is in use by another process: wait, or take another run_dir") from error
    if find_checkpoint(run_dir, resume) != checkpoint:
        lock.close()
        raise InputError(f"another process has written to {run_dir} meanwhile: start again")
    if checkpoint and os.path.realpath(os.path.join(run_dir, "LATEST")) != checkpoint:
        steps = checkpoints_of(run_dir)
        for path in steps[:steps.index(checkpoint)]:
            aside = free_name(path)
            os.rename(path, aside)
            print(f"resume     {path} is kept as {os.path.basename(aside)}")
        point(run_dir, "LATEST", os.path.basename(checkpoint))
        print(f"resume     from {os.path.basename(checkpoint)}, which is LATEST from here on")
    return lock


# ---------------------------------------------------------------- saving


class Checkpoints:
    """Writes a run's checkpoints, with async_save while training goes on.

        step-000040/         the model and its tokenizer, a whole Hugging Face folder; or peft's of adapters
          trainer_state/
            state.json       COUNTERS, FINGERPRINTS, the settings, the random state; and the size and sha256
                             of every other file here, of the records so far, and of itself
            optimizer/       what the optimizer remembers: each rank's share, in safetensors
            reference.safetensors  a reference that moves by itself

    form: the policy without weights, a meta_copy; it writes the model's own configurations, of which sampling
    exchanges the policy's for generation.
    """

    def __init__(self, folder: RunFolder, form, tokenizer, config):
        self.folder, self.form, self.tokenizer, self.config = folder, form, tokenizer, config
        self.in_progress = self.thread = self.group = None
        self.best = Best(config.keep_best)
        if config.async_save:
            self.thread = concurrent.futures.ThreadPoolExecutor(1)
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if num_ranks() > 1 else None

    def save(self, policy, optimizer, state: dict, spared=None, moved=None):
        """Saves all that a resume needs as step-<step>. state: counters and fingerprints, with `step`.

        spared: a step whose checkpoint stays, however many are kept. moved: a reference that is kept too.
        """
        self.finish()
        self.folder.sync()
        rng = [torch.get_rng_state(),  # of several ranks none looks at the others' GPUs
               *(torch.cuda.get_rng_state_all() if num_ranks() == 1 else [])]
        state = {"format": FORMAT, **state, "config": as_flat(self.config), "needs": spared,
                 "best": self.best.step,
                 "base_dtype": str(self.form.dtype),
                 "random": [base64.b64encode(x.numpy().tobytes()).decode() for x in rng],
                 "records": self.folder.digests(state["iteration"]) if rank() == 0 else None}
        weights = full_state_dict(policy, self.thread is not None, learning=bool(adapted_layers(policy)))
        optimizer = optimizer_state(policy, optimizer)
        moved = moved and {name: full_tensor(x.detach()).to("cpu", copy=True)
                           for name, x in moved.named_parameters()}
        if self.thread is None:
            self.write(state, weights, optimizer, moved)
            return
        optimizer = {k: x.to("cpu", copy=True) if torch.is_tensor(x) else x for k, x in optimizer.items()}
        self.in_progress = self.thread.submit(self.write, state, weights, optimizer, moved)

    def check(self):
        """Raises what went wrong with a checkpoint that was written meanwhile."""
        if self.in_progress and self.in_progress.done():
            self.finish()

    def finish(self):
        """Waits for a checkpoint that is being written, and raises what went wrong with it."""
        if self.in_progress:
            self.in_progress.result()
            self.in_progress = None

    def write(self, state, weights, optimizer, moved=None):
        """Writes it whole beside its final name, renames it, and only then moves LATEST to it.

        All ranks write their shares of the optimizer's state, the first what else there is.
        """
        name = f"step-{state['step']:06d}"
        with complete_folder(self.folder.path(name), self.group) as partial:
            beside = os.path.join(partial, "trainer_state")
            if rank() == 0:
                if state["base"]:
                    save_adapter(partial, self.form, weights)
                else:
                    self.form.save_pretrained(partial, state_dict=weights)
                self.tokenizer.save_pretrained(partial)
                if moved:
                    os.makedirs(beside, exist_ok=True)  # others may have begun
                    save_file(moved, os.path.join(beside, "reference.safetensors"))
            tensors = {name: x for name, x in optimizer.items() if torch.is_tensor(x)}
            save_shards(tensors, os.path.join(beside, "optimizer"), self.group)
            # Each rank hashes its share of the optimizer's state, the first what else there is.
            own = f"trainer_state/optimizer/shard-{rank() + 1:05d}*"
            names = glob.glob(own, root_dir=partial)
            if rank() == 0:
                names += [name for name in files_in(partial) if "/shard-" not in name]
            files = from_all(digests(partial, names), self.group)
            if rank() == 0:
                scalars = {name: x for name, x in optimizer.items() if not torch.is_tensor(x)}
                write_state(partial, state | {"optimizer": scalars, "files": {
                    name: digest for part in files for name, digest in part.items()}})
        if rank() == 0:
            point(self.folder.run_dir, "LATEST", name)
            if state["best"] == state["step"]:
                point(self.folder.run_dir, "BEST", name)
            self.discard(state["step"], state["best"])
        wait_for_all(self.group)

    def discard(self, newest, best):
        """Deletes a former best that nothing else asked for, and with keep_checkpoints all but the newest,
        the best and those whose policy is their opponent."""
        paths = [path for path in checkpoints_of(self.folder.run_dir) if step_of(path) <= newest]
        states = {path: {} for path in paths}
        for path in paths if self.config.keep_checkpoints or self.config.keep_best else ():
            with contextlib.suppress(InputError):  # a damaged one is no reason to end the run
                states[path] = parse_state(path)
        kept = [x for x in paths if step_of(x) in (newest, best) or not states[x].get("only_best")]
        kept = [x for x in kept if x in kept[:self.config.keep_checkpoints] or step_of(x) == best]
        needed = {states[path].get("needs") for path in kept}
        for path in paths:
            if path not in kept and step_of(path) not in needed:
                discarded = self.folder.path(f".{os.path.basename(path)}.partial")
                os.rename(path, discarded)  # half deleted, it is no checkpoint
                shutil.rmtree(discarded)

    def update_best(self, step, metrics):
        """Takes an evaluation for keep_best; BEST is moved here only if its checkpoint stands already."""
        path = self.folder.path(f"step-{step:06d}")
        is_best = self.best.metric and self.best.update(step, from_first(metrics))  # all ranks must agree
        if is_best and rank() == 0 and os.path.isdir(path):
            point(self.folder.run_dir, "BEST", os.path.basename(path))

    def recall_best(self):
        """What keep_best knows, from the evaluations whose checkpoints stand."""
        link, lines = self.folder.path("BEST"), self.folder.lines("metrics.jsonl") if rank() == 0 else None
        if rank() == 0 and os.path.islink(link):
            os.remove(link)
        elif rank() == 0 and os.path.exists(link):  # as in a copy without links
            os.rename(link, free_name(link))
        for line in from_first(lines) if self.best.metric else ():
            is_kept = os.path.isdir(self.folder.path(f"step-{line['step']:06d}"))
            if line["split"] == "eval" and self.best.metric in line and is_kept:
                self.update_best(line["step"], line)


def save_model(folder, model, tokenizer, **notes):
    """Keeps a model as a complete Hugging Face folder, which says what it holds as a checkpoint does."""
    weights = full_state_dict(model)
    with complete_folder(folder) as partial:
        if rank() == 0:
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            write_state(partial, {"format": FORMAT, **notes, "files": digests(partial, files_in(partial))})


def keep_models(folder: RunFolder, config, policy, reference, tokenizer):
    """Keeps what a resume reads and no folder has: a reference made here, and the base of adapters."""
    is_made = (config.reference or config.model) == "tiny"
    if is_made and reference and not isinstance(reference, AdaptersOff):
        save_model(folder.path("reference"), reference, tokenizer)
    if makes_base(config):
        save_model(folder.path("base"), base_of(policy), tokenizer)


# ---------------------------------------------------------------- reading it back


def merge(checkpoint, trust_remote_code=False) -> str:
    """Makes of an adapter runs/x/step-000040 and the model beside it runs/x/merged-000040, a whole Hugging
    Face folder, unless it is there, and returns its name; another one of that name is put aside."""
    if not is_adapter(checkpoint):
        raise InputError(f"{checkpoint} is no checkpoint with adapters, which alone are merged")
    check_model("adapter", checkpoint)
    run_dir, name = os.path.split(os.path.realpath(checkpoint))
    merged = os.path.join(run_dir, "merged" + name.removeprefix("step"))
    with writing(run_dir), open(os.path.join(run_dir, ".merge.lock"), "w") as lock:
        if rank() == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two that merge the second waits, and finds it
            with open(os.path.join(run_dir, name, "adapter_model.safetensors"), "rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
            if os.path.exists(merged) and merged_from(merged) != own:
                os.rename(merged, free_name(merged))
        if not from_first(os.path.exists(merged)):
            model, tokenizer = load_adapted(os.path.join(run_dir, name), trust_remote_code)
            save_model(merged, model, tokenizer, merged_from=own if rank() == 0 else None)
    return os.path.basename(merged)


def merged_from(path):
    """The hash of the adapter that was merged into a model, or None where it is not whole."""
    return None if fault_of(path, parse_state, alone=True) else parse_state(path).get("merged_from")


def keep_merged(config):
    """Merges a run's last checkpoint, if that has adapters: runs/x/merged is a link to it."""
    latest = os.path.join(config.run_dir, "LATEST")
    if is_adapter(latest):
        name = merge(latest, config.trust_remote_code)
        link = os.path.join(config.run_dir, "merged")
        if rank() == 0:
            if os.path.isdir(link) and not os.path.islink(link):  # as in a copy without links
                os.rename(link, free_name(link))
            point(config.run_dir, "merged", name)


def reference_path(config, in_stages: bool, checkpoint: str | None) -> str | None:
    """Where the reference is; None: it is the policy as it starts.

    In stages a checkpoint keeps the policy of the iteration's start; a reference that came from no folder is
    kept in the run's.
    """
    path = config.reference or config.model
    if path == config.model and (not checkpoint or config.lora["rank"]):
        return None  # with adapters the policy without them, or with another one
    if in_stages:
        return os.path.join(config.run_dir, f"step-{read_state(checkpoint)['first_step']:06d}")
    return os.path.join(config.run_dir, "reference") if path == "tiny" and checkpoint else path


def read_began(checkpoint: str | None) -> str | None:
    """The date on which a checkpoint's run began, as 2026-11-25; None where it does not say, or is none."""
    return checkpoint and read_state(checkpoint)["began"]


def restore_state(checkpoint, step, policy, optimizer, config, moved=None):
    """Puts back the random state, what the optimizer remembered and, into `moved`, a reference that moves.
    Raises InputError if they do not fit."""
    folder, state = os.path.join(checkpoint, "trainer_state"), read_state(checkpoint)
    try:
        restore_optimizer(os.path.join(folder, "optimizer"), state["optimizer"], policy, optimizer, config)
        if moved:
            kept = load_file(os.path.join(folder, "reference.safetensors"))
            for name, x in moved.named_parameters():
                copy_full(x, kept[name])
        cpu, *cuda = (torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
                      for text in state["random"])
        torch.set_rng_state(cpu)
    except (Exception, dcp.CheckpointException) as error:  # which is no Exception
        raise InputError(f"checkpoint {checkpoint} does not fit this run, its trainer_state cannot be read: "
                         f"{first_line(error)}") from error
    if num_ranks() == 1 and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] != ["merge"] or len(words) < 2 or words[2:] not in ([], ["trust_remote_code=true"]):
        sys.exit("usage: python -m engine.checkpoints merge runs/x/step-000040 [trust_remote_code=true]")
    try:
        name = merge(words[1], len(words) > 2)
    except InputError as refused:
        sys.exit(f"error: {refused}")
    print("merged    ", os.path.join(os.path.dirname(os.path.realpath(words[1])), name))
