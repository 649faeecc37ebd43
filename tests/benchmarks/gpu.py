"""What does this code reach on a GPU, and which of its settings bring it there?

    python tests/benchmarks/gpu.py [--out FILE] [--minutes 9.5] [--tiny]

Needs one NVIDIA card and no network, and ends in time. DPO of models with random weights, in the shapes of
Llama-3.2-1B and Qwen2.5-0.5B, on pairs of random tokens, as long as those of Anthropic's HH or with long
answers. Each row of a table adds a setting to those of the row before, and has a process of its own with the
same weights and pairs; a row that does not run says why. TRL's DPOTrainer stands beside, where it is
installed. --tiny does the same on a CPU with models so small that the numbers mean nothing.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback

import numpy as np
import throughput
import torch
import transformers
from torch._subclasses import FakeTensorMode

import train
import trainers  # noqa: F401, which train.py imports late
from data import load_rows
from engine import first_line
from engine.batches import CACHED, Example
from engine.distributed import device
from engine.dry_run import estimate_memory
from engine.gpu import PEAKS, necessary_flops
from engine.models import load_tokenizer, train_tokenizer
from losses import OBJECTIVES

LIMIT = 180  # seconds of a row, so that one that hangs leaves time for the others
COMMON = {"tie_word_embeddings": True, "max_position_embeddings": 4096}
MODELS = {
    "1B": COMMON | {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256},
    "0.5B": COMMON | {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936}}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 1024}
HH = os.path.join(throughput.ROOT, "tests", "data", "hh.jsonl")
SETTINGS = [*throughput.DEFAULTS, f"data={HH}", "lr=1e-6", "compute_dtype=bfloat16", "reference_cache=false"]
ATTENTION = {
    "separate rows, sdpa": ["layout=separate", "attention=sdpa"],
    "separate, flash_attention_2": ["layout=separate", "attention=flash_attention_2"],
    "shared, sdpa": ["layout=shared", "attention=sdpa"],
    "shared, flex_attention": ["layout=shared", "attention=flex_attention"],
    "shared, varlen": ["layout=shared", "attention=varlen"]}
ADDED = {"+ compile": "compile=true", "+ reference cached": "reference_cache=true",
         "+ bfloat16 weights": "dtype=bfloat16"}
PACKAGES = {"attention=flash_attention_2": "flash_attn", "trl": "trl"}  # that a setting or task needs
HEAD = ("| | pairs/s | times the first | tokens/s | share of the peak | peak memory, GiB "
        "| dry_run's estimate, GiB | largest difference of a loss |\n|---|---|---|---|---|---|---|---|")
LEGEND = """
Medians of steps of DPO, with RMSprop, computing in bfloat16, on float32 weights but where bfloat16 ones are
named. A row with + goes on from the fastest above it, and from the rows with + that have run. Tokens are
counted once, without padding. The share is what a step must compute, each prompt once (6 operations a weight
and token, and the reference's forward where the step runs it), against the card's dense bfloat16 peak by
NVIDIA's datasheet. The estimate is dry_run's of the largest microbatch that was timed, by sdpa and without
compiling. A loss is compared with the first row's, step by step.

Published marks: prefix sharing gives 1.1 to 1.6 times over good packing (arXiv 2410.20305), DPO of 7B runs at
12 to 32% of the peak (open-instruct), pretraining at 33 to 46% (torchtitan, fms-fsdp).
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="a file for the page, written anew after every row")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work()
    if not (arguments.tiny or torch.cuda.is_available()):
        parser.error("there is no NVIDIA card here; --tiny tries the script on a CPU")
    tables = {}
    with tempfile.TemporaryDirectory() as folder, Contenders(folder, arguments.minutes) as contenders:
        for title, row, answer in measure(contenders.run, arguments.tiny):
            tables.setdefault(title, {})[row] = answer
            print(f"{title}: {row}: {answer.get('reason', 'measured')}", file=sys.stderr)
            if arguments.out:
                with open(arguments.out, "w", encoding="utf-8") as file:
                    file.write(render(tables))
    print(render(tables), end="")


