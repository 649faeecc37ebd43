"""How does text become token ids, cut where a prompt ends? Whole: no token is put in or lost there."""

import functools
import itertools
import json
import unicodedata
from collections.abc import Iterator
from types import SimpleNamespace

from tokenizers import Tokenizer

from engine import Dropped
from engine.chats import GUARD, WRITTEN, ChatTemplate


class TokenCutter:
    """Encodes texts, and says which token follows a place in them."""

    def __init__(self, tokenizer, chats: ChatTemplate):
        self.tokenizer, self.chats = tokenizer, chats
        self.backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        if self.backend:
            self.backend.no_truncation()
            self.backend.no_padding()

    def encode_batch(self, texts) -> list:
        """Encodings, with `ids` and char_to_token; special tokens that stand in the texts are tokens."""
        if self.backend:
            return self.backend.encode_batch(texts, add_special_tokens=False)
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return [SimpleNamespace(ids=x, char_to_token=lambda place: None) for x in ids]

    def cut_alike(self, parts) -> Iterator[tuple[list[int], list[int]]]:
        """cut_ids of (text, cuts, encoding of what part_read says), which begin alike, up to the last cut but
        one. Of all but the first only the end of that beginning is encoded again: where its last tokens are
        the same, so are those before, as BPE is decided by pairs of tokens that stand together."""
        for number, (text, cuts, encoding) in enumerate(parts):
            skip = part_read(number, text, cuts)
            ids, places = self.cut_ids(text[skip:], [cut - skip for cut in cuts], encoding)
            if number == 0:
                prompt = ids[:places[-2]]
            elif skip and ids[places[-2] - 8:places[-2]] == prompt[-8:]:
                more = len(prompt) - places[-2]
                ids, places = prompt + ids[places[-2]:], [place + more for place in places]
            elif skip:
                ids, places = self.cut_ids(text, cuts)
            yield ids, places

    def cut_ids(self, text, cuts, encoding=None) -> tuple[list[int], list[int]]:
        """Ids of a text, and how many of them stand before each of the cuts, ascending places in it.

        Ids before a cut are those of the text before it, whatever follows. Where they are no prefix of the
        whole's, as a token crosses the cut, what follows is encoded as a continuation. Control tokens with
        GUARD in them are text. encoding: the text's, if it is known. Raises Dropped.
        """
        if GUARD not in text:
            return self.cut(text, cuts, self.encode, encoding)
        if not self.backend:
            raise Dropped("a message mentions a control token, which only a fast tokenizer can keep as text")
        parts = [self.chats.control.sub(lambda token: WRITTEN + token[0], text[start:stop]).replace(GUARD, "")
                 for start, stop in itertools.pairwise([0, *cuts, len(text)])]
        cuts = list(itertools.accumulate(map(len, parts)))[:-1]
        return self.cut("".join(parts), cuts, self.encode_mentioning)

    def token_weights(self, weights, said, text, ids, places, count) -> list[float]:
        """Weights of a response's `count` tokens: of each that of its last character.

        weights: of the characters of what is said in it and, last, of what follows. text: the whole one, with
        ids and places as cut_ids gives them. Raises Dropped where places in it cannot be told.
        """
        encoding = self.encode(text)
        offsets = getattr(encoding, "offsets", None) if list(encoding.ids) == list(ids) else None
        start, stop = places[-2:]
        blank = len(said) - len(said.lstrip())  # which some tokenizers count to no token
        begin = text.find(said, max(0, offsets[start][0] - blank)) if offsets and GUARD not in text else -1
        if begin < 0:
            raise Dropped("the places of its weights cannot be told: text or tokens are not the row's own")
        own = [weights[min(max(0, last - 1 - begin), len(said))] for _, last in offsets[start:stop]]
        return (own + [weights[-1]] * (count - len(own)))[:count]

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_mentioning(self, text):
        return self.mentioning.encode(text, add_special_tokens=False)

    @functools.cached_property
    def mentioning(self):
        """A copy of the tokenizer in which control tokens have WRITTEN in front: without it they are text."""
        def rename(token):
            return WRITTEN + token if token in self.chats.control_tokens else token
        parts = json.loads(self.backend.to_str()) | {"post_processor": None}
        model, vocab = parts["model"], parts["model"]["vocab"]
        model["vocab"] = ({rename(token): i for token, i in vocab.items()} if isinstance(vocab, dict)
                          else [[rename(token), score] for token, score in vocab])
        if merges := model.get("merges"):  # without those that make a control token
            control = {*self.chats.control_tokens}
            pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
            model["merges"] = [list(pair) for pair in pairs if not {*pair, "".join(pair)} & control]
        if model.get("unk_token"):
            model["unk_token"] = rename(model["unk_token"])
        for token in parts["added_tokens"]:
            token["content"] = rename(token["content"])
        return Tokenizer.from_str(json.dumps(parts))

    def cut(self, text, cuts, encode, encoding=None):
        encoding = encoding or encode(text)
        ids, places = encoding.ids, []
        for number, cut in enumerate(cuts):
            place = place_of(encoding, text, cut)
            if place is None:
                head = encode(text[:cut]).ids
                if ids[:len(head)] != head or (ids == head and text[cut:].strip()):
                    head, before = self.cut(text[:cut], cuts[:number], encode)
                    rest, after = self.cut_continued(text[cut:], [x - cut for x in cuts[number + 1:]], encode)
                    return head + rest, [*before, len(head), *(len(head) + place for place in after)]
                place = len(head)
            places.append(place)
        return ids, places

    def cut_continued(self, text, cuts, encode):
        """cut() of a text that continues another, without the space that some tokenizers put in front."""
        for anchor in "\n.a":
            head = encode(anchor).ids
            is_plain = head and anchor not in self.tokenizer.get_added_vocab()
            if is_plain and encode(anchor + text).ids[:len(head)] == head:
                ids, places = self.cut(anchor + text, [len(anchor) + cut for cut in cuts], encode)
                return ids[len(head):], [place - len(head) for place in places]
        return self.cut(text, cuts, encode)


def part_read(number, text, cuts):
    """From which place on the text of that number is encoded, of several that begin alike; see cut_alike."""
    return max(0, cuts[-2] - 64) if number and GUARD not in text else 0


def place_of(encoding, text, cut):
    """How many tokens stand before a place in the text; None where that cannot be told from the encoding.

    White space is split by what follows it, so before a cut it tells nothing; nor does a letter with whose
    mark, or Hangul part, a cut text goes on: normalizers join them.
    """
    if cut == 0:
        return 0
    joins = any(unicodedata.category(x)[0] == "M" or "\u1160" <= x < "\u1200" for x in text[cut:cut + 1])
    last = None if joins or text[cut - 1].isspace() else encoding.char_to_token(cut - 1)
    if last is None:
        return None
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1)[0] < cut:
        last += 1  # several tokens of one character
    return last + 1 if encoding.token_to_chars(last)[1] <= cut else None
