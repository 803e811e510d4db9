"""Selection of data: by quality, and by what a source is worth."""
