"""A loss gets what its row asks for, of any cut of the step; rows that cannot work are refused."""

import dataclasses
import inspect
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (FEW_ROWS, TEMPORARY, TINY_RUN, last_gradient, losses_of, make_trainer, numbers,
                      obvious_logp, read_lines, same_weights, tiny_of, write_lines)
from fork_rows import lerp, normalised_loss
from on_ranks import on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import losses
from engine import InputError
from engine.batches import CACHED, Example, Layout, collate
from engine.objectives import WEIGHT, call_loss, can_cache, check_table, read_values
from engine.toy import toy
from losses import Objective, dpo_loss, own_answer_as_rejected, rm_loss, rpo_loss, sft_loss

QUICK = [f"eval_data={FEW_ROWS}", "num_samples=0"]
EXACT = ["dtype=float64", "compute_dtype=float64"]
KEYS = {"dpo.beta": 0.1, "dpo.label_smoothing": 0.0, "dpo.average_logps": False, "dpo.sft_weight": 0.0}
TEN = write_lines(os.path.join(TEMPORARY.name, "ten.jsonl"), toy("train", True)[:10])
LISTS = write_lines(os.path.join(TEMPORARY.name, "lists.jsonl"), [
    {"prompt": row["prompt"],
     "responses": [row["chosen"], row["rejected"], " Good.", " The plot."][:3 + i % 2]}
    for i, row in enumerate(toy("train", True)[:12])])


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """Llama's norms compute in float32 whatever the dtype; here in float64."""
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture
def dpo_is(monkeypatch):
    """dpo_is(loss, ...) puts another row in dpo's place: pairs with a reference, unless it says otherwise."""
    def put(loss, **fields):
        fields = {"needs_pairs": not fields.get("needs_lists"), "needs_reference": True} | fields
        monkeypatch.setitem(losses.OBJECTIVES, "dpo", Objective(loss, **fields))
    return put


