"""What finetuning on real photos gains on photos that were held out.

    python benchmarks/finetune.py --real DIR --out runs/finetune

Calls the public commands only (`lso pack`, `lso fit`). DIR holds `photos/` and `taesd/`. A fifth of the photos, chosen
by a hash of their names, is never trained on; before and after are measured on these.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from benchmarks.results_file import interval, write_section
from datamodules.shards import ShardSet
from lso_lightning.__main__ import main as lso
from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder
from lso_lightning.images import from_uint8, read_image

SIZE = 128  # pixels
HELD_OUT = 0.2


@torch.no_grad()
def measure(folder: Path, images: torch.Tensor) -> np.ndarray:
    """PSNR in dB and SSIM of each image's 8-bit round trip, ``(n, 2)``."""
    autoencoder, rows = Autoencoder(str(folder)), []
    for image in images.split(1):
        made = autoencoder.decode(autoencoder.encode(image))
        psnr = peak_signal_noise_ratio(made, image, data_range=1.0)
        rows.append([float(psnr), float(structural_similarity_index_measure(made, image, data_range=1.0))])
    return np.array(rows)


def cell(values: np.ndarray) -> str:
    """Mean and interval over photos."""
    mean, low, high = interval(values)
    return f"{mean:.4g} [{low:.4g}, {high:.4g}]"


def finetune(real: Path, packed: Path, run: Path, train: str, epochs: int) -> None:
    """One run of `lso fit`; a finished or killed one is continued."""
    fit = [
        "fit", "--config=train/vae_finetune", f"--data.shards={packed}", f"--model.folder={real / 'taesd'}",
        "--model.regularizer=lso_lightning.networks.NoRegularizer", f"--model.train={train}",
        "--model.optimizer.lr=1e-4", "--data.workers=0",
        f"--trainer.max_epochs={epochs}", f"--trainer.default_root_dir={run}", "--ckpt_path=last",
        "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.devices=1",
    ]  # fmt: skip
    try:
        lso(fit)
    except SystemExit as done:  # 0: a finished run, measured again
        if done.code:
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder with photos/ and taesd/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training photos")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    packed = args.out / "packed"
    lso(["pack", str(args.real / "photos"), str(packed), f"--size={SIZE}", f"--val={HELD_OUT}", "--shards=4"])
    shards = ShardSet(str(packed))
    names = sorted(str(name) for name in shards.table["name"][shards.rows("val")])
    images = from_uint8(torch.stack([read_image(args.real / "photos" / name, SIZE) for name in names]))
    before = measure(args.real / "taesd", images)
    lines = [
        f"{len(shards.rows('train'))} photos to train on, {len(names)} held out, {SIZE} px, TAESD, {args.epochs} epochs"
        f" of batches of 8 on {args.threads} threads; means over held-out photos with 95 % bootstrap intervals.",
        "",
        "| trained | PSNR, dB | gain, dB | SSIM | gain | photos that gain |",
        "|---|---|---|---|---|---|",
        f"| nothing | {cell(before[:, 0])} | | {cell(before[:, 1])} | | |",
    ]
    for train in ("all", "decoder"):
        finetune(args.real, packed, args.out / train, train, args.epochs)
        after = measure(args.out / train / "export", images)
        gain = after - before
        lines.append(
            f"| {train} | {cell(after[:, 0])} | {cell(gain[:, 0])} | {cell(after[:, 1])}"
            f" | {cell(gain[:, 1])} | {(gain[:, 0] > 0).sum()} of {len(gain)} |"
        )
    write_section("finetune", f"python benchmarks/finetune.py --real DIR --epochs {args.epochs}", lines)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
