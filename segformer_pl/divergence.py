"""Stop a training as soon as its weights are not finite, before they are evaluated or saved.

Steps after the first nan are wasted, and a checkpoint with nan that replaces the last good one
loses the run.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from segformer_pl.checkpoints import describe_non_finite, non_finite
from segformer_pl.errors import Diverged

# Number of consecutive non-finite losses that end a training. A single one may be a bad batch in
# float16, whose step the gradient scaler skips. The scaler halves its scale with every skip, so
# after 40 in a row no usable scale is left.
PATIENCE = 40


class DivergenceWatch:
    """Check of weights and loss after every optimiser step.

    The weights are checked rather than the gradients, because a gradient scaler in float16 lets
    gradients overflow by design: it skips those steps, and the weights stay finite. Weights are
    equal on all ranks of ``ddp``, so all ranks stop at the same step.

    On a GPU the check of a step is read only after the next step has been queued, so the host
    never waits for the device.
    """

    def __init__(self) -> None:
        self._pending: tuple[nn.Module, int, float, Tensor, Tensor, torch.cuda.Event | None] | None
        self._pending = None
        self._num_bad_losses = 0

    @torch.no_grad()
    def observe(self, network: nn.Module, step: int, loss: Tensor, lr: float) -> None:
        """Queue the check of a step, after evaluating that of the step before.

        Args:
            network: Network after the step.
            step: Number of the step.
            loss: Training loss of the step, a scalar.
            lr: Largest learning rate of the step.

        Raises:
            UserError: The weights are not finite, or none of the last ``PATIENCE`` losses is.
        """
        self.check_pending()
        # The norm may overflow although all weights are finite, so an infinite norm leads to a
        # check of every weight.
        norm = get_total_norm([parameter.detach() for parameter in network.parameters()])
        is_finite = torch.stack([norm.isfinite(), loss.isfinite()])
        event = None
        if is_finite.is_cuda:
            is_finite = is_finite.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (network, step, lr, loss, is_finite, event)
        if event is None:
            self.check_pending()

    def check_pending(self) -> None:
        """Evaluate the check of the last observed step.

        Raises:
            UserError: As in :meth:`observe`.
        """
        if self._pending is None:
            return
        network, step, lr, loss, is_finite, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        finite_norm, finite_loss = is_finite.tolist()
        if not finite_norm and (counts := non_finite(dict(network.named_parameters()))):
            raise divergence_error(f"the network has {describe_non_finite(counts)}", step, loss, lr)
        self._num_bad_losses = 0 if finite_loss else self._num_bad_losses + 1
        if self._num_bad_losses >= PATIENCE:
            raise divergence_error(
                f"the last {PATIENCE} losses were nan or infinite", step, loss, lr
            )


def divergence_error(what: str, step: int, loss: Tensor | None, lr: float | None) -> Diverged:
    """Build the error that ends a diverged training.

    Args:
        what: What is not finite, a clause.
        step: Number of the last step.
        loss: Training loss of that step, a scalar, if there is one.
        lr: Largest learning rate of that step, if there is one.
    """
    values = [f"loss {loss.item():g}"] if loss is not None else []
    values += [f"largest learning rate {lr:g}"] if lr is not None else []
    described = f" ({', '.join(values)})" if values else ""
    return Diverged(
        f"the training diverged: after step {step}{described} {what}; earlier checkpoints are "
        "unchanged: resume from one of them, or restart if there is none, with "
        "a smaller --model.lr, a longer --model.warmup_steps or --trainer.gradient_clip_val 1, or "
        "in bf16-mixed if this was 16-mixed"
    )
