"""A run that begins wrong does not begin: faults are planted in the engine, and each is named."""

import dataclasses
import glob
import os
import types
import warnings

import pytest
import torch
from conftest import FAMILIES, FORTY, OWN, make_trainer, needed, write_lines
from on_ranks import answers, begin
from safetensors import safe_open
from test_layouts import BOTH_SIDES, MORE, PAIRS, SHARE_NOT, family, longrope, pairs_of

import engine.batches
import engine.first_batch
import trainers
from engine import InputError
from engine.batches import SEPARATE, SHARED, Batcher
from engine.cache import write_checked
from engine.distributed import StopRequest
from engine.first_batch import NOISE, check_reading, check_reference, spread

ROWS = [f"data={FORTY}", f"eval_data={FORTY}", "num_eval_examples=12", "num_samples=0", "batch_size=20"]


# ---------------------------------------------------------------- what is planted in a batch


def shifted_position(batch):
    """The second response stands one further from its prompt."""
    return {"positions": batch.positions + (batch.segments % 3 == 2)}


def dropped_mask(batch):
    """Of a shared row each token sees all before it: other responses, and other examples."""
    return {"segments": batch.segments.clamp(max=0), "prompts": batch.prompts.clamp(max=0)}


def lost_end(batch):
    """Of each response the last token does not count."""
    ends = batch.lengths.cumsum(0) - 1
    stay = torch.ones(len(batch.targets), dtype=torch.bool).index_fill_(0, ends, False)
    lengths = {"lengths": batch.lengths - 1}
    return lengths | {name: getattr(batch, name)[stay] for name in ("states", "targets", "token_weights")}


def shifted_targets(batch):
    """Each token is predicted where the next one is."""
    return {"targets": batch.targets.roll(1)}


def shifted_states(batch):
    return {"states": batch.states - 1}


def other_weight(batch):
    return {"token_weights": batch.token_weights.index_fill(0, torch.tensor([7]), 0.5)}


def swapped_responses(batch):
    """Chosen and rejected, where the sums are made."""
    return {"lengths": batch.lengths.roll(1)}


def shifted_ends(batch):
    return {"ends": batch.ends - 1}


def plant(monkeypatch, fault):
    """Every batch that a Batcher makes from here on has it."""
    collate = engine.batches.collate

    def spoilt(*arguments):
        batch = collate(*arguments)
        return dataclasses.replace(batch, **fault(batch))
    monkeypatch.setattr(engine.batches, "collate", spoilt)


def refusal(trainer):
    """The sentence with which a run does not begin."""
    with pytest.raises(InputError, match="^this run would begin wrong: ") as caught:
        trainer.train()
    assert trainer.step == 0 and not trainer.folder.lines("metrics.jsonl") and "\n" not in str(caught.value)
    return str(caught.value)


FAULTS = {
    "positions": (shifted_position, ["layout=shared"]), "mask": (dropped_mask, ["layout=shared"]),
    "targets": (shifted_targets, []), "states": (shifted_states, ["layout=separate"]),
    "weights": (other_weight, []), "of sft": (shifted_states, ["loss=sft"]),
    "of a long row": (shifted_targets, ["layout=separate", "max_tokens_per_microbatch=100"]),
    "in bfloat16": (shifted_states, ["compute_dtype=bfloat16"]),
    "mask in bfloat16": (dropped_mask, ["layout=shared", "dtype=bfloat16", "compute_dtype=bfloat16"]),
    "packed": (shifted_position, ["attention=varlen"]), "in float64": (dropped_mask, [
        "layout=shared", "dtype=float64", "compute_dtype=float64"])}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_batch_is_found(name, sft_run, monkeypatch):
    fault, settings = FAULTS[name]
    trainer = make_trainer(*ROWS, "loss=dpo", f"model={sft_run}/LATEST", *settings)
    plant(monkeypatch, fault)
    said = refusal(trainer)
    assert "forty.jsonl" in said and "token " in said and " of response " in said
    assert " as the run reads it and -" in said and "layout=separate" in said


def test_tokens_that_do_not_count_are_found(sft_run, monkeypatch):
    for settings in (["loss=dpo"], ["loss=kd", f"reference={sft_run}/LATEST"]):
        trainer = make_trainer(*ROWS, f"model={sft_run}/LATEST", *settings, f"exp_name={settings[0][5:]}")
        with monkeypatch.context() as patch:
            plant(patch, lost_end)
            said = refusal(trainer)
        count = int(said.split()[5])
        assert f"{count} tokens of response 1 of " in said and f"the run reads {count - 1}: " in said


def test_a_score_at_another_token_is_found(sft_run, monkeypatch):
    trainer = make_trainer(*ROWS, "loss=rm", f"model={sft_run}/LATEST")
    plant(monkeypatch, shifted_ends)
    assert "token " in refusal(trainer)


def test_a_wrong_sum_is_found(sft_run, monkeypatch):
    trainer = make_trainer(*ROWS, "loss=sft", f"model={sft_run}/LATEST")
    right = engine.first_batch.sum_over_responses
    monkeypatch.setattr(engine.first_batch, "sum_over_responses", lambda *given: right(*given) + 0.01)
    assert ": response 1 of" in refusal(trainer)


