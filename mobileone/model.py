"""The MobileOne network on timm's ByobNet backbone."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, get_layer_fns
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobileone.block import MobileOneBlock
from mobileone.block_checks import FoldingNotice, check_norm_factory
from mobileone.variants import Variant
from mobileone.weights import adapt_on_load, check_strictly, convert_keys

__all__ = ["MobileOne", "checkpoint_filter_fn"]


class MobileOne(ByobNet):
    """MobileOne (Vasu et al., CVPR 2023, Table 7), with the interface of every timm backbone.

    Structure, arguments and state-dict keys are those of timm's own MobileOne, so checkpoints
    pass both ways. `load_state_dict` also takes Apple's keys, fused files of either kind (the
    model then takes its fused form) and checkpoints of a LightningModule that holds the network
    as `model`.

    Args:
        variant: The row of the family to build.
        num_classes: Classes of the head; 0 for none.
        in_chans: Channels of the input images.
        global_pool: timm's pooling name; "avg" by default.
        output_stride: Total stride of the features, 8, 16 or 32; less than 32 dilates.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly over the stages to this rate.
        act_layer: timm's activation name.
        norm_layer: timm's name of a BatchNorm; no other normalization folds.
        num_conv_branches: k of every block but the stem, instead of the variant's.
        use_scale: Whether 3×3 blocks train with a 1×1 "scale" branch.
        use_skip: Whether blocks train with a BatchNorm skip, where shapes permit.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        Input (N, in_chans, H, W), output (N, num_classes).

    Raises:
        ValueError: `output_stride` is not one of the above, `norm_layer` is not a BatchNorm, or a
            branch breaks a block's rule.
    """

    def __init__(
        self,
        variant: Variant,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str | None = None,
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: str = "relu",
        norm_layer: str = "batchnorm",
        num_conv_branches: int | None = None,
        use_scale: bool = True,
        use_skip: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_conv_branches is not None:
            variant = replace(variant, num_conv_branches=num_conv_branches)
        if output_stride not in (8, 16, 32):
            raise ValueError(f"`output_stride` (={output_stride}) must be 8, 16 or 32")
        cfg = ByoModelCfg(
            blocks=_stages(variant, use_scale, use_skip),
            stem_type="3x3",
            stem_pool=None,
            stem_chs=variant.stem_width,
            act_layer=act_layer,
            norm_layer=norm_layer,
        )
        layers = get_layer_fns(cfg)
        check_norm_factory(layers.norm_act)  # before ByobNet's own stem trips over it
        super().__init__(
            cfg,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            output_stride=output_stride,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )
        # ByobNet can build a stem of timm's block only
        self.stem = MobileOneBlock(
            in_chans,
            variant.stem_width,
            stride=2,
            use_scale=use_scale,
            layers=layers,
            device=device,
            dtype=dtype,
        )
        notice = FoldingNotice()
        for module in self.modules():
            if isinstance(module, MobileOneBlock):
                module.notice = notice
        self.register_load_state_dict_pre_hook(adapt_on_load)
        self.init_weights()

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def init_weights(self) -> None:
        """Set every parameter and buffer to its initial value (He normal, fan out, for kernels)."""
        for module in self.modules():
            _init_module(module)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load as torch does, from any known layout; weights that do not fit change nothing.

        Args:
            state_dict: The weights.
            strict: Whether all keys must match, once renamed.
            assign: Whether the model takes over the tensors themselves.

        Returns:
            torch's named tuple of missing and unexpected keys.

        Raises:
            RuntimeError: The weights do not fit.
        """
        if strict:
            check_strictly(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Convert a weight file before timm adapts it to other channels or classes (timm's hook).

    Args:
        state_dict: Weights in any known layout.
        model: The model that will load them.

    Returns:
        The weights under timm's names.
    """
    return convert_keys(state_dict)


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, std=(2.0 * module.groups / fan_out) ** 0.5)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    elif isinstance(module, _BatchNorm):
        module.reset_parameters()
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _stages(
    variant: Variant, use_scale: bool, use_skip: bool
) -> tuple[tuple[ByoBlockCfg, ...], ...]:
    """Each stage is a row of depthwise 3×3 and pointwise 1×1 blocks, in turn."""
    stages = []
    branches: dict[str, Any] = {
        "num_conv_branches": variant.num_conv_branches,
        "use_scale": use_scale,
        "use_skip": use_skip,
    }
    width_in = variant.stem_width
    rows = zip(variant.depths, variant.widths, variant.se_blocks, strict=True)
    for depth, width_out, num_se in rows:
        blocks: list[ByoBlockCfg] = []
        for index in range(depth):
            attn = "se" if index >= depth - num_se else None
            unit = partial(_cfg, branches=branches, attn=attn)
            stride = 2 if index == 0 else 1
            blocks.append(unit(kernel_size=3, width=width_in, group_size=1, stride=stride))
            blocks.append(unit(kernel_size=1, width=width_out, group_size=0, stride=1))
            width_in = width_out
        stages.append(tuple(blocks))
    return tuple(stages)


def _cfg(
    kernel_size: int,
    width: int,
    group_size: int,
    stride: int,
    branches: dict[str, Any],
    attn: str | None,
) -> ByoBlockCfg:
    build = partial(_build_block, kernel_size=kernel_size, **branches)
    # timm takes any partial here, whatever its annotation is
    return ByoBlockCfg(type=build, d=1, c=width, s=stride, gs=group_size, attn_layer=attn)  # type: ignore[arg-type]


def _build_block(
    in_chs: int,
    out_chs: int,
    kernel_size: int,
    dilation: tuple[int, int],
    group_size: int,
    use_scale: bool,
    use_skip: bool,
    bottle_ratio: float,
    downsample: str,
    drop_block: Any,
    **options: Any,
) -> MobileOneBlock:
    """Translate ByobNet's block arguments, of which the last three are for other kinds of blocks.

    A stage whose stride was traded for dilation starts with unequal dilations; its first block
    has no skip, as it has none with the stride, so that weights fit either way.
    """
    strided = dilation[0] != dilation[1]
    return MobileOneBlock(
        in_chs,
        out_chs,
        kernel_size=kernel_size,
        dilation=dilation[0] if kernel_size > 1 else 1,
        groups=in_chs // group_size if group_size else 1,
        use_scale=use_scale and kernel_size > 1,
        use_skip=False if strided or not use_skip else None,
        **options,
    )
