"""The step against an obvious float64 implementation, splits, evaluation, sampling, saving, stopping, resuming."""

import copy
import dataclasses
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import FEW_ROWS, ROOT, TINY_RUN, losses_of, read_lines, write_lines
from safetensors.torch import load_file
from transformers import (CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification)

import train
import trainers
from data import SEPARATE, Example, InputError, Layout, collate
from losses import OBJECTIVES

UNREPEATABLE = ("split", "time", "examples_per_second", "tokens_per_second")


def make_trainer(*arguments):
    return train.build_trainer(train.load_config([*TINY_RUN, *arguments])[0])


def needed(loss, sft_run):
    """The settings without which a loss does not start, and those that make it quick."""
    return {"kd": [f"reference={sft_run}/LATEST"], "spin": ["spin.max_tokens=8"]}.get(loss, [])


# ---------------------------------------------------------------- the step, against the simplest version


def obvious_logp(model, example, response):
    """log pi of one response: its own row, full logits, log_softmax, gather."""
    ids = torch.tensor([[*example.prompt, *response]])
    logps = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
    start = len(example.prompt)
    return sum(logps[at - 1, ids[0, at]] for at in range(start, ids.shape[1]))


def obvious_losses(name, model, reference, example):
    """The per-example loss with the formulas written out, and the example's share of the denominator."""
    if name == "rm":
        w, l = (model(input_ids=torch.tensor([[*example.prompt, *response]])).logits[0, 0]
                for response in example.responses)
        return torch.log(1 + torch.exp(l - w)), 1
    if name == "kd":
        ids = torch.tensor([[*example.prompt, *example.responses[0]]])
        logps = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, len(example.prompt) - 1:-1]
        with torch.no_grad():
            teacher = reference(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, len(example.prompt) - 1:-1]
        return (teacher.exp() * (teacher - logps)).sum(), len(logps)
    w = obvious_logp(model, example, example.responses[0])
    if name == "sft":
        return -w, len(example.responses[0])
    l = obvious_logp(model, example, example.responses[1])
    with torch.no_grad():
        reference_w, reference_l = (obvious_logp(reference, example, r) for r in example.responses)
    h = (w - reference_w) - (l - reference_l)
    if name in ("dpo", "spin"):
        return torch.log(1 + torch.exp(-0.5 * h)), 1
    if name == "ipo":
        return (h - 1) ** 2, 1
    p = 1 / (1 + math.exp(-(example.columns["chosen_reward"] - example.columns["rejected_reward"])))
    q = 1 / (1 + torch.exp(-0.5 * h))
    return p * (math.log(p) - torch.log(q)) + (1 - p) * (math.log(1 - p) - torch.log(1 - q)), 1


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-5)])
def test_trajectory_matches_the_obvious_implementation(name, dtype, tolerance, sft_run):
    """Five steps: losses, every gradient, clipping, warmup and RMSprop, against float64."""
    block = [f"{name}.beta=0.5"] if f"{name}.beta" in train.read_schema()[0] else []
    # transformers' RMSNorm is float32 in float64 models too, so shared rows differ by 3e-8 of a gradient there
    block += [*needed(name, sft_run), "layout=separate" if dtype == "float64" else "layout=shared"]
    trainer = make_trainer(f"loss={name}", *block, f"dtype={dtype}", f"compute_dtype={dtype}", "max_steps=5",
                           "max_grad_norm=0.5", "lr=1e-5", "warmup_steps=2", "lr_schedule=constant",
                           "max_tokens_per_microbatch=100", f"model={sft_run}/LATEST")
    if name == "spin":
        trainer.next_iteration()
    if name == "kd":  # another model, or there is nothing to learn
        with torch.no_grad():
            for p in trainer.reference.parameters():
                p += 0.02 * torch.randn_like(p)
    model = copy.deepcopy(trainer.policy).double()
    reference = copy.deepcopy(trainer.reference or model).double()
    squares = [torch.zeros_like(p) for p in model.parameters()]
    order = torch.randperm(len(trainer.train_examples), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(5):
        batch = [trainer.train_examples[i] for i in order[4 * step:4 * step + 4]]
        losses, weights = zip(*(obvious_losses(name, model, reference, example) for example in batch))
        loss = sum(losses) / sum(weights)
        model.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1, 0.5 / (norm + 1e-6))  # torch's clip_grad_norm_ adds 1e-6

        metrics = trainer.train_step()
        # float32 weights drift apart by rounding, which RMSprop divides by small gradients
        drift = tolerance * (1 if name == "dpo" or dtype == "float64" else 3)
        assert metrics["loss"] == pytest.approx(loss.item(), abs=drift, rel=drift)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=max(3 * tolerance, 1e-9))
        for p, ours in zip(model.parameters(), trainer.policy.parameters()):
            difference = (ours.grad.double() - p.grad).abs().max()
            assert difference <= drift * p.grad.abs().max()

        rate = 1e-5 * min(1, (step + 1) / 3)
        assert metrics["lr"] == rate
        with torch.no_grad():
            for p, square in zip(model.parameters(), squares):
                square.mul_(0.99).add_(0.01 * p.grad.square())
                p -= rate * p.grad / (square.sqrt() + 1e-8)
    if dtype == "float64":
        for p, ours in zip(model.parameters(), trainer.policy.parameters()):
            assert torch.allclose(p, ours, rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", [
    ["loss=sft"], ["loss=sft", "sft.average=examples"], ["loss=dpo", "dpo.sft_weight=0.1"], ["loss=ipo"],
    ["loss=ipo", "ipo.average_logps=true"], ["loss=rpo"], ["loss=rm"], ["loss=kd", "kd.sft_weight=0.5"],
    ["loss=spin", "num_epochs=0.15", "eval_batch_size=400"]], ids=" ".join)
def test_a_step_is_the_same_however_it_is_split(settings, run, sft_run, monkeypatch):
    settings += needed(settings[0][5:], sft_run)
    monkeypatch.setattr(trainers, "CHUNK_LOGITS", 10_000)  # some twenty tokens
    curves = {}
    splits = [(1, 10**6), (2, 10**6), (8, 10**6), (1, 200), (2, 97), (1, 1)]
    for i, (parts, budget) in enumerate(splits):
        folder = run(*settings, *TINY_RUN, "max_steps=5", "batch_size=16", "eval_every=0", "lr=1e-5",
                     f"gradient_accumulation_steps={parts}", f"max_tokens_per_microbatch={budget}", f"run_dir=run{i}")
        lines = read_lines(f"{folder}/metrics.jsonl")
        curves[parts, budget] = [{k: v for k, v in line.items() if k not in UNREPEATABLE} for line in lines]
    for curve in curves.values():
        for line, expected in zip(curve, curves[splits[0]], strict=True):
            assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_sft_averages_tokens_or_examples():
    by_tokens, by_examples = make_trainer("loss=sft"), make_trainer("loss=sft", "sft.average=examples")
    examples = by_tokens.train_examples[:4]
    logps = [obvious_logp(by_tokens.policy, example, example.responses[0]).item() for example in examples]
    for trainer, count in ((by_tokens, sum(len(e.responses[0]) for e in examples)), (by_examples, 4)):
        sums = trainer.accumulate([collate(examples)], trainer.denominator(examples))
        means = trainers.means(sums, [*map(float, sums.values())], trainer.denominator(examples), len(examples))
        assert means["loss"] == pytest.approx(-sum(logps) / count, rel=1e-5)


def test_bfloat16_computes_on_float32_weights():
    trainer, exact = make_trainer("loss=dpo", "compute_dtype=bfloat16"), make_trainer("loss=dpo")
    assert all(p.dtype == torch.float32 for p in trainer.policy.parameters())
    batch = collate(trainer.train_examples[:8])
    logps, expected = (t.response_logps(t.policy, batch) for t in (trainer, exact))
    assert logps.dtype == torch.float32
    assert 1e-4 < (logps - expected).abs().max() < 1.0  # really bfloat16, and not far off
    assert trainer.train_step()["loss"] == pytest.approx(math.log(2), abs=1e-6)


FAMILIES = {  # where a window is possible, of 8 tokens
    "llama": {}, "gpt2": {}, "gpt_neox": {}, "opt": {}, "qwen2": {}, "qwen3": {}, "olmo2": {}, "cohere": {},
    "mistral": {"sliding_window": 8}, "gemma2": {"sliding_window": 8}, "gemma3_text": {"sliding_window": 8},
    "phi3": {"sliding_window": 8}, "gpt_oss": {"sliding_window": 8}, "mixtral": {"sliding_window": 8},
    "llama4_text": {"attention_chunk_size": 8, "intermediate_size_mlp": 48}}


def tiny_of(model_type, **more):
    """A small random causal model of a family, without its special defaults for size."""
    more = FAMILIES.get(model_type, {}) | more
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if model_type == "opt":
        size |= {"word_embed_proj_dim": 32, "ffn_dim": 48, "init_std": 0.3}
    elif model_type not in ("gpt2", "bloom", "mpt", "gpt_neo", "mamba"):
        size |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    if model_type == "gpt_neo":
        size |= {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8}
        del size["num_hidden_layers"], size["num_attention_heads"]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**size | {"initializer_range": 0.3} | more)
    for name in [name for name in vars(config) if "drop" in name and isinstance(getattr(config, name), float)]:
        setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config).eval()


def random_pairs(vocab_size=60):
    rng = np.random.default_rng(0)
    return [Example("x", rng.integers(3, vocab_size, p), tuple(rng.integers(3, vocab_size, n) for n in lengths), {})
            for p, *lengths in ((12, 9, 14), (5, 20, 3), (16, 4, 4), (1, 1, 2))]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_both_layouts_agree_with_the_plain_model(model_type):
    """Log-probabilities and gradients, the last in one row with another, against each sequence padded on the left
    and run by the model as transformers has it; activation checkpointing too."""
    trainer = make_trainer("loss=dpo", "max_steps=0")
    model = trainer.policy = tiny_of(model_type)
    pairs, logps, gradients = random_pairs(), [], []
    weights = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))

    def add(values):
        model.zero_grad()
        (values * weights).sum().backward()
        logps.append(values.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

    rows = [np.append(pair.prompt, pair.responses[k]) for k in (0, 1) for pair in pairs]
    ids, mask = torch.zeros(2, 8, 32, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, -len(row):], mask[i, -len(row):] = torch.from_numpy(row), 1
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                   use_cache=False).logits.log_softmax(-1)
    lengths = [len(pair.responses[k]) for k in (0, 1) for pair in pairs]
    add(torch.stack([logits[i, -n - 1:-1].gather(1, ids[i, -n:, None]).sum() for i, n in enumerate(lengths)]).view(2, 4))
    batches = [collate(pairs, layout=Layout(shared)) for shared in (False, True)]
    assert batches[1].input_ids.shape == (3, 35)  # 16 + 4 + 4, and 1 + 1 + 2, share the row of 28 or are the third
    for batch in batches:
        add(trainer.response_logps(model, batch))
    if model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        add(trainer.response_logps(model, batches[1]))
    for values, gradient in zip(logps[1:], gradients[1:]):
        assert torch.allclose(values, logps[0], rtol=1e-6, atol=1e-5) and values.std() > 1
        assert (gradient - gradients[0]).abs().max() <= 1e-5 * gradients[0].abs().max()


