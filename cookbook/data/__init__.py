"""Training data: JSON-lines rows, their rendering to tokens and weights, the order they are trained in, and reports.

Importing this needs numpy only; a tokenizer is given by the caller (cookbook.models.load_tokenizer).
"""

from cookbook.data.dataset import Batch, SFTDataset
from cookbook.data.epochs import START, EpochPlan, Position
from cookbook.data.jsonl import JsonlFile
from cookbook.data.pairs import RenderedPair, render_pair
from cookbook.data.preflight import PreflightReport, preflight_report
from cookbook.data.preview import preview
from cookbook.data.procedural import make_preference_task, make_rl_task, make_task
from cookbook.data.rendering import TRAIN_ON_WHAT, RenderedRow, Renderer
from cookbook.data.report import TokenQuantiles

__all__ = [
    "START",
    "TRAIN_ON_WHAT",
    "Batch",
    "EpochPlan",
    "JsonlFile",
    "Position",
    "PreflightReport",
    "RenderedPair",
    "RenderedRow",
    "Renderer",
    "SFTDataset",
    "TokenQuantiles",
    "make_preference_task",
    "make_rl_task",
    "make_task",
    "preflight_report",
    "preview",
    "render_pair",
]
