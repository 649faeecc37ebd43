"""A step is what the obvious version says, however it is split; evaluation, records, self-play's loop."""

import copy
import json
import math
import os
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (DATA, FEW_ROWS, OWN, TEMPORARY, TINY_RUN, last_gradient, latest, losses_of,
                      make_trainer, needed, obvious_logp, read_lines, same_weights, write_lines)
from fork_rows import ROWS
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import engine.forward
import trainers
from engine.batches import CACHED, SEPARATE, collate, stream
from engine.checkpoints import read_state
from engine.config import read_schema
from engine.forward import response_logps, response_scores
from engine.objectives import WEIGHT
from engine.sampling import Sampler
from engine.toy import toy
from losses import OBJECTIVES, sft_loss
from trainers import add_to_sums, mean_metrics

QUICK = [f"eval_data={FEW_ROWS}", "num_samples=0"]  # without toy's true rewards, for which all is sampled
EXACT = ["dtype=float64", "compute_dtype=float64"]
# What float32 may be off by, relative to what is added up: 2^-24 times the root of the number of additions.
# Most, 2^16, has the norm of the embeddings' gradient; a forward and backward, some 20 products of up to 512
# terms one after another, has fewer. Times ten, for room
ROUNDING = 10 * 2**-24 * 2**8
FORTY = write_lines(os.path.join(TEMPORARY.name, "forty of toy.jsonl"), toy("train", True)[:40])
SPIN = ["loss=spin", f"data={FORTY}", "max_steps=null", "num_epochs=0.2", "spin.max_tokens=10",
        "eval_batch_size=400"]  # 2 steps in each iteration


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers' RMSNorm computes in float32 even in float64 models: its last bit is 6e-8, not 1e-16."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: self.weight * x * torch.rsqrt(
        x.square().mean(-1, keepdim=True) + self.variance_epsilon))


# ---------------------------------------------------------------- a step, against the simplest version


def obvious_losses(name, model, reference, example):
    """The per-example loss with the formulas written out, and the example's share of the denominator."""
    if name == "rm":
        w, l = (model(input_ids=torch.tensor([[*example.prompt, *response]])).logits[0, 0]
                for response in example.responses)
        return torch.log(1 + torch.exp(l - w)), 1
    if name == "kd":
        ids = torch.tensor([[*example.prompt, *example.responses[0]]])
        answer = slice(len(example.prompt) - 1, -1)
        logps = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, answer]
        with torch.no_grad():
            teacher = reference(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, answer]
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


def obvious_step(name, model, reference, examples):
    """The examples' loss and its gradient's norm; leaves the gradients, clipped to 0.5, in the model."""
    losses, weights = zip(*(obvious_losses(name, model, reference, example) for example in examples))
    loss = sum(losses) / sum(weights)
    model.zero_grad()
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    for p in model.parameters():
        p.grad *= min(1, 0.5 / (norm + 1e-6))  # torch's clip_grad_norm_ adds 1e-6
    return loss.item(), norm


def trainer_and_twins(name, sft_run, *settings):
    """A trainer, float64 copies of its policy and reference, and the order of its examples."""
    if name not in OWN:
        pytest.skip("adopted by a fork, which compares it with plain code of its own, as tests/test_forks.py")
    block = [f"{name}.beta=0.5"] if f"{name}.beta" in read_schema()[0] else []
    trainer = make_trainer(f"loss={name}", f"model={sft_run}/LATEST", *QUICK, f"data={FORTY}", *block,
                           *needed(name, sft_run), "max_steps=5", "max_grad_norm=0.5", "lr=1e-5",
                           "warmup_steps=2", "lr_schedule=constant", "max_tokens_per_microbatch=100",
                           *settings)
    if name == "spin":
        trainer.next_iteration()
    if name == "kd":  # another model, or there is nothing to learn
        with torch.no_grad():
            for p in trainer.reference.parameters():
                p += 0.02 * torch.randn_like(p)
    model = copy.deepcopy(trainer.policy).double()
    order = torch.randperm(len(trainer.train_examples), generator=torch.Generator().manual_seed(0)).tolist()
    return trainer, model, copy.deepcopy(trainer.reference or model).double(), order


