"""The suite of training steps: order, time, what is kept when something ends it, and all of it."""

import pytest
import torch

from lightning_modules.cli.main import main
from mobileone.bench.results import Result
from mobileone.bench.show.tables import result_table
from mobileone.bench.training_step import suite as suites
from mobileone.bench.training_step.implementations import IMPLEMENTATIONS
from mobileone.bench.training_step.suite import SUITES, Suite, measure_suite
from mobileone.bench.training_step.worker import StepTime, StepWorkerError, training_step


class Fake:
    """In place of a process: a step takes as long as the script says, and the clock goes on."""

    now = 0.0
    started = 0
    fails = None

    def __init__(self, *task):
        Fake.started += 1
        self.limit = None

    def prepare(self, model, contender, setting):
        self.contender = contender
        Fake.now += 60.0 if IMPLEMENTATIONS[contender][1] else 1.0
        if contender in Fake.fails:
            raise StepWorkerError(Fake.fails[contender])

    def step(self):
        Fake.now += 0.2
        return StepTime(0.2 if self.contender.startswith("timm") else 0.1, 0.0)

    def memory(self):
        return {} if "graphs" in self.contender else {"kept_mib": 1.0, "peak_mib": 2.0}

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(Fake, "now", 0.0)
    monkeypatch.setattr(Fake, "started", 0)
    monkeypatch.setattr(Fake, "fails", {})
    monkeypatch.setattr(suites, "StepWorker", Fake)
    monkeypatch.setattr(suites.time, "monotonic", lambda: Fake.now)
    return Fake


def test_the_most_informative_comes_first_and_time_ends_it(fake, tmp_path):
    result = measure_suite("gpu", "cpu", output=str(tmp_path))
    assert 590 < fake.now < 670  # the last one may be a compiler's
    first = [row for row in result.rows if row["layout"] == "channels-last"][:4]
    assert {(row["model"], row["precision"], row["batch_size"]) for row in first} == {
        ("mobileone_s0", "bfloat16", 256)
    }
    seen = {(row["model"], row["precision"], row["batch_size"]) for row in result.rows}
    assert {(f"mobileone_s{i}", "bfloat16", 256) for i in range(5)} <= seen
    assert {("mobileone_s0", p, 256) for p in ("float32", "tf32", "float16")} <= seen
    compiled = [row["contender"] for row in result.rows if row["contender"].endswith("compiled")]
    assert {"timm compiled", "ours always compiled", "plain compiled"} <= set(compiled)
    everything = len(suites._cells(SUITES["gpu"], tuple(suites._LATER), "cpu"))
    assert result.protocol["left"] == everything - len(result.rows) > 0
    kept = Result.load(tmp_path / "suite.json", "suite")
    assert kept.rows == result.rows and kept.protocol == result.protocol
    assert f"time was over: {result.protocol['left']}" in result_table(kept).caption
    assert len((tmp_path / "suite.csv").read_text().splitlines()) == 1 + len(result.rows)


def test_what_was_measured_stays_when_the_machine_goes_away(fake, tmp_path, monkeypatch):
    class Taken(Fake):
        def step(self):
            if self.contender == "plain":
                raise KeyboardInterrupt
            return super().step()

    monkeypatch.setattr(suites, "StepWorker", Taken)
    with pytest.raises(KeyboardInterrupt):
        measure_suite("gpu", "cpu", output=str(tmp_path))
    rows = Result.load(tmp_path / "suite.json").rows
    assert [row["contender"] for row in rows] == ["timm", "ours", "ours always"]


