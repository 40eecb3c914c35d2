"""Commands on several runs of one config."""