def measure(run, tiny):
    """Yields (table, row, answer), the most important first; run(task, ...) gives the answers."""
    batch_size, num_steps, width, limit = (8, 2, 128, 8) if tiny else (128, 8, 2048, 128)
    num_long = batch_size // 8  # pairs with long answers in a step

    def answer_to(task, model, changes, long=None):
        """long: None for HH's lengths, or how many tokens a pair with long answers has."""
        for name in [x for x in (task, *changes) if x in PACKAGES]:
            if not importlib.util.find_spec(PACKAGES[name]):
                return {"changes": changes, "reason": f"{PACKAGES[name]} is not installed"}
        size = [f"batch_size={num_long if long else batch_size}", f"max_length={long or 512}",
                f"max_steps={throughput.WARM_UP + num_steps}"]
        return run(task, [*SETTINGS, f"model={model}", *size, *changes], long) | {"changes": changes}

    # One setting after another: the fastest attention is kept, and then what runs.
    run("make", "1B", MODELS["1B"] | (TINY if tiny else {}))
    main_title, answers = f"1B, {batch_size} pairs a step, as long as HH's", []
    for row, changes in ATTENTION.items():
        answers.append(answer_to("train", "1B", changes))
        yield main_title, row, answers[-1]
    kept = fastest(answers)["changes"]
    for row, change in ADDED.items():
        answers.append(answer_to("train", "1B", [*kept, change]))
        yield main_title, row, answers[-1]
        kept = kept if "reason" in answers[-1] else answers[-1]["changes"]

    # Long answers, in the first row and the best, and what else is of use.
    best, title = fastest(answers)["changes"], f"{num_long} pairs of some {width} tokens a step"
    ends = {"separate rows, sdpa": answers[0]["changes"], "the best above: " + " ".join(best): best}
    for row, changes in ends.items():
        yield f"1B, {title}", row, answer_to("train", "1B", changes, width)
    prompts = batch_size // 2
    yield main_title, f"sampling {prompts} answers of {limit} tokens, bfloat16", answer_to(
        "sample", "1B", ["loss=sft", "dtype=bfloat16", f"batch_size={prompts}", f"sample_max_tokens={limit}"])
    yield main_title, "TRL's DPOTrainer, reference cached", answer_to(
        "trl", "1B", ["gradient_accumulation_steps=8"])  # all at once, its logits would fill the card
    run("make", "0.5B", MODELS["0.5B"] | (TINY if tiny else {}))
    for row, changes in ends.items():
        yield f"0.5B, {title}", row, answer_to("train", "0.5B", changes, width)


def fastest(answers):
    return min(answers, key=lambda answer: answer.get("seconds", math.inf))


class Contenders:
    """Runs one task after another, each in a process of its own, until the time is up.

    A process starts before its task is known, and imports while the one before it still measures.
    """

    def __init__(self, folder, minutes):
        self.folder, self.deadline = folder, time.monotonic() + 60 * minutes

    def __enter__(self):
        self.waiting = self.start()
        return self

    def __exit__(self, *error):
        self.waiting.kill()
        self.waiting.communicate()

    def start(self):
        return subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"], cwd=self.folder,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, *task) -> dict:
        """The task's answer, or {"reason": why there is none}."""
        seconds = min(LIMIT, self.deadline - time.monotonic())
        if seconds <= 0:
            return {"reason": "out of time"}
        worker, self.waiting = self.waiting, self.start()
        try:
            said, _ = worker.communicate(json.dumps(task), timeout=seconds)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()  # but not for what it has started, which ends by itself
            return {"reason": f"not finished within {seconds:.0f} s"}
        answers = [line[1:] for line in said.splitlines() if line.startswith("\x00")]
        return json.loads(answers[-1]) if answers else {"reason": f"it left with status {worker.returncode}"}


def render(tables) -> str:
    """The page, markdown, of {title: {row: answer}}."""
    answers = [answer for rows in tables.values() for answer in rows.values()]
    machine = next((answer["machine"] for answer in answers if "machine" in answer), "nothing has run")
    peak = next((peak for key, peak in PEAKS.items() if key in machine), None)
    lines = [f"{machine}; peak: {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'unknown'}"]
    for title, rows in tables.items():
        lines += ["", f"## {title}", "", HEAD]
        first, *_ = rows.values()
        lines += [f"| {row} | {' | '.join(cells(answer, first, peak))} |" for row, answer in rows.items()]
    return "\n".join([*lines, LEGEND])


def cells(answer, first, peak) -> list[str]:
    """A row's cells, `-` where there is nothing to say."""
    if "reason" in answer:
        return ["not run: " + answer["reason"].replace("|", "/"), *[""] * 6]

    def per_second(name, unit=1):
        return answer[name] / answer["seconds"] / unit if name in answer and unit else None
    times = gap = None
    if "losses" in answer and "losses" in first:
        times = first["seconds"] / answer["seconds"]
        gap = max(abs(a - b) for a, b in zip(answer["losses"], first["losses"]))
    values = [(per_second("pairs"), ".2f"), (times, ".2f"), (per_second("tokens"), ",.0f"),
              (per_second("flops", peak), ".1%"), (answer["memory"], ".2f"), (answer.get("estimate"), ".2f"),
              (gap, ".1e")]
    return ["-" if value is None else format(value, form) for value, form in values]


# ---------------------------------------------------------------- tasks, in processes of their own


