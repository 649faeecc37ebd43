"""What does a loss get of models and data, and is what its row asks for possible?

The table's rows come as arguments, duck-typed: see losses.Objective for their fields.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from engine import InputError, first_line
from engine.batches import CACHED, Batch, Example
from engine.distributed import device, from_all, rank, reshard, sum_over_ranks
from engine.forward import read_tokens, response_scores, sum_over_responses, token_logps

SELF_PLAY = {  # what a block of self-play may set, and what is so where it has no such key; see config.yaml
    "iterations": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 128, "mix_previous": False,
    "reset_optimizer": False, "answers": "sample", "num_prompts": None, "num_answers": 1}
WEIGHT = "weight"  # (name, WEIGHT) holds the weights of a metric that has its own
TRAINERS_KEYS = ("average", "train_on", "lr", "default_rewards")  # of a block, besides what functions name


# ---------------------------------------------------------------- what a loss is given


def read_values(objective, policy, reference, batch: Batch, bf16=False) -> dict[str, torch.Tensor]:
    """What a loss takes of a microbatch of B examples, by the names of its parameters; the policy's values
    carry the gradient.

    (B,) each, of lists (B, K); by_token (B, T) or (B, K, T), padded with 0, where `mask` has the tokens'
    weights.
    """
    read = {}  # {"policy", "reference" or a name of token_values: (K, B) or (K, B, T)}
    if objective.inputs == "scores":
        read["policy"] = response_scores(policy, batch, bf16)
    else:
        def functions(*logits_and_targets):
            *logits, targets = logits_and_targets
            logps = (-F.cross_entropy(x, targets, reduction="none") for x in logits)
            own = objective.token_values(*logits_and_targets) if objective.token_values else {}
            return dict(zip(("policy", "reference"), logps)) | own
        models = [policy, reference] if reads_both(objective) else [policy]
        arrange = pad_responses if objective.by_token else sum_over_responses
        tokens = read_tokens(functions, models, batch, bf16)
        if objective.needs_reference and len(models) == 1 and not batch.joint:
            if CACHED in batch.columns:
                read["reference"] = batch.columns[CACHED].T
            else:
                with torch.no_grad():
                    tokens["reference"] = token_logps(reference, batch, bf16)
        read |= {name: arrange(values, batch) for name, values in tokens.items()}
        if objective.by_token:
            read["mask"] = pad_responses(batch.token_weights, batch)

    by_position = [read.pop(model) for model in ("policy", "reference") if model in read]
    positional, keywords = parameters(objective.loss)
    if objective.needs_lists:
        by_position = [x.movedim(0, 1) for x in by_position]
        own = {name: x.movedim(0, 1) for name, x in read.items()}
    else:
        by_position = [response for x in by_position for response in x]
        own = {f"{who}_{name}": response for name, x in read.items()
               for who, response in zip(("chosen", "rejected"), x)}
    if len(by_position) != len(positional) and not batch.joint:
        raise InputError(f"{name_of(objective.loss)} takes by position {', '.join(positional)}, and "
                         f"{batch.examples[0].where} gives {len(by_position)}: one for each of its responses")
    if lacking := [name for name in objective.columns if name not in batch.columns]:
        raise InputError(f"{batch.examples[0].where} has no column {', '.join(lacking)}, which "
                         f"{name_of(objective.loss)} takes: example.with_responses(..., name=number) adds it")
    columns = {name: batch.columns[name] for name in objective.columns}
    return dict(zip(positional, by_position)) | {k: x for k, x in own.items() if k in keywords} | columns


def call_loss(objective, values: dict, batch: Batch | None = None) -> tuple[torch.Tensor, dict]:
    """A loss's (B,), which carry the gradient, and its metrics, {name: (B,)}, detached.

    A metric (value, weight) becomes their product, and the weight under (name, WEIGHT). Of a joined batch
    they are known, and carry the gradient that the loss of the whole batch has here. Raises InputError where
    it does not give one number for each example.
    """
    if batch and batch.joint:
        losses, metrics, gradients = batch.joint
        for name in filter(values.__contains__, gradients):  # in one order, which a resumed run has too
            value = values[name]
            gradient = gradients[name][..., :value.shape[-1]] if value.dim() > 1 else gradients[name]
            losses = losses + (gradient * (value - value.detach())).reshape(len(losses), -1).sum(1)  # adds 0
        return losses, metrics
    given = objective.loss(**values)
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict)):
        raise InputError(f"{name_of(objective.loss)} gives {type(given).__name__}; it must give losses and a "
                         "dict of metrics, which may be {}")
    losses, metrics = given
    count = len(next(iter(values.values())))
    flat = {}
    for name, value in metrics.items():
        flat |= dict(zip((name, (name, WEIGHT)), value)) if isinstance(value, tuple) else {name: value}
    if "loss" in flat:
        raise InputError(f"{name_of(objective.loss)} gives a metric `loss`, which the loss itself is")
    for name, value in {"losses": losses, **flat}.items():
        if not torch.is_tensor(value) or value.shape != (count,):
            shape = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
            raise InputError(f"{name_of(objective.loss)} gives {name} of shape {shape}; of each of a batch's "
                             f"{count} examples it must give one number, ({count},), not averaged")
    flat |= {name: (flat[name] * flat[name, WEIGHT]).where(flat[name, WEIGHT] != 0, 0)
             for name in flat if (name, WEIGHT) in flat}
    return losses, {name: value.detach() for name, value in flat.items()}


def token_losses(objective, models, batch: Batch, bf16=False) -> tuple[torch.Tensor, dict]:
    """call_loss where a loss takes the models' logits (N, V) and targets and gives losses (N,): sums (B,)."""
    values = read_tokens(functools.partial(loss_and_metrics, objective.loss), models, batch, bf16)
    sums = {name: sum_over_responses(value, batch)[0] for name, value in values.items()}
    losses, weights = sums.pop("loss"), batch.columns["chosen_length"]
    return losses, {name: value.detach() for name, value in sums.items()} | {
        (name, WEIGHT): weights for name in sums}