@pytest.mark.parametrize("name", OBJECTIVES)
def test_trajectory_matches_the_obvious_implementation(name, sft_run, exact_norms):
    """Five steps: losses, every gradient, clipping, warmup and RMSprop, all in float64."""
    trainer, model, reference, order = trainer_and_twins(name, sft_run, *EXACT, "layout=separate")
    squares = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(5):
        examples = [trainer.train_examples[i] for i in order[4 * step:4 * step + 4]]
        loss, norm = obvious_step(name, model, reference, examples)
        metrics = trainer.train_step()
        assert metrics["loss"] == pytest.approx(loss, rel=1e-9, abs=1e-9)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-9)
        for p, ours in zip(model.parameters(), trainer.policy.parameters()):
            assert (last_gradient(ours) - p.grad).abs().max() <= 1e-9 * p.grad.abs().max()
        rate = 1e-5 * min(1, (step + 1) / 3)
        assert metrics["lr"] == rate
        with torch.no_grad():
            for p, square in zip(model.parameters(), squares):
                square.mul_(0.99).add_(0.01 * p.grad.square())
                p -= rate * p.grad / (square.sqrt() + 1e-8)
    for p, ours in zip(model.parameters(), trainer.policy.parameters()):
        assert torch.allclose(p, ours, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_in_float32_and_shared_rows(name, sft_run):
    """Only the first: RMSprop divides by gradients so small that they are all rounding."""
    trainer, model, reference, order = trainer_and_twins(name, sft_run, "layout=shared")
    loss, norm = obvious_step(name, model, reference, [trainer.train_examples[i] for i in order[:4]])
    metrics = trainer.train_step()
    # The policy is its reference yet, so both err alike and h is exactly 0; of the others a loss is a mean
    assert metrics["loss"] == pytest.approx(loss, rel=ROUNDING, abs=ROUNDING)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=ROUNDING)
    for p, ours in zip(model.parameters(), trainer.policy.parameters()):
        assert last_gradient(ours).dtype == torch.float32
        assert (last_gradient(ours) - p.grad).abs().max() <= ROUNDING * p.grad.abs().max()


@pytest.mark.parametrize("settings", [
    ["loss=sft"], ["loss=sft", "sft.average=examples"], ["loss=dpo", "dpo.sft_weight=0.1"],
    ["loss=ipo", "ipo.average_logps=true"], ["loss=rpo"], ["loss=rm"], ["loss=kd", "kd.sft_weight=0.5"],
    ["loss=spin"]], ids=" ".join)
def test_a_step_is_the_same_however_it_is_split(settings, sft_run, exact_norms, monkeypatch):
    """In parts, by a budget of tokens, one by one; the logits by some twenty tokens; in shared rows."""
    def two_steps(parts, budget, layout):
        trainer = make_trainer(*settings, *needed(settings[0][5:], sft_run), *QUICK, *EXACT, f"data={FORTY}",
                               f"tokenizer={sft_run}/LATEST", f"layout={layout}", "batch_size=8", "lr=1e-5",
                               f"gradient_accumulation_steps={parts}", f"max_tokens_per_microbatch={budget}")
        if trainer.objective.self_play:
            trainer.next_iteration()
        return [trainer.train_step() for _ in range(2)]
    whole = two_steps(1, 10**6, "separate")
    monkeypatch.setitem(engine.forward.CHUNK_LOGITS, "cpu", 10_000)
    for split in ((8, 10**6, "auto"), (2, 97, "separate"), (1, 1, "auto"), (1, 200, "shared")):
        for metrics, expected in zip(two_steps(*split), whole, strict=True):
            assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-9)




