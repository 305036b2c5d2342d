"""Block pruning of vision transformers (LPViT): scores, allocation under a cost, block-sparse layers."""

from lynceus.rewrite.block_prune.allocate import Allocation as Allocation
from lynceus.rewrite.block_prune.allocate import allocate as allocate
from lynceus.rewrite.block_prune.energy import joules_per_image as joules_per_image
from lynceus.rewrite.block_prune.mlp import BlockSparseMlp as BlockSparseMlp
from lynceus.rewrite.block_prune.report import sparsity_report as sparsity_report
from lynceus.rewrite.block_prune.rewrite import BlockPrune as BlockPrune
from lynceus.rewrite.block_prune.rewrite import KeptBlocks as KeptBlocks
from lynceus.rewrite.block_prune.rewrite import prune as prune
from lynceus.rewrite.block_prune.sparse import BlockSparseConv as BlockSparseConv
from lynceus.rewrite.block_prune.sparse import BlockSparseLinear as BlockSparseLinear
