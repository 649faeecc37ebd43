"""Which datasets are there, and how does a row become token ids?

    row (a dict, as the dataset has it) -> read_row -> TextRow -> Encoder.render -> its whole text, and the
    spans of its answers there -> Encoder.example -> Example (token ids)

A row that cannot be trained on raises Dropped; the Report counts it. A malformed one raises InputError.
"""

import datetime
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from engine import Dropped, InputError
from engine.batches import COMPUTED_COLUMNS, LIST_REWARDS, REWARDS, Example
from engine.chats import (GUARD, WRITTEN, ChatTemplate, fill_template, is_text, read_tools,
                          split_conversations)
from engine.checkpoints import read_began
from engine.config import FIELD, as_list
from engine.distributed import from_first, raise_on_all_ranks
from engine.files import load_hub, number_rows, read_source, short_names, strip_html, with_name
from engine.models import load_end_ids, load_model_config, load_tokenizer
from engine.objectives import add_responses
from engine.report import Report, progress
from engine.rows import lacks_rewards, read_cell, read_list, read_numbers, read_weights
from engine.tokens import TokenCutter, part_read
from engine.toy import toy, toy_optimal_reward, toy_scores

ASSISTANT = "\n\nAssistant:"  # closes the prompt in an HH transcript
SHAPES = (  # prompt column, chosen or only response, rejected; the first that fits and suffices is read
    ("prompt", "chosen", "rejected"),
    (None, "chosen", "rejected"),
    ("prompt", "chosen_response", "rejected_response"),
    (None, "messages", None),
    (None, "conversations", None),
    ("prompt", "response", None),
    ("prompt", "completion", None),
    ("instruction", "output", None),  # and `input`, where a row has one
    ("input", "output", None),
)
LIST_SHAPE = ("prompt", "responses")  # of any number of texts, or of lists of messages


@dataclass
class RunData:
    """All that a run reads but weights.

    eval_sources: held-out examples by the name of their source. sample_examples: their prompts are answered
    in each evaluation. judge: the Dataset whose true scores are known of these, or None. end_ids: the tokens
    that end a response; the first closes those that have none. fingerprints: of the training rows' texts
    (`data`) and token ids (`tokens`), for a resumed run must go on with the same. began: the date on which
    the run did.
    """

    train_examples: list[Example]
    eval_sources: dict[str, list[Example]]
    sample_examples: list[Example]
    judge: "Dataset | None"
    fingerprints: dict[str, str]
    began: str
    reports: dict[str, Report]
    tokenizer: PreTrainedTokenizerBase
    end_ids: list[int]
    model_config: PretrainedConfig
    dropouts: dict[str, float]

    @property
    def eval_examples(self):
        return list(itertools.chain(*self.eval_sources.values()))


def load_data(config, objective, checkpoint=None) -> RunData:
    """Reads the sources that the config names and makes token ids of their rows, for the policy."""
    today = from_first(datetime.date.today().isoformat())  # before a rank may fail alone
    return load_data_on(today, config, objective, checkpoint)