def stirred(trainer, seed=1):
    """The trainer, its policy moved away from its reference."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainer.policy.parameters():
            p += 0.05 * torch.randn(p.shape, generator=random, dtype=p.dtype)
    return trainer


def log_ratios(trainer, examples):
    """log pi - log ref of every response, (B, K), by plain forwards."""
    return torch.stack([torch.stack([obvious_logp(trainer.policy, x, ids)
                                     - obvious_logp(trainer.reference, x, ids).detach()
                                     for ids in x.responses]) for x in examples])


# ---------------------------------------------------------------- what is read at each token


def taking(positional, keywords=()):
    """A function with parameters of these names."""
    def loss(*arguments, **settings):
        raise AssertionError("it is only asked for its parameters")
    kinds = [*((name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in positional),
             *((name, inspect.Parameter.KEYWORD_ONLY) for name in keywords)]
    loss.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name, kind in kinds])
    return loss


def entropy(policy_logits, targets):
    logps = policy_logits.log_softmax(-1)
    return {"entropy": -(logps.exp() * logps).sum(-1), "id": targets.to(logps.dtype)}


def kl_and_best(policy_logits, reference_logits, targets):
    policy, reference = policy_logits.log_softmax(-1), reference_logits.log_softmax(-1)
    return {"kl": (policy.exp() * (policy - reference)).sum(-1), "best": policy.max(-1).values}


def plain_tokens(policy, reference, prompt, response):
    """{name: numbers of every token of a response}, by full logits and loops over tokens."""
    ids = torch.tensor([[*prompt, *response]])
    p, q = (model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1) for model in (policy, reference))
    numbers = {name: [] for name in ("policy", "reference", "entropy", "id", "kl", "best")}
    for at, token in enumerate(response, len(prompt)):
        a, b = p[at - 1], q[at - 1]
        numbers["policy"].append(a[token].item())
        numbers["reference"].append(b[token].item())
        numbers["entropy"].append(-sum(math.exp(x) * x for x in a.tolist()))
        numbers["id"].append(float(token))
        numbers["kl"].append(sum(math.exp(x) * (x - y) for x, y in zip(a.tolist(), b.tolist())))
        numbers["best"].append(max(a.tolist()))
    return numbers


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("by_token", [False, True], ids=["summed", "by_token"])
@pytest.mark.parametrize("function", [None, entropy, kl_and_best])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_read_of_tokens_is_what_full_logits_say(count, function, by_token, shared):
    """Weights 0, 0.5 and 2: sums are weighted; by token those of weight 0 are left out."""
    policy, reference = tiny_of("llama").double(), tiny_of("llama", initializer_range=0.2).double()
    rng, names = np.random.default_rng(count), {None: [], entropy: ["entropy", "id"],
                                                kl_and_best: ["kl", "best"]}[function]
    examples = []
    for prompt, *lengths in ((7, 6, 4, 5), (5, 3, 5, 2), (2, 1, 2, 3)):
        weights = [rng.choice([0, 0.5, 1, 2], n).astype(np.float32) for n in lengths[:count]]
        for own in weights:
            own[-1] = own[-1] or 2
        examples.append(Example("x", rng.integers(3, 60, prompt), tuple(
            rng.integers(3, 60, n) for n in lengths[:count]), {}, tuple(weights) if prompt != 5 else None))
    prefixes = ["chosen_", "rejected_"][:count] if count < 3 else [""]
    own = [*names, "mask"] if by_token else names
    positional = [f"{who}_{x}logps" for who in ("policy", "reference") for x in prefixes]
    objective = Objective(taking(positional, [x + name for x in prefixes for name in own]), count == 2, True,
                          needs_lists=count == 3, token_values=function, by_token=by_token)
    read = read_values(objective, policy, reference, collate(examples, torch.float64, Layout(shared)))
    assert read.keys() == inspect.signature(objective.loss).parameters.keys()

    with torch.no_grad():
        plain = [[plain_tokens(policy, reference, x.prompt, ids) | {"mask": x.weights(k).tolist()}
                  for k, ids in enumerate(x.responses)] for x in examples]
    width = max(np.count_nonzero(x.weights(k)) for x in examples for k in range(count))

    def expected(name, numbers):
        if not by_token:
            return sum(w * value for w, value in zip(numbers["mask"], numbers[name]))
        kept = [value for w, value in zip(numbers["mask"], numbers[name]) if w]
        return kept + [0.0] * (width - len(kept))
    for who, name in [*zip(positional, ["policy"] * len(prefixes) + ["reference"] * len(prefixes)),
                      *((x + name, name) for x in prefixes for name in own)]:
        k = int("rejected" in who)
        values = [[expected(name, numbers) for numbers in row] if count == 3 else expected(name, row[k])
                  for row in plain]
        assert torch.allclose(read[who].double(), torch.tensor(values, dtype=torch.float64), atol=1e-9), who
    assert read[positional[0]].requires_grad and not read[positional[-1]].requires_grad or function


# ---------------------------------------------------------------- a loss of the whole batch


WHOLE = ["loss=dpo", *QUICK, *EXACT, "dpo.beta=2", "max_grad_norm=null", "lr=0", "num_eval_examples=9"]


def normalised_by_token(chosen, rejected, reference_chosen, reference_rejected, *, chosen_mask,
                        rejected_mask, beta, label_smoothing=0.0, sft_weight=0.0, average_logps=False):
    chosen, reference_chosen = ((x * chosen_mask).sum(-1) for x in (chosen, reference_chosen))
    rejected, reference_rejected = ((x * rejected_mask).sum(-1) for x in (rejected, reference_rejected))
    return normalised_loss(chosen, rejected, reference_chosen, reference_rejected, beta=beta)


@pytest.mark.parametrize("twice", [False, True, "by_token"])
@pytest.mark.parametrize("settings", [["max_tokens_per_microbatch=90"], ["gradient_accumulation_steps=3"]])
def test_a_step_of_a_whole_batch_in_parts_is_plain_autograd(settings, twice, dpo_is):
    by_token = twice == "by_token"
    dpo_is(normalised_by_token if by_token else normalised_loss, whole_batch=True, by_token=by_token)
    trainer = stirred(make_trainer(*WHOLE, *settings, "batch_size=8"))
    rows = trainer.data.train_examples[:8]
    if by_token:  # of many lengths, so that parts are padded to several widths
        rows = [x.with_responses(x.responses[0][:9 + i], x.responses[1][i:]) for i, x in enumerate(rows)]
    trainer.train_examples = [*rows[:6], rows[2], rows[2]] if twice is True else rows
    assert len(trainer.make_global_batch(0)[1]) >= 3
    ratios = log_ratios(trainer, trainer.train_examples)
    margins = ratios[:, 0] - ratios[:, 1]
    loss = -F.logsigmoid(2 * margins / margins.std()).sum() / 8
    parameters = list(trainer.policy.parameters())
    expected = torch.autograd.grad(loss, parameters)
    metrics = trainer.train_step()
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-9)
    for p, gradient in zip(parameters, expected, strict=True):
        assert (last_gradient(p) - gradient).abs().max() < 1e-9
    assert max(x.abs().max() for x in expected) > 1e-3
    margins = margins.tolist()
    assert metrics["margin"] == pytest.approx(sum(margins) / 8, abs=1e-9)
    high = [x for x in margins if x > 0]
    assert metrics["high"] == pytest.approx(sum(high) / len(high), abs=1e-9) and 0 < len(high) < 8
    assert metrics["none"] is None


def test_evaluation_of_a_whole_batch_in_parts_is_one_call(dpo_is):
    dpo_is(normalised_loss, whole_batch=True)
    lines = []
    for settings in (["max_tokens_per_microbatch=90", "eval_batch_size=4"], ["eval_batch_size=100"]):
        trainer = stirred(make_trainer(*WHOLE, *settings, f"run_dir={len(lines)}"))
        trainer.evaluate()
        lines += read_lines(f"{len(lines)}/metrics.jsonl")
    with torch.no_grad():
        ratios = log_ratios(trainer, trainer.data.eval_examples)
    margins = ratios[:, 0] - ratios[:, 1]
    loss = -F.logsigmoid(2 * margins / margins.std()).mean().item()
    assert len(margins) == 9
    for line in lines:
        assert line["loss"] == pytest.approx(loss, abs=1e-9)
        assert line["high"] == pytest.approx(margins[margins > 0].mean().item(), abs=1e-9)
        assert line["margin"] == pytest.approx(margins.mean().item(), abs=1e-9) and line["none"] is None


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_the_whole_batch_on_two_ranks(sft_run):
    settings = ["loss=dpo", *TINY_RUN, *QUICK, *EXACT, f"data={TEN}", f"model={sft_run}/LATEST",
                "reference=tiny", f"tokenizer={sft_run}/LATEST", "batch_size=5", "eval_every=3", "lr=1e-3",
                "max_tokens_per_microbatch=150", "num_epochs=9"]
    for ranks in (1, 2):
        on_ranks(ranks, *settings, f"run_dir=ranks{ranks}", trouble="row normalised")
    for line, other in zip(numbers("ranks1"), numbers("ranks2"), strict=True):
        assert line.pop("none") is other.pop("none") is None and "high" in line
        assert line == pytest.approx(other, rel=1e-6)


def weighing(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             *, chosen_reward, rejected_reward, beta, reward_scale, divergence, sft_weight,
             chosen_length, rejected_length, default_rewards=None, average_logps=False):
    """RPO, and the mean reward of those above 0; a mean over none; the mean over all."""
    losses, _ = rpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                         reference_rejected_logps, chosen_reward=chosen_reward,
                         rejected_reward=rejected_reward, beta=beta)
    return losses, {"good": (chosen_reward, (chosen_reward > 0).to(chosen_reward.dtype)),
                    "rewards/accuracies": (chosen_reward, 0 * chosen_reward), "rejected": rejected_reward}


@pytest.mark.parametrize("whole_batch", [False, True])
def test_a_metric_is_averaged_over_its_own_weights(whole_batch, run, monkeypatch):
    """In steps and evaluations of several parts; where there are none it is null, and the run goes on."""
    monkeypatch.setitem(losses.OBJECTIVES, "rpo", dataclasses.replace(
        losses.OBJECTIVES["rpo"], loss=weighing, whole_batch=whole_batch))
    rows = toy("train", True)[:10]
    folder = run("loss=rpo", *TINY_RUN, *QUICK, f"data={TEN}", f"eval_data={TEN}", "num_eval_examples=10",
                 "batch_size=5", "shuffle=false", "max_steps=2", "gradient_accumulation_steps=2",
                 "eval_every=2", "eval_batch_size=3")
    lines = read_lines(f"{folder}/metrics.jsonl")
    for line, of in zip(lines, (rows, rows[:5], rows[5:], rows), strict=True):
        good = [row["chosen_reward"] for row in of if row["chosen_reward"] > 0]
        assert line["good"] == pytest.approx(sum(good) / len(good)) and len(good) < len(of)
        assert line["rejected"] == pytest.approx(sum(row["rejected_reward"] for row in of) / len(of))
        assert line["rewards/accuracies"] is None and math.isfinite(line["loss"])


def test_a_run_goes_on_with_a_metric_that_has_no_weight(dpo_is, run):
    def loss(policy_chosen_logps, *, sft_weight=0.0, beta, label_smoothing=0.0, average_logps=False):
        own = policy_chosen_logps.detach()
        return -policy_chosen_logps, {"none": (own, 0 * own), "short": (own, (own > -1e3).to(own.dtype))}
    dpo_is(loss, needs_pairs=False, needs_reference=False)
    folder = run("loss=dpo", *TINY_RUN, *QUICK)
    lines = read_lines(f"{folder}/metrics.jsonl")
    assert [line["split"] for line in lines] == ["eval", "train", "train", "train", "eval"]
    assert all(line["none"] is None and math.isfinite(line["short"]) for line in lines)


# ---------------------------------------------------------------- what a loss may give


def test_what_a_loss_gives_is_one_number_of_each_example():
    values = {"policy_chosen_logps": torch.arange(3.0)}

    def says(make):
        def odd_loss(policy_chosen_logps):
            return make(policy_chosen_logps)
        with pytest.raises(InputError) as caught:
            call_loss(Objective(odd_loss, False, False), values)
        assert "\n" not in str(caught.value)
        return str(caught.value)
    assert says(lambda x: (x.mean(), {})) == (
        "odd_loss gives losses of shape (); of each of a batch's 3 examples it must give one number, (3,), "
        "not averaged")
    assert "losses of shape (3, 1)" in says(lambda x: (x[:, None], {}))
    assert "odd_loss gives a metric `loss`, which the loss itself is" in says(lambda x: (x, {"loss": 2 * x}))
    assert "losses of shape float" in says(lambda x: (1.0, {}))
    assert "gives r of shape ()" in says(lambda x: (x, {"r": x.mean()}))
    assert "gives r of shape float" in says(lambda x: (x, {"r": 1.0}))
    assert "gives ('r', 'weight') of shape (2,)" in says(lambda x: (x, {"r": (x, x[:2])}))
    assert "gives r of shape ()" in says(lambda x: (x, {"r": (x.mean(), x)}))  # would be broadcast
    _, metrics = call_loss(Objective(lambda policy_chosen_logps: (policy_chosen_logps, {
        "r": (policy_chosen_logps, policy_chosen_logps / 2)}), False, False), values)
    assert metrics["r"].tolist() == [0, 0.5, 2] and metrics["r", WEIGHT].tolist() == [0, 0.5, 1]


# ---------------------------------------------------------------- rows of the table that cannot work


def with_kl(policy_logits, targets):
    return {"kl": targets * 1.0}


def with_scalar(policy_logits, targets):
    return {"kl": targets.sum()}


def centred(policy_logits, targets):
    values = policy_logits.amax(-1)
    return {"kl": values - values.mean()}


def centred_losses(policy_logits, targets):
    return centred(policy_logits, targets)["kl"], {}


def averaged_tokens(policy_chosen_logps, *, chosen_mask):
    return -policy_chosen_logps.mean(-1), {}


def weighted_tokens(policy_chosen_logps, *, chosen_mask):
    return -(policy_chosen_logps * chosen_mask).sum(-1) / chosen_mask.sum(-1), {}


def with_error(policy_logits, targets):
    raise RuntimeError("no such index")


def moves(step, metrics, policy, reference, state):
    return state


def one(policy_chosen_logps):
    return -policy_chosen_logps, {}


def asking(policy_chosen_logps, *, chosen_kl, margin):
    return -policy_chosen_logps * chosen_kl * margin, {}


def averaged(policy_chosen_logps):
    return -policy_chosen_logps.mean(), {}


def compared(policy_chosen_logps):
    return -(policy_chosen_logps - policy_chosen_logps.mean()).square(), {}


def clamped(policy_chosen_logps, reference_chosen_logps):
    """As KTO: of half of all batches the mean is below 0, and cut off."""
    ratios = policy_chosen_logps - reference_chosen_logps
    return -(ratios - ratios.mean().clamp(min=0).detach()).sigmoid(), {}


def measured(policy_chosen_logps):
    logps = policy_chosen_logps.detach()
    return -policy_chosen_logps, {"mean": logps.mean().expand(len(logps))}


def sorted_one(policy_chosen_logps):
    return -policy_chosen_logps.sort().values, {}


def bare(policy_chosen_logps):
    return -policy_chosen_logps


def detached(policy_chosen_logps):
    return -policy_chosen_logps.detach(), {}


ONE, PAIR = {"needs_pairs": False, "needs_reference": False}, {"needs_pairs": True, "needs_reference": True}


@pytest.mark.parametrize("loss, fields, said", [
    (one, ONE | {"inputs": "words"}, "inputs='words' is not logps, scores or logits"),
    (one, ONE | {"average": "rows"}, "average='rows' is not examples or tokens"),
    (dpo_loss, PAIR | {"needs_lists": True}, "needs_pairs and needs_lists exclude each other"),
    (dpo_loss, PAIR | {"inputs": "logits"}, "reads one response of each example"),
    (one, ONE | {"inputs": "logits", "whole_batch": True}, "inputs='logits' reads one response"),
    (one, ONE | {"inputs": "scores", "token_values": with_kl}, "go with inputs='logps', not 'scores'"),
    (one, ONE | {"inputs": "scores", "by_token": True}, "go with inputs='logps', not 'scores'"),
    (rm_loss, PAIR | {"inputs": "scores"}, "no reference gives scores"),
    (one, ONE | {"needs_teacher": True}, "needs_teacher goes with needs_reference"),
    (one, ONE | {"moves_reference": True, "after_step": moves}, "moves_reference needs a reference"),
    (dpo_loss, PAIR | {"moves_reference": True}, "and after_step or self_play to move it"),
    (one, ONE | {"add_responses": lambda examples: examples}, "add_responses adds to one response"),
    (dpo_loss, PAIR | {"add_responses": lambda examples: examples, "self_play": own_answer_as_rejected,
                       "evaluated_as": "dpo"}, "add_responses and self_play exclude each other"),
    (one, ONE | {"evaluated_as": "nothing"}, "evaluated_as='nothing' is no row of the table"),
    (dpo_loss, PAIR | {"self_play": own_answer_as_rejected}, "held-out rows bring one response"),
    (sft_loss, PAIR, "sft_loss takes by position policy_chosen_logps: 1, where this row brings 4"),
    (dpo_loss, PAIR | {"needs_reference": False}, ": 4, where this row brings 2; columns and settings come"),
    (asking, ONE, "asking asks for chosen_kl, margin: not in columns, no key of its block"),
    (asking, ONE | {"token_values": with_kl}, "asks for margin: not in columns"),
    (one, ONE | {"token_values": with_scalar}, "with_scalar does not make {name: (n,)} of logits"),
    (one, ONE | {"token_values": with_error}, "targets (n,): no such index"),
    (one, ONE | {"token_values": centred}, "centred compares tokens, of which it gets only some at a time"),
    (centred_losses, ONE | {"inputs": "logits"}, "centred_losses compares tokens, of which it gets"),
    (averaged_tokens, ONE | {"by_token": True}, "averaged_tokens reads what is padded: multiply by the mask"),
    (averaged, ONE, "averaged gives losses of shape ()"),
    (compared, ONE, "compared compares the examples of a batch, by losses"),
    (clamped, ONE | {"needs_reference": True}, "clamped compares the examples of a batch, by losses"),
    (measured, ONE, "measured compares the examples of a batch, by mean"),
    (one, ONE | {"token_values": kl_and_best}, "reads reference_logits, so needs_reference must be said"),
    (sorted_one, ONE, "sorted_one compares the examples of a batch"),
    (bare, ONE, "bare gives Tensor; it must give losses and a dict of metrics, which may be {}"),
    (detached, ONE, "detached gives losses without a gradient: is something detached?"),
])
def test_a_row_that_cannot_work_is_refused(loss, fields, said):
    with pytest.raises(InputError) as caught:
        check_table({"row": Objective(loss, **fields)}, {})
    assert said in str(caught.value) and str(caught.value).startswith("losses.py, OBJECTIVES['row']: ")
    assert "\n" not in str(caught.value)


def test_by_token_with_the_mask_is_no_reading_of_padding():
    check_table({"row": Objective(weighted_tokens, **ONE, by_token=True)}, {})


def test_a_key_of_a_block_that_nothing_reads_is_refused(dpo_is, refused):
    check_table({"dpo": Objective(dpo_loss, **PAIR)}, KEYS)
    with pytest.raises(InputError, match=r"\['dpo'\]: nothing reads gamma, tau of its block in config.yaml"):
        check_table({"dpo": Objective(dpo_loss, **PAIR)}, KEYS | {"dpo.gamma": 1.0, "dpo.tau": 1.0})
    check_table({"dpo": Objective(one, **ONE)}, {"dpo.average": "tokens", "dpo.train_on": "answers"})
    with pytest.raises(InputError, match="nothing reads answers, iterations of"):  # those of self-play alone
        check_table({"dpo": Objective(one, **ONE)}, {"dpo.iterations": 2, "dpo.answers": "wait"})
    dpo_is(one, **ONE)
    assert refused("loss=sft") == ("losses.py, OBJECTIVES['dpo']: nothing reads average_logps, beta, "
                                   "label_smoothing, sft_weight of its block in config.yaml")


def test_a_whole_batch_may_be_compared():
    for loss in (compared, sorted_one):
        check_table({"row": Objective(loss, **ONE, whole_batch=True)}, {})


# ---------------------------------------------------------------- what moves


def halved(step, metrics, policy, reference, state, *, beta):
    assert math.isfinite(metrics["loss"]) and not torch.is_grad_enabled()
    return {"beta": beta / 2}


def test_a_schedule_of_beta_is_in_the_next_steps_loss(dpo_is):
    dpo_is(dpo_loss, after_step=halved)
    trainer = stirred(make_trainer("loss=dpo", *QUICK, *EXACT, "lr=0", "dpo.beta=0.8"))
    for step in range(3):
        examples = trainer.make_global_batch(trainer.num_used)[0]
        with torch.no_grad():
            ratios = log_ratios(trainer, examples)
        beta = 0.8 / 2**step
        expected = -F.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])).mean().item()
        assert trainer.train_step()["loss"] == pytest.approx(expected, abs=1e-9)
    assert trainer.state == {"beta": 0.1}


def test_a_schedule_goes_on_in_a_resumed_run(dpo_is, run):
    dpo_is(dpo_loss, after_step=halved)
    shared = ["loss=dpo", *TINY_RUN, *QUICK, "lr_schedule=constant", "dpo.beta=0.8"]
    whole = run(*shared, "max_steps=4", "run_dir=whole")
    run(*shared, "max_steps=2", "run_dir=part")
    part = run("resume=true", "run_dir=part", "max_steps=4")
    assert losses_of(whole) == losses_of(part) and same_weights(whole, part)


@pytest.mark.parametrize("state, said", [
    ({"beta": math.nan}, "gives beta as nan"), ({"beta": math.inf}, "gives beta as inf"),
    ({"beta": "0.1"}, "gives beta as '0.1'"), ({"beta": None}, "gives beta as None"),
    (0.1, "gives its state as 0.1"), (None, "gives its state as None"),
    ({"beta": torch.tensor(0.1)}, r"gives beta as tensor\(0.1"), ({"beta": [0.1]}, "gives beta as ")])
def test_a_state_that_is_no_finite_numbers_is_refused(state, said, dpo_is):
    dpo_is(dpo_loss, after_step=lambda *arguments: state)
    trainer = make_trainer("loss=dpo", *QUICK)
    with pytest.raises(InputError, match=said + ".*it must give a dict of finite numbers by name"):
        trainer.train_step()


def test_a_state_of_numpys_numbers_is_saved(dpo_is, run):
    dpo_is(dpo_loss, after_step=lambda *arguments: {"beta": np.float32(0.5), "count": np.int64(3)})
    folder = run("loss=dpo", *TINY_RUN, *QUICK)
    assert len(losses_of(folder)) == 3 and os.path.lexists(f"{folder}/LATEST")


def test_a_moved_reference_is_kept_and_the_samples_kl_is_from_the_first(dpo_is, run):
    dpo_is(dpo_loss, after_step=lerp, moves_reference=True)
    shared = ["loss=dpo", *TINY_RUN, f"eval_data={FEW_ROWS}", "num_samples=5", "lr_schedule=constant", *EXACT,
              "warmup_steps=0", "num_eval_examples=5"]
    whole = run(*shared, "max_steps=6", "run_dir=whole")
    run(*shared, "max_steps=3", "run_dir=part")
    part = run("resume=true", "run_dir=part", "max_steps=6")
    assert same_weights(whole, part) and losses_of(whole) == losses_of(part)
    moved = [load_file(f"{folder}/LATEST/trainer_state/reference.safetensors") for folder in (whole, part)]
    assert moved[0].keys() == moved[1].keys()
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in moved[0])
    assert not os.path.exists("runs/reference_cache")

    policy, first = (AutoModelForCausalLM.from_pretrained(f"whole/{name}", dtype=torch.float64)
                     for name in ("LATEST", "reference"))
    assert not torch.equal(moved[0]["lm_head.weight"], first.lm_head.weight)
    trainer = make_trainer(*shared, f"model={whole}/LATEST", "exp_name=again")
    total = 0.0
    for example, ids in zip(trainer.sampler.examples, trainer.sampler.answers(trainer.policy), strict=True):
        row = torch.tensor([[*example.prompt, *ids]])
        with torch.no_grad():
            p, q = (model(input_ids=row).logits[0].double().softmax(-1) for model in (policy, first))
        before = slice(len(example.prompt) - 1, row.shape[1] - 1)
        total += (p[before] * (p[before] / q[before]).log()).sum().item()
    for folder in (whole, part):
        line = read_lines(f"{folder}/metrics.jsonl")[-1]
        assert line["step"] == 6 and line["samples/kl"] == pytest.approx(total / 5, rel=1e-6) and total > 1e-2


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_reference_that_moves_on_two_ranks(sft_run):
    """Also where the reference's layers would stay gathered, and in a run that is taken up on two."""
    settings = ["loss=dpo", *TINY_RUN, *EXACT, f"data={TEN}", f"eval_data={FEW_ROWS}", "max_steps=4",
                f"model={sft_run}/LATEST", "num_epochs=9", "lr_schedule=constant", "lr=1e-3",
                "warmup_steps=0", "save_every=2", "sample_max_tokens=4"]
    on_ranks(1, *settings, "run_dir=ranks1", trouble="row following")
    on_ranks(2, *settings, "run_dir=ranks2", "max_steps=2", trouble="row following")
    on_ranks(2, "resume=true", "run_dir=ranks2", "max_steps=4", "fsdp.reshard_after_forward=false",
             trouble="row following")
    one, two = ([line for line in numbers(f"ranks{ranks}") if line["step"] != 2 or "lr" in line]
                for ranks in (1, 2))
    for line, other in zip(one, two, strict=True):
        assert line == pytest.approx(other, rel=1e-6, abs=1e-9)


