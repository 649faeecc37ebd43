"""Is all of this right on an NVIDIA card? python -m pytest -q tests/test_gpu.py, in three minutes.

Without a card, or among the other tests, the checks are skipped; with GPU_TESTS_ON=cpu they run to their end
on a CPU, where the engine's stand-in takes FlashAttention's place, and show that they themselves are right.
"""

import contextlib
import gc
import itertools
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (FEW_ROWS, FORTY, ROOT, TEMPORARY, config_of, last_gradient, losses_of, make_trainer,
                      needed, read_lines, same_weights, tiny_of, write_lines)
from on_ranks import on_ranks
from torch._subclasses import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

import engine.forward
import engine.gpu
import train
import trainers
from engine.attention import as_bias, attend_one_by_one
from engine.batches import PACKED, SEPARATE, SHARED, Example, collate
from engine.checkpoints import read_state
from engine.distributed import apply_fsdp, device, device_mesh, full_tensor, meta_copy
from engine.dry_run import estimate_memory, tokens_that_fit
from engine.forward import measure_attention, response_logps
from engine.gpu import gpu_metrics, known_before, necessary_flops
from engine.sampling import SeededSampling
from engine.toy import toy
from losses import OBJECTIVES

HAS_CARD, STAND_IN = torch.cuda.is_available(), os.environ.get("GPU_TESTS_ON") == "cpu"
DEVICE = device()
ON_CARD = pytest.mark.skipif(not (HAS_CARD or STAND_IN), reason="there is no NVIDIA card")
CARDS_OWN = pytest.mark.skipif(not HAS_CARD, reason="a card's own")
HAS_FLASH = pytest.mark.skipif(not is_flash_attn_2_available(), reason="a card's own package flash-attn")
pytestmark = pytest.mark.xdist_group("ranks")  # one worker has the process that forks

BF16 = "compute_dtype=bfloat16"
STEPS = [f"data={FORTY}", f"eval_data={FORTY}", "num_samples=0", "eval_every=0", "batch_size=8",
         "max_steps=3", "num_epochs=9", "lr=1e-4", "warmup_steps=0", "lr_schedule=constant"]
NOT_PLAYED = [name for name, objective in OBJECTIVES.items() if not objective.self_play]
MODELS = {"llama": {"num_attention_heads": 4, "num_key_value_heads": 2}, "mistral": {"sliding_window": 7},
          "gpt_neox": {}}
# Rows of some 400 tokens, which a kernel reads in several blocks
LONG = write_lines(os.path.join(TEMPORARY.name, "long.jsonl"), [
    {"prompt": row["prompt"], "chosen": row["chosen"] * 18, "rejected": row["rejected"] * 18}
    for row in toy("train", True)[:40]])


def settings_of(name, sft_run):
    """With which a loss has something to learn, and self-play draws the same answers on any device."""
    start = [f"{'tokenizer' if OBJECTIVES[name].needs_teacher else 'model'}={sft_run}/LATEST"]
    greedy = [f"{name}.temperature=0"] if OBJECTIVES[name].self_play else []
    return [*STEPS, f"loss={name}", *start, *greedy, *needed(name, sft_run)]


def random_examples(*sizes):
    """Of so many tokens: a prompt and its responses, as long as several of a kernel's blocks."""
    numbers = np.random.default_rng(0)
    return [Example("x", numbers.integers(3, 60, prompt), tuple(
        numbers.integers(3, 60, length) for length in lengths), {})
        for prompt, *lengths in sizes or ((150, 90, 140), (5, 200, 3), (64, 64, 64), (1, 1, 2))]


def logps_and_gradients(model, batch, bf16=False):
    """The responses' log-probabilities (K * B,), and all gradients of a weighted sum of them in a vector."""
    model.zero_grad()
    logps = response_logps(model, batch.to(DEVICE), bf16).flatten()
    (logps * torch.linspace(-1, 1.5, len(logps), device=DEVICE)).sum().backward()
    gradients = [full_tensor(p.grad).flatten().float().cpu() for p in model.parameters()]
    return logps.detach().cpu(), torch.cat(gradients)


