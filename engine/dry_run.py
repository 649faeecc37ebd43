"""Will it fit? What each device would hold, counted on tensors without memory: no weights are read."""

import math
import os
import types

import torch
from torch._subclasses import FakeTensorMode

from engine.distributed import decoder_layers, reduce_dtype
from engine.forward import CHUNK_LOGITS, decoder_of
from engine.models import load_model, make_optimizer
from engine.objectives import can_cache
from engine.report import print_lines


def print_dry_run(config, objective, run_data, path):
    """What each device would hold, how many tokens and steps there are, and how large a checkpoint is.

    path: where the model's configuration is, whose weights are not read.
    """
    mode = FakeTensorMode()
    num_devices, replicas = config.world_size or int(os.environ.get("WORLD_SIZE", 1)), config.fsdp["replicas"]
    computing = types.SimpleNamespace(
        **vars(config) | {"dtype": config.compute_dtype, "activation_checkpointing": False})
    head = "new scores" if objective.inputs == "scores" else None
    models = [load_model(path, run_data.model_config, settings, run_data.tokenizer, head, mode)
              for settings in (config, computing)]
    examples, parts = run_data.train_examples, config.gradient_accumulation_steps
    num_tokens, length = sum(x.num_tokens for x in examples), max(x.row_length for x in examples)
    share = num_tokens / len(examples) * config.batch_size / num_devices  # a device's tokens in a step
    budget = config.max_tokens_per_microbatch or 2**14  # a GPU's
    count, num_rows = max(parts, math.ceil(share / budget)), round(min(budget, share / parts) / length)
    num_rows = max(1, num_rows)
    held = estimate_memory(*models, mode, config, num_devices, num_rows, length, count)
    saved = held.pop("checkpoint")
    lines = [("model", f"{config.model}, {run_data.model_config.model_type}, "
                       f"{sum(x.numel() for x in models[0].parameters()):,} parameters in {config.dtype}, "
                       f"computing in {config.compute_dtype}"),
             ("devices", f"{num_devices}, with {replicas} x {num_devices // replicas} shards of it; on each")]
    in_host = {"weights", "gradients", "optimizer state"} if config.fsdp["cpu_offload"] else set()
    lines += [("", f"{size / 2**20:>12,.1f} MiB  {name}{' (in the host)' if name in in_host else ''}")
              for name, size in held.items()]
    in_all = sum(size for name, size in held.items() if name not in in_host)
    lines += [("", f"{in_all / 2**20:>12,.1f} MiB  in all, with microbatches of {num_rows:,} x "
                   f"{length:,} tokens")]
    if objective.needs_reference:
        waits = config.reference_cache and can_cache(objective)
        lines += [("", f"{held['weights'] / 2**20:>12,.1f} MiB  more for a reference as large, "
                       + ("until its numbers are known" if waits else "which stays"))]
    lines += [("data", f"{len(examples):,} rows and {num_tokens:,} tokens, "
                       f"{math.ceil(len(examples) / config.batch_size):,} steps an epoch; on a device "
                       f"{count:,} microbatches a step"),
              ("checkpoint", f"{saved / 2**20:,.1f} MiB")]
    print_lines(lines)


def estimate_memory(model, computing, mode, config, num_devices, num_rows, length, num_microbatches):
    """Bytes on each of so many devices, {what: bytes}, for a model of fake tensors.

    computing: the same in compute_dtype, without activation checkpointing. mode: the fake tensors'. A
    microbatch has num_rows of `length` tokens, and a device so many of them in a step. Activations are what
    one forward keeps for its backward, counted tensor by tensor; with activation checkpointing what follows
    from that.
    """
    def num_bytes(tensors, shards=1):  # FSDP cuts the first dimension
        return sum(math.ceil(x.shape[0] / shards) * math.prod(x.shape[1:]) * x.element_size()
                   for x in tensors)

    fsdp, weights = config.fsdp, list(model.parameters())
    shards = num_devices // fsdp["replicas"]
    held = {"weights": num_bytes(weights, shards), "gradients": num_bytes(weights, shards),
            "optimizer state": optimizer_bytes(weights, config, shards),
            "checkpoint": num_bytes(weights) + optimizer_bytes(weights, config, 1)}
    layers = decoder_layers(computing)
    inside = {x for layer in layers for x in layer.parameters()}
    if num_devices > 1 and fsdp["reduce_once"] and num_microbatches > 1:
        held["whole gradients"] = sum(x.numel() for x in weights) * reduce_dtype(config.dtype).itemsize
    if num_devices > 1:  # the next layer is gathered while one runs
        sizes = sorted(num_bytes(layer.parameters()) for layer in layers)
        held["gathered weights"] = num_bytes(x for x in computing.parameters() if x not in inside) + sum(
            sizes[-2:] if fsdp["reshard_after_forward"] else sizes)
    states, activations = saved_by_forward(computing, mode, num_rows, length)
    if config.activation_checkpointing and layers:  # each layer's input, and one layer's own
        activations = len(layers) * states.numel() * states.element_size() + activations / len(layers)
    vocab_size = model.config.get_text_config().vocab_size if model.get_output_embeddings() is not None else 1
    logits = min(num_rows * length * vocab_size, CHUNK_LOGITS + vocab_size)
    held["activations"] = activations + logits * (2 * 4 + states.element_size())  # float32, and its gradient
    return held


def saved_by_forward(model, mode, num_rows, length):
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
        states = decoder_of(model)(input_ids=ids, use_cache=False)[0]
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