# ---------------------------------------------------------------- the reference of lists, kept


def lists_loss(policy_logps, reference_logps, *, beta, label_smoothing=0.0, sft_weight=0.0,
               average_logps=False):
    """The first response against all."""
    return -(beta * (policy_logps - reference_logps)).log_softmax(-1)[:, 0], {}


def test_the_reference_of_lists_of_three_and_four_is_computed_once(dpo_is, capsys):
    dpo_is(lists_loss, needs_lists=True)
    settings = ["loss=dpo", f"data={LISTS}", f"eval_data={LISTS}", "num_eval_examples=5", "num_samples=0",
                *EXACT, "max_steps=9", "lr=0", "batch_size=12"]
    trainer = make_trainer(*settings)
    examples = trainer.data.train_examples
    assert [len(x.responses) for x in examples] == [3, 4] * 6
    with torch.no_grad():
        expected = [[obvious_logp(trainer.reference, x, ids).item() for ids in x.responses] for x in examples]
    for told in ("of 0 rows read from runs/reference_cache, of 17 computed",
                 "of 17 rows read from runs/reference_cache, of 0 computed"):
        trainer = make_trainer(*settings)
        trainer.fill_in_reference()
        assert told in capsys.readouterr().out
        for example, values in zip(trainer.data.train_examples, expected, strict=True):
            assert example.columns[CACHED] == pytest.approx(values, abs=1e-9)
    stirred(trainer)
    total = 0.0
    for example, known in zip(trainer.data.train_examples, expected):
        with torch.no_grad():
            ratios = [obvious_logp(trainer.policy, example, ids).item() - x
                      for ids, x in zip(example.responses, known)]
        total += math.log(sum(math.exp(0.1 * (x - ratios[0])) for x in ratios))
    assert trainer.train_step()["loss"] == pytest.approx(total / 12, abs=1e-9)


