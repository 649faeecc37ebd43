"""Reward against KL on toy, method by method and beta by beta, beside the best that any policy can do.

    python tests/benchmarks/frontier.py [--seed 0] [--methods DPO IPO ...] [--steps 512] [--runs FOLDER]

Trains one SFT model, then every method of METHODS from it, one process per core; a run that is there already
is not repeated. Prints a table in Markdown and draws assets/frontier.png (needs matplotlib). About a quarter
of an hour on two cores. The counterpart of Figure 2 of the DPO paper (arXiv:2305.18290), with the optimum
known.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from engine.toy import toy, toy_optimal_reward

BETAS = (0.5, 1, 2, 4)
METHODS = {  # name: settings, and the betas
    "DPO": ("loss=dpo dpo.sft_weight=0.05", BETAS),
    "cDPO, e = 0.1": ("loss=dpo dpo.sft_weight=0.05 dpo.label_smoothing=0.1", BETAS),
    "IPO": ("loss=ipo ipo.sft_weight=0.1", (0.1, 0.2, 0.4, 0.8)),
    "RPO, bwd_kl": ("loss=rpo rpo.sft_weight=0.05", BETAS),
    "RPO, fwd_kl": ("loss=rpo rpo.sft_weight=0.05 rpo.divergence=fwd_kl", BETAS),
    "RPO, sq": ("loss=rpo rpo.sft_weight=0.05 rpo.divergence=sq", BETAS),
    "SPIN on chosen": ("loss=spin spin.max_tokens=32 spin.sft_weight=0.05", BETAS),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="beginnings of METHODS' names")
    parser.add_argument("--steps", type=int, default=512, help="optimizer steps of every method")
    parser.add_argument("--sft_steps", type=int, default=768)
    parser.add_argument("--runs", default=os.path.join(ROOT, "runs", "frontier"))
    parser.add_argument("--picture", default=os.path.join(ROOT, "assets", "frontier.png"))
    arguments = parser.parse_args()
    folder = os.path.join(arguments.runs, f"seed-{arguments.seed}-{arguments.sft_steps}-{arguments.steps}")
    os.makedirs(folder, exist_ok=True)
    pairs = os.path.join(folder, "pairs.jsonl")  # for SPIN, which on toy itself reads unlabelled responses
    with open(pairs, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in toy("train", True))

    def train(name, *settings):
        """Runs train.py, or finds the run there; returns its last evaluation."""
        run_dir = os.path.join(folder, name)
        command = [sys.executable, os.path.join(ROOT, "train.py"), *settings, f"run_dir={run_dir}",
                   f"seed={arguments.seed}", "resume=auto", "eval_first=false", "eval_every=100000",
                   "save_every=0"]
        if not os.path.exists(os.path.join(run_dir, "done")):
            print(name, flush=True)
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                                  text=True)
            if done.returncode:
                sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            open(os.path.join(run_dir, "done"), "w").close()
        with open(os.path.join(run_dir, "metrics.jsonl"), encoding="utf-8") as file:
            return [line for line in map(json.loads, file) if line["split"] == "eval"][-1]

    def align(method, settings, beta):
        settings = settings.split()
        loss = settings[0].removeprefix("loss=")
        name = "-".join(method.replace(",", "").replace(" =", "").split() + [str(beta)])
        steps = arguments.steps // 2 if loss == "spin" else arguments.steps  # of each of the two iterations
        source = [f"data={pairs}", "eval_data=toy"] if loss == "spin" else []
        line = train(name, *settings, *source, f"model={sft}", "lr=2e-4", f"num_epochs={steps / 512}",
                     f"{loss}.beta={beta}")
        if loss == "spin":  # its reference moves: measure against the SFT model
            line = train(name + "-measured", "loss=dpo", "max_steps=0",
                         f"model={os.path.join(folder, name, 'LATEST')}", f"reference={sft}")
        return {"method": method, "beta": beta, **line}

    train("sft", f"max_steps={arguments.sft_steps}")
    sft = os.path.realpath(os.path.join(folder, "sft", "LATEST"))
    jobs = [(method, settings, beta) for method, (settings, betas) in METHODS.items() for beta in betas
            if method.startswith(tuple(arguments.methods))]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        points = list(pool.map(lambda job: align(*job), jobs))
    print(table(points))
    draw(points, arguments)


def table(points):
    lines = ["| method | beta | well formed | reward | KL, nats | best reward at that KL | efficiency |",
             "|---|---|---|---|---|---|---|"]
    for point in points:
        reward, well_formed, kl, best, efficiency = (point[f"samples/{name}"] for name in (
            "reward", "well_formed", "kl", "optimal_reward", "efficiency"))
        lines.append(f"| {point['method']} | {point['beta']} | {well_formed:.3f} | {reward:.2f} | {kl:.2f} | "
                     f"{best:.2f} | {'-' if efficiency is None else format(efficiency, '.3f')} |")
    return "\n".join(lines)


def draw(points, arguments):
    try:
        import matplotlib
    except ImportError:
        sys.exit("the table is above; for the picture: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    widest = max(point["samples/kl"] for point in points) * 1.05
    grid = [widest * i / 400 for i in range(401)]
    axes.plot(grid, [toy_optimal_reward(kl) for kl in grid], color="black", label="best possible")
    for number, method in enumerate(dict.fromkeys(point["method"] for point in points)):
        line = [(p["samples/kl"], p["samples/reward"]) for p in points if p["method"] == method]  # by beta
        axes.plot(*zip(*line), marker="osD^v<>"[number % 7], markersize=6, linewidth=1, alpha=0.85,
                  label=method)
    axes.set_xlabel("KL of the policy from its SFT model, nats per response")
    axes.set_ylabel("mean reward of 1,024 samples (-4 to 4)")
    axes.set_title(f"toy, seed {arguments.seed}, {arguments.steps} steps of 32 pairs; a point for each beta")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    os.makedirs(os.path.dirname(os.path.abspath(arguments.picture)), exist_ok=True)
    figure.savefig(arguments.picture, dpi=120)
    print(f"{arguments.picture} is drawn")


if __name__ == "__main__":
    main()
