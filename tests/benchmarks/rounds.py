"""The same image every round: alone, together, and as predicted (results/rounds).

Run by hand: ``python -m tests.benchmarks.rounds``, or with ``--folder`` on images of one's own.
Gradients are simulated; the attacker knows the defence. Between rounds the model takes a step of
``--step`` on eight other images.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from statistics import median

import torch

from fedleak.attacks import make_attack, together
from fedleak.client.compute import gradient
from fedleak.client.replay import Replay
from fedleak.data import load_data
from fedleak.defences import defend, parse_defence
from fedleak.metric.jacobian import UpdateJacobian
from fedleak.metric.prediction import natural_prior, over_rounds
from fedleak.metric.reference import Reference, entry_errors
from fedleak.models import build_model
from fedleak.observation import Observation
from fedleak.quality import score

CASES = (
    ("cnn2-v2", "noise:0.1", 16), ("cnn2-v2", "noise:0.3", 16),
    ("cnn2-v2", "prune:0.9", 8), ("cnn2-v2", "prune:0.95", 8),
)  # fmt: skip
IMAGES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="Class folders of images; else digits of scikit-learn")
    parser.add_argument("--defence", action="append", default=[], help="One of those here alone")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--rounds", type=int, help="Fewer than 16 and 8")
    parser.add_argument("--step", type=float, default=0.5, help="Between rounds")
    options = parser.parse_args()
    images, _ = load_data("folder", options.folder) if options.folder else load_data("digits")
    attack, prior = make_attack("hybrid"), natural_prior(images.shape)
    print("| network | defence | rounds | image | median alone | best alone | together | gain "
          "| predicted after 1 | predicted after all | one more round |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for network, defence, rounds in CASES:
        if defence not in (options.defence or [defence]):
            continue
        rounds = min(rounds, options.rounds or rounds)
        spec, gains = parse_defence(defence), []
        for image in range(options.images):
            x, y = images.batch([image])
            model = build_model(network, images.shape, images.classes, seed=0)
            seen, references = [], []
            for n in range(rounds):
                sent = copy.deepcopy(model)
                update, _ = gradient(sent, x, y)
                noisy = defend(update, spec, 1000 * image + n)
                one = Observation.from_gradient(sent, noisy, images.shape, defence=spec)
                seen.append(replace(one, place=(n, 0)))
                jacobian = UpdateJacobian(Replay(sent, images.shape), x, y)
                exact = defend(jacobian.gradient, spec, 1000 * image + n)
                errors = entry_errors(jacobian.gradient, spec, exact)
                references.append(Reference(jacobian, exact, errors))
                others, _ = gradient(model, *images.batch(list(range(100 + 8 * n, 108 + 8 * n))))
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        p -= options.step * others[name]
            alone = [attack([o])[0] for o in seen]
            single = [score(a.images[0], x[0]).psnr_db for a in alone]
            joint = score(together(attack, seen, alone).images[0], x[0]).psnr_db
            told = over_rounds(references, prior)
            gains.append(joint - median(single))
            print(f"| {network} | {defence} | {rounds} | {image} | {median(single):.1f} "
                  f"| {max(single):.1f} | {joint:.1f} | {gains[-1]:+.1f} | {told[0]:.1f} "
                  f"| {told[-1]:.1f} | {told[-1] - told[-2]:+.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