def masked_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
                *, chosen_mask, rejected_mask, beta, label_smoothing=0.0, sft_weight=0.0,
                average_logps=False):
    chosen = ((policy_chosen_logps - reference_chosen_logps) * chosen_mask).sum(-1)
    rejected = ((policy_rejected_logps - reference_rejected_logps) * rejected_mask).sum(-1)
    return -F.logsigmoid(beta * (chosen - rejected)), {}


@pytest.mark.parametrize("loss, fields", [
    (masked_loss, {"by_token": True}), (dpo_loss, {"after_step": lerp, "moves_reference": True}),
    (dpo_loss, {"token_values": kl_and_best})])
def test_what_is_not_the_same_in_every_step_is_not_kept(loss, fields, dpo_is):
    dpo_is(loss, **fields)
    trainer = stirred(make_trainer("loss=dpo", *QUICK, *EXACT, "lr=0"))
    trainer.fill_in_reference()
    examples = trainer.make_global_batch(0)[0]
    assert not can_cache(trainer.objective) and not os.path.exists("runs/reference_cache")
    assert not any(CACHED in x.columns for x in examples)
    with torch.no_grad():
        ratios = log_ratios(trainer, examples)
    expected = -F.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean().item()
    assert trainer.train_step()["loss"] == pytest.approx(expected, abs=1e-9)
