"""What can be set, and what is allowed? config.yaml is the only schema; without torch, to refuse at once."""

import copy
import difflib
import functools
import glob
import importlib.util
import math
import os
import re
import types

import yaml

from engine import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCHEMA = os.path.join(ROOT, "config.yaml")
PATHS = ("model", "reference", "tokenizer", "reward_model")  # keys that name a folder or a hub id
CACHE = "runs/reference_cache"  # the folder of reference_cache=true
FIELD = re.compile(r"\{([^{}]+)\}")  # in a prompt_template
FORMER = {"attribute_template": "prompt_template"}
ELSEWHERE = {  # names of the same things in transformers, TRL and NeMo-Aligner
    "learning_rate": "lr", "weight_decay": "optimizer_args.weight_decay", "optim": "optimizer",
    "epochs": "num_epochs", "num_train_epochs": "num_epochs", "max_epochs": "num_epochs",
    "beta": "dpo.beta, ipo.beta or that of another loss", "label_smoothing": "dpo.label_smoothing",
    "loss_type": "loss", "model_name_or_path": "model", "model_name": "model", "ref_model": "reference",
    "train_batch_size": "batch_size, of all devices together", "global_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size, of all devices together",
    "per_device_eval_batch_size": "eval_batch_size",
    "micro_batch_size": "max_tokens_per_microbatch, in tokens",
    "warmup_ratio": "warmup_steps, below 1 a fraction", "lr_scheduler_type": "lr_schedule",
    "max_seq_length": "max_length", "output_dir": "run_dir", "dataset": "data", "dataset_name": "data",
    "eval_steps": "eval_every", "save_steps": "save_every", "logging_steps": "log_every",
    "save_total_limit": "keep_checkpoints", "load_best_model_at_end": "keep_best",
    "metric_for_best_model": "keep_best", "eval_strategy": "eval_every",
    "max_completion_length": "max_length",
    "rpo_alpha": "dpo.sft_weight", "precompute_ref_log_probs": "reference_cache", "use_peft": "lora.rank",
    "lora_r": "lora.rank", "lora_alpha": "lora.alpha", "lora_target_modules": "lora.targets",
    "gradient_checkpointing": "activation_checkpointing", "gradient_clip_val": "max_grad_norm",
    "max_time": "max_hours", "bf16": "compute_dtype=bfloat16", "report_to": "wandb"}
MAY_CHANGE = re.compile(  # in a resumed run; num_epochs and max_steps too while the learning rate is constant
    "exp_name|run_dir|resume|trust_remote_code|max_hours|eval_.*|num_eval_examples|num_samples|sample_.*|"
    "save_every|log_every|keep_checkpoints|keep_best|wandb.*|gradient_accumulation_steps|"
    "max_tokens_per_microbatch|attention|check_first_batch|activation_checkpointing|compile|layout|"
    r"reference_cache|fsdp\..*|async_save|dry_run|world_size")


class Loader(yaml.SafeLoader):
    """YAML in which numbers are decimal (010, 1_000, 23:30 are text) and a key given twice is an error."""

    yaml_implicit_resolvers = {first: [kind for kind in kinds if not kind[0].endswith((":int", ":float"))]
                               for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()}

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


NUMBERS = {"int": "0|[1-9][0-9]*",
           "float": r"((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|\.inf|\.nan"}
for yaml_class in (Loader, Dumper):
    for kind, form in NUMBERS.items():  # the first that fits
        yaml_class.add_implicit_resolver(
            f"tag:yaml.org,2002:{kind}", re.compile(f"[-+]?({form})$"), list("-+.0123456789"))


# ---------------------------------------------------------------- from text to values


def read_arguments(arguments: list[str]) -> dict:
    """{dotted key: value} of a command line's `key=value` and `--config file`, the later over the earlier.

    Raises InputError for an unknown key or a value of the wrong type or out of range.
    """
    _, rules = read_schema()
    given, arguments = {}, list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if argument == "--config" and arguments:
            argument = f"--config={arguments.pop(0)}"
        if argument.startswith("--config="):
            given |= flatten(read_yaml(argument.partition("=")[2]), rules)
            continue
        key, equals, text = argument.partition("=")
        if not equals or key.startswith("-"):
            raise InputError(f"{argument!r} is not understood: settings are given as key=value, a file of "
                             "them as --config mine.yaml, and --help lists them")
        parent, _, name = key.partition(".")
        if name and rules.get(parent) == "mapping":
            given[parent] = given.get(parent, {}) | {name: parse(text, "")}
        else:
            given |= flatten({key: parse(text, rules.get(FORMER.get(key, key), ""))}, rules)
    name = given.get("exp_name") or ""
    if {*name} & {"/", "\0"} or name in (".", "..") or len(name.encode(errors="replace")) > 100:
        raise InputError(f"exp_name={name!r} names no folder in runs: give one name of at most 100 bytes, "
                         "without /, or a place of your own by run_dir=")
    return given


