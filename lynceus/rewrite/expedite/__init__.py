"""Expedite: dense-prediction transformers on fewer tokens, without training. See `Expedite` and the two operators."""

from lynceus.rewrite.expedite.operators import Clustering as Clustering
from lynceus.rewrite.expedite.operators import cluster as cluster
from lynceus.rewrite.expedite.operators import naive_unpool as naive_unpool
from lynceus.rewrite.expedite.operators import reconstruction_weights as reconstruction_weights
from lynceus.rewrite.expedite.rewrite import Expedite as Expedite
