"""Raw copies of a paged cache's first and newest tokens, which are attended to instead of their codes."""

from turboquant_core.ops.raw_copies.api import copy_update
from turboquant_core.ops.raw_copies.table import CopyTable

__all__ = ["CopyTable", "copy_update"]
