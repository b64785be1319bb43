"""Models on this machine: pulling them, finding them by name, loading their tokenizers."""

from cookbook.models.catalogue import CATALOGUE, CatalogueEntry
from cookbook.models.folders import ModelFolder, check_model_folder, context_length, list_models, resolve_model
from cookbook.models.pull import pull, pull_entry
from cookbook.models.tokenizer import load_tokenizer, tokenizer_fingerprint

__all__ = [
    "CATALOGUE",
    "CatalogueEntry",
    "ModelFolder",
    "check_model_folder",
    "context_length",
    "list_models",
    "load_tokenizer",
    "pull",
    "pull_entry",
    "resolve_model",
    "tokenizer_fingerprint",
]
