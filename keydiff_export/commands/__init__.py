"""The verbs behind the command line, each a typed function; the CLI only parses and prints."""
