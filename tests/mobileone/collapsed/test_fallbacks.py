"""Everything that runs a block in another way: it works collapsed, or the branches run."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from mobileone import MobileOneBlock, set_collapse
from mobileone.bench.training_step.worker import kept_bytes
from mobileone.collapsed import Path, functions, path_of
from mobileone.collapsed.branches import describe, parameters
from tests.helpers import twin
from tests.helpers.variants import slow

BLOCKS = [
    {"in_chs": 6, "out_chs": 6, "groups": 6, "num_conv_branches": 2},
    {"in_chs": 6, "out_chs": 6, "kernel_size": 1},
    {"in_chs": 6, "out_chs": 8, "kernel_size": 1, "num_conv_branches": 4},
    {"in_chs": 3, "out_chs": 8, "stride": 2},
]


def image(channels, dtype=torch.float32):
    return torch.randn(4, channels, 9, 8, dtype=dtype)


def collapsed(*shape, **options):
    """A block that always trains in a collapsed form."""
    block = MobileOneBlock(*shape, **options)
    set_collapse(block, "always")
    return block


def branches_of(block):
    """A copy that runs its branches."""
    other = copy.deepcopy(block)
    set_collapse(other, "never")
    return other


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["always", "never"])
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_checkpointing_updates_statistics_once(shape, mode, reentrant):
    plain, _ = twin.build(shape, dtype=torch.float32)
    set_collapse(plain, mode)
    wrapped = copy.deepcopy(plain)
    x = image(shape["in_chs"])
    assert (path_of(plain, x) is Path.BRANCHES) == (mode == "never")

    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    g = torch.randn_like(plain.eval()(x))
    expected = twin.step(plain.train(), x, g)
    actual = twin.step(Checkpointed(wrapped), x, g)
    actual = {name.removeprefix("block."): value for name, value in actual.items()}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_autocast_keeps_the_statistics_in_float32(shape, mode, dtype):
    block, _ = twin.build(shape, dtype=torch.float32)
    block.act = nn.Identity()  # else a rounding tosses what an output near 0 passes back
    set_collapse(block, mode)
    branches = branches_of(block)
    exact = branches_of(block).double()
    x = image(shape["in_chs"]).relu()
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    with torch.autocast("cpu", dtype):
        y, expected = block(inputs[0]), branches(inputs[1])
    assert y.dtype == expected.dtype
    wide = x.double().requires_grad_()
    truth = exact(wide)
    for name, buffer in exact.named_buffers():
        if "running" in name:
            error = (block.get_buffer(name) - buffer).abs().max()
            allowed = (branches.get_buffer(name) - buffer).abs().max()
            assert error <= 1.2 * allowed + 1e-6, name
    error, allowed = ((z - truth).square().mean().sqrt() for z in (y, expected))
    # 2: the branches pass a float32 input through the skip unrounded, here it joins the product
    assert error <= 2 * allowed + 1e-4
    g = torch.randn_like(truth)
    for output in (y, expected, truth):
        output.backward(g.to(output.dtype))
    error, allowed = ((z.grad - wide.grad).square().mean().sqrt() for z in inputs)
    assert error <= 2 * allowed + 1e-3 * wide.grad.abs().max()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_blocks_behind_the_first_collapse_as_well(dtype):
    block = collapsed(16, 16, 1, num_conv_branches=4)
    x = torch.randn(16, 16, 14, 14, dtype=dtype)  # as the block before leaves it
    assert path_of(block, x) is Path.BRANCHES  # an error of the caller's
    with torch.autocast("cpu", dtype):
        assert path_of(block, x) is Path.GRAM
        y = block(x.requires_grad_())
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert block.identity.weight.grad.dtype == torch.float32


def test_bfloat16_models_train():
    block = collapsed(4, 4, 1, num_conv_branches=3, dtype=torch.bfloat16)
    x = image(4, torch.bfloat16).requires_grad_()
    assert path_of(block, x) is Path.GRAM
    y = block(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == block.identity.weight.grad.dtype == torch.bfloat16
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_a_second_derivative_is_an_error_and_not_a_wrong_number():
    block = collapsed(4, 4, 1, num_conv_branches=2)
    x = image(4).requires_grad_()
    assert path_of(block, x) is not Path.BRANCHES
    (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_batched_gradients_are_an_error_and_not_a_wrong_number(shape):
    block, x = collapsed(**shape), image(shape["in_chs"]).requires_grad_()
    y = block(x)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(y, x, torch.randn(3, *y.shape), is_grads_batched=True)


def double(module, args, output):
    return output * 2


def patch(module):
    """Replace a module's forward by one that doubles the output."""
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def without_affine(block):
    block.conv_kxk[0].bn.weight = block.conv_kxk[0].bn.bias = None


