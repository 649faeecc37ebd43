"""What is on disk, and how does it stay whole? A run's folder: its records and its checkpoints."""

import concurrent.futures
import contextlib
import fcntl
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file, save_file

from engine import InputError, first_line
from engine.config import (ROOT, Dumper, as_namespace, check_changes, check_config, flatten, read_schema,
                           read_yaml)
from engine.distributed import (TIMEOUT, check_devices, copy_full, from_first, full_state_dict, full_tensor,
                                num_ranks, raise_on_all_ranks, rank, wait_for_all)
from engine.lora import AdaptersOff, adapted_layers, base_of, base_path, is_adapter, save_adapter
from engine.models import check_optimizer, load_adapted, make_optimizer
from engine.objectives import check_table

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process needs none
COUNTERS = ("step", "examples", "iteration", "first_step", "first_examples")  # where a checkpoint stands
FINGERPRINTS = ("data", "tokens", "reference", "reward_model", "base")  # which a resumed run finds again


# ---------------------------------------------------------------- a run's folder, and nobody else in it


def load_config(given: dict, objectives: dict, datasets: dict):
    """The config, a namespace with blocks as dicts, and the checkpoint to go on from, or None.

    given: settings by dotted key. A resumed run's config is the one in its folder, with these laid over it.
    objectives, datasets: the tables of losses and named sources. Raises InputError for what is refused.
    """
    config, checkpoint = as_namespace(given, datasets), None
    if config.resume or not config.dry_run:  # a dry run from step 0 needs no folder
        checkpoint = find_checkpoint(config.run_dir, config.resume)
    if checkpoint:
        _, rules = read_schema()
        own = flatten(read_yaml(os.path.join(config.run_dir, "config.yaml")), rules)
        before, run_dir = as_namespace(own, datasets), config.run_dir
        config = as_namespace(own | given, datasets)
        config.run_dir = run_dir  # the folder may have been moved
        check_changes(before, config, given, bool(objectives[before.loss].self_play))
    check_table(objectives, read_schema()[0])
    check_config(config, objectives)
    check_devices(config)
    check_optimizer(config)
    return config, checkpoint


def find_checkpoint(run_dir: str, resume: bool | str) -> str | None:
    """The checkpoint to go on from, or None for a fresh run. Raises InputError if that is not possible."""
    latest = os.path.join(run_dir, "LATEST")
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    traces = [name for name in names if re.fullmatch(r"config\.yaml|metrics\.jsonl|LATEST|step-\d+", name)]
    if resume is False and traces:
        how = "go on with it by resume=true" if "LATEST" in names else "start it over by resume=auto"
        raise InputError(f"{run_dir} holds a run already: {how}, or choose another exp_name or run_dir")
    if resume is True and not os.path.lexists(latest):
        raise InputError(f"{run_dir} has no complete checkpoint to resume; resume=auto starts at step 0")
    if resume is False or not os.path.lexists(latest):
        if "config.yaml" in names and not read_provenance(os.path.join(run_dir, "config.yaml")):
            raise InputError(f"{run_dir} has a config.yaml that no run wrote: choose another run_dir")
        return None
    read_state(os.path.realpath(latest))
    return os.path.realpath(latest)


