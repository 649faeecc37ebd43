"""Which datasets are there, and how does a row become token ids?

    row (a dict, as the dataset has it)  -> read_row -> TextRow  -> encode -> Example (token ids)

A row that cannot be trained on raises Dropped; the Report counts it. A malformed one raises InputError.
"""

import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import jinja2
import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from engine import InputError
from engine.batches import COMPUTED_COLUMNS, REWARDS, Example
from engine.config import FIELD, as_list
from engine.distributed import raise_on_all_ranks
from engine.files import load_hub, number_rows, read_source, strip_html, with_name
from engine.models import load_end_ids, load_model_config, load_tokenizer
from engine.report import Report, progress
from engine.toy import toy, toy_optimal_reward, toy_scores

COLUMN_ALIASES = {"chosen_reward": "score_chosen", "rejected_reward": "score_rejected"}
ASSISTANT = "\n\nAssistant:"  # closes the prompt in an HH transcript
SHAPES = (  # prompt column, chosen or only response, rejected; the first that fits and suffices is read
    ("prompt", "chosen", "rejected"),
    (None, "chosen", "rejected"),
    ("prompt", "chosen_response", "rejected_response"),
    (None, "messages", None),
    ("prompt", "response", None),
    ("prompt", "completion", None),
    ("instruction", "output", None),  # and `input`, where a row has one
    ("input", "output", None),
)


class Dropped(Exception):
    """This row cannot be trained on; the message is the reason, under which the Report counts it."""


@dataclass
class RunData:
    """All that a run reads but weights.

    fingerprint: of the training rows, for a resumed run must go on with the same. sample_examples: their
    prompts are answered in each evaluation. judge: the Dataset whose true scores are known of these, or None.
    end_ids: the tokens that end a response; the first closes those that have none. reports: on the rows.
    """

    train_examples: list[Example]
    eval_examples: list[Example]
    sample_examples: list[Example]
    judge: "Dataset | None"
    fingerprint: str
    reports: dict[str, Report]
    tokenizer: PreTrainedTokenizerBase
    end_ids: list[int]
    model_config: PretrainedConfig
    dropouts: dict[str, float]


@raise_on_all_ranks
def load_data(config, objective, checkpoint=None) -> RunData:
    """Reads the sources that the config names and makes token ids of their rows, for the policy."""
    eval_sources = as_list(config.eval_data) or [name for name in as_list(config.data) if name in DATASETS]
    load = functools.partial(load_rows, objective=objective, template=config.attribute_template,
                             may_lack_rewards=config.reward_model is not None)
    train_rows, train_report = load(config.data, "train")
    eval_rows, eval_report = load(eval_sources, "test")
    reports = {"data": train_report, "eval data": eval_report}

    texts = (text for row in train_rows for text in (row.prompt, *row.responses))
    model_path = checkpoint or config.model
    tokenizer = load_tokenizer(checkpoint or config.tokenizer or config.model, texts, config)
    model_config, dropouts = load_model_config(model_path, config, tokenizer)
    end_ids = load_end_ids(model_path, model_config, tokenizer)

    judge = DATASETS.get(eval_sources[0]) if len(set(eval_sources)) == 1 else None  # of several none is
    judge = judge if judge and judge.scores else None
    num_prompts = max(config.num_samples, judge.num_samples if judge else 0)
    num_prompts = 0 if objective.inputs == "scores" else num_prompts  # a reward model writes nothing
    limit = None if config.num_eval_examples is None else max(config.num_eval_examples, num_prompts)
    train_examples = encode(train_rows, train_report, tokenizer, config, end_ids)
    held_out = encode(eval_rows, eval_report, tokenizer, config, end_ids, limit)
    sample_examples = held_out[:num_prompts]
    if config.sample_attributes:
        rows, reports["samples"] = load(eval_sources, "test", attributes=config.sample_attributes)
        sample_examples = encode(rows, reports["samples"], tokenizer, config, end_ids, num_prompts)
    if config.max_steps == 0 and not eval_sources:
        raise InputError("max_steps=0 only evaluates and samples, and there is nothing to: name eval_data")
    for key, report in (("data", train_report), ("eval_data", eval_report)):
        if not report.used and (eval_sources or key == "data"):
            raise InputError(f"{key} leaves no row to work with: " + "; ".join(report.lines()))
    return RunData(train_examples, held_out[:config.num_eval_examples], sample_examples, judge,
                   train_report.fingerprint, reports, tokenizer, end_ids, model_config, dropouts)