def dilated_differently(block):
    conv = block.conv_kxk[1].conv
    conv.dilation = conv.padding = (2, 2)


def without_running_statistics(block):
    bn = block.conv_kxk[0].bn
    bn.running_mean = bn.running_var = bn.num_batches_tracked = None
    bn.track_running_stats = False


def batch_statistics_only(block):  # as virtual adversarial training does for a pass
    for norm in (block.identity, block.conv_scale.bn, block.conv_kxk[0].bn):
        norm.track_running_stats = False


def another_kind_of_branch(block):
    class Twice(type(block.conv_scale)):
        def forward(self, x):
            return 2 * super().forward(x)

    block.conv_scale.__class__ = Twice


def parametrized(block):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(block.conv_kxk[0].conv, "weight", Double())


def first(block):
    return block.conv_kxk[0].conv


CHANGES = {
    "frozen": lambda b: b.conv_kxk[0].bn.eval(),
    "without affine": without_affine,
    "without running statistics": without_running_statistics,
    "batch statistics only": batch_statistics_only,
    "dropout of branches": lambda b: setattr(b, "drop_path", nn.Dropout2d(1 - 1e-9)),
    "patched": lambda b: patch(first(b)),
    "patched norm": lambda b: patch(b.identity),
    "another kind of branch": another_kind_of_branch,
    "dilated differently": dilated_differently,
    "hooked": lambda b: first(b).register_forward_hook(double),
    "hooked branch": lambda b: b.conv_scale.register_forward_hook(double),
    "hooked skip": lambda b: b.identity.register_forward_hook(double),
    "hooked stochastic depth": lambda b: b.drop_path.register_forward_hook(double),
    "hooked backwards": lambda b: first(b).register_full_backward_pre_hook(lambda *called: None),
    "parametrized": parametrized,
    "reflecting": lambda b: setattr(first(b), "padding_mode", "reflect"),
    "with bias": lambda b: setattr(first(b), "bias", nn.Parameter(torch.ones(6))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_blocks_that_are_not_plain_run_their_branches(change):
    block = collapsed(6, 6, groups=6, num_conv_branches=2)
    x = image(6)
    assert path_of(block, x) is not Path.BRANCHES
    change(block)
    assert path_of(block, x) is Path.BRANCHES
    torch.testing.assert_close(block(x), branches_of(block)(x))


def test_statistics_that_are_not_tracked_do_not_move():
    block = collapsed(6, 6, groups=6)
    batch_statistics_only(block)
    before = [b.clone() for b in block.buffers()]
    block(image(6))
    assert all(map(torch.equal, before, block.buffers()))


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_wrapped_parameters_and_buffers_run_the_branches(name):
    """Their own memory is empty: our kernels would read at address 0."""
    block, x = collapsed(6, 6, groups=6), image(6)
    expected = block(x)
    norm = block.conv_scale.bn
    wrapped = TwoTensor(*(getattr(norm, name).detach().clone() for _ in range(2)))
    setattr(norm, name, nn.Parameter(wrapped) if name == "weight" else wrapped)
    assert path_of(block, x) is Path.BRANCHES
    torch.testing.assert_close(getattr(block(x), "a", block(x)), expected)


def test_a_frozen_block_drops_its_branches_all_the_same():
    block = MobileOneBlock(6, 6, groups=6)
    block.drop_path = nn.Dropout2d(1 - 1e-9)
    for norm in (block.identity, block.conv_scale.bn, block.conv_kxk[0].bn):
        norm.eval()
    x = image(6)
    torch.testing.assert_close(block(x), block.identity(x).relu())


def test_whoever_watches_all_modules_sees_the_branches():
    block = collapsed(6, 6, groups=6)
    seen = []
    watch = nn.modules.module.register_module_forward_hook(lambda *called: seen.append(called[0]))
    try:
        block(image(6))
    finally:
        watch.remove()
    assert {block.identity, block.conv_scale.conv, block.conv_kxk[0].bn} <= set(seen)
    assert path_of(block, image(6)) is not Path.BRANCHES


@pytest.mark.parametrize("part", ["act", "attn"])
def test_the_hooks_of_what_follows_the_sum_are_called(part):
    block = collapsed(6, 6, groups=6)
    expected, x = copy.deepcopy(block), image(6)
    block.get_submodule(part).register_forward_hook(double)
    assert path_of(block, x) is not Path.BRANCHES  # the sum itself nobody watches
    torch.testing.assert_close(block(x), 2 * expected(x))


@pytest.mark.parametrize("part", ["act", "attn"])
def test_a_replaced_forward_of_what_follows_the_sum_is_called(part):
    block = collapsed(6, 6, groups=6)
    expected, x = copy.deepcopy(block), image(6)
    patch(block.get_submodule(part))
    torch.testing.assert_close(block(x), 2 * expected(x))


def test_forward_derivatives_are_those_of_the_branches():
    block = collapsed(6, 8, 1, num_conv_branches=3).double()
    x, t = torch.randn(2, 4, 6, 9, 8, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        y = block(torch.autograd.forward_ad.make_dual(x, t))
        slope = torch.autograd.forward_ad.unpack_dual(y).tangent
    difference = (block(x + 1e-6 * t) - block(x - 1e-6 * t)) / 2e-6
    assert (slope - difference).abs().quantile(0.99) < 1e-5  # but where ReLU turns
    assert path_of(block, x) is Path.GRAM


@pytest.mark.parametrize("size", [(9, 8), (14, 14)], ids=str)  # images joined, and one by one
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_what_a_block_returns_may_be_changed_in_place(shape, size):
    block, _ = twin.build(shape)
    block.act = nn.Identity()
    set_collapse(block, "always")
    x = torch.randn(4, shape["in_chs"], *size, dtype=torch.float64)
    branches, inputs = branches_of(block), [x.clone().requires_grad_() for _ in range(2)]
    assert path_of(block, x) is not Path.BRANCHES
    for model, own in zip((block, branches), inputs, strict=True):
        model(own).mul_(3).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-9)


def test_inputs_whose_sign_is_only_noted_run_the_branches():
    block = collapsed(6, 6, groups=6)
    x = torch._neg_view(image(6))  # as of a conjugate's imaginary part: memory has other values
    assert path_of(block, x.resolve_neg()) is not Path.BRANCHES
    torch.testing.assert_close(block(x), branches_of(block)(x.resolve_neg()))


def test_float64_is_left_alone_by_autocast():
    block = collapsed(6, 8, 1, num_conv_branches=3, dtype=torch.float64)
    x = image(6, torch.float64)
    assert path_of(block, x) is Path.GRAM
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = block(x), branches_of(block)(x)
    assert y.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


def test_narrow_gradients_lose_nothing_in_cancellation():
    """A loss pushes whole channels; BatchNorm passes on what is left about the mean."""
    block, _ = twin.build(BLOCKS[2], dtype=torch.float32)
    block.act = nn.Identity()
    set_collapse(block, "always")
    x = torch.randn(16, 6, 14, 14)
    exact, branches = branches_of(block).double(), branches_of(block)
    g = (torch.randn(16, 8, 14, 14) + 30).bfloat16()
    exact(x.double()).backward(g.double())
    for model in (block, branches):
        with torch.autocast("cpu", torch.bfloat16):
            model(x).backward(g)
    for name, truth in exact.named_parameters():
        error, allowed = (
            (model.get_parameter(name).grad - truth.grad).norm() for model in (block, branches)
        )
        assert error <= 1.2 * allowed + 1e-3 * truth.grad.norm(), name


def test_synchronized_batch_norm_runs_the_branches():
    block = collapsed(6, 6, groups=6)
    assert path_of(convert_sync_batchnorm(block), image(6)) is Path.BRANCHES


def test_a_frozen_parameter_gets_no_gradient_and_the_others_theirs():
    block, _ = twin.build(BLOCKS[2])
    block.conv_kxk[1].conv.weight.requires_grad_(False)
    branches = branches_of(block)
    set_collapse(block, "always")
    x = image(6, torch.float64)
    g = torch.randn(4, 8, 9, 8, dtype=torch.float64)
    for model in (block, branches):
        model(x).backward(g)
    assert block.conv_kxk[1].conv.weight.grad is None
    for ours, theirs in zip(block.parameters(), branches.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of PyTorch's own batch_norm
def test_tracers_record_the_branches():
    block = MobileOneBlock(6, 6, groups=6)
    x = image(6)
    y = branches_of(block)(x)
    graph = torch.fx.symbolic_trace(copy.deepcopy(block))
    assert sum(node.op == "call_module" for node in graph.graph.nodes) > 4
    torch.testing.assert_close(graph(x), y)
    traced = torch.jit.trace(copy.deepcopy(block), x, check_trace=False)
    torch.testing.assert_close(traced(x), y)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(block))(x), y)
    exported = torch.export.export(copy.deepcopy(block), (x,)).module()
    torch.testing.assert_close(exported(x), y)


def test_meta_tensors_have_shapes():
    block = MobileOneBlock(6, 8, 1, num_conv_branches=2, device="meta")
    assert block(torch.empty(2, 6, 5, 4, device="meta")).shape == (2, 8, 5, 4)


def test_functional_transforms_run_the_branches():
    block = MobileOneBlock(6, 6, groups=6)
    for bn in [block.identity, block.conv_scale.bn, block.conv_kxk[0].bn]:
        bn.running_mean = bn.running_var = bn.num_batches_tracked = None
    x = torch.randn(3, 2, 6, 5, 5)
    expected = torch.stack([block(part) for part in x])
    torch.testing.assert_close(torch.vmap(block)(x), expected)


def network():
    return nn.Sequential(
        MobileOneBlock(3, 8, stride=2, num_conv_branches=2),
        MobileOneBlock(8, 8, groups=8, num_conv_branches=2),
        MobileOneBlock(8, 12, 1, num_conv_branches=3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    ).double()


# the compiler hides this warning of its own by a way that errors do not go
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("auto", torch.float32),
        ("always", torch.float32),
        ("always", torch.float64),
        ("stacked", torch.float64),
        *(slow(mode, torch.float64) for mode in ("auto", "never")),
        *(slow(mode, torch.float32) for mode in ("never", "stacked")),
    ],
)
def test_compiled_models_train_as_eager_ones_in_one_graph(mode, dtype, monkeypatch):
    torch.compiler.reset()
    eager = network().to(dtype)
    if mode == "stacked":
        stack = SimpleNamespace(__wrapped__=lambda *_: Path.STACKED)
        monkeypatch.setattr("mobileone.collapsed.dispatch.choose", stack)
    else:
        set_collapse(eager, mode)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for size in (16, 24, 16):  # a curriculum's sizes
        x = torch.randn(4, 3, size, size, dtype=dtype)
        g = torch.randn(4, 3, dtype=dtype)
        actual = twin.step(compiled, x, g)
        with monkeypatch.context() as patch:
            if mode == "stacked":
                patch.setattr("mobileone.collapsed.dispatch.choose", lambda *_: Path.STACKED)
            expected = twin.step(eager, x, g)
        twin.assert_same(actual, expected, 1e-9 if dtype is torch.float64 else 2e-5)
    if mode not in ("never", "stacked"):  # there the compiler keeps other tensors than autograd
        assert kept_bytes(compiled, x) <= 1.01 * kept_bytes(eager, x)


