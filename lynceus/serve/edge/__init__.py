"""Edge: a split model on several devices at once, each a process of its own, over a small TCP protocol.

cluster = deploy(plan); cluster(images); cluster.status(); cluster.restart("device1"); cluster.close()
"""

from lynceus.serve.edge.cluster import Answer as Answer
from lynceus.serve.edge.cluster import Cluster as Cluster
from lynceus.serve.edge.cluster import EdgeConfig as EdgeConfig
from lynceus.serve.edge.cluster import Timed as Timed
from lynceus.serve.edge.cluster import deploy as deploy

__all__ = ["Answer", "Cluster", "EdgeConfig", "Timed", "deploy"]
