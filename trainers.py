"""How do we step, evaluate, sample, save?"""

import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy,
                                    fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GenerationConfig, LlamaConfig, LogitsProcessor, PreTrainedModel, TopKLogitsWarper,
                          TopPLogitsWarper)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
from transformers.modeling_layers import GradientCheckpointingLayer

from data import (REWARDS, SEPARATE, InputError, Layout, collate, deal, first_line, microbatches, stream,
                  train_tokenizer)
from losses import OBJECTIVES

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process needs none
START = time.monotonic()  # max_hours counts from here
TIMEOUT = datetime.timedelta(minutes=30)  # a rank waits for the others no longer
COUNTERS = ("step", "examples", "iteration", "first_step", "first_examples")  # where a checkpoint stands
ATTENTION_COST = 3.0  # a multiply-add in attention against one in a matrix product, by the clock
REFERENCE = ("reference_chosen_logps", "reference_rejected_logps")  # columns, where they are computed once
CHUNK_LOGITS = 2**24  # how many logits of a model exist at once

# ---------------------------------------------------------------- ranks: on one process these do nothing


def start_ranks():
    """Joins the processes that torchrun started, if they are several. Only what the first prints is shown."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torchrun keeps one machine's store when it starts the ranks again, and what the dead ones wrote there
    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", store=store, rank=number,
                            world_size=count, timeout=TIMEOUT)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    wait_for_all()  # none goes on, and writes, before all have read what was there


def leave_ranks():
    if dist.is_initialized():
        dist.destroy_process_group()


def num_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def device():
    """Where this rank computes."""
    has_gpu = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")


def from_all(value):
    """A list of every rank's value, on all of them."""
    values = [value] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def from_first(value):
    """The first rank's value, on all."""
    values = [value]
    if num_ranks() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def sum_over_ranks(values):
    """Sums of each of a list of numbers, in float64."""
    total = torch.tensor(values, dtype=torch.float64)
    if num_ranks() > 1:
        dist.all_reduce(total)
    return total.tolist()


def wait_for_all(group=None):
    if num_ranks() > 1:
        dist.all_reduce(torch.zeros(1), group=group)


def refused_by_all(function):
    """Makes an InputError that one rank raises in a function one of all ranks, or the others would wait."""
    @functools.wraps(function)
    def wrapped(*arguments, **options):
        result = message = None
        try:
            result = function(*arguments, **options)
        except InputError as error:
            message = str(error)
            if num_ranks() == 1:
                raise
        if message := next(filter(None, from_all(message)), None):
            raise InputError(message)
        return result
    return wrapped


@contextlib.contextmanager
def all_cores():
    """While the others wait the first rank computes with all cores, where torchrun gave it one."""
    num_threads = torch.get_num_threads()
    if num_ranks() > 1:
        torch.set_num_threads(os.cpu_count())
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@functools.cache  # each mesh opens connections of its own
def device_mesh(replicas):
    return init_device_mesh(device().type, (replicas, num_ranks() // replicas),
                            mesh_dim_names=("replicas", "shards"))


def spread(model, config):
    """The model sharded over all ranks by FSDP2, with the first rank's weights; what it is made from stays.

    Each layer is gathered when it runs; what is outside of the layers (embeddings, last norm, head) from
    `within` to the end of the backward.
    """
    sharded = model if num_ranks() == 1 else hollow(model)
    if config.compile:
        compile_layers(sharded)
    if num_ranks() == 1:
        return model
    fsdp = config.fsdp
    mesh = device_mesh(fsdp["replicas"])
    options = {
        "mesh": mesh if fsdp["replicas"] > 1 else mesh["shards"],
        "mp_policy": MixedPrecisionPolicy(getattr(torch, config.compute_dtype), reduce_dtype(config)),
        "offload_policy": CPUOffloadPolicy() if fsdp["cpu_offload"] else OffloadPolicy()}
    for layer in decoder_layers(sharded):
        fully_shard(layer, reshard_after_forward=fsdp["reshard_after_forward"], **options)
    fully_shard(sharded, reshard_after_forward=False, **options)
    sharded.to_empty(device="cpu" if fsdp["cpu_offload"] else device())
    sharded.tie_weights()
    set_model_state_dict(sharded, model.state_dict() if rank() == 0 else {},
                         options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    buffers = dict(model.named_buffers(remove_duplicate=False)) if rank() == 0 else {}
    buffers = from_first({name: buffer.cpu() for name, buffer in buffers.items()})
    for name, buffer in buffers.items():  # rotary frequencies are in no state dict
        parent, _, name = name.rpartition(".")
        sharded.get_submodule(parent)._buffers[name] = buffer.to(device())
    sharded.within = lambda read: read()
    register_fsdp_forward_method(sharded, "within")
    return sharded


def hollow(model):
    """A copy of a model on the meta device."""
    memo = {id(x): torch.nn.Parameter(x.to("meta"), x.requires_grad) for x in model.parameters()}
    memo |= {id(x): x.to("meta") for x in model.buffers()}
    return copy.deepcopy(model, memo)


def reduce_dtype(config):
    """Gradients cross ranks in float32 at least."""
    return torch.promote_types(getattr(torch, config.dtype), torch.float32)


def sync_gradients(model, is_last):
    """Whether the next backward reduces the gradients over ranks, or adds them up where they are."""
    model.set_requires_gradient_sync(is_last)
    model.set_is_last_backward(is_last)


def within(model, read):
    """read(), with what is outside of a sharded model's layers gathered until the backward has ended."""
    return model.within(read) if isinstance(model, FSDPModule) else read()


@contextlib.contextmanager
def gathered(model, config):
    """While it lasts a rank may run a sharded model by itself: each holds all weights. Yields whether not:

    where they do not fit into a device's memory, and generate() must keep the ranks in step instead.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules or not fits_whole(model, config):
        yield bool(modules)
        return
    model.set_reshard_after_forward(False)
    try:
        for module in modules:
            module.unshard()
        yield False
    finally:
        for module in modules:
            module.reshard()
        model.set_reshard_after_forward(config.fsdp["reshard_after_forward"])
        model.set_reshard_after_forward(False, recurse=False)  # the root, as before


def fits_whole(model, config):
    """Whether half of the memory that is free on every rank's GPU holds all weights."""
    if device().type == "cpu":
        return True
    num_bytes = sum(x.numel() for x in model.parameters()) * getattr(torch, config.compute_dtype).itemsize
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return all(from_all(2 * num_bytes < torch.cuda.mem_get_info()[0] + unused))


def whole(tensor):
    """A sharded tensor, or any other, with all that it has; all ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model, copied=False):
    """A model's state dict on the CPU, on the first rank; the others, which ask too, get an empty one.

    copied: sharing no memory with the model.
    """
    tensors, state = {}, {}  # tied weights are one tensor
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in tensors:
            values = whole(tensor.detach())
            is_own = copied and not isinstance(tensor, DTensor)
            tensors[id(tensor)] = values.to("cpu", copy=is_own) if rank() == 0 else None
        state[name] = tensors[id(tensor)]
    return state if rank() == 0 else {}


# ---------------------------------------------------------------- models and tokenizers


def load_tokenizer(path, rows, config):
    """The tokenizer at `path`, a hub id or folder, or for `tiny` one trained on the rows.

    Raises InputError where there is none, or none with the special tokens that the run needs.
    """
    with refusing(f"the tokenizer of {path}"):
        tokenizer = train_tokenizer(rows) if path == "tiny" else AutoTokenizer.from_pretrained(
            path, trust_remote_code=config.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {path} has no end-of-sequence token, which closes every "
                         "response: name one in its tokenizer_config.json, or choose another by tokenizer=")
    if config.add_bos and tokenizer.bos_token_id is None:
        raise InputError(f"add_bos=true, but the tokenizer of {path} has no begin-of-sequence token")
    return tokenizer


def load_model_config(path, config, tokenizer):
    """The model's own configuration with every dropout at 0, and what those were. Reads no weights."""
    if path == "tiny":
        model_config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256,
                                   num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048,
                                   bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                                   pad_token_id=tokenizer.pad_token_id)
    else:
        with refusing(f"the model {path}"):
            model_config = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    dropouts = {}
    for part in {id(part): part for part in (model_config, model_config.get_text_config())}.values():
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float | int) and value > 0:
                dropouts[name] = value
                setattr(part, name, type(value)(0))
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise InputError(f"max_length={config.max_length} is beyond the {positions} positions of {path}: "
                         "lower max_length, or choose another model")
    return model_config, dropouts


