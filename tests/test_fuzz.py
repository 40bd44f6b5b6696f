"""The fuzzer of `tests/faults/fuzz.py`: some hundred files of it, and that it finds what is planted."""

import io
import json
import pathlib
import random
import subprocess
import sys

import pytest
from PIL import Image

from faults import mutations

SCRIPT = pathlib.Path(__file__).parent / "faults" / "fuzz.py"


def fuzz(folder, *options):
    command = [sys.executable, SCRIPT, f"--out={folder / 'found.json'}", f"--keep={folder / 'kept'}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (folder / "found.json").exists(), done.stderr
    return done.returncode, json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_mutated_images_and_weights_are_read_or_refused(tmp_path):
    status, found = fuzz(tmp_path, "--files=400", "--seed=1")
    assert (status, found["failures"], found["files"]) == (0, [], 400)
    # Each kind is read in part: a fuzzer whose files are all refused at the door tests the door.
    assert all(
        found["counts"][f"{kind} {outcome}"] > 5 for kind in ("png", "jpg", "webp", "bmp", "safetensors") for outcome in ("read", "refused")
    )
    assert not (tmp_path / "kept").exists()


PLANTED = {
    "exception": "ZeroDivisionError: division by zero",
    "crash": "died (signal 11)",
    "hang": "silent for 2 s",
    "memory": "MB",
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "says"), PLANTED.items(), ids=PLANTED.keys())
def test_what_is_planted_is_found_and_its_file_kept(kind, says, tmp_path):
    # On a loaded machine memory takes its time; only what hangs is to be waited for.
    seconds = 1 if kind == "hang" else 20
    status, found = fuzz(tmp_path, "--files=9", f"--seconds={seconds}", f"--plant={kind}")
    assert (status, found["files"]) == (1, 9)
    (failure,) = found["failures"]
    assert failure["number"] == 7
    assert says in failure["outcome"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [f"0-7.{failure['kind']}"]


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp"])
def test_mutations_are_the_same_for_the_same_seed_and_differ_for_others(kind):
    sound = mutations.images()[kind]
    one, again, other = ([mutations.mutated(random.Random(f"{seed}/{i}"), kind, sound) for i in range(30)] for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert not set(one) <= set(sound)


def test_no_sound_image_holds_the_time_of_day():
    # Else a file that failed in the child would be another in the parent, which keeps it.
    images = [Image.open(io.BytesIO(content)) for kind in mutations.images().values() for content in kind]
    dates = [image.info["icc_profile"][24:36] for image in images if "icc_profile" in image.info]
    assert dates == [bytes(12)] * 4
