"""What is a GPU told before a run, and how near to its peak does a step come?"""

import os
import weakref

import torch

from engine.batches import CACHED
from engine.distributed import device, num_ranks
from engine.forward import multiply_adds

PEAKS = {  # bfloat16 FLOP/s, dense, by NVIDIA's datasheets, of a card whose name holds this; the first counts
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12}
COUNTED = weakref.WeakKeyDictionary()  # multiply_adds of a model, once and not in every step


def prepare_gpu():
    """To be called before the first model. cuDNN's attention, torch 2.13's first choice on Hopper, gives NaN
    gradients under masks of some lengths (pytorch #196678) and makes a plan for each new shape."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for add_in_order, read at the first product


def known_before(measured, config) -> dict:
    """What a run that goes on has measured, on such GPUs with such settings; what is found is noted there."""
    if device().type == "cpu":
        return {}
    own = [torch.cuda.get_device_name(), num_ranks(), config.attention, config.activation_checkpointing,
           config.fsdp]
    return measured if measured and measured["for"] == own else {"for": own}


def gpu_metrics(throughput: dict) -> dict[str, float]:
    """Of the steps since the last call: mfu, the share of the card's peak in bfloat16 that `flops` in
    `seconds` reached, where that is known, and memory_gb, the most that was allocated. None on a CPU."""
    if device().type == "cpu":
        return {}
    metrics = {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    torch.cuda.reset_peak_memory_stats()
    name = torch.cuda.get_device_name()
    if peak := next((peak for card, peak in PEAKS.items() if card in name), None):
        metrics["mfu"] = throughput["flops"] / throughput["seconds"] / num_ranks() / peak
    return metrics


def step_flops(model, examples, needs_reference) -> float:
    """necessary_flops of a step on a GPU; a reference whose numbers are known does not run."""
    if device().type == "cpu":
        return 0.0
    return necessary_flops(model, examples, needs_reference and CACHED not in examples[0].columns)


def necessary_flops(model, examples, with_reference: bool) -> float:
    """Floating-point operations of a step, forward and backward, on each prompt and response once, unpadded.

    with_reference: whether a reference as large runs in the step too, forward alone.
    """
    parts = flops_by_part(model, examples)
    attention, products = parts.pop("attention"), sum(parts.values())
    passes = 3 if all(x.requires_grad for x in model.parameters()) else 2  # frozen ones have no gradient
    return products * (passes + with_reference) / 3 + attention * (3 + with_reference) / 3


def flops_by_part(model, examples) -> dict[str, float]:
    """The same without a reference, of prompts, responses, the head and attention: a multiplication and an
    addition each, and a backward is two forwards."""
    if model not in COUNTED:
        COUNTED[model] = multiply_adds(model)
    (linear, attention), config = COUNTED[model], model.config.get_text_config()
    head = config.vocab_size * config.hidden_size if model.get_output_embeddings() is not None else 0
    parts = dict.fromkeys(("prompt", "response", "head", "attention"), 0)
    for example in examples:
        prompt, lengths = len(example.prompt), [*map(len, example.responses)]
        pairs = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in lengths)
        parts["prompt"] += 6 * linear * prompt
        parts["response"] += 6 * linear * sum(lengths)
        parts["head"] += 6 * head * sum(lengths)
        parts["attention"] += 12 * attention * pairs  # a score and a value
    return parts
