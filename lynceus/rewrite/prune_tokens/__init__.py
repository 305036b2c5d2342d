"""Token pruning of Vim and PlainMamba that keeps every token's place. See `PruneTokens`."""

from lynceus.rewrite.prune_tokens.networks import Cuts as Cuts
from lynceus.rewrite.prune_tokens.rewrite import PruneTokens as PruneTokens
