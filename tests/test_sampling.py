"""Answers depend on prompt and seed alone, come from the model's distribution, and are judged rightly."""

import dataclasses
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (FEW_ROWS, TEMPORARY, TINY_RUN, config_of, make_trainer, read_lines,
                      same_weights, write_bare_pairs, write_lines)
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GenerationConfig, GPT2Config, GPT2LMHeadModel)

import engine.sampling
from data import Dataset
from engine import InputError
from engine.batches import Example
from engine.sampling import Sampler, SeededSampling, SelfPlay, score_metrics
from engine.toy import toy

QUICK = [f"eval_data={FEW_ROWS}"]  # toy itself has all of its samples judged
EXACT = ["dtype=float64", "compute_dtype=float64"]  # where the last bit decides no argmax
SIXTY = write_lines(os.path.join(TEMPORARY.name, "sixty to answer.jsonl"), toy("train", True)[:60])
SPIN = ["loss=spin", f"data={SIXTY}", *QUICK, "num_samples=0", "max_steps=null", "num_epochs=0.1",
        "spin.max_tokens=10", "eval_batch_size=400"]  # 2 steps in each iteration
PLAIN = {"temperature": 1.0, "top_p": 1.0}


def sampler_of(trainer, end_ids=None, *, models=None, examples=None):
    """The trainer's sampler made again, once its models or data have been changed."""
    if end_ids is not None:
        trainer.data.end_ids = end_ids
    sampler = Sampler(trainer.config, trainer.data, trainer.batcher, models or [trainer.policy], None, False)
    sampler.examples = sampler.examples if examples is None else examples
    return sampler


def prompts_of(*lengths):
    return [np.arange(2, 2 + length) for length in lengths]


# ---------------------------------------------------------------- drawing


def test_samples_do_not_depend_on_batching():
    trainer = make_trainer(*QUICK, *EXACT, "eval_batch_size=64", "sample_max_tokens=12")
    sampler = trainer.sampler
    prompts = prompts_of(*range(40, 20, -1), *range(1, 21))
    sampler.examples = [Example("x", prompt, (), {}) for prompt in prompts]
    together = sampler.answers(trainer.policy)
    trainer.config.eval_batch_size = 3
    assert sampler.answers(trainer.policy) == together
    sampler.examples = sampler.examples[:5]
    assert sampler.answers(trainer.policy) == together[:5]
    assert len(together) == 40 and len(set(map(tuple, together))) > 30  # they differ from prompt to prompt
    trainer.config.seed = 1
    assert sampler.answers(trainer.policy) != together[:5]


