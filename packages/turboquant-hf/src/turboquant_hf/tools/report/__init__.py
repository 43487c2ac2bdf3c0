"""`turboquant report`: run files of `turboquant eval` as a page, and as a part of a model card."""
