"""What is printed? What became of the rows, the summary, progress, samples, failures, the closing table."""

import hashlib
import itertools
import json
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.distributed import device, from_all, num_ranks, rank

SECONDS_PER_LINE = 30  # where nobody watches a bar
EVAL_NAMES = {  # on the console, with how they are written
    "loss": ("loss", ".3f"), "rewards/accuracies": ("accuracy", ".3f"), "rewards/margins": ("margin", ".2f"),
    "samples/kl": ("KL", ".2f"), "samples/reward": ("reward", ".2f")}
TRAIN_NAMES = {
    "loss": ("loss", ".3f"), "rewards/accuracies": ("accuracy", ".2f"), "grad_norm": ("grad_norm", ".2f"),
    "lr": ("lr", ".1e"), "mfu": ("mfu", ".3f"), "memory_gb": ("memory_gb", ".1f")}

# Columns that look like data.
UNREAD = ("history", "context", "system", "tools", "images", "image", "videos", "video", "audios", "audio",
          "documents", "instruction", "input", "question", "query", "definition", "attributes")


@dataclass
class Report:
    """What became of rows: how many were used, cut, and dropped, by reason and with places; and notes."""

    rows: int = 0
    what: str = "rows"
    used: int = 0
    cut: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> places ("train.jsonl line 87")
    notes: Counter = field(default_factory=Counter)  # what is said of rows -> how many
    digest: Any = field(default_factory=hashlib.sha256)  # of the texts of the rows that could be read

    def drop(self, reason, where):
        self.dropped.setdefault(str(reason), []).append(where)

    def note(self, what):
        self.notes[what] += 1

    def note_unread(self, row: dict, read):
        """Notes columns of a dataset's row that look like data, have a value, and are not read."""
        for name in UNREAD:
            if name not in read and row.get(name) not in (None, "", [], {}):
                self.note(f"have a column {name}, which is not read")

    def lines(self):
        """The report as lines of text, for the summary."""
        num_dropped = sum(map(len, self.dropped.values()))
        unread = self.rows - self.used - num_dropped
        yield (f"{self.used:,} of {self.rows:,} {self.what} used, {num_dropped:,} dropped, "
               f"{self.cut:,} cut to fit" + (f", {unread:,} beyond what was asked for" if unread else ""))
        for reason, places in self.dropped.items():
            more = f" and {len(places) - 5:,} more" if len(places) > 5 else ""
            yield f"  dropped {len(places):,}: {reason} ({', '.join(places[:5])}{more})"
        for what, number in self.notes.items():
            yield f"  {number:,} rows {what}"


def frozen_part(model, config):
    """What of a model does not learn, for a line about it."""
    frozen = sum(x.numel() for x in model.parameters() if not x.requires_grad)
    base_dtype = config.lora["base_dtype"] or config.dtype
    return f", of which {frozen:,} are frozen, in {base_dtype}" if config.lora["rank"] else ""


def print_summary(config, objective, run_data, policy, num_steps, resumed_at=None):
    """What a run is about to do, before its first step; resumed_at: the step that it goes on after."""
    num_parameters = sum(parameter.numel() for parameter in policy.parameters())
    num_tokens = sum(example.num_tokens for example in run_data.train_examples)
    going_on = "" if resumed_at is None else f", going on after step {resumed_at}"
    lines = [("run", config.run_dir + going_on),
             ("model", f"{config.model}, {policy.config.model_type}, {num_parameters:,} parameters in "
                       f"{config.dtype} on {policy.device}{frozen_part(policy, config)}")]
    if num_ranks() > 1:
        replicas = config.fsdp["replicas"]
        lines.append(("devices", f"{num_ranks()}, with {replicas} x {num_ranks() // replicas} shards"))
    lines += [("", f"  {name} was {value}, set to 0") for name, value in run_data.dropouts.items()]
    if objective.needs_reference:
        own = "the policy at each iteration's start" if objective.in_stages else (
            "the model's starting weights")
        moves = objective.moves_reference and not objective.in_stages
        lines.append(("reference", (config.reference or own)
                      + ", and moves; samples/kl is measured from where it begins" * moves))
    if config.reward_model:
        lines.append(("rewards", config.reward_model))
    block = getattr(config, config.loss, {})
    settings = (name + "=" + json.dumps(value).strip('"') for name, value in block.items())
    lines.append(("loss", " ".join([config.loss, *settings])))
    for name, report in run_data.reports.items():
        if name == "samples" and not report.rows:
            continue
        first, *rest = report.lines() if report.rows else ["none, so no evaluation; eval_data= names one"]
        lines += [(name, first), *(("", line) for line in rest)]
    at_most = "at most " if objective.self_play else ""
    lines.append(("steps", f"{at_most}{num_steps:,} of {config.batch_size} examples; {num_tokens:,} tokens "
                           "in the data"))
    lines += [("lengths", describe_lengths(run_data.train_examples)),
              ("first", mark_answers(run_data.train_examples[0], run_data.tokenizer)),
              *(("note", note) for note in notes_of(config, run_data, num_steps))]
    print_lines(lines)


