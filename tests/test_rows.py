"""Rows as people have them, to the token ids that they mean: cases with right values worked out by hand.

cases.jsonl was given to the project (data/README.md says what its fields are), more_cases.jsonl is its own.
There a rendering is written out with its control tokens between ⟦ and ⟧; the text between them is tokenized
here by the bare BPE model, which knows no added token, so no code of the project has a part in it.
"""

import contextlib
import datetime
import functools
import importlib.util
import io
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, config_of, made_once, read_lines, shared, write_lines
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
from engine import Dropped, InputError
from engine.report import print_summary
from losses import OBJECTIVES

GIVEN = read_lines(os.path.join(DATA, "cases.jsonl"))
OWN = read_lines(os.path.join(DATA, "more_cases.jsonl"))
TODAY = re.compile(r"\{today(?::(.*?))?\}")
MARKED = re.compile("⟦(.*?)⟧")
NO_MODEL = SimpleNamespace(parameters=list, config=SimpleNamespace(model_type="llama"), device="cpu")

# ---------------------------------------------------------------- tokenizers and models, made once

SPEC = importlib.util.spec_from_file_location("make_tokenizers", os.path.join(DATA, "make_tokenizers.py"))
maker = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(maker)
IM, END = maker.IM, maker.END
CHATML = maker.CHATML + END
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}"
EACH = "{% for m in messages %}"


def im(template, **more):
    """A variant with the tokens of ChatML."""
    return {"base": "hh_bpe8k", "special": IM, "end": "<|im_end|>", "template": template} | more


MORE = {  # as in make_tokenizers.py
    "header": {  # Llama 3: trims
        "base": "hh_bpe8k", "begin": "<|begin_of_text|>", "end": "<|eot_id|>",
        "special": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "template": "{{ bos_token }}" + EACH + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"},
    "gemma": {  # another name for the assistant, no system
        "base": "hh_bpe8k", "begin": "<bos>", "end": "<eos>", "ends": ["<end_of_turn>"],
        "special": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "template": "{{ bos_token }}" + EACH + "{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"},
    "spaced": im(EACH + TURN + " {{ eos_token }}\n{% endfor %}" + END),
    "left": im(CHATML, flags={"lstrip": True}),
    "boxed": im(CHATML, special=[*IM, "<|box|>"]),
    "tooled": im("{% if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }}{% endfor %}"
                 "<|im_end|>\n{% endif %}" + CHATML),
    "two": im({"default": CHATML, "tool_use": "With {{ tools[0].name }}." + CHATML}),
    "zero": im("{% set share = 12 // (3 - messages | length) %}" + CHATML),
    "typed": im(EACH + TURN + "{{ '' + m.suffix if m.suffix else '' }}<|im_end|>\n{% endfor %}" + END),
    "pythonic": im(EACH + TURN + "{% for call in m.tool_calls or [] %}[{{ call.function.name }} "
                   "{{ call.function.arguments }}]{% endfor %}<|im_end|>\n{% endfor %}" + END),
    "says": im("<|im_start|>system\nAnswer as {'name': ...}.<|im_end|>\n" + CHATML),
    "shows": im("{% if tools %}<|im_start|>system\nTools: {{ tools }}<|im_end|>\n{% endif %}" + CHATML),
    "needs": im("{% if messages[0].role != 'system' %}{{ raise_exception('system?') }}{% endif %}" + CHATML),
    "calls": im(EACH + "<|im_start|>{{ m.role }}\n{{ m.tool_calls[0].function.arguments | tojson "
                "if m.tool_calls else m.content }}<|im_end|>\n{% endfor %}" + END),  # as Llama 3.1
    "known": im("{% for m in messages if m.role in ('user', 'assistant') %}" + TURN
                + "<|im_end|>\n{% endfor %}" + END),
    "syntax": im("{% for m in messages %}{{ m.content }"),
    "r1": im(maker.CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
             special=[*IM, "<think>", "</think>"]),
    "switch": im(maker.CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n"
                 "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
                 special=[*IM, "<think>", "</think>"]),
    "day": im("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
              "<|im_start|>system\nToday Date: {{ date_string }}<|im_end|>\n" + CHATML),
    "diary": im("{% set day = strftime_now(' %A, %d.%m.%Y') %}" + EACH +
                "<|im_start|>{{ m.role + day }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>{{ 'assistant' + day }}\n{% endif %}"),
}

for name in ("chatml", "tail", "strip", "unended"):  # the same, with calls of tools
    words = "(m.content + '(' + m.tool_calls[0].function.name + ')' if m.tool_calls else m.content)"
    template = maker.VARIANTS[name]["template"]
    MORE[name + "_calls"] = maker.VARIANTS[name] | {"template": template.replace("m.content", words)}


def write_hh_bpe8k(folder):
    """The tokenizer hh_bpe8k from its merges: two special tokens, the bytes, and a token for each merge."""
    with open(os.path.join(DATA, "hh_bpe8k", "merges.txt"), encoding="utf-8") as file:
        merges = [tuple(line.rstrip("\n").split(" ")) for line in file]
    tokens = ["<|endoftext|>", "<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    model = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    parts = json.loads(model.to_str()) | {
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in (0, 1)],
        "pre_tokenizer": byte_level | {"add_prefix_space": False},
        "post_processor": byte_level | {"trim_offsets": False}, "decoder": byte_level}
    os.makedirs(folder)
    shutil.copy(os.path.join(DATA, "hh_bpe8k", "tokenizer_config.json"), folder)
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as file:
        json.dump(parts, file, ensure_ascii=False)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder that holds a small whole model for each name of VARIANTS and MORE."""
    def make(folder):
        maker.MODELS = maker.pathlib.Path(folder) / "bases"
        write_hh_bpe8k(maker.MODELS / "hh_bpe8k")
        shutil.copytree(os.path.join(DATA, "stories260K"), maker.MODELS / "stories260K")
        maker.make(folder, maker.VARIANTS | MORE)
    return made_once(tmp_path_factory, "tokenizers", make)


@functools.cache
def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def bare_of(folder, continues=False):
    """The folder's tokenizer without added tokens, and without the space before texts if one continues."""
    parts = json.loads(tokenizer_of(folder).backend_tokenizer.to_str())
    steps = (parts["normalizer"] or {}).get("normalizers", [])
    steps[:] = [step for step in steps if not (continues and step["type"] == "Prepend")]
    return Tokenizer.from_str(json.dumps(parts | {"added_tokens": [], "post_processor": None}))


