"""Adapters learn beside frozen weights, which are the reference; what is saved is peft's, and merges."""

import fcntl
import functools
import json
import os
import re
import runpy
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import (FORTY, ROOT, copy_model, hash_again, latest, losses_of, made_once, make_trainer,
                      needed, numbers, obvious_logp, read_lines, tiny_of)
from fork_rows import ROWS
from on_ranks import on_ranks
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import engine.checkpoints
import train
from engine.forward import read_tokens, response_logps, token_kls
from engine.lora import AdaptersOff
from losses import OBJECTIVES

LORA = ["lora.rank=4", "lora.alpha=8"]  # what adapters say counts twice
SIZE = 4 * (128 + 128) + 3 * (128 + 256)  # of tiny's q, k, v, o and gate, up, down in a layer, at rank 1
RUN = [f"data={FORTY}", f"eval_data={FORTY}", "num_eval_examples=8", "batch_size=4", "lr_schedule=constant",
       "sample_max_tokens=8", "num_samples=2", "eval_every=0", "warmup_steps=0", "num_epochs=1"]
EXACT = ["dtype=float64", "compute_dtype=float64"]
SHORT_SPIN = ["num_epochs=0.25", "spin.max_tokens=8"]  # three steps in each of two iterations
IDS = torch.arange(5, 45).view(2, 20)
RANKS = pytest.mark.xdist_group("ranks")


@pytest.fixture
def exact(monkeypatch):
    """transformers' RMSNorm computes in float32 even in float64 models."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: self.weight * x * torch.rsqrt(
        x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def finished(sft_run, factory, name, *settings):
    """The folder of a run of four steps with adapters beside sft_run's model, made once."""
    return made_once(factory, name, lambda folder: train.main([
        f"model={sft_run}/LATEST", *RUN, *LORA, "lr=1e-2", "max_steps=4", f"run_dir={folder}", *settings]))


@pytest.fixture(scope="session")
def adapted(sft_run, tmp_path_factory):
    """Of DPO, in float64."""
    return finished(sft_run, tmp_path_factory, "adapted", "loss=dpo", *EXACT, "eval_every=4", "save_every=1",
                    "keep_checkpoints=2")


@pytest.fixture(scope="session")
def judge(sft_run, tmp_path_factory):
    """Of a reward model."""
    return finished(sft_run, tmp_path_factory, "judge", "loss=rm")


def adapter(folder):
    return load_file(f"{folder}/LATEST/adapter_model.safetensors")


def assert_same_run(ours, theirs, tolerance=0.0):
    """Adapters and all metrics. Some norms compute in float32, where a last bit is 6e-8 of a number."""
    first, second = adapter(ours), adapter(theirs)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=tolerance) for name in first)
    assert_same_lines(numbers(ours), numbers(theirs), tolerance)


def assert_same_lines(ours, theirs, tolerance, without=()):
    for line, expected in zip(ours, theirs, strict=True):
        is_tie = tolerance and abs(expected.get("rewards/margins", 1)) < 1e-6  # rounding says which is larger
        unread = [*without, *(["rewards/accuracies"] if is_tie else [])]
        line, expected = ({name: x for name, x in each.items() if name not in unread}
                          for each in (line, expected))
        assert line == (pytest.approx(expected, rel=tolerance, abs=tolerance) if tolerance else expected)


def logps(trainer, model):
    """Of the held-out examples' responses."""
    values = functools.partial(response_logps, model, bf16=False)
    return trainer.batcher.values(values, trainer.data.eval_examples, "")


