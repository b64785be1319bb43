"""What a model keeps of its last forward pass: the backward pass of a loss on the client comes next, on the same data.

Only speed and memory depend on it, never a result.
"""

from __future__ import annotations

from collections.abc import Sequence

from cookbook.backend.decoder import Decoder
from cookbook.backend.trainer.compute import BatchResult, Datum, KeptForward, forward, forward_kept
from cookbook.losses import Kernel, LossConfig

__all__ = ["ForwardKeeper"]


class ForwardKeeper:
    """The last forward pass of one trained model, until the next operation on that model.

    After a pass that no backward pass followed, as in an evaluation, passes are made without a graph until one is
    followed again.
    """

    def __init__(self) -> None:
        self._last: KeptForward | None = None
        self._is_wanted = True

    def forward(self, decoder: Decoder, data: Sequence[Datum], kernel: Kernel, config: LossConfig) -> BatchResult:
        """As `compute.forward`."""
        self.drop()
        if self._is_wanted:
            result, self._last = forward_kept(decoder, data, kernel, config)
        else:
            result, self._last = forward(decoder, data, kernel, config), KeptForward(data)
        return result

    def take(self, data: Sequence[Datum]) -> KeptForward | None:
        """What is kept, for a backward pass on these data; None = nothing that fits. It is no longer held here."""
        last, self._last = self._last, None
        if last is None:
            return None
        self._is_wanted = last.fits(data)
        return last if self._is_wanted else None

    def drop(self) -> None:
        """Forget the pass: what comes next is no backward pass."""
        if self._last is not None:
            self._last, self._is_wanted = None, False