def test_what_the_sums_are_divided_by():
    """The loss by tokens or examples; metrics by examples, those of a loss of tokens by tokens: by hand."""
    examples = [SimpleNamespace(lengths=(3,)), SimpleNamespace(lengths=(5,))]  # 8 tokens

    def means(name, sums, **settings):
        sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
        return mean_metrics(sums, OBJECTIVES[name].bound(settings), examples)
    sums = {"loss": 16.0, "logps/chosen": -16.0, "sft_loss": 4.0}  # the last's name decides nothing
    metrics = {"logps/chosen": -8.0, "sft_loss": 2.0}
    assert means("sft", sums, average="tokens") == {"loss": 2.0, **metrics}
    assert means("sft", sums, average="examples") == {"loss": 8.0, **metrics}
    sums = {"loss": 16.0, "preference_loss": 4.0, "sft_loss": 12.0}
    assert means("dpo", sums) == {"loss": 8.0, "preference_loss": 2.0, "sft_loss": 6.0}
    # metrics that have weights of their own, as distillation's: 4 / 8 tokens; of no row at all there is none
    sums = {"loss": 16.0, "kd_loss": 4.0, ("kd_loss", WEIGHT): 8.0, "none": 0.0, ("none", WEIGHT): 0.0}
    assert means("kd", sums) == {"loss": 2.0, "kd_loss": 0.5, "none": None}
    # two pairs of rewards 1, 3 and 2, 6: of the pairs the means are 2 and 4, of the squares 5 and 20
    sums = {"loss": 0.0, "rewards/mean": 6.0, "rewards/mean_square": 25.0}
    assert means("rm", sums) == {
        "loss": 0.0, "rewards/mean": 3.0, "rewards/std": pytest.approx(math.sqrt(12.5 - 9))}
    assert math.isnan(means("rm", sums | {"rewards/mean_square": math.inf})["rewards/std"])


def test_an_idle_microbatch_adds_nothing():
    """Not even where it is not finite, and where a rank has no other; the names are there all the same."""
    sums, nan = {}, torch.tensor([math.nan])
    add_to_sums(sums, SimpleNamespace(is_idle=True), nan, {"a": nan})
    assert {name: total.item() for name, total in sums.items()} == {"loss": 0.0, "a": 0.0}
    losses = torch.tensor([1e8, 1.0], requires_grad=True)
    add_to_sums(sums, SimpleNamespace(is_idle=False), losses, {"a": torch.tensor([2.0, 3.0])})
    add_to_sums(sums, SimpleNamespace(is_idle=True), nan, {"a": nan})
    assert {name: total.item() for name, total in sums.items()} == {"loss": 1e8 + 1, "a": 5.0}  # not float32
    assert list(sums) == ["loss", "a"] and not sums["loss"].requires_grad


def test_sft_averages_tokens_or_examples(exact_norms):
    examples = make_trainer(*QUICK).train_examples[:4]
    for average, count in (("tokens", sum(len(e.responses[0]) for e in examples)), ("examples", 4)):
        trainer = make_trainer(*QUICK, *EXACT, f"sft.average={average}")
        trainer.train_examples, trainer.config.shuffle = examples, False
        with torch.no_grad():
            logps = [obvious_logp(trainer.policy, e, e.responses[0]).item() for e in examples]
        metrics = trainer.train_step()
        assert metrics["loss"] == pytest.approx(-sum(logps) / count, rel=1e-9)
        assert metrics["logps/chosen"] == pytest.approx(sum(logps) / 4, rel=1e-9)


def test_settings_of_each_iteration():
    """Of a list one for each; a rate of 0 is one, and null is the run's."""
    trainer = make_trainer(*SPIN, *QUICK, "lr=3e-3", "spin.beta=[0.1,0.5]", "spin.lr=[0,2e-3]")
    pair = [torch.tensor([x]) for x in (-1.0, -3.0, -2.0, -2.0)]  # h = 2
    for iteration, (lr, beta) in enumerate(((0, 0.1), (2e-3, 0.5))):
        trainer.iteration = iteration
        trainer.bind_settings()
        assert trainer.lr == lr and trainer.settings["beta"] == beta
        losses, _ = trainer.train_objective.loss(*pair)
        assert losses.item() == pytest.approx(math.log(1 + math.exp(-2 * beta)), rel=1e-6)
    assert make_trainer(*SPIN, *QUICK, "lr=3e-3", "spin.lr=0").lr == 0
    assert make_trainer(*SPIN, *QUICK, "lr=3e-3").lr == make_trainer(*QUICK, "lr=3e-3").lr == 3e-3


