"""From rows to token ids, with tokenizers of eight families, and to losses: those of the whole texts."""

import itertools
import json
import math
import os
import random
import re
import unicodedata
from dataclasses import dataclass

import pytest
import torch
from conftest import (DATA, SHARED, config_of, last_gradient, losses_of, make_trainer, same_weights, shared,
                      tiny_of, write_lines)
from on_ranks import on_ranks
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import data
from data import Encoder, TextRow
from engine.report import Report
from engine.tokens import place_of
from losses import OBJECTIVES

EXACT = ["dtype=float64", "compute_dtype=float64"]
HH, HH_TRAIN = os.path.join(DATA, "hh.jsonl"), os.path.join(SHARED, "data", "hh", "train.jsonl")
MENTION = "\ue000"  # stands for a mention of a control token, where the expected ids are worked out

# ---------------------------------------------------------------- tokenizers of eight families, made small

LLAMA3_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK_REGEXES = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"))


@dataclass
class Family:
    """A tokenizer with its template.

    ends: tokens that end a response, as the model's folder has them. control: tokens that a message cannot
    write. answer: what stands of an answer between what opens it and its end token, with that.
    """

    name: str
    tokenizer: PreTrainedTokenizerFast
    ends: list
    control: list
    answer: str

    @property
    def end_ids(self):
        return self.tokenizer.convert_tokens_to_ids(self.ends)

    def split(self, text):  # what stands between control tokens, in turns with them
        return re.split(f"({'|'.join(map(re.escape, self.control))})", text)

    def encode_with_places(self, text):
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoding["input_ids"], [start for start, _ in encoding["offset_mapping"]]

    def encode(self, text):
        return self.encode_with_places(text)[0]

    def chat(self, messages, generate=False):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)

    def encoder(self):
        return Encoder(self.tokenizer, config_of("max_length=100000"), self.end_ids, "2026-11-25")

    def assert_decoded(self, ids, text, mention=""):
        """The ids decode to the text. A T5 has tokens for some texts only."""
        decoded, expected = self.tokenizer.decode(ids), self.decoded(text).replace(MENTION, mention)
        if self.name == "t5":
            decoded, expected = (unicodedata.normalize("NFKC", text) for text in (decoded, expected))
        assert decoded == expected or self.name == "t5" and self.tokenizer.unk_token_id in ids

    def decoded(self, text):
        """What is left of a text in its ids. Four families are not lossless: Mistral reads a text without its
        first space; Llama 2 puts one behind control tokens, and so does Phi-3, in place of white space that
        stands there; a T5 reads all white space as one space, and puts it behind control tokens."""
        if self.name == "mistral":
            return text.removeprefix(" ")
        if self.name not in ("llama2", "phi3", "t5"):
            return text
        first, *rest = self.split(text)
        if self.name == "t5":
            first, *rest = (" ".join(unicodedata.normalize("NFKC", part.replace("\u200b", " ")).split())
                            for part in (first, *rest))
        after = [part.lstrip() if self.name == "phi3" else part for part in rest[1::2]]
        return first + "".join(token + (part and " " + part) for token, part in zip(rest[::2], after))

    def bare(self):
        """A tokenizer that has no control tokens, for what stands between them."""
        parts = json.loads(self.tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}
        parts["added_tokens"] = [x for x in parts["added_tokens"] if x["content"] not in self.control]
        model, gone = parts["model"], {token: f"{MENTION}{i}" for i, token in enumerate(self.control)}
        if isinstance(model["vocab"], dict):
            model["vocab"] = {gone.get(token, token): i for token, i in model["vocab"].items()}
            model["unk_token"] = gone.get(model["unk_token"], model["unk_token"])
        else:
            model["vocab"] = [[gone.get(token, token), score] for token, score in model["vocab"]]
        if self.name == "mistral":  # it puts a space before a text, where <s> stands
            parts["pre_tokenizer"]["prepend_scheme"] = "never"
        return Tokenizer.from_str(json.dumps(parts))

    def ids_by_parts(self, text, mention):
        """Ids of a rendering: each control token's, and those of the bare texts between, where MENTION stands
        for one that is text."""
        bare, ids = self.bare(), []
        for number, part in enumerate(self.split(text)):
            if number % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
            else:
                part = part.lstrip() if self.name == "phi3" and number else part
                ids += bare.encode(part.replace(MENTION, mention)).ids if part else []
        return ids


