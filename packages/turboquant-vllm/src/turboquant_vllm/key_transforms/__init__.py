"""What keys go through, settled before anything is stored: of a calibration file, or means of the texts that ship."""
