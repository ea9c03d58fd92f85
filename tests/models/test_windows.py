"""Windows of tokens, compared with timm's."""

import torch
from timm.models import swin_transformer

from segformer_pl.models.windows import window_partition, window_reverse


def test_windows_are_those_of_timm_and_return_to_the_map():
    tokens = torch.randn(2, 6, 20, 3, dtype=torch.float64)
    windows = window_partition(tokens, (3, 4))
    torch.testing.assert_close(
        windows, swin_transformer.window_partition(tokens, (3, 4)), rtol=0, atol=0
    )
    torch.testing.assert_close(window_reverse(windows, (3, 4), 6, 20), tokens, rtol=0, atol=0)
