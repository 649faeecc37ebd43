"""What happens in a run, in order? python train.py [--config mine.yaml] [key=value ...], or --help."""

import contextlib
import difflib
import fcntl
import functools
import importlib.metadata
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import types

import torch
import transformers
import yaml
from torch._subclasses import FakeTensorMode

import data
import trainers
from data import DATASETS, InputError, as_list
from losses import OBJECTIVES

HERE = os.path.dirname(os.path.abspath(__file__))
MAY_CHANGE = re.compile(  # in a resumed run; num_epochs and max_steps too while the learning rate is constant
    "exp_name|run_dir|resume|max_hours|eval_.*|num_eval_examples|num_samples|sample_.*|save_every|log_every|"
    "keep_checkpoints|wandb.*|gradient_accumulation_steps|max_tokens_per_microbatch|attention|"
    r"activation_checkpointing|compile|layout|reference_cache|fsdp\..*|async_save|dry_run|world_size")
PATHS = ("model", "reference", "tokenizer", "reward_model")  # keys that name a folder or a hub id


def main(arguments):
    """Runs what the arguments ask for; returns the exit status. Raises InputError for refused input."""
    config, checkpoint = load_config(arguments)
    if config.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print_dry_run(config, checkpoint)
        return 0
    trainers.start_ranks()
    trainer = build_trainer(config, checkpoint)
    with lock_folder(config, checkpoint):
        trainer.restore_records()
        if checkpoint and trainer.is_finished and not trainer.eval_is_due():
            print(f"This run is finished: its last step, {trainer.step}, is in {checkpoint}.")
            return 0
        write_start(trainer)
        stopped_by = trainer.train()
    if not stopped_by:
        print_results(trainer)
        return 0
    name = stopped_by if stopped_by == "max_hours" else signal.Signals(stopped_by).name
    command = "torchrun ..." if trainers.num_ranks() > 1 else "python"
    print(f"Stopped by {name} after step {trainer.step} of {trainer.num_steps}; all is saved. To go on:\n"
          f"  {command} train.py resume=true run_dir={shlex.quote(os.path.relpath(config.run_dir))}")
    return 0 if stopped_by == "max_hours" else 128 + stopped_by


def build_trainer(config, checkpoint=None):
    """Data, tokenizer, models and Trainer of a config, printing a summary; writes nothing."""
    trainers.keep_freed_memory()
    if trainers.num_ranks() > 1:
        trainers.refused_by_all(trainers.check_optimizer)(config)
    torch.manual_seed(config.seed)
    inputs = load_inputs(config, checkpoint)
    objective, tokenizer = OBJECTIVES[config.loss], inputs.tokenizer
    head = "new scores" if objective.inputs == "scores" else None
    policy = trainers.load_model(checkpoint or config.model, inputs.model_config, config, tokenizer, head)
    reference = load_reference(config, checkpoint, policy, tokenizer) if objective.needs_reference else None
    reward_model = load_other("reward_model", config.reward_model, config, tokenizer, "scores")
    trainer = trainers.Trainer(
        config, policy, reference, tokenizer, inputs.end_ids, inputs.train_examples,
        inputs.reports["data"].fingerprint, inputs.eval_examples, inputs.sample_examples, inputs.judge,
        reward_model, checkpoint, functools.partial(load_reference, config, True, None, tokenizer))
    print_summary(trainer, inputs.dropouts, inputs.reports)
    return trainer