def test_a_teacher_that_is_read_wrong_is_found(sft_run, monkeypatch):
    trainer = make_trainer(*ROWS, "loss=kd", "model=tiny", f"tokenizer={sft_run}/LATEST",
                           f"reference={sft_run}/LATEST")
    right = engine.first_batch.token_logps
    monkeypatch.setattr(engine.first_batch, "token_logps", lambda model, *given: right(model, *given) - (
        1e-3 * (model is trainer.reference)))
    refusal(trainer)


# ---------------------------------------------------------------- another reference


@pytest.mark.parametrize("settings", [[], ["compute_dtype=bfloat16"], ["lora.rank=4"]])
def test_a_reference_that_is_not_the_start_is_found(settings, sft_run):
    """Its numbers of each step, where no row is kept."""
    trainer = make_trainer(*ROWS, "loss=dpo", f"model={sft_run}/LATEST", "reference_cache=false", *settings)
    weights = [x for name, x in trainer.policy.named_parameters() if x.requires_grad and "embed" not in name]
    with torch.no_grad():
        for x in weights:
            x += 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    said = refusal(trainer)
    assert " by the reference and -" in said and "weights have changed" in said


@pytest.mark.parametrize("count", [40, 12])
def test_a_stale_cache_is_found(count, sft_run):
    """Of the training rows, or of evaluation's, whose file holds other numbers, whole by its own hash."""
    settings = [*ROWS, "loss=dpo", f"model={sft_run}/LATEST", "max_steps=2"]
    make_trainer(*settings).fill_in_reference()
    for path in glob.glob("runs/reference_cache/*"):
        with safe_open(path, "pt") as file:
            values = file.get_tensor("values")
        if len(values) == count:
            write_checked(path, values + 0.01)
    said = refusal(make_trainer(*settings, "exp_name=stale"))
    assert " by the reference and -" in said and "delete the folder of reference_cache" in said


def test_self_play_is_looked_at_in_each_iteration(sft_run, monkeypatch):
    trainer = make_trainer(*ROWS, "loss=spin", f"model={sft_run}/LATEST", "spin.max_tokens=8",
                           "max_steps=null", "num_epochs=0.5")
    right, seen = trainers.check_first_batch, []

    def noting(examples, *arguments, is_start):
        seen.append((trainer.iteration, len(examples), is_start))
        if trainer.iteration == 1:
            with torch.no_grad():
                trainer.reference.lm_head.weight.mul_(1.01)
        right(examples, *arguments, is_start=is_start)
    monkeypatch.setattr(trainers, "check_first_batch", noting)
    with pytest.raises(InputError, match="by the reference"):
        trainer.train()
    assert seen == [(-1, 0, True), (0, 20, True), (1, 20, True)]


# ---------------------------------------------------------------- what is right begins


RIGHT = [["layout=separate"], ["layout=shared"], ["compute_dtype=bfloat16"], ["attention=varlen"]]


@pytest.mark.parametrize("settings", [
    *RIGHT, *(pytest.param(x, marks=pytest.mark.slow) for x in (
        ["attention=eager"], ["dtype=bfloat16", "compute_dtype=bfloat16"], ["reference_cache=false"],
        ["dtype=float64", "compute_dtype=float64"], ["lora.rank=4"], ["activation_checkpointing=true"],
        ["attention=varlen", "compute_dtype=bfloat16"], ["max_tokens_per_microbatch=100"],
        ["lora.rank=4", "lora.base_dtype=bfloat16", "compute_dtype=bfloat16"]))], ids=" ".join)
@pytest.mark.parametrize("loss", OWN)
def test_each_loss_begins(loss, settings, sft_run, monkeypatch):
    """And what is looked at is far within what is allowed; nothing of the run is changed."""
    losses = ["loss=" + loss, *(needed(loss, sft_run)), f"model={sft_run}/LATEST"]
    trainer = make_trainer(*ROWS, *losses, *settings, "eval_every=0", "max_steps=1")
    right, asked = trainers.check_first_batch, []
    before = {name: x.clone() for name, x in trainer.policy.state_dict().items()}

    def unchanged(*arguments, **options):
        state = torch.get_rng_state()
        asked.append(arguments)
        right(*arguments, **options)
        assert torch.equal(state, torch.get_rng_state()) and trainer.policy.training
        assert all(torch.equal(x, before[name]) for name, x in trainer.policy.state_dict().items())
    monkeypatch.setattr(trainers, "check_first_batch", unchanged)
    assert trainer.train() == 0 and asked and trainer.step == 1


