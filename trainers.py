"""What is a step, an evaluation, a run? Read Trainer from `train` on; self-play is a loop around the loop."""

import copy
import dataclasses
import functools
import math
import time
from collections import Counter

import torch
from transformers import PreTrainedModel

from engine import InputError
from engine.batches import Batch, Batcher, Example, default_max_tokens, stream
from engine.cache import ReferenceCache, fill_in_rewards, score_or_read
from engine.checkpoints import Checkpoints, keep_models, restore_state
from engine.distributed import (WAITS, Stopped, StopRequest, device, full_tensor, meta_copy, num_ranks,
                                shard, shard_frozen, sync_gradients)
from engine.dry_run import tokens_that_fit
from engine.first_batch import check_first_batch
from engine.folder import RunFolder
from engine.forward import choose_layouts, response_logps, response_scores
from engine.gpu import gpu_metrics, known_before, step_flops
from engine.lora import read_adapters
from engine.models import (as_steps, check_fingerprints, fingerprint, fingerprints, learning_rate,
                           make_optimizer, update)
from engine.objectives import (SELF_PLAY, add_to_sums, call_loss, can_cache, join, mean_metrics, parameters,
                               read_values, step_state, token_losses)
from engine.report import Progress, describe_failure, print_evaluation, print_samples
from engine.sampling import Sampler, SelfPlay
from engine.state import COUNTERS, read_state
from losses import OBJECTIVES, Objective


