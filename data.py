"""How does a dataset row become a batch?

    row (a dict, as the dataset has it)  -> read_row -> TextRow  -> encode -> Example (token ids)
    examples of one global batch         -> microbatches -> collate -> Batch (tensors)

A row that cannot be trained on raises Dropped; the Report counts it. A malformed one raises InputError.
"""

import csv
import difflib
import functools
import hashlib
import html.parser
import itertools
import json
import math
import os
import random
import re
import sys
from dataclasses import dataclass, field, replace
from typing import Callable

import jinja2
import numpy as np
import pyarrow.parquet
import torch
from tqdm import tqdm

COMPUTED_COLUMNS = ("chosen_length", "rejected_length")  # an objective's columns that no row has to bring
REWARDS = ("chosen_reward", "rejected_reward")  # columns that a reward model can fill
COLUMN_ALIASES = {"chosen_reward": "score_chosen", "rejected_reward": "score_rejected"}
FIELD = re.compile(r"\{([^{}]+)\}")  # in an attribute_template
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


class InputError(ValueError):
    """Something the user gave is not allowed. The message is one sentence: given, allowed, what to do."""


def first_line(error):
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class Dropped(Exception):
    """This row cannot be trained on; the message is the reason, under which the Report counts it."""


@dataclass
class Report:
    """What became of a split's rows: how many were used, cut, and dropped, by reason and with places."""

    rows: int = 0
    used: int = 0
    cut: int = 0
    dropped: dict = field(default_factory=dict)  # reason -> places ("train.jsonl line 87")
    unused_attributes: int = 0  # rows with attributes that no template puts into their prompts
    fingerprint: str = ""  # sha256 of the rows that could be read, in order

    def drop(self, reason, where):
        self.dropped.setdefault(str(reason), []).append(where)

    def lines(self):
        """The report as lines of text, for the summary before step 1."""
        num_dropped = sum(map(len, self.dropped.values()))
        unread = self.rows - self.used - num_dropped
        yield (f"{self.used:,} of {self.rows:,} rows used, {num_dropped:,} dropped, {self.cut:,} cut to fit"
               + (f", {unread:,} beyond what was asked for" if unread else ""))
        for reason, places in self.dropped.items():
            more = f" and {len(places) - 5:,} more" if len(places) > 5 else ""
            yield f"  dropped {len(places):,}: {reason} ({', '.join(places[:5])}{more})"
        if self.unused_attributes:
            yield f"  {self.unused_attributes:,} have attributes, unused: attribute_template is null"


# ---------------------------------------------------------------- sources: a name, a hub id, a file


def toy(split, pairs):
    """Film reviews of four sentences, " The ASPECT was WORD.", each praise with probability 1/2.

    Pairs are labelled by Bradley-Terry on the true rewards; without pairs the rows are fresh, unlabelled
    responses. The rows are the same in every run, whatever its seed.
    """
    rng = random.Random(f"toy {split} {pairs}")

    def review():
        words = [rng.choice(rng.choice(TOY_WORDS)) for _ in range(4)]
        return "".join(f" The {rng.choice(TOY_ASPECTS)} was {word}." for word in words)

    rows = []
    for _ in range(16384 if split == "train" else 1024):
        prompt = f"Review of The {rng.choice(TOY_ADJECTIVES)} {rng.choice(TOY_NOUNS)}:"
        if not pairs:
            rows.append({"prompt": prompt, "response": review()})
            continue
        answers = [review(), review()]
        rewards = [toy_scores(prompt, answer, True)["reward"] for answer in answers]
        w = 0 if rng.random() < 1 / (1 + math.exp(rewards[1] - rewards[0])) else 1
        rows.append({"prompt": prompt, "chosen": answers[w], "rejected": answers[1 - w],
                     "chosen_reward": rewards[w], "rejected_reward": rewards[1 - w]})
    return rows


TOY_ADJECTIVES = "Silent Golden Hidden Broken Distant Paper Winter Burning Lonely Crooked".split()
TOY_NOUNS = "Garden River Letter Harbor Mirror Station Kingdom Summer Orchard Witness".split()
TOY_ASPECTS = "acting plot music pacing script camera".split()
TOY_WORDS = [words.split() for words in ("brilliant moving clever gripping superb fresh",  # praise
                                         "dull clumsy tired bland weak awful")]  # blame
TOY_REVIEW = re.compile(rf"( The ({'|'.join(TOY_ASPECTS)}) was ({'|'.join(sum(TOY_WORDS, []))})\.){{4}}")


