"""Published losses, a page each in tests/forks, put into a copy of the project as the README says: the
first loss is what plain code says, the curve is the same however it is cut, a resumed run is a whole one."""

import difflib
import functools
import glob
import math
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import (FEW_ROWS, ROOT, adopt, copy_project, losses_of, made_once, numbers, pieces_of,
                      read_lines, same_weights, write_lines)
from on_ranks import answers, begin
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.toy import toy_scores

pytestmark = pytest.mark.xdist_group("forks")  # one worker has the process that forks
FORKS = sorted(path[:-3] for path in os.listdir(os.path.join(ROOT, "tests", "forks")))
DATASETS = {"kto": "toy_feedback", "plackett_luce": "toy_lists", "turns": "toy_turns"}  # others: few.jsonl
LATER = ("iterative_dpo", "rdpo", "simpo", "wpo", "kto")  # whose seams others show too
LOSSES = {"turns": "dpo", "on_policy_distillation": "on_policy_kd"}
SETTINGS = {  # other than the defaults, so that a setting that is not read shows
    "simpo": ["simpo.beta=2", "simpo.gamma=0.5"], "kto": ["kto.beta=0.5"],
    "tdpo": ["tdpo.beta=0.5", "tdpo.alpha=0.7"],
    "plackett_luce": ["plackett_luce.beta=0.5"], "aot": ["aot.beta=0.5"], "wpo": ["wpo.beta=0.5"],
    "trdpo": ["trdpo.beta=0.5", "trdpo.every=2"], "rdpo": ["rdpo.beta=0.5", "rdpo.flipped=0.2"],
    "turns": ["dpo.beta=0.5"],
    "online_dpo": ["online_dpo.beta=0.5", "online_dpo.max_tokens=32", "online_dpo.num_prompts=12",
                   "online_dpo.iterations=3", "num_epochs=4", "eval_data=toy", "eval_every=0"],
    "iterative_dpo": ["iterative_dpo.beta=0.5", "iterative_dpo.max_tokens=32", "iterative_dpo.num_prompts=12",
                      "num_epochs=4", "eval_every=0"],
    "on_policy_distillation": ["on_policy_kd.num_prompts=12", "on_policy_kd.max_tokens=32", "num_epochs=2",
                               "eval_every=0"]}
# While policy and reference are one, all log-ratios are 0. DPO and those built on it: -log sigmoid(0) = log 2
# too, which no weight of turns and no sorting changes; TDPO's KLs are 0 too; rDPO's is
# ((1 - e) log 2 - e log 2) / (1 - 2e) = log 2.
# KTO: 1 - sigmoid(0) = 1/2 of every row. Plackett-Luce: each order of four has probability 1/24.
START = {"kto": 0.5, "plackett_luce": math.log(24)} | dict.fromkeys(
    ("tdpo", "aot", "trdpo", "online_dpo", "iterative_dpo", "rdpo", "turns"), math.log(2))


# ---------------------------------------------------------------- copies, data and models


@functools.cache
def page(name):
    with open(os.path.join(ROOT, "tests", "forks", name + ".md"), encoding="utf-8") as file:
        return file.read()


@pytest.fixture(scope="session")
def fork(tmp_path_factory):
    """fork("kto") is a copy of the project that has adopted that page."""
    @functools.cache
    def make(name):
        copy = copy_project(tmp_path_factory.mktemp(name))
        adopt(copy, page(name))
        return copy
    return make


@pytest.fixture(scope="session")
def other(sft_run, tmp_path_factory):
    """A reference that is not where the policy begins."""
    def make(folder):
        model = AutoModelForCausalLM.from_pretrained(f"{sft_run}/LATEST")
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.02 * torch.randn_like(p)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(f"{sft_run}/LATEST").save_pretrained(folder)
    return made_once(tmp_path_factory, "other", make)


def rows_of(name, fork):
    """30 rows, of the fork's own dataset where it has one."""
    if name not in DATASETS:
        return read_lines(FEW_ROWS)[:30]
    (rows,), printed = answers(begin(1, DATASETS[name], 30, function="rows", project=str(fork(name))))
    assert isinstance(rows, list), printed
    return rows


def do(name, num_ranks, fork, *runs):
    """Starts runs of a fork, one after another in one process on each rank."""
    return begin(num_ranks, *runs, function="several", trouble="exact_norms", project=str(fork(name)),
                 seconds=200)


def settings_of(name, sft_run):
    return [f"loss={LOSSES.get(name, name)}", f"model={sft_run}/LATEST", "data=rows.jsonl",
            "eval_data=rows.jsonl", "num_eval_examples=9", "num_samples=0", "batch_size=8", "num_epochs=2",
            "lr=1e-3", "warmup_steps=2", "lr_schedule=constant", "dtype=float64", "compute_dtype=float64",
            "eval_every=3", *SETTINGS[name]]


