"""How fast is a training step, how much memory does it take, and where does the time go?

    python tests/benchmarks/throughput.py --data FILE [--model MODEL_OR_CONFIG] [--peer trl]
        [--against "compute_dtype=bfloat16"] [--lengths 256,128,128] [--set vocab_size=32768] [key=value ...]

Contenders take turns in one run, each in a process of its own with the same weights, rows and order: this
project with the settings key=value, again with those of every --against laid over them, TRL's DPOTrainer with
its reference precomputed (--peer trl, if it is installed), and plain matrix products. A config's .json gets
random weights and needs tokenizer=; by default it is that of a Llama of 17M parameters. --lengths makes rows
of random tokens, so many in prompt, chosen and rejected. Prints medians over the rounds, the median of the
rounds' ratios, and the parts of a step; the peak memory is that of the whole process, on a GPU that of the
tensors.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
DEFAULTS = ["loss=dpo", "batch_size=8", "truncation=drop", "eval_every=0", "shuffle=false", "lr=1e-5",
            "lr_schedule=constant", "warmup_steps=0", "num_epochs=1"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.path.join(os.path.dirname(__file__), "llama17m.json"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--peer", choices=["trl"])
    parser.add_argument("--against", action="append", default=[], help="settings of one more contender")
    parser.add_argument("--lengths", help="tokens of prompt, chosen and rejected")
    parser.add_argument("--set", action="append", default=[], help="key=value of the model's own config")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of a contender in a round")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments, settings = parser.parse_known_args()
    if arguments.worker:
        return WORKERS[arguments.worker](arguments, settings)
    with tempfile.TemporaryDirectory() as folder:
        settings = [*DEFAULTS, f"data={os.path.abspath(arguments.data)}", *settings]
        settings += [f"model={make_model(arguments, settings, folder)}"]
        contenders = {"matrix products": ("matmul", settings), "here": ("here", settings)}
        contenders |= {f"here, {more}": ("here", [*settings, *more.split()]) for more in arguments.against}
        if arguments.peer:
            contenders["TRL"] = ("trl", settings)
        compare(arguments, contenders, folder)


def make_model(arguments, settings, folder):
    """The folder of the model: as given, or one with random weights for a config's .json."""
    if not arguments.model.endswith(".json"):
        return os.path.abspath(arguments.model) if os.path.isdir(arguments.model) else arguments.model
    from transformers import AutoTokenizer
    path = dict(setting.split("=", 1) for setting in settings).get("tokenizer")
    if not path:
        sys.exit(f"{arguments.model} is a config without a tokenizer: name one by tokenizer=")
    given = (setting.split("=") for setting in arguments.set)
    with open(arguments.model) as file:
        options = json.load(file) | {key: json.loads(value) for key, value in given}
    save_random_model(options, AutoTokenizer.from_pretrained(path), folder)
    return folder


