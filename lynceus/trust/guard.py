"""What every check of this room looks at before long work; the work is done in `lynceus.core.guard`."""

from lynceus.core.guard import Material as Material
from lynceus.core.guard import collect as collect
from lynceus.core.guard import examine as examine
from lynceus.core.guard import first_not_finite as first_not_finite
from lynceus.core.guard import fitted as fitted
from lynceus.core.guard import looks_like_probabilities as looks_like_probabilities