@functools.cache
def read_schema():
    """Defaults and rules of config.yaml, by dotted key; a rule is a comment up to its first period."""
    rules, block = {}, ""
    with open(SCHEMA, encoding="utf-8") as file:
        for line in file:
            if match := re.match(r"( *)(\w+):(.*?)(?:# (.*?)\.(?:\s|$)|$)", line):
                indent, key, value, rule = match.groups()
                block = block if indent else "" if value.strip() else key + "."
                if value.strip():
                    rules[block + key] = rule or type(yaml.load(value, Loader)).__name__.replace("dict", "{}")
    return flatten(read_yaml(SCHEMA), rules), rules


def read_yaml(path, provenance=False):
    """The mapping in a file. Of a run's own config.yaml, unless its provenance is asked for, without that and
    without what belongs to that run alone."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = load_yaml(file, f"config file {path}") or {}
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}") from error
    if not isinstance(settings, dict):
        raise InputError(f"config file {path} holds {type(settings).__name__}, not keys with values")
    own = () if provenance or "provenance" not in settings else (
        "provenance", "run_dir", "resume", "trust_remote_code")  # to run code nobody else can allow
    for key in ("eval_every", "save_every") if own else ():
        if isinstance(every := settings.get(key), float) and every % 1 == 0 and every != 1:
            settings[key] = int(every)  # as runs wrote it when 2.0 was two steps
    return {key: value for key, value in settings.items() if key not in own}


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
        if key in FORMER and value is None:
            continue  # as a run's config.yaml had it
        if key in FORMER:
            raise InputError(f"{key} is called {FORMER[key]} now: give it under that name")
        if key in rules:
            if not any(fits(value, rule) for rule in rules[key].split(" or ")):
                raise InputError(f"{key}={value!r} is not allowed: it must be {rules[key]}")
            own = {key: value}
        elif block := [known for known in rules if known.startswith(key + ".")]:
            if not isinstance(value, dict | None):
                raise InputError(f"{key}={value!r} is not allowed: {key} is a block with keys of its own, "
                                 + ", ".join(block))
            own = flatten(value or {}, rules, key + ".")
        else:
            own = f"; here it is {ELSEWHERE[key]}" if key in ELSEWHERE else ""
            raise InputError(f"{key} is no key of config.yaml"
                             + (own or nearest(key, rules, ": --help lists them")))
        for twice in own.keys() & flat.keys():
            raise InputError(f"{twice} stands twice, dotted and in its block: keep one of the two")
        flat |= own
    return flat


def nearest(word, words, otherwise=""):
    """What is said of the word that was probably meant, if there is one."""
    near = difflib.get_close_matches(word.lower(), words, 1)
    return f"; the nearest is {near[0]}" if near else otherwise


def fits(value, rule):
    """Whether value obeys one rule: `int >= 1`, `float in [0, 0.5)`, `str`, `null`, `linear | cosine`, ..."""
    if " | " in rule:
        return any(value is choice or value == choice and isinstance(value, str)
                   for choice in (yaml.load(word, Loader) for word in rule.split(" | ")))
    kind, _, bound = rule.partition(" ")
    if kind == "float" and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    kinds = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "mapping": dict, "{}": dict,
             "null": type(None)}
    if type(value) is not kinds[kind] or kind == "{}" and value:
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


def as_namespace(flat, datasets):
    """Flat settings over the defaults as the config: blocks as dicts, local paths absolute, free of links.

    datasets: names that are no paths.
    """
    def resolve(path):
        if path in (None, "tiny", *datasets) or not (os.path.exists(path) or glob.glob(path)):
            return path
        folder, name = os.path.split(path)  # a file keeps its name: the hub's cache has links to others
        is_file = os.path.isfile(path)
        return os.path.join(os.path.realpath(folder), name) if is_file else os.path.realpath(path)

    config = types.SimpleNamespace()
    defaults, _ = read_schema()
    for key, value in copy.deepcopy(defaults | flat).items():
        block, _, name = key.rpartition(".")
        if block:
            vars(config).setdefault(block, {})[name] = value
        else:
            setattr(config, key, value)
    config.exp_name = config.exp_name or config.loss
    config.run_dir = os.path.realpath(os.path.expanduser(
        config.run_dir or os.path.join("runs", config.exp_name)))
    for key in (*PATHS, "data", "eval_data"):
        value = getattr(config, key)
        setattr(config, key, [resolve(item) for item in value] if isinstance(value, list) else resolve(value))
    return config


def as_flat(config):
    """{dotted key: value} of a config."""
    flat = {}
    for key, value in vars(config).items():
        is_block = isinstance(value, dict) and key not in read_schema()[1]
        flat |= {f"{key}.{name}": x for name, x in value.items()} if is_block else {key: value}
    return flat


def as_list(value):
    return [] if value is None else [value] if isinstance(value, str) else value


# ---------------------------------------------------------------- what no single key's rule says


def check_config(config, objectives, knows_base=False):
    """Raises InputError for settings that do not go together; objectives: the table of losses. knows_base: a
    run goes on whose adapters say where their base is, and its model may be gone."""
    if config.loss not in objectives:
        raise InputError(f"loss={config.loss} is not one of {', '.join(objectives)}"
                         + nearest(config.loss, objectives))
    if config.truncation != "drop" and config.max_prompt_length >= config.max_length:
        raise InputError(f"max_length={config.max_length} leaves no room for a response after "
                         f"max_prompt_length={config.max_prompt_length}: raise the one or lower the other")
    if (config.compute_dtype, config.dtype) not in {(config.dtype,) * 2, ("bfloat16", "float32")}:
        raise InputError(f"compute_dtype={config.compute_dtype} does not go with dtype={config.dtype}: "
                         "make them equal, or compute in bfloat16 on float32 weights")
    if config.wandb != "disabled" and not getattr(importlib.util.find_spec("wandb"), "origin", None):
        raise InputError(f"wandb={config.wandb} needs the wandb library: pip install wandb")
    if config.keep_best and config.eval_every == 0:
        raise InputError(f"keep_best={config.keep_best} needs evaluations, which eval_every=0 has not: "
                         "set it")
    if config.min_lr and config.lr_schedule == "constant":
        raise InputError(f"min_lr={config.min_lr} is not read with lr_schedule=constant: leave it out, or "
                         "choose linear or cosine")
    block = getattr(config, config.loss, {})
    highest = block.get("lr") or config.lr
    if config.min_lr > min(highest if isinstance(highest, list) else [highest]):
        raise InputError(f"min_lr={config.min_lr} is above the rate from which it is reached, {highest}: "
                         "lower it")
    if (rewards := block.get("default_rewards")) and (len(rewards) != 2 or config.reward_model):
        raise InputError(f"{config.loss}.default_rewards={rewards} must be two numbers, as [1,0], and goes "
                         "without reward_model, which gives rewards too")
    is_self_play = objectives[config.loss].self_play
    for name, value in block.items():
        if is_self_play and isinstance(value, list) and len(value) != block.get("iterations", 1):
            raise InputError(f"{config.loss}.{name}={value} is a list of {len(value)} where {config.loss}."
                             f"iterations={block.get('iterations', 1)}: give one number, or one for each")
    check_models(config, objectives[config.loss])
    check_template(config)
    check_folders(config, objectives[config.loss], PATHS[knows_base:])  # the model is the first


def check_typed(arguments, config, objectives):
    """Raises InputError for a key of another loss's block on the command line; in a file they may stand."""
    read = {config.loss, objectives[config.loss].evaluated_as}
    for before, argument in zip(["", *arguments], arguments):
        key = argument.partition("=")[0]
        block = key.partition(".")[0]
        if block in objectives and block not in read and before != "--config":
            raise InputError(f"{key} is not read with loss={config.loss}: leave it out, or give loss={block}")


