"""The MobileOne family as data: one row a model."""

from dataclasses import dataclass

__all__ = ["BASE_WIDTHS", "VARIANTS", "Variant"]

BASE_WIDTHS = (64, 128, 256, 512)
"""Output channels of the four stages at width factor 1 (paper, Table 7; stages 4 and 5 merged)."""


@dataclass(frozen=True)
class Variant:
    """One row of the family.

    Attributes:
        depths: Number of depthwise-separable blocks in each of the four stages.
        alphas: Width factor of each stage; multiplies `BASE_WIDTHS`.
        num_conv_branches: Over-parameterization factor k of every block but the stem, which has 1.
        se_blocks: How many blocks, counted from the end of each stage, carry squeeze-and-excite.
    """

    depths: tuple[int, int, int, int]
    alphas: tuple[float, float, float, float]
    num_conv_branches: int = 1
    se_blocks: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def stem_width(self) -> int:
        """Stem channels as in the released code and weights, which cap Table 7's figure at 64."""
        return min(64, int(64 * self.alphas[0]))

    @property
    def widths(self) -> tuple[int, ...]:
        """Output channels of the four stages."""
        return tuple(int(c * a) for c, a in zip(BASE_WIDTHS, self.alphas, strict=True))


VARIANTS: dict[str, Variant] = {
    # Vasu et al., CVPR 2023, Table 7. Depths: its stages 2, 3, 4 + 5, 6.
    "mobileone_s0": Variant((2, 8, 10, 1), (0.75, 1.0, 1.0, 2.0), num_conv_branches=4),
    "mobileone_s1": Variant((2, 8, 10, 1), (1.5, 1.5, 2.0, 2.5)),
    "mobileone_s2": Variant((2, 8, 10, 1), (1.5, 2.0, 2.5, 4.0)),
    "mobileone_s3": Variant((2, 8, 10, 1), (2.0, 2.5, 3.0, 4.0)),
    "mobileone_s4": Variant((2, 8, 10, 1), (3.0, 3.5, 3.5, 4.0), se_blocks=(0, 0, 5, 1)),
    # Table 13 publishes the micro variants' counts, not their layouts or weights. These layouts
    # are reconstructed: mu1 and mu2 give the printed parameters and MACs; mu0 is inexact
    # (0.559 M / 68.9 M against 0.57 M / 68 M). k is an assumption as well.
    "mobileone_mu0": Variant((2, 4, 6, 1), (0.75, 0.5, 0.5, 0.75), num_conv_branches=3),
    "mobileone_mu1": Variant((2, 6, 8, 1), (0.75, 0.75, 0.75, 1.0), num_conv_branches=2),
    "mobileone_mu2": Variant((2, 6, 8, 1), (0.75, 1.0, 1.0, 1.0), num_conv_branches=2),
}