def marked_ids(folder, text, continues=False):
    """Ids of a rendering that is written out with ⟦control tokens⟧, which may strip the text beside them."""
    tokenizer, ids, pieces = tokenizer_of(folder), [], MARKED.split(text)
    known = {token.content: (i, token) for i, token in tokenizer.added_tokens_decoder.items()}
    for i, piece in enumerate(pieces):
        if i % 2:
            ids.append(known[piece][0])
            continue
        piece = piece.lstrip() if i > 0 and known[pieces[i - 1]][1].rstrip else piece
        piece = piece.rstrip() if i + 1 < len(pieces) and known[pieces[i + 1]][1].lstrip else piece
        bare = bare_of(folder, continues and i == 0)
        ids += bare.encode(piece, add_special_tokens=False).ids if piece else []
    return ids


def split_ids(folder, prompt, response):
    """Ids of a prompt, and of the whole what follows them."""
    ids, whole = marked_ids(folder, prompt), marked_ids(folder, prompt + response)
    if whole[:len(ids)] == ids:
        return ids, whole[len(ids):]
    return ids, marked_ids(folder, response, continues=True)  # a token crosses the boundary


def test_the_tokenizer_made_of_merges_is_the_shared_one(tmp_path):
    write_hh_bpe8k(tmp_path / "made")
    with open(tmp_path / "made" / "tokenizer.json", encoding="utf-8") as made:
        with open(shared("models", "hh_bpe8k", "tokenizer.json"), encoding="utf-8") as given:
            assert json.load(made) == json.load(given)


# ---------------------------------------------------------------- cases


def words_of(case, key):
    """The words that must all stand in one line."""
    words = case[key] if isinstance(case[key], list) else case[key].split()
    return [*words, "dropped"] if key == "dropped" else words


def stands(words, text):
    """Whether one line of the text holds all these words, a number as a whole one."""
    patterns = [rf"\b{word}\b" if word.isdigit() else re.escape(word) for word in words]
    return any(all(re.search(pattern, line, re.I) for pattern in patterns) for line in text.splitlines())


