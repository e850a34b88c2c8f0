"""Forms chosen by trial: the fastest is taken and kept, and the training does not notice."""

import copy
import json
import logging
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mobileone
from mobileone import MobileOneBlock
from mobileone.collapsed import Path, choices, dispatch, functions, keep_choices, path_of, trial
from mobileone.collapsed import cpu_kernels as native
from mobileone.collapsed.branches import describe
from mobileone.collapsed.cost_model import Setting, runnable
from tests.helpers import twin

GRAM_WINS = {Path.BRANCHES: 3.0, Path.GRAM: 1.0, Path.STACKED: 2.0, Path.DEPTHWISE: 9.0}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of this test alone."""
    native.library()  # which is cached in the user's folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    start_again()
    yield tmp_path / "cache" / "mobileone" / "forms.json"
    start_again()


def start_again():
    """Forget what a new process does not know."""
    keep_choices(None)
    trial._fresh.clear()
    trial._tried.clear()


class Clock:
    """In place of `seconds`: runs the call, and says what is set for its form, with noise."""

    def __init__(self, costs):
        self.costs, self.runs = costs, []

    def __call__(self, run, device):
        plan = run.args[1]
        path = Path.BRANCHES if plan is None else plan.path
        run()
        self.runs.append(path)
        noise = [7.0, 1.0, 1.0, 3.0, 1.0, 0.2]  # the first run of a form sets libraries up
        return self.costs[path] * noise[(self.runs.count(path) - 1) % 6]


@pytest.fixture
def clock(monkeypatch):
    found = Clock(dict(GRAM_WINS))
    monkeypatch.setattr(trial, "seconds", found)
    return found


def measured(*args, **kwargs):
    block = MobileOneBlock(*args, **{"num_conv_branches": 3, **kwargs})
    mobileone.set_collapse(block, "measured")
    return block


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ({}, Path.GRAM),
        ({Path.STACKED: 0.5}, Path.STACKED),
        ({Path.BRANCHES: 0.9}, Path.BRANCHES),
        ({Path.BRANCHES: 1.1}, Path.BRANCHES),  # a tie, or nearly
        ({Path.BRANCHES: 1.12}, Path.GRAM),
    ],
)
def test_the_fastest_is_taken_where_it_is_clearly_faster(costs, expected, clock):
    clock.costs |= costs
    block, x = measured(8, 8, 1), torch.randn(2, 8, 6, 6)
    block(x)
    assert sorted(clock.runs, key=str) == sorted(
        6 * [Path.BRANCHES, Path.GRAM, Path.STACKED], key=str
    )
    assert path_of(block, x) is expected
    block(x)
    assert len(clock.runs) == 18


def test_by_the_clock_of_this_machine():
    """k = 4 in a pointwise block: the branches take three times as long as the Gram form."""
    block, x = measured(48, 48, 1, num_conv_branches=4), torch.randn(8, 48, 40, 40)
    block(x)
    assert path_of(block, x) is not Path.BRANCHES


def network():
    layers = [
        measured(3, 8, stride=2),
        nn.Dropout(0.2),
        measured(8, 8, groups=8),
        measured(8, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    ]
    return nn.Sequential(*layers)


def train(model, steps=3, autocast=False):
    """Train with momentum; returns all that training changes, and what hooks saw."""
    torch.manual_seed(3)
    seen = []
    model[2].register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 20, 20)), torch.arange(4))
            assert torch.is_autocast_cache_enabled()
        loss.backward()
        optimizer.step()
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    return [*model.state_dict().values(), *momenta, *seen, torch.get_rng_state(), loss]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_with_trials_is_the_one_without_bit_for_bit(autocast, clock):
    with_trials = train(network(), autocast=autocast)
    assert len(clock.runs) > 3 * 3 * 6 - 6
    start_again()  # the cache stays
    clock.runs.clear()
    torch.manual_seed(0)
    without = train(network(), autocast=autocast)
    assert not clock.runs
    torch.manual_seed(0)
    assert len(with_trials) == len(without) > 90
    for found, expected in zip(with_trials, without, strict=True):
        assert torch.equal(found, expected)


def test_the_seed_of_the_networks_compared_is_the_same():
    torch.manual_seed(0)
    first = network()
    torch.manual_seed(0)
    assert all(map(torch.equal, first.state_dict().values(), network().state_dict().values()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_a_trial_is_exact(reentrant, clock):
    block = measured(4, 6, 1).double()
    plain = copy.deepcopy(block)
    mobileone.set_collapse(plain, "never")
    x, g = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(2, 6, 5, 5).double()
    expected = twin.step(plain, x, g)
    run = partial(checkpoint, block, use_reentrant=reentrant)
    own = x.clone().requires_grad_()
    y = run(own)
    y.backward(g)
    assert bool(clock.runs) != reentrant  # whose forward pass has no gradients
    gradients = {name: p.grad for name, p in block.named_parameters()}
    found = {"y": y.detach(), "x": own.grad, **gradients, **dict(block.named_buffers())}
    twin.assert_same(found, expected)


def test_where_the_pass_is_not_a_training_steps_own_nothing_is_tried(clock):
    block, x = measured(4, 6, 1), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        block(x)
    with torch.autograd.set_detect_anomaly(True):
        block(x)
    frozen = copy.deepcopy(block).requires_grad_(False)
    frozen(x)
    watched = copy.deepcopy(block)
    watched.act.register_forward_hook(lambda *_: None)
    watched(x)
    torch.compiler.reset()
    torch.compile(block, backend="eager", fullgraph=True)(x)
    assert not clock.runs
    assert path_of(frozen, x) is Path.BRANCHES
    block(x)
    assert clock.runs


def test_a_compiled_block_takes_the_form_that_is_kept_and_branches_where_sizes_are_open(clock):
    torch.compiler.reset()
    block, x = measured(4, 6, 1), torch.randn(2, 4, 5, 5)
    block(x)
    ran = []
    known = functions._FORMS[Path.GRAM]
    functions._FORMS[Path.GRAM] = known._replace(
        forward=lambda *args: ran.append(1) or known.forward(*args)
    )
    try:
        compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
        twin.assert_same({"y": compiled(x)}, {"y": block(x)}, 1e-5)
        assert len(ran) == 2
        for batch in (3, 4):  # of the second on, the size is a symbol
            compiled(torch.randn(batch, 4, 5, 5))
        assert len(ran) == 2
    finally:
        functions._FORMS[Path.GRAM] = known
    assert len(clock.runs) == 18


def test_what_one_process_measured_the_next_one_reads(clock, cache):
    block, x = measured(8, 8, 1), torch.randn(2, 8, 6, 6)
    block(x)
    start_again()
    clock.costs[Path.BRANCHES] = 0.1
    block(x)
    assert len(clock.runs) == 18 and path_of(block, x) is Path.GRAM
    block(x[:1])  # another size
    assert len(clock.runs) == 36 and path_of(block, x[:1]) is Path.BRANCHES
    ((machine, forms),) = (
        item for item in json.loads(cache.read_text()).items() if item[0] != "format"
    )
    assert f"torch {torch.__version__}" in machine
    assert [*forms.values()] == ["GRAM", "BRANCHES"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '{"format": "other", "m": {}}', '{"format": "mobileone-forms-1", "m": 3}',
     '{"format": "mobileone-forms-1", "MACHINE": {"KEY": "AFFINE"}}',
     '{"format": "mobileone-forms-1", "MACHINE": {"KEY": ["GRAM"]}}'],
)  # fmt: skip
def test_a_cache_that_is_damaged_or_names_what_cannot_run_is_measured_again(text, clock, cache):
    block, x = measured(8, 8, 1), torch.randn(2, 8, 6, 6)
    block(x)
    good = json.loads(cache.read_text())
    machine = next(name for name in good if name != "format")
    key = json.dumps(next(iter(good[machine])))[1:-1]
    cache.write_text(text.replace("MACHINE", json.dumps(machine)[1:-1]).replace("KEY", key))
    start_again()
    block(x)
    assert len(clock.runs) == 36 and path_of(block, x) is Path.GRAM
    assert json.loads(cache.read_text())[machine] == good[machine]


def test_a_cache_that_cannot_be_written_costs_trials_only(clock, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(choices, "replace_text", full)
    block, x = measured(8, 8, 1), torch.randn(2, 8, 6, 6)
    block(x)
    assert path_of(block, x) is Path.GRAM


def test_a_resumed_run_takes_its_own_forms_whatever_the_cache_says(clock, cache, tmp_path):
    block, x = measured(8, 8, 1), torch.randn(2, 8, 6, 6)
    block(x)
    start_again()
    keep_choices(tmp_path / "run")
    block(x)  # from the cache, and from now on the run's
    cache.unlink()
    start_again()
    clock.costs = {path: -cost for path, cost in GRAM_WINS.items()}
    block(x)
    assert path_of(block, x) is Path.BRANCHES  # a new run
    for rank in (0, 1):
        keep_choices(tmp_path / "run", rank)  # 1 has none, and reads that of 0
        assert path_of(block, x) is Path.GRAM
    assert not (tmp_path / "run" / "rank-1.json").exists()
    block(x[:1])
    assert (tmp_path / "run" / "rank-1.json").is_file()
    assert len(clock.runs) == 54


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("80 GiB"), ValueError("no such kernel")])
@pytest.mark.parametrize("failing", [Path.GRAM, Path.BRANCHES])
def test_a_form_that_fails_is_left_out_and_not_for_ever(error, failing, clock, cache):
    def fail(run, device):
        plan = run.args[1]
        if (Path.BRANCHES if plan is None else plan.path) is failing:
            raise error
        return clock(run, device)

    block, x = measured(8, 8, 1), torch.randn(2, 8, 6, 6)
    trial.seconds, before = fail, trial.seconds
    try:
        assert block(x).isfinite().all()
    finally:
        trial.seconds = before
    expected = Path.STACKED if failing is Path.GRAM else Path.GRAM
    assert path_of(block, x) is expected
    assert not cache.exists()


def test_where_every_form_fails_the_branches_run(clock, monkeypatch):
    def fail(run, device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trial, "seconds", fail)
    block, x = measured(8, 8, 1), torch.randn(2, 8, 6, 6)
    assert block(x).isfinite().all() and path_of(block, x) is Path.BRANCHES


def test_images_of_ever_new_sizes_are_not_all_tried(clock, monkeypatch):
    monkeypatch.setattr(trial, "_SIZES", 2)
    block = measured(8, 8, 1)
    for size in (4, 5, 6, 7):
        block(torch.randn(2, 8, size, size))
    assert len(clock.runs) == 36
    assert path_of(block, torch.randn(2, 8, 7, 7)) is Path.BRANCHES


def test_one_line_reports_when_all_are_tried(clock, caplog):
    caplog.set_level(logging.INFO, "mobileone.collapsed.trial")
    model, x = network(), torch.randn(4, 3, 20, 20)
    clock.costs[Path.DEPTHWISE] = 0.1
    model(x)
    assert not caplog.messages
    model(x)
    model(x)
    (line,) = caplog.messages
    assert line.startswith("collapse: 3 shapes of blocks measured on cpu: ")
    assert f"{2 + (native.library() is None)} × {Path.GRAM.value}" in line


def test_what_decides_is_in_the_key(clock):
    block, x = measured(8, 8, 1), torch.randn(2, 8, 6, 6)
    block(x)
    others = [
        lambda: block(x.to(memory_format=torch.channels_last)),
        lambda: block(x.clone().requires_grad_()),
        lambda: copy.deepcopy(block).double()(x.double()),
        lambda: measured(8, 8, 1, num_conv_branches=2)(x),
        lambda: measured(8, 8, 1, use_skip=False)(x),
    ]
    for other in others:
        before = len(clock.runs)
        other()
        assert len(clock.runs) > before
        other()
        assert len(clock.runs) == before + 18


def test_choices_with_and_without_kernels_are_two(monkeypatch):
    machines = set()
    for there in (True, False):
        monkeypatch.setattr(choices.cpu_kernels, "available", lambda there=there: there)
        machines.add(choices._machine(torch.device("cpu")))
    assert len(machines) == 2


def test_choices_of_another_gpu_or_other_versions_are_others(monkeypatch):
    names = iter(["NVIDIA H200", "NVIDIA L4"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    machines = [choices._machine(torch.device("cuda", i)) for i in (0, 1)]
    assert "H200" in machines[0] and "L4" in machines[1] and "cuDNN" in machines[0]
    with torch.backends.cudnn.flags(benchmark=True, allow_tf32=False):
        machines.append(choices._machine(torch.device("cuda", 1)))
    machines.append(choices._machine(torch.device("cpu")))
    monkeypatch.setattr(torch, "__version__", "2.99")
    choices._software.cache_clear()
    machines.append(choices._machine(torch.device("cpu")))
    choices._software.cache_clear()
    choices._gpu.cache_clear()
    assert len(set(machines)) == 5


def test_on_cuda_auto_is_measured_between_forms_that_never_wait(monkeypatch):
    assert dispatch._is_measured("auto", "cuda") and not dispatch._is_measured("auto", "cpu")
    assert not dispatch._is_measured("always", "cuda") and dispatch._is_measured("measured", "cpu")
    torch.use_deterministic_algorithms(True)
    try:
        assert not dispatch._is_measured("auto", "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    geometry = describe(MobileOneBlock(8, 8, 1))
    assert runnable(geometry, 100, 10, Setting("cuda", torch.float16, False)) == (Path.STACKED,)
    assert runnable(geometry, 1, 1, Setting("cuda", torch.float16, False)) == ()


def test_a_gpus_time_is_taken_between_two_events(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, other):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("idle"))
    taken = trial.seconds(lambda: done.append("run"), torch.device("cuda", 0))
    assert done == ["idle", "record", "run", "record", "wait"] and taken == 0.25
