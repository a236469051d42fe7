"""Services that a run reports to (`train.report_to`): scalars and the resolved config, nothing else.

Each is a package of its own, imported only if a run reports to it.
"""

import contextlib
import importlib.util
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from .._utils.json_files import MAX_ROWS_BYTES
from .._utils.records import read_record, write_record

PROJECT = "loraplus_jax"
"""The project of the runs, unless the service's own environment variable names another."""
FILE = "trackers.json"
SAVE_SECONDS = 1.0
"""While the rows of before are sent, after how long the file says which."""


class Tracker(Protocol):
    """A service with runs of scalars.

    Attributes:
      address: after `start`, where the run is, to print; None prints nothing.
    """

    address: str | None

    def start(self, directory: Path, config: Mapping[str, Any], run_id: str | None) -> str:
        """Starts a run, or continues the one with this id; returns its id."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the scalars of a step. A step may have several rows, and steps need not increase."""
        ...

    def finish(self, finished: bool) -> None:
        """Ends the run, as finished or as interrupted."""
        ...


class Wandb:
    """Weights & Biases; WANDB_MODE, WANDB_PROJECT and so on hold. Offline files are in the run's directory."""

    def start(self, directory: Path, config: Mapping[str, Any], run_id: str | None) -> str:
        """See `Tracker`."""
        # Otherwise about 30 lines, some before a run has settings; `Reports` prints the address.
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # pyright: ignore[reportMissingImports]

        # By default it also uploads the console, the code, the git state and the machine's load.
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=directory.name,
            id=run_id or uuid.uuid4().hex[:8],
            resume="allow",
            config=dict(config),
            allow_val_change=True,  # of the settings that may change when a run resumes
            dir=directory,
            reinit="create_new",  # and leave a user's own run alone
            settings=settings,
        )
        # Its own step counts calls and never falls.
        self._run.define_metric("*", step_metric="step")
        self.address = self._run.settings.sync_dir if self._run.offline else self._run.url
        return self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **values})

    def finish(self, finished: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME hold."""

    address: str | None = None

    def start(self, directory: Path, config: Mapping[str, Any], run_id: str | None) -> str:
        """See `Tracker`."""
        import mlflow  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        # The client: `mlflow.start_run` would add tags with user, script and commit, and end a user's own run.
        self._metric, self._client = Metric, mlflow.MlflowClient()
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._id = run_id
            return run_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment_id, run_name=directory.name).info.run_id
        params = [Param(key, str(value)) for key, value in flatten_config(config)]
        for first in range(0, len(params), 100):  # the REST API's limit
            self._client.log_batch(self._id, params=params[first : first + 100])
        return self._id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        now = int(1000 * time.time())
        self._client.log_batch(self._id, [self._metric(name, x, now, step) for name, x in values.items()])

    def finish(self, finished: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")


class Trackio:
    """Trackio, whose run is known by its name; TRACKIO_PROJECT, TRACKIO_SPACE_ID and so on hold."""

    address: str | None = None

    def start(self, directory: Path, config: Mapping[str, Any], run_id: str | None) -> str:
        """See `Tracker`."""
        import trackio  # pyright: ignore[reportMissingImports]

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run_id or f"{directory.name}-{uuid.uuid4().hex[:8]}",
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        return self._run.name

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def finish(self, finished: bool) -> None:
        """See `Tracker`."""
        self._run.finish()


TRACKERS: Mapping[str, type[Tracker]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ImportError if the package of a tracker is not installed; the message names the extra."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"train.report_to {name}: the package {name} is not installed; "
                f"run pip install 'loraplus_jax[{name}]', or remove it from train.report_to"
            )


class Reports:
    """The trackers of a run, which continue their runs when it resumes.

    A tracker that raises is left out until the run resumes, with one line: a service that is down ends no run. It
    then gets the rows that it lacks. `trackers.json` keeps each tracker's id, whether it is used, and which rows it
    has; after a kill these are the rows of the file.

    Args:
      names: names in `TRACKERS`.
      directory: the run's directory.
      config: the run's settings as plain values.
      logged: `(step, values)` of the rows so far, those after the checkpoint included.
      console: where to print.
      check: called before every write; raises if the directory is not there any more.
    """

    def __init__(
        self,
        names: Sequence[str],
        directory: Path,
        config: Mapping[str, Any],
        logged: Iterable[tuple[int, Mapping[str, float]]],
        console: Console,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._console, self._path, self._check = console, directory / FILE, check
        self._running: dict[str, Tracker] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self._saved: float | None = time.monotonic()
        """When, until the rows of before are sent; then None."""
        try:
            self._known = _read(self._path)
        except (ValueError, OSError) as error:
            if names:
                self._print_failure(", ".join(names), error)
            return
        in_file = [_key(step, values) for step, values in logged]
        for old in self._known.values():
            if old["used"]:
                old["rows"].update(in_file)
            old["used"] = False
        try:
            for name in names:
                with self._or_left_out(name):
                    tracker, old = TRACKERS[name](), self._known.get(name, {"id": None, "rows": set()})
                    run_id = tracker.start(directory, config, old["id"])
                    self._known[name] = {"id": run_id, "used": False, "rows": old["rows"]}
                    self._running[name] = tracker
                    if tracker.address is not None:
                        console.print(f"{name}: {tracker.address}")
            self._save()
        except BaseException:  # without an end, a service shows a run as running forever
            self._finish(False)
            raise

    def catch_up(self) -> None:
        """Says that the rows of before are sent: from now on, all in the file are."""
        for name in self._running:
            self._known[name]["used"] = True
        self._save()
        self._saved = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends a row to the trackers that lack it."""
        running = [*self._running.items()]
        for name, tracker in running:
            rows, key = self._known[name]["rows"], _key(step, values)
            if key not in rows:
                with self._or_left_out(name):
                    tracker.log(step, values)
                    rows.add(key)
        is_due = self._saved is not None and time.monotonic() > self._saved + SAVE_SECONDS
        if is_due:
            self._saved = time.monotonic()
        if is_due or len(self._running) < len(running):
            self._save()

    def close(self, finished: bool) -> None:
        """Ends the trackers' runs, as finished or as interrupted."""
        self._finish(finished)
        self._save()

    def _finish(self, finished: bool) -> None:
        for name, tracker in [*self._running.items()]:
            with self._or_left_out(name):
                tracker.finish(finished)

    def _save(self) -> None:
        if self._known:
            self._check()
            known = {name: old | {"rows": sorted(old["rows"])} for name, old in self._known.items()}
            write_record(self._path, {"services": known})

    @contextlib.contextmanager
    def _or_left_out(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any type: these packages do not say which
            self._running.pop(name, None)
            if name in self._known:
                self._known[name]["used"] = False
            self._print_failure(name, error)

    def _print_failure(self, name: str, error: Exception) -> None:
        # Without the password of an address.
        reason = re.sub(r"//[^/@\s]+@", "//***@", " ".join(f"{error}".split())[:200])
        self._console.print(
            f"train.report_to {name} failed ({type(error).__name__}: {reason}); the run continues without it"
        )


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What `trackers.json` says, if it is there."""
    if not path.exists():
        return {}
    record = read_record(path, limit=MAX_ROWS_BYTES)
    try:
        services: dict[str, Any] = record["services"]
        return {
            n: {"id": old["id"], "used": old["used"], "rows": {*old["rows"]}} for n, old in services.items()
        }
    except (AttributeError, TypeError, KeyError):
        raise ValueError(f"{path} is damaged; remove it to start new runs at the services") from None


def _key(step: int, values: Mapping[str, float]) -> str:
    """What identifies a row: its step and, as a step may have several rows, one of its names."""
    return f"{step} {min(values, default='')}"


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the settings by dotted name.

    >>> dict(flatten_config({"seed": 0, "train": {"steps": 5}}))
    {'seed': 0, 'train.steps': 5}
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten_config(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
