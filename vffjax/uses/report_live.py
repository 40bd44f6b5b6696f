"""The page of a run that is training, made of its metrics.jsonl alone. It reads; it takes no lock, and uses no device. Needs no JAX."""

import pathlib
import time
from typing import Any

from vffjax import files, paths
from vffjax.errors import UserError, aid, notice
from vffjax.runs.logbook import finished, read_metrics
from vffjax.runs.plots import total_epochs
from vffjax.uses import report_page
from vffjax.uses.report_page import Section

PAGE = "live.html"
RELOAD = 5  # seconds after which the page reloads itself
LOOK = 1.0  # seconds between two looks at metrics.jsonl
SHARE = 4  # times as long as drawing took, nothing is drawn, so that it takes little from the training


def follow(workdir: pathlib.Path) -> pathlib.Path:
    """Writes live.html whenever an epoch has ended, until the run has ended; returns its path.

    Raises:
        UserError: there is no run, or its configuration cannot be read.
    """
    workdir = paths.local(workdir, "--workdir")
    paths.check_run_folder(workdir)
    config = _config(workdir)
    paths.refuse_links(workdir, report_page.PICTURES)
    notice(f"{workdir / PAGE} is drawn after each epoch; open it in a browser, and stop this by Ctrl-C")
    seen: list[dict[str, Any]] | None = None
    while True:
        ended = finished(workdir) is not None
        records = read_metrics(workdir)
        took = 0.0
        if records != seen or ended:
            began = time.monotonic()
            _write(workdir, config, records, ended)
            took, seen = time.monotonic() - began, records
        if ended:
            return workdir / PAGE
        time.sleep(max(LOOK, SHARE * took))


def _config(workdir: pathlib.Path) -> dict[str, Any]:
    path = workdir / "config.json"
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise UserError(f"--workdir={workdir}: no run here ({path.name} is missing); give the folder of a run that has begun") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it") from None


def _write(workdir: pathlib.Path, config: dict[str, Any], records: list[dict[str, Any]], ended: bool) -> None:
    folder = report_page.picture_folder(workdir)
    sections = [
        Section("Curves", folder).fill(lambda section: report_page.curves(section, records)),
        Section("The run", folder).fill(lambda section: report_page.about_the_run(section, config, [], workdir)),
    ]
    name, rule = workdir.resolve().name, report_page.text(config.get("rule"))
    if ended:
        about = "The run has ended. vffjax report --workdir with its folder writes report.html, which shows what was learnt."
    else:
        about = f"The run is training, or was interrupted. The page is drawn after each epoch, and reloads itself every {RELOAD} seconds."
    facts = [("Epoch", "none has ended yet")]
    with aid(f"{workdir / PAGE}, its figures"):  # the lines of metrics.jsonl may come from anyone
        facts = _facts(config, records) or facts
    report_page.write(workdir / PAGE, f"{name}: rule {rule}", about, facts, sections, 0 if ended else RELOAD)


def _facts(config: dict[str, Any], records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not records:
        return []
    last = records[-1]
    facts = [("Epoch", f"{last['epoch']} of {report_page.text(total_epochs(config, records))}")]
    for key, name, shown in (
        ("val_error", "Validation error", "{:.2f} %".format),
        ("train_accuracy", "Training error", lambda accuracy: f"{100 * (1 - accuracy):.1f} %"),
        ("loss", "Loss", "{:.3f}".format),
        ("seconds", "Seconds an epoch", "{:.1f}".format),
    ):
        if isinstance(last.get(key), (int, float)):
            facts.append((name, shown(last[key])))
    return facts
