"""Studies: runnable claims of papers, each with a protocol fixed in advance and a negative control that must fail."""