def distance(numbers, expected):
    """How far log-probabilities or gradients are off, of the norm of what is expected."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(numbers, expected))


def step_of(*settings):
    """The losses of three steps, and the last one's gradients."""
    trainer = make_trainer(*settings)
    losses = torch.tensor([trainer.train_step()["loss"] for _ in range(3)])
    gradients = [last_gradient(p).flatten().float().cpu() for p in trainer.policy.parameters()]
    return losses, torch.cat(gradients)


# ---------------------------------------------------------------- a card's numbers are a CPU's


@ON_CARD
@pytest.mark.parametrize("name, more", [*((name, []) for name in OBJECTIVES), ("dpo", ["lora.rank=4"])])
def test_losses_in_float32_are_a_cpus(name, more, sft_run, run):
    """Three steps in shared rows, against separate ones on a CPU."""
    settings = [*settings_of(name, sft_run), *more]
    on_ranks(1, *settings, "layout=separate", "run_dir=cpu")  # where no card is seen
    losses = losses_of(run(*settings, "layout=shared", "run_dir=card"))
    assert len(losses) == 3 and len(set(losses)) == 3
    assert losses == pytest.approx(losses_of("cpu"), rel=1e-5)


@ON_CARD
@pytest.mark.parametrize("name", NOT_PLAYED)
def test_losses_in_bfloat16(name, sft_run, run):
    """Rows that share prompts, by a mask or packed, are off no further than separate ones, times three."""
    def losses(folder, *more):
        return torch.tensor(losses_of(run(*settings_of(name, sft_run), *more, f"run_dir={folder}")))
    exact = losses("exact", "attention=sdpa", "layout=separate")
    apart = losses("apart", "attention=sdpa", "layout=separate", BF16)
    own = (apart - exact).abs().max()
    for folder, more in (("masked", ["attention=sdpa", "layout=shared"]), ("packed", ["attention=varlen"])):
        error = (losses(folder, *more, BF16) - exact).abs().max()
        assert 0 < error <= 3 * own + 2e-3 * exact.abs().max(), (error, own)


@ON_CARD
@pytest.mark.parametrize("attention, model_type", [
    *itertools.product(("sdpa", "eager", "varlen"), MODELS),
    pytest.param("flex_attention", "mistral", marks=CARDS_OWN),
    pytest.param("flash_attention_2", "mistral", marks=HAS_FLASH)])
def test_each_attention_says_what_separate_rows_say(attention, model_type):
    """Log-probabilities and gradients; in bfloat16, as far as separate rows by sdpa agree with float32."""
    model, examples = tiny_of(model_type, **MODELS[model_type]).to(DEVICE), random_examples()
    expected = logps_and_gradients(model, collate(examples))
    tolerance, bf16 = 1e-4, attention in ("varlen", "flash_attention_2")
    if bf16:
        tolerance = 1e-3 + 3 * distance(logps_and_gradients(model, collate(examples), bf16), expected)
    model.set_attn_implementation(attention)
    layout = {"varlen": PACKED, "flash_attention_2": SEPARATE}.get(attention, SHARED)
    error = distance(logps_and_gradients(model, collate(examples, layout=layout), bf16), expected)
    assert error <= tolerance < 0.3, (error, tolerance)


@ON_CARD
@pytest.mark.parametrize("window", [-1, 0, 6])
def test_the_kernel_sees_what_its_stand_in_sees(window):
    """Values and gradients as float32 has them, of queries fewer than keys; one key more or less is seen."""
    torch.manual_seed(0)
    num_queries, num_keys = torch.tensor([130, 3, 1, 70]), torch.tensor([300, 200, 9, 71])
    tensors = [torch.randn(count, heads, 64, device=DEVICE).bfloat16() for count, heads in (
        (num_queries.sum(), 4), (num_keys.sum(), 2), (num_keys.sum(), 2))]
    direction = torch.randn(num_queries.sum(), 4, 64, device=DEVICE).bfloat16()

    def attended(kernel, dtype, window, dropped=0):
        """dropped: keys at each sequence's end that are not there."""
        query, key, value = leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        ends = [F.pad(x.cumsum(0), (1, 0)).int().to(DEVICE) for x in (num_queries, num_keys - dropped)]
        kept = torch.cat([torch.arange(count) < count - dropped for count in num_keys.tolist()]).to(DEVICE)
        given = kernel(query, key[kept], value[kept], *ends, 130, 300 - dropped, scale=0.125, enable_gqa=True,
                       window_size=(window, 0))
        (given * direction.to(dtype)).sum().backward()
        return [x.float() for x in (given.detach(), *(leaf.grad for leaf in leaves))]

    def errors(numbers):  # of a window of one key queries and keys have no gradient
        least = direction.float().norm() / 10
        return [((a - b).norm() / b.norm().clamp(min=least)).item() for a, b in zip(numbers, exact)]
    exact = attended(attend_one_by_one, torch.float32, window)
    own = attended(varlen_attn if HAS_CARD else attend_one_by_one, torch.bfloat16, window)
    assert max(errors(own)) < 0.02, errors(own)  # bfloat16 rounds by 2^-9, some times one after another
    others = [{"window": window, "dropped": 1}] + ([{"window": window + 1}] if window >= 0 else [])
    for other in others:
        wrong = errors(attended(attend_one_by_one, torch.float32, **other))
        assert min(wrong[0], wrong[3]) > 0.06, wrong  # what is attended to, and the gradient of values


