"""How fast does self-play answer its prompts? Tokens a second, in turns with `generate` on unsorted batches.

    python tests/benchmarks/generation.py --data FILE [--model FOLDER] [--prompts 256] [--rounds 5]
        [key=value ...]

Both sample at temperature 1 from the same weights and prompts, in batches of eval_batch_size and at most
spin.max_tokens tokens each; what counts is a response's tokens up to its end token. Prints medians and the
median of the rounds' ratios.
"""

import argparse
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import torch
from torch.nn.utils.rnn import pad_sequence

import train
from data import DATASETS
from engine.checkpoints import load_config
from engine.config import read_arguments
from losses import OBJECTIVES


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments, settings = parser.parse_known_args()
    given = read_arguments(["loss=spin", "eval_batch_size=64", "spin.max_tokens=64", f"data={arguments.data}",
                            f"model={arguments.model}", "run_dir=/nonexistent/generation", *settings])
    config, _ = load_config(given, OBJECTIVES, DATASETS)
    trainer = train.build_trainer(config)
    examples = trainer.data.train_examples[:arguments.prompts]
    rates = {"here": [], "generate": []}
    for round in range(arguments.rounds + 1):
        for name, answer in (("here", sorted_and_seeded), ("generate", plainly)):
            started = time.perf_counter()
            with torch.no_grad():
                answers = answer(trainer, examples, round)
            if round:  # the first warms up
                rates[name].append(sum(map(len, answers)) / (time.perf_counter() - started))
    ratio = statistics.median(a / b for a, b in zip(rates["here"], rates["generate"]))
    lengths = sorted(len(example.prompt) for example in examples)
    here, plain = (statistics.median(rates[name]) for name in ("here", "generate"))
    print(f"\n{len(examples)} prompts of {lengths[0]} to {lengths[-1]} tokens, median "
          f"{lengths[len(lengths) // 2]}: {here:,.0f} tokens/s here, {plain:,.0f} by generate on unsorted "
          f"batches of {config.eval_batch_size}; {ratio:.2f} times as many")


def sorted_and_seeded(trainer, examples, round):
    """As SelfPlay.write_answers has them answered."""
    config, prompts = trainer.config, [example.prompt for example in examples]
    limits = [min(config.spin["max_tokens"], config.max_length - len(prompt)) for prompt in prompts]
    seeds = [round * 1_000_003 + number for number in range(len(examples))]
    sampling = {"temperature": 1, "top_p": 1, "top_k": 0}
    batches = trainer.sampler.batches(trainer.policy, prompts, limits, seeds, sampling)
    return [ids for _, answers in batches for ids in answers]


def plainly(trainer, examples, round):
    torch.manual_seed(round)
    answers, size, end_ids = [], trainer.config.eval_batch_size, trainer.data.end_ids
    for start in range(0, len(examples), size):
        prompts = [torch.from_numpy(example.prompt).long() for example in examples[start:start + size]]
        ids = pad_sequence(prompts, True, end_ids[0], "left").to(trainer.policy.device)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left").to(ids.device)
        output = trainer.policy.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, eos_token_id=end_ids, pad_token_id=end_ids[0],
            max_new_tokens=trainer.config.spin["max_tokens"])
        answers += [trainer.sampler.up_to_end(row) for row in output[:, ids.shape[1]:].tolist()]
    return answers


if __name__ == "__main__":
    main()