def toy_scores(prompt, response, finished):
    """True reward of a response: praise minus blame, from -4 to 4, and -4 for what is not well formed.

    finished: whether the end-of-sequence token came within the token limit.
    """
    if not finished or not TOY_REVIEW.fullmatch(response):
        return {"reward": -4.0, "well_formed": 0.0}
    praise = sum(response.count(f" was {word}.") for word in TOY_WORDS[0])
    return {"reward": float(2 * praise - 4), "well_formed": 1.0}


def toy_optimal_reward(kl):
    """The highest mean reward of any policy at this KL (nats) from the data's distribution.

    Tilting each sentence's odds by e^2t gives reward 4 tanh t at a KL of 4 [log 2 - H(sigmoid 2t)];
    bisection finds t.
    """
    low, high = 0.0, 20.0
    for _ in range(100):
        t = (low + high) / 2
        p = 1 / (1 + math.exp(-2 * t))
        entropy = -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)
        low, high = (t, high) if 4 * (math.log(2) - entropy) < kl else (low, t)
    return 4 * math.tanh(low) if kl < 4 * math.log(2) else 4.0


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


def strip_html(text):
    """The text of an HTML fragment; blocks end in a blank line."""
    pieces = []
    parser = html.parser.HTMLParser(convert_charrefs=True)
    parser.handle_data = pieces.append
    blocks = ("p", "pre", "li", "blockquote")
    parser.handle_endtag = lambda tag: pieces.append("\n\n" if tag in blocks else "")
    parser.feed(text)
    parser.close()
    return re.sub(r"\n{3,}", "\n\n", "".join(pieces)).strip()


def load_hub(name, config=None, split="train"):
    """One split of a Hugging Face dataset. Raises InputError where it cannot be had."""
    import datasets  # takes a second, and only hub data need it

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"dataset {name}, config {config}, split {split} cannot be loaded: "
                         f"{first_line(error)}") from error


def read_jsonl(path):
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", parse_json(line, f"{path} line {number}")


def read_json(path):
    with open(path, encoding="utf-8-sig") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        return number_rows(parse_json(text, path))
    return read_jsonl(path)  # JSON lines under the other name


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error


def read_csv(path):
    """Cells are text, as they stand; a number is read where a number is needed."""
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"line {reader.line_num} has not the header's {len(reader.fieldnames)} cells")
            yield f"line {reader.line_num}", row


def read_parquet(path):
    return number_rows(pyarrow.parquet.read_table(path).to_pylist())


def number_rows(rows):
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


FILES = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet, ".csv": read_csv}


def load_source(name, split, pairs):
    """One source's rows as (place, row), in order. Raises InputError for an unknown or unreadable source."""
    ending = os.path.splitext(name)[1]
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?::(.+))?", name)
    if name in DATASETS:
        rows = number_rows(DATASETS[name].load(split, pairs))
    elif ending in FILES and os.path.isfile(name):
        try:
            rows = list(FILES[ending](name))
        except (OSError, UnicodeError, csv.Error, pyarrow.ArrowException) as error:
            raise InputError(f"{name} is no {ending} file in UTF-8: {error}") from error
    elif hub and ending not in FILES and not os.path.isfile(name):
        rows = number_rows(load_hub(hub[1], hub[2], hub[3] or split))
    else:
        near = difflib.get_close_matches(name, DATASETS, 1)
        why = "no such file" if ending in FILES else f"did you mean {near[0]}?" if near else "no dataset"
        raise InputError(f"{name!r} cannot be read, {why}: give one of {', '.join(DATASETS)}, an existing "
                         f"file ending in {', '.join(FILES)}, or a hub id org/name[/config][:split]")
    return ((f"{os.path.basename(name) if ending in FILES else name} {place}", row) for place, row in rows)


def as_list(value):
    return [] if value is None else [value] if isinstance(value, str) else value


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
        return not isinstance(self.prompt, str)


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


# ---------------------------------------------------------------- tokens: from text to examples


@dataclass
class Example:
    """Token ids of one row, as int32 arrays, responses with their end token unless it was cut off."""

    where: str
    prompt: np.ndarray
    responses: tuple
    columns: dict

    @property
    def num_tokens(self):
        """Each prompt and response once, no padding."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def row_length(self):
        return len(self.prompt) + max(map(len, self.responses))


def train_tokenizer(rows, vocab_size=1024):
    """A byte-level BPE of these rows' own texts, for the `tiny` model; equal rows give an equal tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts():
        for row in rows:
            for part in (row.prompt, *row.responses):
                yield part if is_text(part) else json.dumps(part, ensure_ascii=False)

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|pad|>")