def arguments_of(case, folders):
    """What train.py is given for a case, whose rows are written to a file."""
    rows = write_lines("rows.jsonl", case["rows"])
    given = {"max_steps": 0, "num_samples": 0, "num_eval_examples": None} | case["config"]
    return [f"loss={case['loss']}", f"model={os.path.join(folders, case['tokenizer'])}", f"data={rows}",
            f"eval_data={rows}", *(f"{key}={json.dumps(value)}" for key, value in given.items())]


def read_case(case, folders):
    """(what load_data makes of a case's rows, or None where it refuses them; what is said)"""
    config, objective = config_of(*arguments_of(case, folders)), OBJECTIVES[case["loss"]]
    try:
        read = data.load_data(config, objective)
    except InputError as refusal:
        assert "\n" not in str(refusal)
        return None, f"refused: {refusal}"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        print_summary(config, objective, read, NO_MODEL, num_steps=0)
    return read, said.getvalue()


def ids_that_must_come(case, folder):
    """{"prompt": ids, "responses": [ids, ...]} of a case, from its ids or else from its rendering."""
    expected = case["expect"]
    if expected.get("ids"):
        return expected["ids"]
    if "own" not in case["id"]:  # not marked: all that look so are tokens
        tokens = map(str, tokenizer_of(folder).added_tokens_decoder.values())
        tokens = "|".join(map(re.escape, tokens))
        expected = json.loads(re.sub(tokens, lambda token: f"⟦{token[0]}⟧", json.dumps(expected)))
    prompt, *responses = (TODAY.sub(lambda day: datetime.date.today().strftime(day[1] or "%Y-%m-%d"), text)
                          for text in (expected["prompt"], *expected["responses"]))
    pairs = [split_ids(folder, prompt, response) for response in responses]
    return {"prompt": pairs[0][0], "responses": [ids for _, ids in pairs]}


@pytest.mark.parametrize("case", [*GIVEN, *OWN], ids=lambda case: case["id"])
def test_a_row_means_what_it_says(case, folders):
    """Its token ids, or the words with which it is dropped, refused or noted."""
    read, said = read_case(case, folders)
    assert (read is None) == ("refused" in case), said
    for key in {"refused", "dropped", "noted"} & case.keys():
        assert stands(words_of(case, key), said), said
    assert "never" not in case or not stands(words_of(case, "never"), said), said
    if "expect" in case:
        example, = read.train_examples
        got = {"prompt": example.prompt.tolist(), "responses": [ids.tolist() for ids in example.responses]}
        folder = os.path.join(folders, case["tokenizer"])
        wanted, decode = ids_that_must_come(case, folder), tokenizer_of(folder).decode
        assert [decode(ids) for ids in (got["prompt"], *got["responses"])] == [
            decode(ids) for ids in (wanted["prompt"], *wanted["responses"])]
        assert got == wanted


def test_of_each_kind_are_five_cases_more():
    kinds = [case["kind"] for case in OWN]
    assert {case["kind"] for case in GIVEN} == set(kinds) and min(map(kinds.count, kinds)) >= 5
    assert len({case["id"] for case in [*GIVEN, *OWN]}) == len(GIVEN) + len(OWN)


def test_the_rule_by_which_own_cases_are_worked_out_gives_the_given_ids(folders):
    """Where no message mentions a control token and nothing is cut: all that look so are tokens."""
    cases = [case for case in GIVEN if "expect" in case and case["expect"]["ids"]
             and not case["kind"].startswith("control") and "max_length" not in case["config"]]
    assert len(cases) > 25
    for case in cases:
        unknown = case | {"expect": case["expect"] | {"ids": None}}
        assert ids_that_must_come(unknown, os.path.join(folders, case["tokenizer"])) == case["expect"]["ids"]


# ---------------------------------------------------------------- the same through train.py's main


def logp(model, prompt, response):
    """The sum of the response's log-probabilities, in float64."""
    ids = torch.tensor([[*prompt, *response]])
    logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(logps[i - 1, ids[0, i]].item() for i in range(len(prompt), ids.shape[1]))


RUN = ["beside-1", "end-1", "end-4", "content-4", "mention-2", "mention-5", "begin-1", "begin-3", "date-1",
       "fails-3", "column-8", "text-2", "fails-1", "column-9", "mention-own-3", "begin-own-2", "opens-own-4"]
RUN = [case for case in [*GIVEN, *OWN] if case["id"] in RUN]


