"""Which weights learn? All of a model's, or adapters beside them, over peft; and how one is made of both."""

import contextlib
import json
import math
import os
import types
import warnings

import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from engine import InputError, first_line
from engine.distributed import copy_full
from engine.state import kept_state

LEARNS, FROZEN = "default", "reference"  # names in peft: the policy's adapter, and that of an opponent


def import_peft(what):
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{what} needs the peft library: pip install peft") from error
    return peft


# ---------------------------------------------------------------- adapters in a model


def makes_base(config):
    """Whether the frozen weights beside a run's adapters came from no folder, and are kept in the run's."""
    return config.lora["rank"] > 0 and (config.model == "tiny" or is_adapter(config.model))


def add_adapters(model, config, checkpoint, with_opponent=False):
    """Puts adapters into a model, in place, if the config has them: they and a reward model's head learn, the
    rest is frozen. At first they change nothing.

    checkpoint: of a run that goes on, which says where its base is, or None. Raises InputError without peft,
    and for targets of which one matches nothing.
    """
    settings = config.lora
    if not settings["rank"]:
        return
    beside = os.path.join(config.run_dir, "base") if makes_base(config) else config.model
    peft, apart = import_peft(f"lora.rank={settings['rank']}"), {*unread(model)}
    apart = [name for name, x in model.named_modules() if getattr(x, "weight", None) in apart]
    options = peft.LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], target_modules=read_targets(model, config),
        use_rslora=settings["rslora"], init_lora_weights=settings["init"] == "default" or "gaussian",
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
        exclude_modules=apart or None,
        base_model_name_or_path=base_folder(checkpoint) if checkpoint else beside)
    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # an opponent has one of its own
    for name in (LEARNS, FROZEN)[:1 + with_opponent]:
        peft.inject_adapter_in_model(options, model, name)
    for name, x in model.named_parameters():
        x.requires_grad_(f".{LEARNS}." in name or name.startswith("score."))
        if ".lora_" in name or x.requires_grad:  # peft makes them of the type of what they stand beside
            x.data = x.data.to(getattr(torch, config.dtype))
    for layer in adapted_layers(model):
        layer._active_adapter = [LEARNS]


def read_targets(model, config):
    """The targets as peft takes them, for which one word is a pattern. It would pass over a name that matches
    nothing, and put into embeddings what would not learn here; tied ones cannot be merged."""
    targets, embeddings = config.lora["targets"], model.get_input_embeddings().weight
    if targets in ("all-linear", ["all-linear"]):
        return "all-linear"
    targets = [targets] if isinstance(targets, str) else targets
    if "all-linear" in targets:
        raise InputError(f"lora.targets={targets}: all-linear stands alone, or give all names")
    linear = [name for name, x in model.named_modules() if isinstance(x, (torch.nn.Linear, Conv1D))
              and x.weight is not embeddings and name != "score"]  # a reward model's head learns itself
    if wrong := [x for x in targets if not any(f".{name}".endswith(f".{x}") for name in linear)]:
        names = sorted({name.rpartition(".")[2] for name in linear})
        raise InputError(f"lora.targets={targets}, of which {', '.join(wrong)} matches nothing in the model: "
                         f"choose from {', '.join(names)}, or all-linear")
    return targets


def unread(model):
    """The weights that text does not reach: those of what sees or hears, beside the language model."""
    if model.config is model.config.get_text_config():
        return []
    parts = model.get_decoder(), model.get_output_embeddings(), getattr(model, "score", None)
    read = {x for part in parts if part is not None for x in part.parameters()}
    return [x for x in model.parameters() if x not in read]


