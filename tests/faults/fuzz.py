"""Fuzzing of the files that may come from anyone: images for `predict`, and weight files.

    python tests/faults/fuzz.py --files 10000 --seed 0 [--out FILE.json] [--keep DIR]

Each file is a valid PNG, JPEG or safetensors file that was mutated; which one follows from the seed and the file's number. A child
process reads all of them, one after the other, by `pictures.read_image` and `weights.read_weights`. Allowed are success and
`UserError`. Another exception, a dead or silent process, a file that takes longer than `--seconds`, and memory beyond `--megabytes` are
failures; so is a UserError for want of memory, since the child's address space is limited to a little more than that. Status 1 if there
is a failure; its file is written to `--keep`.
"""

import argparse
import collections
import faulthandler
import functools
import gc
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from faults import mutations  # noqa: E402

# What one image of `pictures.MAX_PIXELS` takes: decoded with an alpha channel, and converted, 256 MiB each; the file, and some to spare.
MEGABYTES = 700


def memory(key):
    """VmRSS (now) or VmHWM (its peak) of this process, in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1000


def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


@functools.cache
def networks():
    """Of a network by our names and of one by torchvision's a plan, its states, shapes only, and a sound weight file."""
    import jax

    from oracles import CONV, config_of, random_states
    from vffjax.training.plan import init_states, make_plan
    from vffjax.weights import weights

    shape, found = (8, 8, 2), []
    for keys in (CONV, {"network": "resnet18", "width_factor": 0.01, "head_grid": 1}):
        plan = make_plan(config_of(**keys), 12, 3)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "w.safetensors"
            weights.write_weights(path, plan, random_states(plan, shape), {"image_shape": list(shape)})
            found.append((plan, jax.eval_shape(lambda plan=plan: init_states(plan, shape)), path.read_bytes()))
    return found


def make(seed, number):
    """Suffix and bytes of file `number`."""
    rng = random.Random(f"{seed}/{number}")
    kind = rng.choice(["png", "png", "jpg", "webp", "bmp", "safetensors"])
    sound = [networks()[number % 2][2]] if kind == "safetensors" else mutations.images()[kind]
    return kind, mutations.mutated(rng, kind, sound)


def read(path, kind, number):
    """What happened: read or refused. Raises what must not happen."""
    from vffjax.data import pictures
    from vffjax.errors import UserError
    from vffjax.weights import weights

    try:
        if kind == "safetensors":
            plan, states, _ = networks()[number % 2]
            weights.read_weights(path, plan, states)
        else:
            pictures.read_image(path, ((8, 8, 1), (32, 32, 3))[number % 2])
        return "read"
    except UserError as error:
        if "\n" in str(error) or not str(error).startswith(str(path)):
            raise AssertionError(f"not one line that names the file: {error}") from error
        # Pillow says it as an OSError too.
        if "MemoryError" in str(error) or "memory" in str(error.__context__):
            raise AssertionError(f"wants too much memory: {error}") from error
        return "refused"


PLANTED = {
    "exception": lambda: 1 / 0,
    "crash": lambda: os.kill(os.getpid(), 11),
    "hang": lambda: time.sleep(60),
    "memory": lambda: len(bytearray(b"x") * (MEGABYTES + 100) * 10**6),
}


def child(a):
    """Reads files from `--first` on; says each file's number before, and its outcome after."""
    from PIL import Image  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "file"
        for number in range(8):  # what is loaded once
            kind, content = make(a.seed, number)
            path.with_suffix(f".{kind}").write_bytes(content)
            read(path.with_suffix(f".{kind}"), kind, number)
        gc.collect()
        before = memory("VmRSS")
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + int((a.megabytes + 200) * 1e6)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in range(a.first, a.files):
            kind, content = make(a.seed, number)
            target = path.with_suffix(f".{kind}")
            target.write_bytes(content)
            print(json.dumps({"number": number}), flush=True)
            forget_peak()
            faulthandler.dump_traceback_later(a.seconds + 1, exit=True)
            start = time.monotonic()
            try:
                if a.plant and number % 50 == 7:
                    PLANTED[a.plant]()
                outcome = read(target, kind, number)
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - start
            faulthandler.cancel_dump_traceback_later()
            grown = memory("VmHWM") - before
            if seconds > a.seconds:
                outcome = f"took {seconds:.1f} s"
            if grown > a.megabytes:
                outcome = f"took {grown:.0f} MB"
            done = {"number": number, "kind": kind, "outcome": outcome, "seconds": seconds, "mb": grown, "rss": memory("VmHWM")}
            print(json.dumps(done), flush=True)
            target.unlink()


def run(a):
    """Outcomes of all files, from as many children as it takes."""
    found, first = [], 0
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    while first < a.files:
        options = ["--seed", a.seed, "--files", a.files, "--first", first, "--seconds", a.seconds, "--megabytes", a.megabytes]
        options += ["--plant", a.plant] if a.plant else []
        command = [sys.executable, __file__, "--child", *map(str, options)]
        at = None
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout
            assert process.stderr
            for line in process.stdout:
                at = json.loads(line)
                if "outcome" in at:
                    found.append(at)
            said = process.stderr.read().strip().splitlines()
        if at is None:
            raise RuntimeError(f"the child did not begin: {said[-1:]}")
        if "outcome" not in at:
            last = said[-1] if process.returncode > 0 and said else f"signal {-process.returncode}"
            why = f"silent for {a.seconds + 1} s" if any("Timeout" in line for line in said) else f"died ({last})"
            found.append({"number": at["number"], "kind": make(a.seed, at["number"])[0], "outcome": why, "seconds": 0, "mb": 0, "rss": 0})
        first = at["number"] + 1
        if process.returncode == 0:
            break
    return found


def summary(found, a, seconds):
    counts = collections.Counter(f"{f['kind']} {f['outcome'] if f['outcome'] in ('read', 'refused') else 'FAILED'}" for f in found)
    return {
        "files": len(found),
        "seed": a.seed,
        "counts": dict(sorted(counts.items())),
        "failures": [f for f in found if f["outcome"] not in ("read", "refused")],
        "slowest_seconds": round(max(f["seconds"] for f in found), 3),
        "most_memory_grown_mb": round(max(f["mb"] for f in found)),
        "peak_rss_mb": round(max(f["rss"] for f in found)),
        "seconds": round(seconds, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=5, help="a file that takes longer is a failure")
    parser.add_argument("--megabytes", type=int, default=MEGABYTES, help="memory of one file beyond which it is a failure")
    parser.add_argument("--out", help="JSON")
    parser.add_argument("--keep", help="folder for the files that failed")
    parser.add_argument("--plant", choices=PLANTED, help="misbehave on every fiftieth file, to see that it is found")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        return child(a)
    start = time.monotonic()
    made = summary(run(a), a, time.monotonic() - start)
    made["seconds"] = round(time.monotonic() - start, 1)
    for failure in made["failures"]:
        if a.keep:
            pathlib.Path(a.keep).mkdir(parents=True, exist_ok=True)
            kind, content = make(a.seed, failure["number"])
            pathlib.Path(a.keep, f"{a.seed}-{failure['number']}.{kind}").write_bytes(content)
    print(json.dumps(made, indent=2))
    if a.out:
        pathlib.Path(a.out).write_text(json.dumps(made, indent=2) + "\n")
    return sys.exit(1 if made["failures"] or made["files"] != a.files else 0)


if __name__ == "__main__":
    main()
