"""Latency, throughput and memory of real networks, small."""

import dataclasses
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from mobileone.bench.inference.case import build_form
from mobileone.bench.inference.latency import measure_latency, measure_throughput
from mobileone.bench.inference.memory import measure_memory
from mobileone.bench.runtimes import RUNTIMES, check_runtimes, missing_runtimes, runtimes_for
from mobileone.bench.show.tables import change_table, make_table, result_table
from mobileone.bench.suites import SUITES, choose_models
from mobileone.bench.timing import check_device
from tests.helpers.tables import text_of
from tests.helpers.variants import slow

PRESENT = [
    name
    for name in RUNTIMES
    if RUNTIMES[name].lack() is None and name in ("eager", "torchscript", "onnxruntime", "openvino")
]


class Repeated(nn.Module):
    """The same convolution, several times."""

    def __init__(self, times):
        super().__init__()
        self.times, self.conv = times, nn.Conv2d(3, 3, 5, padding=2)

    def forward(self, x):
        for _ in range(self.times):
            x = self.conv(x)
        return x


@pytest.fixture(scope="module")
def result():
    return measure_latency(["mobileone_mu0"], PRESENT, runs=4, input_size=64)


def test_every_case_is_fused_right_and_timed(result):
    assert [(row["model"], row["runtime"]) for row in result.rows] == [
        ("mobileone_mu0", runtime) for runtime in PRESENT
    ]
    for row in result.rows:
        assert row["failure"] is None and row["relative_error"] < 1e-4
        assert row["branches_left"] == row["norms_left"] == 0
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p90_ms"] <= row["max_ms"]
        assert row["timed"] == 4 and row["threads"] == 1 and row["image_size"] == 64
    assert result.kind == "latency" and result.protocol["statistic"] == "min_ms"
    shown = text_of(result_table(result))
    assert "mobileone_mu0" in shown and "runs 4" in shown


@pytest.mark.parametrize("name", [slow("executorch"), slow("litert"), "coreai"])
def test_a_named_network_is_measured_as_the_file_for_devices(name):
    if lack := RUNTIMES[name].lack():
        pytest.skip(lack)
    (row,) = measure_latency(["mobileone_mu0"], [name], runs=1, input_size=32).rows
    assert row["failure"] is None and row["relative_error"] < 1e-3  # of probabilities
    assert row["min_ms"] > 0 and row["norms_left"] == 0


def test_a_case_that_takes_longer_is_told_from_a_shorter_one():
    modules = {str(n): (lambda n=n: Repeated(n).eval()) for n in (2, 20)}
    short, long = measure_latency(modules, ["eager"], runs=10, input_size=128).rows
    assert long["min_ms"] > 4 * short["min_ms"]  # ten times the work


def test_a_runtime_that_computes_something_else_is_not_timed(monkeypatch):
    def wrong(path, x, threads):
        return lambda: torch.zeros(1, 1000)

    monkeypatch.setitem(RUNTIMES, "eager", dataclasses.replace(RUNTIMES["eager"], load=wrong))
    (row,) = measure_latency(["mobileone_mu0"], ["eager"], runs=1, input_size=32).rows
    assert "output differs from PyTorch's by 1" in row["failure"] and "min_ms" not in row


def test_a_converter_that_fails_is_named_beside_those_that_do_not(monkeypatch):
    def broken(model, x, path):
        raise NotImplementedError("no such operation\nand more")

    monkeypatch.setitem(
        RUNTIMES, "torchscript", dataclasses.replace(RUNTIMES["torchscript"], convert=broken)
    )
    result = measure_latency(["mobileone_mu0"], ["eager", "torchscript"], runs=1, input_size=32)
    assert [row["failure"] for row in result.rows] == [
        None, "NotImplementedError: no such operation",
    ]  # fmt: skip
    assert "torchscript: NotImplementedError" in text_of(result_table(result))


def test_a_case_is_loaded_once_or_each_turn_on_the_same_input(monkeypatch):
    seen = []

    def load(path, x, threads):
        seen.append(x)
        return original.load(path, x, threads)

    original = RUNTIMES["eager"]
    monkeypatch.setitem(RUNTIMES, "eager", dataclasses.replace(original, load=load))
    for protocol, loads in (("paper", 1), ("modelbench", 20)):
        seen.clear()
        (row,) = measure_latency(
            ["mobileone_mu0"], ["eager"], protocol, runs=420, batch_size=3, input_size=32
        ).rows
        assert len(seen) == loads and all(x is seen[0] for x in seen)
        assert seen[0].shape == (3, 3, 32, 32)
        assert row["timed"] == (420 if protocol == "paper" else 20)


def test_results_of_other_machines_and_settings_are_not_compared(result):
    assert "now / before" in text_of(change_table(result, result))
    other = dataclasses.replace(result, machine=result.machine | {"machine_id": "x"})
    with pytest.raises(ValueError, match="different machines"):
        change_table(other, result)
    threads = dataclasses.replace(result, protocol=result.protocol | {"threads": 9})
    with pytest.raises(ValueError, match="`threads` is 9"):
        change_table(threads, result)
    with pytest.raises(ValueError, match="no row in common"):
        change_table(dataclasses.replace(result, rows=result.rows[:1]),
                     dataclasses.replace(result, rows=result.rows[1:]))  # fmt: skip


