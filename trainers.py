"""How do we step, evaluate, sample, save?"""

import collections
import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import time

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig,
                          LogitsProcessor, TopPLogitsWarper)

from data import InputError, collate, first_line, microbatches, stream, train_tokenizer
from losses import OBJECTIVES

START = time.monotonic()  # max_hours counts from here

# ---------------------------------------------------------------- models and tokenizers


def load_tokenizer(path, rows, config):
    """The tokenizer at `path`, a hub id or folder, or for `tiny` one trained on the rows.

    Raises InputError where there is none, or none with the special tokens that the run needs.
    """
    with refusing(f"the tokenizer of {path}"):
        tokenizer = train_tokenizer(rows) if path == "tiny" else AutoTokenizer.from_pretrained(
            path, trust_remote_code=config.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {path} has no end-of-sequence token, which closes every "
                         "response: name one in its tokenizer_config.json, or choose another by tokenizer=")
    if config.add_bos and tokenizer.bos_token_id is None:
        raise InputError(f"add_bos=true, but the tokenizer of {path} has no begin-of-sequence token")
    return tokenizer


def load_model_config(path, config, tokenizer):
    """The model's own configuration with every dropout at 0, and what those were. Reads no weights."""
    if path == "tiny":
        model_config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256,
                                   num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048,
                                   bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                                   pad_token_id=tokenizer.pad_token_id)
    else:
        with refusing(f"the model {path}"):
            model_config = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    dropouts = {}
    for part in {id(part): part for part in (model_config, model_config.get_text_config())}.values():
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float | int) and value > 0:
                dropouts[name] = value
                setattr(part, name, type(value)(0))
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise InputError(f"max_length={config.max_length} is beyond the {positions} positions of {path}: "
                         "lower max_length, or choose another model")
    return model_config, dropouts


def load_model(path, model_config, config, tokenizer):
    """The causal language model at `path`, on this run's device. Raises InputError if it is not whole."""
    options = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attention,
               "trust_remote_code": config.trust_remote_code}
    with refusing(f"the model {path}"):
        if path == "tiny":
            model = AutoModelForCausalLM.from_config(model_config, **options)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(path, config=model_config,
                                                               output_loading_info=True, **options)
            if absent := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
                raise ValueError(f"{len(absent)} weights are missing or of another shape, first {absent[0]}")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, more than the embeddings of {path}: "
                         "choose the tokenizer that belongs to the model")
    check_causal(model, path)
    if config.activation_checkpointing:
        with refusing(f"the model {path} with activation_checkpointing"):
            model.activation_checkpointing_enable({"use_reentrant": False})
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def check_causal(model, path):
    """Refuses a model whose predictions depend on later tokens: its log-probabilities mean nothing here."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 8, 7, 6, 5]]) % model.config.vocab_size
    first, second = model.eval()(input_ids=ids, use_cache=False).logits[:, :4].float()
    if not torch.allclose(first, second, atol=1e-2):
        raise InputError(f"{path} is no causal language model, what it predicts depends on later tokens: "
                         "choose one that is")


def load_end_ids(path, model_config, tokenizer):
    """Ids that end a response: the tokenizer's end token, then those of the model's generation config."""
    generation_config = GenerationConfig.from_model_config(model_config)
    if path != "tiny":
        with contextlib.suppress(OSError):  # it has none of its own
            generation_config = GenerationConfig.from_pretrained(path)
    more = generation_config.eos_token_id
    more = more if isinstance(more, list) else [more]
    return [tokenizer.eos_token_id, *(i for i in more if isinstance(i, int) and i != tokenizer.eos_token_id)]


def check_same_tokenizer(path, tokenizer, config):
    """Log-ratios of models with different vocabularies mean nothing: refuses a reference with another one."""
    if os.path.isdir(path) and not any(name.startswith("tokenizer") for name in os.listdir(path)):
        return  # weights without a tokenizer are taken at their word
    with refusing(f"the tokenizer of reference={path}"):
        other = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    if other.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"reference={path} has another tokenizer than the model: choose one with the same")


def fingerprint(model):
    """sha256 over the model's weights: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def refusing(what):
    """Turns what transformers raises while it loads from a folder or the hub into one sentence."""
    try:
        yield
    except Exception as error:  # of any kind: a config.json can be wrong in many ways
        raise InputError(f"{what} cannot be loaded: {first_line(error)}") from error