@pytest.mark.parametrize("types", [[], ["compute_dtype=bfloat16"], ["compute_dtype=bfloat16", "dtype=bfloat16"]])
@pytest.mark.parametrize("model_type", ["bloom", "mpt", "gpt_neo", "mamba"])
def test_models_that_cannot_share_prompts_are_found_out(model_type, types, capsys, refused):
    trainer = make_trainer("loss=dpo", "max_steps=0", *types)
    capsys.readouterr()
    trainer.policy = trainer.reference = tiny_of(model_type).to(getattr(torch, trainer.config.dtype))
    before = [x.clone() for x in (*trainer.policy.parameters(), *trainer.policy.buffers())]
    trainer.data_examples, trainer.eval_examples = random_pairs(), []
    assert [layout.shared for layout in trainer.choose_layouts()] == [False]
    assert capsys.readouterr().out.startswith("layout     separate, ")
    after = [*trainer.policy.parameters(), *trainer.policy.buffers()]
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(before, after, strict=True))
    trainer.config.layout = "shared"
    with pytest.raises(InputError, match="layout=shared is not possible with this model"):
        trainer.choose_layouts()


@pytest.mark.parametrize("k, example, found", [(0, 0, False), (0, 1, False), (1, 0, True), (1, 1, True), (0, 2, True),
                                               (1, 2, True)])
def test_a_leak_is_found_by_what_moves(k, example, found):
    """The first responses of the first two examples are exchanged: they may move, and nothing else."""
    trainer = make_trainer("loss=dpo", "max_steps=0")
    logps = torch.full((2, 3), -50.0)
    moved = logps.clone()
    moved[k, example] += 0.01
    answers = iter([logps, logps, moved])
    said = trainer.why_not_shared(trainer.policy, lambda model, batch: next(answers))
    assert said == ("in which one response sees another (by 2.0e-04)" if found else None)


def test_packed_examples_and_reward_models_are_tried_too(capsys):
    """A model that is right for one pair in a row but not for two, and a judge that is another model."""
    trainer = make_trainer("loss=dpo", "max_steps=0")
    trainer.data_examples, trainer.eval_examples = random_pairs(), []
    assert [layout.shared for layout in trainer.choose_layouts()] == [False, True]

    def leak(model, arguments, options):
        if "position_ids" in options:  # in shared rows a second prompt is read as another, by the first one's token
            second = ((options["position_ids"] == 0) & (options["input_ids"] != 0)).cumsum(1) == 2
            options["input_ids"] = (options["input_ids"] + second * options["input_ids"][:, :1]) % 400
        return arguments, options
    hook = trainer.policy.model.register_forward_pre_hook(leak, with_kwargs=True)
    assert trainer.choose_layouts() == (SEPARATE,)
    hook.remove()
    trainer.reward_model = AutoModelForSequenceClassification.from_config(tiny_of("bloom").config)
    capsys.readouterr()
    assert trainer.choose_layouts() == (SEPARATE,) and "layout     separate, whose numbers" in capsys.readouterr().out


def test_the_token_budget_suits_the_device():
    """Apart, a toy pair is two rows of about 33 tokens: 15 of them in 1,024 tokens, 31 in 2,048."""
    for settings, tokens in ((["layout=separate"], 1024), (["layout=separate", "compute_dtype=bfloat16"], 2048),
                             (["layout=separate", "max_tokens_per_microbatch=300"], 300)):
        trainer = make_trainer("loss=dpo", *settings)
        sizes = [collate(part, layout=layout).input_ids.numel() for part, layout in trainer.cut(
            trainer.train_examples, 1, trainer.config.max_tokens_per_microbatch)]
        assert tokens * 0.8 < max(sizes) <= tokens


# ---------------------------------------------------------------- the reference, once


def reference_rows(printed):
    """(rows read, rows computed) as a run printed them."""
    (found,) = re.findall(r"log-probabilities of ([\d,]+) rows read from \S+, of ([\d,]+) computed", printed)
    return tuple(int(number.replace(",", "")) for number in found)


def test_the_reference_is_computed_once_for_all_runs(run, sft_run, capsys):
    dpo = ["loss=dpo", f"model={sft_run}/LATEST", *TINY_RUN, "batch_size=200"]  # 3 steps see all 400 rows
    first = run(*dpo)
    assert reference_rows(capsys.readouterr().out) == (0, 408)
    second = run(*dpo, "exp_name=again")
    assert reference_rows(capsys.readouterr().out) == (408, 0)
    uncached = run(*dpo, "exp_name=uncached", "reference_cache=false")
    assert "log-probabilities of" not in capsys.readouterr().out
    curves = [[{k: v for k, v in line.items() if k not in UNREPEATABLE} for line in read_lines(f"{folder}/metrics.jsonl")]
              for folder in (first, second, uncached)]
    assert curves[0] == curves[1]
    for line, expected in zip(curves[0], curves[2], strict=True):
        assert line == {k: v if v is None else pytest.approx(v, rel=1e-4, abs=1e-4) for k, v in expected.items()}
    for settings, rows in (
            (["loss=ipo", "lr=1e-3", "max_tokens_per_microbatch=300"], (400, 8)),  # evaluation is cut in another way
            (["reference_cache=elsewhere"], (0, 408)), (["attention=eager"], (0, 408)), (["compute_dtype=bfloat16"], (0, 408)),
            (["max_length=20", "max_prompt_length=8"], (0, 408)), ([f"reference={first}/LATEST"], (0, 408))):
        run(*dpo, *settings, f"exp_name={settings[-1].replace('/', '')}")
        assert reference_rows(capsys.readouterr().out) == rows


def test_reference_log_probabilities_are_the_reference_models(sft_run):
    trainer = make_trainer("loss=rpo", f"model={sft_run}/LATEST", "num_eval_examples=8", "batch_size=400")
    with torch.no_grad():
        expected = [[obvious_logp(trainer.reference, example, ids).item() for ids in example.responses]
                    for example in [*trainer.data_examples[:4], *trainer.eval_examples[:4]]]
    trainer.fill_in_reference()
    for example, values in zip([*trainer.data_examples[:4], *trainer.eval_examples[:4]], expected):
        assert [example.columns[name] for name in trainers.REFERENCE] == pytest.approx(values, abs=1e-4)
        assert {"chosen_reward", "rejected_reward"} <= example.columns.keys()
    assert all(p.device.type == "meta" for p in trainer.reference.parameters())
    with trainer.reference_in_memory():
        assert all(torch.equal(a, b) for a, b in zip(trainer.reference.parameters(), trainer.policy.parameters()))
    assert trainer.reference.device.type == "meta"


def test_what_decides_the_reference_is_in_its_key(sft_run):
    """One weight, one setting of the model (no weight shows it), one token of one row."""
    def file_of(change):
        trainer = make_trainer("loss=dpo", f"model={sft_run}/LATEST", f"reference={sft_run}/LATEST", "batch_size=400")
        trainer.eval_examples = []
        change(trainer)
        trainer.fingerprints["reference"] = trainers.fingerprint(trainer.reference)
        before = set(os.listdir("runs/reference_cache")) if os.path.isdir("runs/reference_cache") else set()
        trainer.fill_in_reference()
        return set(os.listdir("runs/reference_cache")) - before

    def change_weight(trainer):
        with torch.no_grad():
            trainer.reference.lm_head.weight[3, 4] += 1e-3

    def change_setting(trainer):
        trainer.reference.config.rms_norm_eps = 1e-3

    def change_token(trainer):
        trainer.data_examples[7].responses[1][0] += 1

    def move_token(trainer):  # from the prompt to the response
        example = trainer.data_examples[7]
        trainer.data_examples[7] = dataclasses.replace(example, prompt=example.prompt[:-1], responses=(
            np.append(example.prompt[-1:], example.responses[0]), example.responses[1]))

    assert len(file_of(lambda trainer: None)) == 1 and not file_of(lambda trainer: None)
    for change in (change_weight, change_setting, change_token, move_token):
        assert len(file_of(change)) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_cache_file_is_computed_again(damage, sft_run, capsys):
    values = []
    for round in range(3):
        trainer = make_trainer("loss=dpo", f"model={sft_run}/LATEST", "batch_size=400")
        trainer.eval_examples = []
        capsys.readouterr()
        trainer.fill_in_reference()
        printed = capsys.readouterr().out
        assert reference_rows(printed) == ((400, 0) if round == 2 else (0, 400))
        assert ("is damaged and computed again" in printed) is (round == 1)
        values.append([example.columns[name] for example in trainer.data_examples for name in trainers.REFERENCE])
        (name,) = os.listdir("runs/reference_cache")
        with open(f"runs/reference_cache/{name}", "rb") as file:
            content = file.read()
        changed = {"cut": content[:-100], "flip": content[:-100] + bytes([content[-100] ^ 1]) + content[-99:], "empty": b"",
                   "other": b"x" * 1000}[damage]
        if round == 0:
            with open(f"runs/reference_cache/{name}", "wb") as file:
                file.write(changed)
    assert values[0] == values[1] == values[2]


