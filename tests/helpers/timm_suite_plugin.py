"""pytest plugin that points timm's test_models.py at the family of this package.

That file asks `timm.list_models` for its parameters while it is imported, so this plugin, which
is imported before it, answers with our names alone. Some tests name other models literally; those
whose subject is the interface every backbone shares are re-parametrized with ours.
"""

from fnmatch import fnmatch

import pytest
import timm

import mobileone  # noqa: F401  (registers the family)

SHARED_INTERFACE = {
    "test_reset_classifier_keeps_pool",
    "test_features_only_grad_checkpointing_backward",
    "test_model_features_output_stride",
    "test_feature_getter_stage_ends_torchscript",
    "test_prune_intermediate_layers_params_used",
    "test_prune_to_stem_feature",
    "test_head_hidden_size",
    "test_headless_checkpoint_reload",
    "test_mobile_model_fusion_features",
    "test_model_init_weights_after_to_empty",
}
# these download the published weights
NEEDS_NETWORK = {
    "test_model_features_pretrained",
    "test_model_inference",
    "test_model_load_pretrained",
}

_all_models = timm.list_models


def family(*_, **options):
    """Our names, whatever pattern or module is asked for."""
    kept = {k: v for k, v in options.items() if k in ("pretrained", "include_tags")}
    return [name for name in _all_models("mobileone_*", **kept) if fnmatch(name, "mobileone_*")]


timm.list_models = family
timm.list_pretrained = lambda *_, **__: family(pretrained=True)


def pytest_pycollect_makeitem(collector, name, obj):
    """Give the tests of the shared interface our models instead of their literal ones."""
    if name in SHARED_INTERFACE:
        obj.pytestmark = [_with_family(mark) for mark in obj.pytestmark]


def _with_family(mark):
    if mark.name != "parametrize":
        return mark
    names = mark.args[0]
    columns = [c.strip() for c in names.split(",")] if isinstance(names, str) else list(names)
    if columns[0] != "model_name":
        return mark
    rows = [name if len(columns) == 1 else (name, *[{}] * (len(columns) - 1)) for name in family()]
    return pytest.mark.parametrize(names, rows).mark


def pytest_collection_modifyitems(config, items):
    """Keep the tests that run one of our models."""
    ours = [item for item in items if _is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


def _is_ours(item):
    model = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
    wanted = isinstance(model, str) and model.startswith("mobileone_")
    return wanted and item.originalname not in NEEDS_NETWORK


def pytest_configure(config):
    """Declare timm's markers."""
    for name in (
        "base forward backward cfg cfg_nonstd torchscript features fxforward fxbackward timeout"
    ).split():
        config.addinivalue_line("markers", name)