@trainers.refused_by_all
def load_inputs(config, checkpoint=None):
    """All that a run reads but weights: tokenizer, the model's configuration, examples, reports on rows."""
    objective = OBJECTIVES[config.loss]
    named = [name for name in as_list(config.data) if name in DATASETS]
    eval_sources = as_list(config.eval_data) or named
    load = functools.partial(data.load_rows, objective=objective, template=config.attribute_template,
                             may_lack_rewards=config.reward_model is not None)
    train_rows, train_report = load(config.data, "train")
    eval_rows, eval_report = load(eval_sources, "test")

    model_path = checkpoint or config.model
    tokenizer = trainers.load_tokenizer(checkpoint or config.tokenizer or config.model, train_rows, config)
    model_config, dropouts = trainers.load_model_config(model_path, config, tokenizer)
    end_ids = trainers.load_end_ids(model_path, model_config, tokenizer)

    judge = known_rewards(eval_sources)
    num_prompts = max(config.num_samples, judge.num_samples if judge else 0)
    num_prompts = 0 if objective.inputs == "scores" else num_prompts  # a reward model writes nothing
    limit = None if config.num_eval_examples is None else max(config.num_eval_examples, num_prompts)
    train_examples = data.encode(train_rows, train_report, tokenizer, config, end_ids)
    held_out = data.encode(eval_rows, eval_report, tokenizer, config, end_ids, limit)
    sample_examples = held_out[:num_prompts]
    reports = {"data": train_report, "eval data": eval_report}
    if config.sample_attributes:
        rows, reports["samples"] = load(eval_sources, "test", attributes=config.sample_attributes)
        sample_examples = data.encode(rows, reports["samples"], tokenizer, config, end_ids, num_prompts)
    if config.max_steps == 0 and not eval_sources:
        raise InputError("max_steps=0 only evaluates and samples, and there is nothing to: name eval_data")
    for key, report in (("data", train_report), ("eval_data", eval_report)):
        if not report.used and (eval_sources or key == "data"):
            raise InputError(f"{key} leaves no row to work with: " + "; ".join(report.lines()))
    return types.SimpleNamespace(
        tokenizer=tokenizer, model_config=model_config, dropouts=dropouts, end_ids=end_ids, judge=judge,
        train_examples=train_examples, eval_examples=held_out[:config.num_eval_examples],
        sample_examples=sample_examples, reports=reports)


# ---------------------------------------------------------------- config


class Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number and a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"the key {key} stands twice in one mapping: keep one of the two")
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads: quotes a text that looks like 1e-5, and repeats rather than refers."""

    def ignore_aliases(self, data):
        return True


for yaml_class in (Loader, Dumper):
    yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def load_config(arguments):
    """The config, a namespace with blocks as dicts, and the checkpoint to go on from, or None.

    A resumed run's config is its own with the arguments laid over it. Raises InputError for what is refused.
    """
    defaults, rules = read_schema()
    given = read_arguments(arguments, rules)
    config = as_namespace(defaults | given)
    checkpoint = None if config.dry_run and not config.resume else find_checkpoint(config)
    if checkpoint:
        saved = defaults | flatten(read_yaml(os.path.join(config.run_dir, "config.yaml")), rules)
        before, run_dir = as_namespace(saved), config.run_dir
        config = as_namespace(saved | given)
        config.run_dir = run_dir  # the folder may have been moved
        check_changes(before, config, given)
    check_config(config)
    return config, checkpoint


def read_arguments(arguments, rules):
    """{dotted key: value} of a command line's `key=value` and `--config file`, the later over the earlier."""
    given, arguments = {}, list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if argument == "--config" and arguments:
            given |= flatten(read_yaml(arguments.pop(0)), rules)
            continue
        key, equals, text = argument.partition("=")
        if not equals or key.startswith("-"):
            raise InputError(f"{argument!r} is not understood: settings are given as key=value, a file of "
                             "them as --config mine.yaml, and --help lists them")
        parent, _, name = key.partition(".")
        if name and rules.get(parent) == "mapping":
            given[parent] = given.get(parent, {}) | {name: parse(text, "")}
        else:
            given |= flatten({key: parse(text, rules.get(key, ""))}, rules)
    return given


def read_schema():
    """Defaults and rules of config.yaml, by dotted key; a rule is a comment up to its first period."""
    path = os.path.join(HERE, "config.yaml")
    rules, block = {}, ""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if match := re.match(r"( *)(\w+):(.*?)(?:# (.*?)\.(?:\s|$)|$)", line):
                indent, key, value, rule = match.groups()
                block = block if indent else "" if value.strip() else key + "."
                if value.strip():
                    rules[block + key] = rule or type(yaml.load(value, Loader)).__name__
    return flatten(read_yaml(path), rules), rules


def read_yaml(path, provenance=False):
    """The mapping in a file; the provenance that a run's own config.yaml adds only where it is asked for."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = load_yaml(file, f"config file {path}") or {}
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}") from error
    if not isinstance(settings, dict):
        raise InputError(f"config file {path} holds {type(settings).__name__}, not keys with values")
    return settings if provenance else {key: value for key, value in settings.items() if key != "provenance"}


def load_yaml(text, what):
    try:
        return yaml.load(text, Loader)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{what} is not YAML: {' '.join(str(error).split())}") from error


def parse(text, rule):
    """A command line's value: YAML, but text as it stands where text is allowed."""
    words = rule.split()
    literal = text == "null" or "bool" in words and isinstance(load_yaml(text, repr(text)), bool)
    if "str" in words and not literal and not ("list" in words and text.startswith("[")):
        return text
    return load_yaml(text, repr(text))