@torch.no_grad()
def plain_model(folder, policy, scale):
    """A model without adapters, with W + scale B A for each W that has them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    parts = dict(policy.named_parameters())
    for name, weight in model.named_parameters():
        a, b = (parts.get(f"{name.removesuffix('.weight')}.lora_{x}.default.weight") for x in "AB")
        if a is not None:
            weight += scale * b @ a
    return model


# ---------------------------------------------------------------- before the first step


@pytest.mark.parametrize("loss, dtype, tolerance", [
    *((loss, "float64", 1e-12) for loss in OBJECTIVES), ("dpo", "float32", 1e-5)])
def test_at_first_adapters_change_nothing(loss, dtype, tolerance, run, sft_run, exact):
    """Evaluation, samples and the first loss are those of a run in which all weights learn; rewards are 0."""
    settings = [f"loss={loss}", f"model={sft_run}/LATEST", *RUN, *needed(loss, sft_run), "max_steps=1",
                "eval_every=1", f"dtype={dtype}", f"compute_dtype={dtype}"]
    full, lora = run(*settings, "run_dir=full"), run(*settings, *LORA, "run_dir=lora")
    assert_same_lines(numbers(lora)[:2], numbers(full)[:2], tolerance, without=["grad_norm"])
    first = numbers(lora)[0]
    if "rewards/chosen" in first and OBJECTIVES[loss].needs_reference:
        assert first["rewards/chosen"] == first["rewards/rejected"] == first["samples/kl"] == 0
    for name in {"samples.jsonl", "generated-00.jsonl"} & set(os.listdir(full)):
        ours, theirs = ([line | {"key": None} for line in read_lines(f"{folder}/{name}")][:2]
                        for folder in (lora, full))  # the key is of all weights' names
        assert ours == theirs


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("rslora, scale", [("false", 8 / 4), ("true", 8 / 2)])
def test_gradients_are_those_of_the_weights_they_make(rslora, scale, sft_run, exact):
    """With G the gradient of W + s B A: s B'G of A and s G A' of B, by DPO's formula in float64."""
    trainer = make_trainer("loss=dpo", f"model={sft_run}/LATEST", *RUN, *LORA, *EXACT, "max_grad_norm=null",
                           f"lora.rslora={rslora}", "dpo.beta=0.3")
    for name, x in trainer.policy.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(x, std=0.05)
    before = {name: x.detach().clone() for name, x in trainer.policy.named_parameters()}
    plain, base = (plain_model(f"{sft_run}/LATEST", trainer.policy, s) for s in (scale, 0))
    losses = []
    for example in trainer.make_global_batch(0)[0]:
        ratios = [obvious_logp(plain, example, ids) - obvious_logp(base, example, ids).detach()
                  for ids in example.responses]
        losses.append(-F.logsigmoid(0.3 * (ratios[0] - ratios[1])))
    torch.stack(losses).mean().backward()
    assert trainer.train_step()["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-12)
    for name, x in trainer.policy.named_parameters():
        of, part = re.fullmatch(r"(.*?)(?:\.base_layer|\.lora_([AB])\.default)?\.weight", name).groups()
        if part is None:
            assert not x.requires_grad and x.grad is None and torch.equal(x, before[name])
            continue
        gradient = plain.get_parameter(f"{of}.weight").grad
        other = before[name.replace(f"lora_{part}", f"lora_{'B' if part == 'A' else 'A'}")]
        expected = scale * (other.T @ gradient if part == "A" else gradient @ other.T)
        assert torch.allclose(x.kept_gradient, expected, rtol=0, atol=1e-9) and expected.abs().max() > 1e-6


@pytest.mark.parametrize("loss, head, init, std", [  # uniform within 1 / sqrt(128), or a Gaussian's 1 / rank
    ("dpo", set(), "default", (3 * 128) ** -0.5), ("rm", {"score.weight"}, "gaussian", 1 / 4)])
def test_what_learns(loss, head, init, std, sft_run):
    """Both matrices beside 7 weights in each of two layers, and a reward model's head; nothing else."""
    trainer = make_trainer(f"loss={loss}", f"model={sft_run}/LATEST", *RUN, *LORA, f"lora.init={init}",
                           "lora.targets=[all-linear]")
    before = {name: x.detach().clone() for name, x in trainer.policy.named_parameters()}
    first = before["model.layers.0.mlp.up_proj.lora_A.default.weight"]
    assert first.std().item() == pytest.approx(std, rel=0.1)
    trainer.train_step()
    names = {x: name for name, x in trainer.policy.named_parameters()}
    held = {names[x] for x in trainer.optimizer.state}
    assert held == {name for name in before if ".lora_" in name} | head and len(held) == 28 + len(head)
    moved = {name for x, name in names.items() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if ".lora_B." in name} | head  # while B is 0, A has no gradient


# ---------------------------------------------------------------- the reference


@torch.no_grad()
def test_the_reference_is_the_policy_without_adapters(sft_run, exact):
    """No weight is there twice; after steps its numbers, samples and KL are the untouched model's."""
    with torch.enable_grad():
        trainer = make_trainer("loss=dpo", f"model={sft_run}/LATEST", *RUN, *LORA, *EXACT, "lr=1e-2")
        kept, drawn = trainer.reference.state_dict(), trainer.sampler.answers(trainer.reference)
        for _ in range(3):
            trainer.train_step()
    own = {x.data_ptr() for x in trainer.policy.parameters()}
    assert {x.data_ptr() for x in kept.values()} < own and trainer.reference.policy is trainer.policy
    base, plain = (plain_model(f"{sft_run}/LATEST", trainer.policy, scale) for scale in (0, 2))
    assert kept.keys() == base.state_dict().keys()
    for model, known in ((trainer.reference, base), (trainer.policy, plain)):
        expected = [pytest.approx([obvious_logp(known, x, ids).item() for ids in x.responses])
                    for x in trainer.data.eval_examples]
        assert logps(trainer, model) == expected
    assert logps(trainer, trainer.policy) != [pytest.approx(x) for x in logps(trainer, trainer.reference)]
    assert trainer.sampler.answers(trainer.reference) == drawn != trainer.sampler.answers(trainer.policy)
    kls = []
    for example, answer in zip(trainer.data.sample_examples, drawn):
        ids, start = torch.tensor([[*example.prompt, *answer]]), len(example.prompt) - 1
        ours, theirs = (m(input_ids=ids).logits.log_softmax(-1)[0, start:-1] for m in (plain, base))
        kls.append((ours.exp() * (ours - theirs)).sum().item())
    kl = trainer.sampler.kl(trainer.policy, trainer.reference, drawn)
    assert kl == pytest.approx(sum(kls) / len(kls), rel=1e-6) and kl > 1e-3


def test_a_full_runs_reference_cache_is_found(run, sft_run, capsys):
    settings = ["loss=dpo", f"model={sft_run}/LATEST", *RUN, "eval_every=10"]
    full, names = run(*settings, "run_dir=full"), os.listdir("runs/reference_cache")
    capsys.readouterr()
    lora = run(*settings, *LORA, "run_dir=lora")
    assert re.search("probabilities of 48 rows read from .*, of 0 computed", capsys.readouterr().out)
    assert os.listdir("runs/reference_cache") == names and latest(lora) == 10
    ours, theirs = (read_lines(f"{folder}/samples.jsonl")[-1] for folder in (lora, full))
    assert ours["reference"] == theirs["reference"]


def test_another_reference_is_loaded(sft_run, adapted, exact):
    """Base and adapter of a finished run, whose last evaluation says their log-probabilities."""
    trainer = make_trainer("loss=dpo", f"model={sft_run}/LATEST", f"reference={adapted}/LATEST", *RUN, *LORA,
                           *EXACT)
    assert not isinstance(trainer.reference, AdaptersOff)
    chosen, said = [x[0] for x in logps(trainer, trainer.reference)], numbers(adapted)
    assert sum(chosen) / len(chosen) == pytest.approx(said[-1]["logps/chosen"], rel=1e-6)
    assert abs(said[-1]["logps/chosen"] - said[0]["logps/chosen"]) > 1


def test_the_opponent_of_self_play_is_a_frozen_adapter(sft_run):
    """The policy as each iteration begins, exactly, while the policy moves on."""
    trainer = make_trainer("loss=spin", f"model={sft_run}/LATEST", *RUN, *LORA, "spin.max_tokens=8")
    for _ in range(2):
        trainer.next_iteration()
        begun = logps(trainer, trainer.reference)
        assert begun == logps(trainer, trainer.policy)
        for _ in range(2):
            trainer.train_step()
        assert begun == logps(trainer, trainer.reference) != logps(trainer, trainer.policy)
    assert trainer.iteration == 1 and trainer.reference.policy is trainer.policy


# ---------------------------------------------------------------- going on, and on any number of ranks


@pytest.mark.parametrize("loss, stop", [("sft", 3), ("dpo", 3), ("rm", 3), ("spin", 5)])
def test_resuming_matches_not_stopping(loss, stop, run):
    """Beside tiny's weights, which the run keeps and takes along; spin stops in the middle of iteration 1."""
    settings = [*RUN, *LORA, f"loss={loss}", "eval_every=1", "optimizer=AdamW", "lr=1e-2",
                *(SHORT_SPIN if loss == "spin" else [])]
    run(*settings, "max_steps=6", "run_dir=whole")
    run(*settings, f"max_steps={stop}", "run_dir=part")
    shutil.copytree("part", "copy", symlinks=True)
    os.truncate("part/base/model.safetensors", 100)  # the copy has its own
    run("resume=true", "max_steps=6", "run_dir=copy")
    assert_same_run("whole", "copy")
    early = {f"{name}-{stop:06d}" for name in ("step", "merged")}
    assert {"base", "merged", *early} <= {*os.listdir("copy")} == {*os.listdir("whole")} | early
    os.remove("copy/merged")  # as if it had been killed before
    shutil.rmtree("copy/merged-000006")
    os.mkdir("copy/merged")  # as a copy without links has one
    run("resume=true", "run_dir=copy")
    assert os.path.isdir("copy/merged.1") and os.readlink("copy/merged") == "merged-000006"
    assert loss == "rm" or read_lines("whole/samples.jsonl") == read_lines("copy/samples.jsonl")
    ours, theirs = (load_file(f"{folder}/merged/model.safetensors") for folder in ("copy", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@RANKS
def test_killed_and_resumed(adapted):
    """A second stage, beside base and adapter of the first, with saves in the background."""
    settings = [*RUN, *LORA, "loss=dpo", f"model={adapted}/LATEST", "async_save=true", "save_every=2",
                "max_steps=6"]
    on_ranks(1, *settings, "run_dir=undisturbed")
    on_ranks(1, *settings, "run_dir=killed", trouble="killed 6", answer=-9)
    assert latest("killed") in (2, 4) and not os.path.exists("killed/merged")
    on_ranks(1, "resume=true", "run_dir=killed")
    assert_same_run("undisturbed", "killed")


@pytest.fixture(scope="session")
def made(sft_run, tmp_path_factory):
    """made("dpo", 2) is the folder of that run on so many ranks, which the first test that asks begins."""
    base = tmp_path_factory.mktemp("lora")
    settings = [*RUN, *LORA, *EXACT, f"model={sft_run}/LATEST", "max_steps=6", "batch_size=5", "lr=1e-3",
                "save_every=3", "reference_cache=cache"]

    @functools.cache
    def make(loss, num_ranks, *more, trouble=None):
        folder = f"{base}/{loss}{num_ranks}{''.join(more)}"
        on_ranks(num_ranks, *settings, f"loss={loss}", *(SHORT_SPIN if loss == "spin" else ["eval_every=3"]),
                 *more, f"run_dir={folder}", trouble=trouble)
        return folder
    return make


@RANKS
@pytest.mark.parametrize("loss, num_ranks", [
    ("dpo", 2), pytest.param("dpo", 4, marks=pytest.mark.slow), ("rm", 2),
    pytest.param("spin", 2, marks=pytest.mark.slow)])
def test_a_curve_is_the_same_on_any_number_of_ranks(loss, num_ranks, made):
    assert_same_run(made(loss, num_ranks), made(loss, 1), 1e-6)
    assert sorted(os.listdir(made(loss, num_ranks))) == sorted(os.listdir(made(loss, 1)))


@RANKS
@pytest.mark.parametrize("loss, before, after", [("dpo", 2, 1), ("dpo", 1, 2), ("spin", 2, 1)])
def test_resumed_on_another_number_of_ranks(loss, before, after, made):
    shutil.copytree(made(loss, before), "r", symlinks=True)
    os.remove("r/LATEST")
    os.symlink("step-000003", "r/LATEST")
    on_ranks(after, "resume=true", "run_dir=r")
    assert_same_run("r", made(loss, 1), 1e-6)


@RANKS
@pytest.mark.parametrize("setting", [
    "activation_checkpointing=true", "layout=separate", "layout=shared", "attention=varlen", "compile=true",
    "gradient_accumulation_steps=3"])
def test_other_ways_to_compute_give_the_same_losses(setting, made):
    other = made("dpo", 1, setting, trouble="compiled" if setting == "compile=true" else None)
    assert losses_of(other) == pytest.approx(losses_of(made("dpo", 1)), rel=1e-6)


@RANKS
@pytest.mark.parametrize("targets", ["lm_head", "layers.1.mlp.up_proj"])
def test_what_learns_may_stand_at_the_end(targets, made):
    """Where all before it is frozen, in a shard too."""
    alone, shards = (made("dpo", num_ranks, f"lora.targets={targets}") for num_ranks in (1, 2))
    assert_same_run(shards, alone, 1e-6)
    assert len(adapter(alone)) == 2 and len({*losses_of(alone)}) > 3


def test_recomputed_layers_of_the_reference_have_no_adapters(sft_run, exact):
    """Policy and reference are read together: gradients as without recomputation."""
    def gradients(is_checkpointed):
        torch.manual_seed(0)
        trainer = make_trainer("loss=dpo", f"model={sft_run}/LATEST", *RUN, *LORA, *EXACT,
                               f"activation_checkpointing={is_checkpointed}")
        weights = [x for x in trainer.policy.parameters() if x.requires_grad]
        for x in weights:
            torch.nn.init.normal_(x, std=0.05)
        batch = trainer.make_global_batch(0)[1][0]
        read_tokens(token_kls, [trainer.policy, trainer.reference], batch)["kl"].sum().backward()
        return torch.cat([x.grad.flatten() for x in weights])
    expected = gradients("false")
    assert torch.allclose(gradients("true"), expected, rtol=0, atol=1e-9) and expected.norm() > 1e-2


@RANKS
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_narrower_base(num_ranks, sft_run):
    """Frozen weights in bfloat16, what learns in float32; it does learn, and the merged ones round once."""
    on_ranks(num_ranks, *RUN, *LORA, "loss=dpo", f"model={sft_run}/LATEST", "lora.base_dtype=bfloat16",
             "compute_dtype=bfloat16", "eval_every=10", "lr=1e-3", "run_dir=r")
    assert {x.dtype for x in adapter("r").values()} == {torch.float32}
    merged, name = load_file("r/merged/model.safetensors"), "model.layers.1.mlp.up_proj"
    a, b = (adapter("r")[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    weight = load_file(f"{sft_run}/LATEST/model.safetensors")[f"{name}.weight"].bfloat16()
    exact = weight.float() + 2 * b @ a
    expected = exact.bfloat16()
    whole = make_trainer(*RUN, "model=r/LATEST").policy.get_parameter(f"{name}.weight")
    assert torch.allclose(whole, exact, rtol=0, atol=1e-6)  # in float32 nothing is rounded
    assert merged["lm_head.weight"].dtype == merged[f"{name}.weight"].dtype == torch.bfloat16
    differ = [(x != expected).float().mean() for x in (merged[f"{name}.weight"], weight)]
    assert differ[0] < 0.001 < differ[1]  # sums in another order differ in one of 10,000
    first, last = (line for line in numbers("r") if "lr" not in line)
    assert first["rewards/margins"] == 0 and last["loss"] < first["loss"]


# ---------------------------------------------------------------- on disk


def test_what_is_on_the_disk(adapted):
    """Of two checkpoints that are kept each holds adapters, and neither holds the base."""
    folder = os.path.realpath(f"{adapted}/LATEST")
    assert sorted(name for name in os.listdir(adapted) if name[:4] in ("step", "base", "merg")) == [
        "merged", "merged-000004", "step-000003", "step-000004"]
    assert os.readlink(f"{adapted}/merged") == "merged-000004"
    assert sorted(os.listdir(folder)) == [
        "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "trainer_state"]
    assert sum(os.path.getsize(f"{at}/{name}") for at, _, names in os.walk(folder) for name in names) < 2e6
    assert sum(x.numel() for x in adapter(adapted).values()) == 4 * 2 * SIZE
    pattern = r"base_model\.model\.model\.layers\.[01]\.(self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight"
    assert all(re.fullmatch(pattern, name) for name in adapter(adapted))


def merge(folder):
    """How python -m engine.checkpoints merge ends: None, or a sentence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["checkpoints.py", "merge", folder])
        try:
            runpy.run_path(f"{ROOT}/engine/checkpoints.py", run_name="__main__")
        except SystemExit as end:
            return end.code


@pytest.mark.parametrize("family, options", [
    ("llama", {}), ("gpt2", {"n_positions": 512, "bos_token_id": None}), ("mixtral", {})])
def test_peft_and_the_merged_folder_give_the_runs_logits(family, options, sft_run):
    """Also beside weights that lie the other way round and are tied, and beside experts' blocks."""
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    tiny_of(family, vocab_size=len(tokenizer), **options).save_pretrained("model")
    tokenizer.save_pretrained("model")
    trainer = make_trainer("loss=dpo", "model=model", *RUN, *LORA, "lr=1e-2", "max_steps=2", "run_dir=r")
    trainer.train()
    assert merge("r/LATEST") is None is merge("r/step-000002/")  # the second finds it
    merged, info = AutoModelForCausalLM.from_pretrained("r/merged-000002", output_loading_info=True)
    assert not any(info.values()) and len(AutoTokenizer.from_pretrained("r/merged-000002")) == len(tokenizer)
    base = AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        expected = trainer.policy.eval()(IDS).logits
        assert (base(IDS).logits - expected).abs().max() > 0.1
        for model in (merged, PeftModel.from_pretrained(base, os.path.realpath("r/LATEST"))):
            assert torch.allclose(model(IDS).logits, expected, atol=1e-3)
    shutil.rmtree("r/merged-000002")
    os.truncate("r/LATEST/adapter_model.safetensors", 99)
    assert "LATEST is damaged, adapter_model.safetensors has 99 bytes" in merge("r/LATEST")
    for folder in (f"{sft_run}/LATEST", "r/step-000009"):
        assert f"{folder} is no checkpoint with adapters" in merge(folder)


@pytest.mark.parametrize("lora", [LORA, []])
def test_the_next_stage_starts_from_base_and_adapter(lora, run, adapted, exact):
    """Which are its reference: rewards are 0, log-probabilities those with which the stage before ended."""
    folder = run("loss=dpo", f"model={adapted}/LATEST", *RUN, *lora, *EXACT, "max_steps=1", "eval_every=1")
    first, last = numbers(folder)[0], numbers(adapted)[-1]
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["samples/kl"] == 0
    for name in ("logps/chosen", "logps/rejected"):
        assert first[name] == pytest.approx(last[name], rel=1e-6)


def test_a_reward_model_with_adapters_judges(run, sft_run, judge):
    """By its folder, by the merged one or through peft it gives the same scores."""
    settings = ["loss=dpo", f"model={sft_run}/LATEST", *RUN, "max_steps=0"]
    given = [numbers(run(*settings, f"reward_model={judge}/{name}", f"run_dir={name}"))[0]["samples/reward"]
             for name in ("LATEST", "merged")]
    assert given[0] == pytest.approx(given[1], rel=1e-4)
    base, merged = (AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
                    for path in (f"{sft_run}/LATEST", f"{judge}/merged"))
    model = PeftModel.from_pretrained(base, os.path.realpath(f"{judge}/LATEST"))
    assert model(IDS[:1]).logits.item() == pytest.approx(merged(IDS[:1]).logits.item(), rel=1e-4)


@pytest.mark.parametrize("loss, num_opponents, head", [("dpo", 0, 0), ("spin", 1, 0), ("rm", 0, 128)])
def test_dry_run_counts_what_learns(loss, num_opponents, head, run, sft_run, capsys):
    """Gradients, twice as much for AdamW, and all three in a checkpoint; an opponent is a weight only."""
    learning, said = 256 * 2 * SIZE + head, []
    for rank in (0, 256):
        run(f"loss={loss}", f"model={sft_run}/LATEST", *RUN, f"lora.rank={rank}", "optimizer=AdamW",
            "dry_run=true")
        out = capsys.readouterr().out
        said.append({name: float(size) for size, name in re.findall(r"([\d.]+) MiB  (.+)", out)})
    size = learning * 4 / 2**20
    assert said[1]["gradients"] == pytest.approx(size, abs=0.06)
    assert said[1]["optimizer state"] == pytest.approx(2 * size, abs=0.06)
    adapters = (1 + num_opponents) * (learning - head) * 4 / 2**20
    assert said[1]["weights"] - said[0]["weights"] == pytest.approx(adapters, abs=0.11)
    assert float(re.search(r"checkpoint +([\d.]+)", out)[1]) == pytest.approx(3 * size, abs=0.06)
    assert "more for a reference" not in out


def test_a_merged_folder_of_another_adapter_is_put_aside(adapted):
    """As of a step that was written again, or a damaged one; of two that merge at once the second waits and
    finds it."""
    shutil.copytree(adapted, "r", symlinks=True)
    shutil.rmtree("r/merged-000004")
    with open("r/.merge.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor() as threads:
            jobs = [threads.submit(engine.checkpoints.merge, "r/LATEST") for _ in range(2)]
            time.sleep(0.2)
            assert not any(job.done() for job in jobs) and not os.path.exists("r/merged-000004")
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert [job.result() for job in jobs] == ["merged-000004"] * 2
    first = load_file("r/merged-000004/model.safetensors")
    weights = adapter("r")
    save_file({name: 2 * x for name, x in weights.items()}, "r/LATEST/adapter_model.safetensors")
    hash_again("r/LATEST")
    engine.checkpoints.merge("r/LATEST")
    kept, other = (load_file(f"r/{name}/model.safetensors") for name in ("merged-000004.1", "merged-000004"))
    assert all(torch.equal(first[name], kept[name]) for name in first)
    name = "model.layers.0.mlp.up_proj"
    a, b = (weights[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    added = other[f"{name}.weight"] - first[f"{name}.weight"]
    assert torch.allclose(added, 2 * 3 * b @ a, rtol=0, atol=1e-9)  # both matrices twice
    os.truncate("r/merged-000004/config.json", 9)
    engine.checkpoints.merge("r/LATEST")
    assert os.path.getsize("r/merged-000004.2/config.json") == 9
    again = load_file("r/merged-000004/model.safetensors")
    assert torch.equal(again[f"{name}.weight"], other[f"{name}.weight"])


def test_a_stage_goes_on_without_the_one_before(run, sft_run, adapted):
    """Whose checkpoint may be gone: the base is in the run's folder."""
    copy_model(f"{adapted}/LATEST", "before")
    settings = [*RUN, *LORA, *EXACT, "loss=dpo", "model=before"]
    run(*settings, "max_steps=4", "run_dir=whole")
    run(*settings, "max_steps=2", "run_dir=part")
    shutil.rmtree("before")
    run("resume=true", "max_steps=4", "run_dir=part")
    assert_same_run("whole", "part")
    options = [json.load(open(f"{folder}/LATEST/adapter_config.json")) for folder in ("whole", "part")]
    assert [x["base_model_name_or_path"] for x in options] == [
        os.path.abspath(f"{folder}/base") for folder in ("whole", "part")]
    assert options[0]["target_modules"] == sorted(options[0]["target_modules"])


def test_a_models_folder_of_ones_own_stays(run, refused, sft_run):
    """Also where it stands in the run's, under the name of what a run keeps there."""
    copy_model(f"{sft_run}/LATEST", "exp/base")
    before = {name: open(f"exp/base/{name}", "rb").read() for name in os.listdir("exp/base")}
    assert "exp has a folder base that no run wrote: choose another run_dir" in refused(
        *RUN, *LORA, "model=exp/base", "run_dir=exp")
    run(*RUN, *LORA, "model=exp/base", "max_steps=1", "run_dir=other")
    assert {name: open(f"exp/base/{name}", "rb").read() for name in os.listdir("exp/base")} == before
    assert not os.path.exists("other/base")


# ---------------------------------------------------------------- what is refused


NAMES = "choose from down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj, or all-linear"


@pytest.mark.parametrize("settings, said", [
    (["lora.rank=-1"], "lora.rank=-1 is not allowed: it must be int >= 0"),
    (["lora.alpha=0"], "lora.alpha=0 is not allowed: it must be float > 0"),
    (["lora.targets=x"], "lora.targets=['x'], of which x matches nothing in the model: " + NAMES),
    (["lora.targets=[q_proj,x,embed_tokens]"], "of which x, embed_tokens matches nothing in the model: "),
    (["lora.base_dtype=bfloat16"], "lora.base_dtype=bfloat16 computes in bfloat16: set compute_dtype=bf"),
    (["lora.base_dtype=float32", *EXACT], "lora.base_dtype=float32 does not go with dtype=float64: leave it"),
    (["lora.targets=[all-linear,lm_head]"], "all-linear stands alone, or give all names"),
    (["lora.rank=0"], "lora.alpha=8 is not read with lora.rank=0: set a rank, or leave it out"),
    (["loss=dpo"], "loss=dpo moves its reference, which adapters share with the policy: set lora.rank=0")])
def test_settings_that_are_refused(settings, said, refused, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "dpo", ROWS["following"])
    assert said in refused(*RUN, *LORA, *settings)


def test_adapters_that_are_refused(refused, monkeypatch, adapted, judge):
    """A reward model's as a policy and the other way round; a damaged one; any without the library."""
    for lora in ([], LORA):
        assert "it is a reward model, without" in refused(*RUN, *lora, "loss=dpo", f"model={judge}/LATEST")
    same = f"model={adapted}/LATEST"
    for settings in (["loss=rm", same], ["loss=dpo", same, f"reward_model={adapted}/LATEST"]):
        said = refused(*RUN, *settings)
        assert "is a language model's, without scores: begin from the whole model, the run's merged/" in said
    copy_model(f"{adapted}/LATEST", "damaged")
    for text in ("{", "[]", "{}", '{"peft_type": "IA3", "base_model_name_or_path": "x"}',
                 '{"peft_type": "LORA", "base_model_name_or_path": null}'):
        with open("damaged/adapter_config.json", "w") as file:
            file.write(text)
        assert "damaged cannot be read, its adapter_config.json is no LoRA's beside a model: " in refused(
            *RUN, "model=damaged")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert refused(*RUN, *LORA) == "lora.rank=4 needs the peft library: pip install peft"
    assert "4 needs the peft library: pip install" in refused(*RUN, f"model={adapted}/LATEST", *EXACT)


def test_what_a_resumed_run_cannot_change(refused, adapted):
    shutil.copytree(adapted, "r", symlinks=True)
    for key, value, old in (("rank", 8, 4), ("alpha", 2, 8), ("targets", "x", "all-linear")):
        assert re.match(rf"lora.{key} was {old}(.0)? when this run began and cannot become {value}",
                        refused("resume=true", "run_dir=r", f"lora.{key}={value}"))


def test_a_base_that_is_another_or_gone(run, refused, sft_run):
    copy_model(f"{sft_run}/LATEST", "base")
    folder = run(*RUN, *LORA, "model=base", "max_steps=1", "run_dir=r")
    weights, resume = load_file("base/model.safetensors"), ["resume=true", "run_dir=r", "max_steps=2"]
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, "base/model.safetensors",
              metadata={"format": "pt"})
    for other in ([], ["dtype=bfloat16", "compute_dtype=bfloat16"]):
        assert "was trained beside other weights than those in" in refused(
            *RUN, f"model={folder}/LATEST", *other)
    assert "the base is not what this run began with" in refused(*resume)
    shutil.rmtree("base")
    assert "/base, which is not there: put that model back" in refused(*RUN, f"model={folder}/LATEST")
    assert "/base, which is not there: put that model back" in refused(*resume)
