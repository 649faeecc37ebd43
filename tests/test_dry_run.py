"""Will it fit? What dry_run prints is what a run holds, and the same counted by hand."""

import os
import re

import pytest
import torch
from conftest import DATA, FEW_ROWS, last_gradient, make_trainer, tiny_of

import engine.dry_run
import train
from engine.dry_run import tokens_that_fit

MIB = 2**20
TINY = 440_704  # weights of tiny, with the 439 tokens of FEW_ROWS: 2 * 439 * 128 + 2 * 164_096 + 128
ROUNDING = 0.06  # one digit after the point is printed


def dry_run(capsys, *arguments):
    """Its output, and the numbers in it: {what: MiB}."""
    capsys.readouterr()
    assert train.main([f"data={FEW_ROWS}", "dry_run=true", *arguments]) == 0
    output = capsys.readouterr().out
    sizes = re.findall(r"([\d,.]+) MiB(?:  ([a-z ]+))?", output)
    return output, {name.strip() or "checkpoint": float(size.replace(",", "")) for size, name in sizes}


@pytest.mark.parametrize("optimizer, per_weight", [("RMSprop", 1), ("AdamW", 2)])
def test_dry_run_says_what_a_run_holds(optimizer, per_weight, capsys):
    trainer = make_trainer("loss=dpo", f"optimizer={optimizer}", f"eval_data={FEW_ROWS}")
    trainer.train_step()
    weights = list(trainer.policy.parameters())
    held = {"weights": weights, "gradients": [last_gradient(weight) for weight in weights],
            "optimizer state": [x for state in trainer.optimizer.state.values() for x in state.values()]}
    held = {name: sum(x.numel() * x.element_size() for x in tensors) / MIB for name, tensors in held.items()}
    _, said = dry_run(capsys, "loss=dpo", f"optimizer={optimizer}", "exp_name=new")
    for name, size in held.items():
        assert said[name] == pytest.approx(size, abs=ROUNDING), name
        copies = per_weight if name == "optimizer state" else 1
        assert size == pytest.approx(copies * TINY * 4 / MIB, abs=0.001)  # and a count of steps each
    assert not os.path.exists("runs/new")
    # of a run that is there, its own settings
    trainer.start_folder()
    trainer.save()
    _, said = dry_run(capsys, "loss=dpo", "resume=true", "world_size=2")
    assert said["optimizer state"] == pytest.approx(per_weight * TINY * 4 / 2 / MIB, abs=ROUNDING)


def test_dry_run_counts_tokens_steps_and_bytes(capsys, refused):
    """By hand: float32, RMSprop's average of each weight, 400 pairs."""
    output, said = dry_run(capsys, "loss=dpo", "world_size=8", "batch_size=64")
    examples = make_trainer("loss=dpo", f"eval_data={FEW_ROWS}").train_examples
    num_tokens = sum(len(x.prompt) + sum(map(len, x.responses)) for x in examples)
    assert f"400 rows and {num_tokens:,} tokens, 7 steps an epoch" in output
    assert f"{TINY:,} parameters in float32" in output and "8, with 1 x 8 shards of it" in output
    assert said["weights"] == said["gradients"] == said["optimizer state"] == round(TINY * 4 / 8 / MIB, 1)
    assert said["checkpoint"] == round(TINY * 8 / MIB, 1)
    assert "more for a reference as large, until its numbers are known" in output
    assert "is for dry_run=true" in refused("world_size=2")
    assert "fsdp.replicas=3 does not divide the 8 devices" in refused(
        "dry_run=true", "world_size=8", "fsdp.replicas=3")


def test_dry_run_reads_no_weights(capsys):
    """By hand: 5 layers, with keys and values half as wide; embeddings tied to the head."""
    model = f"model={os.path.join(DATA, 'stories260K')}"  # a folder without weights
    layer, outside = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 172 + 2 * 64, 512 * 64 + 64
    output, said = dry_run(capsys, model, "world_size=2")
    assert f"{outside + 5 * layer:,} parameters" in output and os.listdir() == []
    # while a layer runs the next is gathered; or all are
    assert said["gathered weights"] == pytest.approx((outside + 2 * layer) * 4 / MIB, abs=ROUNDING)
    _, said = dry_run(capsys, model, "world_size=2", "fsdp.reshard_after_forward=false")
    assert said["gathered weights"] == pytest.approx((outside + 5 * layer) * 4 / MIB, abs=ROUNDING)
    assert "gathered weights" not in dry_run(capsys, model)[1]


@pytest.mark.parametrize("optimizer, per_weight", [("Adam", 2), ("ASGD", 1), ("SGD", 0)])
def test_dry_run_counts_any_optimizers_state(optimizer, per_weight, capsys):
    _, said = dry_run(capsys, "world_size=2", f"optimizer={optimizer}")
    assert said["optimizer state"] == pytest.approx(TINY * 4 / 2 / MIB * per_weight, abs=ROUNDING)