def flatten(settings, rules, prefix=""):
    """{dotted key: value} of nested settings. Raises InputError for an unknown key or a refused value."""
    flat = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in rules:
            if not any(fits(value, rule) for rule in rules[key].split(" or ")):
                raise InputError(f"{key}={value!r} is not allowed: it must be {rules[key]}")
            flat[key] = value
        elif isinstance(value, dict | types.NoneType) and any(known.startswith(key + ".") for known in rules):
            flat |= flatten(value or {}, rules, key + ".")
        else:
            near = difflib.get_close_matches(key, rules, 1, cutoff=0)
            raise InputError(f"{key} is no key of config.yaml; the nearest is {near[0]}")
    return flat


def fits(value, rule):
    """Whether value obeys one rule: `int >= 1`, `float in [0, 0.5)`, `str`, `null`, `linear | cosine`, ..."""
    if " | " in rule:
        return any(value is choice or value == choice and isinstance(value, str)
                   for choice in (yaml.load(word, Loader) for word in rule.split(" | ")))
    kind, _, bound = rule.partition(" ")
    if kind == "float" and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    kinds = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "mapping": dict,
             "null": type(None)}
    if type(value) is not kinds[kind]:
        return False
    if kind == "list":
        return len(value) > 0 and all(fits(item, bound.removeprefix("of ")) for item in value)
    if kind == "float" and not math.isfinite(value):
        return False
    if interval := re.fullmatch(r"in ([\[(])(.+), (.+)([\])])", bound):
        opening, low, high, closing = interval.groups()
        return (value >= float(low) if opening == "[" else value > float(low)) and (
            value <= float(high) if closing == "]" else value < float(high))
    sign, _, limit = bound.partition(" ")
    return not bound or (value >= float(limit) if sign == ">=" else value > float(limit))


def as_namespace(flat):
    """Flat settings as the config: blocks as dicts, local paths absolute and free of links."""
    config = types.SimpleNamespace()
    for key, value in flat.items():
        block, _, name = key.rpartition(".")
        if block:
            vars(config).setdefault(block, {})[name] = value
        else:
            setattr(config, key, value)
    config.exp_name = config.exp_name or config.loss
    config.run_dir = os.path.realpath(config.run_dir or os.path.join("runs", config.exp_name))
    for key in (*PATHS, "data", "eval_data"):
        value = getattr(config, key)
        setattr(config, key, [resolve(item) for item in value] if isinstance(value, list) else resolve(value))
    return config


def resolve(path):
    return path if path in (None, "tiny", *DATASETS) or not os.path.exists(path) else os.path.realpath(path)


