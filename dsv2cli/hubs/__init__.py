"""Where models come from and where they lie: names, copies on disk, downloads. Needs no torch."""
