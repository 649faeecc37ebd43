"""How does a conversation become text? Messages in any dialect, templates, and where answers stand."""

import contextlib
import datetime
import itertools
import json
import os
import re

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

from engine import Dropped, InputError, first_line
from engine.config import FIELD

ROLES = {"human": "user", "model": "assistant", "gpt": "assistant", "bot": "assistant"}  # and what they mean
CONTENT_TOKENS = ("think", "thinking", "tool_call", "tool_calls", "tool_response", "tools", "answer")
# Stand within a control token that is mentioned, for a turn, for an answer, before a control token that the
# template wrote. They are no characters, so no text holds them.
GUARD, BEFORE, ANSWER, WRITTEN = "\ufdd0\ufdd1\ufdd2\ufdd3"


# ---------------------------------------------------------------- messages


def is_text(value):
    return isinstance(value, str)


def is_answer(turn):
    return turn["role"] == "assistant" and turn.get("weight", 1) > 0


def read_messages(value, place) -> list[dict]:
    """Messages with text for role and content, in the words of OpenAI's chats; `place` names their column.

    ShareGPT's are `from` and `value`; content may come in parts. Raises InputError, or Dropped for pictures
    and the like.
    """
    messages = []
    for given in value:
        message = without_none(given) if isinstance(given, dict) else {}
        if "function_call" in message:  # as OpenAI's first models had it
            message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
        role = message.pop("from", None) if "role" not in message else message["role"]
        content = message.pop("value", None) if "content" not in message else message["content"]
        if isinstance(content, list):
            parts = [part.get("text", part) if isinstance(part, dict) else part for part in content]
            if other := [part for part in parts if isinstance(part, dict)]:
                raise Dropped(f"a message has a part that is no text: {other[0].get('type')}")
            content = "".join(parts) if all(map(is_text, parts)) else None
        if content is None and message.get("tool_calls"):
            content = ""
        if not (is_text(role) and is_text(content) and message.get("weight", 1) in (0, 1)):
            given = json.dumps(given, default=str)[:200]
            raise InputError(f"{place} has {given}; a message has text for role and content, and if any a "
                             "weight of 0 or 1")
        messages.append(message | {"role": ROLES.get(role, role), "content": content})
    return messages


