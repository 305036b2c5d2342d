"""N2N learning: recurrent policies make a trained network smaller, first layer by layer, then size by size.

Ashok, Rhinehart, Beainy, Kitani: N2N Learning: Network to Network Compression via Policy Gradient Reinforcement
Learning, ICLR 2018, arXiv 1709.06030. Reference code: anubhavashok/N2N (CC BY-NC-SA 4.0; read for facts).
"""

from lynceus.search.policy.compress import Compressed, PolicyConfig, compress
from lynceus.search.policy.files import load_policy, save_policy
from lynceus.search.policy.reinforce import ReinforceConfig
from lynceus.search.policy.reward import Reward, compression_reward, softness
from lynceus.search.policy.scoring import DistilConfig
from lynceus.search.policy.sequences import RemovalPolicy, ShrinkPolicy, features

__all__ = [
    "Compressed",
    "DistilConfig",
    "PolicyConfig",
    "ReinforceConfig",
    "RemovalPolicy",
    "Reward",
    "ShrinkPolicy",
    "compress",
    "compression_reward",
    "features",
    "load_policy",
    "save_policy",
    "softness",
]