def test_samples_come_from_the_policys_distribution():
    """The first sampled token's frequencies against the softmax, by a chi-square-like bound."""
    trainer = make_trainer(*QUICK, "sample_max_tokens=1", "eval_batch_size=4000")
    torch.manual_seed(0)
    for parameter in trainer.policy.lm_head.parameters():
        parameter.data = torch.randn_like(parameter) / 4  # far from uniform
    prompt = trainer.sampler.examples[0]
    trainer.sampler.examples = [prompt] * 4000
    drawn = [ids[0] for ids in trainer.sampler.answers(trainer.policy)]
    with torch.no_grad():
        logits = trainer.policy(input_ids=torch.tensor([[*prompt.prompt]])).logits[0, -1]
    expected = logits.softmax(-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / 4000
    fair = torch.bincount(torch.multinomial(expected, 4000, replacement=True), minlength=len(expected)) / 4000
    distance, fair_distance = ((x - expected).abs().sum().item() / 2 for x in (counts, fair))
    assert distance < 1.3 * fair_distance
    uniform = (expected - 1 / len(expected)).abs().sum().item() / 2
    assert fair_distance < uniform / 2  # the bound tells this distribution from another


def test_noise_of_a_row_is_its_seeds():
    """-log of an exponential draw is added to the scores, once they are divided and cut."""
    scores = torch.randn(3, 50)
    hot = SeededSampling([1, 2, 3], 2.0, 1.0)(None, scores)
    assert torch.equal(hot, SeededSampling([1, 2, 3], 1.0, 1.0)(None, scores / 2))
    assert torch.equal(hot[1:2], SeededSampling([2], 2.0, 1.0)(None, scores[1:2]))
    noise = torch.empty(50).exponential_(generator=torch.Generator().manual_seed(2))
    assert torch.equal(hot[1], scores[1] / 2 - noise.log())
    kept = SeededSampling([1, 2, 3], 1.0, 1.0, top_k=4)(None, scores).isfinite()
    assert torch.equal(kept, scores >= scores.topk(4).values[:, -1:])
    assert torch.equal(SeededSampling([1, 2, 3], 0, 1.0)(None, scores), scores)
    draws = SeededSampling([1, 2, 3], 1.0, 1.0)  # of one row: the next step's noise is another
    assert not torch.equal(draws(None, scores), draws(None, scores))


def test_greedy_temperature_and_top_p():
    trainer = make_trainer(*QUICK, *EXACT, "num_samples=1", "sample_max_tokens=5", "sample_temperature=0")
    sampler, (example,) = trainer.sampler, trainer.sampler.examples
    ids = torch.tensor([[*example.prompt]])
    greedy = trainer.policy.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1]:].tolist()
    assert sampler.answers(trainer.policy) == [greedy]
    trainer.config.sample_temperature, trainer.config.sample_top_p = 1.0, 1e-6  # only the likeliest is left
    assert sampler.answers(trainer.policy) == [greedy]
    trainer.config.sample_top_p = 1.0
    assert sampler.answers(trainer.policy) != [greedy]


def test_samples_stay_within_the_models_positions():
    trainer = make_trainer(*QUICK, "sample_max_tokens=50")
    reader = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(
        max_position_embeddings=20)))
    examples = [Example("x", prompt, (), {}) for prompt in prompts_of(5, 12, 19)]
    models, never = [trainer.policy, reader, None], [-1]
    sampler = sampler_of(trainer, never, models=models, examples=examples)
    assert [len(ids) for ids in sampler.answers(trainer.policy)] == [15, 8, 1]


def test_long_prompts_have_less_room_and_share_batches():
    trainer = make_trainer(*QUICK)
    trainer.policy.config.max_position_embeddings = 50
    sampler = sampler_of(trainer, [-1])
    batches = [(batch, list(map(len, ids))) for batch, ids in sampler.batches(
        trainer.policy, prompts_of(3, 44, 10, 20, 45, 20), [30, 30, 7, 30, 30, 30], range(6), PLAIN)]
    assert batches == [([0, 2, 3, 5], [30, 7, 30, 30]), ([1], [6]), ([4], [5])]
    sampler = sampler_of(trainer)  # with a real end
    prompts = prompts_of(3, 44, 45)
    for batch, answers in sampler.batches(trainer.policy, prompts, [30] * 3, range(3), PLAIN):
        assert all(0 < len(ids) <= (30, 6, 5)[i] for i, ids in zip(batch, answers))


def test_prompts_answered_at_once_are_bounded_by_tokens(monkeypatch):
    """On a GPU to four microbatches' tokens, 400 here, room for answers counted; a long one goes alone."""
    trainer = make_trainer(*QUICK)
    sampler = sampler_of(trainer)
    sampler.batcher = dataclasses.replace(sampler.batcher, max_tokens=100)
    prompts, limits = prompts_of(*[10] * 9, 60, 600), [40] * 11
    assert [len(batch) for batch in sampler.group(prompts, limits)] == [11]
    monkeypatch.setattr(engine.sampling, "device", lambda: torch.device("cuda", 0))
    assert [len(batch) for batch in sampler.group(prompts, limits)] == [8, 2, 1]


def test_batches_that_are_known_are_left_out():
    trainer = make_trainer(*QUICK, "eval_batch_size=2")
    arguments = trainer.policy, prompts_of(3, 4, 5, 6), [4] * 4, range(4), PLAIN
    whole = list(trainer.sampler.batches(*arguments))
    assert [batch for batch, _ in whole] == [[0, 1], [2, 3]]
    assert list(trainer.sampler.batches(*arguments, {0, 1, 2})) == whole[1:]