def check_models(config, objective):
    """Raises InputError where the models that are named are not those that the loss reads."""
    if objective.in_stages and config.reference:
        raise InputError(f"reference={config.reference} does not go with loss={config.loss}, whose reference "
                         "is the policy at the start of each iteration: leave it out")
    if objective.needs_teacher and not config.reference:
        raise InputError(f"loss={config.loss} needs a teacher: name one of the same tokenizer by reference=")
    if config.lora["rank"] and objective.moves_reference and not objective.in_stages:
        raise InputError(f"loss={config.loss} moves its reference, which adapters share with the policy: "
                         "set lora.rank=0")
    if config.lora["base_dtype"] == "bfloat16" != config.compute_dtype and config.lora["rank"]:
        raise InputError("lora.base_dtype=bfloat16 computes in bfloat16: set compute_dtype=bfloat16")
    if config.lora["base_dtype"] == "float32" != config.dtype and config.lora["rank"]:
        raise InputError(f"lora.base_dtype=float32 does not go with dtype={config.dtype}: leave it out")
    defaults, _ = read_schema()
    for name, value in config.lora.items() if not config.lora["rank"] else ():
        if value != defaults[f"lora.{name}"]:
            raise InputError(f"lora.{name}={value} is not read with lora.rank=0: set a rank, or leave it out")
    unread = [] if objective.needs_reference else ["reference"]
    unread += ["reward_model", "sample_attributes"] if objective.inputs == "scores" else []
    for key in unread:
        if value := getattr(config, key):
            raise InputError(f"{key}={value} is not read with loss={config.loss}: leave it out")
    if config.reward_model == "tiny":
        raise InputError("reward_model=tiny would judge at random: train one by loss=rm, and name its LATEST")


