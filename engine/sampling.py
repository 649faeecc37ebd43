"""How are answers drawn, and judged? Seeded sampling, an evaluation's samples, self-play's pairs."""

import contextlib
import functools
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (GenerationConfig, LogitsProcessor, PreTrainedModel, TopKLogitsWarper,
                          TopPLogitsWarper)

from engine import InputError
from engine.batches import Batcher, Example, stream
from engine.distributed import (device, from_all, from_first, num_ranks, raise_on_all_ranks, rank, unsharded,
                                wait_for_all)
from engine.folder import RunFolder
from engine.forward import (autocast, in_any_order, read_tokens, response_logps, response_scores,
                            sum_over_responses, token_kls)
from engine.lora import as_asked
from engine.objectives import SELF_PLAY, parameters
from engine.report import progress


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling with noise of each row's own seed (the Gumbel-max trick).

    The scores are divided by temperature (0: greedy), cut to the top_k largest (0: all) and then to the
    smallest set of tokens of probability top_p, and get Gumbel noise: the largest is then a draw from their
    softmax. The noise is drawn where the model is: a GPU's is not a CPU's.
    """

    def __init__(self, seeds, temperature, top_p, top_k=0):
        self.generators = [torch.Generator(device()).manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.warpers = [TopKLogitsWarper(top_k)] if top_k else []
        self.warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    def __call__(self, input_ids, scores):
        if self.temperature == 0:
            return scores
        scores = scores.float() / self.temperature
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        return scores - noise.log()  # -log of exponential noise is Gumbel noise


class Sampler:
    """Draws answers to prompts, arrays of ids, and says what is known of them; an answer is a list of ids.

    It ends with the end token where one came. Each prompt has noise of its own seed, so an answer depends on
    prompt and seed, not on the batch, nor on the number of ranks.
    models: those that read prompt and answer, so that both stay within their positions; None are left out.
    """

    def __init__(self, config, run_data, batcher: Batcher, models, reward_model, bf16: bool):
        self.config, self.data, self.batcher = config, run_data, batcher
        self.reward_model, self.bf16 = reward_model, bf16
        self.end_ids, self.examples = run_data.end_ids, run_data.sample_examples
        pad = run_data.tokenizer.pad_token_id
        self.pad = self.end_ids[0] if pad is None else pad
        # generate() takes the likeliest token; SeededSampling's noise makes that a draw
        self.plain = GenerationConfig(do_sample=False, eos_token_id=self.end_ids, pad_token_id=self.pad)
        configs = [model.config.get_text_config() for model in (*models, reward_model) if model]
        self.positions = min(getattr(c, "max_position_embeddings", None) or math.inf for c in configs)

    def batches(self, model: PreTrainedModel, prompts, max_new_tokens, seeds, sampling,
                known=frozenset()) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yields prompts' numbers and answers, batch by batch in order of length; each rank does a batch.

        max_new_tokens: of each answer, fewer where positions end. sampling: SeededSampling's other arguments.
        A batch of which all are in `known` is left out.
        """
        limits = [min(limit, self.positions - len(prompt)) for limit, prompt in zip(max_new_tokens, prompts)]
        batches = [batch for batch in self.group(prompts, limits) if not known.issuperset(batch)]
        with as_asked(model) as model, unsharded(model, self.config) as in_step, progress(
                None, "sampling", total=len(batches), unit="batch") as bar:
            model.generation_config = self.plain  # of the model's own a repetition penalty would be mixed in
            while batches:
                self.batcher.stop.check()
                at_once = batches[:num_ranks()]
                while in_step and len(at_once) > 1 and (  # all go on as long as the slowest
                        len(prompts[at_once[-1][-1]]) + limits[at_once[0][0]] > self.positions):
                    at_once.pop()
                batches = batches[len(at_once):]
                is_idle = rank() >= len(at_once)
                batch = at_once[0][:1] if is_idle else at_once[rank()]
                noise = SeededSampling([seeds[i] for i in batch], **sampling)
                limit = 1 if is_idle else limits[batch[0]]
                output = self.generate(model, [prompts[i] for i in batch], limit, noise, in_step)
                drawn = [self.up_to_end(ids)[:limits[i]] for i, ids in zip(batch, output)]
                yield from zip(at_once, from_all(drawn))
                bar.update(len(at_once))

    def group(self, prompts, limits):
        """Numbers of prompts to be answered at once: of similar lengths, within the positions, and on a GPU a
        budget of tokens, which have keys and values alone where a microbatch's have all activations."""
        batches, size = [], min(self.config.eval_batch_size, math.ceil(len(prompts) / num_ranks()))
        max_tokens = 4 * self.batcher.max_tokens if device().type == "cuda" else math.inf
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            # all go on until the first, with most room, is done
            length = len(prompts[i]) + limits[batches[-1][0]] if batches else 0
            if batches and len(batches[-1]) < size and length <= min(
                    self.positions, max_tokens / (len(batches[-1]) + 1)):
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def generate(self, model, prompts, max_new_tokens, noise, in_step):
        """generate() on left-padded prompts: lists of ids. in_step: as long as the slowest rank's."""
        prompts = [torch.from_numpy(prompt).long() for prompt in prompts]
        input_ids = pad_sequence(prompts, True, self.pad, "left").to(device())
        mask = pad_sequence([torch.ones_like(ids) for ids in prompts], True, 0, "left").to(device())
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else (
            contextlib.nullcontext())  # or it would compile for each new length of the cache
        with autocast(self.bf16), eager, in_any_order():  # top_p's sums have no other
            output = model.generate(input_ids, attention_mask=mask, max_new_tokens=max_new_tokens,
                                    logits_processor=[noise], synced_gpus=in_step)
        return output[:, input_ids.shape[1]:].tolist()

    def up_to_end(self, ids):
        return ids[:next((at + 1 for at, token in enumerate(ids) if token in self.end_ids), len(ids))]

    def is_finished(self, ids):
        return len(ids) > 0 and ids[-1] in self.end_ids

    def true_scores(self, example, ids) -> dict[str, float]:
        """What the data know of an answer."""
        prompt = self.data.tokenizer.decode(example.prompt)
        known = self.data.judge.scores(prompt, self.text(ids), self.is_finished(ids))
        return {name: float(value) for name, value in known.items()}

    def to_the_end(self, example, ids):
        """An answer to the end of a chat's rendering, where it is finished and there is room."""
        has_room = len(example.prompt) + len(ids) + len(example.after) <= self.positions
        return [*ids, *example.after.tolist()] if self.is_finished(ids) and has_room else [*ids]

    def text(self, ids):
        """An answer's, without its end token."""
        return self.data.tokenizer.decode(ids[:-1] if self.is_finished(ids) else ids)

    # ------------------------------------------------------------ samples of an evaluation

    def answers(self, model: PreTrainedModel) -> list[list[int]]:
        """The model's answers to the prompts of evaluations."""
        prompts, answers, seed = [x.prompt for x in self.examples], {}, self.config.seed * 1_000_003
        sampling = {"temperature": self.config.sample_temperature, "top_p": self.config.sample_top_p}
        limits, seeds = [self.config.sample_max_tokens] * len(prompts), range(seed, seed + len(prompts))
        for numbers, drawn in self.batches(model, prompts, limits, seeds, sampling):
            answers |= zip(numbers, drawn)
        return [answers[number] for number in range(len(prompts))]

    def kl(self, policy, reference, answers) -> float:
        """KL(policy || reference) of whole answers, nats: token_kls summed over the sampled tokens, averaged.

        Its expectation over the policy's own samples is that of log pi - log ref, its noise a fraction.
        """
        def sums(batch):
            kls = read_tokens(token_kls, [policy, reference], batch, self.bf16)["kl"]
            return sum_over_responses(kls, batch)
        return sum(kl for kl, in self.values(sums, answers, "KL")) / len(answers)

    def scores(self, answers) -> list[dict[str, float]]:
        """Of each answer the data's true scores, where they are known, and the reward model's `reward`."""
        scores = [{} for _ in answers]
        if self.data.judge:
            for i, (example, ids) in enumerate(zip(self.examples, answers)):
                scores[i] = self.true_scores(example, ids)
        if self.reward_model:
            learned = functools.partial(response_scores, self.reward_model, bf16=self.bf16)
            ended = [self.to_the_end(*pair) for pair in zip(self.examples, answers)]
            for known, (reward,) in zip(scores, self.values(learned, ended, "scoring samples")):
                if "reward" in known:
                    known["true_reward"] = known.pop("reward")
                known["reward"] = reward
        return scores

    @torch.no_grad()
    def values(self, function, answers, title):
        examples = [replace(example, responses=(np.array(ids, np.int32),), columns={}, token_weights=None)
                    for example, ids in zip(self.examples, answers)]
        return self.batcher.values(function, examples, title)

    def metrics(self, answers, scores, kl=None) -> dict[str, float]:
        """Metrics over all answers and scores, of `policy` and, with a KL, of `reference`."""
        optimal_reward = self.data.judge and self.data.judge.optimal_reward
        return {"samples/length": sum(map(len, answers["policy"])) / len(self.examples)} | score_metrics(
            scores["policy"], scores.get("reference"), kl, optimal_reward)

    def records(self, answers, scores) -> list[dict]:
        """What is shown of the first num_samples: prompt, answers with their scores, the data's own."""
        records = []
        for i, example in enumerate(self.examples[:self.config.num_samples]):
            record = {"prompt": self.data.tokenizer.decode(example.prompt)}
            for who, prefix in (("policy", ""), ("reference", "reference_")):
                if who in answers:
                    record[who] = self.text(answers[who][i])
                    record |= {prefix + name: value for name, value in scores[who][i].items()}
            records.append(record | {"chosen": self.text(example.responses[0].tolist())})
        return records


