"""All built-in loss kernels by their name on the wire, with their config keys and defaults."""

from __future__ import annotations

from collections.abc import Mapping

from cookbook.losses.cross_entropy import cross_entropy
from cookbook.losses.policy import cispo, dapo, dro, gspo, importance_sampling, ppo
from cookbook.losses.records import ConfigKey, Kernel

__all__ = ["KERNELS"]

_POLICY_INPUTS = ("old_logprobs", "advantages")
_MAX_LOG_CAP = 80.0  # exp(88.7) is the largest finite float32
_RATIO_LOG_CAP = ConfigKey(20.0, maximum=_MAX_LOG_CAP)


def _clip(low: float, high: float) -> dict[str, ConfigKey]:
    return {"clip_low_threshold": ConfigKey(low), "clip_high_threshold": ConfigKey(high)}


_ALL = (
    Kernel("cross_entropy", cross_entropy, ("weights",), "weights"),
    Kernel("importance_sampling", importance_sampling, _POLICY_INPUTS, "advantages", {"ratio_log_cap": _RATIO_LOG_CAP}),
    Kernel("ppo", ppo, _POLICY_INPUTS, "advantages", {**_clip(0.8, 1.2), "ratio_log_cap": _RATIO_LOG_CAP}),
    Kernel("cispo", cispo, _POLICY_INPUTS, "advantages", {**_clip(0.8, 1.28), "ratio_log_cap": _RATIO_LOG_CAP}),
    Kernel("dro", dro, _POLICY_INPUTS, "advantages", {"beta": ConfigKey(0.05)}),
    Kernel(
        "dapo",
        dapo,
        _POLICY_INPUTS,
        "advantages",
        {**_clip(0.8, 1.28), "ratio_log_cap": _RATIO_LOG_CAP, "eps_clip_c": ConfigKey(None, minimum=1.0)},
    ),
    # The paper's range, section 5.1: sequence ratios stay far closer to 1 than token ratios do.
    Kernel(
        "gspo",
        gspo,
        _POLICY_INPUTS,
        "advantages",
        {**_clip(1 - 3e-4, 1 + 4e-4), "seq_ratio_log_cap": ConfigKey(10.0, maximum=_MAX_LOG_CAP)},
    ),
)

KERNELS: Mapping[str, Kernel] = {kernel.name: kernel for kernel in _ALL}
"""Name on the wire to kernel."""