def check_config(config):
    """What no single key's rule says. Raises InputError."""
    if config.loss not in OBJECTIVES:
        near = difflib.get_close_matches(config.loss, OBJECTIVES, 1, cutoff=0)
        raise InputError(f"loss={config.loss} is not one of {', '.join(OBJECTIVES)}; the nearest is "
                         f"{near[0]}")
    if config.truncation != "drop" and config.max_prompt_length >= config.max_length:
        raise InputError(f"max_length={config.max_length} leaves no room for a response after "
                         f"max_prompt_length={config.max_prompt_length}: raise the one or lower the other")
    if (config.compute_dtype, config.dtype) not in {(config.dtype,) * 2, ("bfloat16", "float32")}:
        raise InputError(f"compute_dtype={config.compute_dtype} does not go with dtype={config.dtype}: "
                         "make them equal, or compute in bfloat16 on float32 weights")
    for key in ("eval_every", "save_every"):
        every = getattr(config, key)
        if every > 1 and every % 1:
            raise InputError(f"{key}={every} is not allowed: it must be whole steps, or below 1 a fraction "
                             "of an epoch")
    objective = OBJECTIVES[config.loss]
    if objective.self_play and config.reference:
        raise InputError(f"reference={config.reference} does not go with loss={config.loss}, whose reference "
                         "is the policy at the start of each iteration: leave it out")
    if objective.needs_teacher and not config.reference:
        raise InputError(f"loss={config.loss} needs a teacher: name the model, with the same tokenizer, by "
                         "reference=")
    unread = [] if objective.needs_reference else ["reference"]
    unread += ["reward_model", "sample_attributes"] if objective.inputs == "scores" else []
    for key in unread:
        if value := getattr(config, key):
            raise InputError(f"{key}={value} is not read with loss={config.loss}: leave it out")
    if config.reward_model == "tiny":
        raise InputError("reward_model=tiny would judge at random: train one by loss=rm, and name its LATEST")
    block = getattr(config, config.loss, {})
    for name, value in block.items():
        if isinstance(value, list) and len(value) != block.get("iterations", 1):
            raise InputError(f"{config.loss}.{name}={value} is a list of {len(value)} where {config.loss}."
                             f"iterations={block.get('iterations', 1)}: give one number, or one for each")
    check_template(config)
    for key in PATHS:
        path = getattr(config, key) or ""
        is_local = path.count("/") > 1 or path.startswith((".", "~", "/")) or (
            "/" in path and os.path.isdir(path.split("/")[0]))
        if is_local and not os.path.exists(path):
            raise InputError(f"{key}={path}: there is no such folder; give one, a run's LATEST, or a hub id "
                             "org/name")
        whole = key == "tokenizer" or os.path.exists(os.path.join(path, "config.json"))
        if os.path.isdir(path) and not whole:
            is_run = os.path.exists(os.path.join(path, "LATEST"))
            raise InputError(f"{key}={path} is no model's folder, it has no config.json: "
                             + (f"{key}={path}/LATEST is one" if is_run else "give a folder that has"))
    if config.attention == "flex_attention" and not torch.cuda.is_available():
        raise InputError("attention=flex_attention has no backward on a CPU: choose sdpa or eager")
    cache = config.reference_cache
    if isinstance(cache, str) and os.path.lexists(cache) and not os.path.isdir(cache):
        raise InputError(f"reference_cache={cache} is no folder: name one, or set it to true or false")
    if config.compile and not torch.cuda.is_available() and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("compile=true needs a C++ compiler on a CPU, and there is no g++: install one, or "
                         "leave it out")
    parent = config.run_dir
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or config.run_dir == HERE:
        raise InputError(f"run_dir={config.run_dir} cannot be a run's folder, {parent} is in its place: "
                         "choose another run_dir or exp_name")
    trainers.check_optimizer(config)
    num_ranks, replicas = int(os.environ.get("WORLD_SIZE", 1)), config.fsdp["replicas"]
    if config.world_size and not config.dry_run:
        raise InputError(f"world_size={config.world_size} is for dry_run=true; torchrun --nproc_per_node "
                         "gives a run its devices")
    if num_ranks > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(f"WORLD_SIZE={num_ranks}, but nothing says where the first one is: start the run "
                         "by torchrun, or unset it")
    num_ranks = config.world_size or num_ranks
    if num_ranks % replicas:
        raise InputError(f"fsdp.replicas={replicas} does not divide the {num_ranks} devices: choose another")
    if config.fsdp["cpu_offload"] and not (torch.cuda.is_available() and num_ranks > 1 or config.dry_run):
        raise InputError("fsdp.cpu_offload=true takes shards of the weights off GPUs, and this run has none: "
                         "leave it out, or start it on several by torchrun")


def check_template(config):
    """Raises InputError if attribute_template is malformed or does not read sample_attributes."""
    template, given = config.attribute_template, config.sample_attributes
    fields = set(data.FIELD.findall(template or ""))
    if template is not None and ("prompt" not in fields or len(fields) == 1
                                 or set("{}") & set(data.FIELD.sub("", template))):
        raise InputError(f"attribute_template={template!r} must hold {{prompt}}, and {{attributes}} or an "
                         "attribute's name in braces, and no other braces")
    if {"prompt", "attributes"} & given.keys() or not all({name, "attributes"} & fields for name in given):
        raise InputError(f"sample_attributes={given} are not read by attribute_template={template!r}: name "
                         "them in it")


# ---------------------------------------------------------------- the run's folder