@raise_on_all_ranks
def load_data_on(today, config, objective, checkpoint):
    sources = as_list(config.eval_data) or [name for name in as_list(config.data) if name in DATASETS]
    reports = {"data": Report(), "eval data": Report()}
    gives_rewards = config.reward_model or getattr(config, config.loss, {}).get("default_rewards")
    read = functools.partial(load_rows, objective=objective, template=config.prompt_template,
                             may_lack_rewards=bool(gives_rewards))
    train_rows = [read(name, "train", report=reports["data"])[0] for name in as_list(config.data)]
    eval_rows = [read(name, "test", report=reports["eval data"])[0] for name in sources]

    texts = (text for row in itertools.chain(*train_rows) for text in (row.prompt, *row.responses))
    model_path = checkpoint or config.model
    tokenizer = load_tokenizer(checkpoint or config.tokenizer or config.model, texts, config)
    model_config, dropouts = load_model_config(model_path, config, tokenizer)
    end_ids = load_end_ids(model_path, model_config, tokenizer)
    began = read_began(checkpoint) or today
    encoder = Encoder(tokenizer, config, end_ids, began)

    # What is trained on, and the same of the held-out rows, by source.
    train_on = getattr(config, config.loss, {}).get("train_on", "last_answer")
    options = {"train_on": train_on, "to_the_end": objective.inputs == "scores"}  # where scores are read
    train_examples = [example for rows in train_rows for example in encoder.examples(
        rows, reports["data"], limit=config.num_train_examples, **options)]
    eval_sources = {name: encoder.examples(
        rows, reports["eval data"], limit=config.num_eval_examples, **options)
        for name, rows in zip(short_names(sources), eval_rows)}

    if add := objective.bound(getattr(config, config.loss, {})).add_responses:
        add = functools.partial(add_responses, add, config.max_length)
        train_examples = add(train_examples, reports["data"])
        eval_sources = {name: add(examples, reports["eval data"]) for name, examples in eval_sources.items()}

    # The prompts that are answered in each evaluation.
    judge = DATASETS.get(sources[0]) if len(set(sources)) == 1 else None  # of several none is
    judge = judge if judge and judge.scores else None
    num_prompts = max(config.num_samples, judge.num_samples if judge else 0)
    num_prompts = 0 if objective.inputs == "scores" else num_prompts  # a reward model writes nothing
    if config.sample_attributes:
        eval_rows = [read(name, "test", attributes=config.sample_attributes)[0] for name in sources]
    prompts = list(itertools.chain(*eval_rows))
    reports["samples"] = Report(len(prompts), "prompts")
    sample_examples = encoder.examples(prompts, reports["samples"], limit=num_prompts)

    if config.max_steps == 0 and not sources:
        raise InputError("max_steps=0 only evaluates and samples, and there is nothing to: name eval_data")
    parts = zip(itertools.repeat("eval data"), sources, eval_sources.values())
    for what, name, part in [("data", config.data, train_examples), *parts]:
        if not part:
            raise InputError(f"{what} {name} leaves no row to work with: " + "; ".join(reports[what].lines()))
    tokens = hashlib.sha256(b"".join(example.fingerprint for example in train_examples))
    fingerprints = {"data": reports["data"].digest.hexdigest(), "tokens": tokens.hexdigest()}
    return RunData(train_examples, eval_sources, sample_examples, judge, fingerprints, began, reports,
                   tokenizer, end_ids, model_config, dropouts)


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
    """prompt and responses are strings, or (chat) a list of messages and one message for each response.

    answers: indices into the prompt of earlier answers that SFT may train on. tools: for the chat template.
    """

    where: str
    prompt: str | list
    responses: tuple  # (chosen, rejected), (response,) or a list's
    columns: dict  # name -> float, or a list's floats
    answers: tuple = ()
    tools: list | None = None
    weights: tuple | None = None  # of each response, of its characters and its end

    @property
    def is_chat(self):
        return not is_text(self.prompt)


def load_rows(sources, split, objective, template=None, attributes=None, may_lack_rewards=False, report=None):
    """Reads sources (names, hub ids, files) into TextRows that this objective can use, and a Report.

    template goes around each prompt, with columns and attributes, laid over by `attributes`; see
    fill_template. may_lack_rewards: a pair without rewards that the objective needs has None.
    """
    rows, kinds, report, fields = [], {}, report or Report(), {*FIELD.findall(template or "")}
    fields |= {"attributes"} if fields - {"prompt"} else set()  # where a field may come from
    columns = [name for name in objective.columns if name not in COMPUTED_COLUMNS]
    columns = [] if objective.self_play else columns  # there they come with the answers
    for where, source in itertools.chain.from_iterable(load_source(name, split, objective.reads_pairs)
                                                       for name in as_list(sources)):
        report.rows += 1
        try:
            row = read_row(source, where, objective.reads_pairs, columns, may_lack_rewards, report, fields,
                           objective.reads_lists)
            if template is not None:
                prompt = fill_template(row.prompt, template, source, attributes or {}, where)
                row = replace(row, prompt=prompt)
            texts = json.dumps([row.prompt, row.responses, row.columns, *filter(None, [row.tools])],
                               ensure_ascii=False)
            if re.search(f"[{GUARD}-{WRITTEN}]", texts):
                raise Dropped("it holds one of U+FDD0 to U+FDD3, which are no characters")
            report.digest.update(texts.encode())
            for name, value in row.columns.items():
                if value is not None and kinds.setdefault(name, type(value)) is not type(value):
                    raise InputError(f"{where}: column {name} is {value!r}, where rows before have the other "
                                     "of a number and a list: give all the same")
            if None in row.columns.values():
                report.note("bring no rewards: reward_model or default_rewards gives them")
            rows.append(row)
        except Dropped as reason:
            report.drop(reason, where)
        except UnicodeEncodeError as error:
            raise InputError(f"{where} holds half a character, which is no text: {error}") from error
    return rows, report