# ---------------------------------------------------------------- datasets


def hh(split, pairs):
    """Anthropic's helpful and harmless dialogues (arXiv:2204.05862), transcripts with a shared prompt."""
    return load_hub("Anthropic/hh-rlhf", split=split)


def shp(split, pairs):
    """Stanford Human Preferences: Reddit answers of which one scores at least twice the other.

    Without pairs: each post once, with its best-scored answer among those.
    """
    rows = []
    for row in load_hub("stanfordnlp/SHP", split=split):
        a, b = row["score_A"], row["score_B"]
        if max(a, b) < 2 * min(a, b):
            continue
        answers = [" " + row["human_ref_A"], " " + row["human_ref_B"]]
        w = 0 if row["labels"] == 1 else 1
        rows.append({"prompt": f"\n\nHuman: {row['history']}{ASSISTANT}", "chosen": answers[w],
                     "rejected": answers[1 - w], "score": (a, b)[w]})
    if not pairs:
        rows.sort(key=lambda row: row["score"])  # stable: the last of a prompt is its best
        rows = list({row["prompt"]: row for row in rows}.values())
    return rows


def se(split, pairs):
    """Stack Exchange questions, every two answers of different score a pair (equal scores prefer neither).

    Shuffled with seed 42; the first 1% are held out. Without pairs: each question with its best answer.
    """
    table = load_hub("HuggingFaceH4/stack-exchange-preferences", split="train").shuffle(seed=42)
    border = len(table) // 100
    rows = []
    for row in table.select(range(border) if split == "test" else range(border, len(table))):
        prompt = f"\n\nHuman: {strip_html(row['question'])}{ASSISTANT}"
        answers = sorted(row["answers"], key=lambda answer: -answer["pm_score"])
        texts = [" " + strip_html(answer["text"]) for answer in answers]
        if not pairs:
            rows.append({"prompt": prompt, "response": texts[0]})
            continue
        rows += [{"prompt": prompt, "chosen": texts[i], "rejected": texts[j]}
                 for i, j in itertools.combinations(range(len(answers)), 2)
                 if answers[i]["pm_score"] > answers[j]["pm_score"]]
    return rows


def ultrafeedback(split, pairs):
    """UltraFeedback, binarized: chats, with GPT-4's scores as `score_chosen` and `score_rejected`."""
    return load_hub("HuggingFaceH4/ultrafeedback_binarized", split=f"{split}_prefs")


@dataclass(frozen=True)
class Dataset:
    """load(split, pairs) -> rows: split `train` or `test`; pairs: whether the objective reads pairs.

    scores(prompt, response, finished) -> dict of floats judges samples, where that can be; a `reward` among
    them is compared with the reference's. optimal_reward(kl) is the best possible reward at a KL in nats.
    Each evaluation takes at least num_samples samples.
    """

    load: Callable
    scores: Callable = None
    optimal_reward: Callable = None
    num_samples: int = 0


DATASETS = {
    "toy": Dataset(toy, toy_scores, toy_optimal_reward, num_samples=1024),
    "hh": Dataset(hh),
    "shp": Dataset(shp),
    "se": Dataset(se),
    "ultrafeedback": Dataset(ultrafeedback),
}


def load_source(name, split, pairs):
    """One source's rows as (place, row), in order. Raises InputError for an unknown or unreadable source."""
    if name in DATASETS:
        return with_name(name, number_rows(DATASETS[name].load(split, pairs)))
    return read_source(name, split, DATASETS)


# ---------------------------------------------------------------- rows: to prompt and responses


@dataclass
class TextRow:
    """prompt and responses are strings, or (chat) a list of messages and one message for each response."""

    where: str
    prompt: str | list
    responses: tuple  # (chosen, rejected) or (response,)
    columns: dict  # name -> float

    @property
    def is_chat(self):
        return not is_text(self.prompt)


