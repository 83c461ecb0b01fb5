"""What one evaluation of some rows takes in and gives out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lso_lightning.errors import UserError
from lso_lightning.optimization.table import VALUES


class MicroBatch:
    """Rows decoded together, with what stays fixed for them: start images and the space's context."""

    def __init__(self, rows: Tensor, starts: Tensor, context: dict[str, Tensor]) -> None:
        self.rows, self.starts, self.context = rows, starts, context

    def only(self, keep: Tensor) -> MicroBatch:
        """The rows in the mask ``keep (b,)``."""
        if bool(keep.all()):
            return self
        return MicroBatch(self.rows[keep], self.starts[keep], {k: v[keep] for k, v in self.context.items()})


class Measures(nn.Module):
    """The frozen networks that look at images: the objective and what is measured beside it.

    Args:
        objective: images ``(b, 3, h, w)`` -> scores ``(b,)``.
        faithfulness: (images, start images) -> similarities ``(b,)``, or None.
        judge: as `objective`, or None.
        measured_identity: as `faithfulness`, or None.
    """

    def __init__(
        self,
        objective: nn.Module,
        faithfulness: nn.Module | None,
        judge: nn.Module | None,
        measured_identity: nn.Module | None,
    ) -> None:
        super().__init__()
        self.objective, self.faithfulness = objective, faithfulness
        self.judge, self.measured_identity = judge, measured_identity
        self.requires_grad_(False).eval()

    def scores(self, images: Tensor) -> Tensor:
        """Objective ``(b,)`` of images ``(b, 3, h, w)``."""
        return one_per_image("objective", self.objective(images), images)

    @torch.no_grad()
    def values(self, images: Tensor, starts: Tensor, **known: Tensor | None) -> Tensor:
        """One line of numbers per image; what nothing measures is NaN, in the archive null.

        Args:
            images: ``(b, 3, h, w)``.
            starts: their start images, likewise.
            known: columns ``(b,)`` that need no second evaluation: score, faithfulness, merit, slope.

        Returns:
            ``(b, len(VALUES))`` float32.
        """
        columns = dict(known)
        if columns.get("score") is None:
            columns["score"] = self.scores(images)
        for name in ("faithfulness", "measured_identity"):
            module = getattr(self, name)
            if columns.get(name) is None and module is not None:
                columns[name] = one_per_image(name, module(images, starts), images)
        if self.judge is not None:
            columns["judge"] = one_per_image("judge", self.judge(images), images)
        if columns.get("merit") is None:
            columns["merit"] = columns["score"]
        empty = torch.full((len(images),), torch.nan, device=images.device)
        found = [columns.get(name) for name in VALUES]
        return torch.stack([empty if column is None else column.float() for column in found], 1)


def one_per_image(name: str, values: Tensor, images: Tensor) -> Tensor:
    """Check that a user's module gave one number per image.

    Args:
        name: what the configuration calls it.
        values: its output.
        images: its input ``(b, 3, h, w)``.

    Returns:
        The values ``(b,)``, unchanged.

    Raises:
        UserError: another shape.
    """
    if values.shape != (len(images),):
        found, expected = tuple(values.shape), (len(images),)
        raise UserError(f"model.{name}: gives shape {found} for {len(images)} images, expected {expected}")
    return values