@ON_CARD
@pytest.mark.parametrize("length", [64, 192])
def test_gradients_under_masks_are_finite(length):
    """cuDNN's are not, of scores whose logsumexp is below -88.7 (pytorch #196678): it is off."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_trainer(*STEPS)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.manual_seed(0)
    query = (4 + torch.randn(2, 4, length, 64, device=DEVICE)).bfloat16().requires_grad_()
    key = (-4 - torch.randn(2, 4, length, 64, device=DEVICE)).bfloat16().requires_grad_()
    bias = as_bias(torch.ones(2, 1, length, length, device=DEVICE, dtype=torch.bool).tril(), torch.bfloat16)
    scores = (query @ key.mT / 8 + bias).float()
    assert scores.logsumexp(-1).max() < -88.7
    F.scaled_dot_product_attention(query, key, key, bias).sum().backward()
    assert query.grad.isfinite().all() and key.grad.isfinite().all()


# ---------------------------------------------------------------- shards, compiled layers, less memory


@pytest.fixture
def one_rank():
    """A process group of one, as several have."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if HAS_CARD else "gloo", store=dist.HashStore(), rank=0,
                            world_size=1)
    yield
    dist.destroy_process_group()
    device_mesh.cache_clear()


@ON_CARD
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("offloaded", [False, pytest.param(True, marks=CARDS_OWN)])
def test_a_sharded_model_says_what_the_plain_one_says(offloaded, bf16, one_rank):
    """FSDP2 on one rank; in bfloat16, which it casts to by itself, as far as autocast agrees with float32."""
    plain = tiny_of("llama", **MODELS["llama"])
    config = config_of(*([BF16] if bf16 else []))
    config.fsdp["cpu_offload"] = offloaded
    sharded = apply_fsdp(meta_copy(plain), plain, config)
    if bf16:
        sharded.set_attn_implementation("varlen")
    plain, batch = plain.to(DEVICE), collate(random_examples(), layout=PACKED if bf16 else SHARED)
    expected = logps_and_gradients(plain, batch)
    own = distance(logps_and_gradients(plain, batch, True), expected) if bf16 else 0
    error = distance(logps_and_gradients(sharded, batch), expected)
    assert (error > 1e-3) == bf16 and error <= 1e-4 + 3 * own < 0.3, (error, own)


@pytest.fixture
def dynamo():
    """Counts of torch's compiler, to which it is an error to go on without compiling."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def compile_eagerly(monkeypatch):
    """With a compiler that changes nothing, and takes no time."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(
        self, backend="eager", **options))


@ON_CARD
def test_losses_of_compiled_layers(sft_run, run, dynamo, monkeypatch):
    if not HAS_CARD:
        compile_eagerly(monkeypatch)
    settings = [*settings_of("dpo", sft_run), "layout=shared"]
    plain, compiled = (losses_of(run(*settings, f"compile={word}", f"run_dir={word}"))
                       for word in ("false", "true"))
    assert dynamo["unique_graphs"] > 0
    assert compiled == pytest.approx(plain, rel=1e-4)


