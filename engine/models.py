"""How are model, tokenizer, optimizer and learning rate made, and what is refused?"""

import concurrent.futures
import contextlib
import ctypes
import hashlib
import inspect
import json
import math
import os
import sys
import types

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GenerationConfig, LlamaConfig, PretrainedConfig, PreTrainedModel,
                          PreTrainedTokenizerBase)
from tqdm import tqdm

from engine import InputError, first_line
from engine.distributed import (device, device_mesh, from_first, full_tensor, num_ranks, raise_on_all_ranks,
                                rank, sum_over_ranks)
from engine.forward import autocast
from engine.lora import (AdaptersOff, add_adapters, base_folder, base_of, check_base, is_adapter, is_judge,
                         merge_adapter, policy_source, state_of, unread)
from engine.state import kept_state

# ---------------------------------------------------------------- tokenizers


def load_tokenizer(path, texts, config) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, a hub id or folder, or for `tiny` one trained on the texts.

    Raises InputError where there is none, or none with the special tokens that the run needs.
    """
    with refusing(f"the tokenizer of {path}"):
        tokenizer = train_tokenizer(texts) if path == "tiny" else AutoTokenizer.from_pretrained(
            path, trust_remote_code=config.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {path} has no end-of-sequence token, which closes every "
                         "response: name one in its tokenizer_config.json, or choose another by tokenizer=")
    if config.add_bos and tokenizer.bos_token_id is None:
        raise InputError(f"add_bos=true, but the tokenizer of {path} has no begin-of-sequence token")
    return tokenizer


def train_tokenizer(texts, vocab_size=1024):
    """A byte-level BPE of the texts, for the `tiny` model; equal texts give an equal tokenizer.

    What is no text, as a list of messages, is taken as JSON.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = (text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in texts)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|pad|>")


def load_end_ids(path, model_config, tokenizer) -> list[int]:
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


# ---------------------------------------------------------------- models


def load_model_config(path, config, tokenizer) -> tuple[PretrainedConfig, dict[str, float]]:
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


@raise_on_all_ranks
def load_model(path, model_config, config, tokenizer, head=None, blank=None) -> PreTrainedModel:
    """The causal language model at `path`, on this run's device. Raises InputError if it is not whole.

    Of several ranks the first reads it, into the host's memory, and the others get it on the meta device.
    blank: a context, as a device or a mode, in which to make the model from its configuration alone.
    head: None; or `scores` for a reward model, with a scalar head in the language model's place; or
    `new scores`, which gives a model without such a head one.
    """
    if is_adapter(path):
        return load_merged(path, model_config, config, tokenizer, head, blank)
    auto_class = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    blank = blank or (torch.device("meta") if rank() > 0 else None)
    if head:
        model_config.num_labels = 1
        pad = tokenizer.pad_token_id  # None is right for one text at a time, and refused by batches of them
        model_config.pad_token_id = None if pad == tokenizer.eos_token_id else pad
    is_varlen = config.attention == "varlen"
    attention = "sdpa" if is_varlen else config.attention  # which becomes varlen below
    options = {"dtype": getattr(torch, config.dtype), "attn_implementation": attention,
               "trust_remote_code": config.trust_remote_code}
    with refusing(f"the model {path}"):
        if blank or path == "tiny":
            with blank or contextlib.nullcontext():
                model = auto_class.from_config(model_config, **options)
        else:
            model, info = auto_class.from_pretrained(path, config=model_config, output_loading_info=True,
                                                     ignore_mismatched_sizes=True, **options)  # refused below
            check_loaded(info, head)
    if head and not hasattr(model, "score"):
        raise InputError(f"{path}, {model_config.model_type}, has no scalar head: choose another model")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, more than the embeddings of {path}: "
                         "choose the tokenizer that belongs to the model")
    if num_ranks() == 1 and not blank:
        model = model.to(getattr(config, "device", device()))
        for x in model.parameters():
            if x.data_ptr() % 64:  # as in a file; where weights lie may change the last bit of a product
                x.data = x.data.clone()
    is_flash = "flash" in (config.attention or "")  # not on a CPU, nor in float32
    if not blank and (num_ranks() == 1 or not is_flash):
        with autocast(is_flash):
            check_causal(model, path)
    is_default = config.attention is None and device().type == "cuda" and config.compute_dtype == "bfloat16"
    if is_varlen or (is_default and model.config._attn_implementation == "sdpa"):
        model.set_attn_implementation("varlen")
    model.get_input_embeddings().padding_idx = None  # or an end token that also pads would not learn
    if config.activation_checkpointing:
        with refusing(f"the model {path} with activation_checkpointing"):
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model