@pytest.mark.parametrize("case", RUN, ids=lambda case: case["id"])
def test_a_run_says_so_and_measures_the_same_tokens(case, folders, run, refused, capsys):
    """logps of the evaluation are the sums of the log-probabilities of the case's ids, to 1e-3."""
    folder, arguments = os.path.join(folders, case["tokenizer"]), arguments_of(case, folders)
    if "refused" in case:
        assert stands(case["refused"], refused(*arguments))
        return
    line, = read_lines(os.path.join(run(*arguments), "metrics.jsonl"))
    said = capsys.readouterr().out
    for key in {"dropped", "noted"} & case.keys():
        assert stands(words_of(case, key), said), said
    if "expect" in case:
        expected = ids_that_must_come(case, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        with torch.no_grad():
            for name, response in zip(("logps/chosen", "logps/rejected"), expected["responses"]):
                assert math.isclose(line[name], logp(model, expected["prompt"], response), abs_tol=1e-3)


# ---------------------------------------------------------------- sft.train_on

S, E = "⟦<|im_start|>⟧", "⟦<|im_end|>⟧"
U, A = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})
THREE = [U("What floats?"), A("Wood."), U("What else?"), A("Cork floats."), U("And sinks?"), A("Iron does.")]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"q": "boats"}}}
TOOL = [U("Find boats."), A("I look.") | {"tool_calls": [CALL]}, {"role": "tool", "content": "Two."},
        A("Two boats.")]

# Renderings written out: [[what `answers` counts]]. The end token of `unended` is put there by the project.
CHATML_THREE = f"""{S}user
What floats?{E}
{S}assistant
[[Wood.{E}]]
{S}user
What else?{E}
{S}assistant
[[Cork floats.{E}]]
{S}user
And sinks?{E}
{S}assistant
[[Iron does.{E}]]
"""
CHATML_TOOL = f"""{S}user
Find boats.{E}
{S}assistant
[[I look.(find){E}]]
{S}tool
Two.{E}
{S}assistant
[[Two boats.{E}]]
"""
THOUGHT = "⟦<think>⟧\n\n⟦</think>⟧\n\n"
RENDERINGS = {
    "chatml": (CHATML_THREE, CHATML_TOOL),
    "tail": (CHATML_THREE + "⟦<|endoftext|>⟧", CHATML_TOOL + "⟦<|endoftext|>⟧"),
    "inst": ("⟦<s>⟧[INST] What floats? [/INST][[ Wood.⟦</s>⟧]][INST] What else? [/INST]"
             "[[ Cork floats.⟦</s>⟧]][INST] And sinks? [/INST][[ Iron does.⟦</s>⟧]]", None),  # has no tools
    "thinking": (CHATML_THREE.replace("Iron", THOUGHT + "Iron"),
                 CHATML_TOOL.replace("Two boats", THOUGHT + "Two boats").replace(
                     "I look.(find)", 'I look.\n⟦<tool_call>⟧\nfind {"q": "boats"}\n⟦</tool_call>⟧')),
    "strip": ("⟦<|user|>⟧\nWhat floats?⟦<|end|>⟧\n⟦<|assistant|>⟧\n[[Wood.⟦<|end|>⟧]]\n"
              "⟦<|user|>⟧\nWhat else?⟦<|end|>⟧\n⟦<|assistant|>⟧\n[[Cork floats.⟦<|end|>⟧]]\n"
              "⟦<|user|>⟧\nAnd sinks?⟦<|end|>⟧\n⟦<|assistant|>⟧\n[[Iron does.⟦<|end|>⟧]]\n",
              "⟦<|user|>⟧\nFind boats.⟦<|end|>⟧\n⟦<|assistant|>⟧\n[[I look.(find)⟦<|end|>⟧]]\n"
              "<|tool|>\nTwo.⟦<|end|>⟧\n⟦<|assistant|>⟧\n[[Two boats.⟦<|end|>⟧]]\n"),  # <|tool|> is text
    "unended": ("\nuser: What floats?\nassistant:[[ Wood.]]\nuser: What else?\nassistant:[[ Cork floats.]]\n"
                "user: And sinks?\nassistant:[[ Iron does.⟦<|endoftext|>⟧]]",
                "\nuser: Find boats.\nassistant:[[ I look.(find)]]\ntool: Two.\n"
                "assistant:[[ Two boats.⟦<|endoftext|>⟧]]"),
}