@ON_CARD
def test_whatever_rows_come_layers_stay_compiled(sft_run, dynamo, monkeypatch):
    """Reference, evaluation and training, in each layout, of one row and of several: more than torch's 8."""
    compile_eagerly(monkeypatch)
    trainer = make_trainer(*settings_of("dpo", sft_run), "compile=true", "attention=varlen", BF16)
    examples = [Example(x.where, x.prompt, x.responses[:1], {})
                for x in sorted(trainer.train_examples, key=lambda x: -x.row_length)]
    for layout, count in itertools.product((SEPARATE, SHARED, PACKED), (1, 7)):
        batch = collate(examples[:count], layout=layout).to(DEVICE)
        with torch.no_grad():
            response_logps(trainer.reference, batch, trainer.bf16)
            known = response_logps(trainer.policy.eval(), batch, trainer.bf16)
        logps = response_logps(trainer.policy.train(), batch, trainer.bf16)
        logps.sum().backward()
        with torch.compiler.set_stance("force_eager"):
            expected = response_logps(trainer.policy, batch, trainer.bf16)
        for values in (known, logps):
            assert values.tolist() == [pytest.approx(row, rel=1e-2) for row in expected.tolist()]
    assert dynamo["unique_graphs"] > 8


@ON_CARD
@pytest.mark.parametrize("more", [[], [BF16, "attention=varlen"]], ids=["float32", "bfloat16"])
def test_recomputed_activations_change_nothing(more, sft_run):
    settings = [*settings_of("dpo", sft_run), *more]
    recomputed = step_of(*settings, "activation_checkpointing=true")
    assert distance(recomputed, step_of(*settings)) <= (1e-2 if more else 1e-5)


# ---------------------------------------------------------------- the same again


@pytest.fixture(autouse=True)
def any_order():
    """What a test has asked for is for it alone."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def determinism(monkeypatch):
    """determinism(False): a GPU may add in any order, as torch does by itself."""
    def want(wanted):
        if not wanted:
            monkeypatch.setattr(engine.forward, "add_in_order", lambda *given: None)
    return want


@ON_CARD
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("more", [
    ["layout=shared"], [BF16, "attention=varlen"],
    [BF16, "attention=varlen", "lora.rank=4", "lora.base_dtype=bfloat16"],
    pytest.param([BF16, "attention=varlen", "compile=true"], marks=CARDS_OWN)],
    ids=["float32", "bfloat16", "adapters", "compiled"])
def test_a_run_that_goes_on(more, wanted, run, determinism, capsys):
    """Stopped after 3 of 6 steps: the same bits as a whole run, on a card where rows are packed."""
    determinism(wanted)
    settings = [*STEPS, "loss=dpo", f"data={LONG}", f"eval_data={LONG}", "max_steps=6", *more]
    whole = run(*settings, "run_dir=whole")
    run(*settings, "run_dir=half", "max_steps=3")
    half = run("resume=true", "run_dir=half", "max_steps=6")
    last = "merged" if "lora.rank=4" in more else "LATEST"
    same = losses_of(half) == losses_of(whole) and same_weights(half, whole, last)
    with capsys.disabled():
        print(f"\n{' '.join(more)}, deterministic: {wanted}, resumed bit for bit: {same}")
    assert same or (HAS_CARD and not (wanted and BF16 in more))
    assert len(losses_of(half)) == 6 and losses_of(half) == pytest.approx(losses_of(whole), rel=1e-2)


@pytest.fixture(scope="session")
def llama(sft_run, tmp_path_factory):
    """A random Llama of 100M parameters, on a CPU of few: its folder."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = (768, 2048, 12, 12, 32_000) if HAS_CARD else (64, 96, 2, 2, 512)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    LlamaForCausalLM(LlamaConfig(**dict(zip(names, sizes)), tie_word_embeddings=True)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(f"{sft_run}/LATEST").save_pretrained(folder)
    return [f"model={folder}", f"data={LONG}", f"eval_data={LONG}", "batch_size=16", "lr=1e-5"]