def trained_bpe(texts, pre_tokenizer, alphabet):
    """Vocabulary and merges."""
    tokenizer = changed(Tokenizer(models.BPE()), pre_tokenizer=pre_tokenizer)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [*map(tuple, model["merges"])]


def byte_level(splits, **options):
    """A BPE of bytes after splits by regexes, or by GPT-2's own."""
    before = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    before = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(False, use_regex=not splits)])
    vocab, merges = trained_bpe(TEXTS, before, sorted(pre_tokenizers.ByteLevel.alphabet()))
    return changed(Tokenizer(models.BPE(vocab, merges, **options)), pre_tokenizer=before,
                   decoder=decoders.ByteLevel(), post_processor=processors.ByteLevel(trim_offsets=False))


def sentencepiece(texts, first=("<unk>", "<s>", "</s>"), strip=1):
    """A BPE of words with a mark for spaces, runs of it, and bytes for what else there is, as newlines."""
    texts = [re.sub("[^!-~]+", " ", text) for text in texts]
    vocab, merges = trained_bpe(texts, pre_tokenizers.Metaspace(), ["▁", *map(chr, range(33, 127))])
    names = dict.fromkeys([*first, *(f"<0x{i:02X}>" for i in range(256)), *vocab, "▁▁", "▁▁▁▁"])
    merges += [("▁", "▁"), ("▁▁", "▁▁")]
    model = models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True,
                       byte_fallback=True)
    return changed(Tokenizer(model), decoder=decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", strip, 0)]))


def changed(tokenizer, **parts):
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def prepending(texts):
    """As Llama 2's: a space before each text, also behind a control token."""
    return changed(sentencepiece(texts), normalizer=normalizers.Sequence([normalizers.Prepend("▁"), MARKED]))


def t5():
    """A unigram model, with white space of any kind for one space."""
    tokenizer = changed(
        Tokenizer(models.Unigram()), decoder=decoders.Metaspace(prepend_scheme="always"),
        normalizer=normalizers.Sequence([normalizers.Replace("\u200b", " "), normalizers.NFKC()]),
        pre_tokenizer=pre_tokenizers.Sequence([
            pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]))
    tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    return tokenizer


def special(names, **flags):
    return [AddedToken(name, normalized=False, special=True, **flags) for name in names]


def family(name, tokenizer, added, ends, *, user, opens, answer, start="", after="", closes="", others=()):
    """start: what a rendering begins with, a begin token. user, opens, answer, after: what is written of a
    message, {} being its content. closes: what a rendering ends with. others: added tokens, not special."""
    parts = {"START": start, "USER": user, "SAID": opens + answer + after, "OPENS": opens, "CLOSES": closes}
    template = re.sub("|".join(parts), lambda part: json.dumps(parts[part[0]], ensure_ascii=False).replace(
        "{}", '" + m.content + "'), "{{ START }}{% for m in messages %}{% if m.role == 'user' %}{{ USER }}"
        "{% elif m.role == 'assistant' %}{{ SAID }}{% endif %}{% endfor %}"
        "{{ OPENS if add_generation_prompt else CLOSES }}")
    tokenizer.add_special_tokens(added)
    tokenizer.add_tokens([AddedToken(other, normalized=False) for other in others])
    control = [*(token.content for token in added), *(other for other in others if not other.isspace())]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=ends[0], bos_token=start or None, chat_template=template,
        unk_token="<unk>" if "<unk>" in control else None, clean_up_tokenization_spaces=False)
    return Family(name, fast, ends, sorted(control, key=len, reverse=True), answer)