def ids_and_counts(folder, rendering):
    """Ids of a rendering, and whether each stands in [[brackets]]; no token crosses one."""
    parts = re.split(r"\[\[(?!INST|/INST)|(?<!INST)\]\]", rendering)
    ends = [len(marked_ids(folder, "".join(parts[:i + 1]))) for i in range(len(parts))]
    ids = marked_ids(folder, "".join(parts))
    for i, end in enumerate(ends):
        assert ids[:end] == marked_ids(folder, "".join(parts[:i + 1]))
    return ids, [sum(end <= place for end in ends) % 2 == 1 for place in range(len(ids))]


def example_of(folder, row, *settings):
    """The one example that SFT reads in a row."""
    rows = write_lines("rows.jsonl", [row])
    read = data.load_data(config_of(f"model={folder}", f"data={rows}", *settings), OBJECTIVES["sft"])
    example, = read.train_examples
    return example, "\n".join(read.reports["data"].lines())


def counted(example):
    """Ids of an example, and whether each counts: none of the prompt, of the response by its weights."""
    weights = (torch.ones(len(example.responses[0])).numpy() if example.token_weights is None
               else example.token_weights[0])
    assert len(weights) == len(example.responses[0]) and set(weights) <= {0, 1}
    return [*example.prompt, *example.responses[0]], [False] * len(example.prompt) + [w == 1 for w in weights]


def runs(ids, counts, decode):
    """The texts of what counts, a text for each run of neighbours."""
    texts = []
    for i, (token, counts_here) in enumerate(zip(ids, counts)):
        if counts_here:
            texts = texts if i and counts[i - 1] else [*texts, []]
            texts[-1].append(token)
    return [decode(text) for text in texts]


def without_tail(ids, counts):
    """Both up to the last token that counts: what follows is in no example but those of `everything`."""
    length = max(i for i, counts_here in enumerate(counts) if counts_here) + 1
    return ids[:length], counts[:length]


CONVERSATIONS = [(name, kind) for name, pair in RENDERINGS.items() for kind, text in enumerate(pair) if text]
NAMES = [f"{name}-{('three', 'tool')[kind]}" for name, kind in CONVERSATIONS]


@pytest.mark.parametrize("train_on", ["answers", "last_answer", "everything"])
@pytest.mark.parametrize("name, kind", CONVERSATIONS, ids=NAMES)
def test_the_tokens_that_count_are_those_of_the_answers(name, kind, train_on, folders):
    folder = os.path.join(folders, name + ("_calls" if kind and name != "thinking" else ""))
    ids, counts = ids_and_counts(folder, RENDERINGS[name][kind])
    if train_on == "everything":
        counts = [False] + [True] * (len(ids) - 1)
    else:
        ids, counts = without_tail(ids, counts)
    if train_on == "last_answer":
        last = max(i for i, counts_here in enumerate(counts) if not counts_here)
        counts = [i > last for i in range(len(ids))]
    example, said = example_of(folder, {"messages": (THREE, TOOL)[kind]}, f"sft.train_on={train_on}")
    decode = tokenizer_of(folder).decode
    assert runs(*counted(example), decode) == runs(ids, counts, decode)
    assert counted(example) == (ids, counts)
    assert ("end token" in said) == (name == "unended")
    assert example.lengths == (sum(counts),)


def test_the_answers_decoded_are_the_answers(folders):
    """The brackets above hold what was meant."""
    ends = {"chatml": "<|im_end|>", "tail": "<|im_end|>", "inst": "</s>", "strip": "<|end|>"}
    for name, end in ends.items():
        folder = os.path.join(folders, name)
        example, _ = example_of(folder, {"messages": THREE}, "sft.train_on=answers")
        texts = runs(*counted(example), tokenizer_of(folder).decode)
        assert [text.strip() for text in texts] == [turn["content"] + end for turn in THREE[1::2]]
    folder = os.path.join(folders, "unended")
    example, _ = example_of(folder, {"messages": THREE})
    assert runs(*counted(example), tokenizer_of(folder).decode) == [
        " Wood.", " Cork floats.", " Iron does.<|endoftext|>"]


