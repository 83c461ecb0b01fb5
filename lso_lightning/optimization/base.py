"""What every search does in a round: evaluate its rows, gather, learn, archive. Searchers fill in `learn`."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lso_lightning.distributed import on_rank_zero, sum_over_ranks, together
from lso_lightning.errors import UserError
from lso_lightning.images import to_uint8
from lso_lightning.optimization.archive import NOTHING, START, Archive, stored_images
from lso_lightning.optimization.evaluation import Measures, MicroBatch
from lso_lightning.optimization.identity import describe, require_same
from lso_lightning.optimization.preparation import fit_on_pool
from lso_lightning.optimization.scalars import round_scalars
from lso_lightning.optimization.table import VALUES, LatentTable
from lso_lightning.spaces import PoolDirection, SearchSpace
from lso_lightning.weights import weights_id

_PARQUET_EVERY = 60.0  # seconds; between, the archive's own files are the record
_STORED = ("table.", "constraint.")  # frozen networks stay out of checkpoints: gigabytes that never change


class LatentSearch(LightningModule):
    """A search over the rows of a :class:`LatentTable`. One epoch = one optimiser step = one round.

    Optimisation is manual: a training step evaluates all micro-batches of its rank, sums over ranks and updates the
    table identically everywhere. Nothing depends on how many ranks share the micro-batches.

    Args:
        space: where to search.
        objective: images ``(b, 3, h, w)`` -> scores ``(b,)``, higher is better.
        faithfulness: (images, start images) -> similarities ``(b,)``; None: nothing is constrained.
        floor: least faithfulness of an acceptable image, in its unit.
        target: score that is enough; None: no limit.
        gain: as `target`, counted from the score of the row's own start image (say, 15 years older).
        judge: a second scorer, only measured.
        measured_identity: a second faithfulness, only measured.
        images: which pictures the archive keeps: `all`, `improved` (a row's new best) or a number k (every k rounds).
        patience: a row stops after so many rounds without improvement; None: never.
        seed: of all randomness of the search.
        first_step: where rows begin, from their encodings: towards high-scoring pictures of a pool; None: nowhere.
        threads: CPU threads of each process; with the same number, one rank and many agree bit for bit. None: all cores
            for one rank, its share for each of several.
    """

    automatic_optimization = False
    strict_loading = False
    monitor, mode = "search/improvements", "max"  # best.ckpt: the newest round in which any row found a better image

    def __init__(
        self,
        space: SearchSpace,
        objective: nn.Module,
        faithfulness: nn.Module | None = None,
        floor: float | None = None,
        target: float | None = None,
        gain: float | None = None,
        judge: nn.Module | None = None,
        measured_identity: nn.Module | None = None,
        images: Literal["all", "improved"] | int = "improved",
        patience: int | None = None,
        seed: int = 0,
        first_step: PoolDirection | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        if threads is not None and threads < 1:
            raise UserError(f"model.threads: {threads}, expected at least 1")
        self.threads = threads
        self.first_step = first_step
        if (faithfulness is None) != (floor is None):
            raise UserError("model.faithfulness and model.floor belong together: give both or neither")
        if target is not None and gain is not None:
            raise UserError("model.target and model.gain exclude each other: absolute, or counted from the start")
        for name, number in (("floor", floor), ("target", target), ("gain", gain)):
            if number is not None and not math.isfinite(number):
                raise UserError(f"model.{name}: {number}, expected a finite number")
        if patience is not None and patience < 1:
            raise UserError(f"model.patience: {patience}, expected at least 1 round, or null for never")
        if isinstance(images, int) and images < 1:
            raise UserError(f"model.images: {images!r}, expected all, improved or a positive number of rounds")
        self.space = space.requires_grad_(False).eval()
        self.measures = Measures(objective, faithfulness, judge, measured_identity)
        self.floor, self.fixed_target, self.gain = floor, target, gain
        self.image_policy, self.patience, self.seed = images, patience, seed
        self.best_images: dict[int, Tensor] = {}  #: uint8 picture of the best z of rows this rank owns
        self._micro_batches: list[MicroBatch] = []
        self._resumed, self._parquet_written = False, 0.0

    def train(self, mode: bool = True) -> LatentSearch:
        """Stay in eval mode: all networks are frozen and the table has no modes."""
        return super().train(False)

    # ---- before the first round -------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if not all(hasattr(data, name) for name in ("keys", "images", "micro_batches", "size")):
            raise UserError(f"a search needs start images: --data StartImages (found {type(data).__name__})")
        if self.trainer.precision not in ("32-true", "bf16-mixed"):
            raise UserError(f"--trainer.precision {self.trainer.precision}: a search knows 32-true and bf16-mixed")
        if any(getattr(callback, "every_seconds", 0) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError("last_checkpoint.every_seconds: a search checkpoints every round, leave it at 0")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        self.data = data
        self.space.configure(data.size)
        self.table = LatentTable(len(data.keys), self.space.dim, self.floor)
        self._identity = {
            "start images": list(data.keys), "their pictures": weights_id({"pixels": data.pixels()}),
            "image size": data.size, "micro-batch": data.batch_size, **self.identity(),
        }  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What makes this search this search, as text and numbers: a resume must not change it (docs/resume.md)."""
        return {
            "search space": describe(self.space), "objective": describe(self.measures.objective),
            "faithfulness": describe(self.measures.faithfulness), "floor": self.floor, "target": self.fixed_target,
            "gain": self.gain, "seed": self.seed, "first step": describe(self.first_step),
        }  # fmt: skip

    def on_fit_start(self) -> None:
        run = Path(self.trainer.default_root_dir)
        self.archive = Archive(run / "archive", self.global_rank)
        on_rank_zero(lambda: self.archive.open(int(self.table.rounds) if self._resumed else NOTHING))
        step = fit_on_pool(self, run, fresh=not self._resumed)
        for rows in self.data.micro_batches(self.global_rank, self.trainer.world_size):
            rows = rows.to(self.device)
            starts = self.data.images(rows).to(self.device)
            self._micro_batches.append(MicroBatch(rows, starts, self.space.context(starts, rows, self.seed)))
        if self._resumed:
            self._reload_best_images()
        else:
            self._begin(step)

    @torch.no_grad()
    def _begin(self, step: Tensor | None) -> None:
        """Encode and score the start images; they are round -1 of the archive and count as queries.

        Args:
            step: ``(dim,)`` that every row begins with, from its encoding; None: it begins at its encoding.
        """
        table = self.table
        z, values = torch.zeros_like(table.z), self.no_values()

        def encode() -> None:
            for batch in self._micro_batches:
                began = time.perf_counter()
                z[batch.rows] = self.space.encode(batch.starts)
                values[batch.rows] = self.measures.values(batch.starts, batch.starts)
                self._take_time(values, batch, began)

        together(encode)
        table.start_z.copy_(sum_over_ranks(z))
        table.z.copy_(table.start_z if step is None else table.start_z + step)
        table.best_z.copy_(table.z)
        sum_over_ranks(values)
        table.start_score.copy_(values[:, 0])
        for column, name in enumerate(("objective", "faithfulness")[: 1 if self.floor is None else 2]):
            bad = [self.data.keys[i] for i in (~values[:, column].isfinite()).nonzero().flatten().tolist()]
            if bad:
                named = ", ".join(bad[:5])
                raise UserError(f"model.{name} gives no finite number for {len(bad)} start image(s): {named}")
        if self.gain is not None:
            table.target.copy_(values[:, 0] + self.gain)
        elif self.fixed_target is not None:
            table.target.fill_(self.fixed_target)
        everyone = torch.ones(len(table.z), dtype=torch.bool)
        table.queries += len(table.z)

        def write() -> None:
            self.archive.write_images(START, list(range(len(table.z))), self.data.pixels())
            self._write_record(START, values, everyone, ~everyone)

        on_rank_zero(write)

    def _reload_best_images(self) -> None:
        wanted = {
            (int(self.table.best_round[row]), int(row)): int(row) for b in self._micro_batches for row in b.rows
        }
        stored = self.archive.images([position for position in wanted if position[0] >= 0])
        self.best_images = {wanted[position]: image for position, image in stored.items()}

    # ---- a round ----------------------------------------------------------------------------------------------------

    def training_step(self, rows: list[Tensor], batch_idx: int) -> None:
        """Evaluate every active row once, learn from it and commit the round."""
        active = ~self.table.done
        if not bool(active.any()):  # a resumed search whose rows have all stopped
            self.trainer.should_stop = True
            return
        values, learned, images = self._evaluate_all(active)
        failed = self.table.failed.clone()
        improved = self.table.record(values, active)
        self.learn(values, learned, active)
        if self.patience is not None:
            self.table.done |= self.table.stale >= self.patience
        self._commit(values, active, improved, self.table.failed & ~failed, images)
        self._log_round(values, active)
        if bool(self.table.done.all()):
            self.trainer.should_stop = True

    def evaluate(self, batch: MicroBatch, values: Tensor, learned: Tensor) -> Tensor:
        """Decode and score one micro-batch.

        Args:
            batch: rows to evaluate at their present ``z``.
            values: ``(n, len(VALUES))``; this function fills the rows of the batch.
            learned: ``(n, dim)``; likewise, with what :meth:`learn` needs (a gradient).

        Returns:
            The decoded images ``(b, 3, h, w)``.
        """
        raise NotImplementedError

    def learn(self, values: Tensor, learned: Tensor, active: Tensor) -> None:
        """Move ``table.z`` and step an optimiser once (Lightning counts its steps), the same on every rank."""
        raise NotImplementedError

    def extra_scalars(self) -> dict[str, Tensor]:
        """Further TensorBoard scalars of a searcher, the same on every rank."""
        return {}

    def _evaluate_all(self, active: Tensor) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        values, learned = self.no_values(), torch.zeros_like(self.table.z)
        images: dict[int, Tensor] = {}

        def evaluate() -> None:
            for k, batch in enumerate(self._micro_batches):
                batch = batch.only(active[batch.rows])
                if len(batch.rows):
                    began = time.perf_counter()
                    decoded = to_uint8(self.evaluate(batch, values, learned))
                    self._take_time(values, batch, began)
                    images.update(zip(batch.rows.tolist(), decoded, strict=True))
                for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                    if hook := getattr(callback, "on_micro_batch_end", None):
                        hook(self.trainer, self, k, len(self._micro_batches))

        together(evaluate)
        return sum_over_ranks(values), sum_over_ranks(learned), images

    def _take_time(self, values: Tensor, batch: MicroBatch, began: float) -> None:
        """Seconds per row; after its results have reached the CPU, so that a GPU's work is in it."""
        values[batch.rows, VALUES.index("seconds")] = (time.perf_counter() - began) / len(batch.rows)

    def no_values(self) -> Tensor:
        """An empty round: zeros ``(n, len(VALUES))``."""
        return torch.zeros(len(self.table.z), len(VALUES), device=self.device)

    def first_micro_batch(self) -> tuple[MicroBatch | None, int]:
        """The rank's first micro-batch with rows still searching, and how many micro-batches the rank has."""
        batches = [b.only(~self.table.done[b.rows]) for b in self._micro_batches]
        return next((b for b in batches if len(b.rows)), None), len(batches)

    def _commit(
        self, values: Tensor, active: Tensor, improved: Tensor, failed: Tensor, images: dict[int, Tensor]
    ) -> None:
        """Archive the round: pictures first, then the record that makes it complete."""
        index = int(self.table.rounds)
        own = torch.zeros_like(active)
        own[list(images)] = True
        for row in (own & improved).nonzero().flatten().tolist():
            self.best_images[row] = images[row]
        stored = (own & stored_images(self.image_policy, index, improved, active)).nonzero().flatten().tolist()
        if stored:
            together(lambda: self.archive.write_images(index, stored, torch.stack([images[row] for row in stored])))
        else:
            together(lambda: None)
        on_rank_zero(lambda: self._write_record(index, values, active, failed))
        self.table.rounds += 1

    def _write_record(self, index: int, values: Tensor, active: Tensor, failed: Tensor) -> None:
        rows = active.cpu().nonzero().flatten()
        chosen = values.cpu()[rows]
        record: dict[str, Any] = {
            "round": index,
            "first_query": int(self.table.queries) - len(rows),
            "model_version": int(self.table.model_version),
            "row": rows,
            "start_key": [self.data.keys[row] for row in rows.tolist()],
            "feasible": self.table.feasible(chosen[:, 1]),
            "failed": [self.data.keys[row] for row in failed.nonzero().flatten().tolist()],
        }
        self.archive.write_round(record | {name: chosen[:, i] for i, name in enumerate(VALUES)})
        if time.monotonic() - self._parquet_written > _PARQUET_EVERY:
            self.archive.write_parquet()
            self._parquet_written = time.monotonic()

    def _log_round(self, values: Tensor, active: Tensor) -> None:
        for name, value in (round_scalars(self.table, values, active, self.space) | self.extra_scalars()).items():
            # equal on every rank already: reducing them would cost a collective each and change nothing
            shown = name in ("search/best", "search/feasible")
            self.log(name, value.detach(), prog_bar=shown, on_step=False, on_epoch=True, batch_size=1)

    # ---- after the last round, and checkpoints ----------------------------------------------------------------------

    def on_train_end(self) -> None:
        on_rank_zero(self.archive.write_parquet)
        if self.global_rank == 0:
            print(f"pictures and a table: lso render {self.trainer.default_root_dir}", flush=True)

    def failure(self, run: Path) -> str | None:
        """What the command line reports, with a non-zero exit code, after a search that lost rows."""
        # from the archive, not the table: under ddp_fork the search ran in other processes
        bad = [key for record in Archive(run / "archive").records() for key in record.get("failed", [])]
        if not bad:
            return None
        rows = "1 row, which was" if len(bad) == 1 else f"{len(bad)} rows, which were"
        return (
            f"score, faithfulness or their gradient came out as no finite number for {rows} stopped:"
            f" {', '.join(bad[:5])}; the best images so far are kept"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith(_STORED)}
        checkpoint["search"] = self._identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint.get("search")
        if stored is None:
            raise UserError("this checkpoint holds no search: --ckpt_path must name one of this run's own checkpoints")
        require_same(stored, self._identity)
        expected = {key for key in self.state_dict() if key.startswith(_STORED)}
        if missing := sorted(expected - set(checkpoint["state_dict"])):
            raise UserError(f"resume: the checkpoint is damaged, it lacks {', '.join(missing[:3])}; take another one")
        shape, needed = tuple(checkpoint["state_dict"]["table.z"].shape), tuple(self.table.z.shape)
        if shape != needed:
            raise UserError(f"resume: the checkpoint's latents are {shape}, this search space needs {needed}")
        self._resumed = True