def adapted_layers(model):
    """The layers that have adapters; none of a model without."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


class AdaptersOff:
    """The policy as a reference: with its adapters off, or with the frozen one of self-play's opponent.

    It has the policy's attributes; `in_place` makes the policy itself be it for a while. No second model.
    """

    def __init__(self, policy, has_opponent=False):
        self.policy, self.has_opponent, self.layers = policy, has_opponent, adapted_layers(policy)

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def state_dict(self, **options):
        """That of a model without adapters; or with the opponent's, by the names of the policy's."""
        state = self.policy.state_dict(**options)
        if not self.has_opponent:
            return {name.replace(".base_layer", ""): x for name, x in state.items()
                    if ".lora_" not in name and not name.startswith("score.")}
        return {name.replace(f".{FROZEN}.", f".{LEARNS}."): x for name, x in state.items()
                if f".{LEARNS}." not in name}

    def to(self, device):
        """It stays where the policy is."""
        return self

    @contextlib.contextmanager
    def in_place(self):
        for layer in self.layers:  # by peft's own fields, for its functions change what learns too
            layer._active_adapter, layer._disable_adapters = [FROZEN], not self.has_opponent
        try:
            yield self.policy
        finally:
            for layer in self.layers:
                layer._active_adapter, layer._disable_adapters = [LEARNS], False

    @torch.no_grad()
    def load_state_dict(self, state):
        """The opponent's adapter becomes what the policy's is now."""
        own = dict(self.policy.named_parameters())
        for name, x in own.items():
            if f".{FROZEN}." in name:
                x.copy_(own[name.replace(f".{FROZEN}.", f".{LEARNS}.")])


def base_of(model):
    """A model without its adapters; None where it has none."""
    return AdaptersOff(model) if adapted_layers(model) else None


@contextlib.contextmanager
def as_asked(model):
    """The model; for AdaptersOff the policy as it is meant, without gradients: a checkpointed layer would run
    again in the backward, with its adapters on."""
    if not isinstance(model, AdaptersOff):
        yield model
        return
    with model.in_place() as policy, torch.no_grad():
        yield policy


def state_of(model) -> dict[str, torch.Tensor]:
    """A model's state dict, without the adapter of an opponent."""
    return {name: x for name, x in model.state_dict().items() if f".{FROZEN}." not in name}


# ---------------------------------------------------------------- on disk, in peft's own format


def is_adapter(path):
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def read_options(folder) -> dict:
    """What adapter_config.json says. Raises InputError if that is no LoRA beside a model."""
    try:
        with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
            options = json.load(file)
        if options["peft_type"] != "LORA" or not isinstance(options["base_model_name_or_path"], str):
            raise ValueError("it is of another kind")
        return options
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"the adapter {folder} cannot be read, its adapter_config.json is no LoRA's beside "
                         f"a model: {first_line(error)}") from error


def is_judge(folder):
    """Whether an adapter is a reward model's."""
    return read_options(folder).get("task_type") == "SEQ_CLS"


def base_folder(folder) -> str:
    """The folder or hub id of the model that an adapter stands beside. Raises InputError if it is gone.

    A base that came from no folder is in the run's, which may have been moved or copied.
    """
    path = read_options(folder)["base_model_name_or_path"]
    beside = os.path.join(os.path.dirname(os.path.realpath(folder)), "base")
    if os.path.basename(path) == "base" and os.path.isdir(beside):
        return beside
    if os.path.isabs(path) and not os.path.isdir(path):
        raise InputError(f"{folder} is an adapter of {path}, which is not there: put that model back")
    return path


def policy_source(config, checkpoint):
    """Where the policy's weights come from, and in which type: with adapters the frozen ones beside them."""
    path = checkpoint or config.model
    if not config.lora["rank"]:
        return path, config
    dtype = config.lora["base_dtype"] or config.dtype
    return base_folder(path) if checkpoint else path, types.SimpleNamespace(**vars(config) | {"dtype": dtype})


def read_adapters(policy, config, in_stages, checkpoint):
    """Reads a checkpoint's adapters; returns the reference that the policy itself is, if it has any."""
    if not adapted_layers(policy):
        return None
    if checkpoint and in_stages:
        first = kept_state(checkpoint)["first_step"]
        load_adapter(policy, os.path.join(config.run_dir, f"step-{first:06d}"))
    reference = AdaptersOff(policy, in_stages)
    reference.load_state_dict(policy)
    if checkpoint:
        load_adapter(policy, checkpoint)
    return reference