@ON_CARD
def test_what_the_same_bits_cost(llama, determinism, capsys):
    """Seconds a step of 100M parameters, and whether two runs agree in every bit: printed."""
    for wanted in (False, True):
        determinism(wanted)
        found = []
        for _ in range(2):
            trainer = make_trainer(*STEPS, *llama, BF16, "attention=varlen", "max_steps=9")
            trainer.train_step()
            started = time.perf_counter()
            losses = [trainer.train_step()["loss"] for _ in range(4)]
            found.append((losses, (time.perf_counter() - started) / 4))
        (first, seconds), (second, again) = found
        with capsys.disabled():
            print(f"\ndeterministic: {wanted}, bit for bit: {first == second}, cost: "
                  f"{min(seconds, again):.4f} s a step")
        assert first == pytest.approx(second, rel=1e-3) and (first == second or HAS_CARD and not wanted)


@ON_CARD
def test_answers_are_the_same_again(sft_run):
    """Sampled twice; and greedy, by themselves or beside others."""
    trainer = make_trainer(*STEPS, f"model={sft_run}/LATEST", "eval_data=toy", "num_samples=16")
    sampler, prompts = trainer.sampler, [x.prompt for x in trainer.data.sample_examples[:9]]
    prompts += [prompt[:-2] for prompt in prompts]
    trainer.policy.eval()

    def answers(temperature, size, top_p=1.0, limit=12):
        sampler.config.eval_batch_size, found = size, {}
        sampling = {"temperature": temperature, "top_p": top_p}
        for numbers, drawn in sampler.batches(trainer.policy, prompts, [limit] * 18, range(18), sampling):
            found |= zip(numbers, drawn)
        return [found[i] for i in range(18)]
    assert answers(1.0, 256) == answers(1.0, 256) != answers(0, 256)
    assert answers(1.0, 256, 0.7) == answers(1.0, 256, 0.7) != answers(1.0, 256)
    assert answers(0, 256) == answers(0, 1) == answers(0, 5)
    assert SeededSampling([0], 1.0, 1.0).generators[0].device.type == DEVICE.type


@CARDS_OWN
def test_a_model_that_adds_in_any_order(capsys, monkeypatch):
    """Trains all the same, and it is said. A sum over all places so far has no order on a GPU."""
    decoder = LlamaForCausalLM.get_decoder

    def add_sum(module, given, output):
        return output + 0 * output.detach().flatten().cumsum(0)[-1]

    def hooked(self):
        if not self.model.norm._forward_hooks:
            self.model.norm.register_forward_hook(add_sum)
        return decoder(self)
    monkeypatch.setattr(LlamaForCausalLM, "get_decoder", hooked)
    trainer = make_trainer(*STEPS, BF16, "attention=varlen")
    assert "bits       of a run are others each time: cumsum" in capsys.readouterr().out
    assert trainer.train_step()["loss"] > 0 and not torch.are_deterministic_algorithms_enabled()


# ---------------------------------------------------------------- what fits, and how fast it is


@ON_CARD
def test_a_microbatch_of_the_budget_fits():
    trainer = make_trainer("loss=dpo", BF16, *STEPS, f"data={FEW_ROWS}", "eval_batch_size=1000")
    budget = tokens_that_fit(trainer.policy, [trainer.reference], trainer.config, {}, 512)
    assert 0 < budget <= 2**14 and trainer.batcher.max_tokens == budget
    batch = next(trainer.batcher.eval_share(trainer.train_examples * 2, "a full one"))
    assert 0.9 * budget < batch.input_ids.numel() <= budget
    losses, _ = trainer.compute_losses(batch, trainer.train_objective)
    losses.sum().backward()
    assert all(p.grad.isfinite().all() for p in trainer.policy.parameters())


@ON_CARD
@pytest.mark.parametrize("more", [["attention=sdpa", "layout=separate"], ["attention=varlen"]], ids=" ".join)
def test_memory_is_what_was_estimated(more, llama, capsys):
    """The peak of a second step, of two microbatches, with the optimizer's state, beside dry_run's sum."""
    gc.collect()
    before = torch.cuda.memory_allocated() if HAS_CARD else 0
    trainer = train.build_trainer(config_of(*STEPS, *llama, BF16, *more, "gradient_accumulation_steps=2"))
    shapes = [batch.input_ids.shape for batch in trainer.make_global_batch(1)[1]]
    height, width = max(shapes, key=math.prod)
    held = estimate_memory(trainer.policy, FakeTensorMode(allow_non_fake_inputs=True), trainer.config, 1,
                           height, width, len(shapes))
    estimate = sum(size for name, size in held.items() if name != "checkpoint")
    trainer.train_step()
    if HAS_CARD:
        torch.cuda.reset_peak_memory_stats()
    trainer.train_step()
    peak = torch.cuda.max_memory_allocated() - before if HAS_CARD else estimate
    with capsys.disabled():
        print(f"\n{' '.join(more)}: {height} x {width} tokens, estimated {estimate / 2**20:,.0f} MiB"
              + f", at its peak {peak / 2**20:,.0f} MiB" * HAS_CARD)
    assert len(shapes) > 1 and peak == pytest.approx(estimate, rel=0.1)