def work():
    """Waits for a task and answers it in a line; what is printed besides goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    if not (said := sys.stdin.read()):
        return
    name, *task = json.loads(said)
    try:
        answer = TASKS[name](*task)
    except Exception as error:
        traceback.print_exc()
        answer = {"reason": first_line(error).replace(os.getcwd() + os.sep, "")}
    print("\x00" + json.dumps(answer), file=answers, flush=True)


def make_model(folder, options):
    """Random weights, made on the GPU if there is one, and a tokenizer."""
    texts = (text for row in load_hh() for text in (row.prompt, *row.responses))
    with device():
        throughput.save_random_model(options, train_tokenizer(texts), folder)
    return {}


def load_hh():
    return load_rows(HH, "train", OBJECTIVES["dpo"])[0]


def random_examples(config, vocab_size, long):
    """Of all steps: pairs of random tokens, one for four characters of a row of HH, or about `long` a pair.

    Long pairs have a quarter to a third of that in the prompt and in each answer.
    """
    noise, examples = np.random.default_rng(0), []
    lengths = [[math.ceil(len(text) / 4) for text in (row.prompt, *row.responses)] for row in load_hh()]
    if long:
        lengths = (long * noise.uniform((0.2, 0.3, 0.3), (0.3, 0.4, 0.4), (64, 3))).astype(int).tolist()
    for number in range(config.max_steps * config.batch_size):
        sizes = lengths[noise.integers(len(lengths))]
        prompt, *answers = (noise.integers(3, vocab_size, size, np.int32) for size in sizes)
        examples.append(Example(f"pair {number}", prompt, tuple(answers), {}))
    return examples


def build(settings, long):
    """A Trainer, and its examples."""
    trainer = train.build_trainer(throughput.config_of(settings))
    examples = random_examples(trainer.config, trainer.policy.config.vocab_size, long)
    trainer.data.train_examples = trainer.train_examples = examples
    trainer.data.eval_sources, trainer.data.sample_examples = {}, []
    return trainer, examples


def train_here(settings, long):
    trainer, examples = build(settings, long)
    trainer.fill_in_reference()
    seconds, losses = [], []
    for step in range(trainer.config.max_steps):
        if step == throughput.WARM_UP and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        throughput.synchronize(torch)
        started = time.perf_counter()
        losses.append(trainer.train_step()["loss"])
        throughput.synchronize(torch)
        seconds.append(time.perf_counter() - started)
    answer = step_of(trainer.config, trainer.policy, examples, trainer.reference is not None)
    return answer | {"seconds": statistics.median(seconds[throughput.WARM_UP:]),
                     "losses": losses[throughput.WARM_UP:], "estimate": estimate(trainer)}


def step_of(config, model, examples, with_reference):
    """What a timed step has on average, and what has been used for it."""
    timed = examples[throughput.WARM_UP * config.batch_size:]
    num_steps = len(timed) / config.batch_size
    return used() | {"pairs": config.batch_size, "tokens": sum(x.num_tokens for x in timed) / num_steps,
                     "flops": necessary_flops(model, timed, with_reference) / num_steps}


def used():
    """The memory, GiB, of tensors on a GPU or of the process; and on what machine."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    return {"memory": throughput.peak_memory() * 1e6 / 2**30,
            "machine": f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"}


def estimate(trainer):
    """GiB that dry_run=true foresees for the largest microbatch that was timed, with the reference where it
    stays; of sdpa (flex_attention crashes on tensors without memory)."""
    timed = range(throughput.WARM_UP, trainer.config.max_steps)
    steps = [trainer.make_global_batch(step)[1] for step in timed]
    height, width = max((batch.input_ids.shape for step in steps for batch in step), key=math.prod)
    held = estimate_memory(trainer.policy, FakeTensorMode(allow_non_fake_inputs=True), trainer.config, 1,
                           height, width, max(map(len, steps)))
    stays = trainer.reference is not None and CACHED not in steps[0][0].columns
    return (sum(held.values()) - held["checkpoint"] + stays * held["weights"]) / 2**30


def sample(settings, long):
    trainer, examples = build(settings, long)
    prompts = [example.prompt for example in examples[:trainer.config.batch_size]]

    def draw(limit):
        batches = trainer.sampler.batches(trainer.policy.eval(), prompts, [limit] * len(prompts),
                                          range(len(prompts)), {"temperature": 1, "top_p": 1})
        return sum(len(ids) for _, answers in batches for ids in answers)
    draw(4)  # warms up
    started = time.perf_counter()
    num_tokens = draw(trainer.config.sample_max_tokens)
    return used() | {"tokens": num_tokens, "seconds": time.perf_counter() - started}


def train_by_trl(settings, long):
    """throughput.py's TRL, on these examples."""
    config, said = throughput.config_of(settings), io.StringIO()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(config.model))
    examples = random_examples(config, model.config.vocab_size, long)
    throughput.load_examples = lambda *arguments: (config, load_tokenizer(config.model, [], config), examples)
    num_steps = config.max_steps - throughput.WARM_UP
    with contextlib.redirect_stdout(said):
        throughput.run_trl(argparse.Namespace(steps=num_steps), settings)
    answer = json.loads(said.getvalue().splitlines()[-1][1:])
    return step_of(config, model, examples, with_reference=False) | {
        "seconds": answer["seconds"] / num_steps, "losses": answer["losses"]}


TASKS = {"make": make_model, "train": train_here, "sample": sample, "trl": train_by_trl}

if __name__ == "__main__":
    main()
