"""How does what a run writes stay whole? Its records, folders that are complete or not there, hashes."""

import concurrent.futures
import contextlib
import errno
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import re
import secrets
import shutil
import subprocess

import yaml

from engine import InputError, first_line
from engine.config import ROOT, Dumper, read_yaml
from engine.distributed import from_first, raise_on_all_ranks, rank, wait_for_all

# ---------------------------------------------------------------- records


class RunFolder:
    """A run's settings and files of JSON lines, which the first rank writes; wandb gets the same numbers."""

    def __init__(self, run_dir):
        self.run_dir, self.wandb = run_dir, None
        self.hashers = {}  # of files that grow: {name: sha256 of what is there}

    @raise_on_all_ranks
    def start(self, config, resumed_at=None):
        """Starts wandb, writes config.yaml with the code's version. resumed_at: the step it goes on from."""
        if rank() > 0:
            return
        packages = ["torch", "transformers", "datasets", "tokenizers", "numpy"]
        packages += ["peft"] if config.lora["rank"] else []
        code = {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain")),
                "versions": {name: importlib.metadata.version(name) for name in packages}}
        provenance = {"run_id": secrets.token_hex(6), **code, "resumed": []}
        path = self.path("config.yaml")
        if resumed_at is not None:  # what the run began with stays
            provenance |= read_provenance(path)
            provenance["resumed"].append({"step": resumed_at, **code})
        # What holds for one call only, and nobody else's leave to run code, is not kept.
        settings = vars(config) | {"resume": False, "trust_remote_code": False, "provenance": provenance}
        self.start_wandb(config, settings)
        with open(path + ".partial", "w", encoding="utf-8") as file:
            yaml.dump(settings, file, Dumper, sort_keys=False, allow_unicode=True)
        sync(path + ".partial")  # without it no run goes on
        os.replace(path + ".partial", path)
        sync(self.run_dir)
        sync(os.path.dirname(self.run_dir))

    def start_wandb(self, config, settings):
        if config.wandb == "disabled":
            return
        import wandb
        try:
            self.wandb = wandb.init(
                project=config.wandb_project, name=config.exp_name, mode=config.wandb, dir=self.run_dir,
                id=settings["provenance"]["run_id"], resume="allow", config=settings)
        except wandb.errors.Error as error:
            raise InputError(f"wandb={config.wandb} does not start: {first_line(error)}") from error
        self.wandb.define_metric("*", step_metric="step")

    def close(self):
        if self.wandb:
            self.wandb.finish()

    def log(self, place: dict, metrics: dict):
        """One line in metrics.jsonl. In wandb the names of an evaluation's metrics begin with eval/."""
        self.write("metrics.jsonl", [place | metrics])
        if self.wandb:
            prefix = "eval/" if place["split"] == "eval" else ""
            metrics = {prefix + name: value for name, value in metrics.items()}
            self.wandb.log({"step": place["step"], **metrics})

    def log_samples(self, step: int, records: list[dict]):
        self.write("samples.jsonl", [{"step": step, **record} for record in records])
        if self.wandb and records:
            import wandb
            table = wandb.Table(columns=list(records[0]), data=[list(record.values()) for record in records])
            self.wandb.log({"step": step, "eval/samples": table})

    def path(self, name):
        return os.path.join(self.run_dir, name)

    def lines(self, name) -> list[dict]:
        """The records in a file of JSON lines; none where it is absent."""
        if not os.path.exists(self.path(name)):
            return []
        with open(self.path(name), encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def write(self, name, records):
        """Adds records to a file of JSON lines."""
        if rank() > 0:
            return
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        with open(self.path(name), "ab") as file:
            file.write(text)
        if name in self.hashers:
            self.hashers[name].update(text)

    def rewind(self, name, keep) -> list[dict]:
        """Leaves those records in a file of JSON lines that `keep` accepts; returns them, on all ranks."""
        self.hashers.pop(name, None)
        return from_first(rewind_jsonl(self.path(name), keep) if rank() == 0 else None)

    def cut(self, records: dict, step) -> set[int]:
        """Cuts what a run appends back to where it was saved, at this step or never (None), but for whole
        evaluations of the step itself, which may have come after; returns the steps that are evaluated."""
        def cut_one(name, keep):
            self.hashers.pop(name, None)
            if not os.path.exists(self.path(name)):
                return []
            with open(self.path(name), "rb") as file:
                known, more = file.read(records.get(name, {"size": 0})["size"]), file.read()
            os.truncate(self.path(name), len(known))
            self.write(name, [record for _, record in whole_lines(more.splitlines(keepends=True))
                              if record.get("step") == step and keep(record)])
            return self.lines(name)

        def cut_all():
            lines = cut_one("metrics.jsonl", lambda line: line.get("split") == "eval")
            evaluated = {line["step"] for line in lines if line["split"] == "eval"}
            cut_one("samples.jsonl", lambda line: step in evaluated)
            return evaluated
        return from_first(cut_all() if rank() == 0 else None)

    def digests(self, iteration) -> dict:
        """{name: {"size": bytes, "sha256": hex}} of the records up to now, and of answers that are in use."""
        found = {}
        for name in sorted(os.listdir(self.run_dir)):
            match = re.fullmatch(r"(?:metrics|samples|rewards|generated-(\d+))\.jsonl", name)
            if match and (match[1] is None or int(match[1]) <= iteration):
                if name not in self.hashers:
                    self.hashers[name] = hash_file(self.path(name))
                digest = self.hashers[name].hexdigest()
                found[name] = {"size": os.path.getsize(self.path(name)), "sha256": digest}
        return found

    def clear_partial(self):
        """Deletes what an interrupted save left."""
        for name in os.listdir(self.run_dir) if rank() == 0 else ():
            if re.fullmatch(r"\.(step-\d+|reference|base)\.partial", name):
                shutil.rmtree(self.path(name))

    def sync(self):
        """Waits until all records are on the disk."""
        for name in os.listdir(self.run_dir) if rank() == 0 else ():
            if name.endswith(".jsonl"):
                sync(self.path(name))


def read_provenance(path):
    """What a run's config.yaml says of the code that it began with; none if it is not a run's."""
    return read_yaml(path, provenance=True).get("provenance") or {}


def git(*arguments):
    """What git prints in this clone, or None where there is neither."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class Best:
    """The best evaluation by a metric, keep_best, of those after step 0."""

    def __init__(self, metric: str | None):
        self.metric, self.step, self.value = metric, None, None

    def update(self, step, metrics) -> bool:
        """Whether an evaluation is better than those before. Raises InputError if it lacks the metric."""
        if self.metric not in metrics:
            raise InputError(f"keep_best={self.metric} is no metric of an evaluation, which has "
                             f"{', '.join(metrics)}: choose one")
        value = metrics[self.metric]
        if step == 0 or value is None or not math.isfinite(value):
            return False
        is_lower_better = re.search(r"(^|[/_])(loss|kl)(/|$)", self.metric)  # also of one source, loss/<name>
        if self.step is None or (value < self.value if is_lower_better else value > self.value):
            self.step, self.value = step, value
        return self.step == step


# ---------------------------------------------------------------- what was written is what is there


def hash_file(path, size=None):
    """sha256 of a file, or of its first `size` bytes; hashlib lets other threads run meanwhile."""
    hasher, left = hashlib.sha256(), math.inf if size is None else size
    with open(path, "rb") as file:
        while left and (part := file.read(min(left, 2**22))):
            hasher.update(part)
            left -= len(part)
    return hasher


def files_in(folder) -> list[str]:
    """Paths of all that is no folder, from this one on."""
    found = glob.glob("**", root_dir=folder, recursive=True, include_hidden=True)
    return sorted(name for name in found if not os.path.isdir(os.path.join(folder, name)))


def digests(folder, names) -> dict:
    """{name: {"size": bytes, "sha256": hex}} of files, each in a thread."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        hashers = threads.map(lambda name: hash_file(os.path.join(folder, name)), names)
        return {name: {"size": os.path.getsize(os.path.join(folder, name)), "sha256": hasher.hexdigest()}
                for name, hasher in zip(names, hashers)}


def find_fault(folder, known, growing=False) -> str | None:
    """Of {name: {"size", "sha256"}} the first file that is not so any more, as text; None if all are.

    growing: files may be longer.
    """
    def judge(name):
        path, size = os.path.join(folder, name), known[name]["size"]
        if not os.path.isfile(path):
            return f"{name} is missing"
        found = os.path.getsize(path)
        if found < size or (found > size and not growing):
            return f"{name} has {found:,} bytes of {size:,}"
        if hash_file(path, size).hexdigest() != known[name]["sha256"]:
            return f"{name} is not what was saved"
    with concurrent.futures.ThreadPoolExecutor() as threads:
        return next(filter(None, threads.map(judge, known)), None)


DISK = {errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
        errno.EFBIG, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


def disk_fault(error) -> str | None:
    """What the system says of a disk that does not take what is written, or None for another error."""
    told = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors passes it on
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    return os.strerror(number) if number in DISK else None


@contextlib.contextmanager
def writing(run_dir):
    """Makes one sentence of what a full or read-only disk raises meanwhile."""
    try:
        yield
    except Exception as error:
        place = os.path.abspath(getattr(error, "filename", None) or run_dir)  # or a folder above it
        why, is_own = disk_fault(error), os.path.commonpath([place, run_dir]) in (place, run_dir)
        if isinstance(error, InputError) or not why or not is_own:
            raise
        latest = os.path.join(run_dir, "LATEST")
        saved = f"{os.readlink(latest)} is saved" if os.path.islink(latest) else "nothing is saved yet"
        raise InputError(f"{place} cannot be written, {why.lower()}: {saved}; make room there, and go on by "
                         f"resume={'true' if os.path.islink(latest) else 'auto'}") from error


# ---------------------------------------------------------------- whole, or not there


@contextlib.contextmanager
def complete_folder(final, group=None):
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


def point(run_dir, link, name):
    """Makes a link in a run's folder, LATEST or merged, point to another folder there."""
    temporary = os.path.join(run_dir, f".{link}")
    if os.path.lexists(temporary):
        os.remove(temporary)
    os.symlink(name, temporary)
    os.replace(temporary, os.path.join(run_dir, link))
    sync(run_dir)


def whole_lines(lines):
    """Of lines of JSON, bytes, for a crash can tear a character, those that are whole, with their records."""
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if line.endswith(b"\n") and isinstance(record, dict):
                yield line, record


def rewind_jsonl(path, keep):
    """Rewrites a file of JSON lines with those that `keep` accepts and returns them; a torn line goes too."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        kept = [(line, record) for line, record in whole_lines(file) if keep(record)]
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
