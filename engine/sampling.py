"""How are answers drawn, and judged? Seeded sampling, an evaluation's samples, self-play's pairs."""

import contextlib
import functools
import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (GenerationConfig, LogitsProcessor, PreTrainedModel, TopKLogitsWarper,
                          TopPLogitsWarper)

from engine import InputError
from engine.batches import Batcher, Example
from engine.checkpoints import RunFolder
from engine.distributed import device, from_all, num_ranks, raise_on_all_ranks, rank, unsharded, wait_for_all
from engine.forward import autocast, response_logps, response_scores
from engine.report import progress


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling with noise of each row's own seed (the Gumbel-max trick).

    The scores are divided by temperature (0: greedy), cut to the top_k largest (0: all) and then to the
    smallest set of tokens of probability top_p, and get Gumbel noise: the largest is then a draw from their
    softmax.
    """

    def __init__(self, seeds, temperature, top_p, top_k=0):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.warpers = [TopKLogitsWarper(top_k)] if top_k else []
        self.warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    def __call__(self, input_ids, scores):
        if self.temperature == 0:
            return scores
        scores = scores.float() / self.temperature
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        return scores - noise.log().to(scores.device)  # -log of exponential noise is Gumbel noise


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
        model.generation_config = self.plain  # of the model's own a repetition penalty would be mixed in
        with unsharded(model, self.config) as in_step, progress(
                None, "sampling", total=len(batches), unit="batch") as bar:
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
        """Numbers of prompts to be answered at once: of similar lengths, within the positions."""
        batches, size = [], min(self.config.eval_batch_size, math.ceil(len(prompts) / num_ranks()))
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            if batches and len(batches[-1]) < size and (  # all go on until the first, with most room, is done
                    len(prompts[i]) + limits[batches[-1][0]] <= self.positions):
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
        with autocast(self.bf16), eager:
            output = model.generate(input_ids, attention_mask=mask, max_new_tokens=max_new_tokens,
                                    logits_processor=[noise], synced_gpus=in_step)
        return output[:, input_ids.shape[1]:].tolist()

    def up_to_end(self, ids):
        return ids[:next((at + 1 for at, token in enumerate(ids) if token in self.end_ids), len(ids))]

    def is_finished(self, ids):
        return len(ids) > 0 and ids[-1] in self.end_ids

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
        """Mean over answers of log pi - log ref on the sampled ids, in nats, clipped below at 0."""
        def ratios(batch):
            return response_logps(policy, batch, self.bf16) - response_logps(reference, batch, self.bf16)
        return max(0.0, sum(ratio for ratio, in self.values(ratios, answers, "KL")) / len(answers))

    def scores(self, answers) -> list[dict[str, float]]:
        """Of each answer the data's true scores, where they are known, and the reward model's `reward`."""
        scores, judge = [{} for _ in answers], self.data.judge
        if judge:
            for i, (example, ids) in enumerate(zip(self.examples, answers)):
                prompt = self.data.tokenizer.decode(example.prompt)
                known = judge.scores(prompt, self.text(ids), self.is_finished(ids))
                scores[i] = {name: float(value) for name, value in known.items()}
        if self.reward_model:
            learned = functools.partial(response_scores, self.reward_model, bf16=self.bf16)
            ended = [ids + example.after.tolist() if self.is_finished(ids) and (
                len(example.prompt) + len(ids) + len(example.after) <= self.positions) else ids
                     for ids, example in zip(answers, self.examples)]  # to the end of a chat's rendering
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
    """The opponents' answers to every training prompt, and the pairs of the data's responses and these.

    generated-<iteration>.jsonl keeps the answers; a resumed run samples only those that it lacks. Opponents
    are known by their fingerprints.
    """

    def __init__(self, config, run_data, folder: RunFolder, sampler: Sampler):
        self.config, self.data, self.examples = config, run_data, run_data.train_examples
        self.folder, self.sampler, self.block = folder, sampler, getattr(config, config.loss)

    def key(self, opponent: str, iteration: int) -> str:
        """Stands in every answer of an iteration: of another opponent or other sampling it is another."""
        parts = [self.block[name] for name in ("temperature", "top_p", "top_k", "max_tokens")]
        data = self.data.fingerprints["data"]
        parts += [self.config.max_length, self.config.seed, iteration, data, opponent]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def write_answers(self, model: PreTrainedModel, opponent: str, iteration: int):
        """Draws the model's answers of an iteration into its file."""
        name, key, examples = f"generated-{iteration:02d}.jsonl", self.key(opponent, iteration), self.examples
        sampling = {option: self.block[option] for option in ("temperature", "top_p", "top_k")}
        prompts = [example.prompt for example in examples]
        limits = [min(self.block["max_tokens"], self.config.max_length - len(prompt)) for prompt in prompts]
        seeds = [zlib.crc32(f"{self.config.seed} {iteration} {row}".encode())  # a CPU generator reads 32 bits
                 for row in range(len(examples))]
        known = {line["row"] for line in self.folder.rewind(name, lambda line: line.get("key") == key)}
        tqdm.write(f"iteration {iteration}: answering {len(examples):,} prompts, {len(known):,} in {name}")
        for rows, answers in self.sampler.batches(model, prompts, limits, seeds, sampling, known):
            if known.intersection(rows):  # of a batch that was written in part all is written again
                self.folder.rewind(name, lambda line, rows=rows: line["row"] not in rows)
            self.folder.write(name, [
                {"row": row, "where": examples[row].where, "prompt": self.data.tokenizer.decode(prompts[row]),
                 "response": self.sampler.text(ids), "finished": self.sampler.is_finished(ids), "ids": ids,
                 "key": key}
                for row, ids in zip(rows, answers)])

    @raise_on_all_ranks
    def pairs(self, opponent: str, iteration: int) -> list[Example]:
        """The data's responses against this iteration's answers and, with mix_previous, the one's before."""
        wait_for_all()  # until the last answer is written
        pairs, num_equal = [], 0
        first = max(0, iteration - 1) if self.block["mix_previous"] else iteration
        for number in range(first, iteration + 1):
            answers = self.answers_of(number, self.key(opponent, number) if number == iteration else None)
            for row in sorted(answers):
                example, ids = self.examples[row], answers[row]
                if ids == example.responses[0].tolist():
                    num_equal += 1
                    continue
                pairs.append(replace(
                    example, responses=(example.responses[0], np.array(ids, np.int32)),
                    columns={"finished": float(self.sampler.is_finished(ids))}))
        tqdm.write(f"iteration {iteration}: {len(pairs):,} pairs, {num_equal:,} dropped, equal to the data's")
        return pairs

    def answers_of(self, iteration, key):
        """{row: ids} of an iteration; key None takes any. Raises InputError if an answer is not there."""
        name = f"generated-{iteration:02d}.jsonl"
        try:
            answers = {line["row"]: line["ids"] for line in self.folder.lines(name)
                       if key is None or line["key"] == key}
        except (ValueError, TypeError, KeyError):
            answers = {}
        if answers.keys() != set(range(len(self.examples))):
            raise InputError(f"{self.folder.path(name)} has not one whole line for each answer of iteration "
                             f"{iteration}, which this run needs: put it back, or start a new run")
        return answers