@ON_CARD
def test_a_whole_run_is_measured(run):
    """Its reference waits in the host's memory, and comes back for samples."""
    folder = run(*STEPS, "loss=dpo", BF16, "eval_data=toy", "num_eval_examples=8", "num_samples=2",
                 "sample_max_tokens=8", "eval_every=3", "max_steps=6")
    steps, evaluations = ([line for line in read_lines(f"{folder}/metrics.jsonl") if line["split"] == split]
                          for split in ("train", "eval"))
    known = HAS_CARD and any(name in torch.cuda.get_device_name() for name in engine.gpu.PEAKS)
    assert len(steps) == 6 and len(evaluations) == 3
    for line in steps:
        assert ("memory_gb" in line) == HAS_CARD and ("mfu" in line) == known
        assert line.get("memory_gb", 1) > 0 and 0 < line.get("mfu", 0.5) < 1
    kls = [line["samples/kl"] for line in evaluations]
    assert kls[0] == pytest.approx(0, abs=1e-6) and 0 < kls[1] != kls[2] > 0


# ---------------------------------------------------------------- without a card


@pytest.mark.slow
def test_all_checks_run_to_their_end_on_a_cpu():
    check_on_a_cpu()


def test_some_checks_run_to_their_end_on_a_cpu():
    check_on_a_cpu("kernel or finite or sharded or each_attention")