def test_two_runs_at_once_leave_one_good_cache(sft_run, run, capsys):
    settings = ["loss=dpo", f"model={sft_run}/LATEST", *TINY_RUN, "batch_size=200", "reference_cache=cache"]
    command = [sys.executable, os.path.join(ROOT, "train.py"), *settings]
    both = [subprocess.Popen([*command, f"exp_name=run{i}"], env=os.environ | {"OMP_NUM_THREADS": "1"}) for i in (1, 2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(os.listdir("cache")) == 2 and all(name.endswith(".safetensors") for name in os.listdir("cache"))
    assert losses_of("runs/run1") == losses_of("runs/run2")
    capsys.readouterr()
    run(*settings, "exp_name=third")
    assert reference_rows(capsys.readouterr().out) == (408, 0)


def test_a_run_that_does_not_see_every_row_computes_no_more_than_it_sees(sft_run, run, capsys):
    """399 of 400 rows: the reference runs in the steps, and stays; none at all: evaluation's rows alone."""
    for settings, kept in ((["max_steps=3", "batch_size=133"], True), (["num_epochs=0.9"], True), (["max_steps=0"], False)):
        trainer = make_trainer("loss=dpo", f"model={sft_run}/LATEST", "max_steps=null", *settings)
        capsys.readouterr()
        trainer.fill_in_reference()
        assert reference_rows(capsys.readouterr().out)[1] == (8 if settings == ["max_steps=3", "batch_size=133"] else 0)
        assert (trainer.reference.device.type != "meta") is kept
        assert not any(trainers.REFERENCE[0] in example.columns for example in trainer.data_examples)


def test_a_reference_that_changes_or_goes_meanwhile_stops_the_run_and_saves_it(sft_run, refused, monkeypatch):
    """It is loaded again to be sampled from: after step 2 its folder holds other weights."""
    shutil.copytree(os.path.realpath(f"{sft_run}/LATEST"), "ref")
    evaluate, model = trainers.Trainer.evaluate, AutoModelForCausalLM.from_pretrained("ref")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1

    def change(trainer):
        if trainer.step == 2:
            model.save_pretrained("ref")
        evaluate(trainer)
    monkeypatch.setattr(trainers.Trainer, "evaluate", change)
    said = refused("loss=dpo", f"model={sft_run}/LATEST", "reference=ref", *TINY_RUN, "batch_size=200", "eval_every=1")
    assert said.startswith("the reference is not what this run began with")
    assert os.path.realpath("runs/dpo/LATEST").endswith("step-000002")


def test_a_cache_that_cannot_be_written_is_refused(sft_run, refused):
    cache = f"{FEW_ROWS}/cache"
    said = refused("loss=dpo", f"model={sft_run}/LATEST", *TINY_RUN, f"reference_cache={cache}")
    assert said == f"reference_cache={cache} cannot be written, Not a directory: name another folder, or set it to false"


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.05)])
def test_rewards_at_step_0(dtype, tolerance, sft_run):
    """In evaluation exactly 0; in training as close as two ways to batch the same numbers are, in units of beta: in
    float32 each, in bfloat16 on average."""
    trainer = make_trainer("loss=dpo", "dpo.beta=1", f"model={sft_run}/LATEST", f"compute_dtype={dtype}",
                           "num_eval_examples=50", "max_tokens_per_microbatch=500", "max_steps=100")
    trainer.fill_in_reference()
    sums = trainer.accumulate(trainer.eval_batches(trainer.eval_examples, ""), 50)
    assert sums["rewards/chosen"].item() == sums["rewards/margins"].item() == 0.0
    assert sums["loss"].item() / 50 == pytest.approx(math.log(2), abs=1e-7)
    metrics = [trainer.losses(batch)[1] for position in range(0, 400, 4) for batch in trainer.train_batches(position)[1]]
    rewards = torch.cat([m[name] for m in metrics for name in ("rewards/chosen", "rewards/rejected")])
    error = rewards.abs().max() if dtype == "float32" else rewards.abs().mean()
    assert len(rewards) == 800 and error <= tolerance


# ---------------------------------------------------------------- the rest of the step


def test_batches_are_made_one_step_ahead(monkeypatch):
    trainer, made = make_trainer("loss=dpo", "max_steps=9"), []
    train_batches = trainer.train_batches
    monkeypatch.setattr(trainer, "train_batches", lambda position: made.append(position) or train_batches(position))
    for _ in range(3):
        trainer.train_step()
    assert made == [0, 4, 8, 12]
    ahead = [example.where for batch in trainer.next_batches[0, 12][1] for example in batch.examples]
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(0))[12:16].tolist()
    assert sorted(ahead) == sorted(trainer.train_examples[row].where for row in rows)


def test_logits_exist_a_chunk_at_a_time(sft_run, monkeypatch):
    """Ten tokens here; losses and gradients do not change."""
    numbers, run_head = [], trainers.run_head
    monkeypatch.setattr(trainers, "run_head", lambda *a: numbers.append(len(a[2])) or run_head(*a))
    whole, chunks = (make_trainer("loss=dpo", f"model={sft_run}/LATEST") for _ in range(2))
    expected = whole.train_step()
    numbers.clear()
    monkeypatch.setattr(trainers, "CHUNK_LOGITS", 10 * chunks.policy.config.vocab_size + 1)
    metrics = chunks.train_step()
    assert max(numbers) == 10 and len(numbers) > 20
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for p, q in zip(whole.policy.parameters(), chunks.policy.parameters()):
        assert (p.grad - q.grad).abs().max() <= 1e-5 * p.grad.abs().max()


def test_fused_optimizers_where_torch_has_them():
    weights = [torch.nn.Parameter(torch.ones(2))]
    for settings, fused in ((["optimizer=AdamW"], True), (["optimizer=RMSprop"], None),
                            (["optimizer=AdamW", "optimizer_args.foreach=true"], None)):
        config, _ = train.load_config(settings)
        assert trainers.make_optimizer(weights, config).defaults.get("fused") is fused


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with g++")
def test_compiled_layers_give_the_same_numbers(sft_run, run):
    """Training, evaluation and sampling; the checkpoint has the usual names."""
    folders = [run("loss=dpo", f"model={sft_run}/LATEST", *TINY_RUN, f"compile={c}", f"exp_name=compile-{c}", "lr=1e-5")
               for c in ("false", "true")]
    plain, compiled = (losses_of(folder) for folder in folders)
    assert compiled == pytest.approx(plain, rel=1e-5) and len(plain) == 3
    torch._dynamo.reset()
    names = [AutoModelForCausalLM.from_pretrained(f"{folder}/LATEST").state_dict().keys() for folder in folders]
    assert names[0] == names[1]


def test_what_cannot_be_compiled_is_refused(monkeypatch, refused):
    with pytest.raises(InputError, match="compile=true: ctrl has no layers that can be compiled"):
        trainers.compile_layers(AutoModelForCausalLM.from_config(CONFIG_MAPPING["ctrl"](
            vocab_size=50, n_embd=16, dff=16, n_layer=1, n_head=2)))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    if not torch.cuda.is_available():
        assert "there is no g++" in refused("compile=true")


def test_activation_checkpointing_changes_nothing():
    plain, checkpointed = make_trainer("loss=dpo"), make_trainer("loss=dpo", "activation_checkpointing=true")
    assert checkpointed.policy.is_activation_checkpointing and not plain.policy.is_activation_checkpointing
    assert plain.train_step()["grad_norm"] == pytest.approx(checkpointed.train_step()["grad_norm"], rel=1e-6)


def test_a_tiny_model_learns(run):
    losses = losses_of(run("max_steps=60", "eval_every=0", "num_eval_examples=1"))
    assert losses[0] == pytest.approx(math.log(479), abs=0.3)  # about uniform over the vocabulary
    assert losses[-1] < 1.0


def test_the_number_of_steps_and_the_last_batch(run):
    rows = [{"prompt": "p", "response": f"r {i}"} for i in range(10)]
    write_lines("r.jsonl", rows)
    for epochs, batch_size, examples in ((1, 4, [4, 8, 10]), (2, 4, [4, 8, 12, 16, 20]), (0.5, 4, [4, 5]),
                                         (1, 100, [10]), (0.3, 1, [1, 2, 3])):
        folder = run("data=r.jsonl", f"num_epochs={epochs}", f"batch_size={batch_size}",
                     f"exp_name=e{epochs}b{batch_size}")
        assert [line["examples"] for line in read_lines(f"{folder}/metrics.jsonl")] == examples


# ---------------------------------------------------------------- optimizer and schedule


@pytest.mark.parametrize("schedule, expected", [
    # lr 1, 2 warmup steps, 6 in all: (t + 1) / 3 until t = 2, then over the 4 steps left
    ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
    ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
    ("cosine", [1 / 3, 2 / 3, 1, 0.5 + 2 ** 0.5 / 4, 0.5, 0.5 - 2 ** 0.5 / 4]),
])
def test_schedules_by_hand(schedule, expected):
    config = train.types.SimpleNamespace(warmup_steps=2, lr_schedule=schedule)
    assert [trainers.learning_rate(t, 6, 1.0, config) for t in range(6)] == pytest.approx(expected)
    assert [trainers.learning_rate(t, 6, 0.5, config) for t in range(6)] == pytest.approx([x / 2 for x in expected])


def test_warmup_longer_than_the_run():
    config = train.types.SimpleNamespace(warmup_steps=9, lr_schedule="linear")
    assert [trainers.learning_rate(t, 3, 1.0, config) for t in range(3)] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "AdamW", "SGD"])
def test_optimizers_step_as_torch_does(name):
    arguments = {"RMSprop": ["optimizer_args.alpha=0.5"], "SGD": ["optimizer_args={momentum: 0.9}"]}.get(name, [])
    trainer = make_trainer(f"optimizer={name}", *arguments, "lr=1e-3", "warmup_steps=0", "lr_schedule=constant")
    other = copy.deepcopy(trainer.policy)
    options = {"RMSprop": {"alpha": 0.5}, "SGD": {"momentum": 0.9}}.get(name, {})
    optimizer = getattr(torch.optim, name)(other.parameters(), lr=1e-3, **options)
    for _ in range(3):
        trainer.train_step()
        for p, ours in zip(other.parameters(), trainer.policy.parameters()):
            p.grad = ours.grad.clone()
        optimizer.step()
    for p, ours in zip(other.parameters(), trainer.policy.parameters()):  # a fused step rounds in its own way
        assert torch.allclose(p, ours, rtol=0, atol=1e-6 if trainer.optimizer.defaults.get("fused") else 0)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3


def test_every_offered_optimizer_can_be_made():
    names = trainers.optimizer_names()
    assert {"RMSprop", "Adam", "AdamW", "SGD", "Adafactor"} <= set(names)
    assert not {"LBFGS", "SparseAdam", "Optimizer"} & set(names)
    for name in names:
        config = train.types.SimpleNamespace(optimizer=name, optimizer_args={}, lr=1e-3)
        weight = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = trainers.make_optimizer([weight], config)
        weight.grad = torch.ones(2, 2)
        optimizer.step()
        assert (weight < 1).all()


def test_intervals():
    assert [trainers.as_steps(x, 100, 8) for x in (0, 1, 7, 0.5, 0.001)] == [0, 1, 7, 6, 1]


# ---------------------------------------------------------------- evaluation and samples


def test_evaluation_changes_nothing(run):
    quiet = run(*TINY_RUN, "loss=dpo", "max_steps=4", "eval_every=0", "run_dir=a")
    busy = run(*TINY_RUN, "loss=dpo", "max_steps=4", "eval_every=1", "run_dir=b")
    assert losses_of(quiet) == losses_of(busy)
    for name, weight in load_file(f"{quiet}/LATEST/model.safetensors").items():
        assert torch.equal(weight, load_file(f"{busy}/LATEST/model.safetensors")[name])
    states = [torch.load(f"{folder}/LATEST/trainer_state/rng.pt")["cpu"] for folder in (quiet, busy)]
    assert torch.equal(*states)


