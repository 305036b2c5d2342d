"""ED-ViT: a trained vision transformer split by classes into sub-models for weak devices that run at once.

Liu, Li, Li and Deng, ED-ViT: Splitting Vision Transformer for Distributed Inference on Edge Devices (later: Efficient
Partitioning Vision Transformer on Edge Devices for Distributed Inference), 2024, arXiv 2410.11650. No code is public;
written from the paper's description.

plan = split(model, devices, data, budget)   # classes, pruning, places, fusion
plan.report(); plan.save(FOLDER); plan(images)
"""

from lynceus.rewrite.split.assign import Budget as Budget
from lynceus.rewrite.split.assign import Device as Device
from lynceus.rewrite.split.assign import InfeasibleError as InfeasibleError
from lynceus.rewrite.split.cut import Cut as Cut
from lynceus.rewrite.split.make import Split as Split
from lynceus.rewrite.split.make import SplitConfig as SplitConfig
from lynceus.rewrite.split.make import split as split
from lynceus.rewrite.split.plan import Plan as Plan
from lynceus.rewrite.split.retrain import Retrain as Retrain

__all__ = ["Budget", "Cut", "Device", "InfeasibleError", "Plan", "Retrain", "Split", "SplitConfig", "split"]