def notes_of(config, run_data, num_steps):
    """What is to be said of a slow setting, a long warmup, and prompts that are probably not what the model
    knows."""
    if config.warmup_steps >= num_steps > 0:
        yield (f"the run ends within its warmup of {config.warmup_steps} steps, and never reaches lr="
               f"{config.lr}; warmup_steps=0.1 warms up over a tenth of it")
    if device().type == "cuda" and config.compute_dtype == "float32":
        yield "compute_dtype=bfloat16 is much faster on a GPU; weights stay float32"
    tokenizer, begin = run_data.tokenizer, run_data.tokenizer.bos_token_id
    if run_data.train_examples[0].prompt[0] != begin and tokenizer("a")["input_ids"][:1] == [begin]:
        yield (f"the tokenizer begins texts with {tokenizer.bos_token}, but this run's prompts do not; if "
               "the model was trained so, set add_bos=true")
    path = os.path.join(config.model, "trainer_state", "state.json")
    if os.path.isfile(path):
        with open(path) as file:
            state = json.load(file)
        before = state.get("config", state).get("prompt_template", config.prompt_template)
        if before != config.prompt_template:
            yield f"the model was trained with prompt_template={before!r}, and this run has another"


def describe_lengths(examples):
    """Median, 95% quantile and maximum of the tokens of rows, and of those that count of each response."""
    parts = {"rows of": [example.row_length for example in examples],
             "of a response count": [length for example in examples for length in example.lengths]}
    return "; ".join(f"{name} " + ", ".join(f"{x:,.0f}" for x in np.quantile(lengths, (0.5, 0.95, 1)))
                     for name, lengths in parts.items()) + " tokens (median, 95% below, longest)"


def mark_answers(example, tokenizer):
    """The example with its first response as text, [[what counts]] in brackets, long parts without middle."""
    weights = np.append(np.zeros(len(example.prompt)), example.weights(0))
    ids, at, parts = np.append(example.prompt, example.responses[0]), 0, []
    for counts, group in itertools.groupby(weights > 0):
        length = len([*group])
        text = json.dumps(tokenizer.decode(ids[at:at + length]), ensure_ascii=False)[1:-1]
        text = f"{text[:100]} ... {text[-100:]}" if len(text) > 250 else text
        parts.append(f"[[{text}]]" if counts else text)
        at += length
    return "".join(parts)


def print_lines(lines):
    for name, text in lines:
        print(f"{name:<10} {text}")


class Lines:
    """Where a bar goes that nobody watches: each of its states on a line."""

    def write(self, text):
        if text.strip():
            print(text.strip(), flush=True)

    def flush(self):
        pass


def progress(what, title, leave=False, **options):
    """tqdm's bar, on the first rank; where nobody looks, if it has a title a line every 30 seconds."""
    is_watched = sys.stderr.isatty()
    if title and not is_watched:
        options |= {"file": Lines(), "bar_format": "{desc}  {n_fmt}/{total_fmt}  {elapsed} gone",
                    "delay": SECONDS_PER_LINE, "mininterval": SECONDS_PER_LINE, "miniters": 1}
    is_hidden = rank() > 0 or not (title or is_watched)
    return tqdm(what, desc=title or None, leave=leave, disable=is_hidden, **options)


