"""`turboquant demo`: a real model answering from compressed caches, beside the uncompressed one."""
