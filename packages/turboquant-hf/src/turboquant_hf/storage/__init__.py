"""What is stored of a layer, and how: codes in pages, full-precision tokens, length and padding."""