def test_sampling_leaves_the_models_own_generation_config_aside(sft_run):
    """A repetition penalty would be mixed in; what is saved has it again."""
    model = AutoModelForCausalLM.from_pretrained(f"{sft_run}/LATEST")
    model.generation_config.repetition_penalty, model.generation_config.min_new_tokens = 5.0, 4
    model.save_pretrained("own")
    AutoTokenizer.from_pretrained(f"{sft_run}/LATEST").save_pretrained("own")
    settings = [*QUICK, "num_samples=4", "sample_temperature=0"]
    plain = make_trainer(f"model={sft_run}/LATEST", *settings)
    trainer = make_trainer("model=own", *settings)
    assert trainer.policy.generation_config.repetition_penalty == 5
    assert trainer.sampler.answers(trainer.policy) == plain.sampler.answers(plain.policy)
    trainer.train_step()
    trainer.save()
    saved = GenerationConfig.from_pretrained("runs/sft/LATEST")
    assert saved.repetition_penalty == 5 and saved.min_new_tokens == 4


def test_samples_fit_every_model_that_reads_them(sft_run):
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=16, n_layer=1,
                               n_head=2)).save_pretrained("gpt")
    tokenizer.save_pretrained("gpt")
    trainer = make_trainer("loss=kd", f"model={sft_run}/LATEST", "reference=gpt", *QUICK, "num_samples=16",
                           "max_length=24", "sample_max_tokens=90", "max_prompt_length=12")
    trainer.evaluate()  # 24 learned positions
    answers = trainer.sampler.answers(trainer.policy)
    assert max(len(e.prompt) + len(ids) for e, ids in zip(trainer.sampler.examples, answers)) == 24


# ---------------------------------------------------------------- judging


def test_sample_metrics_by_hand():
    scores = [{"reward": r, "well_formed": 1.0} for r in (4.0, 2.0, 0.0, -2.0)]
    others = [{"reward": r, "well_formed": 0.0} for r in (0.0, 2.0, 2.0, -4.0)]
    assert score_metrics(scores) == {"samples/reward": 1.0, "samples/well_formed": 1.0}
    expected = {"samples/kl": 0.25, "samples/reward": 1.0, "samples/well_formed": 1.0,
                "samples/reference_reward": 0.0, "samples/reference_well_formed": 0.0,
                "samples/win_rate": (1 + 0.5 + 0 + 1) / 4}
    assert score_metrics(scores, others, 0.25) == expected
    assert score_metrics(scores, others, 0.25, lambda kl: 8 * kl) == expected | {
        "samples/optimal_reward": 2.0, "samples/efficiency": 0.5}
    assert score_metrics(scores, others, 0.25, lambda kl: kl) == expected | {  # too little to divide by
        "samples/optimal_reward": 0.25, "samples/efficiency": None}
    judged = [values | {"true_reward": 3.0} for values in scores]  # by a model: the best is that of true ones
    assert score_metrics(judged, others, 0.25, lambda kl: 24 * kl)["samples/efficiency"] == 0.5


def test_the_kl_of_samples_is_summed_over_the_vocabulary():
    trainer = make_trainer("loss=dpo", *QUICK, *EXACT, "lr=0.05", "warmup_steps=0", "sample_max_tokens=6",
                           "num_samples=20", "num_eval_examples=20")
    policy, reference, sampler = trainer.policy, trainer.reference, trainer.sampler
    answers = sampler.answers(policy)
    assert sampler.kl(policy, reference, answers) == 0.0
    trainer.train_step()
    for first, second in ((policy, reference), (reference, policy)):
        expected = 0.0
        for e, ids in zip(sampler.examples, answers, strict=True):
            row = torch.tensor([[*e.prompt, *ids]])
            with torch.no_grad():
                p, q = (model(input_ids=row).logits[0].softmax(-1) for model in (first, second))
            before = slice(len(e.prompt) - 1, row.shape[1] - 1)  # where a sampled token is predicted
            expected += (p[before] * (p[before] / q[before]).log()).sum().item() / 20
        assert sampler.kl(first, second, answers) == pytest.approx(expected, rel=1e-6) and expected > 1e-2