def test_what_held_out_examples_are_evaluated_by():
    """Self-play's by SFT's loss with SFT's settings, for there is no opponent to evaluate against."""
    for average in ("tokens", "examples"):
        trainer = make_trainer(*SPIN, *QUICK, f"sft.average={average}")
        assert trainer.train_objective.self_play and trainer.train_objective.average == "examples"
        assert trainer.eval_objective.loss.func is sft_loss and trainer.eval_objective.average == average
    trainer = make_trainer("loss=dpo", *QUICK)
    assert trainer.eval_objective is trainer.train_objective


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rewards_at_step_0(dtype, sft_run):
    """In evaluation exactly 0; in training, where the reference's numbers come from other batches, as near as
    rounding lets them be. Real dialogues, for rows of one length would round alike in any batch."""
    hh = f"{DATA}/hh.jsonl"
    trainer = make_trainer("loss=dpo", "dpo.beta=1", f"model={sft_run}/LATEST", f"compute_dtype={dtype}",
                           f"data={hh}", f"eval_data={hh}", "num_eval_examples=20", "num_samples=0",
                           "max_length=64", "max_prompt_length=24", "max_tokens_per_microbatch=500",
                           "max_steps=100")
    trainer.fill_in_reference()
    trainer.evaluate()
    line = read_lines("runs/dpo/metrics.jsonl")[-1]
    assert line["rewards/chosen"] == line["rewards/rejected"] == line["rewards/margins"] == 0.0
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    rewards, logps, errors = [], [], []
    for position in range(0, 57, 4):
        for batch in trainer.make_global_batch(position)[1]:
            _, metrics = trainer.compute_losses(batch, trainer.train_objective)
            rewards += [metrics["rewards/chosen"], metrics["rewards/rejected"]]
            logps += batch.columns[CACHED].T
            with torch.no_grad():
                exact = response_logps(trainer.policy, batch)
            errors += [*(exact - response_logps(trainer.policy, batch, trainer.bf16)).detach()]
    rewards, logps, errors = (torch.cat(values).abs() for values in (rewards, logps, errors))
    assert len(rewards) >= 114
    if dtype == "float32":
        assert (rewards <= ROUNDING * logps).all()
    else:  # on average no more than two roundings of this kind are apart
        assert 1e-3 < errors.mean() and rewards.mean() <= 2 * errors.mean()


def test_batches_are_made_one_step_ahead(monkeypatch):
    trainer, made = make_trainer("loss=dpo", *QUICK, "max_steps=9"), []
    make = trainer.make_global_batch
    monkeypatch.setattr(trainer, "make_global_batch", lambda start: made.append(start) or make(start))
    for _ in range(3):
        trainer.train_step()
    assert made == [0, 4, 8, 12]
    ahead = [example.where for batch in trainer.next_global_batch[1] for example in batch.examples]
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(0))[12:16].tolist()
    assert sorted(ahead) == sorted(trainer.train_examples[row].where for row in rows)


def test_gradients_go_after_the_update_and_cudnns_attention_is_off():
    """Evaluation, sampling and saving have their memory; cuDNN's gives NaN gradients under some masks."""
    trainer = make_trainer("loss=dpo", *QUICK)
    torch.backends.cuda.enable_cudnn_sdp(True)
    trainer = make_trainer("loss=dpo", *QUICK)
    trainer.train_step()
    assert all(p.grad is None and last_gradient(p).abs().max() > 0 for p in trainer.policy.parameters())
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_each_model_has_its_say_on_the_layouts(monkeypatch):
    """Policy, reference and judge are tried, on training and held-out rows, each by what is read of it."""
    trainer, asked = make_trainer("loss=dpo", *QUICK), []
    monkeypatch.setattr(trainers, "choose_layouts", lambda *arguments: asked.append(arguments) or (SEPARATE,))
    models = policy, reference, judge = [torch.nn.Identity() for _ in range(3)]
    policy.dtype = torch.float32
    assert trainer.make_batcher(*models).layouts == (SEPARATE,)
    assert asked[0][1] == [(policy, response_logps), (reference, response_logps), (judge, response_scores)]
    rows = [*trainer.data.train_examples, *trainer.data.eval_examples]
    assert asked[0][0] == "auto" and asked[0][2] == rows and len(rows) == 408
    assert asked[0][5] == 8  # tokens of a sample
    trainer.make_batcher(policy, policy, None)
    assert asked[1][1] == [(policy, response_logps)]
    trainer = make_trainer("loss=rm", *QUICK)
    trainer.make_batcher(policy, None, None)
    assert asked[-1][1] == [(policy, response_scores)]
    make_trainer("loss=spin", "spin.max_tokens=77", *QUICK)
    assert asked[-1][5] == 77  # of an answer, which may be longer than all rows


