"""Windows of a map of tokens, for attention within each of them."""

from torch import Tensor

Window = tuple[int, int]  # height and width in tokens


def window_partition(tokens: Tensor, window: Window) -> Tensor:
    """Divide tokens (B, H, W, C) into windows (B * number of windows, *window, C), row by row.

    The windows have to divide the map.
    """
    rows, columns = window
    by_window = tokens.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
    return by_window.flatten(0, 2)


def window_reverse(windows: Tensor, window: Window, height: int, width: int) -> Tensor:
    """Return the tokens (B, height, width, C) of which :func:`window_partition` made windows."""
    rows, columns = window
    by_window = windows.unflatten(0, (-1, height // rows, width // columns))
    return by_window.transpose(2, 3).flatten(3, 4).flatten(1, 2)
