"""Several updates of one layer into one: a row per method, each with the error it makes.

Everything works on the factors; a dense matrix is formed only for methods that choose among the
entries of the update itself (`ties_svd`, `dare_*_svd`, `magnitude_prune_svd`), a layer at a time.
"""

from lamina.engine.combine.compress import Compressed, compress, distance
from lamina.engine.combine.layer import Combined, Part, combine
from lamina.engine.combine.methods import METHODS, Method, Settings, method_of, register
from lamina.engine.combine.truncate import Truncated, truncate_dense, truncate_product

__all__ = [
    "METHODS",
    "Combined",
    "Compressed",
    "Method",
    "Part",
    "Settings",
    "Truncated",
    "combine",
    "compress",
    "distance",
    "method_of",
    "register",
    "truncate_dense",
    "truncate_product",
]
