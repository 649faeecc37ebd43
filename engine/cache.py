"""What is computed once, and kept? The reference's log-probabilities, and rewards of pairs without any."""

import functools
import hashlib
import math
import os
import secrets
import time

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from engine import InputError
from engine.batches import CACHED, LIST_REWARDS, REWARDS, Batcher, Example
from engine.config import CACHE
from engine.distributed import device, from_first, num_ranks, raise_on_all_ranks, rank
from engine.folder import RunFolder, disk_fault, sync
from engine.forward import response_logps
from engine.report import progress


class ReferenceCache:
    """The reference's log-probabilities, in files under a key of all that decides them, to the last bit."""

    def __init__(self, reference, fingerprint, config, bf16):
        self.folder = CACHE if config.reference_cache is True else config.reference_cache
        self.logps = functools.partial(response_logps, reference, bf16=bf16)
        unread = {"_name_or_path", "architectures", "dtype", "transformers_version"}
        settings = {k: v for k, v in reference.config.to_dict().items() if k not in unread}
        arithmetic = [config.dtype, config.compute_dtype, config.compile, torch.__version__,
                      reference.config._attn_implementation, device().type]
        if num_ranks() > 1 and config.compute_dtype != config.dtype:
            arithmetic.append("fsdp")  # which has no autocast
        self.reference, self.arithmetic = [fingerprint, sorted(settings.items())], arithmetic
        self.started, self.num_found, self.num_computed = time.monotonic(), 0, 0
        self.make_folder()

    @raise_on_all_ranks
    def make_folder(self):
        try:
            if rank() == 0:
                os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise InputError(f"reference_cache={self.folder} cannot be written, {error.strerror}: "
                             "name another folder, or set it to false") from error

    def fill_in(self, examples: list[Example], batcher: Batcher):
        """Puts log-probabilities into the examples' columns, in the batcher's microbatches of evaluation."""
        if not examples:
            return
        shapes = [(len(part), layout.shared) for part, layout in batcher.eval_parts(examples)]
        digest = hashlib.sha256(repr([*self.reference, shapes, self.arithmetic]).encode())
        for example in examples:
            for ids in (example.prompt, *example.responses, *(example.token_weights or ())):
                digest.update(len(ids).to_bytes(4) + ids.tobytes())
        path = os.path.join(self.folder, digest.hexdigest() + ".safetensors")
        counts = [len(example.responses) for example in examples]
        logps = from_first(read_checked(path, (len(counts), max(counts))) if rank() == 0 else None)
        if logps is None:
            self.num_computed += len(examples)
            rows = batcher.values(self.logps, examples, "reference")
            rows = [row + [math.nan] * (max(counts) - len(row)) for row in rows]
            logps = torch.tensor(rows, dtype=torch.float64)
            if rank() == 0:
                try:
                    write_checked(path, logps)
                except Exception as error:
                    if not disk_fault(error):
                        raise
                    tqdm.write(f"reference  {self.folder} takes no more, {disk_fault(error).lower()}: its "
                               "numbers are not kept for later runs")
        else:
            self.num_found += len(examples)
        for example, count, row in zip(examples, counts, logps.tolist()):
            example.columns[CACHED] = row[:count]

    def report(self):
        tqdm.write(f"reference  log-probabilities of {self.num_found:,} rows read from {self.folder}, of "
                   f"{self.num_computed:,} computed, {time.monotonic() - self.started:.1f} s")


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


def fill_in_rewards(examples, default, score):
    """Gives examples that came without rewards the default ones, or those that score(examples) gives."""
    lacking = [example for example in examples if None in example.columns.values()]
    rewards = [default] * len(lacking) if default else score(lacking) if lacking else ()
    for example, own in zip(lacking, rewards):
        is_list = LIST_REWARDS in example.columns
        example.columns |= {LIST_REWARDS: own} if is_list else dict(zip(REWARDS, own))


@torch.no_grad()
def score_or_read(examples: list[Example], folder: RunFolder, fingerprint: str, score) -> list[list[float]]:
    """A reward model's score of each response of these examples: read, where it was kept.

    score(examples) -> the same. rewards.jsonl keeps them, under a key of judge and ids.
    """
    kept = folder.rewind("rewards.jsonl", lambda line: {"key", *REWARDS} <= line.keys() or "rewards" in line)
    known, scores = {line["key"]: line for line in kept}, []
    for start in progress(range(0, len(examples), 1000), "rewards, 1,000 rows at a time"):
        part = [example.rendered() for example in examples[start:start + 1000]]
        keys = [hashlib.sha256(b"|".join([fingerprint.encode(), *(ids.tobytes() for ids in (
            example.prompt, *example.responses))])).hexdigest() for example in part]
        if not known.keys() >= set(keys):
            scored = [{"key": key, "where": example.where,
                       **(dict(zip(REWARDS, row)) if len(row) == 2 else {"rewards": row})}
                      for key, example, row in zip(keys, part, score(part))]
            folder.write("rewards.jsonl", scored)
            known = {line["key"]: line for line in scored} | known
        scores += [known[key].get("rewards") or [known[key][name] for name in REWARDS] for key in keys]
    return scores