def load_rows(sources, split, objective, template=None, attributes=None, may_lack_rewards=False):
    """Reads sources (names, hub ids, files) into TextRows that this objective can use, and a Report.

    template puts a row's attributes into its prompt, laid over by `attributes`; see add_attributes.
    may_lack_rewards: a pair without rewards that the objective needs has None, instead of being refused.
    """
    rows, report, digest = [], Report(), hashlib.sha256()
    columns = [name for name in objective.columns if name not in COMPUTED_COLUMNS]
    for where, source in itertools.chain.from_iterable(load_source(name, split, objective.reads_pairs)
                                                       for name in as_list(sources)):
        report.rows += 1
        try:
            row = read_row(source, where, objective.reads_pairs, columns, may_lack_rewards)
        except Dropped as reason:
            report.drop(reason, where)
            continue
        if template is not None:
            row = add_attributes(row, template, source.get("attributes"), attributes or {})
        report.unused_attributes += isinstance(source.get("attributes"), dict) and template is None
        rows.append(row)
        try:
            digest.update(json.dumps([row.prompt, row.responses, row.columns], ensure_ascii=False).encode())
        except UnicodeEncodeError as error:
            raise InputError(f"{where} holds half a character, which is no text: {error}") from error
    report.fingerprint = digest.hexdigest()
    return rows, report


