"""Key means, given to layers before anything is stored: of a calibration file, or of the texts that ship."""