def test_the_kl_of_samples_is_the_mean_log_ratio_of_many():
    trainer = make_trainer("loss=dpo", *QUICK, *EXACT, "lr=0.05", "warmup_steps=0", "sample_max_tokens=8",
                           "num_samples=50", "num_eval_examples=50", "eval_batch_size=500")
    trainer.train_step()
    sampler = sampler_of(trainer, examples=[*trainer.sampler.examples] * 40)
    answers, ratios = sampler.answers(trainer.policy), []
    assert len(set(map(tuple, answers))) > 500
    for start in range(0, 2000, 500):  # padded on the right, where a causal model does not look
        group = list(zip(sampler.examples, answers))[start:start + 500]
        rows = [[*x.prompt, *ids] for x, ids in group]
        padded = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
        with torch.no_grad():
            p, q = (model(input_ids=padded).logits.log_softmax(-1)
                    for model in (trainer.policy, trainer.reference))
        for gap, (x, _), row in zip(p - q, group, rows):
            ratios.append(sum(gap[at - 1, row[at]].item() for at in range(len(x.prompt), len(row))))
    error = np.std(ratios) / math.sqrt(2000)
    kl = sampler.kl(trainer.policy, trainer.reference, answers)
    assert abs(kl - np.mean(ratios)) < 4 * error and kl > 10 * error


def test_sample_length_is_the_mean_number_of_tokens():
    trainer = make_trainer(*QUICK, "num_samples=3", "num_eval_examples=3")
    assert trainer.sampler.metrics({"policy": [[5, 6, 7], [8], [9, 9]]}, {"policy": [{}] * 3}) == {
        "samples/length": 2.0}
    end = trainer.data.end_ids[0]
    assert trainer.sampler.up_to_end([5, end, 6, end]) == [5, end] and trainer.sampler.up_to_end([5]) == [5]
    lengths = [len(ids) for ids in trainer.sampler.answers(trainer.policy)]
    assert trainer.sample() == {"samples/length": sum(lengths) / 3}


def test_known_scores_need_no_optimum():
    trainer = make_trainer("loss=dpo", *QUICK)
    trainer.data.judge = Dataset(None, scores=lambda prompt, response, finished: {"reward": 1})
    metrics = trainer.sample()
    assert metrics["samples/reward"] == 1.0 and metrics["samples/win_rate"] == 0.5
    assert "samples/optimal_reward" not in metrics
    trainer.data.judge = Dataset(None, scores=lambda prompt, response, finished: {"titled": ":" in prompt})
    assert trainer.sample()["samples/titled"] == 1.0


def test_a_reward_model_judges_samples(run, rm_run, sft_run):
    shared = [*TINY_RUN, f"reward_model={rm_run}/LATEST", f"model={sft_run}/LATEST", "sample_max_tokens=24"]
    folder = run(*shared, "loss=dpo", "max_steps=2", "eval_first=false", "lr=0.01")
    line = read_lines(f"{folder}/metrics.jsonl")[-1]
    assert {"samples/reward", "samples/true_reward", "samples/reference_reward", "samples/win_rate",
            "samples/efficiency", "samples/well_formed"} <= set(line)
    assert line["samples/efficiency"] is None or line["samples/efficiency"] == pytest.approx(
        line["samples/true_reward"] / line["samples/optimal_reward"])
    assert line["samples/reward"] != line["samples/true_reward"]
    write_bare_pairs(40)
    bare = ["loss=sft", "data=bare.jsonl", "eval_data=bare.jsonl"]
    folder = run(*shared, *bare, "max_steps=0")
    records, line = read_lines(f"{folder}/samples.jsonl"), read_lines(f"{folder}/metrics.jsonl")[0]
    assert "samples/win_rate" not in line and "samples/true_reward" not in line
    assert line["samples/reward"] == pytest.approx(sum(record["reward"] for record in records) / len(records))
    model = AutoModelForSequenceClassification.from_pretrained(f"{rm_run}/LATEST")
    trainer = make_trainer(*shared, *bare, "exp_name=again")
    answers = trainer.sampler.answers(trainer.policy)
    for example, ids, record in zip(trainer.sampler.examples, answers, records, strict=True):
        score = model(torch.tensor([[*example.prompt, *ids]])).logits.item()
        assert record["policy"] == trainer.sampler.text(ids)
        assert record["reward"] == pytest.approx(score, rel=1e-4, abs=1e-4)
    trainer.sampler.positions = math.inf  # as of models without a limit
    assert trainer.sampler.scores(answers)[0]["reward"] == pytest.approx(records[0]["reward"], rel=1e-4)