def read_row(row, where, pairs, columns=(), may_lack_rewards=False, report=None, read=(), lists=False):
    """A dataset row of any shape in SHAPES, or for lists in LIST_SHAPE, as a TextRow, by the columns that the
    objective reads alone.

    may_lack_rewards: if no reward is there, all are None. read: columns that a template reads. Raises
    Dropped for a row that cannot be trained on, InputError for one that is malformed.
    """
    report = report or Report()
    prompt_name, *names = shape_of(row, where, pairs, lists)
    if not (pairs or lists or "label" in columns) and str(row.get("label")).lower() == "false":
        raise Dropped("its label is false: it is no example of what to say")
    prompt = prompt_name and read_cell(row[prompt_name], prompt_name, where, report)
    read, earlier = {prompt_name, *names, *(f"{name}_weights" for name in names), *read}, ()
    if lists:
        names, answers = read_list(row, *names, where, report)
    else:
        answers = [read_cell(row[name], name, where, report) for name in names]
    if len(set(map(type, answers))) > 1:
        raise InputError(f"{where}: {names[0]} and {names[1]} must both be text or both be lists of messages")
    if prompt_name == "instruction" and is_text(prompt):
        more = row.get("input") or ""
        if not is_text(more):
            more = json.dumps(more, default=str)[:60]
            raise InputError(f"{where}: column input is {more}; it must be text")
        prompt += "\n\n" + (more and more + "\n\n")
        read.add("input")

    # Plain text is a prompt and what follows it; else the answers are the assistant's last messages.
    is_plain = is_text(answers[0]) and (prompt is None or is_text(prompt))
    if is_plain and prompt is None:
        prompt, answers = split_transcript(row, names[0], *answers)
    elif not is_plain:
        prompt, answers, earlier = split_conversations(prompt, answers, names[0], row.get("system"), report)
        read |= {"tools"} | ({"system"} if prompt[0]["content"] == row.get("system") else set())
    for name, answer in zip(names, answers):
        said, calls = (answer, None) if is_plain else (answer["content"], answer.get("tool_calls"))
        if not said.strip() and not calls:
            raise Dropped(f"{name} is white space only")
    if len(answers) > 1 and all(answer == answers[0] for answer in answers):
        raise Dropped(f"{names[0]} and {names[-1]} are equal")
    report.note_unread(row, read)
    lacking, count = may_lack_rewards and lacks_rewards(row, lists), len(answers) if lists else None
    return TextRow(where, prompt, tuple(answers),
                   {name: None if lacking and name in (*REWARDS, LIST_REWARDS) else
                    read_numbers(row, where, name, count) for name in columns}, earlier,
                   None if is_plain else read_tools(row, where), read_weights(row, names, answers, where))


