"""What our sampling loop costs over diffusers' pipeline, and how its memory grows with the steps of a gradient.

    python benchmarks/sampling.py --folder miniature

Pipeline and loop alternate in one process on the same weights, noise and texts, from prompt to pictures, so a machine
whose speed drifts slows both alike; the ratio is taken pair by pair. Memory is that of processes of their own: how far
the most that was resident lies above what was before sampling (Linux).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.results_file import write_section
from lso_lightning.errors import UserError
from lso_lightning.generators import Diffusion
from lso_lightning.generators.shipped import folder_of

PROMPT = "a smiling person with glasses"
FEW, MANY = 10, 50  # steps


def timed(work: Callable[[], object]) -> float:
    """Seconds of the process, which a busy machine changes less than those of a clock."""
    began = time.process_time()
    work()
    return time.process_time() - began


@torch.inference_mode()  # as `lso generate`
def paired(folder: str, batch: int, steps: int, pairs: int) -> tuple[list[float], list[float]]:
    """Processor seconds of each turn of the pipeline and of our loop."""
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder_of(folder), torch_dtype=torch.float32, low_cpu_mem_usage=False, safety_checker=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    diffusion = Diffusion(folder, steps=steps)
    noise = diffusion.noise(range(batch), 0)

    def theirs() -> torch.Tensor:
        return pipeline(
            PROMPT, num_images_per_prompt=batch, num_inference_steps=steps, latents=noise, output_type="pt"
        ).images

    def ours() -> torch.Tensor:
        return diffusion.decode(diffusion.sample(noise, diffusion.encode_text([PROMPT])))

    difference = (theirs() - ours()).abs().max()  # warms up, too
    if difference > 1 / 255:
        sys.exit(f"error: the pictures differ by {difference:.4f}")
    turns = [(timed(theirs), timed(ours)) for _ in range(pairs)]
    return [turn[0] for turn in turns], [turn[1] for turn in turns]


def resident(name: str) -> int:
    """A number of the process in bytes: VmRSS (now) or VmHWM (the most)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def print_growth(folder: str, batch: int, steps: int, checkpointing: bool) -> None:
    """Bytes that a gradient of a sampling takes at most, in a fresh process."""
    diffusion = Diffusion(folder, steps=steps, checkpointing=checkpointing)
    noise, text = diffusion.noise(range(batch), 0).requires_grad_(), diffusion.encode_text([PROMPT])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = resident("VmRSS")
    diffusion.sample(noise, text).square().mean().backward()
    print(resident("VmHWM") - before)


def growth(folder: str, batch: int, steps: int, checkpointing: bool, repeats: int) -> float:
    """MiB, the median of processes."""
    command = [sys.executable, __file__, "--folder", folder, "--batch", str(batch), "--growth", str(steps)]
    runs = [
        subprocess.run([*command, *(["--checkpointing"] if checkpointing else [])], capture_output=True, text=True,
                       check=True) for _ in range(repeats)
    ]  # fmt: skip
    return statistics.median(int(run.stdout.split()[-1]) for run in runs) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="pipeline folder, or miniature; default: random weights, very few")
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM, for the throughput")
    parser.add_argument("--pairs", type=int, default=30, help="counted turns of each")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each number of MiB")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--growth", type=int, help=argparse.SUPPRESS)  # for the processes that are measured
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.growth:
        print_growth(args.folder, args.batch, args.growth, args.checkpointing)
        return
    with tempfile.TemporaryDirectory() as temporary:
        if args.folder is None:
            from tests.factories import tiny_pipeline

            folder = str(tiny_pipeline(Path(temporary) / "tiny"))
        else:
            folder = args.folder
        report(args, folder)


def report(args: argparse.Namespace, folder: str) -> None:
    """Measure, and write the section."""
    theirs, ours = paired(folder, args.batch, args.steps, args.pairs)
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    memory = {
        (checkpointing, steps): growth(folder, args.batch, steps, checkpointing, args.repeats)
        for checkpointing in (True, False) for steps in (FEW, MANY)
    }  # fmt: skip
    name = "random weights, very few" if args.folder is None else folder_of(folder).name
    lines = [
        f"{name}: {args.batch} pictures at a time, guidance 7.5, CPU, {args.threads} threads. Throughput: {args.steps}"
        f" steps of the folder's scheduler, from prompt to pictures, {args.pairs} pairs. Memory: how far the most that"
        " was resident lies above what was before sampling, with the gradient of latents by noise, median of"
        f" {args.repeats} processes.",
        "",
        "| | median | min | max |",
        "|---|---|---|---|",
        f"| pictures per processor second, ours / StableDiffusionPipeline's | {statistics.median(ratios):.3f}"
        f" | {ratios[0]:.3f} | {ratios[-1]:.3f} |",
        f"| processor seconds, ours | {statistics.median(ours):.2f} | {min(ours):.2f} | {max(ours):.2f} |",
        "",
        f"| gradient, MiB | {FEW} steps | {MANY} steps | ratio |",
        "|---|---|---|---|",
    ]
    for checkpointing, how in ((True, "activations recomputed"), (False, "activations kept")):
        few, many = memory[checkpointing, FEW], memory[checkpointing, MANY]
        lines.append(f"| {how} | {few:.0f} | {many:.0f} | {many / few:.2f} |")
    command = f"python benchmarks/sampling.py{'' if args.folder is None else ' --folder ' + name}"
    write_section("sampling", command, lines)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