@pytest.mark.parametrize("settings, row, number", [
    (["loss=dpo"], None, 0), (["loss=dpo", "reference_cache=elsewhere"], None, 0),  # before step 1 it goes
    (["loss=dpo", "reference_cache=false"], None, 1), (["loss=spin"], None, 1), (["loss=rm"], None, 0),
    (["loss=dpo", "max_steps=3"], None, 1), (["loss=dpo", "num_epochs=0.5"], None, 1),  # not every row
    (["loss=dpo"], "following", 2)])  # it moves, and stays where it began
def test_references_that_stay_have_their_memory(settings, row, number, monkeypatch):
    """For the budget of tokens on a GPU: how many of the reference's size are there in a step."""
    if row:
        monkeypatch.setitem(OBJECTIVES, "dpo", ROWS[row])
    trainer, counted = make_trainer(*QUICK, "max_steps=null", *settings), []
    monkeypatch.setattr(trainers, "tokens_that_fit", lambda *given: counted.append(given[1]) or 99)
    reference = trainer.reference and trainer.policy
    judge = copy.deepcopy(trainer.policy)
    monkeypatch.setattr(trainers, "choose_layouts", lambda *arguments: (SEPARATE,))
    trainer.make_batcher(trainer.policy, reference, judge)
    assert counted == [[reference] * number + [judge]]


def test_activation_checkpointing_changes_nothing(exact_norms):
    plain = make_trainer("loss=dpo", *QUICK, *EXACT)
    checkpointed = make_trainer("loss=dpo", *QUICK, *EXACT, "activation_checkpointing=true")
    assert checkpointed.policy.is_activation_checkpointing and not plain.policy.is_activation_checkpointing
    assert plain.train_step()["grad_norm"] == pytest.approx(checkpointed.train_step()["grad_norm"], rel=1e-9)
    for p, q in zip(plain.policy.parameters(), checkpointed.policy.parameters()):
        assert (last_gradient(p) - last_gradient(q)).abs().max() <= 1e-9 * last_gradient(p).abs().max()


@pytest.mark.parametrize("name, options", [("RMSprop", {"alpha": 0.5}), ("Adam", {}), ("AdamW", {}),
                                           ("SGD", {"momentum": 0.9})])
def test_optimizers_step_as_torch_does(name, options):
    trainer = make_trainer(*QUICK, *EXACT, f"optimizer={name}", f"optimizer_args={json.dumps(options)}",
                           "lr=1e-3", "warmup_steps=0", "lr_schedule=constant")
    other = copy.deepcopy(trainer.policy)
    optimizer = getattr(torch.optim, name)(other.parameters(), lr=1e-3, **options)
    before = [p.clone() for p in other.parameters()]
    for _ in range(3):
        trainer.train_step()
        for p, ours in zip(other.parameters(), trainer.policy.parameters()):
            p.grad = last_gradient(ours).clone()
        optimizer.step()
    for p, ours, old in zip(other.parameters(), trainer.policy.parameters(), before):
        assert torch.allclose(p, ours, rtol=0, atol=1e-12)  # a fused step rounds in its own way
        assert not torch.allclose(p, old, rtol=0, atol=1e-6)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights(monkeypatch):
    trainer = make_trainer(*QUICK)
    bad = trainer.train_examples[stream(400, 0, 4, seed=0, shuffle=True)[2]]
    before = [p.clone() for p in trainer.policy.parameters()]
    inner = trainer.compute_losses

    def compute_losses(batch, objective):
        values, metrics = inner(batch, objective)
        return values * torch.tensor([math.nan if e is bad else 1.0 for e in batch.examples]), metrics

    monkeypatch.setattr(trainer, "compute_losses", compute_losses)
    said = f"step 1: loss nan.*is not finite: {bad.where}\\. The weights"
    with pytest.raises(FloatingPointError, match=said):
        trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters()))
    assert trainer.step == 0