with open(HH, encoding="utf-8") as file:
    TEXTS = [json.loads(line)["chosen"] for line in file] + ["a \n b\n \n  c  \n\n   \n\t\td \n\n" * 50]
FIRST, MARKED = pre_tokenizers.Metaspace(prepend_scheme="first", split=False), normalizers.Replace(" ", "▁")
NEWLINES = ["\n" * count for count in range(1, 6)]
LLAMA2, MISTRAL = ["<unk>", "<s>", "</s>"], ["[INST]", "[/INST]"]
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
DEEPSEEK, MARKS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], ["<｜User｜>", "<｜Assistant｜>"]
PHI3 = special(["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], rstrip=True)
HH_TURNS = {"user": "\n\nHuman: {}", "opens": "\n\nAssistant:", "answer": " {}<|endoftext|>"}
INST = {"user": "<s>[INST] {} [/INST]", "opens": "", "answer": " {} </s>"}
FAMILIES = {made.name: made for made in [
    family("gpt2", byte_level([]), special(["<|endoftext|>"]), ["<|endoftext|>"], **HH_TURNS),
    family("llama2", prepending(TEXTS), special(LLAMA2), ["</s>"], **INST),
    family("llama3", byte_level([LLAMA3_REGEX], ignore_merges=True), special(LLAMA3),
           ["<|eot_id|>", "<|end_of_text|>"], start="<|begin_of_text|>",
           user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
           opens="<|start_header_id|>assistant<|end_header_id|>\n\n", answer="{}<|eot_id|>"),
    family("mistral", changed(sentencepiece(TEXTS), pre_tokenizer=FIRST), special([*LLAMA2, *MISTRAL]),
           ["</s>"], start="<s>", user="[INST] {}[/INST]", opens="", answer=" {}</s>"),
    family("gemma", changed(sentencepiece(TEXTS, [*GEMMA, *NEWLINES], strip=0), normalizer=MARKED),
           special(GEMMA), ["<eos>", "<end_of_turn>"], start="<bos>", others=NEWLINES, after="\n",
           user="<start_of_turn>user\n{}<end_of_turn>\n", opens="<start_of_turn>model\n",
           answer="{}<end_of_turn>"),
    family("t5", t5(), special(["<pad>", "</s>", "<unk>"]), ["</s>"], user="user: {}</s>",
           opens="assistant:", answer=" {}</s>"),
    family("phi3", prepending(TEXTS), special([*LLAMA2, "<|endoftext|>"]) + PHI3,
           ["<|endoftext|>", "<|end|>"], user="<|user|>\n{}<|end|>\n", opens="<|assistant|>\n",
           answer="{}<|end|>", after="\n", closes="<|endoftext|>"),
    family("deepseek", byte_level(DEEPSEEK_REGEXES), special(DEEPSEEK), [DEEPSEEK[1]], start=DEEPSEEK[0],
           user="<｜User｜>{}", opens="<｜Assistant｜>", answer="{}" + DEEPSEEK[1], others=MARKS)]}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """transformers' RMSNorm computes in float32 even in float64 models: its last bit is 6e-8, not 1e-16."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: self.weight * x * torch.rsqrt(
        x.square().mean(-1, keepdim=True) + self.variance_epsilon))


# ---------------------------------------------------------------- rows, and what is expected of them

user, assistant = ((lambda text, role=role: {"role": role, "content": text})
                   for role in ("user", "assistant"))


def hh_rows():
    """The pairs of tests/data, and 200 of ../shared where that is there."""
    rows = data.load_rows(HH, "train", OBJECTIVES["dpo"])[0]
    if os.path.exists(HH_TRAIN):
        with open(HH_TRAIN, encoding="utf-8") as file:
            path = write_lines("train.jsonl", map(json.loads, itertools.islice(file, 240)))
        rows += data.load_rows(path, "train", OBJECTIVES["dpo"])[0][:200]
    return rows


def hh_chats():
    """50 pairs of HH as messages."""
    chats = []
    for row in hh_rows():
        said = [text.strip() for text in re.split(r"\n\n(?:Human|Assistant):", row.prompt)[1:-1]]
        if all(said) and len(said) % 2:
            messages = [(user, assistant)[i % 2](text) for i, text in enumerate(said)]
            answers = tuple(assistant(text.strip()) for text in row.responses)
            chats.append(TextRow(row.where, messages, answers, {}))
    return chats[:50]


def pairs(texts):
    return [TextRow(f"row {i}", prompt, (response,), {}) for i, (prompt, response) in enumerate(texts)]


def examples_of(family, rows, **options):
    """One Example for each of the rows."""
    report = Report()
    examples = family.encoder().examples(rows, report, **options)
    assert [example.where for example in examples] == [row.where for row in rows], list(report.lines())
    return examples


def ids_of(example):
    return [*example.prompt.tolist(), *example.responses[0].tolist()]


def count_crossing(family, rows):
    """Of rows of text: prompt ids are those of the prompt alone; joined with a response's they are the whole
    text's, unless a token crosses; they decode to the text. Returns for how many responses one crosses."""
    crossing = 0
    for row, example in zip(rows, examples_of(family, rows)):
        prompt = example.prompt.tolist()
        assert prompt == family.encode(row.prompt), row
        for response, text in zip(example.responses, row.responses):
            *response, end = response.tolist()
            whole = family.encode(row.prompt + text)
            if whole[:len(prompt)] == prompt and whole != prompt:  # or one unknown token is of both
                assert prompt + response == whole, row
            crossing += whole[:len(prompt)] != prompt
            assert end == family.end_ids[0]
            family.assert_decoded(prompt + response, row.prompt + text)
    return crossing


# ---------------------------------------------------------------- the boundary


@each_family
def test_pairs_of_hh_are_the_tokens_of_their_texts(family):
    rows = hh_rows()
    assert count_crossing(family, rows) <= 0.01 * len(rows)  # responses begin with a space


@each_family
def test_chats_of_hh_are_the_tokens_of_their_renderings(family):
    """A response goes from the end of the prompt's rendering to the answer's end token."""
    chats = hh_chats()
    assert len(chats) == 50
    for example, row in zip(examples_of(family, chats), chats):
        prompt = family.encode(opened := family.chat(row.prompt, generate=True))
        assert example.prompt.tolist() == prompt
        for response, answer in zip(example.responses, row.responses):
            text = family.chat([*row.prompt, answer])
            stop = len(opened + family.answer.format(answer["content"]))
            assert text[:stop] == opened + family.answer.format(answer["content"])
            whole = [i for i, place in zip(*family.encode_with_places(text)) if place < stop]
            assert prompt + response.tolist() == whole
            assert response[-1] in family.end_ids and not {*response[:-1].tolist()} & {*family.end_ids}
            family.assert_decoded(whole, text[:stop])


@each_family
def test_no_space_is_put_in_where_a_token_crosses(family):
    """Responses without a space, prompts that end in one, in newlines, or within a word."""
    rows = [row for row in hh_rows()[:57] if len(row.responses[0]) > 9]
    ends = ("", ""), (" ", ""), (" ", " "), ("\n", ""), ("\n", "\n"), ("\n\n", "\n"), ("  ", " ")
    cut = [(row.prompt + end, begin + row.responses[0].strip()) for row in rows for end, begin in ends]
    cut += [(row.prompt + row.responses[0][:n], row.responses[0][n:]) for row in rows for n in (2, 3, 5)]
    assert count_crossing(family, pairs(cut)) >= len(rows)


def spelled(family, rows):
    pieces = family.tokenizer.convert_ids_to_tokens
    return [" ".join(pieces(example.prompt)) + "|" + " ".join(pieces(example.responses[0][:-1]))
            for example in examples_of(family, rows)]


def test_no_space_is_put_in_by_hand():
    """A space nowhere, before the cut, behind it, on both sides; a cut within a word."""
    cuts = "Hi:|there", "Hi: |there", "Hi:| there", "Hi: | there", "Hi th|ere"
    rows = pairs([cut.split("|") for cut in cuts])
    marked = ["▁H i :|th ere", "▁H i : ▁|th ere", "▁H i :|▁there", "▁H i : ▁|▁there", "▁H i ▁th|ere"]
    for name in ("llama2", "mistral", "phi3"):
        assert spelled(FAMILIES[name], rows) == marked
    assert spelled(FAMILIES["gpt2"], rows) == [
        "H i :|t he re", "H i : Ġ|t he re", "H i :|Ġthere", "H i : Ġ|Ġthere", "H i Ġth|ere"]
    # Where newlines are tokens of their own, behind which Llama 2 puts a space
    llama = family("llama2", prepending(TEXTS), special(LLAMA2), ["</s>"], others=["\n"], **INST)
    assert spelled(llama, rows) == marked


def test_a_response_of_no_tokens_has_an_end_token_or_is_dropped():
    """A T5 reads a space of no width as white space; the prompt's own end token ends no response."""
    for prompt in ("Hi", "Hi</s>", "\u200b"):
        examples = FAMILIES["t5"].encoder().examples(pairs([(prompt, "\u200b")]), Report())
        assert all(example.responses[0].tolist() == FAMILIES["t5"].end_ids for example in examples)


# ---------------------------------------------------------------- random texts, cut anywhere

PIECES = ["\n", "\n\n", "\n\n\n", "\t", " \n", "\n ", "\r\n", "\xa0", "\u3000", "\u2009", "\u200b", "'s",
          "'re", "I'm", "'VE", "e\u0301", "n\u0303", "\u0301", "a\u0323\u0302", "\u1100\u1161\u11a8", "क्षि",
          "ﬁ", "Å", "½", "😀", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "❤️", "你好", "日本語", "カナ", "한국어"]


def random_texts(count):
    """(text before a cut, text behind it), seeded."""
    draw, words = random.Random(13), " ".join(TEXTS).split()
    makers = [lambda: " " * draw.choice((1, 1, 1, 2, 3, 5)),
              lambda: str(draw.randrange(10 ** draw.randrange(1, 9))),
              lambda: "".join(draw.choices("!?.,;:-_*#()[]{}<>/\\|\"'`~@$%^&+=", k=draw.randrange(1, 4))),
              *[lambda: draw.choice(PIECES), lambda: draw.choice(words)] * 3]
    texts = ("".join(draw.choice(makers)() for _ in range(draw.randrange(2, 14))) for _ in range(2 * count))
    cut = [(text[:at], text[at:]) for text in texts if (at := draw.randrange(len(text)))]
    return [(prompt, response) for prompt, response in cut if response.strip()][:count]


@each_family
def test_random_texts_cut_anywhere(family):
    texts = [(prompt, response) for prompt, response in random_texts(600) if family.encode(prompt)]
    assert len(texts) > 500 and 60 < count_crossing(family, pairs(texts)) < 300


@each_family
def test_a_cut_that_is_trusted(family):
    """Where place_of tells how many tokens stand before the cut, they are those of the text before it."""
    encode, trusted = family.encoder().cutter.encode, 0
    for prompt, response in random_texts(1000):
        encoding = encode(prompt + response)
        place = place_of(encoding, prompt + response, len(prompt))
        trusted += place is not None
        assert place is None or encoding.ids[:place] == family.encode(prompt), (prompt, response)
    assert trusted > 500


def test_a_mark_that_changes_the_letter_before_the_cut():
    """Normalizers, NFC (Qwen) and NFKC (T5), make one letter of both; the prompt's is what it is alone."""
    qwen = family("qwen", changed(byte_level([LLAMA3_REGEX]), normalizer=normalizers.NFC()),
                  special(["<|endoftext|>"]), ["<|endoftext|>"], **HH_TURNS)
    cuts = "cafe|\u0301 is", "\u1100\u1161|\u11a8", "\u1100|\u1161", "a|\u0323\u0302"
    rows = pairs([cut.split("|") for cut in cuts])
    for made in (qwen, FAMILIES["t5"]):
        for example, row in zip(examples_of(made, rows), rows):
            assert example.prompt.tolist() == made.encode(row.prompt), row


# ---------------------------------------------------------------- control tokens that a chat mentions


def mentioning(word):
    """A chat with a word at the ends of its messages and between, before and behind spaces and letters."""
    return [user(f"{word} opens, then {word}, after{word} and {word}"), assistant(f"It is {word}."),
            user(f"No,\n{word}"), assistant(f"{word} or {word}")]


@each_family
def test_control_tokens_that_a_chat_mentions(family):
    """The framing is that of every other chat; the mention is pieces, as if there were no such token."""
    for token in family.control:
        rows = [TextRow("row", chat[:-1], (chat[-1],), {}) for chat in map(mentioning, (token, "word"))]
        example, other = examples_of(family, rows)
        *prompt, answer = mentioning(MENTION)  # a letter in its place
        opened = family.chat(prompt, generate=True)
        text = opened + family.answer.format(answer["content"])
        assert family.chat([*prompt, answer]).startswith(text)
        assert ids_of(example) == family.ids_by_parts(text, token)
        assert example.prompt.tolist() == family.ids_by_parts(opened, token)
        family.assert_decoded(ids_of(example), text, token)
        control = {*family.tokenizer.convert_tokens_to_ids(family.control)} - {family.tokenizer.unk_token_id}
        framing, expected = ([i for i in ids_of(x) if i in control] for x in (example, other))
        assert framing == expected  # unknown pieces of a mention apart


def test_a_control_token_that_merges_could_make():
    """As where a tokenizer was trained on texts with `</s>` in them."""
    tokenizer = prepending(["</s> </s></s> a b say now"] * 9)
    assert "</s>" in map("".join, json.loads(tokenizer.to_str())["model"]["merges"])
    llama = family("llama2", tokenizer, special(LLAMA2), ["</s>"], **INST)
    example = examples_of(llama, [TextRow("row", [user("say </s> now")], (assistant("a"),), {})])[0]
    assert 2 not in example.prompt and example.responses[0].tolist().count(2) == 1
    assert llama.tokenizer.decode(example.prompt) == "<s> [INST] say </s> now [/INST]"


# ---------------------------------------------------------------- conversations: every answer counts

TURNS = [
    ["What floats?", "Wood does.", "And 12 more?", "Cork, ice\nand 3 boats.", "Why?", "They are light."],
    ["Hi", "Hello!", "Are you well?", "Yes, thank you.", "Bye", "Bye."], ["A", "B", "C", "D, e", "F", "G!"],
    ["I want to know what people do when they have lost their keys, at night, on their way home from work",
     "They look where there is light, and then they ask someone who has been there", "Does that help?",
     "It might not help them to find the keys, but it is a good way to meet people, and to talk about it",
     "So what would you do, if I may ask?", "I would think of where I have been, and go. " * 4 + "Yes"]]
CHATS = [[(user, assistant)[i % 2](text) for i, text in enumerate(turns)] for turns in TURNS]


def counted(family, messages):
    """Of the whole rendering: its text, its ids, which of them are an answer's, the spans of the answers."""
    text, spans, at = family.chat(messages), [], 0
    for message in messages[1::2]:
        said = family.answer.format(message["content"])
        at = text.index(said, at) + len(said)
        spans.append((at - len(said), at))
    ids, places = family.encode_with_places(text)
    return text, ids, [any(start <= place < stop for start, stop in spans) for place in places], spans


@each_family
def test_what_counts_of_a_conversation(family):
    """Exactly the three answers with their end tokens; by last_answer the last; by everything all."""
    rows = [TextRow(f"row {i}", chat[:-1], (chat[-1],), {}, (1, 3)) for i, chat in enumerate(CHATS)]
    made = [examples_of(family, rows, train_on=name) for name in ("answers", "last_answer", "everything")]
    for row, answers, last, everything in zip(rows, *made):
        text, whole, mask, spans = counted(family, [*row.prompt, *row.responses])
        ids = ids_of(answers)
        assert ids == whole[:len(ids)] and not any(mask[len(ids):])
        assert [0.0] * len(answers.prompt) + answers.weights(0).tolist() == mask[:len(ids)]
        borders = [i for i in range(1, len(ids)) if mask[i] != mask[i - 1]] + [len(ids)]
        for start, stop, span in zip(borders[::2], borders[1::2], spans, strict=True):
            family.assert_decoded(ids[:start], text[:span[0]])
            family.assert_decoded(ids[:stop], text[:span[1]])
            assert ids[stop - 1] in family.end_ids and not {*ids[start:stop - 1]} & {*family.end_ids}
        assert ids_of(last) == ids and len(last.prompt) == borders[-2] and last.weights(0).all()
        assert ids_of(everything) == whole and len(everything.prompt) == 1 and everything.weights(0).all()


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """run_of(family): settings of a run over CHATS, with a tiny random Llama for that tokenizer."""
    folders = {}
    path = str(tmp_path_factory.mktemp("chats") / "chats.jsonl")
    write_lines(path, [{"messages": chat} for chat in CHATS])

    def make(family):
        if family.name not in folders:
            folder = folders[family.name] = str(tmp_path_factory.mktemp(family.name))
            model = tiny_of("llama", vocab_size=len(family.tokenizer))
            model.generation_config = GenerationConfig(eos_token_id=family.end_ids)
            model.save_pretrained(folder)
            family.tokenizer.save_pretrained(folder)
        return [f"model={folders[family.name]}", f"data={path}", f"eval_data={path}", "num_samples=0",
                "max_length=1024", "batch_size=4", "shuffle=false", "max_grad_norm=null", "lr=1e-5",
                "lr_schedule=constant", "num_epochs=9", "eval_every=0", *EXACT]
    return make


@each_family
def test_the_loss_of_conversations_by_hand(family, run_of):
    """The mean over the tokens that count, and its gradients, however the step is laid out and split."""
    for number, split in enumerate(("layout=separate", "layout=shared", "max_tokens_per_microbatch=1",
                                    "gradient_accumulation_steps=2")):
        trainer = make_trainer(*run_of(family), "layout=shared", "max_tokens_per_microbatch=9999", split)
        if number == 0:
            model, losses = trainer.policy, []
            for chat in CHATS:
                _, ids, mask, _ = counted(family, chat)
                logps = model(input_ids=torch.tensor([ids]), use_cache=False).logits.log_softmax(-1)[0]
                places = [i for i, counts in enumerate(mask) if counts]
                losses.append(-logps[[i - 1 for i in places], [ids[i] for i in places]])
            loss = torch.cat(losses).mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
        batches = trainer.make_global_batch(0)[1]
        assert len(batches) == (1, 1, 4, 2)[number]
        assert number != 1 or len(batches[0].input_ids) < 4  # several in a row
        assert trainer.train_step()["loss"] == pytest.approx(loss.item(), rel=1e-9)
        for p, gradient in zip(trainer.policy.parameters(), gradients, strict=True):
            assert (last_gradient(p) - gradient).abs().max() <= 1e-9 * gradient.abs().max()


@pytest.mark.parametrize("name", ["llama2", "gemma", "t5", "phi3"])
def test_conversations_resumed(name, run_of, run):
    settings = [*run_of(FAMILIES[name]), "batch_size=3"]
    run(*settings, "run_dir=whole", "max_steps=4")
    run(*settings, "run_dir=half", "max_steps=2")
    run("resume=true", "run_dir=half", "max_steps=4")
    assert losses_of("whole") == losses_of("half") and len(losses_of("half")) == 4
    assert same_weights("whole", "half")


@pytest.mark.xdist_group("ranks")
def test_conversations_on_two_ranks(run_of):
    """Of 3 conversations a step: shares are unequal."""
    for count in (1, 2):
        on_ranks(count, *run_of(FAMILIES["phi3"]), "batch_size=3", "max_steps=4", f"run_dir=ranks{count}")
    one, two = losses_of("ranks1"), losses_of("ranks2")
    assert two == pytest.approx(one, rel=1e-6) and len(one) == 4


# ---------------------------------------------------------------- DPO from whole texts


def obvious_losses_of_dpo(model, tokenizer, rows, beta, lr):
    """20 steps of DPO with RMSprop, two rows each, from the ids of whole texts."""
    def logp(prompt, response):
        ids = tokenizer(prompt + response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        logps = model(input_ids=torch.tensor([ids]), use_cache=False).logits.log_softmax(-1)[0]
        return logps[range(start - 1, len(ids) - 1), ids[start:]].sum()
    reference = [[logp(row.prompt, response).detach() for response in row.responses] for row in rows]
    losses, squares = [], [torch.zeros_like(p) for p in model.parameters()]
    for step in range(20):
        loss = 0
        for i in (2 * step % len(rows), (2 * step + 1) % len(rows)):
            w, l = (logp(rows[i].prompt, response) for response in rows[i].responses)
            h = (w - reference[i][0]) - (l - reference[i][1])
            loss = loss + torch.log(1 + torch.exp(-beta * h)) / 2
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p, square in zip(model.parameters(), squares):
                square.mul_(0.99).add_(0.01 * p.grad.square())
                p -= lr * p.grad / (square.sqrt() + 1e-8)
    return losses


@pytest.mark.parametrize("kind", [pytest.param("real", marks=pytest.mark.slow), "random"])
def test_losses_of_dpo_are_those_of_whole_texts(kind, tmp_path):
    """Over 6 pairs, on stories260K or on a random Llama with its tokenizer, as Llama 2's."""
    folder = shared("models", "stories260K") if kind == "real" else str(tmp_path / "random")
    if kind == "random":
        AutoTokenizer.from_pretrained(os.path.join(DATA, "stories260K")).save_pretrained(folder)
        tiny_of("llama", vocab_size=512, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    rows = data.load_rows(HH, "train", OBJECTIVES["dpo"])[0]
    rows = sorted(rows, key=lambda row: len(row.prompt) + sum(map(len, row.responses)))[:6]
    path = write_lines("pairs.jsonl", [{"prompt": row.prompt, "chosen": w, "rejected": l}
                                       for row in rows for w, l in [row.responses]])
    settings = ["loss=dpo", f"model={folder}", f"data={path}", f"eval_data={path}", "num_samples=0",
                "batch_size=2", "max_steps=20", "num_epochs=9", "shuffle=false", "max_grad_norm=null",
                "lr=1e-5", "lr_schedule=constant", "warmup_steps=0", "dpo.beta=0.3", *EXACT]
    trainer, twin = make_trainer(*settings), make_trainer(*settings)
    losses = [trainer.train_step()["loss"] for _ in range(20)]
    expected = obvious_losses_of_dpo(twin.policy, trainer.data.tokenizer, rows, 0.3, 1e-5)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert losses[0] == pytest.approx(math.log(2)) and max(losses) - min(losses) > 0.01  # weights have moved
