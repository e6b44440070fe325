"""Files and directories that appear complete or not at all."""

import pytest

from minimind_o_hf.files import new_directory, new_file


def test_a_directory_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "parent" / "made"
    with new_directory(target) as temporary:
        (temporary / "config.json").write_text("{}", encoding="utf-8")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in target.parent.iterdir()] == ["made"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_directory_leaves_nothing(tmp_path, error):
    def interrupted():
        with new_directory(tmp_path / "made") as temporary:
            (temporary / "half").touch()
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "made").mkdir()
    with new_directory(tmp_path / "made") as temporary:
        (temporary / "a").touch()
    assert (tmp_path / "made" / "a").is_file()


def test_what_is_there_stays(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").touch()
    with pytest.raises(FileExistsError, match="not empty"), new_directory(tmp_path / "made"):
        pytest.fail("the block must not run")
    # To overwrite is to replace a checkpoint, not anybody's folder.
    with pytest.raises(ValueError, match="no checkpoint"), new_directory(tmp_path / "made", overwrite=True):
        pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "mine"]


def test_overwriting_replaces_the_whole_checkpoint(tmp_path):
    old = tmp_path / "made"
    old.mkdir()
    (old / "config.json").touch()
    (old / "stale").touch()
    with new_directory(old, overwrite=True) as temporary:
        (temporary / "config.json").write_text("new", encoding="utf-8")
        assert (old / "stale").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "config.json"]
    assert (old / "config.json").read_text(encoding="utf-8") == "new"


def test_a_failed_overwrite_keeps_the_old_checkpoint(tmp_path):
    old = tmp_path / "made"
    old.mkdir()
    (old / "config.json").write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), new_directory(old, overwrite=True):
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "config.json"]
    assert (old / "config.json").read_text(encoding="utf-8") == "old"


def test_a_directory_that_another_process_makes_meanwhile_wins(tmp_path):
    def overtaken():
        with new_directory(tmp_path / "made") as temporary:
            (temporary / "ours").touch()
            (tmp_path / "made").mkdir()
            (tmp_path / "made" / "theirs").touch()

    with pytest.raises(FileExistsError):
        overtaken()
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "theirs"]


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("old", encoding="utf-8")

    def interrupted():
        with new_file(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert path.read_text(encoding="utf-8") == "old"
    with new_file(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]