@pytest.mark.parametrize("loss", ["sft", "dpo"])
@pytest.mark.parametrize("count", [450, pytest.param(1800, marks=pytest.mark.slow)])
def test_long_responses_begin(loss, count):
    """Float32 adds them up one by one, which rounds more than reading them does."""
    words = ["The plot was clever.", "It is dull.", "A weak script.", "Who knows?"]
    rows = [{"prompt": f"Film {i}:", "chosen": " ".join(words[(i + j) % 4] for j in range(count // 9)),
             "rejected": " ".join(words[(i * j) % 4] for j in range(count // 9))} for i in range(4)]
    write_lines("long.jsonl", rows)
    trainer = make_trainer(f"loss={loss}", "data=long.jsonl", "eval_data=long.jsonl", "batch_size=4",
                           f"max_length={min(2 * count, 2048)}", "num_samples=0", "max_steps=1",
                           "eval_every=0")
    lengths = [length for x in trainer.data.train_examples for length in x.lengths]
    assert max(lengths) > 0.4 * count
    trainer.train()
    assert trainer.step == 1


def test_rows_whose_logits_are_too_many_are_left_out():
    """But for the shortest: the head makes those of a plain row all at once."""
    rows = [types.SimpleNamespace(row_length=length) for length in (5, 90, 20, 40)]
    assert [x.row_length for x in spread(rows, 40)] == [5, 20, 40]
    assert [x.row_length for x in spread(rows, 4)] == [5]


def test_it_is_looked_at_when_a_run_goes_on(sft_run, run, monkeypatch, refused):
    settings = [*ROWS, "loss=dpo", f"model={sft_run}/LATEST", "max_steps=4", "save_every=2", "run_dir=whole"]
    run(*settings)
    os.remove("whole/LATEST")
    os.symlink("step-000002", "whole/LATEST")
    monkeypatch.chdir(os.getcwd())
    plant(monkeypatch, shifted_targets)
    assert "this run would begin wrong" in refused(*settings, "resume=step-000002")


def batcher(layout, max_tokens=2**20):
    return Batcher((layout,), max_tokens, 8, torch.float32, StopRequest(None))


@torch.no_grad()
def check(model, pairs, layout, bf16=False):
    """Both checks of a model that is its own reference; how near they came to what is allowed."""
    is_narrow = bf16 or model.dtype == torch.bfloat16
    how = batcher(layout), False, bf16, NOISE[is_narrow]
    check_reading(model, pairs, *how)
    check_reference(model, model, pairs, *how)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral", "gpt_oss", "cohere", *(
    pytest.param(name, marks=pytest.mark.slow) for name in sorted({*FAMILIES, *MORE} - {
        "llama", "gemma2", "mixtral", "gpt_oss", "cohere"}))])
def test_each_family_begins(model_type):
    """Flat and peaked predictions, each type of numbers, both layouts."""
    pairs = [*PAIRS, *pairs_of((20, 30, 10), (14, 9, 9), (40, 5, 30), (3, 17, 8))]
    for scale in (1, 15):
        for dtype, bf16 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            model = family(model_type, scale).to(dtype)
            for layout in (SEPARATE, SHARED)[:1 + (model_type not in SHARE_NOT)]:
                check(model, pairs, layout, bf16)


def test_what_cannot_share_is_found():
    for model_type in SHARE_NOT:
        with pytest.raises(InputError, match="would begin wrong"), warnings.catch_warnings(action="ignore"):
            check(family(model_type, 15), PAIRS, SHARED)


def test_longrope_begins():
    check(longrope(), BOTH_SIDES, SEPARATE)
    with pytest.raises(InputError, match="would begin wrong"):
        check(longrope(), BOTH_SIDES, SHARED)


def test_eight_from_the_shortest_to_the_longest():
    pairs = pairs_of(*((3, length, 1) for length in range(1, 30)))
    assert [len(x.responses[0]) for x in spread(pairs[::-1])] == [1, 5, 9, 13, 17, 21, 25, 29]
    assert len(spread(pairs[:3])) == 3 and spread([]) == []


def test_a_token_may_go_to_another_expert():
    """One number is elsewhere, and so is one in some of the disturbed readings; none in any: it is wrong."""
    right = torch.arange(40.0)
    found = right + 0.5 * (right == 7)

    def disturbed(seed, moves=True):
        noise = torch.randn(40, generator=torch.Generator().manual_seed(seed))
        return right + 1e-5 * noise + 0.5 * (right == 7) * (moves and seed % 4 == 3)
    given = [str(i) for i in range(40)], found, right, 1, "{}{}"
    engine.first_batch.compare(*given, disturbed)
    with pytest.raises(InputError, match="wrong: 7 is 7.5 "):
        engine.first_batch.compare(*given, lambda seed: disturbed(seed, False))


# ---------------------------------------------------------------- several ranks


@pytest.mark.parametrize("settings", [[], pytest.param(["compute_dtype=bfloat16"], marks=pytest.mark.slow)])
def test_what_one_rank_finds_stops_all(settings, sft_run):
    arguments = [*ROWS, "loss=dpo", f"model={sft_run}/LATEST", "batch_size=5", "max_steps=1", *settings]
    given, printed = answers(begin(2, *arguments))
    assert given == [0, 0], printed
    given, printed = answers(begin(2, *arguments, "exp_name=wrong", trouble="reads_wrong", rank=1))
    assert len(set(given)) == 1 and "InputError: this run would begin wrong: token " in given[0], printed
