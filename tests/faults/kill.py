"""Kills training runs at random instants, lets the same command go on, and compares with a run that nobody disturbed, to the bit.

    python tests/faults/kill.py --trials 50 --seed 0 --out kill.json

Trials take turns over `SCHEDULES` and over where the signal falls: at any time of the run's life (start and compilation included), while a
checkpoint is being written, within milliseconds of an epoch's line, around the change from one group to the next, and, every other trial,
inside of an epoch. Every trial is killed one to three times, all but the last before it has finished; then the command runs to its end.
Compared are the summary, every line of metrics.jsonl and every array of every saved epoch; not times. Exit status 1 if any trial differs.

With --signal SIGTERM a run that gets it while it trains must end by itself with status 143, having saved. With --signal SIGINT it must end
with status 130 within `MOST_SECONDS`, whatever it is doing.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {"widths": (8, 8, 12, 12), "train_examples": 400, "batch_size": 32}
JOINT, SEQUENTIAL = {"epochs": 12}, {"epochs": 5, "schedule": "sequential"}
SCHEDULES: dict[str, dict[str, Any]] = {
    "joint": JOINT | {"checkpoint_every": 1},
    "joint, every other epoch": JOINT | {"checkpoint_every": 2, "labelling": "triplet", "negatives": "hard"},
    "sequential": SEQUENTIAL | {"checkpoint_every": 1},
    "sequential, cached": SEQUENTIAL | {"checkpoint_every": 2, "feature_cache": "host"},
}
# Epochs of about a second, saved inside now and then, for signals that fall inside of them.
_LONG = {"train_examples": 1_300, "batch_size": 8, "segment_steps": 5, "checkpoint_seconds": 0.3}
LONG: dict[str, dict[str, Any]] = {
    "joint, long epochs": _LONG | {"epochs": 4, "checkpoint_every": 3, "flip": True, "alternating_flip": True},
    "sequential, long epochs": _LONG | {"epochs": 2, "schedule": "sequential", "feature_cache": "device"},
}
INSTANTS = ("any time", "in a save", "at a line", "between groups")
INSIDE = "inside an epoch"
MOST_SECONDS = 5.0


class Run:
    """One process of `train`, watched from outside."""

    def __init__(self, changes: dict[str, Any], workdir: pathlib.Path, environment: dict[str, str]):
        """`changes`: keys of configs/digits.py; of a sequential run two groups are expected."""
        self.workdir = workdir
        self.total = changes["epochs"] * (2 if changes.get("schedule") == "sequential" else 1)
        self.began = time.monotonic()
        keys = [f"--config.{key}={value}" for key, value in changes.items()]
        command = [sys.executable, "train.py", "--config=configs/digits.py", *keys, f"--workdir={workdir}"]
        with open(workdir.with_suffix(".log"), "ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def lines(self) -> int:
        try:
            return (self.workdir / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def saving(self) -> bool:
        folder = self.workdir / "checkpoints"
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return any("tmp" in name or (name.isdigit() and f"{name}.sha256.json" not in names) for name in names)

    def inside(self) -> bool:
        return (self.workdir / "checkpoints" / "inside").is_dir()

    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> int:
        return self.process.wait(timeout=300)


def wait_for(run: Run, instant: str, life: float, draw: random.Random) -> str:
    """Returns at the instant, or when the process has ended; says where the run was. `life`: seconds that an undisturbed process takes."""
    before, total = run.lines(), run.total
    if instant == INSIDE:
        line = draw.randint(before, max(before, total - 1))
        while run.alive() and (run.lines() < line or not run.inside()):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.5))
    elif instant == "any time":
        until = run.began + draw.uniform(0, life)
        while run.alive() and time.monotonic() < until:
            time.sleep(0.001)
    else:
        if before == total:  # nothing is left to be written: it evaluates
            return wait_for(run, "any time", life, draw)
        line = max(total // 2, before + 1) if instant == "between groups" else draw.randint(before + 1, total)
        while run.alive() and run.lines() < line:
            time.sleep(0.0005)
        if instant == "in a save":
            while run.alive() and not run.saving() and run.lines() < total:
                pass
        time.sleep(draw.choice([0.0, 0.002, 0.01, 0.05, 0.2]) * draw.random())
    return f"{run.lines()} lines{', saving' if run.saving() else ''}{', inside' if run.inside() else ''}"


def disturb(
    changes: dict[str, Any], instant: str, workdir: pathlib.Path, environment: dict[str, str], life: float, draw: random.Random, how: int
) -> dict:
    """One trial up to its end; the signals it got, and what became of the process then."""
    signals = []
    for _ in range(draw.randint(1, 3)):
        run = Run(changes, workdir, environment)
        where = wait_for(run, instant, life, draw)
        run.process.send_signal(how)
        sent = time.monotonic()
        signals.append({"at": round(sent - run.began, 3), "where": where, "status": run.end()})
        signals[-1]["seconds"] = round(time.monotonic() - sent, 2)
        if signals[-1]["status"] == 0:  # it was quicker
            break
    return {"instant": instant, "signals": signals, "status": Run(changes, workdir, environment).end()}


def judge(trial: dict[str, Any], reference: pathlib.Path, workdir: pathlib.Path, how: int) -> list[str]:
    """What is wrong with a trial, a line each."""
    from vffjax.uses import reproduction

    if trial["status"] != 0:
        return [f"the last process ended with status {trial['status']}: {workdir.with_suffix('.log').read_text()[-2000:]}"]
    wrong = list(reproduction.compare(reference, workdir)["differences"])
    raw = [(folder / "metrics.jsonl").read_bytes() for folder in (reference, workdir)]
    epochs = [[json.loads(line)["epoch"] for line in content.splitlines()] for content in raw]
    if epochs[0] != epochs[1] or not raw[1].endswith(b"\n"):
        wrong.append(f"metrics.jsonl: epochs {epochs[1]}")
    stray = [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.removesuffix(".sha256.json").isdigit()]
    if stray:
        wrong.append(f"checkpoints: left behind {stray}")
    # By default SIGTERM ends a process that does not train yet or no more.
    ends = {signal.SIGKILL: {-9, 0}, signal.SIGTERM: {143, -15, 0}, signal.SIGINT: {130, 0}}[signal.Signals(how)]
    wrong += [f"a signalled process ended with status {s['status']}" for s in trial["signals"] if s["status"] not in ends]
    slow = [s["seconds"] for s in trial["signals"] if s["status"] == 130 and s["seconds"] > MOST_SECONDS]
    wrong += [f"Ctrl-C was answered after {seconds} s" for seconds in slow]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("SIGKILL", "SIGTERM", "SIGINT"), default="SIGKILL")
    parser.add_argument("--schedules", default="", help="comma-separated numbers of SCHEDULES and LONG; default: all")
    parser.add_argument("--compile", action="store_true", help="share no compiled programs, so that signals fall into the compiler too")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE.json")
    a = parser.parse_args()
    how = signal.Signals[a.signal]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets background processes ignore it
    draw, trials, failures = random.Random(a.seed), [], 0
    every = SCHEDULES | LONG
    names = list(every)
    chosen = [names[int(i)] for i in a.schedules.split(",")] if a.schedules else names
    with tempfile.TemporaryDirectory(prefix="vffjax-kill-") as scratch:
        folder = pathlib.Path(scratch)
        # Programs are compiled once, by the undisturbed runs: else most instants would fall into the compiler.
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        # A run that is interrupted while it compiles has to compile in each trial.
        cache = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"}
        apart = {key: value for key, value in environment.items() if not a.compile or key not in cache}
        life = {}
        for i, schedule in enumerate(chosen):
            for name in (f"reference{i}", f"again{i}"):
                run = Run(SMALL | every[schedule], folder / name, environment)
                if run.end():
                    sys.exit(f"the undisturbed run failed: {(folder / name).with_suffix('.log').read_text()}")
            # The second found its programs compiled, as the trials do; and two undisturbed processes must agree.
            life[schedule] = time.monotonic() - run.began
            if wrong := judge({"status": 0, "signals": []}, folder / f"reference{i}", folder / f"again{i}", how):
                sys.exit(f"two undisturbed runs differ: {wrong}")
        short, long = ([name for name in chosen if name in kind] for kind in (SCHEDULES, LONG))
        for number in range(a.trials):
            turn = number // 2
            if (number % 2 and long) or not short:
                schedule, instant = long[turn % len(long)], INSIDE
            else:
                schedule, instant = short[turn % len(short)], INSTANTS[turn // len(short) % len(INSTANTS)]
            workdir = folder / f"trial{number}"
            changes = SMALL | every[schedule]
            trial = {"schedule": schedule} | disturb(changes, instant, workdir, apart, life[schedule], draw, how)
            trial["wrong"] = judge(trial, folder / f"reference{chosen.index(schedule)}", workdir, how)
            failures += bool(trial["wrong"])
            trials.append(trial)
            print(f"{number + 1}/{a.trials}  {schedule}; {instant}; {trial['signals']}  {trial['wrong'] or 'equal'}", flush=True)
    caught = sum(s["status"] != 0 for trial in trials for s in trial["signals"])
    inside = sum("inside" in s["where"] for trial in trials for s in trial["signals"])
    slowest = max((s["seconds"] for trial in trials for s in trial["signals"]), default=0.0)
    saving = sum("saving" in s["where"] for trial in trials for s in trial["signals"])
    print(
        f"{a.trials - failures} of {a.trials} trials ended equal; {caught} processes were ended by {how.name}, {saving} of them in a save, "
        f"{inside} inside of an epoch that had been saved; the slowest took {slowest} s"
    )
    if a.out:
        a.out.write_text(json.dumps({"seed": a.seed, "signal": how.name, "trials": trials}, indent=2) + "\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