def test_a_gradient_that_is_not_finite_stops_the_run():
    trainer = make_trainer(*QUICK)
    next(trainer.policy.parameters()).register_hook(lambda grad: grad * math.inf)
    before = [p.clone() for p in trainer.policy.parameters()]
    with pytest.raises(FloatingPointError, match="gradient norm (nan|inf); each example's loss is finite"):
        trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters()))


def test_a_teacher_with_padded_embeddings(sft_run):
    """Embeddings are often padded beyond the tokens; only what both have is compared."""
    model = AutoModelForCausalLM.from_pretrained(f"{sft_run}/LATEST")
    model.resize_token_embeddings(model.config.vocab_size + 7, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[-7:] = model.lm_head.weight[:7] * 9  # these would take most of the probability
    model.save_pretrained("padded")
    AutoTokenizer.from_pretrained(f"{sft_run}/LATEST").save_pretrained("padded")
    trainer = make_trainer("loss=kd", f"model={sft_run}/LATEST", "reference=padded", *QUICK, *EXACT)
    assert trainer.train_step()["loss"] == pytest.approx(0, abs=1e-9)


def test_reference_given_by_name(sft_run):
    trainer = make_trainer("loss=dpo", f"model={sft_run}/LATEST", f"reference={sft_run}/LATEST", *QUICK)
    assert trainer.reference is not trainer.policy
    assert all(torch.equal(a, b) for a, b in zip(trainer.policy.parameters(), trainer.reference.parameters()))


# ---------------------------------------------------------------- a run, its evaluations and records


def test_a_tiny_model_learns(sft_run):
    """From uniform over the vocabulary to near the data's own entropy: an aspect of 6 and a word of 12, four
    times, in a response of at most so many tokens."""
    with open(f"{sft_run}/LATEST/config.json") as file:
        vocab_size = json.load(file)["vocab_size"]
    losses = losses_of(sft_run)
    assert losses[0] == pytest.approx(math.log(vocab_size), abs=0.3)
    trainer = make_trainer(f"model={sft_run}/LATEST", *QUICK)
    tokens = max(len(example.responses[0]) for example in trainer.train_examples)
    entropy = 4 * math.log(6 * 12) / tokens
    assert 0.9 * entropy < losses[-1] < 1.2 * entropy


def test_the_number_of_steps_and_the_last_batch(run):
    rows = [{"prompt": "p", "response": f"r {i}"} for i in range(10)]
    write_lines("r.jsonl", rows)
    for epochs, batch_size, examples in ((1, 4, [4, 8, 10]), (2, 4, [4, 8, 12, 16, 20]), (0.5, 4, [4, 5]),
                                         (1, 100, [10]), (0.3, 1, [1, 2, 3])):
        folder = run("data=r.jsonl", f"num_epochs={epochs}", f"batch_size={batch_size}",
                     f"exp_name=e{epochs}b{batch_size}")
        assert [line["examples"] for line in read_lines(f"{folder}/metrics.jsonl")] == examples


def test_evaluation_changes_nothing(run):
    settings = [*TINY_RUN, f"eval_data={FEW_ROWS}", "loss=dpo", "max_steps=4"]
    quiet = run(*settings, "eval_every=0", "run_dir=a")
    busy = run(*settings, "eval_every=1", "run_dir=b")
    assert losses_of(quiet) == losses_of(busy) and same_weights(quiet, busy)
    states = [read_state(f"{folder}/LATEST")["random"] for folder in (quiet, busy)]
    assert states[0] == states[1]
    assert len(read_lines("b/samples.jsonl")) == 10


@pytest.mark.parametrize("count, batch", [(7, 3), (1, 256), (5, 5)])
def test_every_held_out_example_counts_once(count, batch, exact_norms):
    trainer = make_trainer("loss=dpo", *QUICK, *EXACT, f"num_eval_examples={count}",
                           f"eval_batch_size={batch}", "lr=0.01")
    trainer.train_step()
    trainer.evaluate()
    line = read_lines("runs/dpo/metrics.jsonl")[-1]
    examples, objective = trainer.data.eval_examples, trainer.train_objective
    values = [trainer.compute_losses(collate([example], torch.float64), objective) for example in examples]
    assert [example.where for example in examples] == [f"few.jsonl line {i + 1}" for i in range(count)]
    assert line["loss"] == pytest.approx(sum(loss.item() for loss, _ in values) / count, rel=1e-9)
    for name in ("rewards/chosen", "rewards/accuracies", "logps/rejected"):
        assert line[name] == pytest.approx(sum(m[name].item() for _, m in values) / count, rel=1e-9)


def test_the_last_step_is_logged(run):
    folder = run(*TINY_RUN, "num_samples=0", "eval_every=0", "log_every=100", "lr_schedule=constant")
    assert [line["step"] for line in read_lines(f"{folder}/metrics.jsonl")] == [3]
    run("resume=true", f"run_dir={folder}", "max_steps=7", "log_every=2")
    assert [line["step"] for line in read_lines(f"{folder}/metrics.jsonl")] == [3, 4, 6, 7]


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
    trainer = make_trainer("loss=dpo", *QUICK, "batch_size=3")
    metrics = trainer.train_step()
    examples = [trainer.train_examples[i] for i in stream(400, 0, 3, seed=0, shuffle=True)]
    tokens = sum(len(e.prompt) + len(e.responses[0]) + len(e.responses[1]) for e in examples)
    trainer.log("train", metrics)
    assert metrics["tokens_per_second"] / metrics["examples_per_second"] == pytest.approx(tokens / 3)
    assert 0 < metrics["examples_per_second"] < 1e5


def test_sft_has_no_reference_metrics(run):
    lines = read_lines(run(*TINY_RUN) + "/metrics.jsonl")
    assert not {"samples/kl", "samples/optimal_reward", "samples/efficiency"} & set(lines[-1])
    assert "samples/reward" in lines[-1]


def test_a_reward_model_comes_near_the_best_possible_accuracy(rm_run):
    """Labels are drawn from sigmoid(r_w - r_l), so true rewards too are right only so often; ties: half."""
    rows = toy("test", True)
    gaps = [row["chosen_reward"] - row["rejected_reward"] for row in rows]
    ceiling = sum((gap > 0) + (gap == 0) / 2 for gap in gaps) / len(gaps)
    assert 0.7 < ceiling < 0.9
    last = read_lines(f"{rm_run}/metrics.jsonl")[-1]
    assert last["rewards/accuracies"] > ceiling - 0.03
    assert "samples/length" not in last and not os.path.exists(f"{rm_run}/samples.jsonl")


def test_mean_and_spread_of_rewards(exact_norms):
    trainer = make_trainer("loss=rm", *QUICK, *EXACT, "num_eval_examples=9", "max_tokens_per_microbatch=200")
    trainer.evaluate()
    line = read_lines("runs/rm/metrics.jsonl")[-1]
    scores = [response_scores(trainer.policy, collate([e])) for e in trainer.data.eval_examples]
    scores = torch.cat(scores).flatten()
    assert len(scores) == 18
    assert line["rewards/mean"] == pytest.approx(scores.mean().item(), rel=1e-9)
    assert line["rewards/std"] == pytest.approx(scores.std(correction=0).item(), rel=1e-9)
    assert "rewards/mean_square" not in line


# ---------------------------------------------------------------- self-play: a loop around the loop


def test_self_play_iterations(run, sft_run):
    """The opponent is the policy at each iteration's start; beta, lr and schedule are each iteration's."""
    folder = run(*TINY_RUN, *QUICK, *SPIN, f"model={sft_run}/LATEST", "spin.beta=[0.1,0.5]",
                 "spin.lr=[1e-3,2e-3]", "warmup_steps=1", "keep_checkpoints=1")
    lines = [line for line in read_lines(f"{folder}/metrics.jsonl") if line["split"] == "train"]
    assert [(line["step"], line["examples"], line["iteration"]) for line in lines] == [
        (1, 4, 0), (2, 8, 0), (3, 12, 1), (4, 16, 1)]
    assert [line["lr"] for line in lines] == [0.5e-3, 1e-3, 1e-3, 2e-3]
    assert [line["epoch"] for line in lines] == [4 / 40, 8 / 40] * 2
    for line in (lines[0], lines[2]):  # policy and opponent are the same
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6) and line["rewards/margins"] == 0
    assert lines[1]["rewards/margins"] != 0 and lines[3]["rewards/margins"] != 0
    assert sorted(name for name in os.listdir(folder) if "step" in name) == ["step-000002", "step-000004"]
    evals = [line for line in read_lines(f"{folder}/metrics.jsonl") if line["split"] == "eval"]
    assert [line["step"] for line in evals] == [0, 2, 4]
    assert "samples/kl" not in evals[0] and "rewards/chosen" not in evals[0]
    plain = run(*TINY_RUN, *QUICK, "loss=sft", "max_steps=0", f"model={sft_run}/LATEST")
    assert evals[0]["loss"] == pytest.approx(read_lines(f"{plain}/metrics.jsonl")[0]["loss"], rel=ROUNDING)


