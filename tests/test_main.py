"""The dispatcher: light help, lazy commands, files that hold a user's classes, one line for what a person can mend."""

from __future__ import annotations

import errno
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from lso_lightning import __main__ as dispatcher
from lso_lightning import __version__
from lso_lightning.__main__ import main
from lso_lightning.command_line import resolve_class_files
from lso_lightning.errors import UserError


def dummy(run: Path, count: int = 1, trouble: str = "") -> None:
    """Stand in for a command.

    Args:
        run: a folder.
        count: pictures.
        trouble: kind of failure.
    """
    if trouble == "user":
        raise UserError("two words\nand a second line")
    if trouble == "full":
        raise OSError(errno.ENOSPC, "No space left on device", str(run))
    if trouble == "no name":
        raise OSError(errno.ENOSPC, "No space left on device")
    if trouble == "quota":
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    if trouble == "io":
        raise OSError(errno.EIO, "Input/output error")
    if trouble == "interrupt":
        raise KeyboardInterrupt
    if trouble == "bug":
        raise ZeroDivisionError
    print(f"{run.name} {count}")


@pytest.fixture(autouse=True)
def dummy_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatcher.COMMANDS, "dummy", ("tests.test_main", "dummy", "stand in"))


@pytest.fixture
def clean_imports(monkeypatch: pytest.MonkeyPatch):
    """Undo what a test adds to the import system."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    importlib.invalidate_caches()


def code_of(args: list[str]) -> object:
    with pytest.raises(SystemExit) as leaving:
        main(args)
    return leaving.value.code


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option: str) -> None:
    script = (
        f"import sys; from lso_lightning.__main__ import main; main([{option!r}]);"
        " print([name for name in ('torch', 'lightning', 'jsonargparse', 'numpy') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert ("fit" in out and "render" in out) if option == "--help" else __version__ in out


def test_command_is_parsed_from_its_signature(capsys: pytest.CaptureFixture[str]) -> None:
    main(["dummy", "runs/a", "--count", "3"])
    assert capsys.readouterr().out == "a 3\n"
    assert code_of(["dummy", "--help"]) == 0
    assert "pictures" in capsys.readouterr().out
    assert code_of(["dummy", "runs/a", "--coun", "3"]) == 2, "abbreviations are refused"


def test_unknown_command_names_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["fti"]) == 2
    assert "Did you mean 'fit'?" in capsys.readouterr().err


def test_mendable_trouble_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["dummy", "x", "--trouble=user"]) == 1
    assert capsys.readouterr().err == "lso: error: two words and a second line\n"
    assert code_of(["dummy", "x", "--trouble=interrupt"]) == 130


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        main(["dummy", "x", "--trouble=bug"])
    with pytest.raises(OSError, match="Input/output"):
        main(["dummy", "x", "--trouble=io"])


@pytest.mark.parametrize(
    ("trouble", "what"),
    [("full", "x: no space left"), ("no name", "no space left on the device"), ("quota", "disk quota")],
)
def test_a_full_disk_is_one_line_that_says_how_to_go_on(trouble: str, what: str, capsys, monkeypatch) -> None:
    assert code_of(["dummy", "x", f"--trouble={trouble}"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and what in err and "run the same command again" in err
    monkeypatch.setattr("lso_lightning.cli.main", lambda args: dummy(Path("x"), trouble=trouble))
    assert code_of(["fit"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and what in err and "continue with --ckpt_path last" in err


def test_other_ranks_say_who_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert code_of(["dummy", "x", "--trouble=user"]) == 1
    assert capsys.readouterr().err.startswith("lso: error: ")
    monkeypatch.setenv("RANK", "2")
    assert code_of(["dummy", "x", "--trouble=user"]) == 1
    assert capsys.readouterr().err == "[rank 2] lso: error: two words and a second line\n"


def test_class_in_a_file(tmp_path: Path, clean_imports: None) -> None:
    (tmp_path / "my_scores.py").write_text("class Smile:\n    pass\n")
    file = tmp_path / "my_scores.py"
    assert resolve_class_files([f"--objective={file}:Smile", f"{file}:Smile", "--x+=1", "a.py"]) == [
        "--objective=my_scores.Smile",
        "my_scores.Smile",
        "--x+=1",
        "a.py",
    ]
    assert sys.modules["my_scores"].__file__ == str(file)


def test_wrong_class_files_are_explained(tmp_path: Path, clean_imports: None, capsys) -> None:
    (tmp_path / "my_faces.py").write_text("class Smile:\n    pass\n")
    (tmp_path / "json.py").write_text("class Smile:\n    pass\n")
    (tmp_path / "my-faces.py").write_text("class Smile:\n    pass\n")
    expected = {
        "nowhere.py:Smile": "there is no file",
        "my_faces.py:Smil": "Did you mean 'Smile'?",
        "my_faces.py:Zebra": "It has: Smile.",
        "json.py:Smile": "a module named 'json' exists already",
        "my-faces.py:Smile": "cannot be a module name",
    }
    for value, message in expected.items():
        assert code_of(["dummy", "x", f"--trouble={tmp_path / value}"]) == 1
        assert message in capsys.readouterr().err


def test_current_folder_is_importable_but_shadows_nothing(tmp_path: Path, clean_imports: None, monkeypatch) -> None:
    (tmp_path / "only_here.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    main(["dummy", "x"])
    assert sys.path[-1] == str(tmp_path)
    assert importlib.import_module("only_here").x == 1


def test_a_folder_of_the_same_name_does_not_hide_a_class_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_imports: None
) -> None:
    """`lso pack --synthetic 20000 faces`, and then `--objective faces.py:Smile`, or one that lies elsewhere."""
    (tmp_path / "seen" / "packed_faces").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "packed_faces.py").write_text("class Smile:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path / "seen")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resolve_class_files(["packed_faces.py:Smile"]) == ["packed_faces.Smile"]
    assert sys.modules["packed_faces"].__file__ == str(tmp_path / "elsewhere" / "packed_faces.py")