def check_base(folder, fingerprint):
    """Raises InputError where a run's adapter was trained beside other weights than those of this hash."""
    if kept_state(folder).get("base", fingerprint) != fingerprint:
        raise InputError(f"the adapter {folder} was trained beside other weights than those in "
                         f"{base_folder(folder)}: put them back")


def save_adapter(folder, form, weights):
    """form: the policy without weights. weights: {name: tensor} of what learns."""
    options = form.peft_config[LEARNS]
    options.inference_mode = True
    options.target_modules = sorted(options.target_modules)  # or their order would be another each time
    options.modules_to_save = ["score"] if any(name.startswith("score.") for name in weights) else None
    options.save_pretrained(folder)
    form.config.save_pretrained(folder)
    if form.can_generate():
        form.generation_config.save_pretrained(folder)  # which tokens end an answer
    weights = {"base_model.model." + name.replace(f".{LEARNS}.", "."): x for name, x in weights.items()}
    save_file(weights, os.path.join(folder, "adapter_model.safetensors"), {"format": "pt"})


@torch.no_grad()
def load_adapter(model, folder, name=LEARNS):
    """Reads an adapter's weights, and a head's, into a model. Raises InputError if they do not fit."""
    try:
        kept = load_file(os.path.join(folder, "adapter_model.safetensors"))
    except Exception as error:
        raise InputError(f"the adapter {folder} cannot be read: {first_line(error)}") from error
    own = {"base_model.model." + part.replace(f".{name}.", "."): x for part, x in model.named_parameters()
           if f".{name}." in part or part.startswith("score.")}
    shapes, found = ({part: tuple(x.shape) for part, x in tensors.items()} for tensors in (own, kept))
    if wrong := sorted(part for part in {*shapes, *found} if shapes.get(part) != found.get(part)):
        raise InputError(f"the adapter {folder} does not fit the model: {len(wrong)} weights are missing or "
                         f"of another shape, first {wrong[0]}")
    for part, x in own.items():
        copy_full(x, kept[part])


@torch.no_grad()
def merge_adapter(model, folder, dtype):
    """Makes a base and the adapter in a folder one model of `dtype`, in place, rounding once, and says by how
    much logits differ then. Raises InputError if the adapter cannot be read or does not fit."""
    peft = import_peft(f"the adapter {folder}")
    try:
        options = peft.LoraConfig.from_pretrained(folder)
        options.modules_to_save = None  # a reward model's head has its place
        peft.inject_adapter_in_model(options, model, LEARNS)
        for name, x in model.named_parameters():
            if ".lora_" in name:
                x.data = at_least_float(x)
        load_adapter(model.eval().requires_grad_(False), folder)
        ids = torch.arange(32, device=model.device)[None] % model.config.get_text_config().vocab_size
        before = model(input_ids=ids, use_cache=False).logits.float()
        for name, layer in [(name, x) for name, x in model.named_modules() if hasattr(x, "lora_A")]:
            merge_layer(model, name, layer, dtype)
    except InputError:
        raise
    except Exception as error:  # peft knows kinds that it does not merge
        raise InputError(f"the adapter {folder} cannot be merged: {first_line(error)}") from error
    del model.peft_config
    for x in model.requires_grad_(True).parameters():
        x.data = x.data.to(dtype)
    error = (model(input_ids=ids, use_cache=False).logits.float() - before).abs().max().item()
    if not math.isfinite(error):
        raise InputError(f"the adapter {folder} cannot be merged: logits are not finite then")
    print(f"adapter    of {folder} merged in {str(dtype)[6:]}; logits differ by at most {error:.1e}, of up "
          f"to {before.abs().max().item():.1f}")


def merge_layer(model, name, layer, dtype):
    """Puts in a layer's place its base with what its adapter adds. Of experts one adapter is around the
    other: the sum of both is rounded later."""
    base, (parent, _, child) = layer.get_base_layer(), name.rpartition(".")
    for x in base.parameters():
        x.data = at_least_float(x)
    layer.merge(adapter_names=[LEARNS])
    if child != "base_layer":
        setattr(model.get_submodule(parent), child, base)
        for x in base.parameters() if layer.base_layer is base else ():
            x.data = x.data.to(dtype)


def at_least_float(tensor):
    return tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
