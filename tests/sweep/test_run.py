"""Which split decides at each stage of a sweep, on units whose losses are given."""

import io
import math
import re
import shutil
import types

import pytest

from loraplus_jax._utils.records import read_record, write_record
from loraplus_jax.sweep import run as module
from loraplus_jax.sweep.arms import programs_of
from loraplus_jax.sweep.executor import InProcess, Opened
from loraplus_jax.sweep.run import Sweep
from loraplus_jax.sweep.unit import Progress, unit_directory
from loraplus_jax.training.console import LineConsole
from loraplus_jax.training.run_directory import open_output_directory, origins_of, saved_record
from loraplus_jax.training.run_files import CHECKPOINTS, RESULT

from ..messages import mentions

# Loss is this times the rate of B: validation favors the smallest rate, test the largest.
SLOPES = {"validation": 1.0, "test": -1.0}


QUIET = LineConsole(quiet=True)


class GivenLosses:
    """Executor of units that train nothing; the last of a stage finishes first."""

    workers = 3
    finish = InProcess.finish

    def __init__(self, group_size=None):
        self.group_size, self.units = group_size, []

    async def open(self, abstract, most, members_at_once, group_size):
        return Opened(None, {"base": "b", "identity": {}}, 1, self.group_size or most)

    def loss(self, split, trial):
        return 9.0 + SLOPES[split] * trial.learning_rate * trial.lr_ratio

    async def run(self, opened, stages, units):
        self.units += units
        return [self.result(stages, unit) for unit in reversed(units)][::-1]

    def result(self, sweep, unit):
        rows = []
        for stop in unit.stops:
            for arm, trial, seed in unit.members:
                key = {"stage": unit.stage, "arm": arm, "trial": list(trial), "seed": seed, "step": stop}
                rows.append({**key, "split": unit.split, "loss": self.loss(unit.split, trial)})
            sweep.follow(unit, Progress(stop, list(rows)))
        return {"rows": rows, "devices": "1 x given", "seconds": 0.0}


@pytest.fixture
def ended(tmp_path, monkeypatch, parsed):
    """A sweep on an executor, to its end but for figures and winner."""
    task = types.SimpleNamespace(metric="loss", mode="min", derived=lambda values: {})
    splits = {name: {"x": [0.0] * 4} for name in ("validation", "test")}
    data = types.SimpleNamespace(task=task, examples={"test": 4}, summary=(), constant={}, splits=splits)
    abstract = types.SimpleNamespace(data=data, steps=8, shapes=None)
    monkeypatch.setattr(module, "abstract_population", lambda run, data: abstract)
    monkeypatch.setattr(module, "origin_of", lambda abstract, base: {"base": base, "identity": {}})
    monkeypatch.setattr(module, "load_weights", lambda abstract: "weights")
    monkeypatch.setattr(module, "fingerprint", lambda weights: "b")
    monkeypatch.setattr(Sweep, "print_head", lambda self: None)
    monkeypatch.setattr(Sweep, "finish", lambda self: self.report())

    def end(executor, *options, fresh=True, out="out", allow_different=(), console=QUIET):
        run = parsed(*options, f"--output_dir={tmp_path / out}", "--train.compilation_cache=false")
        how = {"fresh": fresh, "allow_different": allow_different}
        with open_output_directory(run, console, **how) as output:
            sweep = Sweep(run, programs_of(run), output, executor)
            return sweep, sweep.train()

    return end


@pytest.mark.parametrize("option", ["method=halving", "method=grid", "learning_rates=[1e-3]"])
def test_the_search_selects_on_validation_and_the_report_tests(ended, option):
    sweep, report = ended(GivenLosses(), f"--sweep.{option}")
    run = sweep.run
    pairs = [(row["first"], row["second"]) for row in report["comparisons"]]
    assert pairs == [("lora_plus", "lora"), ("lora_plus", "control")]
    splits = {(row["stage"], row["split"]) for row in sweep.rows()}
    assert splits == {("search", "validation"), ("report", "test")}
    for row in sweep.rows():
        rate, ratio, *_ = row["trial"]
        assert row["loss"] == 9.0 + SLOPES[row["split"]] * rate * ratio
    for arm, chosen in sweep.tunings[0].chosen.items():
        rates = [t.learning_rate * t.lr_ratio for t in run.trials if t.arm == arm]
        assert chosen.learning_rate * chosen.lr_ratio == min(rates)