@pytest.mark.parametrize("count, batch", [(7, 3), (1, 256), (5, 5)])
def test_every_held_out_example_counts_once(count, batch):
    trainer = make_trainer("loss=dpo", f"num_eval_examples={count}", f"eval_batch_size={batch}", "lr=0.01")
    trainer.train_step()
    trainer.evaluate()
    line = read_lines(f"{trainer.config.run_dir}/metrics.jsonl")[-1]
    values = [trainer.losses(collate([example])) for example in trainer.eval_examples]
    assert len(values) == count
    assert line["loss"] == pytest.approx(sum(loss.item() for loss, _ in values) / count, rel=1e-5)
    for name in ("rewards/chosen", "rewards/accuracies", "logps/rejected"):
        assert line[name] == pytest.approx(sum(m[name].item() for _, m in values) / count, rel=1e-4, abs=1e-6)


@pytest.fixture(autouse=True)
def run_folder(inside):
    """Trainers made here without main write into runs/<loss>, which main would have made."""
    for name in OBJECTIVES:
        os.makedirs(f"runs/{name}")


def test_samples_do_not_depend_on_batching():
    trainer = make_trainer("eval_batch_size=64", "sample_max_tokens=12")
    examples = trainer.sample_examples[:40]
    together = trainer.generate(trainer.policy, examples)
    trainer.config.eval_batch_size = 3
    assert trainer.generate(trainer.policy, examples) == together
    assert trainer.generate(trainer.policy, examples[:5]) == together[:5]
    assert len(set(map(tuple, together))) > 30  # and differ from prompt to prompt


def test_samples_come_from_the_policys_distribution():
    """The first sampled token's frequencies against the softmax, by a chi-square-like bound."""
    trainer = make_trainer("sample_max_tokens=1", "eval_batch_size=4000")
    for parameter in trainer.policy.lm_head.parameters():
        torch.manual_seed(0)
        parameter.data = torch.randn_like(parameter) / 4  # far from uniform
    prompt = trainer.sample_examples[0]
    drawn = [ids[0] for ids in trainer.generate(trainer.policy, [prompt] * 4000)]
    with torch.no_grad():
        logits = trainer.policy(input_ids=torch.tensor([[*prompt.prompt]])).logits[0, -1]
    expected = logits.softmax(-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / 4000
    fair = torch.bincount(torch.multinomial(expected, 4000, replacement=True), minlength=len(expected)) / 4000
    distance, fair_distance = ((x - expected).abs().sum().item() / 2 for x in (counts, fair))
    assert distance < 1.3 * fair_distance
    uniform = (expected - 1 / len(expected)).abs().sum().item() / 2
    assert fair_distance < uniform / 2  # the bound tells this distribution from another


def test_greedy_temperature_and_top_p():
    trainer = make_trainer("sample_max_tokens=5", "sample_temperature=0")
    example = trainer.sample_examples[0]
    ids = torch.tensor([[*example.prompt]])
    greedy = trainer.policy.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1]:].tolist()
    assert trainer.generate(trainer.policy, [example])[0] == greedy
    trainer.config.sample_temperature, trainer.config.sample_top_p = 1.0, 1e-6  # only the likeliest is left
    assert trainer.generate(trainer.policy, [example])[0] == greedy
    trainer.config.sample_top_p = 1.0
    assert trainer.generate(trainer.policy, [example])[0] != greedy


def test_samples_stay_within_the_models_positions():
    trainer = make_trainer("sample_max_tokens=50", "num_samples=3")
    trainer.policy.config.max_position_embeddings = 20
    examples = [Example("x", np.arange(2, 2 + n), (np.array([0]),), {}) for n in (5, 12, 19)]
    trainer.end_ids = [-1]  # never ends
    assert [len(ids) for ids in trainer.generate(trainer.policy, examples)] == [15, 8, 1]


def test_sampling_leaves_the_models_own_generation_config_aside():
    trainer = make_trainer("sample_max_tokens=8", "sample_temperature=0")
    plain = trainer.generate(trainer.policy, trainer.sample_examples[:4])
    trainer.policy.generation_config.repetition_penalty = 5.0
    trainer.policy.generation_config.min_new_tokens = 4
    assert trainer.generate(trainer.policy, trainer.sample_examples[:4]) == plain
    assert trainer.policy.generation_config.repetition_penalty == 5.0


def test_sample_metrics_by_hand():
    trainer = make_trainer("loss=dpo")
    trainer.dataset = train.DATASETS["toy"]
    records = [{"prompt": "p", "reward": r, "well_formed": 1.0, "reference_reward": q}
               for r, q in ((4.0, 0.0), (2.0, 2.0), (0.0, 2.0), (-2.0, -4.0))]
    metrics = trainer.score_metrics(records, kl=1.0)
    assert metrics["samples/reward"] == 1.0 and metrics["samples/well_formed"] == 1.0
    assert metrics["samples/win_rate"] == (1 + 0.5 + 0 + 1) / 4
    assert metrics["samples/efficiency"] == pytest.approx(1.0 / metrics["samples/optimal_reward"])
    assert trainer.score_metrics(records, kl=0.001)["samples/efficiency"] is None
    assert "samples/efficiency" not in trainer.score_metrics(records, kl=None)


def test_sample_kl_is_the_mean_log_ratio():
    trainer = make_trainer("loss=dpo", "lr=0.05", "warmup_steps=0", "sample_max_tokens=6", "num_samples=0")
    samples = trainer.generate(trainer.policy, trainer.sample_examples)
    assert trainer.sample_kl(samples) == 0.0
    trainer.train_step()
    trainer.sample_examples = trainer.sample_examples[:20]
    with torch.no_grad():
        ratios = [(obvious_logp(trainer.policy, e, ids) - obvious_logp(trainer.reference, e, ids)).item()
                  for e, ids in zip(trainer.sample_examples, samples)]
    assert abs(sum(ratios)) > 1e-2
    assert trainer.sample_kl(samples) == pytest.approx(max(0.0, sum(ratios) / 20), rel=1e-4, abs=1e-5)


def test_what_is_written(run):
    folder = run(*TINY_RUN, "loss=dpo", "max_steps=4", "eval_every=2", "dpo.sft_weight=0.1", "log_every=2",
                 "lr=0.05", "warmup_steps=0")
    lines = read_lines(f"{folder}/metrics.jsonl")
    assert [(line["split"], line["step"], line["examples"]) for line in lines] == [
        ("eval", 0, 0), ("train", 2, 8), ("eval", 2, 8), ("train", 4, 16), ("eval", 4, 16)]
    shared = {"step", "examples", "split", "time", "loss", "rewards/chosen", "rewards/rejected",
              "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "sft_loss",
              "preference_loss", "epoch"}
    assert set(lines[1]) == shared | {"grad_norm", "lr", "examples_per_second", "tokens_per_second"}
    assert {"samples/reward", "samples/kl", "samples/length", "samples/win_rate", "samples/well_formed",
            "samples/optimal_reward", "samples/efficiency"} | shared <= set(lines[2])
    assert lines[1]["epoch"] == 8 / 400 and lines[2]["epoch"] == 8 / 400
    assert abs(lines[-1]["time"] - time.time()) < 60
    samples = read_lines(f"{folder}/samples.jsonl")
    assert [line["step"] for line in samples] == [0, 0, 2, 2, 4, 4]
    assert {"prompt", "policy", "reference", "chosen", "reward", "well_formed"} <= set(samples[0])
    assert samples[0]["prompt"].startswith("Review of The ") and samples[0]["chosen"].startswith(" The ")
    assert samples[0]["policy"] == samples[0]["reference"] and samples[4]["policy"] != samples[4]["reference"]


def test_throughput_counts_each_prompt_and_response_once():
    trainer = make_trainer("loss=dpo", "batch_size=3")
    metrics = trainer.train_step()
    examples = [trainer.train_examples[i] for i in trainers.stream(400, 0, 3, seed=0, shuffle=True)]
    tokens = sum(len(e.prompt) + len(e.responses[0]) + len(e.responses[1]) for e in examples)
    trainer.log("train", metrics)
    assert metrics["tokens_per_second"] / metrics["examples_per_second"] == pytest.approx(tokens / 3)
    assert 0 < metrics["examples_per_second"] < 1e5


def test_sample_length_is_the_mean_number_of_tokens():
    trainer = make_trainer()
    lengths = [len(ids) for ids in trainer.generate(trainer.policy, trainer.sample_examples)]
    assert len(lengths) == 1024 and 1 < sum(lengths) / 1024 < 8  # some end before the 8 of sample_max_tokens
    assert trainer.sample()["samples/length"] == sum(lengths) / 1024


def test_temperature_divides_the_scores():
    scores = torch.randn(3, 50)
    hot = trainers.SeededSampling([1, 2, 3], 2.0, 1.0)(None, scores)
    assert torch.equal(hot, trainers.SeededSampling([1, 2, 3], 1.0, 1.0)(None, scores / 2))


def test_known_scores_need_no_optimum():
    trainer = make_trainer("loss=dpo")
    trainer.dataset = train.data.Dataset(None, scores=lambda prompt, response, finished: {"reward": 1})
    metrics = trainer.sample()
    assert metrics["samples/reward"] == 1.0 and metrics["samples/win_rate"] == 0.5
    assert "samples/optimal_reward" not in metrics
    trainer.dataset = train.data.Dataset(None, scores=lambda prompt, response, finished: {"titled": ":" in prompt})
    assert trainer.sample()["samples/titled"] == 1.0


def test_sft_has_no_reference_metrics(run):
    lines = read_lines(run(*TINY_RUN) + "/metrics.jsonl")
    assert not {"samples/kl", "samples/optimal_reward", "samples/efficiency"} & set(lines[-1])
    assert "samples/reward" in lines[-1]


# ---------------------------------------------------------------- self-play

SPIN = ["loss=spin", "max_steps=null", "num_epochs=0.02", "spin.max_tokens=10", "eval_batch_size=400"]  # 2 steps each


def test_self_play_iterations(run, sft_run):
    """The opponent is the policy at each iteration's start; beta, lr, warmup and schedule are each iteration's."""
    folder = run(*TINY_RUN, *SPIN, f"model={sft_run}/LATEST", "spin.beta=[0.1,0.5]", "spin.lr=[1e-3,2e-3]",
                 "warmup_steps=1", "keep_checkpoints=1")
    lines = [line for line in read_lines(f"{folder}/metrics.jsonl") if line["split"] == "train"]
    assert [(line["step"], line["examples"], line["iteration"]) for line in lines] == [
        (1, 4, 0), (2, 8, 0), (3, 12, 1), (4, 16, 1)]
    assert [line["lr"] for line in lines] == [0.5e-3, 1e-3, 1e-3, 2e-3]
    assert [line["epoch"] for line in lines] == [4 / 400, 8 / 400] * 2
    for line in (lines[0], lines[2]):  # policy and opponent are the same
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6) and line["rewards/margins"] == 0
    assert lines[1]["rewards/margins"] != 0 and lines[3]["rewards/margins"] != 0
    assert sorted(name for name in os.listdir(folder) if "step" in name) == ["step-000002", "step-000004"]
    evals = [line for line in read_lines(f"{folder}/metrics.jsonl") if line["split"] == "eval"]
    assert [line["step"] for line in evals] == [0, 2, 4]
    assert "samples/kl" not in evals[0] and "rewards/chosen" not in evals[0]
    plain = run(*TINY_RUN, "loss=sft", "max_steps=0", f"model={sft_run}/LATEST")
    assert evals[0]["loss"] == pytest.approx(read_lines(f"{plain}/metrics.jsonl")[0]["loss"], rel=1e-6)