def check_on_a_cpu(chosen="test"):
    """All that are chosen pass, and none is skipped that needs no card's own thing."""
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    environment |= {"GPU_TESTS_ON": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k",
         f"({chosen}) and not to_their_end"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 9
    assert all("a card's own" in line for line in done.stdout.splitlines() if line.startswith("SKIPPED"))


def test_necessary_operations_by_hand():
    """A prompt of 3 with responses of 2 and 1 tokens; 2 layers of 2 heads of 16, V = 64."""
    model = tiny_of("llama")
    examples = [Example("x", np.arange(3), (np.arange(2), np.arange(1)), {})]
    layer = 4 * 32 * 32 + 3 * 32 * 48  # query, key, value, output; and MLP
    tokens = 6 * 2 * layer  # each once
    pairs = (1 + 2 + 3) + (4 + 5) + 4  # keys that are seen: of the prompt, of each response
    attention = 2 * 2 * 16 * 2 * pairs  # of each a product of query and key, and one with the value
    head = 3 * 64 * 32  # where response tokens are predicted
    one_pass = 2 * (tokens + attention + head)  # a multiplication and an addition
    assert necessary_flops(model, examples, False) == 3 * one_pass
    assert necessary_flops(model, examples * 2, True) == 8 * one_pass  # a reference has no backward
    model.config.num_labels = 1
    judge = AutoModelForSequenceClassification.from_config(model.config)
    score = 6 * 32  # its scalar head, counted at each token
    assert necessary_flops(judge, examples, False) == 3 * (one_pass + 2 * (score - head))


def test_mfu_by_hand(monkeypatch):
    """NVIDIA's datasheet: 989 TFLOP/s in bfloat16 without sparsity."""
    throughput = {"flops": 989e12, "seconds": 4.0}
    monkeypatch.setattr(engine.gpu, "device", lambda: torch.device("cpu"))
    assert gpu_metrics(throughput) == {}
    monkeypatch.setattr(engine.gpu, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    for name, expected in (("NVIDIA H100 80GB HBM3", {"mfu": 0.25}), ("NVIDIA X1", {})):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert gpu_metrics(throughput) == {"memory_gb": 3.0, **expected}


def test_what_attention_costs_by_a_clock(monkeypatch):
    """A clock by which a row of T tokens takes T (a million + 5 T), a shared one T (a million + 20 T)."""
    clock, seen = SimpleNamespace(now=0.0), set()

    def decode(model, inputs):
        height, width = inputs["input_ids"].shape
        cost = 20 if "position_ids" in inputs else 5
        clock.now += 1e-12 * height * width * (10**6 + cost * width)
        clock.now += 0.5 * ((height, width) not in seen)  # at first plans are made
        seen.add((height, width))
        return [torch.zeros(1)]
    monkeypatch.setattr(engine.forward, "decode", decode)
    monkeypatch.setattr(engine.forward, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    separate, shared = measure_attention(tiny_of("llama"), 10**6, False)
    # short rows, of some 40 tokens instead of 0, are what they are compared with
    assert separate == pytest.approx(5, rel=0.05) and shared == pytest.approx(20, rel=0.05)


def test_what_was_measured_stays(run, monkeypatch):
    """A resumed run lays its rows as it began, however fast the card seems then."""
    known, begun = [], {"for": ["a card"]}
    measured = begun | {"attention": [1.5, 4.0], "max_tokens": 777}
    monkeypatch.setattr(trainers, "known_before", lambda measured, config: measured or dict(begun))

    def choose_layouts(*given):
        known.append(dict(given[4]))
        given[4].setdefault("attention", [1.5, 4.0])
        return (SEPARATE,)

    def tokens_that_fit(*given):
        known.append(dict(given[3]))
        return given[3].setdefault("max_tokens", 777)
    monkeypatch.setattr(trainers, "choose_layouts", choose_layouts)
    monkeypatch.setattr(trainers, "tokens_that_fit", tokens_that_fit)
    folder = run(*STEPS, "max_steps=1")
    assert known == [begun, begun | {"attention": [1.5, 4.0]}]
    assert read_state(f"{folder}/LATEST")["measured"] == measured
    run("resume=true", f"run_dir={folder}", "max_steps=2")
    assert known[2:] == [measured] * 2 and read_state(f"{folder}/LATEST")["measured"] == measured


def test_what_was_measured_elsewhere_is_forgotten(monkeypatch):
    """On another card, in another number, with other settings; and on a CPU."""
    config = config_of()
    monkeypatch.setattr(engine.gpu, "device", lambda: torch.device("cpu"))
    assert known_before({"for": []}, config) == {}
    monkeypatch.setattr(engine.gpu, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    known = known_before(None, config) | {"max_tokens": 7}
    assert known_before(known, config) == known
    assert "max_tokens" not in known_before(known, config_of("activation_checkpointing=true"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "L40S")
    assert known_before(known, config) == {"for": ["L40S", *known["for"][1:]]}


def test_an_operation_that_adds_in_any_order_is_found(capsys):
    """By torch's own refusal, here of a model that only says so."""
    model, examples = tiny_of("llama"), random_examples()
    engine.forward.add_in_order(model, response_logps, examples, False)
    assert torch.are_deterministic_algorithms_enabled() and capsys.readouterr().out == ""
    assert all(p.grad is None for p in model.parameters())
    with engine.forward.in_any_order():
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled()
    for message in ("cumsum does not have a deterministic implementation\nbut", "another fault"):
        def refuse(*given, message=message):
            raise RuntimeError(message)
        with contextlib.nullcontext() if "cumsum" in message else pytest.raises(RuntimeError, match=message):
            engine.forward.add_in_order(model, refuse, examples, False)
        assert not torch.are_deterministic_algorithms_enabled()
    assert capsys.readouterr().out == (
        "bits       of a run are others each time: cumsum does not have a deterministic implementation\n")


def test_what_is_known_is_not_measured(monkeypatch):
    """By a model that says that it is on a card."""
    model = tiny_of("llama")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(engine.forward, "why_not_shared", lambda *given: None)
    monkeypatch.setattr(engine.forward, "measure_attention", lambda *given: (1.5, 4.0))
    measured = {}
    for _ in range(2):
        layouts = engine.forward.choose_layouts("auto", [(model, response_logps)], [], False, measured)
        assert [x.quadratic for x in layouts] == [1.5, 4.0] and measured == {"attention": (1.5, 4.0)}
        monkeypatch.setattr(engine.forward, "measure_attention", None)  # is not callable
