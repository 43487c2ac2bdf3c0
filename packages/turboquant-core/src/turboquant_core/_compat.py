"""What differs between the supported versions of Triton."""

from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Renamed after 3.6.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
