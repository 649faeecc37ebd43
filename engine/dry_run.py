"""Will it fit? What each device would hold, counted on tensors without memory: no weights are read."""

import copy
import math
import os
import types

import torch
from torch._subclasses import FakeTensorMode

from engine import first_line
from engine.attention import attention_of
from engine.batches import default_max_tokens
from engine.distributed import decoder_layers, device, from_all, num_ranks, reduce_dtype
from engine.forward import CHUNK_LOGITS, decode, decoder_inputs
from engine.models import load_policy, make_optimizer
from engine.objectives import can_cache
from engine.report import frozen_part, print_lines


def print_dry_run(config, objective, run_data, checkpoint):
    """What each device would hold, how many tokens and steps there are, and how large a checkpoint is.

    checkpoint: of a run that would go on, or None. No weights are read.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    num_devices, replicas = config.world_size or int(os.environ.get("WORLD_SIZE", 1)), config.fsdp["replicas"]
    model = load_policy(config, objective, run_data, checkpoint, torch.device("meta"))
    examples, parts = run_data.train_examples, config.gradient_accumulation_steps
    num_tokens, length = sum(x.num_tokens for x in examples), max(x.row_length for x in examples)
    share = num_tokens / len(examples) * config.batch_size / num_devices  # a device's tokens in a step
    budget = config.max_tokens_per_microbatch or 2**14  # a GPU's
    count, num_rows = max(parts, math.ceil(share / budget)), round(min(budget, share / parts) / length)
    num_rows = max(1, num_rows)
    held = estimate_memory(model, mode, config, num_devices, num_rows, length, count)
    saved = held.pop("checkpoint")
    lines = [("model", f"{config.model}, {run_data.model_config.model_type}, "
                       f"{sum(x.numel() for x in model.parameters()):,} parameters in {config.dtype}, "
                       f"computing in {config.compute_dtype}{frozen_part(model, config)}"),
             ("devices", f"{num_devices}, with {replicas} x {num_devices // replicas} shards of it; on each")]
    in_host = fsdp_in_host(config)
    lines += [("", f"{size / 2**20:>12,.1f} MiB  {name}{' (in the host)' if name in in_host else ''}")
              for name, size in held.items()]
    in_all = sum(size for name, size in held.items() if name not in in_host)
    lines += [("", f"{in_all / 2**20:>12,.1f} MiB  in all, with microbatches of {num_rows:,} x "
                   f"{length:,} tokens")]
    if objective.needs_reference and (config.reference or not config.lora["rank"]):
        waits = config.reference_cache and can_cache(objective)
        lines += [("", f"{held['weights'] / 2**20:>12,.1f} MiB  more for a reference as large, "
                       + ("until its numbers are known" if waits else "which stays"))]
    lines += [("data", f"{len(examples):,} rows and {num_tokens:,} tokens, "
                       f"{math.ceil(len(examples) / config.batch_size):,} steps an epoch; on a device "
                       f"{count:,} microbatches a step"),
              ("checkpoint", f"{saved / 2**20:,.1f} MiB")]
    print_lines(lines)


def estimate_memory(model, mode, config, num_devices, num_rows, length, num_microbatches):
    """Bytes on each of so many devices, {what: bytes}, for a model, of which only the form is read.

    mode: that of the fake tensors to count with. A microbatch has num_rows of `length` tokens, and a device
    so many of them in a step. Activations are what one forward keeps for its backward, counted tensor by
    tensor; with activation checkpointing what follows from that.
    """
    def num_bytes(tensors, shards=1):  # FSDP cuts the first dimension
        return sum(math.ceil(x.shape[0] / shards) * math.prod(x.shape[1:]) * x.element_size()
                   for x in tensors)

    fsdp, weights = config.fsdp, list(model.parameters())
    shards = num_devices // fsdp["replicas"]
    learning = [x for x in weights if x.requires_grad]
    held = {"weights": num_bytes(weights, shards), "gradients": num_bytes(learning, shards),
            "optimizer state": optimizer_bytes(learning, config, shards),
            "checkpoint": num_bytes(learning) + optimizer_bytes(learning, config, 1)}
    bf16 = num_devices == 1 and (config.compute_dtype, config.dtype) == ("bfloat16", "float32")
    bf16 = bf16 and all(x.dim() < 3 for x in weights)  # experts know no autocast without memory
    is_cast = num_devices > 1 or (config.compute_dtype != config.dtype and not bf16)
    computing = fake_copy(model, mode, getattr(torch, config.compute_dtype) if is_cast else None)
    states, activations = saved_by_forward(computing, mode, num_rows, length, bf16)
    layers = decoder_layers(computing)
    inside = {x for layer in layers for x in layer.parameters()}
    if num_devices > 1 and fsdp["reduce_once"] and num_microbatches > 1:
        held["whole gradients"] = sum(x.numel() for x in learning) * reduce_dtype(config.dtype).itemsize
    if num_devices > 1:  # the next layer is gathered while one runs
        sizes = sorted(num_bytes(layer.parameters()) for layer in layers)
        held["gathered weights"] = num_bytes(x for x in computing.parameters() if x not in inside) + sum(
            sizes[-2:] if fsdp["reshard_after_forward"] else sizes)
    if config.activation_checkpointing and layers:  # each layer's input, and one layer's own
        activations = len(layers) * states.numel() * states.element_size() + activations / len(layers)
    held["activations"] = activations
    vocab_size = model.config.get_text_config().vocab_size if model.get_output_embeddings() is not None else 1
    logits = min(num_rows * length * vocab_size, CHUNK_LOGITS["cuda"] + vocab_size)
    size = getattr(torch, config.compute_dtype).itemsize  # then float32, log-probabilities, and gradients
    held["logits"] = logits * (3 * 4 + (2 * size if size < 4 else 0))
    return held


def tokens_that_fit(model, others, config, measured, length, share=0.7) -> int:
    """The budget of a microbatch's tokens: on a GPU what its free memory allows, at most 2**14.

    model: the policy, before it is sharded. others: frozen models that stay beside it. `share` of what is
    free besides their weights, gradients and optimizer state goes to activations, of rows of `length` tokens;
    the rest is for what is not counted. measured: where it is noted, or known from before.
    """
    if device().type == "cpu":
        return default_max_tokens(config.compute_dtype)
    if "max_tokens" not in measured:
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        try:
            held, per_token = memory_of_training(model, others, config, length)
            fitting = max(0, int(share * (free - held) / per_token))
        except Exception as error:  # of a model that does not run on tensors without memory
            print(f"memory     is not estimated, {first_line(error)}")
            fitting = 2**14
        fitting = fitting // 1024 * 1024 or fitting  # not a few tokens more each time
        fitting = min(from_all(min(2**14, fitting)))
        print(f"memory     of a GPU holds microbatches of {fitting:,} tokens" + (
            f", and rows have up to {length:,}: activation_checkpointing=true keeps less"
            if fitting < length else ""))
        measured["max_tokens"] = max(length, fitting)
    return measured["max_tokens"]


def memory_of_training(model, others, config, length) -> tuple[float, float]:
    """Bytes that a GPU holds in any case, and for each token of a microbatch."""
    mode, in_host = FakeTensorMode(allow_non_fake_inputs=True), fsdp_in_host(config)
    one, two = (estimate_memory(model, mode, config, num_ranks(), num_rows, length, 2) for num_rows in (1, 2))
    per_token = (two["activations"] - one["activations"]) / length
    held = sum(size for name, size in one.items() if name not in in_host | {"checkpoint"})
    held -= length * per_token
    if not in_host:
        shards = num_ranks() // config.fsdp["replicas"]
        held += sum(x.numel() * x.element_size() for other in others for x in other.parameters()) / shards
    return held, per_token


def fsdp_in_host(config):
    """What is not on a GPU with fsdp.cpu_offload."""
    return {"weights", "gradients", "optimizer state"} if config.fsdp["cpu_offload"] else set()


def fake_copy(model, mode, dtype=None):
    """The model of fake tensors, its weights of `dtype` or their own, without activation checkpointing."""
    with mode:
        memo = {id(x): torch.nn.Parameter(torch.empty(x.shape, dtype=dtype or x.dtype, device="cpu"),
                                          x.requires_grad) for x in model.parameters()}
        memo |= {id(x): torch.empty(x.shape, dtype=x.dtype, device="cpu") for x in model.buffers()}
        copied = copy.deepcopy(model, memo).eval()  # layers are checkpointed in training only
    copied.set_attn_implementation("sdpa" if copied._supports_sdpa and (
        copied.config._attn_implementation != "eager") else "eager")  # others need a GPU
    return copied


def saved_by_forward(model, mode, num_rows, length, bf16):
    """The decoder's states (num_rows, length, D), and the bytes of all that its forward keeps."""
    own = {x.untyped_storage()._cdata for x in model.parameters()}  # fake storages have no public address
    saved = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # kept, or its address would be used again
        return x

    with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ids = torch.zeros(num_rows, length, dtype=torch.long)
        batch = types.SimpleNamespace(input_ids=ids, segments=None)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), attention_of(model, batch):
            states = decode(model, decoder_inputs(batch))[0]
    return states, sum(storage.nbytes() for storage in saved.values())


def optimizer_bytes(weights, config, shards):
    """What the optimizer would keep for these weights on one of so many shards, in bytes."""
    num_bytes = 0
    for dim in {x.dim() for x in weights}:
        like = torch.nn.Parameter(torch.ones((2, 3, 5, 7, 11)[:dim], dtype=getattr(torch, config.dtype)))
        like.grad = torch.ones_like(like)
        optimizer = make_optimizer([like], config)
        optimizer.step()
        for kept in filter(torch.is_tensor, optimizer.state[like].values()):
            for x in weights:
                sizes = [n if size == own else size for n, size, own in zip(x.shape, kept.shape, like.shape)]
                if kept.shape == like.shape and dim:
                    sizes[0] = math.ceil(sizes[0] / shards)
                num_bytes += math.prod(sizes) * kept.element_size() * (x.dim() == dim)
    return num_bytes