@raise_on_all_ranks
def lock_folder(run_dir, resume, checkpoint):
    """Makes the run's folder and keeps other processes out of it until this one ends, however it ends.

    Returns the lock, which its `with` releases; the first rank's is that of all. Raises InputError where
    another process has it, or has written there since `checkpoint` was found.
    """
    if rank() > 0:
        return contextlib.nullcontext()
    os.makedirs(run_dir, exist_ok=True)
    lock = open(os.path.join(run_dir, ".lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise InputError(f"{run_dir} is in use by another process: wait, or take another run_dir") from error
    if find_checkpoint(run_dir, resume) != checkpoint:
        lock.close()
        raise InputError(f"another process has written to {run_dir} meanwhile: start again")
    return lock


# ---------------------------------------------------------------- records


class RunFolder:
    """A run's settings and files of JSON lines, which the first rank writes; wandb gets the same numbers."""

    def __init__(self, run_dir):
        self.run_dir, self.wandb = run_dir, None

    @raise_on_all_ranks
    def start(self, config, resumed_at=None):
        """Starts wandb, writes config.yaml with the code's version. resumed_at: the step it goes on from."""
        if rank() > 0:
            return
        packages = ("torch", "transformers", "datasets", "tokenizers", "numpy")
        code = {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain")),
                "versions": {name: importlib.metadata.version(name) for name in packages}}
        provenance = {"run_id": secrets.token_hex(6), **code, "resumed": []}
        path = self.path("config.yaml")
        if resumed_at is not None:  # what the run began with stays
            provenance |= read_provenance(path)
            provenance["resumed"].append({"step": resumed_at, **code})
        settings = vars(config) | {"provenance": provenance}
        self.start_wandb(config, settings)
        with open(path + ".partial", "w", encoding="utf-8") as file:
            yaml.dump(settings, file, Dumper, sort_keys=False, allow_unicode=True)
        os.replace(path + ".partial", path)

    def start_wandb(self, config, settings):
        if config.wandb == "disabled":
            return
        import wandb
        try:
            self.wandb = wandb.init(
                project=config.wandb_project, name=config.exp_name, mode=config.wandb, dir=self.run_dir,
                id=settings["provenance"]["run_id"], resume="allow", config=settings)
        except wandb.errors.Error as error:
            raise InputError(f"wandb={config.wandb} does not start: {first_line(error)}") from error
        self.wandb.define_metric("*", step_metric="step")

    def close(self):
        if self.wandb:
            self.wandb.finish()

    def log(self, place: dict, metrics: dict):
        """One line in metrics.jsonl. In wandb the names of an evaluation's metrics begin with eval/."""
        self.write("metrics.jsonl", [place | metrics])
        if self.wandb:
            prefix = "eval/" if place["split"] == "eval" else ""
            metrics = {prefix + name: value for name, value in metrics.items()}
            self.wandb.log({"step": place["step"], **metrics})

    def log_samples(self, step: int, records: list[dict]):
        self.write("samples.jsonl", [{"step": step, **record} for record in records])
        if self.wandb and records:
            import wandb
            table = wandb.Table(columns=list(records[0]), data=[list(record.values()) for record in records])
            self.wandb.log({"step": step, "eval/samples": table})

    def path(self, name):
        return os.path.join(self.run_dir, name)

    def lines(self, name) -> list[dict]:
        """The records in a file of JSON lines; none where it is absent."""
        if not os.path.exists(self.path(name)):
            return []
        with open(self.path(name), encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def write(self, name, records):
        """Adds records to a file of JSON lines."""
        if rank() > 0:
            return
        with open(self.path(name), "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def rewind(self, name, keep) -> list[dict]:
        """Leaves those records in a file of JSON lines that `keep` accepts; returns them, on all ranks."""
        return from_first(rewind_jsonl(self.path(name), keep) if rank() == 0 else None)

    def clear_partial(self):
        """Deletes what an interrupted save left."""
        for name in os.listdir(self.run_dir) if rank() == 0 else ():
            if re.fullmatch(r"\.(step-\d+|reference|base|merged-\d+)\.partial", name):
                shutil.rmtree(self.path(name))

    def sync(self):
        """Waits until all records are on the disk."""
        for name in os.listdir(self.run_dir) if rank() == 0 else ():
            if name.endswith(".jsonl"):
                sync(self.path(name))


def read_provenance(path):
    """What a run's config.yaml says of the code that it began with; none if it is not a run's."""
    return read_yaml(path, provenance=True).get("provenance") or {}


def git(*arguments):
    """What git prints in this clone, or None where there is neither."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# ---------------------------------------------------------------- saving


class Checkpoints:
    """Writes a run's checkpoints, with async_save while training goes on.

        step-000040/         the model and its tokenizer, a whole Hugging Face folder; or peft's of adapters
          trainer_state/
            state.json       COUNTERS and FINGERPRINTS
            rng.pt           random state
            optimizer/       what the optimizer remembers: each rank's share, by torch.distributed.checkpoint
            reference.safetensors  a reference that moves by itself

    form: the policy without weights, a meta_copy; it writes the model's own configurations, of which sampling
    exchanges the policy's for generation. keep: how many checkpoints stay, or None.
    """

    def __init__(self, folder: RunFolder, form, tokenizer, keep, async_save):
        self.folder, self.form, self.tokenizer, self.keep = folder, form, tokenizer, keep
        self.in_progress = self.thread = self.group = None
        if async_save:
            self.thread = concurrent.futures.ThreadPoolExecutor(1)
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if num_ranks() > 1 else None

    def save(self, policy, optimizer, state: dict, spared=None, moved=None):
        """Saves all that a resume needs as step-<step>. state: counters and fingerprints, with `step`.

        spared: a step whose checkpoint stays, however many are kept. moved: a reference that is kept too.
        """
        self.finish()
        self.folder.sync()
        rng = {"cpu": torch.get_rng_state(),  # of several ranks none looks at the others' GPUs
               "cuda": torch.cuda.get_rng_state_all() if num_ranks() == 1 else []}
        weights = full_state_dict(policy, self.thread is not None, learning=bool(adapted_layers(policy)))
        optimizer = optimizer_state(policy, optimizer)
        moved = moved and {name: full_tensor(x.detach()).to("cpu", copy=True)
                           for name, x in moved.named_parameters()}
        if self.thread is None:
            self.write(state, rng, weights, optimizer, spared, moved)
            return
        optimizer = {k: x.to("cpu", copy=True) if torch.is_tensor(x) else x for k, x in optimizer.items()}
        self.in_progress = self.thread.submit(self.write, state, rng, weights, optimizer, spared, moved)

    def check(self):
        """Raises what went wrong with a checkpoint that was written meanwhile."""
        if self.in_progress and self.in_progress.done():
            self.finish()

    def finish(self):
        """Waits for a checkpoint that is being written, and raises what went wrong with it."""
        if self.in_progress:
            self.in_progress.result()
            self.in_progress = None

    def write(self, state, rng, weights, optimizer, spared, moved=None):
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
                os.makedirs(beside, exist_ok=True)  # others may have begun
                torch.save(rng, os.path.join(beside, "rng.pt"))
                if moved:
                    save_file(moved, os.path.join(beside, "reference.safetensors"))
                with open(os.path.join(beside, "state.json"), "w") as file:
                    json.dump(state | {"base_dtype": str(self.form.dtype)}, file)
            dcp.save(optimizer | {"step": state["step"]}, checkpoint_id=os.path.join(beside, "optimizer"),
                     process_group=self.group, no_dist=num_ranks() == 1)
        if rank() == 0:
            point(self.folder.run_dir, "LATEST", name)
            self.discard(state["step"], spared)
        wait_for_all(self.group)

    def discard(self, newest, spared):
        """Deletes all but the newest checkpoints."""
        names = [name for name in os.listdir(self.folder.run_dir) if re.fullmatch(r"step-\d+", name)]
        steps = sorted(step for step in (int(name[5:]) for name in names) if step <= newest)
        for step in steps[:-self.keep] if self.keep else []:
            if step != spared:
                name = f"step-{step:06d}"
                discarded = self.folder.path(f".{name}.partial")
                os.rename(self.folder.path(name), discarded)  # half deleted, it is no checkpoint
                shutil.rmtree(discarded)


def save_model(folder, model, tokenizer):
    """Keeps a model as a complete Hugging Face folder."""
    weights = full_state_dict(model)
    with complete_folder(folder) as partial:
        if rank() == 0:
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)


def keep_models(folder: RunFolder, config, policy, reference, tokenizer):
    """Keeps what a resume reads and no folder has: a reference made here, and the base of adapters."""
    is_made = (config.reference or config.model) == "tiny"
    if is_made and reference and not isinstance(reference, AdaptersOff):
        save_model(folder.path("reference"), reference, tokenizer)
    if base_path(config) == folder.path("base"):
        save_model(folder.path("base"), base_of(policy), tokenizer)


def optimizer_state(model, optimizer) -> dict:
    """{"<weight>.<key>": value} of all that an optimizer remembers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[parameter]}.{key}": value for parameter, state in optimizer.state.items()
            for key, value in state.items() if value is not None}


@contextlib.contextmanager
def complete_folder(final, group=None):
    """Gives a folder for all ranks to fill, which takes its final name only when all in it is on the disk."""
    partial = os.path.join(os.path.dirname(final), f".{os.path.basename(final)}.partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
    wait_for_all(group)
    yield partial
    wait_for_all(group)
    if rank() > 0:
        return
    for folder, _, files in os.walk(partial, topdown=False):
        for path in [*(os.path.join(folder, name) for name in files), folder]:
            sync(path)
    shutil.rmtree(final, ignore_errors=True)  # what a crash left between this rename and that of LATEST
    os.rename(partial, final)
    sync(os.path.dirname(final))


def point(run_dir, link, name):
    """Makes a link in a run's folder, LATEST or merged, point to another folder there."""
    temporary = os.path.join(run_dir, f".{link}")
    if os.path.lexists(temporary):
        os.remove(temporary)
    os.symlink(name, temporary)
    os.replace(temporary, os.path.join(run_dir, link))
    sync(run_dir)


def rewind_jsonl(path, keep):
    """Rewrites a file of JSON lines with those that `keep` accepts and returns them; a torn line goes too."""
    if not os.path.exists(path):
        return []
    kept = []
    with open(path, "rb") as file:  # bytes: a crash can tear a character
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if line.endswith(b"\n") and isinstance(record, dict) and keep(record):
                    kept.append((line, record))
    with open(path + ".partial", "wb") as file:
        file.writelines(line for line, _ in kept)
    sync(path + ".partial")
    os.replace(path + ".partial", path)
    return [record for _, record in kept]


def sync(path):
    """Waits until a file or folder is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


# ---------------------------------------------------------------- reading it back


def merge(checkpoint, trust_remote_code=False) -> str:
    """Makes of an adapter runs/x/step-000040 and the model beside it runs/x/merged-000040, a whole Hugging
    Face folder, and returns its name."""
    if not is_adapter(checkpoint):
        raise InputError(f"{checkpoint} is no checkpoint with adapters, which alone are merged")
    run_dir, name = os.path.split(os.path.realpath(checkpoint))
    merged = "merged" + name.removeprefix("step")
    if not os.path.exists(os.path.join(run_dir, merged)):
        model, tokenizer = load_adapted(os.path.join(run_dir, name), trust_remote_code)
        save_model(os.path.join(run_dir, merged), model, tokenizer)
    return merged


def keep_merged(config):
    """Merges a run's last checkpoint, if that has adapters: runs/x/merged is a link to it."""
    latest = os.path.join(config.run_dir, "LATEST")
    if is_adapter(latest):
        name = merge(latest, config.trust_remote_code)
        if rank() == 0:
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


def read_state(checkpoint: str) -> dict:
    """Counters and fingerprints of a checkpoint. Raises InputError if the folder is not whole."""
    needed = ("config.json", "trainer_state/state.json", "trainer_state/rng.pt",
              "trainer_state/optimizer/.metadata")
    absent = [name for name in needed if not os.path.isfile(os.path.join(checkpoint, name))]
    names = os.listdir(checkpoint) if os.path.isdir(checkpoint) else []
    if not any(name.endswith(".safetensors") for name in names):
        absent.append("model.safetensors")
    if absent:
        raise InputError(f"checkpoint {checkpoint} is incomplete, it lacks {', '.join(absent)}: "
                         "point LATEST at a whole one, or start a new run")
    try:
        with open(os.path.join(checkpoint, "trainer_state", "state.json")) as file:
            later = dict.fromkeys(("reward_model", "tokens", "began", "opponent", "base", "base_dtype"))
            state = dict.fromkeys(COUNTERS[2:], 0) | later | {"state": {}, "measured": {}} | json.load(file)
        if not all(str(state[name] or "2-").startswith("2-") for name in ("reference", "reward_model")):
            raise InputError(f"checkpoint {checkpoint} is of code before 2026-11-26, which hashed models in "
                             "another way: finish the run with that, or begin one with model= this folder")
        return {name: state[name] for name in (*COUNTERS, *FINGERPRINTS, "began", "opponent", "state",
                                                "measured", "base_dtype")}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"checkpoint {checkpoint} is damaged, its state.json is not whole: point LATEST at "
                         "another one, or start a new run") from error


def read_began(checkpoint: str | None) -> str | None:
    """The date on which a checkpoint's run began, as 2026-11-25; None where it does not say, or is none."""
    return checkpoint and read_state(checkpoint)["began"]


def restore_state(checkpoint, step, policy, optimizer, config, moved=None):
    """Puts back the random state, what the optimizer remembered and, into `moved`, a reference that moves.
    Raises InputError if it is damaged."""
    folder = os.path.join(checkpoint, "trainer_state")
    try:
        rng = torch.load(os.path.join(folder, "rng.pt"), map_location="cpu")
        if step > 0:
            restore_optimizer(os.path.join(folder, "optimizer"), policy, optimizer, config)
        if moved:
            kept = load_file(os.path.join(folder, "reference.safetensors"))
            for name, x in moved.named_parameters():
                copy_full(x, kept[name])
    except (Exception, dcp.CheckpointException) as error:  # which is no Exception
        raise InputError(f"checkpoint {checkpoint} is damaged, its trainer_state cannot be read: "
                         f"{first_line(error)}") from error
    torch.set_rng_state(rng["cpu"])
    if num_ranks() == 1 and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])


def restore_optimizer(folder, policy, optimizer, config):
    """Reads into the optimizer what it remembered, of which each rank takes its share."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        twin = torch.nn.Parameter(torch.zeros_like(p))
        twin.grad = torch.zeros_like(p)
        like = make_optimizer([twin], config)
        like.step()  # which makes a state of the right form
        optimizer.state[p] = like.state[twin]
    state = optimizer_state(policy, optimizer)
    dcp.load(state, checkpoint_id=folder, no_dist=num_ranks() == 1)  # in place
    names = dict(policy.named_parameters())
    for name, value in state.items():
        weight, _, key = name.rpartition(".")
        optimizer.state[names[weight]][key] = value


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "merge":
        sys.exit("usage: python -m engine.checkpoints merge runs/x/step-000040")
    try:
        name = merge(sys.argv[2])
    except InputError as refused:
        sys.exit(f"error: {refused}")
    print("merged    ", os.path.join(os.path.dirname(os.path.realpath(sys.argv[2])), name))