def find_checkpoint(config):
    """The checkpoint to go on from, or None for a fresh run. Raises InputError if that is not possible."""
    latest = os.path.join(config.run_dir, "LATEST")
    names = os.listdir(config.run_dir) if os.path.isdir(config.run_dir) else []
    traces = [name for name in names if re.fullmatch(r"config\.yaml|metrics\.jsonl|LATEST|step-\d+", name)]
    if config.resume is False and traces:
        how = "go on with it by resume=true" if "LATEST" in names else "start it over by resume=auto"
        raise InputError(f"{config.run_dir} holds a run already: {how}, or choose another run_dir or, where "
                         "that is not set, another exp_name")
    if config.resume is True and not os.path.lexists(latest):
        raise InputError(f"{config.run_dir} has no complete checkpoint to resume: resume=auto would start at "
                         "step 0 there")
    if config.resume is False or not os.path.lexists(latest):
        if "config.yaml" in names and not read_provenance(os.path.join(config.run_dir, "config.yaml")):
            raise InputError(f"{config.run_dir} has a config.yaml that no run wrote: choose another run_dir")
        return None
    trainers.read_counters(os.path.realpath(latest))
    return os.path.realpath(latest)


def check_changes(before, after, given):
    """Raises InputError if the settings given to a resumed run change what must stay."""
    free = ("num_epochs", "max_steps") if before.lr_schedule == "constant" else ()
    free = free[1:] if OBJECTIVES[before.loss].self_play else free  # earlier iterations are over
    for key in given:
        block, _, name = key.rpartition(".")
        old, new = (vars(config)[block][name] if block else vars(config)[key] for config in (before, after))
        if old != new and not MAY_CHANGE.fullmatch(key) and key not in free:
            raise InputError(f"{key} was {old} when this run began and cannot become {new}: leave it out, or "
                             "start a new run with another exp_name")


def load_reference(config, checkpoint, policy, tokenizer):
    """The frozen model that the config names, or else the policy's starting weights; in self-play those of
    the iteration, which a checkpoint holds."""
    path = config.reference or config.model
    if path == config.model and not checkpoint:
        return policy
    if OBJECTIVES[config.loss].self_play:
        path = os.path.join(config.run_dir, f"step-{trainers.read_counters(checkpoint)['first_step']:06d}")
    elif path == "tiny" and checkpoint:
        path = os.path.join(config.run_dir, "reference")
    return load_other("reference", path, config, tokenizer)


def load_other(key, path, config, tokenizer, head=None):
    """A frozen model beside the policy, with the same tokenizer; None without a path."""
    if path is None:
        return None
    if path != "tiny":
        trainers.check_same_tokenizer(key, path, tokenizer, config)
    model_config, _ = trainers.load_model_config(path, config, tokenizer)
    return trainers.load_model(path, model_config, config, tokenizer, head)