def encode(rows, report, tokenizer, config, end_ids, limit=None, title="tokenizing"):
    """TextRows to Examples, in order, at most `limit`; `report` counts the used, the cut and the dropped.

    end_ids: the tokens that end a response; the first closes those that have none.
    """
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    examples = []
    for start in tqdm(range(0, len(rows), 1000), desc=f"{title}, 1,000 rows at a time", disable=None):
        chunk = rows[start:start + 1000]
        plain = iter(encode_plain([row for row in chunk if not row.is_chat], tokenizer, end_ids))
        for row in chunk:
            if len(examples) == limit:
                return examples
            try:
                ids = encode_chat(row, tokenizer, end_ids, special) if row.is_chat else next(plain)
                prompt, responses, cut = fit(*ids, tokenizer, config)
            except Dropped as reason:
                report.drop(reason, row.where)
                continue
            report.used += 1
            report.cut += cut
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


def fit(prompt, responses, tokenizer, config):
    """Adds the begin token (`add_bos`) and cuts by `truncation` what does not fit `max_length` tokens.

    Returns prompt, responses and whether anything was cut. Raises Dropped if nothing is left to train on.
    """
    bos = [tokenizer.bos_token_id] if config.add_bos and prompt[:1] != [tokenizer.bos_token_id] else []
    cut = len(bos) + len(prompt) + max(map(len, responses)) > config.max_length
    if cut and config.truncation == "drop":
        raise Dropped(f"longer than max_length={config.max_length} tokens")
    if cut:
        room = config.max_prompt_length - len(bos)
        prompt = prompt[max(0, len(prompt) - room):] if config.truncation == "keep_end" else prompt[:room]
        responses = [ids[:config.max_length - len(bos) - len(prompt)] for ids in responses]
    if not bos + prompt:
        raise Dropped("the prompt is empty, so nothing predicts the first token (add_bos=true gives it one)")
    if len(responses) == 2 and responses[0] == responses[1]:
        raise Dropped("the two responses are equal in tokens" + (" after truncation" if cut else ""))
    return bos + prompt, responses, cut


# ---------------------------------------------------------------- batches: from examples to tensors


