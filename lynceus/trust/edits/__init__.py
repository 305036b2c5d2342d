"""Edits of masked objects: size, direction, position, background, complexity; and the audit that asks a model of each.

ImageNet-E: Benchmarking Neural Network Robustness via Attribute Editing, CVPR 2023, arXiv 2303.17096.

edited = edit(sample, size=0.1, angle=30, position="random", complexity=0.5)   # -> Sample
report = audit(subject, samples)                                              # -> Report
"""

from lynceus.trust.edits.audits import Edits as Edits
from lynceus.trust.edits.audits import audit as audit
from lynceus.trust.edits.diffusion import Denoiser as Denoiser
from lynceus.trust.edits.find import find_mask as find_mask
from lynceus.trust.edits.scene import Scene as Scene
from lynceus.trust.edits.scene import edit as edit
from lynceus.trust.edits.settings import Setting as Setting
from lynceus.trust.edits.settings import setting as setting
from lynceus.trust.edits.spectrum import complexity as complexity

__all__ = ["Denoiser", "Edits", "Scene", "Setting", "audit", "complexity", "edit", "find_mask", "setting"]