def save_random_model(options, tokenizer, folder):
    """A model with random weights, of the config that has these options."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**options, eos_token_id=tokenizer.eos_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare(arguments, contenders, folder):
    """Lets the contenders take turns and prints what came out."""
    options = [f"--data={arguments.data}", f"--steps={arguments.steps}", f"--rounds={arguments.rounds}"]
    options += [f"--lengths={arguments.lengths}"] if arguments.lengths else []
    workers, seconds, lines = {}, {name: [] for name in contenders}, {}
    for number, (name, (kind, settings)) in enumerate(contenders.items()):
        own = [f"run_dir={folder}/run-{number}", f"reference_cache={folder}/cache-{number}"]
        own = [x for x in own if x.split("=")[0] not in [setting.split("=")[0] for setting in settings]]
        command = [sys.executable, __file__, *options, f"--worker={kind}", *settings, *own]
        workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ask(workers[name], "")  # wait until it is ready: nobody works in another's turn
    for _ in range(arguments.rounds):
        for name, worker in workers.items():
            lines[name] = ask(worker, "go")
            seconds[name].append(lines[name]["seconds"])
    parts = {name: ask(worker, "parts") for name, worker in workers.items() if contenders[name][0] == "here"}
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    report(arguments, seconds, lines, parts)


def ask(worker, word):
    if word:
        print(word, file=worker.stdin, flush=True)
    for line in worker.stdout:
        if line.startswith("\x00"):
            return json.loads(line[1:])
    sys.exit(f"the contender has left with status {worker.wait()}")


def report(arguments, seconds, lines, parts):
    rate = lines["matrix products"]["flop"] / statistics.median(seconds["matrix products"]) / 1e9
    pairs, tokens = lines["here"]["pairs"], lines["here"]["tokens"]
    print(f"\n{pairs} pairs of {tokens / pairs:.0f} tokens on average, "
          f"{lines['here']['parameters']:,} parameters; plain matrix products: {rate:.0f} GFLOP/s\n")
    print("| | pairs/s | times here | tokens/s | peak memory, MB | largest difference of a loss "
          "| share of the matrix products' rate |\n|---|---|---|---|---|---|---|")
    first, *_ = here = [name for name in seconds if name != "matrix products"]
    for name in here:
        line, median = lines[name], statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[name]))
        gap = max(abs(a - b) for a, b in zip(line["losses"], lines[first]["losses"]))
        count, tokens = (value / arguments.rounds for value in (line["pairs"], lines[first]["tokens"]))
        flop = sum(lines[first]["necessary"].values()) / arguments.rounds
        print(f"| {name} | {count / median:.2f} | {ratio:.3f} | {tokens / median:.0f} | "
              f"{line['memory']:.0f} | {gap:.1e} | {flop / median / 1e9 / rate:.1%} |")
    for name, part in parts.items():
        total = sum(part["seconds"].values())
        median = statistics.median(seconds[name])
        print(f"\n{name}: the parts of a step, {median / arguments.steps * 1e3:.0f} ms\n\n"
              "| | share of the time | necessary GFLOP | GFLOP/s |\n|---|---|---|---|")
        for key, value in part["seconds"].items():
            flop = lines[name]["necessary"].get(key, 0) / arguments.rounds / arguments.steps / 1e9
            spent = value / total * median / arguments.steps
            print(f"| {key} | {value / total:.1%} | {flop:.2f} | {f'{flop / spent:.0f}' if flop else ''} |")
        print(f"reference: computed in {part['reference']:.1f} s, "
              f"read from the cache in {part['cache']:.2f} s")


# ---------------------------------------------------------------- in the contenders' processes


def serve(prepare, go, parts=None):
    """Answers the parent's words, a line each; what else is printed goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    prepare()
    print("\x00{}", file=answers, flush=True)
    for line in sys.stdin:
        values = go() if line.strip() == "go" else parts()
        print("\x00" + json.dumps(values), file=answers, flush=True)


def config_of(settings):
    from data import DATASETS
    from engine.checkpoints import load_config
    from engine.config import read_arguments
    from losses import OBJECTIVES
    return load_config(read_arguments(settings), OBJECTIVES, DATASETS)[0]


def load_examples(arguments, settings):
    """The config, and the examples of all steps in order: the data's first, or random tokens of --lengths."""
    import numpy as np

    from data import Encoder, load_rows
    from engine.models import load_tokenizer
    from losses import OBJECTIVES
    config = config_of(settings)
    need = config.batch_size * (WARM_UP + arguments.steps * arguments.rounds)
    rows, report = load_rows(config.data, "train", OBJECTIVES[config.loss])
    texts = (text for row in rows for text in (row.prompt, *row.responses))
    tokenizer = load_tokenizer(config.tokenizer or config.model, texts, config)
    encoder = Encoder(tokenizer, config, [tokenizer.eos_token_id], "2026-11-25")
    examples = encoder.examples(rows, report, limit=need)
    if arguments.lengths:
        noise, lengths = np.random.default_rng(0), [int(x) for x in arguments.lengths.split(",")]
        examples = [dataclasses.replace(examples[0], prompt=ids[0], responses=tuple(ids[1:])) for ids in (
            [noise.integers(3, len(tokenizer), n, np.int32) for n in lengths] for _ in range(need))]
    while len(examples) < need:  # a small file is read again
        examples += examples[:need - len(examples)]
    # each an object of its own, into whose columns its reference's log-probabilities are filled
    return config, tokenizer, [dataclasses.replace(x, columns=dict(x.columns)) for x in examples]