def test_what_self_play_logs(sft_run):
    """The data's responses have 21 tokens, so of answers of at most 21 some have come to their end."""
    trainer = make_trainer(*SPIN, *QUICK, f"model={sft_run}/LATEST", "spin.max_tokens=21", "batch_size=32",
                           "num_epochs=1")
    trainer.next_iteration()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()[:32]
    drawn = [trainer.train_examples[i].responses[1].tolist() for i in order]
    metrics = trainer.train_step()
    assert metrics["generated/length"] == pytest.approx(sum(map(len, drawn)) / 32)
    finished = sum(ids[-1] == trainer.data.end_ids[0] for ids in drawn) / 32
    assert 0 < finished < 1 and metrics["generated/finished"] == pytest.approx(finished)
    assert "rewards/chosen" in metrics


@pytest.mark.parametrize("reset", [False, True])
def test_the_optimizer_across_iterations(reset, sft_run):
    trainer = make_trainer(*SPIN, *QUICK, f"model={sft_run}/LATEST", f"spin.reset_optimizer={reset}".lower())
    trainer.next_iteration()
    trainer.train_step()
    assert trainer.next_global_batch is not None
    trainer.next_iteration()
    assert trainer.next_global_batch is None  # the one made ahead is of other pairs
    assert len(trainer.optimizer.state) == (0 if reset else len(list(trainer.policy.parameters())))
    weights = list(trainer.policy.parameters())
    before = weights[1].clone()
    trainer.train_step()
    assert not torch.equal(weights[1], before)


