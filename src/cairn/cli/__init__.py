"""The command line: one module per command, each a thin layer on a public function. No logic here."""