def stream(num_rows, start, stop, *, seed, shuffle):
    """Row numbers at positions start to stop of the endless stream of epochs, each a seeded permutation."""
    return [int(epoch_order(num_rows, seed, position // num_rows, shuffle)[position % num_rows])
            for position in range(start, stop)]


@functools.lru_cache(maxsize=2)
def epoch_order(num_rows, seed, epoch, shuffle):
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_rows, generator=generator) if shuffle else torch.arange(num_rows)


@dataclass(frozen=True)
class Layout:
    """How a microbatch is laid in rows, all as wide as the widest: each response after a prompt of its own;
    or shared, examples one after another as they fit, each [prompt | chosen | rejected].

    A row of T tokens costs T (linear + quadratic T).
    """

    shared: bool
    linear: float = 1.0
    quadratic: float = 0.0

    def width(self, example):
        return example.num_tokens if self.shared else example.row_length

    def rows(self, examples, max_tokens=math.inf):
        """Rows, lists of places in `examples`, which come longest first. They end with the first example that
        the budget of tokens, padding counted, has no room for; the first always goes in."""
        rows, room, width = [], [], 0
        for place, example in enumerate(examples):
            own = self.width(example)
            i = next((i for i, left in enumerate(room) if self.shared and left >= own), len(rows))
            if i == len(rows):
                width = max(width, own)
                height = (i + 1) * (1 if self.shared else len(example.responses))
                if i > 0 and height * width > max_tokens:
                    break
                rows.append([])
                room.append(width)
            rows[i].append(place)
            room[i] -= own
        return rows

    def cost(self, examples, rows):
        """Of these rows, per token that is not repeated."""
        width = max(sum(self.width(examples[i]) for i in row) for row in rows)
        height = len(rows) if self.shared else len(rows) * len(examples[0].responses)
        num_tokens = sum(examples[i].num_tokens for row in rows for i in row)
        return height * width * (self.linear + self.quadratic * width) / num_tokens


SEPARATE = Layout(shared=False)


def deal(examples, num_ranks):
    """Deals examples, longest first, each to the rank with the fewest tokens so far: a list for each rank."""
    hands, tokens = [[] for _ in range(num_ranks)], [0] * num_ranks
    for i in sorted(range(len(examples)), key=lambda i: -examples[i].num_tokens):
        rank = tokens.index(min(tokens))
        hands[rank].append(i)
        tokens[rank] += examples[i].num_tokens
    return [[examples[i] for i in sorted(hand)] for hand in hands]


def microbatches(examples, parts, max_tokens, layouts=(SEPARATE,)):
    """Cuts examples, longest first, into `parts` nearly equal parts, and these by a budget of tokens.

    The budget counts padding; an example beyond it goes alone. Each microbatch gets the cheapest of the
    layouts. Returns (examples, layout) pairs.
    """
    ordered = sorted(examples, key=layouts[-1].width, reverse=True)
    batches = []
    for i in range(parts):
        part = ordered[i * len(ordered) // parts:(i + 1) * len(ordered) // parts]
        while part:
            choices = [(layout, layout.rows(part, max_tokens)) for layout in layouts]
            layout, rows = min(choices, key=lambda choice: choice[0].cost(part, choice[1]))
            size = sum(map(len, rows))
            batches.append((part[:size], layout))
            part = part[size:]
    return batches


@dataclass
class Batch:
    """Tensors of B examples with K responses each, laid in R rows of T tokens, padded on the right.

    input_ids, positions: (R, T) int64; a token's position is that in its prompt with its own response.
    segments: (R, T) int64, a number for each prompt and each response, -1 for padding.
    prompts: (R, T) int64, the segment of each token's prompt: a token sees that and its own segment. Both are
    None where each row is one response, which a causal model sees so by itself.
    states: (N,) int64, for each of N response tokens the place in R * T of the token that predicts it.
    targets: (N,) int64, those tokens, response after response, all chosen before all rejected.
    lengths, ends: (K * B,) int64, the responses' tokens, and the place of each one's last token.
    columns: name -> (B,) float.
    is_idle: whether it is there only to keep pace with other ranks, and its numbers count nowhere.

    One pair, prompt [5, 6], chosen [7, 1], rejected [8, 9, 1], separate and shared:

        input_ids   5 6 7 1 0     input_ids   5 6 7 1 8 9 1     targets  7 1 8 9 1
                    5 6 8 9 1     positions   0 1 2 3 2 3 4     lengths  2 3
        states      1 2 6 7 8     segments    0 0 1 1 2 2 2
        ends        3 9           prompts     0 0 0 0 0 0 0
                                  states      1 2 1 4 5
                                  ends        3 6
    """

    examples: list
    input_ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor | None
    prompts: torch.Tensor | None
    states: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    ends: torch.Tensor
    columns: dict
    is_idle: bool = False

    def to(self, device):
        """On a GPU the copies are queued, and nobody waits for them."""
        def move(value):
            if not torch.is_tensor(value) or device.type == "cpu":
                return value
            return value.pin_memory().to(device, non_blocking=True)
        values = {name: move(value) for name, value in vars(self).items() if name != "columns"}
        return Batch(**values, columns={name: move(column) for name, column in self.columns.items()})


def collate(examples, dtype=torch.float32, layout=SEPARATE):
    """Examples, longest first, to a Batch; its columns are of `dtype`. See Batch for what is laid where."""
    num_responses = len(examples[0].responses)
    if layout.shared:
        rows = [[(place, range(num_responses)) for place in row] for row in layout.rows(examples)]
    else:
        rows = [[(place, [k])] for k in range(num_responses) for place in range(len(examples))]
    width = max(sum(len(examples[i].prompt) + sum(len(examples[i].responses[k]) for k in ks) for i, ks in row)
                for row in rows)
    input_ids, positions = np.zeros((2, len(rows), width), np.int64)
    segments, prompts = np.full((2, len(rows), width), -1, np.int64)
    states, ends = ([None] * num_responses * len(examples) for _ in range(2))
    for r, row in enumerate(rows):
        at, segment = 0, 0
        for place, ks in row:
            example = examples[place]
            last, own_prompt = at + len(example.prompt) - 1, segment
            for k in (None, *ks):
                ids, start = (example.prompt, 0) if k is None else (example.responses[k], len(example.prompt))
                span = slice(at, at + len(ids))
                input_ids[r, span], positions[r, span] = ids, np.arange(start, start + len(ids))
                segments[r, span], prompts[r, span] = segment, own_prompt
                if k is not None:
                    number = k * len(examples) + place
                    states[number] = r * width + np.append(last, np.arange(at, at + len(ids) - 1))
                    ends[number] = r * width + at + len(ids) - 1
                at, segment = at + len(ids), segment + 1
    answers = [example.responses[k] for k in range(num_responses) for example in examples]
    columns = {name: [example.columns[name] for example in examples] for name in examples[0].columns}
    columns |= dict(zip(COMPUTED_COLUMNS, zip(*(map(len, example.responses) for example in examples))))
    tensors = (input_ids, positions, *((segments, prompts) if layout.shared else (None, None)),
               np.concatenate(states), np.concatenate(answers).astype(np.int64),
               np.array([len(ids) for ids in answers]), np.array(ends))
    return Batch(list(examples), *(x if x is None else torch.from_numpy(x) for x in tensors),
                 {name: torch.tensor(column, dtype=dtype) for name, column in columns.items()})