def test_a_template_without_a_tools_turn_drops_the_conversation(folders):
    row = {"messages": TOOL}, {"messages": THREE}
    read, said = read_case({"tokenizer": "inst", "loss": "sft", "config": {}, "rows": row}, folders)
    assert len(read.train_examples) == 1 and stands(["dropped 1", "the turns must alternate"], said)


@pytest.mark.parametrize("row, texts", [
    ({"messages": THREE}, ["Wood.", "Cork floats.", "Iron does."]),
    ({"conversations": [{"from": "gpt" if i % 2 else "human", "value": turn["content"]}
                        for i, turn in enumerate(THREE)]}, ["Wood.", "Cork floats.", "Iron does."]),
    ({"messages": [*THREE, U("Thanks.")]}, ["Wood.", "Cork floats.", "Iron does."]),
    # turns in a prompt are context, each assistant turn of the rest counts
    ({"prompt": THREE[:3], "completion": THREE[3:]}, ["Cork floats.", "Iron does."]),
    ({"prompt": THREE[:5], "response": THREE[5:]}, ["Iron does."]),
    ({"prompt": THREE[:5], "response": "Iron does."}, ["Iron does."]),
    ({"prompt": THREE[:3], "completion": THREE}, ["Cork floats.", "Iron does."]),  # the whole conversation
    ({"prompt": [{"role": "system", "content": "Be brief."}], "completion": THREE},
     ["Wood.", "Cork floats.", "Iron does."]),
    ({"prompt": "What floats?", "completion": THREE[1:]}, ["Wood.", "Cork floats.", "Iron does."]),
    # of a pair only the answer counts
    ({"prompt": THREE[:1], "chosen": THREE[1:], "rejected": None}, ["Iron does."]),
    # weight 0 is context, wherever it stands
    ({"messages": [THREE[0], THREE[1] | {"weight": 0}, *THREE[2:]]}, ["Cork floats.", "Iron does."]),
    ({"messages": [*THREE[:3], THREE[3] | {"weight": 0}, *THREE[4:]]}, ["Wood.", "Iron does."]),
    ({"messages": [*THREE[:5], THREE[5] | {"weight": 0}]}, ["Wood.", "Cork floats."]),
    # two assistant turns in a row, and one that begins
    ({"messages": [U("Say."), A("Wood."), A("Cork floats.")]}, ["Wood.", "Cork floats."]),
    ({"messages": [A("Hello."), U("Say."), A("Wood.")]}, ["Wood."]),
])
def test_which_turns_count(row, texts, folders):
    folder = os.path.join(folders, "chatml")
    example, _ = example_of(folder, row)
    assert runs(*counted(example), tokenizer_of(folder).decode) == [text + "<|im_end|>" for text in texts]
    last, _ = example_of(folder, row, "sft.train_on=last_answer")
    assert runs(*counted(last), tokenizer_of(folder).decode) == [texts[-1] + "<|im_end|>"]


def test_earlier_reasoning_is_trained_on_as_the_whole_conversation_shows_it(folders):
    """The template drops the thoughts of all turns but the last; each answer is found where it stands."""
    folder = os.path.join(folders, "thinking")
    thought = "<think>\nIt is light.\n</think>\n\n"
    turns = [turn | ({"content": thought + turn["content"]} if i % 2 else {}) for i, turn in enumerate(THREE)]
    apart = [turn | ({"reasoning_content": "It is light."} if i % 2 else {}) for i, turn in enumerate(THREE)]
    for messages in (turns, apart):
        example, _ = example_of(folder, {"messages": messages})
        assert runs(*counted(example), tokenizer_of(folder).decode) == [
            "Wood.<|im_end|>", "Cork floats.<|im_end|>", thought + "Iron does.<|im_end|>"]


def test_answers_after_a_generation_prompt_that_opens_a_thought(folders):
    """`opens` writes answers without what opens them: each is found after the header."""
    folder = os.path.join(folders, "opens")
    echo = [U("Wood."), A("Wood.")]
    example, said = example_of(folder, {"messages": [*echo, *echo, *THREE[4:]]})
    ids, counts = ids_and_counts(folder, "".join(
        f"{S}user\n{u}{E}\n{S}assistant\n[[{a}{E}]]\n"
        for u, a in (("Wood.", "Wood."), ("Wood.", "Wood."), ("And sinks?", "Iron does."))))
    assert counted(example) == without_tail(ids, counts)
    assert stands(["1", "prompts", "open"], said)