WARM_UP = 4  # steps


def run_here(arguments, settings):
    import train
    from engine.gpu import flops_by_part
    state = {"losses": []}

    def prepare():
        config, tokenizer, examples = load_examples(arguments, settings)
        with contextlib.redirect_stdout(sys.stderr):
            trainer = train.build_trainer(config)
        examples = examples if trainer.objective.needs_pairs else [
            dataclasses.replace(example, responses=example.responses[:1]) for example in examples]
        trainer.data.train_examples = trainer.train_examples = examples
        trainer.data.eval_sources, trainer.data.sample_examples = {}, []
        reference = trainer.reference
        trainer.batcher = trainer.make_batcher(trainer.policy, reference, trainer.reward_model)
        for key in ("reference", "cache"):
            trainer.reference, started = reference, time.perf_counter()
            trainer.fill_in_reference()  # and lets go of the reference
            state[key] = time.perf_counter() - started
        del reference  # or the peak memory would be that of two models
        for _ in range(WARM_UP):
            trainer.train_step()
        state["trainer"] = trainer

    def steps():
        return [state["trainer"].train_step()["loss"] for _ in range(arguments.steps)]

    def go():
        started = time.perf_counter()
        state["losses"] += steps()
        seconds, trainer = time.perf_counter() - started, state["trainer"]
        used = trainer.train_examples[WARM_UP * trainer.config.batch_size:trainer.num_used]
        return {"seconds": seconds, "losses": state["losses"], "memory": peak_memory(), "pairs": len(used),
                "parameters": sum(p.numel() for p in trainer.policy.parameters()),
                "tokens": sum(example.num_tokens for example in used),
                "necessary": flops_by_part(trainer.policy, used)}

    def parts():
        trainer = state["trainer"]
        trainer.examples = WARM_UP * trainer.config.batch_size  # the same examples again
        trainer.next_global_batch = None  # which was made ahead for another place
        return {"seconds": profile(trainer, steps), "reference": state["reference"], "cache": state["cache"]}
    serve(prepare, go, parts)