def test_what_is_before_the_first_estimate_is_told_before_it(ended):
    class Timed(GivenLosses):
        def result(self, sweep, unit):
            for step_seconds in (None, 0.2) if unit.is_timed else ():
                sweep.follow(unit, Progress(unit.start, batch_seconds=0.1, step_seconds=step_seconds))
            return super().result(sweep, unit)

    text = io.StringIO()
    ended(Timed(), "--sweep.methods=[lora_plus,full]", console=LineConsole(file=text))
    lines = re.findall(
        r"^(?:(.+): )?(loading and compiling took \d+ s|estimate(?=: ))", text.getvalue(), re.M
    )
    names = list(dict.fromkeys(name for name, _ in lines))
    assert len(names) == 2
    assert lines == [
        (n, line) for n in names for line in ("loading and compiling took 1 s", *["estimate"] * 2)
    ]


class CountedRow(dict):
    """Counts how often the step of a row is read."""

    read = 0

    def __getitem__(self, name):
        CountedRow.read += name == "step"
        return super().__getitem__(name)


def test_files_and_bookkeeping_are_linear_in_units_and_evaluations(ended, monkeypatch):
    class Counted(GivenLosses):
        def result(self, sweep, unit):
            result = super().result(types.SimpleNamespace(follow=lambda *_: None), unit)
            # At each step, as a unit in training.
            rows = [CountedRow(row) for row in result["rows"]]
            for step in range(unit.start, unit.stops[-1] + 1):
                told = [row for row in rows if dict.__getitem__(row, "step") <= step]
                sweep.follow(unit, Progress(step, told))
            return result | {"rows": rows}

    written, reports = [], []
    write, report = module.to_json, module.make_report
    monkeypatch.setattr(module, "to_json", lambda row: written.append(1) or write(row))
    monkeypatch.setattr(module, "make_report", lambda *args: reports.append(1) or report(*args))
    reads = []
    for seeds in (8, 16, 32):
        CountedRow.read = 0
        written.clear()
        reports.clear()
        sweep, _ = ended(Counted(1), f"--sweep.report_seeds={seeds}")
        reads.append(CountedRow.read)
        assert len(written) == len(sweep.rows())
        # At the rung, at the last step of the search, and at the end.
        assert len(reports) == 3
    assert reads[2] - reads[1] < 2.2 * (reads[1] - reads[0])


class Told(GivenLosses):
    """Tells losses of its own before each result, as an attempt that is lost."""

    def result(self, sweep, unit):
        members = [{"arm": arm, "trial": list(trial), "seed": seed} for arm, trial, seed in unit.members]
        key = {"stage": unit.stage, "split": unit.split, "loss": 1.0}
        rows = [key | member | {"step": stop} for stop in unit.stops for member in members]
        sweep.follow(unit, Progress(unit.stops[-1], rows))
        return super().result(sweep, unit)