def test_generated_answers(run, sft_run):
    folder = run(*TINY_RUN, *SPIN, f"model={sft_run}/LATEST", "spin.max_tokens=20")
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    first, second = (read_lines(f"{folder}/generated-0{i}.jsonl") for i in (0, 1))
    assert sorted(line["row"] for line in first) == sorted(line["row"] for line in second) == list(range(400))
    texts = [row["chosen"] for row in train.data.toy("train", True)[:400]]
    for line in first:
        assert set(line) == {"row", "where", "prompt", "response", "finished", "ids", "key"}
        assert line["where"] == f"few.jsonl line {line['row'] + 1}" and line["prompt"].startswith("Review of The ")
        assert line["finished"] == (line["ids"][-1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in line["ids"][:-1]
        assert len(line["ids"]) == 20 or line["finished"]
        assert tokenizer.decode(line["ids"], skip_special_tokens=True) == line["response"]
    assert {line["finished"] for line in first} == {True, False}
    responses = [[line["response"] for line in sorted(lines, key=lambda line: line["row"])] for lines in (first, second)]
    assert len(set(responses[0])) > 300 and responses[0] != responses[1] and responses[0] != texts


def test_generated_files_do_not_depend_on_the_batch(run, sft_run):
    folders = [run(*TINY_RUN, *SPIN, f"model={sft_run}/LATEST", "max_steps=1", f"eval_batch_size={size}",
                   f"run_dir=b{size}") for size in (400, 64, 7)]
    contents = [open(f"{folder}/generated-00.jsonl").read() for folder in folders]
    assert contents[0].count("\n") == 400 and contents[0] == contents[1] == contents[2]


def test_pairs_of_self_play(capsys):
    trainer = make_trainer("loss=spin", "spin.mix_previous=true")
    same = [trainer.data_examples[row].responses[0].tolist() for row in (0, 3)]
    answers = [[{"row": row, "ids": same[row // 3] if row in (0, 3) else [5 + iteration, row]} for row in range(400)]
               for iteration in (0, 1)]
    for iteration in (0, 1):
        key = {"key": trainer.answers_key(iteration)}
        write_lines(f"runs/spin/generated-0{iteration}.jsonl", [line | key for line in reversed(answers[iteration])])
    trainer.iteration = 0
    trainer.pair_answers()
    assert "iteration 0: 398 pairs, 2 dropped" in capsys.readouterr().out
    assert [e.responses[1].tolist() for e in trainer.train_examples[:3]] == [[5, 1], [5, 2], [5, 4]]
    assert all(e.responses[0] is trainer.data_examples[i].responses[0] for e, i in zip(trainer.train_examples, (1, 2, 4)))
    trainer.iteration = 1
    trainer.pair_answers()
    assert len(trainer.train_examples) == 796
    assert {tuple(e.responses[1]) for e in trainer.train_examples} == {(x, r) for x in (5, 6) for r in range(400)
                                                                      if r not in (0, 3)}
    trainer.config.spin["mix_previous"] = False
    trainer.pair_answers()
    assert {e.responses[1][0] for e in trainer.train_examples} == {6}


def test_what_self_play_logs(sft_run):
    trainer = make_trainer(*SPIN, f"model={sft_run}/LATEST", "spin.max_tokens=20", "batch_size=64", "num_epochs=1")
    trainer.next_iteration()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()[:64]
    drawn = [trainer.train_examples[i].responses[1].tolist() for i in order]
    metrics = trainer.train_step()
    assert metrics["generated/length"] == pytest.approx(sum(map(len, drawn)) / 64)
    finished = sum(ids[-1] == trainer.end_ids[0] for ids in drawn) / 64
    assert 0 < finished < 1 and metrics["generated/finished"] == pytest.approx(finished)
    assert "rewards/chosen" in metrics


def test_an_answer_stays_within_max_length(sft_run):
    trainer = make_trainer("loss=spin", f"model={sft_run}/LATEST", "max_length=20", "max_prompt_length=10", "spin.top_k=1")
    trainer.next_iteration()
    assert max(len(e.prompt) + len(e.responses[1]) for e in trainer.train_examples) == 20
    texts = [line["response"] for line in read_lines("runs/spin/generated-00.jsonl")]
    assert len(set(texts)) < 100  # top_k 1 is greedy: only the prompts differ


@pytest.mark.parametrize("reset", [False, True])
def test_the_optimizer_across_iterations(reset, sft_run):
    trainer = make_trainer(*SPIN, f"model={sft_run}/LATEST", f"spin.reset_optimizer={reset}".lower())
    trainer.next_iteration()
    trainer.train_step()
    trainer.next_iteration()
    assert len(trainer.optimizer.state) == (0 if reset else len(list(trainer.policy.parameters())))
    weights = list(trainer.policy.parameters())
    before = weights[1].clone()
    trainer.train_step()
    assert not torch.equal(weights[1], before)


def test_max_steps_bounds_all_iterations(run):
    folder = run(*TINY_RUN, *SPIN, "max_steps=3", "eval_every=0", "lr_schedule=constant")
    assert [line["step"] for line in read_lines(f"{folder}/metrics.jsonl")] == [1, 2, 3]
    run("resume=true", f"run_dir={folder}", "max_steps=99")
    assert [(line["step"], line["iteration"]) for line in read_lines(f"{folder}/metrics.jsonl")][2:] == [(3, 1), (4, 1)]


def test_answers_of_another_opponent_are_not_used(run):
    """Fresh after a stop without a checkpoint; and a run that was taken back to fewer steps than it had."""
    os.makedirs("runs/new")
    open("runs/new/config.yaml", "w").write("loss: spin\nprovenance: {run_id: abc}\n")
    write_lines("runs/new/generated-00.jsonl", [{"row": row, "ids": [7], "key": "a"} for row in range(400)] + [{"x": 1}])
    folder = run(*TINY_RUN, *SPIN, "max_steps=1", "resume=auto", "exp_name=new")
    assert [7] not in [line["ids"] for line in read_lines(f"{folder}/generated-00.jsonl")]
    settings = [*TINY_RUN, *SPIN, "num_epochs=0.04", "save_every=1", "eval_every=0", "lr_schedule=constant"]
    whole = run(*settings, "run_dir=whole")
    run(*settings, "run_dir=part", "max_steps=3")
    run("resume=true", "run_dir=part", "max_steps=2")
    assert not os.path.exists("part/generated-01.jsonl")
    write_lines("part/generated-01.jsonl", [line | {"key": "b", "ids": [7]} for line in read_lines("part/generated-00.jsonl")])
    run("resume=true", "run_dir=part", "max_steps=null")
    assert same_weights(whole, "part") and read_lines("part/generated-01.jsonl") == read_lines("whole/generated-01.jsonl")


def test_nothing_left_to_learn(run, sft_run, capsys, monkeypatch):
    """Where every answer is the data's there are no pairs: iterations pass without a step."""
    monkeypatch.setattr(trainers.Trainer, "sample_batches", lambda self, model, examples, *_: iter(
        [(range(len(examples)), [example.responses[0].tolist() for example in examples])]))
    folder = run(*TINY_RUN, *SPIN, f"model={sft_run}/LATEST", "eval_every=0", "num_samples=0")
    output = capsys.readouterr().out
    assert output.count("0 pairs, 400 dropped whose answer equals the data's response") == 2
    assert os.readlink(f"{folder}/LATEST") == "step-000000"


def test_long_prompts_have_less_room_and_share_batches():
    trainer = make_trainer("sample_max_tokens=30")
    trainer.policy.config.max_position_embeddings = 50
    examples = [Example("x", np.arange(2, 2 + n), (), {}) for n in (3, 44, 10, 20, 45, 20)]
    batches = [(batch, list(map(len, ids))) for batch, ids in trainer.sample_batches(
        trainer.policy, examples, [30] * 6, range(6), {"temperature": 1.0, "top_p": 1.0})]
    assert [batch for batch, _ in batches] == [[0, 2, 3, 5], [1], [4]]
    lengths = {i: length for batch, values in batches for i, length in zip(batch, values)}
    assert all(lengths[i] <= room for i, room in enumerate((30, 6, 30, 30, 5, 30)))


# ---------------------------------------------------------------- reward models


def write_bare_pairs(count=400):
    return write_lines("bare.jsonl", [{name: row[name] for name in ("prompt", "chosen", "rejected")}
                                      for row in train.data.toy("train", True)[:count]])


def test_a_reward_model_comes_near_the_best_possible_accuracy(rm_run):
    """Labels are drawn from sigmoid(r_w - r_l), so even the true rewards are right only so often; ties: half."""
    rows = train.data.toy("test", True)
    gaps = [row["chosen_reward"] - row["rejected_reward"] for row in rows]
    ceiling = sum((gap > 0) + (gap == 0) / 2 for gap in gaps) / len(gaps)
    assert 0.7 < ceiling < 0.9
    last = read_lines(f"{rm_run}/metrics.jsonl")[-1]
    assert last["rewards/accuracies"] > ceiling - 0.03
    assert "samples/length" not in last and not os.path.exists(f"{rm_run}/samples.jsonl")


def test_a_reward_model_is_a_hugging_face_folder(rm_run, sft_run):
    model = AutoModelForSequenceClassification.from_pretrained(f"{rm_run}/LATEST")
    tokenizer = AutoTokenizer.from_pretrained(f"{rm_run}/LATEST")
    assert model.config.num_labels == 1 and model.config.architectures == ["LlamaForSequenceClassification"]
    prompt, end = "Review of The Silent Garden:", tokenizer.eos_token
    praise, blame = " The plot was superb." * 4, " The plot was awful." * 4
    batch = tokenizer([prompt + praise + end, prompt + blame + end, prompt + blame[:20] + end], padding=True,
                      return_tensors="pt")
    scores = model(**batch).logits[:, 0]
    assert scores[0] > scores[1] + 2
    trainer = make_trainer("loss=rm", f"model={rm_run}/LATEST")
    one = Example("x", batch["input_ids"][0, :6].numpy(), tuple(
        ids[6:][mask[6:] == 1].numpy() for ids, mask in zip(batch["input_ids"][:2], batch["attention_mask"][:2])), {})
    ours = trainer.response_scores(trainer.policy, collate([one]))
    assert ours[:, 0].tolist() == pytest.approx(scores[:2].tolist(), abs=1e-5)


def test_mean_and_spread_of_rewards():
    trainer = make_trainer("loss=rm", "num_eval_examples=9", "max_tokens_per_microbatch=200")
    trainer.evaluate()
    line = read_lines("runs/rm/metrics.jsonl")[-1]
    scores = [trainer.response_scores(trainer.policy, collate([e])) for e in trainer.eval_examples]
    scores = torch.cat(scores).double().flatten()
    assert line["rewards/mean"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert line["rewards/std"] == pytest.approx(scores.std(correction=0).item(), rel=1e-3)
    assert "rewards/mean_square" not in line


def test_a_tokenizer_whose_padding_is_its_end(sft_run):
    """The end token must count; batches of such a model are refused by transformers, single texts are right."""
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    tokenizer.pad_token = tokenizer.eos_token
    shutil.copytree(f"{sft_run}/LATEST", "base")
    tokenizer.save_pretrained("base")
    trainer = make_trainer("loss=rm", "model=base")
    trainer.train_step()
    trainer.save()
    model = AutoModelForSequenceClassification.from_pretrained("runs/rm/LATEST")
    example = trainer.train_examples[0]
    ids = torch.tensor([[*example.prompt, *example.responses[0]]])
    assert ids[0, -1] == tokenizer.eos_token_id and model.config.pad_token_id is None
    assert model(ids).logits.item() == pytest.approx(
        trainer.response_scores(trainer.policy, collate([example]))[0, 0].item(), abs=1e-6)


def test_a_reward_model_judges_samples(run, rm_run, sft_run):
    shared = [*TINY_RUN, f"reward_model={rm_run}/LATEST", f"model={sft_run}/LATEST", "sample_max_tokens=24"]
    line = read_lines(run(*shared, "loss=dpo", "max_steps=2", "eval_first=false", "lr=0.01") + "/metrics.jsonl")[-1]
    assert {"samples/reward", "samples/true_reward", "samples/reference_reward", "samples/win_rate",
            "samples/efficiency", "samples/well_formed"} <= set(line)
    assert line["samples/efficiency"] is None or line["samples/efficiency"] == pytest.approx(
        line["samples/true_reward"] / line["samples/optimal_reward"])
    assert line["samples/reward"] != line["samples/true_reward"]
    write_bare_pairs()
    folder = run(*shared, "loss=sft", "data=bare.jsonl", "eval_data=bare.jsonl", "max_steps=0")
    records, line = read_lines(f"{folder}/samples.jsonl"), read_lines(f"{folder}/metrics.jsonl")[0]
    assert "samples/reward" in line and "samples/win_rate" not in line and "samples/true_reward" not in line
    model = AutoModelForSequenceClassification.from_pretrained(f"{rm_run}/LATEST")
    trainer = make_trainer(*shared, "data=bare.jsonl", "eval_data=bare.jsonl", "exp_name=again")
    samples = trainer.generate(trainer.policy, trainer.sample_examples)
    for example, ids, record in zip(trainer.sample_examples, samples, records, strict=True):
        score = model(torch.tensor([[*example.prompt, *ids]])).logits.item()
        assert record["reward"] == pytest.approx(score, abs=1e-4)


def test_pairs_without_rewards_get_a_reward_models(run, rm_run, sft_run, monkeypatch):
    write_bare_pairs(40)
    settings = [*TINY_RUN, "loss=rpo", "data=bare.jsonl", f"reward_model={rm_run}/LATEST", f"model={sft_run}/LATEST",
                "num_epochs=1", "max_steps=null", "save_every=2", "lr_schedule=constant", "eval_every=0"]
    whole = run(*settings, "run_dir=whole")
    lines = read_lines(f"{whole}/rewards.jsonl")
    assert [line["where"] for line in lines] == [f"bare.jsonl line {i + 1}" for i in range(40)]
    trainer = make_trainer("loss=rm", f"model={rm_run}/LATEST", "data=bare.jsonl")
    for line, example in list(zip(lines, trainer.train_examples))[::9]:
        scores = trainer.response_scores(trainer.policy, collate([example]))[:, 0].tolist()
        assert [line["chosen_reward"], line["rejected_reward"]] == pytest.approx(scores, abs=1e-5)
    run(*settings, "max_steps=6", "run_dir=part")
    monkeypatch.setattr(trainers.Trainer, "score", lambda *_: pytest.fail("rewards are scored again"))
    run("resume=true", "run_dir=part", "max_steps=null")
    assert same_weights("whole", "part") and len(read_lines("part/rewards.jsonl")) == 40


def test_rewards_in_the_data_stay(sft_run, rm_run):
    rows = train.data.toy("train", True)[:6]
    for row in rows[3:]:
        del row["chosen_reward"], row["rejected_reward"]
    write_lines("some.jsonl", rows)
    trainer = make_trainer("loss=rpo", "data=some.jsonl", f"model={sft_run}/LATEST", f"reward_model={rm_run}/LATEST")
    trainer.fill_in_rewards()
    for row, example in zip(rows[:3], trainer.data_examples):
        assert example.columns == {name: row[name] for name in ("chosen_reward", "rejected_reward")}
    for example in trainer.data_examples[3:]:
        assert all(isinstance(value, float) and value % 1 for value in example.columns.values())


def test_pairs_that_are_only_sampled_from_need_no_rewards(run, rm_run, sft_run):
    write_bare_pairs(12)
    folder = run(*TINY_RUN, "loss=rpo", "data=bare.jsonl", "eval_data=bare.jsonl", f"reward_model={rm_run}/LATEST",
                 f"model={sft_run}/LATEST", "num_eval_examples=2", "num_samples=6", "max_steps=1")
    assert len(read_lines(f"{folder}/samples.jsonl")) == 12


def test_another_reward_model_is_refused_on_resume(run, rm_run, sft_run, refused):
    write_bare_pairs(12)
    shutil.copytree(f"{rm_run}/LATEST", "judge")
    run(*TINY_RUN, "loss=rpo", "data=bare.jsonl", "reward_model=judge", f"model={sft_run}/LATEST", "max_steps=1",
        "lr_schedule=constant", "eval_every=0")
    weights = load_file("judge/model.safetensors")
    weights["score.weight"] *= -3
    from safetensors.torch import save_file
    save_file(weights, "judge/model.safetensors", metadata={"format": "pt"})
    assert "the reward_model is not what this run began with" in refused("resume=true", "exp_name=rpo", "max_steps=2")


def test_a_reward_model_is_no_language_model(sft_run, refused):
    """With tied embeddings nothing would be missing: it must be refused as policy, reference and teacher."""
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    LlamaForSequenceClassification(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, num_labels=1)).save_pretrained("judge")
    tokenizer.save_pretrained("judge")
    for arguments in (["loss=sft", "model=judge"], ["loss=dpo", f"model={sft_run}/LATEST", "reference=judge"],
                      ["loss=kd", f"model={sft_run}/LATEST", "reference=judge"]):
        assert "it is a reward model, without a language model's head" in refused(*TINY_RUN, *arguments)


def test_samples_fit_every_model_that_reads_them(sft_run):
    teacher = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(teacher), n_positions=24, n_embd=16, n_layer=1, n_head=2)).save_pretrained("gpt")
    teacher.save_pretrained("gpt")
    trainer = make_trainer("loss=kd", f"model={sft_run}/LATEST", "reference=gpt", "max_length=24", "sample_max_tokens=90",
                           "max_prompt_length=12")
    trainer.evaluate()  # 24 learned positions
    lengths = [len(e.prompt) + len(ids) for e, ids in zip(
        trainer.sample_examples, trainer.generate(trainer.policy, trainer.sample_examples))]
    assert max(lengths) == 24


def test_rewards_are_computed_in_float32(rm_run):
    trainer = make_trainer("loss=rm", f"model={rm_run}/LATEST", "compute_dtype=bfloat16")
    scores = trainer.response_scores(trainer.policy, collate(trainer.train_examples[:50])).flatten()
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())


def test_reward_models_that_are_none(sft_run, run, refused):
    latest_sft = f"{sft_run}/LATEST"
    assert "it is no reward model, it has no scalar head" in refused(*TINY_RUN, "loss=dpo", f"reward_model={latest_sft}", f"model={latest_sft}")
    write_lines("rows.jsonl", [{"prompt": "p", "chosen": f"a {i}", "rejected": "other words"} for i in range(3)])
    other = run("loss=rm", "data=rows.jsonl", "max_steps=1")
    assert "reward_model=" in (said := refused(*TINY_RUN, "loss=dpo", f"reward_model={other}/LATEST"))
    assert "has another tokenizer than the model" in said


# ---------------------------------------------------------------- distillation


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt", "gemma2", "cohere", "granite", "mixtral"])
def test_the_head_by_itself_is_the_models_own(model_type):
    """Gemma 2 caps its logits, Cohere and Granite scale them: run_head must do the same."""
    config = CONFIG_MAPPING[model_type](
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5,
        **{} if model_type in ("gpt2", "opt") else {
            "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0})
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if hasattr(config, name):
            setattr(config, name, 0.7)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = collate([Example("x", np.arange(3, 8), (np.arange(9, 9 + n),), {}) for n in (4, 2)])
    states = model.get_decoder()(**trainers.model_inputs(batch))
    hidden = states[0].flatten(0, 1)[batch.states]
    expected = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.states]
    parts = torch.cat([trainers.run_head(model, states, part) for part in hidden.split(4)])
    assert torch.allclose(parts, expected, atol=1e-5) and expected.std() > 0.05
    assert "forward" not in vars(model.get_decoder())


def test_the_steps_of_iterations_to_come():
    """100 of 400 rows in fours are 25 steps an iteration; mixed, each after the first has twice as many rows."""
    for mixed, steps in (("false", 75), ("true", 125)):
        trainer = make_trainer("loss=spin", "num_epochs=0.25", "spin.iterations=3", "max_steps=null",
                               f"spin.mix_previous={mixed}")
        assert trainer.num_steps == steps
        trainer.config.max_steps = 60
        assert trainer.num_steps == 60


def test_chunks_of_logits_change_nothing(sft_run, monkeypatch):
    norms = []
    for logits in (10**9, 3000, 1):
        monkeypatch.setattr(trainers, "CHUNK_LOGITS", logits)
        trainer = make_trainer("loss=kd", f"model={sft_run}/LATEST", f"reference={sft_run}/LATEST", "kd.divergence=bwd_kl",
                               "kd.temperature=2", "kd.sft_weight=0.5")
        with torch.no_grad():
            trainer.reference.lm_head.weight.mul_(0.5)
        norms.append({k: v for k, v in trainer.train_step().items() if k in ("loss", "kd_loss", "sft_loss", "grad_norm")})
    assert norms[0]["loss"] == pytest.approx(norms[0]["kd_loss"] + 0.5 * norms[0]["sft_loss"]) and len(norms[0]) == 4
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and norms[2] == pytest.approx(norms[0], rel=1e-5)


def test_a_teacher_with_padded_embeddings(sft_run):
    """Embeddings are often padded beyond the tokens; only what both have is compared."""
    model = AutoModelForCausalLM.from_pretrained(f"{sft_run}/LATEST")
    model.resize_token_embeddings(model.config.vocab_size + 7, mean_resizing=False)
    model.save_pretrained("padded")
    AutoTokenizer.from_pretrained(f"{sft_run}/LATEST").save_pretrained("padded")
    trainer = make_trainer("loss=kd", f"model={sft_run}/LATEST", "reference=padded")
    assert trainer.train_step()["loss"] == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------- checkpoints and models


def test_a_checkpoint_is_a_whole_hugging_face_folder(run, sft_run):
    model = AutoModelForCausalLM.from_pretrained(f"{sft_run}/LATEST")
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    ids = tokenizer("Review of The Silent Garden:", return_tensors="pt")
    assert " The " in tokenizer.decode(model.generate(**ids, max_new_tokens=20, do_sample=False)[0])
    trainer = make_trainer("loss=dpo", f"model={sft_run}/LATEST")
    assert all(torch.equal(a, b) for a, b in zip(trainer.policy.parameters(), model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(trainer.reference.parameters(), model.parameters()))
    assert trainer.policy is not trainer.reference


def test_reference_given_by_name(run, sft_run):
    trainer = make_trainer("loss=dpo", f"model={sft_run}/LATEST", f"reference={sft_run}/LATEST", "seed=3")
    assert all(torch.equal(a, b) for a, b in zip(trainer.policy.parameters(), trainer.reference.parameters()))


def test_keep_checkpoints(run):
    folder = run(*TINY_RUN, "max_steps=5", "save_every=1", "keep_checkpoints=2", "eval_every=0")
    assert sorted(name for name in os.listdir(folder) if "step" in name) == ["step-000004", "step-000005"]
    assert os.readlink(f"{folder}/LATEST") == "step-000005"


def test_dropout_is_set_to_0(run, capsys):
    rows = [{"prompt": "p", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(8)]
    write_lines("rows.jsonl", rows)
    base = run("data=rows.jsonl", "max_steps=1", "exp_name=base")
    tokenizer = AutoTokenizer.from_pretrained(f"{base}/LATEST")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2, attention_dropout=0.5)).save_pretrained("dropping")
    tokenizer.save_pretrained("dropping")
    trainer = make_trainer("loss=dpo", "data=rows.jsonl", "model=dropping")
    assert "attention_dropout was 0.5, set to 0" in capsys.readouterr().out
    assert trainer.train_step()["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.policy.training


def test_weights_that_are_missing_are_refused(sft_run, refused):
    from safetensors.torch import save_file
    shutil.copytree(f"{sft_run}/LATEST", "part")
    weights = load_file("part/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, "part/model.safetensors", metadata={"format": "pt"})
    assert "1 weights are missing or of another shape" in refused("model=part")
    open("part/model.safetensors", "r+b").truncate(1000)
    assert "model" in refused("model=part") and "cannot be loaded" in refused("model=part")


def test_a_reference_with_another_tokenizer_is_refused(sft_run, run, refused):
    write_lines("rows.jsonl", [{"prompt": "p", "response": "other words"}] * 3)
    other = run("data=rows.jsonl", "max_steps=1", "exp_name=other")
    message = refused("loss=dpo", f"model={sft_run}/LATEST", f"reference={other}/LATEST")
    assert "has another tokenizer" in message


# ---------------------------------------------------------------- stopping and resuming


def start(*arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *arguments], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def num_lines(path):
    try:
        with open(path, "rb") as file:
            return file.read().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_for(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None), process.stdout.read()
        time.sleep(0.005)


def same_weights(a, b):
    first, second = (load_file(f"{folder}/LATEST/model.safetensors") for folder in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def numbers(folder):
    return [{k: v for k, v in line.items() if k not in UNREPEATABLE} for line in read_lines(f"{folder}/metrics.jsonl")]


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_killed_at_ten_random_moments(loss, tmp_path):
    """kill -9, each followed by resume=true: the weights and records of a run that was left alone."""
    settings = [*TINY_RUN, f"loss={loss}", "save_every=5", "max_steps=500", "num_epochs=9", "eval_every=150"]
    undisturbed = start(*settings, "run_dir=undisturbed")
    rng = random.Random(loss)
    arguments = [*settings, "run_dir=killed"]
    for kill in range(10):
        process = start(*arguments)
        lines = num_lines("killed/metrics.jsonl")
        if kill == 0:
            wait_for(lambda: os.path.lexists("killed/LATEST"), process)
        else:  # the records were cut back and have grown again: it is training
            wait_for(lambda: num_lines("killed/metrics.jsonl") != lines, process)
        time.sleep(rng.uniform(0, 0.4))
        assert process.poll() is None, process.stdout.read()
        process.kill()
        process.wait()
        trainers.read_counters(os.path.realpath("killed/LATEST"))
        AutoModelForCausalLM.from_pretrained("killed/LATEST")
        arguments = ["resume=true", "run_dir=killed"]
    last = start(*arguments)
    assert last.wait(300) == 0, last.stdout.read()
    assert undisturbed.wait(300) == 0
    assert same_weights("killed", "undisturbed")
    assert numbers("killed") == numbers("undisturbed")
    assert read_lines("killed/samples.jsonl") == read_lines("undisturbed/samples.jsonl")
    assert [name for name in os.listdir("killed") if name.endswith(".partial")] == []


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_resuming_matches_not_stopping(loss, run, sft_run):
    settings = [f"loss={loss}", *needed(loss, sft_run), *TINY_RUN, "lr_schedule=constant", "save_every=2", "eval_every=3"]
    whole = run(*settings, "max_steps=7", "run_dir=whole")
    run(*settings, "max_steps=4", "run_dir=part")
    part = run("resume=true", "max_steps=7", "run_dir=part", "eval_every=3")
    assert same_weights(whole, part)
    trains = [[line for line in numbers(folder) if "lr" in line] for folder in (whole, part)]
    assert trains[0] == trains[1] and len(trains[0]) == 7


def test_resuming_a_partial_last_batch_skips_nothing(run):
    write_lines("r.jsonl", [{"prompt": "p", "response": f"r {i}"} for i in range(10)])
    settings = ["data=r.jsonl", "batch_size=4", "lr_schedule=constant"]
    folder = run(*settings)
    run("resume=true", "exp_name=sft", "num_epochs=2.5")
    assert [line["examples"] for line in read_lines(f"{folder}/metrics.jsonl")] == [4, 8, 12, 15, 19, 23, 25]


def test_self_play_killed_in_every_phase(tmp_path):
    """kill -9 while iteration 0 samples, then trains, while iteration 1 samples, then trains; resumed each time."""
    settings = [*TINY_RUN, "loss=spin", "spin.max_tokens=12", "num_epochs=0.5", "max_steps=null", "save_every=3",
                "eval_every=30", "eval_batch_size=8"]  # 50 steps an iteration, 50 batches to sample
    undisturbed = start(*settings, "run_dir=undisturbed")
    moments = [lambda: 60 < num_lines("killed/generated-00.jsonl") < 300,
               lambda: num_lines("killed/generated-00.jsonl") == 400 and latest("killed") > 10,
               lambda: 60 < num_lines("killed/generated-01.jsonl") < 300,
               lambda: num_lines("killed/generated-01.jsonl") == 400 and latest("killed") > 60]
    arguments = [*settings, "run_dir=killed"]
    for moment in moments:
        process = start(*arguments)
        wait_for(moment, process)
        process.kill()
        process.wait()
        arguments = ["resume=true", "run_dir=killed"]
    with open("killed/generated-01.jsonl", "a") as file:
        file.write('{"row": 1, "id')  # a torn line that no crash could leave now, but a copy could
    last = start(*arguments)
    assert last.wait(300) == 2 and "generated-01.jsonl" in last.stdout.read()
    cut = open("killed/generated-01.jsonl").read().rpartition("\n")[0] + "\n"
    open("killed/generated-01.jsonl", "w").write(cut)
    last = start(*arguments)
    assert last.wait(300) == 0, last.stdout.read()
    assert undisturbed.wait(300) == 0
    assert same_weights("killed", "undisturbed") and latest("killed") == 100
    assert numbers("killed") == numbers("undisturbed")
    for name in ("samples.jsonl", "generated-00.jsonl", "generated-01.jsonl"):
        assert open(f"killed/{name}").read() == open(f"undisturbed/{name}").read()


def latest(folder):
    return int(os.readlink(f"{folder}/LATEST").split("-")[1]) if os.path.lexists(f"{folder}/LATEST") else -1


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(number, status, run):
    process = start(*TINY_RUN, "max_steps=2000", "num_epochs=99", "eval_every=0", "run_dir=r", "lr_schedule=constant")
    wait_for(lambda: num_lines("r/metrics.jsonl") > 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert f"Stopped by {number.name} after step" in output and "resume=true run_dir=r" in output
    step = int(os.readlink("r/LATEST").split("-")[1])
    assert read_lines("r/metrics.jsonl")[-1]["step"] == step
    run("resume=true", "run_dir=r", f"max_steps={step + 1}")
    assert os.readlink("r/LATEST") == f"step-{step + 1:06d}"


def test_a_signal_stops_an_evaluation_which_is_made_up_for(run):
    process = start(*TINY_RUN, "max_steps=5", "eval_batch_size=1", "run_dir=r")
    wait_for(lambda: os.path.exists("r/config.yaml"), process)
    time.sleep(1)  # in the first evaluation: 1,024 prompts, one at a time
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and num_lines("r/metrics.jsonl") == 0, output
    run("resume=true", "run_dir=r", "eval_batch_size=256")
    assert [(line["split"], line["step"]) for line in read_lines("r/metrics.jsonl")][:2] == [("eval", 0), ("train", 1)]


def test_max_hours(run, capsys):
    folder = run(*TINY_RUN, "max_hours=1e-9")
    assert "Stopped by max_hours after step 0 of 3; all is saved." in capsys.readouterr().out
    run("resume=true", f"run_dir={folder}", "max_hours=null")
    assert os.readlink(f"{folder}/LATEST") == "step-000003"


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights(run, monkeypatch):
    trainer = make_trainer()
    bad = trainer.train_examples[trainers.stream(400, 0, 4, seed=0, shuffle=True)[2]]
    before = [p.clone() for p in trainer.policy.parameters()]
    inner = trainer.losses

    def losses(batch):
        values, metrics = inner(batch)
        return values * torch.tensor([math.nan if e is bad else 1.0 for e in batch.examples]), metrics

    monkeypatch.setattr(trainer, "losses", losses)
    with pytest.raises(FloatingPointError, match=f"step 1: loss nan.*is not finite: {bad.where}\\. The weights"):
        trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters()))
    assert trainer.step == 0


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch):
    trainer = make_trainer()
    next(trainer.policy.parameters()).register_hook(lambda grad: grad * math.inf)
    before = [p.clone() for p in trainer.policy.parameters()]
    with pytest.raises(FloatingPointError, match="gradient norm (nan|inf); each example's loss is finite"):
        trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters()))


def test_a_checkpoint_that_a_crash_left_ahead_of_latest(run):
    """Killed between the rename of step-000004 and that of LATEST, with only one checkpoint to be kept."""
    settings = [*TINY_RUN, "save_every=1", "eval_every=0", "lr_schedule=constant"]
    whole = run(*settings, "max_steps=4", "run_dir=whole")
    run(*settings, "max_steps=4", "run_dir=r")
    os.remove("r/LATEST")
    os.symlink("step-000002", "r/LATEST")
    run("resume=true", "run_dir=r", "max_steps=3", "keep_checkpoints=1")
    assert os.readlink("r/LATEST") == "step-000003"
    assert sorted(name for name in os.listdir("r") if "step" in name) == ["step-000003", "step-000004"]
    run("resume=true", "run_dir=r", "max_steps=4")
    assert same_weights(whole, "r")


def test_a_line_torn_within_a_character(run):
    folder = run(*TINY_RUN, "lr_schedule=constant", "eval_every=0")
    before = numbers(folder)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(f"{folder}/{name}", "ab") as file:
            file.write('3\n{"step": 1, "x": "'.encode() + "é".encode()[:1])
    run("resume=true", f"run_dir={folder}", "max_steps=4")
    assert numbers(folder)[:3] == before and len(numbers(folder)) == 4


@pytest.mark.parametrize("name, content", [
    ("rng.pt", b""), ("rng.pt", b"PK"), ("optimizer/.metadata", b""), ("optimizer/__0_0.distcp", b"PK"),
    ("state.json", b"{}"), ("state.json", b"[]"), ("state.json", b'{"st')])
def test_damaged_checkpoints_are_refused(name, content, run, refused):
    folder = run(*TINY_RUN, "eval_every=0")
    open(f"{folder}/LATEST/trainer_state/{name}", "wb").write(content)
    assert "is damaged" in refused("resume=true", f"run_dir={folder}")


def test_random_state_is_restored(run):
    folder = run(*TINY_RUN, "eval_every=0")
    saved = torch.load(f"{folder}/LATEST/trainer_state/rng.pt")["cpu"]
    torch.manual_seed(12345)
    config, checkpoint = train.load_config(["resume=true", f"run_dir={folder}"])
    train.build_trainer(config, checkpoint)
    assert torch.equal(torch.get_rng_state(), saved)


def test_run_names_that_look_like_patterns_or_numbers(run, refused):
    for name in ("a[1]", "1e-5", "2024"):
        folder = run(*TINY_RUN, f"exp_name={name}", "eval_every=0", "lr_schedule=constant")
        assert "holds a run already" in refused(*TINY_RUN, f"exp_name={name}")
        run("resume=true", f"exp_name={name}", "max_steps=4")
        assert os.readlink(f"{folder}/LATEST") == "step-000004"


def test_a_run_that_another_process_began_meanwhile():
    config, checkpoint = train.load_config([*TINY_RUN, "exp_name=race"])
    assert train.main([*TINY_RUN, "exp_name=race"]) == 0
    with pytest.raises(InputError, match="holds a run already"), train.lock_folder(config, checkpoint):
        pass


def test_a_model_that_looks_ahead_is_refused(run, sft_run, refused):
    from transformers import RobertaConfig, RobertaForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    for is_decoder in (False, True):
        config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                               num_attention_heads=2, is_decoder=is_decoder, max_position_embeddings=600,
                               initializer_range=1.0)
        RobertaForCausalLM(config).save_pretrained(f"roberta{is_decoder}")
        tokenizer.save_pretrained(f"roberta{is_decoder}")
    assert "is no causal language model" in refused(*TINY_RUN, "model=robertaFalse")
    make_trainer("model=robertaTrue")


def test_what_a_resumed_run_may_not_change(run, sft_run, refused):
    folder = run(*TINY_RUN, "loss=dpo", f"model={sft_run}/LATEST", "lr_schedule=linear")
    for given, old in (("lr=0.5", "lr was 0.002"), ("dpo.beta=0.2", "dpo.beta was 0.1"), ("loss=ipo", "loss was dpo"),
                       ("batch_size=8", "batch_size was 4"), ("max_steps=9", "max_steps was 3"), ("seed=1", "seed was 0")):
        message = refused("resume=true", f"run_dir={folder}", given)
        assert old in message and "cannot become" in message
    run("resume=true", f"run_dir={folder}", "lr=0.002", "save_every=7", "eval_batch_size=8", "log_every=3")


def test_changed_data_or_reference_are_refused(run, sft_run, refused):
    shutil.copytree(os.path.realpath(f"{sft_run}/LATEST"), "base")
    rows = write_lines("r.jsonl", [{"prompt": "p", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(6)])
    folder = run("loss=dpo", "model=base", "data=r.jsonl", "batch_size=2", "max_steps=2", "lr_schedule=constant")
    resume = ["resume=true", f"run_dir={folder}", "max_steps=3"]
    write_lines("r.jsonl", [{"prompt": "p", "chosen": f"a {i}", "rejected": f"c {i}"} for i in range(6)])
    assert "the data is not what this run began with" in refused(*resume)
    write_lines("r.jsonl", [{"prompt": "p", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(6)])
    from safetensors.torch import save_file
    weights = load_file("base/model.safetensors")
    save_file({name: w + (name == "lm_head.weight") for name, w in weights.items()}, "base/model.safetensors",
              metadata={"format": "pt"})
    assert "the reference is not what this run began with" in refused(*resume)
    save_file(weights, "base/model.safetensors", metadata={"format": "pt"})
    run(*resume)
    assert rows


def test_resume_needs_a_whole_checkpoint(run, refused):
    assert "has no complete checkpoint to resume" in refused("resume=true", "exp_name=nothing")
    folder = run(*TINY_RUN, "resume=auto", "exp_name=new")
    os.remove(f"{folder}/LATEST/trainer_state/rng.pt")
    assert "is incomplete, it lacks trainer_state/rng.pt" in refused("resume=auto", "exp_name=new")


def test_resume_auto_starts_over_where_nothing_was_saved(run):
    os.makedirs("runs/new")
    write_lines("runs/new/metrics.jsonl", [{"step": 1, "split": "train", "loss": 7.0}])
    open("runs/new/config.yaml", "w").write("loss: sft\nprovenance: {run_id: abc}\n")
    folder = run(*TINY_RUN, "resume=auto", "exp_name=new", "eval_every=0")
    assert [line["step"] for line in read_lines(f"{folder}/metrics.jsonl")] == [1, 2, 3]
    assert losses_of(folder)[0] != 7.0


def test_a_finished_run_says_so(run, capsys):
    folder = run(*TINY_RUN, "loss=dpo")
    before = open(f"{folder}/metrics.jsonl").read()
    run("resume=true", "loss=dpo")
    assert "This run is finished: its last step, 3, is in" in capsys.readouterr().out
    assert open(f"{folder}/metrics.jsonl").read() == before


def test_two_processes_cannot_write_one_run(refused):
    import fcntl
    os.makedirs("runs/busy")
    with open("runs/busy/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by another process" in refused("exp_name=busy", *TINY_RUN)


def test_latest_moves_only_to_a_whole_folder(monkeypatch):
    trainer = make_trainer("save_every=1", "eval_every=0")
    trainer.save()
    trainer.train_step()
    monkeypatch.setattr(trainer.tokenizer, "save_pretrained", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        trainer.save()
    run_dir = trainer.config.run_dir
    assert os.readlink(f"{run_dir}/LATEST") == "step-000000" and not os.path.exists(f"{run_dir}/step-000001")
    assert AutoModelForCausalLM.from_pretrained(f"{run_dir}/LATEST")


def test_what_is_on_the_disk_before_latest_moves(monkeypatch):
    """Records and files are synced before the folder takes its name, and that before LATEST moves."""
    trainer = make_trainer("eval_every=0")
    trainer.log("train", trainer.train_step())
    steps, opened = [], {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename", "replace")}

    def open_file(path, *arguments, **options):
        number = real["open"](path, *arguments, **options)
        opened[number] = str(path)
        return number

    def fsync(number):
        steps.append(("fsync", os.path.basename(opened[number])))
        real["fsync"](number)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, lambda a, b, name=name: (
            steps.append((name, os.path.basename(b))), real[name](a, b)))
    trainer.save()
    renamed, moved = steps.index(("rename", "step-000001")), steps.index(("replace", "LATEST"))
    for name in ("metrics.jsonl", "model.safetensors", "rng.pt", ".metadata", "trainer_state", ".step-000001.partial"):
        assert steps.index(("fsync", name)) < renamed
    assert renamed < steps.index(("fsync", "sft")) < moved < len(steps) - 1 and steps[-1] == ("fsync", "sft")


# ---------------------------------------------------------------- wandb


def test_wandb_offline(run):
    folder = run(*TINY_RUN, "loss=dpo", "wandb=offline", "eval_every=2")
    assert any(name.startswith("offline-run") for name in os.listdir(f"{folder}/wandb"))


def test_what_wandb_gets(run, monkeypatch):
    """A stand-in records the calls: names, the table of samples, and the same id when the run is resumed."""
    calls, ids = [], []

    class Recorder:
        Table = staticmethod(lambda columns, data: ("table", columns, data))
        errors = type("errors", (), {"Error": RuntimeError})

        def init(self, **options):
            ids.append(options["id"])
            return self

        def log(self, values):
            calls.append(values)

        def define_metric(self, *names, **options):
            pass

        def finish(self):
            pass

    monkeypatch.setitem(sys.modules, "wandb", Recorder())
    folder = run(*TINY_RUN, "loss=dpo", "wandb=online", "eval_every=2", "lr_schedule=constant")
    train_call = next(call for call in calls if call["step"] == 1)
    assert train_call["loss"] == losses_of(folder)[0]
    evaluated = [call for call in calls if "eval/loss" in call]
    assert [call["step"] for call in evaluated] == [0, 2, 3]
    _, columns, rows = next(call["eval/samples"] for call in calls if "eval/samples" in call)
    assert columns[:3] == ["prompt", "policy", "reward"] and len(rows) == 2
    run("resume=true", f"run_dir={folder}", "max_steps=4")
    assert len(ids) == 2 and ids[0] == ids[1]


def test_a_failed_wandb_leaves_no_run_behind(run, refused, monkeypatch):
    class Failing:
        errors = type("errors", (), {"Error": RuntimeError})

        def init(self, **options):
            raise RuntimeError("no key")

    monkeypatch.setitem(sys.modules, "wandb", Failing())
    assert "wandb=online does not start: no key" in refused(*TINY_RUN, "wandb=online")
    run(*TINY_RUN, "wandb=disabled")


def test_wandb_is_not_imported_when_disabled():
    code = "import sys, train; train.main(['max_steps=1', 'eval_every=0']); assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": ROOT}, timeout=120)