def without_none(value):
    """Tables give each object the keys of all others, with nothing in them."""
    if isinstance(value, list):
        return [without_none(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: without_none(item) for key, item in value.items() if item is not None}


def split_conversations(prompt, answers, name, system, report):
    """Chats: (the messages before the answer, [the answer of each], indices of earlier answers that count).

    prompt: text, messages or None. answers: of chosen and rejected, or of one column, text or messages: of
    several the last is the answer. name: the first's column. system: a system message's text, if any.
    Raises Dropped.
    """
    start = [{"role": "user", "content": prompt}] if prompt and is_text(prompt) else prompt or []
    answers = [[{"role": "assistant", "content": x}] if is_text(x) else x for x in answers]
    if is_text(system) and system and (start or answers[0])[0]["role"] != "system":
        start = [{"role": "system", "content": system}, *start]
    is_whole, conversations = name in ("messages", "conversations"), []
    for answer in answers:
        turns = join(start, answer, name, report)
        last = max((i for i, turn in enumerate(turns) if is_answer(turn)), default=0)
        if is_whole and 0 < last < len(turns) - 1:
            report.note("have turns after the last answer, which are not read")
            turns = turns[:last + 1]
        if turns[-1]["role"] != "assistant":
            raise Dropped(f"the last message of {name} is by {turns[-1]['role']}, not by the assistant")
        if len(turns) == 1 or not is_answer(turns[-1]):
            what = "has nothing before its answer" if len(turns) == 1 else "ends in an answer of weight 0"
            raise Dropped(f"the conversation {what}")
        conversations.append(turns)
    prompt = conversations[0][:-1]
    if prompt != conversations[-1][:-1]:
        raise Dropped("rejected does not start with the prompt of chosen")
    first = len(prompt) if name.startswith("chosen") else 1 if is_whole else len(start)
    counted = [i for i in range(first, len(prompt)) if is_answer(prompt[i])]
    return prompt, [turns[-1] for turns in conversations], counted


def join(start, turns, name, report):
    """The conversation that messages of a column make with those of its prompt, `start`."""
    def is_system(turn):
        return turn["role"] == "system"
    system = list(itertools.takewhile(is_system, start))
    said, own = (list(itertools.dropwhile(is_system, part)) for part in (start, turns))
    begun, wanted = ([(x["role"], x["content"].strip()) for x in part] for part in (own[:len(said)], said))
    if not (len(turns) == 1 or not said or turns[0]["role"] == "assistant" or begun == wanted):
        raise Dropped(f"{name} neither continues its prompt nor begins with it")
    if system and len(own) < len(turns) and turns[:len(system)] != system:
        report.note(f"have another system message in {name} than before it, which is not read")
    turns = own if system else turns
    return (system if said and begun == wanted else start) + turns


def read_tools(row, where):
    """The column `tools` of a chat, a list of JSON schemas or the JSON of one; None where it has none."""
    try:
        tools = row.get("tools") or None
        return json.loads(tools) if is_text(tools) else without_none(tools)
    except ValueError as error:
        raise InputError(f"{where}: column tools is no list, and no JSON of one: {error}") from error


def prepared(value, change, kind=None):
    """Messages with each text but roles changed; arguments of tool calls as objects (kind dict), as JSON text
    (str) or as they are."""
    if is_text(value):
        return change(value)
    if isinstance(value, list):
        return [prepared(item, change, kind) for item in value]
    if not isinstance(value, dict):
        return value
    return {change(key): item if key == "role" else prepared(
        as_kind(item, kind) if kind and key == "arguments" else item, change, kind)
        for key, item in value.items()}


def as_kind(arguments, kind):
    with contextlib.suppress(TypeError, ValueError):  # text that is no JSON stays
        if not isinstance(arguments, kind):
            return json.loads(arguments) if kind is dict else json.dumps(arguments, ensure_ascii=False)
    return arguments


def is_written(messages, text):
    """Whether all tool calls are in a rendering, objects not as Python's, JSON not as a text in JSON."""
    for call in itertools.chain.from_iterable(message.get("tool_calls", ()) for message in messages):
        function = call.get("function", call)
        arguments, wrong = function.get("arguments"), None
        if isinstance(as_kind(arguments, dict), dict) and arguments != {}:
            wrong = json.dumps(arguments, ensure_ascii=False) if is_text(arguments) else str(arguments)
        if function["name"] not in text or wrong and wrong in text:
            return False
    return True


# ---------------------------------------------------------------- templates


def fill_template(prompt, template, row, more, where):
    """The prompt with prompt_template around it, in a chat around its last user message.

    "{prompt}" stands for that text, "{attributes}" for all in the row's column attributes, as
    name:value,name:value (SteerLM, arXiv:2310.05344), any other name for an attribute or else a column. more:
    attributes that go before the row's own.
    """
    attributes, fields = row.get("attributes") or {}, {*FIELD.findall(template)}
    if not isinstance(attributes, dict):
        value = json.dumps(attributes, default=str)[:60]
        raise InputError(f"{where}: column attributes is {value}; it must map names to values")
    if unknown := sorted(more.keys() - attributes.keys()) if attributes else []:
        raise InputError(f"sample_attributes.{unknown[0]} is no attribute of {where}, which has "
                         f"{', '.join(attributes)}")
    attributes = {name: value for name, value in (attributes | more).items() if value is not None}
    values = {name: row.get(name) for name in sorted(fields - {"prompt", "attributes"})} | attributes
    if "attributes" in fields and not attributes:
        values["attributes"] = None
    for name, value in values.items():
        if value is None:
            raise InputError(f"{where} has no {name} among its columns or in its column attributes, which "
                             "prompt_template needs: add it, or change the template")
        if name in ("prompt", "attributes") or not isinstance(value, str | int | float):
            value = json.dumps(value, default=str)[:60]
            raise InputError(f"{where}: {name} is {value}; for prompt_template it must be text or a number, "
                             "under another name than prompt and attributes")
    values["attributes"] = ",".join(f"{name}:{value}" for name, value in attributes.items())
    if is_text(prompt):
        values["prompt"] = prompt
        return FIELD.sub(lambda field: str(values[field[1]]), template)
    last = max((i for i, turn in enumerate(prompt) if turn["role"] == "user"), default=len(prompt) - 1)
    text = fill_template(prompt[last]["content"], template, row, more, where)
    return [*prompt[:last], prompt[last] | {"content": text}, *prompt[last + 1:]]


class ChatTemplate:
    """A tokenizer's chat template, and where in its rendering the answers stand.

    Control tokens end, begin or separate turns: the special ones, and what else the template writes around
    plain turns. A message that mentions one means text: in every rendering GUARD stands inside the mention.
    end_ids: tokens that end an answer. today: the template's date. options: what else it is given.
    content_tokens: tokens that are content, beside the common ones.
    """

    def __init__(self, tokenizer, end_ids, today: datetime.date, options=None, content_tokens=()):
        self.tokenizer, self.options = tokenizer, options or {}
        template = tokenizer.chat_template or ""
        for text in template.values() if isinstance(template, dict) else [template]:
            with contextlib.suppress(jinja2.TemplateError):  # each rendering will say so
                _compile_jinja_template(text).globals["strftime_now"] = today.strftime
        self.control = re.compile("(?!)")
        plain = self.render_plain_turns()
        ends = [tokenizer.decode([i]) for i in end_ids]
        content = {*content_tokens, *(f"<{slash}{name}>" for name in CONTENT_TOKENS for slash in ("", "/"))}
        control = {token.content for token in tokenizer.added_tokens_decoder.values()
                   if token.special or token.content in plain and not token.content.isspace()}
        control = {token for token in control - content | {*ends} if len(token) > 1}  # no newline
        self.control_tokens = sorted(control, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, self.control_tokens)))
        self.end = re.compile("|".join(map(re.escape, ends)))
        self.written = set()  # sequences of roles of which the template writes all turns

    def render_plain_turns(self):
        """Turns without a word; what the template refuses of them is left out."""
        turns = {role: {"role": role, "content": BEFORE} for role in ("system", "user", "assistant")}
        texts = []
        for roles in (("user", "assistant", "user"), ("user", "assistant"), ("system", "user")):
            with contextlib.suppress(Dropped, InputError):
                texts.append(self.render([turns[role] for role in roles], generate=roles[-1] == "user"))
        return "".join(texts)

    def render(self, messages, tools=None, generate=False) -> str:
        """The text of messages, and with `generate` of what opens an answer. Raises Dropped if it fails."""
        if self.tokenizer.chat_template is None:
            raise InputError("data have lists of messages, but the tokenizer has no chat template: choose "
                             "one that has (tokenizer=...), or give prompt and response as text")
        failure = "it does not write tool calls, or their arguments neither as objects nor as text"
        for kind in (None, dict, str):
            try:
                given = prepared(messages, self.guarded, kind)
                text = self.tokenizer.apply_chat_template(
                    given, prepared(tools, self.guarded), tokenize=False, add_generation_prompt=generate,
                    **self.options)
                if is_written(given, text):
                    return text
            except Exception as error:  # of any kind: a template is a program
                failure = first_line(error)
        raise Dropped(f"the chat template refuses it: {failure}")

    def check_written(self, messages, tools, text, notes):
        """Raises Dropped for a turn that the template leaves out, as some do where they do not know the role;
        notes a thought or tools that it leaves out."""
        marks = [f"{BEFORE}{i}{BEFORE}" for i in range(len(messages))]
        marked = [x if "tool_calls" in x else x | {"content": mark} for x, mark in zip(messages, marks)]
        roles = tuple(x["role"] for x in marked if x["content"] in marks)
        if roles not in self.written:
            marked_text = self.render(marked, tools)
            absent = [x["role"] for x, mark in zip(marked, marks) if x["content"] == mark not in marked_text]
            if absent:
                raise Dropped(f"the chat template leaves out a turn, by {absent[0]}")
            self.written.add(roles)
        thought = messages[-1].get("reasoning_content") or messages[-1]["content"].rpartition("</think>")[0]
        if self.guarded(thought.split("<think>")[-1].strip()) not in text:
            notes.add("have a thought in their answer that the chat template leaves out")
        if tools and self.render(messages) == text:
            notes.add("have tools that the chat template leaves out")

    def guarded(self, text):
        return self.control.sub(lambda mention: mention[0][0] + GUARD + mention[0][1:], text)

    def find_answer(self, messages, i, text, tools, notes) -> tuple[int, int]:
        """The span of message i in the rendering `text` of all: from where the prompt before it ends, to its
        first end token. Adds to the notes on the row. Raises Dropped."""
        start, is_last = self.find_start(messages, i, text, tools, notes), i == len(messages) - 1
        limit = len(text)
        if not is_last:  # where the words of the next turn begin
            other = [*messages[:i + 1], messages[i + 1] | {"content": BEFORE}, *messages[i + 2:]]
            limit = len(os.path.commonprefix([text, self.render(other, tools)]))
        said = self.guarded(messages[i]["content"])
        said = (said.rpartition("</think>")[2] or said).strip()  # a thought may stand elsewhere
        at = text.find(said, start, limit)
        if at < text.rfind(said, start, limit):  # past what the template writes before it
            marked = self.render([*messages[:i], messages[i] | {"content": ANSWER}, *messages[i + 1:]], tools)
            at = text.find(said, max(start, marked.find(ANSWER)), limit)
        if at < 0:
            raise Dropped("the chat template does not write the answer as it stands")
        end = self.end.search(text, at + len(said), limit)
        if not text[start:end.start() if end else limit].strip():
            raise Dropped("the chat template writes nothing of the answer")
        if end or is_last:
            if not end:
                notes.add("have answers without an end token of the template's; one is put after the last")
            return start, end.end() if end else limit
        own = os.path.commonprefix([text, self.render(messages[:i + 1], tools)]).rstrip()
        return start, max(len(own), at + len(said))

    def find_start(self, messages, i, text, tools, notes):
        """Where answer i begins: after the rendering of what stands before it, opened for an answer.

        Templates that write earlier turns otherwise, or open what answers lack: after the header that both
        have between the turn before (put BEFORE in its place) and the answer (ANSWER).
        """
        opened = self.render(messages[:i], tools, generate=True)
        if text.startswith(opened):
            return len(opened)
        before = [*messages[:i - 1], messages[i - 1] | {"content": BEFORE}]
        whole = self.render([*before, {"role": "assistant", "content": ANSWER}, *messages[i + 1:]], tools)
        header = os.path.commonprefix([self.header(messages[:i], tools), whole.partition(BEFORE)[2]])
        words = self.guarded(messages[i - 1]["content"]).strip()
        at = text.find(header, whole.find(BEFORE) + len(words)) if header else -1
        if at < 0:
            raise Dropped("the chat template renders the prompt otherwise when an answer follows")
        notes.add("have prompts that end before what would open an answer, for answers lack it"
                  if self.header(messages[:i], tools) != header else
                  "have turns that the chat template writes otherwise in the whole conversation")
        return at + len(header)

    def header(self, messages, tools):
        """What stands between the last of these and an answer: it ends the one and opens the other."""
        messages = [*messages[:-1], messages[-1] | {"content": BEFORE}]
        return self.render(messages, tools, generate=True).partition(BEFORE)[2]
