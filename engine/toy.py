"""What is the toy world, and what is the best possible there?"""

import math
import random
import re

ADJECTIVES = "Silent Golden Hidden Broken Distant Paper Winter Burning Lonely Crooked".split()
NOUNS = "Garden River Letter Harbor Mirror Station Kingdom Summer Orchard Witness".split()
ASPECTS = "acting plot music pacing script camera".split()
PRAISE = "brilliant moving clever gripping superb fresh".split()
BLAME = "dull clumsy tired bland weak awful".split()
REVIEW = re.compile(rf"( The ({'|'.join(ASPECTS)}) was ({'|'.join(PRAISE + BLAME)})\.){{4}}")


def toy(split: str, pairs: bool) -> list[dict]:
    """Film reviews of four sentences, " The ASPECT was WORD.", each praise with probability 1/2.

    Pairs are labelled by Bradley-Terry on the true rewards; without pairs the rows are fresh, unlabelled
    responses. The rows are the same in every run, whatever its seed.
    """
    rng = random.Random(f"toy {split} {pairs}")

    def review():
        words = [rng.choice(rng.choice([PRAISE, BLAME])) for _ in range(4)]
        return "".join(f" The {rng.choice(ASPECTS)} was {word}." for word in words)

    rows = []
    for _ in range(16384 if split == "train" else 1024):
        prompt = f"Review of The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}:"
        if not pairs:
            rows.append({"prompt": prompt, "response": review()})
            continue
        answers = [review(), review()]
        rewards = [toy_scores(prompt, answer, True)["reward"] for answer in answers]
        w = 0 if rng.random() < 1 / (1 + math.exp(rewards[1] - rewards[0])) else 1
        rows.append({"prompt": prompt, "chosen": answers[w], "rejected": answers[1 - w],
                     "chosen_reward": rewards[w], "rejected_reward": rewards[1 - w]})
    return rows


def toy_scores(prompt: str, response: str, finished: bool) -> dict[str, float]:
    """True reward of a response: praise minus blame, from -4 to 4, and -4 for what is not well formed.

    finished: whether the end-of-sequence token came within the token limit.
    """
    if not finished or not REVIEW.fullmatch(response):
        return {"reward": -4.0, "well_formed": 0.0}
    num_praise = sum(response.count(f" was {word}.") for word in PRAISE)
    return {"reward": float(2 * num_praise - 4), "well_formed": 1.0}


def toy_optimal_reward(kl: float) -> float:
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
