"""The toy world: what its rows are, what an answer is worth, and what the best possible policy reaches."""

import math

import pytest

from engine.toy import toy, toy_optimal_reward, toy_scores


def test_toy_scores():
    praise = " The plot was superb. The acting was fresh. The camera was moving. The plot was clever."
    mixed = " The plot was superb. The acting was dull. The camera was moving. The plot was clever."
    blame = " The plot was dull. The acting was dull. The camera was weak. The plot was awful."
    assert toy_scores("", praise, True) == {"reward": 4.0, "well_formed": 1.0}
    assert toy_scores("", mixed, True) == {"reward": 2.0, "well_formed": 1.0}
    assert toy_scores("", blame, True) == {"reward": -4.0, "well_formed": 1.0}
    for text, finished in ((praise, False), (praise[1:], True), (praise + " The plot was fresh.", True),
                           (praise.replace("superb", "nice"), True), (praise + " ", True), ("", True)):
        assert toy_scores("", text, finished) == {"reward": -4.0, "well_formed": 0.0}


def test_toy_pairs():
    rows = toy("train", True)
    assert len(rows) == 16384 and rows == toy("train", True)
    held_out = toy("test", True)
    assert len(held_out) == 1024 and held_out != rows[:1024]
    for row in rows[:500]:
        for name in ("chosen", "rejected"):
            assert toy_scores("", row[name], True) == {"reward": row[f"{name}_reward"], "well_formed": 1.0}
    # Bradley-Terry: of pairs 2 apart the better is chosen with probability 1 / (1 + e^-2) = 0.881, of those
    # 4 apart with 1 / (1 + e^-4) = 0.982; these are about 7,000 and 3,600 of them
    gaps = [row["chosen_reward"] - row["rejected_reward"] for row in rows]
    for gap, probability in ((2, 0.881), (4, 0.982)):
        share = gaps.count(gap) / (gaps.count(gap) + gaps.count(-gap))
        assert share == pytest.approx(probability, abs=0.02)


def test_toy_responses_are_others_and_praise_as_often_as_they_blame():
    rows, chosen = toy("train", False), {row["chosen"] for row in toy("train", True)}
    # of 72^4 = 27 million reviews 16,384 are chosen, so of 2,000 fresh ones one or two are
    assert sum(row["response"] in chosen for row in rows[:2000]) < 10
    rewards = [toy_scores(row["prompt"], row["response"], True)["reward"] for row in rows]
    # of 4 sentences of +-1, so with a deviation of 2; the mean's is 2 / sqrt(16384) = 0.016
    assert sum(rewards) / len(rewards) == pytest.approx(0, abs=0.08)
    assert sum(reward ** 2 for reward in rewards) / len(rewards) == pytest.approx(4, abs=0.3)


def test_toy_optimum_by_another_route():
    # maximise E_q[r] - lambda KL(q || p) over the five counts of praise: q ~ binomial(4, 1/2) e^(r / lambda)
    for strength in (0.5, 1.0, 2.0, 5.0):
        weights = [math.comb(4, k) / 16 * math.exp((2 * k - 4) / strength) for k in range(5)]
        q = [weight / sum(weights) for weight in weights]
        kl = sum(x * math.log(x / (math.comb(4, k) / 16)) for k, x in enumerate(q))
        reward = sum(x * (2 * k - 4) for k, x in enumerate(q))
        assert toy_optimal_reward(kl) == pytest.approx(reward, abs=1e-6)
    assert toy_optimal_reward(0) == pytest.approx(0, abs=1e-6)
    assert toy_optimal_reward(3) == 4.0
