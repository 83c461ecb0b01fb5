"""What our `fit` costs over a bare PyTorch loop: 64 rows, real Stable Diffusion latents (TAESD), 128 pixels.

    python benchmarks/step_overhead.py --real DIR

Rounds of the real command line (archive, checkpoint, TensorBoard, progress included) and steps of a bare loop
alternate in one process, so a machine whose speed drifts slows both alike; the ratio is taken pair by pair.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.results_file import write_section
from lso_lightning.__main__ import main as lso


class BareLoop(Callback):
    """After each round of the fit, one step of the same search written as a plain loop."""

    ours: list[float] = []
    bare: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.z = pl_module.table.z.detach().clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.z], lr=0.05)
        self.batches = [(b.rows, b.starts, b.context) for b in pl_module._micro_batches]
        self.began: float | None = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.began is not None:  # the last round ends here, its checkpoint written
            self.ours.append(time.perf_counter() - self.began)
            began = time.perf_counter()
            with torch.enable_grad():
                self.step(pl_module.space, pl_module.measures.objective, pl_module.measures.faithfulness)
            self.bare.append(time.perf_counter() - began)
        self.began = time.perf_counter()

    def step(self, space: Any, objective: Any, faithfulness: Any) -> None:
        self.optimizer.zero_grad()
        for rows, starts, context in self.batches:
            images = space.decode(self.z[rows], context)
            loss = -objective(images) - 10 * faithfulness(images, starts)
            loss.sum().backward()
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, required=True, help="folder with photos/, taesd/ and faces.py")
    parser.add_argument("--rounds", type=int, default=20, help="counted pairs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lso([
            "fit", "--config=optimize/autoencoder_gradient.yaml", f"--data.source={args.real / 'photos'}",
            "--data.size=128", "--data.count=64",
            f"--model.space.init_args.generator.init_args.folder={args.real / 'taesd'}",
            f"--model.objective={args.real / 'faces.py'}:SmileScore",
            f"--model.faithfulness={args.real / 'faces.py'}:IdentityProxy", "--model.floor=0.85",
            "--model.views=null", f"--trainer.max_epochs={args.rounds + 2}", f"--trainer.default_root_dir={folder}/run",
            "--trainer.callbacks+=benchmarks.step_overhead.BareLoop",
        ])  # fmt: skip
    from benchmarks.step_overhead import BareLoop as Counted  # the class that Lightning made, not __main__'s

    ours, bare = Counted.ours[1:], Counted.bare[1:]  # the first pair warms up
    ratios = sorted(a / b for a, b in zip(ours, bare, strict=True))
    middle = statistics.median(ratios)
    lines = [
        "64 rows, 128 px, TAESD, SmileScore and IdentityProxy, micro-batches of 8, CPU,"
        f" {torch.get_num_threads()} threads; {len(ratios)} pairs in one process. The bare step makes one backward pass"
        " for a weighted sum; ours makes two through the scorers and one through the decoder, keeps a floor per row,"
        " and its time includes archive, checkpoint and logs.",
        "",
        "| | median | min | max |",
        "|---|---|---|---|",
        f"| round of `lso fit` / step of a bare loop | {middle:.3f} | {ratios[0]:.3f} | {ratios[-1]:.3f} |",
        f"| total of all rounds / total of all steps | {sum(ours) / sum(bare):.3f} | | |",
        f"| seconds, `lso fit` | {statistics.median(ours):.2f} | {min(ours):.2f} | {max(ours):.2f} |",
        f"| seconds, bare loop | {statistics.median(bare):.2f} | {min(bare):.2f} | {max(bare):.2f} |",
    ]
    write_section("step_overhead", f"python benchmarks/step_overhead.py --real DIR --rounds {args.rounds}", lines)


if __name__ == "__main__":
    main()