@pytest.mark.slow
def test_the_report_does_not_depend_on_groups_on_which_ends_first_nor_on_lost_attempts(ended):
    whole = GivenLosses()
    sweep, report = ended(whole, "--sweep.keep=0.5")
    assert [unit.name for unit in whole.units] == ["search-1-0", "search-8-0", "report-0"]
    for split, size in ((GivenLosses(1), 1), (Told(3), 3)):
        again, same = ended(split, "--sweep.keep=0.5")
        assert (again.rows(), same) == (sweep.rows(), report)
        assert [len(unit.members) for unit in split.units[: 32 // size]] == [size] * (32 // size)


class Saving(GivenLosses):
    """Has a checkpoint of each unit, and notes those that are there when a unit ends."""

    there = ()

    def result(self, sweep, unit):
        result = super().result(sweep, unit)
        (unit_directory(sweep.directory, unit.name) / CHECKPOINTS).mkdir(parents=True)
        for source in unit.sources:
            assert (unit_directory(sweep.directory, source.unit) / CHECKPOINTS).exists()
        self.there = {path.parent.name.rpartition("-")[0] for path in sweep.directory.glob("units/*/*")}
        return result


def test_members_continue_from_the_checkpoint_of_the_unit_that_trained_them(ended):
    executor = Saving(3)
    sweep, _ = ended(executor, "--sweep.keep=0.5")
    units = {unit.name: unit for unit in executor.units}
    continued = [unit for unit in executor.units if unit.stage == "search" and unit.start]
    assert [len(unit.members) for unit in continued] == [3] * 5 + [1]
    for unit in continued:
        for member, source in zip(unit.members, unit.sources, strict=True):
            assert units[source.unit].members[source.number] == member
            assert len(units[source.unit].members) == source.size
            assert units[source.unit].stops[-1] == unit.start
    # Of the stage before the report, and of the report's own; at the end none.
    assert executor.there == {"search-8", "report"}
    assert not list(sweep.directory.glob(f"units/*/{CHECKPOINTS}"))


LISTED = (
    *("--sweep.learning_rates=[1e-3,2e-3]", "--sweep.lr_ratios=[4]"),
    *("--sweep.lora_learning_rates=[1e-3,2e-3]", "--sweep.control=false"),
)


class BestRates(GivenLosses):
    """The loss grows with the distance to the best rate of each method."""

    def __init__(self, lora, lora_plus, group_size=None):
        super().__init__(group_size)
        self.best = {"lora": lora, "lora_plus": lora_plus}

    def loss(self, split, trial):
        return (
            math.nan if trial.learning_rate > 1 else abs(math.log(trial.learning_rate / self.best[trial.arm]))
        )


# A halving that keeps one at its rung, step 1 of 8, selects it there; one that keeps both, at the end.
@pytest.mark.parametrize(
    ("option", "stops", "size"),
    [("method=grid", (8,), 1), ("keep=0.5", (1,), None), ("keep=0.75", (1, 8), 1)],
)
def test_rates_beyond_the_list_are_tried_until_the_best_is_inside(ended, option, stops, size):
    executor = BestRates(lora=3e-4, lora_plus=4e-3, group_size=size)
    sweep, report = ended(executor, *LISTED, f"--sweep.{option}", "--sweep.widen=2", "--sweep.seeds=[0,1]")
    added = [unit for unit in executor.units if unit.name.startswith("wider")]
    members = [(unit.name.split("-")[1], member) for unit in added for member in unit.members]
    assert [(turn, member.trial.learning_rate, member.seed) for turn, member in members] == [
        (turn, rate, seed)
        for turn, rates in (("0", (5e-4, 4e-3)), ("1", (2.5e-4, 8e-3)))
        for rate in rates
        for seed in (0, 1)
    ]
    assert {(unit.start, unit.stops) for unit in added} == {(0, stops)}
    chosen = {arm: trial.learning_rate for arm, trial in sweep.tunings[0].chosen.items()}
    assert chosen == {"lora": 2.5e-4, "lora_plus": 4e-3}
    # Two more rates are the most, and LoRA's best is still an end.
    assert [line.partition(":")[0] for line in report["at_the_edge"]] == ["LoRA"]
    steps = report["member_steps"]
    assert (steps["search"], steps["grid"]) == (16 * stops[-1], 16 * 8)
    assert report["protocol"]["settings"] == {"lora": 4, "lora_plus": 4}


def test_a_further_rate_has_the_best_ratio_and_rank_and_may_be_of_one_method(ended):
    options = ("lr_ratios=[2,4]", "ranks=[4,8]", "rungs=[0.125,0.5]", "keep=0.5", "widen=1")
    options += ("lora_learning_rates=[1e-3,1.5e-3,2e-3]",)
    executor = BestRates(lora=1.5e-3, lora_plus=4e-3)
    sweep, report = ended(executor, *LISTED, *(f"--sweep.{option}" for option in options))
    (added,) = [member for unit in executor.units for member in unit.members if unit.name.startswith("wider")]
    # The first of equal losses.
    assert tuple(added.trial) == (4e-3, 2.0, 16.0, 4)
    assert sweep.tunings[0].chosen["lora_plus"] == added.trial
    assert report["protocol"]["settings"] == {"lora": 6, "lora_plus": 9}
    assert report["protocol"]["equal_budgets"] is False


def test_a_rate_that_diverges_ends_the_range(ended):
    sweep, report = ended(BestRates(lora=1.5e-3, lora_plus=9.0), *LISTED, "--sweep.widen=10")
    # 0.002 doubled until 1.024 diverges.
    assert sweep.tunings[0].chosen["lora_plus"].learning_rate == 0.512
    assert report["at_the_edge"] == []


def test_methods_share_stages_and_one_that_diverges_is_left_out(ended):
    """Two programs: LoRA with LoRA+, and DoRA, whose smallest rates are the same settings."""

    class Diverging(GivenLosses):
        def result(self, sweep, unit):
            result = super().result(sweep, unit)
            for row in result["rows"]:
                row["loss"] = None if row["arm"] == "dora" else row["loss"]
            sweep.follow(unit, Progress(unit.stops[-1], result["rows"]))
            return result

    executor = Diverging()
    sweep, report = ended(executor, "--sweep.methods=[lora_plus,dora]", "--sweep.keep=0.5")
    names = ["lora-search-1-0", "lora-search-8-0", "lora-report-0", "dora-search-1-0"]
    assert [unit.name for unit in executor.units] == names
    assert {member.arm for unit in executor.units[:3] for member in unit.members} == {"lora", "lora_plus"}
    assert list(report["chosen"]) == ["lora", "lora_plus"]
    assert {row["arm"] for row in report["runs"]} == {"lora", "lora_plus"}
    assert report["protocol"]["settings"] == {"lora": 16, "lora_plus": 16, "dora": 16}
    assert "no result: DoRA" in report["verdict"]
    assert not sweep.tunings[1].chosen


class Keeping(GivenLosses):
    """Leaves each result where it is read back; its numbers add up to other bits in another order."""

    async def open(self, *args):
        return (await super().open(*args))._replace(origin=module.origin_of(None, "b"))  # pyright: ignore

    def result(self, sweep, unit):
        result = super().result(sweep, unit)
        if unit.is_scored:
            rows = [{"arm": m.arm, "seed": m.seed, "bleu": 0.1 + 0.7 / m.seed} for m in unit.members]
            result |= {"cost": {"trainable": 1, "step_seconds": unit.members[0].seed / 7}}
            result |= {"text_scores": rows, "unrelated": []}
        path = unit_directory(sweep.directory, unit.name)
        path.mkdir(parents=True)
        origin = origins_of(saved_record(sweep.directory))[-1]
        write_record(path / RESULT, result | {"members": unit.members, "origin": origin})
        return read_record(path / RESULT)


METHODS = ("--sweep.methods=[lora_plus]", "--sweep.report_seeds=5")


def test_what_is_read_back_in_part_or_whole_gives_the_same_report(ended, monkeypatch):
    first = Keeping(2)
    sweep, straight = ended(first, *METHODS)
    lost = [unit.name for unit in first.units if unit.stage == "report"][1]
    shutil.rmtree(unit_directory(sweep.directory, lost))
    again = Keeping(2)
    assert ended(again, *METHODS, fresh=False)[1] == straight
    assert [unit.name for unit in again.units] == [lost]
    # Weights are compared also where nothing is left to train.
    whole = Keeping(2)
    assert ended(whole, *METHODS, fresh=False)[1] == straight
    assert not whole.units
    monkeypatch.setattr(module, "fingerprint", lambda weights: "c")
    with pytest.raises(ValueError, match=mentions("base.weights", "b", "c")):
        ended(whole, *METHODS, fresh=False)


def test_the_units_of_a_sweep_with_other_settings_are_errors(ended, tmp_path):
    other, same = ended(Keeping(), "--train.batch_size=16")[0], ended(Keeping(), out="same")[0]
    sweep, straight = ended(Keeping(), out="mine")
    (path,) = sweep.directory.glob("units/search-8-0")
    for source, error in ((same, None), (other, "another sweep")):
        shutil.rmtree(path)
        shutil.copytree(source.directory / "units/search-8-0", path)
        if error is None:
            assert ended(Keeping(), fresh=False, out="mine")[1] == straight
            continue
        with pytest.raises(ValueError, match=mentions(error, path / RESULT, "remove", path)):
            ended(Keeping(), fresh=False, out="mine")
    shutil.rmtree(path)
    assert ended(Keeping(), fresh=False, out="mine")[1] == straight


def test_differences_that_are_allowed_are_reported_for_ever(ended, monkeypatch):
    def of(data):
        origin = {"identity": {"data": {"train": data}}}
        monkeypatch.setattr(module, "origin_of", lambda abstract, base: origin | {"base": base})
        return Keeping(1)

    sweep, report = ended(of("d1"))
    assert report["protocol"]["allowed_differences"] == []
    shutil.rmtree(unit_directory(sweep.directory, "report-0"))
    with pytest.raises(ValueError, match=mentions("data.train", "d1", "d2", "--allow_different data")):
        ended(of("d2"), fresh=False)
    # What is read back is of one or the other, and every later command says so.
    lines = ['data.train is "d1" there and "d2" here']
    for allow in (("data",), ()):
        report = ended(of("d2"), fresh=False, allow_different=allow)[1]
        assert report["protocol"]["allowed_differences"] == lines
    record = saved_record(sweep.directory)
    assert record["identity"] == {"data": {"train": "d2"}}
    paths = {path.parent.name: path for path in sweep.directory.glob(f"units/*/{RESULT}")}
    before, now = origins_of(record)
    assert read_record(paths.pop("report-0"))["origin"] == now
    assert {read_record(path)["origin"] for path in paths.values()} == {before}


@pytest.mark.parametrize(
    "content",
    [
        {"lora": {"members_at_once": 0, "group_size": 3}},
        {"lora": {"members_at_once": 1, "group_size": -3}},
        {"lora": {"members_at_once": 1, "group_size": "3"}},
        {"lora": {"members_at_once": 1}},
        {"lora": 7},
        {"group_size": 3},
    ],
)
def test_edited_numbers_of_members_are_an_error(ended, content):
    sweep, _ = ended(Keeping(3))
    path = sweep.directory / module.MEMBERS_FILE
    write_record(path, content)
    with pytest.raises(ValueError, match=mentions(path, "remove")):
        ended(Keeping(3), fresh=False)
    path.write_text('{"lora": {"members_at_once": 1, "group_size": 3}}')
    with pytest.raises(ValueError, match=mentions(path, "changed", "remove")):
        ended(Keeping(3), fresh=False)


@pytest.mark.parametrize("method", ["open", "run"])
def test_an_error_of_a_program_names_its_methods(ended, monkeypatch, method):
    async def fail(*_):
        raise ValueError("it does not fit")

    monkeypatch.setattr(GivenLosses, method, fail)
    with pytest.raises(ValueError, match=r"^sweep\.methods lora, lora_plus: it does not fit$"):
        ended(GivenLosses(), "--sweep.methods=[lora_plus,dora]")
    with pytest.raises(ValueError, match=r"^it does not fit$"):
        ended(GivenLosses())
