"""Stop a training whose weights are no longer finite, before they are scored or written.

Everything that follows the first nan is lost time, and a checkpoint with nan in it, written over
the last good one, is a lost run.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from segformer_pl.checkpoints import describe_non_finite, non_finite
from segformer_pl.errors import UserError

# A loss that is not finite once can be one bad batch in float16, whose step the gradient scaler
# skips. Scalers halve their scale with every skip: after so many in a row nothing is left of it.
PATIENCE = 40


class DivergenceWatch:
    """Looks at the weights and the loss of every step.

    Weights tell more than gradients or losses: where float16 is trained with a gradient scaler,
    gradients overflow by design and their steps are skipped, so that the weights stay finite. They
    are the same on all ranks of ``ddp``, which therefore stop at the same step.

    On a GPU nothing is waited for that is not done already: a step is judged when the next one has
    been queued.
    """

    def __init__(self) -> None:
        self._pending: tuple[nn.Module, int, float, Tensor, Tensor, torch.cuda.Event | None] | None
        self._pending = None
        self._num_bad_losses = 0

    @torch.no_grad()
    def observe(self, network: nn.Module, step: int, loss: Tensor, lr: float) -> None:
        """Take note of a network after a step, and judge the step before.

        Args:
            network: The network.
            step: Number of the step.
            loss: Its loss.
            lr: Its largest learning rate.

        Raises:
            UserError: A step left weights that are not finite, or none of the last
                ``PATIENCE`` losses was.
        """
        self.settle()
        # Infinite also if it overflows. Then the weights are looked at one by one.
        norm = get_total_norm([parameter.detach() for parameter in network.parameters()])
        is_finite = torch.stack([norm.isfinite(), loss.isfinite()])
        event = None
        if is_finite.is_cuda:
            is_finite = is_finite.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (network, step, lr, loss, is_finite, event)
        if event is None:
            self.settle()

    def settle(self) -> None:
        """Judge the last step that was observed.

        Raises:
            UserError: See :meth:`observe`.
        """
        if self._pending is None:
            return
        network, step, lr, loss, is_finite, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        finite_norm, finite_loss = is_finite.tolist()
        if not finite_norm and (counts := non_finite(dict(network.named_parameters()))):
            raise divergence(f"the network has {describe_non_finite(counts)}", step, loss, lr)
        self._num_bad_losses = 0 if finite_loss else self._num_bad_losses + 1
        if self._num_bad_losses >= PATIENCE:
            raise divergence(f"the last {PATIENCE} losses were nan or infinite", step, loss, lr)


def divergence(what: str, step: int, loss: Tensor | None, lr: float | None) -> UserError:
    """The error for a training that diverged, in one sentence."""
    known = [f"loss {loss.item():g}"] if loss is not None else []
    known += [f"largest learning rate {lr:g}"] if lr is not None else []
    described = f" ({', '.join(known)})" if known else ""
    return UserError(
        f"the training diverged: after step {step}{described} {what}; what was written before "
        "is kept as it is: go on from an earlier checkpoint, or start anew if there is none, with "
        "a smaller --model.lr, a longer --model.warmup_steps or --trainer.gradient_clip_val 1, or "
        "in bf16-mixed if this was 16-mixed"
    )