def load_merged(folder, model_config, config, tokenizer, head, blank):
    """load_model of an adapter's folder: with the model beside which it was trained it is made one."""
    if is_judge(folder) and not head:
        raise InputError(f"the model {folder} cannot be loaded: it is a reward model, without a language "
                         "model's head")
    if head and not is_judge(folder):
        raise InputError(f"the adapter {folder} is a language model's, without scores: begin from the whole "
                         "model, the run's merged/")
    kept_dtype = kept_state(folder).get("base_dtype", f"torch.{config.dtype}")
    beside = types.SimpleNamespace(**vars(config) | {"dtype": kept_dtype.removeprefix("torch.")})
    model = load_model(base_folder(folder), model_config, beside, tokenizer, head and "new scores", blank)
    dtype = getattr(torch, config.dtype)
    if blank or rank() > 0:
        return model.to(dtype)
    check_base(folder, hash_weights(AdaptersOff(model)))
    merge_adapter(model, folder, dtype)
    with contextlib.suppress(OSError):  # which tokens end an answer; a reward model's says nothing of it
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def load_policy(config, objective, run_data, checkpoint, blank=None) -> PreTrainedModel:
    """The model that learns, as a run starts or as a checkpoint has it, with the adapters that the config
    asks for; a reward model gets a scalar head if it has none. It is saved with the ids that end a response
    in this run; what text does not reach stays as it is."""
    head = "new scores" if objective.inputs == "scores" else None
    path, loading = policy_source(config, checkpoint)
    policy = load_model(path, run_data.model_config, loading, run_data.tokenizer, head, blank)
    whole = run_data.model_config
    if policy.config.model_type != whole.model_type and rank() == 0:
        others = ", ".join(name for name in whole.sub_configs if name != "text_config")
        print(f"model      the language model of {whole.model_type} alone: the rest, {others}, is not saved")
    if policy.can_generate():
        policy.generation_config.eos_token_id = run_data.end_ids
    add_adapters(policy, config, checkpoint, objective.in_stages)
    for x in unread(policy):
        x.requires_grad_(False)
    return policy


def load_adapted(checkpoint, trust_remote_code):
    """A checkpoint's adapter and the model beside it as one, in the host's memory, and its tokenizer."""
    dtype = kept_state(checkpoint).get("base_dtype", "torch.float32").removeprefix("torch.")
    config = types.SimpleNamespace(
        dtype=dtype, compute_dtype=dtype, trust_remote_code=trust_remote_code, max_length=0, device="cpu",
        attention=None, activation_checkpointing=False)
    with refusing(f"the tokenizer of {checkpoint}"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    model_config, _ = load_model_config(checkpoint, config, tokenizer)
    head = "scores" if is_judge(checkpoint) else None
    return load_model(checkpoint, model_config, config, tokenizer, head), tokenizer


def check_loaded(info, head):
    """Raises ValueError if what from_pretrained says of the weights is not what the head needs."""
    if not head and any(name.startswith("score.") for name in info["unexpected_keys"]):
        raise ValueError("it is a reward model, without a language model's head")
    if head == "scores" and any("score.weight" in str(key) for key in info["mismatched_keys"]):
        raise ValueError("it is a classifier of several labels, and a reward model has one score")
    absent = {*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])}
    if head == "scores" and "score.weight" in absent:
        raise ValueError("it is no reward model, it has no scalar head: train one by loss=rm")
    if absent := sorted(absent - ({"score.weight"} if head == "new scores" else set())):
        raise ValueError(f"{len(absent)} weights are missing or of another shape, first {absent[0]}")


