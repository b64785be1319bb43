"""Our side of part `sft`: steps through the official client and the embedded backend. Prints one JSON line."""

from __future__ import annotations