@refused_by_all
def load_model(path, model_config, config, tokenizer, head=None, blank=None):
    """The causal language model at `path`, on this run's device. Raises InputError if it is not whole.

    Of several ranks the first reads it, into the host's memory, and the others get it on the meta device.
    blank: a context, as a device or a mode, in which to make the model from its configuration alone.
    head: None; or `scores` for a reward model, with a scalar head in the language model's place; or
    `new scores`, which also takes a model without such a head and gives it one.
    """
    auto_class = AutoModelForCausalLM
    blank = blank or (torch.device("meta") if rank() > 0 else None)
    if head:
        auto_class = AutoModelForSequenceClassification
        model_config.num_labels = 1
        pad = tokenizer.pad_token_id  # None is right for one text at a time, and refused by batches of them
        model_config.pad_token_id = None if pad == tokenizer.eos_token_id else pad
    options = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attention,
               "trust_remote_code": config.trust_remote_code}
    with refusing(f"the model {path}"):
        if blank:
            with blank:
                model = auto_class.from_config(model_config, **options)
        elif path == "tiny":
            model = auto_class.from_config(model_config, **options)
        else:
            model, info = auto_class.from_pretrained(path, config=model_config, output_loading_info=True,
                                                     **options)
            if not head and any(name.startswith("score.") for name in info["unexpected_keys"]):
                raise ValueError("it is a reward model, without a language model's head")
            absent = {*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])}
            if head == "scores" and "score.weight" in absent:
                raise ValueError("it is no reward model, it has no scalar head: train one by loss=rm")
            if absent := sorted(absent - ({"score.weight"} if head == "new scores" else set())):
                raise ValueError(f"{len(absent)} weights are missing or of another shape, first {absent[0]}")
    if head and not hasattr(model, "score"):
        raise InputError(f"{path}, {model_config.model_type}, has no scalar head on a causal model: choose "
                         "another architecture")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, more than the embeddings of {path}: "
                         "choose the tokenizer that belongs to the model")
    if num_ranks() == 1 and not blank:
        model = model.to(device())
    if not blank and (num_ranks() == 1 or "flash" not in (config.attention or "")):  # not on a CPU
        check_causal(model, path)
    if config.activation_checkpointing:
        with refusing(f"the model {path} with activation_checkpointing"):
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model


@torch.no_grad()
def check_causal(model, path):
    """Refuses a model whose predictions depend on later tokens: its log-probabilities mean nothing here."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 8, 7, 6, 5]], device=model.device)
    ids %= model.config.vocab_size
    first, second = model.eval().base_model(input_ids=ids, use_cache=False)[0][:, :4].float()
    if not torch.allclose(first, second, atol=1e-2):
        raise InputError(f"{path} is no causal language model, what it predicts depends on later tokens: "
                         "choose one that is")


def load_end_ids(path, model_config, tokenizer):
    """Ids that end a response: the tokenizer's end token, then those of the model's generation config."""
    generation_config = GenerationConfig.from_model_config(model_config)
    if path != "tiny":
        with contextlib.suppress(OSError):  # it has none of its own
            generation_config = GenerationConfig.from_pretrained(path)
    more = generation_config.eos_token_id
    more = more if isinstance(more, list) else [more]
    return [tokenizer.eos_token_id, *(i for i in more if isinstance(i, int) and i != tokenizer.eos_token_id)]


def check_same_tokenizer(key, path, tokenizer, config):
    """Token ids mean nothing to a model with another vocabulary: refuses the one that `key` names."""
    if os.path.isdir(path) and not any(name.startswith("tokenizer") for name in os.listdir(path)):
        return  # weights without a tokenizer are taken at their word
    with refusing(f"the tokenizer of {key}={path}"):
        other = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    if other.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"{key}={path} has another tokenizer than the model: choose one with the same, or "
                         "start the model from scratch with tokenizer= that of the other")


def fingerprint(model):
    """sha256 over the model's weights: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = whole(tensor)
        if rank() == 0:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return from_first(digest.hexdigest())


@contextlib.contextmanager
def refusing(what):
    """Turns what transformers raises while it loads from a folder or the hub into one sentence."""
    try:
        yield
    except Exception as error:  # of any kind: a config.json can be wrong in many ways
        raise InputError(f"{what} cannot be loaded: {first_line(error)}") from error


# ---------------------------------------------------------------- optimizer


def optimizer_names():
    """The torch.optim classes whose step needs neither a closure nor sparse gradients."""
    base = torch.optim.Optimizer
    return sorted(name for name, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, base)
                  and c not in (base, torch.optim.LBFGS, torch.optim.SparseAdam))


def make_optimizer(parameters, config):
    """The torch.optim class that the config names. Raises InputError for an unknown name or argument."""
    if config.optimizer not in optimizer_names():
        raise InputError(f"optimizer={config.optimizer} is not one of {', '.join(optimizer_names())}")
    optimizer_class = getattr(torch.optim, config.optimizer)
    known = {parameter.name: parameter.default
             for parameter in inspect.signature(optimizer_class).parameters.values()
             if parameter.name not in ("params", "lr")}
    for name, value in config.optimizer_args.items():
        if name not in known:
            raise InputError(f"optimizer_args.{name} is no argument of {config.optimizer}, which has "
                             f"{', '.join(known)}")
        if isinstance(known[name], bool) and not isinstance(value, bool):
            raise InputError(f"optimizer_args.{name}={value!r} is not allowed: it must be true or false")
    options = config.optimizer_args
    has_fused = "fused" in known and (num_ranks() == 1 or "Adam" in config.optimizer)  # of shards no others
    if has_fused and not {"fused", "foreach", "differentiable"} & options.keys():
        options = options | {"fused": True}
    try:
        return optimizer_class(parameters, lr=config.lr, **options)
    except Exception as error:
        raise InputError(f"{config.optimizer} with {config.optimizer_args} is refused: {error}") from error


def check_optimizer(config):
    """Takes one step on a small matrix, for many wrong arguments show only there. Raises InputError.

    On several ranks the matrix is sharded, which not every optimizer can.
    """
    matrix = torch.ones(2, 2)
    if num_ranks() > 1:
        matrix = distribute_tensor(matrix.to(device()), device_mesh(config.fsdp["replicas"])["shards"],
                                   [Shard(0)])
    weight = torch.nn.Parameter(matrix)
    weight.grad = torch.ones_like(matrix)
    optimizer = make_optimizer([weight], config)
    try:
        optimizer.step()
    except Exception as error:
        where = " on sharded weights" if num_ranks() > 1 else ""
        raise InputError(f"{config.optimizer} with {config.optimizer_args} is refused{where}: "
                         f"{first_line(error)}") from error