# ---------------------------------------------------------------- optimizer


def optimizer_names():
    """The torch.optim classes whose step needs neither a closure nor sparse gradients."""
    base = torch.optim.Optimizer
    return sorted(name for name, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, base)
                  and c not in (base, torch.optim.LBFGS, torch.optim.SparseAdam))


def make_optimizer(parameters, config):
    """The torch.optim class that the config names. Raises InputError for an unknown name or argument."""
    if config.optimizer not in optimizer_names():
        raise InputError(f"optimizer={config.optimizer} is not one of {', '.join(optimizer_names())}")
    optimizer_class = getattr(torch.optim, config.optimizer)
    known = {parameter.name: parameter.default
             for parameter in inspect.signature(optimizer_class).parameters.values()
             if parameter.name not in ("params", "lr")}
    for name, value in config.optimizer_args.items():
        if name not in known:
            raise InputError(f"optimizer_args.{name} is no argument of {config.optimizer}, which has "
                             f"{', '.join(known)}")
        if isinstance(known[name], bool) and not isinstance(value, bool):
            raise InputError(f"optimizer_args.{name}={value!r} is not allowed: it must be true or false")
    try:
        return optimizer_class(parameters, lr=config.lr, **config.optimizer_args)
    except Exception as error:
        raise InputError(f"{config.optimizer} with {config.optimizer_args} is refused: {error}") from error


