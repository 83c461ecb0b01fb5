"""`lso edit photo.jpg`: a whole search for one picture in one command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lso_lightning.errors import UserError
from lso_lightning.images import encode_png


def edit(
    photo: Path,
    autoencoder: str | None = None,
    objective: str | None = None,
    faithfulness: str = "lso_lightning.objectives.StructuralSimilarity",
    floor: float = 0.8,
    judge: str | None = None,
    pool: str | None = None,
    out: Path | None = None,
    size: int = 256,
    rounds: int = 30,
    target: float | None = None,
    gain: float | None = None,
    keep_detail: bool = True,
    views: int = 4,
) -> None:
    """Change one picture so that a score rises while it stays the same picture.

    Args:
        photo: the picture; cropped to a centred square.
        autoencoder: required; diffusers folder of an AutoencoderKL or AutoencoderTiny, or a pipeline folder with vae/.
        objective: required; class of the score, images (b, 3, h, w) in [0, 1] to (b,): package.Class or file.py:Class.
        faithfulness: class of the similarity to the start image, (images, starts) to (b,).
        floor: least faithfulness of the result, in its unit.
        judge: class of a second score, only measured.
        pool: folder of at least 32 real pictures, cropped like the photo and scored once each by the objective: the
            search begins towards the high-scoring ones and follows how they vary; a photo unlike them is refused.
        out: run folder; the result is its edited.png. Default: runs/edit-NAME.
        size: side of the result in pixels.
        rounds: gradient steps.
        target: score that is enough; later steps make the picture more faithful.
        gain: as target, counted from the picture's own score.
        keep_detail: keep what the autoencoder loses of the picture.
        views: random views of the image that the score is averaged over, against adversarial gradients.
    """
    if not photo.is_file():
        raise UserError(f"{photo}: no such picture")
    if autoencoder is None or objective is None:
        raise UserError(
            "edit: --autoencoder DIR (a diffusers folder) and --objective CLASS (file.py:Class) are needed; the picture"
            " is searched in the latents of the one for a higher score of the other"
        )
    if rounds < 1:
        raise UserError(f"edit --rounds {rounds}: expected at least 1")
    out = out or Path("runs") / f"edit-{photo.stem}"
    continued = _continued(out, photo, [autoencoder, objective, faithfulness, floor, judge, pool, size, target, gain,
                                        keep_detail, views])  # fmt: skip
    from lso_lightning.__main__ import main
    from lso_lightning.commands.render import summary
    from lso_lightning.results import decode_missing, read_run

    arguments = [
        "fit",
        "--config=optimize/autoencoder_gradient.yaml",
        f"--data.init_args.source={photo}",
        f"--data.init_args.size={size}",
        f"--model.init_args.space.init_args.generator.init_args.folder={autoencoder}",
        f"--model.init_args.objective={objective}",
        f"--model.init_args.faithfulness={faithfulness}",
        f"--model.init_args.floor={floor}",
        f"--model.init_args.space.init_args.keep_detail={str(keep_detail).lower()}",
        f"--model.init_args.views.init_args.count={views}",
        f"--trainer.max_epochs={rounds}",
        f"--trainer.default_root_dir={out}",
        *(["--ckpt_path=last"] if continued else []),  # an edit that was killed goes on
    ]
    optional: dict[str, Any] = {"judge": judge, "target": target, "gain": gain}
    optional = {f"model.init_args.{name}": value for name, value in optional.items()}
    if pool is not None:
        step = {"class_path": "lso_lightning.spaces.PoolDirection", "init_args": {"images": pool}}
        density = {"class_path": "lso_lightning.spaces.GaussianDensity", "init_args": {"images": pool, "rank": 256}}
        optional |= {
            "data.init_args.like": pool, "model.init_args.first_step": json.dumps(step),
            "model.init_args.space.init_args.density": json.dumps(density), "model.init_args.precondition": 0.5,
        }  # fmt: skip
    arguments += [f"--{name}={value}" for name, value in optional.items() if value is not None]
    try:
        main(arguments)
    except SystemExit as leaving:
        # a search that lost its row still has the best picture until then
        if leaving.code not in (0, 1) or not (out / "checkpoints" / "last.ckpt").is_file():
            raise
        code = leaving.code
    else:
        code = 0
    rows = read_run(out)
    decode_missing(out, rows)
    print(summary(rows))
    (row,) = rows
    if row.after is None:
        raise UserError(f"{photo}: no acceptable picture found")
    (out / "edited.png").write_bytes(encode_png(row.after, small=True))
    if code:
        print(f"the search ended early; its best picture until then: {out / 'edited.png'}")
        raise SystemExit(code)
    if not row.feasible:
        raise UserError(
            f"{photo}: no picture reached faithfulness {floor}; the nearest one ({row.best['faithfulness']:.3f}) is in"
            f" {out / 'edited.png'}; lower --floor, or is it a picture the networks know?"
        )
    print(f"before and after: {photo}, {out / 'edited.png'}")


def _continued(out: Path, photo: Path, settings: list[Any]) -> bool:
    """Whether the run folder holds this very edit already; notes in it which one it holds.

    Raises:
        UserError: it holds another edit, whose picture must not pass for this one's.
    """
    note, told = out / "edit.json", {"photo": hashlib.sha256(photo.read_bytes()).hexdigest(), "settings": settings}
    started = (out / "checkpoints").is_dir()
    if started and (not note.is_file() or json.loads(note.read_text()) != json.loads(json.dumps(told))):
        raise UserError(f"{out} holds the edit of another picture or with other settings: give --out another folder")
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(told))
    return started