def test_an_earlier_answer_that_the_template_does_not_write_is_not_found_in_another_turn(folders):
    """`calls` writes a tool call or the content: "OK." stands only in the last turn, after the tool's."""
    row = {"messages": [U("Find."), A("OK.") | {"tool_calls": [CALL]}, *TOOL[2:3], A("OK.")]}
    case = {"tokenizer": "calls", "loss": "sft", "config": {}, "rows": [row, {"messages": THREE}]}
    read, _ = read_case(case, folders)
    for example in read.train_examples:
        assert not any("Two." in text for text in runs(*counted(example), read.tokenizer.decode))


def test_earlier_answers_end_where_a_template_demands_a_system_turn(folders):
    """No plain conversation without one is there to learn from that the template ends each answer."""
    folder = os.path.join(folders, "needs")
    example, _ = example_of(folder, {"system": "Be brief.", "messages": THREE})
    assert runs(*counted(example), tokenizer_of(folder).decode) == [
        "Wood.<|im_end|>", "Cork floats.<|im_end|>", "Iron does.<|im_end|>"]


@pytest.mark.parametrize("part", [5, None, ["text"]])
def test_a_part_of_content_that_is_no_part_has_a_sentence(part):
    with pytest.raises((InputError, Dropped), match="."):
        data.read_row({"messages": [U([{"type": "text", "text": "Hi."}, part]), A("Ho.")]}, "f line 3", False)


# ---------------------------------------------------------------- a conversation that is cut


@pytest.mark.parametrize("lost", range(1, 14))
def test_of_a_cut_conversation_an_earlier_answer_that_lost_its_beginning_does_not_count(lost, folders):
    """The first answer counts as long as its first token is there; the last always does."""
    folder = os.path.join(folders, "chatml")
    ids, counts = without_tail(*ids_and_counts(folder, RENDERINGS["chatml"][0]))
    num_prompt = max(i for i, counts_here in enumerate(counts) if not counts_here) + 1
    first, after = counts.index(True), counts.index(False, counts.index(True))
    assert lost < after  # so the second answer is whole
    example, said = example_of(folder, {"messages": THREE}, f"max_length={len(ids) - 1}",
                               f"max_prompt_length={num_prompt - lost}")
    if lost > first:
        counts = [False] * after + counts[after:]
    wanted = ids[lost:], [False, *counts[lost + 1:]]
    got = counted(example)
    assert got[0] == wanted[0] and "1 cut" in said
    if lost != first:  # else nothing predicts the first answer's first token: it cannot count
        assert got == wanted
    else:
        assert got[1][0] is False and got[1][after - lost:] == wanted[1][after - lost:]


def test_everything_of_a_cut_conversation_counts_but_the_first(folders):
    folder = os.path.join(folders, "chatml")
    ids, _ = ids_and_counts(folder, RENDERINGS["chatml"][0])
    for max_length, kept in ((len(ids), ids), (len(ids) - 1, None)):
        example, _ = example_of(folder, {"messages": THREE}, "sft.train_on=everything",
                                "max_prompt_length=20", f"max_length={max_length}")
        got, counts = counted(example)
        assert counts == [False] + [True] * (len(got) - 1)
        assert got == (kept or ids[-len(got):]) and len(got) > 20


def test_everything_of_plain_text(folders):
    folder = os.path.join(folders, "plain")
    row = {"prompt": "Q: What floats?\nA:", "response": " Wood."}
    example, _ = example_of(folder, row, "sft.train_on=everything")
    ids = marked_ids(folder, "Q: What floats?\nA: Wood.⟦<|endoftext|>⟧")
    assert counted(example) == (ids, [False] + [True] * (len(ids) - 1))


def test_a_cut_that_keeps_the_start_keeps_the_header(folders):
    """The answer stands behind its own header, whatever is kept before that."""
    folder = os.path.join(folders, "chatml")
    ids, _ = ids_and_counts(folder, RENDERINGS["chatml"][0])
    header = marked_ids(folder, f"{E}\n{S}assistant\n")
    last = marked_ids(folder, f"Iron does.{E}")
    settings = ["sft.train_on=last_answer", "truncation=keep_start", f"max_length={len(ids) - 2}"]
    for room in range(len(header), 30, 3):
        example, _ = example_of(folder, {"messages": THREE}, *settings, f"max_prompt_length={room}")
        assert counted(example) == (ids[:room - len(header)] + header + last,
                                    [False] * room + [True] * len(last))