def profile(trainer, steps):
    """Seconds of steps by part, from torch's profiler: matrix products with the vocabulary are the head's."""
    import torch
    from torch.profiler import ProfilerActivity, record_function

    from engine import batches
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    collate = batches.collate

    def recorded(*arguments, **options):
        with record_function("batch making"):
            return collate(*arguments, **options)
    batches.collate = recorded
    steps()
    with torch.profiler.profile(activities=activities, record_shapes=True) as result:
        started = time.perf_counter()
        steps()
        wall = time.perf_counter() - started
    batches.collate = collate
    vocabulary = trainer.policy.get_input_embeddings().weight.shape[0]
    examples = trainer.train_examples[:trainer.num_used]
    share = sum(len(example.prompt) for example in examples) / sum(example.num_tokens for example in examples)
    rest = "other arithmetic of the model and its backward"
    names = ("prompt", "response", "head", "attention", rest, "optimizer", "batch making")
    seconds = dict.fromkeys(names, 0.0)
    on_gpu = torch.cuda.is_available()
    for event in result.key_averages(group_by_input_shape=True):
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        has_vocabulary = any(vocabulary in shape for shape in event.input_shapes if isinstance(shape, list))
        if event.key in ("aten::mm", "aten::addmm", "aten::bmm") and not has_vocabulary:
            seconds["prompt"] += spent * share
            seconds["response"] += spent * (1 - share)
        elif "attention" in event.key or "flex" in event.key:
            seconds["attention"] += spent
        elif event.key in ("aten::mm", "aten::addmm") or (
                "log_softmax" in event.key or "nll_loss" in event.key):
            seconds["head"] += spent
        elif event.key == "batch making" or event.key.startswith("Optimizer.step"):
            total = (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6
            seconds["optimizer" if event.key != "batch making" else "batch making"] += total
    seconds[rest] = wall - sum(seconds.values())
    return seconds


def run_trl(arguments, settings):
    """TRL's DPOTrainer on the same ids, reference precomputed, no gradient checkpointing."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    state = {"losses": []}
    config, tokenizer, examples = load_examples(arguments, settings)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = Dataset.from_list([dict(zip(names, (ids.tolist() for ids in (example.prompt, *example.responses))))
                              for example in examples])
    answers, sys.stdout = sys.stdout, sys.stderr

    class Peer(DPOTrainer):
        def _prepare_dataset(self, dataset, *arguments, **options):
            return dataset

    class Turns(TrainerCallback):
        def on_step_end(self, arguments_, trainer_state, control, **options):
            done = trainer_state.global_step - WARM_UP
            if done == 0:
                state["losses"].clear()
                print("\x00{}", file=answers, flush=True)
            elif done > 0 and done % arguments.steps == 0:
                synchronize(torch)
                state["due"] = time.perf_counter() - state["started"]
            else:
                return
            state["answer"] = "due" in state

        def on_log(self, arguments_, trainer_state, control, logs=None, **options):
            if trainer_state.global_step > WARM_UP and "loss" in logs:
                state["losses"].append(logs["loss"])
            if state.pop("answer", False):
                pairs = (trainer_state.global_step - WARM_UP) * config.batch_size
                values = {"seconds": state.pop("due"), "losses": state["losses"], "pairs": pairs,
                          "memory": peak_memory()}
                print("\x00" + json.dumps(values), file=answers, flush=True)

        def on_step_begin(self, arguments_, trainer_state, control, **options):
            done = trainer_state.global_step - WARM_UP
            if done >= 0 and done % arguments.steps == 0:
                sys.stdin.readline()
                state["started"] = time.perf_counter()
    parts = config.gradient_accumulation_steps
    options = DPOConfig(
        output_dir=os.path.join(config.run_dir, "trl"), gradient_accumulation_steps=parts,
        per_device_train_batch_size=config.batch_size // parts, learning_rate=config.lr,
        lr_scheduler_type="constant", optim="rmsprop", max_grad_norm=config.max_grad_norm,
        max_steps=len(examples) // config.batch_size, logging_steps=1, report_to="none", save_strategy="no",
        train_sampling_strategy="sequential", precompute_ref_log_probs=True, gradient_checkpointing=False,
        bf16=config.compute_dtype == "bfloat16", beta=config.dpo["beta"],
        max_length=config.max_length, disable_tqdm=True, use_cpu=not torch.cuda.is_available())
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    Peer(model=model, args=options, train_dataset=rows, processing_class=tokenizer,
         callbacks=[Turns()]).train()


def run_matmul(arguments, settings):
    import torch
    config = config_of(settings)
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, config.compute_dtype)) for _ in range(2))
    out, times = torch.empty_like(a), 10

    def go():
        synchronize(torch)
        started = time.perf_counter()
        for _ in range(times):
            torch.mm(a, b, out=out)
        synchronize(torch)
        return {"seconds": time.perf_counter() - started, "flop": 2 * size**3 * times}
    serve(go, go)


def synchronize(torch):
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory():
    """MB: of the process, or of the device where there is one."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


WORKERS = {"here": run_here, "trl": run_trl, "matmul": run_matmul}

if __name__ == "__main__":
    main()