def shape_of(row, where, pairs, lists=False):
    """The first of SHAPES that the row fits and that suffices: the prompt's column or None, the answers'."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is {type(row).__name__}, not an object with named columns")
    shapes = [[name for name in shape if name or name is shape[0]] if pairs else shape[:2]
              for shape in SHAPES if shape[2] or not pairs]
    shapes = [LIST_SHAPE] if lists else shapes
    for shape in shapes:
        if all(row.get(name) is not None for name in shape if name):
            return shape
    wanted = "; or ".join(dict.fromkeys(", ".join(filter(None, shape)) for shape in shapes))
    present = ", ".join(str(name) for name, value in row.items() if value is not None)
    raise InputError(f"{where} has values in the columns {present}; this objective needs {wanted}")


def split_transcript(row, name, chosen, rejected=None):
    """HH: the prompt is `chosen` up to and including its last Assistant marker. name: its column."""
    prompt = chosen[:chosen.rfind(ASSISTANT) + len(ASSISTANT)]
    if ASSISTANT not in chosen:
        raise Dropped(f"{name} has no {ASSISTANT!r}, where the prompt would end, and no column prompt stands "
                      f"beside it in {', '.join(map(str, row))}")
    if rejected is None:
        return prompt, [chosen[len(prompt):]]
    if not rejected.startswith(prompt):
        raise Dropped("rejected does not start with the prompt of chosen")
    return prompt, [chosen[len(prompt):], rejected[len(prompt):]]


# ---------------------------------------------------------------- tokens: one rendering, cut


class Encoder:
    """Makes Examples of TextRows: each is rendered whole, and cut where its prompt and its answers end.

    end_ids: the tokens that end a response. today: the date for chat templates.
    """

    def __init__(self, tokenizer, config, end_ids, today):
        self.config, self.end_ids, self.begin_id = config, end_ids, tokenizer.bos_token_id
        self.chats = ChatTemplate(tokenizer, end_ids, datetime.date.fromisoformat(today),
                                  config.chat_template_kwargs, config.content_tokens or ())
        self.cutter = TokenCutter(tokenizer, self.chats)
        special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def examples(self, rows, report, train_on="last_answer", to_the_end=False, limit=None) -> list[Example]:
        """The rows' Examples, in order, at most `limit`; the report counts the used, the cut and the dropped.

        train_on: `last_answer`, `answers` (those before it too) or `everything`. to_the_end: responses of
        chats go to the end of the rendering, and so they do with `everything`.
        """
        to_the_end = to_the_end or train_on == "everything"

        def made():
            for start in progress(range(0, len(rows), 1000), "tokenizing, 1,000 rows at a time"):
                chunk = rows[start:start + 1000]
                renderings = [(row, *self.render(row, train_on == "answers")) for row in chunk]
                encodings = iter(self.cutter.encode_batch(
                    [text[part_read(k, text, cuts):] for _, parts, *_ in renderings
                     for k, (text, cuts) in enumerate(parts)]))
                for row, parts, notes, reason in renderings:
                    parts = [(text, cuts, next(encodings)) for text, cuts in parts]
                    try:
                        if reason:
                            raise reason
                        cut = list(self.cutter.cut_alike(parts))
                        texts = [text for text, *_ in parts]
                        yield self.example(row, texts, cut, train_on, to_the_end, report)
                        report.notes.update(notes)
                    except Dropped as dropped:
                        report.drop(dropped, row.where)
        return list(itertools.islice(made(), limit))

    def render(self, row, with_earlier):
        """([(the row's whole text with a response, the places in it where answers begin and end, the response
        last)], what is to be noted of the row, why it is dropped or None)."""
        if not row.is_chat:
            is_special = any(map(self.special.search, (row.prompt, *row.responses)))
            notes = {"hold special tokens in plain text, which are read as tokens"} if is_special else set()
            return [(row.prompt + text, [len(row.prompt), len(row.prompt + text)])
                    for text in row.responses], notes, None
        places, parts, notes = [*(row.answers if with_earlier else ()), len(row.prompt)], [], set()
        try:
            for answer in row.responses:
                messages = [*row.prompt, answer]
                text = self.chats.render(messages, row.tools)
                self.chats.check_written(messages, row.tools, text, notes)
                parts.append((text, [self.chats.find_answer(messages, i, text, row.tools, notes)
                                     for i in places]))
            start = min(spans[-1][0] for _, spans in parts)  # what both have of the prompt
            if len({text[:start] for text, _ in parts}) > 1:
                raise Dropped("the chat template renders the prompt otherwise when an answer follows")
        except Dropped as reason:
            return [], notes, reason
        parts = [(text, [*itertools.chain(*spans[:-1]), start, spans[-1][1]]) for text, spans in parts]
        return parts, notes, None

    def example(self, row, texts, cut, train_on, to_the_end, report) -> Example:
        """An Example of the whole texts and (ids, tokens at which the row's answers begin and end) with each
        response."""
        config, responses = self.config, []
        for ids, (*_, start, stop) in cut:
            if start == stop:
                raise Dropped("a response has no tokens")
            end = [] if ids[stop - 1] in self.end_ids else self.end_ids[:1]
            responses.append(ids[start:stop] + end + (ids[stop:] if to_the_end else []))
        ids, (*earlier, start, stop) = cut[0]
        prompt, after = ids[:start], ids[stop:]
        if any(ids[:places[-2]] != prompt for ids, places in cut):
            raise Dropped("the prompt's tokens depend on what follows them")
        begin = [self.begin_id] if config.add_bos and prompt[:1] != [self.begin_id] else []

        # Cut to max_length: first the prompt, then the responses.
        kept = range(len(prompt))
        is_too_long = len(begin) + len(prompt) + max(map(len, responses)) > config.max_length
        if is_too_long and config.truncation == "drop":
            raise Dropped(f"longer than max_length={config.max_length} tokens")
        if is_too_long:
            kept = self.kept(row, prompt, config.max_prompt_length - len(begin))
        room = config.max_length - len(begin) - len(kept)
        is_whole = max(map(len, responses)) + len(after) <= room
        responses = [ids[:room] for ids in responses]
        if len(responses) > 1 and all(ids == responses[0] for ids in responses):
            raise Dropped("the two responses are equal in tokens" + " after truncation" * is_too_long)

        # What counts of the prompt: all, or the earlier answers that did not lose their beginning. From the
        # first token that counts on it is response, but something has to stand before it.
        counting = {i for first, last in zip(earlier[::2], earlier[1::2]) if first in kept
                    for i in range(first, last)}
        counting = range(len(prompt)) if train_on == "everything" else counting
        ids = begin + (prompt if len(kept) == len(prompt) else [prompt[i] for i in kept])
        weights = [0] * len(begin) + [int(i in counting) for i in kept] if counting else []
        first = next((i for i in range(1, len(weights)) if weights[i]), len(ids))
        if first == 0:
            raise Dropped("the prompt is empty, so nothing predicts the first token (add_bos=true does)")
        report.used += 1
        report.cut += is_too_long
        arrays = [np.array(ids[first:] + response, np.int32) for response in responses]
        own = [[1] * len(response) for response in responses]
        for k, of_characters in enumerate(row.weights or ()):
            if of_characters:
                said = row.responses[k]["content"] if row.is_chat else row.responses[k]
                own[k] = self.cutter.token_weights(of_characters, said, texts[k], *cut[k], len(own[k]))
        weights = None if first == len(ids) and not row.weights else tuple(
            np.array(weights[first:] + counted, np.float32) for counted in own)
        if weights and not all(map(np.any, weights)):
            raise Dropped("no token of a response counts")
        return Example(row.where, np.array(ids[:first], np.int32), tuple(arrays), row.columns, weights,
                       np.array(after, np.int32), is_whole)

    def kept(self, row, prompt, number):
        """Which of the prompt's tokens stay, where so many may: a begin token and the answer's header do."""
        if number >= len(prompt):
            return range(len(prompt))
        if self.config.truncation == "keep_end":
            num_first = int(prompt[:1] == [self.begin_id])
        else:
            header = self.chats.header(row.prompt, row.tools) if row.is_chat else ""
            num_first = number - min(number, len(self.cutter.encode(header).ids))
        return [*range(num_first), *range(len(prompt) - number + num_first, len(prompt))]