def test_brackets_in_a_table_are_text():
    shown = text_of(make_table("t [a]", ["w"], [{"w": "[b]"}], ["pip install 'x[c]'"]))
    assert "t [a]" in shown and "[b]" in shown and "'x[c]'" in shown


def test_runtimes_that_are_missing_are_named_with_the_remedy(monkeypatch):
    assert set(PRESENT) <= set(check_runtimes(None, "cpu")) == set(runtimes_for("cpu"))
    if sys.platform != "darwin":
        assert "needs darwin" in missing_runtimes()["coreml_ane"]
    lacking = dataclasses.replace(RUNTIMES["openvino"], packages=("no_such_package",))
    monkeypatch.setitem(RUNTIMES, "openvino", lacking)
    with pytest.raises(ImportError, match=r"pip install 'mobileone-lightning\[openvino,onnx\]'"):
        check_runtimes(["openvino"], "cpu")
    assert "openvino" not in check_runtimes(None, "cpu")
    with pytest.raises(ValueError, match=r"unknown 'tvm'; choose from eager"):
        check_runtimes(["tvm"], "cpu")
    with pytest.raises(ValueError, match="'onnxruntime' does not run on 'cuda'"):
        check_runtimes(["onnxruntime"], "cuda")


def test_numbers_are_checked_before_anything_is_built():
    with pytest.raises(ValueError, match=r"`batch_size` \(=0\)"):
        measure_latency(["mobileone_mu0"], batch_size=0)
    with pytest.raises(ValueError, match=r"`batch_size` \(=0\)"):
        measure_throughput(["mobileone_mu0"], [0])
    with pytest.raises(ValueError, match="compiles in the process"):
        measure_memory(["mobileone_mu0"], ["compile"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"`device` \(='cuda'\).*there is cpu"):
            check_device("cuda")


def test_suites_hold_what_can_be_built_and_name_the_rest():
    assert set(SUITES) == {"paper", "2026"}
    here, choice = choose_models([], "paper")
    assert len(here) + len(choice["missing"]) == 30
    assert {"MobileNeXt-1.0", "MobileFormer-96"} <= set(choice["missing"])
    families = "mobilenetv1 mobilenetv2 mobilenetv3 efficientnet shufflenet repvgg fastvit repvit "
    for family in f"{families}mobilenetv4 starnet mobileone_s4".split():
        assert any(family in name for name in SUITES["2026"]), family
    with pytest.raises(ValueError, match=r"'2027'.*paper, 2026"):
        choose_models([], "2027")


def test_throughput_divides_the_batch_by_the_median():
    result = measure_throughput(["mobileone_mu0"], [1, 4], runs=3, input_size=64)
    assert [row["batch_size"] for row in result.rows] == [1, 4]
    for row in result.rows:
        seconds = row["median_ms"] / 1e3
        assert row["images_per_s"] == pytest.approx(row["batch_size"] / seconds)
    assert "images/s" in text_of(result_table(result))


def test_peak_memory_holds_at_least_the_weights():
    result = measure_memory(["mobileone_mu0"], ["eager"], input_size=64)
    (row,) = result.rows
    assert row["weights_mib"] == pytest.approx(558_760 * 4 / 2**20)
    assert row["peak_mib"] > 0.9 * row["weights_mib"]
    assert "mobileone_mu0" in text_of(result_table(result))


@pytest.mark.slow
def test_peak_memory_grows_with_the_batch():
    one, many = measure_memory(
        ["mobileone_mu0"], ["eager"], batch_sizes=[1, 16], input_size=128
    ).rows
    assert many["tensors_mib"] == pytest.approx(16 * one["tensors_mib"], rel=0.05)
    assert many["peak_mib"] > one["peak_mib"] + 0.5 * (many["tensors_mib"] - one["tensors_mib"])


@pytest.mark.skipif(find_spec("coremltools") is None, reason="needs coremltools")
def test_core_ml_files_have_the_names_that_the_runner_uses(tmp_path):
    import coremltools

    from mobileone.bench.runtimes import convert_coreml
    from mobileone.bench.suites import build_model

    model = build_model("mobileone_mu0")
    fused, _, x = build_form(model, 32)
    convert_coreml(fused, x, tmp_path / "model")
    spec = coremltools.utils.load_spec(str(tmp_path / "model.mlpackage"))
    assert [i.name for i in spec.description.input] == ["images"]
    assert list(spec.description.input[0].type.multiArrayType.shape) == [1, 3, 32, 32]
    assert [o.name for o in spec.description.output] == ["logits"]
    units = {r.load.keywords["compute_units"] for n, r in RUNTIMES.items() if "coreml" in n}
    assert units == {unit.name for unit in coremltools.ComputeUnit}


@pytest.mark.slow
def test_compiled_cases_do_not_share_what_was_compiled(tmp_path):
    names = ["mobileone_mu0", "mobileone_mu1", "mobileone_s0"]
    result = measure_latency(names, ["compile"], runs=2, input_size=32)
    assert [row["failure"] for row in result.rows] == [None] * 3
    assert json.loads(result.save(tmp_path / "r.json").read_text())["rows"] == result.rows