# ---------------------------------------------------------------- the first loss, by plain code


class Plain:
    """What policy and reference say of responses, one at a time; logits in full."""

    def __init__(self, *folders):
        self.tokenizer = AutoTokenizer.from_pretrained(folders[0])
        self.models = [AutoModelForCausalLM.from_pretrained(x, dtype=torch.float64).eval() for x in folders]
        self.read = functools.cache(self.read)

    @torch.no_grad()
    def read(self, prompt, response):
        """[the policy's log-probabilities (T, V), the reference's], and the T tokens of response and end."""
        start = len(self.tokenizer(prompt)["input_ids"])
        ids = torch.tensor([*self.tokenizer(prompt + response)["input_ids"], self.tokenizer.eos_token_id])
        logps = [model(input_ids=ids[None], use_cache=False).logits[0, start - 1:-1].log_softmax(-1)
                 for model in self.models]
        return logps, ids[start:]

    def own(self, prompt, response):
        """Of each model, the log-probabilities of the response's tokens (T,)."""
        logps, ids = self.read(prompt, response)
        return [x[range(len(ids)), ids] for x in logps]

    def ratio(self, prompt, response, weights=1):
        policy, reference = self.own(prompt, response)
        return float(((policy - reference) * weights).sum())

    def pairs(self, rows, function=None):
        """[[of chosen, of rejected], ...] the log-ratio or another function of prompt and response."""
        return [[(function or self.ratio)(row["prompt"], row[name]) for name in ("chosen", "rejected")]
                for row in rows]


def softplus(x):
    return math.log1p(math.exp(x))  # softplus(-x) = -log sigmoid(x)


def simpo(plain, rows):
    pairs = plain.pairs(rows, lambda *texts: float(plain.own(*texts)[0].mean()))
    return [softplus(-(2 * (w - l) - 0.5)) for w, l in pairs]


def kto(plain, rows):
    kl = sum(plain.ratio(row["prompt"], rows[(i + 2) % 30]["completion"]) for i, row in enumerate(rows)) / 30
    assert kl > 0.1 and sum(row["label"] for row in rows) == 15  # or these would not be seen
    margins = [0.5 * (plain.ratio(row["prompt"], row["completion"]) - kl) for row in rows]
    return [1.5 / (1 + math.exp(x)) if row["label"] else 0.7 / (1 + math.exp(-x))
            for x, row in zip(margins, rows)]


def tdpo(plain, rows):
    def kl(*texts):
        policy, reference = plain.read(*texts)[0]
        return float((reference.exp() * (reference - policy)).sum())
    return [softplus(-0.5 * (w - l - 0.7 * (kl_l - kl_w)))
            for (w, l), (kl_w, kl_l) in zip(plain.pairs(rows), plain.pairs(rows, kl))]


def plackett_luce(plain, rows):
    losses = []
    for row in rows:
        ordered = sorted(zip(row["ranks"], row["responses"]))
        rewards = [0.5 * plain.ratio(row["prompt"], text) for _, text in ordered]
        losses.append(-sum(math.log(math.exp(x) / sum(map(math.exp, rewards[k:])))
                           for k, x in enumerate(rewards)))
    return losses


def aot(plain, rows):
    chosen, rejected = map(sorted, zip(*plain.pairs(rows)))
    return [softplus(-0.5 * (w - l)) for w, l in zip(chosen, rejected)]


def wpo(plain, rows):
    def weight(*texts):
        (policy, _), ids = plain.read(*texts)
        return math.prod(float(p[i] / p.square().sum()) for p, i in zip(policy.exp(), ids)) ** (1 / len(ids))
    return [a * b * softplus(-0.5 * (w - l))
            for (w, l), (a, b) in zip(plain.pairs(rows), plain.pairs(rows, weight))]


def trdpo(plain, rows):
    return [softplus(-0.5 * (w - l)) for w, l in plain.pairs(rows)]


def rdpo(plain, rows):
    return [(0.8 * softplus(-0.5 * (w - l)) - 0.2 * softplus(0.5 * (w - l))) / 0.6
            for w, l in plain.pairs(rows)]


def turns(plain, rows):
    def discounted(prompt, response):
        tokens, turn, weights = plain.read(prompt, response)[1].tolist(), 0, []
        for token in tokens:
            weights.append(0.8**min(turn, 3))  # the end is the last sentence's
            turn += "." in plain.tokenizer.decode(token)
        assert turn == 4
        return plain.ratio(prompt, response, torch.tensor(weights))
    return [softplus(-0.5 * (w - l)) for w, l in plain.pairs(rows, discounted)]