@torch.no_grad()
def check_causal(model, path):
    """Refuses a model whose predictions depend on later tokens: its log-probabilities mean nothing here."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 8, 7, 6, 5]], device=model.device)
    ids %= model.config.get_text_config().vocab_size
    first, second = model.eval().base_model(input_ids=ids, use_cache=False)[0][:, :4].float()
    if not torch.allclose(first, second, atol=1e-2):
        raise InputError(f"{path} is no causal language model, its predictions depend on later tokens: take "
                         "one that is")


@raise_on_all_ranks
def load_beside(key, path, config, tokenizer, head=None) -> PreTrainedModel:
    """A model beside the policy, a reference or judge, with the same tokenizer. `key` names it."""
    if path != "tiny":
        check_same_tokenizer(key, path, tokenizer, config)
    model_config, _ = load_model_config(path, config, tokenizer)
    return load_model(path, model_config, config, tokenizer, head)


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the model's weights: names, types, shapes, and the sha256 of the bytes of each.

    `2-` before it: until 2026-11-26 it was another.
    """
    return from_first(hash_weights(model))


def fingerprints(policy, reference, reward_model) -> dict:
    """What a run rests on, {name: fingerprint or None}, with the base of adapters."""
    base = base_of(policy)
    found = {"base": base and fingerprint(base)}
    is_base = isinstance(reference, AdaptersOff) and not reference.has_opponent
    found["reference"] = found["base"] if is_base else reference and fingerprint(reference)
    return found | {"reward_model": reward_model and fingerprint(reward_model)}


def hash_weights(model):
    """The fingerprint, on the first rank; each core takes one weight after another."""
    def hashed(values):
        return hashlib.sha256(values.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
    weights = []
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for name, tensor in sorted(state_of(model).items()):
            values = full_tensor(tensor)
            if rank() == 0:
                described = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
                weights.append((described, threads.submit(hashed, values.detach().cpu())))
                if len(weights) >= 16:
                    weights[-16][1].result()  # no more copies at once
    text = "\n".join(f"{described} {future.result()}" for described, future in weights)
    return "2-" + hashlib.sha256(text.encode()).hexdigest()


def check_fingerprints(state, fingerprints):
    """Raises InputError where something that a run rests on is not what it began with."""
    for what, now in fingerprints.items():
        if state[what] not in (now, None):
            what = "tokenizer or chat template" if what == "tokens" else what
            raise InputError(f"the {what} is not what this run began with: put it back, or start anew")


@contextlib.contextmanager
def refusing(what):
    """Turns what transformers raises while it loads from a folder or the hub into one sentence."""
    try:
        yield
    except Exception as error:  # of any kind: a config.json can be wrong in many ways
        raise InputError(f"{what} cannot be loaded: {first_line(error)}") from error


def keep_freed_memory():
    """Tells glibc to keep what a step frees for the next: to give it back to the system and get it again
    takes a tenth of a step's time on a CPU. Blocks above 32 MB do go back, or the heap would have gaps."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: smaller blocks come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


# ---------------------------------------------------------------- optimizer


def optimizer_names():
    """The torch.optim classes whose step needs neither a closure nor sparse gradients."""
    base = torch.optim.Optimizer
    return sorted(name for name, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, base)
                  and c not in (base, torch.optim.LBFGS, torch.optim.SparseAdam))


def make_optimizer(parameters, config) -> torch.optim.Optimizer:
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
    options, parameters = config.optimizer_args, [x for x in parameters if x.requires_grad]
    has_fused = "fused" in known and (num_ranks() == 1 or "Adam" in config.optimizer)  # of shards no others
    if has_fused and not {"fused", "foreach", "differentiable"} & options.keys():
        options = options | {"fused": True}
    try:
        return optimizer_class(parameters, lr=config.lr, **options)
    except Exception as error:
        raise InputError(f"{config.optimizer} with {config.optimizer_args} is refused: {error}") from error


@raise_on_all_ranks
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


def learning_rate(step, num_steps, lr, config) -> float:
    """The rate of the step that follows `step` finished ones: linear warmup to lr, then the schedule down to
    min_lr."""
    warmup = config.warmup_steps
    if isinstance(warmup, float):
        warmup = math.ceil(round(warmup * num_steps, 6))  # for 0.1 * 30 is 3.0000000000000004
    rate = lr * min(1, (step + 1) / (warmup + 1))
    if config.lr_schedule == "constant" or step <= warmup:
        return rate
    left = (num_steps - step) / (num_steps - warmup)
    share = left if config.lr_schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
    return config.min_lr + (rate - config.min_lr) * share


def update(optimizer, model, is_first):
    """A step of the optimizer; of the first one with bfloat16 weights, says how much of it was rounded away,
    by a million weights that have a gradient."""
    weights = model.parameters() if is_first else ()
    learning = [x for x in weights if x.grad is not None and x.dtype == torch.bfloat16]
    if not learning:
        optimizer.step()
        return
    every = max(1, sum(x.numel() for x in learning) // 1_000_000)

    def some(tensor):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.detach().flatten()[::every].clone()
    before = [(some(x), some(x.grad) != 0) for x in learning]
    optimizer.step()
    stayed = sum(((some(x) == old) & has).sum().item() for x, (old, has) in zip(learning, before))
    stayed, total = sum_over_ranks([stayed, sum(has.sum().item() for _, has in before)])
    tqdm.write(f"rounding   {stayed / max(1, total):.1%} of the weights, in bfloat16, did not move in the "
               f"first step, at lr {optimizer.param_groups[0]['lr']:.1e}; with dtype=float32 "
               "compute_dtype=bfloat16 they do")


def as_steps(interval, num_rows, batch_size) -> int:
    """An interval in optimizer steps: a whole number is one, 1.0 and less of an epoch; 0 stays 0: never."""
    return max(1, round(interval * num_rows / batch_size)) if isinstance(interval, float) else interval


def optimizer_state(model, optimizer) -> dict:
    """{"<weight>.<key>": value} of all that an optimizer remembers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[parameter]}.{key}": value for parameter, state in optimizer.state.items()
            for key, value in state.items() if value is not None}