def test_short_memory_and_a_broken_process_cost_one_measurement_each(fake, monkeypatch):
    small = Suite(("mobileone_s0",), (4,), ("bfloat16",), 32)
    monkeypatch.setitem(SUITES, "small", small)
    fake.fails = {"timm": "OutOfMemoryError: 9 GiB", "ours": "its process ended by SIGSEGV"}
    result = measure_suite("small", contenders=["timm", "ours", "plain", "timm compiled"])
    failed = [row["failure"] for row in result.rows if row["failure"]]
    assert sorted(failed) == ["OutOfMemoryError: 9 GiB"] * 2 + ["its process ended by SIGSEGV"]
    assert fake.started == 3  # anew after the broken one, and for the compiled one
    notes = result_table(result).caption
    assert "planes, timm: OutOfMemoryError: 9 GiB" in notes and "SIGSEGV" in notes
    rows = {(row["contender"], row["layout"]): row for row in result.rows}
    plain, compiled = (rows[name, "channels-last"] for name in ("plain", "timm compiled"))
    assert plain["timm_to"] == 2 and plain["to_plain"] == 1  # by timm's best, which is compiled
    assert compiled["timm_to"] == 1 and compiled["to_plain"] == 2
    assert rows["timm", "planes"]["timm_to"] is None


def test_all_of_it_runs_at_a_toy_size(tmp_path, monkeypatch, capsys):
    """In the real processes, by the command, in the precisions and layouts."""
    tiny = Suite(("mobileone_s0",), (2,), ("float32", "bfloat16"), 32)
    monkeypatch.setitem(SUITES, "smoke", tiny)
    monkeypatch.setattr(suites, "_STEPS", (1, 2))
    contenders = ["timm", "plain graphs"]  # the latter on CUDA alone
    main(
        ["benchmark", "training", "--suite", "smoke", "--output", str(tmp_path),
         "--contenders", f"[{','.join(contenders)}]"]
    )  # fmt: skip
    assert "suite.json" in capsys.readouterr().out
    rows = Result.load(tmp_path / "suite.json").rows
    assert [row["contender"] for row in rows] == 4 * ["timm"]
    for row in rows:
        assert row["failure"] is None
        assert row["seconds"] > 0 and row["peak_mib"] >= row["kept_mib"] > 0
    kept = {row["precision"]: row["kept_mib"] for row in rows}
    assert kept["bfloat16"] != kept["float32"]  # in which the weights are not cast


@pytest.mark.slow
def test_compiled_contenders_run_in_processes_of_their_own(monkeypatch):
    monkeypatch.setitem(SUITES, "smoke", Suite(("mobileone_s0",), (2,), ("bfloat16",), 32))
    names = ["plain", "plain compiled", "ours always compiled", "timm reduce-overhead"]
    result = measure_suite("smoke", contenders=names, budget=1500)
    assert [row["failure"] for row in result.rows] == [None] * 5
    assert all(row["seconds"] > 0 for row in result.rows)


def test_a_step_in_float16_scales_its_loss():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.AdaptiveAvgPool2d(1))
    model.append(torch.nn.Flatten())
    before = [p.clone() for p in model.parameters()]
    seen = []
    model[0].weight.register_hook(lambda grad: seen.append(grad.abs().max()))
    step = training_step(model, torch.randn(4, 3, 8, 8), "float16")
    step()
    training_step(model, torch.randn(4, 3, 8, 8), "bfloat16")()
    assert seen[0] > 1000 * seen[1]
    assert not all(map(torch.equal, before, model.parameters()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_suite_for_a_gpu_asks_for_one():
    with pytest.raises(ValueError, match="cuda"):
        measure_suite("gpu")


def test_mistakes_name_the_choices():
    with pytest.raises(ValueError, match=r"`suite` \(='big'\) must be one of gpu, smoke"):
        measure_suite("big")
    with pytest.raises(ValueError, match=r"`budget` \(=0\)"):
        measure_suite("smoke", budget=0)
    with pytest.raises(ValueError, match=r"'mps'.*cpu or cuda"):
        measure_suite("smoke", device="mps")
    with pytest.raises(ValueError, match=r"'theirs'.*ours always graphs"):
        measure_suite("smoke", contenders=["theirs"])
