"""What may stand in a row's columns? Texts, messages, numbers, weights; what cannot be read is named."""

import contextlib
import json
import math

from engine import Dropped, InputError
from engine.batches import LIST_REWARDS, REWARDS
from engine.chats import is_text, read_messages

COLUMN_ALIASES = {"chosen_reward": "score_chosen", "rejected_reward": "score_rejected",
                  LIST_REWARDS: "scores"}


def read_cell(value, name, where, report):
    """The text in a column, or its messages in one form."""
    if is_text(value):
        with contextlib.suppress(ValueError, RecursionError):
            if value.startswith("[{") and json.loads(value):
                report.note(f"have JSON in {name}, which is read as the text that it is")
        return value
    if value == [] and name != "prompt":
        raise Dropped(f"{name} is empty")
    if isinstance(value, list):
        return read_messages(value, f"{where}: column {name}")
    value = json.dumps(value, default=str)[:60]
    raise InputError(f"{where}: column {name} is {value}; it must be text, or a list of messages with text "
                     "for role and content")


def read_list(row, name, where, report):
    """The responses in a column, two or more, and their names for messages."""
    if not isinstance(row[name], list):
        raise InputError(f"{where}: column {name} is {json.dumps(row[name], default=str)[:60]}; it must be a "
                         "list of responses, each text or a list of messages")
    if len(row[name]) < 2:
        raise Dropped(f"{name} has fewer than two responses")
    names = [f"{name}[{i}]" for i in range(len(row[name]))]
    return names, [read_cell([value] if isinstance(value, dict) else value, own, where, report)
                   for own, value in zip(names, row[name])]


def lacks_rewards(row, lists):
    """Whether a pair, or a list of responses, comes without any."""
    return all(row.get(name) is None for reward in ([LIST_REWARDS] if lists else REWARDS)
               for name in (reward, COLUMN_ALIASES[reward]))


def read_numbers(row, where, name, count=None):
    """The number in column `name`, or in its alias; of lists of `count` responses also one for each."""
    value = row.get(COLUMN_ALIASES.get(name)) if row.get(name) is None else row[name]
    if value is None:
        alias = f" (or {COLUMN_ALIASES[name]})" if name in COLUMN_ALIASES else ""
        helps = (" (where a row has no reward, reward_model= gives all)" if name == LIST_REWARDS else
                 " (where a pair has neither reward, reward_model= or rpo.default_rewards= gives both)"
                 if name in REWARDS else "")
        raise InputError(f"{where}: the objective needs a column {name}{alias}, a number{helps}; "
                         f"the row has {', '.join(map(str, row))}")
    if count is None or not isinstance(value, list):
        return as_number(value, where, name)
    if len(value) != count:
        raise InputError(f"{where}: column {name} has {len(value)} numbers for {count} responses")
    return [as_number(x, where, name) for x in value]


def as_number(value, where, name):
    """A finite float; true and false, also as text, are 1 and 0, but no reward."""
    if name not in (*REWARDS, LIST_REWARDS) and str(value).lower() in ("true", "false"):
        return float(str(value).lower() == "true")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: column {name} is {repr(value)[:60]}; it must be a finite number")
    return number


def read_weights(row, names, responses, where):
    """Of each response the weights of its characters and of what follows it, its end; or None: all 1.

    Column <its column>_weights, for lists one for all, has spans [[start, stop, weight], ...] of characters;
    what is in none of them has weight 1. The end stands at the text's length.
    """
    found = []
    for number, (name, response) in enumerate(zip(names, responses)):
        column = name.partition("[")[0] + "_weights"
        spans = row.get(column)
        if spans is None:
            found.append(None)
            continue
        text = response if is_text(response) else response["content"]
        try:
            if "[" in name and len(spans) > len(responses):
                raise ValueError
            spans = spans[number] if "[" in name else spans
            weights = [1.0] * (len(text) + 1)
            for start, stop, weight in spans or ():
                if not (0 <= start < stop <= len(weights) and 0 <= weight < math.inf):
                    raise ValueError
                weights[start:stop] = [float(weight)] * (stop - start)
        except (TypeError, ValueError, OverflowError, LookupError) as error:
            raise InputError(f"{where}: column {column} must hold spans [start, stop, weight] of {name}'s "
                             f"characters, 0 <= start < stop <= {len(text) + 1} (with its end, past the last "
                             "one), and weights of at least 0") from error
        found.append(weights)
    return tuple(found) if any(found) else None
