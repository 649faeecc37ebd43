"""What happens in a run, in order? python train.py [--config mine.yaml] [key=value ...], or --help."""

import os
import shlex
import signal
import sys

from engine import InputError
from engine.config import SCHEMA, check_typed, read_arguments


def main(arguments: list[str]) -> int:
    """Runs what the arguments ask for; returns the exit status. Raises InputError for refused input."""
    given = read_arguments(arguments)

    # Torch takes seconds to import: only now, when what is mistyped has been refused.
    from data import DATASETS, load_data
    from engine.checkpoints import keep_merged, load_config, lock_folder
    from engine.distributed import MAX_HOURS, TEMPFAIL, WAITS, num_ranks, start_ranks
    from engine.dry_run import print_dry_run
    from engine.report import print_results
    from losses import OBJECTIVES

    # The settings, and the checkpoint to go on from, or None.
    config, checkpoint = load_config(given, OBJECTIVES, DATASETS)
    check_typed(arguments, config, OBJECTIVES)
    objective = OBJECTIVES[config.loss]
    if config.dry_run:
        if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes is enough
            run_data = load_data(config, objective, checkpoint)
            print_dry_run(config, objective, run_data, checkpoint)
        return 0

    start_ranks()  # joins torchrun's processes, if there are several
    trainer = build_trainer(config, checkpoint)
    with lock_folder(config.run_dir, config.resume, checkpoint):
        trainer.rewind_records()
        if checkpoint and trainer.is_finished and not trainer.eval_is_due():
            keep_merged(config)  # it may have been killed just before
            print(f"This run is finished: its last step, {trainer.step}, is in {checkpoint}.")
            return 0
        trainer.start_folder()
        stopped_by = trainer.train()  # 0, the number of a signal, MAX_HOURS or WAITS
        if not stopped_by:
            keep_merged(config)

    if not stopped_by:
        print_results(trainer.folder.lines("metrics.jsonl"), config.run_dir, trainer.saved_step, objective)
        return 0
    names = {MAX_HOURS: "max_hours", WAITS: f"{config.loss}.answers=wait"}
    name = names.get(stopped_by) or signal.Signals(stopped_by).name
    command = "torchrun ..." if num_ranks() > 1 else "python"
    print(f"Stopped by {name} after step {trainer.step} of {trainer.num_steps}; all is saved. To go on:\n"
          f"  {command} train.py resume=true run_dir={shlex.quote(os.path.relpath(config.run_dir))}")
    return TEMPFAIL if stopped_by in names else 128 + stopped_by


def build_trainer(config, checkpoint: str | None = None):
    """Data, tokenizer, models and Trainer of a config, printing a summary; writes nothing."""
    import torch

    from data import load_data
    from engine.checkpoints import reference_path
    from engine.gpu import prepare_gpu
    from engine.models import check_optimizer, keep_freed_memory, load_beside, load_policy
    from engine.report import print_summary
    from losses import OBJECTIVES
    from trainers import Trainer

    keep_freed_memory()
    prepare_gpu()
    check_optimizer(config)  # again, on shards if there are several ranks
    torch.manual_seed(config.seed)

    # The data as token ids; the tokenizer is the model's, that of `tiny` is made from the rows.
    objective = OBJECTIVES[config.loss]
    run_data = load_data(config, objective, checkpoint)
    tokenizer = run_data.tokenizer

    # The policy, which learns; the frozen reference, if none is named the same weights; a reward model.
    policy = load_policy(config, objective, run_data, checkpoint)
    reference = reward_model = None
    if objective.needs_reference:
        path = reference_path(config, objective.in_stages, checkpoint)
        reference = load_beside("reference", path, config, tokenizer) if path else policy
    if config.reward_model:
        reward_model = load_beside("reward_model", config.reward_model, config, tokenizer, "scores")

    trainer = Trainer(config, run_data, policy, reference, reward_model, checkpoint)
    print_summary(config, objective, run_data, trainer.policy, trainer.num_steps, trainer.saved_step)
    return trainer


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # what a screen cannot show ends no run
    if {"--help", "-h"} & set(sys.argv[1:]):
        with open(SCHEMA, encoding="utf-8") as schema:
            print(schema.read(), end="")
        sys.exit(0)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # or shapes leave gaps on a GPU
    os.environ.setdefault("TQDM_LEAVE", "")  # no bar of a library stays on the screen
    if not sys.stderr.isatty():  # a log file wants no progress bars
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    try:
        status = main(sys.argv[1:])
    except InputError as refused:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
            print(f"error: {refused}", file=sys.stderr)
        status = 2
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        from engine.distributed import leave_ranks
        status = leave_ranks(status)
    sys.exit(status)