def check_template(config):
    """Raises InputError if prompt_template is malformed or does not read sample_attributes."""
    template, given = config.prompt_template, config.sample_attributes
    fields = set(FIELD.findall(template or ""))
    if template is not None and set("{}") & set(FIELD.sub("", template)):
        raise InputError(f"prompt_template={template!r} has braces that hold no name: each pair must hold a "
                         "column, an attribute, attributes or prompt")
    if {"prompt", "attributes"} & given.keys() or not all({name, "attributes"} & fields for name in given):
        raise InputError(f"sample_attributes={given} are not read by prompt_template={template!r}: name "
                         "them in it")


def check_folders(config, objective, keys):
    """Raises InputError for a path that cannot be what its key says, before it costs any time."""
    for key in keys:
        path = getattr(config, key) or ""
        if not os.path.exists(path) and (path.startswith((".", "~", "/")) or path.count("/") > 1
                                         or "/" in path and os.path.isdir(path.split("/")[0])):
            raise InputError(f"{key}={path}: there is no such folder; give one, or a hub id org/name")
        if os.path.isdir(path) and key != "tokenizer" and "config.json" not in os.listdir(path):
            is_run = os.path.exists(os.path.join(path, "LATEST"))
            raise InputError(f"{key}={path} is no model's folder, it has no config.json: "
                             + (f"{key}={path}/LATEST is one" if is_run else "give a folder that has"))
    cache = config.reference_cache
    cache = CACHE if cache is True and objective.needs_reference else cache
    if isinstance(cache, str) and not os.access(existing(cache) + "/", os.W_OK):
        raise InputError(f"reference_cache={cache} cannot be written, {existing(cache)} is in its way: name "
                         "another folder, or set it to false")
    parent = existing(config.run_dir)
    if not os.path.isdir(parent) or config.run_dir == ROOT:
        raise InputError(f"run_dir={config.run_dir} cannot be a run's folder, {parent} is in its place: "
                         "choose another run_dir or exp_name")


def existing(path):
    """A path, or where there is nothing the nearest above that exists."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def may_change(key, before, objective):
    """Whether a resumed run may have another value of a key. before: its config."""
    is_open = before.lr_schedule == "constant" and not isinstance(before.warmup_steps, float)
    free = ("num_epochs", "max_steps") if is_open else ()
    free = free[1:] if objective.self_play else free  # iterations are over
    return bool(MAY_CHANGE.fullmatch(key)) or key in free


def check_kept(named, own, kept, before, objective):
    """Raises InputError where a run's config.yaml is not what the run was saved with.

    named: the keys that it names. own, kept: {dotted key: value}, the file's and those that were saved.
    """
    for key, value in kept.items():
        if not may_change(key, before, objective) and (key not in named or own[key] != value):
            found = f"is {own[key]!r} in it" if key in named else "is missing in it"
            raise InputError(f"config.yaml is not what the run began with, {key} {found} and was {value!r}: "
                             "put it back")


def check_changes(before, after, given, objective):
    """Raises InputError if the settings given to a resumed run change what must stay."""
    for key in given:
        block, _, name = key.rpartition(".")
        old, new = (vars(config)[block][name] if block else vars(config)[key] for config in (before, after))
        if old != new and not may_change(key, before, objective):
            first = before.reference or before.model
            first = os.path.join(after.run_dir, "reference") if first == "tiny" else first
            stays = objective.needs_reference and not objective.in_stages
            raise InputError(f"{key} was {old} when this run began and cannot become {new}: leave it out, or "
                             f"start a new run, by another exp_name and model={after.run_dir}/LATEST"
                             + f", and reference={first} to stay near that" * stays)