def learning_rate(step, num_steps, lr, config):
    """The rate of the step that follows `step` finished ones: linear warmup to lr, then the schedule."""
    warmup = config.warmup_steps
    rate = lr * min(1, (step + 1) / (warmup + 1))
    if config.lr_schedule == "constant" or step <= warmup:
        return rate
    left = (num_steps - step) / (num_steps - warmup)
    return rate * (left if config.lr_schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def as_steps(interval, num_rows, batch_size):
    """An interval in optimizer steps, from steps or (below 1) a fraction of an epoch; 0 stays 0: never."""
    is_fraction = 0 < interval < 1
    return max(1, round(interval * num_rows / batch_size)) if is_fraction else int(interval)


# ---------------------------------------------------------------- what a device would hold


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
        held["whole gradients"] = sum(x.numel() for x in weights) * reduce_dtype(config).itemsize
    if num_devices > 1:  # the next layer is gathered while one runs
        sizes = sorted(num_bytes(layer.parameters()) for layer in layers)
        held["gathered weights"] = num_bytes(x for x in computing.parameters() if x not in inside) + sum(
            sizes[-2:] if fsdp["reshard_after_forward"] else sizes)
    own, saved = {x.untyped_storage()._cdata for x in computing.parameters()}, {}

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # kept, or its address would be used again
        return x
    with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ids = torch.zeros(num_rows, length, dtype=torch.long)
        states = decoder_of(computing)(input_ids=ids, use_cache=False)[0]
    activations = sum(storage.nbytes() for storage in saved.values())
    if config.activation_checkpointing and layers:  # each layer's input, and one layer's own
        activations = len(layers) * states.numel() * states.element_size() + activations / len(layers)
    vocab_size = model.config.get_text_config().vocab_size if model.get_output_embeddings() is not None else 1
    logits = min(num_rows * length * vocab_size, CHUNK_LOGITS + vocab_size)
    held["activations"] = activations + logits * (2 * 4 + states.element_size())  # float32, and its gradient
    return held


# ---------------------------------------------------------------- the loop


class Stopped(Exception):
    """A signal or max_hours asks for the end; raised between steps and between evaluation batches."""


class Trainer:
    """One run: the policy, its objective and optimizer, and the folder that keeps it.

    data_fingerprint: of train_examples' rows, for a resumed run must go on with the same.
    sample_examples: the examples whose prompts are answered in each evaluation.
    policy, reference, reward_model: as load_model gives them; the reference may be the policy itself, as it
    is now. The last judges samples, as does dataset, the data.Dataset whose rewards are known, or None.
    load_reference: makes the reference again, which leaves the memory once its numbers are known.
    checkpoint: the folder to go on from, whose weights `policy` has, or None.

    A run is one iteration over the data. Self-play has several, each over pairs of its own: data_examples are
    what the data give, train_examples what this iteration trains on, and it began at first_step. Before the
    first there is iteration -1, with nothing to train on.
    """

    def __init__(self, config, policy, reference, tokenizer, end_ids, train_examples, data_fingerprint,
                 eval_examples, sample_examples, dataset=None, reward_model=None, checkpoint=None,
                 load_reference=None):
        self.config = config
        self.objective = OBJECTIVES[config.loss]
        self.policy, self.reference, self.reward_model = policy, reference, reward_model
        self.tokenizer, self.end_ids = tokenizer, end_ids
        self.data_examples, self.train_examples = train_examples, train_examples
        self.eval_examples, self.sample_examples = eval_examples, sample_examples
        self.dataset, self.load_reference = dataset, load_reference
        self.step = self.examples = self.iteration = self.first_step = self.first_examples = 0
        self.next_batches = {}  # (iteration, position): train_batches of the step that begins there
        if self.objective.self_play:
            self.iteration, self.train_examples = -1, []
        self.precise = False  # while the layouts are compared
        with all_cores():
            self.layouts = from_first(self.choose_layouts())
        self.policy_shell, self.reference_shell = hollow(policy), reference and hollow(reference)
        if reference is policy and num_ranks() == 1:
            reference = copy.deepcopy(policy)
        self.policy = spread(policy, config).train()
        self.reference = reference and spread(reference, config).eval().requires_grad_(False)
        self.reward_model = reward_model and spread(reward_model, config).eval().requires_grad_(False)
        self.fingerprints = {"data": data_fingerprint, "reference": reference and fingerprint(self.reference),
                             "reward_model": reward_model and fingerprint(self.reward_model)}
        self.optimizer = make_optimizer(self.policy.parameters(), config)
        self.saved_step = self.save_in_progress = self.saver = self.save_group = None
        if config.async_save:
            self.saver = concurrent.futures.ThreadPoolExecutor(1)
            self.save_group = dist.new_group(backend="gloo", timeout=TIMEOUT) if num_ranks() > 1 else None
        self.stop = None  # signal number, or "max_hours"
        self.throughput = collections.Counter()  # since the last logged step
        self.wandb = None
        self.reference_samples = self.reference_scores = None
        self.evaluated_steps = set()
        if checkpoint:
            self.restore(checkpoint)

    @refused_by_all
    def choose_layouts(self):
        """The layouts that microbatches may have: separate rows, shared ones, or the cheaper each time.

        Costs are multiply-adds of a token's forward, those in attention weighted by how much slower they are.
        """
        if self.config.layout == "separate" or rank() > 0:  # which has no weights yet
            return (SEPARATE,)
        read = self.response_scores if self.objective.inputs == "scores" else self.response_logps
        reference = None if self.reference is self.policy else self.reference
        models = [(self.policy, read), (reference, read), (self.reward_model, self.response_scores)]
        reason = next(filter(None, (self.why_not_shared(*pair) for pair in models if pair[0])), None)
        if reason and self.config.layout == "shared":
            raise InputError(f"layout=shared is not possible with this model, {reason}: use layout=auto")
        if reason:
            print(f"layout     separate, {reason}")
            return (SEPARATE,)
        config = self.policy.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = ATTENTION_COST * config.num_hidden_layers * config.num_attention_heads * head_dim
        heads = {self.policy.get_input_embeddings().weight}  # and the output's, run on responses alone
        if self.policy.get_output_embeddings() is not None:
            heads.add(self.policy.get_output_embeddings().weight)
        linear = sum(parameter.numel() for parameter in self.policy.parameters() if parameter not in heads)
        shared = Layout(True, linear, 2 * attention)
        return (shared,) if self.config.layout == "shared" else (Layout(False, linear, attention), shared)

    @torch.no_grad()
    def why_not_shared(self, model, read):
        """Why shared rows give this model other numbers than separate ones, or None: tried on real examples.

        In float32 the log-probabilities must agree, and those of one response must not move with another's
        tokens: of the longest example in a row of its own, and of the two shortest, in one if they fit.
        """
        def backwards(example, k):
            responses = list(example.responses)[:1] + [example.responses[-1]]
            responses[k] = responses[k][::-1].copy()
            return dataclasses.replace(example, responses=tuple(responses), columns={})
        ordered = sorted([*self.data_examples, *self.eval_examples], key=lambda example: example.num_tokens)
        pairs = [backwards(example, 1) for example in (ordered[-1], *ordered[:2])]
        others = [backwards(pair, 0) for pair in pairs[:2]] + pairs[2:]
        model.eval()
        self.precise = True
        narrow = [x for x in (*model.parameters(), *model.buffers()) if x.dtype == torch.bfloat16]
        for x in narrow:
            x.data = x.data.float()
        try:
            apart, together, moved = (
                read(model, collate(rows, layout=Layout(shared)).to(model.device))
                for rows, shared in ((pairs, False), (pairs, True), (others, True)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model may refuse positions or masks in its own way
            return f"which does not take shared prompts: {first_line(error)}"
        finally:
            for x in narrow:
                x.data = x.data.bfloat16()  # just what it was
            self.precise = False
            model.train(model is self.policy)
        scale = apart.abs().clamp(min=1)
        error = ((together - apart).abs() / scale).max().item()
        if not error < 1e-4:
            return f"whose numbers in shared rows are off by {error:.1e}"
        change = (together - moved).abs() / scale
        leak = max(change[1].max().item(), change[:, 2:].amax(0).sum().item())
        return f"in which one response sees another (by {leak:.1e})" if leak > 1e-5 else None

    def setting(self, name, default=None, loss=None):
        """A key of the loss's config block; of a list with a value per iteration, this iteration's."""
        value = getattr(self.config, loss or self.config.loss, {}).get(name)
        value = value[self.iteration] if isinstance(value, list) else value
        return default if value is None else value

    @property
    def last_step(self):
        """The number of the optimizer step with which this iteration ends, or max_steps."""
        left = math.ceil((self.num_positions(len(self.train_examples)) - self.position)
                         / self.config.batch_size)
        last = self.step + max(0, left)
        return last if self.config.max_steps is None else min(last, self.config.max_steps)

    @property
    def position(self):
        """How many examples this iteration has used."""
        return self.examples - self.first_examples

    def num_positions(self, num_rows):
        """How many examples all epochs use; rounded first, for 0.1 * 30 is 3.0000000000000004."""
        return math.ceil(round(self.config.num_epochs * num_rows, 6))

    @property
    def num_steps(self):
        """Optimizer steps of the whole run; of iterations to come at most, as some pairs will be dropped."""
        iterations = self.setting("iterations", 1)
        total, mixed = self.last_step, bool(self.setting("mix_previous"))
        for iteration in range(self.iteration + 1, iterations):
            num_rows = len(self.data_examples) * (1 + (mixed and iteration > 0))
            total += math.ceil(self.num_positions(num_rows) / self.config.batch_size)
        return total if self.config.max_steps is None else min(total, self.config.max_steps)

    @property
    def is_finished(self):
        limit = math.inf if self.config.max_steps is None else self.config.max_steps
        last_iteration = self.iteration + 1 >= self.setting("iterations", 1)
        return self.step >= limit or last_iteration and self.step >= self.last_step

    def train(self):
        """Runs to the end or until asked to stop; returns None, the signal's number or "max_hours"."""
        with self.catch_signals(), progress(None, "", total=self.num_steps, initial=self.step, unit="step",
                                            leave=True) as bar:
            try:
                self.fill_in_rewards()
                self.fill_in_reference()
                while True:
                    self.check_stop()
                    if self.eval_is_due():
                        self.evaluate()
                    if self.save_is_due():
                        self.save()
                    if self.is_finished:
                        break
                    if self.step >= self.last_step:
                        self.next_iteration()
                        bar.total = self.num_steps
                        continue
                    metrics = self.train_step()
                    if self.log_is_due():
                        self.log("train", metrics)
                    bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("loss", "rewards/accuracies")
                                     if name in metrics}, refresh=False)
                    bar.update()
            except Stopped:
                if self.saved_step != self.step:
                    self.save()
            except InputError:  # as of a reference that has gone
                if self.step > (self.saved_step or 0):
                    self.save()
                raise
            finally:
                self.finish_save()
        if self.wandb:
            self.wandb.finish()
        return self.stop

    # ------------------------------------------------------------ what is due

    def eval_is_due(self):
        if not self.eval_examples or self.step in self.evaluated_steps:
            return False
        if self.config.max_steps == 0:
            return True
        every = as_steps(self.config.eval_every, len(self.data_examples), self.config.batch_size)
        if every == 0 or self.step == 0:
            return every > 0 and self.config.eval_first
        return self.step % every == 0 or self.step == self.last_step

    def save_is_due(self):
        if self.step == self.saved_step or self.step == 0 and not self.objective.self_play:
            return False
        every = as_steps(self.config.save_every, len(self.data_examples), self.config.batch_size)
        return self.step == self.last_step or every > 0 and self.step % every == 0

    def log_is_due(self):
        return self.step % self.config.log_every == 0

    @contextlib.contextmanager
    def catch_signals(self):
        """SIGTERM and SIGINT ask for a stop at the next step; a second SIGINT stops at once."""
        def ask(number, frame):
            self.stop = self.stop or number
            signal.signal(signal.SIGINT, signal.default_int_handler)
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check_stop(self):
        """Raises Stopped on all ranks, where one of them has been asked to stop."""
        if self.config.max_hours is not None and time.monotonic() - START > 3600 * self.config.max_hours:
            self.stop = self.stop or "max_hours"
        if self.save_in_progress and self.save_in_progress.done():
            self.finish_save()  # it may have failed
        self.stop = next(filter(None, from_all(self.stop)), None)
        if self.stop:
            raise Stopped

    # ------------------------------------------------------------ one step

    def train_step(self):
        """One optimizer step on the global batch; returns its metrics, computed before the update.

        Raises FloatingPointError, with the examples, if the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        examples, batches = self.next_batches.pop((self.iteration, self.position), None) or (
            self.train_batches(self.position))
        denominator = self.denominator(examples)
        self.optimizer.zero_grad(set_to_none=True)
        sums = self.accumulate(batches, denominator, backward=True)
        limit = float("inf") if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit)
        following = self.position + len(examples)  # its batches are made while the device is at work
        self.next_batches = {(self.iteration, following): self.train_batches(following)}
        norm = whole(norm).to(device(), torch.float64)
        *values, grad_norm = torch.stack([*sums.values(), norm]).tolist()  # the step's one wait for it
        metrics = means(sums, values, denominator, len(examples)) | {"grad_norm": grad_norm}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise FloatingPointError(self.describe_failure(metrics, examples, batches))
        metrics["lr"] = learning_rate(self.step - self.first_step, self.last_step - self.first_step,
                                      self.setting("lr", self.config.lr), self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = metrics["lr"]
        self.optimizer.step()
        self.step += 1
        self.examples += len(examples)
        metrics |= self.place()
        self.throughput += collections.Counter(
            examples=len(examples), tokens=sum(example.num_tokens for example in examples),
            seconds=time.perf_counter() - started)
        return metrics

    def train_batches(self, position):
        """The examples of the step that begins at a position of the iteration's stream; this rank's Batches.

        Each rank gets as many Batches as the others, and nearly as many tokens.
        """
        stop = min(position + self.config.batch_size, self.num_positions(len(self.train_examples)))
        rows = stream(len(self.train_examples), position, stop,
                      seed=self.config.seed + 7_368_787 * self.iteration, shuffle=self.config.shuffle)
        examples = [self.train_examples[row] for row in rows]
        cuts = [self.cut(hand, self.config.gradient_accumulation_steps, self.config.max_tokens_per_microbatch)
                for hand in deal(examples, num_ranks())]
        idle = (examples[-1:], SEPARATE, True)  # keeps pace, and counts nowhere
        mine = cuts[rank()] + [idle] * (max(map(len, cuts)) - len(cuts[rank()]))
        return examples, [self.collate(*cut) for cut in mine]

    def place(self):
        """Where in its iteration the run stands."""
        place = {"epoch": self.position / max(1, len(self.train_examples))}
        return place | ({"iteration": max(0, self.iteration)} if self.objective.self_play else {})

    def accumulate(self, batches, denominator, backward=False):
        """Sums over the examples of this rank's Batches: {name: 0-d float64 tensor}, `loss` first.

        With backward the gradient of the mean loss, over the global batch's denominator, is added to .grad.
        """
        sums = collections.defaultdict(float)
        for number, batch in enumerate(batches, 1):
            losses, metrics = self.losses(batch)
            if backward:
                if num_ranks() > 1:
                    sync_gradients(self.policy, number == len(batches) or not self.config.fsdp["reduce_once"])
                (losses.sum() * (0 if batch.is_idle else num_ranks()) / denominator).backward()
            for name, value in {"loss": losses.detach(), **metrics}.items():
                sums[name] += value.double().sum() * (not batch.is_idle)
        return sums

    def loss_name(self, examples):
        """The name of the loss of these examples: the config's; in self-play, of rows as in the data, sft."""
        return "sft" if self.objective.self_play and len(examples[0].responses) == 1 else self.config.loss

    def denominator(self, examples):
        name = self.loss_name(examples)
        if self.setting("average", OBJECTIVES[name].average, name) == "tokens":
            return sum(len(response) for example in examples for response in example.responses)
        return len(examples)

    def losses(self, batch):
        """The losses (B,) and metrics of a Batch, in one forward of each model that has to run."""
        name = self.loss_name(batch.examples)
        objective = OBJECTIVES[name]
        parameters = inspect.signature(objective.loss).parameters
        options = {key: self.setting(key, loss=name) for key in getattr(self.config, name, {})
                   if key in parameters}
        options |= {key: batch.columns[key] for key in objective.columns}
        if objective.inputs == "logits":
            return self.distribution_losses(batch, functools.partial(objective.loss, **options))
        read = self.response_scores if objective.inputs == "scores" else self.response_logps
        values = [*read(self.policy, batch)]
        if objective.needs_reference and REFERENCE[0] in batch.columns:
            values += [batch.columns[key] for key in REFERENCE[:1 + objective.needs_pairs]]
        elif objective.needs_reference:
            with torch.no_grad():
                values += read(self.reference, batch)
        losses, metrics = objective.loss(*values, **options)
        if name == self.config.loss and objective.self_play:
            metrics |= {"generated/length": batch.columns["rejected_length"],
                        "generated/finished": batch.columns["finished"]}
        return losses, metrics

    def response_logps(self, model, batch):
        """Summed log-probabilities (K, B) of a Batch's responses, in float32 (float64 models: float64)."""
        def read(logits, targets):
            return [-F.cross_entropy(logits, targets, reduction="none")]
        return self.sum_over_tokens([model], batch, read)[0]

    def response_scores(self, model, batch):
        """A reward model's scores (K, B) of a Batch's responses: its head at each one's last token."""
        with self.autocast(), shared_attention(model, batch):
            states = within(model, lambda: model.base_model(**model_inputs(batch))[0])
        hidden = as_float(states.flatten(0, 1)[batch.ends])  # (K * B, D)
        head = model.score  # read in float32, for of bfloat16 scores many would be equal
        scores = F.linear(hidden, head.weight.to(hidden.dtype), head.bias)
        return scores.view(-1, len(batch.examples))

    def sum_over_tokens(self, models, batch, read):
        """Sums over each response's tokens, (K, B), of what `read` makes of the models' logits there.

        read(logits (n, V) of each model ..., targets (n,)) -> tensors (n,). Of many logits (N, V) only those
        of a chunk of tokens exist at once: made when they are read, and, of several chunks, again in the
        backward.
        """
        outputs = []
        for model in models:
            with self.autocast(), shared_attention(model, batch), self.gradients(model):
                outputs.append(decode(model, model_inputs(batch)))
        states = [output[0].flatten(0, 1)[batch.states] for output in outputs]  # (N, D) each

        def read_chunk(targets, *hidden):
            logits = []
            for model, output, part in zip(models, outputs, hidden):
                with self.autocast(), self.gradients(model):
                    logits.append(as_float(run_head(model, output, part)))
            width = min(x.shape[-1] for x in logits)  # embeddings are padded beyond the tokens that all have
            return tuple(read(*(x if x.shape[-1] == width else x[:, :width] for x in logits), targets))

        size = max(1, CHUNK_LOGITS // self.policy.config.get_text_config().vocab_size)
        chunks = list(zip(batch.targets.split(size), *(x.split(size) for x in states)))
        if len(chunks) > 1 and torch.is_grad_enabled():
            # reentrant: each chunk adds its (V, D) gradient in place
            read_chunk = functools.partial(checkpoint, read_chunk, use_reentrant=True,
                                           preserve_rng_state=False)
        values = [torch.cat(parts) for parts in zip(*itertools.starmap(read_chunk, chunks))]  # (N,) each
        sums = (torch.segment_reduce(value, "sum", lengths=batch.lengths, unsafe=True) for value in values)
        return [x.view(-1, len(batch.examples)) for x in sums]  # index_add has no fixed order on a GPU

    def distribution_losses(self, batch, loss):
        """A loss of both models' logits at each response token, summed by response: losses (B,), metrics."""
        names = []

        def read(*logits_and_targets):
            losses, metrics = loss(*logits_and_targets)
            names[:] = metrics
            return [losses, *metrics.values()]
        losses, *metrics = (x[0] for x in self.sum_over_tokens([self.policy, self.reference], batch, read))
        return losses, dict(zip(names, metrics))

    def gradients(self, model):
        return torch.set_grad_enabled(torch.is_grad_enabled() and model is self.policy)

    def autocast(self):
        """bfloat16 arithmetic on float32 weights, if the config asks for it."""
        types = self.config.compute_dtype, self.config.dtype
        enabled = types == ("bfloat16", "float32") and not self.precise and num_ranks() == 1
        return torch.autocast(device().type, torch.bfloat16, enabled=enabled)  # FSDP has its own

    def describe_failure(self, metrics, examples, batches):
        self.finish_save()
        bad = []
        with torch.no_grad():
            for batch in batches:
                finite = self.losses(batch)[0].isfinite().tolist()
                bad += [example.where for example, fine in zip(batch.examples, finite)
                        if not (fine or batch.is_idle)]
        bad = sum(from_all(bad), [])
        what = "the examples whose loss is not finite" if bad else "each example's loss is finite; the batch"
        bad = bad or [example.where for example in examples]
        numbers = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        saved = "nothing is saved yet" if self.saved_step is None else f"step {self.saved_step} is saved"
        return (f"step {self.step + 1}: {numbers}; {what}: {', '.join(bad)}. The weights were not touched, "
                f"{saved}. A lower lr may help.")

    # ------------------------------------------------------------ evaluation and samples

    @torch.no_grad()
    def evaluate(self):
        """Metrics over the held-out examples, then samples; changes neither weights nor random state."""
        self.policy.eval()
        denominator = self.denominator(self.eval_examples)
        sums = self.accumulate(self.eval_batches(self.eval_examples, "evaluating"), denominator)
        values = torch.stack(list(sums.values())).tolist()
        metrics = means(sums, values, denominator, len(self.eval_examples))
        if self.sample_examples:
            metrics |= self.sample()
        metrics |= self.place()
        self.policy.train()
        self.log("eval", metrics)  # last: a resumed run takes this line as the sign that all was written
        self.evaluated_steps.add(self.step)

    def eval_batches(self, examples, title):
        return self.batches(self.eval_cuts(examples), title)

    def eval_cuts(self, examples):
        return self.cut(examples, math.ceil(len(examples) / self.config.eval_batch_size),
                        self.config.max_tokens_per_microbatch)

    def batches(self, cuts, title):
        """This rank's Batches of what `cut` returned, with a bar; raises Stopped between them."""
        cuts = [*cuts, *[(*cuts[-1][:2], True)] * (-len(cuts) % num_ranks())]
        for cut in progress(cuts[rank()::num_ranks()], title, unit="batch"):
            self.check_stop()
            yield self.collate(*cut)

    def for_each(self, examples, cuts, title, read):
        """What read(batch), (K, B), gives for each of the examples: lists of K floats, on every rank.

        cuts: the examples in microbatches, which the ranks share among them.
        """
        places, rows = {id(example): place for place, example in enumerate(examples)}, {}
        for batch in self.batches(cuts, title):
            values = read(batch).T.tolist()
            if not batch.is_idle:
                rows |= {places[id(example)]: row for example, row in zip(batch.examples, values)}
        rows = {place: row for part in from_all(rows) for place, row in part.items()}
        return [rows[place] for place in range(len(examples))]

    def cut(self, examples, parts, budget):
        """data.microbatches of this run; a budget of None suits the caches of a CPU, or fills a GPU."""
        usual = 2**11 if self.config.compute_dtype == "bfloat16" else 2**10
        usual = 2**14 if device().type == "cuda" else usual
        return microbatches(examples, parts, budget or usual, self.layouts)

    def collate(self, examples, layout, is_idle=False):
        dtype = torch.promote_types(self.policy.dtype, torch.float32)
        batch = collate(examples, dtype, layout).to(device())
        return dataclasses.replace(batch, is_idle=is_idle)

    def sample(self):
        """Answers of policy and reference to the same prompts; prints and writes num_samples of them.

        Returns metrics over all.
        """
        answers = {"policy": self.generate(self.policy, self.sample_examples)}
        metrics = {"samples/length": sum(map(len, answers["policy"])) / len(self.sample_examples)}
        if self.reference and not self.objective.self_play:  # whose reference is another in each iteration
            with self.reference_in_memory():
                if self.reference_samples is None:  # neither its weights nor the noise change
                    self.reference_samples = self.generate(self.reference, self.sample_examples)
                answers["reference"] = self.reference_samples
                metrics["samples/kl"] = self.sample_kl(answers["policy"])
        records = [{"prompt": self.tokenizer.decode(example.prompt)} for example in self.sample_examples]
        for who, responses in answers.items():
            scores = who == "reference" and self.reference_scores or self.score_samples(responses)
            prefix = "" if who == "policy" else "reference_"
            for record, ids, values in zip(records, responses, scores):
                record[who] = self.decode(ids)
                record |= {prefix + name: float(value) for name, value in values.items()}
        if self.reference_samples:
            self.reference_scores = scores
        for record, example in zip(records, self.sample_examples):
            record["chosen"] = self.decode(example.responses[0].tolist())
        if self.dataset or self.reward_model:
            metrics |= self.score_metrics(records, metrics.get("samples/kl"))
        self.show_samples(records[:self.config.num_samples])
        return metrics

    def score_samples(self, samples):
        """What is known of each sample, in a dict: the data's true scores, the reward model's `reward`."""
        scores = [{} for _ in samples]
        if self.dataset:
            for i, (example, ids) in enumerate(zip(self.sample_examples, samples)):
                finished = len(ids) > 0 and ids[-1] in self.end_ids
                prompt = self.tokenizer.decode(example.prompt)
                scores[i] = dict(self.dataset.scores(prompt, self.decode(ids), finished))
        if self.reward_model:
            for values, (reward,) in zip(scores, self.score(self.with_responses(samples), "samples")):
                if "reward" in values:
                    values["true_reward"] = values.pop("reward")
                values["reward"] = reward
        return scores

    def score_metrics(self, records, kl):
        """Means of the scores; with a reference also the win rate against its answers (a tie is half a win).

        Where the true rewards are known, also the best possible one at this KL, and the share of it reached.
        """
        names = [name for name, value in records[0].items() if isinstance(value, float)]
        metrics = {f"samples/{name}": sum(record[name] for record in records) / len(records)
                   for name in names}
        if kl is not None and "reward" in records[0]:
            gaps = [record["reward"] - record["reference_reward"] for record in records]
            metrics["samples/win_rate"] = sum((gap > 0) + (gap == 0) / 2 for gap in gaps) / len(gaps)
            if self.dataset and self.dataset.optimal_reward:
                optimum = self.dataset.optimal_reward(kl)
                reward = metrics.get("samples/true_reward", metrics["samples/reward"])
                metrics["samples/optimal_reward"] = optimum
                metrics["samples/efficiency"] = reward / optimum if optimum >= 0.5 else None
        return metrics

    def show_samples(self, records):
        self.write("samples.jsonl", [{"step": self.step, **record} for record in records])
        for number, record in enumerate(records, 1):
            tqdm.write(f"\nsample {number} of {len(records)} at step {self.step}")
            for name, value in record.items():
                text = " ".join(str(value).split())
                text = "".join(character if character.isprintable() else "\ufffd" for character in text)
                if len(text) > 300:  # of a prompt the end says more
                    text = f"... {text[-300:]}" if name == "prompt" else f"{text[:300]} ..."
                tqdm.write(f"{name:<22}{text}")
        if self.wandb and records:
            import wandb
            table = wandb.Table(columns=list(records[0]), data=[list(record.values()) for record in records])
            self.wandb.log({"step": self.step, "eval/samples": table})

    def sample_kl(self, samples):
        """Mean over samples of log pi - log ref on the sampled ids, in nats, clipped below at 0."""
        def ratios(batch):
            return self.response_logps(self.policy, batch) - self.response_logps(self.reference, batch)
        examples = self.with_responses(samples)
        total = sum(ratio for ratio, in self.for_each(examples, self.eval_cuts(examples), "KL", ratios))
        return max(0.0, total / len(samples))

    def with_responses(self, samples):
        """The examples that are sampled from, with one response each: these ids."""
        return [dataclasses.replace(example, responses=(np.array(ids, np.int32),), columns={})
                for example, ids in zip(self.sample_examples, samples)]

    def decode(self, ids):
        """The text of a response, without its end token."""
        return self.tokenizer.decode(ids[:-1] if len(ids) > 0 and ids[-1] in self.end_ids else ids)

    def generate(self, model, examples):
        """A sampled response to each example's prompt: lists of ids, with the end token where one came."""
        sampling = {"temperature": self.config.sample_temperature, "top_p": self.config.sample_top_p}
        rooms = [self.config.sample_max_tokens] * len(examples)
        responses = [None] * len(examples)
        seeds = [self.config.seed * 1_000_003 + number for number in range(len(examples))]
        for numbers, drawn in self.sample_batches(model, examples, rooms, seeds, sampling):
            for number, ids in zip(numbers, drawn):
                responses[number] = ids
        return responses

    def sample_batches(self, model, examples, rooms, seeds, sampling, known=frozenset()):
        """Samples responses, batch by batch in order of length: yields example numbers and their ids.

        rooms: tokens that each response may have at most, no more for a longer prompt; and fewer where the
        positions of a model that will read it end. Each has noise of its own seed, so a sample depends on its
        prompt and seed, not on the batch, nor on the number of ranks, each of which does a batch at a time. A
        batch of which all are in `known` is skipped.
        """
        positions = min(getattr(reader.config.get_text_config(), "max_position_embeddings", None) or math.inf
                        for reader in (self.policy, self.reference, self.reward_model) if reader)
        rooms = [min(room, positions - len(example.prompt)) for room, example in zip(rooms, examples)]
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
        batches, size = [], min(self.config.eval_batch_size, math.ceil(len(examples) / num_ranks()))
        for i in order:  # generate() goes on for all until the first, with the most room, is done
            if batches and len(batches[-1]) < size and (
                    len(examples[i].prompt) + rooms[batches[-1][0]] <= positions):
                batches[-1].append(i)
            else:
                batches.append([i])
        batches = [batch for batch in batches if not known.issuperset(batch)]
        pad = self.end_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        kept = model.generation_config  # put aside, or its repetition penalty and the like are mixed in
        model.generation_config = GenerationConfig(do_sample=False, eos_token_id=self.end_ids,
                                                   pad_token_id=pad)
        try:
            with gathered(model, self.config) as in_step, progress(
                    None, "sampling", total=len(batches), unit="batch") as bar:
                while batches:
                    self.check_stop()
                    at_once = batches[:num_ranks()]
                    while in_step and len(at_once) > 1 and (  # all go on as long as the slowest
                            len(examples[at_once[-1][-1]].prompt) + rooms[at_once[0][0]] > positions):
                        at_once.pop()
                    batches = batches[len(at_once):]
                    is_idle = rank() >= len(at_once)
                    batch = at_once[0][:1] if is_idle else at_once[rank()]
                    noise = SeededSampling([seeds[i] for i in batch], **sampling)
                    prompts = [torch.from_numpy(examples[i].prompt).long() for i in batch]
                    output = self.answer(model, prompts, 1 if is_idle else rooms[batch[0]], noise, in_step)
                    drawn = [self.up_to_end(ids)[:rooms[i]] for i, ids in zip(batch, output)]
                    yield from zip(at_once, from_all(drawn))
                    bar.update(len(at_once))
        finally:
            model.generation_config = kept

    def answer(self, model, prompts, max_new_tokens, noise, in_step):
        """generate() on left-padded prompts: lists of ids. in_step: as long as the slowest rank's."""
        pad = model.generation_config.pad_token_id
        input_ids = pad_sequence(prompts, True, pad, "left").to(device())
        mask = pad_sequence([torch.ones_like(ids) for ids in prompts], True, 0, "left").to(device())
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else (
            contextlib.nullcontext())  # or it would compile for each new length of the cache
        with self.autocast(), eager:
            output = model.generate(input_ids, attention_mask=mask, max_new_tokens=max_new_tokens,
                                    logits_processor=[noise], synced_gpus=in_step)
        return output[:, input_ids.shape[1]:].tolist()

    def up_to_end(self, ids):
        return ids[:next((at + 1 for at, token in enumerate(ids) if token in self.end_ids), len(ids))]

    # ------------------------------------------------------------ what the run adds to its data

    @torch.no_grad()
    def score(self, examples, what):
        """The reward model's scores of examples' responses: lists of floats, in the examples' order."""
        read = functools.partial(self.response_scores, self.reward_model)
        return self.for_each(examples, self.eval_cuts(examples), f"scoring {what}", read)

    def fill_in_rewards(self):
        """Scores the pairs that lack the rewards that the loss needs; rewards.jsonl keeps what was scored."""
        lacking = [example for example in [*self.data_examples, *self.eval_examples]
                   if None in example.columns.values()]
        if not lacking:
            return
        judge = self.fingerprints["reward_model"].encode()
        kept = self.cut_back("rewards.jsonl", lambda line: {"key", *REWARDS} <= line.keys())
        known = {line["key"]: line for line in kept}
        for start in progress(range(0, len(lacking), 1000), "rewards, 1,000 pairs at a time"):
            part = [dataclasses.replace(example, columns={}) for example in lacking[start:start + 1000]]
            keys = [hashlib.sha256(b"|".join([judge, *(ids.tobytes() for ids in (
                example.prompt, *example.responses))])).hexdigest() for example in part]
            if not known.keys() >= set(keys):
                scored = [{"key": key, "where": example.where, **dict(zip(REWARDS, scores))}
                          for key, example, scores in zip(keys, part, self.score(part, "pairs"))]
                self.write("rewards.jsonl", scored)
                known = {line["key"]: line for line in scored} | known
            for key, example in zip(keys, lacking[start:start + 1000]):
                example.columns |= {name: known[key][name] for name in REWARDS}
        tqdm.write(f"{len(lacking):,} pairs without rewards have those of reward_model, in rewards.jsonl")

    @torch.no_grad()
    def fill_in_reference(self):
        """Computes the reference's log-probabilities of every response once; then it leaves the memory.

        They are kept in files of at most 10,000 examples, under a key of all that decides them, to the last
        bit. Evaluation's come from the very microbatches that it will use, so that rewards at step 0 are
        exactly 0; training's from microbatches that no setting of memory changes.
        """
        objective, rows = self.objective, self.data_examples
        if not (objective.needs_reference and objective.inputs == "logps" and self.config.reference_cache
                and not objective.self_play):
            return
        self.make_cache_folder()
        limit = math.inf if self.config.max_steps is None else self.config.max_steps * self.config.batch_size
        if min(limit, self.num_positions(len(rows))) < len(rows):
            rows = []  # those of a run that does not see each row are cheaper in its steps
        started, found = time.monotonic(), 0
        for start in range(0, len(rows), 10_000):
            part = rows[start:start + 10_000]
            found += self.fill_in_part(part, self.cut(part, math.ceil(len(part) / 256), None))
        if self.eval_examples:
            found += self.fill_in_part(self.eval_examples, self.eval_cuts(self.eval_examples))
        total = len(rows) + len(self.eval_examples)
        tqdm.write(f"reference  log-probabilities of {found:,} rows read from {self.cache_folder}, of "
                   f"{total - found:,} computed, {time.monotonic() - started:.1f} s")
        if rows or limit == 0:
            self.reference = self.reference_shell

    @refused_by_all
    def make_cache_folder(self):
        try:
            if rank() == 0:
                os.makedirs(self.cache_folder, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.cache_folder):
                    pass
        except OSError as error:
            raise InputError(f"reference_cache={self.cache_folder} cannot be written, {error.strerror}: "
                             "name another folder, or set it to false") from error

    @property
    def cache_folder(self):
        folder = self.config.reference_cache
        return os.path.join("runs", "reference_cache") if folder is True else folder

    def fill_in_part(self, examples, cuts):
        """Puts reference log-probabilities into the examples' columns; returns how many the cache had.

        cuts: the examples in microbatches.
        """
        unread = {"_name_or_path", "architectures", "dtype", "transformers_version"}
        settings = {k: v for k, v in self.reference.config.to_dict().items() if k not in unread}
        shapes = [(len(part), layout.shared) for part, layout in cuts]
        arithmetic = [self.config.dtype, self.config.compute_dtype, self.config.compile, torch.__version__,
                      self.reference.config._attn_implementation, device().type]
        if num_ranks() > 1 and self.config.compute_dtype != self.config.dtype:
            arithmetic.append("fsdp")  # which has no autocast
        digest = hashlib.sha256(repr([self.fingerprints["reference"], sorted(settings.items()), shapes,
                                      arithmetic]).encode())
        for example in examples:
            for ids in (example.prompt, *example.responses):
                digest.update(len(ids).to_bytes(4) + ids.tobytes())
        path = os.path.join(self.cache_folder, digest.hexdigest() + ".safetensors")
        shape = (len(examples), len(examples[0].responses))
        kept = from_first(read_checked(path, shape) if rank() == 0 else None)
        logps = kept
        if kept is None:
            read = functools.partial(self.response_logps, self.reference)
            logps = torch.tensor(self.for_each(examples, cuts, "reference", read), dtype=torch.float64)
            if rank() == 0:
                write_checked(path, logps)
        for example, row in zip(examples, logps.tolist()):
            example.columns |= dict(zip(REFERENCE, row))
        return 0 if kept is None else len(examples)

    @contextlib.contextmanager
    def reference_in_memory(self):
        """Loads the reference again for a while, if it left. Raises InputError if it is another meanwhile."""
        left = self.reference.device.type == "meta"
        if left:
            self.reference = spread(self.load_reference(), self.config).eval().requires_grad_(False)
            if fingerprint(self.reference) != self.fingerprints["reference"]:
                raise InputError("the reference is not what this run began with, its content differs: put it "
                                 "back, and go on by resume=true")
        try:
            yield
        finally:
            if left:
                self.reference = self.reference_shell

    @torch.no_grad()
    def next_iteration(self):
        """Self-play: freezes the policy as the opponent and pairs its answers with the data's responses.

        generated-<iteration>.jsonl keeps the answers; a resumed run samples only those that it lacks.
        """
        self.reference.load_state_dict(self.policy.state_dict())
        self.fingerprints["reference"] = fingerprint(self.reference)
        iteration = self.iteration + 1
        name, examples = f"generated-{iteration:02d}.jsonl", self.data_examples
        sampling = {key: self.setting(key) for key in ("temperature", "top_p", "top_k")}
        rooms = [min(self.setting("max_tokens"), self.config.max_length - len(example.prompt))
                 for example in examples]
        seeds = [zlib.crc32(f"{self.config.seed} {iteration} {row}".encode())  # a CPU generator reads 32 bits
                 for row in range(len(examples))]
        key = self.answers_key(iteration)
        known = {line["row"] for line in self.cut_back(name, lambda line: line.get("key") == key)}
        tqdm.write(f"iteration {iteration}: answering {len(examples):,} prompts, {len(known):,} of them "
                   f"already in {name}")
        for rows, answers in self.sample_batches(self.reference, examples, rooms, seeds, sampling, known):
            if known.intersection(rows):  # of a batch that was written in part all is written again
                self.cut_back(name, lambda line: line["row"] not in rows)
            self.write(name, [
                {"row": row, "where": examples[row].where,
                 "prompt": self.tokenizer.decode(examples[row].prompt), "response": self.decode(ids),
                 "finished": ids[-1] in self.end_ids, "ids": ids, "key": key}
                for row, ids in zip(rows, answers)])
        self.iteration, self.first_step, self.first_examples = iteration, self.step, self.examples
        self.pair_answers()
        if iteration > 0 and self.setting("reset_optimizer"):
            self.optimizer = make_optimizer(self.policy.parameters(), self.config)

    def answers_key(self, iteration):
        """Stands in every answer of an iteration: of another opponent or other sampling it is another."""
        parts = [self.setting(name) for name in ("temperature", "top_p", "top_k", "max_tokens")]
        parts += [self.config.max_length, self.config.seed, iteration]
        parts += [self.fingerprints[name] for name in ("data", "reference")]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def pair_answers(self):
        """train_examples of this iteration: the data's responses against the answers in generated-*.jsonl."""
        wait_for_all()  # until the last answer is written
        self.train_examples, num_equal = [], 0
        first = max(0, self.iteration - 1) if self.setting("mix_previous") else self.iteration
        for iteration in range(first, self.iteration + 1):
            name, key = f"generated-{iteration:02d}.jsonl", self.answers_key(iteration)
            try:
                answers = {line["row"]: line["ids"] for line in self.lines(name)
                           if iteration < self.iteration or line["key"] == key}
            except (ValueError, TypeError, KeyError):
                answers = {}
            if answers.keys() != set(range(len(self.data_examples))):
                raise InputError(f"{self.path(name)} has not one whole line for each answer of iteration "
                                 f"{iteration}, which this run needs: put it back, or start a new run")
            for row in sorted(answers):
                example = self.data_examples[row]
                if answers[row] == example.responses[0].tolist():
                    num_equal += 1
                    continue
                self.train_examples.append(dataclasses.replace(
                    example, responses=(example.responses[0], np.array(answers[row], np.int32)),
                    columns={"finished": float(answers[row][-1] in self.end_ids)}))
        tqdm.write(f"iteration {self.iteration}: {len(self.train_examples):,} pairs, {num_equal:,} dropped "
                   "whose answer equals the data's response")

    # ------------------------------------------------------------ what is recorded

    def log(self, split, metrics):
        """One line in metrics.jsonl; evaluations also on the console; both in wandb."""
        if split == "train":
            seconds = self.throughput["seconds"]
            for name in ("examples", "tokens"):
                metrics[f"{name}_per_second"] = self.throughput[name] / seconds
            self.throughput.clear()
        place = {"step": self.step, "examples": self.examples, "split": split, "time": time.time()}
        self.write("metrics.jsonl", [place | metrics])
        if split == "eval":
            shown = (f"eval/{name} {value:.4g}" for name, value in metrics.items() if value is not None)
            tqdm.write(f"\nstep {self.step}: {', '.join(shown)}")
        if self.wandb:
            prefix = "eval/" if split == "eval" else ""
            self.wandb.log({"step": self.step, **{prefix + name: value for name, value in metrics.items()}})

    def path(self, name):
        return os.path.join(self.config.run_dir, name)

    def lines(self, name):
        """The records in one of the run's files of JSON lines; none where it is absent."""
        if not os.path.exists(self.path(name)):
            return []
        with open(self.path(name), encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def cut_back(self, name, keep):
        """cut_back of one of the run's files, by the first rank; what was kept, on all."""
        return from_first(cut_back(self.path(name), keep) if rank() == 0 else None)

    def write(self, name, records):
        """Adds records to one of the run's files of JSON lines, which the first rank writes."""
        if rank() > 0:
            return
        with open(self.path(name), "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    @refused_by_all
    def start_wandb(self):
        if self.config.wandb == "disabled" or rank() > 0:
            return
        import wandb
        try:
            self.wandb = wandb.init(
                project=self.config.wandb_project, name=self.config.exp_name, mode=self.config.wandb,
                dir=self.config.run_dir, id=self.config.provenance["run_id"], resume="allow",
                config=vars(self.config))
        except wandb.errors.Error as error:
            raise InputError(f"wandb={self.config.wandb} does not start: {first_line(error)}") from error
        self.wandb.define_metric("*", step_metric="step")

    # ------------------------------------------------------------ checkpoints

    def save_reference(self):
        """Keeps the weights of a reference that came from no folder, for a resume."""
        weights = whole_state(self.reference)
        with whole_folder(self.path("reference")) as folder:
            if rank() == 0:
                self.reference_shell.save_pretrained(folder, state_dict=weights)
                self.tokenizer.save_pretrained(folder)

    def save(self):
        """Saves all that a resume needs as step-<step>, with async_save while training goes on."""
        self.finish_save()
        for name in os.listdir(self.config.run_dir) if rank() == 0 else ():
            if name.endswith(".jsonl"):
                sync(self.path(name))
        counters = {name: getattr(self, name) for name in COUNTERS} | self.fingerprints
        rng = {"cpu": torch.get_rng_state(),  # of several ranks none looks at the others' GPUs
               "cuda": torch.cuda.get_rng_state_all() if num_ranks() == 1 else []}
        weights = whole_state(self.policy, copied=self.config.async_save)
        optimizer = optimizer_state(self.policy, self.optimizer)
        self.saved_step = self.step
        if self.config.async_save:
            optimizer = {name: x.to("cpu", copy=True) if torch.is_tensor(x) else x
                         for name, x in optimizer.items()}
            self.save_in_progress = self.saver.submit(
                self.write_checkpoint, counters, rng, weights, optimizer)
        else:
            self.write_checkpoint(counters, rng, weights, optimizer)

    def finish_save(self):
        """Waits for a checkpoint that is being written, and raises what went wrong with it."""
        if self.save_in_progress:
            self.save_in_progress.result()
            self.save_in_progress = None

    def write_checkpoint(self, counters, rng, weights, optimizer):
        """Writes it whole beside its final name, renames it, and only then moves LATEST to it.

        All ranks write their shares of the optimizer's state, the first what else there is.
        """
        run_dir, name = self.config.run_dir, f"step-{counters['step']:06d}"
        with whole_folder(os.path.join(run_dir, name), self.save_group) as folder:
            state = os.path.join(folder, "trainer_state")
            if rank() == 0:
                self.policy_shell.save_pretrained(folder, state_dict=weights)
                self.tokenizer.save_pretrained(folder)
                os.makedirs(state, exist_ok=True)  # others may have begun
                torch.save(rng, os.path.join(state, "rng.pt"))
                with open(os.path.join(state, "state.json"), "w") as file:
                    json.dump(counters, file)
            dcp.save(optimizer | {"step": counters["step"]}, checkpoint_id=os.path.join(state, "optimizer"),
                     process_group=self.save_group, no_dist=num_ranks() == 1)
        if rank() == 0:
            point_latest(run_dir, name)
            self.discard_checkpoints(counters)
        wait_for_all(self.save_group)

    def discard_checkpoints(self, counters):
        """Deletes all but keep_checkpoints of the newest, and what self-play's opponent needs."""
        if self.config.keep_checkpoints is None:
            return
        steps = sorted(step for step in saved_steps(self.config.run_dir) if step <= counters["step"])
        steps = steps[:-self.config.keep_checkpoints]
        spared = {counters["first_step"]} if self.objective.self_play else set()  # a resume needs its weights
        for name in [f"step-{step:06d}" for step in steps if step not in spared]:
            discarded = self.path(f".{name}.partial")
            os.rename(self.path(name), discarded)  # half deleted, it is no checkpoint
            shutil.rmtree(discarded)

    def restore(self, checkpoint):
        """Takes up a checkpoint's optimizer, counters and random state. Raises InputError if it may not."""
        counters = read_counters(checkpoint)
        for what, now in self.fingerprints.items():
            if counters[what] != now:
                raise InputError(f"the {what} is not what this run began with, its content differs: put it "
                                 "back, or start a new run")
        for name in COUNTERS:
            setattr(self, name, counters[name])
        try:
            rng = torch.load(os.path.join(checkpoint, "trainer_state", "rng.pt"), map_location="cpu")
            self.restore_optimizer(os.path.join(checkpoint, "trainer_state", "optimizer"))
        except (Exception, dcp.CheckpointException) as error:  # which is no Exception
            raise InputError(f"checkpoint {checkpoint} is damaged, its trainer_state cannot be read: "
                             f"{first_line(error)}") from error
        torch.set_rng_state(rng["cpu"])
        if num_ranks() == 1 and len(rng["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(rng["cuda"])
        self.saved_step = self.step
        if self.iteration >= 0 and self.objective.self_play:
            self.pair_answers()

    def restore_optimizer(self, folder):
        """Reads into the optimizer what it remembered, of which each rank takes its share."""
        if self.step == 0:
            return
        like = make_optimizer([torch.nn.Parameter(torch.zeros_like(p)) for p in self.policy.parameters()],
                              self.config)
        parameters = [[p for group in optimizer.param_groups for p in group["params"]]
                      for optimizer in (self.optimizer, like)]
        for p in parameters[1]:
            p.grad = torch.zeros_like(p)
        like.step()  # which makes a state of the right form
        for p, other in zip(*parameters):
            self.optimizer.state[p] = like.state[other]
        state = optimizer_state(self.policy, self.optimizer)
        dcp.load(state, checkpoint_id=folder, no_dist=num_ranks() == 1)  # in place
        names = {name: p for name, p in self.policy.named_parameters()}
        for name, value in state.items():
            weight, _, key = name.rpartition(".")
            self.optimizer.state[names[weight]][key] = value

    def restore_records(self):
        """Cuts metrics.jsonl and samples.jsonl back to this step; clears what an interrupted save left."""
        for name in os.listdir(self.config.run_dir) if rank() == 0 else ():
            if re.fullmatch(r"\.(step-\d+|reference)\.partial", name):
                shutil.rmtree(self.path(name))
        kept = self.cut_back("metrics.jsonl",
                             lambda line: self.saved_step is not None and line["step"] <= self.step)
        self.evaluated_steps = {line["step"] for line in kept if line["split"] == "eval"}
        self.cut_back("samples.jsonl", lambda line: line["step"] in self.evaluated_steps)


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling with noise of each row's own seed (the Gumbel-max trick).

    The scores are divided by temperature (0: greedy), cut to the top_k largest (0: all) and then to the
    smallest set of tokens of probability top_p, and get Gumbel noise: the largest is then a draw from their
    softmax.
    """

    def __init__(self, seeds, temperature, top_p, top_k=0):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.warpers = [TopKLogitsWarper(top_k)] if top_k else []
        self.warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    def __call__(self, input_ids, scores):
        if self.temperature == 0:
            return scores
        scores = scores.float() / self.temperature
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)  # -log of it is Gumbel
        return scores - noise.log().to(scores.device)


def decoder_of(model):
    """A causal language model without its head."""
    decoder = model.get_decoder()
    if decoder is model:  # as Llama 4's text model says
        decoder = next((child for child in model.children() if isinstance(child, PreTrainedModel)), None)
    if decoder is None:
        raise InputError(f"{model.config.model_type} names no decoder apart from its head: choose another "
                         "architecture")
    return decoder


def decode(model, inputs):
    """What a model's decoder gives: its states, and what else its head's forward may ask for."""
    outputs = []

    def read():
        outputs.append(decoder_of(model)(**inputs))
        return outputs[0][0]  # on these a sharded model waits in the backward
    within(model, read)
    return outputs[0]


def decoder_layers(model):
    """The layers of a model's decoder, as transformers marks them."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model):
    """Compiles each decoder layer for any shape. Raises InputError where transformers marks no layers."""
    layers = decoder_layers(model)
    if not layers:
        raise InputError(f"compile=true: {model.config.model_type} has no layers that can be compiled one by "
                         "one: leave it out")
    for layer in layers:
        layer.compile(dynamic=True)


def keep_freed_memory():
    """Tells glibc to keep what a step frees for the next: to give it back to the system and get it again
    takes a tenth of a step's time on a CPU. Blocks above 32 MB do go back, or the heap would have gaps."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: smaller blocks come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def model_inputs(batch):
    """A Batch as a decoder's arguments. Padding is on the right, where causal attention never looks."""
    options = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.segments is not None:  # with a mask of ones transformers looks for no packing of its own
        options |= {"position_ids": batch.positions, "attention_mask": torch.ones_like(batch.input_ids)}
    return options


@contextlib.contextmanager
def shared_attention(model, batch):
    """While it lasts, a token of a shared row sees only its prompt and its own response, by the model's rule.

    The rule (causal, a sliding window, ...) is asked with the positions in the response's own sequence.
    """
    if batch.segments is None:
        yield
        return
    name, segments, prompts, positions = (
        model.config._attn_implementation, batch.segments, batch.prompts, batch.positions)
    make_mask = MASKS[name]

    def make_shared_mask(*arguments, mask_function, attention_mask=None, **options):
        def allowed(b, h, q, k):
            seen = (segments[b, k] == segments[b, q]) | (segments[b, k] == prompts[b, q])
            return seen & mask_function(b, h, positions[b, q], positions[b, k])
        return make_mask(*arguments, mask_function=allowed, attention_mask=None,
                         **options | {"allow_is_causal_skip": False})

    MASKS[name] = make_shared_mask
    try:
        yield
    finally:
        del MASKS[name]  # the override, not transformers' own entry


def means(names, sums, denominator, num_examples):
    """{name: mean} over all ranks' examples of sums over those of each; losses are over the denominator."""
    means = {name: value / (denominator if name.endswith("loss") else num_examples)
             for name, value in zip(names, sum_over_ranks(sums))}
    if "rewards/mean_square" in means:
        variance = means.pop("rewards/mean_square") - means["rewards/mean"] ** 2
        means["rewards/std"] = math.sqrt(max(0.0, variance)) if math.isfinite(variance) else math.nan
    return means


def progress(what, title, leave=False, **options):
    """tqdm's bar, on the first rank, and only where somebody looks."""
    return tqdm(what, desc=title or None, leave=leave, disable=True if rank() > 0 else None, **options)


def as_float(values):
    return values.to(torch.promote_types(values.dtype, torch.float32))


def run_head(model, states, hidden):
    """The logits (N, V) of decoder states (N, D): the model's own forward, around a decoder that gives these.

    Whatever a model does after its decoder (Gemma 2 caps, Cohere and Granite scale) is done here too.
    """
    states.last_hidden_state = hidden[None]
    decoder = decoder_of(model)
    decoder.forward = lambda *arguments, **options: states
    try:
        ids = hidden.new_zeros(1, len(hidden), dtype=torch.long)  # only their number is read
        return model.forward(input_ids=ids, use_cache=False).logits.squeeze(0)  # past a sharded model's hooks
    finally:
        del decoder.forward


def write_checked(path, values):
    """Saves a tensor with its hash, whole or not at all; of two writers of one path the later stays."""
    partial = f"{path}.{secrets.token_hex(8)}.partial"
    save_file({"values": values}, partial, {"sha256": hashlib.sha256(values.numpy().tobytes()).hexdigest()})
    sync(partial)
    os.replace(partial, path)


def read_checked(path, shape):
    """What write_checked saved; None where there is no such file, or a damaged one, which is noted."""
    if not os.path.exists(path):
        return None
    try:
        with safe_open(path, "pt") as file:
            values, digest = file.get_tensor("values"), file.metadata()["sha256"]
        if values.shape == shape and hashlib.sha256(values.numpy().tobytes()).hexdigest() == digest:
            return values
    except Exception:  # safetensors has errors of its own for each kind of damage
        pass
    tqdm.write(f"{path} is damaged and computed again")
    return None


def read_counters(checkpoint):
    """Step, examples and fingerprints of a checkpoint. Raises InputError if the folder is not whole."""
    needed = ("config.json", "trainer_state/state.json", "trainer_state/rng.pt",
              "trainer_state/optimizer/.metadata")
    absent = [name for name in needed if not os.path.isfile(os.path.join(checkpoint, name))]
    names = os.listdir(checkpoint) if os.path.isdir(checkpoint) else []
    if not any(name.endswith(".safetensors") for name in names):
        absent.append("model.safetensors")
    if absent:
        raise InputError(f"checkpoint {checkpoint} is incomplete, it lacks {', '.join(absent)}: "
                         "point LATEST at a whole one, or start a new run")
    try:
        with open(os.path.join(checkpoint, "trainer_state", "state.json")) as file:
            counters = dict.fromkeys(COUNTERS[2:], 0) | {"reward_model": None} | json.load(file)
        return {name: counters[name] for name in (*COUNTERS, "data", "reference", "reward_model")}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"checkpoint {checkpoint} is damaged, its state.json is not whole: point LATEST at "
                         "another one, or start a new run") from error


def saved_steps(run_dir):
    """The steps of which a folder holds a checkpoint."""
    return [int(name[5:]) for name in os.listdir(run_dir) if re.fullmatch(r"step-\d+", name)]


def optimizer_state(model, optimizer):
    """{"<weight>.<key>": value} of all that an optimizer remembers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[parameter]}.{key}": value for parameter, state in optimizer.state.items()
            for key, value in state.items() if value is not None}


@contextlib.contextmanager
def whole_folder(final, group=None):
    """Gives a folder for all ranks to fill, which takes its final name only when all in it is on the disk."""
    partial = os.path.join(os.path.dirname(final), f".{os.path.basename(final)}.partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
    wait_for_all(group)
    yield partial
    wait_for_all(group)
    if rank() > 0:
        return
    for folder, _, files in os.walk(partial, topdown=False):
        for path in [*(os.path.join(folder, name) for name in files), folder]:
            sync(path)
    shutil.rmtree(final, ignore_errors=True)  # what a crash left between this rename and that of LATEST
    os.rename(partial, final)
    sync(os.path.dirname(final))


def point_latest(run_dir, name):
    temporary = os.path.join(run_dir, ".LATEST")
    if os.path.lexists(temporary):
        os.remove(temporary)
    os.symlink(name, temporary)
    os.replace(temporary, os.path.join(run_dir, "LATEST"))
    sync(run_dir)


def cut_back(path, keep):
    """Rewrites a file of JSON lines with those that `keep` accepts and returns them; a torn line goes too."""
    if not os.path.exists(path):
        return []
    kept = []
    with open(path, "rb") as file:  # bytes: a crash can tear a character
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if line.endswith(b"\n") and isinstance(record, dict) and keep(record):
                    kept.append((line, record))
    with open(path + ".partial", "wb") as file:
        file.writelines(line for line, _ in kept)
    sync(path + ".partial")
    os.replace(path + ".partial", path)
    return [record for _, record in kept]


def sync(path):
    """Waits until a file or folder is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
