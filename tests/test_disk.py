"""Disks that are full or read-only: status 2, one line that names the file and the way out, the last sound checkpoint intact.

On a file system of their own, which only root may mount; elsewhere these tests skip and say so.
"""

import contextlib
import subprocess
from unittest import mock

import pytest

from command_lines import TINY_FLAGS
from runs import assert_same_bits, contents, copy_of, finished, summary_of, untimed
from vffjax.runs import checkpoint, origin, summary, workdir
from vffjax.runs.checkpoint import Checkpoints
from vffjax.runs.logbook import Logbook
from vffjax.runs.workdir import load_run
from vffjax.uses import reproduction


@pytest.fixture
def disk(tmp_path):
    """An empty file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "vffjax-test", folder]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk):
    """Leaves no free byte."""
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.fixture
def train(call):
    def run(folder):
        with mock.patch.object(origin, "_commit", lambda: "0" * 40):
            return call("train", *TINY_FLAGS, f"--workdir={folder}")

    return run


# What is about to be written when the disk is full; what is saved then.
MOMENTS = {
    "the configuration": ((workdir, "claim_workdir"), 1, 0),
    "the first line": ((Logbook, "epoch"), 1, 0),
    "a later line": ((Logbook, "epoch"), 2, 1),
    "a checkpoint": ((checkpoint.Writer, "save"), 2, 1),
    "the digests": ((checkpoint, "write_json"), 2, 1),
    "the summary": ((summary, "write_json"), 1, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize(("where", "times", "saved"), MOMENTS.values(), ids=MOMENTS.keys())
def test_a_full_disk_is_named_and_with_space_the_run_ends_as_if_undisturbed(where, times, saved, disk, train):
    owner, name = where
    sound, calls = getattr(owner, name), []

    def full(*arguments, **named):
        calls.append(1)
        if len(calls) == times:
            fill(disk)
        return sound(*arguments, **named)

    folder = disk / "run"
    if name == "claim_workdir":
        folder.mkdir()
        fill(disk)
        status, out, err = train(folder)
    else:
        with mock.patch.object(owner, name, full):
            status, out, err = train(folder)
    assert (status, out) == (2, ""), err
    last = err.splitlines()[-1]
    assert last.startswith("vffjax: error: "), err
    assert str(disk) in last
    assert "No space left on device" in last
    assert "check space and permissions, or give another --workdir" in last
    assert "Traceback" not in err
    complete = Checkpoints(folder).epochs()
    assert max(complete, default=0) == saved
    for epoch in complete:
        assert_same_bits(*(load_run(f, str(epoch))[1:3] for f in (folder, finished()))) if epoch in (2, 3) else load_run(folder, str(epoch))
    assert not list(folder.glob("checkpoints/*tmp*")), "takes space that the next try needs"

    (disk / "filler").unlink()
    status, _, err = train(folder)
    assert status == 0, err
    assert untimed(summary_of(folder)) == untimed(summary_of(finished()))
    assert reproduction.compare(finished(), folder)["differences"] == []


@pytest.mark.slow
def test_a_disk_that_fills_up_before_the_pictures_costs_the_pictures_alone(disk, train):
    folder, sound = disk / "run", summary.plot_curves

    def full(*arguments):
        fill(disk)
        return sound(*arguments)

    with mock.patch.object(summary, "plot_curves", full):
        status, _, err = train(folder)
    assert status == 0
    told = [line for line in err.splitlines() if "left out" in line]
    for name, line in zip(("curves.png", "features.png"), told, strict=True):
        assert line.startswith(f"{folder / name} is left out (OSError: ")
    assert all("No space left on device" in line for line in told)
    assert untimed(summary_of(folder)) == untimed(summary_of(finished()))
    (disk / "filler").unlink()
    assert train(folder)[0] == 0
    assert (folder / "curves.png").exists() and (folder / "features.png").exists()


def test_a_read_only_workdir_is_named_and_can_be_evaluated(disk, train, call):
    folder = copy_of(finished(), disk)
    before = contents(folder)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    status, out, err = train(folder)
    assert (status, out) == (2, "")
    assert err.startswith("vffjax: error: ")
    assert err.count("\n") == 1
    assert f"{folder / '.lock'}: Read-only file system; check space and permissions" in err
    status, out, err = train(disk / "new")
    assert (status, out) == (2, "")
    assert f"{disk / 'new'}: Read-only file system" in err.splitlines()[-1]
    status, out, err = call("evaluate", f"--workdir={folder}")
    assert (status, err) == (0, "")
    assert f"test error {summary_of(finished())['test_error']:.2f} %" in out
    assert contents(folder) == before
