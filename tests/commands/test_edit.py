"""`lso edit`: one picture, one command."""

from __future__ import annotations

from pathlib import Path

import pytest

from lso_lightning.__main__ import main
from lso_lightning.images import from_uint8, read_image
from tests.factories import Brightness, face_photos, tiny_autoencoder
from tests.optimization.searches import checkpoint


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return sorted(face_photos(tmp_path / "photos", 2, 48).glob("*.png"))[0]


def arguments(photo: Path, tmp_path: Path, *more: str) -> list[str]:
    autoencoder = tmp_path / "autoencoder"
    if not autoencoder.exists():
        tiny_autoencoder(autoencoder)
    return ["edit", str(photo), f"--autoencoder={autoencoder}", "--objective=tests.factories.Brightness",
            "--size=32", "--rounds=6", "--views=1", f"--out={tmp_path / 'run'}", *more]  # fmt: skip


def test_the_whole(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(photo, tmp_path, "--floor=0.5"))
    edited = from_uint8(read_image(tmp_path / "run" / "edited.png")[None])
    table = {k.removeprefix("table."): v for k, v in checkpoint(tmp_path / "run")["state_dict"].items()}
    assert Brightness()(edited).item() == pytest.approx(table["best_score"].item(), abs=1e-6)
    assert table["best_score"].item() > table["start_score"].item()
    out = capsys.readouterr().out
    assert "cost: 1 rows" in out and "edited.png" in out and "round 6/6" in out


def test_an_unreachable_floor_is_said_and_the_nearest_picture_kept(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments(photo, tmp_path, "--floor=1.5"))
    assert leaving.value.code == 1
    assert "no picture reached faithfulness 1.5" in capsys.readouterr().err
    assert (tmp_path / "run" / "edited.png").is_file()


def test_with_a_pool(photo: Path, tmp_path: Path) -> None:
    pool = face_photos(tmp_path / "pool", 40, 32)
    main(arguments(photo, tmp_path, f"--pool={pool}", "--floor=0.5"))
    assert int(checkpoint(tmp_path / "run")["state_dict"]["table.queries"]) == 40 + 1 + 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--objective=tests.optimization.toys.Blue"], "Blue"),
        (["--autoencoder=nowhere"], "nowhere: no such folder"),
        (["--size=30"], "multiple of"),
    ],
)
def test_mistakes(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments(photo, tmp_path, *change))
    assert leaving.value.code != 0
    message = capsys.readouterr().err
    message = message[message.index("lso: error: ") :]
    assert words in message and "Given value" not in message and "Traceback" not in message


def test_a_second_call_goes_on_and_another_picture_is_refused(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(photo, tmp_path, "--floor=0.5"))
    before = (tmp_path / "run" / "edited.png").read_bytes()
    main(arguments(photo, tmp_path, "--floor=0.5"))
    assert (tmp_path / "run" / "edited.png").read_bytes() == before
    other = sorted(photo.parent.glob("*.png"))[1]
    for changed in (arguments(other, tmp_path, "--floor=0.5"), arguments(photo, tmp_path, "--floor=0.6")):
        with pytest.raises(SystemExit) as leaving:
            main(changed)
        assert leaving.value.code == 1
        assert "holds the edit of another picture" in capsys.readouterr().err
    assert (tmp_path / "run" / "edited.png").read_bytes() == before


def test_no_picture_and_no_arguments(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, words in ((["edit", "nowhere.png"], "no such picture"), (["edit", str(photo)], "--autoencoder DIR")):
        with pytest.raises(SystemExit):
            main(line)
        assert words in capsys.readouterr().err