def test_pairs_that_are_only_sampled_from_need_no_rewards(run, rm_run, sft_run):
    write_bare_pairs(12)
    folder = run(*TINY_RUN, "loss=rpo", "data=bare.jsonl", "eval_data=bare.jsonl",
                 f"reward_model={rm_run}/LATEST", f"model={sft_run}/LATEST", "num_eval_examples=2",
                 "num_samples=6", "max_steps=1")
    assert len(read_lines(f"{folder}/samples.jsonl")) == 12


# ---------------------------------------------------------------- self-play


def test_generated_answers(run, sft_run):
    """The data's responses have 21 tokens, so of answers of at most 21 some have come to their end."""
    folder = run(*TINY_RUN, *SPIN, f"model={sft_run}/LATEST", "spin.max_tokens=21", "eval_every=0")
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    first, second = (sorted(read_lines(f"{folder}/generated-0{i}.jsonl"), key=lambda line: line["row"])
                     for i in (0, 1))
    assert [line["row"] for line in first] == [line["row"] for line in second] == list(range(60))
    for line in first:
        assert set(line) == {"row", "where", "prompt", "response", "finished", "ids", "key"}
        assert line["where"] == f"{os.path.basename(SIXTY)} line {line['row'] + 1}"
        assert line["prompt"].startswith("Review of The ")
        assert line["finished"] == (line["ids"][-1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in line["ids"][:-1]
        assert len(line["ids"]) == 21 or line["finished"]
        ids = line["ids"][:-1] if line["finished"] else line["ids"]
        assert tokenizer.decode(ids) == line["response"]  # a special token within is shown
    assert {line["finished"] for line in first} == {True, False}
    responses = [[line["response"] for line in lines] for lines in (first, second)]
    assert len(set(responses[0])) > 40 and responses[0] != responses[1]
    assert responses[0] != [row["chosen"] for row in toy("train", True)[:60]]


def test_generated_files_do_not_depend_on_the_batch(sft_run):
    contents = []
    for size in (400, 16, 7):
        trainer = make_trainer(*SPIN, *EXACT, f"model={sft_run}/LATEST", f"eval_batch_size={size}",
                               f"run_dir=b{size}")
        trainer.next_iteration()
        with open(f"b{size}/generated-00.jsonl") as file:
            contents.append(file.read())
    assert contents[0].count("\n") == 60 and contents[0] == contents[1] == contents[2]


def test_pairs_of_self_play(capsys):
    trainer = make_trainer("loss=spin", *QUICK, "num_samples=0", "spin.mix_previous=true")
    self_play, examples = trainer.self_play, trainer.data.train_examples
    same = {row: examples[row].responses[0].tolist() for row in (0, 3)}
    end = trainer.data.end_ids[0]
    answers = {row: same.get(row, [row, end] if row == 2 else [row]) for row in range(400)}
    for number in (0, 1):
        key = {"key": self_play.key("opponent", number)}
        write_lines(f"runs/spin/generated-0{number}.jsonl", [
            {"row": row, "ids": ids if row in same else [5 + number, *ids]} | key
            for row, ids in reversed(answers.items())])
    make = trainer.objective.self_play
    pairs = self_play.examples(make, "opponent", 0)
    assert "iteration 0: 398 examples, 2 prompts gave none" in capsys.readouterr().out
    assert [e.responses[1].tolist() for e in pairs[:3]] == [[5, 1], [5, 2, end], [5, 4]]
    assert [e.columns for e in pairs[:3]] == [
        {"generated/length": length, "generated/finished": finished}
        for length, finished in ((2, 0.0), (3, 1.0), (2, 0.0))]
    assert all((e.responses[0] == examples[i].responses[0]).all() for e, i in zip(pairs, (1, 2, 4)))
    pairs = self_play.examples(make, "opponent", 1)
    assert [tuple(e.responses[1][:2]) for e in pairs] == [
        (first, row) for first in (5, 6) for row in range(400) if row not in same]
    self_play.settings["mix_previous"] = False
    assert {e.responses[1][0] for e in self_play.examples(make, "opponent", 1)} == {6}
    with pytest.raises(InputError, match="generated-01.jsonl has not one whole line"):
        self_play.examples(make, "another", 1)
    write_lines("runs/spin/generated-01.jsonl", read_lines("runs/spin/generated-01.jsonl")[1:])
    with pytest.raises(InputError, match="generated-01.jsonl has not one whole line"):
        self_play.examples(make, "opponent", 1)


def test_what_an_answer_depends_on_is_in_its_key():
    def key(*settings, opponent="a", iteration=0, fingerprint="of the rows"):
        run_data = SimpleNamespace(fingerprints={"data": fingerprint, "tokens": "t"}, train_examples=[])
        return SelfPlay(config_of("loss=spin", *settings), run_data, None, None).key(opponent, iteration)
    keys = [key(), key(opponent="b"), key(iteration=1), key(fingerprint="of others"), *map(key, (
        "seed=1", "spin.temperature=0.5", "spin.top_p=0.5", "spin.top_k=5", "spin.max_tokens=9",
        "max_length=300"))]
    assert len(set(keys)) == len(keys) == 10
    assert key("lr=0.1", "batch_size=1", "spin.beta=0.5") == keys[0]


def test_an_answer_stays_within_max_length(sft_run):
    """And of one likeliest token each it is greedy, whatever its noise."""
    trainer = make_trainer(*SPIN, *EXACT, f"model={sft_run}/LATEST", "max_length=20", "max_prompt_length=10",
                           "spin.max_tokens=99", "spin.top_k=1")
    trainer.next_iteration()
    assert max(len(e.prompt) + len(e.responses[1]) for e in trainer.train_examples) == 20
    for example in trainer.train_examples[:4]:
        greedy = trainer.policy.generate(torch.tensor([[*example.prompt]]), do_sample=False,
                                         max_new_tokens=20 - len(example.prompt))
        assert greedy[0].tolist() == [*example.prompt, *example.responses[1]]


def test_answers_of_another_opponent_are_not_used(run):
    """Fresh after a stop without a checkpoint; and a run that was taken back to fewer steps than it had."""
    os.makedirs("runs/new")
    with open("runs/new/config.yaml", "w") as file:
        file.write("loss: spin\nprovenance: {run_id: abc}\n")
    write_lines("runs/new/generated-00.jsonl", [
        *({"row": row, "ids": [7], "key": "a"} for row in range(60)), {"x": 1}])
    folder = run(*TINY_RUN, *SPIN, "max_steps=1", "eval_every=0", "resume=auto", "exp_name=new")
    assert [7] not in [line["ids"] for line in read_lines(f"{folder}/generated-00.jsonl")]
    settings = [*TINY_RUN, *SPIN, "num_epochs=0.25", "save_every=1", "eval_every=0", "lr_schedule=constant"]
    whole = run(*settings, "run_dir=whole")
    run(*settings, "run_dir=part", "max_steps=3")
    run("resume=true", "run_dir=part", "max_steps=2")
    assert not os.path.exists("part/generated-01.jsonl")
    write_lines("part/generated-01.jsonl", [
        line | {"key": "b", "ids": [7]} for line in read_lines("part/generated-00.jsonl")])
    run("resume=true", "run_dir=part", "max_steps=null")
    assert same_weights(whole, "part")
    assert read_lines("part/generated-01.jsonl") == read_lines("whole/generated-01.jsonl")
