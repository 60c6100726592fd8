"""Values that are no numbers: the stage that gave them is computed once more in float32, or the run ends by name."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Values, and the precision that they were computed in; told whether it is to be float32.
Attempt = Callable[[bool], tuple[tuple[Tensor, ...], str]]


class NanGuard:
    """Of one run. retries: the stages that were computed again; notices: what a user is told of it."""

    def __init__(self, model: str) -> None:
        self.retries: list[str] = []
        self.notices: list[str] = []
        self._model = model

    def finite(self, stage: str, attempt: Attempt) -> tuple[Tensor, ...]:
        """What ``attempt`` gives, once all of it is finite.

        Half precision overflows where float32 does not, so a second attempt is worth its time; after one in float32 it
        would give the same again. Raises FloatingPointError, naming the model and the stage.
        """
        values, precision = attempt(False)
        if _finite(values):
            return values
        told, again = f"{stage} gave values that are no numbers", ""
        if precision != "float32":
            log.warning("%s: %s in %s; once more in float32", self._model, told, precision)
            again = f", in {precision} and once more in float32"
            del values
            values, _ = attempt(True)
            if _finite(values):
                self.retries.append(stage)
                self.notices.append(f"{told} in {precision}, and was done again in float32")
                return values
        raise FloatingPointError(f"{self._model}: {told}{again}; no picture was made")


def _finite(values: tuple[Tensor, ...]) -> bool:
    # The ends tell of any NaN or infinity, in one look where isfinite takes several.
    return all(bool(torch.stack(torch.aminmax(value)).isfinite().all()) for value in values)