def check_optimizer(config):
    """Takes one step on a small matrix, for many wrong arguments show only there. Raises InputError."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = make_optimizer([weight], config)
    try:
        optimizer.step()
    except Exception as error:
        raise InputError(f"{config.optimizer} with {config.optimizer_args} is refused: {error}") from error


def learning_rate(step, num_steps, config):
    """The rate of the step that follows `step` finished ones: linear warmup to lr, then the schedule."""
    warmup = config.warmup_steps
    rate = config.lr * min(1, (step + 1) / (warmup + 1))
    if config.lr_schedule == "constant" or step <= warmup:
        return rate
    left = (num_steps - step) / (num_steps - warmup)
    return rate * (left if config.lr_schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def as_steps(interval, num_rows, batch_size):
    """An interval in optimizer steps, from steps or (below 1) a fraction of an epoch; 0 stays 0: never."""
    is_fraction = 0 < interval < 1
    return max(1, round(interval * num_rows / batch_size)) if is_fraction else int(interval)


# ---------------------------------------------------------------- the loop


class Stopped(Exception):
    """A signal or max_hours asks for the end; raised between steps and between evaluation batches."""


class Trainer:
    """One run: the policy, its objective and optimizer, and the folder that keeps it.

    data_fingerprint: of train_examples' rows, for a resumed run must go on with the same.
    held_out: Examples; the first num_eval_examples are evaluated, the first num_prompts sampled from.
    dataset: the data.Dataset whose known rewards judge the samples, or None.
    checkpoint: the folder to go on from, whose weights `policy` has, or None.
    """

    def __init__(self, config, policy, reference, tokenizer, end_ids, train_examples, data_fingerprint,
                 held_out, num_prompts, dataset, checkpoint=None):
        self.config = config
        self.objective = OBJECTIVES[config.loss]
        self.policy = policy.train()
        self.reference = reference and reference.eval().requires_grad_(False)
        self.fingerprints = {"data": data_fingerprint, "reference": reference and fingerprint(reference)}
        self.tokenizer, self.end_ids = tokenizer, end_ids
        self.train_examples = train_examples
        self.eval_examples = held_out[:config.num_eval_examples]
        self.sample_examples = held_out[:num_prompts]
        self.dataset = dataset
        block = getattr(config, config.loss, {})
        self.average = block.get("average", self.objective.average)
        names = inspect.signature(self.objective.loss).parameters
        self.loss_options = {name: value for name, value in block.items() if name in names}
        self.optimizer = make_optimizer([p for p in policy.parameters() if p.requires_grad], config)
        self.step = self.examples = 0
        self.saved_step = None
        self.stop = None  # signal number, or "max_hours"
        self.throughput = collections.Counter()  # since the last logged step
        self.wandb = None
        self.reference_samples = None
        self.evaluated_steps = set()
        if checkpoint:
            self.restore(checkpoint)

    @property
    def num_steps(self):
        """Optimizer steps of the whole run, those done included."""
        left = math.ceil((self.num_positions - self.examples) / self.config.batch_size)
        total = self.step + max(0, left)
        return total if self.config.max_steps is None else min(total, self.config.max_steps)

    @property
    def num_positions(self):
        """Examples of all epochs; rounded first, for 0.1 * 30 is 3.0000000000000004."""
        return math.ceil(round(self.config.num_epochs * len(self.train_examples), 6))

    def train(self):
        """Runs to the end or until asked to stop; returns None, the signal's number or "max_hours"."""
        num_steps = self.num_steps
        with self.catch_signals(), tqdm(total=num_steps, initial=self.step, unit="step", disable=None) as bar:
            try:
                while True:
                    self.check_stop()
                    if self.eval_is_due():
                        self.evaluate()
                    if self.save_is_due():
                        self.save()
                    if self.step >= num_steps:
                        break
                    metrics = self.train_step()
                    if self.log_is_due():
                        self.log("train", metrics)
                    bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("loss", "rewards/accuracies")
                                     if name in metrics}, refresh=False)
                    bar.update()
            except Stopped:
                if self.saved_step != self.step:
                    self.save()
        if self.wandb:
            self.wandb.finish()
        return self.stop

    # ------------------------------------------------------------ what is due

    def eval_is_due(self):
        if not self.eval_examples or self.step in self.evaluated_steps:
            return False
        if self.config.max_steps == 0:
            return True
        every = as_steps(self.config.eval_every, len(self.train_examples), self.config.batch_size)
        if every == 0 or self.step == 0:
            return every > 0 and self.config.eval_first
        return self.step % every == 0 or self.step == self.num_steps

    def save_is_due(self):
        if self.step == 0 or self.step == self.saved_step:
            return False
        every = as_steps(self.config.save_every, len(self.train_examples), self.config.batch_size)
        return self.step == self.num_steps or every > 0 and self.step % every == 0

    def log_is_due(self):
        return self.step % self.config.log_every == 0

    @contextlib.contextmanager
    def catch_signals(self):
        """SIGTERM and SIGINT ask for a stop at the next step; a second SIGINT stops at once."""
        def ask(number, frame):
            self.stop = self.stop or number
            signal.signal(signal.SIGINT, signal.default_int_handler)
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check_stop(self):
        if self.config.max_hours is not None and time.monotonic() - START > 3600 * self.config.max_hours:
            self.stop = self.stop or "max_hours"
        if self.stop:
            raise Stopped

    # ------------------------------------------------------------ one step

    def train_step(self):
        """One optimizer step on the global batch; returns its metrics, computed before the update.

        Raises FloatingPointError, with the examples, if the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        stop = min(self.examples + self.config.batch_size, self.num_positions)
        rows = stream(len(self.train_examples), self.examples, stop,
                      seed=self.config.seed, shuffle=self.config.shuffle)
        examples = [self.train_examples[row] for row in rows]
        batches = microbatches(examples, self.config.gradient_accumulation_steps,
                               self.config.max_tokens_per_microbatch)
        self.optimizer.zero_grad(set_to_none=True)
        sums = self.accumulate(batches, self.denominator(examples), backward=True)
        limit = float("inf") if self.config.max_grad_norm is None else self.config.max_grad_norm
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit).double()
        values = torch.stack(list(sums.values())).tolist()  # the step's one wait for the device
        metrics = dict(zip(sums, values))
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise FloatingPointError(self.describe_failure(metrics, batches))
        metrics["lr"] = learning_rate(self.step, self.num_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = metrics["lr"]
        self.optimizer.step()
        self.step += 1
        self.examples += len(examples)
        metrics["epoch"] = self.examples / len(self.train_examples)
        self.throughput += collections.Counter(
            examples=len(examples), tokens=sum(example.num_tokens for example in examples),
            seconds=time.perf_counter() - started)
        return metrics

    def accumulate(self, batches, denominator, backward=False):
        """Means over all examples of batches (lists of examples): {name: 0-d float64 tensor}, `loss` first.

        `loss` is the sum of the losses over `denominator`; with backward its gradient is added to .grad.
        """
        num_examples = sum(map(len, batches))
        means = collections.defaultdict(float)
        for batch in tqdm(batches, desc="evaluating", leave=False, disable=backward or None):
            if not backward:
                self.check_stop()
            losses, metrics = self.losses(batch)
            if backward:
                (losses.sum() / denominator).backward()
            means["loss"] += losses.detach().double().sum() / denominator
            for name, value in metrics.items():
                means[name] += value.double().sum() / num_examples
        return dict(means)

    def denominator(self, examples):
        if self.average == "tokens":
            return sum(len(response) for example in examples for response in example.responses)
        return len(examples)

    def losses(self, examples):
        """This objective's losses (B,) and metrics for a list of examples, in one forward of each model."""
        batch = collate(examples, torch.promote_types(self.policy.dtype, torch.float32))
        batch = batch.to(self.policy.device)
        logps = [*self.response_logps(self.policy, batch)]
        if self.objective.needs_reference:
            with torch.no_grad():
                logps += self.response_logps(self.reference, batch)
        columns = {name: batch.columns[name] for name in self.objective.columns}
        return self.objective.loss(*logps, **columns, **self.loss_options)

    def response_logps(self, model, batch):
        """Summed log-probabilities (K, B) of a Batch's responses, in float32 (float64 models: float64)."""
        with self.autocast():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
                           logits_to_keep=batch.predicts).logits  # (N, V), N response tokens in all rows
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = batch.input_ids[:, 1:][batch.predicts[:, :-1]]  # (N,)
        token_logps = -F.cross_entropy(logits, targets, reduction="none")  # (N,)
        rows = torch.zeros(batch.predicts.shape, dtype=logits.dtype, device=logits.device)
        rows = rows.masked_scatter(batch.predicts, token_logps)  # (K * B, T), 0 where nothing is predicted
        return rows.sum(-1).view(batch.num_responses, -1)  # (K, B)

    def autocast(self):
        """bfloat16 arithmetic on float32 weights, if the config asks for it."""
        enabled = self.config.compute_dtype == "bfloat16" and self.config.dtype == "float32"
        return torch.autocast(self.policy.device.type, torch.bfloat16, enabled=enabled)

    def describe_failure(self, metrics, batches):
        bad = []
        with torch.no_grad():
            for batch in batches:
                finite = self.losses(batch)[0].isfinite().tolist()
                bad += [example.where for example, fine in zip(batch, finite) if not fine]
        what = "the examples whose loss is not finite" if bad else "each example's loss is finite; the batch"
        bad = bad or [example.where for batch in batches for example in batch]
        numbers = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        saved = "nothing is saved yet" if self.saved_step is None else f"step {self.saved_step} is saved"
        return (f"step {self.step + 1}: {numbers}; {what}: {', '.join(bad)}. The weights were not touched, "
                f"{saved}. A lower lr may help.")

    # ------------------------------------------------------------ evaluation and samples

    @torch.no_grad()
    def evaluate(self):
        """Metrics over the held-out examples, then samples; changes neither weights nor random state."""
        self.policy.eval()
        parts = math.ceil(len(self.eval_examples) / self.config.eval_batch_size)
        batches = microbatches(self.eval_examples, parts, self.config.max_tokens_per_microbatch)
        means = self.accumulate(batches, self.denominator(self.eval_examples))
        metrics = {name: value.item() for name, value in means.items()}
        if self.sample_examples:
            metrics |= self.sample()
        metrics["epoch"] = self.examples / len(self.train_examples)
        self.policy.train()
        self.log("eval", metrics)  # last: a resumed run takes this line as the sign that all was written
        self.evaluated_steps.add(self.step)

    def sample(self):
        """Answers of policy and reference to the same prompts; prints and writes num_samples of them.

        Returns metrics over all.
        """
        answers = {"policy": self.generate(self.policy, self.sample_examples)}
        metrics = {"samples/length": sum(map(len, answers["policy"])) / len(self.sample_examples)}
        if self.reference:
            if self.reference_samples is None:  # neither its weights nor the noise change
                self.reference_samples = self.generate(self.reference, self.sample_examples)
            answers["reference"] = self.reference_samples
            metrics["samples/kl"] = self.sample_kl(answers["policy"])
        answers["chosen"] = [example.responses[0].tolist() for example in self.sample_examples]
        records = [{"prompt": self.tokenizer.decode(example.prompt)} for example in self.sample_examples]
        for who, responses in answers.items():
            for record, ids in zip(records, responses):
                finished = len(ids) > 0 and ids[-1] in self.end_ids
                record[who] = self.tokenizer.decode(ids[:-1] if finished else ids)
                if self.dataset and who != "chosen":
                    scores = self.dataset.scores(record["prompt"], record[who], finished)
                    prefix = "" if who == "policy" else "reference_"
                    record |= {prefix + name: float(value) for name, value in scores.items()}
        if self.dataset:
            metrics |= self.score_metrics(records, metrics.get("samples/kl"))
        self.show_samples(records[:self.config.num_samples])
        return metrics

    def score_metrics(self, records, kl):
        """Means of the known scores; with a reference also the win rate against its answers (a tie is half a
        win), the best possible reward at this KL, and the share of it that was reached."""
        names = [name for name, value in records[0].items() if isinstance(value, float)]
        metrics = {f"samples/{name}": sum(record[name] for record in records) / len(records)
                   for name in names}
        if kl is not None and "reward" in records[0]:
            gaps = [record["reward"] - record["reference_reward"] for record in records]
            metrics["samples/win_rate"] = sum((gap > 0) + (gap == 0) / 2 for gap in gaps) / len(gaps)
            if self.dataset.optimal_reward:
                reward, optimum = metrics["samples/reward"], self.dataset.optimal_reward(kl)
                metrics["samples/optimal_reward"] = optimum
                metrics["samples/efficiency"] = reward / optimum if optimum >= 0.5 else None
        return metrics

    def show_samples(self, records):
        self.write("samples.jsonl", [{"step": self.step, **record} for record in records])
        for number, record in enumerate(records, 1):
            tqdm.write(f"\nsample {number} of {len(records)} at step {self.step}")
            for name, value in record.items():
                text = " ".join(str(value).split())
                text = "".join(character if character.isprintable() else "\ufffd" for character in text)
                if len(text) > 300:  # of a prompt the end says more
                    text = f"... {text[-300:]}" if name == "prompt" else f"{text[:300]} ..."
                tqdm.write(f"{name:<22}{text}")
        if self.wandb and records:
            import wandb
            table = wandb.Table(columns=list(records[0]), data=[list(record.values()) for record in records])
            self.wandb.log({"step": self.step, "eval/samples": table})

    def sample_kl(self, samples):
        """Mean over samples of log pi - log ref on the sampled ids, in nats, clipped below at 0."""
        drawn = [dataclasses.replace(example, responses=(torch.tensor(ids, dtype=torch.int32).numpy(),))
                 for example, ids in zip(self.sample_examples, samples)]
        total = 0.0
        for examples in microbatches(drawn, 1, self.config.max_tokens_per_microbatch):
            self.check_stop()
            batch = collate(examples).to(self.policy.device)
            ratios = self.response_logps(self.policy, batch) - self.response_logps(self.reference, batch)
            total += ratios.double().sum().item()
        return max(0.0, total / len(drawn))

    def generate(self, model, examples):
        """A sampled response to each example's prompt: lists of ids, with the end token where one came.

        The noise is seeded by example, so a sample depends on its prompt and place, not on the batch.
        """
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        rooms = [min(self.config.sample_max_tokens, positions - len(example.prompt)) for example in examples]
        order = sorted(range(len(examples)), key=lambda i: (rooms[i], len(examples[i].prompt)))
        responses = [None] * len(examples)
        pad = self.end_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        settings = GenerationConfig(do_sample=False, eos_token_id=self.end_ids, pad_token_id=pad)
        kept = model.generation_config  # put aside, or its repetition penalty and the like are mixed in
        model.generation_config = settings
        try:
            for room, group in itertools.groupby(order, key=lambda i: rooms[i]):
                group = list(group)
                for start in range(0, len(group), self.config.eval_batch_size):
                    self.check_stop()
                    chunk = group[start:start + self.config.eval_batch_size]
                    prompts = [torch.from_numpy(examples[i].prompt).long() for i in chunk]
                    input_ids = pad_sequence(prompts, True, pad, "left").to(model.device)
                    mask = pad_sequence([torch.ones_like(ids) for ids in prompts], True, 0, "left")
                    noise = SeededSampling([self.config.seed * 1_000_003 + i for i in chunk],
                                           self.config.sample_temperature, self.config.sample_top_p)
                    with self.autocast():
                        output = model.generate(input_ids, attention_mask=mask.to(model.device),
                                                max_new_tokens=room, logits_processor=[noise])
                    for i, ids in zip(chunk, output[:, input_ids.shape[1]:].tolist()):
                        ends = [at + 1 for at, token in enumerate(ids) if token in self.end_ids]
                        responses[i] = ids[:ends[0]] if ends else ids
        finally:
            model.generation_config = kept
        return responses

    # ------------------------------------------------------------ what is recorded

    def log(self, split, metrics):
        """One line in metrics.jsonl; evaluations also on the console; both in wandb."""
        if split == "train":
            seconds = self.throughput["seconds"]
            for name in ("examples", "tokens"):
                metrics[f"{name}_per_second"] = self.throughput[name] / seconds
            self.throughput.clear()
        place = {"step": self.step, "examples": self.examples, "split": split, "time": time.time()}
        self.write("metrics.jsonl", [place | metrics])
        if split == "eval":
            shown = (f"eval/{name} {value:.4g}" for name, value in metrics.items() if value is not None)
            tqdm.write(f"\nstep {self.step}: {', '.join(shown)}")
        if self.wandb:
            prefix = "eval/" if split == "eval" else ""
            self.wandb.log({"step": self.step, **{prefix + name: value for name, value in metrics.items()}})

    def records(self):
        """The lines of metrics.jsonl."""
        path = os.path.join(self.config.run_dir, "metrics.jsonl")
        if not os.path.exists(path):
            return []
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def write(self, name, records):
        with open(os.path.join(self.config.run_dir, name), "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def start_wandb(self):
        if self.config.wandb == "disabled":
            return
        import wandb
        try:
            self.wandb = wandb.init(
                project=self.config.wandb_project, name=self.config.exp_name, mode=self.config.wandb,
                dir=self.config.run_dir, id=self.config.provenance["run_id"], resume="allow",
                config=vars(self.config))
        except wandb.errors.Error as error:
            raise InputError(f"wandb={self.config.wandb} does not start: {first_line(error)}") from error
        self.wandb.define_metric("*", step_metric="step")

    # ------------------------------------------------------------ checkpoints

    def save(self):
        """Writes step-<step> whole beside its final name, renames it, and only then moves LATEST to it."""
        run_dir = self.config.run_dir
        for name in ("metrics.jsonl", "samples.jsonl"):
            if os.path.exists(os.path.join(run_dir, name)):
                sync(os.path.join(run_dir, name))
        name = f"step-{self.step:06d}"
        with whole_folder(os.path.join(run_dir, name)) as folder:
            self.policy.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            os.makedirs(os.path.join(folder, "trainer_state"))
            rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
            torch.save({"optimizer": self.optimizer.state_dict(), "rng": rng},
                       os.path.join(folder, "trainer_state", "state.pt"))
            with open(os.path.join(folder, "trainer_state", "state.json"), "w") as file:
                json.dump({"step": self.step, "examples": self.examples, **self.fingerprints}, file)
        point_latest(run_dir, name)
        self.saved_step = self.step
        if self.config.keep_checkpoints is not None:
            steps = sorted(step for step in saved_steps(run_dir) if step <= self.step)
            for name in [f"step-{step:06d}" for step in steps[:-self.config.keep_checkpoints]]:
                discarded = os.path.join(run_dir, f".{name}.partial")
                os.rename(os.path.join(run_dir, name), discarded)  # half deleted, it is no checkpoint
                shutil.rmtree(discarded)

    def restore(self, checkpoint):
        """Takes up a checkpoint's optimizer, counters and random state. Raises InputError if it may not."""
        counters = read_counters(checkpoint)
        for what, now in self.fingerprints.items():
            if counters[what] != now:
                raise InputError(f"the {what} is not what this run began with, its content differs: put it "
                                 "back, or start a new run")
        try:
            state = torch.load(os.path.join(checkpoint, "trainer_state", "state.pt"), map_location="cpu")
        except Exception as error:
            raise InputError(f"checkpoint {checkpoint} is damaged, its state.pt cannot be read: "
                             f"{first_line(error)}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, saved in state["optimizer"]["state"].items():  # load_state_dict casts to the weights' type
            now = self.optimizer.state[parameters[i]]
            now |= {name: x.to(now[name].device) for name, x in saved.items() if torch.is_tensor(x)}
        torch.set_rng_state(state["rng"]["cpu"])
        if len(state["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        self.step = self.saved_step = counters["step"]
        self.examples = counters["examples"]

    def restore_records(self):
        """Cuts metrics.jsonl and samples.jsonl back to this step; clears what an interrupted save left."""
        for name in os.listdir(self.config.run_dir):
            if re.fullmatch(r"\.(step-\d+|reference)\.partial", name):
                shutil.rmtree(os.path.join(self.config.run_dir, name))
        kept = cut_back(os.path.join(self.config.run_dir, "metrics.jsonl"),
                        lambda line: self.saved_step is not None and line["step"] <= self.step)
        self.evaluated_steps = {line["step"] for line in kept if line["split"] == "eval"}
        cut_back(os.path.join(self.config.run_dir, "samples.jsonl"),
                 lambda line: line["step"] in self.evaluated_steps)


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling with noise of each row's own seed (the Gumbel-max trick).

    The scores are divided by temperature (0: greedy), cut to the smallest set of tokens of probability top_p,
    and get Gumbel noise: their largest entry is then a draw from their softmax.
    """

    def __init__(self, seeds, temperature, top_p):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.warper = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids, scores):
        if self.temperature == 0:
            return scores
        scores = scores.float() / self.temperature
        if self.warper:
            scores = self.warper(input_ids, scores)
        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)  # -log of it is Gumbel
        return scores - noise.log().to(scores.device)


def read_counters(checkpoint):
    """Step, examples and fingerprints of a checkpoint. Raises InputError if the folder is not whole."""
    needed = ("config.json", "trainer_state/state.json", "trainer_state/state.pt")
    absent = [name for name in needed if not os.path.isfile(os.path.join(checkpoint, name))]
    names = os.listdir(checkpoint) if os.path.isdir(checkpoint) else []
    if not any(name.endswith(".safetensors") for name in names):
        absent.append("model.safetensors")
    if absent:
        raise InputError(f"checkpoint {checkpoint} is incomplete, it lacks {', '.join(absent)}: "
                         "point LATEST at a whole one, or start a new run")
    try:
        with open(os.path.join(checkpoint, "trainer_state", "state.json")) as file:
            counters = json.load(file)
        return {name: counters[name] for name in ("step", "examples", "data", "reference")}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"checkpoint {checkpoint} is damaged, its state.json is not whole: point LATEST at "
                         "another one, or start a new run") from error


def saved_steps(run_dir):
    """The steps of which a folder holds a checkpoint."""
    return [int(name[5:]) for name in os.listdir(run_dir) if re.fullmatch(r"step-\d+", name)]


@contextlib.contextmanager
def whole_folder(final):
    """Gives a folder to fill, which takes its final name only when all in it is on the disk."""
    partial = os.path.join(os.path.dirname(final), f".{os.path.basename(final)}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    yield partial
    for folder, _, files in os.walk(partial, topdown=False):
        for path in [*(os.path.join(folder, name) for name in files), folder]:
            sync(path)
    shutil.rmtree(final, ignore_errors=True)  # what a crash left between this rename and that of LATEST
    os.rename(partial, final)
    sync(os.path.dirname(final))


def point_latest(run_dir, name):
    temporary = os.path.join(run_dir, ".LATEST")
    if os.path.lexists(temporary):
        os.remove(temporary)
    os.symlink(name, temporary)
    os.replace(temporary, os.path.join(run_dir, "LATEST"))
    sync(run_dir)


def cut_back(path, keep):
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