class Trainer:
    """One run: the policy, its objective and optimizer, and the folder that keeps it.

    run_data: a data.RunData. policy, reference, reward_model: as load_model gives them; a reference that is
    the policy itself is frozen as it is now. checkpoint: the folder that the policy comes from, to go on.

    A run is one iteration: all its epochs over the data. Self-play has several, each over pairs of its own,
    train_examples, from first_step on; before the first it stands at iteration -1, with nothing to train on.
    """

    def __init__(self, config, run_data, policy: PreTrainedModel, reference: PreTrainedModel | None = None,
                 reward_model: PreTrainedModel | None = None, checkpoint: str | None = None):
        self.config, self.data, self.objective = config, run_data, OBJECTIVES[config.loss]
        self.train_examples = [] if self.objective.self_play else run_data.train_examples
        self.step = self.examples = self.first_step = self.first_examples = 0
        self.iteration = -1 if self.objective.self_play else 0
        self.state, self.opponent = {}, None  # what after_step moves; who answered this iteration's prompts
        self.records = {}  # what each was when a checkpoint was saved
        self.response_values = response_scores if self.objective.inputs == "scores" else response_logps
        # bf16: by autocast, on one device; shards cast by themselves.
        self.bf16 = num_ranks() == 1 and (config.compute_dtype, config.dtype) == ("bfloat16", "float32")
        self.saved_step, self.evaluated_steps, self.next_global_batch = None, set(), None
        self.reference_samples, self.reference_waits = None, False
        self.max_steps = math.inf if config.max_steps is None else config.max_steps
        self.throughput = Counter()  # since the last logged step

        is_own = reference is policy and config.lora["rank"] > 0  # the policy without its adapters
        if config.keep_best and not run_data.eval_examples:
            raise InputError(f"keep_best={config.keep_best} needs held-out rows: name some by eval_data=")

        # Parts with a state of their own, each in its room of the engine.
        self.stop = StopRequest(config.max_hours)
        self.folder = RunFolder(config.run_dir)
        self.checkpoints = Checkpoints(self.folder, meta_copy(policy), run_data.tokenizer, config)
        self.batcher = self.make_batcher(policy, None if is_own else reference, reward_model, checkpoint)

        # Models, sharded over the ranks; only the policy learns.
        if reference is policy and num_ranks() == 1 and not is_own:  # of several shard() makes copies
            reference = copy.deepcopy(policy)
        self.policy = shard(policy, config).train()
        own = read_adapters(self.policy, config, self.objective.in_stages, checkpoint)
        self.reference = own if is_own else reference and shard_frozen(reference, config)
        self.first_reference = self.reference  # from which samples/kl is measured
        if self.objective.moves_reference and not self.objective.in_stages:
            first = reference if num_ranks() > 1 else copy.deepcopy(reference)
            self.first_reference = shard_frozen(first, config)
        self.reward_model = reward_model and shard_frozen(reward_model, config)
        models = self.policy, self.reference
        self.fingerprints = run_data.fingerprints | fingerprints(*models, self.reward_model)
        self.sampler = Sampler(config, run_data, self.batcher, models, self.reward_model, self.bf16)
        if self.objective.self_play:
            self.self_play = SelfPlay(config, run_data, self.folder, self.sampler,
                                      "scores" in parameters(self.objective.self_play)[0])
        self.optimizer = make_optimizer(self.policy.parameters(), config)
        self.bind_settings()
        if checkpoint:
            self.restore(checkpoint)

    def make_batcher(self, policy, reference, reward_model, checkpoint=None):
        """Makes batches in the layouts in which all of these models give the numbers of plain rows."""
        config, values = self.config, self.response_values
        models = {policy: values, reference: values, reward_model: response_scores}
        models = [pair for pair in models.items() if pair[0]]  # policy and reference may be one, or some None
        examples = [*self.data.train_examples, *self.data.eval_examples]  # of which some are tried
        self.measured = known_before(checkpoint and read_state(checkpoint)["measured"], config)
        drawn = max(config.sample_max_tokens, getattr(config, config.loss, {}).get("max_tokens", 0))
        layouts = choose_layouts(
            config.layout, models, examples, config.compute_dtype == "bfloat16", self.measured, drawn)
        goes = config.reference_cache and can_cache(self.objective) and self.uses_every_row
        moves = self.objective.moves_reference and not self.objective.in_stages  # beside the first one
        frozen = [model for model in (*[reference] * (1 + moves - goes), reward_model) if model]
        max_tokens = config.max_tokens_per_microbatch or tokens_that_fit(
            policy, frozen, config, self.measured, max(x.row_length for x in examples))
        dtype = torch.promote_types(policy.dtype, torch.float32)
        return Batcher(layouts, max_tokens, config.eval_batch_size, dtype, self.stop)

    def bind_settings(self):
        """Puts settings into the losses, and sets lr: a list has a value for each iteration of self-play."""
        block = getattr(self.config, self.config.loss, {})
        block = SELF_PLAY | block if self.objective.self_play else block
        self.settings = {name: value[self.iteration] if isinstance(value, list) and self.objective.self_play
                         else value for name, value in block.items()}
        self.train_objective = self.eval_objective = self.objective.bound(self.settings | self.state)
        if other := self.objective.evaluated_as:  # self-play as SFT on the data's responses
            self.eval_objective = OBJECTIVES[other].bound(getattr(self.config, other))
        self.lr = self.config.lr if self.settings.get("lr") is None else self.settings["lr"]

    # ------------------------------------------------------------ the loop

    def train(self) -> int:
        """Runs to the end, or until asked to stop; returns 0, or the StopRequest's reason."""
        with self.stop.catch_signals(), Progress(self.num_steps, self.step) as self.progress:
            try:
                fill_in_rewards(  # of pairs that come without
                    [*self.data.train_examples, *self.data.eval_examples],
                    self.settings.get("default_rewards"), self.score)
                self.fill_in_reference()  # its log-probabilities: once, for every epoch and later run
                self.train_iteration()
                while not self.is_finished:  # only self-play goes on: a new opponent, new pairs
                    self.next_iteration()
                    self.train_iteration()
            except Stopped:  # by stop.check(), between steps or within an evaluation
                if self.saved_step != self.step:
                    self.save()
            finally:
                self.checkpoints.finish()
        self.folder.close()
        return self.stop.reason

    def train_iteration(self):
        """The loop, to the last step over train_examples: evaluate, save, step, log."""
        self.next_global_batch = self.make_global_batch(self.num_used)
        check_first_batch(self.next_global_batch[0], self.data.eval_sources, self.batcher, self.policy,
                          self.reference, self.objective, self.config, self.bf16,
                          is_start=self.step == (self.first_step if self.objective.in_stages else 0))
        while True:
            self.stop.check()  # a signal or max_hours: all ranks leave at the same step
            self.checkpoints.check()  # one that is written meanwhile may have failed
            if self.eval_is_due():
                self.evaluate()
            if self.save_is_due():
                self.save()
            if self.step >= self.last_step:
                return
            metrics = self.train_step()
            if self.step % self.config.log_every == 0 or self.is_finished:
                self.log("train", metrics)
            self.progress.advance(self.step, self.num_steps, metrics)

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the global batch; returns its metrics, computed before the update.

        Raises FloatingPointError, naming the examples, if the loss or the gradient norm is not finite.
        """
        started = time.perf_counter()
        objective = self.train_objective

        # The global batch is the same on any number of ranks; each takes its share, in microbatches.
        examples, microbatches = self.next_global_batch or self.make_global_batch(self.num_used)
        denominator = objective.denominator(examples)  # examples, or response tokens, of all ranks
        microbatches = self.joined(microbatches, examples, objective)

        # Forward, loss, backward: the microbatches' gradients add up to that of the global batch's mean loss.
        sums, all_losses = {}, []
        for number, batch in enumerate(microbatches, 1):
            losses, metrics = self.compute_losses(batch, objective)  # (B,) with gradient, and {name: (B,)}
            weight = 0 if batch.is_idle else num_ranks() / denominator  # idle: to keep pace with other ranks
            is_last = number == len(microbatches)
            sync_gradients(self.policy, is_last or not self.config.fsdp["reduce_once"])
            (losses.sum() * weight).backward()  # averages over ranks where it syncs: hence num_ranks()
            losses = losses.detach()  # lets go of what the graph still holds
            add_to_sums(sums, batch, losses, metrics)
            all_losses.append(losses)

        # Clip to a norm over all parameters of all ranks. The next batch is made while the device is at work.
        max_norm = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), max_norm))
        self.next_global_batch = self.make_global_batch(self.num_used + len(examples))

        # Sum the metrics over ranks (here the host waits for the device), and refuse what is not finite.
        metrics = mean_metrics(sums, objective, examples) | {"grad_norm": grad_norm.item()}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            self.checkpoints.finish()  # or what is said to be saved may not be
            raise FloatingPointError(describe_failure(
                self.step + 1, metrics, examples, microbatches, all_losses, self.saved_step))

        # The update, at this step's learning rate.
        step, num_steps = self.step, self.num_steps
        if objective.in_stages:
            step, num_steps = self.step - self.first_step, self.last_step - self.first_step
        metrics["lr"] = learning_rate(step, num_steps, self.lr, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = metrics["lr"]
        update(self.optimizer, self.policy, is_first=self.step == 0)
        self.optimizer.zero_grad(set_to_none=True)  # evaluation and saving want their memory
        self.step += 1
        self.examples += len(examples)
        if objective.after_step:
            self.state = step_state(objective, self.step, metrics, self.policy, self.reference, self.state)
            self.bind_settings()
        self.throughput.update(examples=len(examples), tokens=sum(example.num_tokens for example in examples),
                               flops=step_flops(self.policy, examples, objective.needs_reference),
                               seconds=time.perf_counter() - started)
        return metrics | self.epoch_metrics()

    def compute_losses(self, batch: Batch, objective: Objective) -> tuple[torch.Tensor, dict]:
        """A microbatch's losses (B,), which carry the gradient, and its metrics, each (B,) and detached."""
        if batch.joint and not torch.is_grad_enabled():
            return batch.joint[:2]
        if objective.inputs == "logits":  # distillation: both models' distributions at each response token
            return token_losses(objective, [self.policy, self.reference], batch, self.bf16)
        values = self.read_values(batch, objective)  # of policy and reference, and columns: (B,) each
        losses, metrics = call_loss(objective, values, batch)
        return losses, metrics | {name: x for name, x in batch.columns.items() if name[:10] == "generated/"}

    def read_values(self, batch, objective):
        return read_values(objective, self.policy, self.reference, batch, self.bf16)

    def joined(self, batches, examples, objective):
        """The batches; if the loss is one of the whole batch, with what it says of each beside all others."""
        if not objective.whole_batch:
            return batches
        return join(objective, functools.partial(self.read_values, objective=objective), examples, batches)

    def make_global_batch(self, start: int) -> tuple[list[Example], list[Batch]]:
        """The examples of the step that begins so far into the stream, and this rank's share of them."""
        config, num_rows = self.config, len(self.train_examples)
        end = min(start + config.batch_size, self.num_to_use(num_rows))
        seed = config.seed + 7_368_787 * self.iteration  # another order in each iteration of self-play
        rows = stream(num_rows, start, end, seed=seed, shuffle=config.shuffle)
        examples = [self.train_examples[row] for row in rows]
        return examples, self.batcher.train_share(examples, config.gradient_accumulation_steps)

    # ------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self):
        """Metrics over the held-out examples, then samples; changes neither weights nor random state."""
        self.policy.eval()
        objective, sums, by_source = self.eval_objective, {}, {}
        for source, examples in self.data.eval_sources.items():
            own = {}
            for batch in self.joined(self.batcher.eval_share(examples, "evaluating"), examples, objective):
                add_to_sums(own, batch, *self.compute_losses(batch, objective))
            if len(self.data.eval_sources) > 1:
                by_source |= {f"{k}/{source}": x for k, x in mean_metrics(own, objective, examples).items()}
            sums = {name: sums.get(name, 0) + total for name, total in own.items()}
        metrics = mean_metrics(sums, objective, self.data.eval_examples) | by_source
        if self.data.sample_examples:
            metrics |= self.sample()
        self.policy.train()
        # Last: where this line stands, a resume finds all written.
        self.log("eval", metrics | self.epoch_metrics())
        self.evaluated_steps.add(self.step)
        self.checkpoints.update_best(self.step, metrics)

    def sample(self) -> dict[str, float]:
        """Policy and reference answer the same prompts: metrics over all, num_samples of them are shown."""
        sampler, reference, kl = self.sampler, self.first_reference, None
        answers = {"policy": sampler.answers(self.policy)}  # lists of ids
        scores = {"policy": sampler.scores(answers["policy"])}  # {name: float} of each
        if reference and not self.objective.in_stages:  # there it is another in each iteration
            if self.reference_waits:
                reference.to(device())
            if self.reference_samples is None:  # neither its weights nor the noise change
                drawn = sampler.answers(reference)
                self.reference_samples = drawn, sampler.scores(drawn)
            answers["reference"], scores["reference"] = self.reference_samples
            kl = sampler.kl(self.policy, reference, answers["policy"])
            if self.reference_waits:
                reference.to("cpu")
        records = sampler.records(answers, scores)
        self.folder.log_samples(self.step, records)
        if not self.evaluated_steps or self.is_finished:  # all are in samples.jsonl
            print_samples(self.step, records)
        return sampler.metrics(answers, scores, kl)

    # ------------------------------------------------------------ self-play; what is computed before step 1

    @torch.no_grad()
    def next_iteration(self):
        """Self-play: the policy answers prompts, and what the objective makes of its answers is trained on.

        In stages the policy as it is now is the reference; before the first it was evaluated and saved.
        """
        opponent = fingerprint(self.policy)
        self.policy.eval()
        if not self.self_play.write_answers(self.policy, opponent, self.iteration + 1):
            self.stop.reason = WAITS  # until they come from elsewhere
            raise Stopped
        self.policy.train()
        self.opponent = opponent
        if self.objective.in_stages:
            self.reference.load_state_dict(self.policy.state_dict())
            self.fingerprints["reference"] = self.opponent
        self.iteration, self.first_step, self.first_examples = self.iteration + 1, self.step, self.examples
        self.bind_settings()
        self.train_examples, self.next_global_batch = self.make_examples(), None
        if self.iteration > 0 and self.settings["reset_optimizer"]:
            self.optimizer = make_optimizer(self.policy.parameters(), self.config)

    def make_examples(self):
        """What this iteration of self-play is trained on."""
        score = self.score if self.reward_model else None
        return self.self_play.examples(self.train_objective.self_play, self.opponent, self.iteration, score)

    def score(self, examples) -> list[list[float]]:
        """The reward model's score of each response."""
        scores = functools.partial(response_scores, self.reward_model, bf16=self.bf16)
        score = functools.partial(self.batcher.values, scores, title="scoring")
        return score_or_read(examples, self.folder, self.fingerprints["reward_model"], score)

    @torch.no_grad()
    def fill_in_reference(self):
        """The reference's log-probabilities of every response, computed once or read from their cache.

        Evaluation's come from its own microbatches, so that rewards at step 0 are exactly 0; training's from
        some that no setting of memory changes. Then the reference waits in the host for samples, or goes.
        """
        # A run that does not see every row computes those that it sees in its steps.
        config, rows = self.config, self.data.train_examples if self.uses_every_row else []
        if not (config.reference_cache and can_cache(self.objective)):
            return
        cache = ReferenceCache(self.reference, self.fingerprints["reference"], config, self.bf16)
        fixed = dataclasses.replace(
            self.batcher, max_tokens=default_max_tokens(config.compute_dtype), eval_batch_size=256)
        for start in range(0, len(rows), 10_000):
            cache.fill_in(rows[start:start + 10_000], fixed)
        evaluates = config.eval_every > 0 or self.max_steps == 0
        for examples in self.data.eval_sources.values() if evaluates else ():
            cache.fill_in(examples, self.batcher)
        cache.report()
        if rows or self.max_steps == 0:  # all its numbers are known
            is_sampled = evaluates and len(self.data.sample_examples) > 0
            self.reference = self.first_reference = self.reference if is_sampled else None
            self.reference_waits = is_sampled and self.reference.device.type != "cpu"  # where it is already
            if self.reference_waits:
                self.reference.to("cpu")

    # ------------------------------------------------------------ where the run stands, and what is due

    @property
    def num_used(self):
        """How many examples this iteration has used."""
        return self.examples - self.first_examples

    def num_to_use(self, num_rows):
        """How many examples all epochs use; rounded first, for 0.1 * 30 is 3.0000000000000004."""
        return math.ceil(round(self.config.num_epochs * num_rows, 6))

    @property
    def uses_every_row(self):
        num_rows = len(self.data.train_examples)
        return min(self.max_steps * self.config.batch_size, self.num_to_use(num_rows)) >= num_rows

    @property
    def last_step(self):
        """The number of the optimizer step with which this iteration ends, or max_steps."""
        left = self.num_to_use(len(self.train_examples)) - self.num_used
        return min(self.step + max(0, math.ceil(left / self.config.batch_size)), self.max_steps)

    @property
    def num_steps(self):
        """Optimizer steps of the whole run, at most: of iterations to come some pairs will be dropped."""
        total, mixed = self.last_step, bool(self.settings.get("mix_previous"))
        for iteration in range(self.iteration + 1, self.settings.get("iterations", 1)):
            num_rows = self.settings["num_prompts"] or len(self.data.train_examples)
            num_rows *= 1 + (mixed and iteration > 0)
            total += math.ceil(self.num_to_use(num_rows) / self.config.batch_size)
        return min(total, self.max_steps)

    @property
    def is_last_iteration(self):
        return self.iteration + 1 >= self.settings.get("iterations", 1) or self.last_step == self.max_steps

    @property
    def is_finished(self):
        return self.step >= self.last_step and self.is_last_iteration

    @property
    def stage_ends_there(self):
        """Whether with last_step the run ends, or an iteration that is a stage of its own."""
        return self.objective.in_stages or self.is_last_iteration

    @property
    def ends_stage(self):
        return self.step == self.last_step and self.stage_ends_there

    def epoch_metrics(self):
        """Metrics that say where in its data, and in self-play in which iteration, the run stands."""
        epoch = {"epoch": self.num_used / max(1, len(self.train_examples))}
        return epoch | ({"iteration": max(0, self.iteration)} if self.objective.self_play else {})

    def eval_is_due(self):
        if not self.data.eval_examples or self.step in self.evaluated_steps:
            return False
        if self.max_steps == 0:
            return True
        every = as_steps(self.config.eval_every, len(self.data.train_examples), self.config.batch_size)
        if self.step == 0:
            return every > 0 and self.config.eval_first
        is_near_last = 0 < self.last_step - self.step < every / 2 and self.stage_ends_there
        return every > 0 and (self.step % every == 0 and not is_near_last or self.ends_stage)

    def save_is_due(self):
        if self.step == self.saved_step or (self.step == 0 and not self.objective.in_stages):
            return False  # there the first opponent is saved
        return self.save_is_asked or self.step == self.checkpoints.best.step

    @property
    def save_is_asked(self):
        """Whether by save_every, or as the last step, whatever an evaluation said."""
        every = as_steps(self.config.save_every, len(self.data.train_examples), self.config.batch_size)
        return self.ends_stage or (every > 0 and self.step % every == 0)

    # ------------------------------------------------------------ what is recorded, and read back

    def log(self, split, metrics):
        """One line in metrics.jsonl and in wandb; evaluations also on the console."""
        if split == "train":
            for name in ("examples", "tokens"):
                metrics[f"{name}_per_second"] = self.throughput[name] / self.throughput["seconds"]
            metrics |= gpu_metrics(self.throughput)
            self.throughput.clear()
        place = {"step": self.step, "examples": self.examples, "split": split, "time": time.time()}
        self.folder.log(place, metrics)
        if split == "eval":
            print_evaluation(self.step, metrics)

    def start_folder(self):
        """Starts wandb, writes config.yaml, and keeps the weights of what came from no folder."""
        self.folder.start(self.config, self.saved_step)
        if self.saved_step is None:
            reference = None if self.objective.in_stages else self.first_reference
            keep_models(self.folder, self.config, self.policy, reference, self.data.tokenizer)

    def save(self):
        """Saves all that a resume needs as step-<step>; spares what self-play's opponent needs."""
        state = {name: getattr(self, name) for name in COUNTERS} | self.fingerprints
        state |= {"began": self.data.began, "state": self.state, "opponent": self.opponent,
                  "measured": self.measured}
        state["only_best"] = self.step == self.checkpoints.best.step and not self.save_is_asked
        spared = self.first_step if self.objective.in_stages else None
        moved = self.reference if self.first_reference is not self.reference else None
        self.checkpoints.save(self.policy, self.optimizer, state, spared, moved)
        self.saved_step = self.step

    def restore(self, checkpoint):
        """Takes up a checkpoint's optimizer, counters and random state. Raises InputError if it may not."""
        state = read_state(checkpoint)
        check_fingerprints(state, self.fingerprints)
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.state, self.opponent, self.records = state["state"], state["opponent"], state["records"]
        moved = self.reference if self.first_reference is not self.reference else None
        restore_state(checkpoint, self.step, self.policy, self.optimizer, self.config, moved)
        self.saved_step = self.step
        self.bind_settings()
        if self.objective.self_play and self.iteration >= 0:
            self.train_examples = self.make_examples()

    def rewind_records(self):
        """Cuts the records back to the step that is saved, or to none; clears an interrupted save."""
        self.folder.clear_partial()
        self.evaluated_steps = self.folder.cut(self.records, self.saved_step)
        self.checkpoints.recall_best()
