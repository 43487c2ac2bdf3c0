"""`turboquant calibrate`: what keys of every layer go through, measured on texts, in a file."""