def test_what_saves_memory_is_counted(capsys):
    settings = ["world_size=8", "gradient_accumulation_steps=2"]
    _, plain = dry_run(capsys, *settings)
    parts = ("weights", "gradients", "optimizer state", "whole gradients", "gathered weights", "activations",
             "logits")
    assert plain["in all"] == pytest.approx(sum(plain[name] for name in parts), abs=0.06 * 8)
    assert plain["whole gradients"] == pytest.approx(TINY * 4 / MIB, abs=ROUNDING)
    assert "whole gradients" not in dry_run(capsys, *settings, "fsdp.reduce_once=false")[1]
    assert "whole gradients" not in dry_run(capsys, "world_size=8")[1]  # one microbatch has no use for them
    checkpointing = dry_run(capsys, *settings, "activation_checkpointing=true")[1]
    assert 0 < checkpointing["activations"] < plain["activations"]
    in_bfloat16 = dry_run(capsys, *settings, "compute_dtype=bfloat16")[1]
    assert in_bfloat16["gathered weights"] == pytest.approx(plain["gathered weights"] / 2, abs=ROUNDING)
    assert in_bfloat16["activations"] < plain["activations"] and in_bfloat16["weights"] == plain["weights"]
    hybrid = dry_run(capsys, *settings, "fsdp.replicas=4")
    assert "8, with 4 x 2 shards of it" in hybrid[0]
    assert hybrid[1]["weights"] == pytest.approx(TINY * 4 / 2 / MIB, abs=ROUNDING)
    output, offloaded = dry_run(capsys, *settings, "fsdp.cpu_offload=true")
    assert output.count("(in the host)") == 3
    assert offloaded["in all"] == pytest.approx(sum(plain[name] for name in parts[3:]), abs=0.06 * 5)


def test_activations_are_what_a_forward_keeps():
    """Against the bytes that autograd holds of a real forward, beside the weights: a policy in training."""
    trainer = make_trainer(f"eval_data={FEW_ROWS}")
    config, policy = trainer.config, trainer.policy
    mode = engine.dry_run.FakeTensorMode(allow_non_fake_inputs=True)
    estimated = [engine.dry_run.estimate_memory(policy, mode, config, 1, rows, 64, 1)["activations"]
                 for rows in (2, 4)]
    own, kept = {x.untyped_storage().data_ptr() for x in policy.parameters()}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x
    measured = []
    for rows in (2, 4):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            states = policy.model(input_ids=torch.zeros(rows, 64, dtype=torch.long), use_cache=False)[0]
        measured.append(sum(x.untyped_storage().nbytes() for x in kept.values()))
        del states
    assert estimated == pytest.approx(measured, rel=0.01) and measured[1] > 1.5 * measured[0]


def test_the_budget_is_what_free_memory_holds(monkeypatch, capsys):
    """On a GPU, by hand: 0.7 of what is left beside weights, gradients, optimizer and a reference, by the
    bytes of a token; the smallest of all ranks; on a CPU what suits its caches."""
    trainer = make_trainer("loss=dpo", f"eval_data={FEW_ROWS}")
    policy, config, mode = trainer.policy, trainer.config, engine.dry_run.FakeTensorMode()
    assert tokens_that_fit(policy, [policy], config, {}, 512) == 1024
    one, two = (engine.dry_run.estimate_memory(policy, mode, config, 1, rows, 512, 1) for rows in (1, 2))
    per_token = (two["activations"] - one["activations"]) / 512
    held = 4 * TINY * 4 + one["logits"] + (one["activations"] - 512 * per_token)  # four times the weights

    monkeypatch.setattr(engine.dry_run, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 100)
    for tokens, expected in ((3100, 3072), (10**6, 16384), (700, 700), (0, 512), (-5, 512)):
        capsys.readouterr()
        free = held + tokens * per_token / 0.7
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free - 100, 0))
        assert tokens_that_fit(policy, [policy], config, {}, 512) == pytest.approx(expected, abs=3)
        said = capsys.readouterr().out
        assert "memory     of a GPU holds microbatches of " in said
        assert (tokens < 512) is ("activation_checkpointing=true keeps less" in said)
    monkeypatch.setattr(engine.dry_run, "from_all", lambda value: [700, value])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (held + 3000 * per_token / 0.7, 0))
    measured = {}
    assert tokens_that_fit(policy, [policy], config, measured, 512) == 700
    assert measured == {"max_tokens": 700}
    assert tokens_that_fit(policy, [policy], config, {"max_tokens": 800}, 9) == 800
    monkeypatch.setattr(engine.dry_run, "saved_by_forward", None)  # as of a model without an estimate
    assert tokens_that_fit(policy, [policy], config, {}, 512) == 700
    assert "memory     is not estimated, " in capsys.readouterr().out


def test_experts_are_counted_too():
    """Whose products are refused, without memory, under autocast."""
    trainer, model = make_trainer("compute_dtype=bfloat16"), tiny_of("mixtral")
    mode = engine.dry_run.FakeTensorMode(allow_non_fake_inputs=True)
    small, large = (engine.dry_run.estimate_memory(model, mode, trainer.config, 1, rows, 64, 1)
                    for rows in (2, 4))
    assert 1.9 < large["activations"] / small["activations"] < 2.1


def test_float32_weights_in_bfloat16_keep_more_than_bfloat16_weights(capsys):
    """On one device autocast keeps a copy of each weight, and the residual stream stays float32."""
    one = dry_run(capsys, "compute_dtype=bfloat16")[1]["activations"]
    narrow = dry_run(capsys, "compute_dtype=bfloat16", "dtype=bfloat16")[1]["activations"]
    assert one > narrow + 2 * 2 * 164_096 / MIB  # of the layers' weights, 2 bytes each