def online_dpo(plain, rows):
    """Of the answers that the run has drawn: where each found its end, text says all."""
    drawn, pairs = read_lines("by_hand/generated-00.jsonl"), []
    prompts = [line["prompt"] for line in drawn[::2]]
    for prompt, *group in zip(prompts, drawn[::2], drawn[1::2]):
        assert {line["prompt"] for line in group} == {prompt}
        scored = [(toy_scores(prompt, line["response"], line["finished"])["reward"], line["ids"])
                  for line in group]
        best, worst = max(scored, key=lambda x: x[0])[1], min(scored, key=lambda x: x[0])[1]
        if len({reward for reward, _ in scored}) > 1:
            pairs.append((prompt, best, worst))
    assert 2 < len(pairs) < len(prompts) == 12
    return [softplus(-0.5 * (ids_ratio(plain, prompt, w) - ids_ratio(plain, prompt, l)))
            for prompt, w, l in pairs]


def iterative_dpo(plain, rows):
    """Of the answers that the run has drawn, by the scores that it has kept."""
    drawn, scores, losses = read_lines("by_hand/generated-00.jsonl"), read_lines("by_hand/rewards.jsonl"), []
    assert len(drawn) == 24 and len(scores) == 12
    for first, second, line in zip(drawn[::2], drawn[1::2], scores):
        assert first["where"] == second["where"] == line["where"]
        gap = ids_ratio(plain, first["prompt"], first["ids"])
        gap -= ids_ratio(plain, first["prompt"], second["ids"])
        if line["chosen_reward"] != line["rejected_reward"]:  # of the first answer, and of the second
            is_first = line["chosen_reward"] > line["rejected_reward"]
            losses.append(softplus(-0.5 * gap if is_first else 0.5 * gap))
    assert len(losses) > 2
    return losses


def on_policy_distillation(plain, rows):
    """KL(student || teacher) at each token of the answers that the run has drawn."""
    losses = []
    for line in read_lines("by_hand/generated-00.jsonl"):
        student, teacher = of_ids(plain, line["prompt"], line["ids"])
        losses += (student.exp() * (student - teacher)).sum(-1).tolist()
    assert len(losses) > 60
    return losses


def ids_ratio(plain, prompt, ids):
    policy, reference = (float(x[range(len(ids)), ids].sum()) for x in of_ids(plain, prompt, ids))
    return policy - reference


@torch.no_grad()
def of_ids(plain, prompt, ids):
    """What each model says at an answer's tokens: log-probabilities (T, V)."""
    start = plain.tokenizer(prompt)["input_ids"]
    return [model(input_ids=torch.tensor([[*start, *ids]])).logits[0, len(start) - 1:-1].log_softmax(-1)
            for model in plain.models]


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LATER else name
                                  for name in FORKS])
def test_a_fork(name, fork, sft_run, other, request):
    """One microbatch, several without a cache, two ranks; stopped at half and resumed; the first loss."""
    rows = rows_of(name, fork)
    write_lines("rows.jsonl", rows)
    common = settings_of(name, sft_run)
    if name == "iterative_dpo":
        common.append(f"reward_model={request.getfixturevalue('rm_run')}/LATEST")
    if name == "on_policy_distillation":  # whose teacher is another model from the start
        common.append(f"reference={other}")
    by_hand = [*common, "batch_size=30", "num_eval_examples=4", "eval_every=0", "run_dir=by_hand",
               "max_steps=1",
               *{"simpo": [], "kto": ["kto.desirable_weight=1.5", "kto.undesirable_weight=0.7"],
                 "trdpo": ["trdpo.every=1"], "online_dpo": ["online_dpo.num_answers=2", "num_epochs=1"],
                 "iterative_dpo": ["iterative_dpo.num_answers=2", "num_epochs=1"],
                 "on_policy_distillation": ["num_epochs=1"]}.get(name, [])]
    by_hand += [] if name == "simpo" else [f"reference={other}"]
    whole = [*common, "max_steps=6"]
    jobs = [do(name, 2, fork, [*whole, "reference_cache=two", "run_dir=ranks"]),
            do(name, 1, fork, [*whole, "run_dir=whole"],
               [*whole, "max_tokens_per_microbatch=300", "reference_cache=false", "run_dir=cut"],
               [*common, "max_steps=3", "run_dir=part"], ["resume=true", "max_steps=6", "run_dir=part"],
               by_hand)]
    for job, expected in zip(jobs, ([[0]] * 2, [[0] * 5])):
        given, printed = answers(job)
        assert given == expected, f"{given}\n{printed[-5000:]}"

    # The curve: the same however it is cut; of a resumed run bit for bit.
    curve = losses_of("whole")
    assert len(curve) == 6 and max(curve) - min(curve) > 1e-3
    for run in ("cut", "ranks"):
        assert losses_of(run) == pytest.approx(curve, rel=1e-9, abs=1e-12)
        assert_same_numbers(run, "whole")
    assert numbers("part") == numbers("whole") and same_weights("part", "whole")

    # The loss before the first update.
    if name == "wpo":  # log 2, by each pair's weight
        assert curve[0] == pytest.approx(math.log(2) * losses_line("whole")["wpo/weights"], rel=1e-12)
    elif name in START:
        assert curve[0] == pytest.approx(START[name], rel=1e-12)
    plain = Plain(f"{sft_run}/LATEST", other)
    expected = globals()[name](plain, rows)
    assert losses_of("by_hand") == [pytest.approx(sum(expected) / len(expected), rel=1e-6)]  # float32's norms
    if name == "trdpo":  # after this step the reference has gone 0.6 of its way to the policy
        moved, policy, began = (load_file(path) for path in (
            "by_hand/LATEST/trainer_state/reference.safetensors", "by_hand/LATEST/model.safetensors",
            f"{other}/model.safetensors"))
        for key in began.keys() & moved.keys():
            assert torch.allclose(moved[key], 0.6 * policy[key] + 0.4 * began[key].double(), atol=1e-12)


