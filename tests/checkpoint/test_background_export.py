"""Exports behind training: what they read can't be removed under them."""

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.background_export import BackgroundExport
from lightning_zero.checkpoint.integrity import read_manifest, require_sound
from lightning_zero.checkpoint.manifest import Manifest
from lightning_zero.checkpoint.storage import Location, locate
from tests.checkpoint.sample import Sample


class Writer:
    """Notes which step it was given as a whole checkpoint; waits before it looks."""

    def __init__(self) -> None:
        self.go, self.begun, self.written = threading.Event(), threading.Event(), []

    def __call__(self, directory: Location, output: Path) -> None:
        self.begun.set()
        assert self.go.wait(60)
        manifest = read_manifest(directory)
        require_sound(directory, manifest, "full")
        self.written.append((output.name, manifest.step))


def by_step(manifest: Manifest) -> Path:
    return Path(f"{manifest.step}.ckpt")


def always_the_same(manifest: Manifest) -> Path:
    return Path("model.ckpt")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (by_step, [("1.ckpt", 1), ("2.ckpt", 2), ("3.ckpt", 3)]),
        (always_the_same, [("model.ckpt", 1), ("model.ckpt", 3)]),  # the first was under way
    ],
)
def test_a_checkpoint_that_is_removed_is_exported_all_the_same(tmp_path: Path, name, expected) -> None:
    exports, writer = BackgroundExport(), Writer()
    for step in (1, 2, 3):
        exports.begin(Sample(step=step).save(tmp_path / f"tag{step}"), name, writer)
        assert writer.begun.wait(60)
        commit.remove_tag(tmp_path, f"tag{step}")
        commit.clean_leftovers(tmp_path)
    writer.go.set()
    exports.join()
    assert writer.written == expected
    assert not [path for path in tmp_path.iterdir() if path.name != commit.LATEST]


def test_what_a_dead_process_held_goes_with_the_next_save(tmp_path: Path) -> None:
    exports, writer = BackgroundExport(), Writer()
    tag = Sample().save(tmp_path / "tag")
    pid = os.fork()
    if pid == 0:
        exports.begin(tag, by_step, writer)
        os._exit(0)  # without waiting
    os.waitpid(pid, 0)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    commit.clean_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["latest", "tag"]


def test_behind_a_url_it_is_done_at_once() -> None:
    url = locate("memory://exports/tag")
    Sample().save(url)  # type: ignore[arg-type]
    exports, writer = BackgroundExport(), Writer()
    writer.go.set()
    exports.begin(url, by_step, writer)
    assert writer.written == [("3.ckpt", 3)]


def test_the_first_error_is_raised_once_and_the_others_are_warned_of(tmp_path: Path) -> None:
    def fail(directory: Location, output: Path) -> None:
        raise OSError(f"no room for {output}")

    exports = BackgroundExport()
    with pytest.warns(UserWarning, match="no manifest|can't be read"):
        exports.begin(tmp_path / "gone", by_step, fail)
    with pytest.raises(Exception, match="can't be read"):
        exports.join()
    exports.begin(Sample().save(tmp_path / "tag"), by_step, fail)
    with pytest.raises(OSError, match=r"no room for 3\.ckpt"):
        exports.join()
    exports.join()


def test_an_error_is_raised_in_the_end_where_warnings_are_errors_too(tmp_path: Path) -> None:
    exports = BackgroundExport()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exports.begin(Sample().save(tmp_path / "tag"), by_step, lambda directory, output: output.stat())
        with pytest.raises(FileNotFoundError, match=r"3\.ckpt"):
            exports.join()


def test_a_process_that_ends_without_waiting_for_its_export_writes_it_all_the_same(tmp_path: Path) -> None:
    Sample().save(tmp_path / "tag")
    script = """if True:
        import sys, time
        from pathlib import Path
        from lightning_zero.checkpoint.background_export import BackgroundExport
        from lightning_zero.checkpoint.export import Wanted, export
        from lightning_zero.checkpoint.reader import Reader

        def write(directory, output):
            time.sleep(0.5)
            export(Reader(directory), output, Wanted())

        BackgroundExport().begin(Path(sys.argv[1]) / "tag", lambda manifest: Path(sys.argv[1]) / "model.ckpt", write)
    """
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert sorted(os.listdir(tmp_path)) == ["latest", "model.ckpt", "tag"]


def test_where_there_can_be_no_more_threads_it_is_done_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    exports, written = BackgroundExport(), []
    tag = Sample().save(tmp_path / "tag")
    monkeypatch.setattr(threading.Thread, "start", start)
    exports.begin(tag, by_step, lambda directory, output: written.append(output.name))
    exports.join()
    assert written == ["3.ckpt"]
    assert sorted(os.listdir(tmp_path)) == ["latest", "tag"]
