"""How do N processes act as one, and stop as one? On one process, what only several need does nothing."""

import atexit
import contextlib
import copy
import datetime
import errno
import functools
import os
import shutil
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy,
                                    fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from engine import InputError

START = time.monotonic()  # max_hours counts from here
TIMEOUT = datetime.timedelta(minutes=30)  # a rank waits for the others no longer
TEMPFAIL = 75  # the status with which a scheduler may start a run again
MAX_HOURS, WAITS = 1000, 1001  # why a run stopped, besides the numbers of signals: the last for answers


# ---------------------------------------------------------------- ranks


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


def leave_ranks(status) -> int:
    """Ends this process, if it is one of several; otherwise returns the status that torchrun may see.

    Not by sys.exit: a thread of gloo's may still hold a tensor, and if it lets go of it while Python is taken
    down, it aborts (pytorch/pytorch#190489).
    """
    if status == TEMPFAIL and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        status = 0  # or torchrun would start the ranks again
    if dist.is_initialized():
        dist.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def device() -> torch.device:
    """Where this rank computes."""
    has_gpu = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")


def from_all(value, group=None) -> list:
    """Every rank's value, on all of them."""
    values = [value] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(values, value, group)
    return values


def from_first(value):
    """The first rank's value, on all."""
    values = [value]
    if num_ranks() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def sum_over_ranks(values: list[float]) -> list[float]:
    """Sums of each of a list of numbers, in float64."""
    total = torch.tensor(values, dtype=torch.float64)
    if num_ranks() > 1:
        dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(number: int) -> int:
    largest = torch.tensor(number)
    if num_ranks() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def wait_for_all(group=None):
    if num_ranks() > 1:
        dist.all_reduce(torch.zeros(1), group=group)


def raise_on_all_ranks(function):
    """If one rank raises InputError in this function, raise it on all; otherwise the rest wait for ever."""
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


class Stopped(Exception):
    """A signal or max_hours asks for the end; raised between steps and between evaluation batches."""