@pytest.mark.parametrize("mode", ["always", "never"])
def test_the_compiler_gets_the_network_without_a_break(mode):
    torch.compiler.reset()
    model = network().float()
    set_collapse(model, mode)
    found = torch._dynamo.explain(model)(torch.randn(4, 3, 32, 32))
    assert found.graph_break_count == 0 and found.graph_count == 1
    operators = [str(node.target) for node in found.graphs[0].graph.nodes]
    branches = sum("batch_norm" in name for name in operators)
    functions = sum("autograd_function_apply" in name for name in operators)
    assert (functions == 0 and branches > 0) if mode == "never" else functions > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("channels", [8, 136])
def test_a_compiler_gets_the_dtypes_it_was_told(channels, alike, dtype):
    block = collapsed(channels, channels, 1, num_conv_branches=4, dtype=dtype)
    x = torch.randn(16, channels, 9, 8, dtype=dtype)
    x = x[:, :1] + 0.1 * x if alike else x
    operator = torch.ops.mobileone.collapsed_forward.default
    form = (path_of(block, x).name, *functions._pack(describe(block)), True, dtype, True)
    call = (x, parameters(block), *form)
    assert (operator(*call)[3][0] > 0) == alike  # the algebra ran in float64 whatever the size
    torch.library.opcheck(operator, call, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_of_many_channels_keeps_its_statistics_in_its_own_dtype(dtype):
    block = collapsed(256, 256, 1, num_conv_branches=4, dtype=dtype)
    x = torch.randn(16, 256, 7, 7, dtype=dtype, requires_grad=True)
    assert path_of(block, x) is Path.GRAM
    numbers = 2 * x.numel() + 2 * 256**2  # x, y, C and the folded kernel
    assert kept_bytes(block, x) <= 1.05 * numbers * x.element_size()


def test_blocks_with_stochastic_depth_stay_in_the_graph():
    torch.compiler.reset()
    block = MobileOneBlock(8, 8, drop_path_rate=0.5)
    whole = torch.compile(block, backend="eager", fullgraph=True)
    assert whole(torch.randn(2, 8, 6, 6)).shape == (2, 8, 6, 6)


def test_the_mode_is_of_the_run_and_not_of_the_checkpoint():
    model = timm.create_model("mobileone_s0", num_classes=2)
    keys = list(model.state_dict())
    set_collapse(model, "never")
    assert list(model.state_dict()) == keys
    blocks = [module for module in model.modules() if isinstance(module, MobileOneBlock)]
    assert {block.collapse for block in blocks} == {"never"}
    assert {
        block.collapse for block in copy.deepcopy(model).modules() if hasattr(block, "collapse")
    } == {"never"}
    assert path_of(blocks[0], torch.randn(2, 3, 32, 32)) is Path.BRANCHES


def test_the_log_says_once_what_runs_and_why(caplog):
    block, x = MobileOneBlock(10, 14, 1, num_conv_branches=3), torch.randn(2, 10, 23, 21)
    block(x)  # before anybody listens
    set_collapse(block, "always")

    def heard():
        caplog.clear()
        for _ in range(2):
            block(x)
        return [record.getMessage() for record in caplog.records]

    with caplog.at_level(logging.INFO, "mobileone.collapsed"):
        (line,) = heard()
        assert "3 × Conv2d(10, 14," in line and "2×10×23×21, cpu, float32" in line
        assert Path.GRAM.value in line
        assert heard() == []
        hook = block.conv_kxk[0].register_forward_hook(lambda *called: None)
        (line,) = heard()
        assert f"{Path.BRANCHES.value} (a layer with a hook" in line
        hook.remove()
        assert heard() == []
        set_collapse(block, "never")
        (line,) = heard()
        assert "collapse=never" in line and f"{Path.BRANCHES.value} (as set)" in line
        set_collapse(block, "never")  # of another run in this process
        assert len(heard()) == 1
        convert_sync_batchnorm(block)
        assert path_of(block, x) is Path.BRANCHES


def test_blocks_pickled_by_versions_without_a_mode_train():
    block = MobileOneBlock(6, 6, groups=6)
    assert "collapse" not in vars(block)  # a default of the class
    set_collapse(block, "always")
    assert "collapse" in vars(pickle.loads(pickle.dumps(block)))
    torch.jit.script(block)


def test_channels_last_inputs_are_taken():
    for shape in BLOCKS:
        block = collapsed(**shape)
        x = image(shape["in_chs"])
        expected = branches_of(block)(x)
        torch.testing.assert_close(
            block(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4
        )
