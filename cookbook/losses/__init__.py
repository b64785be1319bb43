"""Loss formulas with one shared record for input and output. What a trainer does with their gradient is not here."""

from cookbook.losses.kernels import KERNELS
from cookbook.losses.records import ConfigKey, Kernel, LossConfig, LossInput, LossOutput

__all__ = ["KERNELS", "ConfigKey", "Kernel", "LossConfig", "LossInput", "LossOutput"]