def save_shards(tensors, folder, group):
    """Each rank's share of tensors as safetensors; of one process without the copies that shards cost."""
    if not tensors:
        return
    if num_ranks() == 1:
        os.makedirs(folder)
        whole = {name: x.contiguous() for name, x in tensors.items()}
        return save_file(whole, os.path.join(folder, "shard-00001.safetensors"))
    try:
        writer = HuggingFaceStorageWriter(folder, save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:  # which is no Exception
        raise next(iter(error.failures.values()))[0] from error


def restore_optimizer(folder, scalars, policy, optimizer, config):
    """Reads into the optimizer what it remembered, of which each rank takes its share. A weight that never
    had a gradient has nothing."""
    reader = HuggingFaceStorageReader(folder)
    kept = {*scalars, *(reader.read_metadata().state_dict_metadata if os.path.isdir(folder) else ())}
    stepped = {name.rpartition(".")[0] for name in kept}
    names = dict(policy.named_parameters())
    for p in (names[name] for name in sorted(stepped)):
        twin = torch.nn.Parameter(torch.zeros_like(p))
        twin.grad = torch.zeros_like(p)
        like = make_optimizer([twin], config)
        like.step()  # which makes a state of the right form
        optimizer.state[p] = like.state[twin]
    state = optimizer_state(policy, optimizer)
    if state.keys() != kept:
        raise ValueError(f"of {len(kept)} things that the optimizer remembers it asks for {len(state)}")
    tensors = {name: x for name, x in state.items() if torch.is_tensor(x)}
    if tensors:
        dcp.load(tensors, storage_reader=reader, no_dist=num_ranks() == 1)  # in place
    for name, value in (tensors | scalars).items():
        weight, _, key = name.rpartition(".")
        optimizer.state[names[weight]][key] = value