def loss_and_metrics(loss, *logits_and_targets):
    """A loss of tokens as what token_values gives: {name: (n,)}."""
    losses, metrics = loss(*logits_and_targets)
    return {"loss": losses, **metrics}


def pad_responses(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Values (N,) of the tokens that count, by response: (K, B, T), padded with 0."""
    num_responses = len(batch.lengths) // len(batch.examples)
    counts = [x.num_counting(k) for k in range(num_responses) for x in batch.examples]  # no wait for the GPU
    return pad_sequence(values.split(counts), batch_first=True).unflatten(0, (num_responses, -1))


# ---------------------------------------------------------------- a loss of the whole batch


def join(objective, read: Callable, examples: list[Example], batches) -> list[Batch]:
    """This rank's batches, each with what a loss says of it that is called once for those of all ranks.

    read(batch) gives what the loss takes; here, without gradient. It gets the values of `examples`, in their
    order. `joint` of a batch: its losses, its metrics, and the gradient of all losses' sum by its values.
    """
    if len({len(example.responses) for example in examples}) > 1:
        raise InputError("a loss of the whole batch takes rows with the same number of responses each")
    places = {id(example): place for place, example in enumerate(examples)}
    batches, own = list(batches), []
    with torch.no_grad():
        for batch in batches:
            values = {name: value.cpu() for name, value in read(batch).items()}  # an idle one's: to keep pace
            own.append(([] if batch.is_idle else [places[id(x)] for x in batch.examples], values))

    # The values of all, in the order of the examples; the loss, and its gradient by them.
    shares = from_all(own)
    parts = [part for share in shares for part in share if part[0]]
    order = torch.tensor([place for part, _ in parts for place in part]).argsort(stable=True)
    values = {name: cat_padded([x[name] for _, x in parts])[order].to(device()) for name in parts[0][1]}
    leaves = {name: x.requires_grad_() for name, x in values.items() if name not in objective.columns}
    with torch.enable_grad():
        losses, metrics = call_loss(objective, values)
        gradients = torch.autograd.grad(losses.sum(), [*leaves.values()], allow_unused=True)
    gradients = {name: x for name, x in zip(leaves, gradients) if x is not None}

    # Each batch's part of these; an idle one's, which counts nowhere, is the first example's.
    rows = order.argsort().to(device())  # where they are in that order, as they came
    at = sum(len(part) for share in shares[:rank()] for part, _ in share)
    joined = []
    for batch, (places, _) in zip(batches, own):
        mine = rows[:1] if batch.is_idle else rows[at:at + len(places)]
        at += len(places)
        joined.append(replace(batch, joint=(
            losses.detach()[mine], *({name: x[mine] for name, x in part.items()}
                                     for part in (metrics, gradients)))))
    return joined


def cat_padded(parts):
    """Tensors of several batches in one, the last dimension of by-token ones padded with 0."""
    if parts[0].dim() > 1:
        width = max(x.shape[-1] for x in parts)
        parts = [F.pad(x, (0, width - x.shape[-1])) for x in parts]
    return torch.cat(parts)


# ---------------------------------------------------------------- what a row of the table asks for


@functools.lru_cache(maxsize=64)
def parameters(function) -> tuple[list[str], dict]:
    """The names of a function's positional parameters, and {name: whether it must be given} of the others."""
    known = inspect.signature(function).parameters.values() if function else ()
    return ([p.name for p in known if p.kind == p.POSITIONAL_OR_KEYWORD],
            {p.name: p.default is p.empty for p in known if p.kind == p.KEYWORD_ONLY})


def reads_both(objective):
    """Whether the policy's logits and the reference's are read together, at each token."""
    return "reference_logits" in parameters(objective.token_values)[0]


def can_cache(objective):
    """Whether the reference's numbers can be computed once: sums, of a reference and responses that stay."""
    return (objective.needs_reference and objective.inputs == "logps" and not objective.by_token
            and not objective.self_play and not objective.moves_reference and not reads_both(objective))


def name_of(function):
    return getattr(function, "func", function).__name__


def check_table(objectives: dict, defaults: dict):
    """Raises InputError for a row that cannot work. defaults: config.yaml's, by dotted key."""
    for name, objective in objectives.items():
        block = {key.partition(".")[2]: value for key, value in defaults.items()
                 if key.startswith(name + ".")}
        for problem in problems(objective, block, objectives):
            raise InputError(f"losses.py, OBJECTIVES[{name!r}]: {problem}")


def problems(x, block, objectives):
    """What is wrong with a row, as sentences."""
    more, takes = x.needs_pairs or x.needs_lists, 1 + x.needs_pairs
    yield from (problem for problem, is_so in {
        f"inputs={x.inputs!r} is not logps, scores or logits": x.inputs not in ("logps", "scores", "logits"),
        f"average={x.average!r} is not examples or tokens": x.average not in ("examples", "tokens"),
        "needs_pairs and needs_lists exclude each other": x.needs_pairs and x.needs_lists,
        "inputs='logits' reads one response of each example; name token_values for more":
            x.inputs == "logits" and (more or x.whole_batch),
        f"token_values and by_token go with inputs='logps', not {x.inputs!r}":
            x.inputs != "logps" and (x.token_values or x.by_token),
        "no reference gives scores": x.inputs == "scores" and x.needs_reference,
        "token_values reads reference_logits, so needs_reference must be said":
            reads_both(x) and not x.needs_reference,
        "needs_teacher goes with needs_reference": x.needs_teacher and not x.needs_reference,
        "moves_reference needs a reference, and after_step or self_play to move it":
            x.moves_reference and not (x.needs_reference and (x.self_play or x.after_step)),
        "add_responses adds to one response, and the loss takes no more": x.add_responses and not more,
        "add_responses and self_play exclude each other": x.add_responses and x.self_play,
        f"evaluated_as={x.evaluated_as!r} is no row of the table": x.evaluated_as not in (None, *objectives),
        "held-out rows bring one response, so evaluated_as must name a loss of one, as sft":
            x.self_play and more and not x.evaluated_as,
    }.items() if is_so)
    bound = x.bound(block)
    positional, keywords = parameters(bound.loss)
    count = (1 + x.needs_reference) * takes + (x.inputs == "logits")
    if len(positional) != count:
        yield (f"{name_of(x.loss)} takes by position {', '.join(positional)}: {len(positional)}, where this "
               f"row brings {count}; columns and settings come after a *")
    for function, counts in ((x.add_responses, (1,)), (x.self_play, (2, 3)), (x.after_step, (5,))):
        if function and len(given := parameters(function)[0]) not in (0, *counts):  # 0: as *arguments
            yield f"{name_of(function)} takes {', '.join(given)}, which is not what class Objective says"
    known = {*TRAINERS_KEYS, *(SELF_PLAY if x.self_play else ())}.union(*(
        parameters(f)[1] for f in (x.loss, x.token_values, x.after_step, x.add_responses, x.self_play)))
    if unread := block.keys() - known:
        yield f"nothing reads {', '.join(sorted(unread))} of its block in config.yaml"
    if x.inputs == "logits":
        function = functools.partial(loss_and_metrics, bound.loss)
        yield from problems_of_tokens(x.loss, function, 1 + x.needs_reference)
    else:
        yield from problems_of_loss(bound, positional, keywords)


def problems_of_tokens(own, function, num_models):
    """What is wrong with a function of logits and targets, called on five random tokens and the first three.

    own: whose name is said.
    """
    random = torch.Generator().manual_seed(0)
    logits = [torch.randn(5, 4096, generator=random) for _ in range(num_models)]
    try:
        made = function(*logits, torch.arange(5))
        some = function(*(x[:3] for x in logits), torch.arange(3))
        is_right = all(value.shape == (5,) for value in made.values())
    except Exception as error:
        yield (f"{name_of(own)} does not make {{name: (n,)}} of logits (n, V) and targets (n,): "
               + first_line(error))
        return
    if not is_right:
        yield f"{name_of(own)} does not make {{name: (n,)}} of logits (n, V) and targets (n,)"
    elif not all(torch.allclose(made[name][:3], some[name], atol=1e-5) for name in made):
        yield f"{name_of(own)} compares tokens, of which it gets only some at a time"


def problems_of_loss(x, positional, keywords):
    """What is wrong with a loss, called on random numbers: six examples, and the first three of them."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(6, *shape, generator=random, dtype=torch.float64).requires_grad_()
    extras = ["mask"] if x.by_token else []
    if x.token_values:
        num_models = 1 + reads_both(x)
        yield from problems_of_tokens(x.token_values, x.token_values, num_models)
        extras += x.token_values(*[torch.zeros(5, 4096)] * num_models, torch.arange(5))
    prefixes = [""] if x.needs_lists else ["chosen_", "rejected_"][:1 + x.needs_pairs]
    names = [prefix + name for prefix in prefixes for name in extras]
    if lacking := [name for name, must in keywords.items() if must and name not in (*names, *x.columns)]:
        yield (f"{name_of(x.loss)} asks for {', '.join(lacking)}: not in columns, no key of its block, no "
               f"name of what is read at each token ({', '.join(names) or 'nothing'})")
        return
    shape = (3,) * x.needs_lists + (4,) * x.by_token
    for scale in (0.1, 0.1, 1, 1, 10, 10):  # a clamp may hide what a loss compares
        values = {name: scale * draw(*shape) - 10 for name in positional}
        values |= {name: scale * draw(*shape) for name in names if name in keywords}
        values |= {name: torch.ones_like(value) for name, value in values.items() if name.endswith("mask")}
        values |= {name: draw(*(3,) * x.needs_lists).abs().round() + 3 for name in x.columns}
        try:
            whole, part = (dict(zip(("losses", "metrics"), call_loss(x, some))) for some in (
                values, {name: value[:3] for name, value in values.items()}))
        except InputError as error:
            yield str(error)
            return
        except (NameError, AttributeError, TypeError) as error:
            yield f"{name_of(x.loss)} fails: {first_line(error)}"
            return
        except Exception:  # of numbers that are not the data's
            return
        if not whole["losses"].requires_grad:
            yield f"{name_of(x.loss)} gives losses without a gradient: is something detached?"
        if x.by_token:
            longer = {k: v if k in x.columns else F.pad(v, (0, 2)) for k, v in values.items()}
            if not torch.allclose(call_loss(x, longer)[0], whole["losses"]):
                yield f"{name_of(x.loss)} reads what is padded: multiply by the mask, divide by its sum"
        whole, part = ({"losses": said["losses"], **said["metrics"]} for said in (whole, part))
        for name in () if x.whole_batch else whole:
            if not torch.allclose(whole[name][:3], part[name], equal_nan=True):
                yield (f"{name_of(x.loss)} compares the examples of a batch, by {name}: its row must say "
                       "whole_batch=True, or the result would depend on how a step is cut")


def add_responses(add: Callable, max_length: int, examples: list[Example], report) -> list[Example]:
    """add(examples), each cut to max_length tokens; the report counts these."""
    added = add(examples)
    if not isinstance(added, list) or not all(isinstance(x, Example) and len(x.responses) > 1 for x in added):
        raise InputError(f"{name_of(add)} must return Examples of several responses: Example.with_responses")
    fitting = []
    for example in added:
        room = max_length - len(example.prompt)
        report.cut += example.row_length > max_length
        weights = example.token_weights and tuple(x[:room] for x in example.token_weights)
        fitting.append(replace(example, responses=tuple(ids[:room] for ids in example.responses),
                               token_weights=weights))
    return fitting


def step_state(objective, step, metrics, policy, reference, state) -> dict[str, float]:
    """What after_step says, checked: numbers by name, which are kept in checkpoints."""
    reshard(reference)
    with torch.no_grad():
        state = objective.after_step(step, metrics, policy, reference, state)
    is_dict = isinstance(state, dict)
    for name, value in (state.items() if is_dict else [("", state)]):
        if not (is_dict and isinstance(value, numbers.Real) and math.isfinite(value)):
            raise InputError(f"{name_of(objective.after_step)} gives {name or 'its state'} as {value!r}; it "
                             "must give a dict of finite numbers by name")
    return {name: x.item() if hasattr(x, "item") else x for name, x in state.items()}  # numpy's: no JSON


# ---------------------------------------------------------------- what is averaged


def add_to_sums(sums: dict, batch: Batch, losses: torch.Tensor, metrics: dict):
    """Adds a microbatch's losses and metrics, (B,) each, to {name: 0-d float64 tensor}.

    Those of an idle one count as 0, even where they are not finite.
    """
    for name, values in {"loss": losses.detach(), **metrics}.items():
        total = values.double().sum()
        sums[name] = sums.get(name, 0) + (torch.zeros_like(total) if batch.is_idle else total)


def mean_metrics(sums: dict, objective, examples: list[Example]) -> dict[str, float | None]:
    """{name: mean} over these examples, the sums being this rank's. Waits for the device, once.

    The loss is divided by the objective's denominator, a metric by the number of examples or by the sum of
    its own weights; where that is 0 there is no mean.
    """
    totals = dict(zip(sums, sum_over_ranks(torch.stack(list(sums.values())).tolist())))
    weights = {name: totals.get((name, WEIGHT), len(examples)) for name in totals if isinstance(name, str)}
    weights["loss"] = objective.denominator(examples)
    means = {name: totals[name] / weight if weight else None for name, weight in weights.items()}
    if "rewards/mean_square" in means:
        variance = means.pop("rewards/mean_square") - means["rewards/mean"] ** 2
        means["rewards/std"] = math.sqrt(max(0.0, variance)) if math.isfinite(variance) else math.nan
    return means
