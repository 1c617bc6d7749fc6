"""What a base looks like, and whether another one is the same: told by sampled weights.

`compare(sketch, FileWeights(directory))` needs no torch; `memory` has what reads a model.
"""

from lamina.checkpoint.sketch.files import FileWeights, sketch_files
from lamina.checkpoint.sketch.likeness import Likeness, Over, compare

__all__ = ["FileWeights", "Likeness", "Over", "compare", "sketch_files"]