class Progress:
    """How far training is: a bar where somebody looks, elsewhere a line every 30 seconds."""

    def __init__(self, num_steps, step):
        self.bar = progress(None, "", leave=True, total=num_steps, initial=step, unit="step")
        self.rate = self.first = None
        self.started = time.monotonic()
        self.next_line = self.started + SECONDS_PER_LINE

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def advance(self, step, num_steps, metrics):
        """After this step of so many, with what its metrics are."""
        self.rate = metrics.get("tokens_per_second", self.rate)  # of the last step that was logged
        shown = describe(metrics, TRAIN_NAMES)
        self.bar.total = num_steps
        self.bar.set_postfix_str("  ".join(shown), refresh=False)
        self.bar.update()
        now = time.monotonic()
        first_step, first_time = self.first = self.first or (step, now)  # what came before it took its time
        if not self.bar.disable or rank() > 0 or now < self.next_line:
            return
        self.next_line = now + SECONDS_PER_LINE
        shown += [f"{self.rate:,.0f} tokens/s"] if self.rate else []
        gone = f"{clock(now - self.started)} gone"
        if step > first_step:
            gone += f", {clock((now - first_time) / (step - first_step) * (num_steps - step))} left"
        print(f"step {step}/{num_steps}", *shown, gone, sep="  ", flush=True)


def describe(metrics, names):
    """Those metrics that there are, each as its name and value."""
    def text(value, form):  # what is small, or not finite, in two digits that count
        return f"{value:{form if abs(value) >= 0.1 or form[-1] == 'e' else '.2g'}}"
    return [f"{name} {text(metrics[key], form)}"
            for key, (name, form) in names.items() if metrics.get(key) is not None]


def clock(seconds):
    """Minutes and seconds, from an hour on with hours, as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def print_evaluation(step, metrics):
    """What matters of an evaluation; metrics.jsonl has all."""
    tqdm.write("  ".join([f"step {step}", "eval", *describe(metrics, EVAL_NAMES)]))


def print_samples(step, records):
    """Each record's fields on a line of their own, long ones cut."""
    for number, record in enumerate(records, 1):
        tqdm.write(f"\nsample {number} of {len(records)} at step {step}")
        for name, value in record.items():
            text = " ".join(str(value).split())
            text = "".join(character if character.isprintable() else "\ufffd" for character in text)
            if len(text) > 300:  # of a prompt the end says more
                text = f"... {text[-300:]}" if name == "prompt" else f"{text[:300]} ..."
            tqdm.write(f"{name:<22}{text}")
    if records:
        tqdm.write("")


def describe_failure(step, metrics, examples, microbatches, all_losses, saved_step):
    """The sentence on a step whose loss or gradient is not finite, with the examples that did it."""
    bad = [example.where for batch, losses in zip(microbatches, all_losses) if not batch.is_idle
           for example, is_fine in zip(batch.examples, losses.isfinite().tolist()) if not is_fine]
    bad = sum(from_all(bad), [])
    what = "the examples whose loss is not finite" if bad else "each example's loss is finite; the batch"
    places = ", ".join(bad or [example.where for example in examples])
    saved = "nothing is saved yet" if saved_step is None else f"step {saved_step} is saved"
    return (f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; {what}: {places}. "
            f"The weights were not touched, {saved}. A lower lr may help.")


def print_results(records, run_dir, saved_step, objective):
    """First, best and last evaluation (or training step) in columns, the checkpoints, and how to use one."""
    link = os.path.join(os.path.relpath(run_dir), "BEST")
    best = int(os.readlink(link)[5:]) if os.path.islink(link) else None
    for split, title in (("eval", "evaluation"), ("train", "training")):
        lines = [line for line in records if line["split"] == split]
        if lines:
            shown = [line for line in lines if line in (lines[0], lines[-1]) or line["step"] == best]
            print(f"\n{title:<30}" + "".join(f"{'step ' + str(line['step']):>14}" for line in shown))
            for name in [name for name in shown[-1] if name not in ("step", "examples", "split", "time")]:
                values = (line.get(name) for line in shown)
                cells = ("-" if value is None else f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
                         for value in values)
                print(f"{name:<30}" + "".join(f"{cell:>14}" for cell in cells))
            break
    if saved_step:
        latest = os.path.join(os.path.relpath(run_dir), "LATEST")
        key = "reward_model" if objective.inputs == "scores" else "model"
        print(f"\ncheckpoint  {latest} -> step-{saved_step:06d}")
        if best is not None:
            print(f"best        {link} -> step-{best:06d}")
        print(f"use it by   {key}={shlex.quote(latest if best is None else link)}")