def test_the_losses_of_a_conversation_by_hand(folders, run):
    """The mean over the three answers' tokens, and its count, of one forward of the whole conversation."""
    folder = os.path.join(folders, "chatml")
    rows = write_lines("rows.jsonl", [{"messages": THREE}])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids, counts = ids_and_counts(folder, RENDERINGS["chatml"][0])
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    each = [logps[i - 1, ids[i]].item() for i in range(1, len(ids))]
    answers = [value for value, counts_here in zip(each, counts[1:]) if counts_here]
    last = answers[-len(marked_ids(folder, f"Iron does.{E}")):]
    for train_on, values in {"answers": answers, "last_answer": last, "everything": each}.items():
        line, = read_lines(os.path.join(run(
            f"model={folder}", f"data={rows}", f"eval_data={rows}", "max_steps=0", "num_samples=0",
            f"sft.train_on={train_on}", f"run_dir={train_on}"), "metrics.jsonl"))
        assert math.isclose(line["loss"], -sum(values) / len(values), rel_tol=1e-5)
        assert math.isclose(line["logps/chosen"], sum(values), abs_tol=1e-3)


# ---------------------------------------------------------------- what a template leaves out

CALLS = A("") | {"tool_calls": [CALL]}


def reading(folders, name, messages, **more):
    """The Example of a chat, or None, and what the summary says of it."""
    rows = write_lines("rows.jsonl", [{"messages": messages} | more, {"messages": [U("q"), A("a")]}])
    config = config_of(f"model={os.path.join(folders, name)}", f"data={rows}")
    read = data.load_data(config, OBJECTIVES["sft"])
    example = read.train_examples[0] if len(read.train_examples) == 2 else None
    return example, "\n".join(read.reports["data"].lines())


@pytest.mark.parametrize("name, messages, said", [
    ("chatml", [U("q"), CALLS, {"role": "tool", "content": "Two."}, A("a")], "does not write tool calls"),
    ("known", [U("q"), {"role": "observation", "content": "Two."}, A("a")], "out a turn, by observation"),
    ("known", [{"role": "system", "content": "s"}, U("q"), A("a")], "leaves out a turn, by system")])
def test_turns_and_calls_that_a_template_leaves_out_drop_the_row(name, messages, said, folders):
    example, lines = reading(folders, name, messages)
    assert example is None and said in lines


def test_thoughts_and_tools_that_a_template_leaves_out_are_named(folders):
    example, said = reading(folders, "opens", [U("q"), A("<think>\nso\n</think>\n\na")])
    assert "1 rows have a thought in their answer that the chat template leaves out" in said
    assert tokenizer_of(os.path.join(folders, "opens")).decode(example.responses[0]) == "a<|im_end|>"
    assert "have a thought" not in reading(folders, "thinking", [U("q"), A("<think>\nso\n</think>\n\na")])[1]
    tools = [{"type": "function", "function": {"name": "find"}}]
    for name, leaves_out in (("chatml", True), ("tooled", False)):
        _, said = reading(folders, name, [U("q"), A("a")], tools=tools)
        assert ("1 rows have tools that the chat template leaves out" in said) is leaves_out


def test_calls_as_tables_and_old_clients_have_them(folders):
    """Nothing under the keys of other rows' arguments; one call, no list; white space beside a call."""
    arguments = {"q": "boats", "day": None}
    calls = A("\n\n") | {"tool_calls": [CALL | {"function": {"name": "find", "arguments": arguments}}]}
    old = {"role": "assistant", "content": None,
           "function_call": {"name": "find", "arguments": '{"q": "boats"}'}}
    for answer in (calls, old):
        example, _ = reading(folders, "thinking", [U("q"), answer])
        text = tokenizer_of(os.path.join(folders, "thinking")).decode(example.responses[0])
        assert text.strip().endswith('find {"q": "boats"}\n</tool_call><|im_end|>') and "day" not in text
    example, said = reading(folders, "pythonic", [U("q"), A("") | {"tool_calls": [
        {"type": "function", "function": {"name": "find", "arguments": "{}"}}]}])
    assert "[find {}]" in tokenizer_of(os.path.join(folders, "pythonic")).decode(example.responses[0]), said