def test_max_steps_bounds_all_iterations(run):
    folder = run(*TINY_RUN, *SPIN, *QUICK, "max_steps=3", "eval_every=0", "lr_schedule=constant")
    assert [line["step"] for line in read_lines(f"{folder}/metrics.jsonl")] == [1, 2, 3]
    run("resume=true", f"run_dir={folder}", "max_steps=99")
    assert [(line["step"], line["iteration"]) for line in read_lines(f"{folder}/metrics.jsonl")][2:] == [
        (3, 1), (4, 1)]


def test_nothing_left_to_learn(run, capsys, monkeypatch):
    """Where every answer is the data's there are no pairs: iterations pass without a step."""
    monkeypatch.setattr(Sampler, "batches", lambda self, *_, **__: iter(
        [(range(40), [example.responses[0].tolist() for example in self.data.train_examples])]))
    folder = run(*TINY_RUN, *QUICK, *SPIN, "eval_every=0")
    assert capsys.readouterr().out.count("0 examples, 40 prompts gave none") == 2
    assert latest(folder) == 0


def test_the_steps_of_iterations_to_come():
    """100 of 400 rows in fours are 25 steps an iteration; mixed, all after the first have twice the rows."""
    for mixed, steps in (("false", 75), ("true", 125)):
        trainer = make_trainer("loss=spin", *QUICK, "num_epochs=0.25", "spin.iterations=3", "max_steps=null",
                               f"spin.mix_previous={mixed}")
        assert trainer.num_steps == steps
        trainer.max_steps = 60
        assert trainer.num_steps == 60