def losses_line(folder):
    return next(line for line in read_lines(f"{folder}/metrics.jsonl") if line["split"] == "train")


def assert_same_numbers(folder, other):
    for line, expected in zip(numbers(folder), numbers(other), strict=True):
        if abs(expected.get("rewards/margins", 1)) < 1e-9:  # all are 0, and rounding says which is larger
            del line["rewards/accuracies"], expected["rewards/accuracies"]
        assert line == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_fork_is_at_most_forty_lines_and_changes_nothing_else(fork):
    for name in FORKS:
        lines = "".join(pieces_of(page(name)).values()).splitlines()
        count = sum(1 for line in lines if line.strip())
        print(f"{name:15} {count} lines")
        assert 3 <= count <= 40, name
        for path in sorted(glob.glob("**/*.py", root_dir=ROOT, recursive=True)) + ["config.yaml"]:
            if path.startswith("tests"):
                continue
            before, after = (open(os.path.join(root, path), encoding="utf-8").read().splitlines()
                             for root in (ROOT, fork(name)))
            changed = [line for line in difflib.unified_diff(before, after, n=0)
                       if line[:3] not in ("---", "+++")]
            assert not any(line.startswith("-") for line in changed), (name, path)
            assert not changed or path in ("losses.py", "config.yaml", "data.py"), (name, path)


@pytest.fixture(scope="session")
def whole_sft(tmp_path_factory):
    """The SFT run of the README's first command, in full: its folder."""
    def make(folder):
        subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), f"run_dir={folder}"], check=True)
    return made_once(tmp_path_factory, "whole_sft", make)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORKS)
def test_the_command_of_a_page(name, fork, whole_sft, request):
    """200 steps on toy. What has a reference comes near the best reward at its KL; SimPO has none, and widens
    its margins."""
    command = re.search(r"```bash\npython train.py (.*?)```", page(name), re.S)[1].replace("\\\n", " ")
    os.makedirs("runs/sft")
    os.symlink(os.path.realpath(f"{whole_sft}/LATEST"), "runs/sft/LATEST")
    if "runs/rm/" in command:
        subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), "loss=rm", "model=runs/sft/LATEST",
                        "lr=2e-4", "num_epochs=1", "eval_every=0", "run_dir=runs/rm"], check=True)
    if "runs/short/" in command:
        subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), "max_steps=60", "eval_every=0",
                        "run_dir=runs/short"], check=True)
    command = [sys.executable, str(fork(name) / "train.py"), *shlex.split(command), "run_dir=run"]
    subprocess.run(command, check=True)
    evaluated = [line for line in read_lines("run/metrics.jsonl") if line["split"] == "eval"]
    first, last = evaluated[0], evaluated[-1]
    print(name, {key: last.get(key) for key in ("samples/efficiency", "samples/kl", "samples/well_formed")})
    if name == "online_dpo":  # a step an iteration, but where no prompt gave a pair
        assert last["iteration"] == 199 and 190 <= len(losses_of("run")) <= 200
    else:
        assert len(losses_of("run")) == 200
    if name == "simpo":
        assert last["loss"] < 0.6 * first["loss"] and last["rewards/accuracies"] > first["rewards/accuracies"]
    elif name == "on_policy_distillation":  # a student that was half trained comes near its teacher
        assert last["samples/kl"] < min(2, first["samples/kl"]) and last["samples/well_formed"] > 0.8
    else:
        assert last["samples/efficiency"] > 0.7 and last["samples/well_formed"] > 0.8
        assert last["samples/win_rate"] > 0.7 and last["samples/kl"] > 0.1
