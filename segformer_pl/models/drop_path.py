"""Stochastic depth."""

from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): leave a residual branch out for some of the samples.

    In training, each sample's branch is 0 with the given probability and otherwise scaled so that
    its expectation stays the same. The random numbers are those of ``timm.layers.DropPath``, whose
    import takes longer than that of torch.

    Args:
        drop_prob: Probability in 0 to 1.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, branch: Tensor) -> Tensor:
        """Return the branch (B, ...) without some of its B samples; the shape stays the same."""
        if not self.training or self.drop_prob == 0:
            return branch
        keep_prob = 1 - self.drop_prob
        factor = branch.new_empty(len(branch), *(1,) * (branch.dim() - 1)).bernoulli_(keep_prob)
        if keep_prob > 0:
            factor /= keep_prob
        return branch * factor

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"
