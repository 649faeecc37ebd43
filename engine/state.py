"""Is a checkpoint what was saved? state.json says what it holds, and all is held to it before it is used."""

import errno
import hashlib
import json
import os
import re

from engine import InputError
from engine.folder import files_in, find_fault

FORMAT = 2
COUNTERS = ("step", "examples", "iteration", "first_step", "first_examples")  # where a checkpoint stands


def checkpoints_of(run_dir) -> list[str]:
    """Paths of a run's checkpoints, the newest first."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    paths = [os.path.join(run_dir, name) for name in names if re.fullmatch(r"step-\d+", name)]
    return sorted(paths, key=step_of, reverse=True)


def step_of(path):
    return int(os.path.basename(path)[5:])


def write_state(folder, state):
    """trainer_state/state.json, with a hash of its own text."""
    text = json.dumps(state)
    digest = hashlib.sha256(text.encode()).hexdigest()
    os.makedirs(os.path.join(folder, "trainer_state"), exist_ok=True)
    with open(os.path.join(folder, "trainer_state", "state.json"), "w") as file:
        file.write(f'{text[:-1]}, "sha256": "{digest}"}}')


def parse_state(checkpoint) -> dict:
    """What state.json says. Raises InputError where it is not what was written, or is older code's."""
    name = "trainer_state/state.json"
    try:
        with open(os.path.join(checkpoint, name), encoding="utf-8") as file:
            state = json.load(file)
        is_old = "step" in state and state.get("format") != FORMAT
        digest = state.pop("sha256", None)
        is_own = hashlib.sha256(json.dumps(state).encode()).hexdigest() == digest
        fault = None if is_own else "not what was saved"
    except (ValueError, AttributeError):
        is_old, fault = False, "not what was saved"
    except OSError as error:
        is_old, fault = False, "missing" if error.errno == errno.ENOENT else error.strerror
    if is_old:
        raise InputError(f"checkpoint {checkpoint} is of code before 2026-11-27, which wrote another format: "
                         "finish the run with that, or begin one with model= this folder")
    if fault:
        raise InputError(f"checkpoint {checkpoint} is damaged, {name} is {fault}")
    return state


def kept_state(folder) -> dict:
    """The same; {} for a folder that is no run's."""
    is_own = os.path.isfile(os.path.join(folder, "trainer_state", "state.json"))
    return parse_state(folder) if is_own else {}


def read_state(checkpoint: str) -> dict:
    """The same, of a checkpoint in its run. Raises InputError also where its counters cannot be."""
    state = parse_state(checkpoint)
    step, counters = state.get("step"), [state.get(name) for name in COUNTERS]
    fits = type(state.get("config")) is dict and all(type(x) is int for x in counters) and (
        os.path.basename(os.path.realpath(checkpoint)) == f"step-{step:06d}")
    if not (fits and step <= state["examples"] <= step * state["config"]["batch_size"]):
        raise InputError(f"checkpoint {checkpoint} is damaged, trainer_state/state.json is another step's")
    return state


def check_model(key, path):
    """Raises InputError where a model to begin from is a checkpoint that says what it holds, and holds other
    files."""
    if not (path and os.path.isfile(os.path.join(path, "trainer_state", "state.json"))):
        return
    try:
        files = parse_state(path)["files"]
    except InputError as error:
        if "is of code before" in str(error):
            return
        raise
    if fault := fault_within(path, files, without="trainer_state/"):
        raise InputError(f"{key}={path} is damaged, {fault}: put it back, or delete its trainer_state to "
                         "take it as it is")


def fault_of(folder, read=read_state, alone=False) -> str | None:
    """What is wrong with a checkpoint or, if it does not stand alone, with what it needs beside it; None if
    every file is what was saved. read: parse_state, for another model that the run keeps."""
    try:
        state = read(folder)
    except InputError as error:
        return str(error)
    if fault := fault_within(folder, state["files"]):
        return f"checkpoint {folder} is damaged, {fault}"
    if alone:
        return None
    run_dir, needed = os.path.dirname(folder), state["needs"]
    if fault := find_fault(run_dir, state["records"], growing=True):
        return f"what is beside checkpoint {folder} is damaged, {fault}"
    beside = {os.path.join(run_dir, name): parse_state for name in ("base", "reference")}
    beside = {path: read for path, read in beside.items() if os.path.isdir(path)}
    if needed not in (None, state["step"]):
        beside[os.path.join(run_dir, f"step-{needed:06d}")] = read_state  # its opponent
    fault = next(filter(None, (fault_of(path, read, alone=True) for path, read in beside.items())), None)
    return fault and f"checkpoint {folder} needs another one, and {fault}"


def fault_within(folder, files, without=None):
    """What is wrong with a checkpoint's files, or None; without: names that begin so are not looked at."""
    def is_left(name):
        return bool(without) and name.startswith(without)
    more = [x for x in files_in(folder) if not (x in files or x == "trainer_state/state.json" or is_left(x))]
    fault = find_fault(folder, {name: x for name, x in files.items() if not is_left(name)})
    return fault or (f"{more[0]} was not saved with it" if more else None)


def check_whole(checkpoint):
    """Raises InputError, naming an older checkpoint that is whole, if this one is not."""
    if not (fault := fault_of(checkpoint)):
        return
    if "is of code before" in fault:
        raise InputError(fault)
    steps = checkpoints_of(os.path.dirname(checkpoint))
    older = steps[steps.index(checkpoint) + 1:] if checkpoint in steps else []
    older = next((path for path in older if not fault_of(path)), None)
    raise InputError(f"{fault}: " + (
        f"resume={os.path.basename(older)} goes on from the newest that is whole" if older else
        "put it back, or start a new run, for no older one is whole"))