@trainers.refused_by_all
def lock_folder(config, checkpoint):
    """Makes the run's folder and keeps other processes out of it until this one ends, however it ends.

    Returns the lock, which its `with` releases; the first rank's is that of all.
    """
    if trainers.rank() > 0:
        return contextlib.nullcontext()
    os.makedirs(config.run_dir, exist_ok=True)
    lock = open(os.path.join(config.run_dir, ".lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise InputError(f"{config.run_dir} is in use by another process: wait for it, or choose another "
                         "exp_name") from error
    if find_checkpoint(config) != checkpoint:
        lock.close()
        raise InputError(f"another process has written to {config.run_dir} meanwhile: start again")
    return lock


def write_start(trainer):
    """Starts wandb, writes config.yaml, and keeps the weights of a reference that came from no folder."""
    config = trainer.config
    path = os.path.join(config.run_dir, "config.yaml")
    packages = ("torch", "transformers", "datasets", "tokenizers", "numpy")
    code = {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain")),
            "versions": {name: importlib.metadata.version(name) for name in packages}}
    fresh = trainer.saved_step is None
    config.provenance = {"run_id": secrets.token_hex(6), **code, "resumed": []}
    if not fresh:  # what the run began with stays
        config.provenance |= read_provenance(path)
        config.provenance["resumed"].append({"step": trainer.step, **code})
    trainer.start_wandb()
    if trainers.rank() == 0:
        with open(path + ".partial", "w", encoding="utf-8") as file:
            yaml.dump(vars(config), file, Dumper, sort_keys=False, allow_unicode=True)
        os.replace(path + ".partial", path)
    kept = trainer.objective.self_play  # step-000000 holds the weights
    if fresh and trainer.reference and not kept and (config.reference or config.model) == "tiny":
        trainer.save_reference()


def read_provenance(path):
    """What a run's config.yaml says of the code that it began with; none if it is not a run's."""
    return read_yaml(path, provenance=True).get("provenance") or {}


def git(*arguments):
    """What git prints in this clone, or None where there is neither."""
    try:
        done = subprocess.run(["git", "-C", HERE, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# ---------------------------------------------------------------- what the person sees


def known_rewards(sources):
    """The Dataset whose true rewards judge the samples: that of all sources, if it is one and has them."""
    found = {DATASETS.get(name) for name in sources}
    dataset = found.pop() if len(found) == 1 else None
    return dataset if dataset and dataset.scores else None


def print_summary(trainer, dropouts, reports):
    config = trainer.config
    policy, block = trainer.policy, getattr(config, config.loss, {})
    num_parameters = sum(parameter.numel() for parameter in policy.parameters())
    num_tokens = sum(example.num_tokens for example in trainer.data_examples)
    resumed = trainer.saved_step is not None
    lines = [("run", config.run_dir + (f", going on after step {trainer.step}" if resumed else "")),
             ("model", f"{config.model}, {policy.config.model_type}, {num_parameters:,} parameters in "
                       f"{config.dtype} on {policy.device}")]
    if trainers.num_ranks() > 1:
        replicas, num_ranks = config.fsdp["replicas"], trainers.num_ranks()
        idle = max(0, num_ranks - config.batch_size)
        lines.append(("devices", f"{num_ranks}, with {replicas} x {num_ranks // replicas} shards of the model"
                      + (f"; batch_size={config.batch_size} leaves {idle} of them idle" if idle else "")))
    lines += [("", f"  {name} was {value}, set to 0") for name, value in dropouts.items()]
    if trainer.reference:
        own = "the policy at each iteration's start" if trainer.objective.self_play else (
            "the model's starting weights")
        lines.append(("reference", config.reference or own))
    if trainer.reward_model:
        lines.append(("rewards", config.reward_model))
    settings = (name + "=" + json.dumps(value).strip('"') for name, value in block.items())
    lines.append(("loss", " ".join([config.loss, *settings])))
    for name, report in reports.items():
        first, *rest = report.lines() if report.rows else ["none, so no evaluation; eval_data= names one"]
        lines += [(name, first), *(("", line) for line in rest)]
    at_most = "at most " if trainer.objective.self_play else ""
    lines.append(("steps", f"{at_most}{trainer.num_steps:,} of {config.batch_size} examples; {num_tokens:,} "
                           "tokens in the data"))
    tokenizer = trainer.tokenizer
    if not config.add_bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        lines.append(("note", f"the tokenizer begins texts with {tokenizer.bos_token}, but this run's "
                              "prompts do not; if the model was trained so, set add_bos=true"))
    for name, text in lines:
        print(f"{name:<10} {text}")


def print_dry_run(config, checkpoint):
    """What each device would hold, how many tokens and steps there are, and how large a checkpoint is."""
    inputs, mode, objective = load_inputs(config, checkpoint), FakeTensorMode(), OBJECTIVES[config.loss]
    num_devices, replicas = config.world_size or int(os.environ.get("WORLD_SIZE", 1)), config.fsdp["replicas"]
    computing = types.SimpleNamespace(
        **vars(config) | {"dtype": config.compute_dtype, "activation_checkpointing": False})
    head = "new scores" if objective.inputs == "scores" else None
    models = [trainers.load_model(checkpoint or config.model, inputs.model_config, settings, inputs.tokenizer,
                                  head, mode) for settings in (config, computing)]
    examples, parts = inputs.train_examples, config.gradient_accumulation_steps
    num_tokens, length = sum(x.num_tokens for x in examples), max(x.row_length for x in examples)
    share = num_tokens / len(examples) * config.batch_size / num_devices  # a device's tokens in a step
    budget = config.max_tokens_per_microbatch or 2**14  # a GPU's
    count, num_rows = max(parts, math.ceil(share / budget)), round(min(budget, share / parts) / length)
    num_rows = max(1, num_rows)
    held = trainers.estimate_memory(*models, mode, config, num_devices, num_rows, length, count)
    saved = held.pop("checkpoint")
    lines = [("model", f"{config.model}, {inputs.model_config.model_type}, "
                       f"{sum(x.numel() for x in models[0].parameters()):,} parameters in {config.dtype}, "
                       f"computing in {config.compute_dtype}"),
             ("devices", f"{num_devices}, with {replicas} x {num_devices // replicas} shards of it; on each")]
    in_host = {"weights", "gradients", "optimizer state"} if config.fsdp["cpu_offload"] else set()
    lines += [("", f"{size / 2**20:>12,.1f} MiB  {name}{' (in the host)' if name in in_host else ''}")
              for name, size in held.items()]
    in_all = sum(size for name, size in held.items() if name not in in_host)
    lines += [("", f"{in_all / 2**20:>12,.1f} MiB  in all, with microbatches of {num_rows:,} x "
                   f"{length:,} tokens")]
    if objective.needs_reference:
        leaves = config.reference_cache and objective.inputs == "logps" and not objective.self_play
        lines += [("", f"{held['weights'] / 2**20:>12,.1f} MiB  more for a reference as large, "
                       + ("until its numbers are known" if leaves else "which stays"))]
    lines += [("data", f"{len(examples):,} rows and {num_tokens:,} tokens, "
                       f"{math.ceil(len(examples) / config.batch_size):,} steps an epoch; on a device "
                       f"{count:,} microbatches a step"),
              ("checkpoint", f"{saved / 2**20:,.1f} MiB")]
    for name, text in lines:
        print(f"{name:<10} {text}")


def print_results(trainer):
    """First and last evaluation (or training step) side by side, the checkpoint, and what to run next."""
    config, records = trainer.config, trainer.lines("metrics.jsonl")
    for split, title in (("eval", "evaluation"), ("train", "training")):
        lines = [line for line in records if line["split"] == split]
        if lines:
            shown = lines if len(lines) == 1 else [lines[0], lines[-1]]
            print(f"\n{title:<30}" + "".join(f"{'step ' + str(line['step']):>14}" for line in shown))
            for name in list(shown[-1])[4:]:  # the first four say where, not what
                values = (line.get(name) for line in shown)
                cells = ("-" if value is None else f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
                         for value in values)
                print(f"{name:<30}" + "".join(f"{cell:>14}" for cell in cells))
            break
    if not trainer.saved_step:
        return
    latest = os.path.join(os.path.relpath(config.run_dir), "LATEST")
    print(f"\ncheckpoint  {latest} -> step-{trainer.saved_step:06d}")
    sources = shlex.quote(config.data if isinstance(config.data, str) else f"[{','.join(config.data)}]")
    shortest = min(trainer.data_examples, key=lambda example: len(example.prompt))
    prompt = trainer.tokenizer.decode(shortest.prompt)
    if trainer.objective.inputs == "scores":
        text = json.dumps(prompt + trainer.tokenizer.decode(shortest.responses[0]))
        code = ("from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T; "
                f"path = {json.dumps(latest)}; ids = T.from_pretrained(path)({text}, return_tensors='pt'); "
                "print(M.from_pretrained(path)(**ids).logits.item())")
        print("next        python -c " + shlex.quote(code))
    elif trainer.objective.needs_pairs or trainer.objective.needs_reference:
        answer = f'pipeline("text-generation", {json.dumps(latest)})({json.dumps(prompt)})'
        code = f'from transformers import pipeline; print({answer}[0]["generated_text"])'
        print("next        python -c " + shlex.quote(code))
    else:
        following = next(name for name, objective in OBJECTIVES.items()
                         if objective.reads_pairs and objective.needs_reference)
        settings = f"lr=2e-4 num_epochs=1 {following}.beta=1 {following}.sft_weight=0.05"  # the README's
        if config.data != "toy":
            settings = f"lr=5e-7 lr_schedule=constant data={sources}"
        print(f"next        python train.py loss={following} model={shlex.quote(latest)} {settings}")


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__)
        with open(os.path.join(HERE, "config.yaml"), encoding="utf-8") as schema:
            print(schema.read(), end="")
        sys.exit(0)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():  # a log file wants no progress bars
        transformers.logging.disable_progress_bar()
    try:
        status = main(sys.argv[1:])
    except InputError as refused:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
            print(f"error: {refused}", file=sys.stderr)
        status = 2
    trainers.leave_ranks()
    sys.exit(status)