def read_row(row, where, pairs, columns=(), may_lack_rewards=False):
    """A dataset row of any shape in SHAPES, by the columns that the objective reads alone.

    may_lack_rewards: if neither reward is there, both are None. Raises Dropped for a row that cannot be
    trained on, InputError for one that is malformed.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where} is {type(row).__name__}, not an object with named columns")
    shapes = {tuple(filter(None, shape if pairs else shape[:2])): shape
              for shape in SHAPES if shape[2] or not pairs}
    needed = next((names for names in shapes if all(row.get(name) is not None for name in names)), None)
    if needed is None:
        wanted = "; or ".join(map(", ".join, shapes))
        present = ", ".join(str(name) for name, value in row.items() if value is not None)
        raise InputError(f"{where} has values in the columns {present}; this objective needs {wanted}")
    more = ("input",) if needed[0] == "instruction" and row.get("input") is not None else ()
    for name in needed + more:
        if not is_text(row[name]) and not (is_conversation(row[name]) and name != "input"):
            value = json.dumps(row[name], default=str)[:60]
            raise InputError(f"{where}: column {name} is {value}; it must be text, or a list of messages "
                             "with text for role and content")
    shape = shapes[needed]
    prompt = row[shape[0]] if shape[0] else None
    answers = [row[name] for name in shape[1:] if name in needed]
    if len(set(map(type, answers))) > 1:
        raise InputError(f"{where}: {shape[1]} and {shape[2]} must both be text or both be lists of messages")
    if shape[0] == "instruction" and is_text(prompt):
        prompt += f"\n\n{row['input']}\n\n" if row.get("input") else "\n\n"
    if prompt is None and shape[1] != "messages" and is_text(answers[0]):
        prompt, answers = split_transcript(*answers)
    elif not is_text(answers[0]) or not is_text(prompt):
        prompt, answers = split_conversations(prompt, answers)
    for name, answer in zip(shape[1:], answers):
        if not (answer if is_text(answer) else answer["content"]).strip():
            raise Dropped(f"{name} is white space only")
    if pairs and answers[0] == answers[1]:
        raise Dropped(f"{shape[1]} and {shape[2]} are equal")
    lacking = may_lack_rewards and all(row.get(name) is None for reward in REWARDS
                                       for name in (reward, COLUMN_ALIASES[reward]))
    return TextRow(where, prompt, tuple(answers),
                   {name: None if lacking and name in REWARDS else read_number(row, where, name)
                    for name in columns})


def is_text(value):
    return isinstance(value, str)


def is_conversation(value):
    return isinstance(value, list) and len(value) > 0 and all(
        isinstance(message, dict) and is_text(message.get("role")) and is_text(message.get("content"))
        for message in value)


def split_transcript(chosen, rejected=None):
    """HH: the prompt is `chosen` up to and including its last Assistant marker."""
    prompt = chosen[:chosen.rfind(ASSISTANT) + len(ASSISTANT)]
    if ASSISTANT not in chosen:
        raise Dropped(f"chosen has no {ASSISTANT!r}, where the prompt would end")
    if rejected is None:
        return prompt, [chosen[len(prompt):]]
    if not rejected.startswith(prompt):
        raise Dropped("rejected does not start with the prompt of chosen")
    return prompt, [chosen[len(prompt):], rejected[len(prompt):]]


def split_conversations(prompt, answers):
    """Chats: the prompt is the messages before the last assistant turn; later turns are not answers.

    An answer that is text or one message follows `prompt`; a longer one is the whole conversation.
    """
    start = [{"role": "user", "content": prompt}] if is_text(prompt) else prompt or []
    prompts, messages = [], []
    for answer in answers:
        if is_text(answer):
            answer = [{"role": "assistant", "content": answer}]
        turns = answer if len(answer) > 1 else start + answer
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        if last == 0:
            raise Dropped("the conversation has no assistant turn after a prompt")
        prompts.append(turns[:last])
        messages.append(turns[last])
    if prompts[0] != prompts[-1]:
        raise Dropped("rejected does not start with the prompt of chosen")
    return prompts[0], messages


def add_attributes(row, template, attributes, more):
    """The TextRow with its attributes, a mapping, in its prompt; in a chat in the prompt's last message.

    template: "{prompt}" stands for that text, "{attributes}" for all as name:value,name:value, and "{name}"
    for one (SteerLM, arXiv:2310.05344). more: values that go before the row's own.
    """
    if not isinstance(attributes or {}, dict):
        value = json.dumps(attributes, default=str)[:60]
        raise InputError(f"{row.where}: column attributes is {value}; it must map names to values")
    values = {name: value for name, value in ((attributes or {}) | more).items() if value is not None}
    for name, value in values.items():
        if name in ("prompt", "attributes") or not isinstance(value, str | int | float):
            value = json.dumps(value)[:60]
            raise InputError(f"{row.where}: the attribute {name} is {value}; it must be text or a number, "
                             "under another name than prompt and attributes")
    unknown = sorted(more.keys() - attributes.keys()) if attributes else []
    if unknown:
        raise InputError(f"sample_attributes.{unknown[0]} is no attribute of {row.where}, which has "
                         f"{', '.join(attributes)}")
    absent = sorted(set(FIELD.findall(template)) - {"prompt", "attributes", *values})
    if absent or not values:
        raise InputError(f"{row.where} has no {absent[0] if absent else 'value'} in its column attributes, "
                         "which attribute_template needs: add it, or change the template")
    everything = ",".join(f"{name}:{value}" for name, value in values.items())
    values |= {"attributes": everything, "prompt": row.prompt[-1]["content"] if row.is_chat else row.prompt}
    text = FIELD.sub(lambda field: str(values[field[1]]), template)
    prompt = [*row.prompt[:-1], row.prompt[-1] | {"content": text}] if row.is_chat else text
    return replace(row, prompt=prompt)


def read_number(row, where, name):
    """The float in column `name`, or in its alias."""
    value = row.get(COLUMN_ALIASES.get(name)) if row.get(name) is None else row[name]
    if value is None:
        alias = f" (or {COLUMN_ALIASES[name]})" if name in COLUMN_ALIASES else ""
        helps = " (where a pair has neither reward, reward_model= gives both)" if name in REWARDS else ""
        raise InputError(f"{where}: the objective needs a column {name}{alias}, a number{helps}; "
                         f"the row has {', '.join(map(str, row))}")
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number):
        raise InputError(f"{where}: column {name} is {value!r}; it must be a finite number")
    return number


# ---------------------------------------------------------------- tokens


def encode(rows, report, tokenizer, config, end_ids, limit=None) -> list[Example]:
    """TextRows to Examples, in order, at most `limit`; `report` counts the used, the cut and the dropped."""
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    examples = []
    for start in progress(range(0, len(rows), 1000), "tokenizing, 1,000 rows at a time"):
        chunk = rows[start:start + 1000]
        plain = iter(encode_plain([row for row in chunk if not row.is_chat], tokenizer, end_ids))
        for row in chunk:
            if len(examples) == limit:
                return examples
            try:
                ids = encode_chat(row, tokenizer, end_ids, special) if row.is_chat else next(plain)
                prompt, responses, was_cut = truncated(*ids, tokenizer, config)
            except Dropped as reason:
                report.drop(reason, row.where)
                continue
            report.used += 1
            report.cut += was_cut
            examples.append(Example(row.where, np.array(prompt, np.int32),
                                    tuple(np.array(ids, np.int32) for ids in responses), row.columns))
    return examples


def encode_plain(rows, tokenizer, end_ids):
    """[(prompt ids, [response ids])]: tokenised apart, special tokens as text, each response ended."""
    if not rows:
        return []
    texts = [text for row in rows for text in (row.prompt, *row.responses)]
    ids = iter(tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return [(next(ids), [next(ids) + end_ids[:1] for _ in row.responses]) for row in rows]


def encode_chat(row, tokenizer, end_ids, special):
    """The prompt as the chat template renders it, and for each answer what the template adds to that.

    A response goes to its last end token; one is appended where there is none. special: text -> id of the
    tokens that the template may use and that a message may not: there they are encoded as text.
    Returns prompt ids and [response ids]. Raises Dropped for what the template cannot render.
    """
    if tokenizer.chat_template is None:
        raise InputError(f"{row.where} is a list of messages, but the tokenizer has no chat template: choose "
                         "a tokenizer with one (tokenizer=...), or give prompt and response as text")

    text = "".join(message["content"] for message in [*row.prompt, *row.responses])
    guard = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)

    def render(messages, **options):
        shielded = [message | {"content": shield(message["content"], special, guard)} for message in messages]
        try:
            return tokenizer.apply_chat_template(shielded, tokenize=False, **options)
        except jinja2.TemplateError as error:
            raise Dropped(f"the chat template refuses it: {error}") from error

    prompt = render(row.prompt, add_generation_prompt=True)
    texts = [prompt]
    for answer in row.responses:
        whole = render([*row.prompt, answer])
        if not whole.startswith(prompt):
            raise Dropped("the chat template renders the prompt otherwise when an answer follows")
        texts.append(whole[len(prompt):])
    prompt, *responses = [encode_rendered(text, tokenizer, special, guard) for text in texts]
    for i, ids in enumerate(responses):
        end = max((at + 1 for at, token in enumerate(ids) if token in end_ids), default=0)
        responses[i] = ids[:end] if end else ids + end_ids[:1]
    return prompt, responses


def shield(text, special, guard):
    """Puts guard, a character that is not in the text, inside the special tokens that stand there as text."""
    for token in special:
        text = text.replace(token, token[0] + guard + token[1:])
    return text


def encode_rendered(text, tokenizer, special, guard):
    """A rendered chat to ids, as the tokenizer does it, but with shielded special tokens as text."""
    if guard not in text:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
        plain = part.replace(guard, "")
        ids += [special[part]] if part in special else tokenizer(
            plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def truncated(prompt, responses, tokenizer, config):
    """Adds the begin token (`add_bos`) and cuts by `truncation` what does not fit `max_length` tokens.

    Returns prompt, responses and whether anything was cut. Raises Dropped if nothing is left to train on.
    """
    bos = [tokenizer.bos_token_id] if config.add_bos and prompt[:1] != [tokenizer.bos_token_id] else []
    is_too_long = len(bos) + len(prompt) + max(map(len, responses)) > config.max_length
    if is_too_long and config.truncation == "drop":
        raise Dropped(f"longer than max_length={config.max_length} tokens")
    if is_too_long:
        kept = config.max_prompt_length - len(bos)
        prompt = prompt[max(0, len(prompt) - kept):] if config.truncation == "keep_end" else prompt[:kept]
        responses = [ids[:config.max_length - len(bos) - len(prompt)] for ids in responses]
    if not bos + prompt:
        raise Dropped("the prompt is empty, so nothing predicts the first token (add_bos=true gives it one)")
    if len(responses) == 2 and responses[0] == responses[1]:
        raise Dropped("the two responses are equal in tokens" + (" after truncation" if is_too_long else ""))
    return bos + prompt, responses, is_too_long