class StopRequest:
    """Whether a rank has been asked to stop, of which all hear at the same step.

    reason: 0, the number of a signal, MAX_HOURS or WAITS.
    """

    def __init__(self, max_hours: float | None):
        self.max_hours, self.reason = max_hours, 0

    @contextlib.contextmanager
    def catch_signals(self):
        """SIGTERM, SIGINT, SIGUSR1, and SIGHUP unless it is ignored, ask for a stop at the next step; a
        second SIGINT stops at once."""
        def ask(number, frame):
            self.reason = self.reason or number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            leave_closed_terminal()
        numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
        numbers -= {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        before = {number: signal.signal(number, ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self):
        """Raises Stopped on all ranks where one of them has been asked to stop."""
        if self.max_hours is not None and time.monotonic() - START > 3600 * self.max_hours:
            self.reason = self.reason or MAX_HOURS
        if agreed := max_over_ranks(self.reason):  # a signal that comes meanwhile waits for the next check
            self.reason = agreed
            raise Stopped


def leave_closed_terminal():
    """Sends what is printed nowhere if its terminal is gone, where printing would fail and end the save."""
    for stream in (1, 2):
        try:
            os.get_terminal_size(stream)
        except OSError as error:
            if error.errno == errno.EIO:  # not ENOTTY, which is a file's or a pipe's
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


# ---------------------------------------------------------------- weights in shards


@functools.cache  # each mesh opens connections of its own
def device_mesh(replicas):
    return init_device_mesh(device().type, (replicas, num_ranks() // replicas),
                            mesh_dim_names=("replicas", "shards"))


def shard(model: PreTrainedModel, config) -> PreTrainedModel:
    """The model sharded over all ranks by FSDP2, with the first rank's weights; with `compile` its layers are
    compiled, on one rank too.

    Each layer is gathered when it runs; what is outside of the layers (embeddings, last norm, head) from
    with_root_unsharded to the end of the backward. Raises InputError for a model without marked layers.
    """
    sharded = model if num_ranks() == 1 else meta_copy(model)
    if config.compile:
        compile_layers(sharded)
    if num_ranks() == 1:
        return model
    if not decoder_layers(sharded):
        raise InputError(f"{model.config.model_type} marks no layers to shard: run it on one device")
    return apply_fsdp(sharded, model, config)


def shard_frozen(model, config):
    """The same of a model that does not learn."""
    return shard(model, config).eval().requires_grad_(False)


def apply_fsdp(sharded, model, config):
    """Shards a meta_copy of a model, in place, and gives it the weights that the first rank's model has."""
    fsdp = config.fsdp
    mesh = device_mesh(fsdp["replicas"])
    options = {
        "mesh": mesh if fsdp["replicas"] > 1 else mesh["shards"],
        "mp_policy": MixedPrecisionPolicy(getattr(torch, config.compute_dtype), reduce_dtype(config.dtype)),
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
        setattr(sharded.get_submodule(parent), name, buffer.to(device()))
    sharded.with_root_unsharded = lambda function: function()
    register_fsdp_forward_method(sharded, "with_root_unsharded")
    return sharded


def meta_copy(model):
    """A copy of a model on the meta device: its form without its weights."""
    memo = {id(x): torch.nn.Parameter(x.to("meta"), x.requires_grad) for x in model.parameters()}
    memo |= {id(x): x.to("meta") for x in model.buffers()}
    return copy.deepcopy(model, memo)


def decoder_layers(model):
    """The layers of a model's decoder, as transformers marks them."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model):
    """Compiles each decoder layer for any shape. Raises InputError where transformers marks no layers."""
    layers = decoder_layers(model)
    if not layers:
        raise InputError(f"compile=true: {model.config.model_type} marks no layers to compile: leave it out")
    # All layers share one, for reference, evaluation and training in each layout; beyond it torch goes on
    # without compiling.
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        layer.compile(dynamic=True)


def reduce_dtype(dtype: str) -> torch.dtype:
    """Gradients cross ranks in float32 at least."""
    return torch.promote_types(getattr(torch, dtype), torch.float32)


def sync_gradients(model, wanted):
    """Whether the next backward averages the gradients over ranks, or adds them up where they are."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
        model.set_is_last_backward(wanted)


def reshard(model):
    """Lets go of what is gathered of a model that ran without a backward: all its weights are shards then."""
    for module in model.modules() if model else ():  # layers too, where reshard_after_forward=false
        if isinstance(module, FSDPModule):
            module.reshard()


def with_root_unsharded(model, function):
    """function(), with what is outside of a sharded model's layers gathered until the backward has ended."""
    return model.with_root_unsharded(function) if isinstance(model, FSDPModule) else function()


@contextlib.contextmanager
def unsharded(model, config):
    """While it lasts a rank may run a sharded model by itself: each holds all weights.

    Yields True if it stays sharded: where all weights do not fit into a device's memory, and generate() must
    keep the ranks in step instead.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules or not fits_unsharded(model, config.compute_dtype):
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


def fits_unsharded(model, compute_dtype):
    """Whether half of the memory that is free on every rank's GPU holds all weights."""
    if device().type == "cpu":
        return True
    num_bytes = sum(x.numel() for x in model.parameters()) * getattr(torch, compute_dtype).itemsize
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return all(from_all(2 * num_bytes < torch.cuda.mem_get_info()[0] + unused))


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor, or any other, with all that it has; all ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_full(tensor, values):
    """Fills a tensor, which may be a shard, from one with all that it has."""
    is_shard = isinstance(tensor, DTensor)
    values = values.to(tensor.device)
    tensor.copy_(distribute_tensor(values, tensor.device_mesh, tensor.placements) if is_shard else values)


def full_state_dict(model, copied=False, learning=False) -> dict[str, torch.Tensor]:
    """A model's state dict on the CPU, on the first rank; the others, which ask too, get an empty one.

    copied: sharing no memory with the model. learning: only what learns. Tied weights are one tensor, which
    torch's own function unties.
    """
    tensors, state = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if learning and not tensor.requires_grad:
            continue
        if id(tensor) not in tensors:
            values = full_tensor(tensor.detach())
            is_own = copied and not isinstance(tensor, DTensor)
            tensors[id(tensor)] = values.to("cpu", copy=is_own) if rank() == 0 else None
        state[name] = tensors[id(tensor)]
    return state if rank() == 0 else {}


def check_devices(config):
    """Raises InputError for what these devices, or so many of them, cannot do."""
    has_gpu, replicas = torch.cuda.is_available(), config.fsdp["replicas"]
    num_devices = int(os.environ.get("WORLD_SIZE", 1))
    if config.attention == "varlen" and has_gpu and config.compute_dtype != "bfloat16":
        raise InputError("attention=varlen computes in bfloat16 on a GPU: set compute_dtype=bfloat16, or "
                         "choose sdpa")
    if config.attention == "flex_attention" and not has_gpu:
        raise InputError("attention=flex_attention has no backward on a CPU: choose sdpa or eager")
    if config.compile and not has_gpu and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("compile=true needs a C++ compiler on a CPU, and there is no g++: install one")
    if config.world_size and not config.dry_run:
        raise InputError(f"world_size={config.world_size} is for dry_run=true: leave it out, or use torchrun")
    if num_devices > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(f"WORLD_SIZE={num_devices} without a MASTER_ADDR: start the run by torchrun")
    num_asked = config.world_size or num_devices
    if num_asked % replicas:
        raise InputError(f"fsdp.replicas={replicas} does not divide the {num_asked} devices: choose another")
    if config.fsdp["cpu_offload"] and not (has_gpu and num_devices > 1 or config.dry_run):
        raise InputError("fsdp.cpu_offload=true needs several GPUs: leave it out, or give them by torchrun")
