"""The sections of the config, one module each, with the checks within a section."""