def score_metrics(scores, reference_scores=None, kl=None, optimal_reward=None) -> dict[str, float]:
    """The KL and means of answers' scores; beside the reference's also the win rate (a tie is half a win).

    optimal_reward(kl) is the best possible mean reward: it, and the share of it that was reached.
    """
    metrics = {} if kl is None else {"samples/kl": kl}
    for prefix, known in (("", scores), ("reference_", reference_scores or [{}])):
        for name in known[0]:
            metrics[f"samples/{prefix}{name}"] = sum(values[name] for values in known) / len(known)
    if reference_scores and "reward" in scores[0]:
        gaps = [own["reward"] - other["reward"] for own, other in zip(scores, reference_scores)]
        metrics["samples/win_rate"] = sum((gap > 0) + (gap == 0) / 2 for gap in gaps) / len(gaps)
        if optimal_reward:
            optimum = optimal_reward(kl)
            reward = metrics.get("samples/true_reward", metrics["samples/reward"])
            metrics["samples/optimal_reward"] = optimum
            metrics["samples/efficiency"] = reward / optimum if optimum >= 0.5 else None
    return metrics


# ---------------------------------------------------------------- self-play


class SelfPlay:
    """The policy's answers to training prompts, in iterations, and what is trained on of them.

    generated-<iteration>.jsonl keeps the answers, drawn here or, with answers=wait, elsewhere; a resumed run
    samples only those that it lacks.
    """

    def __init__(self, config, run_data, folder: RunFolder, sampler: Sampler, is_judged=False):
        self.config, self.data, self.folder, self.sampler = config, run_data, folder, sampler
        self.settings = SELF_PLAY | getattr(config, config.loss)
        if is_judged and not (config.reward_model or run_data.judge):
            raise InputError(f"loss={config.loss} judges its answers: name a reward_model, or train and "
                             "evaluate on data that know the rewards, as toy")

    def prompted(self, iteration) -> list[Example]:
        """The examples that are answered in an iteration, as often as they are: all, or the next num_prompts
        of the stream."""
        examples, count = self.data.train_examples, self.settings["num_prompts"]
        if count:
            rows = stream(len(examples), iteration * count, (iteration + 1) * count, seed=self.config.seed,
                          shuffle=self.config.shuffle)
            examples = [examples[row] for row in rows]
        return [example for example in examples for _ in range(self.settings["num_answers"])]

    def key(self, opponent: str, iteration: int) -> str:
        """Stands in every answer of an iteration: of another opponent or other sampling it is another."""
        parts = [self.settings[name] for name in ("temperature", "top_p", "top_k", "max_tokens")]
        data = self.data.fingerprints["data"]
        parts += [self.config.max_length, self.config.seed, iteration, data, opponent]
        if self.settings["num_prompts"] or self.settings["num_answers"] > 1:
            parts += [self.settings["num_prompts"], self.settings["num_answers"]]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def write_answers(self, model: PreTrainedModel, opponent: str, iteration: int) -> bool:
        """Draws the model's answers of an iteration into its file; False where others are to do so first."""
        name, key = f"generated-{iteration:02d}.jsonl", self.key(opponent, iteration)
        examples = self.prompted(iteration)
        sampling = {option: self.settings[option] for option in ("temperature", "top_p", "top_k")}
        prompts = [example.prompt for example in examples]
        limits = [min(self.settings["max_tokens"], self.config.max_length - len(x)) for x in prompts]
        seeds = [zlib.crc32(f"{self.config.seed} {iteration} {row}".encode())  # a CPU generator reads 32 bits
                 for row in range(len(examples))]
        draw = functools.partial(self.sampler.batches, model, sampling=sampling)
        if self.settings["answers"] == "wait":
            return self.have_come(name, draw, model, [
                {"row": row, "where": example.where, "prompt": self.data.tokenizer.decode(example.prompt),
                 "ids": example.prompt.tolist(), "max_tokens": limit, "seed": seed, **sampling, "key": key}
                for row, (example, limit, seed) in enumerate(zip(examples, limits, seeds))])
        known = {line["row"] for line in self.folder.rewind(name, lambda line: is_sealed(line, key))}
        tqdm.write(f"iteration {iteration}: answering {len(examples):,} prompts, {len(known):,} in {name}")
        for rows, answers in draw(prompts, limits, seeds, known=known):
            if known.intersection(rows):  # of a batch that was written in part all is written again
                self.folder.rewind(name, lambda line, rows=rows: line["row"] not in rows)
            self.folder.write(name, [
                {"row": row, "where": examples[row].where, "prompt": self.data.tokenizer.decode(prompts[row]),
                 "response": self.sampler.text(ids), "finished": self.sampler.is_finished(ids), "ids": ids,
                 "key": seal(key, row, ids)}
                for row, ids in zip(rows, answers)])
        return True

    def have_come(self, name, draw, model, asked) -> bool:
        """Whether answers made elsewhere are there, and the model's: if not, prompts-<iteration>.jsonl asks.

        Raises InputError where they are no answers of this model, by their log-probabilities under it.
        """
        if not from_first(os.path.exists(self.folder.path(name))):
            prompts = name.replace("generated", "prompts")
            self.folder.rewind(prompts, lambda line: False)
            self.folder.write(prompts, asked)
            tqdm.write(f"{self.folder.path(prompts)} has {len(asked):,} prompts to be answered: put "
                       f"{{row, ids}} of each answer into {name} beside it, and resume")
            return False
        answers, some = self.answers_of(name, len(asked), asked[0]["key"]), asked[:256]
        if too_long := [row for row, line in enumerate(asked) if len(answers[row]) > line["max_tokens"]]:
            raise InputError(f"{name}: the answer of row {too_long[0]} has more tokens than max_tokens there")
        prompts = [np.array(line["ids"], np.int32) for line in some]
        limits, seeds = ([line[key] for line in some] for key in ("max_tokens", "seed"))
        own = {i: ids for rows, drawn in draw(prompts, limits, seeds) for i, ids in zip(rows, drawn)}
        pairs = [Example("", prompt, (np.array(answers[i], np.int32), np.array(own[i], np.int32)), {})
                 for i, prompt in enumerate(prompts)]
        logps = self.sampler.batcher.values(
            functools.partial(response_logps, model, bf16=self.sampler.bf16), pairs, "checking answers")
        means = np.array([[x / len(ids) for x, ids in zip(row, pair.responses)]
                          for row, pair in zip(logps, pairs)])
        gap = means[:, 0] - means[:, 1]
        if abs(gap.mean()) > 5 * gap.std() / math.sqrt(len(gap)) + 0.01:
            raise InputError(
                f"the answers in {name} have a mean log-probability of {means[:, 0].mean():.3f} nats a token "
                f"under this run's policy, its own answers one of {means[:, 1].mean():.3f}: draw them from "
                f"the weights in {self.folder.path('LATEST')}, with the settings in the file of prompts")
        return True

    @raise_on_all_ranks
    def examples(self, make: Callable, opponent: str, iteration: int, score=None) -> list[Example]:
        """What make(example, answers[, scores]) makes of this iteration's answers and, with mix_previous, of
        those of the one before. score(examples) judges, else the data do."""
        wait_for_all()  # until the last answer is written
        made, num_dropped, count = [], 0, self.settings["num_answers"]
        first = max(0, iteration - 1) if self.settings["mix_previous"] else iteration
        for number in range(first, iteration + 1):
            examples, key = self.prompted(number), self.key(opponent, number) if number == iteration else None
            answers = self.answers_of(f"generated-{number:02d}.jsonl", len(examples), key)
            groups = [[np.array(answers[row], np.int32) for row in range(start, start + count)]
                      for start in range(0, len(examples), count)]
            scores = self.judge(examples[::count], groups, score) if "scores" in parameters(make)[0] else None
            for i, (example, group) in enumerate(zip(examples[::count], groups)):
                found = make(example, group, *([scores[i]] if scores else []))
                found = [*found] if isinstance(found, list | tuple) else [] if found is None else [found]
                if not all(isinstance(x, Example) and all(map(len, x.responses)) for x in found):
                    raise InputError(f"loss={self.config.loss}: self_play must give Examples with responses "
                                     "that are not empty, as example.with_responses(...) does, or None")
                num_dropped += not found
                own = {"generated/length": sum(map(len, group)) / count,
                       "generated/finished": sum(map(self.sampler.is_finished, group)) / count}
                made += [replace(x, columns=x.columns | own) for x in found]
        tqdm.write(f"iteration {iteration}: {len(made):,} examples, {num_dropped:,} prompts gave none, "
                   "as where answers are equal, or the data's")
        return made

    def judge(self, examples, groups, score) -> list[list[float]]:
        """A score of each answer."""
        if score:
            return score([replace(x.with_responses(*(self.sampler.to_the_end(x, ids) for ids in group)),
                                  is_whole=False) for x, group in zip(examples, groups)])
        return [[self.sampler.true_scores(x, ids.tolist())["reward"] for ids in group]
                for x, group in zip(examples, groups)]

    def answers_of(self, name, count, key=None) -> dict[int, list[int]]:
        """{row: ids} of a file; key None takes any. Raises InputError if an answer is not there, or twice."""
        size = self.data.model_config.get_text_config().vocab_size
        try:
            answers = [(line["row"], line["ids"]) for line in self.folder.lines(name)
                       if key is None or line.get("key", key) == key or is_sealed(line, key)]
            is_whole = sorted(row for row, _ in answers) == list(range(count)) and all(
                ids and all(type(x) is int and 0 <= x < size for x in ids) for _, ids in answers)
        except (ValueError, TypeError, KeyError, AttributeError):
            is_whole = False
        if not is_whole:
            raise InputError(f"{self.folder.path(name)} has not one whole line for each of the {count:,} "
                             "answers that this run needs, with ids of its vocabulary: put it back, or start "
                             "a new run")
        return dict(answers)


def seal(key, row, ids) -> str:
    """Stands in an answer: whose it is, and that it is as it was written."""
    return hashlib.sha256(f"{key} {row} {ids}".encode()).hexdigest()[:16]


def is_sealed(line, key):
    return line.get("key") == seal(key, line.get("row"), line.get("ids"))
