"""Words: sentences of which each word has a tag."""
